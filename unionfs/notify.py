# SPDX-License-Identifier: GPL-2.0-or-later
"""What a service manager is told: sd_notify(3), and how often it wants a sign of life.

Owns the datagram.  Says nothing, and raises nothing, where nobody listens.  Called by the daemon in
the foreground and by `unionfs up --foreground`.
"""

import contextlib
import os
import socket
from typing import Final

_SOCKET: Final = "NOTIFY_SOCKET"


def send(*lines: str) -> None:
    """Tell these lines, such as READY=1 or STATUS=..., as one message."""
    address = os.environ.get(_SOCKET, "")
    if not address.startswith(("/", "@")):
        return
    text = "\n".join(line.replace("\n", " ") for line in lines)
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
