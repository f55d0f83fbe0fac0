# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store grow`, `shrink` and `compact`: what they must not touch, and what a copy keeps."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests.rig import damage, ground, images
from tests.test_store_commands import done, fails, store
from tests.test_stores import base, need
from unionfs.errors import UnionfsError
from unionfs.stores import ext, resized, resizing
from unionfs.stores.tools import find
from unionfs.stores.whole import check_whole

__all__ = ["base"]

MIB = 1 << 20
_NODUMP = 0x40


@pytest.mark.parametrize("kind", images.WRITABLE)
def test_what_is_cut_off_is_not_made_to_look_whole(base: Path, kind: str) -> None:
    need("ext4")  # the others are refused before anybody mounts them
    if find(f"mkfs.{kind}") is None:
        pytest.skip(f"there is no mkfs.{kind}")
    image = images.make(base / "s.img", kind, megabytes=320)
    check_whole(str(image), kind)
    os.truncate(image, 160 * MIB)
    before = images.digest(image)
    told = f"{image} is truncated: {160 * MIB} bytes, and its file system has {320 * MIB}"
    assert told in store("check", image).stdout
    for words in (["grow", "--size", "330M"], ["shrink", "--size", "100M"], ["compact"]):
        assert told in fails(words[0], image, *words[1:])
    assert images.digest(image) == before
    assert image.stat().st_size == 160 * MIB


def test_what_is_cut_off_while_it_is_mounted_does_not_grow_by_itself(tmp_path: Path) -> None:
    if find("mkfs.xfs") is None:
        pytest.skip("there is no mkfs.xfs")
    image = images.make(tmp_path / "s.img", "xfs", megabytes=320)
    os.truncate(image, 160 * MIB)
    with pytest.raises(OSError, match="is truncated"):
        resizing.enlarge(str(image), "/dev/loop-none", -1, "xfs", 400 * MIB)
    assert image.stat().st_size == 160 * MIB


def test_the_smallest_piece(tmp_path: Path) -> None:
    image = tmp_path / "s.img"
    image.write_bytes(bytes(1100))
    for kind in ("ext4", "xfs", "btrfs"):
        with pytest.raises(UnionfsError, match="is truncated"):
            check_whole(str(image), kind)
    check_whole(str(image), "erofs")


@pytest.mark.parametrize(("verb", "size"), [("grow", "48M"), ("shrink", "24M")])
def test_a_copy_is_as_the_image_was(base: Path, verb: str, size: str) -> None:
    need("ext4")
    image = images.make(base / "s.img", megabytes=32)
    os.setxattr(image, "user.note", b"of mine")
    setfacl = find("setfacl")
    if setfacl is not None:
        ground.run(setfacl, "-m", "u:12:r", image)
    names = set(os.listxattr(image))
    fd = os.open(image, os.O_RDONLY)
    flags = struct.unpack("=Q", fcntl.ioctl(fd, 0x80086601, bytes(8)))[0]
    fcntl.ioctl(fd, 0x40086602, struct.pack("=Q", flags | _NODUMP))
    os.close(fd)
    done(verb, image, "--size", size)
    assert set(os.listxattr(image)) == names
    assert os.getxattr(image, "user.note") == b"of mine"
    fd = os.open(image, os.O_RDONLY)
    assert struct.unpack("=Q", fcntl.ioctl(fd, 0x80086601, bytes(8)))[0] & _NODUMP
    os.close(fd)


def test_another_name_of_an_image_is_not_left_behind(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img", megabytes=32)
    os.link(image, base / "other.img")
    assert "has 2 names (hard links)" in fails("grow", image, "--size", "48M")
    assert "has 2 names (hard links)" in fails("shrink", image, "--size", "24M")
    assert os.path.samefile(image, base / "other.img")
    (base / "other.img").unlink()
    done("grow", image, "--size", "48M")


@pytest.mark.parametrize(("verb", "size"), [("grow", 48), ("shrink", 24)])
def test_space_that_was_taken_stays_so(base: Path, verb: str, size: int) -> None:
    need("ext4")
    image = base / "s.img"
    done("create", image, "--size", "32M", "--full")
    done(verb, image, "--size", f"{size}M")
    assert image.stat().st_size == size * MIB
    assert resized.is_full(image.stat())
    sparse = base / "sparse.img"
    done("create", sparse, "--size", "32M")
    done(verb, sparse, "--size", f"{size}M")
    assert not resized.is_full(sparse.stat())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts xfs")
def test_space_that_was_taken_stays_so_where_the_kernel_grows(base: Path) -> None:
    image = base / "s.img"
    done("create", image, "--size", "300M", "--full", "--fs", "xfs")
    done("grow", image, "--size", "316M")
    assert image.stat().st_size == 316 * MIB
    assert resized.is_full(image.stat())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts xfs")
def test_an_image_that_cannot_be_grown_is_as_long_as_before(base: Path) -> None:
    image = images.make(base / "s.img", "xfs")
    damage.write(image, 216, b"\xff" * 4)  # features that nobody knows
    length = image.stat().st_size
    assert str(image) in fails("grow", image, "--size", "+64M")
    assert image.stat().st_size == length


@pytest.mark.parametrize(
    ("out", "err", "said"),
    [
        (b"i: Root inode is not a directory.\n", b"i: UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY."
         b"\n\t(i.e., without -a or -p options)\n", "Root inode is not a directory."),
        (b"i: \nThe superblock could not be read or does not describe a valid ext2/ext3/ext4\n"
         b"    e2fsck -b 32768 <device>\n or\n\n", b"e2fsck: Bad magic number\n",
         "e2fsck: Bad magic number"),
        (b"", b"i: UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY.\n", "e2fsck ended with 4"),
    ],
)  # fmt: skip
def test_which_line_of_e2fsck_says_it(out: bytes, err: bytes, said: str) -> None:
    assert ext.complaint(subprocess.CompletedProcess(["e2fsck", "-p", "i"], 4, out, err)) == said


def test_another_super_block_is_told_of(base: Path) -> None:
    need("ext4")
    e2fsck = find("e2fsck")
    assert e2fsck is not None
    image = images.make(base / "s.img", megabytes=160)
    damage.write(image, 1024, bytes(1024))
    told = fails("check", image, code=8)
    assert f"e2fsck -b 32768 -B 4096 {image}" in told
    subprocess.run([e2fsck, "-y", "-b", "32768", "-B", "4096", image], check=False)
    assert store("check", image).returncode == 0
    small = images.make(base / "small.img", megabytes=16)
    damage.write(small, 1024, bytes(1024))
    assert "restore a backup" in fails("check", small, code=8)


def test_what_is_wrong_with_a_damaged_one(base: Path) -> None:
    need("ext4")
    debugfs = find("debugfs")
    if debugfs is None:
        pytest.skip("there is no debugfs")
    image = images.make(base / "s.img", megabytes=32)
    ground.run(debugfs, "-w", "-R", "clri <2>", image)
    told = fails("grow", image, "--size", "48M")
    assert f"{image} cannot be resized: Root inode is not a directory" in told
    assert f"check it: unionfs store check --repair {image}" in told
