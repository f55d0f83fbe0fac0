# SPDX-License-Identifier: GPL-2.0-or-later
"""Eight processes change the same few names at once; then a remount must show the same tree,
with right link counts, and the daemon must not have complained."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from functools import partial
from pathlib import Path

import pytest

from tests import stress
from tests.rig import storm
from tests.rig.at_once import begin
from tests.rig.mounted import PATIENCE, Unionfs

SECONDS = 3.0
PROCESSES = 8


def changes(seed: int, mnt: Path, wrong: multiprocessing.Queue[str]) -> None:
    rng = random.Random(seed)
    os.chdir(mnt)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if words := storm.try_change(rng):
            wrong.put(words)


@pytest.mark.root
@pytest.mark.parametrize("options", ["", "whiteout=wh", "metacopy=off,index=off"])
def test_storm(place: Path, options: str) -> None:
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    storm.fill(place / "lower")
    words = options.split(",") if options else []
    context = multiprocessing.get_context("fork")
    wrong: multiprocessing.Queue[str] = context.Queue()
    with Unionfs([place / "lower"], place / "upper", place / "mnt", options=words) as u:
        arguments = [(seed, u.mnt, wrong) for seed in range(PROCESSES)]
        processes = [context.Process(target=changes, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert wrong.empty(), wrong.get()
        before = storm.tree(u.mnt)
        assert os.listdir(place / "upper" / ".unionfs" / "work") in ([], ["incompat"])
        u.remount()
        assert storm.tree(u.mnt) == before
        if "index=off" not in words:
            storm.check_links(before)


def test_beside_the_oracle(place: Path) -> None:
    """tools/stress, in short."""
    assert stress.run(place, stress.Plan(seconds=SECONDS, processes=2)) == []


@pytest.mark.root
def test_a_link_while_a_copy_is_completed(place: Path) -> None:
    """The new name is one of the whole file, never of the metadata-only copy that it replaces."""
    many = 120
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    for number in range(many):
        (place / f"lower/f{number}").write_bytes(os.urandom(200_000))
    rng = random.Random(1)
    with Unionfs([place / "lower"], place / "upper", place / "mnt") as union:
        for number in range(many):
            path = union.mnt / f"f{number}"
            path.chmod(0o600)
            appended = begin(partial(_append, path))
            time.sleep(rng.random() * 0.004)
            os.link(path, union.mnt / f"g{number}")
            appended.result(PATIENCE)
        union.remount()
        for number in range(many):
            path, link = union.mnt / f"f{number}", union.mnt / f"g{number}"
            assert path.samefile(link)
            assert path.stat().st_nlink == 2
            assert link.read_bytes().endswith(b"appended")


@pytest.mark.root
def test_a_directory_that_is_changed_beside_copy_ups(place: Path) -> None:
    """A copy-up puts the times of its directory back, but not over those of a change."""
    for name in ("lower/d", "upper", "mnt"):
        (place / name).mkdir(parents=True)
    for number in range(1000):
        (place / f"lower/d/l{number}").write_text("x")
    with Unionfs([place / "lower"], place / "upper", place / "mnt") as union:
        d = union.mnt / "d"
        copies = begin(partial(_chmod_all, [d / f"l{number}" for number in range(1000)]))
        seen = [d.stat().st_mtime_ns]
        while not copies.done():
            time.sleep(0.004)  # the clock of files moves on
            (d / f"new{len(seen)}").touch()
            seen.append(d.stat().st_mtime_ns)
        copies.result(PATIENCE)
    assert len(set(seen)) == len(seen)


def _chmod_all(paths: list[Path]) -> None:
    for path in paths:
        path.chmod(0o600)


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"appended")
