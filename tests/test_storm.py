# SPDX-License-Identifier: GPL-2.0-or-later
"""Eight processes change the same few names at once; then a remount must show the same tree,
with right link counts, and the daemon must not have complained."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

from tests import stress
from tests.rig import storm
from tests.rig.mounted import Unionfs

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
