# SPDX-License-Identifier: GPL-2.0-or-later
"""Rename of everything, without EXDEV: a directory that comes from lower layers leaves a redirect.

As fs/overlayfs/dir.c does it: both ends are brought into the upper, what must hide or lead
elsewhere is marked, and one renameat2(2) commits, leaving or taking away whiteouts by its flags.
"""

import contextlib
import errno
import os
import stat

from unionfs import numbers
from unionfs._native import copy_xattrs, renameat2
from unionfs.copy_up import ensure_name, ensure_upper, temporary, write_nlink
from unionfs.create import check_name, ensure_found, redirect_path, set_data_redirect
from unionfs.flags import may_remove
from unionfs.marks import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, fd_path, lent, lent_at
from unionfs.remove import count_link_removed, discard_dir, drop_index, keep_links
from unionfs.union import UPPER_ENTRY, UPPER_WHITEOUT, Entry, Union


def _error(code: int, name: bytes) -> OSError:
    return OSError(code, os.strerror(code), name)


def rename(
    union: Union, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int
) -> None:
    """renameat2(2) of the union."""
    if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
        raise _error(errno.EINVAL, name)
    check_name(union, new_parent, new_name)
    exchange = bool(flags & RENAME_EXCHANGE)
    old = union.entry(parent, name)
    new = union.entry(new_parent, new_name)
    if not old.ino or (exchange and not new.ino):
        raise _error(errno.ENOENT, name)
    if flags & RENAME_NOREPLACE and new.ino:
        raise _error(errno.EEXIST, new_name)
    if new.ino == old.ino:
        return  # two names of one file: rename(2) does nothing
    if new.ino and not exchange and stat.S_ISDIR(new.type) and not union.tree.is_empty(new.ino):
        may_remove(union, parent, old, upper=True)
        may_remove(union, new_parent, new, upper=True)
        raise _error(errno.ENOTEMPTY, new_name)
    may_remove(union, parent, old)
    may_remove(union, new_parent, new)
    union.tree.changeable(new_parent, True, False)
    ensure_upper(union, parent)
    ensure_upper(union, new_parent)
    if not flags and union.tree.plain_rename(parent, name, new_parent, new_name):
        return
    ensure_name(union, parent, name, old.ino)
    ensure_found(union, old.ino)
    if exchange:
        ensure_name(union, new_parent, new_name, new.ino)
        ensure_found(union, new.ino)
    elif new.ino:
        keep_links(union, new_parent, new_name, new)
    with union.committing(*[ino for ino in (old.ino, new.ino) if ino]):
        old = union.entry(parent, name)
        new = union.entry(new_parent, new_name)
        _commit(union, (parent, name, old), (new_parent, new_name, new), exchange=exchange)
    if new.ino and not exchange:
        drop_index(union, new.ino)


Side = tuple[int, bytes, Entry]


def _commit(union: Union, old: Side, new: Side, *, exchange: bool) -> None:
    (parent, name, old_entry), (new_parent, new_name, new_entry) = old, new
    _mark_mover(union, old, new_parent, hides=new_entry.lower)
    if exchange:
        _mark_mover(union, new, parent, hides=old_entry.lower)
    replaced = bool(new_entry.ino) and not exchange
    record = numbers.last_link(union, new_entry.ino) if replaced else None
    if replaced:
        union.tree.prepare_unlink(new_parent, new_name)
    try:
        if replaced and not stat.S_ISDIR(new_entry.type):
            count_link_removed(union, new_parent, new_name, new_entry.ino)
        with (
            union.tree.upper_dir(parent) as old_fd,
            union.tree.upper_dir(new_parent) as new_fd,
            union.entering(parent, new_parent),
        ):
            if exchange:
                renameat2(old_fd, name, new_fd, new_name, RENAME_EXCHANGE)
            else:
                _move(union, old_fd, old, new_fd, new)
    except BaseException:
        if replaced:
            union.tree.abandon_unlink(new_parent, new_name)
        raise
    union.tree.renamed(parent, name, new_parent, new_name, exchange)
    numbers.drop(union, record)


