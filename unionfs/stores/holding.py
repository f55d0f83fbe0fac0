# SPDX-License-Identifier: GPL-2.0-or-later
"""Holding up who writes to a store while it is read once more; reading it goes on.

Owns that they go on however we end: a child waits for that.  A file system that the kernel has
mounted is frozen (FIFREEZE).  What is not a file system of its own, or is a program's, cannot be;
there the daemon of the union, by which alone its upper is changed, keeps the requests that change
something (cext/hold.h), for as long as we say that we get on.  Called by backing.py.
"""

import contextlib
import errno
import fcntl
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from typing import Final

from unionfs.errors import UnionfsError

_FIFREEZE: Final = 0xC0045877
_FITHAW: Final = 0xC0045878
_HOLD: Final = 0xC0085548  # UNIONFS_IOC_HOLD
_WISH: Final = struct.Struct("=II")
_SILENCE: Final = 30  # seconds
_SOON: Final = 1.0
HINT: Final = "unmount the union, or stop what writes to it"

Beat = Callable[[], None]


class Ended(Exception):
    """The union has ended: somebody else may write to its upper from now on."""


@contextlib.contextmanager
def frozen(fd: int, name: str) -> Iterator[Beat]:
    """Hold up all who write to a file system; reading goes on."""

    def thaw() -> None:
        fcntl.ioctl(fd, _FITHAW, 0)

    with _guarded(thaw):
        try:
            fcntl.ioctl(fd, _FIFREEZE, 0)
        except OSError as exc:
            reason = os.strerror(exc.errno or errno.EIO)
            what = f"{name} changes all the time, and cannot be frozen: {reason}"
            raise UnionfsError(what, hint=HINT) from exc
        try:
            yield lambda: None
        finally:
            thaw()


@contextlib.contextmanager
def held(point: str, name: str) -> Iterator[Beat]:
    """Hold up who changes the union at a mount point.

    What is yielded is to be called whenever we get on: the daemon waits for it no longer than a
    while, since what we need could be held up too.  It raises an error once that is over, or Ended.
    """
    ticket = _take(point, name)
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > _SOON:
            _keep(point, ticket, name)
            last = time.monotonic()

    def let_go() -> None:
        _ask(point, 0, ticket)

    with _guarded(let_go):
        try:
            yield beat
            _keep(point, ticket, name)
        finally:
            with contextlib.suppress(OSError):
                let_go()


def _take(point: str, name: str) -> int:
    """A ticket, when whoever has one is ready."""
    while True:
        try:
            return _ask(point, _SILENCE, 0)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                time.sleep(0.05)
            elif exc.errno == errno.EAGAIN:
                what = f"what is being written to {name} takes longer than {_SILENCE} s"
                raise UnionfsError(what, hint="begin again when it has less to do") from exc
            elif exc.errno == errno.ENOTCONN:
                raise Ended from exc
            else:  # ENOTTY: the reference driver
                raise UnionfsError(f"{name} changes all the time", hint=HINT) from exc


def _keep(point: str, ticket: int, name: str) -> None:
    try:
        _ask(point, _SILENCE, ticket)
    except OSError as exc:
        if exc.errno == errno.ETIME:
            what = f"{name} changes all the time, and takes too long to read while that is held up"
            raise UnionfsError(what, hint=HINT) from exc
        raise Ended from exc


def _ask(point: str, seconds: int, ticket: int) -> int:
    """The ticket.  What is at the mount point is opened for a moment only: it can be unmounted."""
    fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    try:
        answer: bytes = fcntl.ioctl(fd, _HOLD, _WISH.pack(seconds, ticket))
    finally:
        os.close(fd)
    return int(_WISH.unpack(answer)[1])


@contextlib.contextmanager
def _guarded(release: Callable[[], None]) -> Iterator[None]:
    """A child that releases when we are gone."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _guard(release, reading, writing)
    os.close(reading)
    try:
        yield
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def _guard(release: Callable[[], None], reading: int, writing: int) -> None:
    """In the child.  As a rule all go on already when it ends."""
    try:
        os.close(writing)
        os.setsid()  # what the terminal sends us (^Z, say) does not reach it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.read(reading, 1)
        with contextlib.suppress(OSError):
            release()
    finally:
        os._exit(0)
