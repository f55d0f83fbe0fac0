# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process that asks may do with set-group-ID: its groups and CAP_FSETID, from /proc.

Owns the reading of another process's credentials; who asks is told by the kernel (`Caller`).
"""

from pathlib import Path
from typing import Final

from unionfs.create import Caller

_CAP_FSETID: Final = 1 << 4


def may_keep_setgid(uid: int, gid: int, ctx: Caller) -> bool:
    """Whether the caller is in the group of a file of these owners, or above such things
    (in_group_or_capable of fs/attr.c)."""
    if ctx.gid == gid:
        return True
    process = Path(f"/proc/{ctx.pid}")
    try:
        status = _fields(process / "status")
        if gid in map(int, status["Groups"].split()):
            return True
        return bool(int(status["CapEff"], 16) & _CAP_FSETID) and _knows(process, uid, gid)
    except (OSError, KeyError):
        return ctx.uid == 0  # it has ended, or is not to be seen


def _fields(path: Path) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in path.read_text(errors="replace").splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _knows(process: Path, uid: int, gid: int) -> bool:
    """Whether both ids exist in the process's user namespace, in which its capabilities count."""
    return _maps(process, "uid_map", uid) and _maps(process, "gid_map", gid)


def _maps(process: Path, name: str, number: int) -> bool:
    text = (process / name).read_text()
    if text == Path("/proc/self", name).read_text():
        return True  # our own namespace, of which the kernel shows ids of the one above instead
    ranges = (map(int, line.split()) for line in text.splitlines())
    return any(outside <= number < outside + length for _, outside, length in ranges)


__all__ = ["may_keep_setgid"]
