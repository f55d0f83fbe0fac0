# SPDX-License-Identifier: GPL-2.0-or-later
"""A store put back to its base before it is mounted.  Called by root.py."""

import functools
import os

from unionfs import identity, locator
from unionfs.errors import UnionfsError
from unionfs.mounts import read_mounts
from unionfs.options import MountOptions
from unionfs.passphrase import Source, obtain
from unionfs.stores import backing, base, changing, find, inspect, mounted_base, probe


def reset(options: MountOptions) -> str | None:
    """Put the upper's changes aside; where they are kept, None if there were none.

    Not those of another base, unless mismatches are ignored.
    """
    assert options.upper is not None
    # The device is waited for here: what looks at stores does not.
    where = locator.parse(options.upper)
    find.find(where, search=options.search, timeout=options.device_timeout or 0)
    try:
        with backing.chosen(options.upper, write=True) as upper:
            if not changing.contents(upper):
                return None
            if options.on_mismatch != "ignore":
                _refuse_another(upper, options.lowers[-1])
            source = Source(options.key_file, options.credential)
            ask = functools.partial(obtain, source)
            kept = changing.reset(upper, ask, keep=True, known=any(source))
            return f"{upper.name.rpartition('/')[0]}/{kept}"
    except backing.NoUpper:
        return None
    except OSError as exc:
        raise UnionfsError(f"{options.upper}: {os.strerror(exc.errno or 0)}") from exc


def _refuse_another(upper: backing.Chosen, lower: str) -> None:
    where = locator.parse(lower)
    path = find.find(where)
    if os.path.isdir(path):
        own = mounted_base.describe(where, path, read_mounts())
    else:
        own = base.describe(where, probe.probe(path))
    error = identity.mismatch(inspect.read_record(upper.fd), own, upper.name)
    if error is not None:
        raise error
