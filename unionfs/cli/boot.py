# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs boot`: what the kernel's command line says of the root, done.

Owns its parser and what is printed.  Called by main.py, and that by the hooks in system/.
"""

import os
from collections.abc import Sequence

from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, UnionfsError

USAGE = """\
unionfs boot [--root DIR] [--cmdline TEXT] [--lower LOCATOR] [-n]
       unionfs boot --files"""

DESCRIPTION = """\
Mounts the union that the kernel's command line asks for over DIR, where an initramfs
has mounted the root, before the system is started from there. A store that is missing
or broken does not stop the boot, unless unionfs.fallback=fail is asked for."""

EPILOG = """
exit codes: 0 done, or nothing asked; 64 the system goes on without its store or
  without the union: the reason is told, logged, and kept in /run/unionfs/root;
  32 failed, and unionfs.fallback=fail; 1 wrong usage

example of a kernel command line (see unionfs-boot(8)):
  root=LABEL=SYSTEM cow_label=persist
"""

CMDLINE = "/proc/cmdline"


def run(argv: Sequence[str]) -> int:
    """Do it."""
    parser = Parser(prog="unionfs boot", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("--root", metavar="DIR", default="/sysroot", help="where the root is (/sysroot)")
    add("--cmdline", metavar="TEXT", help="instead of what /proc/cmdline has")
    add("--lower", metavar="LOCATOR", help="the base is this image or device, not what DIR has")
    add("-n", "--dry-run", action="store_true", help="only tell what would be done")
    add("--files", action="store_true", help="list the files that an initramfs needs for this")
    given = parser.read(argv)
    if given.files:
        from unionfs.boot import files

        print("\n".join(files.needed()))
        return ExitCode.OK
    from unionfs.boot import root
    from unionfs.boot.cmdline import parse_cmdline

    text = given.cmdline if given.cmdline is not None else _kernels_own()
    # What lies below it is named by joining paths, and a relative one would be taken from /.
    top = os.path.realpath(given.root)
    return root.boot(parse_cmdline(text), top, lower=given.lower, dry=given.dry_run)


def _kernels_own() -> str:
    try:
        with open(CMDLINE, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError as exc:
        reason = os.strerror(exc.errno or 0)
        hint = "mount /proc, or give --cmdline TEXT"
        raise UnionfsError(f"cannot read {CMDLINE}: {reason}", hint=hint) from exc
