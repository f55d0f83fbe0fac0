# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon that the system's root stands on gets out of that system's way.

What starts it, an initramfs, moves its mounts to the new root and goes.  The daemon would be left
in an empty directory, without /proc, by which it reaches its files.  So once the union is mounted
the daemon moves to mounts of its own: /proc, /dev, /run and /sys, and nothing else; what it serves
it has open.  Called by daemon.py, before there are threads.
"""

import contextlib
import errno
import logging
import os
import time
from typing import TYPE_CHECKING, Final

from unionfs import survive, syscalls
from unionfs.mounts import read_mounts
from unionfs.syscalls import MountFlag, UnmountFlag

if TYPE_CHECKING:
    from unionfs.opened import Opened

log = logging.getLogger("unionfs")

_KEPT: Final = ("/proc", "/dev", "/run", "/sys")
_PLACE: Final = "/run/unionfs"
IN_MEMORY: Final = (syscalls.RAMFS, syscalls.TMPFS)
# sysvinit's killall spares the processes whose numbers are in files here.
_OMITTED: Final = "/run/sendsigs.omit.d"
_PATIENCE: Final = 2.0  # seconds
_PAUSE: Final = 0.05


def in_initramfs() -> bool:
    """Whether the system is still to come: its root is in memory for the time being."""
    return os.path.exists("/etc/initrd-release") or syscalls.filesystem_type("/") in IN_MEMORY


def step_aside() -> None:
    """Leave everybody's mounts, and be spared when the initramfs and the system end."""
    if in_initramfs():
        survive.mark_as_root_storage(initrd="/")
        with contextlib.suppress(OSError):
            os.makedirs(_OMITTED, exist_ok=True)
            with open(_omitted(), "w") as file:
                file.write(f"{os.getpid()}\n")
    os.makedirs(_PLACE, 0o755, exist_ok=True)
    syscalls.unshare_mounts()
    syscalls.mount("none", "/", "", MountFlag.REC | MountFlag.PRIVATE)
    _make_root()
    _leave()


def _omitted() -> str:
    return f"{_OMITTED}/unionfs-{os.getpid()}"


def rest(opened: "Opened") -> None:
    """The system is at its end, and its root read-only: leave the store as if we had ended.

    We go on, since the machine is switched off by a program that lies on the root.  Called in a
    thread.  Who has asked for it (system/system-shutdown) waits until we need not be spared.
    """
    if opened.work is not None and opened.upper is not None:
        opened.work.rest()
        with contextlib.suppress(OSError):
            syscalls.syncfs(opened.upper.fd)
        _make_readonly(opened.store_root)
    log.info("%s: at rest", opened.point)
    with contextlib.suppress(OSError):
        os.unlink(_omitted())


def _make_readonly(root: int) -> None:
    """As unmounting would, so that no journal is left.  What was just closed is awaited."""
    end = time.monotonic() + _PATIENCE
    while root >= 0:
        try:
            syscalls.make_readonly(root)
        except OSError as exc:
            if exc.errno == errno.EBUSY and time.monotonic() < end:
                time.sleep(_PAUSE)
                continue
            log.warning("the store stays writable: %s, ignoring", exc)
        return


def _make_root() -> None:
    """A directory in memory, with what is kept; what was mounted below it is let go of first."""
    for entry in reversed(read_mounts()):
        if entry.point.startswith(f"{_PLACE}/"):
            with contextlib.suppress(OSError):  # gone with another
                syscalls.umount(entry.point, UnmountFlag.NOFOLLOW | UnmountFlag.DETACH)
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
