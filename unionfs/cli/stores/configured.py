# SPDX-License-Identifier: GPL-2.0-or-later
"""The stores that profiles and fstab name, whether or not they are mounted now.

Owns where that is looked for.  Looks at no store.  Called by list.py.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from unionfs import locator
from unionfs.errors import UnionfsError
from unionfs.mounts import unescape
from unionfs.options import read_strings

FSTAB: Final = "/etc/fstab"
_TYPES: Final = (b"unionfs", b"fuse.unionfs")
_FIELDS: Final = 4  # that are needed: what, where, type, options


def stores(fstab: str = FSTAB) -> Iterator[str]:
    """The paths of directories and images that are named; a device is found by itself."""
    for text in (*_of_profiles(), *_of_fstab(fstab)):
        where = locator.parse(text)
        if where.tag is not None or not os.path.exists(where.value):
            continue
        below = where.directory or "/"
        yield (
            os.path.normpath(f"{where.value}/{below}")
            if os.path.isdir(where.value)
            else where.value
        )


def _of_profiles() -> Iterator[str]:
    from unionfs.profiles import files

    for name in files.names():
        with contextlib.suppress(UnionfsError):  # a template, or wrong: for `policy` to say
            profile = files.said(name)
            if profile.store:
                yield profile.store
            yield from (rule.upper for rule in profile.rules if rule.upper)


def _of_fstab(path: str) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split()
        if len(fields) < _FIELDS or line.lstrip().startswith(b"#") or fields[2] not in _TYPES:
            continue
        with contextlib.suppress(UnionfsError):  # wrong: for mount(8) to say
            upper = read_strings([unescape(fields[3])]).asked("upper")
            if isinstance(upper, str) and upper:
                yield upper
