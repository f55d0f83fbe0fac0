# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store check`."""

import errno
import functools
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unionfs.cli import key
from unionfs.cli.main import report as say
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, UnionfsError, printable, usage_error
from unionfs.options import split_layers
from unionfs.passphrase import obtain

if TYPE_CHECKING:
    from unionfs.stores.examination import Wish

USAGE = """\
unionfs store check STORE [--lower LOWER[:LOWER...]] [--repair [--take]] [--json]
       [-q] [--key-file FILE | --credential NAME]"""

DESCRIPTION = """\
Checks a store that is not mounted: its file system by its own fsck, then, in each
directory with changes, the records, what a killed daemon left, the hard link index and
every mark. With --lower also what marks lead to: the directories of redirects, the data
of metadata-only copies, the names of indexed files. Nothing is written without --repair,
and what cannot be repaired in an upper without a loss is only told; a damaged file system
may lose what cannot be read in it, which is told too. The directories of an encrypted
store are looked into with --key-file or --credential only."""

EPILOG = """
exit codes, as of fsck(8), added up:
  0 nothing is wrong       1 errors were corrected   4 errors are left
  8 it could not be checked (in use, missing)       16 wrong usage
"""


def run(argv: Sequence[str]) -> int:
    """Check."""
    parser = Parser(prog="unionfs store check", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("store", metavar="STORE", help="DIR, IMAGE, /dev/NAME, LABEL=...")
    parser.add_argument("--repair", action="store_true", help="correct what can be corrected")
    parser.add_argument(
        "--lower",
        action="append",
        default=[],
        metavar="LOWER",
        help="the lowers, as for unionfs mount: DIR, IMAGE, LABEL=..., A:B; may be repeated",
    )
    parser.add_argument(
        "--take", action="store_true", help="also of another machine that did not unmount it"
    )
    parser.add_argument("--json", action="store_true", help="as an object")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    key.add_arguments(parser)
    from unionfs.stores.checking import Code
    from unionfs.stores.examination import Wish

    store = "the store"
    try:
        given = parser.read(argv)
        store = given.store
        if given.take and not given.repair:
            raise usage_error("--take is for --repair", "write --repair --take")
        lowers = [path for text in given.lower for path in split_layers(text)]
        source = key.source(given)
        ask = functools.partial(obtain, source) if any(source) else None
        wish = Wish(given.repair, given.take, tuple(lowers), ask)
        return _check(given.store, wish, as_json=given.json, quiet=given.quiet)
    except UnionfsError as exc:
        from unionfs.stores.mounted import named

        say("unionfs", named(exc))
        return Code.USAGE if exc.code == ExitCode.USAGE else Code.TROUBLE
    except BrokenPipeError:
        raise
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        where = f" ({exc.filename})" if isinstance(exc.filename, str) else ""
        say("unionfs", UnionfsError(f"{store} cannot be checked: {reason}{where}"))
        return Code.TROUBLE


def _check(store: str, wish: "Wish", *, as_json: bool, quiet: bool) -> int:
    from unionfs.cli import show
    from unionfs.stores.checking import Report
    from unionfs.stores.examination import examine

    found = Report()
    with show.working(store, quiet=quiet) as progress:
        examine(store, found, wish, progress)
    if as_json:
        told = {
            "filesystem": found.filesystem or None,
            "code": int(found.code),
            "problems": [problem._asdict() for problem in found.problems],
            "notes": found.notes,
        }
        print(json.dumps(told, indent=2))
        return found.code
    if found.filesystem:
        print(printable(found.filesystem))
    for path, what, repaired in found.problems:
        print(printable(f"{path}: {what}{' (repaired)' if repaired else ''}"))
    for note in found.notes:
        print(printable(note))
    if not found.problems and not found.code:
        print("no problem is found")
    return found.code
