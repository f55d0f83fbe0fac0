# SPDX-License-Identifier: GPL-2.0-or-later
"""`-` for the file of a backup: standard output, or standard input.

Owns the temporary file in between.  A backup may have to be begun anew, and a restore first looks
at the end: neither can be done on a pipe.  So nothing is written to it that is not complete.
Called by backup.py and restore.py.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Final

STANDARD: Final = "-"
_LARGE: Final = "/var/tmp"  # not in memory, as /tmp may be


def spool_directory() -> str:
    """Where the temporary file lies, which has no name."""
    return os.environ.get("TMPDIR") or _LARGE


@contextlib.contextmanager
def spooled() -> Iterator[tuple[int, str]]:
    """A temporary file, to be filled."""
    with tempfile.TemporaryFile(dir=spool_directory(), buffering=0) as file:
        yield file.fileno(), STANDARD


def pour(fd: int) -> None:
    """Write all of an open file to standard output."""
    sys.stdout.flush()
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.flush()


def taken_in() -> IO[bytes]:
    """What standard input has, as an open file."""
    file = tempfile.TemporaryFile(dir=spool_directory(), buffering=0)  # noqa: SIM115
    try:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file
