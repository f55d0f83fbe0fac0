# SPDX-License-Identifier: GPL-2.0-or-later
"""Symbolic links on the way to a path of some system, which may be mounted below a directory.

Owns how they are followed: as that system itself would, so that none leads out of it.  Looks at
links only.  Called by plan.py and by `unionfs policy`.
"""

import errno
import os
from typing import Final

from unionfs.errors import UnionfsError
from unionfs.profiles.profile import below

_MOST: Final = 40  # as the kernel: MAXSYMLINKS


def followed(root: str, path: str) -> str:
    """A path of the system at `root`, as that system sees it, free of links.

    What is not there has none.  Raises UnionfsError for links that lead in a circle.
    """
    done: list[str] = []
    left = path.split("/")[::-1]
    count = 0
    while left:
        part = left.pop()
        if part == "..":
            del done[-1:]
        if part in ("", ".", ".."):
            continue
        try:
            target = os.readlink(below(root, "/".join([*done, part])))
        except OSError:
            done.append(part)
            continue
        count += 1
        if count > _MOST:
            raise UnionfsError(f"{path}: {os.strerror(errno.ELOOP)}")
        if target.startswith("/"):
            done.clear()
        left += target.split("/")[::-1]
    return "/" + "/".join(done)


def named(root: str, path: str) -> str:
    """The same without following what the path itself names, unless a slash ends it."""
    parent, name = os.path.split(path)
    if name in ("", ".", ".."):
        return followed(root, path)
    return below(followed(root, parent), name)


def refuse(said_by: str, layer: str, path: str) -> None:
    """Raises UnionfsError if a link is on the way from a layer's top to a path below it."""
    place = layer
    for part in filter(None, path.split("/")):
        place = below(place, part)
        try:
            target = os.readlink(place)
        except OSError:
            continue
        hint = f"name what it points to: {target}"
        raise UnionfsError(f"{said_by}: {place} is a symbolic link in the base", hint=hint)
