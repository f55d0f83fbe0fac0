# SPDX-License-Identifier: GPL-2.0-or-later
"""How many requests an operation costs, by the benchmarks' own workloads: a bound for each, so that
a change that makes the kernel ask once more is seen. Nothing here depends on time.

A bound is what is needed at present and a little for what a directory or the first file costs;
where less is needed, lower it. With passthrough the kernel reads and writes by itself, so what it
takes away is a second bound; a third is for what Python answers, which takes longest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

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


class Bound(NamedTuple):
    passed: float  # with passthrough, where the kernel reads and writes by itself,
    served: float  # and without
    python: float = 0.0  # of them answered by Python


BOUNDS = {
    "walk, fresh": Bound(0.1, 0.1),
    "walk, again": Bound(0.1, 0.1),
    "open-read-close, first": Bound(3.2, 3.2),
    "open-read-close, again": Bound(2.1, 2.1),
    "open-read-close, first, 4 at once": Bound(3.2, 3.2),
    "open-read-close, again, 4 at once": Bound(2.1, 2.1),
    "open-read-close, first, 16 at once": Bound(3.2, 3.2),
    "open-read-close, again, 16 at once": Bound(2.1, 2.1),
    "missing names": Bound(1.1, 1.1),
    "create-write-close": Bound(5.1, 6.1),
    "rename": Bound(3.1, 3.1),
    "unlink of new files": Bound(2.1, 2.1),
    "unlink of lower files": Bound(3.1, 3.1),
    "rm -rf of a new tree": Bound(2.2, 2.2),
    # A directory of the lower is taken away by Python.
    "rm -rf of a lower tree": Bound(2.2, 2.2, 0.02),
    "append to lower files": Bound(4.1, 5.1),
    "chmod of lower files": Bound(2.1, 2.1, 0.04),
    "chown of lower files": Bound(3.1, 3.1, 0.04),
    "chmod of large lower files": Bound(2.7, 2.7),
    "chown of large lower files": Bound(3.4, 3.4),
    "first write into a large lower file": Bound(4.0, 5.0),
    # A user's kernel reads ahead less.
    "sequential read, first": Bound(1.0, 9.0),
    "sequential read, again": Bound(0.5, 0.5),
    "random read, again": Bound(0.02, 0.02),
    "write and fsync": Bound(1.5, 2.5),
    "random write": Bound(0.02, 1.1),
    # What other programs ask changes with their versions, and what is at once with its order.
    "unpack of a tar": Bound(9.5, 15.5),
    "git clone and status": Bound(1500, 1900, 5.0),
    "mixed": Bound(3.4, 3.7, 0.05),
}
# Root has both ways to be served; a user has one, whatever he asks for.
WAYS = ["passthrough=all", "passthrough=off"] if os.geteuid() == 0 else ["passthrough=off"]


class Scene(NamedTuple):
    place: Place
    passed: bool


@pytest.fixture(scope="module", params=WAYS)
def scene(request: pytest.FixtureRequest, stores: Stores) -> Iterator[Scene]:
    """A union for all of them: each workload has data of its own."""
    top: Path = stores.place()
    for name in ("lower", "upper", "mnt", "store"):
        (top / name).mkdir()
    lower.make_trees(top / "lower", SIZES)
    lower.make_store(top / "store", SIZES)
    with Unionfs([top / "lower"], top / "upper", top / "mnt", options=[request.param]) as union:
        place = Place(str(top / "mnt"), str(top / "lower"), str(top / "store"), SIZES)
        yield Scene(place, cast("dict[str, bool]", union.status()["passthrough"])["active"])
    stores.base.remove(top)


@pytest.mark.parametrize("name", BOUNDS)
def test_requests(scene: Scene, name: str) -> None:
    found = client.measure(scene.place, name, counted=True)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    bound = BOUNDS[name]
    requests, count = found["requests"], found["count"]
    words = f"{count} operations needed {requests}"
    assert total(requests) / count <= (bound.passed if scene.passed else bound.served), words
    assert sum(requests["python"].values()) / count <= bound.python, words
