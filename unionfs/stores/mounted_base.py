# SPDX-License-Identifier: GPL-2.0-or-later
"""A base that is mounted already: the device beneath it.

Owns what is known of a directory that is the root of a mounted file system, which is recognized
as if its device had been named.  A directory within one is nobody's base: what lies around it may
be installed anew, and it stays the same directory.  Called by opening.py, opened.py and whoever
else asks which base a store belongs to.
"""

import contextlib
import os
import stat
from collections.abc import Sequence
from typing import Final

from unionfs import locator
from unionfs.errors import UnionfsError
from unionfs.identity import Base
from unionfs.locator import Locator, unescape_tag
from unionfs.mounts import MountEntry, filesystem_at, read_mounts
from unionfs.stores import base, find
from unionfs.stores.probe import Contents, probe

_LINKS: Final = "/dev/disk/by-"


def describe(where: Locator, directory: str, mounts: Sequence[MountEntry]) -> Base:
    """What a store remembers of a base that is this directory."""
    contents = contents_at(directory, mounts)
    with contextlib.suppress(OSError):  # of a digest, which not everybody may make
        return base.describe(where, contents)
    return base.describe(where, None)


def named(lower: str) -> Base:
    """What a store remembers of a base that a locator names: an image, a device or a directory."""
    where = locator.parse(lower)
    path = find.find(where)
    if os.path.isdir(path):
        return describe(where, path, read_mounts())
    return base.describe(where, probe(path))


def device_at(directory: str, mounts: Sequence[MountEntry]) -> tuple[str, MountEntry] | None:
    """The device whose file system a directory is the root of, and its mount."""
    entry = filesystem_at(directory, mounts)
    node = None if entry is None else _node(entry)
    return None if entry is None or node is None else (node, entry)


def contents_at(directory: str, mounts: Sequence[MountEntry]) -> Contents | None:
    """What is on the device that is mounted there; None where there is none, or it is not known."""
    if (found := device_at(directory, mounts)) is None:
        return None
    node, entry = found
    try:
        contents = probe(node)
    except UnionfsError:  # an ordinary user may not read it; udev has
        contents = Contents(node, entry.fstype, _linked("label", node), _linked("uuid", node))
    return contents if contents.uuid or contents.label or contents.usage == "filesystem" else None


def _node(entry: MountEntry) -> str | None:
    """The device of a mounted file system.  btrfs has a number of its own in place of that."""
    if entry.fstype == "btrfs":
        return entry.source if _is_device(entry.source) else None
    with contextlib.suppress(OSError), open(f"/sys/dev/block/{entry.device}/uevent") as file:
        for line in file:
            name, _, value = line.strip().partition("=")
            if name == "DEVNAME" and _is_device(f"/dev/{value}"):
                return f"/dev/{value}"
    return None


def _is_device(path: str) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISBLK(os.stat(path).st_mode)
    return False


def _linked(tag: str, node: str) -> str:
    """What udev shows of a device."""
    with contextlib.suppress(OSError), os.scandir(f"{_LINKS}{tag}") as links:
        for link in links:
            if os.path.realpath(link.path) == node:
                return unescape_tag(link.name)
    return ""
