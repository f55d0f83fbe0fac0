# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounts for tests: one interface over a plain directory, kernel overlayfs and unionfs.

The plain directory (filled with what the lowers show) and kernel overlayfs are controls: a test
that fails on them is wrong itself. unionfs is mounted through its real command line, in the
foreground by default so that its log is at hand. After each unmount the log is read: a warning, an
error or a traceback fails the test unless it was expected; so do a mount that stays, a daemon that
died early, and one that does not end or ends with an exit code.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tests.rig import ground, layers

Backend = Literal["plain", "overlay", "unionfs"]
OVERLAY_OPTIONS = "redirect_dir=on,index=on,metacopy=on,xino=on"
PATIENCE = 30.0
# Which driver the unions of the tests have, where a test does not say.
DRIVER_VARIABLE = "UNIONFS_TEST_DRIVER"
_SUSPICIOUS = re.compile(r"WARNING|ERROR|CRITICAL|Traceback|Exception|runtime error:|Sanitizer")


def program() -> list[str]:
    """The command under test: $UNIONFS, else the one installed beside the interpreter."""
    if given := os.environ.get("UNIONFS"):
        return given.split()
    beside = Path(sys.executable).parent / "unionfs"
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "unionfs.cli.main"]


def is_mounted(point: str | os.PathLike[str]) -> bool:
    return os.path.realpath(point) in ground.mounts_below(point)


