# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon that may have few descriptors: directories make way for files, and who has all the
files open that there may be keeps nobody from what needs a descriptor for a moment."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rig.limited import Limited
from unionfs import inherited

FEW = 100
DIRECTORIES = 150
NAMES = 600


@pytest.fixture(params=["engine", "pyfuse3"])
def union(request: pytest.FixtureRequest, place: Path) -> Iterator[Limited]:
    union = Limited(place, f"--nofile={FEW}:{FEW}", options=[f"driver={request.param}"])
    for number in range(DIRECTORIES):
        (place / f"lower/d{number}/sub").mkdir(parents=True)
        (place / f"lower/d{number}/file").write_text("x")
    (place / "lower/many").mkdir()
    for number in range(NAMES):
        (place / f"lower/many/name{number}").touch()
    with union:
        yield union


@contextlib.contextmanager
def as_many_as_possible(opened: Callable[[int], int]) -> Iterator[int]:
    """Descriptors of the union, until it says that there are too many."""
    held: list[int] = []
    try:
        refused = 0
        while not refused:
            try:
                held.append(opened(len(held)))
            except OSError as error:
                refused = error.errno or -1
        assert refused == errno.ENFILE
        assert len(held) > FEW // 4
        yield len(held)
    finally:
        for fd in held:
            os.close(fd)


def walk(union: Limited) -> int:
    return sum(len(names) for _, _, names in os.walk(union.mnt))


def test_more_directories_than_descriptors(union: Limited) -> None:
    assert walk(union) == DIRECTORIES + NAMES


def change_something(mnt: Path) -> None:
    assert (mnt / "d149/sub").stat()
    assert sorted(os.listdir(mnt / "d140")) == ["file", "sub"]
    (mnt / "d130/made").mkdir()
    (mnt / "d120/file").unlink()
    (mnt / "d110/file").rename(mnt / "d110/moved")
    (mnt / "d109/sub").chmod(0o700)
    (mnt / "d108/file").chmod(0o600)
    (mnt / "d107/link").symlink_to("file")
    (mnt / "d106/sub").rename(mnt / "d105/there")


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT])
def test_as_many_files_open_as_there_may_be(union: Limited, flags: int) -> None:
    mnt = union.mnt
    name = "new" if flags & os.O_CREAT else "file"

    def opened(number: int) -> int:
        return os.open(mnt / f"d{number}" / name, flags)

    with as_many_as_possible(opened) as count:
        assert not (mnt / f"d{count}/new").exists(), "refused, and made all the same"
        change_something(mnt)
        assert len(os.listdir(mnt / "many")) == NAMES
        (mnt / "d0" / name).unlink()
    assert walk(union) > DIRECTORIES
    with open(mnt / "d100/another", "w") as file:
        file.write("x")


def test_listings_that_stay_open(union: Limited) -> None:
    """Read partly, and on when no more can be opened."""
    (union.mnt / "d0/sub").rmdir()  # merged, and listed as a whole
    listings = [os.scandir(union.mnt / "many") for _ in range(FEW)]
    names = [{next(listing).name} for listing in listings]
    try:
        change_something(union.mnt)
        for seen, listing in zip(names, listings, strict=True):
            seen.update(entry.name for entry in listing)
            assert len(seen) == NAMES
    finally:
        for listing in listings:
            listing.close()


def test_files_without_a_name(union: Limited) -> None:
    def opened(_number: int) -> int:
        return os.open(union.mnt / "d0", os.O_TMPFILE | os.O_RDWR)

    if "engine" not in union.options[0]:
        pytest.skip("pyfuse3 has no O_TMPFILE")
    with as_many_as_possible(opened):
        change_something(union.mnt)


def test_removed_while_they_are_open(union: Limited) -> None:
    mnt = union.mnt
    with as_many_as_possible(lambda number: os.open(mnt / f"d{number}/file", os.O_RDWR)) as count:
        with contextlib.suppress(OSError):
            for number in range(count):
                (mnt / f"d{number}/file").unlink()
        assert os.listdir(mnt / "d140")
        assert (mnt / "d149/sub").stat()
        (mnt / "d109/sub").chmod(0o700)


@pytest.mark.parametrize(("soft", "most"), [(100, 25), (2, 1), (20000, 256), (-1, 256)])
def test_open_directories(monkeypatch: pytest.MonkeyPatch, soft: int, most: int) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _limit: (soft, -1))
    assert inherited.open_directories() == most
