# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store` shrink, compact, clone and reset: on real images, and killed in the middle."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.rig.mounted import Unionfs
from tests.test_store_backup import fill, tree_of
from tests.test_store_commands import (
    done,
    facts,
    fails,
    killed_at,
    listing,
    shim,
    store,
)
from tests.test_stores import base, change, check, need, union
from unionfs.removal import remove_path
from unionfs.stores.tools import find

__all__ = ["base", "shim"]

ARCH = os.uname().machine


def hidden(place: Path) -> list[str]:
    return [name for name in listing(place) if name.startswith(".")]


# shrink, compact


@pytest.mark.parametrize("kind", ["ext4", pytest.param("btrfs", marks=pytest.mark.slow)])
def test_shrink(base: Path, kind: str) -> None:
    need(kind)
    large, small = (64, 24) if kind == "ext4" else (400, 300)
    image = images.make(base / "s.img", kind, "keep me", large)
    with union(base, base / "tree", image):
        change(base / "mnt")
        if kind == "ext4":
            assert "in use" in fails("shrink", image, "--size", f"{small}M")
    done("shrink", image, "--size", f"{small}M")
    assert image.stat().st_size == small << 20
    assert store("check", image).returncode == 0
    assert facts("info", image)["label"] == "keep me"
    with union(base, base / "tree", image):
        check(base / "mnt")
    assert "has only" in fails("shrink", image, "--size", "1G", code=1)
    assert hidden(base) == []
    assert images.loops_of(image) == []


