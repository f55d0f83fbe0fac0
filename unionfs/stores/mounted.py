# SPDX-License-Identifier: GPL-2.0-or-later
"""The stores of mounted unions, as their daemons tell of them.

Owns which union has which store: by where it lies, since a copy of a store has the same id.  Called
by inspect.py, and by the verbs of `unionfs store` to say who has what they cannot have.
"""

import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from unionfs.errors import InUse, UnionfsError
from unionfs.mounts import MountEntry, read_mounts
from unionfs.stores import find


@dataclass(frozen=True, slots=True)
class Mounted:
    """A union with an upper, and what its status says of that."""

    point: str
    upper: str  # its name; the path of one that is a directory
    store: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    owner: int = 0  # the user whose mount it is

    @property
    def place(self) -> str:
        """The image or device that has the upper, or the directory that it is."""
        source = self.store.get("source")
        return source if isinstance(source, str) else self.upper

    @property
    def directory(self) -> str | None:
        """Where in an image or on a device; None of a directory."""
        found = self.store.get("directory")
        return found if isinstance(found, str) else None

    @property
    def alone(self) -> bool:
        """Whether nobody else can mount its image: a program has it, not the kernel."""
        return str(self.store.get("mounted_by", "kernel")) != "kernel"

    def lies_in(self, path: str) -> bool:
        """Whether a path is its image, the loop device on that, its device or its directory."""
        ways = {self.place, str(self.store.get("device", self.place))}
        ways |= {image for way in ways if (image := find.image_of(way)) is not None}
        return any(is_same(way, path) for way in ways)

    def has(self, path: str, directory: str, identity: str | None) -> bool:
        """Whether it is an upper: a directory in what is at a path, with this id."""
        if self.directory is not None:
            return self.directory == directory and self.lies_in(path)
        below = os.path.join(path, directory.lstrip("/"))
        if os.path.isdir(path):
            return is_same(self.upper, below)
        # On a device that is mounted, it is known by the path there.
        return identity is not None and str(self.store.get("id")) == identity


def is_same(one: str, other: str) -> bool:
    """Whether two paths are one file, directory or device."""
    try:
        first, second = os.stat(one), os.stat(other)
    except OSError:
        return False
    if stat.S_ISBLK(first.st_mode) and stat.S_ISBLK(second.st_mode):
        return first.st_rdev == second.st_rdev
    return os.path.samestat(first, second)


def answers(deadline: float, user: int | None) -> Iterator[tuple[MountEntry, dict[str, Any]]]:
    """The unions that answer within so many seconds, and what; of a user, or of all."""
    from unionfs.mounts import FSTYPE
    from unionfs.unions import ask, owner

    mounts = read_mounts()
    for entry in mounts:
        if entry.fstype == FSTYPE and user in (None, owner(entry)[0]):
            yield entry, ask(entry, mounts, deadline).facts


def mounted_unions(deadline: float = 2, user: int | None = None) -> list[Mounted]:
    """Those that answer (within so many seconds), and whose changes stay; of a user, or of all."""
    from unionfs.unions import owner

    found = []
    for entry, facts in answers(deadline, user):
        store, upper = facts.get("store"), facts.get("upper")
        if isinstance(upper, str) and not facts.get("ephemeral"):
            told = store if isinstance(store, dict) else {}
            found.append(Mounted(entry.point, upper, told, facts, owner(entry)[0]))
    return found


def union_of(path: str, directory: str) -> Mounted | None:
    """By which an upper is changed, a directory in what is at a path; None if none answers."""
    from unionfs.unions import DEADLINE

    # What a stranger's daemon says is not believed.
    found = mounted_unions(DEADLINE, os.geteuid())
    return next((union for union in found if union.has(path, directory, None)), None)


def named(error: UnionfsError) -> UnionfsError:
    """An error, which says at which mount points a store is used, if it is that and it is known."""
    if not isinstance(error, InUse):
        return error
    unions = [m for m in mounted_unions() if _is_meant(m, error)]
    points = [m.point for m in unions]
    if not points:
        return error
    several = len(points) > 1
    who, where, first = "unions" if several else "union", ", ".join(points), unions[0]
    if error.shared and first.alone and first.owner != os.geteuid():
        # FUSE lets only that user look, and not even root.
        user = _user(first.owner)
        what = f"{error.name} is in use by the {who} of {user} at {where}"
        return UnionfsError(what, hint=f"do it as that user: runuser -u {user} -- unionfs ...")
    what = f"{error.name} is in use by the {who} at {where}"
    if error.why and first.alone:
        what += f", and {first.store['mounted_by']} {error.why}"
    which = "them" if several else "it"
    return UnionfsError(what, hint=f"unmount {which} first: unionfs umount {' '.join(points)}")


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _is_meant(union: Mounted, error: InUse) -> bool:
    if error.directory is None:
        return union.lies_in(error.path)
    return union.has(error.path, error.directory, error.identity)
