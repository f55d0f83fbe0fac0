# SPDX-License-Identifier: GPL-2.0-or-later
"""Whiteouts that are devices are names of one inode."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.rig.ground import Ground
from tests.rig.mounted import Unionfs
from tests.test_full import Small, code_of

MANY = 70000


@pytest.fixture
def union(place: Path) -> Iterator[Unionfs]:
    for name in ("lower/dir", "upper", "mnt"):
        (place / name).mkdir(parents=True)
    for number in range(6):
        (place / f"lower/file{number}").write_text("lower")
    union = Unionfs([place / "lower"], place / "upper", place / "mnt")
    with union:
        yield union


def shared(union: Unionfs) -> Path:
    assert union.upper is not None
    return union.upper / ".unionfs/whiteout"


def remove_each_way(union: Unionfs) -> None:
    """What is in the lower alone, what was copied up, an empty directory, what moves away."""
    (union.mnt / "file0").unlink()
    (union.mnt / "file1").chmod(0o600)
    (union.mnt / "file1").unlink()
    (union.mnt / "dir").rmdir()
    (union.mnt / "file2").rename(union.mnt / "moved")


def assert_removed(mnt: Path) -> None:
    assert set(os.listdir(mnt)) - {".unionfs"} == {"file3", "file4", "file5", "moved"}


def is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def test_one_inode(union: Unionfs) -> None:
    assert union.upper is not None
    remove_each_way(union)
    inode = shared(union).lstat().st_ino
    for name in ("file0", "file1", "dir"):
        assert is_whiteout(union.upper / name)
        assert (union.upper / name).lstat().st_ino == inode
    assert is_whiteout(union.upper / "file2")  # made by the rename itself
    union.remount()
    assert_removed(union.mnt)
    (union.mnt / "file3").unlink()
    assert (union.upper / "file3").lstat().st_ino == inode
    (union.mnt / "file0").write_text("new")
    assert shared(union).lstat().st_nlink == 4


@pytest.mark.parametrize("what", ["nothing", "file", "symlink", "device"])
def test_something_else_is_there(union: Unionfs, what: str) -> None:
    if what == "device" and os.geteuid() != 0:
        pytest.skip("needs root, to make one")
    union.umount()
    shared(union).unlink()
    if what == "file":
        shared(union).write_text("no whiteout")
    elif what == "symlink":
        shared(union).symlink_to("../file3")
    elif what == "device":
        os.mknod(shared(union), stat.S_IFCHR, os.makedev(1, 3))
    union.mount()
    remove_each_way(union)
    union.remount()
    assert_removed(union.mnt)


def test_without(union: Unionfs) -> None:
    """Taken away meanwhile, or it never could be made."""
    shared(union).unlink()
    remove_each_way(union)
    union.remount()
    assert_removed(union.mnt)


def test_all_the_names_that_it_may_have(union: Unionfs, place: Path) -> None:
    (place / "names").mkdir()
    before = shared(union).lstat()
    linked = (partial(os.link, shared(union), place / f"names/{number}") for number in range(MANY))
    refused = next(filter(None, map(code_of, linked)), 0)
    if not refused:
        pytest.skip(f"{MANY} names are not too many here")
    assert refused == errno.EMLINK
    remove_each_way(union)
    assert shared(union).lstat().st_ino != before.st_ino
    assert shared(union).lstat().st_nlink == 4
    assert os.listdir(shared(union).parent / "work") == []
    union.remount()
    assert_removed(union.mnt)


@pytest.mark.parametrize("program", ["cp", "tar"])
def test_copied(union: Unionfs, place: Path, program: str) -> None:
    remove_each_way(union)
    union.umount()
    (place / "copy").mkdir()
    if program == "cp":
        subprocess.run(["cp", "-a", f"{place}/upper/.", place / "copy"], check=True)
    else:
        words = ["tar", "--xattrs", "--xattrs-include=*", "-S", "-C"]
        made = subprocess.run(
            [*words, place / "upper", "-c", "."], stdout=subprocess.PIPE, check=True
        )
        subprocess.run([*words, place / "copy", "-x"], input=made.stdout, check=True)
    with Unionfs(union.lowers, place / "copy", union.mnt) as copy:
        assert_removed(copy.mnt)
    union.mount()


@pytest.mark.root
def test_no_inode_is_left() -> None:
    with Ground("unionfs-full-") as base:
        small = Small(base, "ext4")
        with small.union as union:
            (small.mnt / "here").touch()
            small.fill_inodes()
            small.refused((small.mnt / "new").touch)
            (small.mnt / "little").unlink()
            union.remount()
            (small.mnt / "big").unlink()
            union.remount()
            assert set(os.listdir(small.mnt)) == {"here", "d" * 200}
            small.drain_inodes()
