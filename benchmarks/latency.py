# SPDX-License-Identifier: GPL-2.0-or-later
"""`benchmarks/run latency`: how long others wait while one large file is copied up.

One process looks up names that are not there and opens, reads and closes small files, as fast as it
gets answers; first by itself, then while another writes the first byte into a large file of the
lower. The 99th percentiles are compared. As the client of a union it is `--client ROOT`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import lower, report, rounds, systems
from benchmarks.rounds import Scene
from benchmarks.systems import System
from benchmarks.workload import DEFAULT, GIB, MIB
from tests.rig import as_user, ground
from tests.rig.ground import Ground

FILES = 500
PAIRS = 5000  # lookups and reads, when nothing else happens
LIMIT = 2.0
KINDS = ("lookup", "small read")
Figures = dict[str, float]  # by kind and state: microseconds; and "seconds" of the copy-up


class Reader:
    """Asks and remembers how long each answer took."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._names = 0
        self._files = [f"{root}/small/f{number}" for number in range(FILES)]
        self._buffers = [bytearray(4096)]

    def pair(self, waits: tuple[list[int], list[int]]) -> None:
        self._names += 1
        missing = f"{self._root}/small/none{self._names}"
        path = self._files[self._names % FILES]
        began = time.perf_counter_ns()
        os.path.lexists(missing)
        between = time.perf_counter_ns()
        fd = os.open(path, os.O_RDONLY)
        os.preadv(fd, self._buffers, 0)
        os.close(fd)
        ended = time.perf_counter_ns()
        waits[0].append(between - began)
        waits[1].append(ended - between)


def percentiles(waits: tuple[list[int], list[int]], state: str) -> Iterator[tuple[str, float]]:
    for kind, taken in zip(KINDS, waits, strict=True):
        yield f"{kind}, {state}", statistics.quantiles(taken, n=100)[98] / 1000


def client(root: str) -> Figures:
    reader = Reader(root)
    for _ in range(FILES):
        reader.pair(([], []))
    idle: tuple[list[int], list[int]] = [], []
    for _ in range(PAIRS):
        reader.pair(idle)
    found = dict(percentiles(idle, "idle"))
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        fd = os.open(f"{root}/big", os.O_WRONLY)
        os.pwrite(fd, b"x", 0)
        os._exit(0)
    busy: tuple[list[int], list[int]] = [], []
    while len(busy[0]) % 20 or os.waitpid(pid, os.WNOHANG)[0] == 0:
        reader.pair(busy)
    found["seconds"] = time.perf_counter() - began
    found["pairs"] = len(busy[0])
    return found | dict(percentiles(busy, "busy"))


def fill(scene: Scene, size: int) -> None:
    (scene.lower / "small").mkdir(parents=True)
    for number in range(FILES):
        (scene.lower / "small" / f"f{number}").write_bytes(b"x" * 4096)
    lower.fill(scene.lower / "big", size)
    if os.geteuid() == 0:
        lower.give(scene.lower, as_user.UID, as_user.GID)


def measure(scene: Scene, system: System) -> Figures:
    with rounds.mounted(scene, system) as root:
        words = [sys.executable, "-m", "benchmarks.latency", "--client", str(root)]
        done = subprocess.run(
            system.command(words),
            stdout=subprocess.PIPE,
            cwd=as_user.PROJECT,
            env=as_user.environment(),
            timeout=rounds.PATIENCE,
            check=True,
        )
    return dict(json.loads(done.stdout))


def table(found: dict[str, list[Figures]], size: int) -> Iterator[str]:
    """Medians of the rounds; ratios beyond the goal in bold."""
    yield (
        f"| p99 in µs, copy-up of {size / GIB:g} GiB | "
        + " | ".join(
            f"{kind}: {title}" for kind in KINDS for title in ("idle", "meanwhile", "ratio")
        )
        + " | copy-up, s |"
    )
    yield "|---|" + "---:|" * 7
    for name, told in found.items():
        cells = []
        for kind in KINDS:
            idle, busy = (
                statistics.median(each[f"{kind}, {state}"] for each in told)
                for state in ("idle", "busy")
            )
            ratio = f"{busy / idle:.1f}"
            cells += [
                f"{idle:.0f}",
                f"{busy:.0f}",
                ratio if busy / idle <= LIMIT else f"**{ratio}**",
            ]
        cells.append(f"{statistics.median(each['seconds'] for each in told):.1f}")
        yield f"| {name} | " + " | ".join(cells) + " |"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run latency",
        description="The 99th percentile of lookups and small reads, when nothing else happens and "
        "while a large file is copied up without reflink.",
    )
    parser.add_argument("--client", help=argparse.SUPPRESS)
    # xfs has reflinks: the copy would be over before anything is measured.
    parser.add_argument("--ground", choices=("tmpfs", "ext4"), default="tmpfs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=2048, metavar="MIB", help="of the large file")
    parser.add_argument("--system", action="append", metavar="NAME", help="only this, or these")
    parser.add_argument("--fuse-overlayfs", action="append", default=[], metavar="PROGRAM")
    parser.add_argument("--write", type=Path, metavar="FILE", help="into this document")
    return parser.parse_args(arguments)


def main() -> int:
    given = parse(sys.argv[1:])
    if given.client:
        print(json.dumps(client(given.client)))
        return 0
    ground.isolate()
    chosen = systems.choose(given.system, given.fuse_overlayfs, [])
    chosen.pop(systems.PLAIN, None)  # there is nothing to copy up
    found: dict[str, list[Figures]] = {name: [] for name in chosen}
    size = given.size * MIB
    with as_user.fuse_for_all(), Ground("unionfs-benchmark-") as base:
        top = base.directory("ground")
        if os.geteuid() == 0:
            top = base.filesystem("layers", given.ground, 3 * given.size + 1024)
        scene = Scene(top, DEFAULT)
        fill(scene, size)
        for number in range(given.rounds):
            for name, system in chosen.items():
                print(f"round {number + 1}: {name}", file=sys.stderr)
                found[name].append(measure(scene, system))
    command = report.command("benchmarks/run", "latency", *sys.argv[1:])
    told = report.machine()
    lines = [
        f"{told['kernel']}, {told['cores']} cores of {told['cpu']}; {given.rounds} rounds on "
        f"{given.ground}: `{command}`.",
        "",
        *table(found, size),
    ]
    print(*lines, sep="\n")
    if given.write:
        document = report.insert(given.write.read_text(), "latency", "\n".join(lines))
        given.write.write_text(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
