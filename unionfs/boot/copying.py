# SPDX-License-Identifier: GPL-2.0-or-later
"""The base copied into memory, so that its medium can be taken away.  Called by root.py.

A tmpfs is mounted for the time of the copy and of the mount; then it is seen nowhere, and the
union's loop device holds what lies in it.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import stat
from typing import Final

from unionfs import locator, syscalls
from unionfs.boot.telling import Teller
from unionfs.errors import UnionfsError
from unionfs.options import MountOptions
from unionfs.stores import find
from unionfs.syscalls import MountFlag, UnmountFlag

_PLACE: Final = "/run/unionfs/toram"
_LEFT: Final = 128 << 20  # memory that the system is left with at least
_OWN: Final = 1 << 20  # what a tmpfs takes for itself


def to_memory(
    options: MountOptions, lower: str | None, teller: Teller, stack: contextlib.ExitStack
) -> MountOptions:
    """The options with the copy for the base; as they are, with a warning, if it cannot be had."""
    if lower is None:
        teller.warn("toram has no effect: the root is mounted already, and no image is named")
        return options
    try:
        copy = _copy(lower, options.device_timeout or 0, stack)
    except (UnionfsError, OSError) as exc:
        reason = exc.line() if isinstance(exc, UnionfsError) else str(exc)
        teller.warn(f"the base stays where it is: {reason}")
        return options
    teller.say(f"{lower} is copied to memory")
    lowers = tuple(copy if text == options.lowers[-1] else text for text in options.lowers)
    return dataclasses.replace(options, lowers=lowers)


def _copy(lower: str, timeout: float, stack: contextlib.ExitStack) -> str:
    where = locator.parse(lower)
    path = find.find(where, timeout=timeout)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        hint = "only an image is copied"
        raise UnionfsError(f"{path} is no file", hint=hint)
    free = _available()
    if free is not None and status.st_size + _LEFT > free:
        hint = "leave toram out, or add memory"
        mib = 1 << 20
        raise UnionfsError(
            f"{path} has {status.st_size // mib} MiB, and only {free // mib} are free", hint=hint
        )
    os.makedirs(_PLACE, 0o700, exist_ok=True)
    size = f"size={status.st_size + _OWN},mode=700"
    syscalls.mount("unionfs", _PLACE, "tmpfs", MountFlag.NOSUID | MountFlag.NODEV, size)
    stack.callback(os.rmdir, _PLACE)
    stack.callback(syscalls.umount, _PLACE, UnmountFlag.NOFOLLOW | UnmountFlag.DETACH)
    copy = f"{_PLACE}/{os.path.basename(path)}"
    shutil.copyfile(path, copy)
    return copy if where.directory is None else f"{copy}:{where.directory}"


def _available() -> int | None:
    """Memory that can be had without swapping."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        if (
            match := re.search(r"^MemAvailable:\s+([0-9]+) kB", file.read(), re.MULTILINE)
        ) is not None:
            return int(match[1]) * 1024
    return None
