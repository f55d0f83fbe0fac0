# SPDX-License-Identifier: GPL-2.0-or-later
"""`benchmarks/run`: all systems in turns, round by round, over one lower; medians and ratios."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import systems, workloads
from benchmarks.systems import SYSTEMS, Layers

Times = dict[str, list[list[float]]]  # by system: by workload, one a round, microseconds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run",
        description="Time file operations on the unions found here, each on a fresh upper over the "
        "same lower, in turns. Microseconds an operation (a MiB), medians of the rounds.",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--system", action="append", choices=SYSTEMS, help="may be repeated")
    parser.add_argument("--place", type=Path, default=Path("/dev/shm"), help="where the layers lie")
    parser.add_argument("--json", type=Path, help="write the figures of every round there")
    return parser.parse_args()


@contextlib.contextmanager
def mounted(name: str, place: Path, lower: Path) -> Iterator[Path]:
    """A union of this kind on a fresh upper; nothing of it is left afterwards."""
    here = place / name
    layers = Layers(lower, here / "upper", here / "work", here / "mnt")
    for path in layers[1:]:
        path.mkdir(parents=True)
    systems.call(SYSTEMS[name].mount(layers))
    try:
        yield layers.mnt
    finally:
        systems.call(SYSTEMS[name].umount(layers))
        shutil.rmtree(here)


def time_round(root: Path) -> list[float]:
    found = []
    for workload in workloads.WORKLOADS.values():
        began = time.perf_counter()
        count = workload(root)
        found.append((time.perf_counter() - began) / count * 1e6)
    return found


def table(names: list[str], times: Times) -> Iterator[str]:
    """Markdown: a row for each workload; in brackets the ratio to the first system."""
    yield "| µs | " + " | ".join(names) + " |"
    yield "|---|" + "---:|" * len(names)
    for row, workload in enumerate(workloads.WORKLOADS):
        medians = [statistics.median(times[name][row]) for name in names]
        cells = [f"{medians[0]:.1f}"]
        cells += [f"{each:.1f} ({each / medians[0]:.2f})" for each in medians[1:]]
        yield f"| {workload} | " + " | ".join(cells) + " |"


def main() -> int:
    options = parse()
    names = options.system or systems.found()
    times: Times = {name: [[] for _ in workloads.WORKLOADS] for name in names}
    with tempfile.TemporaryDirectory(prefix="unionfs-benchmark-", dir=options.place) as base:
        lower = Path(base) / "lower"
        lower.mkdir()
        workloads.make_lower(lower)
        for turn in range(options.rounds):
            for name in names:
                print(f"round {turn + 1} of {options.rounds}: {name}", file=sys.stderr)
                with mounted(name, Path(base), lower) as root:
                    for row, taken in zip(times[name], time_round(root), strict=True):
                        row.append(taken)
    machine = f"Linux {platform.release()}, layers in {options.place}, {options.rounds} rounds"
    print(machine, "", *table(names, times), sep="\n")
    if options.json:
        figures = {name: dict(zip(workloads.WORKLOADS, times[name], strict=True)) for name in names}
        options.json.write_text(json.dumps({"machine": machine, "times": figures}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
