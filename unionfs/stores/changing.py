# SPDX-License-Identifier: GPL-2.0-or-later
"""Cloning an upper to another store, and resetting one to its base.

Owns what of an upper is its own and not its copy's, and what a path's reset takes away.  An upper
that is taken away is kept beside, as NAME.before-DATE, unless it is told otherwise.
"""

import contextlib
import errno
import os
import shutil
import stat
from typing import Final

from unionfs.errors import UnionfsError, usage_error
from unionfs.format import AREA_NAME
from unionfs.identity import FILE, StoreRecord, new_record
from unionfs.locator import Locator
from unionfs.passphrase import Ask, wiped
from unionfs.removal import remove_tree
from unionfs.stores import archive, find, foreign, fscrypt, gocryptfs
from unionfs.stores import kept as names
from unionfs.stores.archive import Advance
from unionfs.stores.backing import Chosen, give_id, refuse_bound
from unionfs.stores.encrypting import encrypt_by_fscrypt, opened_by_gocryptfs
from unionfs.stores.inspect import read_record
from unionfs.stores.mounted import is_same
from unionfs.stores.replacing import not_removed, replace
from unionfs.stores.tools import uninterrupted
from unionfs.syscalls import exists

_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def refuse_used(source: Chosen) -> None:
    """Raise an error if a union has it, or if no copy of it can be what it is."""
    refuse_bound(source)
    foreign.refuse_divided(source)
    if source.in_use:
        raise source.in_use_by_a_union()


def clone(source: Chosen, target: Chosen, advance: Advance) -> None:
    """Copy an upper that no union uses to an empty place; the copy is a store of its own."""
    if set(os.listdir(target.fd)) - target.not_its_own() or target.encrypted:
        hint = "name a directory that is not there yet, by :/dir"
        raise UnionfsError(f"{target.name} is not empty: it is not overwritten", hint=hint)

    def fill(into: str) -> None:
        path = f"/proc/{os.getpid()}/fd/{source.fd}"
        try:
            archive.copy(path, into, advance, source.not_its_own())
        except UnionfsError as exc:  # of tar
            exc.message = f"cannot clone {source.name} to {target.name}: {exc.message}"
            raise
        give_id(into, None)

    replace(target, fill, keep=False)


def refuse_same(source: Chosen, new: Locator) -> None:
    """Raise an error if the copy would go to the image or device that it is read from.

    Its file system is mounted for reading only.
    """
    volume = source.volume
    path = new.value if new.tag is None else find.find(new, search="images")
    if volume.contents is not None and is_same(volume.path, path):
        what = f"{source.name} and {new.text} are in one file system"
        raise UnionfsError(what, hint="clone it to a directory elsewhere first, and that to it")


def default_directory(source: Chosen) -> str:
    """Where a clone lies in a file system of its own."""
    if source.directory != "/":
        return source.directory
    record = read_record(source.fd)
    if record is None or record.base is None:
        hint = "name the directory: IMAGE:/dir"
        raise usage_error(f"it is not known which base {source.name} belongs to", hint)
    from unionfs.stores.base import default_directory

    return default_directory(record.base.name)


def reset(upper: Chosen, ask: Ask, *, keep: bool, known: bool = False) -> str | None:
    """Put an empty upper, with the root's owner and mode and the same record, in the place of one.

    That of an encrypted one has the same passphrase, for which is asked where it makes the key.
    For gocryptfs it need not be known; but then the record cannot be read either.
    """
    foreign.refuse_divided(upper)
    status = os.fstat(upper.fd)
    record = read_record(upper.fd) or new_record(None)

    def fill(into: str) -> None:
        if upper.encrypted == gocryptfs.KIND:
            for name in gocryptfs.OWN_FILES:
                shutil.copy2(f"/proc/self/fd/{upper.fd}/{name}", f"{into}/{name}")
            if known:
                with wiped(ask(upper.name)) as secret:
                    _copy_record(upper, into, secret)
        elif upper.encrypted:
            with wiped(ask(upper.name)) as secret:
                fscrypt.refuse_wrong(upper.fd, upper.name, secret)
                encrypt_by_fscrypt(upper, into, secret, lambda: _write_record(into, record))
        else:
            _write_record(into, record)
        if os.geteuid() == 0:
            os.chown(into, status.st_uid, status.st_gid)
        os.chmod(into, stat.S_IMODE(status.st_mode))

    return replace(upper, fill, keep=keep, hint=foreign.BY_NO_DISCARD)


