# SPDX-License-Identifier: GPL-2.0-or-later
"""`benchmarks/run`: all systems in turns, round by round, over one lower; medians and ratios."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import plots, report, rounds, systems
from benchmarks.report import Run
from benchmarks.rounds import Scene
from benchmarks.workload import DEFAULT, GIB, MIB, QUICK
from benchmarks.workloads import WORKLOADS
from tests.rig import as_user, ground
from tests.rig.ground import Ground

GROUNDS = ("tmpfs", "ext4", "xfs")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run",
        description="Time workloads on the unions found here, each on a fresh upper over the same "
        "lower, in turns. Microseconds an operation, medians of the rounds, as a Markdown table.",
    )
    add = parser.add_argument
    add("--ground", choices=GROUNDS, help="what all layers lie on (tmpfs); only as root")
    add("--rounds", type=int, metavar="N", help="5; with --quick 1")
    add("--quick", action="store_true", help="smaller data: does everything run?")
    add("--large", action="store_true", help="also the first write into a file of 4 GiB")
    add("--workload", action="append", metavar="NAME", help="only this, or these")
    add("--system", action="append", metavar="NAME", help="only this, or these")
    add("--list", action="store_true", help="name the workloads and the systems found, and end")
    add("-o", dest="options", action="append", default=[], metavar="OPTIONS",
        help="one more system: unionfs with these mount options")  # fmt: skip
    add("--fuse-overlayfs", action="append", default=[], metavar="PROGRAM",
        help="one more system: this build of it")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write what every round gave there")
    add("--plots", metavar="STEM", help="draw STEM-times.png and STEM-requests.png")
    add("--write", type=Path, metavar="FILE",
        help="put the tables into the ground's part of a document, plots beside it")  # fmt: skip
    given = parser.parse_args()
    root = os.geteuid() == 0
    if not root and (given.ground or given.write):
        parser.error("--ground and --write: only as root")
    given.ground = given.ground or ("tmpfs" if root else tempfile.gettempdir())
    given.rounds = given.rounds or (1 if given.quick else 5)
    for path in (given.json, given.write, given.plots and Path(given.plots)):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no such directory")
    for name in given.workload or ():
        if name not in WORKLOADS:
            parser.error(f"--workload {name!r}: no such workload; --list names them")
    return given


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[int, str, str], None]]:
    """A bar on a terminal, by tqdm where it is installed; else a line for each turn."""
    bar = _bar(steps)
    last = [""]

    def line(number: int, system: str, _workload: str) -> None:
        turn = f"round {number + 1}: {system}"
        if turn != last[0]:
            last[0] = turn
            print(turn, file=sys.stderr)

    def advance(number: int, system: str, workload: str) -> None:
        bar.set_description(f"round {number + 1}, {system}, {workload}", refresh=False)
        bar.update()

    if bar is None:
        yield line
    else:
        with bar:
            yield advance


def _bar(steps: int) -> Any:  # noqa: ANN401
    """tqdm's, which has no types; None where it cannot be shown."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=steps, unit="", mininterval=1, dynamic_ncols=True)


@contextlib.contextmanager
def scene(given: argparse.Namespace) -> Iterator[Scene]:
    """The lower and the store on the ground; all of it is taken down at the end."""
    sizes = QUICK if given.quick else DEFAULT
    sizes = sizes._replace(huge=4 * GIB if given.large else 0)
    with as_user.fuse_for_all(), Ground("unionfs-benchmark-") as base:
        if os.geteuid() == 0:
            # Twice what the lower has (the plain directory's copy), and as much for changes.
            needed = 4 * (sizes.first_write + sizes.huge + 8 * sizes.large) // MIB + 4096
            top = base.filesystem("ground", given.ground, needed)
        else:
            top = base.directory("ground")
        made = Scene(top, sizes)
        made.fill()
        yield made


def deliver(run: Run, given: argparse.Namespace) -> None:
    text = report.markdown(run)
    print(text)
    if given.json:
        given.json.write_text(json.dumps(report.to_json(run), indent=1))
    stem = given.plots or (
        given.write and given.write.with_name(f"{given.write.stem}-{run.ground}")
    )
    pictures = []
    if stem and plots.possible():
        pictures = plots.write(run, str(stem))
    elif stem:
        print(plots.WHY_NOT, file=sys.stderr)
    if given.write:
        shown = "".join(f"\n\n![{path.stem}]({path.name})" for path in pictures)
        document = given.write.read_text()
        document = report.insert(document, "workloads", report.legend())
        given.write.write_text(report.insert(document, run.ground, text + shown))


def main() -> int:
    ground.isolate()
    given = parse()
    chosen = systems.choose(given.system, given.fuse_overlayfs, given.options)
    workloads = [name for name in WORKLOADS if name in (given.workload or WORKLOADS)]
    if given.list:
        print(*chosen, "", *workloads, sep="\n")
        return 0
    if given.write:
        for part in ("workloads", given.ground):
            try:
                report.insert(given.write.read_text(), part, "")
            except (OSError, ValueError) as error:
                sys.exit(f"benchmarks/run: --write {given.write}: {error}")
    with (
        scene(given) as made,
        progress(given.rounds * len(chosen) * len(workloads)) as tell,
    ):
        results, facts = rounds.run(made, list(chosen.values()), workloads, given.rounds, tell)
    command = report.command("benchmarks/run", *sys.argv[1:])
    run = Run(given.ground, given.rounds, command, chosen, results, facts)
    deliver(run, given)
    failed = rounds.troubles(results, "failed").values()
    return int(any(chosen[system].ours for where in failed for system, _ in where))


if __name__ == "__main__":
    sys.exit(main())
