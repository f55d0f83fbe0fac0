# SPDX-License-Identifier: GPL-2.0-or-later
"""A store put back to its base before it is mounted.  Called by root.py."""

import functools
import os

from unionfs import identity, locator
from unionfs.errors import UnionfsError
from unionfs.options import MountOptions
from unionfs.passphrase import Source, obtain
from unionfs.stores import backing, changing, find, inspect, mounted_base


def reset(options: MountOptions) -> str | None:
    """Put the upper's changes aside; where they are kept, None if there were none.

    Not those of another base, unless mismatches are ignored.  Does not wait for its device.
    """
    assert options.upper is not None
    # Where it is looked for, as what looks at stores does not heed.
    find.find(locator.parse(options.upper), search=options.search)
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
    own = mounted_base.named(lower)
    error = identity.mismatch(inspect.read_record(upper.fd), own, upper.name)
    if error is not None:
        raise error
