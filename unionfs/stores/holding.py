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
import secrets
import signal
import struct
import time
from collections.abc import Callable, Iterator
from typing import Final

from unionfs.errors import UnionfsError
from unionfs.unions import DEADLINE, ask_in_child

_FIFREEZE: Final = 0xC0045877
_FITHAW: Final = 0xC0045878
_HOLD: Final = 0x400C5548  # UNIONFS_IOC_HOLD
_WISH: Final = struct.Struct("=III")
_SILENCE: Final = 30  # seconds
PATIENCE: Final = 60.0
_SOON: Final = 1.0
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY
HINT: Final = "unmount the union, or stop what writes to it"

Beat = Callable[[], None]


class Ended(Exception):
    """The union has ended: somebody else may write to its upper from now on."""


@contextlib.contextmanager
def frozen(fd: int, name: str) -> Iterator[Beat]:
    """Hold up all who write to a file system; reading goes on."""

    def thaw() -> None:
        fcntl.ioctl(fd, _FITHAW, 0)

    with _guarded(thaw, fd):
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
    hold = _Hold(point, name)
    with _guarded(hold.give_up):
        hold.begin()
        try:
            yield hold.beat
            hold.go_on()
        finally:
            with contextlib.suppress(OSError):
                hold.ask(0)


class _Hold:
    """What a daemon is asked for.  Its mount point is opened for a moment only each time, by a
    child: the union can be unmounted, and a daemon that hangs does not hang us."""

    def __init__(self, point: str, name: str) -> None:
        self._point = point
        self._name = name
        self._ticket = 1 + secrets.randbelow(0xFFFFFFFE)
        self._last = time.monotonic()

    def ask(self, seconds: int, *, begins: bool = False) -> None:
        """Raises OSError; TimeoutError if nobody answers."""

        def question() -> bytes:
            fd = os.open(self._point, _OPEN)
            fcntl.ioctl(fd, _HOLD, _WISH.pack(seconds, self._ticket, begins))
            return b""

        reply = ask_in_child(question, DEADLINE + (seconds if begins else 0))
        if reply is None:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        if isinstance(reply, int):
            raise OSError(reply, os.strerror(reply))

    def begin(self) -> None:
        """Wait until it is ours, and nothing is under way."""
        while True:
            try:
                self.ask(_SILENCE, begins=True)
                break
            except OSError as exc:
                if exc.errno != errno.EBUSY:
                    raise self._error(exc) from exc
                time.sleep(0.05)
        self._last = time.monotonic()

    def beat(self) -> None:
        """Tell the daemon now and then that we get on."""
        if time.monotonic() - self._last > _SOON:
            self.go_on()

    def go_on(self) -> None:
        """Be sure that it was ours all the time, and is."""
        try:
            self.ask(_SILENCE)
        except OSError as exc:
            if exc.errno == errno.ENOTTY:  # what the union was mounted on
                raise Ended from exc
            raise self._error(exc) from exc
        self._last = time.monotonic()

    def give_up(self) -> None:
        """In a child, after an end that may have come while it was asked for."""
        for _ in range(10):
            try:
                self.ask(0)
                break
            except OSError as exc:
                if exc.errno != errno.ESTALE:
                    break
            time.sleep(0.1)

    def _error(self, exc: OSError) -> Exception:
        hint = HINT
        match exc.errno:
            case errno.ENOTCONN | errno.ECONNABORTED | errno.ESTALE:
                return Ended()
            case errno.EAGAIN:
                what = f"what is being written to {self._name} takes longer than {_SILENCE} s"
                hint = "begin again when it has less to do"
            case errno.ETIME:
                what = f"{self._name} changes all the time, and too many or too long for them were"
                what += " held up while it was read"
            case errno.ETIMEDOUT:
                what = f"the daemon of {self._point} does not answer"
                hint = f"look at it: unionfs status {self._point}"
            case errno.ENOTTY | errno.ENOSYS:  # the reference driver
                what = f"{self._name} changes all the time"
            case _:
                what = f"{self._name} changes all the time, and cannot be held: {exc.strerror}"
        return UnionfsError(what, hint=hint)


@contextlib.contextmanager
def _guarded(release: Callable[[], None], *needed: int) -> Iterator[None]:
    """A child that releases when we are gone; it has nothing open but what is needed for that."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _guard(release, reading, needed)
    os.close(reading)
    try:
        yield
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def _guard(release: Callable[[], None], reading: int, needed: tuple[int, ...]) -> None:
    """In the child.  As a rule all go on already when it ends."""
    try:
        first = 0
        for kept in sorted((reading, *needed)):
            os.closerange(first, kept)
            first = kept + 1
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))
        os.setsid()  # what the terminal sends us (^Z, say) does not reach it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.read(reading, 1)
        with contextlib.suppress(OSError):
            release()
    finally:
        os._exit(0)
