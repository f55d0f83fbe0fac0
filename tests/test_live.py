# SPDX-License-Identifier: GPL-2.0-or-later
"""lower=live and timeout=: somebody changes the lower underneath, and it is seen.

With timeout=0 the kernel asks at each use, so nothing here waits.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.mounted import Unionfs


@pytest.fixture
def union(place: Path) -> Iterator[Unionfs]:
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    low = place / "lower"
    (low / "d" / "sub").mkdir(parents=True)
    for name in ("f", "g", "d/x", "d/sub/y"):
        (low / name).write_text(f"old {name}")
    (low / "link").symlink_to("old")
    union = Unionfs([low], place / "upper", place / "mnt", options=["lower=live", "timeout=0"])
    with union:
        yield union


def names(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if name != ".unionfs")


def test_new_and_removed_names(union: Unionfs) -> None:
    low, mnt = union.lowers[0], union.mnt
    assert not (mnt / "new").exists()
    (low / "new").write_text("new")
    assert (mnt / "new").read_text() == "new"
    assert "new" in names(mnt)
    (low / "new").unlink()
    assert not (mnt / "new").exists()
    assert "new" not in names(mnt)
    (low / "d" / "sub" / "y").unlink()
    (low / "d" / "sub").rmdir()
    assert names(mnt / "d") == ["x"]
    (low / "d" / "sub").write_text("a file now")
    assert (mnt / "d" / "sub").read_text() == "a file now"


def test_content(union: Unionfs) -> None:
    low, mnt = union.lowers[0], union.mnt
    assert (mnt / "f").read_text() == "old f"
    (low / "f").write_text("longer than it was")  # the same inode
    assert (mnt / "f").read_text() == "longer than it was"
    (low / "f.new").write_text("replaced")
    os.rename(low / "f.new", low / "f")  # another inode
    assert (mnt / "f").read_text() == "replaced"
    (low / "f").chmod(0o600)
    assert (mnt / "f").stat().st_mode & 0o777 == 0o600
    with open(mnt / "f", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == b"replaced"


def test_symlinks_and_types(union: Unionfs) -> None:
    """A file system gives a freed inode number to the next file: nothing of the old one stays."""
    low, mnt = union.lowers[0], union.mnt
    assert os.readlink(mnt / "link") == "old"
    (low / "link").unlink()
    (low / "link").symlink_to("new")
    assert os.readlink(mnt / "link") == "new"
    (low / "link").unlink()
    (low / "link").write_text("a file")
    assert (mnt / "link").read_text() == "a file"
    (low / "link").unlink()
    (low / "link").mkdir()
    (low / "link" / "inner").touch()
    assert names(mnt / "link") == ["inner"]


def test_directories_moved_and_replaced(union: Unionfs) -> None:
    low, mnt = union.lowers[0], union.mnt
    assert (mnt / "d" / "sub" / "y").read_text() == "old d/sub/y"
    os.rename(low / "d", low / "moved")
    assert not (mnt / "d").exists()
    assert (mnt / "moved" / "sub" / "y").read_text() == "old d/sub/y"
    (low / "d").mkdir()
    (low / "d" / "other").write_text("other")
    assert names(mnt / "d") == ["other"]
    assert (mnt / "d" / "other").read_text() == "other"


def test_what_was_copied_up_stays(union: Unionfs) -> None:
    low, mnt = union.lowers[0], union.mnt
    (mnt / "f").write_text("mine")
    (mnt / "g").unlink()
    (mnt / "d" / "mine").write_text("mine")
    (low / "f").write_text("changed")
    (low / "g").write_text("changed")
    (low / "d" / "x").write_text("changed")
    (low / "d" / "new").write_text("new")
    assert (mnt / "f").read_text() == "mine"
    assert not (mnt / "g").exists()
    assert (mnt / "d" / "x").read_text() == "changed"
    assert names(mnt / "d") == ["mine", "new", "sub", "x"]


def test_open_descriptors(union: Unionfs) -> None:
    """What is open stays what it is, as in any file system when a name is replaced."""
    low, mnt = union.lowers[0], union.mnt
    with open(mnt / "f") as file:
        (low / "f.new").write_text("replaced")
        os.rename(low / "f.new", low / "f")
        assert file.read() == "old f"
        assert (mnt / "f").read_text() == "replaced"


def test_changes_of_what_has_changed(union: Unionfs) -> None:
    low, mnt = union.lowers[0], union.mnt
    assert (mnt / "f").exists()
    (low / "f").unlink()
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        (mnt / "f").unlink()
    (low / "g.new").write_text("replaced g")
    assert (mnt / "g").read_text() == "old g"
    os.rename(low / "g.new", low / "g")
    with open(mnt / "g", "a") as file:
        file.write(" and mine")
    assert (mnt / "g").read_text() == "replaced g and mine"
    (low / "d" / "x").unlink()
    os.rename(mnt / "d", mnt / "e")
    assert names(mnt / "e") == ["sub"]
    union.remount()
    assert names(mnt) == ["e", "g", "g.new", "link"] or names(mnt) == ["e", "g", "link"]
    assert (mnt / "g").read_text() == "replaced g and mine"


def test_a_time_of_its_own(place: Path) -> None:
    """timeout= alone bounds what is remembered of names; without it that is for ever."""
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    low, mnt = place / "lower", place / "mnt"
    with Unionfs([low], place / "upper", mnt, options=["timeout=0"]):
        assert not (mnt / "new").exists()
        (low / "new").write_text("1")
        assert (mnt / "new").read_text() == "1"
        (low / "new").write_text("22")
        assert (mnt / "new").read_text() == "22"
    (low / "new").unlink()
    with Unionfs([low], place / "upper", mnt):
        assert not (mnt / "new").exists()
        (low / "new").write_text("1")
        assert not (mnt / "new").exists()
