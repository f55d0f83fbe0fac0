# SPDX-License-Identifier: GPL-2.0-or-later
"""File flags (ioctl_iflags(2)): setting them, and heeding those of lower files.

In the upper they are the upper's file system's own: it refuses to change what is immutable, or
append-only, when it is asked to. Of a file in a lower we are the ones who must refuse. Whether a
program may set a flag the kernel has decided (vfs_fileattr_set). Called by operations.py and by the
families of changes.
"""

import fcntl
import os
import stat
import struct
from typing import Final

from unionfs.copy_up import ensure_upper
from unionfs.marks import fd_path, lent
from unionfs.union import UPPER_ENTRY, Entry, Union

# linux/fs.h
GETFLAGS: Final = 0x80086601
SETFLAGS: Final = 0x40086602
FSGETXATTR: Final = 0x801C581F
FSSETXATTR: Final = 0x401C5820
APPEND: Final = 0x20
_PROTECTING: Final = 0x10 | APPEND  # FS_IMMUTABLE_FL
_PROTECTING_X: Final = 0x8 | 0x10  # FS_XFLAG_IMMUTABLE, FS_XFLAG_APPEND
_FLAGS: Final = struct.Struct("=I")
_FSXATTR: Final = struct.Struct("=IIIII")  # xflags, extsize, nextents, projid, cowextsize


def may_remove(union: Union, parent: int, entry: Entry, *, upper: bool = False) -> None:
    """Before a name of a lower file is whited out: raises what unlink(2) would. `upper`: also of a
    file in the upper, where its file system is not going to be asked."""
    if entry.ino and (upper or entry.upper != UPPER_ENTRY):
        union.tree.changeable(parent, False, True)
        union.tree.changeable(entry.ino, False, upper)


def set_flags(union: Union, ino: int, wanted: bytes, *, extended: bool) -> None:
    """FS_IOC_SETFLAGS, or FS_IOC_FSSETXATTR where `extended`.

    Only what differs from what is shown is set: flags of a lower file may be none that the upper's
    file system has, and those that a copy does not have were not asked for.
    """
    shown = union.tree.flags(ino, extended)
    from_lower = not union.info(ino).upper
    # With its data: once it is immutable it cannot be completed.
    ensure_upper(union, ino, data=True)
    with union.committing(ino):
        held = union.tree.open_node(ino, os.O_PATH | os.O_NOFOLLOW)
        try:
            with lent(held, stat.S_IRUSR):
                fd = os.open(fd_path(held), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(held)
        try:
            if extended:
                now = fcntl.ioctl(fd, FSGETXATTR, bytes(28))
                fcntl.ioctl(fd, FSSETXATTR, _extended(shown, now, wanted, from_lower=from_lower))
            else:
                now = fcntl.ioctl(fd, GETFLAGS, bytes(8))
                protecting = _PROTECTING if from_lower else 0
                words = [_FLAGS.unpack_from(value)[0] for value in (shown, now, wanted)]
                flags = _merged(words[0], words[1], words[2], protecting)
                fcntl.ioctl(fd, SETFLAGS, struct.pack("=Q", flags))
        finally:
            os.close(fd)


def _merged(shown: int, now: int, wanted: int, protecting: int) -> int:
    """What to set: what the file has, and what a copy could not yet have, but for what changes."""
    changes = shown ^ wanted
    return (now | shown & protecting) & ~changes | wanted & changes


def _extended(shown: bytes, now: bytes, wanted: bytes, *, from_lower: bool) -> bytes:
    fields = [_FSXATTR.unpack_from(value) for value in (shown, now, wanted)]
    merged = [
        asked if asked != seen else have
        for seen, have, asked in zip(fields[0], fields[1], fields[2], strict=True)
    ]
    protecting = _PROTECTING_X if from_lower else 0
    merged[0] = _merged(fields[0][0], fields[1][0], fields[2][0], protecting)
    return _FSXATTR.pack(*merged) + bytes(8)
