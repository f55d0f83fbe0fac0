# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store reset`."""

import functools
from collections.abc import Sequence

from unionfs.cli import key
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, printable

USAGE = """\
unionfs store reset STORE [PATH...] [--key-file FILE | --credential NAME]
       [-n] [--discard]"""

DESCRIPTION = """\
Takes the changes in STORE away, all of them or those at each PATH of the union, so that the
base is seen again. The store must not be in use. What is taken away is kept beside it, and
its place is told, unless --discard is given. For a PATH in an encrypted store its
passphrase is needed, and in one of fscrypt always; what is reset as a whole is then
encrypted as before."""

EPILOG = """
exit codes: 0 done, 1 wrong usage, 32 failed: nothing was taken away

example:
  unionfs store reset changes.img /etc/fstab -n
"""


def run(argv: Sequence[str]) -> int:
    """Reset it."""
    parser = Parser(prog="unionfs store reset", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("store", metavar="STORE", help="DIR, IMAGE, /dev/NAME, LABEL=..., with :/dir")
    add("paths", nargs="*", metavar="PATH", help="in the union")
    add("-n", "--dry-run", action="store_true", help="only tell what would be taken away")
    add("--discard", action="store_true", help="do not keep what is taken away")
    key.add_arguments(parser)
    given = parser.read(argv)
    source = key.source(given)
    from unionfs import passphrase
    from unionfs.stores import backing, changing

    ask = functools.partial(passphrase.obtain, source)
    shown = ask if given.paths else None
    with backing.chosen(given.store, write=not given.dry_run, ask=shown) as upper:
        found = changing.find_paths(upper, given.paths) or changing.contents(upper)
        if given.dry_run:
            for relative in found:
                print(printable(f"{upper.name}: {relative}"))
            return ExitCode.OK
        if given.paths:
            kept = changing.reset_paths(upper, found, keep=not given.discard)
            place = f"{upper.name}/{kept}"
        else:
            keep = not given.discard
            kept = changing.reset(upper, ask, keep=keep, known=any(source))
            place = "" if kept is None else upper.beside(kept)
        if kept is not None:
            print(printable(f"what was taken away is kept in {place}"))
    return ExitCode.OK
