# SPDX-License-Identifier: GPL-2.0-or-later
"""The file system of an image that a program has mounted for a union: lent to who wants to read it.

Owns how it is reached, until when, and how its writer is held up.  The program has the image for
itself, and its mount is attached nowhere (userspace.py); the union's daemon holds it by a
descriptor, which those may open through /proc whom FUSE lets look: the same user.  Who has done so
keeps the program alive, which writes everything out only when it ends.  So what was lent is given
back as soon as the daemon has let it go, be it unmounted or killed.

Called by volume.py, for the verbs that only read; holding.py calls back to stop the daemon.
"""

import contextlib
import errno
import fcntl
import os
import pwd
import select
import signal
import time
from dataclasses import dataclass
from typing import Final

from unionfs import syscalls
from unionfs.errors import UnionfsError
from unionfs.mounts import mount_number
from unionfs.stores.mounted import Mounted
from unionfs.unions import integer

_FUSE: Final = 0x65735546  # linux/magic.h: FUSE_SUPER_MAGIC
_STOP_SECONDS: Final = 20  # less than holding.py waits for progress
_STOPPED: Final = b"TtXZ"  # proc_pid_stat(5)
_WATCHDOG: Final = b"WATCHDOG_USEC="


@dataclass(slots=True)
class Lender:
    """The daemon of a union, and the mount of which it has an open descriptor."""

    name: str  # of the store
    point: str
    pid: int
    watch: int  # pidfd
    descriptor: int  # in the daemon
    mount: int
    writes_itself: bool  # whether it writes itself, and not the kernel for it (passthrough)

    def close(self) -> None:
        """The root is closed by who has it."""
        os.close(self.watch)

    def has_ended(self) -> bool:
        """Whether the daemon is gone, or has let the mount go and waits for its end."""
        try:
            return mount_number(self.descriptor, self.pid) != self.mount
        except OSError:
            return True

    def ended(self) -> UnionfsError:
        """The error that it is."""
        what = f"the union at {self.point} ended while {self.name} was read"
        return UnionfsError(what, hint="begin again: it is not in use any more")

    def check(self) -> None:
        """Raise that error if it is so."""
        if self.has_ended():
            raise self.ended()

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
        fd = os.open(f"/proc/{self.pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def stop(self) -> None:
        """Stop the daemon, and wait until none of its threads is in a system call any more."""
        signal.pidfd_send_signal(self.watch, signal.SIGSTOP)
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
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            with contextlib.suppress(FileNotFoundError):
                with open(f"/proc/{self.pid}/task/{thread}/stat", "rb") as file:
                    state = file.read().rpartition(b")")[2].split()[0]
                if state not in _STOPPED:
                    return False
        return True


def borrow(union: Mounted, name: str) -> tuple[int, Lender]:
    """The root (O_PATH) of what a program has mounted for a union, and who lends it."""
    if union.owner != os.geteuid():
        # Even root is let look by FUSE only as that user; what a stranger's daemon says of its
        # descriptors is not believed.
        user = _user(union.owner)
        hint = f"do it as that user: runuser -u {user} -- unionfs ..."
        raise UnionfsError(f"{name} is in use by the union of {user} at {union.point}", hint=hint)
    what = f"{name} is in use by the union at {union.point}, whose daemon cannot be reached"
    hint = f"unmount it first: unionfs umount {union.point}"
    pid, descriptor = integer(union.facts, "pid"), integer(union.store, "descriptor")
    if pid is None or descriptor is None:
        raise UnionfsError(f"{what}: it is of an older version", hint=hint)
    if union.facts.get("pid_namespace") != os.readlink("/proc/self/ns/pid"):
        raise UnionfsError(f"{what}: it is in another container", hint="do it there")
    with contextlib.ExitStack() as opened:
        try:
            watch = os.pidfd_open(pid)
            opened.callback(os.close, watch)
            root = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_PATH | os.O_DIRECTORY)
            opened.callback(os.close, root)
            if syscalls.filesystem_type(f"/proc/self/fd/{root}") != _FUSE:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        except OSError as exc:
            reason = os.strerror(exc.errno or errno.EIO)
            raise UnionfsError(f"{what}: {reason}", hint=hint) from exc
        told = union.facts.get("passthrough")
        writes_itself = not (isinstance(told, dict) and told.get("active"))
        lender = Lender(
            name,
            union.point,
            pid,
            watch,
            descriptor,
            mount_number(root),
            writes_itself=writes_itself,
        )
        lender.check()
        opened.pop_all()
        return root, lender


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
