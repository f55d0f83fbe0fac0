# SPDX-License-Identifier: GPL-2.0-or-later
"""Inode numbers of copies that can carry no extended attribute: a user's symbolic links and special
files, every file of an upper without attributes.

AREA/numbers/INO, a symbolic link to NUMBER:BIRTH:ORIGIN, all in hexadecimal: made by one call
before the copy is published, removed after its last name is. BIRTH is the copy's own time of birth,
ORIGIN that of what it is a copy of (left out if it is not known). One that was left behind by a cut
is not believed for another file that gets the same number, since that was made at another time.
Read in C.
"""

import contextlib
import os
import stat

from unionfs._native import birth_time
from unionfs.union import Union


def keep(union: Union, fd: int, ino: int, origin: int) -> None:
    """Record the union's number of what `fd` stands for, and when its origin was made (0: not
    known)."""
    if union.work is None or union.work.numbers < 0:
        return
    record = f"{os.stat(fd).st_ino:x}"
    value = f"{ino:x}:{birth_time(fd):x}" + (f":{origin:x}" if origin else "")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(record, dir_fd=union.work.numbers)
    os.symlink(value, record, dir_fd=union.work.numbers)


def last_link(union: Union, ino: int) -> str | None:
    """The record to drop when the one name that is left goes; asked before it goes."""
    info = union.info_or_none(ino)
    if union.work is None or union.work.numbers < 0 or info is None:
        return None
    if not info.upper or not info.foreign or stat.S_ISDIR(info.type):
        return None
    if stat.S_ISREG(info.type) and union.marks.xattrs:
        return None
    fd = union.tree.open_node(ino, os.O_PATH | os.O_NOFOLLOW)
    try:
        status = os.stat(fd)
    finally:
        os.close(fd)
    return f"{status.st_ino:x}" if status.st_nlink == 1 else None


def drop(union: Union, record: str | None) -> None:
    """Remove a record."""
    if record is not None and union.work is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(record, dir_fd=union.work.numbers)
