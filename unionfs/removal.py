# SPDX-License-Identifier: GPL-2.0-or-later
"""Removing a directory of ours with all that is in it, and nothing else.

Owns the rule that a removal enters nothing that is mounted there and follows no link, and that what
is left is told.  Called by whatever takes an upper away, and by what has made a temporary one.
"""

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from unionfs.mounts import mount_number

_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY
_DEEP: Final = 200  # what lies deeper is moved up: a directory has a descriptor while it is emptied

# What to do about what is left.
HINT: Final = "see who owns it, whether it is mounted, or lsattr(1) shows it immutable; remove it"


def remove_tree(top: int, name: str) -> list[str]:
    """Remove `name` in an open directory, also what its user locked himself out of.

    Returns what is left, as paths that begin with `name`: what is mounted or immutable.
    """
    return _Removal(top).remove(name)


def remove_path(path: Path) -> list[str]:
    """The same by a path of our own."""
    top = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        return remove_tree(top, path.name)
    finally:
        os.close(top)


class _Removal:
    """One removal: what it may not leave, and what it could not remove."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._place = _place(top)
        self._root = -1
        self._left: list[str] = []

    def remove(self, name: str) -> list[str]:
        self._remove(self._top, name, name, 0)
        return self._left

    def _remove(self, parent: int, name: str, path: str, depth: int) -> None:
        try:
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=parent)
                return
            if depth == _DEEP:
                self._move_up(parent, name)
                return
            if self._empty(parent, name, path, depth):
                os.rmdir(name, dir_fd=parent)
        except FileNotFoundError:
            return
        except OSError:
            self._left.append(path)

    def _empty(self, parent: int, name: str, path: str, depth: int) -> bool:
        """Whether a directory is empty now."""
        before = len(self._left)
        fd = self._enter(parent, name)
        try:
            if not depth:
                self._root = fd
            while names := _listed(fd):
                for below in names:
                    self._remove(fd, below, f"{path}/{below}", depth + 1)
                if depth or len(self._left) > before:  # only the root gets what was deep
                    break
        finally:
            os.close(fd)
        return len(self._left) == before

    def _enter(self, parent: int, name: str) -> int:
        held = os.open(name, _PATH, dir_fd=parent)
        try:
            if _place(held) != self._place:
                raise OSError(errno.EBUSY, "something is mounted there")
            with contextlib.suppress(OSError):
                os.chmod(f"/proc/self/fd/{held}", stat.S_IRWXU)
            return os.open(".", _OPEN, dir_fd=held)
        finally:
            os.close(held)

    def _move_up(self, parent: int, name: str) -> None:
        os.close(self._enter(parent, name))
        deep = f".deep-{secrets.token_hex(8)}"
        os.rename(name, deep, src_dir_fd=parent, dst_dir_fd=self._root)


def _place(fd: int) -> int:
    """The mount that a directory is on: a bind can be of the same file system."""
    number = mount_number(fd)
    return number if number >= 0 else os.fstat(fd).st_dev


def _listed(fd: int) -> list[str]:
    fresh = os.open(".", _OPEN, dir_fd=fd)  # btrfs lists no name younger than a descriptor
    try:
        return os.listdir(fresh)
    finally:
        os.close(fresh)
