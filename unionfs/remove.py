# SPDX-License-Identifier: GPL-2.0-or-later
"""Names that go: unlink and rmdir. Where a lower layer has the name, a whiteout takes its place, by
one system call."""

import errno
import logging
import os
import stat

from unionfs import numbers
from unionfs._native import renameat2
from unionfs.copy_up import ensure_name, ensure_upper, write_nlink
from unionfs.flags import may_remove
from unionfs.marks import lent_at
from unionfs.reserve import using_reserve
from unionfs.union import UPPER_ENTRY, Entry, Union
from unionfs.work import empty_directory

log = logging.getLogger("unionfs")


@using_reserve
def unlink(union: Union, parent: int, name: bytes) -> None:
    """Remove a name of anything but a directory."""
    entry = union.entry(parent, name)
    if not entry.ino:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    may_remove(union, parent, entry)
    ensure_upper(union, parent)
    if union.tree.plain_unlink(parent, name):
        return
    keep_links(union, parent, name, entry)
    with union.committing(entry.ino):
        # A copy-up may have been published while the lock was waited for.
        entry = union.entry(parent, name)
        union.tree.prepare_unlink(parent, name)
        try:
            count_link_removed(union, parent, name, entry.ino)
            record = numbers.last_link(union, entry.ino)
            with union.tree.upper_dir(parent) as dirfd, union.entering(parent):
                _remove_at(union, dirfd, name, entry)
        except BaseException:
            union.tree.abandon_unlink(parent, name)
            raise
        union.tree.unlinked(parent, name)
    numbers.drop(union, record)
    drop_index(union, entry.ino)


def _remove_at(union: Union, dirfd: int, name: bytes, entry: Entry) -> None:
    if entry.upper != UPPER_ENTRY:
        union.marks.make_whiteout(union.tree, dirfd, name)
    elif entry.lower:
        union.marks.whiteout_over(union.tree, union.work_fd, union.temp_name(), dirfd, name)
    else:
        os.unlink(name, dir_fd=dirfd)


@using_reserve
def rmdir(union: Union, parent: int, name: bytes) -> None:
    """Remove a directory in which the union shows nothing."""
    entry = union.entry(parent, name)
    if not entry.ino:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    if not stat.S_ISDIR(entry.type):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
    if not union.tree.is_empty(entry.ino):
        may_remove(union, parent, entry, upper=True)
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), name)
    may_remove(union, parent, entry)
    ensure_upper(union, parent)
    if union.tree.plain_rmdir(parent, name):
        return
    with union.committing(entry.ino):
        entry = union.entry(parent, name)
        union.tree.prepare_unlink(parent, name)
        try:
            with union.tree.upper_dir(parent) as dirfd, union.entering(parent):
                _remove_dir_at(union, dirfd, name, entry)
        except BaseException:
            union.tree.abandon_unlink(parent, name)
            raise
        union.tree.unlinked(parent, name)


def _remove_dir_at(union: Union, dirfd: int, name: bytes, entry: Entry) -> None:
    if entry.upper != UPPER_ENTRY:
        union.marks.make_whiteout(union.tree, dirfd, name)
        return
    temp = union.temp_name()
    if entry.lower:
        union.marks.whiteout_over_dir(union.tree, union.work_fd, temp, dirfd, name)
    else:
        try:
            os.rmdir(name, dir_fd=dirfd)
            return
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # Whiteouts are in it: out of the way by one call, and then away.
        with lent_at(dirfd, name, stat.S_IWUSR):
            renameat2(dirfd, name, union.work_fd, temp, 0)
    discard_dir(union, temp)


def discard_dir(union: Union, temp: bytes) -> None:
    """Remove a directory that has been moved to the work directory, with the marks in it.

    It has lost its name already, so nothing that goes wrong is the caller's; what is left goes
    when the upper is mounted again.
    """
    try:
        with lent_at(union.work_fd, temp, stat.S_IRWXU):
            fd = os.open(temp, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=union.work_fd)
            try:
                empty_directory(fd)
            finally:
                os.close(fd)
            os.rmdir(temp, dir_fd=union.work_fd)
    except OSError as exc:
        log.warning("%s stays in the work directory: %s", os.fsdecode(temp), exc)


# ---- hard links of lower files ----


def keep_links(union: Union, parent: int, name: bytes, entry: Entry) -> None:
    """Before a name of a lower file with several is removed: the index must know the file, and the
    name must be in the upper, so that the link and its count go with one call.

    Else the count of its links could not be kept (ovl_nlink_start of the kernel).
    """
    info = union.info_or_none(entry.ino)
    if info is None or stat.S_ISDIR(info.type):
        return
    if union.work is None or union.work.index < 0 or not union.marks.xattrs:
        return
    linked = not info.upper and union.tree.getattr(entry.ino)[2] > 1
    if info.indexed or (linked and union.tree.index_name(entry.ino)):
        ensure_name(union, parent, name, entry.ino)


def count_link_removed(union: Union, parent: int, name: bytes, ino: int) -> None:
    """The count of an indexed file, as it will be once the name is gone."""
    info = union.info_or_none(ino)
    if info is None or not info.indexed:
        return
    diff = info.nlink_diff
    if not union.tree.name_is_real(parent, name):
        diff -= 1
    write_nlink(union, ino, diff)
    union.tree.set_nlink_diff(ino, diff)


def drop_index(union: Union, ino: int) -> None:
    """Remove a file from the index when the union has no name for it any more."""
    info = union.info_or_none(ino)
    if info is None or not info.indexed or union.work is None:
        return
    links = os.stat(info.index_name, dir_fd=union.work.index, follow_symlinks=False).st_nlink
    if links + info.nlink_diff <= 0:
        os.unlink(info.index_name, dir_fd=union.work.index)
