# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store list`."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unionfs import locator
from unionfs.cli import show
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, UnionfsError

if TYPE_CHECKING:
    from unionfs.stores.inspect import Store

USAGE = "unionfs store list [PLACE...] [--json]"

DESCRIPTION = """\
Lists stores: those at PLACE, a store or a directory with images (*.img) or uppers in it;
without PLACE, all devices and images at the top of mounted file systems in which there
are changes of unions, and what mounted unions, profiles and fstab have as stores.
File systems are looked into read-only."""

EPILOG = """
exit codes: 0 listed (also nothing), 1 wrong usage, 32 a PLACE cannot be opened
"""

COLUMNS = (
    *("STORE", "KIND", "LABEL", "FS", "SIZE", "USED"),
    *("DIRECTORY", "BASE", "LAST USED", "MOUNTED ON"),
)


def run(argv: Sequence[str]) -> int:
    """List."""
    parser = Parser(prog="unionfs store list", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("places", nargs="*", metavar="PLACE", help="where to look")
    parser.add_argument("--json", action="store_true", help="a list of objects, one a store")
    given = parser.read(argv)
    for place in given.places:
        locator.parse(place)  # an empty one would be the current directory
    from unionfs.cli.stores import configured
    from unionfs.stores.inspect import find_stores

    stores = list(find_stores(given.places, () if given.places else configured.stores()))
    if given.json:
        print(json.dumps([store.facts() for store in stores], indent=2))
    else:
        _show(stores)
    for store in stores:
        if store.problem and store.asked:
            raise UnionfsError(store.problem)
    return ExitCode.OK


def _show(stores: "Sequence[Store]") -> None:
    rows = []
    for store in stores:
        facts = store.facts()
        first = [
            store.path,
            store.kind,
            store.label or "-",
            store.fstype or "-",
            show.size_text(store.size),
            show.size_text(facts["used"]),
        ]
        for upper in store.uppers:
            record = upper.record
            base = f"({upper.encrypted})" if upper.encrypted else upper.base_shown()
            used = record.used[:16].replace("T", " ") if record is not None else "-"
            place = upper.mounted or upper.elsewhere() or "-"
            rows.append([*first, upper.directory, base, used, place])
            first = [""] * len(first)
            for kept in upper.kept:
                date = kept.date[:16].replace("T", " ")
                rows.append([*first, kept.shown(store.path), "(kept)", date, "-"])
        if not store.uppers:
            rows.append([*first, store.problem or "-", "-", "-", "-"])
    if rows:
        show.table(COLUMNS, rows)
    else:
        print("no store is found")
