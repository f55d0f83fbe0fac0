# SPDX-License-Identifier: GPL-2.0-or-later
"""What came out, for people and for programs: Markdown tables, JSON, and a part of a document."""

from __future__ import annotations

import os
import platform
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import goals, rounds
from benchmarks.requests import Requests
from benchmarks.rounds import Facts, Results
from benchmarks.systems import System
from benchmarks.workloads import WORKLOADS


class Run(NamedTuple):
    """Everything of one run."""

    ground: str
    rounds: int
    command: str
    systems: dict[str, System]
    results: Results
    facts: Facts

    @property
    def workloads(self) -> list[str]:
        return list(next(iter(self.results.values())))

    def medians(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for system, by_workload in self.results.items():
            found[system] = {}
            for workload, told in by_workload.items():
                times = [each["microseconds"] for each in told if "microseconds" in each]
                if times:
                    found[system][workload] = statistics.median(times)
        return found

    def requests(self, system: str, workload: str) -> tuple[Requests, int]:
        """Those of the last round, and how many operations they were for."""
        for told in reversed(self.results[system][workload]):
            if "requests" in told:
                return told["requests"], told["count"]
        return {}, 0

    def passthrough(self, system: str) -> bool:
        return bool(self.facts.get(system, {}).get("features", {}).get("passthrough"))

    def verdicts(self, workload: str, system: str) -> list[goals.Verdict]:
        found = goals.ratios(workload, self.systems[system], self.systems, self.medians())
        return list(
            goals.verdicts(
                workload,
                system,
                found,
                passthrough=self.passthrough(system),
                reflink=self.ground == "xfs",
            )
        )


def machine() -> dict[str, str]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    release = re.match(r"[0-9.]+", platform.release())
    return {
        "kernel": f"Linux {release.group() if release else platform.release()}",
        "cpu": cpu.group(1).strip() if cpu else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "python": platform.python_version(),
    }


def command(*words: str) -> str:
    """As it was called, but for where programs and files lie on this machine."""
    return shlex.join(os.path.basename(word) if word.startswith("/") else word for word in words)


def to_json(run: Run) -> dict[str, Any]:
    return {
        "machine": machine(),
        "ground": run.ground,
        "rounds": run.rounds,
        "command": run.command,
        "medians": run.medians(),
        "results": run.results,
        "facts": run.facts,
    }


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(cells: Sequence[str]) -> Iterator[str]:
    yield _row(cells)
    yield "|---|" + "---:|" * (len(cells) - 1)


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def times(run: Run) -> Iterator[str]:
    """Medians in microseconds."""
    medians = run.medians()
    yield from _head(["µs", "one", *run.systems])
    for name in run.workloads:
        cells = [medians[system].get(name) for system in run.systems]
        shown = [_number(cell) if cell is not None else "" for cell in cells]
        yield _row([name, WORKLOADS[name].unit, *shown])


def _verdict(verdict: goals.Verdict) -> str:
    text = f"{verdict.ratio:.2f} of {verdict.goal.limit:g} {verdict.goal.against}"
    return text if verdict.met else f"**{text}**"


def ratios(run: Run) -> Iterator[str]:
    """Ours to kernel overlayfs and to the fastest peer; goals, those missed in bold."""
    ours = [system for system in run.systems.values() if system.ours]
    titles = ["overlay", "fastest FUSE peer", "goals"]
    yield from _head(["", *(f"{each.name}: {title}" for each in ours for title in titles)])
    medians = run.medians()
    for name in run.workloads:
        cells = [name]
        for system in ours:
            found = goals.ratios(name, system, run.systems, medians)
            cells += [f"{found[key]:.2f}" if key in found else "" for key in ("overlay", "peer")]
            cells.append("; ".join(_verdict(each) for each in run.verdicts(name, system.name)))
        yield _row(cells)


def summary(run: Run) -> Iterator[str]:
    for system in run.systems:
        found = [each for name in run.workloads for each in run.verdicts(name, system)]
        if found:
            met = sum(each.met for each in found)
            yield f"{system} meets {met} of {len(found)} goals."


def requests(run: Run) -> Iterator[str]:
    """Requests an operation: all; by who answered; by kind."""
    counted = [
        system for system in run.systems if any(run.requests(system, n)[1] for n in run.workloads)
    ]
    if not counted:
        return
    titles = ("requests", "of them by Python", "kinds")
    yield from _head(
        ["an operation", *(f"{each}: {title}" for each in counted for title in titles)]
    )
    for name in run.workloads:
        cells = [name]
        for system in counted:
            told, count = run.requests(system, name)
            cells += _shares(told, count) if count else ["", "", ""]
        yield _row(cells)


def _shares(told: Requests, count: int) -> list[str]:
    kinds: Counter[str] = Counter()
    for each in told.values():
        kinds.update(each)
    python = sum(told.get("python", {}).values())
    shown = [
        f"{kind} {number / count:.2f}"
        for kind, number in kinds.most_common()
        if number / count >= 0.005
    ]
    return [f"{sum(kinds.values()) / count:.2f}", f"{python / count:.2f}", ", ".join(shown)]


def troubles(run: Run, kind: str) -> Iterator[str]:
    for reason, where in rounds.troubles(run.results, kind).items():
        by_workload: dict[str, list[str]] = {}
        for system, workload in sorted(where):
            by_workload.setdefault(workload, []).append(system)
        for workload, systems in by_workload.items():
            names = "all" if len(systems) == len(run.systems) else ", ".join(systems)
            yield f"- {workload} ({names}): {kind}: {reason}"


def markdown(run: Run) -> str:
    """One ground's part of the document."""
    told = machine()
    lines = [
        f"{told['kernel']}, {told['cores']} cores of {told['cpu']}, {told['memory']}; "
        f"{run.rounds} rounds on {run.ground}: `{run.command}`.",
        "",
    ]
    for system, facts in run.facts.items():
        if "driver" in facts:
            lines.append(f"- {system}: {_what(facts)}")
    lines += ["", *times(run), "", *ratios(run), "", *summary(run), "", *requests(run)]
    missing = [*troubles(run, "skipped"), *troubles(run, "failed")]
    return "\n".join([*lines, *([""] if missing else []), *missing])


def _what(facts: Mapping[str, Any]) -> str:
    reason = facts.get("reasons", {}).get("passthrough", "")
    passes = facts.get("features", {}).get("passthrough")
    return f"driver {facts.get('driver')}, " + (
        "FUSE passthrough" if passes else f"no FUSE passthrough ({reason})"
    )


def legend() -> str:
    """What each workload does."""
    lines = [*_head(["workload", "one operation", "what is done"])]
    lines[1] = "|---|---|---|"
    lines += [_row([each.name, each.unit, each.words]) for each in WORKLOADS.values()]
    return "\n".join(lines)


def insert(document: str, part: str, text: str) -> str:
    """The document with this part written anew; ValueError if it has no such part."""
    begin, end = f"<!-- {part}: begin -->\n", f"<!-- {part}: end -->"
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"has no part {part!r} ({begin.strip()} … {end})")
    return f"{before}{begin}{text}\n{end}{after}"
