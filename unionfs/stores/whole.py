# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether an image or device is as long as the file system in it.

Owns what the super blocks say of that.  What is cut off is lost, and must not be made to look
whole: a file that is lengthened has zeros there, in which e2fsck finds nothing wrong.  Called
before a file system is checked, resized, or mounted by a program, which would not ask.
"""

import os
import struct
from collections.abc import Callable
from typing import Final

from unionfs.errors import UnionfsError

_HINT: Final = "restore a backup"
_SUPERS: Final = 65536 + 4096  # to where the last super block ends: btrfs's
_EXT: Final = 1024
_EXT_BYTES: Final = 1024
_EXT_64BIT: Final = 0x80
_XFS_BYTES: Final = 512
_BTRFS: Final = 65536
_BTRFS_MAGIC: Final = b"_BHRfS_M"


def _ext(data: bytes) -> int | None:
    """Documentation/filesystems/ext4/super.rst."""
    block = data[_EXT : _EXT + _EXT_BYTES]
    if len(block) < _EXT_BYTES:
        return None
    count = int.from_bytes(block[4:8], "little")
    log = int.from_bytes(block[24:28], "little")
    if int.from_bytes(block[0x60:0x64], "little") & _EXT_64BIT:
        count |= int.from_bytes(block[0x150:0x154], "little") << 32
    return count << (10 + min(log, 6))


def _xfs(data: bytes) -> int | None:
    """fs/xfs/libxfs/xfs_format.h: sb_blocksize and sb_dblocks."""
    if len(data) < _XFS_BYTES or not data.startswith(b"XFSB"):
        return None
    size, count = struct.unpack_from(">IQ", data, 4)
    return int(size) * int(count)


def _btrfs(data: bytes) -> int | None:
    """include/uapi/linux/btrfs_tree.h: total_bytes of dev_item, this one of several devices."""
    block = data[_BTRFS:]
    if len(block) < 4096 or block[0x40:0x48] != _BTRFS_MAGIC:
        return None
    return int(struct.unpack_from("<Q", block, 0xC9 + 8)[0])


_SIZES: Final[dict[str, Callable[[bytes], int | None]]] = {
    "ext2": _ext,
    "ext3": _ext,
    "ext4": _ext,
    "xfs": _xfs,
    "btrfs": _btrfs,
}


def check_whole(path: str, fstype: str) -> None:
    """Raise an error if what is there is shorter than its file system; of other kinds it is not
    known."""
    if fstype not in _SIZES:
        return
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        size = _SIZES[fstype](file.read(_SUPERS))
    if size is None:
        raise UnionfsError(f"{path} is truncated", hint=_HINT)
    if size > end:
        what = f"{path} is truncated: {end} bytes, and its file system has {size}"
        raise UnionfsError(what, hint=_HINT)
