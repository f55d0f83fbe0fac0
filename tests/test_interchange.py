# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel interchange: an upper written by one is mounted by the other and shows the same tree.

The scripts below change a union in the ways that leave marks on disk. Each is run on one side, the
tree is pictured, then the other mounts the same lowers, upper and work directory; it must show the
very same, be able to go on from there, and hand it back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.rig import layers, mounted, snapshot, syscalls
from tests.rig.arena import backends
from tests.rig.mounted import Backend, Mounted, Overlay, Unionfs
from tests.rig.syscalls import RENAME_EXCHANGE

pytestmark = pytest.mark.root
OLD = 1_000_000_000_123_456_789


def build(place: Path) -> list[Path]:
    low = place / "lower"
    (low / "d" / "sub" / "deep").mkdir(parents=True)
    (low / "d" / "sub" / "deep" / "file").write_text("deep file")
    (low / "d" / "a").write_text("a")
    (low / "d" / "b").write_text("b")
    (low / "e").mkdir()
    (low / "e" / "y").write_text("y")
    (low / "empty").mkdir()
    (low / "big").write_bytes(os.urandom(3 << 20))
    os.link(low / "d" / "a", low / "link-a")
    os.link(low / "d" / "a", low / "e" / "link-a2")
    (low / "s").symlink_to("d/a")
    os.mkfifo(low / "fifo")
    os.setxattr(low / "d" / "b", "user.one", b"1")
    middle = place / "middle"
    (middle / "d").mkdir(parents=True)
    layers.whiteout(middle / "d" / "b")
    (middle / "e").mkdir()
    layers.make_opaque(middle / "e")
    (middle / "e" / "z").write_text("z")
    (middle / "m").write_text("of the middle")
    for folder, _, files in os.walk(place):
        for name in files:
            os.utime(Path(folder, name), ns=(OLD, OLD), follow_symlinks=False)
    return [middle, low]


def rename(source: Path, target: Path, flags: int = 0) -> None:
    syscalls.renameat2(os.fsencode(source), os.fsencode(target), flags)


def s_new_things(m: Path) -> None:
    (m / "newdir").mkdir(mode=0o2775)
    (m / "newdir" / "f").write_text("new")
    (m / "newdir" / "s").symlink_to("f" * 1000)
    os.mkfifo(m / "newdir" / "fifo")
    os.mknod(m / "newdir" / "null", 0o20666, os.makedev(1, 3))
    os.setxattr(m / "newdir" / "f", "user.x", b"y")
    os.setxattr(m / "newdir" / "f", "trusted.x", b"y")


def s_writes(m: Path) -> None:
    with open(m / "d" / "sub" / "deep" / "file", "a") as file:
        file.write(", written")
    (m / "m").write_text("overwritten")
    os.truncate(m / "big", 1_000_000)


def s_removals(m: Path) -> None:
    (m / "d" / "a").unlink()
    (m / "s").unlink()
    (m / "empty").rmdir()
    (m / "e" / "z").unlink()
    (m / "e").rmdir()
    (m / "e").mkdir()
    (m / "e" / "y").write_text("another y")


def s_metadata(m: Path) -> None:
    (m / "big").chmod(0o600)
    os.chown(m / "d", 5, 6)
    os.utime(m / "m", ns=(OLD + 1, OLD + 2))
    os.setxattr(m / "fifo", "trusted.x", b"y")
    os.lchown(m / "s", 7, 8)


def s_renamed_files(m: Path) -> None:
    rename(m / "m", m / "d" / "m2")
    rename(m / "big", m / "moved-big")
    rename(m / "d" / "sub" / "deep" / "file", m / "s")


def s_renamed_directories(m: Path) -> None:
    rename(m / "d" / "sub", m / "sub")
    rename(m / "d", m / "empty")
    rename(m / "sub" / "deep", m / "empty" / "deep")
    (m / "d").mkdir()
    (m / "d" / "fresh").write_text("not the old d")


def s_renamed_again(m: Path) -> None:
    rename(m / "d", m / "one")
    rename(m / "one", m / "e" / "two")
    rename(m / "e", m / "three")
    rename(m / "three" / "two" / "sub", m / "three" / "sub")


def s_exchanged(m: Path) -> None:
    rename(m / "d", m / "e", RENAME_EXCHANGE)
    rename(m / "m", m / "empty", RENAME_EXCHANGE)
    rename(m / "e" / "sub", m / "s", RENAME_EXCHANGE)


def s_hard_links(m: Path) -> None:
    with open(m / "link-a", "a") as file:
        file.write(", through one name")
    os.link(m / "link-a", m / "another")
    os.link(m / "m", m / "m-link")
    (m / "d" / "a").unlink()


def s_metacopy_then_moves(m: Path) -> None:
    (m / "big").chmod(0o640)
    rename(m / "big", m / "d" / "sub" / "big2")
    rename(m / "d" / "sub", m / "sub")
    os.link(m / "sub" / "big2", m / "big-link")


def s_root(m: Path) -> None:
    m.chmod(0o711)


SCRIPTS: Sequence[Callable[[Path], None]] = (
    s_new_things,
    s_writes,
    s_removals,
    s_metadata,
    s_renamed_files,
    s_renamed_directories,
    s_renamed_again,
    s_exchanged,
    s_hard_links,
    s_metacopy_then_moves,
)
IDS = [script.__name__[2:] for script in SCRIPTS]


