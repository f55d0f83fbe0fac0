# SPDX-License-Identifier: GPL-2.0-or-later
"""The kinds of encrypted uppers: which one a directory is, and how it is seen as it is.

Owns what gocryptfs.py and fscrypt.py have in common.  Called by opening.py and the verbs of stores.
"""

import contextlib
import os
from collections.abc import Iterator

from unionfs.errors import InUse
from unionfs.passphrase import Ask
from unionfs.stores import fscrypt, gocryptfs
from unionfs.stores.volume import Volume

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def kind_of(directory: int) -> str:
    """How an open directory (O_PATH will do) is encrypted; empty if it is not."""
    if gocryptfs.is_encrypted(directory):
        return gocryptfs.KIND
    return fscrypt.KIND if fscrypt.is_encrypted(directory) else ""


def hides(directory: int) -> str:
    """How, if nothing can be read in it as it is."""
    if gocryptfs.is_encrypted(directory):
        return gocryptfs.KIND
    return fscrypt.KIND if fscrypt.is_locked(directory) else ""


def name_of(volume: Volume, inside: str) -> str:
    """For messages and questions."""
    source = volume.locator.source
    return source if inside == "/" else f"{source}:{inside}"


def in_use(volume: Volume, inside: str, directory: int) -> InUse:
    """The error that a union has an upper, which is open."""
    from unionfs.stores.inspect import read_record

    record = read_record(directory)
    return InUse(
        name_of(volume, inside),
        volume.path,
        directory=inside,
        identity=None if record is None else record.uuid,
    )


def mount(volume: Volume, inside: str, directory: int, ask: Ask, *, readonly: bool) -> Volume:
    """What gocryptfs shows of a cipher directory, which is open as `directory` (O_PATH will do)."""
    held = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    try:
        helper = gocryptfs.start(held, name_of(volume, inside), ask, readonly=readonly)
    finally:
        os.close(held)
    contents, device = volume.contents, volume.device
    return Volume(volume.locator, contents, device, helper.root, readonly, helper)


@contextlib.contextmanager
def shown(
    volume: Volume, inside: str, directory: int, ask: Ask | None, *, readonly: bool
) -> Iterator[int]:
    """An encrypted directory as it is, open; the caller has the lock of one of fscrypt.

    `ask`: not needed for one that hides nothing.
    """
    if kind_of(directory) == fscrypt.KIND:
        fscrypt.unlock(directory, name_of(volume, inside), ask, volume.keys)
        yield directory
        return
    assert ask is not None
    plain = mount(volume, inside, directory, ask, readonly=readonly)
    try:
        upper = os.open(".", _OPEN, dir_fd=plain.root)
        try:
            yield upper
        finally:
            os.close(upper)
    finally:
        plain.close()
