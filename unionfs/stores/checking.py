# SPDX-License-Identifier: GPL-2.0-or-later
"""Checking the file system of a store by its own fsck, and what was found in a store.

Owns the calls of fsck programs and what they mean, as exit codes of fsck(8), and the report.  A
file system that is in use is not checked; one that was not unmounted is, once its journal has been
replayed.  Called by examination.py, for `unionfs store check`.
"""

import contextlib
import enum
import errno
import os
import re
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from unionfs.errors import InUse, UnionfsError
from unionfs.stores import ext, kernel, loop, rescue, userspace, whole
from unionfs.stores.probe import Contents
from unionfs.stores.tools import lines_of, run, tool


class Code(enum.IntFlag):
    """Exit codes of fsck(8)."""

    OK = 0
    CORRECTED = 1
    UNCORRECTED = 4
    TROUBLE = 8
    USAGE = 16


_GOOD: Final = (Code.OK, Code.CORRECTED)
_PENDING: Final = "it was not unmounted; mounting it replays its journal"
# What xfs_repair says of a log with changes in it, and of one whose ends it does not find.
_XFS_PENDING: Final = re.compile(rb"valuable metadata changes|log head and/or tail cannot be")
_XFS_CORRECTED: Final = 4  # with -e
_XFS_DROPPED: Final = re.compile(r"clear(ed|ing)|junking|moving to lost\+found")
_BTRFS_LOG_ROOT: Final = 65536 + 96  # struct btrfs_super_block: there is a tree of logs
# How what is in a journal is given up.
_DISCARD: Final = {"xfs": "xfs_repair -L", "btrfs": "btrfs rescue zero-log"}
# Lines of fsck programs that tell of no fault: versions, phases, advice.
_PATTER: Final = re.compile(
    r"$|e2fsck [0-9]|Pass [0-9]|Could this be|Phase [0-9]|- |Cannot get host|Repair may fail"
    r"|the image and the host|No modify flag|\[[0-9]/[0-9]\]|Opening filesystem|Checking filesystem"
    r"|UUID:|Metadata CRC error detected at"
)
_ANSWER: Final = re.compile(r"\s+[A-Z][a-z ]*\? (?:no|yes)$")


class Problem(NamedTuple):
    """Something that is not as it should be."""

    path: str
    what: str
    repaired: bool = False


@dataclass(slots=True)
class Report:
    """What was found in a store."""

    filesystem: str = ""  # what fsck said, one line
    code: Code = Code.OK
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be looked at, and why

    def add(self, path: str, what: str, *, repaired: bool = False) -> None:
        """One more problem."""
        self.problems.append(Problem(path, what, repaired))
        self.code |= Code.CORRECTED if repaired else Code.UNCORRECTED


def check_filesystem(contents: Contents, report: Report, *, repair: bool) -> bool:
    """Run the fsck of an image or device that nobody uses; whether it may be mounted then.

    One that was not unmounted has its last changes in its journal.  Until that is replayed fsck
    sees what is no more, so nothing it says is told; with `repair` it is replayed first.
    """
    path, fstype = contents.path, contents.fstype
    command = _fsck(path, fstype, repair=repair)
    if command is None:
        report.filesystem = f"{fstype} has no fsck"
        return True
    try:
        whole.check_whole(path, fstype)  # e2fsck may call it clean
    except UnionfsError as exc:
        _say(report, fstype, Code.UNCORRECTED, exc.message)
        return False
    if fstype in ext.TYPES and repair:
        return _repair_ext(path, fstype, report)
    with _locked(path, write=repair):
        pending = _pending(path, fstype)
        done = None if pending else run(command)
    if fstype == "xfs" and done is not None:
        pending = bool(_XFS_PENDING.search(done.stdout + done.stderr))
    if pending and not repair:
        report.code |= Code.TROUBLE
        report.filesystem = f"{fstype}: {_PENDING}; to check it, mount it first or use --repair"
        return False
    if pending:
        if not _replay(contents, report):
            return False
        with _locked(path, write=repair):
            done = run(command)
    assert done is not None
    code = _meaning(fstype, done.returncode, repair=repair)
    _say(report, fstype, code, "" if code in _GOOD else _complaint(fstype, done))
    if code == Code.CORRECTED:
        lines = lines_of(done.stdout + done.stderr)
        dropped = [line for line in lines if _XFS_DROPPED.search(line)]
        report.notes += [f"xfs_repair: {line}" for line in rescue.shortened(dropped)]
    if pending:
        _say_replayed(report)
    return code in _GOOD


def _repair_ext(path: str, fstype: str, report: Report) -> bool:
    """e2fsck replays the journal itself; what it has dropped is told."""
    with _locked(path, write=True):
        pending = _pending(path, fstype)
        outcome = rescue.repair(path)
    code = _meaning(fstype, outcome.done.returncode, repair=True)
    why = "" if code in _GOOD else _complaint(fstype, outcome.done)
    if outcome.forced and not why:
        why = "by e2fsck -y, which takes away what cannot be read"
    _say(report, fstype, code, why)
    if pending:
        _say_replayed(report)
    for place in outcome.gone:
        what = "was there before the repair, and is not any more"
        if place == "/":
            what = f"could not be read: what was there is in {rescue.LOST}, or gone"
        report.add(place, what)
    for place in outcome.found:
        report.add(place, "has lost its name and was put there by e2fsck: it may be of an upper")
    report.notes += [f"e2fsck: {line}" for line in rescue.shortened(outcome.dropped)]
    return code in _GOOD


