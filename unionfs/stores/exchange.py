# SPDX-License-Identifier: GPL-2.0-or-later
"""How new content takes the place of an upper that cannot be renamed: what is in it is moved.

Such are the root of a file system, and a directory on which something is mounted.  Owns the steps,
and what is made of them when they were cut.  Called by replacing.py, by whatever verb uses an upper
next, and by work.py when it is mounted; the caller has the upper's lock.

In the area of the upper, which stays where it is:

    exchange.new/       what is to come, not complete: removed
    exchange.old/       what there was, if it is not kept; with an area of its own
    exchange.keep/      the same, if it is: before-DATE in the end
    exchange.out/       exchange.new, complete, while what there was is moved out: moved back
    exchange.in/        the same, while it is moved in: brought to its end

Each step is one rename, so a cut leaves what there was, or what was to come.
"""

import contextlib
import os
from collections.abc import Collection, Iterator
from typing import Final

from unionfs.errors import UnionfsError
from unionfs.format import AREA_NAME
from unionfs.removal import remove_tree
from unionfs.stores import kept
from unionfs.syscalls import exists

_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_START: Final = "exchange."
_NEW: Final = "exchange.new"
_OLD: Final = "exchange.old"
_KEEP: Final = "exchange.keep"
_OUT: Final = "exchange.out"
_IN: Final = "exchange.in"
_LOCK: Final = "lock"  # of the area, where directories cannot be locked


def is_cut(upper: int) -> bool:
    """Whether an open upper was left between what there was and what was to come."""
    with contextlib.suppress(PermissionError):  # who may not look cannot mount it either
        return any(exists(upper, f"{AREA_NAME}/{name}") for name in (_OUT, _IN))
    return False


def refuse_cut(upper: int, name: str) -> None:
    """Raise an error if an upper that is only read was left so."""
    if is_cut(upper):
        hint = "mount it writable once, which brings it to its end"
        raise UnionfsError(f"{name} was being replaced by a verb that was killed", hint=hint)


def settle(upper: int) -> None:
    """Bring an open upper to one of both; nothing if it is."""
    try:
        area = os.open(AREA_NAME, _OPEN, dir_fd=upper)
    except OSError:  # there is none, or none of ours
        return
    try:
        found = {name for name in os.listdir(area) if name.startswith(_START)}
        if _OUT in found:
            _move_back(upper, area)
        elif _IN in found:
            _move_in(upper, area)
        if found:
            _tidy(area)
    finally:
        os.close(area)


def begin(upper: int) -> int:
    """Make the directory for what is to come in an open upper, and open it."""
    settle(upper)
    with contextlib.suppress(FileExistsError):
        os.mkdir(AREA_NAME, 0o700, dir_fd=upper)
    with _opened(upper, AREA_NAME) as area:
        if any(name.startswith(_START) for name in os.listdir(area)):
            hint = "see whether chattr(1) has made something in it immutable"
            raise UnionfsError(f"not all can be removed of what is in {AREA_NAME}", hint=hint)
        os.mkdir(_NEW, 0o700, dir_fd=area)
        return os.open(_NEW, _OPEN, dir_fd=area)


def abandon(upper: int) -> None:
    """Remove what is not to come after all."""
    settle(upper)
    with contextlib.suppress(OSError):  # not if it was there before
        os.rmdir(AREA_NAME, dir_fd=upper)


def complete(upper: int, *, keep: bool, stay: Collection[str]) -> str | None:
    """Exchange the content of an open upper, but for what is to stay; where the old one is kept."""
    for root in (".", f"{AREA_NAME}/{_NEW}"):
        if not os.access(root, os.W_OK, dir_fd=upper, effective_ids=True):
            abandon(upper)
            hint = "chmod u+w the root of the upper, or name a directory in it"
            what = "you may not write to the root of the upper: what is in it cannot be moved"
            raise UnionfsError(what, hint=hint)
    old = _KEEP if keep else _OLD
    with _opened(upper, AREA_NAME) as area:
        os.mkdir(old, 0o700, dir_fd=area)
        os.rename(_NEW, _OUT, src_dir_fd=area, dst_dir_fd=area)
        try:
            _move_out(upper, area, old, stay)
        except OSError as exc:
            _move_back(upper, area)
            _tidy(area)
            what = os.fsdecode(exc.filename or "")
            raise UnionfsError(f"cannot move {what}: {os.strerror(exc.errno or 0)}") from exc
        os.rename(_OUT, _IN, src_dir_fd=area, dst_dir_fd=area)
        _move_in(upper, area)
        name = _tidy(area)
    return None if name is None else f"{AREA_NAME}/{name}"


