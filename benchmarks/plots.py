# SPDX-License-Identifier: GPL-2.0-or-later
"""Pictures of a run, by matplotlib, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import Run
from benchmarks.systems import OVERLAY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHY_NOT = "no plots: matplotlib is not installed (pip install 'unionfs[bench]')"


def possible() -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    return True


def write(run: Run, stem: str) -> list[Path]:
    """STEM-times.png and, where requests were counted, STEM-requests.png."""
    made = []
    for name, figure in (("times", _times(run)), ("requests", _requests(run))):
        if figure is not None:
            path = Path(f"{stem}-{name}.png")
            figure.savefig(path, dpi=80, bbox_inches="tight")
            made.append(path)
    return made


def _times(run: Run) -> Figure | None:
    """Each workload's time as a multiple of kernel overlayfs's, on a logarithmic scale."""
    from matplotlib.figure import Figure

    medians = run.medians()
    base = medians.get(OVERLAY)
    if not base:
        return None
    names = [name for name in run.workloads if name in base]
    figure = Figure(figsize=(9, 0.28 * len(names) + 1.5))
    axes = figure.add_subplot()
    marks = iter("osD^v<>pPX*h8")
    for system in run.systems.values():
        if system.name == OVERLAY:
            continue
        rows = [row for row, name in enumerate(names) if name in medians[system.name]]
        values = [medians[system.name][names[row]] / base[names[row]] for row in rows]
        size = 7 if system.ours else 5
        axes.plot(values, rows, next(marks), label=system.name, markersize=size, alpha=0.8)
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(left=1e-3)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set_xlabel(f"time, kernel overlayfs on {run.ground} = 1 (less is better)")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=3)
    return figure


def _requests(run: Run) -> Figure | None:
    """Requests an operation by kind, of the first system that counts them."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    counted = [s for s in run.systems if any(run.requests(s, n)[1] for n in run.workloads)]
    if not counted:
        return None
    kinds: dict[str, list[float]] = {}
    names = [name for name in run.workloads if 0 < _per_operation(run, counted[0], name) < 20]
    for row, name in enumerate(names):
        told, count = run.requests(counted[0], name)
        for by_kind in told.values():
            for kind, number in by_kind.items():
                kinds.setdefault(kind, [0.0] * len(names))[row] += number / count
    figure = Figure(figsize=(9, 0.28 * len(names) + 1.5))
    axes = figure.add_subplot()
    colours = colormaps["tab20"]
    left = [0.0] * len(names)
    for number, (kind, values) in enumerate(sorted(kinds.items())):
        if max(values) >= 0.01:
            colour = colours(number % 20)
            axes.barh(range(len(names)), values, left=left, label=kind, color=colour)
            left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel(f"requests an operation, {counted[0]} (up to 20)")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=6)
    return figure


def _per_operation(run: Run, system: str, workload: str) -> float:
    told, count = run.requests(system, workload)
    return sum(sum(kinds.values()) for kinds in told.values()) / count if count else 0.0
