# SPDX-License-Identifier: GPL-2.0-or-later
"""The base copied into memory, so that its medium can be taken away.  Called by root.py.

That is the image or device that is named as the base, else the device that the root is mounted
from.  What another has copied already stays where it is.

A tmpfs is mounted for the time of the copy and of the mount; then it is seen nowhere, and the
union's loop device holds what lies in it.
"""

import contextlib
import dataclasses
import os
import re
import stat
from typing import Final

from unionfs import locator, syscalls
from unionfs.boot.aside import IN_MEMORY
from unionfs.boot.telling import Teller
from unionfs.errors import UnionfsError
from unionfs.mounts import read_mounts
from unionfs.options import MountOptions
from unionfs.stores import find, mounted_base, squash
from unionfs.syscalls import MountFlag, UnmountFlag

_PLACE: Final = "/run/unionfs/toram"
_LEFT: Final = 128 << 20  # memory that the system is left with at least
_OWN: Final = 1 << 20  # what a tmpfs takes for itself
_PIECE: Final = 1 << 20
_TAIL: Final = 64 * 1024  # by which a squashfs is recognized: stores/base.py


def to_memory(
    options: MountOptions, lower: str | None, teller: Teller, stack: contextlib.ExitStack
) -> MountOptions:
    """The options with the copy for the base; as they are, with a warning, if it cannot be had."""
    try:
        source = lower or _device_of(options.lowers[-1])
        where = locator.parse(source)
        path = find.find(where, timeout=options.device_timeout or 0)
        if _is_in_memory(path):
            teller.say(f"{source} is in memory already")
            return options
        copy = _copy(path, stack)
    except (UnionfsError, OSError) as exc:
        reason = exc.line() if isinstance(exc, UnionfsError) else str(exc)
        teller.warn(f"the base stays where it is: {reason}")
        return options
    teller.say(f"{source} is copied to memory")
    if where.directory is not None:
        copy = f"{copy}:{where.directory}"
    return dataclasses.replace(options, lowers=(*options.lowers[:-1], copy))


def _device_of(root: str) -> str:
    """What the root is mounted from."""
    found = mounted_base.device_at(os.path.realpath(root), read_mounts())
    if found is None:
        hint = "name an image or a device by unionfs.lower="
        raise UnionfsError(f"toram has no effect: {root} is not mounted from a device", hint=hint)
    device, entry = found
    if "ro" not in entry.options.split(","):
        hint = "mount it read-only: ro on the kernel's command line"
        raise UnionfsError(f"{root} is mounted writable, and may change", hint=hint)
    if entry.root != "/":
        raise UnionfsError(f"{root} is a part of {device} only", hint="leave toram out")
    return device


def _is_in_memory(path: str) -> bool:
    """A RAM disk, or a loop device on a file that lies in memory."""
    name = os.path.basename(os.path.realpath(path))
    if path.startswith("/dev/") and re.fullmatch(r"z?ram[0-9]+", name):
        return True
    with contextlib.suppress(OSError), open(f"/sys/class/block/{name}/loop/backing_file") as file:
        path = file.read().strip()
    return os.path.exists(path) and _type_of(path) in IN_MEMORY


def _type_of(path: str) -> int:
    status = os.stat(path)
    return 0 if stat.S_ISBLK(status.st_mode) else syscalls.filesystem_type(path)


def _copy(path: str, stack: contextlib.ExitStack) -> str:
    with open(path, "rb", buffering=0) as source:
        if not stat.S_ISREG(mode := os.fstat(source.fileno()).st_mode) and not stat.S_ISBLK(mode):
            raise UnionfsError(f"{path} is no file and no device", hint="name an image")
        whole = source.seek(0, os.SEEK_END)
        # A partition may be much larger than the image that was written to it.
        used = squash.bytes_used(path) or whole
        free = _available()
        if free is not None and used + _LEFT > free:
            hint = "leave toram out, or add memory"
            mib = 1 << 20
            raise UnionfsError(
                f"{path} has {used // mib} MiB, and only {free // mib} are free", hint=hint
            )
        os.makedirs(_PLACE, 0o700, exist_ok=True)
        size = f"size={used + _TAIL + _OWN},mode=700"
        syscalls.mount("unionfs", _PLACE, "tmpfs", MountFlag.NOSUID | MountFlag.NODEV, size)
        stack.callback(os.rmdir, _PLACE)
        stack.callback(syscalls.umount, _PLACE, UnmountFlag.NOFOLLOW | UnmountFlag.DETACH)
        copy = f"{_PLACE}/{os.path.basename(path)}"
        with open(copy, "wb", buffering=0) as target:
            target.truncate(whole)
            _copy_range(source.fileno(), target.fileno(), 0, used)
            if used < whole:
                _copy_range(source.fileno(), target.fileno(), max(used, whole - _TAIL), whole)
    return copy


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    """What is empty stays a hole."""
    position = start
    while position < end:
        piece = os.pread(source, min(_PIECE, end - position), position)
        if not piece:
            raise UnionfsError("the base has become shorter while it was copied")
        if piece.strip(b"\0"):
            os.pwrite(target, piece, position)
        position += len(piece)


def _available() -> int | None:
    """Memory that can be had without swapping."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        if (
            match := re.search(r"^MemAvailable:\s+([0-9]+) kB", file.read(), re.MULTILINE)
        ) is not None:
            return int(match[1]) * 1024
    return None
