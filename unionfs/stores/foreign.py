# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether what a verb is about to replace is a store, and what else would be lost with it.

Owns both rules.  A directory that was never an upper is somebody's files: a verb may put it aside,
but not destroy it.  What a mounted union uses is not replaced at all (using.py).  Called by
replacing.py before anything is made, and by verbs that only tell what they would do.
"""

import contextlib
import os
from typing import TYPE_CHECKING, Final

from unionfs.errors import UnionfsError
from unionfs.format import AREA_NAME, is_marked
from unionfs.identity import FILE
from unionfs.mounts import mounted_in, read_mounts
from unionfs.stores import unlocking, using
from unionfs.syscalls import exists

if TYPE_CHECKING:
    from unionfs.stores.backing import Chosen

_NLINK: Final = ".overlay.nlink"  # the mark of a file that is in an index
# How to keep what a verb would destroy.
BY_KEEP: Final = "--keep keeps it beside"
BY_NO_DISCARD: Final = "without --discard it is kept beside"
_OWN: Final = (FILE, "format", "work")  # one of them is in each area


def refuse(upper: "Chosen", *, keep: bool, hint: str) -> None:
    """Raise an error unless a directory may be replaced; `hint`: how to `keep` what is in it."""
    refuse_mounted(upper.fd, upper.name)
    if not upper.in_use:  # else nothing is replaced: a dry run
        using.refuse(upper)
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


def refuse_divided(upper: "Chosen") -> None:
    """Raise an error for an upper whose hard link index is elsewhere, as with workdir=.

    Without it a copy has broken links, and what is reset would be seen again through it.
    """
    if upper.encrypted or exists(upper.fd, AREA_NAME):
        return
    for folder, _, names, fd in os.fwalk(".", dir_fd=upper.fd):
        for name in names:
            if _is_indexed(f"/proc/self/fd/{fd}/{name}"):
                file = os.path.normpath(os.path.join(folder, name))
                what = f"{upper.name} has its hard link index in another directory ({file})"
                hint = "mount it with its workdir=, and copy or remove there what is meant"
                raise UnionfsError(what, hint=hint)


def _is_indexed(path: str) -> bool:
    with contextlib.suppress(OSError):
        if os.lstat(path).st_nlink > 1:
            return any(m.endswith(_NLINK) for m in os.listxattr(path, follow_symlinks=False))
    return False


def is_store(upper: int) -> bool:
    """Whether an open directory is an upper: of ours, encrypted, or marked by another program."""
    if unlocking.kind_of(upper) or is_marked(upper):
        return True
    with contextlib.suppress(PermissionError):  # not one that who asks may replace
        return any(exists(upper, f"{AREA_NAME}/{name}") for name in _OWN)
    return False
