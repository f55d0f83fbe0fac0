# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading a whole file that says what is to be mounted.

Owns what such a file may be: a plain one, of a size that somebody could have written.  A FIFO or a
device in its place must not hold up a boot (systemd's generators, the initramfs), nor fill memory.
Called by files.py and persistence.py.
"""

import errno
import os
import stat
from typing import Final

LARGEST: Final = 1 << 20
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def read_whole(path: str, *, folder: int | None = None, flags: int = 0) -> bytes:
    """The bytes of a file, `path` being seen from the directory `folder`.  Raises OSError."""
    fd = os.open(path, _FLAGS | flags, dir_fd=folder)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no plain file", path)
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise OSError(errno.EFBIG, f"it is larger than {LARGEST >> 20} MiB", path)
    return data
