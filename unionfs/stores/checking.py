# SPDX-License-Identifier: GPL-2.0-or-later
"""Checking the file system of a store by its own fsck, and what was found in a store.

Owns the calls of fsck programs and what they mean, as exit codes of fsck(8), and the report.  A
file system that is in use is not checked.  Called by examination.py, for `unionfs store check`.
"""

import enum
import errno
import os
import stat
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from unionfs.errors import InUse
from unionfs.stores import loop
from unionfs.stores.probe import Contents
from unionfs.stores.tools import lines_of, run, tool


class Code(enum.IntFlag):
    """Exit codes of fsck(8)."""

    OK = 0
    CORRECTED = 1
    UNCORRECTED = 4
    TROUBLE = 8
    USAGE = 16


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


def check_filesystem(contents: Contents, report: Report, *, repair: bool) -> None:
    """Run the fsck of an image or device that nobody uses."""
    path, fstype = contents.path, contents.fstype
    command = _fsck(path, fstype, repair=repair)
    if command is None:
        report.filesystem = f"{fstype} has no fsck"
        return
    done = run(command)
    lines = lines_of(done.stdout + done.stderr)
    code = _meaning(fstype, done.returncode, repair=repair)
    report.code |= code
    said = {Code.OK: "clean", Code.CORRECTED: "repaired", Code.UNCORRECTED: "damaged"}
    report.filesystem = f"{fstype}: {said.get(code, 'could not be checked')}"
    if code & (Code.UNCORRECTED | Code.TROUBLE) and lines:
        report.filesystem += f" ({lines[-1]})"


def _fsck(path: str, fstype: str, *, repair: bool) -> list[str] | None:
    if fstype in ("ext2", "ext3", "ext4"):
        return [tool("e2fsck", "e2fsprogs"), "-f", "-y" if repair else "-n", path]
    # xfs_repair of a dirty log would lose what is in it: mounting replays it.
    if fstype == "xfs":
        return [tool("xfs_repair", "xfsprogs"), *([] if repair else ["-n"]), "-f", path]
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
    return Code.UNCORRECTED if code in (1, 2) else Code.TROUBLE


def refuse_used(contents: Contents, *, patience: float = 0) -> None:
    """Raise an error if the file system is mounted, here or by a union's daemon.

    `patience`: seconds to wait for a loop device that is being released.
    """
    path = contents.path
    hint = "unmount it first"
    if stat.S_ISBLK(os.stat(path).st_mode):
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise
            raise InUse(path, path, "", hint=hint) from exc
        return
    end = time.monotonic() + patience
    while devices := _devices(path):
        if time.monotonic() >= end:
            raise InUse(path, path, f"by {', '.join(devices)}", hint=hint)
        time.sleep(0.02)


def _devices(path: str) -> list[str]:
    if os.geteuid() != 0:
        return []
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [device for device, _ in loop.devices_of(fd)]
    finally:
        os.close(fd)
