# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon that is killed at a chosen system call: what `crashing` does for the steps that Python
takes, for those that C takes. strace(1) counts and kills; nothing of this is in the product.

A step is a system call that alters a layer, of whatever thread.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.rig.crashing import Stepping
from tests.rig.mounted import PATIENCE
from tests.rig.waiting import wait_until

_CALLS = [
    "mkdirat",
    "mknodat",
    "symlinkat",
    "linkat",
    "renameat",
    "renameat2",
    "unlinkat",
    "chmod",
    "fchmod",
    "fchmodat",
    "chown",
    "fchown",
    "fchownat",
    "utimensat",
    "truncate",
    "ftruncate",
    "fallocate",
    "fsync",
    "setxattr",
    "fsetxattr",
    "removexattr",
    "copy_file_range",
    "sendfile",
    "pwrite64",
]
_LINE = re.compile(r"^(\d+) +(\w+)\(")
_KILL_SECONDS = 10
_FOR_LONG_US = 60_000_000


def why_not() -> str:
    """Why this cannot be done here; empty if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(
        ["strace", "-qq", "-e", "inject=getppid:error=EIO:when=1", "true"], capture_output=True
    )
    return "" if tried.returncode == 0 else "strace may not trace here: " + tried.stderr.decode()


def killed(
    command: Sequence[str], calls: str, log: Path, again: Callable[[], None]
) -> Iterator[None]:
    """Run a program whole, and then killed at each of its own steps, which are `calls`, `again`
    having put back what it starts from; yields after each kill."""
    trace = ["strace", "-qq", "-s", "0", "-o", str(log), "-e", f"trace={calls}"]
    subprocess.run([*trace, *command], check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)
    steps = re.findall(r"^(\w+)\(", log.read_text(), re.MULTILINE)
    for number, name in enumerate(steps):
        again()
        nth = steps[: number + 1].count(name)
        kill = ["-e", f"inject={name}:error=EIO:signal=KILL:when={nth}"]
        subprocess.run([*trace, *kill, *command], timeout=PATIENCE, stdout=subprocess.DEVNULL)
        yield


def killed_at(
    command: Sequence[str],
    commit: str,
    log: Path,
    again: Callable[[], None],
    done: Callable[[], bool],
) -> Iterator[None]:
    """Run a program that is killed at its first call of `commit`, before it is done, and then once
    it is `done`, `again` having put back what it starts from; yields after each kill."""
    trace = ["strace", "-qq", "-s", "0", "-o", str(log), "-e", f"trace={commit}"]
    before = ["-e", f"inject={commit}:error=EIO:signal=KILL:when=1"]
    subprocess.run([*trace, *before, *command], timeout=PATIENCE, stdout=subprocess.DEVNULL)
    yield
    again()
    after = ["-e", f"inject={commit}:delay_exit={_FOR_LONG_US}:when=1"]
    process = subprocess.Popen(
        [*trace, *after, *command], stdout=subprocess.DEVNULL, start_new_session=True
    )
    wait_until(done)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    yield


def kills(
    where: str,
    command: Sequence[str],
    calls: str,
    log: Path,
    again: Callable[[], None],
    done: Callable[[], bool],
) -> Iterator[None]:
    """At the `commit`, which is renameat2(2), or at `all` steps: see both above."""
    if where == "commit":
        return killed_at(command, "renameat2", log, again, done)
    return killed(command, calls, log, again)


class Traced(Stepping):
    """`unionfs mount -f` in a forked child that is traced between arm() and disarm().

    `stop_at`: as for Stepping, with the steps of the whole run in `steps`.  `spread`: several
    threads took steps; strace counts those of each by itself, and kills at another or at none.
    """

    steps: tuple[str, ...] = ()
    spread = False
    tracer: subprocess.Popen[bytes] | None = None

    def instrument(self) -> None:
        """Nothing: it is the daemon as it is."""

    def arm(self) -> None:
        self.trace.write_text("")
        self.trace.chmod(0o666)
        command = ["strace", "-f", "-qq", "-s", "0", "-o", str(self.trace)]
        command += ["-e", "trace=" + ",".join(_CALLS), "-e", "signal=none"]
        if self.stop_at:
            name = self.steps[self.stop_at - 1]
            nth = self.steps[: self.stop_at].count(name)
            # Not done: an error in its place, and killed before that is seen.
            command += ["-e", f"inject={name}:error=EIO:signal=KILL:when={nth}"]
        self.tracer = subprocess.Popen([*command, "-p", str(self.pid)])
        deadline = time.monotonic() + PATIENCE
        while not all(self._is_traced(task) for task in Path(f"/proc/{self.pid}/task").iterdir()):
            assert time.monotonic() < deadline, "strace does not attach"
            assert self.tracer.poll() is None, "strace ended"
            time.sleep(0.002)

    @staticmethod
    def _is_traced(task: Path) -> bool:
        return "TracerPid:\t0\n" not in (task / "status").read_text()

    def disarm(self) -> list[str]:
        assert self.tracer is not None
        try:
            self.tracer.wait(_KILL_SECONDS if self.stop_at else 0)  # it ends with the daemon
        except subprocess.TimeoutExpired:
            self.tracer.send_signal(signal.SIGINT)
            self.tracer.wait(PATIENCE)
        self.tracer = None
        found = [_LINE.match(line) for line in self.trace.read_text().splitlines()]
        self.spread = len({match[1] for match in found if match}) > 1
        return [match[2] for match in found if match]

    def abandon(self) -> None:
        if self.tracer is not None:
            self.tracer.kill()
            self.tracer.wait()
            self.tracer = None
        super().abandon()


__all__ = ["Traced", "why_not"]
