# SPDX-License-Identifier: GPL-2.0-or-later
"""Which directory of a store holds the changes to a base, if nothing says so.

Owns the rule that changes are found again whatever their base is called: an image gets another
name, a device another number, a label is given later.  Called by opening.py, encrypting.py and
boot/.
"""

import fnmatch
import logging
import os
from collections.abc import Iterator
from typing import Final

from unionfs import identity
from unionfs.identity import Base
from unionfs.locator import Locator
from unionfs.stores import base
from unionfs.stores.volume import Volume, walk

log: Final = logging.getLogger(__name__)


def default_directory(volume: Volume, of: Base, where: Locator) -> str:
    """Where in a store the changes to `of`, which `where` names, lie or are to lie.

    What is there under the base's name, unless it is another base's; what was made over this base
    under another name; what is there under the name of a mounted base's directory, as it was
    called before labels were looked at; the base's name.
    """
    named = base.default_directory(of.name)
    before = base.default_directory(base.base_name(where, None))
    there, fits = _look(volume, named, of)
    if there and fits:
        return named
    if (found := max(_made_over(volume, of), default=None)) is not None:
        log.info("the changes to %s lie in %s:%s", of, volume.locator.source, found[1])
        return found[1]
    return before if not there and all(_look(volume, before, of)) else named


def _look(volume: Volume, inside: str, of: Base) -> tuple[bool, bool]:
    """Whether a directory is there, and whether nothing says that it is another base's."""
    from unionfs.stores.inspect import read_record

    try:
        fd = walk(volume, inside)
    except FileNotFoundError:
        return False, True
    try:
        return True, identity.mismatch(read_record(fd), of, inside) is None
    finally:
        os.close(fd)


def _made_over(volume: Volume, of: Base) -> Iterator[tuple[str, str]]:
    """When the uppers of this machine's architecture that are this base's were used, and where."""
    from unionfs.stores.inspect import uppers_of

    ours = base.default_directory("*")
    for upper in uppers_of(volume):
        record = upper.record
        if record is None or record.base is None or not record.base.proves(of):
            continue
        if fnmatch.fnmatchcase(upper.directory, ours):
            yield record.used, upper.directory
