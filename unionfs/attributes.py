# SPDX-License-Identifier: GPL-2.0-or-later
"""What is said of a file: mode, owner, times, size, extended attributes.

Of a large lower file only the metadata are copied up for it; none of its data for a truncation to
nothing.
"""

import contextlib
import dataclasses
import errno
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass

from unionfs import _native, acl
from unionfs.acl import ACCESS
from unionfs.callers import may_keep_setgid
from unionfs.copy_up import (
    can_override,
    disk_ids,
    ensure_upper,
    give_owner,
    override_mode,
    set_override,
)
from unionfs.create import Caller
from unionfs.marks import fd_path, lent
from unionfs.syscalls import TMPFS, filesystem_type
from unionfs.union import Union

ACL_PREFIX = b"system.posix_acl_"
CAPABILITY = b"security.capability"
# Of an attribute that is there: not the caller's to read; a malformed capability; a capability of
# the root of a user namespace that is unknown here.
UNREADABLE = frozenset((errno.EACCES, errno.EINVAL, errno.EOVERFLOW))
JUST_NOW = 10**9  # ns: how long a request may take


@dataclass(frozen=True, slots=True)
class Change:
    """What to set; None leaves it. Times in nanoseconds."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


def change(union: Union, ino: int, what: Change, ctx: Caller, handle_fd: int | None = None) -> None:
    """Apply a change. `handle_fd`: the writable descriptor it was asked through, if any."""
    union.tree.changeable(ino, False, False)
    if what.mode is not None and what.mode & stat.S_ISGID and not union.kills_privileges:
        what = _without_foreign_setgid(union, ino, what, ctx)
    if what.size is not None:
        what = _with_set_id_cleared(union, ino, what, ctx)
    elif what == Change() and union.kills_privileges:
        what = _with_privileges_killed(union, ino, ctx)
    resized = what.size is not None and union.tree.getattr(ino)[6] != what.size
    ensure_upper(union, ino, data=what.size is not None, truncate=what.size)
    with _opened(union, ino) as fd:
        owner = _shown_owner(union, ino)
        if what.size is not None:
            _resize(fd, what.size, handle_fd, resized=resized)
        if union.override is not None and can_override(os.stat(fd).st_mode):
            _override(union, ino, fd, what, ctx)
        else:
            _owner_and_mode(union, fd, what, owner, ctx)
        if what.atime_ns is not None or what.mtime_ns is not None:
            now = os.stat(fd)
            atime = now.st_atime_ns if what.atime_ns is None else what.atime_ns
            mtime = now.st_mtime_ns if what.mtime_ns is None else what.mtime_ns
            _set_times(fd, atime, mtime)


def _set_times(fd: int, atime: int, mtime: int) -> None:
    """utimensat(2). Times of an append-only file may be set to now, and to nothing else."""
    try:
        os.utime(fd_path(fd), ns=(atime, mtime))
    except PermissionError:
        if atime != mtime or abs(time.time_ns() - mtime) > JUST_NOW:
            raise
        os.utime(fd_path(fd))


@contextlib.contextmanager
def _opened(union: Union, ino: int) -> Iterator[int]:
    """A descriptor (O_PATH) of the upper file, which is not replaced meanwhile by its completed
    copy: the change would be lost."""
    with union.committing(ino), union.entering(ino):
        fd = union.tree.open_node(ino, os.O_PATH | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            os.close(fd)


def _without_foreign_setgid(union: Union, ino: int, what: Change, ctx: Caller) -> Change:
    """Set-group-ID does not stay when the kernel, before a write, takes set-user-ID away by a mode
    of its own making, which it does without FUSE_HANDLE_KILLPRIV_V2. (What nobody may give by
    chmod(2), it has taken from the mode itself: setattr_prepare of fs/attr.c.)"""
    attr = union.tree.getattr(ino)
    gid = attr[4] if what.gid is None else what.gid
    if what.mode is None or may_keep_setgid(attr[3], gid, ctx):
        return what
    return dataclasses.replace(what, mode=what.mode & ~stat.S_ISGID)


def _with_set_id_cleared(union: Union, ino: int, what: Change, ctx: Caller) -> Change:
    """truncate(2) by one who is not above such things; the kernel leaves it to us to take away
    set-group-ID without group execute (fuse_setattr)."""
    attr = union.tree.getattr(ino)
    mode = attr[1] if what.mode is None else what.mode
    kept = without_set_id(mode, attr[3], attr[4], ctx)
    return what if kept == mode else dataclasses.replace(what, mode=kept)


def _with_privileges_killed(union: Union, ino: int, ctx: Caller) -> Change:
    """What a change of nothing stands for with FUSE_HANDLE_KILLPRIV_V2, where the kernel does not
    say which set-ID bits go: a write is about to come, of one who is not above such things; or a
    chown(path, -1, -1); or root's write to a file that has just lost its capability."""
    attr = union.tree.getattr(ino)
    mode = attr[1]
    to_write = union.capabilities_killed.take(ctx.pid, ino, time.monotonic_ns())
    if not stat.S_ISREG(mode):
        return Change()
    if not _keeps_set_id(ctx):
        mode = without_set_id(mode, attr[3], attr[4], ctx)
        mine = ctx.uid in (0, attr[3])
        if mode != attr[1] and not mine and not union.tree.is_written(ino):
            # It is no write but a chown, by one who may not change the mode (setattr_prepare).
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    elif not to_write:
        mode &= ~(stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))
    return Change() if mode == attr[1] else Change(mode=mode)


