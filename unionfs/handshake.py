# SPDX-License-Identifier: GPL-2.0-or-later
"""The FUSE INIT exchange, with the flags that we choose; then the loop of pyfuse3.

Owns what is negotiated with the kernel.  Does not own mounting (session.py) nor what is answered
later (operations.py).  Called by daemon.py.

libfuse decides the flags of INIT by itself and knows only some of them.  So it is given one end
of a socket pair at first: INIT is read from the real device, passed to it, and its reply is
patched and written to the real device.  Then the device takes the place of libfuse's end (dup2).
The loop is at that moment waiting for the socket; a message on it wakes the loop, whose next
read is of the device.  Both ends stay open: epoll holds on to the old one by its open file.
"""

import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

import pyfuse3
import trio

from unionfs.errors import UnionfsError
from unionfs.options import MountOptions

log = logging.getLogger(__name__)

# include/uapi/linux/fuse.h: fuse_in_header, fuse_init_in up to flags2; fuse_out_header and
# fuse_init_out up to flags2.
_IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
_INIT_IN: Final = struct.Struct("=IIIII")
_OUT_HEADER: Final = struct.Struct("=IiQ")
_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI")
_OP_INIT: Final = 26
_MAJOR: Final = 7
_READ_SIZE: Final = (1 << 20) + 4096
_PAGES: Final = 256  # 1 MiB in one request


class InitFlag(IntFlag):
    """FUSE_* of INIT; those from bit 32 on travel in flags2."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    MAP_ALIGNMENT = 1 << 26
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    OVER_IO_URING = 1 << 41


# DONT_MASK: the handlers get the mode as it was asked for and the umask beside it, since a
# default ACL of the parent takes the umask's place.
_ALWAYS: Final = (
    InitFlag.ASYNC_READ
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.BIG_WRITES
    | InitFlag.DONT_MASK
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
)
# HANDLE_KILLPRIV would promise that we clear setuid and capabilities at each write; without it
# the kernel does so by SETATTR and REMOVEXATTR.  WRITEBACK_CACHE: the kernel would keep the times.
_NEVER: Final = InitFlag.HANDLE_KILLPRIV | InitFlag.WRITEBACK_CACHE


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What is set and cleared in libfuse's reply to INIT, as far as the kernel offered it."""

    wanted: InitFlag
    unwanted: InitFlag
    stack_depth: int = 0  # with PASSTHROUGH

    @classmethod
    def of(cls, options: MountOptions) -> "Wishes":
        """From the mount options."""
        wanted, unwanted = _ALWAYS, _NEVER
        if options.noacl:
            unwanted |= InitFlag.POSIX_ACL
        else:
            wanted |= InitFlag.POSIX_ACL
        # All changes pass through us, so a changed mtime or size is no reason to drop pages;
        # unless somebody else changes the layers.
        if options.lower_live:
            wanted |= InitFlag.AUTO_INVAL_DATA
            # A new link may get the number of the one before: its target must be asked for.
            wanted &= ~InitFlag.CACHE_SYMLINKS
            unwanted |= InitFlag.CACHE_SYMLINKS
        else:
            unwanted |= InitFlag.AUTO_INVAL_DATA
        return cls(wanted=wanted, unwanted=unwanted)


def offered_flags(request: bytes) -> InitFlag:
    """What the kernel offers in its INIT request."""
    opcode = _IN_HEADER.unpack_from(request)[1]
    if opcode != _OP_INIT:
        raise UnionfsError(f"the kernel's first FUSE request is {opcode}, not INIT")
    _, _, _, flags, flags2 = _INIT_IN.unpack_from(request.ljust(64, b"\0"), _IN_HEADER.size)
    if flags & InitFlag.INIT_EXT:
        flags |= flags2 << 32
    return InitFlag(flags)


def patch_init(request: bytes, reply: bytes, wishes: Wishes) -> tuple[bytes, InitFlag]:
    """libfuse's reply with our flags in it, and the flags that were agreed upon."""
    length, error, _ = _OUT_HEADER.unpack_from(reply)
    if error:
        raise UnionfsError(f"libfuse refused the kernel's INIT: {os.strerror(-error)}")
    if length != len(reply) or length < _OUT_HEADER.size + _INIT_OUT.size:
        raise UnionfsError("libfuse answered INIT in a form that is too old to be understood")
    body = list(_INIT_OUT.unpack_from(reply, _OUT_HEADER.size))
    flags = InitFlag(body[3] | body[10] << 32)
    unwanted = wishes.unwanted | InitFlag.HANDLE_KILLPRIV_V2
    flags = (flags | wishes.wanted) & ~unwanted & offered_flags(request)
    if flags & InitFlag.MAX_PAGES:
        body[8] = _PAGES
    body[3] = int(flags) & 0xFFFFFFFF
    body[10] = int(flags) >> 32
    patched = bytearray(reply)
    _INIT_OUT.pack_into(patched, _OUT_HEADER.size, *body)
    return bytes(patched), flags


