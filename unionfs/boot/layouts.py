# SPDX-License-Identifier: GPL-2.0-or-later
"""Stores that the programs whose words we take have written by kernel overlayfs.

Owns the table LAYOUTS: where each of them has its upper and its work directory.  Their format is
ours (docs/on-disk-format.md), but they lie a step below the directory that is ours, which would
show them as two directories in the root.  Called by root.py.
"""

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import Final

from unionfs import locator
from unionfs.boot.request import Request
from unionfs.errors import UnionfsError
from unionfs.format import AREA_NAME
from unionfs.stores.volume import Volume, open_volume, walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a program lays out its store."""

    program: str
    words: tuple[str, ...]  # that name the store
    upper: str
    work: str
    at_top: bool  # where no directory is said; else below one that is called as ours is


LAYOUTS: Final = (
    Layout(  # _mnt_overlayfs of its hook
        program="archiso",
        words=("cow_label", "cow_device"),
        upper="upperdir",
        work="workdir",
        at_top=False,
    ),
    Layout(
        program="casper",
        words=("persistent",),
        upper="upper",
        work="work",
        at_top=True,
    ),
    Layout(  # the work directory itself is `_` in it
        program="overlayroot",
        words=("overlayroot",),
        upper="overlay",
        work="overlay-workdir",
        at_top=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Left:
    """An upper that another program has left: its locator."""

    program: str
    upper: str


def find_left(request: Request, ours: str) -> Left | None:
    """What the program whose word names the store has left there; None if it is a store of ours.

    ours: the locator of the upper that we would take or make.
    """
    word = request.sources.get("store", "").partition("=")[0]
    layout = next((layout for layout in LAYOUTS if word in layout.words), None)
    if layout is None or request.store is None:
        return None
    own = locator.parse(ours).directory or "/"
    above = request.directory or ("/" if layout.at_top else own)
    # What cannot be looked at cannot be mounted either, and whoever does that says why.
    with contextlib.suppress(UnionfsError, OSError):
        volume = open_volume(request.store, readonly=True, untouched=True)
        try:
            if any(_is_directory(volume, path, AREA_NAME) for path in {own, above}):
                return None
            if all(_is_directory(volume, above, name) for name in (layout.upper, layout.work)):
                return Left(layout.program, f"{request.store}:{os.path.join(above, layout.upper)}")
        finally:
            volume.close()
    return None


def _is_directory(volume: Volume, inside: str, name: str) -> bool:
    """Whether a directory of the store has one of that name."""
    try:
        fd = walk(volume, inside)
    except FileNotFoundError:
        return False
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
    finally:
        os.close(fd)
