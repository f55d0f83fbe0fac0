# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon that the system's root stands on gets out of that system's way.

What starts it, an initramfs, moves its mounts to the new root and goes.  The daemon would be left
in an empty directory, without /proc, by which it reaches its files.  So once the union is mounted
the daemon moves to mounts of its own: /proc, /dev, /run and /sys, and nothing else; what it serves
it has open.  Called by daemon.py, before there are threads.
"""

import contextlib
import os
from typing import Final

from unionfs import survive, syscalls
from unionfs.mounts import read_mounts
from unionfs.syscalls import MountFlag, UnmountFlag

_KEPT: Final = ("/proc", "/dev", "/run", "/sys")
_PLACE: Final = "/run/unionfs"
_IN_MEMORY: Final = (0x858458F6, 0x01021994)  # ramfs and tmpfs: linux/magic.h
# sysvinit's killall spares the processes whose numbers are in files here.
_OMITTED: Final = "/run/sendsigs.omit.d"


def in_initramfs() -> bool:
    """Whether the system is still to come: its root is in memory for the time being."""
    return os.path.exists("/etc/initrd-release") or syscalls.filesystem_type("/") in _IN_MEMORY


def step_aside() -> None:
    """Leave everybody's mounts, and be spared when the initramfs and the system end."""
    if in_initramfs():
        survive.mark_as_root_storage(initrd="/")
        with contextlib.suppress(OSError):
            os.makedirs(_OMITTED, exist_ok=True)
            with open(f"{_OMITTED}/unionfs-{os.getpid()}", "w") as file:
                file.write(f"{os.getpid()}\n")
    os.makedirs(_PLACE, 0o755, exist_ok=True)
    syscalls.unshare_mounts()
    syscalls.mount("none", "/", "", MountFlag.REC | MountFlag.PRIVATE)
    _make_root()
    _leave()


def _make_root() -> None:
    """A directory in memory, with what is kept."""
    points = {entry.point for entry in read_mounts()}
    syscalls.mount("unionfs", _PLACE, "tmpfs", MountFlag.NOSUID | MountFlag.NODEV, "mode=755")
    for point in _KEPT:
        if point in points:
            os.mkdir(_PLACE + point)
            syscalls.mount(point, _PLACE + point, "", MountFlag.BIND)


def _leave() -> None:
    """Let go of all others.

    pivot_root(2) refuses to put a first root aside.  So the new one is moved over it, as
    switch_root(8) does; what it stands on stays.
    """
    for entry in reversed(read_mounts()):
        if not f"{_PLACE}/".startswith(entry.point.rstrip("/") + "/"):
            if entry.point.startswith(f"{_PLACE}/"):
                continue
            with contextlib.suppress(OSError):  # gone with another, or covered
                syscalls.umount(entry.point, UnmountFlag.NOFOLLOW | UnmountFlag.DETACH)
    os.chdir(_PLACE)
    syscalls.mount(".", "/", "", MountFlag.MOVE)
    os.chroot(".")
    os.chdir("/")
