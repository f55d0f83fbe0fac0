# SPDX-License-Identifier: GPL-2.0-or-later
"""Space that is kept for removing: a whiteout, and the directory that it lies in, take some.

Owns AREA/reserve, a file without content that has blocks.  When a removal meets a full file system,
some of them are given back, and it is tried again; when there is space, the file is filled up.
Made by opened.py for a store with a file system of its own; filled by space.py, used by remove.py.
"""

import contextlib
import errno
import functools
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec

if TYPE_CHECKING:
    from unionfs.union import Union

P = ParamSpec("P")

FILE: Final = "reserve"
_MOST: Final = 4 << 20
_SHARE: Final = 25  # or 4 %: that is some hundred directories in the smallest image
_PARTS: Final = 16  # so that who writes at the same moment does not get all of it
_BLOCK: Final = 4096


class Reserve:
    """The file in an open area."""

    def __init__(self, area: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        self._fd = os.open(FILE, flags, 0o600, dir_fd=area)
        self._lock = threading.Lock()

    def close(self) -> None:
        """What is kept stays; a second call does nothing."""
        with self._lock:
            if self._fd >= 0:
                with contextlib.suppress(OSError):  # ENOTCONN: a program that mounted it has died
                    os.close(self._fd)
                self._fd = -1

    def fill(self, size: int, free: int) -> None:
        """Take what is missing, where there is much more than that."""
        wanted = min(_MOST, size // _SHARE) // _BLOCK * _BLOCK
        with self._lock:
            if self._fd < 0 or free < 3 * wanted:
                return
            status = os.fstat(self._fd)
            # A copy of a store has the size and no blocks.
            if wanted and (status.st_size < wanted or status.st_blocks * 512 < wanted):
                with contextlib.suppress(OSError):  # filled meanwhile, or it cannot be had
                    os.posix_fallocate(self._fd, 0, wanted)

    def give(self) -> bool:
        """Free a part; False if there is none."""
        with self._lock:
            if self._fd < 0:
                return False
            size = os.fstat(self._fd).st_size
            if size == 0:
                return False
            part = max(min(_MOST, size) // _PARTS, 16 * _BLOCK)
            os.ftruncate(self._fd, max(0, size - part))
            # What a journal has not noted as free is not given to anybody.
            os.fsync(self._fd)
            return True


def using_reserve(
    function: "Callable[Concatenate[Union, P], None]",
) -> "Callable[Concatenate[Union, P], None]":
    """A removal, which changes nothing if it fails, is tried again as long as space is given."""

    @functools.wraps(function)
    def wrapped(union: "Union", /, *args: P.args, **kwargs: P.kwargs) -> None:
        while True:
            try:
                return function(union, *args, **kwargs)
            except OSError as exc:
                reserve = union.work.reserve if union.work is not None else None
                if exc.errno != errno.ENOSPC or reserve is None or not reserve.give():
                    raise

    return wrapped
