# SPDX-License-Identifier: GPL-2.0-or-later
"""What a squashfs says of itself: whether it is whole, how long it is, and which one it is.

squashfuse mounts what the kernel would not: truncated, or absurd.  There is no UUID in it.
Owns the look at the super block (Documentation/filesystems/squashfs.rst, squashfs_fs.h).
"""

import os
import struct
from typing import Final

from unionfs import syscalls
from unionfs.errors import UnionfsError

_SUPER: Final = struct.Struct("<IIIIIHHHHHHQQ")  # to bytes_used
_MAGIC: Final = b"hsqs"
_BLOCKS: Final = range(12, 21)  # log2 of the sizes of blocks: 4 KiB to 1 MiB
_SUPER_MAGIC: Final = 0x73717368  # linux/magic.h
_SUPER_BYTES: Final = 96
_TABLES: Final = 64 * 1024


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


def fs_id(path: str) -> bytes:
    """16 bytes made of its super block, with the time it was made, and of the end of its tables.

    b"" if it is none, or not ours to read.
    """
    import hashlib

    try:
        used = bytes_used(path)
        if used is None:
            return b""
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read(_SUPER_BYTES))
            file.seek(max(0, used - _TABLES))
            digest.update(file.read(min(used, _TABLES)))
    except OSError:
        return b""
    return digest.digest()[:16]


def fs_id_of(fd: int) -> bytes:
    """The same of what the kernel has mounted, by a descriptor in it."""
    try:
        if syscalls.filesystem_type(f"/proc/self/fd/{fd}") != _SUPER_MAGIC:
            return b""
        device = os.fstat(fd).st_dev
        place = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
        return fs_id(f"/dev/{os.path.basename(os.path.realpath(place))}")
    except OSError:
        return b""
