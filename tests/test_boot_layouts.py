# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs boot` by another program's words, with the store that it wrote by kernel overlayfs."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.test_boot import boot, change, end, image, is_changed, root, status
from tests.test_stores import need

__all__ = ["image", "root"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a system is booted by root")

OURS = f"persistent_root/{os.uname().machine}"
# The words, the directory that is above the upper, the upper and the work directory.
LEFT = [
    ("cow_device={0}", OURS, "upperdir", "workdir"),
    ("cow_label={1} cow_directory=sessions/1", "sessions/1", "upperdir", "workdir"),
    ("persistent", "", "upper", "work"),
    ("persistent persistent-path=/here", "here", "upper", "work"),
    ("overlayroot=device:dev={0}", "", "overlay", "overlay-workdir/_"),
    ("overlayroot={0}", "", "overlay", "overlay-workdir/_"),
    ("overlayroot=device:dev={0},dir=/a", "a", "overlay", "overlay-workdir/_"),
]


@contextmanager
def named(image: Path, name: str) -> Iterator[str]:
    """A device with the image, which has a label that others must not have meanwhile."""
    with open(f"{tempfile.gettempdir()}/unionfs-test-{name}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ground.run("e2label", image, name)
        with images.attached(image) as device:
            yield device


@contextmanager
def seen(image: Path, place: Path) -> Iterator[Path]:
    """The content of a store."""
    point = place / "inside"
    point.mkdir(exist_ok=True)
    ground.run("mount", "-o", "loop", image, point)
    try:
        yield point
    finally:
        ground.run("umount", point)


def overlay(root: Path, store: Path, above: str, upper: str, work: str) -> None:
    """Have kernel overlayfs change the root, as that program would have it."""
    for name in (upper, work):
        (store / above / name).mkdir(parents=True, exist_ok=True)
    words = f"upperdir={store}/{above}/{upper},workdir={store}/{above}/{work}"
    ground.run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={root},{words}", root)


@pytest.mark.parametrize(("words", "above", "upper", "work"), LEFT)
def test_store_of_another_program(
    root: Path, image: Path, place: Path, words: str, above: str, upper: str, work: str
) -> None:
    """Its changes are seen, ours are added to them, and it sees these in turn."""
    with seen(image, place) as store:
        overlay(root, store, above, upper, work)
        change(root)
        ground.run("umount", root)
        listed = sorted(os.listdir(store))
    with named(image, "writable") as device:
        line = words.format(device, "writable")
        for turn in range(2):
            told = boot(root, line)
            assert "has left are used: " in told
            assert is_changed(root)
            assert sorted(os.listdir(root)) == ["etc"] + ["more"] * turn
            (root / "more").write_text("more\n")
            store_facts = status(root)["store"]
            assert isinstance(store_facts, dict)
            assert store_facts["directory"] == f"/{above}/{upper}".replace("//", "/")
            end(root)
    with seen(image, place) as store:
        assert sorted(os.listdir(store)) == listed, "nothing of ours is made beside it"
        overlay(root, store, above, upper, work)
        assert is_changed(root)
        assert (root / "more").read_text() == "more\n"
        ground.run("umount", root)


def test_store_that_is_ours_stays_so(root: Path, image: Path, place: Path) -> None:
    """Whatever lies beside its changes; and a new one is made as ever."""
    with images.attached(image) as device:
        for changed in (False, True):
            told = boot(root, f"cow_device={device}")
            assert "has left" not in told
            assert is_changed(root) == changed
            if not changed:
                change(root)
                for name in ("upperdir", "workdir"):
                    (root / name).mkdir()
            end(root)
    with seen(image, place) as store:
        for name in ("overlay", "overlay-workdir"):
            (store / name).mkdir()
    with images.attached(image) as device:
        assert "has left" not in boot(root, f"overlayroot={device}")
        assert is_changed(root)


def test_only_by_that_programs_words(root: Path, image: Path, place: Path) -> None:
    """And only if both its directories are there."""
    with seen(image, place) as store:
        for name in ("upperdir/etc", "workdir", "d/upper/etc"):
            (store / name).mkdir(parents=True)
    with images.attached(image) as device:
        for line in (f"unionfs.store={device}:/", f"overlayroot={device}"):
            assert "has left" not in boot(root, line)
            end(root)
    with named(image, "writable"):
        assert "has left" not in boot(root, "persistent persistent-path=d")


@pytest.mark.parametrize("mode", ["cow_persistent=N", "unionfs.mode=ro", "unionfs.reset"])
def test_how_it_is_used(root: Path, image: Path, place: Path, mode: str) -> None:
    with seen(image, place) as store:
        overlay(root, store, "d", "upperdir", "workdir")
        change(root)
        ground.run("umount", root)
    with images.attached(image) as device:
        line = f"cow_device={device} cow_directory=d"
        told = boot(root, f"{line} {mode}")
        assert is_changed(root) == (mode == "unionfs.mode=ro")
        assert ("its changes are kept in" in told) == ("reset" in mode)
        (root / "more").touch()
        end(root)
        boot(root, line)
        reset = "reset" in mode
        assert is_changed(root) != reset
        assert (root / "more").exists() == reset


def test_store_that_is_damaged_is_told_of_as_ever(root: Path, place: Path) -> None:
    need("ext4")
    broken = place / "broken.img"
    broken.write_bytes(b"x" * 65536)
    told = boot(root, f"cow_device={broken}", code=64)
    assert "no file system that is known" in told