# What libfuse asks for by itself, and the engine has to.  No READDIRPLUS_AUTO: the number of an
# entry is known only once it has been looked up, so the plain form would cost us no less.
# HANDLE_KILLPRIV_V2 spares a GETXATTR of security.capability before every write; libfuse does not
# pass on what we then need to know.
_ENGINE: Final = (
    InitFlag.DO_READDIRPLUS
    | InitFlag.INIT_EXT
    | InitFlag.ASYNC_DIO
    | InitFlag.HANDLE_KILLPRIV_V2
    | InitFlag.PASSTHROUGH
    | InitFlag.NO_OPEN_SUPPORT
)
_ENGINE_MINOR: Final = 38
_MAX_WRITE: Final = _PAGES * 4096
_MAX_BACKGROUND: Final = 64
_TIME_GRANULARITY: Final = 1  # ns
_INIT_REPLY: Final = struct.Struct("=IIIIHHIIHHII24x")


def answer_init(device: int, wishes: Wishes) -> InitFlag:
    """Read the INIT that waits in `device` and answer it; the flags that were agreed upon.

    Raises UnionfsError if the kernel speaks another major version.
    """
    request = os.read(device, _READ_SIZE)
    unique = _IN_HEADER.unpack_from(request)[2]
    flags = (wishes.wanted | _ENGINE) & ~wishes.unwanted & offered_flags(request)
    if not wishes.stack_depth:
        flags &= ~InitFlag.PASSTHROUGH
    major, minor, readahead, _, _ = _INIT_IN.unpack_from(request.ljust(64, b"\0"), _IN_HEADER.size)
    if major != _MAJOR:
        raise UnionfsError(f"the kernel speaks FUSE {major}.{minor}, not {_MAJOR}")
    body = _INIT_REPLY.pack(
        _MAJOR,
        min(minor, _ENGINE_MINOR),
        readahead,
        int(flags) & 0xFFFFFFFF,
        _MAX_BACKGROUND,
        _MAX_BACKGROUND * 3 // 4,
        _MAX_WRITE,
        _TIME_GRANULARITY,
        _PAGES,
        0,
        int(flags) >> 32,
        wishes.stack_depth if InitFlag.PASSTHROUGH in flags else 0,
    )
    os.write(device, _OUT_HEADER.pack(_OUT_HEADER.size + len(body), 0, unique) + body)
    log.debug("INIT agreed: %r", flags)
    return flags


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Not that an answer found nobody: the request was taken back, or the union is unmounted.

    ENOENT of a write to the device (fuse(4)); libfuse itself is silent about it.
    """
    message = record.getMessage()
    return not ("fuse_reply_" in message and message.endswith(os.strerror(errno.ENOENT)))


class Loop:
    """One run of pyfuse3's loop over the device of a fresh mount.

    pyfuse3 keeps its session in module globals: there is one Loop in a process.
    """

    def __init__(self, device: int, wishes: Wishes, options: Iterable[str]) -> None:
        """Take over `device`, the descriptor of /dev/fuse that was mounted."""
        self._device = device
        self._wishes = wishes
        self._options = set(options)
        self._sockets: list[socket.socket] = []
        self._started = False
        logging.getLogger("pyfuse3").addFilter(_is_worth_logging)
        self.flags = InitFlag(0)

    async def run(self, operations: pyfuse3.Operations, on_init: Callable[[], None]) -> None:
        """Serve until the file system is unmounted; `on_init` when the kernel has its answer."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sockets.append(near)
        with far:
            # libfuse takes an open descriptor for a mount point, and closes it in the end.
            descriptor = os.dup(far.fileno())
        try:
            pyfuse3.init(operations, f"/dev/fd/{descriptor}", self._options)
        except BaseException:
            os.close(descriptor)
            raise
        self._started = True
        async with trio.open_nursery() as nursery:
            # One request may be busy for long with a large copy: others need tasks of their own.
            nursery.start_soon(pyfuse3.main, 4, 512)
            await self._exchange_init(near)
            on_init()
            # Not before there is a request: libfuse's read would block the whole loop.
            await trio.lowlevel.wait_readable(self._device)
            self._give_device(near, descriptor)

    async def _exchange_init(self, near: socket.socket) -> None:
        await trio.lowlevel.wait_readable(self._device)
        request = os.read(self._device, _READ_SIZE)
        near.send(request)
        await trio.lowlevel.wait_readable(near)
        reply, self.flags = patch_init(request, near.recv(4096), self._wishes)
        os.write(self._device, reply)
        log.debug("INIT agreed: %r", self.flags)

    def _give_device(self, near: socket.socket, descriptor: int) -> None:
        """Exchange libfuse's socket for the device.  No checkpoint until the loop is woken."""
        keep = socket.socket(fileno=os.dup(descriptor))
        self._sockets.append(keep)
        os.dup2(self._device, descriptor, inheritable=False)
        trio.lowlevel.notify_closing(self._device)
        os.close(self._device)
        self._device = -1
        near.send(b"\0")

    def stop(self) -> None:
        """Let the loop end after the requests that are being answered."""
        if self._started:
            pyfuse3.terminate()

    def close(self) -> None:
        """Close the device, which ends the connection; a second call does nothing."""
        if self._started:
            self._started = False
            pyfuse3.close(unmount=False)
        if self._device >= 0:
            with contextlib.suppress(OSError):
                os.close(self._device)
            self._device = -1
        while self._sockets:
            self._sockets.pop().close()
