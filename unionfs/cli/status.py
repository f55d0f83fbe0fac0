# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs status`: what is mounted, as the daemons themselves tell it.

Owns the wording for people and the list for programs.  Knows of a union only what mountinfo and
the attribute user.unionfs.status say.  Called by main.py.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence

from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, counted, printable, usage_error
from unionfs.mounts import FSTYPE, MountEntry, read_mounts
from unionfs.unions import Answer, ask, find, integer, texts

USAGE = "unionfs status [MNT...] [--json]"

DESCRIPTION = """\
Tells of the union at MNT, or of all that are mounted: layers, who and since when, free
space, what works on this upper and what does not, and why."""

EPILOG = """
exit codes:
  0 told    1 MNT is no union, or wrong usage
"""

WIDTH = 88
COLUMN = 13


def run(argv: Sequence[str]) -> int:
    """Print the status."""
    parser = Parser(prog="unionfs status", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("places", nargs="*", metavar="MNT", help="where a union is mounted")
    parser.add_argument("--json", action="store_true", help="a list of objects, one a union")
    given = parser.read(argv)
    mounts = read_mounts()
    entries = [_union_at(path, mounts) for path in given.places]
    if not given.places:
        entries = [entry for entry in mounts if entry.fstype == FSTYPE]
    told = [(entry, ask(entry, mounts)) for entry in entries]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # names need not be UTF-8
    if given.json:
        print(json.dumps([_object(entry, answer) for entry, answer in told], indent=2))
    elif told:
        print("\n\n".join("\n".join(_lines(entry, answer)) for entry, answer in told))
    else:
        print("no union is mounted")
    return ExitCode.OK


def _union_at(path: str, mounts: Sequence[MountEntry]) -> MountEntry:
    entry = find(path, mounts)
    if entry is None:
        what = "is not a mount point" if os.path.lexists(path) else "does not exist"
        raise usage_error(f"{path} {what}", "unionfs status without MNT lists the unions")
    if entry.fstype != FSTYPE:
        raise usage_error(f"{path} is a mount of {entry.fstype}, not a union")
    return entry


def _object(entry: MountEntry, answer: Answer) -> dict[str, object]:
    told: dict[str, object] = {
        "mountpoint": entry.point,
        "source": entry.source,
        "state": answer.state,
    }
    if answer.reason:
        told["reason"] = answer.reason
    return told | {key: value for key, value in answer.facts.items() if key not in told}


def _lines(entry: MountEntry, answer: Answer) -> Iterator[str]:
    """What a person reads of one union."""
    if answer.state != "ok":
        yield f"{printable(entry.point)}: union of {printable(entry.source)}, {answer.state}"
        yield from _field("state", [answer.reason])
        return
    facts = answer.facts
    yield f"{printable(entry.point)}: {_kind(facts)} union of {printable(entry.source)}"
    yield from _field("lower", [printable(path) for path in texts(facts.get("lowers"))])
    yield from _field("upper", [printable(path) for path in texts(facts.get("upper"))])
    yield from _field("store", _store(facts.get("store")))
    yield from _field("degraded", _degraded(facts.get("degraded")))
    yield from _field("broken", [printable(text) for text in texts(facts.get("broken"))])
    yield from _field("mismatch", [printable(text) for text in texts(facts.get("mismatch"))])
    yield from _field("work", [printable(path) for path in texts(facts.get("work"))])
    yield from _field("free", _space(facts))
    yield from _field("low", _low(facts.get("space")))
    yield from _field("recovered", [printable(text) for text in texts(facts.get("recovered"))])
    yield from _field("check", _check(facts.get("check")))
    yield from _field("since", _since(facts.get("since")))
    yield from _field("daemon", _daemon(facts))
    yield from _field("kernel", _passed(facts))
    works, lacks = _features(facts)
    yield from _field("works", _wrapped(works))
    yield from _field("lacks", lacks)


def _store(store: object) -> list[str]:
    """The file system that an upper has for itself, and the base it was made over."""
    if not isinstance(store, dict):
        return []
    lines = []
    if "source" in store:
        source = str(store["source"])
        device = f", {store['device']}" if store.get("device") != source else ""
        label = f" label {store['label']}" if store.get("label") else ""
        lines.append(f"{source} ({store.get('fstype')}{label}{device}, by {store['mounted_by']})")
    if store.get("encrypted"):
        lines.append(f"encrypted ({store['encrypted']})")
    if store.get("base"):
        lines.append(f"made over {store['base']}")
    return [printable(line) for line in lines]


def _low(space: object) -> list[str]:
    """That the store gets full, and why it does not grow."""
    if not isinstance(space, dict):
        return []
    what = "the disk that the store's image lies on" if space.get("disk") else "the store"
    lines = [f"{what} gets full"] if space.get("low") else []
    return lines + [printable(str(space["problem"]))] * bool(space.get("problem"))


def _check(check: object) -> list[str]:
    """What the check after an unclean end has found so far."""
    if not isinstance(check, dict):
        return []
    if check.get("state") != "done":
        reason = f": {check['reason']}" if check.get("reason") else ""
        return [printable(f"of the upper {check.get('state')}{reason}")]
    problems = integer(check, "problems") or 0
    if not problems:
        looked = counted(integer(check, "directories") or 0, "directory", "directories")
        return [f"nothing is wrong in {looked} of the upper"]
    return [counted(problems, "problem"), *map(printable, texts(check.get("told")))]


def _degraded(degraded: object) -> list[str]:
    """Why the union runs without its store, or only reads it: the option that says so, and why."""
    if not isinstance(degraded, dict):
        return []
    options = [f"{name}={value}" for name, value in degraded.items() if name != "reason"]
    return [printable(f"{','.join(options)}: {degraded.get('reason')}")]


def _field(name: str, values: Sequence[str]) -> Iterator[str]:
    for number, value in enumerate(values):
        yield f"  {name if number == 0 else '':<{COLUMN - 2}}{value}"


def _kind(facts: dict[str, object]) -> str:
    if facts.get("ephemeral"):
        return "ephemeral"
    return "read-only" if facts.get("readonly") or not facts.get("upper") else "writable"


def _space(facts: dict[str, object]) -> list[str]:
    free, size = integer(facts, "free"), integer(facts, "size")
    return [] if free is None or size is None else [f"{_bytes(free)} of {_bytes(size)}"]


def _bytes(count: int) -> str:
    amount = float(count)
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def _since(value: object) -> list[str]:
    """ISO 8601, as the daemon says it; as local time, and how long ago that is."""
    import datetime

    try:
        start = datetime.datetime.fromisoformat(value if isinstance(value, str) else "").timestamp()
    except ValueError:
        return []
    minutes = max(0, int(time.time() - start)) // 60
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    length = f"{days} d {hours} h" if days else f"{hours} h {minutes} min"
    if not days and not hours:
        length = f"{minutes} min" if minutes else "less than a minute"
    return [f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(start))} ({length})"]


