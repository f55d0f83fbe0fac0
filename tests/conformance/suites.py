# SPDX-License-Identifier: GPL-2.0-or-later
"""How each foreign suite is started on a mount, and how its verdict is read.

The suites are built outside the repository and given by path; nothing is downloaded or built here.
Each function gets a `Ground` of its own and gives back one `Verdict` per setting.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.rig import ground, mounted, syscalls
from tests.rig.ground import Ground, Kind
from tests.rig.mounted import Backend

PJDFSTEST_SETTINGS = ("root", "made", "lower")
UNIONMOUNT_SETTINGS = ("", "--samefs", "--squashfs")
UNIONMOUNT_TESTS = 58
HELPERS = ("mount.fuse.unionfs",)


class Verdict(NamedTuple):
    suite: str
    setting: str
    passed: bool
    words: str

    def __str__(self) -> str:
        mark = "ok    " if self.passed else "FAILED"
        return f"{mark} {self.suite:12} {self.setting or 'plain':14} {self.words}"


@contextlib.contextmanager
def union(base: Ground, backend: Backend, kind: Kind, lower_names: Sequence[str]) -> Iterator[Path]:
    """A mounted union whose lower has the given empty directories; gives the mount point."""
    place = base.filesystem("store", kind)
    lower = place / "lower"
    lower.mkdir()
    for name in lower_names:
        (lower / name).mkdir(parents=True)
        # Something beside the suite's own files, so that the directory is really merged.
        (lower / name / "of-the-lower").write_text("stays\n")
    made = mounted.make(backend, [lower], place)
    with made:
        yield made.mnt


def pjdfstest(
    base: Ground, checkout: Path, backend: Backend, kind: Kind, setting: str, jobs: int, log: Path
) -> Verdict:
    """In the mount's root, in a directory made through the mount, in one that is the lower's."""
    with union(base, backend, kind, ["lower/deep"] if setting == "lower" else []) as mnt:
        where = {"root": mnt, "made": mnt / "made" / "deep", "lower": mnt / "lower" / "deep"}
        where[setting].mkdir(parents=True, exist_ok=True)
        words = ["prove", "-r", f"-j{jobs}", str(checkout / "tests")]
        with open(log, "w") as file:
            done = subprocess.run(words, cwd=where[setting], stdout=file, stderr=file, check=False)
    text = log.read_text(errors="replace")
    failed = re.findall(r"^(\S+\.t)\s+\(Wstat: \d+ (?!.*Failed: 0\))", text, re.MULTILINE)
    total = re.search(r"^Files=(\d+), Tests=(\d+)", text, re.MULTILINE)
    count = f"{total[1]} files, {total[2]} tests" if total else "no total"
    names = " ".join(name.rpartition("/tests/")[2] for name in failed)
    good = done.returncode == 0 and total is not None and not failed
    return Verdict("pjdfstest", setting, good, f"{count}, {len(failed)} failing files {names}")


def fsx(base: Ground, program: Path, backend: Backend, kind: Kind, ops: int, log: Path) -> Verdict:
    """A new file, a lower file truncated by the first open, a lower file kept as it is."""
    place = base.filesystem("store", kind)
    lower = place / "lower"
    lower.mkdir()
    content = os.urandom(200_000)
    for name in ("truncated", "kept"):
        (lower / name).write_bytes(content)
    runs: dict[str, list[str]] = {"new": [], "truncated": [], "kept": ["-k"]}
    results = []
    made = mounted.make(backend, [lower], place)
    with made, open(log, "w") as file:
        for seed, (name, flags) in enumerate(runs.items(), 1):
            words = [str(program), "-q", "-N", str(ops), "-S", str(seed), "-P", str(base.base)]
            words += [*flags, str(made.mnt / name)]
            done = subprocess.run(words, stdout=file, stderr=file, check=False)
            results.append(f"{name}: {'ok' if done.returncode == 0 else 'FAILED'}")
        made.remount()
    same = all((lower / name).read_bytes() == content for name in ("truncated", "kept"))
    results.append("lower unchanged" if same else "LOWER CHANGED")
    good = same and not any("FAILED" in result for result in results)
    return Verdict("fsx", f"{ops} ops", good, ", ".join(results))


@contextlib.contextmanager
def helpers_in_sbin(base: Ground) -> Iterator[None]:
    """mount(8) runs /sbin/mount.TYPE only: lay ours over /sbin, in this mount namespace alone."""
    if not ground.isolate():
        raise RuntimeError("mount helpers can be laid over /sbin by root only")
    sbin = Path("/sbin").resolve()
    side = base.filesystem("sbin", "tmpfs")
    for name in ("upper", "work"):
        (side / name).mkdir()
    words = f"lowerdir={sbin},upperdir={side / 'upper'},workdir={side / 'work'}"
    syscalls.mount("overlay", str(sbin), "overlay", 0, words)
    try:
        beside = Path(sys.executable).parent
        for name in HELPERS:
            # Not a link: another package may own the same name, which is only hidden here.
            (sbin / name).unlink(missing_ok=True)
            (sbin / name).write_text(f'#!/bin/sh\nexec {beside / name} "$@"\n')
            (sbin / name).chmod(0o755)
        yield
    finally:
        syscalls.umount(sbin, syscalls.MNT_DETACH)


def unionmount(base: Ground, checkout: Path, backend: Backend, setting: str, log: Path) -> Verdict:
    """A copy of the suite with its four directories moved into our ground, else as it is."""
    copy = base.base / "unionmount"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    settings = copy / "settings.py"
    text = settings.read_text()
    for name in ("base", "lower", "upper", "mnt"):
        path = base.directory(f"um-{name}")
        text = text.replace(f'"/{name}"', f'"{path}"')
    settings.write_text(text)
    kind = ["--ov", "--fuse=unionfs"] if backend == "unionfs" else ["--ov"]
    # -S: it has a package `tests`, too, and an editable install puts ours on the path.
    words = [sys.executable, "-S", "run", *kind, *filter(None, [setting]), "--verify"]
    with helpers_in_sbin(base), open(log, "w") as file:
        done = subprocess.run(words, cwd=copy, stdout=file, stderr=file, check=False)
        subprocess.run(
            [sys.executable, "-S", "run", "-c"], cwd=copy, stdout=file, stderr=file, check=False
        )
        for point in reversed(ground.mounts_below(base.base)):
            if point != str(base.base / "sbin"):
                with contextlib.suppress(OSError):
                    syscalls.umount(point, syscalls.MNT_DETACH)
    lines = log.read_text(errors="replace").splitlines()
    started = [
        line for line in lines if line.startswith("*** run ") or line.startswith("*** ./run")
    ]
    good = done.returncode == 0 and len(started) == UNIONMOUNT_TESTS
    passed = len(started) if done.returncode == 0 else max(0, len(started) - 1)
    last = "" if good else f"; last: {started[-1] if started else ''} {' / '.join(lines[-3:])}"
    return Verdict("unionmount", setting, good, f"{passed} of {UNIONMOUNT_TESTS} passed{last}")
