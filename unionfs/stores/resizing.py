# SPDX-License-Identifier: GPL-2.0-or-later
"""Making a store larger, mounted or not.

Owns the order, which loses nothing at whatever step it is cut: an image is lengthened first, which
changes nothing that is there; then the file system is told, by the kernel, which journals it.  An
ext4 that is not mounted is resized in a copy that takes the image's name when it is complete: a cut
resize2fs may leave neither the old nor the new.

xfs and btrfs grow while they are mounted, and are mounted for it (where nobody else sees it, as
always).  ext4 grows mounted where the kernel lets us (CAP_SYS_RESOURCE).
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
import subprocess
from collections.abc import Callable
from typing import Final

from unionfs.errors import UnionfsError, usage_error
from unionfs.stores import kernel, loop, userspace
from unionfs.stores.making import new_file
from unionfs.stores.probe import Contents, probe, require_filesystem, tool

_BLKGETSIZE64: Final = 0x80081272
# fs/ext4/ext4.h: _IOW('f', 16, __u64); xfs_fs.h: _IOW('X', 110, struct xfs_growfs_data) and
# _IOR('X', 124, struct xfs_fsop_geom_v1); btrfs.h: _IOW(0x94, 3, struct btrfs_ioctl_vol_args).
_EXT4_IOC_RESIZE_FS: Final = 0x40086610
_XFS_IOC_FSGROWFSDATA: Final = 0x4010586E
_XFS_IOC_FSGEOMETRY_V1: Final = 0x80705864
_BTRFS_IOC_RESIZE: Final = 0x50009403
_XFS_GEOMETRY_SIZE: Final = 112
_BTRFS_SMALLEST: Final = 256 << 20  # fs/btrfs/ioctl.c
_STEP: Final = 8 << 20

Advance = Callable[[int], None]


def grow(path: str, size: int | None, advance: Advance) -> int:
    """Grow the store at `path` to `size` bytes (a device: to its end); its size then."""
    contents = probe(path)
    require_filesystem(contents)
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
    devices = _loops(path)
    if devices:
        _lengthen(path, size)
        loop.resized(devices[0])
        try:
            _resize_mounted(contents, devices[0])
        except UnionfsError:
            os.truncate(path, length)  # the file system does not know of more
            loop.resized(devices[0])
            raise
        return size
    if contents.fstype == "ext4":
        _grow_copy(path, size, advance)
        return size
    if not kernel.may_mount():
        hint = "ask root to do it"
        raise UnionfsError(f"{path}: an ordinary user cannot grow {contents.fstype}", hint=hint)
    _lengthen(path, size)
    held = loop.attach(path, readonly=False)
    try:
        _resize_mounted(contents, held.path)
    finally:
        os.close(held.fd)
    return size


def _loops(path: str) -> list[str]:
    if os.geteuid() != 0:
        return []
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [device for device, _ in loop.devices_of(fd)]
    finally:
        os.close(fd)


def _lengthen(path: str, size: int) -> None:
    """The file only; what is in it stays where it is."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
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
    _resize_mounted(contents, path)
    return int(end)


def _resize_mounted(contents: Contents, device: str) -> None:
    """Tell a file system that its device is larger; mounted once more, it is the same one."""
    root, _ = kernel.mount(contents._replace(path=device), readonly=False)
    try:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=root)
    finally:
        os.close(root)
    try:
        {"ext4": _resize_ext4, "xfs": _resize_xfs, "btrfs": _resize_btrfs}[contents.fstype](fd)
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        hint = None
        if contents.fstype == "ext4" and exc.errno == errno.EPERM:
            reason = (
                "this kernel does not let us resize a mounted ext4 (CAP_SYS_RESOURCE is missing)"
            )
            hint = "unmount the union, and grow it then"
        raise UnionfsError(f"{contents.path} cannot be grown: {reason}", hint=hint) from exc
    finally:
        os.close(fd)


def _device_bytes(fd: int) -> int:
    """Of the block device under an open file system."""
    number = os.fstat(fd).st_dev
    with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/size") as file:
        return int(file.read()) * 512


def _resize_ext4(fd: int) -> None:
    blocks = _device_bytes(fd) // os.fstatvfs(fd).f_bsize
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


def _grow_copy(path: str, size: int, advance: Advance) -> None:
    """resize2fs on a copy that then replaces the image."""
    real = os.path.realpath(path)
    lock = userspace.lock_image(real, readonly=False)
    try:
        with contextlib.ExitStack() as stack:
            fd, temporary = stack.enter_context(new_file(real, replace=True))
            status = os.fstat(lock)
            copy_sparse(lock, fd, status.st_size, advance)
            os.ftruncate(fd, size)
            os.fchmod(fd, stat.S_IMODE(status.st_mode))
            with contextlib.suppress(PermissionError):
                os.fchown(fd, status.st_uid, status.st_gid)
            _run([tool("e2fsck", "e2fsprogs"), "-f", "-p", temporary], path, good=1)
            _run([tool("resize2fs", "e2fsprogs"), temporary], path, good=0)
    finally:
        os.close(lock)


def _run(command: list[str], path: str, *, good: int) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode > good:
        lines = os.fsdecode(done.stderr or done.stdout).strip().splitlines()
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        name = os.path.basename(command[0])
        hint = f"check it: unionfs store check --repair {path}"
        raise UnionfsError(f"{path} cannot be grown: {name}: {reason}", hint=hint)


def copy_sparse(source: int, target: int, size: int, advance: Advance) -> None:
    """Copy a file's data, by sharing it where that can be done, holes staying holes."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, 0x40049409, source)  # FICLONE
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
