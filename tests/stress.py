# SPDX-License-Identifier: GPL-2.0-or-later
"""The long stress: `tools/stress --minutes 10`, and a short one in test_storm.py.

Several processes use one union at once. Each does the operations of the differential test in a
directory of its own, compared step by step with its own plain directory, and between them changes
names that all of them share. In the end, and after a remount, the whole must still be what the
plain directories are, and the shared part what it was.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
import traceback
from multiprocessing.context import ForkProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import NamedTuple

from tests.differential import world
from tests.differential.generate import Generator, Known, Seeded
from tests.differential.harness import Harness, open_to_owner
from tests.differential.operations import Op
from tests.differential.watchdog import Watchdog
from tests.rig import as_user, ground, layers, mounted, storm
from tests.rig.ground import Ground, Kind

LAYERS = 2
SHARED = "shared"
BURST = 25
TREE_EVERY = 20  # bursts
PATIENCE = 120.0
_context = multiprocessing.get_context("fork")


class Plan(NamedTuple):
    seconds: float
    processes: int = 8
    seed: int = 0
    options: tuple[str, ...] = ()


class Part:
    """One process's share: its directory in the union and in the plain tree."""

    def __init__(self, union: mounted.Mounted, control: Path, seed: int, name: str) -> None:
        self.seed = seed
        self.shared = union.mnt / SHARED
        # The harness is told of a plain directory: mounting is not its business here.
        subject = mounted.Plain([], None, union.mnt / name)
        self.harness = Harness(subject, control / name)
        self.done: list[Op] = []

    def work(self, end: float, steps: Synchronized[int], wrong: multiprocessing.Queue[str]) -> None:
        try:
            self._work(end, steps, wrong)
        except BaseException as error:
            words = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            last = "".join(f"\n    {op}" for op in self.done[-12:])
            wrong.put(f"process {self.seed}: {words}{last}")

    def _work(
        self, end: float, steps: Synchronized[int], wrong: multiprocessing.Queue[str]
    ) -> None:
        os.chdir(self.shared)
        rng, chooser = random.Random(self.seed), Seeded(self.seed)
        generator = Generator(
            Known(), root=os.geteuid() == 0, overlay=False, engine=self.harness.engine
        )
        bursts = 0
        while time.monotonic() < end:
            for _ in range(BURST):
                generator.known.refresh(self.harness.control.root)
                self.done.append(generator.next(chooser))
                self.harness.step(self.done[-1])
                if words := storm.try_change(rng):
                    wrong.put(f"process {self.seed}, in {SHARED}: {words}")
                    return
            bursts += 1
            if bursts % TREE_EVERY == 0:
                self.harness.check_tree()
            with steps.get_lock():
                steps.value += 2 * BURST
        self.harness.check_tree()


def _build(place: Path, plan: Plan, names: list[str]) -> list[Path]:
    """Layers that hold a world for each process, and what all share."""
    lowers = [place / f"layer{number}" for number in range(LAYERS)]
    for path in lowers:
        path.mkdir()
    for number, name in enumerate(names):
        room = place / "room"
        room.mkdir()
        shape = world.Shape(plan.seed + number, "ext4", LAYERS, False, False, False)
        for made, lower in zip(
            world.build(room, shape, root=os.geteuid() == 0), lowers, strict=True
        ):
            made.rename(lower / name)
        room.rmdir()
    (lowers[-1] / SHARED).mkdir()
    storm.fill(lowers[-1] / SHARED)
    return lowers


