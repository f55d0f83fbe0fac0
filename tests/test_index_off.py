# SPDX-License-Identifier: GPL-2.0-or-later
"""Without an index each name of a lower hard link is a file of its own, as in kernel overlayfs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.mounted import Unionfs


@pytest.fixture
def union(place: Path) -> Iterator[Unionfs]:
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    (place / "lower/a").write_text("lower\n")
    (place / "lower/b").hardlink_to(place / "lower/a")
    with Unionfs([place / "lower"], place / "upper", place / "mnt", options=["index=off"]) as union:
        yield union


def test_a_change_is_of_the_name_that_was_used(union: Unionfs) -> None:
    numbers = [os.stat(union.mnt / name).st_ino for name in "ab"]
    with open(union.mnt / "a", "a") as file:
        file.write("one\n")
    for _ in range(2):
        assert (union.mnt / "a").read_text() == "lower\none\n"
        assert (union.mnt / "b").read_text() == "lower\n"
        assert [os.stat(union.mnt / name).st_ino for name in "ab"] == numbers
        union.remount()
    os.chmod(union.mnt / "b", 0o600)
    assert os.stat(union.mnt / "a").st_mode & 0o777 == 0o644
    with open(union.mnt / "b", "a") as file:
        file.write("two\n")
    union.remount()
    assert (union.mnt / "b").read_text() == "lower\ntwo\n"


def test_the_other_name_stays(union: Unionfs) -> None:
    with open(union.mnt / "b") as opened:
        (union.mnt / "a").unlink()
        assert os.fstat(opened.fileno()).st_nlink > 0
        os.rename(union.mnt / "b", union.mnt / "c")
        assert opened.read() == "lower\n"
    union.remount()
    assert sorted(os.listdir(union.mnt)) == ["c"]
    assert (union.mnt / "c").read_text() == "lower\n"