def truncate_at_open(union: Union, ino: int, ctx: Caller) -> None:
    """O_TRUNC: no data are copied, and the times change even if the file was empty.

    The kernel leaves it to us to take set-ID bits away, as do_truncate of fs/open.c does.
    """
    ensure_upper(union, ino, data=True, truncate=0)
    fd = union.tree.open_node(ino, os.O_PATH | os.O_NOFOLLOW)
    try:
        with lent(fd, stat.S_IWUSR):
            os.close(os.open(fd_path(fd), os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC))
    finally:
        os.close(fd)
    what = _with_set_id_cleared(union, ino, Change(), ctx)
    if what.mode is not None:
        change(union, ino, what, ctx)


def without_set_id(mode: int, uid: int, gid: int, ctx: Caller) -> int:
    """What is left of a file's mode when the caller changes its content
    (setattr_should_drop_suidgid of fs/attr.c)."""
    return mode if _keeps_set_id(ctx) else _with_another_owner(mode, uid, gid, ctx)


def _with_another_owner(mode: int, uid: int, gid: int, ctx: Caller) -> int:
    """What is left of the mode of anything but a directory when the caller changes its owner or
    group, which were `uid` and `gid` (chown_common of fs/open.c)."""
    mode &= ~stat.S_ISUID
    if mode & stat.S_ISGID and (mode & stat.S_IXGRP or not may_keep_setgid(uid, gid, ctx)):
        mode &= ~stat.S_ISGID
    return mode


def _keeps_set_id(ctx: Caller) -> bool:
    """Whether the caller has CAP_FSETID: root mostly has. The kernel tells the engine of a root
    that has not (pyfuse3 cannot say so)."""
    return ctx.uid == 0 and not getattr(ctx, "kills_set_id", False)


