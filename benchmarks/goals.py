# SPDX-License-Identifier: GPL-2.0-or-later
"""The goals, in one place, and whether medians meet them.

A goal is a ratio that may not be exceeded: to kernel overlayfs (which is mounted without metacopy)
or to the fastest FUSE union of others that was mounted by the same user.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from benchmarks.systems import OVERLAY, UNIONFS, UNIONFS_USER, System

When = Literal["", "passthrough", "kept", "reflink", "copy"]
Medians = Mapping[str, Mapping[str, float]]  # by system: by workload, microseconds


class Goal(NamedTuple):
    """`when`: only with FUSE passthrough, only without it (pages are kept); only where the ground
    has reflinks, only where a copy moves the data."""

    limit: float
    against: Literal["overlay", "peer"]
    workloads: tuple[str, ...]
    systems: tuple[str, ...] = (UNIONFS,)
    when: When = ""


class Verdict(NamedTuple):
    goal: Goal
    ratio: float

    @property
    def met(self) -> bool:
        return round(self.ratio, 2) <= self.goal.limit


BOTH = (UNIONFS, UNIONFS_USER)
PROCESSES = ("", ", 4 at once", ", 16 at once")
READ_FIRST = tuple(f"open-read-close, first{many}" for many in PROCESSES)
READ_AGAIN = tuple(f"open-read-close, again{many}" for many in PROCESSES)
DATA = (
    *("sequential read, first", "sequential read, again", "random read, again"),
    *("write and fsync", "random write"),
    *(
        f"fio {order} {verb}, {how}"
        for how in ("buffered", "O_DIRECT", "mmap")
        for order in ("sequential", "random")
        for verb in ("read", "write")
    ),
)
GOALS = (
    Goal(1.0, "peer", (), BOTH),
    Goal(
        0.6,
        "peer",
        (
            *("walk, fresh", *READ_FIRST, "unlink of lower files", "rm -rf of a new tree"),
            *("rm -rf of a lower tree", "unpack of a tar", "git clone and status"),
            "append to lower files",
        ),
    ),
    Goal(
        0.6,
        "peer",
        ("first write into a large lower file", "first write into a huge lower file"),
        when="reflink",
    ),
    Goal(0.8, "peer", ("create-write-close", "rename", "chmod of lower files")),
    Goal(0.9, "peer", ("missing names",)),
    Goal(1.15, "overlay", ("walk, again",)),
    Goal(1.15, "overlay", DATA, when="passthrough"),
    Goal(
        2.0,
        "overlay",
        (
            *("create-write-close", "unpack of a tar", "git clone and status"),
            *("dpkg -i", "pip install"),
        ),
    ),
    Goal(3.5, "overlay", READ_AGAIN, when="passthrough"),
    Goal(2.5, "overlay", READ_AGAIN, BOTH, when="kept"),
    Goal(
        0.05, "overlay", ("chmod of large lower files", "chown of large lower files"), when="copy"
    ),
    Goal(1.3, "overlay", ("sequential read, again", "random read, again"), (UNIONFS_USER,)),
    Goal(4.0, "overlay", ("sequential read, first",), (UNIONFS_USER,)),
    Goal(2.5, "overlay", ("write and fsync",), (UNIONFS_USER,)),
)


def ratios(
    workload: str, system: System, systems: Mapping[str, System], medians: Medians
) -> dict[str, float]:
    """To "overlay" and to the fastest "peer", where both have been measured."""
    mine = medians[system.name].get(workload)
    if mine is None:
        return {}
    found = {}
    if overlay := medians.get(OVERLAY, {}).get(workload):
        found["overlay"] = mine / overlay
    peers = [
        medians[other.name][workload]
        for other in systems.values()
        if other.peer and other.user == system.user and workload in medians[other.name]
    ]
    if peers:
        found["peer"] = mine / min(peers)
    return found


def verdicts(
    workload: str, system: str, found: Mapping[str, float], *, passthrough: bool, reflink: bool
) -> Iterator[Verdict]:
    """The goals that this workload has here, the loosest against the same system left out."""
    here = {
        "": True,
        "passthrough": passthrough,
        "kept": not passthrough,
        "reflink": reflink,
        "copy": not reflink,
    }
    tightest: dict[str, Goal] = {}
    for goal in GOALS:
        if (
            system.partition(":")[0] not in goal.systems
            or not here[goal.when]
            or goal.against not in found
        ):
            continue
        if goal.workloads and workload not in goal.workloads:
            continue
        if goal.against not in tightest or goal.limit < tightest[goal.against].limit:
            tightest[goal.against] = goal
    for against, goal in tightest.items():
        yield Verdict(goal, found[against])
