# SPDX-License-Identifier: GPL-2.0-or-later
"""What one step of the differential test can do, and doing it on one side.

An `Op` is plain data (it goes into a replay file as one JSON line); `Side.apply` carries it out
below one root and gives back what the program saw: a value or an errno. Nothing here compares or
chooses. Paths are relative, never contain `..`, and no symlink's target does, so that nothing
leaves the root.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import select
import stat
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import cast

from tests.rig import syscalls

Json = str | int | bool | None | list["Json"]
Result = tuple[str, object]

SET_ID = stat.S_ISUID | stat.S_ISGID

# Who acts: index 0 is the process's own identity (root, or the ordinary user).
ACTORS: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (0, 0, ()),
    (1000, 1000, (1000, 2000)),
    (1001, 1001, (1001,)),
)


# FS_SYNC_FL, FS_NODUMP_FL, FS_NOATIME_FL; and FS_IMMUTABLE_FL, FS_APPEND_FL, which must not come.
FLAGS = 0x08 | 0x40 | 0x80 | 0x10 | 0x20
# The same by FS_IOC_FSGETXATTR: FS_XFLAG_SYNC, _NOATIME, _NODUMP; _IMMUTABLE, _APPEND.
XFLAGS = 0x20 | 0x40 | 0x80 | 0x08 | 0x10
# Whoever wants a clone and gets one of these copies the bytes. EINVAL: not in whole blocks.
NO_CLONE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL)


@dataclass(frozen=True)
class Op:
    name: str
    args: dict[str, Json] = field(default_factory=dict)
    actor: int = 0
    umask: int = 0o022
    watch: bool = False
    """Look at the paths before and after (which also warms the kernel's caches: not always)."""

    def line(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def parse(line: str) -> Op:
        return Op(**json.loads(line))

    def paths(self) -> list[str]:
        return [str(self.args[key]) for key in ("path", "to") if key in self.args]

    def __str__(self) -> str:
        shown = ", ".join(f"{key}={_short(value)}" for key, value in self.args.items())
        who = f" as {ACTORS[self.actor][0]}" if self.actor else ""
        return f"{self.name}({shown}){who} umask {self.umask:03o}"


def _short(value: Json) -> str:
    text = ascii(value)
    return text if len(text) < 60 else f"{text[:30]}…{text[-12:]}({len(text)})"


def facts(st: os.stat_result) -> tuple[object, ...]:
    """What two stats must agree on, whatever the two trees' device, inode number and clock."""
    directory = stat.S_ISDIR(st.st_mode)
    device = stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode)
    return (
        oct(st.st_mode),
        "dir" if directory else st.st_nlink,
        st.st_uid,
        st.st_gid,
        "dir" if directory else st.st_size,
        st.st_rdev if device else 0,
    )


def pattern(spec: Json) -> bytes:
    """[letter, length] -> bytes that tell their position."""
    assert isinstance(spec, list)
    letter, length = int(str(spec[0])), int(str(spec[1]))
    block = bytes((letter + i * 7) % 251 for i in range(251))
    return (block * (length // 251 + 1))[:length]


class Side:
    """One root and the descriptors, maps and locks held on it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.fds: dict[int, int] = {}
        self.maps: dict[int, mmap.mmap] = {}

    def path(self, relative: str) -> bytes:
        return os.fsencode(f"{self.root}/{relative}" if relative else self.root)

    def close(self) -> None:
        for held in self.maps.values():
            held.close()
        for fd in self.fds.values():
            os.close(fd)
        self.maps.clear()
        self.fds.clear()

    def apply(self, op: Op) -> Result:
        handler: Callable[..., object] = getattr(self, f"do_{op.name}")
        uid, gid, groups = ACTORS[op.actor] if op.actor else (os.geteuid(), os.getegid(), ())
        old = os.umask(op.umask)
        try:
            with syscalls.identity(uid, gid, groups):
                return "ok", handler(**op.args)
        except OSError as error:
            if op.name == "fallocate" and error.errno == errno.EOPNOTSUPP:
                self._lose_capability(cast(int, op.args["slot"]))
            return "error", errno.errorcode.get(error.errno or 0, str(error.errno))
        finally:
            os.umask(old)

    def _lose_capability(self, slot: int) -> None:
        """The kernel takes it from a file in FUSE before the upper's file system can refuse what
        was asked, whoever asked."""
        with contextlib.suppress(OSError):
            os.removexattr(self.fd(slot), "security.capability")

    def fd(self, slot: int) -> int:
        try:
            return self.fds[slot]
        except KeyError:
            raise OSError(errno.EBADF, "empty slot") from None

    # Descriptors

    def _keep(self, slot: int, fd: int) -> object:
        self.do_close(slot)
        self.fds[slot] = fd
        return facts(os.fstat(fd))

    def do_open(self, slot: int, path: str, flags: int, mode: int) -> object:
        # A FIFO without a partner would block for ever.
        return self._keep(slot, os.open(self.path(path), flags | os.O_NONBLOCK, mode))

    def do_openat(self, slot: int, at: int, name: str, flags: int, mode: int) -> object:
        raw = os.fsencode(name)
        return self._keep(slot, os.open(raw, flags | os.O_NONBLOCK, mode, dir_fd=self.fd(at)))

    def do_tmpfile(self, slot: int, path: str, flags: int, mode: int) -> object:
        return self._keep(slot, os.open(self.path(path), os.O_TMPFILE | flags, mode))

    def do_link_fd(self, slot: int, to: str) -> None:
        syscalls.link_descriptor(self.fd(slot), self.path(to))

    def do_tmpfile_excl(self, path: str, to: str, mode: int) -> None:
        """One that shall never have a name."""
        flags = os.O_TMPFILE | os.O_RDWR | os.O_EXCL
        fd = os.open(self.path(path), flags, mode)
        try:
            syscalls.link_descriptor(fd, self.path(to))
        finally:
            os.close(fd)

    def do_close(self, slot: int) -> object:
        held = self.maps.pop(slot, None)
        if held is not None:
            held.close()
        fd = self.fds.pop(slot, None)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def do_read(self, slot: int, size: int) -> object:
        return os.read(self.fd(slot), size)

    def do_pread(self, slot: int, size: int, offset: int) -> object:
        return os.pread(self.fd(slot), size, offset)

    def do_write(self, slot: int, data: Json) -> object:
        return os.write(self.fd(slot), pattern(data))

    def do_pwrite(self, slot: int, data: Json, offset: int) -> object:
        return os.pwrite(self.fd(slot), pattern(data), offset)

    def do_lseek(self, slot: int, offset: int, whence: int) -> object:
        fd = self.fd(slot)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            return "a directory's offsets are its own"
        return os.lseek(fd, offset, whence)

    def do_seek_data(self, slot: int, offset: int, whence: int) -> object:
        """Where holes are is the file system's affair; what it calls one must read as zeros."""
        fd = self.fd(slot)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return "not for what has no data"
        size = os.fstat(fd).st_size
        try:
            found = os.lseek(fd, offset, whence)
        except OSError as error:
            if error.errno != errno.ENXIO or offset >= size:
                raise
            found = size  # a hole up to the end
        reads = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
        if whence == os.SEEK_DATA and reads:
            assert not any(os.pread(fd, found - offset, offset)), f"data before {found}"
        assert offset <= found <= size
        os.lseek(fd, offset, os.SEEK_SET)
        return size

    def do_fallocate(self, slot: int, mode: int, offset: int, length: int) -> object:
        if mode & syscalls.FALLOC_ZERO_RANGE and os.fstat(self.fd(slot)).st_mode & SET_ID:
            return "the kernel takes set-ID bits away before FUSE can say that it has no such mode"
        syscalls.fallocate(self.fd(slot), mode, offset, length)
        return None

    def do_copy_range(
        self, slot: int, source: int, size: int, offset: int, source_offset: int
    ) -> object:
        return os.copy_file_range(self.fd(source), self.fd(slot), size, source_offset, offset)

    def do_flags(self, path: str, bits: int) -> object:
        """File flags; changed only of files, since new files inherit those of directories, and
        what is prepared elsewhere cannot."""
        place = os.fsdecode(self.path(path))
        kind = stat.S_IFMT(os.lstat(place).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            return "the kernel asks a FUSE file system for no other kind's"
        if kind == stat.S_IFDIR:
            bits = 0
        now = syscalls.get_flags(place)
        if bits:
            syscalls.set_flags(place, now ^ bits)
        return syscalls.get_flags(place) & FLAGS

    def do_xflags(self, path: str, bits: int) -> object:
        """The same flags by the other ioctl, and no project."""
        place = os.fsdecode(self.path(path))
        kind = stat.S_IFMT(os.lstat(place).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            return "the kernel asks a FUSE file system for no other kind's"
        if kind == stat.S_IFDIR:
            bits = 0
        now, *rest = syscalls.get_xflags(place)
        if bits:
            syscalls.set_xflags(place, ((now & XFLAGS) ^ bits, *rest))
        now, _extent, _extents, project, _cow = syscalls.get_xflags(place)
        return now & XFLAGS, project

    def do_clone(self, slot: int, source: int) -> object:
        """As `cp --reflink=auto`: the kernel clones nothing of a FUSE file system, and where the
        plain directory's can be cloned the bytes must be the same."""
        target, origin = self.fd(slot), self.fd(source)
        both = [os.fstat(fd) for fd in (target, origin)]
        if not all(stat.S_ISREG(st.st_mode) for st in both) or both[0].st_ino == both[1].st_ino:
            return "not from one file to another"
        try:
            syscalls.clone(target, origin)
        except OSError as error:
            if error.errno not in NO_CLONE:
                raise
            data = os.pread(origin, both[1].st_size, 0)
            if data:
                os.pwrite(target, data, 0)
        return both[1].st_size

    def do_poll(self, slot: int) -> object:
        poll = select.poll()
        poll.register(self.fd(slot), select.POLLIN | select.POLLOUT | select.POLLPRI)
        return [events for _, events in poll.poll(0)]

    def do_syncfs(self, slot: int) -> None:
        syscalls.syncfs(self.fd(slot))

    def do_fstat(self, slot: int) -> object:
        return facts(os.fstat(self.fd(slot)))

    def do_ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self.fd(slot), size)

    def do_fsync(self, slot: int) -> None:
        os.fsync(self.fd(slot))

    def do_fdatasync(self, slot: int) -> None:
        os.fdatasync(self.fd(slot))

    def do_fchmod(self, slot: int, mode: int) -> None:
        os.fchmod(self.fd(slot), mode)

    def do_fchown(self, slot: int, uid: int, gid: int) -> None:
        os.fchown(self.fd(slot), uid, gid)

    def do_futimens(self, slot: int, atime: int, mtime: int) -> None:
        os.utime(self.fd(slot), ns=(atime, mtime))

    def do_fsetxattr(self, slot: int, name: str, value: Json, flags: int) -> None:
        os.setxattr(self.fd(slot), name, pattern(value), flags)

    def do_fgetxattr(self, slot: int, name: str) -> object:
        return os.getxattr(self.fd(slot), name)

    def do_fremovexattr(self, slot: int, name: str) -> None:
        os.removexattr(self.fd(slot), name)

    def do_flistdir(self, slot: int) -> object:
        fd = self.fd(slot)
        syscalls.lseek(fd, 0)
        return sorted(entry.name for entry in syscalls.read_directory(fd))

    def do_mkdirat(self, at: int, name: str, mode: int) -> None:
        os.mkdir(os.fsencode(name), mode, dir_fd=self.fd(at))

    def do_unlinkat(self, at: int, name: str) -> None:
        os.unlink(os.fsencode(name), dir_fd=self.fd(at))

    # Memory maps, kept in the slot of their descriptor

    def do_map(self, slot: int) -> object:
        fd = self.fd(slot)
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode) or not st.st_size:
            return "nothing to map"
        if slot in self.maps:
            self.maps.pop(slot).close()
        self.maps[slot] = mmap.mmap(fd, st.st_size, mmap.MAP_SHARED)
        return st.st_size

    def _window(self, slot: int, offset: int, size: int) -> tuple[mmap.mmap, slice] | None:
        """The part of the map that still lies within the file: beyond it is SIGBUS."""
        held = self.maps.get(slot)
        if held is None:
            return None
        end = min(len(held), os.fstat(self.fd(slot)).st_size)
        return held, slice(min(offset, end), min(offset + size, end))

    def do_map_write(self, slot: int, offset: int, data: Json) -> object:
        raw = pattern(data)
        window = self._window(slot, offset, len(raw))
        if window is None:
            return "no map"
        held, part = window
        held[part] = raw[: part.stop - part.start]
        held.flush()
        return part.stop - part.start

    def do_map_read(self, slot: int, offset: int, size: int) -> object:
        window = self._window(slot, offset, size)
        return "no map" if window is None else window[0][window[1]]

    # Locks: both kinds belong to the open file description

    def do_flock(self, slot: int, how: int) -> None:
        fcntl.flock(self.fd(slot), how | fcntl.LOCK_NB)

    def do_ofd_lock(self, slot: int, kind: int, start: int, length: int) -> None:
        lock = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
        fcntl.fcntl(self.fd(slot), fcntl.F_OFD_SETLK, lock)

    # Names

    def do_mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self.path(path), mode)

    def do_rmdir(self, path: str) -> None:
        os.rmdir(self.path(path))

    def do_unlink(self, path: str) -> None:
        os.unlink(self.path(path))

    def do_rename(self, path: str, to: str, flags: int) -> None:
        syscalls.renameat2(self.path(path), self.path(to), flags)

    def do_link(self, path: str, to: str, follow: bool) -> None:
        os.link(self.path(path), self.path(to), follow_symlinks=follow)

    def do_symlink(self, path: str, target: str) -> None:
        os.symlink(os.fsencode(target), self.path(path))

    def do_readlink(self, path: str) -> object:
        return os.readlink(self.path(path))

    def do_mknod(self, path: str, mode: int, major: int, minor: int) -> None:
        os.mknod(self.path(path), mode, os.makedev(major, minor))

    # Attributes

    def do_truncate(self, path: str, size: int) -> None:
        os.truncate(self.path(path), size)

    def do_chmod(self, path: str, mode: int) -> None:
        os.chmod(self.path(path), mode)

    def do_chown(self, path: str, uid: int, gid: int, follow: bool) -> object:
        if (uid, gid) == (-1, -1) and os.geteuid() == 0:
            with contextlib.suppress(OSError):
                os.getxattr(self.path(path), "security.capability", follow_symlinks=follow)
                return "the kernel does not tell it from a write of root's (docs/adr/0009)"
        os.chown(self.path(path), uid, gid, follow_symlinks=follow)
        return None

    def do_utimens(
        self, path: str, a_s: int, a_ns: int, m_s: int, m_ns: int, follow: bool
    ) -> object:
        flags = 0 if follow else syscalls.AT_SYMLINK_NOFOLLOW
        syscalls.utimensat(self.path(path), (a_s, a_ns), (m_s, m_ns), flags)
        st = os.stat(self.path(path), follow_symlinks=follow)
        fixed = a_ns < 10**9, m_ns < 10**9
        return (st.st_atime_ns if fixed[0] else 0, st.st_mtime_ns if fixed[1] else 0)

    def do_setxattr(self, path: str, name: str, value: Json, flags: int, follow: bool) -> None:
        os.setxattr(self.path(path), name, pattern(value), flags, follow_symlinks=follow)

    def do_setxattr_raw(self, path: str, name: str, value: str) -> None:
        """ACLs and capabilities: the exact bytes, in hex."""
        os.setxattr(self.path(path), name, bytes.fromhex(value))

    def do_getxattr(self, path: str, name: str, follow: bool) -> object:
        return os.getxattr(self.path(path), name, follow_symlinks=follow)

    def do_listxattr(self, path: str, follow: bool) -> object:
        return sorted(os.listxattr(self.path(path), follow_symlinks=follow))

    def do_removexattr(self, path: str, name: str, follow: bool) -> None:
        os.removexattr(self.path(path), name, follow_symlinks=follow)

    def do_stat(self, path: str, follow: bool) -> object:
        return facts(os.stat(self.path(path), follow_symlinks=follow))

    def do_access(self, path: str, mode: int) -> object:
        return os.access(self.path(path), mode, effective_ids=True)

    def do_statfs(self, path: str) -> object:
        got = os.statvfs(self.path(path))
        assert got.f_bavail <= got.f_bfree <= got.f_blocks, got
        assert got.f_ffree <= got.f_files, got
        return got.f_bsize, got.f_frsize, got.f_blocks, got.f_files, got.f_namemax

    # Directories

    def do_listdir(self, path: str) -> object:
        found = []
        with os.scandir(self.path(path)) as entries:
            for entry in entries:
                kinds = entry.is_dir(follow_symlinks=False), entry.is_symlink()
                inode = entry.inode()
                with contextlib.suppress(OSError):
                    assert inode == entry.stat(follow_symlinks=False).st_ino, (
                        f"d_ino {inode} of {entry.name!r} is not its st_ino"
                    )
                found.append((entry.name, *kinds))
        return sorted(found)

    def do_scan(self, path: str, cut: int, size: int) -> object:
        """Read on from the cookie of entry `cut` again: the same entries must follow."""
        fd = os.open(self.path(path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            entries = list(syscalls.read_directory(fd, size))
            if cut < len(entries):
                syscalls.lseek(fd, entries[cut].cookie)
                rest = [entry.name for entry in syscalls.read_directory(fd, 4096)]
                wanted = [entry.name for entry in entries[cut + 1 :]]
                assert rest == wanted, f"after seekdir to {cut}: {rest!r}, before {wanted!r}"
            return sorted(entry.name for entry in entries)
        finally:
            os.close(fd)
