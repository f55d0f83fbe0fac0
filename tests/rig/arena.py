# SPDX-License-Identifier: GPL-2.0-or-later
"""One test's lowers, upper and mount, on a backend the test does not need to know.

A test fills `arena.lower`, then enters `with arena.mounted() as mnt:` and does what a program would
do. The `arena` fixture (tests/conftest.py) runs it on a plain directory first, which proves the
test, on kernel overlayfs where that keeps the promise too, and on unionfs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.rig import mounted, snapshot
from tests.rig.mounted import Backend, Mounted


class Arena:
    def __init__(self, place: Path, backend: Backend) -> None:
        self.place = place
        self.backend = backend
        self.lower = place / "lower"
        self.lower.mkdir()
        self.lowers = [self.lower]
        self.options: list[str] = []
        self.workdir = False
        self.union: Mounted | None = None

    @property
    def plain(self) -> bool:
        return self.backend == "plain"

    @property
    def upper(self) -> Path:
        """Where changes went; a test asks only when `plain` is false."""
        return self.place / "upper"

    @property
    def work(self) -> Path:
        return self.place / "work"

    def add_lower(self, name: str) -> Path:
        """One more lower, on top of those there are."""
        path = self.place / name
        path.mkdir()
        self.lowers.insert(0, path)
        return path

    def make(self) -> Mounted:
        self.union = mounted.make(
            self.backend, self.lowers, self.place, options=self.options, workdir=self.workdir
        )
        return self.union

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Path]:
        """Mount, run the body, unmount; the lowers must be what they were, to the nanosecond."""
        before = [snapshot.take(lower) for lower in self.lowers]
        union = self.union or self.make()
        with union:
            yield union.mnt
        for lower, want in zip(self.lowers, before, strict=True):
            snapshot.assert_same(snapshot.take(lower), want, f"lower {lower.name} changed")

    def remount(self) -> None:
        assert self.union is not None
        self.union.remount()


def backends(wanted: Sequence[Backend] = ("plain", "overlay", "unionfs")) -> list[Backend]:
    """The wanted ones that were asked for: UNIONFS_BACKENDS=plain,overlay proves tests alone."""
    asked = os.environ.get("UNIONFS_BACKENDS", "plain,overlay,unionfs").split(",")
    mine = [name for name in wanted if name in asked]
    # Kernel overlayfs cannot be mounted by an ordinary user.
    return [name for name in mine if name != "overlay" or os.geteuid() == 0]
