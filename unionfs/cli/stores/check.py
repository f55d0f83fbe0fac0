# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store check`."""

import functools
import json
import sys
from collections.abc import Sequence

from unionfs.cli import key
from unionfs.cli.main import report as say
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, UnionfsError, printable
from unionfs.passphrase import Source, obtain

USAGE = """\
unionfs store check STORE [--repair] [--json]
       [--key-file FILE | --credential NAME]"""

DESCRIPTION = """\
Checks a store that is not mounted: its file system by its own fsck, then, in each
directory with changes, the records, what a killed daemon left, and every mark. Nothing
is written without --repair. The directories of an encrypted store are looked into
with --key-file or --credential only."""

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
    parser.add_argument("--json", action="store_true", help="as an object")
    key.add_arguments(parser)
    from unionfs.stores.checking import Code

    try:
        given = parser.read(argv)
        source = key.source(given)
        return _check(given.store, source, repair=given.repair, as_json=given.json)
    except UnionfsError as exc:
        say("unionfs", exc)
        return Code.USAGE if exc.code == ExitCode.USAGE else Code.TROUBLE


def _check(store: str, source: Source, *, repair: bool, as_json: bool) -> int:
    from unionfs.stores.checking import Report
    from unionfs.stores.examination import examine

    found = Report()
    ask = functools.partial(obtain, source) if any(source) else None
    examine(store, found, repair=repair, ask=ask)
    if as_json:
        told = {
            "filesystem": found.filesystem or None,
            "code": int(found.code),
            "problems": [problem._asdict() for problem in found.problems],
        }
        print(json.dumps(told, indent=2))
        return found.code
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")
    if found.filesystem:
        print(printable(found.filesystem))
    for path, what, repaired in found.problems:
        print(printable(f"{path}: {what}{' (repaired)' if repaired else ''}"))
    if not found.problems and not found.code:
        print("no problem is found")
    return found.code