def _mark_mover(union: Union, side: Side, to: int, *, hides: bool) -> None:
    """What must be written on something before it moves.

    A directory merged with lower ones gets a redirect to where they have it; another directory,
    where the lower layers have something at its new name, becomes opaque; a metadata-only copy
    says where its data are.
    """
    _, name, entry = side
    info = union.info(entry.ino)
    if info.foreign and union.marks.xattrs:
        union.tree.make_impure(to)
    if stat.S_ISDIR(entry.type):
        if info.ndirs > 1:
            _set_redirect(union, entry.ino, name)
        elif hides:
            fd = union.tree.open_node(entry.ino, os.O_PATH)
            try:
                union.marks.set_opaque(fd)
            finally:
                os.close(fd)
        return
    if info.indexed:
        # The kernel's "L+n" counts from the lower file of the name that goes.
        write_nlink(union, entry.ino, info.nlink_diff)
    if info.metacopy:
        fd = union.tree.open_node(entry.ino, os.O_PATH | os.O_NOFOLLOW)
        try:
            set_data_redirect(union, entry.ino, fd)
        finally:
            os.close(fd)


def _set_redirect(union: Union, ino: int, name: bytes) -> None:
    """Absolute, so that it holds wherever the directory goes; one that is absolute stays."""
    redirect = union.info(ino).redirect
    if redirect is not None and redirect.startswith(b"/"):
        return
    if not union.options.redirect_dir or not union.marks.xattrs:
        raise _error(errno.EXDEV, name)
    path = redirect_path(union, ino)
    union.note_incompat()
    fd = union.tree.open_node(ino, os.O_PATH)
    try:
        union.marks.set(fd, "redirect", path)
    finally:
        os.close(fd)
    union.tree.set_redirect(ino, path)


def _move(union: Union, old_fd: int, old: Side, new_fd: int, new: Side) -> None:
    """The one call. Preconditions: the old name is in the upper, what moves is marked."""
    (_, name, old_entry), (_, new_name, new_entry) = old, new
    directory = stat.S_ISDIR(old_entry.type)
    if new_entry.upper == UPPER_ENTRY and new_entry.ino and stat.S_ISDIR(new_entry.type):
        _clear_target(union, new_fd, new_name)
    if union.marks.wh:
        if old_entry.lower:
            union.marks.make_whiteout(union.tree, old_fd, name)
        os.rename(name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)
        if new_entry.upper == UPPER_WHITEOUT or new_entry.lower:
            union.marks.drop_wh(new_fd, new_name)
        return
    if directory and new_entry.upper == UPPER_WHITEOUT:
        # The whiteout goes to the old name, where it is right or else harmless.
        before = os.stat(name, dir_fd=old_fd, follow_symlinks=False)
        renameat2(old_fd, name, new_fd, new_name, RENAME_EXCHANGE)
        # xfs takes a directory that changes places for one that has changed.
        times = (before.st_atime_ns, before.st_mtime_ns)
        os.utime(new_name, ns=times, dir_fd=new_fd, follow_symlinks=False)
        if not old_entry.lower:
            os.unlink(name, dir_fd=old_fd)
    elif old_entry.lower:
        renameat2(old_fd, name, new_fd, new_name, RENAME_WHITEOUT)
    else:
        os.rename(name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)


def _clear_target(union: Union, new_fd: int, new_name: bytes) -> None:
    """A directory that the union shows empty may hold whiteouts: an opaque empty one goes in its
    place, for a rename replaces only what is empty on disk (ovl_clear_empty)."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as stack:
        with lent_at(new_fd, new_name, stat.S_IRUSR):
            old = os.open(new_name, flags, dir_fd=new_fd)
        stack.callback(os.close, old)
        if not os.listdir(old):
            return
        status = os.stat(new_name, dir_fd=new_fd, follow_symlinks=False)
        temp = union.temp_name()
        os.mkdir(temp, 0o700, dir_fd=union.work_fd)
        stack.enter_context(temporary(union, temp, directory=True))
        fd = os.open(temp, flags, dir_fd=union.work_fd)
        stack.callback(os.close, fd)
        if union.marks.xattrs:
            union.marks.set_opaque(fd)
        path = fd_path(fd)
        os.chown(path, status.st_uid, status.st_gid)
        # The directory is seen until the rename, and stays if that fails.
        copy_xattrs(old, fd, union.marks.prefix, None)
        os.chmod(path, stat.S_IMODE(status.st_mode))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with lent(fd, stat.S_IWUSR), lent_at(new_fd, new_name, stat.S_IWUSR):
            renameat2(union.work_fd, temp, new_fd, new_name, RENAME_EXCHANGE)
    discard_dir(union, temp)
