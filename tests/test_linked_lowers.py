# SPDX-License-Identifier: GPL-2.0-or-later
"""Hard links of lowers without a UUID, or with numbers of FUSE: the index knows its own only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.rig.mounted import Overlay, Unionfs, is_mounted, user_mount_possible
from tests.rig.waiting import wait_until
from unionfs.stores.tools import find


@pytest.fixture
def base(place: Path) -> Path:
    why = user_mount_possible()
    if why:
        pytest.skip(why)
    for name in ("one", "two", "both", "upper", "mnt"):
        (place / name).mkdir()
    for folder, name in (("one", "a"), ("two", "b"), ("both", "a"), ("both", "b")):
        first = place / folder / f"{name}1"
        first.write_text(f"{name}\n")
        (place / folder / f"{name}2").hardlink_to(first)
    return place


def image(path: Path, tree: Path, kind: str = "squashfs") -> Path:
    why = images.why_not(kind)
    if why:
        pytest.skip(why)
    if kind == "squashfs":
        return images.squash(path, tree)
    with open(path, "wb") as file:
        file.truncate(16 << 20)
    mkfs = find("mkfs.ext4")
    assert mkfs
    ground.run(mkfs, "-q", "-F", "-b", "4096", "-d", tree, path)
    return path


def append(path: Path) -> None:
    with open(path, "a") as file:
        file.write("changed\n")


def contents(mnt: Path, *names: str) -> list[str]:
    """In this order, which is that in which FUSE numbers files."""
    return [(mnt / name).read_text() for name in names]


@pytest.mark.parametrize("kind", ["squashfs", "ext4"])
def test_links_stay_links_in_an_image(base: Path, kind: str) -> None:
    if os.geteuid() and kind == "squashfs" and not find("squashfuse_ll"):
        pytest.skip("there is no squashfuse_ll")
    lower = image(base / "lower.img", base / "both", kind)
    with Unionfs([lower], base / "upper", base / "mnt") as union:
        append(union.mnt / "a2")
        for _ in range(2):
            found = contents(union.mnt, "b1", "b2", "a1", "a2")
            assert found == ["b\n", "b\n", "a\nchanged\n", "a\nchanged\n"]
            status = [(union.mnt / name).stat() for name in ("a1", "a2", "b1")]
            assert status[0].st_ino == status[1].st_ino != status[2].st_ino
            assert [s.st_nlink for s in status] == [2, 2, 2]
            union.remount()
        (union.mnt / "a2").unlink()
        (union.mnt / "b1").unlink()
        union.remount()
        assert contents(union.mnt, "b2", "a1") == ["b\n", "a\nchanged\n"]
        assert (union.mnt / "a1").stat().st_nlink == 1


@pytest.mark.parametrize("kind", ["squashfs", "ext4"])
def test_files_of_two_images_are_two_files(base: Path, kind: str) -> None:
    """squashfs has no UUID, the copy of an ext4 that of its original; the numbers are the same."""
    lowers = [image(base / "one.img", base / "one", kind)]
    if kind == "squashfs":
        lowers.append(image(base / "two.img", base / "two", kind))
        names, text = ("b1", "b2"), "b\n"
    else:
        lowers.append(base / "two.img")
        (base / "one").rename(base / "away")
        (base / "two.img").write_bytes(lowers[0].read_bytes())
        ground.run("debugfs", "-w", "-R", "mkdir d", base / "two.img")
        for name in ("a1", "a2"):
            ground.run("debugfs", "-w", "-R", f"ln {name} d/{name}", base / "two.img")
        names, text = ("d/a1", "d/a2"), "a\n"
    with Unionfs(lowers, base / "upper", base / "mnt") as union:
        append(union.mnt / "a1")
        for _ in range(2):
            assert contents(union.mnt, *names) == [text, text]
            assert contents(union.mnt, "a1", "a2") == ["a\nchanged\n", "a\nchanged\n"]
            union.remount()
        append(union.mnt / names[0])
        union.remount()
        assert contents(union.mnt, *names) == [text + "changed\n"] * 2
        assert contents(union.mnt, "a1", "a2") == ["a\nchanged\n", "a\nchanged\n"]


@contextmanager
def shown(squashfs: Path, point: Path) -> Iterator[Path]:
    """By the program that numbers files as they are looked up."""
    program = find("squashfuse")
    if not program:
        pytest.skip("there is no squashfuse")
    point.mkdir(exist_ok=True)
    process = subprocess.Popen([program, "-f", squashfs, point])
    try:
        wait_until(lambda: is_mounted(point))
        yield point
    finally:
        ground.run(*(["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]), point)
        process.wait()


def test_numbers_that_pass_are_not_remembered(base: Path) -> None:
    """A directory of a FUSE file system without numbers of its own: each name is a file."""
    squashfs = images.squash(base / "lower.img", base / "both")
    with (
        shown(squashfs, base / "lower") as lower,
        Unionfs([lower], base / "upper", base / "mnt") as union,
    ):
        assert (union.mnt / "a1").read_text() == "a\n"
        append(union.mnt / "a1")
        os.chmod(union.mnt / "b2", 0o600)
        (union.mnt / "b1").unlink()
    assert not os.listdir(base / "upper/.unionfs/index")
    with (
        shown(squashfs, base / "lower") as lower,
        Unionfs([lower], base / "upper", base / "mnt") as union,
    ):
        assert contents(union.mnt, "b2", "a2", "a1") == ["b\n", "a\n", "a\nchanged\n"]
        assert (union.mnt / "b2").stat().st_mode & 0o777 == 0o600
        assert sorted(os.listdir(union.mnt)) == ["a1", "a2", "b2"]


def test_a_union_as_the_lower_of_another(base: Path) -> None:
    """Its numbers are those that FUSE asks it by, and are the same at each mount."""
    (base / "middle").mkdir()
    (base / "inner").mkdir()
    inner = Unionfs([base / "both"], base / "middle", base / "inner")
    outer = Unionfs([base / "inner"], base / "upper", base / "mnt")
    with inner, outer:
        append(outer.mnt / "a1")
        for _ in range(2):
            assert contents(outer.mnt, "a1", "a2", "b1") == ["a\nchanged\n", "a\nchanged\n", "b\n"]
            assert (outer.mnt / "a1").stat().st_ino == (outer.mnt / "a2").stat().st_ino
            outer.umount()
            inner.remount()
            outer.mount()


@pytest.mark.parametrize("seen", ["image", "directory"])
def test_an_image_in_the_place_of_another(base: Path, seen: str) -> None:
    """As root's A and B: its files have the numbers of the other's, and are none of them."""
    first = image(base / "one.img", base / "one")
    second = image(base / "two.img", base / "two")
    if seen == "directory" and os.geteuid():
        pytest.skip("needs root")
    lower = base / "lower.img" if seen == "image" else base / "lower"
    if seen == "directory":
        lower.mkdir()

    @contextmanager
    def over(which: Path) -> Iterator[Path]:
        with ExitStack() as stack:
            if seen == "directory":
                ground.run("mount", "-o", "loop,ro", which, lower)
                stack.callback(ground.run, "umount", lower)
            else:
                lower.write_bytes(which.read_bytes())
            words = ["on-mismatch=ignore"]
            yield stack.enter_context(
                Unionfs([lower], base / "upper", base / "mnt", options=words)
            ).mnt

    with over(first) as mnt:
        append(mnt / "a1")
    with over(second) as mnt:
        assert contents(mnt, "b1", "b2", "a1") == ["b\n", "b\n", "a\nchanged\n"]
        assert (mnt / "b1").stat().st_nlink == 2
        append(mnt / "b2")
        assert contents(mnt, "b1", "a1") == ["b\nchanged\n", "a\nchanged\n"]
    with over(first) as mnt:
        assert (mnt / "a2").read_text() == "a\nchanged\n"
        (kept,) = [name for name in os.listdir(mnt) if name.startswith("b")]
        assert (mnt / kept).read_text() == "b\nchanged\n"


def test_an_index_that_kernel_overlayfs_has_made(base: Path) -> None:
    """A squashfs has no UUID there."""
    if os.geteuid():
        pytest.skip("needs root")
    squashfs = image(base / "one.img", base / "one")
    (base / "lower").mkdir()
    (base / "work").mkdir()
    ground.run("mount", "-o", "loop,ro", squashfs, base / "lower")
    try:
        kernel = Overlay([base / "lower"], base / "upper", base / "mnt", work=base / "work")
        kernel.mount()
        append(kernel.mnt / "a1")
        indexed = os.listdir(base / "work/index")
        kernel.umount()
        if not indexed:
            pytest.skip("kernel overlayfs keeps no index over a squashfs")
        with Unionfs([base / "lower"], base / "upper", base / "mnt", work=base / "work") as union:
            assert contents(union.mnt, "a2", "a1") == ["a\nchanged\n", "a\nchanged\n"]
            append(union.mnt / "a2")
            assert (union.mnt / "a1").read_text() == "a\nchanged\nchanged\n"
    finally:
        ground.run("umount", base / "lower")


@pytest.mark.parametrize("by", ["time", "size"])
def test_an_ext4_made_anew_with_the_uuid_of_another(
    base: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mke2fs gives the files of both the same handles, with a generation of 0."""
    why = images.why_not("ext4")
    if why:
        pytest.skip(why)
    mkfs = find("mkfs.ext4")
    assert mkfs
    if by == "size":
        (base / "two/b1").write_text("bbb\n")
    made = {}
    for at, name in enumerate(("one", "two")):
        monkeypatch.setenv("E2FSPROGS_FAKE_TIME", str(1_700_000_000 + at * (by == "time")))
        for file in (base / name).iterdir():
            os.utime(file, (1_600_000_000 + at * (by == "time"),) * 2)
        made[name] = base / f"{name}.img"
        with open(made[name], "wb") as image:
            image.truncate(16 << 20)
        uuid = "11111111-2222-3333-4444-555555555555"
        ground.run(mkfs, "-q", "-F", "-U", uuid, "-d", base / name, made[name])
    lower = base / "lower.img"
    union = Unionfs([lower], base / "upper", base / "mnt")
    text = (base / "two/b1").read_text()

    lower.write_bytes(made["one"].read_bytes())
    with union:
        append(union.mnt / "a1")
    lower.write_bytes(made["two"].read_bytes())
    with union:
        assert contents(union.mnt, "b1", "b2") == [text, text]
        append(union.mnt / "b1")
        union.remount()
        assert contents(union.mnt, "b1", "b2") == [text + "changed\n"] * 2
        assert (union.mnt / "b1").stat().st_ino == (union.mnt / "b2").stat().st_ino
    lower.write_bytes(made["one"].read_bytes())
    with union:
        assert contents(union.mnt, "a1", "a2") == ["a\nchanged\n", "a\nchanged\n"]


