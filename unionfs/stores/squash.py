# SPDX-License-Identifier: GPL-2.0-or-later
"""squashfs before squashfuse, which mounts what the kernel would not: truncated, or absurd; and
how much of a device one takes.

Owns the look at the super block (Documentation/filesystems/squashfs.rst, squashfs_fs.h).
"""

import os
import struct
from typing import Final

from unionfs.errors import UnionfsError

_SUPER: Final = struct.Struct("<IIIIIHHHHHHQQ")  # to bytes_used
_MAGIC: Final = b"hsqs"
_BLOCKS: Final = range(12, 21)  # log2 of the sizes of blocks: 4 KiB to 1 MiB


def bytes_used(path: str) -> int | None:
    """How long the file system is; None if it is none, or longer than what it lies on."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        block = file.read(_SUPER.size)
    if len(block) < _SUPER.size or not block.startswith(_MAGIC):
        return None
    used: int = _SUPER.unpack(block)[12]
    return used if used <= end else None


def check_whole(path: str) -> None:
    """Raise an error if the image is shorter than its file system, or cannot be one."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        block = file.read(_SUPER.size)
    hint = "restore it from where it came"
    if len(block) < _SUPER.size:
        raise UnionfsError(f"{path} is truncated", hint=hint)
    words = _SUPER.unpack(block)
    size, log, used = words[3], words[6], words[12]
    if log not in _BLOCKS or size != 1 << log:
        raise UnionfsError(f"{path} is damaged: its blocks have {size} bytes", hint=hint)
    if used > end:
        raise UnionfsError(
            f"{path} is truncated: {end} bytes, and its file system has {used}", hint=hint
        )
