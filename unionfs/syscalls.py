# SPDX-License-Identifier: GPL-2.0-or-later
"""The raw system calls that Python's os module does not offer, spelled once.

Owns numbers, flags and argument types; each function raises OSError with the name of the call.
Does not own any policy.  Called by layer, work and session at start and stop only: what a
request needs often is in the C module.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterable
from enum import IntFlag
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

# Added after the unified numbering: the same on every architecture (include/uapi/asm-generic).
_NR_OPEN_TREE: Final = 428
_NR_MOVE_MOUNT: Final = 429
_NR_FSOPEN: Final = 430
_NR_FSCONFIG: Final = 431
_NR_FSMOUNT: Final = 432
_NR_FSPICK: Final = 433
_NR_MOUNT_SETATTR: Final = 442

AT_FDCWD: Final = -100
AT_SYMLINK_FOLLOW: Final = 0x400
AT_EMPTY_PATH: Final = 0x1000
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_FSCONFIG_CMD_RECONFIGURE: Final = 7
_FSPICK_CLOEXEC: Final = 1
_FSPICK_EMPTY_PATH: Final = 8
_FUSE_SUPER_MAGIC: Final = 0x65735546
_MS_PRIVATE: Final = 1 << 18
_CLONE_NEWNS: Final = 0x20000
_CAPABILITY_VERSION_3: Final = 0x20080522
_CLONE_NEWUSER: Final = 0x10000000
_STATFS_BYTES: Final = 256
_STATX_BYTES: Final = 256
_AT_STATX_DONT_SYNC: Final = 0x4000
_FICLONE: Final = 0x40049409
_GETFLAGS: Final = 0x80086601
_FS_ENCRYPT_FL: Final = 0x800
_MAX_HANDLE: Final = 128
RAMFS: Final = 0x858458F6  # linux/magic.h
TMPFS: Final = 0x01021994


class MountAttr(IntFlag):
    """mount_setattr(2) and fsmount(2)."""

    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4
    NOEXEC = 0x8
    NOATIME = 0x10
    STRICTATIME = 0x20
    ATIME_MASK = 0x70
    NODIRATIME = 0x80


class MountFlag(IntFlag):
    """mount(2)."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    SYNCHRONOUS = 16
    DIRSYNC = 128
    NOSYMFOLLOW = 256
    NOATIME = 1024
    NODIRATIME = 2048
    BIND = 4096
    MOVE = 8192
    REC = 16384
    PRIVATE = 1 << 18
    RELATIME = 1 << 21
    STRICTATIME = 1 << 24
    LAZYTIME = 1 << 25


class UnmountFlag(IntFlag):
    """umount2(2)."""

    DETACH = 2
    NOFOLLOW = 8


class RenameFlag(IntFlag):
    """renameat2(2)."""

    NOREPLACE = 1
    EXCHANGE = 2
    WHITEOUT = 4


class _MountAttrStruct(ctypes.Structure):
    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapWord(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


class _FileHandle(ctypes.Structure):
    _fields_ = [
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _MAX_HANDLE),
    ]


def _checked(name: str, result: int, path: str | None = None) -> int:
    if result >= 0:
        return result
    code = ctypes.get_errno()
    raise OSError(code, f"{name}: {os.strerror(code)}", path)


