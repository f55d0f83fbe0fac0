# SPDX-License-Identifier: GPL-2.0-or-later
"""The rounds: each system in its turn on a fresh upper, its client started, asked and ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

from benchmarks import lower, systems
from benchmarks.client import Result
from benchmarks.systems import Layers, System
from benchmarks.workload import Place, Sizes
from tests.rig import as_user, ground

PATIENCE = 300.0
Results = dict[str, dict[str, list[Result]]]  # by system: by workload, one a round
Facts = dict[str, dict[str, Any]]  # what a union of ours tells of itself, by system


class Scene(NamedTuple):
    """What all turns share: a directory on the ground, with `lower` and `store` filled."""

    base: Path
    sizes: Sizes

    @property
    def lower(self) -> Path:
        return self.base / "lower"

    @property
    def store(self) -> Path:
        return self.base / "store"

    def fill(self) -> None:
        for name in ("lower", "store", "tmp"):
            (self.base / name).mkdir()
        lower.make_store(self.store, self.sizes)
        lower.make_lower(self.lower, self.sizes)
        if os.geteuid() == 0:
            (self.base / "tmp").chmod(0o1777)
            lower.give(self.store, as_user.UID, as_user.GID)

    def give_lower(self, system: System) -> None:
        """To whoever mounts it: a system's files are root's, a user's are his own. All of it is in
        memory then: overlayfs lets fio drop pages of the lower; the next would have to pay."""
        if os.geteuid() == 0:
            lower.give(self.lower, *((as_user.UID, as_user.GID) if system.user else (0, 0)))
        lower.warm(self.lower)


class Client:
    """benchmarks.client in a process of its own; killed if it does not answer."""

    def __init__(self, scene: Scene, system: System, root: Path) -> None:
        place = Place(str(root), str(scene.lower), str(scene.store), scene.sizes)
        words = [sys.executable, "-m", "benchmarks.client", json.dumps(place._asdict())]
        home = {"HOME": str(scene.base / "tmp"), "TMPDIR": str(scene.base / "tmp")}
        self._process = subprocess.Popen(
            system.command(words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=as_user.PROJECT,
            env=as_user.environment() | home,
        )
        self.facts: dict[str, Any] = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.stdout.close()

    def ask(self, workload: str) -> Result:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{workload}\n".encode())
            self._process.stdin.flush()
        except OSError:
            return {"failed": "the client has ended"}
        return cast(Result, self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            self._process.kill()
            return {"failed": f"no answer in {PATIENCE:.0f} s"}
        line = self._process.stdout.readline()
        return dict(json.loads(line)) if line else {"failed": "the client has ended"}


@contextlib.contextmanager
def mounted(scene: Scene, system: System) -> Iterator[Path]:
    """Nothing of it is left afterwards, whatever happened."""
    here = scene.base / "turn"
    at = Layers(scene.lower, here / "upper", here / "work", here / "mnt")
    here.mkdir()
    scene.give_lower(system)
    try:
        if system.mount is None:
            subprocess.run(["cp", "-a", "--reflink=auto", at.lower, at.mnt], check=True)
        else:
            for path in at[1:]:
                path.mkdir()
                if system.user and os.geteuid() == 0:
                    os.chown(path, as_user.UID, as_user.GID)
            systems.call(system.command(system.mount(at)))
        # What was prepared is on the disk: nobody's turn pays for another's.
        subprocess.run(["sync", "-f", here], check=True)
        yield at.mnt
    finally:
        if ground.mounts_below(at.mnt):
            try:
                systems.call(system.command(system.umount(at)))
            except RuntimeError:
                # A mount that is busy or whose daemon has died: the cause is told elsewhere.
                for tool in (["umount", "-l"], ["fusermount3", "-u", "-z"]):
                    subprocess.run([*tool, at.mnt], capture_output=True, check=False)
        shutil.rmtree(here)


def run(
    scene: Scene,
    chosen: Sequence[System],
    workloads: Sequence[str],
    rounds: int,
    tell: Callable[[int, str, str], None],
) -> tuple[Results, Facts]:
    """All rounds; `tell` is called with round, system and workload before each is done."""
    results: Results = {system.name: {name: [] for name in workloads} for system in chosen}
    facts: Facts = {}
    for number in range(rounds):
        # Each goes first once: what a turn leaves behind meets another system in each round.
        first = number % len(chosen)
        for system in [*chosen[first:], *chosen[:first]]:
            found = results[system.name]
            try:
                with mounted(scene, system) as root, Client(scene, system, root) as client:
                    facts.setdefault(system.name, client.facts)
                    for name in workloads:
                        tell(number, system.name, name)
                        found[name].append(client.ask(name))
            except RuntimeError as error:
                for name in workloads:
                    if len(found[name]) <= number:
                        found[name].append({"failed": str(error).replace(str(scene.base), "BASE")})
    return results, facts


def troubles(results: Results, kind: str) -> Mapping[str, set[tuple[str, str]]]:
    """Why there is nothing in the table: by reason, the systems and workloads it is true of."""
    found: dict[str, set[tuple[str, str]]] = {}
    for system, by_workload in results.items():
        for workload, told in by_workload.items():
            for result in told:
                if reason := str(result.get(kind, "")):
                    found.setdefault(reason, set()).add((system, workload))
    return found
