# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether what a verb is about to replace is a store, and what else would be lost with it.

Owns both rules.  A directory that was never an upper is somebody's files: a verb may put it aside,
but not destroy it.  What a mounted union has as a lower is not replaced at all.  Called by
replacing.py before anything is made, and by verbs that only tell what they would do.
"""

import os
from typing import TYPE_CHECKING, Final

from unionfs import locator
from unionfs.errors import UnionfsError
from unionfs.format import AREA_NAME, is_marked
from unionfs.identity import FILE
from unionfs.mounts import Position, locate, mounted_in, read_mounts
from unionfs.stores import unlocking
from unionfs.stores.mounted import lowers_in_use

if TYPE_CHECKING:
    from unionfs.stores.backing import Chosen

# How to keep what a verb would destroy.
BY_KEEP: Final = "--keep keeps it beside"
BY_NO_DISCARD: Final = "without --discard it is kept beside"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY
_OWN: Final = (FILE, "format", "work")  # one of them is in each area


def refuse(upper: "Chosen", *, keep: bool, hint: str) -> None:
    """Raise an error unless a directory may be replaced; `hint`: how to `keep` what is in it."""
    refuse_mounted(upper.fd, upper.name)
    if point := _base_of(upper.fd):
        what = f"{upper.name} is a lower of the union at {point}"
        raise UnionfsError(what, hint=f"unmount it first: unionfs umount {point}")
    if keep or is_store(upper.fd) or not set(os.listdir(upper.fd)) - upper.not_its_own():
        return
    what = f"{upper.name} is not a store, and what is in it would be lost"
    raise UnionfsError(what, hint=f"{hint}, or name an empty directory")


def refuse_mounted(upper: int, name: str, relative: str = "") -> None:
    """Raise an error if anything is mounted in an open upper, or at or below a path in it.

    Renamed, it would go with it, and be in the way of who removes it.
    """
    point = mounted_in(upper, relative, read_mounts())
    if point is not None:
        what = f"{point} is a mount point in {name}"
        raise UnionfsError(what, hint=f"unmount it first: umount {point}")


def is_store(upper: int) -> bool:
    """Whether an open directory is an upper: of ours, encrypted, or marked by another program."""
    if unlocking.kind_of(upper) or is_marked(upper):
        return True
    return any(_exists(upper, f"{AREA_NAME}/{name}") for name in _OWN)


def _exists(fd: int, path: str) -> bool:
    try:
        os.stat(path, dir_fd=fd, follow_symlinks=False)
    except OSError:
        return False
    return True


def _base_of(upper: int) -> str:
    """Where a union is mounted that has it, or something below it, as a lower; empty: nowhere.

    That of one in an image or on a device cannot be mounted for writing meanwhile.
    """
    for point, lower in lowers_in_use():
        if locator.is_directory(lower) and _is_in(lower, upper):
            return point
    return ""


def _is_in(path: str, upper: int) -> bool:
    """Whether a directory is an open one or below it, by whichever mount."""
    own = _position(upper)
    try:
        fd = os.open(path, _DIRECTORY)
    except OSError:
        return False
    try:
        its = _position(fd)
        alike = os.path.samestat(os.fstat(fd), os.fstat(upper))
    finally:
        os.close(fd)
    return alike or (own is not None and its is not None and its.inside(own))


def _position(fd: int) -> Position | None:
    return locate(fd, read_mounts())
