# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's side in Python: requests that change the union, and the engine's life.

The threads of `_native.Engine` answer by themselves what asks what is there and what moves bytes.
For the rest they call `Requests` on the thread that has read the request: the wire's bytes become
the arguments of the same `pyfuse3.Operations` that pyfuse3's loop drives, and its answer bytes
again (include/uapi/linux/fuse.h). Called by daemon.py.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import stat
import struct
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import pyfuse3
import trio

from unionfs import attributes, passthrough, uring
from unionfs._native import Engine, Tree
from unionfs.flags import FSSETXATTR, SETFLAGS
from unionfs.handshake import InitFlag, Wishes, answer_init
from unionfs.operations import UnionOperations

log = logging.getLogger("unionfs")

_SECOND: Final = 10**9
_ENTRY: Final = struct.Struct("=QQQQII")  # fuse_entry_out up to attr
_ATTR_OUT: Final = struct.Struct("=QII")  # fuse_attr_out up to attr
_ATTR: Final = struct.Struct("=QQQqqqIIIIIIIIII")  # fuse_attr
_OPEN_OUT: Final = struct.Struct("=QII")
_GETXATTR: Final = struct.Struct("=II")
_SETXATTR: Final = struct.Struct("=II")
_MKNOD: Final = struct.Struct("=IIII")
_MKDIR: Final = struct.Struct("=II")
_CREATE: Final = struct.Struct("=IIII")
_OPEN: Final = struct.Struct("=II")
_LINK: Final = struct.Struct("=Q")
_RENAME: Final = struct.Struct("=Q")
_RENAME2: Final = struct.Struct("=QII")
_FSYNC: Final = struct.Struct("=QII")
_IOCTL: Final = struct.Struct("=QIIQII")
_IOCTL_OUT: Final = struct.Struct("=iIII")
_SETATTR: Final = struct.Struct("=IIQQQqqqIIIIIIII")
_KEEP_CACHE: Final = 1 << 1
_DATASYNC: Final = 1
_OPEN_KILL_SUIDGID: Final = 1


class Opcode(IntEnum):
    """Requests, as the kernel numbers them."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class _Valid(IntEnum):
    """FATTR_*: what a SETATTR sets."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    KILL_SUIDGID = 1 << 11


@dataclass(slots=True)
class Context:
    """Who asks; as pyfuse3.RequestContext, which cannot be filled from outside."""

    uid: int
    gid: int
    pid: int
    umask: int = 0
    kills_set_id: bool = False  # the kernel says so: whoever it is has no CAP_FSETID


@dataclass(slots=True)
class Fields:
    """What is set; as pyfuse3.SetattrFields."""

    update_mode: bool
    update_uid: bool
    update_gid: bool
    update_size: bool
    update_atime: bool
    update_mtime: bool


@dataclass(slots=True)
class _Wanted:
    """The values of a SETATTR; as pyfuse3.EntryAttributes."""

    st_mode: int
    st_uid: int
    st_gid: int
    st_size: int
    st_atime_ns: int
    st_mtime_ns: int


Answer = bytes | int
Handler = Callable[[int, Context, bytes], Answer]


