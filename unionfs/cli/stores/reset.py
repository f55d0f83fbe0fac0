# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store reset`."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unionfs.cli import key, show
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, printable, usage_error

if TYPE_CHECKING:
    from unionfs.passphrase import Source

USAGE = """\
unionfs store reset STORE [PATH...] [--key-file FILE | --credential NAME]
       [-n] [--discard] [-q]
       unionfs store reset STORE --forget [DATE] [-n] [--key-file FILE | --credential NAME]"""

DESCRIPTION = """\
Takes the changes in STORE away, all of them or those at each PATH of the union, so that the
base is seen again. The store must not be in use. What is taken away is kept beside it, and
its place is told, unless --discard is given. For a PATH in an encrypted store its
passphrase is needed, and in one of fscrypt always; what is reset as a whole is then
encrypted as before.
--forget removes what is kept of STORE, by whatever verb: all of it, or that of DATE, of which
the beginning will do. STORE may be in use, and is not reset."""

EPILOG = """
exit codes: 0 done, 1 wrong usage, 32 failed: nothing was taken away, or what was could not all be
removed (it says which, and where it is)

example:
  unionfs store reset changes.img /etc/fstab -n
  unionfs store reset changes.img --forget 20261128
"""


def run(argv: Sequence[str]) -> int:
    """Reset it."""
    parser = Parser(prog="unionfs store reset", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("store", metavar="STORE", help="DIR, IMAGE, /dev/NAME, LABEL=..., with :/dir")
    add("paths", nargs="*", metavar="PATH", help="in the union")
    add("-n", "--dry-run", action="store_true", help="only tell what would be taken away")
    add("--discard", action="store_true", help="do not keep what is taken away")
    add("-q", "--quiet", action="store_true", help="no progress")
    add("--forget", nargs="?", const="", metavar="DATE", help="remove what is kept, and no more")
    key.add_arguments(parser)
    given = parser.read(argv)
    source = key.source(given)
    if given.forget is not None:
        if given.paths or given.discard:
            raise usage_error("--forget stands alone", "leave the PATH and --discard out")
        return _forget(given.store, given.forget, source, dry_run=given.dry_run)
    from unionfs import passphrase
    from unionfs.stores import backing, changing, foreign

    ask = functools.partial(passphrase.obtain, source)
    shown = ask if given.paths else None
    with backing.chosen(given.store, write=not given.dry_run, ask=shown) as upper:
        found = changing.find_paths(upper, given.paths) or changing.contents(upper)
        if given.dry_run:
            if not given.paths:
                foreign.refuse(upper, keep=not given.discard, hint=foreign.BY_NO_DISCARD)
            for relative in found:
                print(printable(f"{upper.name}: {relative}"))
            return ExitCode.OK
        with show.working(upper.name, quiet=given.quiet) as progress:
            if given.discard and not upper.encrypted:  # else it may ask for the passphrase
                progress.phase("removing")
            keep = not given.discard
            if given.paths:
                kept = changing.reset_paths(upper, found, keep=keep)
                place = f"{upper.name}/{kept}"
            else:
                kept = changing.reset(upper, ask, keep=keep, known=any(source))
                place = "" if kept is None else upper.beside(kept)
        if kept is not None:
            print(printable(f"what was taken away is kept in {place}"))
    return ExitCode.OK


def _forget(store: str, date: str, source: "Source", *, dry_run: bool) -> int:
    from unionfs import passphrase
    from unionfs.stores import backing, forgetting

    # What lies in the area of an encrypted one is not seen without.
    ask = functools.partial(passphrase.obtain, source) if any(source) else None
    with backing.chosen(store, write=not dry_run, ask=ask, beside=True) as upper:
        found = forgetting.find(upper, date)
        for item in found:
            told = f"{forgetting.place(upper, item)}, {show.size_text(item.size)}"
            if not dry_run:
                forgetting.forget(upper, item)
            print(printable(f"{told}, {'would be' if dry_run else 'is'} forgotten"))
        if not found:
            print(printable(f"nothing is kept of {upper.name}"))
    return ExitCode.OK