class Mounted(abc.ABC):
    """One union over given layers, mounted and unmounted as often as a test likes.

    `mnt` is where it is seen, `lowers` its lowers (top-most first), `upper` where changes go
    (None for the plain directory).
    """

    backend: Backend

    def __init__(
        self,
        lowers: Sequence[Path],
        upper: Path | None,
        mnt: Path,
        *,
        work: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.lowers = list(lowers)
        self.upper = upper
        self.mnt = mnt
        self.work = work
        self.options = list(options)

    @abc.abstractmethod
    def mount(self) -> None: ...

    @abc.abstractmethod
    def umount(self) -> None: ...

    def remount(self) -> None:
        """Unmount and mount again: what the kernel had cached is gone."""
        self.umount()
        self.mount()

    def abandon(self) -> None:
        """Take it down by force after a failure; never raises."""
        subprocess.run(["umount", "-l", self.mnt], capture_output=True, check=False)

    def __enter__(self) -> Self:
        self.mount()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.umount()
        else:
            self.abandon()


class Plain(Mounted):
    backend = "plain"
    _filled = False

    def mount(self) -> None:
        if not self._filled:
            layers.merge(self.lowers, self.mnt)
            self._filled = True

    def umount(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class Overlay(Mounted):
    backend = "overlay"

    def mount(self) -> None:
        assert self.upper is not None
        assert self.work is not None
        words = ",".join(self.options or [OVERLAY_OPTIONS])
        stack = ":".join(map(str, self.lowers))
        places = f"lowerdir={stack},upperdir={self.upper},workdir={self.work}"
        ground.run("mount", "-t", "overlay", "overlay", "-o", f"{words},{places}", self.mnt)

    def umount(self) -> None:
        ground.run("umount", self.mnt)


class Unionfs(Mounted):
    """`unionfs mount … -f` with its log in a file; `daemonised` uses the command as users do."""

    backend = "unionfs"

    def __init__(
        self,
        lowers: Sequence[Path],
        upper: Path | None,
        mnt: Path,
        *,
        work: Path | None = None,
        options: Sequence[str] = (),
        flags: Sequence[str] = (),
        daemonised: bool = False,
        log: Path | None = None,
    ) -> None:
        super().__init__(lowers, upper, mnt, work=work, options=options)
        self.flags = list(flags)
        self.daemonised = daemonised
        self.log = log or mnt.with_name(mnt.name + ".log")
        self.expected: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._read = 0

    def command(self) -> list[str]:
        stack = ":".join(
            str(lower).replace("\\", "\\\\").replace(":", "\\:") for lower in self.lowers
        )
        words = list(self.options)
        driver = os.environ.get(DRIVER_VARIABLE)
        if driver and not any(word.startswith("driver=") for word in words):
            words.append(f"driver={driver}")
        if self.work is not None:
            words.append("workdir=" + str(self.work).replace("\\", "\\\\").replace(",", "\\,"))
        places = [stack, *([str(self.upper)] if self.upper is not None else []), str(self.mnt)]
        extra = ["-o", ",".join(words)] if words else []
        foreground = [] if self.daemonised else ["-f"]
        return [*program(), "mount", *foreground, *self.flags, *places, *extra]

    def mount(self) -> None:
        self._read = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            if self.daemonised:
                done = subprocess.run(
                    self.command(), stdout=log, stderr=log, timeout=PATIENCE, check=False
                )
                if done.returncode:
                    raise AssertionError(f"mount: exit {done.returncode}: {self.words()}")
                assert is_mounted(self.mnt), "the command returned 0 and nothing is mounted"
                os.stat(self.mnt)
                return
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._wait_for_mount(self.process)

    def _wait_for_mount(self, process: subprocess.Popen[bytes]) -> None:
        """The kernel marks the mount table readable with POLLPRI whenever it changes."""
        deadline = time.monotonic() + PATIENCE
        pidfd = os.pidfd_open(process.pid)
        try:
            with open("/proc/self/mountinfo") as table:
                poll = select.poll()
                poll.register(table, select.POLLPRI)
                poll.register(pidfd, select.POLLIN)
                while not is_mounted(self.mnt):
                    if process.poll() is not None:
                        raise AssertionError(f"mount: exit {process.returncode}: {self.words()}")
                    left = deadline - time.monotonic()
                    if left < 0:
                        self.abandon()
                        raise AssertionError(f"mount: nothing after {PATIENCE} s: {self.words()}")
                    poll.poll(left * 1000)
        finally:
            os.close(pidfd)
        # Answered by the daemon: it is ready, not only in the table.
        os.stat(self.mnt)

    @property
    def pid(self) -> int:
        """The daemon's process id, from itself."""
        if self.process is not None:
            return self.process.pid
        return int(str(self.status()["pid"]))

    def status(self) -> dict[str, object]:
        answer: dict[str, object] = json.loads(os.getxattr(self.mnt, "user.unionfs.status"))
        return answer

    def words(self) -> str:
        """What this mount's daemon has logged so far."""
        if not self.log.exists():
            return ""
        with open(self.log, "rb") as log:
            log.seek(self._read)
            return log.read().decode(errors="replace").strip()

    def umount(self) -> None:
        process, self.process = self.process, None
        if process is not None and process.poll() is not None:
            self.process = process
            self.abandon()
            raise AssertionError(f"the daemon died, exit {process.returncode}: {self.words()}")
        done = subprocess.run(
            [*program(), "umount", str(self.mnt)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode:
            self.process = process
            self.abandon()
            raise AssertionError(f"umount: exit {done.returncode}: {done.stderr}; {self.words()}")
        assert not is_mounted(self.mnt), "umount returned 0 and the mount is still there"
        if process is not None:
            code = process.wait(timeout=PATIENCE)
            assert code == 0, f"the daemon ended with exit code {code}: {self.words()}"
        self._check_log()

    def _check_log(self) -> None:
        bad = [line for line in self.words().splitlines() if _SUSPICIOUS.search(line)]
        bad = [line for line in bad if not any(re.search(word, line) for word in self.expected)]
        assert not bad, f"the daemon complained: {self.words()}"

    def kill(self) -> None:
        """kill -9, then a plain unmount of what is left."""
        self.die()
        self.clear()

    def die(self) -> None:
        """kill -9; the mount stays."""
        pid = self.pid
        os.kill(pid, 9)
        if self.process is not None:
            self.process.wait(timeout=PATIENCE)
            self.process = None
        else:
            ground.reap([pid])

    def clear(self) -> None:
        """A plain unmount after a death."""
        # Answered by nobody, so it waits for the end of the connection: of its io_uring, the kernel
        # disposes when the process has ended already.
        with contextlib.suppress(OSError):
            os.statvfs(self.mnt)
        tool = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
        ground.run(*tool, self.mnt)

    def abandon(self) -> None:
        process, self.process = self.process, None
        for tool in (["umount", "-l"], ["fusermount3", "-u", "-z"]):
            if is_mounted(self.mnt):
                with contextlib.suppress(FileNotFoundError):
                    subprocess.run([*tool, self.mnt], capture_output=True, check=False)
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            if process.poll() is None:
                process.kill()
                process.wait()


def make(
    backend: Backend,
    lowers: Sequence[Path],
    place: Path,
    *,
    options: Sequence[str] = (),
    workdir: bool = False,
    name: str = "",
) -> Mounted:
    """A union in the directory `place` (on the upper's file system), not yet mounted.

    Its parts are place/NAME{mnt,upper,work}; `workdir` gives unionfs a work directory of its own
    instead of the one it keeps inside the upper.
    """
    mnt, upper, work = (place / f"{name}{part}" for part in ("mnt", "upper", "work"))
    mnt.mkdir(exist_ok=True)
    if backend == "plain":
        return Plain(lowers, None, mnt, options=options)
    upper.mkdir(exist_ok=True)
    if backend == "overlay":
        work.mkdir(exist_ok=True)
        return Overlay(lowers, upper, mnt, work=work, options=options)
    if workdir:
        work.mkdir(exist_ok=True)
    return Unionfs(lowers, upper, mnt, work=work if workdir else None, options=options)


@contextlib.contextmanager
def kernel_view(lowers: Sequence[Path], upper: Path, work: Path, mnt: Path) -> Iterator[Path]:
    """What kernel overlayfs makes of an upper that somebody else wrote."""
    mnt.mkdir(exist_ok=True)
    view = Overlay(lowers, upper, mnt, work=work)
    with view:
        yield mnt


def user_mount_possible() -> str | None:
    """Why an ordinary user cannot mount here, or None."""
    if shutil.which("fusermount3") is None:
        return "there is no fusermount3 (package fuse3)"
    return None if os.path.exists("/dev/fuse") else "there is no /dev/fuse"
