# SPDX-License-Identifier: GPL-2.0-or-later
"""Uppers whose marks are `.wh.` names: asked for, or where the file system holds nothing else.

The same changes are made on a plain copy of the lower; both trees must be the same, also after a
remount.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import as_user, ground, layers, syscalls
from tests.rig.mounted import Unionfs

pytestmark = pytest.mark.root
Tree = dict[str, tuple[int, str]]


@pytest.fixture(params=["asked", "no-xattrs"])
def union(request: pytest.FixtureRequest, place: Path) -> Iterator[Unionfs]:
    """On ext4 with whiteout=wh, and on a ramfs, which holds neither xattrs nor exchanges."""
    for name in ("lower", "store", "mnt"):
        (place / name).mkdir()
    fill(place / "lower")
    options = ["whiteout=wh"]
    if request.param == "no-xattrs":
        ground.run("mount", "-t", "ramfs", "ramfs", place / "store")
        options = []
    (place / "store" / "upper").mkdir()
    union = Unionfs([place / "lower"], place / "store" / "upper", place / "mnt", options=options)
    try:
        yield union
    finally:
        union.abandon()
        if request.param == "no-xattrs":
            syscalls.umount(str(place / "store"), 0)


def fill(lower: Path) -> None:
    for name in ("d", "d/sub", "e", "empty", "full"):
        (lower / name).mkdir()
    for name in ("f", "g", "h", "d/x", "d/y", "d/sub/deep", "e/z", "full/a", "full/b"):
        (lower / name).write_text(f"lower {name}")
    (lower / "link").symlink_to("f")


def tree(top: Path) -> Tree:
    """Paths with type, mode and content."""
    found: Tree = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        mode = path.lstat().st_mode
        content = ""
        if stat.S_ISLNK(mode):
            content = os.readlink(path)
        elif stat.S_ISREG(mode):
            content = path.read_text()
        if name.split("/")[0] != ".unionfs":
            found[name] = (mode, content)
    return found


def test_status_says_it(union: Unionfs, request: pytest.FixtureRequest) -> None:
    with union:
        marks = union.status()["marks"]
        assert isinstance(marks, dict)
        assert marks["whiteout"] == "wh"
        if "no-xattrs" in request.node.name:
            features = union.status()["features"]
            assert isinstance(features, dict)
            assert features["xattrs"] is None
            reasons = union.status()["reasons"]
            assert isinstance(reasons, dict)
            assert reasons["xattrs"]


def test_marks_on_disk(union: Unionfs) -> None:
    upper = union.upper
    assert upper is not None
    with union:
        (union.mnt / "f").unlink()
        assert stat.S_ISREG((upper / ".wh.f").lstat().st_mode)
        (union.mnt / "f").write_text("new")
        assert not (upper / ".wh.f").exists()
        shutil.rmtree(union.mnt / "d")
        assert sorted(os.listdir(upper)) == [".unionfs", ".wh.d", "f"]
        (union.mnt / "d").mkdir()
        assert not (upper / ".wh.d").exists()
        assert os.listdir(union.mnt / "d") == []
        union.remount()
        assert os.listdir(union.mnt / "d") == []


def test_names_that_are_marks(union: Unionfs) -> None:
    """A lower may have such names; shown, they could be neither changed nor removed."""
    (union.lowers[0] / ".wh.f").write_text("a file of this name")
    with union:
        assert ".wh.f" not in os.listdir(union.mnt)
        assert (union.mnt / "f").read_text() == "lower f"
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            (union.mnt / ".wh.g").write_text("x")
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            os.rename(union.mnt / "f", union.mnt / ".wh.g")
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            os.link(union.mnt / "f", union.mnt / ".wh.g")
        assert (union.mnt / "g").exists()


def both(union: Unionfs, plain: Path) -> tuple[Path, Path]:
    return union.mnt, plain


def test_all_kinds_of_changes(union: Unionfs, place: Path) -> None:
    plain = place / "plain"
    plain.mkdir()
    layers.merge(union.lowers, plain)
    with union:
        for top in both(union, plain):
            (top / "f").unlink()
            (top / "f").mkdir()
            (top / "f" / "inner").write_text("1")
            os.rename(top / "g", top / "h")
            (top / "g").symlink_to("nowhere")
            (top / "full" / "a").unlink()
            (top / "full" / "b").unlink()
            (top / "full").rmdir()
            os.mkfifo(top / "full")
            (top / "empty").rmdir()
            (top / "made").mkdir()
            os.rename(top / "made", top / "empty")
            (top / "e" / "z").unlink()
            (top / "onto").mkdir()
            (top / "onto" / "new").write_text("n")
            os.rename(top / "onto", top / "e")
            (top / "d" / "x").chmod(0o600)
            os.link(top / "d" / "y", top / "d" / "y2")
            (top / "d" / "y").unlink()
            (top / "d" / "sub" / "deep").write_text("changed")
            os.rename(top / "d" / "sub" / "deep", top / "deep")
            (top / "link").unlink()
            os.rename(top / "h", top / "link")
            os.truncate(top / "link", 3)
            (top / "h").write_text("h again")
        assert tree(union.mnt) == tree(plain)
        union.remount()
        assert tree(union.mnt) == tree(plain)


def test_merged_directories(union: Unionfs) -> None:
    """Without xattrs there are no redirects: EXDEV, upon which mv(1) copies."""
    with union:
        if union.status()["marks"]["redirect_dir"]:  # type: ignore[index]
            os.rename(union.mnt / "d", union.mnt / "moved")
        else:
            with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
                os.rename(union.mnt / "d", union.mnt / "moved")
            ground.run("mv", union.mnt / "d", union.mnt / "moved")
        for _ in range(2):
            assert not (union.mnt / "d").exists()
            assert sorted(os.listdir(union.mnt / "moved")) == ["sub", "x", "y"]
            assert (union.mnt / "moved" / "sub" / "deep").read_text() == "lower d/sub/deep"
            union.remount()
        (union.mnt / "d").mkdir()
        union.remount()
        assert os.listdir(union.mnt / "d") == []


def test_long_names(union: Unionfs) -> None:
    """The mark is four bytes longer than the name: what cannot be marked is not removed."""
    longest, fits = "n" * 255, "m" * 251
    for name in (longest, fits):
        (union.lowers[0] / name).write_text("long")
    with union:
        (union.mnt / fits).unlink()
        with pytest.raises(OSError, match=os.strerror(errno.ENAMETOOLONG)):
            (union.mnt / longest).unlink()
        assert (union.mnt / longest).read_text() == "long"
        (union.mnt / ("o" * 255)).write_text("new")
        (union.mnt / ("o" * 255)).unlink()
        union.remount()
        assert not (union.mnt / fits).exists()


def step(random: random.Random, top: Path, names: list[str]) -> object:
    """One random change; its outcome. The same generator state does the same on either tree."""
    a, b = random.choice(names), random.choice(names)
    kind = random.randrange(9)
    text = str(random.random())
    try:
        if kind == 0:
            (top / a).write_text(text)
        elif kind == 1:
            (top / a).unlink()
        elif kind == 2:
            (top / a).mkdir()
        elif kind == 3:
            (top / a).rmdir()
        elif kind == 4:
            # No directory is renamed that the lower has: see test_merged_directories.
            if (top / a).is_dir() and not (top / a).is_symlink():
                return None
            os.rename(top / a, top / b)
        elif kind == 5:
            os.link(top / a, top / b, follow_symlinks=False)
        elif kind == 6:
            (top / a).symlink_to(text)
        elif kind == 7:
            (top / a).chmod(0o600)
        else:
            return sorted(name for name in os.listdir(top / a) if name != ".unionfs")
    except OSError as exc:
        return exc.errno
    return None


@pytest.mark.parametrize("seed", range(4))
def test_random_changes(union: Unionfs, place: Path, seed: int) -> None:
    plain = place / "plain"
    plain.mkdir()
    layers.merge(union.lowers, plain)
    names = ["f", "g", "d", "d/x", "d/sub", "d/sub/deep", "e", "e/z", "full", "full/a", "empty"]
    names += ["n", "empty/n", "d/n"]
    with union:
        for count in range(300):
            state = f"{seed}.{count}"
            outcomes = [step(random.Random(state), top, names) for top in both(union, plain)]
            assert outcomes[0] == outcomes[1], f"step {count}"
            if count % 50 == 49:
                assert tree(union.mnt) == tree(plain)
                union.remount()
                assert tree(union.mnt) == tree(plain)


def test_read_only_reads_them(union: Unionfs) -> None:
    with union:
        (union.mnt / "f").unlink()
        shutil.rmtree(union.mnt / "d")
        (union.mnt / "d").mkdir()
    assert union.upper is not None
    reader = Unionfs(union.lowers, union.upper, union.mnt, flags=["--ro"])
    with reader:
        assert not (union.mnt / "f").exists()
        assert os.listdir(union.mnt / "d") == []
        assert not [name for name in os.listdir(union.mnt) if name.startswith(".wh.")]


def test_as_a_user_without_xattrs(user_place: Path) -> None:
    """An upper that takes no user.* attributes either: a ramfs of the user's."""
    for name in ("lower", "upper", "mnt"):
        (user_place / name).mkdir()
    fill(user_place / "lower")
    ground.run("mount", "-t", "ramfs", "ramfs", user_place / "upper")
    with contextlib.ExitStack() as stack:
        stack.callback(syscalls.umount, str(user_place / "upper"), 0)
        for path in [user_place, *user_place.rglob("*")]:
            os.chown(path, as_user.UID, as_user.GID, follow_symlinks=False)
        done = as_user.python("-m", "tests.rootless", "run_without_xattrs", str(user_place))
        assert done.returncode == 0, done.stderr
