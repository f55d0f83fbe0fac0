# SPDX-License-Identifier: GPL-2.0-or-later
"""What a boot says, where somebody will see it.

On stderr, which an initramfs shows or keeps; there also in the kernel's log, which the system's
journal takes over; and in /run/unionfs/root/boot, for scripts.  Called by root.py.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Final

from unionfs import runtime
from unionfs.boot.aside import in_initramfs
from unionfs.errors import printable
from unionfs.stores.tools import Progress

NAME: Final = runtime.ROOT  # of the union
_FILE: Final = "boot"
_KERNEL_LOG: Final = "/dev/kmsg"
_INFO: Final = 6  # of syslog(3)
_WARNING: Final = 4
MIB: Final = 1 << 20
_OFTEN: Final = 0.2  # seconds between two counts


class Teller:
    """Collects the lines of one boot."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._log = _KERNEL_LOG if in_initramfs() else None

    def say(self, text: str) -> None:
        """What is done."""
        self._tell(text, _INFO)

    def warn(self, text: str, *, shown: bool = False) -> None:
        """What is not as it was asked for; `shown`: another has put it on stderr."""
        self._tell(f"warning: {text}", _WARNING, shown=shown)

    def _tell(self, text: str, priority: int, *, shown: bool = False) -> None:
        line = printable(text)
        self.lines.append(line)
        if not shown:
            print(f"unionfs: {line}", file=sys.stderr, flush=True)
        if self._log is not None:
            with contextlib.suppress(OSError), open(self._log, "wb", buffering=0) as log:
                log.write(f"<{priority}>unionfs: {line}\n".encode(errors="replace"))

    @contextlib.contextmanager
    def hearing(self) -> Iterator[None]:
        """What others log as a warning meanwhile is told too."""
        ear, log = _Ear(self), logging.getLogger("unionfs")
        log.addHandler(ear)
        try:
            yield
        finally:
            log.removeHandler(ear)

    @contextlib.contextmanager
    def counting(self, what: str, total: int) -> Iterator[Progress]:
        """On a terminal how far long work is, in a line that goes when it ends."""
        if not sys.stderr.isatty():
            yield Progress()
            return
        count = _Count(printable(what), total)
        try:
            yield count
        finally:
            count.wipe()

    def keep(self) -> None:
        """Write the file.  A full or missing /run must not stop a boot."""
        if (place := runtime.directory(NAME)) is None:
            return
        with contextlib.suppress(OSError):
            os.makedirs(place, 0o755, exist_ok=True)
            text = "".join(line + "\n" for line in self.lines)
            with open(f"{place}/{_FILE}", "wb") as file:
                file.write(text.encode(errors="surrogateescape"))


class _Ear(logging.Handler):
    def __init__(self, teller: Teller) -> None:
        super().__init__(logging.WARNING)
        self._teller = teller
        self._process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        if os.getpid() == self._process:  # a daemon has a log of its own
            self._teller.warn(record.getMessage())


class _Count(Progress):
    """By itself: the bars of the verbs (cli/show.py) need more than an initramfs has."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = max(total, 1)
        self._done = self._width = 0
        self._next = 0.0

    def __call__(self, count: int) -> None:
        self._done += count
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + _OFTEN
        done = min(self._done, self._total)
        percent = done * 100 // self._total
        self._show(f"unionfs: {self._what}: {done // MIB} of {self._total // MIB} MiB, {percent} %")

    def wipe(self) -> None:
        """Leave the line as it was."""
        self._show("")
        self._show("")

    def _show(self, text: str) -> None:
        """In the place of what stands there, by what every console knows."""
        sys.stderr.write(f"\r{text:<{self._width}}")
        sys.stderr.flush()
        self._width = len(text)


def degraded() -> str | None:
    """Why the union of the root has no store, if so."""
    with contextlib.suppress(OSError), open(f"{runtime.directory(NAME)}/degraded", "rb") as file:
        return os.fsdecode(file.read()).strip()
    return None
