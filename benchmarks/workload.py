# SPDX-License-Identifier: GPL-2.0-or-later
"""What a workload is: a name, what one operation of it is, and how it is prepared and timed.

A workload's function prepares (untimed) and returns what is to be timed. It learns the names of the
lower's files from the lower itself, so that the union has not seen them when the clock starts, and
makes each path a string before that. The timed part does nothing but the operations.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Skipped(Exception):
    """The workload is not possible here; the message says why."""


class Sizes(NamedTuple):
    """How much of everything. Bytes where nothing else is said."""

    files: int = 1000  # at most, in a tree of the lower
    changed: int = 200  # files of the lower that are changed
    new: int = 1000
    missing: int = 2000
    large: int = 64 * MIB  # of which only the mode or owner is changed
    first_write: int = 512 * MIB
    huge: int = 0  # 0: none
    data: int = 64 * MIB  # read and written in sequence
    random: int = 4000  # blocks at random
    transactions: int = 200
    starts: int = 5
    mixed: int = 400  # by each process


DEFAULT = Sizes()
QUICK = Sizes(200, 50, 200, 400, 16 * MIB, 64 * MIB, 0, 16 * MIB, 1000, 30, 2, 100)


class Place(NamedTuple):
    """Where a workload finds its data; strings, since they cross to the client's process."""

    root: str  # the union
    lower: str
    store: str  # neither: archives, packages, a repository
    sizes: Sizes


class Timed(NamedTuple):
    """`run` may give the seconds itself, where the whole is not what counts."""

    operations: int
    run: Callable[[], float | None]

    def seconds(self) -> float:
        began = time.perf_counter()
        own = self.run()
        return time.perf_counter() - began if own is None else own


class Workload(NamedTuple):
    name: str
    unit: str
    words: str
    prepare: Callable[[Place], Timed]


WORKLOADS: dict[str, Workload] = {}
Prepare = Callable[[Place], Timed]


def workload(name: str, unit: str, words: str) -> Callable[[Prepare], Prepare]:
    """Enters a function under this name, in the order of the table."""

    def enter(prepare: Prepare) -> Prepare:
        WORKLOADS[name] = Workload(name, unit, words, prepare)
        return prepare

    return enter


def files(place: Place, tree: str, most: int | None = None) -> list[str]:
    """Paths in the union of the regular files of a tree of the lower, directory by directory."""
    found: list[str] = []
    start = len(place.lower)
    for folder, folders, names in os.walk(os.path.join(place.lower, tree)):
        folders.sort()
        found += [f"{place.root}{folder[start:]}/{name}" for name in sorted(names)]
    return found[:most]


def folder(place: Place, name: str) -> str:
    """A new, empty directory in the union."""
    path = f"{place.root}/{name}"
    os.mkdir(path)
    return path


def in_processes(works: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """Processes that exist already when the clock starts, so that neither their making nor the
    interpreter's lock is measured. The call lets them go, and waits for all."""
    reading, writing = os.pipe()
    children = []
    for work in works:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(writing)
                if os.read(reading, 1):
                    work()
                    code = 0
            finally:
                os._exit(code)
        children.append(pid)
    os.close(reading)

    def go() -> None:
        os.write(writing, b"g" * len(children))
        os.close(writing)
        failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(children)} processes failed")

    return go
