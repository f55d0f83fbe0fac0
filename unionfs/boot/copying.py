# SPDX-License-Identifier: GPL-2.0-or-later
"""The base copied into memory, so that its medium can be taken away.  Called by root.py.

That is the image or device that is named as the base, else the device that the root is mounted
from.  What another has copied already stays where it is.

A tmpfs is mounted for the time of the copy and of the mount; then it is seen nowhere, and the
union's loop device holds what lies in it.
"""

import contextlib
import os
import re
import stat
from typing import Final

from unionfs import locator, syscalls
from unionfs.boot.aside import IN_MEMORY
from unionfs.boot.telling import MIB, Teller
from unionfs.errors import UnionfsError
from unionfs.mounts import read_mounts
from unionfs.stores import find, mounted_base, squash
from unionfs.stores.tools import Progress
from unionfs.syscalls import MountFlag, UnmountFlag

_PLACE: Final = "/run/unionfs/toram"
_LEFT: Final = 128 << 20  # memory that the system is left with at least
_OWN: Final = 1 << 20  # what a tmpfs takes for itself
_PIECE: Final = 1 << 20
_TAIL: Final = 64 * 1024  # by which a squashfs is recognized: stores/base.py


def to_memory(
    lower: str | None, root: str, seconds: float, teller: Teller, stack: contextlib.ExitStack
) -> str | None:
    """The copy of the base, a locator; None, with a line that says why, if there is none.

    seconds: how long the device of `lower` is waited for.
    """
    try:
        source = lower or _device_of(root)
        where = locator.parse(source)
        path = find.find(where, timeout=seconds)
        if _is_in_memory(path):
            teller.say(f"{source} is in memory already")
            return None
        copy = _copy(path, source, teller, stack)
    except (UnionfsError, OSError) as exc:
        reason = exc.line() if isinstance(exc, UnionfsError) else str(exc)
        teller.warn(f"the base stays where it is: {reason}")
        return None
    teller.say(f"{source} is copied to memory")
    return copy if where.directory is None else f"{copy}:{where.directory}"


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


def _copy(path: str, called: str, teller: Teller, stack: contextlib.ExitStack) -> str:
    with open(path, "rb", buffering=0) as source:
        if not stat.S_ISREG(mode := os.fstat(source.fileno()).st_mode) and not stat.S_ISBLK(mode):
            raise UnionfsError(f"{path} is no file and no device", hint="name an image")
        whole = source.seek(0, os.SEEK_END)
        # A partition may be much larger than the image that was written to it.
        used = squash.bytes_used(path) or whole
        free = _available()
        if free is not None and used + _LEFT > free:
            hint = "leave toram out, or add memory"
            raise UnionfsError(
                f"{path} has {used // MIB} MiB, and only {free // MIB} are free", hint=hint
            )
        os.makedirs(_PLACE, 0o700, exist_ok=True)
        size = f"size={used + _TAIL + _OWN},mode=700"
        syscalls.mount("unionfs", _PLACE, "tmpfs", MountFlag.NOSUID | MountFlag.NODEV, size)
        stack.callback(os.rmdir, _PLACE)
        stack.callback(syscalls.umount, _PLACE, UnmountFlag.NOFOLLOW | UnmountFlag.DETACH)
        copy = f"{_PLACE}/{os.path.basename(path)}"
        teller.say(f"copying {called} to memory: {-(-used // MIB)} MiB")
        with open(copy, "wb", buffering=0) as target, teller.counting(called, used) as advance:
            target.truncate(whole)
            _copy_range(source.fileno(), target.fileno(), 0, used, advance)
            if used < whole:
                start = max(used, whole - _TAIL)
                _copy_range(source.fileno(), target.fileno(), start, whole, advance)
    return copy


def _copy_range(source: int, target: int, start: int, end: int, advance: Progress) -> None:
    """What is empty stays a hole."""
    position = start
    while position < end:
        piece = os.pread(source, min(_PIECE, end - position), position)
        if not piece:
            raise UnionfsError("the base has become shorter while it was copied")
        if piece.strip(b"\0"):
            os.pwrite(target, piece, position)
        position += len(piece)
        advance(len(piece))


def _available() -> int | None:
    """Memory that can be had without swapping."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        if (
            match := re.search(r"^MemAvailable:\s+([0-9]+) kB", file.read(), re.MULTILINE)
        ) is not None:
            return int(match[1]) * 1024
    return None
