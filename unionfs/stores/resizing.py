# SPDX-License-Identifier: GPL-2.0-or-later
"""Making a store larger or smaller, mounted or not.

Owns the order, which loses nothing at whatever step it is cut: an image is lengthened first, which
changes nothing that is there; then the file system is told, by the kernel, which journals it.  An
ext4 that is not mounted is resized in a copy that takes the image's name when it is complete: a cut
resize2fs may leave neither the old nor the new.

xfs and btrfs grow while they are mounted, and are mounted for it (where nobody else sees it, as
always).  ext4 grows mounted where the kernel lets us (CAP_SYS_RESOURCE).  What an image has been
cut off is looked for first: lengthened, it would seem whole.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Final

from unionfs import capabilities
from unionfs.errors import InUse, UnionfsError, usage_error
from unionfs.stores import kernel, loop, resized, userspace
from unionfs.stores.probe import Contents, probe, require_filesystem
from unionfs.stores.tools import Progress, tool
from unionfs.stores.whole import check_whole

_BLKGETSIZE64: Final = 0x80081272
# fs/ext4/ext4.h: _IOW('f', 16, __u64); xfs_fs.h: _IOW('X', 110, struct xfs_growfs_data) and
# _IOR('X', 124, struct xfs_fsop_geom_v1); btrfs.h: _IOW(0x94, 3, struct btrfs_ioctl_vol_args).
_EXT4_IOC_RESIZE_FS: Final = 0x40086610
_XFS_IOC_FSGROWFSDATA: Final = 0x4010586E
_XFS_IOC_FSGEOMETRY_V1: Final = 0x80705864
_BTRFS_IOC_RESIZE: Final = 0x50009403
_FITRIM: Final = 0xC0185879
_EVERYTHING: Final = (1 << 64) - 1
_XFS_GEOMETRY_SIZE: Final = 112
_BTRFS_SMALLEST: Final = 256 << 20  # fs/btrfs/ioctl.c
_TRIM: Final = 1 << 30


def grow(path: str, size: int | None, advance: Progress) -> int:
    """Grow the store at `path` to `size` bytes (a device: to its end); its size then."""
    contents = _examined(path)
    if contents.fstype not in ("ext4", "xfs", "btrfs"):
        hint = "ext4, xfs and btrfs do"
        raise UnionfsError(f"{path}: {contents.fstype} cannot be grown", hint=hint)
    if stat.S_ISBLK(os.stat(path).st_mode):
        return _grow_device(contents, size)
    if size is None:
        raise usage_error("no --size is given", "write --size 8G, or --size +2G")
    length = os.stat(path).st_size
    if size < length:
        raise usage_error(f"{path} has {length} bytes, more than {size}", "grow makes it larger")
    if contents.fstype == "btrfs" and size < _BTRFS_SMALLEST:
        raise usage_error(f"btrfs cannot be resized to {size} bytes", "write --size 256M or more")
    if not _loops(path):
        if contents.fstype == "ext4":
            resized.as_copy(path, size, advance)
            return size
        if not kernel.may_mount():
            hint = "ask root to do it"
            raise UnionfsError(f"{path}: an ordinary user cannot grow {contents.fstype}", hint=hint)
    _lengthen(path, size)
    held = kernel.attach(contents)
    try:
        loop.resized(held.path)
        _resize_mounted(contents)
    except UnionfsError:
        os.truncate(path, length)  # the file system does not know of more
        loop.resized(held.path)
        raise
    finally:
        os.close(held.fd)
    return size


def _examined(path: str) -> Contents:
    """What is in it, if it is a file system that nothing has been cut off."""
    contents = probe(path)
    require_filesystem(contents)
    check_whole(path, contents.fstype)
    return contents


def _loops(path: str) -> list[str]:
    if os.geteuid() != 0:
        return []
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return userspace.once_left(lambda: [device for device, _ in loop.devices_of(fd)])
    finally:
        os.close(fd)


def _lengthen(path: str, size: int) -> None:
    """The file only; what is in it stays where it is."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        resized.lengthen(fd, size)
        os.fsync(fd)
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"{path} cannot be made larger: {reason}") from exc
    finally:
        os.close(fd)


