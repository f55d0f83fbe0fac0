# SPDX-License-Identifier: GPL-2.0-or-later
"""How a daemon that the root file system stands on outlives systemd's last killing spree.

Owns the mark: a process whose argv[0] begins with `@` is left alone when the initrd hands over to
the system, and when the system shuts down (https://systemd.io/ROOT_STORAGE_DAEMONS).  It is honest
only of a process that was started in an initrd, so it is set there and nowhere else.  Called by
whatever mounts a root union, in the daemon's process.
"""

import ctypes
import os
from typing import Final

_INITRD: Final = "/etc/initrd-release"
_ARG_START: Final = 47  # of /proc/PID/stat, counted from 0: proc(5)


def mark_as_root_storage(*, initrd: str = _INITRD) -> bool:
    """Be spared by the killing of all processes; False where this is no initrd."""
    if not os.path.exists(initrd):
        return False
    try:
        address = _arguments_start()
    except (OSError, ValueError, IndexError):
        return False  # no /proc: then nobody reads our arguments either
    if address == 0:
        return False
    # The memory that the kernel shows as /proc/PID/cmdline: where execve(2) has put argv.
    ctypes.memset(address, ord("@"), 1)
    return True


def _arguments_start() -> int:
    with open("/proc/self/stat", "rb") as file:
        text = file.read()
    # The second field, the program's name in parentheses, may have spaces.
    name_end = text.rindex(b")")
    return int(text[name_end + 2 :].split()[_ARG_START - 2])
