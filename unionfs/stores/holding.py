# SPDX-License-Identifier: GPL-2.0-or-later
"""Holding up who writes to a store while it is read once more.

Owns that they go on however we end: a child waits for that.  What the kernel has mounted is frozen
(FIFREEZE).  What a program has mounted for a user cannot be; there the only writer of an upper, the
daemon of its union (writer.py), is stopped (SIGSTOP), where a kill could have hit it too: between
two system calls, each of which leaves the upper whole.  A stopped daemon answers nobody, so what we
need could lie in its union, and wait for us as we for it: the child does not wait longer than a
while for a sign of progress.  Called by backing.py.
"""

import contextlib
import errno
import fcntl
import math
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from typing import Final

from unionfs.errors import UnionfsError
from unionfs.stores.writer import Writer

_FIFREEZE: Final = 0xC0045877
_FITHAW: Final = 0xC0045878
_SILENCE: Final = 30.0  # seconds
HINT: Final = "unmount the union, or stop what writes to it"

Beat = Callable[[], None]


@contextlib.contextmanager
def frozen(fd: int, name: str) -> Iterator[Beat]:
    """Hold up all who write to a file system; reading goes on."""

    def thaw() -> None:
        fcntl.ioctl(fd, _FITHAW, 0)

    with _guarded(thaw, name, silence=math.inf, whole=math.inf) as beat:
        try:
            fcntl.ioctl(fd, _FIFREEZE, 0)
        except OSError as exc:
            reason = os.strerror(exc.errno or errno.EIO)
            what = f"{name} changes all the time, and cannot be frozen: {reason}"
            raise UnionfsError(what, hint=HINT) from exc
        try:
            yield beat
        finally:
            thaw()


@contextlib.contextmanager
def stopped(writer: Writer, name: str) -> Iterator[Beat]:
    """Stop the daemon that writes to an upper.

    What is yielded tells that we get on, and raises an error once it goes on, by whomever, or
    Ended.
    """
    if not writer.itself:
        raise UnionfsError(f"{name} changes all the time", hint=HINT)
    whole = writer.patience() or math.inf
    with contextlib.ExitStack() as held:
        held.callback(os.close, writer.lock())
        go_on = writer.let_go_on
        beat = held.enter_context(_guarded(go_on, name, silence=_SILENCE, whole=whole))
        held.callback(go_on)
        writer.stop()

        def beat_stopped() -> None:
            beat()
            writer.check()
            if not writer.is_stopped():
                what = f"{name} changes all the time, and its daemon did not stay stopped"
                raise UnionfsError(what, hint=HINT)

        yield beat_stopped
        beat_stopped()


@contextlib.contextmanager
def _guarded(
    release: Callable[[], None], name: str, *, silence: float, whole: float
) -> Iterator[Beat]:
    """A child that releases when we are gone, say nothing for too long or take too long."""
    reading, writing = os.pipe()
    end = time.monotonic() + whole
    child = os.fork()
    if child == 0:
        _guard(release, reading, writing, silence, end)
    os.close(reading)

    def beat() -> None:
        try:
            os.write(writing, b".")
        except BrokenPipeError:
            what = f"{name} changes all the time, and takes too long to read while that is held up"
            raise UnionfsError(what, hint=HINT) from None

    try:
        yield beat
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def _guard(
    release: Callable[[], None], reading: int, writing: int, silence: float, end: float
) -> None:
    """In the child.  As a rule all go on already when it ends.

    The pipe is closed first: who can still write to it knows that nobody was let go on before.
    """
    try:
        os.close(writing)
        os.setsid()  # what the terminal sends us (^Z, say) does not reach it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            wait = min(silence, end - time.monotonic())
            limit = None if wait == math.inf else max(wait, 0.0)
            if not select.select([reading], [], [], limit)[0] or not os.read(reading, 65536):
                break
        os.close(reading)
        with contextlib.suppress(OSError):
            release()
    finally:
        os._exit(0)
