# SPDX-License-Identifier: GPL-2.0-or-later
"""FUSE passthrough: whether it can be had, and why not (docs/adr/0011).

The kernel then reads and writes a layer's files by itself. What is opened so is decided in
cext/face.c. Called by the engine's start and by the status.
"""

import errno
import fcntl
import os
import struct
from typing import Final

from unionfs.options import MountOptions

# include/uapi/linux/fuse.h
_BACKING_OPEN: Final = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
_BACKING_CLOSE: Final = 0x4004E502  # _IOW(229, 2, uint32_t)
_BACKING_MAP: Final = struct.Struct("=iIQ")
# How many stacked file systems may lie below a mount, ours not counted. With 1 ours can itself be
# below an overlay; the kernel's limit is two in all.
STACK_DEPTH: Final = 1
OFF, AUTO, ALL = range(3)  # enum passthrough (cext/tree.h)
_WHICH: Final = {"off": OFF, "auto": AUTO, "all": ALL}
_CAP_SYS_ADMIN: Final = 1 << 21


def which(options: MountOptions) -> int:
    """Which files are to be passed through, as the engine takes it."""
    return _WHICH[options.passthrough]


def not_wanted(options: MountOptions) -> str | None:
    """Why the kernel is not even asked for it, or None."""
    if options.passthrough == "off":
        return "turned off by passthrough=off"
    return None if _privileged() else "only root of the whole machine may have it"


def _privileged() -> bool:
    """CAP_SYS_ADMIN in the initial user namespace, as the kernel wants it."""
    try:
        with open("/proc/self/uid_map") as file:
            whole = file.read().split() == ["0", "0", "4294967295"]
        with open("/proc/self/status") as file:
            words = dict(line.split(":", 1) for line in file)
    except OSError:
        return False
    return whole and bool(int(words.get("CapEff", "0"), 16) & _CAP_SYS_ADMIN)


def refused(device: int) -> str | None:
    """Try it on a file in memory: why the kernel refuses, or None."""
    file = os.memfd_create("unionfs-passthrough", os.MFD_CLOEXEC)
    try:
        number = fcntl.ioctl(device, _BACKING_OPEN, bytearray(_BACKING_MAP.pack(file, 0, 0)))
    except OSError as exc:
        return explain(exc.errno or errno.EIO)
    finally:
        os.close(file)
    fcntl.ioctl(device, _BACKING_CLOSE, struct.pack("=I", number))
    return None


def explain(code: int) -> str:
    """What an errno of BACKING_OPEN says of a file."""
    if code == errno.ELOOP:
        return "the layer lies on a file system that is itself stacked (overlay, FUSE)"
    return os.strerror(code)
