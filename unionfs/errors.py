# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong before and around a mount, as its user is told it.

Owns the exit codes and the one exception that carries a line for the user.  Does not own the
errno edge of the file system's operations, nor any printing: cli/main.py prints, once.
Raised by options, layer, work, session, daemon and the verbs.
"""

import contextlib
import enum
import errno
import os
from collections.abc import Iterator


class ExitCode(enum.IntEnum):
    """Exit codes, those of mount(8).  A number once given away is never used for another."""

    OK = 0
    USAGE = 1  # incorrect invocation or permissions
    SYSTEM = 2  # out of memory, cannot fork, no /dev/fuse ...
    INTERNAL = 4  # a bug in unionfs: comes with a traceback
    INTERRUPT = 8  # the user interrupted
    MTAB = 16  # kept free: mount(8) uses it for problems with mtab
    FAIL = 32  # the mount, or the unmount, failed
    PARTIAL = 64  # some of several mounts could be unmounted, others not


class UnionfsError(Exception):
    """One line for the user: what happened, to which path or option; and what to do (hint)."""

    def __init__(
        self, message: str, *, hint: str | None = None, code: ExitCode = ExitCode.FAIL
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def line(self) -> str:
        """MESSAGE; HINT with control characters spelled out, so that it stays one line."""
        text = self.message if self.hint is None else f"{self.message}; {self.hint}"
        return printable(text)


class InUse(UnionfsError):
    """Somebody has a store; by which mount he does, those find out who have the time to ask.

    `directory`: which upper in it; None if all of it is meant.  `identity`: that upper's id.
    `why`: what cannot be done with it while a program has it mounted, and the kernel could.
    `shared`: whether the user for whom a program has it mounted could do it meanwhile.
    """

    def __init__(
        self,
        name: str,
        path: str,
        by: str = "by a union",
        *,
        directory: str | None = None,
        identity: str | None = None,
        hint: str = "unmount it, or wait for another verb that has it to end",
    ) -> None:
        super().__init__(f"{name} is in use {by}".rstrip(), hint=hint)
        self.name = name
        self.path = path
        self.directory = directory
        self.identity = identity
        self.why = ""
        self.shared = False


def printable(text: str) -> str:
    """The text with control characters spelled out; bytes that are not UTF-8 stay."""
    kept = (c if c.isprintable() or "\udc80" <= c <= "\udcff" else ascii(c)[1:-1] for c in text)
    return "".join(kept)


def counted(count: int, one: str, many: str | None = None) -> str:
    """How many of something there are, in words: `1 mount`, `2 mounts`."""
    return f"{count} {one if count == 1 else many or one + 's'}"


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Have an error of the system say `what` failed, and what is to be done."""
    try:
        yield
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room there, or name another place" if full else None
        if exc.errno == errno.EIO:
            hint = "a device fails: see dmesg(1)"
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"{what}: {reason}", hint=hint) from exc


def usage_error(message: str, hint: str | None = None) -> UnionfsError:
    """An error in what the user wrote: exit code 1."""
    return UnionfsError(message, hint=hint, code=ExitCode.USAGE)
