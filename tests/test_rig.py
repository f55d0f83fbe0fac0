# SPDX-License-Identifier: GPL-2.0-or-later
"""The rig itself: layers merged as kernel overlayfs merges them, pictures that see differences."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.rig import ground, layers, mounted, snapshot
from tests.rig.arena import Arena
from tests.rig.ground import Ground


def build(arena: Arena) -> None:
    """Three lowers with every kind of mark in the middle."""
    low = arena.lower
    (low / "kept").write_text("from the bottom")
    (low / "gone").write_text("hidden above")
    (low / "dir").mkdir(mode=0o750)
    (low / "dir" / "a").write_text("a")
    (low / "dir" / "b").write_text("b")
    os.link(low / "dir" / "a", low / "dir" / "a2")
    (low / "veiled").mkdir()
    (low / "veiled" / "old").write_text("old")
    (low / "was-file").write_text("file")
    (low / "was-dir").mkdir()
    (low / "was-dir" / "inner").write_text("inner")
    middle = arena.add_lower("middle")
    layers.whiteout(middle / "gone")
    (middle / "dir").mkdir(mode=0o711)
    layers.whiteout(middle / "dir" / "b")
    (middle / "veiled").mkdir()
    layers.make_opaque(middle / "veiled")
    (middle / "veiled" / "new").write_text("new")
    (middle / "was-file").mkdir()
    (middle / "was-dir").write_text("now a file")
    top = arena.add_lower("top")
    (top / "gone").mkdir()
    (top / "dir").mkdir(mode=0o700)
    (top / "dir" / "b").symlink_to("a")
    os.utime(top / "dir", ns=(1_000_000_001, 2_000_000_003))


def test_merge_shows_what_the_union_shows(arena: Arena) -> None:
    build(arena)
    copy = arena.place / "copy"
    copy.mkdir()
    layers.merge(arena.lowers, copy)
    with arena.mounted() as mnt:
        got, want = snapshot.take(mnt), snapshot.take(copy)
    assert {name.decode() for name in want} == {
        ".", "kept", "dir", "dir/a", "dir/a2", "dir/b", "veiled", "veiled/new",
        "was-file", "was-dir", "gone",
    }  # fmt: skip
    # The root's own times come from the topmost lower in an empty upper, not from the copy.
    got[b"."] = want[b"."]
    snapshot.assert_same(got, want, "the union of three lowers")


def test_snapshot_names_each_difference(place: Path) -> None:
    one, two = place / "one", place / "two"
    for tree in (one, two):
        tree.mkdir()
        (tree / "same").write_text("x")
        (tree / "link").hardlink_to(tree / "same")
        (tree / "content").write_text("x")
        (tree / "mode").write_text("x")
    layers.copy_metadata(os.fsencode(one), os.fsencode(two))
    (two / "link").unlink()
    (two / "link").write_text("x")
    (two / "content").write_text("y")
    (two / "mode").chmod(0o600)
    (one / "only").mkdir()
    lines = snapshot.differences(snapshot.take(one), snapshot.take(two), ignore=("mtime",))
    text = "\n".join(lines)
    for word in (
        "only: should not",
        "content: content is",
        "mode: mode is",
        "same: group",
        "links",
    ):
        assert word in text, text


@pytest.mark.root
def test_ground_leaves_nothing(tmp_path: Path) -> None:
    before = ground.mounts_below("/")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("content")
    with Ground() as base:
        path = base.base
        for kind in ground.KINDS:
            (base.filesystem(kind, kind) / "file").write_text("content")
        for image in ("squashfs", "erofs"):
            assert (base.image(image, image, tree) / "file").read_text() == "content"
    assert not path.exists()
    assert ground.mounts_below("/") == before


@pytest.mark.root
def test_suspicious_log_fails(place: Path) -> None:
    union = mounted.Unionfs([place], place, place / "mnt")
    union.log.write_text("12:00 WARNING something odd\n")
    with pytest.raises(AssertionError, match="complained"):
        union._check_log()
    union.expected.append("something odd")
    union._check_log()
