# SPDX-License-Identifier: GPL-2.0-or-later
"""How a new directory takes the place of an upper, by one call, and the old one is kept or removed.

Owns the steps, and what is made of their leftovers.  What the new one has in it is for others:
a restore, a clone, a reset, encryption.  The caller has the upper's lock.

What is to be kept gets its name by that same call: the new one, complete, is called
NAME.before-DATE, and then the two are exchanged.  Killed just before, the new one is what is kept;
the old one is never what a later verb would remove.

An upper that cannot be renamed gets new content instead (exchange.py).
"""

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from unionfs import syscalls
from unionfs.errors import UnionfsError, counted, told
from unionfs.format import AREA_NAME
from unionfs.mounts import path_of, read_mounts
from unionfs.removal import HINT, remove_tree
from unionfs.stores import exchange, foreign
from unionfs.stores import kept as names
from unionfs.stores.tools import uninterrupted
from unionfs.stores.volume import Volume, walk
from unionfs.syscalls import RenameFlag

if TYPE_CHECKING:
    from unionfs.stores.backing import Chosen

_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def open_beside(volume: Volume, directory: str) -> tuple[int, str]:
    """The directory that an upper lies in, open, and the upper's name there.

    An upper that is the root of its file system has no place beside it.
    """
    parent, name = os.path.split(directory)
    if volume.contents is None and not name:
        parent, name = os.path.split(volume.mountpoint)
        return os.open(parent or "/", _OPEN), name
    if not name:
        what = f"{volume.locator.source}:/ is the root of its file system"
        raise UnionfsError(what, hint="name a directory by :/dir")
    opened = walk(volume, parent)
    try:
        return os.open(".", _OPEN, dir_fd=opened), name
    finally:
        os.close(opened)


def stays(upper: "Chosen") -> str:
    """Why a directory cannot be renamed; empty if it can."""
    if upper.directory != "/":
        return ""
    if upper.volume.contents is not None:
        return "is the root of its file system"
    point = path_of(upper.fd)
    return "is a mount point" if any(m.point == point for m in read_mounts()) else ""


def refuse_encrypted(upper: "Chosen") -> None:
    """Raise an error if it has to be renamed: encrypted content cannot be moved name by name."""
    if why := stays(upper):
        hint = "name a directory in it, by :/dir" if upper.volume.contents else "use one in it"
        raise UnionfsError(f"{upper.name} {why}, and cannot be encrypted as such", hint=hint)


def replace(
    upper: "Chosen",
    fill: Callable[[str], None],
    *,
    keep: bool,
    hint: str = "",
    encrypted: bool = False,
) -> str | None:
    """Fill a new directory, then have it take an upper's place; what the old one is kept as.

    `hint`: how to keep it, if it is no store.  `encrypted`: the old or the new one.
    """
    volume, directory = upper.volume, upper.directory
    foreign.refuse(upper, keep=keep, hint=hint)
    if encrypted or upper.encrypted:
        refuse_encrypted(upper)
    elif stays(upper):
        return _exchange_content(upper, fill, keep=keep)
    top, name = open_beside(volume, directory)
    try:
        tidy(top, name)
        temporary = names.temporary(name, names.NEW)
        try:
            os.mkdir(temporary, 0o700, dir_fd=top)
        except OSError as exc:
            reason = os.strerror(exc.errno or errno.EIO)
            where = f"{volume.locator.source}{'' if directory == '/' else f':{directory}'}"
            hint = "what takes its place is made there"
            raise UnionfsError(f"cannot write beside {where}: {reason}", hint=hint) from exc
        try:
            fd = os.open(temporary, _OPEN, dir_fd=top)
            try:
                # Programs that fill it reach it by this path.
                with told(f"cannot write what is to take the place of {upper.name}"):
                    fill(f"/proc/{os.getpid()}/fd/{fd}")
                    syscalls.syncfs(fd)
            finally:
                os.close(fd)
        except BaseException:
            remove_tree(top, temporary)
            raise
        with uninterrupted():
            return _take_place(upper, top, temporary, name, keep=keep)
    finally:
        os.close(top)


def _exchange_content(upper: "Chosen", fill: Callable[[str], None], *, keep: bool) -> str | None:
    """Of one that cannot be renamed."""
    _refuse_others(upper)
    into = exchange.begin(upper.fd)
    try:
        with told(f"cannot write what is to take the place of {upper.name}"):
            fill(f"/proc/{os.getpid()}/fd/{into}")
            syscalls.syncfs(into)
    except BaseException:
        exchange.abandon(upper.fd)
        raise
    finally:
        os.close(into)
    with uninterrupted():
        kept = exchange.complete(upper.fd, keep=keep, stay=upper.not_its_own())
    if left := exchange.left(upper.fd):
        raise not_removed(upper, f"{AREA_NAME}/{left}", [])
    return kept


def _refuse_others(upper: "Chosen") -> None:
    """Below the root of a file system may lie the stores of other unions, in use even."""
    from unionfs.stores.inspect import find_uppers

    others = [found.directory for found in find_uppers(upper.fd) if found.directory != "/"]
    if others:
        what = f"{upper.name} has other stores in it: {', '.join(others)}"
        raise UnionfsError(what, hint="name the one that is meant, or move them away")


def _take_place(upper: "Chosen", top: int, temporary: str, name: str, *, keep: bool) -> str | None:
    new = temporary
    try:
        if keep:
            new = names.new_name(top, name)
            os.rename(temporary, new, src_dir_fd=top, dst_dir_fd=top)
        old = _exchange(top, new, name, names.KEPT_ASIDE if keep else names.MOVED_ASIDE)
    except BaseException:
        for ours in (temporary, new):
            remove_tree(top, ours)
        raise
    if not keep:
        if left := remove_tree(top, old):
            raise not_removed(upper, old, left)
        return None
    if old != new:
        os.rename(old, new, src_dir_fd=top, dst_dir_fd=top)
    return new


def _exchange(top: int, new: str, name: str, suffix: str) -> str:
    """One call where there is one; else the old one is moved aside first.  What it is called."""
    try:
        syscalls.renameat2(top, new, top, name, RenameFlag.EXCHANGE)
        return new
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # fuse2fs
            raise
    aside = names.temporary(name, suffix)
    os.rename(name, aside, src_dir_fd=top, dst_dir_fd=top)
    try:
        os.rename(new, name, src_dir_fd=top, dst_dir_fd=top)
    except BaseException:
        os.rename(aside, name, src_dir_fd=top, dst_dir_fd=top)
        raise
    return aside


def not_removed(upper: "Chosen", what: str, left: list[str]) -> UnionfsError:
    """The error that `what` was taken away, beside an upper or in its area, and is still there.

    `left`: the paths that are, if they are known.
    """
    place = f"{upper.beside(what)}" + (
        f" ({counted(len(left), 'file')}: {left[0]})" if left else ""
    )
    return UnionfsError(f"done, but not all that was there can be removed: {place}", hint=HINT)


def tidy(top: int, name: str) -> None:
    """Remove what a verb that was killed has left of an upper, which is in its place.

    An old one that was to be kept gets its name.
    """
    found = os.listdir(top)
    for left in names.temporaries(found, name, names.KEPT_ASIDE):
        os.rename(left, names.new_name(top, name), src_dir_fd=top, dst_dir_fd=top)
    for left in names.temporaries(found, name, names.NEW, names.MOVED_ASIDE):
        remove_tree(top, left)
