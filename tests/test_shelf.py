# SPDX-License-Identifier: GPL-2.0-or-later
"""Lower files that were read stay open in the daemon for who reads them next: cext/shelf.h."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.rig.limited import Limited
from tests.rig.mounted import Unionfs
from tests.rig.waiting import wait_until

FILES = 40
FEW = 100


@contextmanager
def union(
    place: Path, options: Sequence[str] = (), limits: Sequence[str] = ()
) -> Iterator[Unionfs]:
    (place / "lower").mkdir()
    for number in range(FILES):
        (place / f"lower/file{number}").write_text(f"{number}\n")
    with Limited(place, *limits, options=options) as made:
        yield made


def read_all(mnt: Path) -> None:
    for number in range(FILES):
        assert (mnt / f"file{number}").read_text() == f"{number}\n"


def kept(made: Unionfs, place: Path) -> list[int]:
    """The lower files that the daemon has open, by their numbers."""
    files = {}
    for number in range(FILES):
        status = (place / f"lower/file{number}").stat()
        files[status.st_dev, status.st_ino] = number
    found = []
    top = f"/proc/{made.pid}/fd"
    for fd in os.listdir(top):
        with suppress(FileNotFoundError):
            status = os.stat(f"{top}/{fd}")
            found += [files[key] for key in [(status.st_dev, status.st_ino)] if key in files]
    return sorted(found)


def test_they_are_opened_once(place: Path) -> None:
    with union(place) as made:
        read_all(made.mnt)
        wait_until(lambda: kept(made, place) == list(range(FILES)))
        read_all(made.mnt)
        wait_until(lambda: kept(made, place) == list(range(FILES)))
        with open(made.mnt / "file1") as one, open(made.mnt / "file1") as other:
            assert one.read() == other.read() == "1\n"
        wait_until(lambda: kept(made, place) == list(range(FILES)))


def test_no_more_than_there_may_be(place: Path) -> None:
    with union(place, limits=[f"--nofile={FEW}:{FEW}"]) as made:
        read_all(made.mnt)
        read_all(made.mnt)
        wait_until(lambda: 0 < len(kept(made, place)) <= FEW // 8)
        held = [os.open(made.mnt / f"file{number}", os.O_RDONLY) for number in range(FILES)]
        for number, fd in enumerate(held):
            assert os.read(fd, 9) == f"{number}\n".encode()
            os.close(fd)


def test_not_of_what_has_changed(place: Path) -> None:
    with union(place) as made:
        read_all(made.mnt)
        (made.mnt / "file1").write_text("changed\n")
        (made.mnt / "file2").chmod(0o600)
        (made.mnt / "file3").unlink()
        (made.mnt / "file4").rename(made.mnt / "moved")
        with open(made.mnt / "file0") as file:  # read before it is copied up, and after
            (made.mnt / "file0").write_text("0, too\n")
            assert file.read() == "0, too\n"
        assert (made.mnt / "file0").read_text() == "0, too\n"
        assert (made.mnt / "file1").read_text() == "changed\n"
        assert (made.mnt / "file2").read_text() == "2\n"
        assert not (made.mnt / "file3").exists()
        assert (made.mnt / "moved").read_text() == "4\n"
        wait_until(lambda: not {0, 1} & set(kept(made, place)))


def test_none_of_a_lower_that_changes(place: Path) -> None:
    with union(place, options=["lower=live"]) as made:
        read_all(made.mnt)
        wait_until(lambda: kept(made, place) == [])
        (place / "lower/file1").write_text("changed below\n")


@pytest.mark.parametrize("flags", [os.O_NOATIME, os.O_SYNC])
def test_none_that_is_open_in_another_way(place: Path, flags: int) -> None:
    with union(place) as made:
        os.close(os.open(made.mnt / "file1", os.O_RDONLY | flags))
        wait_until(lambda: kept(made, place) == [])  # nobody waits for a RELEASE
