# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon of a union as the only one who writes to its upper: found, stopped, let go on.

Owns which process that is, and that no other one is stopped in its stead.  What a program has
mounted for a user (userspace.py) may have the uppers of several unions; each has a writer of its
own.  Called by backing.py; holding.py sees to it that it goes on however we end.
"""

import contextlib
import fcntl
import os
import select
import signal
import time
from dataclasses import dataclass
from typing import Final

from unionfs.errors import UnionfsError
from unionfs.mounts import mount_number
from unionfs.stores import sharing
from unionfs.stores.mounted import Mounted, mounted_unions
from unionfs.stores.volume import Volume
from unionfs.unions import DEADLINE, integer

_STOP_SECONDS: Final = 20  # less than holding.py waits for progress
_STOPPED: Final = b"TtXZ"  # proc_pid_stat(5)
_WATCHDOG: Final = b"WATCHDOG_USEC="


class Ended(Exception):
    """The daemon has ended while it was to be stopped: somebody else may write from now on."""


@dataclass(slots=True)
class Writer:
    """The daemon of a union."""

    point: str
    pid: int
    watch: int  # pidfd
    itself: bool  # whether it writes itself, and not the kernel for it (passthrough)

    def close(self) -> None:
        """Forget it."""
        os.close(self.watch)

    def has_ended(self) -> bool:
        """Whether the daemon is gone; its upper is somebody else's to write then."""
        return sharing.has_ended(self.watch)

    def check(self) -> None:
        """Raise Ended if it is so."""
        if self.has_ended():
            raise Ended

    def patience(self) -> float | None:
        """How long, in seconds, a service manager does without a sign of life; None: for ever.

        The last one may have been given as long ago as watchdog.py takes between two.
        """
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{self.pid}/environ", "rb") as file:
                words = file.read().split(b"\0")
            for word in words:
                if word.startswith(_WATCHDOG):
                    return int(word.removeprefix(_WATCHDOG)) / 1e6 / 3
        return None

    def lock(self) -> int:
        """A descriptor for whose life nobody else of us stops the daemon: the first to be ready
        would let it go on for all.  Waits for another."""
        try:
            fd = os.open(f"/proc/{self.pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Ended from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def stop(self) -> None:
        """Stop the daemon, and wait until none of its threads is in a system call any more."""
        try:
            signal.pidfd_send_signal(self.watch, signal.SIGSTOP)
        except ProcessLookupError:
            raise Ended from None
        end = time.monotonic() + _STOP_SECONDS
        while not self.is_stopped():
            self.check()
            if time.monotonic() > end:
                what = f"the daemon of {self.point} has not stopped for {_STOP_SECONDS} s"
                raise UnionfsError(what, hint="begin again when it has less to do")
            select.select([self.watch], [], [], 0.01)

    def let_go_on(self) -> None:
        """After stop()."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.watch, signal.SIGCONT)

    def is_stopped(self) -> bool:
        """Whether all of it is: a thread is a thread only where it comes back from the kernel."""
        try:
            threads = os.listdir(f"/proc/{self.pid}/task")
        except FileNotFoundError:
            raise Ended from None
        for thread in threads:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"/proc/{self.pid}/task/{thread}/stat", "rb") as file:
                    state = file.read().rpartition(b")")[2].split()[0]
                if state not in _STOPPED:
                    return False
        return True


def writer_of(volume: Volume, directory: str) -> Writer | None:
    """Who writes to an upper in what a program has mounted; None if nobody answers for it."""
    for union in mounted_unions(DEADLINE):
        # What a stranger's daemon says is not believed.
        if union.owner == os.geteuid() and union.has(volume.path, directory, None):
            return _writer(union, volume)
    return None


def _writer(union: Mounted, volume: Volume) -> Writer | None:
    what = f"the daemon of {union.point} cannot be reached"
    pid = integer(union.facts, "pid")
    if pid is None or union.facts.get("pid_namespace") != os.readlink("/proc/self/ns/pid"):
        raise UnionfsError(f"{what}: it is in another container", hint="do it there")
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        if not _has_open(pid, mount_number(volume.root)):
            os.close(watch)
            return None
    except OSError as exc:
        os.close(watch)
        raise UnionfsError(f"{what}: {exc.strerror}", hint="do it as its user") from exc
    told = union.facts.get("passthrough")
    by_kernel = isinstance(told, dict) and bool(told.get("active"))
    return Writer(union.point, pid, watch, itself=not by_kernel)


def _has_open(pid: int, mount: int) -> bool:
    """Whether a process is one of those who have the mount: no other one is to be stopped."""
    try:
        return any(mount_number(int(fd), pid) == mount for fd in os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return False
