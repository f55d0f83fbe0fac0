# SPDX-License-Identifier: GPL-2.0-or-later
"""One kernel upper, changed by kernel overlayfs and by us in turns, over three lowers.

Whoever changes a union, the other then shows the very same tree and goes on from there. What each
turn does is what the two could misunderstand of each other: names of a hard link that only the
index knows, redirects within redirects (relative ones of the kernel's, absolute ones of ours),
metadata-only copies that were renamed and linked, opaque directories with whiteouts beneath them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.rig import layers, snapshot
from tests.rig.arena import backends
from tests.rig.mounted import Mounted, Overlay, Unionfs
from tests.rig.syscalls import RENAME_EXCHANGE, renameat2

pytestmark = pytest.mark.root
Turn = Callable[[Path], None]


def build(place: Path) -> list[Path]:
    bottom, middle, top = (place / name for name in ("bottom", "middle", "top"))
    for folder in ("a/b/c/d", "opaque/under", "other"):
        (bottom / folder).mkdir(parents=True)
    for file in ("a/1", "a/b/2", "a/b/c/3", "a/b/c/d/4", "opaque/under/5", "other/6", "hidden"):
        (bottom / file).write_text(f"{file} of the bottom")
    for number in range(4):
        (bottom / f"large-{number}").write_bytes(os.urandom(1 << 18))
    (bottom / "link-0").write_text("one file, five names")
    for name in ("link-1", "link-2", "a/link-3", "a/b/link-4"):
        os.link(bottom / "link-0", bottom / name)
    (middle / "a/b").mkdir(parents=True)
    (middle / "a/b/2").write_text("2 of the middle")
    (middle / "opaque").mkdir()
    layers.make_opaque(middle / "opaque")
    (middle / "opaque/instead").write_text("of the middle")
    layers.whiteout(middle / "hidden")
    (top / "a/b/c").mkdir(parents=True)
    (top / "a/b/c/top").write_text("of the top")
    layers.whiteout(top / "a/1")
    return [top, middle, bottom]


def move(mnt: Path, source: str, target: str, flags: int = 0) -> None:
    renameat2(os.fsencode(mnt / source), os.fsencode(mnt / target), flags)


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def t_links(m: Path) -> None:
    """Copied up under one name; the others only by the index."""
    append(m / "link-0", ", written")
    (m / "link-1").unlink()


def t_links_by_another_name(m: Path) -> None:
    append(m / "a/b/link-4", ", again by another name")
    os.link(m / "link-2", m / "link-5")
    move(m, "a/link-3", "link-3")


def t_directories(m: Path) -> None:
    move(m, "a/b/c", "a/b/c2")
    move(m, "a", "a2")
    move(m, "a2/b", "b2")
    (m / "a").mkdir()
    (m / "a/new").write_text("not the old a")


def t_directories_within(m: Path) -> None:
    move(m, "b2/c2", "b2/c3")
    move(m, "b2", "a2/b3")
    move(m, "a2/b3/c3/d", "a/d")
    append(m / "a/d/4", ", changed where it is now")


def t_metacopies(m: Path) -> None:
    for number in range(4):
        (m / f"large-{number}").chmod(0o640)
    move(m, "large-0", "other/large-0")
    os.link(m / "large-1", m / "other/large-1-too")
    move(m, "other", "other2")


def t_metacopies_again(m: Path) -> None:
    os.chown(m / "other2/large-0", 3, 4)
    move(m, "other2/large-0", "large-00")
    append(m / "other2/large-1-too", "and a line")
    os.truncate(m / "large-2", 12345)


def t_opaque(m: Path) -> None:
    (m / "opaque/instead").unlink()
    (m / "opaque").rmdir()
    (m / "opaque").mkdir()
    (m / "opaque/under").mkdir()
    (m / "opaque/under/mine").write_text("mine")


def t_opaque_moved(m: Path) -> None:
    target = "a2" if (m / "a2").exists() else "a"
    move(m, "opaque", f"{target}/opaque")
    (m / "opaque").mkdir()
    move(m, f"{target}/opaque/under", "opaque/under")
    move(m, "opaque", f"{target}/opaque", RENAME_EXCHANGE)


PAIRS = [
    (t_links, t_links_by_another_name),
    (t_directories, t_directories_within),
    (t_metacopies, t_metacopies_again),
    (t_opaque, t_opaque_moved),
]
TURNS = [turn for pair in PAIRS for turn in pair]


@pytest.fixture
def sides(place: Path) -> Iterator[list[Mounted]]:
    if "unionfs" not in backends() or "overlay" not in backends():
        pytest.skip("needs both backends")
    lowers = build(place)
    for name in ("upper", "work", "mnt"):
        (place / name).mkdir()
    frozen = [snapshot.take(lower) for lower in lowers]
    yield [
        kind(lowers, place / "upper", place / "mnt", work=place / "work")
        for kind in (Overlay, Unionfs)
    ]
    for lower, tree in zip(lowers, frozen, strict=True):
        snapshot.assert_same(snapshot.take(lower), tree, f"lower {lower.name} changed")


def take_turns(sides: list[Mounted], turns: Sequence[Turn], first: int) -> None:
    want = None
    for number, turn in enumerate(turns):
        side = sides[(number + first) % 2]
        with side:
            if want is not None:
                done = f"as {side.backend} shows it after {turns[number - 1].__name__}"
                snapshot.assert_same(snapshot.take(side.mnt), want, done)
            turn(side.mnt)
            want = snapshot.take(side.mnt)
    for side in sides:
        with side:
            assert want is not None
            done = f"as {side.backend} shows it in the end"
            snapshot.assert_same(snapshot.take(side.mnt), want, done)


@pytest.mark.parametrize("first", [0, 1], ids=["kernel-first", "unionfs-first"])
def test_all_in_turns(sides: list[Mounted], first: int) -> None:
    take_turns(sides, TURNS, first)


@pytest.mark.parametrize("first", [0, 1], ids=["kernel-first", "unionfs-first"])
@pytest.mark.parametrize("pair", PAIRS, ids=[one.__name__[2:] for one, _ in PAIRS])
def test_one_begins_and_the_other_goes_on(
    sides: list[Mounted], pair: tuple[Turn, Turn], first: int
) -> None:
    take_turns(sides, list(pair), first)


@pytest.mark.parametrize("first", [0, 1], ids=["kernel-first", "unionfs-first"])
def test_inode_numbers_outlast_the_exchange(sides: list[Mounted], first: int) -> None:
    """Of copied-up files, by the kernel's origins and by ours."""
    one, other = sides[first], sides[1 - first]
    with one:
        t_links(one.mnt)
        t_metacopies(one.mnt)
        names = ["link-0", "link-2", "large-1", "large-3", "other2/large-0"]
        want = {name: (one.mnt / name).stat().st_ino for name in names}
    with other:
        assert {name: (other.mnt / name).stat().st_ino for name in names} == want
