# SPDX-License-Identifier: GPL-2.0-or-later
"""A system that packages are installed in: this machine's own programs and what they are linked to.

Small, so that any machine can make one; for chroot(8), by root or in a user's own namespace.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# What dpkg wants to find.
PROGRAMS = [
    "dpkg",
    "dpkg-deb",
    "dpkg-split",
    "dpkg-query",
    "sh",
    "rm",
    "tar",
    "diff",
    "ldconfig",
    "start-stop-daemon",
]
_LINKED = re.compile(r"(?:=> |^\s*)(/\S+) \(0x", re.MULTILINE)


def make_system(top: Path) -> None:
    """Fill a directory that is not there yet; with dpkg, where this machine has it."""
    for name in ("dev", "etc", "tmp", "usr/bin"):
        (top / name).mkdir(parents=True)
    (top / "dev/null").touch()
    for name in ("passwd", "group"):
        (top / "etc" / name).write_text("root:x:0:0:root:/root:/bin/sh\n")
    for name in ("updates", "info", "triggers", "alternatives", "parts"):
        (top / "var/lib/dpkg" / name).mkdir(parents=True)
    (top / "var/lib/dpkg/status").touch()
    for name in PROGRAMS:
        path = shutil.which(name, path=PATH)
        if path is not None:
            add_program(top, path, name)


def add_program(top: Path, path: str, name: str) -> None:
    """As /usr/bin/NAME, and the libraries that it is linked to, where it looks for them."""
    shutil.copy2(os.path.realpath(path), top / "usr/bin" / name)
    listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout
    for library in _LINKED.findall(listed):
        target = Path(f"{top}{library}")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(os.path.realpath(library), target)


def inside(top: str, command: Sequence[str]) -> list[str]:
    """The command that runs another one in there, as root or as what looks like root."""
    chroot = shutil.which("chroot", path=PATH) or "chroot"
    alone = [] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
    return [*alone, chroot, top, *command]
