# SPDX-License-Identifier: GPL-2.0-or-later
"""Repairing an ext4 with e2fsck: first what is safe, then at any cost; what it cost is told.

Owns the calls of e2fsck, and the look (debugfs) at which uppers there were before and are after.
Called by checking.py.
"""

import re
import subprocess
from dataclasses import dataclass, field
from typing import Final

from unionfs.stores.tools import lines_of, run, tool

LOST: Final = "lost+found"
_UNCORRECTED: Final = 4  # fsck(8)
_PACKAGE: Final = "e2fsprogs"
_ROOT: Final = "2"
# What e2fsck -y says where it takes something away.
_DROPPED: Final = re.compile(r".*\b(Clear|Salvage|Truncate|Delete|Unlink)\S*\? yes$|.+ CLEARED\.")
_TOLD: Final = 5


@dataclass(slots=True)
class Outcome:
    """What was done.  `forced`: not without a loss, perhaps."""

    done: "subprocess.CompletedProcess[bytes]"
    forced: bool = False
    gone: list[str] = field(default_factory=list)  # directories that could be uppers
    found: list[str] = field(default_factory=list)  # in lost+found
    dropped: list[str] = field(default_factory=list)  # in e2fsck's words


def repair(path: str) -> Outcome:
    """What `-p` cannot correct without asking is corrected by `-y`.  Both may take names away."""
    e2fsck = tool("e2fsck", _PACKAGE)
    before = _places(path)
    done = run([e2fsck, "-f", "-p", path])
    said = done.stdout
    forced = bool(done.returncode & _UNCORRECTED)
    if forced:
        done = run([e2fsck, "-f", "-y", path])
        said += done.stdout
    outcome = Outcome(done, forced)
    lines = [line.removeprefix(f"{path}: ") for line in lines_of(said)]
    outcome.dropped = [line for line in lines if _DROPPED.match(line)]
    after = _places(path)
    lost = f"/{LOST}/"
    # Of a damaged inode it is not known what it was.
    outcome.gone = [
        p for p, there in before.items() if there and p not in after and not p.startswith(lost)
    ]
    if "/" not in before:
        outcome.gone.append("/")
    outcome.found = [p for p in after if p.startswith(lost) and p not in before]
    return outcome


def shortened(lines: list[str]) -> list[str]:
    """The first of many."""
    more = len(lines) - _TOLD
    return lines if more <= 0 else [*lines[:_TOLD], f"and {more} more like these"]


def _places(path: str) -> dict[str, bool]:
    """What could be an upper, what is in lost+found, and the root; whether it is a directory, or
    was one."""
    found = {}
    for name, inode, directory in _listed(path, _ROOT):
        if name == ".":
            found["/"] = False
            continue
        found[f"/{name}"] = directory and name != LOST  # that may be made anew
        if name == LOST or name.startswith("persistent_"):
            inside = _listed(path, inode)
            found |= {f"/{name}/{below}": there for below, _, there in inside if below != "."}
    return found


def _listed(path: str, inode: str) -> list[tuple[str, str, bool]]:
    """Name, inode and whether it is a directory, of what is in one; as far as that can be read."""
    done = run([tool("debugfs", _PACKAGE), "-c", "-R", f"ls -p <{inode}>", path])
    entries = []
    for line in lines_of(done.stdout):
        parts = line.split("/")  # /INODE/MODE/USER/GROUP/NAME/SIZE/
        if len(parts) == 8 and parts[5] not in ("..", "") and parts[1] != "0":
            kind = int(parts[2], 8) & 0o170000
            entries.append((parts[5], parts[1], kind in (0, 0o040000)))
    return entries
