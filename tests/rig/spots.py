# SPDX-License-Identifier: GPL-2.0-or-later
"""Unions for the tests of passthrough: one for many tests, each with a directory of its own that
has files in the lower, and what the union tells of its requests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from tests.rig.mounted import Unionfs

if TYPE_CHECKING:
    from tests.conftest import Stores

BIG = b"the lower's " * 12_000  # what pays to be passed through from a lower


TESTS = 64


def fill(directory: Path) -> None:
    directory.mkdir(parents=True)
    for name in ("big", "other", "third"):
        (directory / name).write_bytes(BIG)
    (directory / "small").write_bytes(b"small")
    os.link(directory / "other", directory / "linked")


def make(place: Path, *options: str, upper: bool = True) -> Unionfs:
    for name in ("upper", "mnt"):
        (place / name).mkdir()
    if not (place / "lower").exists():
        fill(place / "lower")
    words = ["driver=engine", *options]
    return Unionfs(
        [place / "lower"], place / "upper" if upper else None, place / "mnt", options=words
    )


def told(union: Unionfs) -> dict[str, object]:
    return cast("dict[str, object]", union.status()["passthrough"])


def skip_without(union: Unionfs) -> None:
    if not told(union)["active"]:
        pytest.skip(f"no passthrough: {told(union)['reason']}")


@dataclass
class Spot:
    """A directory of its own in a union that the tests share."""

    whole: Unionfs
    name: str

    @property
    def mnt(self) -> Path:
        return self.whole.mnt / self.name

    @property
    def lower(self) -> Path:
        return self.whole.lowers[0] / self.name

    @property
    def upper(self) -> Path:
        return self.whole.mnt.parent / "upper" / self.name

    @property
    def scratch(self) -> Path:
        """Outside of the union."""
        path = self.whole.mnt.parent / "scratch" / self.name
        path.mkdir(parents=True, exist_ok=True)
        return path


@contextlib.contextmanager
def shared(stores: Stores, *options: str) -> Iterator[Iterator[Spot]]:
    place = stores.place()
    for number in range(TESTS):
        fill(place / "lower" / f"t{number}")
    with make(place, *options) as union:
        skip_without(union)
        yield (Spot(union, f"t{number}") for number in range(TESTS))
    stores.base.remove(place)


def asked(union: Unionfs, *kinds: str) -> int:
    counted = cast("dict[str, dict[str, int]]", union.status()["requests"])
    return sum(who.get(kind, 0) for who in counted.values() for kind in kinds)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def bytes_moved(union: Unionfs) -> int:
    """How many READ and WRITE there were."""
    return asked(union, "read", "write")


def descriptors(union: Unionfs) -> int:
    return len(os.listdir(f"/proc/{union.pid}/fd"))


def open_files(union: Unionfs) -> int:
    return cast("dict[str, int]", union.status()["table"])["open_files"]
