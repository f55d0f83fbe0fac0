# SPDX-License-Identifier: GPL-2.0-or-later
"""The requests: pyfuse3's arguments in, attributes out, no decisions.

Handlers never wait for a trio task of their own. What may move bytes or wait for a disk goes
through `_work`: tried in place, and where it says that it is long (LongWork, before it has changed
anything) once more in a worker thread; in a worker thread at once while another is at work. Every
handler has one edge: an OSError becomes its errno, anything else is logged with its traceback and
becomes EIO, and the mount lives.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import signal
import stat
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, StatvfsData

from unionfs import _native, attributes, copy_up, create, flags, remove, rename
from unionfs._native import ROOT_INO
from unionfs.attributes import Change
from unionfs.create import New
from unionfs.union import LongWork, Union

log = logging.getLogger("unionfs")
P = ParamSpec("P")
R = TypeVar("R")

STATUS_XATTR = b"user.unionfs.status"
FOREVER = 1e9  # seconds
# Directory entries asked of the tree at a time.
ENTRIES = 64
# Long works at a time, in threads of their own; further ones wait.
LONG_AT_ONCE = 200
Attr = tuple[int, ...]
WRITING = os.O_WRONLY | os.O_RDWR


def edge(handler: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """The one place where errors turn into errno."""

    @functools.wraps(handler)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(*args, **kwargs)
        except OSError as exc:
            code = exc.errno or errno.EIO
            if code == errno.EIO:
                _complain(args[0], handler.__name__, exc)
            raise FUSEError(code) from exc
        except FUSEError:
            raise
        except Exception as exc:
            log.exception("%s failed unexpectedly", handler.__name__)
            raise FUSEError(errno.EIO) from exc

    return wrapped


def _complain(operations: object, name: str, exc: OSError) -> None:
    reason = None
    if isinstance(operations, UnionOperations):
        reason = operations.union.tree.take_warning()
    log.error("%s: %s", name, reason or exc)


class UnionOperations(pyfuse3.Operations):
    """One union as pyfuse3 sees it."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, union: Union) -> None:
        super().__init__()
        self.union = union
        self.enable_acl = not union.options.noacl
        options = union.options
        # Seconds that the kernel may keep names and attributes.
        self.timeout = FOREVER if options.timeout is None else options.timeout
        if options.lower_live and options.timeout is None:
            self.timeout = 1.0
        # Somebody else changes the layers: nothing of them may stay in the kernel.
        self.live = options.lower_live or options.timeout is not None
        self.flush_matters = _remote(union)
        # Whoever calls has a thread for it (the engine).
        self.in_place = False
        self._long_works = 0
        self._limiter = trio.CapacityLimiter(LONG_AT_ONCE)

    async def _work(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._long_works and not self.in_place:
            try:
                return function(*args, **kwargs)
            except LongWork:
                pass
        # While bytes move, the upper's file system may let every change wait for its journal: the
        # loop must not, or the requests that change nothing would wait as well.
        return await self._long(function, *args, **kwargs)

    async def _long(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        if self.in_place:
            return self.union.long(function, *args, **kwargs)

        def call() -> R:
            try:
                return self.union.long(function, *args, **kwargs)
            finally:
                # The loop's thread may be in a read of libfuse's whose request was taken back
                # (its process was killed): EINTR brings it back to us (daemon.py has the handler).
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)

        self._long_works += 1
        try:
            return await trio.to_thread.run_sync(call, limiter=self._limiter)
        finally:
            self._long_works -= 1

    def _attributes(self, attr: Attr) -> EntryAttributes:
        e = EntryAttributes()
        e.st_ino = attr[0]
        e.generation = 0
        e.entry_timeout = e.attr_timeout = self.timeout
        e.st_mode = attr[1]
        e.st_nlink = attr[2]
        e.st_uid = attr[3]
        e.st_gid = attr[4]
        e.st_rdev = attr[5]
        e.st_size = attr[6]
        e.st_blksize = attr[7]
        e.st_blocks = attr[8]
        e.st_atime_ns = attr[9]
        e.st_mtime_ns = attr[10]
        e.st_ctime_ns = attr[11]
        return e

    def _check_writable(self) -> None:
        if self.union.readonly:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # ---- what is there ----

    @edge
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        try:
            return self._attributes(self.union.tree.lookup(parent_inode, name))
        except FileNotFoundError:
            missing = EntryAttributes()
            missing.st_ino = 0  # a name that the kernel may remember not to be there
            missing.entry_timeout = self.timeout
            return missing

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, nlookup in inode_list:
            self.union.tree.forget(ino, nlookup)

    @edge
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return self._attributes(self.union.tree.getattr(inode))

    @edge
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self.union.tree.readlink(inode)

    @edge
    async def statfs(self, ctx: pyfuse3.RequestContext) -> StatvfsData:
        union = self.union
        layer = union.upper if union.upper is not None else union.lowers[0]
        found = os.fstatvfs(layer.fd)
        missing = _native.room_missing(union.image, found.f_bfree * found.f_frsize)
        missing //= found.f_frsize or 1  # a file system may tell of none
        data = StatvfsData()
        data.f_bsize = found.f_bsize
        data.f_frsize = found.f_frsize
        data.f_blocks = found.f_blocks
        data.f_bfree = found.f_bfree - missing
        data.f_bavail = max(0, found.f_bavail - missing)
        data.f_files = found.f_files
        data.f_ffree = found.f_ffree
        data.f_favail = found.f_favail
        data.f_namemax = found.f_namemax
        return data

    @edge
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # never asked: the kernel checks (default_permissions)

    @edge
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if inode == ROOT_INO and name == STATUS_XATTR:
            return json.dumps(self.union.status()).encode()
        return self.union.tree.getxattr(inode, name)

    @edge
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return self.union.tree.listxattr(inode, ctx.uid == 0)

    # ---- open files ----

    @edge
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        if flags & WRITING or flags & os.O_TRUNC:
            self._check_writable()
            await self._work(self._open_for_writing, inode, flags, ctx)
        return FileInfo(fh=self.union.tree.open(inode, flags), keep_cache=not self.live)

    def _open_for_writing(self, inode: int, how: int, ctx: pyfuse3.RequestContext) -> None:
        append = how & (os.O_APPEND | os.O_TRUNC) == os.O_APPEND
        self.union.tree.changeable(inode, append, False)
        if how & os.O_TRUNC:
            attributes.truncate_at_open(self.union, inode, ctx)
        else:
            copy_up.ensure_upper(self.union, inode, data=True)

    @edge
    async def create(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[FileInfo, EntryAttributes]:
        self._check_writable()
        new = New(mode=stat.S_IFREG | stat.S_IMODE(mode), flags=flags)
        fd = await self._work(create.create, self.union, parent_inode, name, new, ctx)
        try:
            attr = self.union.tree.lookup(parent_inode, name)
            fh = self.union.tree.adopt(attr[0], fd, flags)
        except BaseException:
            os.close(fd)
            raise
        return FileInfo(fh=fh, keep_cache=True), self._attributes(attr)

    @edge
    async def tmpfile(
        self, parent_inode: int, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """open(2) with O_TMPFILE; pyfuse3 has no handler for it."""
        self._check_writable()
        new = New(mode=stat.S_IFREG | stat.S_IMODE(mode), flags=flags)
        fd = await self._work(create.create_nameless, self.union, parent_inode, new, ctx)
        try:
            attr = self.union.tree.made_nameless(fd)
            try:
                fh = self.union.tree.adopt(attr[0], fd, flags)
            except BaseException:
                self.union.tree.forget(attr[0], 1)
                raise
        except BaseException:
            os.close(fd)
            raise
        return FileInfo(fh=fh, keep_cache=True), self._attributes(attr)

    @edge
    async def read(self, fh: int, off: int, size: int) -> bytes:
        data = self.union.tree.read(fh, off, size, True)
        if data is None:
            data = await self._long(self.union.tree.read, fh, off, size, False)
        return data or b""

    @edge
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._work(self.union.tree.write, fh, off, buf)

    @edge
    async def flush(self, fh: int) -> None:
        if not self.flush_matters:
            raise FUSEError(errno.ENOSYS)  # never asked again
        _, _, fd = self.union.tree.file_info(fh)
        os.close(os.dup(fd))

    @edge
    async def fsync(self, fh: int, datasync: bool) -> None:
        if self.union.options.fsync != "volatile" and not self.union.readonly:
            await self._long(self._fsync, fh, datasync)

    def _fsync(self, fh: int, datasync: bool) -> None:
        self.union.tree.fsync(fh, datasync)
        ino, _, _ = self.union.tree.file_info(fh)
        copy_up.sync_names(self.union, ino)

    async def release(self, fh: int) -> None:
        self.union.tree.release(fh)

    # ---- directories ----

    @edge
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return self.union.tree.opendir(inode)

    @edge
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        tree = self.union.tree
        directory = tree.dir_ino(fh)
        while True:
            entries = tree.readdir(fh, start_id, ENTRIES)
            for entry in entries:
                if not self._reply_entry(token, directory, entry):
                    return
                start_id = entry[2]
            if len(entries) < ENTRIES:
                return

    def _reply_entry(
        self, token: pyfuse3.ReaddirToken, directory: int, entry: tuple[bytes, int, int]
    ) -> bool:
        name, kind, next_id = entry
        tree = self.union.tree
        if name in (b".", b".."):
            # The kernel takes no reference for these two.
            above = tree.name_of(directory) if name == b".." else None
            attr = tree.getattr(above[0] if above else directory)
            return bool(pyfuse3.readdir_reply(token, name, self._attributes(attr), next_id))
        try:
            attr = tree.lookup(directory, name)
        except FileNotFoundError:
            return True  # gone since it was listed
        except OSError as exc:
            # A directory that its owner may list and not search, or a damaged entry, which must
            # not hide the others.
            if exc.errno != errno.EACCES:
                _complain(self, "readdir", exc)
            return bool(pyfuse3.readdir_reply(token, name, _unseen(directory, name, kind), next_id))
        if pyfuse3.readdir_reply(token, name, self._attributes(attr), next_id):
            return True
        tree.forget(attr[0], 1)
        return False

    async def releasedir(self, fh: int) -> None:
        self.union.tree.releasedir(fh)

    @edge
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        if self.union.options.fsync == "volatile":
            return
        ino = self.union.tree.dir_ino(fh)
        await self._long(copy_up.sync_directory, self.union, ino)

    # ---- changes ----

    async def _make(
        self, parent: int, name: bytes, new: New, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        self._check_writable()
        fd = await self._work(create.create, self.union, parent, name, new, ctx)
        if fd >= 0:
            os.close(fd)
        return self._attributes(self.union.tree.lookup(parent, name))

    @edge
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        new = New(mode=stat.S_IFDIR | stat.S_IMODE(mode))
        return await self._make(parent_inode, name, new, ctx)

    @edge
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        if stat.S_ISCHR(mode) and rdev == 0:
            raise FUSEError(errno.EPERM)  # would be a whiteout
        if not stat.S_IFMT(mode):
            mode |= stat.S_IFREG
        return await self._make(parent_inode, name, New(mode=mode, rdev=rdev), ctx)

    @edge
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        new = New(mode=stat.S_IFLNK | 0o777, target=target)
        return await self._make(parent_inode, name, new, ctx)

    @edge
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        self._check_writable()
        await self._work(create.link, self.union, inode, new_parent_inode, new_name)
        return self._attributes(self.union.tree.lookup(new_parent_inode, new_name))

    @edge
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._check_writable()
        await self._work(remove.unlink, self.union, parent_inode, name)

    @edge
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._check_writable()
        await self._work(remove.rmdir, self.union, parent_inode, name)

    @edge
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        self._check_writable()
        await self._work(
            rename.rename,
            self.union,
            parent_inode_old,
            name_old,
            parent_inode_new,
            name_new,
            flags,
        )

    @edge
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        self._check_writable()
        what = Change(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        handle_fd = None
        if fh is not None and what.size is not None:
            _, flags, fd = self.union.tree.file_info(fh)
            handle_fd = fd if flags & WRITING else None
        await self._work(attributes.change, self.union, inode, what, ctx, handle_fd)
        return self._attributes(self.union.tree.getattr(inode))

    @edge
    async def setxattr(
        self,
        inode: int,
        name: bytes,
        value: bytes,
        ctx: pyfuse3.RequestContext,
        flags: int = 0,
    ) -> None:
        """`flags`: of setxattr(2); pyfuse3 looks by itself."""
        self._check_writable()
        if inode == ROOT_INO and name == STATUS_XATTR:
            raise FUSEError(errno.EPERM)
        await self._work(attributes.set_xattr, self.union, inode, name, value, ctx, flags)

    @edge
    async def set_flags(self, inode: int, wanted: bytes, extended: bool) -> None:
        """FS_IOC_SETFLAGS or FS_IOC_FSSETXATTR; pyfuse3 has no handler for them."""
        self._check_writable()
        await self._work(flags.set_flags, self.union, inode, wanted, extended=extended)

    @edge
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._check_writable()
        await self._work(attributes.remove_xattr, self.union, inode, name, ctx)


def _unseen(directory: int, name: bytes, kind: int) -> EntryAttributes:
    """A name of which no more can be said: the kernel asks again before it uses it.

    pyfuse3 cannot give a number without a node; this one stands for no node, and its FORGET for
    nothing.
    """
    e = EntryAttributes()
    digest = hashlib.blake2b(name, digest_size=8, key=directory.to_bytes(8, "little")).digest()
    e.st_ino = 1 << 63 | int.from_bytes(digest, "little")
    e.st_mode = (kind << 12) or stat.S_IFREG
    e.st_nlink = 1
    e.entry_timeout = e.attr_timeout = 0
    return e


def _remote(union: Union) -> bool:
    """Whether close(2) on the upper's file system can tell of an error (NFS, other FUSE)."""
    if union.upper is None:
        return False
    return bool(_filesystem_type(union.upper.fd) in {"nfs", "nfs4", "cifs", "9p", "fuse", "ceph"})


def _filesystem_type(fd: int) -> str:
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo") as file:
            for line in file:
                words = line.split()
                if words[2] == wanted:
                    kind: str = words[words.index("-") + 1]
                    return kind.split(".")[0]
    except OSError:
        pass
    return ""


__all__ = ["STATUS_XATTR", "UnionOperations"]
