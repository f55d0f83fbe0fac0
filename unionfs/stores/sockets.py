# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets in an upper, which tar leaves out: without one the lower's file of its name would be seen
again.

Owns the list of them that goes with an archive as AREA/sockets, and making them from it.  Called by
archive.py only.  A list is somebody's data: what it names is looked for beneath a directory, and no
link is followed.
"""

import contextlib
import json
import os
import stat
from collections.abc import Collection, Iterator
from typing import Any, Final

from unionfs.errors import UnionfsError
from unionfs.format import AREA_NAME

FILE: Final = f"{AREA_NAME}/sockets"
_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY


def listed(directory: str, without: Collection[str]) -> bytes:
    """A line of JSON for each socket in a directory, but for its area and for these names."""
    lines: list[bytes] = []
    stack = [(os.open(directory, os.O_RDONLY | os.O_DIRECTORY), "")]
    try:
        while stack:
            folder, path = stack.pop()
            try:
                for name in _below(folder, () if path else {AREA_NAME, *without}, lines, path):
                    # Else it is being changed, or for tar to tell.
                    with contextlib.suppress(OSError):
                        stack.append((os.open(name, _OPEN, dir_fd=folder), f"{path}{name}/"))
            finally:
                os.close(folder)
    finally:
        for left, _ in stack:
            os.close(left)
    return b"".join(lines)


def _below(folder: int, without: Collection[str], lines: list[bytes], path: str) -> list[str]:
    """The directories in one; its sockets are told."""
    directories = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in without:
                continue
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
            elif not entry.is_file(follow_symlinks=False) and not entry.is_symlink():
                lines.append(_line(folder, entry.name, path + entry.name))
    return directories


def _line(folder: int, name: str, path: str) -> bytes:
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return b""
    if not stat.S_ISSOCK(status.st_mode):
        return b""
    told = {
        "path": path,
        "mode": stat.S_IMODE(status.st_mode),
        "owner": [status.st_uid, status.st_gid],
        "mtime": status.st_mtime_ns,
    }
    return json.dumps(told).encode() + b"\n"


def make(directory: str, lines: bytes) -> None:
    """Make what is listed, in a directory in which the rest is."""
    top = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        for line in lines.splitlines():
            _make(top, json.loads(line))
    except (ValueError, KeyError, TypeError) as exc:
        raise UnionfsError("the list of sockets is not understood") from exc
    finally:
        os.close(top)


def make_unpacked(directory: str) -> None:
    """The same with the list that came in an archive, which goes."""
    path = f"{directory}/{FILE}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    with open(fd, "rb") as file:
        lines = file.read()
    os.unlink(path)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path))  # the area is elsewhere: there was none
    make(directory, lines)


def _make(top: int, told: dict[str, Any]) -> None:
    *folders, name = str(told["path"]).split("/")
    if any(part in ("", ".", "..") for part in (*folders, name)):
        raise ValueError(told["path"])
    mode, owner = stat.S_IMODE(told["mode"]), told["owner"]
    folder = os.dup(top)
    try:
        for part in folders:
            below = os.open(part, _PATH, dir_fd=folder)
            os.close(folder)
            folder = below
        with _writable(folder):
            os.mknod(name, stat.S_IFSOCK | 0o600, dir_fd=folder)
            if os.geteuid() == 0:
                os.chown(name, int(owner[0]), int(owner[1]), dir_fd=folder, follow_symlinks=False)
            os.chmod(name, mode, dir_fd=folder)
            times = (int(told["mtime"]),) * 2
            os.utime(name, ns=times, dir_fd=folder, follow_symlinks=False)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _writable(folder: int) -> Iterator[None]:
    """Its times are kept, and its mode, though its owner may not write there."""
    path = f"/proc/self/fd/{folder}"
    status = os.stat(path)
    mode = stat.S_IMODE(status.st_mode)
    lent = os.geteuid() != 0 and mode & 0o300 != 0o300
    if lent:
        os.chmod(path, mode | 0o300)
    try:
        yield
    finally:
        if lent:
            os.chmod(path, mode)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
