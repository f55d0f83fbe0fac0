# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store backup`."""

import contextlib
import os
import sys
from collections.abc import Sequence

from unionfs.cli import show
from unionfs.cli.parser import Parser
from unionfs.cli.stores.standard import STANDARD, pour, spool_directory, spooled
from unionfs.errors import ExitCode, usage_error
from unionfs.errors import told as failing

USAGE = "unionfs store backup STORE FILE [-q]"

DESCRIPTION = """\
Writes the changes in STORE to FILE, a tar archive in zstd with a checksum. The store may
be in use: the backup has it as it was at one moment. FILE gets its name when it is
complete, and is never overwritten; it must not be in STORE. With - it is standard output,
to which the backup is written when it is complete.
STORE with changes of several unions: name one by :/dir."""

EPILOG = """
exit codes: 0 written, 1 wrong usage, 2 a program is missing, 8 interrupted, 32 failed;
unless it is 0 there is no FILE

example:
  unionfs store backup LABEL=persist /media/backup/monday.tar.zst
  unionfs store backup LABEL=persist - | ssh elsewhere 'cat >monday.tar.zst'
"""


def run(argv: Sequence[str]) -> int:
    """Back up."""
    parser = Parser(
        prog="unionfs store backup", usage=USAGE, description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "store", metavar="STORE", help="DIR, IMAGE, /dev/NAME, LABEL=..., with :/dir"
    )
    parser.add_argument("file", metavar="FILE", help="the backup to write; -: standard output")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no report")
    given = parser.read(argv)
    from unionfs.stores import backing, foreign
    from unionfs.stores.making import new_file

    to_output = given.file == STANDARD
    if to_output and sys.stdout.isatty():
        raise usage_error("a backup is not written to a terminal", "name a FILE, or a pipe")
    folder = spool_directory() if to_output else os.path.dirname(os.path.abspath(given.file))
    with backing.chosen(given.store, write=False) as upper, contextlib.ExitStack() as stack:
        backing.refuse_bound(upper)
        foreign.refuse_divided(upper)
        backing.refuse_target(upper, folder)
        new = spooled() if to_output else new_file(given.file)
        fd, _ = stack.enter_context(new)
        total = backing.tree_bytes(upper.fd)
        with (
            show.progress(given.file, total, quiet=given.quiet) as advance,
            open(os.dup(fd), "w+b", buffering=0) as target,
            failing(f"cannot back up {upper.name} to {given.file}"),
        ):
            trailer = backing.backup(upper, target, advance)
        size = os.fstat(fd).st_size
        if to_output:
            pour(fd)
    if not given.quiet:
        told = f"{show.size_text(trailer.bytes)} in {show.size_text(size)}"
        how = ", encrypted as the store is" if upper.encrypted else ""
        line = f"{given.file}: {told}, sha256 {trailer.sha256[:16]}{how}"
        print(line, file=sys.stderr if to_output else sys.stdout)
    return ExitCode.OK