def _grow_device(contents: Contents, size: int | None) -> int:
    path = contents.path
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = struct.unpack("=Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
    finally:
        os.close(fd)
    if size is not None and size != end:
        hint = "leave --size out: the file system is grown to the end of its device"
        raise usage_error(f"{path} has {end} bytes, and is not resized itself", hint)
    _resize_mounted(contents)
    return int(end)


def _resize_mounted(contents: Contents) -> None:
    """Tell a file system that its device is larger."""
    try:
        with _opened(contents) as fd:
            tell_larger(fd, contents.fstype)
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        hint = None
        if contents.fstype == "ext4" and exc.errno == errno.EPERM:
            reason = (
                "this kernel does not let us resize a mounted ext4 (CAP_SYS_RESOURCE is missing)"
            )
            hint = "unmount the union, and grow it then"
            if stat.S_ISBLK(os.stat(contents.path).st_mode):  # an image is grown as a copy
                hint = "back it up, and grow it by resize2fs(8) while nobody has it mounted"
        raise UnionfsError(f"{contents.path} cannot be grown: {reason}", hint=hint) from exc


def tell_larger(fd: int, fstype: str) -> None:
    """Have an open file system take all of its device; raises OSError."""
    {"ext4": _resize_ext4, "xfs": _resize_xfs, "btrfs": _resize_btrfs}[fstype](fd)


def enlarge(path: str, device: str, fd: int, fstype: str, size: int) -> None:
    """Grow the mounted image at `path`, whose root is open as `fd`; raises OSError, undone."""
    if fstype == "btrfs" and size < _BTRFS_SMALLEST:
        size = _BTRFS_SMALLEST
    try:
        check_whole(path, fstype)
    except UnionfsError as exc:  # cut off while it is mounted
        raise OSError(errno.EIO, exc.message) from exc
    before = os.stat(path).st_size
    space = os.statvfs(os.path.dirname(path))
    if space.f_bavail * space.f_frsize < size - before:
        raise OSError(errno.ENOSPC, "no space for a larger image")
    image = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        resized.lengthen(image, size)
    finally:
        os.close(image)
    loop.resized(device)
    try:
        tell_larger(fd, fstype)
    except OSError:
        os.truncate(path, before)
        loop.resized(device)
        raise


def _device_bytes(fd: int) -> int:
    """Of the block device under an open file system."""
    number = os.fstat(fd).st_dev
    with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/size") as file:
        return int(file.read()) * 512


def _resize_ext4(fd: int) -> None:
    blocks = _device_bytes(fd) // os.fstatvfs(fd).f_bsize
    with capabilities.in_effect():
        fcntl.ioctl(fd, _EXT4_IOC_RESIZE_FS, struct.pack("=Q", blocks))


def _resize_xfs(fd: int) -> None:
    geometry = bytearray(_XFS_GEOMETRY_SIZE)
    fcntl.ioctl(fd, _XFS_IOC_FSGEOMETRY_V1, geometry)
    words = struct.unpack_from("=8I", geometry)  # the first is the block size, the last imaxpct
    blocks = _device_bytes(fd) // words[0]
    if blocks > struct.unpack_from("=Q", geometry, 32)[0]:
        fcntl.ioctl(fd, _XFS_IOC_FSGROWFSDATA, struct.pack("=QI4x", blocks, words[7]))


def _resize_btrfs(fd: int) -> None:
    fcntl.ioctl(fd, _BTRFS_IOC_RESIZE, bytearray(struct.pack("=q4088s", 0, b"max")))


def promised_by_btrfs(uuid: str) -> Callable[[], int]:
    """Bytes of data that wait in memory: btrfs's statfs(2) shows their space as free until then.

    Those of ext4 and xfs are taken from it when they are written to memory.
    """
    # Documentation/ABI/testing has no page for it: fs/btrfs/sysfs.c, space_info_attrs.
    path = f"/sys/fs/btrfs/{uuid}/allocation/data/bytes_may_use"

    def promised() -> int:
        try:
            with open(path, encoding="ascii") as file:
                return int(file.read())
        except OSError:  # no sysfs here
            return 0

    return promised


def shrink(path: str, size: int, advance: Progress) -> None:
    """Make an image smaller: an ext4 as a copy, a btrfs mounted; the file is cut last."""
    contents = _examined(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise usage_error(f"{path} is no image", "only images are made smaller")
    if size > os.stat(path).st_size:
        raise usage_error(f"{path} has only {os.stat(path).st_size} bytes", "shrink makes it less")
    if contents.fstype == "ext4":
        if devices := _loops(path):
            hint = "unmount the union first"
            raise InUse(path, path, f"by {devices[0]}", hint=hint)
        resized.as_copy(path, size, advance)
    elif contents.fstype == "btrfs" and kernel.may_mount():
        if size < _BTRFS_SMALLEST:
            hint = "write --size 256M or more"
            raise usage_error(f"btrfs cannot be resized to {size} bytes", hint)
        advance.phase("moving what lies further back")
        _shrink_btrfs(contents, size)
    else:
        hint = "make a smaller store, and clone it"
        raise UnionfsError(f"{path}: {contents.fstype} cannot be made smaller here", hint=hint)


def _shrink_btrfs(contents: Contents, size: int) -> None:
    held = kernel.attach(contents)
    try:
        words = bytearray(struct.pack("=q4088s", 0, str(size).encode()))
        with _opened(contents) as fd:
            fcntl.ioctl(fd, _BTRFS_IOC_RESIZE, words)
        os.truncate(contents.path, size)
        loop.resized(held.path)
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"{contents.path} cannot be made smaller: {reason}") from exc
    finally:
        os.close(held.fd)


def compact(path: str, advance: Progress) -> None:
    """Give the space of an image that its file system does not use back to its disk."""
    contents = _examined(path)
    if contents.fstype not in ("ext4", "xfs", "btrfs"):
        raise UnionfsError(f"{path}: {contents.fstype} has nothing to give back")
    if kernel.may_mount():
        try:
            with _opened(contents) as fd:
                _trim(fd, contents.fstype, advance)
        except OSError as exc:
            reason = os.strerror(exc.errno or errno.EIO)
            hint = "its disk takes no space back" if exc.errno == errno.EOPNOTSUPP else None
            raise UnionfsError(f"{path} cannot be compacted: {reason}", hint=hint) from exc
        return
    if contents.fstype != "ext4":
        raise UnionfsError(f"{path}: an ordinary user cannot compact {contents.fstype}")
    lock = userspace.lock_image(path, readonly=False)
    advance.phase("giving space back")
    try:
        command = [tool("e2fsck", "e2fsprogs"), "-f", "-p", "-E", "discard", path]
        resized.check(command, path, what="compacted")
    finally:
        os.close(lock)


def _trim(fd: int, fstype: str, advance: Progress) -> None:
    """In pieces, between which it can be interrupted; btrfs counts addresses of its own."""
    space = os.fstatvfs(fd)
    end = 0 if fstype == "btrfs" else space.f_blocks * space.f_frsize
    advance.phase("giving space back", "GiB" if end else "")
    for start in range(0, end, _TRIM):
        fcntl.ioctl(fd, _FITRIM, struct.pack("=QQQ", start, _TRIM, 0))
        advance(1)
    # What statfs(2) does not count, such as the journal's surroundings, is at the end.
    fcntl.ioctl(fd, _FITRIM, struct.pack("=QQQ", end, _EVERYTHING - end, 0))


@contextlib.contextmanager
def _opened(contents: Contents) -> Iterator[int]:
    """The root of a file system; mounted once more, it is the same one."""
    root, _ = kernel.mount(contents, readonly=False)
    try:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=root)
    finally:
        os.close(root)
    try:
        yield fd
    finally:
        os.close(fd)
