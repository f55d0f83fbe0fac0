# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store create`."""

import os
from collections.abc import Sequence

from unionfs.cli import show
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, usage_error
from unionfs.stores import making

USAGE = """\
unionfs store create IMAGE --size SIZE [--fs FS] [--label LABEL] [--full] [-q]
       unionfs store create /dev/NAME [--fs FS] [--label LABEL]"""

DESCRIPTION = """\
Makes a store. IMAGE gets its name when it is complete; what is there already, a file or
something on the device, is never overwritten."""

EPILOG = """
exit codes: 0 made, 1 wrong usage, 2 a program is missing, 8 interrupted, 32 failed

example:
  unionfs store create changes.img --size 8G --label persist
  unionfs mount rootfs.squashfs changes.img /mnt
"""


def run(argv: Sequence[str]) -> int:
    """Make it."""
    parser = Parser(
        prog="unionfs store create", usage=USAGE, description=DESCRIPTION, epilog=EPILOG
    )
    add = parser.add_argument
    add("path", metavar="IMAGE", help="the file to make, or a block device")
    add("--size", help="of the image: 512M, 8G")
    add("--fs", choices=sorted(making.KINDS), default="ext4", help="file system; ext4")
    add("--label", default="", help="to find it by: LABEL=...")
    add("--full", action="store_true", help="take the space now; else it is taken as it is used")
    add("-q", "--quiet", action="store_true", help="no progress bar")
    given = parser.read(argv)
    path = given.path
    device = path.startswith("/dev/") and os.path.exists(path)
    if device and given.size:
        raise usage_error("--size is for images", "leave it out: a device has its own")
    if not device and not given.size:
        raise usage_error("no --size is given", "write --size 8G")
    size = None if device else show.read_size(given.size)
    making.check_wish(given.fs, size, given.label)
    if size is None:
        making.format_device(path, given.fs, given.label)
    else:
        with show.progress(path, size if given.full else None, quiet=given.quiet) as advance:
            making.create_image(
                path, size, given.fs, given.label, sparse=not given.full, advance=advance
            )
    return ExitCode.OK
