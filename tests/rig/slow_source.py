# SPDX-License-Identifier: GPL-2.0-or-later
"""A file system whose reads wait until they are told to go on: a lower that takes for ever.

As a program (`python -m tests.rig.slow_source MOUNTPOINT NAME…`) it serves files of SIZE bytes,
prints `read NAME` when the first read of a file waits, and lets all reads through once a line comes
in on its standard input. `SlowSource` starts it for a test.
"""

from __future__ import annotations

import errno
import os
import queue
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import pyfuse3
import trio

from tests.rig import syscalls
from tests.rig.mounted import PATIENCE

SIZE = 3 << 20
WHEN = 1_600_000_000_000_000_000


def content(name: str, offset: int = 0, size: int = SIZE) -> bytes:
    """What a file holds."""
    line = f"{name} ".encode()
    start = offset % len(line)
    size = max(0, min(size, SIZE - offset))
    return (line * (size // len(line) + 2))[start : start + size]


class Slow(pyfuse3.Operations):
    """One directory of regular files."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.told: set[int] = set()
        self.go = trio.Event()

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        e = pyfuse3.EntryAttributes()
        e.st_ino = inode
        root = inode == pyfuse3.ROOT_INODE
        e.st_mode = (stat.S_IFDIR | 0o755) if root else (stat.S_IFREG | 0o644)
        e.st_nlink = 2 if root else 1
        e.st_size = 0 if root else SIZE
        e.st_atime_ns = e.st_mtime_ns = e.st_ctime_ns = WHEN
        e.attr_timeout = e.entry_timeout = 1000
        return e

    async def lookup(self, parent, name, ctx):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        try:
            return self._attributes(self.names.index(os.fsdecode(name)) + 2)
        except ValueError:
            raise pyfuse3.FUSEError(errno.ENOENT) from None

    async def getattr(self, inode, ctx):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        return self._attributes(inode)

    async def opendir(self, inode, ctx):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        return inode

    async def readdir(self, fh, start, token):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        for number in range(start, len(self.names)):
            name, attributes = os.fsencode(self.names[number]), self._attributes(number + 2)
            if not pyfuse3.readdir_reply(token, name, attributes, number + 1):
                return

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh, offset, size):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        name = self.names[fh - 2]
        if fh not in self.told:
            self.told.add(fh)
            print(f"read {name}", flush=True)
        await self.go.wait()
        return content(name, offset, size)


async def _serve(slow: Slow) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        slow.go.set()


class SlowSource:
    """The program, mounted at `point` inside a with block."""

    def __init__(self, point: Path, names: list[str]) -> None:
        self.point = point
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.rig.slow_source", str(point), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.expect("mounted")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())

    def expect(self, *lines: str) -> None:
        """Wait until it has said all this, in any order."""
        wanted = set(lines)
        while wanted:
            wanted.discard(self._lines.get(timeout=PATIENCE))

    def quiet(self) -> bool:
        """Whether there is nothing more that it said."""
        return self._lines.empty()

    def go(self) -> None:
        """Let all reads through, from now on."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self._process.stdin.write("go\n")
            self._process.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.go()
        syscalls.umount(self.point, syscalls.MNT_DETACH)
        self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self._process.stdout is not None
        self._process.stdout.close()


def _allow_background(point: str) -> None:
    """Read-ahead goes on in the background, of which the kernel allows a dozen at a time."""
    minor = 0
    with open("/proc/self/mountinfo") as table:
        for line in table:
            if line.split(" ")[4] == point:
                minor = int(line.split(" ")[2].partition(":")[2])
    with tempfile.TemporaryDirectory() as control:
        syscalls.mount("fusectl", control, "fusectl", 0)
        try:
            Path(control, str(minor), "max_background").write_text("1000")
        finally:
            syscalls.umount(control)


def main(point: str, names: list[str]) -> None:
    slow = Slow(names)
    pyfuse3.init(slow, point, {"fsname=slow", "default_permissions"})
    _allow_background(point)
    print("mounted", flush=True)
    try:
        trio.run(_serve, slow)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
