# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether requests come over io_uring, and why not if they do not.

Owns the conditions (docs/adr/0012): the kernel keeps a queue for each processor that there can be,
and once it was told in INIT that it shall use them, every request waits until all are served. So
the rings are opened before. Called by engine.py.
"""

import errno
import os
from typing import Final

from unionfs._native import open_rings

ENABLED: Final = "/sys/module/fuse/parameters/enable_uring"
_PROCESSORS: Final = "/sys/devices/system/cpu"
_MOST: Final = 128  # two threads and two descriptors each

REFUSED: Final = "the mount option io_uring=off"
SWITCHED_OFF: Final = f"switched off by the administrator ({ENABLED} is N)"


def _read(path: str) -> str:
    with open(path) as file:
        return file.read().strip()


def _numbers(text: str) -> set[int]:
    """The processors in a list like 0-3,6."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _queues() -> tuple[int, str | None]:
    """How many there are, and what stands against serving them."""
    possible = _numbers(_read(f"{_PROCESSORS}/possible"))
    count = len(possible)
    if count > _MOST or max(possible) >= count:
        return count, f"the processors are numbered up to {max(possible)}, more than {_MOST - 1}"
    # A thread must be able to go where requests wait.
    forbidden = _numbers(_read(f"{_PROCESSORS}/online")) - os.sched_getaffinity(0)
    if forbidden:
        return count, f"unionfs may not run on processor {min(forbidden)}"
    return count, None


def prepare() -> tuple[object | None, str]:
    """Rings for every queue; or None and the reason."""
    try:
        if _read(ENABLED) != "Y":
            return None, SWITCHED_OFF
        count, obstacle = _queues()
    except FileNotFoundError:
        return None, "the kernel has no FUSE over io_uring (Linux 6.14)"
    except (OSError, ValueError) as exc:
        return None, f"the processors are not known: {exc}"
    if obstacle is not None:
        return None, obstacle
    try:
        return open_rings(count), ""
    except OSError as exc:
        hint = " (/proc/sys/kernel/io_uring_disabled)" if exc.errno == errno.EPERM else ""
        return None, f"io_uring cannot be used here: {exc.strerror}{hint}"