def test_a_number_that_a_lower_gives_again(base: Path) -> None:
    """A kernel overlay has no file handles: what it makes later may have the number of before."""
    if os.geteuid():
        pytest.skip("needs root")
    with open(base / "disk.img", "wb") as image:
        image.truncate(16 << 20)
    mkfs = find("mkfs.ext4")
    assert mkfs
    ground.run(mkfs, "-q", "-F", base / "disk.img")
    for name in ("disk", "lower"):
        (base / name).mkdir()
    ground.run("mount", "-o", "loop", base / "disk.img", base / "disk")
    try:
        for name in ("upper", "work"):
            (base / "disk" / name).mkdir()
        kernel = Overlay(
            [base / "one"], base / "disk/upper", base / "lower", work=base / "disk/work"
        )
        with kernel:
            lower = kernel.mnt
            (lower / "c1").write_text("c\n")
            (lower / "c2").hardlink_to(lower / "c1")
            number = (lower / "c1").stat().st_ino
            with Unionfs([lower], base / "upper", base / "mnt") as union:
                append(union.mnt / "c1")
            for name in ("c1", "c2"):
                (lower / name).unlink()
            (lower / "d1").write_text("d\n")
            (lower / "d2").hardlink_to(lower / "d1")
            if (lower / "d1").stat().st_ino != number:
                pytest.skip("it has another number")
            with Unionfs([lower], base / "upper", base / "mnt") as union:
                assert contents(union.mnt, "d1", "d2") == ["d\n", "d\n"]
                append(union.mnt / "d2")
                union.remount()
                assert contents(union.mnt, "d1", "d2") == ["d\nchanged\n"] * 2
    finally:
        ground.run("umount", base / "disk")


