# SPDX-License-Identifier: GPL-2.0-or-later
"""What the marks in an upper refer to: directories and data in the lowers, and the hard link index.

Owns the rules by which such a mark is in order.  Nothing is repaired here but an index entry that
nobody refers to, which is moved aside: what a mark leads to may only be missing because another
base is there.  Called by checking.py; the lowers are opened by examination.py or the daemon.

What a path of the lowers means is asked of a union of them alone, so that their own whiteouts and
redirects count as they do in a mount.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from typing import Final, NamedTuple

from unionfs._native import ROOT_INO
from unionfs.union import Union

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_HANDLE: Final = re.compile(r"[0-9a-f]{2,}")
_NUMBERED: Final = re.compile(r"unionfs(-[0-9a-f]+){2,3}")
_NLINK: Final = re.compile(rb"([UL])([+-][0-9]+)")
_OVL_FB: Final = 21  # bytes before the handle
_BATCH: Final = 512
LOST: Final = "lost"


class Found(NamedTuple):
    """What the lowers have at a path."""

    mode: int
    size: int


class Lowers:
    """The lowers of a union, without an upper, asked by path."""

    def __init__(self, union: Union) -> None:
        self._tree = union.tree

    def look(self, path: bytes) -> Found | None:
        """What is at an absolute path; None if nothing is."""
        ino, seen = ROOT_INO, []
        try:
            attributes = self._tree.getattr(ROOT_INO)
            for name in path.split(b"/"):
                if name:
                    attributes = self._tree.lookup(ino, name)
                    ino = attributes[0]
                    seen.append(ino)
            return Found(attributes[1], attributes[6])
        except OSError as exc:
            # EIO: a mark in the lowers themselves that leads to nothing.
            if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ENAMETOOLONG):
                return None
            raise
        finally:
            for number in seen:
                self._tree.forget(number, 1)


def wrong_directory(below: bytes | None, lowers: Lowers) -> str:
    """What is wrong with a redirect of a directory, which leads to `below`; empty if nothing is."""
    found = lowers.look(below) if below is not None else None
    if found is None or not stat.S_ISDIR(found.mode):
        return f"it leads to no directory in the lowers ({_shown(below)})"
    return ""


def wrong_copy(below: bytes | None, size: int, lowers: Lowers) -> str:
    """What is wrong with a metadata-only copy whose data are at `below`."""
    found = lowers.look(below) if below is not None else None
    if found is None or not stat.S_ISREG(found.mode):
        return f"its data are missing: the lowers have no file {_shown(below)}"
    if found.size != size:
        return f"its data have {found.size} bytes in the lowers ({_shown(below)}), not {size}"
    return ""


def _shown(path: bytes | None) -> str:
    return "anywhere" if path is None else os.fsdecode(path)


def target(below: bytes | None, name: bytes, redirect: bytes | None) -> bytes | None:
    """Where in the lowers a name of the upper leads; None: nowhere.

    `below`: where its directory does.
    """
    if redirect is not None and redirect.startswith(b"/"):
        return redirect
    return None if below is None else below + b"/" + (name if redirect is None else redirect)


# The index


def check_index(area: int, prefix: str) -> Iterator[tuple[str, str]]:
    """The entries of AREA/index that are wrong, and why; `prefix` is that of the upper's marks."""
    for name, status, index in _entries(area):
        path = f"/proc/self/fd/{index}/{name}"
        origin = _mark(path, f"{prefix}origin")
        if not (_HANDLE.fullmatch(name) or _NUMBERED.fullmatch(name)):
            yield name, "it is no name of an index"
        elif origin is None:
            if _HANDLE.fullmatch(name):
                yield name, "it has no origin"
        elif len(origin) < _OVL_FB or origin[1] != 0xFB or origin[2] != len(origin):
            yield name, "its origin is not understood"
        elif _HANDLE.fullmatch(name) and name != origin.hex():
            yield name, "its origin is another file"
        count = _links(_mark(path, f"{prefix}nlink"), status)
        if count is not None and count < status.st_nlink - 1:
            yield name, f"it has {status.st_nlink - 1} names in the upper, more than are counted"


def _entries(area: int) -> Iterator[tuple[str, os.stat_result, int]]:
    """What is in the index, but for the directories and whiteouts of kernel overlayfs."""
    with contextlib.suppress(FileNotFoundError):
        index = os.open("index", _DIRECTORY, dir_fd=area)
        try:
            for name in sorted(os.listdir(index)):
                status = os.stat(name, dir_fd=index, follow_symlinks=False)
                whiteout = stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
                if not (whiteout or stat.S_ISDIR(status.st_mode)):
                    yield name, status, index
        finally:
            os.close(index)


def _mark(path: str, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None


def _links(mark: bytes | None, status: os.stat_result) -> int | None:
    """The union's links of an indexed file; None where only the lowers know."""
    match = None if mark is None else _NLINK.fullmatch(mark)
    if match is None or match[1] != b"U":
        return None
    return status.st_nlink + int(match[2])


class Unnamed(NamedTuple):
    """An entry of the index that no name in the union refers to."""

    name: str
    what: str
    spare: bool  # nor would one, over these lowers


def unnamed(area: int, union: Union, lowers: Union) -> list[Unnamed]:
    """The entries of the index that no name in `union` refers to; `lowers`: it without its upper.

    One with a name in the upper has a second link; for the others every name is looked at.  An
    entry whose origin the lowers do not have may only be over others than it was made over.
    """
    alone = {name for name, status, _ in _entries(area) if status.st_nlink == 1}
    if alone:
        alone -= {union.info(ino).index_name.decode() for ino in _files(union)}
    origins = {lowers.tree.index_name(ino) for ino in _files(lowers)} if alone else set()
    return [
        Unnamed(name, "no name refers to it", True)
        if name in origins
        else Unnamed(name, "its origin is not in these lowers, and no name refers to it", False)
        for name in sorted(alone)
    ]


def _files(union: Union) -> Iterator[int]:
    """Each name of a file with several links, by its inode number; valid until the next."""
    tree = union.tree
    stack = [(ROOT_INO, 0)]
    while stack:
        folder, counted = stack.pop()
        for name in _names(union, folder):
            try:
                found = tree.lookup(folder, name)
            except OSError:
                continue  # for the marks to say
            if stat.S_ISDIR(found[1]):
                stack.append((found[0], 1))
                continue
            if found[2] > 1 or union.info(found[0]).indexed:
                yield found[0]
            tree.forget(found[0], 1)
        if counted:
            tree.forget(folder, counted)


def _names(union: Union, folder: int) -> Iterator[bytes]:
    handle = union.tree.opendir(folder)
    try:
        offset = 0
        while entries := union.tree.readdir(handle, offset, _BATCH):
            yield from (name for name, _, _ in entries if name not in (b".", b".."))
            offset = entries[-1][2]
    finally:
        union.tree.releasedir(handle)


def set_aside(area: int, name: str) -> None:
    """Move an entry of the index to AREA/lost: whatever it was, it is not thrown away."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(LOST, 0o700, dir_fd=area)
    index = os.open("index", _DIRECTORY, dir_fd=area)
    try:
        os.rename(f"index/{name}", f"{LOST}/{name}", src_dir_fd=area, dst_dir_fd=area)
        os.fsync(index)
    finally:
        os.close(index)
