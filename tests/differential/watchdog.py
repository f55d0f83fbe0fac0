# SPDX-License-Identifier: GPL-2.0-or-later
"""Ends a daemon that does not answer any more.

A process that waits for a FUSE request cannot be interrupted, only its daemon can be killed: the
kernel then fails the request. That takes another process, forked before anything else happens, with
its own identity (the harness changes its own). The stacks it could get are left in a file.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from pathlib import Path
from typing import Self

SECONDS = 60


class Watchdog:
    """Fed by the harness at every step; the process to kill is told by `guard`."""

    def __init__(self, report: Path, seconds: float = SECONDS) -> None:
        reader, self._writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._writer)
            try:
                _watch(reader, report, seconds)
            finally:
                os._exit(0)
        os.close(reader)

    def feed(self) -> None:
        os.write(self._writer, b".")

    def guard(self, pid: int) -> None:
        """0: nothing to guard."""
        os.write(self._writer, b"P%d\n" % pid)

    def close(self) -> None:
        os.close(self._writer)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _watch(reader: int, report: Path, seconds: float) -> None:
    pid = 0
    told = b""
    while True:
        ready, _, _ = select.select([reader], [], [], seconds)
        if ready:
            data = os.read(reader, 65536)
            if not data:
                return
            told = (told + data)[-4096:]
            if b"P" in told and told.rpartition(b"P")[2].count(b"\n"):
                pid = int(told.rpartition(b"P")[2].partition(b"\n")[0])
        elif pid:
            _end(pid, report)
            pid = 0


def _end(pid: int, report: Path) -> None:
    words = [f"daemon {pid} did not answer"]
    for task in Path(f"/proc/{pid}/task").glob("*"):
        words.append(f"{task.name}: {(task / 'wchan').read_text()}")
    try:
        debugger = ["gdb", "-p", str(pid), "-batch", "-ex", "thread apply all bt 40"]
        done = subprocess.run(debugger, capture_output=True, text=True, timeout=60, check=False)
        words += [line for line in done.stdout.splitlines() if line.startswith(("#", "Thread"))]
    except (OSError, subprocess.SubprocessError) as error:
        words.append(f"no stacks: {error}")
    report.write_text("\n".join(words) + "\n")
    os.kill(pid, 9)
