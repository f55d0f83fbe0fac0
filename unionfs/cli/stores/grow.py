# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store grow`."""

import os
from collections.abc import Sequence

from unionfs import locator
from unionfs.cli import show
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, usage_error

USAGE = """\
unionfs store grow STORE --size SIZE|+SIZE [-q]
       unionfs store grow /dev/NAME"""

DESCRIPTION = """\
Makes a store larger. xfs and btrfs grow also while a union uses them, ext4 where the kernel
lets us. The image of an ext4 that is not mounted is resized as a copy, which then takes its
place: that needs the space on disk for both. A file system on a device is grown to the end
of the device."""

EPILOG = """
exit codes: 0 grown, 1 wrong usage, 2 a program is missing, 8 interrupted, 32 failed;
on 8 and 32 what was in the store is there as before
"""


def run(argv: Sequence[str]) -> int:
    """Grow it."""
    parser = Parser(prog="unionfs store grow", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("store", metavar="STORE", help="IMAGE, /dev/NAME, LABEL=...")
    parser.add_argument("--size", help="the new size, or how much more: 8G, +2G")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    given = parser.read(argv)
    from unionfs.stores import find, resizing
    from unionfs.stores.probe import check_readable

    path = find.find(locator.parse(given.store), search="images")
    if os.path.isdir(path):
        raise usage_error(f"{path} is a directory", "it is as large as its file system")
    check_readable(path)
    size = None
    if given.size:
        size = show.read_size(given.size.removeprefix("+"))
        if given.size.startswith("+"):
            size += os.stat(path).st_size
    total = os.stat(path).st_size
    with show.progress(path, total, quiet=given.quiet) as advance:
        reached = resizing.grow(path, size, advance)
    print(f"{path}: {show.size_text(reached)}")
    return ExitCode.OK