def _call(name: str, number: int, *args: object) -> int:
    """Run a system call by number.  Integers are widened: a variadic int would leave garbage."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return _checked(name, _syscall(ctypes.c_long(number), *words))


def clone_mount(fd: int) -> int:
    """A detached copy of the mount that `fd` (a directory) lies on, rooted at `fd`.

    Without AT_RECURSIVE, so mount points beneath show what they cover.  EPERM without
    CAP_SYS_ADMIN; EINVAL in a user namespace when that would uncover what its owner hid.
    """
    flags = _OPEN_TREE_CLONE | AT_EMPTY_PATH | os.O_CLOEXEC
    return _call("open_tree", _NR_OPEN_TREE, fd, ctypes.c_char_p(b""), flags)


def set_mount_attributes(fd: int, attr_set: MountAttr, attr_clear: MountAttr) -> None:
    """Change the flags of the mount `fd` is the root of, and make it private."""
    attr = _MountAttrStruct(int(attr_set), int(attr_clear), _MS_PRIVATE, 0)
    size = ctypes.sizeof(attr)
    empty = ctypes.c_char_p(b"")
    _call("mount_setattr", _NR_MOUNT_SETATTR, fd, empty, AT_EMPTY_PATH, ctypes.byref(attr), size)


def attach_mount(fd: int, target: str) -> None:
    """move_mount(2): have a detached mount seen at `target`, a directory or, of a file, a file."""
    words = (fd, ctypes.c_char_p(b""), AT_FDCWD, ctypes.c_char_p(os.fsencode(target)))
    _call("move_mount", _NR_MOVE_MOUNT, *words, _MOVE_MOUNT_F_EMPTY_PATH)


def private_tmpfs(options: dict[str, str]) -> int:
    """A tmpfs that is mounted nowhere: gone with the last descriptor on it."""
    attributes = MountAttr.NOSUID | MountAttr.NODEV | MountAttr.NOATIME
    return private_mount("tmpfs", options, (), attributes)


def private_mount(
    fstype: str, options: dict[str, str], flags: Iterable[str], attributes: MountAttr
) -> int:
    """A file system that is mounted nowhere, its root an O_PATH descriptor.

    It is unmounted with the last descriptor on it.  An error has what the file system said of it
    as its text.
    """
    context = _call("fsopen", _NR_FSOPEN, ctypes.c_char_p(fstype.encode()), _FSOPEN_CLOEXEC)
    try:
        for key, value in options.items():
            words = (ctypes.c_char_p(key.encode()), ctypes.c_char_p(os.fsencode(value)), 0)
            _call("fsconfig", _NR_FSCONFIG, context, _FSCONFIG_SET_STRING, *words)
        for flag in flags:
            name = ctypes.c_char_p(flag.encode())
            _call("fsconfig", _NR_FSCONFIG, context, _FSCONFIG_SET_FLAG, name, None, 0)
        _call("fsconfig", _NR_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call("fsmount", _NR_FSMOUNT, context, _FSMOUNT_CLOEXEC, int(attributes))
    except OSError as exc:
        if said := _messages(context):
            raise OSError(exc.errno, said) from exc
        raise
    finally:
        os.close(context)


def make_readonly(root: int) -> None:
    """Have nobody write to a file system any more, wherever it is mounted; `root`: of a mount.

    EBUSY while a file is open for writing.  Afterwards it is as if it had been unmounted.
    """
    flags = _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH
    context = _call("fspick", _NR_FSPICK, root, ctypes.c_char_p(b""), flags)
    try:
        words = (_FSCONFIG_SET_FLAG, ctypes.c_char_p(b"ro"), None, 0)
        _call("fsconfig", _NR_FSCONFIG, context, *words)
        _call("fsconfig", _NR_FSCONFIG, context, _FSCONFIG_CMD_RECONFIGURE, None, None, 0)
    finally:
        os.close(context)


def _messages(context: int) -> str:
    """The errors that a file system has left in its context, each read once (`e TEXT`)."""
    found = []
    with contextlib.suppress(OSError):
        while line := os.read(context, 1024):
            if line.startswith(b"e "):
                found.append(os.fsdecode(line[2:]).strip())
    return ", ".join(found)


def mount(source: str, target: str, fstype: str, flags: MountFlag, data: str = "") -> None:
    """mount(2); where it makes no new mount, the type does not matter."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        fstype.encode(),
        ctypes.c_ulong(int(flags)),
        os.fsencode(data),
    )
    _checked("mount", result, target)


def umount(target: str, flags: UnmountFlag) -> None:
    """umount2(2).  Releases the GIL, so that a loop in this process can go on answering."""
    _checked("umount", _libc.umount2(os.fsencode(target), ctypes.c_int(int(flags))), target)


