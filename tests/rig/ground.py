# SPDX-License-Identifier: GPL-2.0-or-later
"""The ground a mount test stands on: a private mount namespace, layers on real file systems.

Isolation: `isolate()` moves the running process into its own mount namespace, in place and before
any thread exists (tests/conftest.py calls it while it is imported, tests/differential/run.py
first of all). No re-execution is needed: every child inherits the namespace, no mount is ever seen
outside, and all of them, with their loop devices, vanish with the last process in it. The process
also becomes the reaper of the daemons started below it, so that `reap()` can end what a failed
test left behind. An ordinary user has no such namespace: there only the mounts made by the tests
themselves are taken down, one by one.

`Ground` makes directories, tmpfs and loop images in one directory and takes all of it down again
in the reverse order, whatever happened. It knows nothing of unions (see mounted.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args

from tests.rig import syscalls

Kind = Literal["ext4", "xfs", "btrfs", "tmpfs"]
ImageKind = Literal["squashfs", "erofs"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_MKFS: dict[str, list[str]] = {
    # 1 KiB blocks, which mkfs picks for small images, refuse xattrs of 1 000 bytes.
    # And enough inodes for directories of 100 000 entries.
    "ext4": ["mkfs.ext4", "-q", "-F", "-b", "4096", "-i", "4096"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
_isolated = False


def isolate() -> bool:
    """Enter a private mount namespace once; False if this process may not (an ordinary user)."""
    global _isolated
    if _isolated:
        return True
    syscalls.become_subreaper()
    if os.geteuid() != 0:
        return False
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    _isolated = True
    return True


def run(*command: str | os.PathLike[str]) -> str:
    """Run a tool of the system; its own words are in the exception if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = " ".join(map(str, command))
        raise RuntimeError(f"{words}: exit {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


def mounts_below(path: str | os.PathLike[str]) -> list[str]:
    """Mount points at and below a path, deepest last."""
    top = os.path.realpath(path)
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            point = line.split(" ")[4]
            for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                point = point.replace(code, char)
            if point == top or point.startswith(f"{top.rstrip('/')}/"):
                found.append(point)
    return found


def children() -> list[int]:
    """Processes whose parent we are, also adopted daemons."""
    mine = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        with contextlib.suppress(OSError):
            stat = Path("/proc", entry, "stat").read_text(errors="replace")
            if int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                mine.append(int(entry))
    return mine


def reap(pids: list[int], patience: float = 5.0) -> None:
    """End children that should have ended by themselves: TERM, then KILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + patience
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while pids and time.monotonic() < deadline:
            pids = [pid for pid in pids if not _gone(pid)]
            if pids:
                time.sleep(0.02)
        if not pids:
            return


def _gone(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return not Path(f"/proc/{pid}").exists()


class Ground:
    """One directory in which layers are made; a context manager that leaves nothing behind."""

    def __init__(self, prefix: str = "unionfs-test-") -> None:
        self.base = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
        self.base.chmod(0o755)
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def directory(self, name: str, mode: int = 0o755) -> Path:
        path = self.base / name
        path.mkdir()
        path.chmod(mode)
        return path

    def filesystem(self, name: str, kind: Kind, megabytes: int = 0) -> Path:
        """A writable file system of its own, mounted at base/name (root only)."""
        point = self.directory(name)
        if kind == "tmpfs":
            size = f",size={megabytes}m" if megabytes else ""
            run("mount", "-t", "tmpfs", "-o", f"mode=0755{size}", "tmpfs", point)
        else:
            image = self.base / f"{name}.img"
            # The smallest btrfs is 109 MiB, the smallest xfs 300 MiB; sparse, so it costs nothing.
            with open(image, "wb") as file:
                file.truncate((megabytes or 2048) << 20)
            run(*_MKFS[kind], image)
            # nodiscard and no lazy initialisation: an image file is as fast as it gets already.
            run("mount", "-t", kind, "-o", "loop", image, point)
        self._undo.append(lambda: self._unmount(point))
        point.chmod(0o755)
        return point

    def image(self, name: str, kind: ImageKind, tree: Path) -> Path:
        """A read-only image of a tree, mounted at base/name (root only)."""
        point = self.directory(name)
        image = self.base / f"{name}.img"
        if kind == "squashfs":
            run("mksquashfs", tree, image, "-no-progress", "-quiet", "-comp", "gzip")
        else:
            run("mkfs.erofs", "--quiet", image, tree)
        run("mount", "-t", kind, "-o", "loop,ro", image, point)
        image.unlink()
        self._undo.append(lambda: self._unmount(point))
        return point

    def remove(self, path: Path) -> None:
        """Something made here, or below it, is not needed any more."""
        for point in reversed(mounts_below(path)):
            syscalls.umount(point, syscalls.MNT_DETACH)
        _remove(path)

    def later(self, undo: Callable[[], object]) -> None:
        """Something more to take down, before what was made earlier."""
        self._undo.append(undo)

    def close(self) -> None:
        """Take everything down; the first failure is raised at the end, nothing is skipped."""
        failure: BaseException | None = None
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:
                failure = failure or error
        for point in reversed(mounts_below(self.base)):
            failure = failure or RuntimeError(f"mount left behind: {point}")
            with contextlib.suppress(OSError):
                syscalls.umount(point, syscalls.MNT_DETACH)
        _remove(self.base)
        if failure:
            raise failure

    @staticmethod
    def _unmount(point: Path) -> None:
        for below in reversed(mounts_below(point)):
            syscalls.umount(below, 0 if below == str(point) else syscalls.MNT_DETACH)


def _remove(path: Path) -> None:
    """rmtree, also where an ordinary user has taken his own rights to a directory away."""
    if os.geteuid() != 0:
        path.chmod(0o700)
        for folder, names, _ in os.walk(path):
            for name in names:
                if not os.path.islink(os.path.join(folder, name)):
                    os.chmod(os.path.join(folder, name), 0o700)
    shutil.rmtree(path)
