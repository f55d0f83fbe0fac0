# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store compact`."""

import os
from collections.abc import Sequence

from unionfs import locator
from unionfs.cli import show
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, usage_error

USAGE = "unionfs store compact STORE [-q]"

DESCRIPTION = """\
Gives what the file system of STORE does not use back to the disk: an image then takes only
the space of what is in it. Root may do it while a union uses the store."""

EPILOG = """
exit codes: 0 done, 1 wrong usage, 2 a program is missing, 8 interrupted, 32 failed
"""


def run(argv: Sequence[str]) -> int:
    """Compact it."""
    parser = Parser(
        prog="unionfs store compact", usage=USAGE, description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("store", metavar="STORE", help="IMAGE, /dev/NAME, LABEL=...")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    given = parser.read(argv)
    from unionfs.stores import find, resizing

    path = find.find(locator.parse(given.store), search="images")
    if os.path.isdir(path):
        raise usage_error(f"{path} is a directory", "it takes the space of what is in it")
    before = os.stat(path).st_blocks * 512 if os.path.exists(path) else 0
    with show.working(path, quiet=given.quiet) as advance:
        resizing.compact(path, advance)
    after = os.stat(path).st_blocks * 512
    if os.path.isfile(path):
        print(f"{path}: {show.size_text(before)} on disk before, {show.size_text(after)} now")
    return ExitCode.OK