@pytest.mark.parametrize("target", ["nowhere", "there"])
def test_a_symbolic_link_with_two_names_is_itself(base: Path, target: str) -> None:
    """Not what it leads to, which may be anywhere."""
    if target == "there":
        (base / "there").write_text("outside\n")
        target = str(base / "there")
    os.symlink(target, base / "one/s1")
    os.link(base / "one/s1", base / "one/s2", follow_symlinks=False)
    with Unionfs([base / "one"], base / "upper", base / "mnt") as union:
        os.utime(union.mnt / "s1", ns=(5, 5), follow_symlinks=False)
        os.rename(union.mnt / "s2", union.mnt / "s3")
        for _ in range(2):
            assert [os.readlink(union.mnt / name) for name in ("s1", "s3")] == [target] * 2
            status = [(union.mnt / name).lstat() for name in ("s1", "s3")]
            assert [s.st_mtime_ns for s in status] == [5, 5]
            assert status[0].st_ino == status[1].st_ino
            if os.geteuid() == 0:  # a user's symbolic link carries no attribute with its count
                assert [s.st_nlink for s in status] == [2, 2]
            union.remount()
        os.unlink(union.mnt / "s1")
        assert os.readlink(union.mnt / "s3") == target
        assert not os.path.lexists(union.mnt / "s1")


