# SPDX-License-Identifier: GPL-2.0-or-later
"""The helper that umount(8) starts: umount.fuse.unionfs.

Owns umount(8)'s meaning of the flags.  Without it umount returns while the daemon still writes, and
what the union stands on could not be unmounted next.  Called by umount(8), and so by systemd for
.mount units.
"""

import sys
from collections.abc import Sequence

from unionfs.cli.helper import TYPES, enter
from unionfs.cli.main import guarded
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, usage_error

USAGE = "umount.fuse.unionfs DIR [-flnrv] [-N NAMESPACE] [-t TYPE]"

DESCRIPTION = """\
Unmounts the union at DIR, called by umount(8), and returns when its daemon has ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what umount(8) asks; its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return guarded("umount.fuse.unionfs", lambda: run(arguments))


def run(argv: Sequence[str]) -> int:
    """Unmount."""
    parser = Parser(prog="umount.fuse.unionfs", usage=USAGE, description=DESCRIPTION)
    add = parser.add_argument
    add("directory", metavar="DIR", help="the mount point")
    add("-f", action="store_true", dest="force", help="abort requests, if the daemon hangs")
    add("-l", action="store_true", dest="lazy", help="detach now, and do not wait")
    add("-n", action="store_true", help="ignored: there is no mtab to write")
    add("-r", action="store_true", help="ignored: a union is not made read-only instead")
    add("-v", action="store_true", dest="verbose", help="say what is done")
    add("-N", metavar="NAMESPACE", dest="namespace", help="unmount in this mount namespace")
    add("-t", metavar="TYPE", dest="fstype", default=TYPES[0], help="one of our own types")
    given = parser.read(argv)
    if given.fstype not in TYPES:
        raise usage_error(f"type {given.fstype} is not ours", f"use -t {TYPES[0]}")
    # Loaded before another namespace hides the files it is loaded from.
    from unionfs import syscalls, unmounting  # noqa: F401

    enter(given.namespace)
    unmounting.unmount(given.directory, lazy=given.lazy, force=given.force)
    if given.verbose:
        print(f"umount.fuse.unionfs: {given.directory} unmounted")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
