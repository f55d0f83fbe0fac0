# SPDX-License-Identifier: GPL-2.0-or-later
"""The unions that are compared, each mounted the same way over one lower on an upper of its own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Layers(NamedTuple):
    lower: Path
    upper: Path
    work: Path
    mnt: Path


class System(NamedTuple):
    """How a union is mounted and unmounted; `program` must be found."""

    program: str
    mount: Callable[[Layers], list[str]]
    umount: Callable[[Layers], list[str]] = lambda layers: ["umount", str(layers.mnt)]


def _places(layers: Layers) -> str:
    return f"lowerdir={layers.lower},upperdir={layers.upper},workdir={layers.work}"


def _unionfs(driver: str) -> System:
    return System(
        "unionfs",
        lambda at: [
            *("unionfs", "mount", str(at.lower), str(at.upper), str(at.mnt)),
            *("-o", f"driver={driver}"),
        ],
        lambda at: ["unionfs", "umount", str(at.mnt)],
    )


SYSTEMS = {
    "overlay": System(
        "mount",
        lambda at: [
            *("mount", "-t", "overlay", "overlay", str(at.mnt)),
            *("-o", f"{_places(at)},redirect_dir=on,index=on"),
        ],
    ),
    "unionfs": _unionfs("engine"),
    "unionfs-pyfuse3": _unionfs("pyfuse3"),
    "fuse-overlayfs": System(
        "fuse-overlayfs", lambda at: ["fuse-overlayfs", "-o", _places(at), str(at.mnt)]
    ),
    "unionfs-fuse": System(
        "unionfs-fuse",
        lambda at: [
            *("unionfs-fuse", "-o", "cow,allow_other,use_ino"),
            *(f"{at.upper}=RW:{at.lower}=RO", str(at.mnt)),
        ],
    ),
}


def found() -> list[str]:
    """The systems whose programs this machine has."""
    return [name for name, system in SYSTEMS.items() if shutil.which(system.program)]


def call(command: list[str]) -> None:
    """Run a command; raises CalledProcessError with its words."""
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
