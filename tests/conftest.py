# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of all tests: the private mount namespace, stores, places and arenas."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from tests.rig import as_user, ground
from tests.rig.arena import Arena, backends
from tests.rig.ground import Ground, Kind
from tests.rig.native import Stack
from tests.rig.pair import Pair
from tests.rig.spots import Spot, shared

# While this file is imported the process has one thread, so all of pytest moves at once.
ground.isolate()

_SKIP_OVERLAY = "kernel overlayfs does not promise this"


class Stores:
    """File systems made once a session; each test gets a directory of its own on one of them."""

    def __init__(self, base: Ground) -> None:
        self.base = base
        self._made: dict[str, Path] = {}
        self._count = 0

    def place(self, kind: Kind | None = None) -> Path:
        kind = kind or "ext4"
        if os.geteuid() != 0:
            top = self.base.base
        else:
            if kind not in self._made:
                self._made[kind] = self.base.filesystem(f"store-{kind}", kind)
            top = self._made[kind]
        self._count += 1
        path = top / f"t{self._count}"
        path.mkdir()
        return path


@pytest.fixture(scope="session")
def stores() -> Iterator[Stores]:
    with Ground() as base:
        yield Stores(base)
        # A daemon of a test that failed: ended here, so that the stores can be unmounted.
        ground.reap([pid for pid in ground.children() if _is_daemon(pid)])


def _is_daemon(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(os.path.basename(word) == b"unionfs" for word in words[:3])


@pytest.fixture
def place(stores: Stores) -> Iterator[Path]:
    """An empty directory on ext4 (an ordinary user: on whatever the temporary directory is on)."""
    path = stores.place()
    yield path
    left = ground.mounts_below(path)
    stores.base.remove(path)
    assert not left, f"mounts left behind: {left}"


@pytest.fixture(params=["plain", "overlay", "unionfs"])
def arena(request: pytest.FixtureRequest, place: Path) -> Iterator[Arena]:
    """The same test on the plain directory, on kernel overlayfs and on unionfs.

    `@pytest.mark.without_overlay(reason)` leaves out the kernel's where it falls short itself.
    """
    if request.param not in backends():
        pytest.skip(f"backend {request.param} not asked for, or not for an ordinary user")
    marker = request.node.get_closest_marker("without_overlay")
    if marker and request.param == "overlay":
        pytest.skip(marker.args[0] if marker.args else _SKIP_OVERLAY)
    arena = Arena(place, request.param)
    yield arena
    if arena.union is not None:
        arena.union.abandon()


@pytest.fixture(params=get_args(Kind) if os.geteuid() == 0 else ("ext4",))
def pair(request: pytest.FixtureRequest, stores: Stores) -> Iterator[Pair]:
    """A pair on each kind of file system; as an ordinary user on the one there is."""
    place = stores.place(request.param)
    yield Pair(place)
    stores.base.remove(place)


@pytest.fixture
def single(place: Path) -> Pair:
    """A pair on one file system, for what does not depend on it."""
    return Pair(place)


@pytest.fixture
def user_place() -> Iterator[Path]:
    """A directory that belongs to the ordinary user."""
    why = as_user.why_impossible()
    if why:
        pytest.skip(why)
    with Ground("unionfs-user-") as base:
        path = Path(tempfile.mkdtemp(dir=base.base))
        if os.geteuid() == 0:
            os.chown(path, as_user.UID, as_user.GID)
        yield path


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "without_overlay(reason): kernel overlayfs falls short here, so not run on it"
    )
    config.addinivalue_line("markers", "root: needs root")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(scope="module")
def spots(stores: Stores) -> Iterator[Iterator[Spot]]:
    with shared(stores, "passthrough=all") as found:
        yield found


@pytest.fixture
def spot(spots: Iterator[Spot]) -> Spot:
    return next(spots)


@pytest.fixture
def stack(place: Path) -> Iterator[Stack]:
    """For the C module by itself."""
    stack = Stack(place)
    yield stack
    stack.close()
