# SPDX-License-Identifier: GPL-2.0-or-later
"""A resized copy of an ext4, which takes the place of the image.

Owns the copy, and that it is as the image was: owner, mode, attributes, flags, and its space taken
if that was so.  Called by resizing.py.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Callable
from typing import Final

from unionfs.errors import InUse, UnionfsError
from unionfs.stores import ext, userspace
from unionfs.stores.making import new_file
from unionfs.stores.tools import Progress, lines_of, run, tool
from unionfs.syscalls import clone_file

_STEP: Final = 8 << 20
_CORRECTED: Final = 1  # fsck(8)
# linux/fs.h
_GETFLAGS: Final = 0x80086601
_SETFLAGS: Final = 0x40086602
# FS_FL_USER_MODIFIABLE without FS_IMMUTABLE_FL and FS_APPEND_FL, of which an image that
# can be written to has none; and FS_NOCOW_FL.
_FLAGS: Final = (0x000380FF & ~0x30) | 0x00800000

Advance = Callable[[int], None]


def as_copy(path: str, size: int, advance: Progress) -> None:
    """resize2fs on a copy that then replaces the image."""
    real = os.path.realpath(path)
    try:
        lock = userspace.lock_image(real, readonly=False)
    except InUse as exc:
        exc.why = "cannot resize what it has mounted"
        raise
    try:
        _refuse_names(path, os.fstat(lock))
        with new_file(real, replace=True) as (fd, temporary):
            _fill(lock, fd, path, advance, size=size)
            advance.phase("checking the copy")
            check([tool("e2fsck", "e2fsprogs"), "-f", "-p", temporary], path)
            advance.phase("resizing")
            blocks = f"{size // 512}s"  # in sectors
            _run_resize2fs([tool("resize2fs", "e2fsprogs"), temporary, blocks], path, lock)
            os.ftruncate(fd, size)
            if is_full(os.fstat(lock)):
                _take(fd, size, path)
    finally:
        os.close(lock)


def _refuse_names(path: str, status: os.stat_result) -> None:
    """The copy would have one of the names only."""
    if status.st_nlink > 1:
        what = f"{path} has {status.st_nlink} names (hard links), and would be replaced by one only"
        hint = f"remove the others: find / -xdev -inum {status.st_ino}"
        raise UnionfsError(what, hint=hint)


def _fill(image: int, fd: int, path: str, advance: Progress, *, size: int) -> None:
    """Make an empty file what the image is, and longer if it shall be."""
    status = os.fstat(image)
    _copy_flags(image, fd, path)  # before its data: so some of them want it
    copy_sparse(image, fd, status.st_size, advance)
    if size > status.st_size:
        os.ftruncate(fd, size)
    if is_full(status):
        _take(fd, size, path)  # now, when nothing has been done yet
    with contextlib.suppress(PermissionError):
        os.fchown(fd, status.st_uid, status.st_gid)
    os.fchmod(fd, stat.S_IMODE(status.st_mode))
    _copy_attributes(image, fd, path)


def is_full(status: os.stat_result) -> bool:
    """Whether a file has all its space (`store create --full`): it has no holes."""
    return status.st_blocks * 512 >= status.st_size


def lengthen(fd: int, size: int) -> None:
    """Make an open image longer, with its space if it had all of it; raises OSError, undone."""
    status = os.fstat(fd)
    if size <= status.st_size:
        return
    try:
        if is_full(status):
            os.posix_fallocate(fd, status.st_size, size - status.st_size)
        else:
            os.ftruncate(fd, size)
    except OSError:
        os.ftruncate(fd, status.st_size)
        raise


def _take(fd: int, size: int, path: str) -> None:
    """Take the space that a file has not got yet."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        hint = "all its space was taken, which the new one shall have too, beside the old"
        raise UnionfsError(f"{path} cannot be resized: {reason}", hint=hint) from exc


def _copy_flags(image: int, fd: int, path: str) -> None:
    """Those of chattr(1)."""
    try:
        have, now = (
            struct.unpack_from("=I", fcntl.ioctl(each, _GETFLAGS, bytes(8)))[0]
            for each in (image, fd)
        )
    except OSError:  # a file system without flags
        return
    if wanted := have & _FLAGS & ~now:
        try:
            fcntl.ioctl(fd, _SETFLAGS, struct.pack("=Q", now | wanted))
        except OSError as exc:
            raise _not_kept(path, "flags (lsattr)", exc) from exc


def _copy_attributes(image: int, fd: int, path: str) -> None:
    """The extended ones, ACLs among them; those that only root may set stay behind for others."""
    for name in os.listxattr(image):
        try:
            value = os.getxattr(image, name)
            try:
                if os.getxattr(fd, name) == value:  # of a security module
                    continue
            except OSError:
                pass
            os.setxattr(fd, name, value)
        except PermissionError as exc:
            if os.geteuid() == 0 or not name.startswith(("security.", "trusted.")):
                raise _not_kept(path, f"attribute {name}", exc) from exc
        except OSError as exc:
            raise _not_kept(path, f"attribute {name}", exc) from exc


def _not_kept(path: str, what: str, exc: OSError) -> UnionfsError:
    reason = os.strerror(exc.errno or errno.EIO)
    hint = "take it away first, if nobody needs it"
    return UnionfsError(f"the {what} of {path} cannot be kept: {reason}", hint=hint)


def _run_resize2fs(command: list[str], path: str, image: int) -> None:
    """What it refuses, e2fsck would find nothing wrong with."""
    done = run(command)
    if not done.returncode:
        return
    lines = lines_of(done.stderr or done.stdout)
    reason = lines[-1] if lines else f"exit code {done.returncode}"
    hint = None
    if smallest := re.search(r"smaller than minimum \(([0-9]+)\)", reason):
        # s_log_block_size, at 24 in the super block
        block = 1024 << int.from_bytes(os.pread(image, 4, 1024 + 24), "little")
        mebibytes = -(-int(smallest[1]) * block >> 20)
        reason, hint = "it has more in it than that", f"write --size {mebibytes}M or more"
    raise UnionfsError(f"{path} cannot be resized: {reason}", hint=hint)


def check(command: list[str], path: str, *, what: str = "resized") -> None:
    """Run e2fsck -p."""
    done = run(command)
    if done.returncode > _CORRECTED:
        reason = ext.complaint(done)
        hint = f"check it: unionfs store check --repair {path}"
        raise UnionfsError(f"{path} cannot be {what}: {reason}", hint=hint)


def copy_sparse(source: int, target: int, size: int, advance: Advance) -> None:
    """Copy a file's data, by sharing it where that can be done, holes staying holes."""
    with contextlib.suppress(OSError):
        clone_file(source, target)
        advance(size)
        return
    position = 0
    os.ftruncate(target, size)
    while position < size:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno != errno.ENXIO:  # only a hole is left
                raise
            advance(size - position)
            return
        end = os.lseek(source, start, os.SEEK_HOLE)
        advance(start - position)
        position = start
        while position < end:
            data = os.pread(source, min(_STEP, end - position), position)
            if not data:
                return
            os.pwrite(target, data, position)
            position += len(data)
            advance(len(data))
