# SPDX-License-Identifier: GPL-2.0-or-later
"""Loop devices that go by themselves with the last user of the file system on them.

Owns the ioctls of loop(4).  One image never gets two writable loop devices, whoever made the first:
two would each have a cache of its own, and destroy the file system between them.
"""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from unionfs.errors import ExitCode, InUse, UnionfsError

_CONTROL: Final = "/dev/loop-control"
# linux/loop.h
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_SET_CAPACITY: Final = 0x4C07
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CTL_GET_FREE: Final = 0x4C82
_READ_ONLY: Final = 1
_AUTOCLEAR: Final = 4
_INFO: Final = struct.Struct("=QQQQQIIII64s64s32s2Q")
_ATTEMPTS: Final = 32


class Loop(NamedTuple):
    """A loop device; it stays as long as `fd` or a mount holds it."""

    fd: int
    path: str


class Bound(NamedTuple):
    """What a loop device is bound to."""

    device: int
    inode: int
    offset: int
    readonly: bool


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No two of us look for the loop device of one image and make it at the same time."""
    fd = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def bound(fd: int) -> Bound | None:
    """What the open loop device `fd` is bound to; None: nothing."""
    buffer = bytearray(_INFO.size)
    try:
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, buffer)
    except OSError as exc:
        if exc.errno in (errno.ENXIO, errno.ENOTTY):
            return None
        raise
    info = _INFO.unpack(buffer)
    return Bound(_real_device(info[0]), info[1], info[3], bool(info[8] & _READ_ONLY))


def _real_device(number: int) -> int:
    """lo_device is the kernel's huge encoding of a dev_t (new_encode_dev)."""
    return os.makedev((number & 0xFFF00) >> 8, number & 0xFF | (number >> 12) & 0xFFF00)


def devices_of(image: int) -> Iterator[tuple[str, Bound]]:
    """The loop devices bound to the open file `image`."""
    status = os.fstat(image)
    for name in sorted(os.listdir("/sys/class/block")):
        if not name.startswith("loop") or not os.path.exists(f"/sys/class/block/{name}/loop"):
            continue
        try:
            fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found = bound(fd)
        except OSError:
            continue
        finally:
            os.close(fd)
        # The device number as the kernel has it: btrfs shows stat(2) another.
        if found is not None and found.inode == status.st_ino and _same_file(name, image, found):
            yield f"/dev/{name}", found


def _same_file(name: str, image: int, found: Bound) -> bool:
    if found.device == os.fstat(image).st_dev:
        return True
    try:
        with open(f"/sys/class/block/{name}/loop/backing_file", "rb") as file:
            path = file.read().rstrip(b"\n")
        return os.path.samestat(os.stat(path), os.fstat(image))
    except OSError:
        return False


def attach(path: str, *, readonly: bool) -> Loop:
    """A loop device for the image, the one that is there or a new one."""
    try:
        image = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        hint = "it must be writable; a mount can do without, by --ro" if not readonly else None
        raise UnionfsError(f"cannot open the image {path}: {reason}", hint=hint) from exc
    try:
        with _alone():
            for device, found in devices_of(image):
                if found.readonly and not readonly:
                    hint = "unmount what uses it first"
                    raise InUse(path, path, f"read-only, by {device}", hint=hint)
                if found.offset == 0:
                    return Loop(os.open(device, _flags(readonly)), device)
            _lock(image, path, readonly=readonly)
            return _make(image, path, readonly=readonly)
    except FileNotFoundError as exc:
        hint = "load the kernel's module (modprobe loop), or pass the loop devices in"
        raise UnionfsError(
            f"no loop device for {path}: there is no {exc.filename}",
            hint=hint,
            code=ExitCode.SYSTEM,
        ) from exc
    finally:
        os.close(image)


def _lock(image: int, path: str, *, readonly: bool) -> None:
    """Keep a user's fuse2fs away.  The device shares the open file, so it also keeps the lock."""
    try:
        fcntl.flock(image, (fcntl.LOCK_SH if readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        hint = "unmount the union that uses it first"
        raise InUse(path, path, "by another program", hint=hint) from None


def _flags(readonly: bool) -> int:
    return (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC


def _make(image: int, path: str, *, readonly: bool) -> Loop:
    name = os.fsencode(path)[:63]
    flags = _AUTOCLEAR | (_READ_ONLY if readonly else 0)
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
    config = struct.pack("=II", image, 0) + info + bytes(64)
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            device = f"/dev/loop{number}"
            fd = os.open(device, _flags(readonly))
            try:
                fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
                return Loop(fd, device)
            except OSError as exc:
                os.close(fd)
                if exc.errno != errno.EBUSY:  # another program was quicker
                    raise
    finally:
        os.close(control)
    raise UnionfsError(f"no loop device is free for {path}", code=ExitCode.SYSTEM)


def resized(device: str) -> None:
    """Tell a loop device that its file has another length now."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _LOOP_SET_CAPACITY, 0)
    finally:
        os.close(fd)
