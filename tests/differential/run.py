# SPDX-License-Identifier: GPL-2.0-or-later
"""The long differential run: `python -m tests.differential.run --seeds 20 --ops 2000`.

Each seed makes its own lowers (world.py), mounts, and drives the harness; on a difference the
operations so far are written to a replay file, made as short as possible with --shrink.
`--user` does the same as an ordinary user, in a process of that user.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from tests.differential import world
from tests.differential.generate import Generator, Known, Seeded
from tests.differential.harness import Harness
from tests.differential.operations import Op
from tests.differential.watchdog import Watchdog
from tests.rig import as_user, ground, layers, mounted, snapshot
from tests.rig.ground import Ground
from tests.rig.mounted import Backend

# Without metacopy: the kernel's gives a file a new mtime when the data follow.
OVERLAY = "redirect_dir=on,index=on,xino=on"
TREE_EVERY = 100
REMOUNT_EVERY = 500
_REDIRECT_MAX = Path("/sys/module/overlay/parameters/redirect_max")
RAISED = "4000"
_counter = itertools.count()


class Plan(NamedTuple):
    """One run: where, on what, and what to do (operations, or how many to invent)."""

    backend: Backend
    shape: world.Shape
    ops: Sequence[Op] | int
    options: tuple[str, ...] = ()


class Failure(NamedTuple):
    words: str
    ops: list[Op]

    def signature(self) -> tuple[str, ...]:
        """What makes two failures the same one: the last step and the kind of difference."""
        kinds = re.findall(r"error '\w+'|mtime|ctime|st_ino|xattrs|missing|group|died", self.words)
        return (self.ops[-1].name if self.ops else "", *sorted(set(kinds)))


class Runner:
    """Runs plans in one ground; each in directories of its own, removed if the run was good."""

    def __init__(self, base: Ground) -> None:
        self.base = base
        self.hung = base.base / "hung"
        self.watchdog = Watchdog(self.hung)
        base.later(self.watchdog.close)
        self.root = os.geteuid() == 0
        self._stores: dict[str, Path] = {}

    def store(self, kind: ground.Kind) -> Path:
        if not self.root:
            return self.base.base
        if kind not in self._stores:
            self._stores[kind] = self.base.filesystem(f"store-{kind}", kind)
        return self._stores[kind]

    def fresh(self, shape: world.Shape) -> Path:
        place = self.store(shape.filesystem) / f"run{next(_counter)}"
        place.mkdir()
        return place

    def run(self, plan: Plan) -> Failure | None:
        place = self.fresh(plan.shape)
        try:
            return self._run(plan, place)
        finally:
            self.base.remove(place)

    def _run(self, plan: Plan, place: Path) -> Failure | None:
        done: list[Op] = []
        lowers = world.build(place, plan.shape, root=self.root)
        if plan.shape.squashed:
            image = f"squashed{next(_counter)}"
            lowers[-1] = self.base.image(image, "squashfs", lowers[-1])
        control = place / "control"
        control.mkdir()
        layers.merge(lowers, control)
        frozen = [snapshot.take(lower) for lower in lowers]
        union = mounted.make(
            plan.backend, lowers, place, options=plan.options, workdir=plan.shape.workdir
        )
        if union.upper is not None:
            # A union's root is its upper's: give the empty one the look of the lower's.
            layers.copy_metadata(os.fsencode(control), os.fsencode(union.upper))
        try:
            union.mount()
            harness = Harness(union, control, self.watchdog)
            try:
                harness.check_tree()
                self._drive(plan, harness, done)
                harness.remount()
                harness.union.umount()
            finally:
                harness.subject.close()
                harness.control.close()
            for lower, want in zip(lowers, frozen, strict=True):
                snapshot.assert_same(snapshot.take(lower), want, f"{lower} changed")
        except (AssertionError, OSError) as error:
            self.watchdog.guard(0)
            union.abandon()
            words = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            if isinstance(union, mounted.Unionfs) and union.words():
                words += "\n  log: " + "\n  ".join(union.words()[-4000:].splitlines())
            if self.hung.exists():
                words += "\n  " + "\n  ".join(self.hung.read_text().splitlines()[:60])
                self.hung.unlink()
            return Failure(words, done)
        return None

    def _drive(self, plan: Plan, harness: Harness, done: list[Op]) -> None:
        if not isinstance(plan.ops, int):
            for op in plan.ops:
                done.append(op)
                harness.step(op)
            return
        known = Known()
        overlay = plan.backend == "overlay"
        # What a rotated upper's link counts hide is as unknowable as a lower's.
        links = not plan.shape.rotate
        generator = Generator(
            known,
            root=self.root,
            overlay=overlay,
            links=links,
            engine=harness.engine,
        )
        chooser = Seeded(plan.shape.seed)
        for number in range(1, plan.ops + 1):
            known.refresh(harness.control.root)
            op = generator.next(chooser)
            done.append(op)
            harness.step(op)
            special = None
            if number % REMOUNT_EVERY == 0:
                rotate = plan.shape.rotate and plan.backend != "plain"
                special = Op("rotate" if rotate else "remount")
            elif number % TREE_EVERY == 0:
                special = Op("check")
            if special is not None:
                done.append(special)
                harness.step(special)

    def shrink(self, plan: Plan, failure: Failure) -> Failure:
        """Leave out operations, in ever smaller pieces, as long as it fails in the same way."""
        piece = max(1, len(failure.ops) // 2)
        while True:
            at = 0
            while at < len(failure.ops):
                rest = failure.ops[:at] + failure.ops[at + piece :]
                again = self.run(plan._replace(ops=rest))
                if again is not None and again.signature() == failure.signature():
                    failure = again
                    print(f"  … {len(failure.ops)} operations", file=sys.stderr, flush=True)
                else:
                    at += piece
            if piece == 1:
                return failure
            piece = max(1, piece // 2)


def report(plan: Plan, failure: Failure, folder: Path) -> Path:
    who = "" if os.geteuid() == 0 else "-user"
    path = folder / f"differential-{plan.backend}-{plan.shape.seed}{who}.replay"
    lines = [f"# seed {plan.shape.seed}", *(op.line() for op in failure.ops)]
    path.write_text("\n".join(lines) + "\n")
    print(f"FAILED seed {plan.shape.seed} ({plan.shape}): {failure.words}")
    for op in failure.ops[-12:]:
        print(f"    {op}")
    print(f"  replay with: --replay {path}")
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--ops", type=int, default=2000)
    parser.add_argument("--backend", choices=("plain", "overlay", "unionfs"), default="unionfs")
    parser.add_argument("--user", action="store_true", help="as an ordinary user")
    parser.add_argument("-o", dest="options", default="", help="mount options")
    parser.add_argument("--filesystem", choices=ground.KINDS, help="one kind for all seeds")
    parser.add_argument("--replay", type=Path, help="do the operations of a replay file")
    parser.add_argument("--shrink", action="store_true", help="shorten what fails")
    parser.add_argument("--keep-going", action="store_true", help="try all seeds")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    return parser.parse_args(arguments)


def as_ordinary_user(arguments: Sequence[str]) -> int:
    why = as_user.why_impossible()
    if why:
        print(f"skipped: {why}")
        return 77
    words = [word for word in arguments if word != "--user"]
    done = as_user.python("-m", "tests.differential.run", *words, timeout=24 * 3600)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


@contextlib.contextmanager
def redirect_limit(backend: str) -> Iterator[None]:
    """Kernel overlayfs refuses (EXDEV) redirects beyond 256 bytes unless told otherwise."""
    if backend != "overlay" or not _REDIRECT_MAX.exists():
        yield
        return
    before = _REDIRECT_MAX.read_text()
    # Another run of ours may have raised it already: then the kernel's default is what was.
    before = "256" if before.strip() == RAISED else before
    _REDIRECT_MAX.write_text(RAISED)
    try:
        yield
    finally:
        _REDIRECT_MAX.write_text(before)


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    ground.isolate()
    if options.user and os.geteuid() == 0:
        return as_ordinary_user(given)
    bad = 0
    seeds = range(options.first, options.first + options.seeds)
    ops: Sequence[Op] | int = options.ops
    if options.replay:
        lines = options.replay.read_text().splitlines()
        seed = int(lines[0].split()[-1])
        seeds = range(seed, seed + 1)
        ops = [Op.parse(line) for line in lines[1:]]
    with redirect_limit(options.backend), Ground("unionfs-differential-") as base:
        runner = Runner(base)
        for seed in seeds:
            shape = world.Shape.of(seed, root=runner.root)
            if options.filesystem:
                shape = shape._replace(filesystem=options.filesystem)
            backend = cast(Backend, options.backend)
            # Kernel overlayfs has no ACLs on files that still lie in a squashfs.
            shape = shape._replace(squashed=False) if backend == "overlay" else shape
            words = options.options or (OVERLAY if backend == "overlay" else "")
            mount_options = tuple(filter(None, words.split(",")))
            plan = Plan(backend, shape, ops, mount_options)
            began = time.monotonic()
            failure = runner.run(plan)
            if failure is None:
                print(f"ok seed {seed} {shape} {time.monotonic() - began:.1f} s", flush=True)
                continue
            bad += 1
            if options.shrink:
                failure = runner.shrink(plan, failure)
            report(plan, failure, options.out)
            if not options.keep_going:
                break
        ground.reap([pid for pid in ground.children() if pid != runner.watchdog.pid])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
