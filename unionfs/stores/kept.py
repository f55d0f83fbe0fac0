# SPDX-License-Identifier: GPL-2.0-or-later
"""What is kept of changes that were taken away, and what is only there for a while: by its name.

Owns these names.  Called by all that looks for uppers, and by replacing.py, which makes them.

    NAME.before-DATE             beside an upper NAME: all of it, as it was
    .NAME.HEX.restore            what is to take its place, not complete
    .NAME.HEX.restore.old        itself, while two directories cannot be exchanged (fuse2fs)
    .NAME.HEX.keep.old           the same, if it is to be kept

and in NAME/.unionfs, reset-DATE: some paths of it (reset PATH); before-DATE: all of it, as it was,
if nothing can be beside it (exchange.py).  DATE is YYYYMMDD-HHMMSS, local.
"""

import datetime
import os
import re
import secrets
from collections.abc import Iterable
from typing import Final

_DATE: Final = "%Y%m%d-%H%M%S"
_BEFORE: Final = re.compile(
    r"(.+?)(?:\.before-[0-9]{8}-[0-9]{6})*\.before-([0-9]{8}-[0-9]{6})", re.S
)
_PATHS: Final = re.compile(r"reset-([0-9]{8}-[0-9]{6})")
_TEMPORARY: Final = re.compile(r"\.(.+)\.[0-9a-f]{8}(\.restore|\.restore\.old|\.keep\.old)", re.S)
_WHOLE: Final = re.compile(r"before-([0-9]{8}-[0-9]{6})")
NEW: Final = ".restore"
MOVED_ASIDE: Final = ".restore.old"
KEPT_ASIDE: Final = ".keep.old"


def split(name: str) -> tuple[str, str] | None:
    """The upper that something was kept of, and when; None if it is not kept.

    What was kept of a kept one belongs to the same upper.
    """
    match = _BEFORE.fullmatch(name)
    return None if match is None else (match[1], match[2])


def date_of_paths(name: str) -> str:
    """When paths were taken away, of a name in the area; empty if it is another name."""
    match = _PATHS.fullmatch(name)
    return "" if match is None else match[1]


def date_of_whole(name: str) -> str:
    """The same for all of an upper whose place is the area."""
    match = _WHOLE.fullmatch(name)
    return "" if match is None else match[1]


def date_in_area(name: str) -> str:
    """The same for either."""
    return date_of_paths(name) or date_of_whole(name)


def told(date: str) -> str:
    """A DATE in ISO 8601; as it is if there is no such date."""
    try:
        return datetime.datetime.strptime(date, _DATE).isoformat()
    except ValueError:
        return date


def of(names: Iterable[str], name: str) -> list[str]:
    """What is kept of the upper `name` among these names, the oldest first."""
    found = [
        (parts[1], n) for n in names if (parts := split(n)) and n.startswith(f"{name}.before-")
    ]
    return [n for _, n in sorted(found)]


def _dated(folder: int, start: str) -> str:
    """A name with the time at its end that is not taken: of two in one second one gets the next."""
    now = datetime.datetime.now()
    while os.path.lexists(f"/proc/self/fd/{folder}/{start}{now:{_DATE}}"):
        now += datetime.timedelta(seconds=1)
    return f"{start}{now:{_DATE}}"


def new_name(folder: int, name: str) -> str:
    """What the upper `name` will be called in the open directory if it is kept now."""
    return _dated(folder, f"{name}.before-")


def new_paths(area: int) -> str:
    """What the paths are called in the area that are taken away now."""
    return _dated(area, "reset-")


def new_whole(area: int) -> str:
    """What all of an upper is called in the area if it is kept there now."""
    return _dated(area, "before-")


def temporary(name: str, suffix: str) -> str:
    """A new name for what has to do with the upper `name`."""
    return f".{name}.{secrets.token_hex(4)}{suffix}"


def is_temporary(name: str) -> bool:
    """Whether it is no upper, though it may look like one."""
    return _TEMPORARY.fullmatch(name) is not None


def temporaries(names: Iterable[str], name: str, *suffixes: str) -> list[str]:
    """Those of the upper `name`."""
    return [
        n
        for n in names
        if (match := _TEMPORARY.fullmatch(n)) and match[1] == name and match[2] in suffixes
    ]


def moved_aside(names: Iterable[str], name: str) -> str | None:
    """The upper `name` itself, which is not there, where a verb was killed in the middle."""
    found = temporaries(names, name, MOVED_ASIDE, KEPT_ASIDE)
    return found[0] if len(found) == 1 else None


def all_moved_aside(names: Iterable[str]) -> set[str]:
    """The uppers of which something was moved aside, and that may not be there."""
    matches = (_TEMPORARY.fullmatch(name) for name in names)
    return {match[1] for match in matches if match and match[2] != NEW}
