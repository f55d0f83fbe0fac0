# SPDX-License-Identifier: GPL-2.0-or-later
"""Encrypting a store: an upper is copied into a new encrypted directory, which takes its place.

Owns the order.  How one directory takes another's place is replacing.py's, as for a restore: by one
call, with the old one kept beside.  Called by `unionfs store encrypt`.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator

from unionfs import locator
from unionfs.errors import UnionfsError, usage_error
from unionfs.format import AREA_NAME
from unionfs.mounts import read_mounts
from unionfs.stores import archive, backing, belonging, foreign, fscrypt, gocryptfs, mounted_base
from unionfs.stores.archive import Advance
from unionfs.stores.backing import Chosen
from unionfs.stores.base import describe
from unionfs.stores.replacing import replace
from unionfs.stores.volume import open_volume

_NEW_MODE = 0o755


def place_of(store: str, lower: str | None) -> tuple[str, os.stat_result | None]:
    """Where the upper lies or will lie, and what a new one is to be like.

    `lower`: the base that it is for, which says so where a union would make it.
    """
    if lower is None:
        return store, None
    where = locator.parse(store)
    if locator.is_directory(store) or where.directory is not None:
        raise usage_error("--base is for an image or a device", "leave it out")
    with contextlib.ExitStack() as stack:
        base = open_volume(lower, readonly=True, untouched=True, search="images")
        stack.callback(base.close)
        if base.contents is not None:
            own = describe(base.locator, base.contents)
        else:
            own = mounted_base.describe(base.locator, base.mountpoint, read_mounts())
        volume = open_volume(store, readonly=True, untouched=True, search="images")
        stack.callback(volume.close)
        inside = belonging.default_directory(volume, own, base.locator)
        return f"{where.source}:{inside}", os.stat(".", dir_fd=base.root)


def refuse_encrypted(upper: Chosen) -> None:
    """Raise an error if there is nothing to do."""
    if upper.encrypted:
        changes = upper.encrypted == gocryptfs.KIND
        hint = "gocryptfs -passwd changes its passphrase" if changes else "there is nothing to do"
        raise UnionfsError(f"{upper.name} is encrypted already ({upper.encrypted})", hint=hint)


def encrypt(
    upper: Chosen,
    secret: bytearray,
    like: os.stat_result | None,
    advance: Advance,
    *,
    kind: str,
    keep: bool,
) -> str | None:
    """Put an encrypted upper in the place of a plain one; where that is kept, if it is."""
    there = os.listdir(upper.fd)

    def fill(into: str) -> None:
        if kind == fscrypt.KIND:
            source = f"/proc/{os.getpid()}/fd/{upper.fd}"
            encrypt_by_fscrypt(upper, into, secret, lambda: archive.copy(source, into, advance))
        else:
            _encrypt_by_gocryptfs(upper, into, secret, advance)
        if not there:
            _become(upper, into, like)

    keep = keep and bool(set(there) - {AREA_NAME})
    return replace(upper, fill, keep=keep, hint=foreign.BY_NO_DISCARD, encrypted=True)


def encrypt_by_fscrypt(
    upper: Chosen, into: str, secret: bytearray, fill: Callable[[], None]
) -> None:
    """Have an empty directory encrypted, and filled; it is unlocked as long as the volume is."""
    fd = os.open(into, os.O_RDONLY | os.O_DIRECTORY)
    try:
        made_of = fscrypt.make(fd, upper.name, secret, upper.volume.keys)
        fill()
        fscrypt.remember(fd, made_of)
    finally:
        os.close(fd)


def _encrypt_by_gocryptfs(upper: Chosen, into: str, secret: bytearray, advance: Advance) -> None:
    cipher = os.open(into, os.O_RDONLY | os.O_DIRECTORY)
    try:
        gocryptfs.init(cipher, upper.name, secret)
        _copy(upper, cipher, secret, advance)
    finally:
        os.close(cipher)


def _copy(upper: Chosen, cipher: int, secret: bytearray, advance: Advance) -> None:
    own = f"/proc/{os.getpid()}/fd"
    with opened_by_gocryptfs(cipher, upper.name, secret) as plain:
        archive.copy(f"{own}/{upper.fd}", f"{own}/{plain}", advance)


@contextlib.contextmanager
def opened_by_gocryptfs(cipher: int, name: str, secret: bytearray) -> Iterator[int]:
    """What a cipher directory has in it; an error if not all that is written there got there.

    If it is locked, then by the caller, exclusively and by this descriptor.
    """
    helper = gocryptfs.start(cipher, name, lambda _: secret[:], readonly=False)
    try:
        yield helper.root
    except BaseException:
        helper.close()
        raise
    finally:
        written = helper.close()
        os.close(helper.root)
    if not written:
        raise UnionfsError(f"cannot encrypt {name}: gocryptfs ended with an error")


def _become(upper: Chosen, into: str, like: os.stat_result | None) -> None:
    """A new upper's root becomes the union's."""
    made = stat.S_IMODE(os.fstat(upper.fd).st_mode)
    if like is not None:
        if os.geteuid() == 0:
            os.chown(into, like.st_uid, like.st_gid)
        os.chmod(into, stat.S_IMODE(like.st_mode))
    elif upper.volume.contents is not None and made == backing.PRIVATE:
        os.chmod(into, _NEW_MODE)
