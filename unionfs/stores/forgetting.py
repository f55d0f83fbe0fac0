# SPDX-License-Identifier: GPL-2.0-or-later
"""Removing what is kept of an upper: beside it as a whole, and in its area as paths.

Owns which of it is meant, and that nobody uses it.  The upper itself may be in use.  Called by
`unionfs store reset --forget`.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from typing import Final

from unionfs.errors import InUse, UnionfsError
from unionfs.removal import HINT, remove_tree
from unionfs.stores import foreign, replacing
from unionfs.stores import kept as names
from unionfs.stores.backing import Chosen
from unionfs.stores.inspect import Kept, directories, disk_bytes, kept_beside, upper_at

_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_ROOT: Final = "/"  # of its file system: nothing is beside it


def find(upper: Chosen, date: str) -> list[Kept]:
    """What is kept of an upper, with sizes; of a DATE, of which the beginning will do."""
    digits = re.sub("[^0-9]", "", date)
    found = [item for item in _all(upper) if re.sub("[^0-9]", "", item.date).startswith(digits)]
    if not found and date:
        raise UnionfsError(
            f"{upper.name} keeps nothing of {date}", hint="unionfs store info lists it"
        )
    for item in found:
        fd = _open(upper, item)
        try:
            item.size = disk_bytes(fd)
        finally:
            os.close(fd)
    return sorted(found, key=lambda item: item.date)


def _is_alone(upper: Chosen) -> bool:
    return upper.volume.contents is not None and upper.directory == _ROOT


def _all(upper: Chosen) -> Iterator[Kept]:
    own = upper_at(upper.fd, upper.directory)
    if own is not None:
        yield from own.kept
    if _is_alone(upper):
        return
    top, name = replacing.open_beside(upper.volume, upper.directory)
    try:
        plain = own is None and not upper.encrypted
        seen = f"../{name}" if upper.directory == _ROOT else upper.directory
        yield from kept_beside(top, directories(top), seen, plain=plain)
    finally:
        os.close(top)


def _open(upper: Chosen, item: Kept) -> int:
    """What is kept, locked: somebody may have it mounted by its name."""
    if item.in_area:
        folder, name = os.path.split(os.path.relpath(item.directory, upper.directory))
        fd = os.open(f"{folder}/{name}", _OPEN, dir_fd=upper.fd)
    else:
        top, _ = replacing.open_beside(upper.volume, upper.directory)
        try:
            fd = os.open(os.path.basename(item.directory), _OPEN, dir_fd=top)
        finally:
            os.close(top)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        where = os.path.normpath(item.directory), upper.volume.path
        raise InUse(place(upper, item), where[1], directory=where[0]) from None
    return fd


def place(upper: Chosen, item: Kept) -> str:
    """Where it is, for messages."""
    name = os.path.basename(item.directory)
    return (
        f"{upper.name}/{os.path.relpath(item.directory, upper.directory)}"
        if item.in_area
        else (upper.beside(name))
    )


def forget(upper: Chosen, item: Kept) -> None:
    """Remove it.  Killed in the middle, no half of an upper is left that looks like one."""
    fd = _open(upper, item)
    try:
        foreign.refuse_mounted(fd, place(upper, item))
        if item.in_area:
            _remove_in_area(upper, item)
            return
        top, name = replacing.open_beside(upper.volume, upper.directory)
        try:
            temporary = names.temporary(name, names.NEW)
            own = os.path.basename(item.directory)
            os.rename(own, temporary, src_dir_fd=top, dst_dir_fd=top)
            if left := remove_tree(top, temporary):
                raise _not_forgotten(upper, item, upper.beside(left[0]))
        finally:
            os.close(top)
    finally:
        os.close(fd)


def _remove_in_area(upper: Chosen, item: Kept) -> None:
    folder, name = os.path.split(os.path.relpath(item.directory, upper.directory))
    area = os.open(folder, _OPEN, dir_fd=upper.fd)
    try:
        if left := remove_tree(area, name):
            raise _not_forgotten(upper, item, f"{upper.name}/{folder}/{left[0]}")
    finally:
        os.close(area)


def _not_forgotten(upper: Chosen, item: Kept, left: str) -> UnionfsError:
    return UnionfsError(f"not all of {place(upper, item)} can be removed: {left}", hint=HINT)
