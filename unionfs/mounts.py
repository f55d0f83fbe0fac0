# SPDX-License-Identifier: GPL-2.0-or-later
"""What /proc/self/mountinfo says: which mounts there are, and where in its file system a file is.

Owns the reading of mountinfo.  Changes nothing.  Called by layer and work (does one directory
lie in the other?), session and daemon (what is mounted on the mount point?), stores (which base?).
"""

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

FSTYPE = "fuse.unionfs"  # of our mounts
_SUBVOLUME = 256  # the inode number of its root: BTRFS_FIRST_FREE_OBJECTID
_ESCAPE = re.compile(rb"\\([0-7]{3})")


class MountEntry(NamedTuple):
    """One line of mountinfo."""

    number: int
    device: str  # "major:minor" of the file system
    root: str  # what of the file system is mounted: a path within it
    point: str
    fstype: str
    source: str
    options: str  # of the super block


class Position(NamedTuple):
    """Where a directory lies: its file system and its path within that.

    Bind mounts and mount points do not matter: two directories are nested when one position
    is inside the other, by whichever way they are reached.
    """

    device: str
    path: str

    def inside(self, other: "Position") -> bool:
        """Whether this is `other` or below it."""
        if self.device != other.device:
            return False
        return self.path == other.path or self.path.startswith(other.path.rstrip("/") + "/")


def unescape(field: bytes) -> str:
    """Spaces, tabs, newlines and backslashes are written as three octal digits."""
    return os.fsdecode(_ESCAPE.sub(lambda m: bytes([int(m[1], 8)]), field))


def parse_mounts(text: bytes) -> list[MountEntry]:
    """The mounts of a mountinfo file, in its order: what covers comes after what is covered."""
    entries = []
    for line in text.splitlines():
        head, _, tail = line.partition(b" - ")
        first, last = head.split(b" "), tail.split(b" ")
        if len(first) < 6 or len(last) < 2:
            continue
        entries.append(
            MountEntry(
                number=int(first[0]),
                device=first[2].decode(),
                root=unescape(first[3]),
                point=unescape(first[4]),
                fstype=last[0].decode(),
                source=unescape(last[1]),
                options=unescape(last[2]) if len(last) > 2 else "",
            )
        )
    return entries


def read_mounts() -> list[MountEntry]:
    """The mounts this process sees; none where there is no /proc."""
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            return parse_mounts(file.read())
    except FileNotFoundError:
        return []


def mount_number(fd: int, process: int | str = "self") -> int:
    """The mount that `fd` was opened through, as in the first column of mountinfo; -1 unknown."""
    try:
        with open(f"/proc/{process}/fdinfo/{fd}", "rb") as file:
            for line in file:
                if line.startswith(b"mnt_id:"):
                    return int(line[7:])
    except FileNotFoundError:
        pass
    return -1


def path_of(fd: int) -> str:
    """The path of an open directory, free of symlinks, as this process would walk it."""
    return os.readlink(f"/proc/self/fd/{fd}")


def locate(fd: int, mounts: Iterable[MountEntry]) -> Position | None:
    """Where the directory `fd` lies; None if its mount is not listed (a chroot, no /proc)."""
    number = mount_number(fd)
    for entry in mounts:
        if entry.number != number:
            continue
        path = path_of(fd)
        below = os.path.relpath(path, entry.point)
        if below.split("/")[0] == "..":
            return None
        return Position(entry.device, os.path.normpath(os.path.join(entry.root, below)))
    return None


def filesystem_at(directory: str, mounts: Iterable[MountEntry]) -> MountEntry | None:
    """The mount whose file system's root is seen there; None if it is a directory within one.

    The root of a subvolume of btrfs is one, too.
    """
    try:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        number = mount_number(fd)
        entry = next((entry for entry in mounts if entry.number == number), None)
        if entry is None or path_of(fd) != entry.point:
            return None
        subvolume = entry.fstype == "btrfs" and os.fstat(fd).st_ino == _SUBVOLUME
        return entry if entry.root == "/" or subvolume else None
    finally:
        os.close(fd)


def mounted_beneath(path: str, mounts: Iterable[MountEntry]) -> bool:
    """Whether anything is mounted strictly below `path` (absolute, free of symlinks)."""
    prefix = path.rstrip("/") + "/"
    return any(entry.point.startswith(prefix) and entry.point != path for entry in mounts)


def mounted_in(fd: int, relative: str, mounts: Iterable[MountEntry]) -> str | None:
    """A mount point below an open directory, or at or below a path in it; None if there is none.

    What is on a mount that nobody else sees has none.
    """
    mounts = list(mounts)
    number = mount_number(fd)
    if all(entry.number != number for entry in mounts):
        return None
    root = path_of(fd)
    path = os.path.join(root, relative).rstrip("/")
    for entry in mounts:
        at = bool(relative) and entry.point == path
        if (entry.point.startswith(f"{path}/") and entry.point != root) or at:
            return entry.point
    return None


def topmost(path: str, mounts: Iterable[MountEntry]) -> MountEntry | None:
    """What is seen at `path` if it is a mount point."""
    found = None
    for entry in mounts:
        if entry.point == path:
            found = entry
    return found


def covering(entry: MountEntry, mounts: Iterable[MountEntry]) -> MountEntry | None:
    """What lies over a mount, at its mount point or on the way there; None if it is seen."""
    later = False
    for other in mounts:
        if later and f"{entry.point}/".startswith(other.point.rstrip("/") + "/"):
            return other
        later = later or other.number == entry.number
    return None
