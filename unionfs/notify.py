# SPDX-License-Identifier: GPL-2.0-or-later
"""What a service manager is told: sd_notify(3), how often it wants a sign of life, and, by a unit
that fails, that a union runs without its store.

Owns the datagram, and the name of that unit.  Says nothing, and raises nothing, where nobody
listens.  Called by the daemon and by what brings profiles up.
"""

import contextlib
import os
import re
import socket
from typing import Final

from unionfs import runtime

_SOCKET: Final = "NOTIFY_SOCKET"
# Set for all that systemd starts, and by nobody else: systemd.exec(5).
_STARTED_BY_SYSTEMD: Final = "INVOCATION_ID"
_INITRD: Final = "/etc/initrd-release"
_UNIT: Final = "unionfs-degraded@{}.service"
_IN_UNIT_NAMES: Final = re.compile(r"[A-Za-z0-9:_.\\@-]+")
_SECONDS: Final = 10  # for systemctl: it only has to pass a word on


def send(*lines: str) -> None:
    """Tell these lines, such as READY=1 or STATUS=..., as one message.

    systemd takes backslashes in it away, and all of it as nothing if one is the last.
    """
    address = os.environ.get(_SOCKET, "")
    if not address.startswith(("/", "@")):
        return
    text = "\n".join(line.replace("\n", " ").replace("\\", "\\\\") for line in lines)
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(os.fsencode(text), address.replace("@", "\0", 1))


def watchdog_seconds() -> float | None:
    """Within which time WATCHDOG=1 is awaited from this process; None if it is not."""
    try:
        seconds = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        pid = int(os.environ.get("WATCHDOG_PID") or os.getpid())
    except ValueError:
        return None
    return seconds if seconds > 0 and pid == os.getpid() else None


def is_service() -> bool:
    """Whether systemd has started us."""
    return _STARTED_BY_SYSTEMD in os.environ


def has_store(name: str, *, degraded: bool) -> None:
    """Have the unit fail that says it of a union or a profile, or take that back.

    What is started in an initrd is not told there: the system that comes after has the unit, and
    its generator starts it.
    """
    if not is_service() or os.path.exists(_INITRD):
        return
    mark = runtime.directory(f".failed-{name}")
    if mark is None or not _IN_UNIT_NAMES.fullmatch(name):
        return
    if not degraded and not os.path.exists(mark):
        return
    import subprocess  # slow to load, and hardly ever needed

    command = ["systemctl", *(["--user"] if os.geteuid() else []), "--no-block", "start"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if degraded:
            with open(mark, "w"):
                pass
        else:
            os.unlink(mark)
        subprocess.run(
            [*command, _UNIT.format(name)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