def _move_out(upper: int, area: int, old: str, stay: Collection[str]) -> None:
    with _opened(area, old) as into:
        os.mkdir(AREA_NAME, 0o700, dir_fd=into)
        _become(into, upper)
        _move(upper, into, {AREA_NAME, *stay})
        with _opened(into, AREA_NAME) as inner:
            _move(area, inner, {n for n in os.listdir(area) if _belongs_here(n)})


def _belongs_here(name: str) -> bool:
    """Whether something in the area is of this place, whatever is in it."""
    return name == _LOCK or name.startswith(_START) or bool(kept.date_of_whole(name))


def _move_back(upper: int, area: int) -> None:
    for old in (old for old in (_KEEP, _OLD) if exists(area, old)):
        with _opened(area, old) as source:
            if exists(source, AREA_NAME):
                with _opened(source, AREA_NAME) as inner:
                    _move(inner, area)
                os.rmdir(AREA_NAME, dir_fd=source)
            _move(source, upper)
        os.rmdir(old, dir_fd=area)  # an error if anything is left there
    os.rename(_OUT, _NEW, src_dir_fd=area, dst_dir_fd=area)


def _move_in(upper: int, area: int) -> None:
    with _opened(area, _IN) as source:
        if exists(source, AREA_NAME):
            with _opened(source, AREA_NAME) as inner:
                _move(inner, area, {n for n in os.listdir(inner) if _belongs_here(n)})
        _move(source, upper, os.listdir(upper))  # what stayed: it was not moved
        _become(upper, source)
    os.rename(_IN, _NEW, src_dir_fd=area, dst_dir_fd=area)


def _tidy(area: int) -> str | None:
    """Remove what is of no use any more, and give what is kept its name; that name."""
    for left in (_NEW, _OLD):
        _remove(area, left)
    with contextlib.suppress(OSError):  # nothing was moved there, or it was moved back
        os.rmdir(_KEEP, dir_fd=area)
    if not exists(area, _KEEP):
        return None
    name = kept.new_whole(area)
    os.rename(_KEEP, name, src_dir_fd=area, dst_dir_fd=area)
    return name


def _remove(area: int, name: str) -> None:
    """What cannot be removed stays.  No link is followed: the upper may be a stranger's."""
    remove_tree(area, name)


def left(upper: int) -> str:
    """What of the content that was exchanged could not be removed: its name in the area."""
    return _OLD if exists(upper, f"{AREA_NAME}/{_OLD}") else ""


def _move(source: int, target: int, but: Collection[str] = ()) -> None:
    with _opened(source, ".") as fresh:  # btrfs lists no name younger than a descriptor
        for name in sorted(set(os.listdir(fresh)) - set(but)):
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)


def _become(target: int, source: int) -> None:
    """Have a directory owner, mode, attributes and times of another, as far as one may."""
    status = os.fstat(source)
    if os.geteuid() == 0:
        os.fchown(target, status.st_uid, status.st_gid)
    # Of a mount point that is not his, a user may change what is in it only.
    with contextlib.suppress(PermissionError):
        os.fchmod(target, status.st_mode & 0o7777)
    its = _attributes(source)
    for name in _attributes(target).keys() - its.keys():
        with contextlib.suppress(OSError):
            os.removexattr(target, name)
    for name, value in its.items():
        with contextlib.suppress(OSError):
            os.setxattr(target, name, value)
    with contextlib.suppress(PermissionError):
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _attributes(fd: int) -> dict[str, bytes]:
    """But for those that the system gives."""
    with contextlib.suppress(OSError):
        names = [name for name in os.listxattr(fd) if not name.startswith("security.")]
        return {name: os.getxattr(fd, name) for name in names}
    return {}


@contextlib.contextmanager
def _opened(parent: int, name: str) -> Iterator[int]:
    fd = os.open(name, _OPEN, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)
