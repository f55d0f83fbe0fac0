# SPDX-License-Identifier: GPL-2.0-or-later
"""A union by the engine, and beside it, on the file system of its upper, a plain copy of what it
shows: a call must come to the same on both."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from tests.rig import snapshot
from tests.rig.mounted import Unionfs


class Pair:
    """A union, and beside it, on the file system of its upper, a plain copy of what it shows."""

    def __init__(self, place: Path, upper: Path | None = None) -> None:
        self.place = place
        self.lower, self.plain = place / "lower", place / "plain"
        for name in ("lower", "plain", "upper", "mnt"):
            (place / name).mkdir()
        self.union = Unionfs(
            [self.lower],
            upper or place / "upper",
            place / "mnt",
            options=["driver=engine"],
        )
        self.upper, self.mnt = upper or place / "upper", self.union.mnt

    def fill(self, make: Callable[[Path], object]) -> None:
        """Make something in the lower and in the plain copy."""
        for root in (self.lower, self.plain):
            make(root)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """Mounted inside; the lower must be what it was."""
        before = snapshot.take(self.lower)
        with self.union:
            yield
        snapshot.assert_same(snapshot.take(self.lower), before, "the lower changed")

    def both(self, action: Callable[..., object], *args: object) -> object:
        """The same on both; what both came to."""
        got, want = outcome(action, self.mnt, *args), outcome(action, self.plain, *args)
        assert got == want
        return got

    def requests(self, kind: str) -> int:
        counted = cast("dict[str, dict[str, int]]", self.union.status()["requests"])
        return sum(who.get(kind, 0) for who in counted.values())


def outcome(action: Callable[..., object], root: Path, *args: object) -> object:
    try:
        return action(root, *args)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