def _say_replayed(report: Report) -> None:
    report.code |= Code.CORRECTED
    report.filesystem += "; it was not unmounted, and its journal has been replayed"


def _say(report: Report, fstype: str, code: Code, why: str) -> None:
    report.code |= code
    said = {Code.OK: "clean", Code.CORRECTED: "repaired", Code.UNCORRECTED: "damaged"}
    report.filesystem = f"{fstype}: {said.get(code, 'could not be checked')}"
    if why:
        report.filesystem += f" ({why})"


def _pending(path: str, fstype: str) -> bool:
    """Whether a journal waits to be replayed; of xfs only xfs_repair can tell."""
    if fstype in ext.TYPES:
        return ext.has_journal_to_replay(path)
    if fstype == "btrfs":
        with open(path, "rb") as file:
            file.seek(_BTRFS_LOG_ROOT)
            return any(file.read(8))
    return False


def _replay(contents: Contents, report: Report) -> bool:
    """Mount it once, where nobody sees it; the kernel replays the journal."""
    path, fstype = contents.path, contents.fstype
    if not kernel.may_mount():
        report.code |= Code.TROUBLE
        report.filesystem = f"{fstype}: {_PENDING}, which only root can do: ask root to check it"
        return False
    try:
        root, _ = kernel.mount(contents, readonly=False)
    except UnionfsError as exc:
        report.code |= Code.UNCORRECTED | Code.TROUBLE
        report.filesystem = f"{fstype}: it was not unmounted, and its journal cannot be replayed"
        report.filesystem += f" ({exc.message})"
        if command := _DISCARD.get(fstype):
            report.filesystem += f"; {command} {path} gives up what is in it"
        return False
    os.close(root)
    # The kernel may take a moment to release it.
    refuse_used(contents, patience=userspace.LOCK_SECONDS)
    return True


def _complaint(fstype: str, done: "subprocess.CompletedProcess[bytes]") -> str:
    """The line that says most of what fsck has found."""
    # e2fsck tells in its output what it finds, the others where errors belong.
    first, second = done.stdout, done.stderr
    if fstype not in ext.TYPES:
        first, second = second, first
    lines = [line for line in lines_of(first) + lines_of(second) if not _PATTER.match(line)]
    said = next((line for line in lines if line.startswith("ERROR")), lines[0] if lines else "")
    return _ANSWER.sub("", said) or f"its fsck ended with {done.returncode}"


def _fsck(path: str, fstype: str, *, repair: bool) -> list[str] | None:
    if fstype in ext.TYPES:
        return [tool("e2fsck", "e2fsprogs"), "-f", "-n", path]
    if fstype == "xfs":
        return [tool("xfs_repair", "xfsprogs"), "-e" if repair else "-n", "-f", path]
    # btrfs has no repair that its makers advise.
    if fstype == "btrfs":
        return [tool("btrfs", "btrfs-progs"), "check", "--readonly", path]
    return None


def _meaning(fstype: str, code: int, *, repair: bool) -> Code:
    if code == 0:
        return Code.OK
    if fstype.startswith("ext"):
        # 2: corrected, and the machine should be started anew: that is for mounted ones.
        corrected = code & 3 and repair
        return Code(code & (4 | 8)) or (Code.CORRECTED if corrected else Code.UNCORRECTED)
    if fstype == "xfs" and repair and code == _XFS_CORRECTED:
        return Code.CORRECTED
    return Code.UNCORRECTED if code in (1, 2) else Code.TROUBLE


@contextlib.contextmanager
def _locked(path: str, *, write: bool) -> Iterator[None]:
    """An image, so that nobody mounts it; a device is held by the file system's own fsck."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        yield
        return
    # The loop device of a look at it may not be released yet.
    patience = userspace.LOCK_SECONDS if write else 0.0
    lock = userspace.lock_image(path, readonly=not write, patience=patience)
    try:
        yield
    finally:
        os.close(lock)


def refuse_used(contents: Contents, *, patience: float = 0) -> None:
    """Raise an error if the file system is mounted, here or by a union's daemon.

    `patience`: seconds to wait for a loop device that is being released.
    """
    path = contents.path
    hint = "unmount it first"
    if stat.S_ISBLK(os.stat(path).st_mode):
        if userspace.once_left(lambda: [path] if _is_busy(path) else []):
            raise InUse(path, path, "", hint=hint)
        return
    end = time.monotonic() + patience
    while devices := userspace.once_left(lambda: _devices(path)):
        if time.monotonic() >= end:
            raise InUse(path, path, f"by {', '.join(devices)}", hint=hint)
        time.sleep(0.02)


def _is_busy(device: str) -> bool:
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise
        return True
    return False


def _devices(path: str) -> list[str]:
    if os.geteuid() != 0:
        return []
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [device for device, _ in loop.devices_of(fd)]
    finally:
        os.close(fd)