def _run(handler: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401
    """A handler's answer. It never waits: under the engine all its work is done in place."""
    try:
        handler.send(None)
    except StopIteration as end:
        return end.value
    handler.close()
    raise AssertionError("a handler waited for the loop")


def _name(body: bytes, at: int = 0) -> bytes:
    return body[at : body.index(b"\0", at)]


def _two_names(body: bytes, at: int = 0) -> tuple[bytes, bytes]:
    first, second, *_ = body[at:].split(b"\0", 2)
    return first, second


def _seconds(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * _SECOND)


def _attr(e: pyfuse3.EntryAttributes) -> bytes:
    atime, atime_rest = divmod(e.st_atime_ns, _SECOND)
    mtime, mtime_rest = divmod(e.st_mtime_ns, _SECOND)
    ctime, ctime_rest = divmod(e.st_ctime_ns, _SECOND)
    rdev = e.st_rdev
    major, minor = os.major(rdev), os.minor(rdev)
    return _ATTR.pack(
        e.st_ino,
        e.st_size,
        e.st_blocks,
        atime,
        mtime,
        ctime,
        atime_rest,
        mtime_rest,
        ctime_rest,
        e.st_mode,
        e.st_nlink,
        e.st_uid,
        e.st_gid,
        (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12),  # new_encode_dev
        e.st_blksize,
        0,
    )


def _entry(e: pyfuse3.EntryAttributes) -> bytes:
    names, names_rest = _seconds(e.entry_timeout)
    attrs, attrs_rest = _seconds(e.attr_timeout)
    return _ENTRY.pack(e.st_ino, e.generation, names, attrs, names_rest, attrs_rest) + _attr(e)


def _attr_out(e: pyfuse3.EntryAttributes) -> bytes:
    attrs, attrs_rest = _seconds(e.attr_timeout)
    return _ATTR_OUT.pack(attrs, attrs_rest, 0) + _attr(e)


def _open_out(info: pyfuse3.FileInfo) -> bytes:
    return _OPEN_OUT.pack(info.fh, _KEEP_CACHE if info.keep_cache else 0, 0)


class Requests:
    """One union's operations as the engine calls them."""

    def __init__(self, operations: UnionOperations) -> None:
        # pyfuse3's own classes of arguments cannot be made here; ours have the same attributes.
        self._operations: Any = operations
        self._handlers: dict[int, Handler] = {
            Opcode.SETATTR: self._setattr,
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename2,
            Opcode.LINK: self._link,
            Opcode.OPEN: self._open,
            Opcode.CREATE: self._create,
            Opcode.TMPFILE: self._tmpfile,
            Opcode.IOCTL: self._ioctl,
            Opcode.FSYNC: self._fsync,
            Opcode.FSYNCDIR: self._fsyncdir,
            Opcode.GETXATTR: self._getxattr,
            Opcode.SETXATTR: self._setxattr,
            Opcode.REMOVEXATTR: self._removexattr,
        }

    def __call__(self, opcode: int, ino: int, uid: int, gid: int, pid: int, body: bytes) -> Answer:
        """The answer's bytes, or a negative errno."""
        try:
            return self._handlers[opcode](ino, Context(uid, gid, pid), body)
        except pyfuse3.FUSEError as exc:
            return -exc.errno
        except BaseException:
            log.exception("request %d failed unexpectedly", opcode)
            return -errno.EIO

    def _setattr(self, ino: int, ctx: Context, body: bytes) -> Answer:
        valid, _, fh, size, _, atime, mtime, _, atime_rest, mtime_rest, _, mode, _, uid, gid, _ = (
            _SETATTR.unpack_from(body)
        )
        ctx.kills_set_id = bool(valid & _Valid.KILL_SUIDGID)
        now = time.time_ns() if valid & (_Valid.ATIME_NOW | _Valid.MTIME_NOW) else 0
        fields = Fields(
            update_mode=bool(valid & _Valid.MODE),
            update_uid=bool(valid & _Valid.UID),
            update_gid=bool(valid & _Valid.GID),
            update_size=bool(valid & _Valid.SIZE),
            update_atime=bool(valid & (_Valid.ATIME | _Valid.ATIME_NOW)),
            update_mtime=bool(valid & (_Valid.MTIME | _Valid.MTIME_NOW)),
        )
        wanted = _Wanted(
            st_mode=mode,
            st_uid=uid,
            st_gid=gid,
            st_size=size,
            st_atime_ns=now if valid & _Valid.ATIME_NOW else atime * _SECOND + atime_rest,
            st_mtime_ns=now if valid & _Valid.MTIME_NOW else mtime * _SECOND + mtime_rest,
        )
        handle = fh if valid & _Valid.FH else None
        return _attr_out(_run(self._operations.setattr(ino, wanted, fields, handle, ctx)))

    def _symlink(self, ino: int, ctx: Context, body: bytes) -> Answer:
        name, target = _two_names(body)
        return _entry(_run(self._operations.symlink(ino, name, target, ctx)))

    def _mknod(self, ino: int, ctx: Context, body: bytes) -> Answer:
        mode, rdev, ctx.umask, _ = _MKNOD.unpack_from(body)
        major, minor = (rdev & 0xFFF00) >> 8, (rdev & 0xFF) | ((rdev >> 12) & 0xFFF00)
        device = os.makedev(major, minor)
        name = _name(body, _MKNOD.size)
        return _entry(_run(self._operations.mknod(ino, name, mode, device, ctx)))

    def _mkdir(self, ino: int, ctx: Context, body: bytes) -> Answer:
        mode, ctx.umask = _MKDIR.unpack_from(body)
        name = _name(body, _MKDIR.size)
        return _entry(_run(self._operations.mkdir(ino, name, stat.S_IMODE(mode), ctx)))

    def _unlink(self, ino: int, ctx: Context, body: bytes) -> Answer:
        _run(self._operations.unlink(ino, _name(body), ctx))
        return b""

    def _rmdir(self, ino: int, ctx: Context, body: bytes) -> Answer:
        _run(self._operations.rmdir(ino, _name(body), ctx))
        return b""

    def _rename(self, ino: int, ctx: Context, body: bytes) -> Answer:
        (to,) = _RENAME.unpack_from(body)
        old, new = _two_names(body, _RENAME.size)
        _run(self._operations.rename(ino, old, to, new, 0, ctx))
        return b""

    def _rename2(self, ino: int, ctx: Context, body: bytes) -> Answer:
        to, flags, _ = _RENAME2.unpack_from(body)
        old, new = _two_names(body, _RENAME2.size)
        _run(self._operations.rename(ino, old, to, new, flags, ctx))
        return b""

    def _link(self, ino: int, ctx: Context, body: bytes) -> Answer:
        (old,) = _LINK.unpack_from(body)
        return _entry(_run(self._operations.link(old, ino, _name(body, _LINK.size), ctx)))

    def _open(self, ino: int, ctx: Context, body: bytes) -> Answer:
        flags, how = _OPEN.unpack_from(body)
        ctx.kills_set_id = bool(how & _OPEN_KILL_SUIDGID)
        return _open_out(_run(self._operations.open(ino, flags, ctx)))

    def _create(self, ino: int, ctx: Context, body: bytes) -> Answer:
        flags, mode, ctx.umask, _ = _CREATE.unpack_from(body)
        name = _name(body, _CREATE.size)
        info, entry = _run(self._operations.create(ino, name, mode, flags, ctx))
        return _entry(entry) + _open_out(info)

    def _tmpfile(self, ino: int, ctx: Context, body: bytes) -> Answer:
        flags, mode, ctx.umask, _ = _CREATE.unpack_from(body)
        info, entry = _run(self._operations.tmpfile(ino, mode, flags, ctx))
        return _entry(entry) + _open_out(info)

    def _fsync(self, ino: int, ctx: Context, body: bytes) -> Answer:
        fh, flags, _ = _FSYNC.unpack_from(body)
        _run(self._operations.fsync(fh, bool(flags & _DATASYNC)))
        return b""

    def _fsyncdir(self, ino: int, ctx: Context, body: bytes) -> Answer:
        fh, flags, _ = _FSYNC.unpack_from(body)
        _run(self._operations.fsyncdir(fh, bool(flags & _DATASYNC)))
        return b""

    def _ioctl(self, ino: int, ctx: Context, body: bytes) -> Answer:
        _, _, command, _, size, _ = _IOCTL.unpack_from(body)
        if command not in (SETFLAGS, FSSETXATTR):
            return -errno.ENOTTY
        wanted = body[_IOCTL.size : _IOCTL.size + size]
        _run(self._operations.set_flags(ino, wanted, command == FSSETXATTR))
        return _IOCTL_OUT.pack(0, 0, 0, 0)

    def _getxattr(self, ino: int, ctx: Context, body: bytes) -> Answer:
        size, _ = _GETXATTR.unpack_from(body)
        value: bytes = _run(self._operations.getxattr(ino, _name(body, _GETXATTR.size), ctx))
        if not size:
            return _GETXATTR.pack(len(value), 0)
        return value if len(value) <= size else -errno.ERANGE

    def _setxattr(self, ino: int, ctx: Context, body: bytes) -> Answer:
        size, flags = _SETXATTR.unpack_from(body)
        name = _name(body, _SETXATTR.size)
        start = _SETXATTR.size + len(name) + 1
        value = body[start : start + size]
        if flags:  # as pyfuse3 does
            self._check_presence(ino, name, flags, ctx)
        _run(self._operations.setxattr(ino, name, value, ctx, flags))
        return b""

    def _check_presence(self, ino: int, name: bytes, flags: int, ctx: Context) -> None:
        """XATTR_CREATE and XATTR_REPLACE of setxattr(2)."""
        try:
            _run(self._operations.getxattr(ino, name, ctx))
        except pyfuse3.FUSEError as exc:
            if exc.errno in attributes.UNREADABLE:
                return  # may be set all the same: setxattr(2) will tell
            if exc.errno != errno.ENODATA or flags & os.XATTR_REPLACE:
                raise
        else:
            if flags & os.XATTR_CREATE:
                raise pyfuse3.FUSEError(errno.EEXIST)

    def _removexattr(self, ino: int, ctx: Context, body: bytes) -> Answer:
        _run(self._operations.removexattr(ino, _name(body), ctx))
        return b""


class EngineLoop:
    """The engine over the device of a fresh mount, with the interface of handshake.Loop."""

    def __init__(self, device: int, wishes: Wishes, *, only_root_and_us: bool) -> None:
        """Take over `device`, the descriptor of /dev/fuse that was mounted."""
        self._device = device
        self._no_rings = uring.REFUSED  # why; empty: there are some
        self._only_uid = os.geteuid() if only_root_and_us else -1
        self._wishes = wishes
        self._engine: Engine | None = None
        self._tree: Tree | None = None
        self._no_passthrough: str | None = None
        self.flags = InitFlag(0)

    async def run(self, operations: pyfuse3.Operations, on_init: Callable[[], None]) -> None:
        """Serve until the file system is unmounted; `on_init` when the kernel has its answer."""
        assert isinstance(operations, UnionOperations)
        await trio.lowlevel.wait_readable(self._device)
        operations.in_place = True
        union = operations.union
        self._no_passthrough = passthrough.not_wanted(union.options)
        wishes = self._wishes
        if self._no_passthrough is None:
            wishes = dataclasses.replace(wishes, stack_depth=passthrough.STACK_DEPTH)
        rings = self._answer_init(wishes, union.options.io_uring)
        if self._no_passthrough is None:
            self._no_passthrough = self._try_passthrough()
        union.kills_privileges = InitFlag.HANDLE_KILLPRIV_V2 in self.flags
        layer = union.upper if union.upper is not None else union.lowers[0]
        self._tree = union.tree
        self._engine = Engine(
            union.tree,
            device=self._device,
            statfs_fd=layer.fd,
            valid_ns=int(operations.timeout * _SECOND),
            keep_cache=not operations.live,
            flush=operations.flush_matters,
            only_uid=self._only_uid,
            passthrough=passthrough.OFF
            if self._no_passthrough
            else passthrough.which(union.options),
            no_open=union.readonly
            and not operations.live
            and self._no_passthrough is not None
            and InitFlag.NO_OPEN_SUPPORT in self.flags,
            call=Requests(operations),
            rings=rings,
        )
        union.requests = self._counts
        union.passthrough = self._passed
        union.without_io_uring = self._without_rings
        on_init()
        await trio.lowlevel.wait_readable(self._engine.fileno())

    def _answer_init(self, wishes: Wishes, io_uring: bool) -> object | None:
        """Rings, if the kernel agreed to use them."""
        rings = None
        if io_uring:
            rings, self._no_rings = uring.prepare()
        if rings is not None:
            wishes = dataclasses.replace(wishes, wanted=wishes.wanted | InitFlag.OVER_IO_URING)
        self.flags = answer_init(self._device, wishes)
        if rings is not None and InitFlag.OVER_IO_URING not in self.flags:
            rings, self._no_rings = None, uring.SWITCHED_OFF
        return rings

    def _try_passthrough(self) -> str | None:
        if InitFlag.PASSTHROUGH not in self.flags:
            return "this kernel has no FUSE passthrough (Linux 6.9)"
        return passthrough.refused(self._device)

    def _passed(self) -> dict[str, Any]:
        """Whether files are passed through, how many were, and why one was not."""
        assert self._engine is not None
        opened, anew, code = self._engine.passed()
        reason = self._no_passthrough or (passthrough.explain(code) if code else None)
        return {
            "active": self._no_passthrough is None,
            "opened": opened,
            "opened_anew": anew,
            "reason": reason,
        }

    def _without_rings(self) -> str:
        """Why requests do not come over io_uring; empty if they do."""
        if self._engine is not None and (error := self._engine.ring_error()):
            return f"the kernel refused the rings: {os.strerror(error)}"
        return self._no_rings

    def _counts(self) -> dict[str, dict[str, int]]:
        """Requests by kind and by who answered them."""
        assert self._engine is not None
        counts: dict[str, dict[str, int]] = {"engine": {}, "python": {}}
        for number, (engine, python) in sorted(self._engine.counts().items()):
            with contextlib.suppress(ValueError):
                name = Opcode(number).name.lower()
                for who, count in (("engine", engine), ("python", python)):
                    if count:
                        counts[who][name] = count
        return counts

    def stop(self) -> None:
        """Let the threads end after the requests that are being answered."""
        if self._engine is not None:
            self._engine.stop()

    def close(self) -> None:
        """End the threads and close the device, which ends the connection."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._tree is not None:
            # The kernel holds what is passed through until it is told otherwise, by this device.
            self._tree.close()
        if self._device >= 0:
            os.close(self._device)
            self._device = -1


__all__ = ["EngineLoop", "Opcode", "Requests"]
