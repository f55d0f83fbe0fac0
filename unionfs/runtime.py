# SPDX-License-Identifier: GPL-2.0-or-later
"""/run/unionfs/NAME: what a script can see of a union without asking its daemon.

Owns the directory, which exists while there is something to tell: `degraded`, one line, why
a union runs without its store.  For an ordinary user below $XDG_RUNTIME_DIR.  Called by daemon.py.

Owns also where a user's programs keep what is there for a moment (stores/).
"""

import contextlib
import os
import stat
from typing import Final

from unionfs.errors import printable

ROOT: Final = "root"  # the name of the union that a system runs from


def name_of(point: str) -> str:
    """A mount point as the name of a union, as systemd-escape(1) --path spells it."""
    path = os.path.normpath(point).strip("/")
    if not path:
        return "-"
    told = []
    for number, byte in enumerate(os.fsencode(path)):
        char = chr(byte)
        if char == "/":
            told.append("-")
        elif (char.isascii() and (char.isalnum() or char in ":_")) or (char == "." and number):
            told.append(char)
        else:
            told.append(f"\\x{byte:02x}")
    return "".join(told)


def directory(name: str) -> str | None:
    """Where it would be; None if this user has no such place."""
    if os.geteuid() == 0:
        return f"/run/unionfs/{name}"
    place = os.environ.get("XDG_RUNTIME_DIR")
    return f"{place}/unionfs/{name}" if place and os.path.isdir(place) else None


def tell_degraded(name: str, reason: str) -> None:
    """Write the reason.  A full or missing /run must not stop what goes on without its store."""
    if (place := directory(name)) is None:
        return
    with contextlib.suppress(OSError):
        os.makedirs(place, 0o755, exist_ok=True)
        with open(f"{place}/.degraded", "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(printable(reason) + "\n")
        os.rename(f"{place}/.degraded", f"{place}/degraded")


def clear(name: str) -> None:
    """Nothing is to tell (any more); also of a daemon that was killed."""
    if (place := directory(name)) is None:
        return
    with contextlib.suppress(OSError):
        os.unlink(f"{place}/degraded")
    with contextlib.suppress(OSError):
        os.rmdir(place)


def stages() -> str:
    """Where this user has a directory for what is there for a moment, also without a session."""
    import tempfile

    place = _session()
    return os.path.realpath(tempfile.gettempdir() if place is None else place)


def private() -> str | None:
    """A directory that nobody else can write to; None if there is none."""
    place = _session()
    name = "unionfs" if place is not None else f"unionfs-{os.geteuid()}"
    path = f"{stages()}/{name}"
    with contextlib.suppress(OSError):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755 if place is not None else 0o700)
        found = os.lstat(path)
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if ours and not found.st_mode & 0o022:
            return path
    return None


def _session() -> str | None:
    place = os.environ.get("XDG_RUNTIME_DIR", "")
    return place if place and os.access(place, os.W_OK | os.X_OK) else None