def test_shrink_to_less_than_there_is(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img", megabytes=64)
    with union(base, base / "tree", image):
        (base / "mnt/big").write_bytes(os.urandom(20 << 20))
    before = image.read_bytes()
    assert "cannot be resized" in fails("shrink", image, "--size", "16M")
    assert image.read_bytes() == before
    assert hidden(base) == []


def test_shrink_killed(base: Path, shim: Callable[[str], Path]) -> None:
    need("ext4")
    image = images.make(base / "s.img", megabytes=64)
    before = image.read_bytes()
    killed_at(shim("resize2fs"), "shrink", image, "--size", "16M")
    assert image.read_bytes() == before


def test_xfs_does_not_shrink(base: Path) -> None:
    need("xfs")
    image = images.make(base / "s.img", "xfs", megabytes=320)
    assert "clone" in fails("shrink", image, "--size", "300M")


@pytest.mark.parametrize("kind", images.OTHERS_SLOWLY)
def test_compact(base: Path, kind: str) -> None:
    need(kind)
    image = images.make(base / "s.img", kind, megabytes=320 if kind == "xfs" else 128)
    with union(base, base / "tree", image):
        change(base / "mnt")
        (base / "mnt/big").write_bytes(os.urandom(24 << 20))
    before = image.stat().st_blocks * 512
    with union(base, base / "tree", image):
        (base / "mnt/big").unlink()
        os.sync()
        if os.geteuid() == 0:
            done("compact", image)
    done("compact", image)
    assert image.stat().st_blocks * 512 < before - (16 << 20)
    with union(base, base / "tree", image):
        check(base / "mnt")


# clone


def test_clone_from_and_to_everything(base: Path) -> None:
    need("ext4")
    up = base / "up"
    up.mkdir()
    with union(base, base / "tree", up):
        fill(base / "mnt")
        before = tree_of(base / "mnt")
        assert "in use" in fails("clone", up, base / "other")
    for new in ("other.img", "other:/dir"):
        assert "--size" in fails("clone", up, base / new)
    done("clone", up, base / "made")
    with union(base, base / "tree", base / "made"):
        assert tree_of(base / "mnt") == before
    assert "No such file" in fails("clone", up, base / "other/made")
    assert not (base / "other").exists()
    done("clone", up, f"{base}/new.img:/work", "--size", "64M", "--label", "copy")
    assert facts("info", base / "new.img")["label"] == "copy"
    with union(base, base / "tree", f"{base}/new.img:/work"):
        assert tree_of(base / "mnt") == before
    (base / "back").mkdir()
    done("clone", f"{base}/new.img:/work", base / "back")
    with union(base, base / "tree", base / "back"):
        assert tree_of(base / "mnt") == before
    ids = [
        facts("info", place)["uppers"][0]["id"] for place in (up, base / "new.img", base / "back")
    ]
    assert len(set(ids)) == 3
    assert "is not empty" in fails("clone", up, base / "back")
    assert "is not overwritten" in fails("clone", up, f"{base}/new.img:/x", "--size", "64M")
    (base / "fresh").mkdir()
    assert "which base" in fails("clone", base / "fresh", base / "c.img", "--size", "64M", code=1)
    assert not (base / "c.img").exists()
    done("clone", up, base / "c.img", "--size", "64M")
    assert facts("info", base / "c.img")["uppers"][0]["directory"] == f"/persistent_tree/{ARCH}"
    assert hidden(base) == []


@pytest.mark.slow
def test_clone_between_file_systems(base: Path) -> None:
    need("ext4")
    source = images.make(base / "a.img")
    with union(base, base / "tree", source):
        change(base / "mnt")
    kind = "xfs" if os.geteuid() == 0 else "ext4"
    done("clone", source, base / "b.img", "--size", "300M", "--fs", kind)
    said = facts("info", base / "b.img")
    assert said["fstype"] == kind
    assert said["uppers"][0]["directory"] == f"/persistent_tree/{ARCH}"
    with union(base, base / "tree", base / "b.img"):
        check(base / "mnt")
    if os.geteuid() == 0:
        target = images.make(base / "c.img")
        with images.attached(target) as device:
            done("clone", base / "b.img", device)
            with union(base, base / "tree", device):
                check(base / "mnt")


def test_clone_killed(base: Path, shim: Callable[[str], Path]) -> None:
    up = base / "up"
    up.mkdir()
    with union(base, base / "tree", up):
        change(base / "mnt")
    (base / "other").mkdir()
    killed_at(shim("tar"), "clone", up, base / "other")
    assert list((base / "other").iterdir()) == []
    done("clone", up, base / "other")
    bad = shim("tar")
    (bad / "tar").write_text("#!/bin/sh\nexit 1\n")
    found = store("clone", up, base / "made", path=bad)
    assert found.returncode == 32
    assert not (base / "made").exists()
    with union(base, base / "tree", base / "other"):
        check(base / "mnt")
    assert hidden(base) == []


# reset


def test_reset_all(base: Path) -> None:
    up = base / "up"
    up.mkdir()
    up.chmod(0o705)
    with union(base, base / "tree", up):
        change(base / "mnt")
        assert "in use" in fails("reset", up)
        assert "file" in done("reset", up, "--dry-run")
    told = done("reset", up)
    (kept,) = base.glob("up.before-*")
    assert str(kept.name) in told
    assert stat.S_IMODE(up.stat().st_mode) == 0o705
    with union(base, base / "tree", up):
        assert (base / "mnt/file").read_text() == "lower\n"
        assert (base / "mnt/gone").exists()
    with union(base, base / "tree", kept):
        check(base / "mnt")
    assert "file" not in done("reset", up, "--discard")
    assert len(list(base.glob("up.before-*"))) == 1
    assert hidden(base) == []


def test_reset_in_an_image(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    with union(base, base / "tree", image):
        change(base / "mnt")
    done("reset", image)
    with union(base, base / "tree", image):
        assert (base / "mnt/gone").exists()
    (upper,) = facts("info", image)["uppers"]
    assert len(upper["kept"]) == 1


def test_reset_paths(base: Path) -> None:
    up = base / "up"
    up.mkdir()
    with union(base, base / "tree", up):
        change(base / "mnt")
        (base / "mnt/made/below").write_text("x")
    assert done("reset", up, "/gone", "made/below", "-n").count("\n") == 2
    assert "/other is not changed" in fails("reset", up, "/gone", "/other")
    with union(base, base / "tree", up):
        check(base / "mnt")
    for path in ("/", ".", "../x", ".unionfs/work"):
        assert "is no path in the union" in fails("reset", up, path, code=1)
    told = done("reset", up, "/gone", "/file", "made/below")
    with union(base, base / "tree", up):
        assert (base / "mnt/file").read_text() == "lower\n"
        assert (base / "mnt/gone").read_text() == "lower\n"
        assert list((base / "mnt/made").iterdir()) == []
        assert (base / "mnt/moved").exists()
    (kept,) = (up / ".unionfs").glob("reset-*")
    assert kept.name in told
    assert (kept / "1-file").read_text() == "changed\n"


def test_reset_of_one_name_of_several(base: Path) -> None:
    os.link(base / "tree/file", base / "tree/link")
    up = base / "up"
    up.mkdir()
    with union(base, base / "tree", up):
        (base / "mnt/file").write_text("changed\n")
        assert (base / "mnt/link").read_text() == "changed\n"
    assert "other names" in fails("reset", up, "/file")
    with union(base, base / "tree", up):
        assert (base / "mnt/link").read_text() == "changed\n"


def test_reset_of_a_directory_with_a_name_of_several(base: Path) -> None:
    """Both are in it, which the upper does not know: the base's would show what was changed."""
    os.link(base / "tree/file", base / "tree/dir/one")
    os.link(base / "tree/file", base / "tree/dir/two")
    os.unlink(base / "tree/file")
    up = base / "up"
    up.mkdir()
    with union(base, base / "tree", up):
        (base / "mnt/dir/one").write_text("changed\n")
        (base / "mnt/dir/other").write_text("x")
    assert "has other names" in fails("reset", up, "/dir")
    done("reset", up, "/dir/other")
    with union(base, base / "tree", up):
        assert (base / "mnt/dir/two").read_text() == "changed\n"


# What is not a store


def files_in(place: Path) -> None:
    place.mkdir()
    (place / "2024").mkdir()
    (place / "2024/one.jpg").write_text("dear")


def saved(base: Path) -> Path:
    """A backup of changes in base/up."""
    (base / "up").mkdir()
    with union(base, base / "tree", base / "up"):
        change(base / "mnt")
    done("backup", base / "up", base / "x")
    return base / "x"


def test_files_that_were_never_a_store_are_not_destroyed(base: Path) -> None:
    backup = saved(base)
    photos = base / "photos"
    files_in(photos)
    for words in (("restore", backup, photos), ("reset", photos, "--discard")):
        said = fails(*words)
        assert f"{photos} is not a store" in said
        assert "or name an empty directory" in said
        assert (photos / "2024/one.jpg").read_text() == "dear"
    fails("reset", photos, "--discard", "-n")
    assert "--keep keeps" in fails("restore", backup, photos)
    assert "is not a store of unionfs" in fails("reset", photos, "2024")
    assert listing(photos) == ["2024"]
    assert hidden(base) == []
    done("restore", "--keep", backup, photos)
    (kept,) = base.glob("photos.before-*")
    assert (kept / "2024/one.jpg").read_text() == "dear"
    with union(base, base / "tree", photos):
        check(base / "mnt")
    done("restore", backup, photos)  # now it is one
    done("reset", kept)  # and what is not may be put aside
    (again,) = base.glob("photos.before-*.before-*")
    assert (again / "2024/one.jpg").read_text() == "dear"


def test_a_directory_in_an_image_that_was_never_a_store(base: Path) -> None:
    need("ext4")
    backup = saved(base)
    image = images.make(base / "s.img")
    with union(base, base / "tree", f"{image}:/docs"):
        (base / "mnt/sub").mkdir()
        (base / "mnt/sub/letter").write_text("dear")
    docs = f"{image}:/docs/sub"
    assert f"{docs} is not a store" in fails("restore", backup, docs)
    assert "is not a store" in fails("reset", docs, "--discard")
    with union(base, base / "tree", f"{image}:/docs"):
        assert (base / "mnt/sub/letter").read_text() == "dear"


def test_the_base_of_a_mounted_union_is_not_replaced(base: Path) -> None:
    backup = saved(base)
    (base / "over").mkdir()
    with union(base, base / "tree", base / "over"):
        for words in (("restore", backup, base / "tree", "--keep"), ("reset", base / "tree")):
            assert f"is a lower of the union at {base / 'mnt'}" in fails(*words)
        assert (base / "mnt/file").read_text() == "lower\n"
    assert listing(base / "tree") == ["dir", "file", "gone"]


@pytest.mark.parametrize("by", ["us", "overlayfs"])
def test_an_upper_without_an_area_is_a_store(base: Path, by: str) -> None:
    """One of workdir=, or of kernel overlayfs, where its root is marked."""
    backup, up = saved(base), base / "other"
    up.mkdir()
    (base / "work").mkdir()
    with union(base, base / "tree", up, f"workdir={base / 'work'}"):
        (base / "mnt/file").write_text("changed\n")
    assert listing(up) == ["file"]
    if by == "overlayfs":
        if os.geteuid() != 0:
            pytest.skip("root's marks")
        for name in os.listxattr(up):
            os.removexattr(up, name)
        os.setxattr(up, "trusted.overlay.impure", b"y")
    done("restore", backup, up)
    with union(base, base / "tree", up):
        check(base / "mnt")


def test_lost_and_found_is_no_change(base: Path) -> None:
    """Of a file system whose root is the upper; anywhere else it is a directory as any."""
    need("ext4")
    image = images.make(base / "s.img")
    up = f"{image}:/.."  # a Path would lose the slash
    with union(base, base / "tree", up):
        assert "lost+found" in listing(base / "mnt")
    assert done("reset", up, "-n") == ""
    assert "is not changed" in fails("reset", up, "lost+found")
    with union(base, base / "tree", up):
        change(base / "mnt")
    assert "lost+found" not in done("reset", up, "-n")
    done("backup", up, base / "x")
    done("clone", up, base / "copy")
    for new in ("restored", "copy"):
        if new == "restored":
            done("restore", base / "x", base / new)
        with union(base, base / "tree", base / new):
            check(base / "mnt")
    (base / "copy/lost+found").mkdir()
    assert "lost+found" in done("reset", base / "copy", "-n")


# What is mounted in an upper, and what cannot be removed


def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("root mounts, and makes files immutable")


def test_what_is_mounted_in_an_upper_is_not_removed(base: Path) -> None:
    as_root()
    backup, up, outer = saved(base), base / "up", base / "outer"
    files_in(outer)
    (up / "mp").mkdir()
    done("reset", up)
    (kept,) = base.glob("up.before-*")
    done("restore", backup, up)
    for place in (up, kept):
        (place / "mp").mkdir(exist_ok=True)
        ground.run("mount", "--bind", outer, place / "mp")
    try:
        told = f"{up / 'mp'} is a mount point in {up}"
        for words in (["--discard"], [], ["--discard", "-n"], ["mp", "--discard"], ["mp"]):
            assert told in fails("reset", up, *words)
        assert told in fails("restore", backup, up)
        assert told in fails("restore", backup, up, "--keep")
        assert "is a mount point in" in fails("reset", up, "--forget")
    finally:
        for place in (up, kept):
            ground.run("umount", place / "mp")
    assert (outer / "2024/one.jpg").read_text() == "dear"
    assert (kept / "mp").is_dir()
    assert hidden(base) == []


def test_a_removal_stays_on_its_mount(base: Path) -> None:
    """Even if nobody looked: of a bind the device is the same."""
    as_root()
    outer = base / "outer"
    files_in(outer)
    (base / "old/a/mp").mkdir(parents=True)
    ground.run("mount", "--bind", outer, base / "old/a/mp")
    try:
        assert remove_path(base / "old") == ["old/a/mp"]
    finally:
        ground.run("umount", base / "old/a/mp")
    assert (outer / "2024/one.jpg").read_text() == "dear"
    assert remove_path(base / "old") == []
    assert not (base / "old").exists()


def test_a_removal_of_what_is_locked_linked_and_deep(base: Path) -> None:
    files_in(base / "outer")
    old = base / "old"
    (old / "locked/below").mkdir(parents=True)
    (old / "link").symlink_to(base / "outer")
    (old / "locked").chmod(0)
    fd = os.open(old, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert remove_path(old) == []
    assert not old.exists()
    assert (base / "outer/2024/one.jpg").exists()


def test_what_cannot_be_removed_is_told(base: Path) -> None:
    as_root()
    backup, up = saved(base), base / "up"
    for words in (("reset", up, "--discard"), ("restore", backup, up)):
        done("restore", "--keep", backup, up)
        inode = (up / "file").stat().st_ino
        ground.run("chattr", "+i", up / "file")
        told = fails(*words)
        (left,) = (p for p in base.glob(".up.*/file") if p.stat().st_ino == inode)
        ground.run("chattr", "-i", left)
        assert "not all that was there can be removed" in told
        assert str(left) in told or left.name in told
        assert left.parent.name in told
    done("reset", up)  # removes what was left
    assert hidden(base) == []


EMPTY = [
    *(("info", "{}"), ("list", "{}"), ("reset", "{}", "--discard"), ("reset", "{}", "file")),
    *(("reset", "{}", "--forget"), ("restore", "x", "{}"), ("restore", "--keep", "x", "{}")),
    *(("backup", "{}", "y"), ("clone", "{}", "new"), ("clone", "up", "{}"), ("check", "{}")),
    *(("encrypt", "{}", "--discard"), ("grow", "{}"), ("shrink", "{}"), ("compact", "{}")),
    ("clone", "up", "{}", "--size", "64M"),
]


@pytest.mark.parametrize("words", EMPTY, ids=" ".join)
def test_an_empty_name_is_not_the_current_directory(
    base: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "encrypt" and not find("gocryptfs"):
        pytest.skip("no gocryptfs")
    saved(base)
    monkeypatch.chdir(base)
    before = listing(base)
    size = ["--size", "64M"] if words[0] in ("grow", "shrink") else []
    code = 16 if words[0] == "check" else 1  # that of fsck(8)
    for empty in ("", ":/", "LABEL=", 'LABEL="":/x'):
        said = fails(*(word.replace("{}", empty) for word in words), *size, code=code)
        assert "name" in said
    assert listing(base) == before


# What somebody uses


def test_what_has_a_used_layer_in_it_is_not_replaced(base: Path) -> None:
    """The upper, the work directory or a lower of a mounted union, or what lies in one."""
    backup, parent = saved(base), base / "parent"
    for name in ("upper", "work", "inner"):
        (parent / name).mkdir(parents=True)
    (parent / ".unionfs").mkdir()
    (parent / ".unionfs/work").mkdir()
    (parent / "upper/dir/deep").mkdir(parents=True)
    with union(base, base / "tree", parent / "upper", f"workdir={parent / 'work'}"):
        for place in (parent, parent / "work", parent / "upper/dir", parent / "upper/dir/new"):
            for words in (("restore", "--keep", backup, place), ("reset", place)):
                if place.exists() or words[0] == "restore":
                    said = fails(*words)
                    locked = place.name == "work" and "in use by a union" in said
                    assert locked or f"of the union at {base / 'mnt'}" in said, said
        (base / "mnt/file").write_text("changed\n")
    lowers = Unionfs([parent / "inner", base / "tree"], None, base / "mnt")
    lowers.upper = base / "up"
    with lowers:
        assert "in it, a lower of the union at" in fails("reset", parent)
        (parent / "upper/dir/.unionfs/work").mkdir(parents=True)
        done("reset", parent / "upper/dir")  # a lower may be anywhere above
    done("reset", parent)


def test_a_used_upper_in_the_same_image_is_not_replaced(base: Path) -> None:
    need("ext4")
    backup, image = saved(base), images.make(base / "s.img")
    with union(base, base / "tree", f"{image}:/p/up"):
        change(base / "mnt")
        said = fails("restore", "--keep", backup, f"{image}:/p")
        assert "in use" in said or "the upper of the union at" in said, said
        check(base / "mnt")
    with union(base, base / "tree", f"{image}:/p/up"):
        check(base / "mnt")


def test_an_image_in_use_is_not_replaced_with_its_directory(base: Path) -> None:
    need("ext4")
    (base / "p/.unionfs/work").mkdir(parents=True)
    image = images.make(base / "p/s.img")
    with union(base, base / "tree", image):
        assert f"has {image} in it, the upper of the union at" in fails("reset", base / "p")


def test_what_a_kernel_overlay_uses_is_not_replaced(base: Path) -> None:
    as_root()
    backup, place = saved(base), base / "place"
    for name in ("upper", "work", "lower"):
        (place / name).mkdir(parents=True)
    (place / "upper/dir").mkdir()
    options = f"lowerdir={base / 'tree'}:{place / 'lower'},upperdir={place / 'upper'}"
    point = base / "mnt"
    ground.run("mount", "-t", "overlay", "o", "-o", f"{options},workdir={place / 'work'}", point)
    try:
        for used in (base / "tree", place, *(place / n for n in ("upper", "work", "lower"))):
            said = fails("restore", "--keep", backup, used)
            assert f"of kernel overlayfs at {point}" in said, said
        assert "lies in" in fails("reset", place / "upper/dir")
    finally:
        ground.run("umount", point)
    done("reset", place)


# All of the paths or none


def contents(up: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in up.rglob("*") if path.is_file()}


def test_paths_that_are_named_twice_or_below_others(base: Path) -> None:
    saved(base)
    up = base / "up"
    for words in (("made", "made"), ("file", "/file", "--discard")):
        done("reset", up, *words)
    assert not (up / "file").exists()
    (up / "made/below").mkdir(parents=True)
    done("reset", up, "made/below", "made", "made/below")
    assert not (up / "made").exists()


def test_paths_of_which_one_cannot_be_moved(base: Path) -> None:
    as_root()
    saved(base)
    up = base / "up"
    (up / "new").write_text("new")
    before = contents(up)
    ground.run("chattr", "+i", up / "file")
    try:
        for words in ((), ("--discard",)):
            said = fails("reset", up, "new", "file", *words)
            assert "cannot take file out of" in said
            assert "nothing was taken away" in said
    finally:
        ground.run("chattr", "-i", up / "file")
    assert contents(up) == before


@pytest.mark.parametrize("name", ["tmpfs:", "tmpfs:size=1G", "s.img:nope"])
def test_no_directory_is_made_of_what_was_misread(
    base: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = saved(base)
    (base / "s.img").write_bytes(b"")
    monkeypatch.chdir(base)
    before = listing(base)
    for words in (("clone", "up"), ("restore", backup)):
        fails(*words, name, code=1)
    assert listing(base) == before


def test_clone_within_one_image(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    with union(base, base / "tree", f"{image}:/two"):
        change(base / "mnt")
    said = fails("clone", f"{image}:/two", f"{image}:/three")
    assert f"{image}:/two and {image}:/three are in one file system" in said


def test_a_full_place_is_named(base: Path) -> None:
    as_root()
    saved(base)
    (base / "up/large").write_bytes(os.urandom(4 << 20))
    (base / "small").mkdir()
    ground.run("mount", "-t", "tmpfs", "-o", "size=1M", "t", base / "small")
    try:
        said = fails("clone", base / "up", base / "small/new")
        assert str(base / "small/new") in said
        said = fails("backup", base / "up", base / "small/file")
        assert str(base / "up") in said
        assert "No space left" in said
    finally:
        ground.run("umount", base / "small")


def test_an_upper_with_its_index_elsewhere(base: Path) -> None:
    os.link(base / "tree/file", base / "tree/link")
    up, work = base / "up", f"workdir={base / 'work'}"
    up.mkdir()
    (base / "work").mkdir()
    with union(base, base / "tree", up, work):
        (base / "mnt/gone").write_text("changed\n")
    done("backup", up, base / "x")  # there is nothing in the index
    with union(base, base / "tree", up, work):
        (base / "mnt/file").write_text("changed\n")
    for words in (["reset", up], ["reset", up, "--discard"]):
        assert "has its hard link index in another directory (file)" in fails(*words)
    assert "hard link index" in fails("backup", up, base / "y")
    assert "hard link index" in fails("clone", up, base / "new")
    assert not (base / "y").exists()
    assert (up / "file").read_text() == "changed\n"
