# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree of the C module over a test's own directories, without a mount."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from unionfs._native import ROOT_INO, Tree

PREFIX = "trusted.overlay." if os.geteuid() == 0 else "user.overlay."


NOT_PLAIN: dict[str, object] = {
    "work_fd": -1,
    "plain": False,
    "all_ids": True,
    "sync_copies": True,
    "sync_names": False,
    "metacopy_bytes": 0,
}


class Stack:
    """A tree over directories of the test's own: upper, middle, bottom."""

    def __init__(self, place: Path, *, max_open_dirs: int = 16) -> None:
        self.place = place
        self.paths = [place / name for name in ("upper", "middle", "bottom")]
        self.index = place / "index"
        for path in (*self.paths, self.index):
            path.mkdir(exist_ok=True)
        self.upper, self.middle, self.bottom = self.paths
        flags = os.O_RDONLY | os.O_DIRECTORY
        self.fds = [os.open(path, flags) for path in (*self.paths, self.index)]
        self.max_open_dirs = max_open_dirs
        self.tree = self.make()
        self.changing: Tree | None = None

    def make(self, **changed: object) -> Tree:
        words: dict[str, object] = {
            "has_upper": True,
            "live": False,
            "upper_xattrs": True,
            "user_prefix": PREFIX.startswith("user"),
            "override": 0,
            "squash_uid": -1,
            "squash_gid": -1,
            "uids": [],
            "gids": [],
            "max_open_dirs": self.max_open_dirs,
            "index_fd": self.fds[3],
            "numbers_fd": -1,
            "image_fd": -1,
            "static_nlink": False,
            "noxattrs": False,
            "noacl": False,
        } | NOT_PLAIN
        described = [(fd, 0, False, False, bytes(16)) for fd in self.fds[:3]]
        return Tree(described, **(words | changed))  # type: ignore[arg-type]

    def plain(self) -> Tree:
        """One that makes plain changes, over the same layers; it is made once."""
        if self.changing is None:
            work = self.place / "work"
            work.mkdir()
            self.fds.append(os.open(work, os.O_RDONLY | os.O_DIRECTORY))
            self.changing = self.make(
                plain=True, work_fd=self.fds[-1], index_fd=-1, sync_copies=False
            )
        return self.changing

    def ino(self, path: str) -> int:
        """Look a path up, one reference for each part."""
        at = ROOT_INO
        for name in os.fsencode(path).split(b"/"):
            at = self.tree.lookup(at, name)[0]
        return at

    def read(self, path: str) -> bytes:
        fh = self.tree.open(self.ino(path), os.O_RDONLY)
        try:
            return self.tree.read(fh, 0, 1 << 20, False) or b""
        finally:
            self.tree.release(fh)

    def list(self, path: str = "") -> set[bytes]:
        dh = self.tree.opendir(self.ino(path) if path else ROOT_INO)
        try:
            return {name for name, _, _ in self.tree.readdir(dh, 0, 100)} - {b".", b".."}
        finally:
            self.tree.releasedir(dh)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def mark(path: Path, name: str, value: bytes) -> None:
    os.setxattr(path, PREFIX + name, value)


def refused(action: Callable[[], object]) -> int:
    """The errno of what must fail."""
    try:
        action()
    except OSError as error:
        return error.errno or 0
    raise AssertionError("it was not refused")