def _resize(fd: int, size: int, handle_fd: int | None, *, resized: bool) -> None:
    """ftruncate(2) always changes the times, truncate(2) only with the size (xfs, btrfs); and the
    copy-up may have brought no more than `size` bytes already."""
    if handle_fd is not None:
        os.ftruncate(handle_fd, size)
        return
    with lent(fd, stat.S_IWUSR):
        if not resized:
            os.truncate(fd_path(fd), size)
            return
        file = os.open(fd_path(fd), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(file, size)
        finally:
            os.close(file)


def _shown_owner(union: Union, ino: int) -> tuple[int, int]:
    """As the caller sees him, which may not be as on disk (uidmapping=, gidmapping=)."""
    attr = union.tree.getattr(ino)
    return attr[3], attr[4]


def _owner_and_mode(
    union: Union, fd: int, what: Change, owner: tuple[int, int], ctx: Caller
) -> None:
    if what.uid is not None or what.gid is not None:
        now = os.stat(fd)
        uid, gid = disk_ids(
            union,
            now.st_uid if what.uid is None else what.uid,
            now.st_gid if what.gid is None else what.gid,
        )
        if union.options.squash_to_uid is not None or what.uid is None:
            uid = -1
        if union.options.squash_to_gid is not None or what.gid is None:
            gid = -1
        os.chown(fd_path(fd), uid, gid)
        if what.mode is None and not stat.S_ISDIR(now.st_mode):
            # We may be above what the caller is not.
            mode = _native.mode_of(fd)
            kept = _with_another_owner(mode, *owner, ctx)
            if kept != mode:
                _native.set_mode(fd, stat.S_IMODE(kept))
    if what.mode is not None:
        _native.set_mode(fd, stat.S_IMODE(what.mode))
    if what == Change():
        _settle_privileges(fd, owner, ctx)


def _settle_privileges(fd: int, owner: tuple[int, int], ctx: Caller) -> None:
    """A change of nothing: the kernel asks it before a write that takes away set-group-ID without
    group execute, or after it has removed capabilities, and for chown(path, -1, -1).

    The first it leaves to us, with the caller to judge by (setattr_should_drop_sgid of fs/attr.c,
    which fuse_setattr does not follow). Else only ctime changes, and chown would clear more.
    """
    status = os.stat(fd)
    mode = stat.S_IMODE(_native.mode_of(fd))
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        # Nobody writes to it through us: chown, which takes set-ID bits of special files too.
        os.chown(fd_path(fd), -1, -1)
        return
    if (
        stat.S_ISREG(status.st_mode)
        and mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID
        and not may_keep_setgid(*owner, ctx)
    ):
        mode &= ~stat.S_ISGID
    _native.set_mode(fd, mode)


def _override(union: Union, ino: int, fd: int, what: Change, ctx: Caller) -> None:
    """Owner and mode go to the attribute; on disk as far as they can be given."""
    if what.mode is None and what.uid is None and what.gid is None:
        return
    shown = union.tree.getattr(ino)
    uid, gid = disk_ids(
        union,
        shown[3] if what.uid is None else what.uid,
        shown[4] if what.gid is None else what.gid,
    )
    mode = shown[1] if what.mode is None else what.mode
    if what.mode is None and stat.S_ISREG(shown[1]):
        mode = _with_another_owner(mode, shown[3], shown[4], ctx)
    set_override(union, fd, uid, gid, mode, shown[1], shown[5])
    give_owner(union, fd, uid, gid, mode)
    _native.set_mode(fd, override_mode(mode, directory=stat.S_ISDIR(shown[1])))


def set_xattr(
    union: Union, ino: int, name: bytes, value: bytes, ctx: Caller, flags: int = 0
) -> None:
    """setxattr(2)."""
    stored = _stored(union, name)
    union.tree.changeable(ino, False, False)
    ensure_upper(union, ino)
    with _opened(union, ino) as fd:
        os.setxattr(fd_path(fd), stored, value, flags)
        if name == ACCESS.encode():
            acl.settle(fd)
            _drop_setgid(union, ino, fd, ctx)


def remove_xattr(union: Union, ino: int, name: bytes, ctx: Caller) -> None:
    """removexattr(2)."""
    stored = _stored(union, name)
    if not name.startswith(ACL_PREFIX):
        _find_xattr(union, ino, name)
    union.tree.changeable(ino, False, False)
    ensure_upper(union, ino)
    with _opened(union, ino) as fd:
        os.removexattr(fd_path(fd), stored)
        if name == ACCESS.encode() and filesystem_type(fd_path(fd)) == TMPFS:
            _drop_setgid(union, ino, fd, ctx)  # simple_set_acl of fs/posix_acl.c; others leave it
    if name == CAPABILITY:
        union.capabilities_killed.note(ctx.pid, ino, time.monotonic_ns())


def _find_xattr(union: Union, ino: int, name: bytes) -> None:
    """ENODATA before anything is copied up for nothing."""
    try:
        union.tree.getxattr(ino, name)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise


def _stored(union: Union, name: bytes) -> bytes:
    refused = (union.options.noxattrs) or (union.options.noacl and name.startswith(ACL_PREFIX))
    if refused:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), name)
    return union.tree.xattr_stored(name)


def _drop_setgid(union: Union, ino: int, fd: int, ctx: Caller) -> None:
    """An ACL set by one who is not in the file's group takes set-group-ID away, as the kernel does
    where it knows who asks (posix_acl_update_mode); here root asked it."""
    mode = _native.mode_of(fd)
    if mode & stat.S_ISGID and not may_keep_setgid(*_shown_owner(union, ino), ctx):
        _native.set_mode(fd, stat.S_IMODE(mode) & ~stat.S_ISGID)