def _daemon(facts: dict[str, object]) -> list[str]:
    parts = []
    if (pid := integer(facts, "pid")) is not None:
        parts.append(f"pid {pid}")
    if (uid := integer(facts, "uid")) is not None:
        parts.append(f"of {_user(uid)}")
    text = " ".join(parts)
    if isinstance(version := facts.get("version"), str):
        text += f", unionfs {version}"
    if isinstance(driver := facts.get("driver"), str):
        text += f", driver {driver}"
    return [text.removeprefix(", ")] if text else []


def _passed(facts: dict[str, object]) -> list[str]:
    """How many files the kernel was given to read and write by itself."""
    told = facts.get("passthrough")
    if not isinstance(told, dict) or not told.get("active"):
        return []
    return [f"{integer(told, 'opened') or 0} opened in passthrough"]


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _features(facts: dict[str, object]) -> tuple[list[str], list[str]]:
    """What works, with its kind (xattrs: "trusted"); what does not, with the reason."""
    features, reasons = facts.get("features"), facts.get("reasons")
    works: list[str] = []
    lacks: list[str] = []
    for name, feature in features.items() if isinstance(features, dict) else ():
        label = str(name).replace("_", " ")
        reason = reasons.get(name) if isinstance(reasons, dict) else None
        if feature:
            works.append(f"{label} ({feature})" if isinstance(feature, str) else label)
        else:
            lacks.append(f"{label}: {reason}" if reason else label)
    return works, lacks


def _wrapped(words: Sequence[str]) -> list[str]:
    """Comma-separated, in lines that leave room for the names of the fields."""
    lines: list[str] = []
    for number, word in enumerate(words):
        piece = word + ("," if number + 1 < len(words) else "")
        if lines and len(lines[-1]) + 1 + len(piece) <= WIDTH - COLUMN:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return lines
