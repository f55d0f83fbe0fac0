# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store info`."""

import json
from collections.abc import Sequence

from unionfs.cli import show
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, UnionfsError

USAGE = "unionfs store info STORE [--json]"

DESCRIPTION = """\
Tells of one store: its file system and its space, and of each directory with changes in
it when it was made and used, over which base, where it is mounted, and what was taken away
from it and is kept."""

EPILOG = """
exit codes: 0 told, 1 wrong usage, 32 it cannot be opened
"""


def run(argv: Sequence[str]) -> int:
    """Tell."""
    parser = Parser(prog="unionfs store info", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("store", metavar="STORE", help="DIR, IMAGE, /dev/NAME, LABEL=... ")
    parser.add_argument("--json", action="store_true", help="as an object")
    given = parser.read(argv)
    from unionfs.stores.inspect import look
    from unionfs.stores.mounted import mounted_unions

    store = look(given.store, mounted_unions(), sizes=True)
    if store.problem:
        raise UnionfsError(store.problem)
    facts = store.facts()
    if given.json:
        print(json.dumps(facts, indent=2))
        return ExitCode.OK
    pairs = [("store", f"{store.path} ({store.kind})")]
    if store.fstype:
        pairs.append(("file system", store.fstype))
        pairs.append(("label", store.label or "-"))
        pairs.append(("UUID", store.uuid or "-"))
    pairs.append(("size", show.size_text(store.size)))
    pairs.append(("used", show.size_text(facts["used"])))
    pairs.append(("free", show.size_text(store.free)))
    if store.allocated is not None:
        pairs.append(("on disk", show.size_text(store.allocated)))
    for upper in store.uppers:
        record = upper.record
        pairs.append(("changes", upper.directory))
        if upper.encrypted:
            pairs.append(("  encrypted", upper.encrypted))
        if record is not None:
            pairs.append(("  id", record.uuid))
            pairs.append(("  base", str(record.base) if record.base is not None else "-"))
            if record.base is not None and record.base.kind == "directory":
                pairs.append(("  path", record.base.path))
            pairs.append(("  created", record.created))
            pairs.append(("  last used", record.used))
        if not upper.encrypted or record is not None:
            pairs.append(("  mounted on", upper.mounted or upper.elsewhere() or "-"))
        for kept in upper.kept:
            how = f", encrypted ({kept.encrypted})" if kept.encrypted else ""
            told = f"of {kept.date.replace('T', ' ')}, {show.size_text(kept.size)}{how}"
            pairs.append(("  kept", f"{kept.shown(store.path)} {told}"))
    show.fields(pairs)
    return ExitCode.OK
