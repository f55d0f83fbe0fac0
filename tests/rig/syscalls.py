# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls the tests need and Python 3.11 does not have.

Owns no policy: each function is one call, raises OSError with its errno, and is used by the rig,
the differential test and the semantics tests. The product has its own module of this kind; the
tests do not share it, so that a mistake there cannot hide itself.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUSER = 0x1000_0000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND = 1, 2, 4, 4096
MS_REC, MS_PRIVATE = 16384, 1 << 18
MNT_DETACH = 2
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 0x1, 0x2, 0x10
FALLOC_COLLAPSE_RANGE, FALLOC_INSERT_RANGE, FALLOC_UNSHARE_RANGE = 0x8, 0x20, 0x40
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
PR_SET_CHILD_SUBREAPER = 36
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
_STATX_BTIME = 0x800
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_GETVERSION = 0x8008_6601, 0x4008_6602, 0x8008_7601
FICLONE = 0x4004_9409
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C_581F, 0x401C_5820


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


class Dirent(NamedTuple):
    name: bytes
    ino: int
    cookie: int


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    _check(LIBC.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    _check(
        LIBC.mount(
            os.fsencode(source),
            os.fsencode(target),
            None if kind is None else kind.encode(),
            ctypes.c_ulong(flags),
            None if data is None else os.fsencode(data),
        ),
        f"mount {target}",
    )


def umount(target: str | os.PathLike[str], flags: int = 0) -> None:
    _check(LIBC.umount2(os.fsencode(target), flags), f"umount {os.fspath(target)}")


def become_subreaper() -> None:
    """Let daemons started by a child become our children, so that they can be waited for."""
    _check(LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def renameat2(
    source: bytes,
    target: bytes,
    flags: int,
    source_dir: int = AT_FDCWD,
    target_dir: int = AT_FDCWD,
) -> None:
    _check(LIBC.renameat2(source_dir, source, target_dir, target, flags), "renameat2")


def utimensat(path: bytes, atime: tuple[int, int], mtime: tuple[int, int], flags: int) -> None:
    """Like os.utime, with UTIME_NOW and UTIME_OMIT for each time by itself."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    _check(LIBC.utimensat(AT_FDCWD, path, times, flags), "utimensat")


def birth(path: bytes) -> int:
    """Time of birth in ns: with st_ino it names an inode for ever, also once the number is reused.

    Returns 0 on a file system that keeps none.
    """
    buffer = ctypes.create_string_buffer(256)
    _check(LIBC.statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, _STATX_BTIME, buffer), "statx")
    (mask,) = struct.unpack_from("=I", buffer, 0)
    if not mask & _STATX_BTIME:
        return 0
    seconds, nanos = struct.unpack_from("=qI", buffer, 0x50)
    return int(seconds) * 10**9 + int(nanos)


def link_descriptor(fd: int, path: bytes) -> None:
    """Give a file made by O_TMPFILE a name."""
    source = f"/proc/self/fd/{fd}".encode()
    _check(LIBC.linkat(AT_FDCWD, source, AT_FDCWD, path, AT_SYMLINK_FOLLOW), "linkat")


def get_flags(path: str | os.PathLike[str]) -> int:
    """FS_IOC_GETFLAGS of a file or directory."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        (flags,) = struct.unpack_from("=I", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8)))
        return int(flags)
    finally:
        os.close(fd)


def set_flags(path: str | os.PathLike[str], flags: int) -> None:
    """FS_IOC_SETFLAGS."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=Q", flags))
    finally:
        os.close(fd)


def get_xflags(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """FS_IOC_FSGETXATTR: xflags, extsize, nextents, projid, cowextsize."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return struct.unpack_from("=5I", fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(28)))
    finally:
        os.close(fd)


def set_xflags(path: str | os.PathLike[str], values: tuple[int, ...]) -> None:
    """FS_IOC_FSSETXATTR."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, FS_IOC_FSSETXATTR, struct.pack("=5I8x", *values))
    finally:
        os.close(fd)


def clone(target: int, source: int) -> None:
    """FICLONE of the whole file."""
    fcntl.ioctl(target, FICLONE, source)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) in all its modes."""
    size = ctypes.c_int64(length)
    _check(LIBC.fallocate(fd, ctypes.c_int(mode), ctypes.c_int64(offset), size), "fallocate")


def syncfs(fd: int) -> None:
    _check(LIBC.syncfs(fd), "syncfs")


def lseek(fd: int, offset: int) -> int:
    return os.lseek(fd, offset, os.SEEK_SET)


def getdents(fd: int, size: int) -> list[Dirent]:
    """One getdents64 call: what readdir gives, without libc's buffer in between."""
    buffer = ctypes.create_string_buffer(size)
    number = _check(LIBC.syscall(217, fd, buffer, size), "getdents64")
    entries = []
    at = 0
    while at < number:
        ino, cookie, length = struct.unpack_from("=QqH", buffer, at)
        name = buffer.raw[at + 19 : at + length].split(b"\0", 1)[0]
        entries.append(Dirent(name, ino, cookie))
        at += length
    return entries


def read_directory(fd: int, size: int = 32768) -> Iterator[Dirent]:
    """All entries from the descriptor's position on, also `.` and `..`."""
    while batch := getdents(fd, size):
        yield from batch


@contextmanager
def identity(uid: int, gid: int, groups: tuple[int, ...] = ()) -> Iterator[None]:
    """Act as another user: effective ids (and with them the capabilities) for a while.

    The whole process changes, so nothing else may run in it meanwhile.
    """
    if (uid, gid) == (os.geteuid(), os.getegid()):
        yield
        return
    before = os.getgroups()
    mine = os.geteuid(), os.getegid()
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(mine[0])
        os.setegid(mine[1])
        os.setgroups(before)
