# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store shrink`."""

import os
from collections.abc import Sequence

from unionfs import locator
from unionfs.cli import show
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, usage_error

USAGE = "unionfs store shrink IMAGE --size SIZE [-q]"

DESCRIPTION = """\
Makes an image and its file system smaller. An ext4, which must not be in use, is resized as
a copy that then takes its place; a btrfs is resized in place (root). xfs cannot be made
smaller. To give unused space back and keep the size, there is unionfs store compact."""

EPILOG = """
exit codes: 0 done, 1 wrong usage, 2 a program is missing, 8 interrupted, 32 failed;
on 8 and 32 what was in the store is there as before
"""


def run(argv: Sequence[str]) -> int:
    """Shrink it."""
    parser = Parser(
        prog="unionfs store shrink", usage=USAGE, description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("image", metavar="IMAGE", help="an image")
    parser.add_argument("--size", help="the new size: 2G")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    given = parser.read(argv)
    if not given.size:
        raise usage_error("no --size is given", "write --size 2G")
    from unionfs.stores import find, resizing

    path = find.find(locator.parse(given.image), search="images")
    if os.path.isdir(path):
        raise usage_error(f"{path} is a directory", "it is as large as what is in it")
    size = show.read_size(given.size)
    total = os.stat(path).st_size if os.path.exists(path) else None
    with show.progress(path, total, quiet=given.quiet) as advance:
        resizing.shrink(path, size, advance)
    print(f"{path}: {show.size_text(size)}")
    return ExitCode.OK