@pytest.mark.parametrize("ro", [False, True])
def test_a_former_upper_as_a_lower(base: Path, ro: bool) -> None:
    """Its index is not read: the name that it has of a changed file is a file of its own."""
    (base / "one/c1").write_bytes(bytes(100_000))
    (base / "one/c2").hardlink_to(base / "one/c1")
    with Unionfs([base / "one"], base / "upper", base / "mnt") as union:
        append(union.mnt / "a1")
        os.chmod(union.mnt / "c1", 0o600)  # a metadata-only copy
    (base / "new").mkdir()
    changed = {"a": (base / "upper/a1").exists(), "c": (base / "upper/c1").exists()}
    first = [f"{name}{1 if has else 2}" for name, has in changed.items()]
    other = [f"{name}{2 if has else 1}" for name, has in changed.items()]
    lowers = [base / "upper", base / "one"]
    with Unionfs(lowers, None if ro else base / "new", base / "mnt") as union:
        for _ in range(2):
            for name in ("a1", "a2", "c1", "c2"):
                assert (union.mnt / name).stat().st_nlink == 2
            assert sorted(os.listdir(union.mnt)) == ["a1", "a2", "c1", "c2"]
            assert (union.mnt / first[0]).read_text() == "a\nchanged\n"
            assert (union.mnt / other[0]).read_text() == "a\n"
            assert (union.mnt / first[1]).read_bytes() == bytes(100_000)
            assert (union.mnt / first[1]).stat().st_mode & 0o777 == 0o600
            union.remount()
        if not ro:
            append(union.mnt / first[0])
            (union.mnt / first[1]).unlink()
            union.remount()
            assert (union.mnt / first[0]).read_text() == "a\nchanged\nchanged\n"
            assert sorted(os.listdir(union.mnt)) == sorted(["a1", "a2", other[1]])


def test_a_copy_of_a_former_uppers_copy_without_data(base: Path) -> None:
    """Found by the index, it has its own data, not those that are below the lower's."""
    (base / "one/big").write_bytes(bytes(100_000))
    with Unionfs([base / "one"], base / "upper", base / "mnt") as union:
        os.chmod(union.mnt / "big", 0o600)
        os.link(union.mnt / "big", union.mnt / "other")
    (base / "new").mkdir()
    with Unionfs([base / "upper", base / "one"], base / "new", base / "mnt") as union:
        append(union.mnt / "big")
        for names in (["big", "other"], ["other", "big"]):
            union.remount()
            for name in names:
                assert (union.mnt / name).read_bytes() == bytes(100_000) + b"changed\n"