def side(backend: Backend, lowers: list[Path], place: Path) -> Mounted:
    upper, work, mnt = (place / name for name in ("upper", "work", "mnt"))
    for path in (upper, work, mnt):
        path.mkdir(exist_ok=True)
    kind = Overlay if backend == "overlay" else Unionfs
    return kind(lowers, upper, mnt, work=work)


@pytest.fixture(params=[("unionfs", "overlay"), ("overlay", "unionfs")], ids="-then-".join)
def pair(request: pytest.FixtureRequest) -> tuple[Backend, Backend]:
    if "unionfs" not in backends() or "overlay" not in backends():
        pytest.skip("needs both backends")
    first, second = request.param
    return first, second


def carry(
    pair: tuple[Backend, Backend], place: Path, scripts: Sequence[Callable[[Path], None]]
) -> None:
    """The scripts on the first side, the same tree on the second, which goes on and hands back."""
    lowers = build(place)
    frozen = [snapshot.take(lower) for lower in lowers]
    one, other = (side(backend, lowers, place) for backend in pair)
    with one:
        for script in scripts:
            script(one.mnt)
        want = snapshot.take(one.mnt)
    with other:
        snapshot.assert_same(snapshot.take(other.mnt), want, f"{pair[0]}'s upper seen by {pair[1]}")
        with open(other.mnt / "went-on", "w") as file:
            file.write(pair[1])
        for name in sorted(os.listdir(other.mnt)):
            if (other.mnt / name).is_dir() and not (other.mnt / name).is_symlink():
                rename(other.mnt / name, other.mnt / f"{name}-moved")
        want = snapshot.take(other.mnt)
    with one:
        snapshot.assert_same(snapshot.take(one.mnt), want, f"handed back to {pair[0]}")
    for lower, tree in zip(lowers, frozen, strict=True):
        snapshot.assert_same(snapshot.take(lower), tree, "the lower changed")


@pytest.mark.parametrize("script", SCRIPTS, ids=IDS)
def test_one_script(
    pair: tuple[Backend, Backend], place: Path, script: Callable[[Path], None]
) -> None:
    carry(pair, place, [script])


@pytest.mark.parametrize(
    "scripts",
    [
        (s_new_things, s_writes, s_metadata, s_hard_links, s_renamed_files),
        (s_writes, s_renamed_directories, s_new_things),
        (s_hard_links, s_renamed_again, s_root),
        (s_metadata, s_metacopy_then_moves, s_new_things),
    ],
    ids=["files", "directories", "links", "metacopy"],
)
def test_scripts_together(
    pair: tuple[Backend, Backend], place: Path, scripts: Sequence[Callable[[Path], None]]
) -> None:
    carry(pair, place, scripts)


def test_upper_with_its_own_work_directory_is_seen_by_the_kernel(place: Path) -> None:
    """Without workdir= ours lies in UPPER/.unionfs; the kernel gets another one."""
    if "unionfs" not in backends():
        pytest.skip("backend unionfs not asked for")
    lowers = build(place)
    union = mounted.make("unionfs", lowers, place)
    with union:
        for script in (s_writes, s_metadata, s_renamed_again):
            script(union.mnt)
        want = snapshot.take(union.mnt)
    assert union.upper is not None
    work = place / "kernel-work"
    work.mkdir()
    with mounted.kernel_view(lowers, union.upper, work, place / "view") as view:
        got = snapshot.take(view, hide=[b".unionfs"])
    snapshot.assert_same(got, want, "our upper seen by the kernel")


def test_same_script_gives_the_same_tree_on_both(place: Path) -> None:
    if "unionfs" not in backends() or "overlay" not in backends():
        pytest.skip("needs both backends")
    for script in SCRIPTS:
        trees = []
        for backend in ("overlay", "unionfs"):
            here = place / f"{script.__name__}-{backend}"
            here.mkdir()
            names: Backend = "overlay" if backend == "overlay" else "unionfs"
            union = side(names, build(here), here)
            with union:
                script(union.mnt)
                trees.append(snapshot.take(union.mnt))
        lines = snapshot.differences(trees[1], trees[0], fresh=OLD + 10**9, slack=60 * 10**9)
        lines = [line for line in lines if ": content " not in line or "big" not in line]
        assert not lines, f"{script.__name__}: {lines}"


def test_a_completed_copy_says_where_it_came_from(place: Path) -> None:
    """The lower file, as its metadata-only copy did; not that copy."""
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    (place / "lower/large").write_bytes(bytes(1 << 20))
    copy = place / "upper/large"

    def marks() -> dict[str, bytes]:
        return {
            name: os.getxattr(copy, name) for name in os.listxattr(copy) if "metacopy" not in name
        }

    with Unionfs([place / "lower"], place / "upper", place / "mnt"):
        os.chmod(place / "mnt/large", 0o600)
        assert "trusted.overlay.metacopy" in os.listxattr(copy)
        before = marks()
        with open(place / "mnt/large", "ab") as file:
            file.write(b"more")
        assert "trusted.overlay.metacopy" not in os.listxattr(copy)
        assert marks() == before