def exists(directory: int, path: str) -> bool:
    """Whether an open directory has something there, be it a link to nowhere.

    Raises OSError if that cannot be known.
    """
    try:
        os.stat(path, dir_fd=directory, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def filesystem_type(path: str) -> int:
    """f_type of statfs(2): linux/magic.h."""
    told = ctypes.create_string_buffer(_STATFS_BYTES)
    _checked("statfs", _libc.statfs(os.fsencode(path), told), path)
    return ctypes.c_long.from_buffer(told).value


def syncfs(fd: int) -> None:
    """syncfs(2)."""
    _checked("syncfs", _libc.syncfs(ctypes.c_int(fd)))


def set_effective(capability: int, *, on: bool) -> bool:
    """Raise or lower a capability of this thread alone; False if it was so already."""
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    words = (_CapWord * 2)()
    _checked("capget", _libc.capget(ctypes.byref(header), words))
    word, bit = words[capability // 32], 1 << capability % 32
    if bool(word.effective & bit) == on:
        return False
    word.effective ^= bit
    _checked("capset", _libc.capset(ctypes.byref(header), words))
    return True


def unshare_mounts() -> None:
    """A copy of all mounts for this thread alone; while there is but one, for the process."""
    _checked("unshare", _libc.unshare(ctypes.c_int(_CLONE_NEWNS)))


def unshare_user() -> None:
    """A user namespace for this process, of one thread, and mounts that belong to it."""
    flags = _CLONE_NEWUSER | _CLONE_NEWNS
    _checked("unshare", _libc.unshare(ctypes.c_int(flags)))


def renameat2(old_dir: int, old: str, new_dir: int, new: str, flags: RenameFlag) -> None:
    """renameat2(2)."""
    args = (old_dir, os.fsencode(old), new_dir, os.fsencode(new), ctypes.c_uint(int(flags)))
    _checked("renameat2", _libc.renameat2(*args), old)


def link_descriptor(fd: int, directory: int, name: str) -> None:
    """Give a file made by O_TMPFILE its name.  Through /proc: that needs no capability."""
    source = f"/proc/self/fd/{fd}".encode()
    args = (AT_FDCWD, source, directory, os.fsencode(name), AT_SYMLINK_FOLLOW)
    _checked("linkat", _libc.linkat(*args), name)


def device_of(path: str) -> int:
    """st_dev, as far as it is known without asking the server of a network or FUSE file system."""
    found = (ctypes.c_char * _STATX_BYTES)()
    args = (AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, 0, ctypes.byref(found))
    _checked("statx", _libc.statx(*args), path)
    return os.makedev(*struct.unpack_from("=II", found.raw, 136))  # stx_dev_major, stx_dev_minor


def clone_file(source: int, target: int) -> None:
    """FICLONE: share the extents of one file with another."""
    fcntl.ioctl(target, _FICLONE, source)


def is_encrypted(fd: int) -> bool:
    """Whether the kernel encrypts a file or directory (fscrypt), with whatever key."""
    try:
        flags = fcntl.ioctl(fd, _GETFLAGS, bytes(8))
    except OSError:  # a file system without flags
        return False
    return bool(int.from_bytes(flags[:4], sys.byteorder) & _FS_ENCRYPT_FL)


def node_of_fuse(fd: int) -> int | None:
    """The number by which FUSE asks for a file, if it tells; None of other file systems."""
    handle = _FileHandle(handle_bytes=_MAX_HANDLE)
    if not is_in_fuse(f"/proc/self/fd/{fd}") or not _get_handle(fd, handle):
        return None
    high, low = struct.unpack_from("=II", bytes(handle.f_handle))
    return int(high) << 32 | int(low)


def is_in_fuse(path: str) -> bool:
    """Whether something lies in a file system in user space; raises no error."""
    try:
        return filesystem_type(path) == _FUSE_SUPER_MAGIC
    except OSError as exc:
        return exc.errno == errno.ENOSYS  # what every other one has


def _get_handle(fd: int, handle: _FileHandle) -> bool:
    mount_id = ctypes.c_int()
    args = (fd, b"", ctypes.byref(handle), ctypes.byref(mount_id), AT_EMPTY_PATH)
    return int(_libc.name_to_handle_at(*args)) == 0


def has_file_handles(fd: int) -> bool:
    """Whether name_to_handle_at(2) knows the file system of `fd`."""
    if _get_handle(fd, _FileHandle(handle_bytes=_MAX_HANDLE)):
        return True
    code = ctypes.get_errno()
    # EOVERFLOW: it has them, only longer ones than we brought room for.
    if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EOVERFLOW):
        return code == errno.EOVERFLOW
    raise OSError(code, f"name_to_handle_at: {os.strerror(code)}")