def run(place: Path, plan: Plan, *, loud: bool = False) -> list[str]:
    """What went wrong, in words; `place` is an empty directory on the file system to be used."""
    names = [f"p{number}" for number in range(plan.processes)]
    lowers = _build(place, plan, names)
    control = place / "control"
    control.mkdir()
    layers.merge(lowers, control)
    report = place / "hung"
    union = mounted.make("unionfs", lowers, place, options=plan.options)
    assert isinstance(union, mounted.Unionfs)
    with Watchdog(report, PATIENCE) as watchdog:
        union.mount()
        watchdog.guard(union.pid)
        try:
            found = _use(union, control, plan, names, watchdog, loud=loud)
            if not found:
                watchdog.guard(0)
                union.umount()
        except (AssertionError, OSError):
            found = [traceback.format_exc()]
        if found:
            watchdog.guard(0)
            union.abandon()
            found += [union.words()] if union.words() else []
            found += [report.read_text()] if report.exists() else []
        return found


def _use(
    union: mounted.Unionfs,
    control: Path,
    plan: Plan,
    names: list[str],
    watchdog: Watchdog,
    *,
    loud: bool,
) -> list[str]:
    parts = [Part(union, control, plan.seed + number, name) for number, name in enumerate(names)]
    for part in parts:
        part.harness.check_tree()
    wrong: multiprocessing.Queue[str] = _context.Queue()
    steps: Synchronized[int] = _context.Value("q", 0)
    end = time.monotonic() + plan.seconds
    processes = [_context.Process(target=part.work, args=(end, steps, wrong)) for part in parts]
    for process in processes:
        process.start()
    found = _wait(processes, steps, wrong, watchdog, loud=loud)
    if found:
        return found
    assert union.upper is not None
    left = [name for name in os.listdir(union.upper / ".unionfs/work") if name != "incompat"]
    assert not left, f"left in the work directory: {left}"
    if os.geteuid() != 0:
        open_to_owner(os.fsencode(union.mnt / SHARED))
    shared = storm.tree(union.mnt / SHARED)
    storm.check_links(shared)
    watchdog.guard(0)
    union.remount()
    watchdog.guard(union.pid)
    for part in parts:
        part.harness.check_tree()
        watchdog.feed()
    assert storm.tree(union.mnt / SHARED) == shared, "the shared part has changed"
    return []


def _wait(
    processes: list[ForkProcess],
    steps: Synchronized[int],
    wrong: multiprocessing.Queue[str],
    watchdog: Watchdog,
    *,
    loud: bool,
) -> list[str]:
    """Feeds the watchdog as long as there is progress; ends all when one has failed."""
    found: list[str] = []
    seen, said = -1, time.monotonic()
    while any(process.is_alive() for process in processes):
        for process in processes:
            process.join(0.2)
        while not wrong.empty():
            found.append(wrong.get())
        if found:
            for process in processes:
                process.terminate()
        if steps.value != seen:
            seen = steps.value
            watchdog.feed()
        if loud and time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"{seen} steps", flush=True)
    while not wrong.empty():
        found.append(wrong.get())
    codes = [process.exitcode for process in processes]
    if not found and any(codes):
        found.append(f"exit codes {codes}")
    if loud:
        print(f"{steps.value} steps by {len(processes)} processes", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/stress", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--filesystem", choices=ground.KINDS, default="tmpfs")
    parser.add_argument("--user", action="store_true", help="as an ordinary user")
    parser.add_argument("-o", dest="options", default="", help="mount options")
    given = parser.parse_args()
    ground.isolate()
    if given.user and os.geteuid() == 0:
        if why := as_user.why_impossible():
            print(f"skipped: {why}")
            return 77
        words = [word for word in sys.argv[1:] if word != "--user"]
        done = as_user.python("-m", "tests.stress", *words, timeout=given.minutes * 60 + 1800)
        print(done.stdout + done.stderr)
        return done.returncode
    options = tuple(filter(None, given.options.split(",")))
    plan = Plan(given.minutes * 60, given.processes, given.seed, options)
    with Ground("unionfs-stress-") as base:
        kind: Kind = given.filesystem
        root = os.geteuid() == 0
        found = run(base.filesystem("store", kind, 8192) if root else base.base, plan, loud=True)
    print("\n".join(found) if found else "nothing differs")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
