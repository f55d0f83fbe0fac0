# SPDX-License-Identifier: GPL-2.0-or-later
"""How full the upper is, watched while the union is mounted.

Owns the low-water mark, the decision to grow an image, and when the reserve is filled; a copy-up
asks by itself (cext/room.h).  Does not know how a file system grows (stores/resizing.py).  Called
by daemon.py.
"""

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from unionfs import _native
from unionfs.reserve import Reserve

log = logging.getLogger("unionfs")

_GROW_BEFORE: Final = 256 << 20
_STEP: Final = 64 << 20
LOOK_SECONDS: Final = 5.0
GROW_SECONDS: Final = 0.1


@dataclass(slots=True)
class Mark:
    """A low-water mark: bytes, or a share of the file system."""

    amount: float
    percent: bool

    def bytes_of(self, size: int) -> int:
        """On a file system of this size."""
        return int(size * self.amount / 100) if self.percent else int(self.amount)


@dataclass(slots=True)
class Watch:
    """Looks at one file system from time to time; says once that it is low, or not any more."""

    fd: int
    name: str
    mark: Mark
    largest: int | None = None  # autogrow=MAX, bytes
    image_size: Callable[[], int] = lambda: 0
    enlarge: Callable[[int], None] | None = None
    promised: Callable[[], int] = lambda: 0  # bytes that the file system still shows as free
    reserve: Reserve | None = None
    image: int = -1  # what the file system lies in (Layer)
    low: bool = field(default=False, init=False)
    _free: int = field(default=0, init=False)  # at the last look
    disk: bool = field(default=False, init=False)  # it is low since the image's own disk is
    problem: str = field(default="", init=False)  # why it does not grow any more

    @property
    def seconds(self) -> float:
        """How long to wait until the next look."""
        return GROW_SECONDS if self._may_grow() else LOOK_SECONDS

    def _may_grow(self) -> bool:
        return self.largest is not None and self.enlarge is not None and not self.problem

    def look(self) -> None:
        """Grow what may grow, and warn."""
        try:
            size, free = self._measure()
            # As much again as is written in several looks.
            written, self._free = max(0, self._free - free), free
            while self._may_grow() and free < max(_GROW_BEFORE, size // 4, 4 * written):
                if not self._grow():
                    break
                size, free = self._measure()
                self._free = free
            if self.reserve is not None:
                self.reserve.fill(size, free)
        except OSError as exc:  # a program that mounts it for us has died: said elsewhere
            log.debug("the space of %s is not known: %s", self.name, exc)
            return
        sure = free - _native.room_missing(self.image, free)
        low = sure < self.mark.bytes_of(size)
        self.disk = low and sure < free
        if low and not self.low:
            why = ", as the disk that its image lies on is full" if self.disk else ""
            log.warning("%s has only %d MiB left of %d%s", self.name, sure >> 20, size >> 20, why)
        elif self.low and not low:
            log.info("%s has %d MiB again", self.name, sure >> 20)
        self.low = low

    def _measure(self) -> tuple[int, int]:
        space = os.fstatvfs(self.fd)
        free = space.f_bavail * space.f_frsize
        return space.f_blocks * space.f_frsize, max(0, free - self.promised())

    def _grow(self) -> bool:
        """One step; False if there was none."""
        now = self.image_size()
        assert self.largest is not None
        assert self.enlarge is not None
        wanted = min(self.largest, now + max(now // 4, _STEP))
        if wanted <= now:
            return False
        try:
            self.enlarge(wanted)
        except OSError as exc:
            reason = os.strerror(exc.errno or errno.EIO)
            self.problem = f"{self.name} does not grow: {reason}"
            log.warning("%s", self.problem)
            return False
        log.info("%s has grown to %d MiB", self.name, wanted >> 20)
        return True
