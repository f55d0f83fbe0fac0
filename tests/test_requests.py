# SPDX-License-Identifier: GPL-2.0-or-later
"""How many requests an operation costs, by the benchmarks' own workloads: a bound for each, so that
a change that makes the kernel ask once more is seen. Nothing here depends on time.

A bound is what is needed at present and a little for what a directory or the first file costs;
where less is needed, lower it. Passthrough and a writeback cache only take requests away.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks import client, lower
from benchmarks.requests import total
from benchmarks.workload import MIB, Place, Sizes
from tests.rig.mounted import DRIVER_VARIABLE, Unionfs

if TYPE_CHECKING:
    from tests.conftest import Stores

pytestmark = pytest.mark.skipif(
    os.environ.get(DRIVER_VARIABLE, "engine") != "engine", reason="only the engine counts requests"
)
SIZES = Sizes(60, 30, 40, 40, MIB, MIB, 0, 4 * MIB, 100, 1, 1, 20)
BOUNDS = {
    "walk, fresh": 0.1,
    "walk, again": 0.1,
    "open-read-close, first": 3.2,
    "open-read-close, again": 2.1,
    "open-read-close, again, 4 at once": 2.1,
    "missing names": 1.1,
    "create-write-close": 6.1,
    "rename": 3.1,
    "unlink of new files": 2.1,
    "unlink of lower files": 3.1,
    "rm -rf of a new tree": 2.2,
    "rm -rf of a lower tree": 2.2,
    "append to lower files": 5.2,
    "chmod of lower files": 2.2,
    "chown of lower files": 3.2,
    "chmod of large lower files": 2.7,
    "first write into a large lower file": 5.0,
    "sequential read, first": 9.0,
    "sequential read, again": 0.5,
    "random read, again": 0.1,
    "write and fsync": 2.5,
    "random write": 1.1,
}


@pytest.fixture(scope="module")
def scene(stores: Stores) -> Iterator[Place]:
    """A union for all of them: each workload has data of its own."""
    top: Path = stores.place()
    for name in ("lower", "upper", "mnt"):
        (top / name).mkdir()
    lower.make_trees(top / "lower", SIZES)
    with Unionfs([top / "lower"], top / "upper", top / "mnt"):
        yield Place(str(top / "mnt"), str(top / "lower"), "", SIZES)
    stores.base.remove(top)


@pytest.mark.parametrize("name", BOUNDS)
def test_requests(scene: Place, name: str) -> None:
    found = client.measure(scene, name, counted=True)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    needed = total(found["requests"]) / found["count"]
    assert needed <= BOUNDS[name], f"{found['count']} operations needed {found['requests']}"
