# SPDX-License-Identifier: GPL-2.0-or-later
"""After an unclean end: the upper is checked by itself while it is used, and that is told."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.rig import ground
from tests.rig.mounted import Unionfs, program
from tests.rig.waiting import wait_until
from tests.test_stores import base, change, union

__all__ = ["base"]

PREFIX = "trusted.overlay." if os.geteuid() == 0 else "user.overlay."


@pytest.fixture
def killed(base: Path) -> Path:
    """base/up, whose daemon was killed."""
    (base / "tree/large").write_bytes(bytes(100_000))
    os.link(base / "tree/file", base / "tree/link")
    (base / "up").mkdir()
    made = union(base, base / "tree", base / "up")
    made.mount()
    change(base / "mnt")
    (base / "mnt/large").chmod(0o600)
    made.kill()
    return base


def found(made: Unionfs) -> dict[str, object]:
    """The result of the check, once it is there."""
    wait_until(lambda: made.status().get("check", {}).get("state") != "running")  # type: ignore[attr-defined]
    told = made.status()["check"]
    assert isinstance(told, dict)
    return told


def shown(place: Path) -> str:
    return ground.run(*program(), "status", place / "mnt")


def test_nothing_is_wrong(killed: Path) -> None:
    with union(killed, killed / "tree", killed / "up") as made:
        assert found(made) == {"state": "done", "directories": 3, "problems": 0, "told": []}
        assert "nothing is wrong in 3 directories of the upper" in shown(killed)
        assert "was checked: nothing is wrong" in made.words()
        assert not (killed / "up/.unionfs/unchecked").exists()
    with union(killed, killed / "tree", killed / "up") as made:
        assert "check" not in made.status(), "only after an unclean end"


def test_what_is_wrong_is_told(killed: Path) -> None:
    up = killed / "up"
    shutil.rmtree(killed / "tree/dir")
    (killed / "tree/large").unlink()
    os.setxattr(up / "made", f"{PREFIX}opaque", b"maybe")
    (up / ".unionfs/index/strange").touch()
    made = union(killed, killed / "tree", up)
    made.expected = ["up: /", "has 4 problems"]
    with made:
        told = found(made)
        assert told["problems"] == 4
        expected = [
            "/.unionfs/index/strange: it is no name of an index",
            "/large: its data are missing: the lowers have no file /large",
            f"/made: {PREFIX}opaque: b'maybe' is neither y nor x",
            "/moved: redirect: it leads to no directory in the lowers (/dir)",
        ]
        assert sorted(told["told"]) == expected  # type: ignore[call-overload]
        for line in expected:
            assert line in made.words()
            assert line in shown(killed)
        assert (killed / "mnt/file").read_text() == "changed\n", "it can be used all the same"


def test_it_is_ended_with_the_union(killed: Path) -> None:
    """However much there is to look at; and then it begins anew."""
    up = killed / "up"
    for number in range(3000):
        (up / f"made/{number}").mkdir()
    with union(killed, killed / "tree", up) as made:
        assert made.status()["check"] == {"state": "running"}
        assert "of the upper running" in shown(killed)
    assert (up / ".unionfs/unchecked").exists()
    assert not (up / ".unionfs/owner").exists()
    shutil.rmtree(up / "made")
    with union(killed, killed / "tree", up) as made:
        assert found(made)["problems"] == 0
    assert not (up / ".unionfs/unchecked").exists()


def test_it_is_no_hindrance(killed: Path) -> None:
    """Changes meanwhile are no problems, and none is held up."""
    up = killed / "up"
    for number in range(300):
        (up / f"made/{number}").mkdir()
    with union(killed, killed / "tree", up) as made:
        mnt = killed / "mnt"
        number = 0
        while made.status()["check"] == {"state": "running"}:
            number += 1
            (mnt / f"made/{number % 300}").rename(mnt / "made/away")
            (mnt / "made/away").rename(mnt / f"made/{number % 300}")
            (mnt / "link").write_text(f"{number}\n")
            (mnt / "made/file").touch()
            (mnt / "made/file").unlink()
        assert found(made)["problems"] == 0
        assert number > 1
    with union(killed, killed / "tree", up):
        assert (killed / "mnt/link").read_text() == f"{number}\n"


def test_not_where_changes_are_in_memory(killed: Path) -> None:
    with union(killed, killed / "tree", None, "ephemeral") as made:
        assert "check" not in made.status()
