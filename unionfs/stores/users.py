# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has a file system open, for the message that it is in use.

Owns the look at the processes.  What a verb or a daemon has mounted is seen nowhere but in its open
files.  Called by kernel.py when a mount was refused.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from unionfs import syscalls
from unionfs.mounts import read_mounts

_TOLD: Final = 3
_WORDS: Final = 3  # of a command line of ours: unionfs store VERB


def who(device: int) -> str:
    """For people, who uses the file system with this device number; empty if it is not seen."""
    number = f"{os.major(device)}:{os.minor(device)}"
    places = [f"at {entry.point}" for entry in read_mounts() if entry.device == number]
    if places:
        return " and ".join(places[:_TOLD])
    return " and ".join(f"by {one}" for one in _processes(device))


def _processes(device: int) -> list[str]:
    found: list[str] = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if len(found) < _TOLD and int(pid) != os.getpid() and device in _devices(pid):
            found.append(f"{_name(pid)} (process {pid})")
    return found


def _devices(pid: str) -> Iterator[int]:
    """Of its open files; a FUSE file system is not asked, which may not answer."""
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield syscalls.device_of(f"/proc/{pid}/fd/{fd}")


def _name(pid: str) -> str:
    """`unionfs store VERB` of ours, or the name of the program."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = [os.fsdecode(word) for word in file.read().split(b"\0")]
        for number, word in enumerate(words[:_WORDS]):
            if os.path.basename(word) == "unionfs":
                count = _WORDS if words[number + 1 : number + 2] == ["store"] else 2
                return " ".join(["unionfs", *words[number + 1 : number + count]])
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().strip()
    except OSError:
        return "a program"