def _copy_record(upper: Chosen, into: str, secret: bytearray) -> None:
    with opened_by_gocryptfs(upper.fd, upper.name, secret) as plain:
        record = read_record(plain)
    cipher = os.open(into, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with opened_by_gocryptfs(cipher, upper.name, secret) as plain:
            _write_record(f"/proc/self/fd/{plain}", record or new_record(None))
    finally:
        os.close(cipher)


def _write_record(into: str, record: StoreRecord) -> None:
    """It is the same store, over the same base."""
    os.mkdir(f"{into}/{AREA_NAME}", 0o700)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    with os.fdopen(os.open(f"{into}/{AREA_NAME}/{FILE}", flags, 0o600), "w") as file:
        file.write(record.text())


def contents(upper: Chosen) -> list[str]:
    """What is at the top of an upper."""
    return sorted(set(os.listdir(upper.fd)) - {AREA_NAME} - _not_shown(upper))


def _not_shown(upper: Chosen) -> set[str]:
    own = set(gocryptfs.OWN_FILES) if upper.encrypted == gocryptfs.KIND else set()
    return own | upper.not_its_own()


def find_paths(upper: Chosen, paths: list[str]) -> list[str]:
    """What the upper has of these paths of the union, as its own relative paths."""
    found = []
    for path in paths:
        relative = os.path.normpath(path).strip("/")
        if relative in ("", ".") or relative.split("/")[0] in ("..", AREA_NAME):
            raise usage_error(f"{path} is no path in the union", "leave it out to reset everything")
        folder, name = os.path.split(relative)
        here = [n for n in (name, f".wh.{name}") if exists(upper.fd, os.path.join(folder, n))]
        if not folder:
            here = [n for n in here if n not in upper.not_its_own()]
        if not here:
            raise UnionfsError(f"{path} is not changed: {upper.name} has nothing of it")
        found += [os.path.join(folder, n) for n in here]
    return _outermost(found)


def _outermost(found: list[str]) -> list[str]:
    """Each once, and none below another: that goes with it."""
    named = dict.fromkeys(found)
    return [path for path in named if not any(path.startswith(f"{other}/") for other in named)]


def reset_paths(upper: Chosen, found: list[str], *, keep: bool) -> str | None:
    """Take paths out of an upper, so that the base is seen there; where they are kept."""
    for relative in found:
        foreign.refuse_mounted(upper.fd, upper.name, relative)
        _refuse_linked(upper, relative)
    try:
        area = os.open(AREA_NAME, _OPEN, dir_fd=upper.fd)
    except FileNotFoundError:
        hint = "mount it once, or reset it as a whole"
        raise UnionfsError(f"{upper.name} is not a store of unionfs", hint=hint) from None
    try:
        aside = names.new_paths(area)
        os.mkdir(aside, 0o700, dir_fd=area)
        with uninterrupted():
            _move_all(upper, found, area, aside)
        if keep:
            return f"{AREA_NAME}/{aside}"
        if left := remove_tree(area, aside):
            raise not_removed(upper, f"{AREA_NAME}/{aside}", left)
        return None
    finally:
        os.close(area)


def _move_all(upper: Chosen, found: list[str], area: int, aside: str) -> None:
    """All of the paths or none."""
    places = [(path, f"{aside}/{n}-{os.path.basename(path)}") for n, path in enumerate(found)]
    moved: list[tuple[str, str]] = []
    for relative, kept in places:
        try:
            _move(upper.fd, relative, area, kept)
        except OSError as exc:
            for done in reversed(moved):
                _move(upper.fd, done[0], area, done[1], back=True)
            os.rmdir(aside, dir_fd=area)
            reason = os.strerror(exc.errno or errno.EIO)
            what = f"cannot take {relative} out of {upper.name}: {reason}"
            hint = "nothing was taken away; see whether lsattr(1) shows it immutable"
            raise UnionfsError(what, hint=hint) from exc
        moved.append((relative, kept))


def _move(upper: int, relative: str, area: int, kept: str, *, back: bool = False) -> None:
    """Rename a path of an upper into its area, or back."""
    parent = _open_parent(upper, relative)
    name = os.path.basename(relative)
    try:
        if back:
            os.rename(kept, name, src_dir_fd=area, dst_dir_fd=parent)
        else:
            os.rename(name, kept, src_dir_fd=parent, dst_dir_fd=area)
        os.fsync(parent)
    finally:
        os.close(parent)


def _open_parent(upper: int, relative: str) -> int:
    """The directory of a path in an upper; no link is followed."""
    fd = os.open(".", _OPEN, dir_fd=upper)
    for name in os.path.dirname(relative).split("/"):
        if not name:
            continue
        try:
            below = os.open(name, _OPEN, dir_fd=fd)
        except OSError as exc:
            reason = os.strerror(exc.errno or errno.EIO)
            raise UnionfsError(f"cannot open {relative} in the store: {reason}") from exc
        finally:
            os.close(fd)
        fd = below
    return fd


def _refuse_linked(upper: Chosen, relative: str) -> None:
    """A hard link's copy is shown for its other names by the index: not one name's to reset.

    Nor is it that of a directory in which it has one, as its other names may be anywhere.
    """
    with contextlib.suppress(FileNotFoundError):
        index = os.open(f"{AREA_NAME}/index", _OPEN, dir_fd=upper.fd)
        try:
            numbers = {
                os.stat(n, dir_fd=index, follow_symlinks=False).st_ino for n in os.listdir(index)
            }
        finally:
            os.close(index)
        parent = _open_parent(upper.fd, relative)
        try:
            found = _one_of(numbers, parent, os.path.basename(relative)) if numbers else None
        finally:
            os.close(parent)
        if found is not None:
            path = os.path.join(os.path.dirname(relative), found)
            hint = "reset the whole store, or copy the file back in the union"
            raise UnionfsError(f"{path} has other names that share its changes", hint=hint)


def _one_of(numbers: set[int], parent: int, name: str) -> str | None:
    """The first file at or below a name with one of these inode numbers."""
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        return name if status.st_ino in numbers else None
    for folder, _, files, fd in os.fwalk(name, dir_fd=parent):
        for file in files:
            if os.stat(file, dir_fd=fd, follow_symlinks=False).st_ino in numbers:
                return os.path.join(folder, file)
    return None
