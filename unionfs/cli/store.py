# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store VERB`: the dispatch; each verb's parser stands beside its action in cli/stores/.

Called by main.py.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import cast

from unionfs.cli.main import Verb
from unionfs.errors import ExitCode, InUse, UnionfsError, usage_error

VERBS = {
    "create": "make a store: an image, or a file system on a device",
    "list": "list the stores that can be found",
    "info": "tell of one store, and of what lies in it",
    "check": "check a store, and repair it",
    "grow": "make a store larger",
    "shrink": "make an image smaller",
    "compact": "give unused space of an image back to its disk",
    "backup": "write the changes in a store to one file",
    "restore": "bring back what a backup has",
    "clone": "copy the changes in one store to another",
    "reset": "go back to the base, wholly or for some paths",
    "encrypt": "encrypt what holds the changes",
}

HELP = f"""\
usage: unionfs store VERB ...

A store is what holds the changes of unions: a directory, an image or a device, named
as unionfs mount names it (see unionfs-store(8)).

verbs:
{chr(10).join(f"  {verb:<8} {meaning}" for verb, meaning in VERBS.items())}

unionfs store VERB --help tells more.
"""


def run(argv: Sequence[str], *, last: bool = False) -> int:
    """Find the verb and run it; `last`: it is all that this process is for."""
    first = argv[0] if argv else ""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # names and labels need not be UTF-8
    if first in VERBS:
        from unionfs.stores.tools import interruptible

        verb = cast(Verb, importlib.import_module(f"unionfs.cli.stores.{first}"))
        try:
            with interruptible(last=last):
                return verb.run(argv[1:])
        except BrokenPipeError:
            raise
        except InUse as exc:
            from unionfs.stores.mounted import named

            raise named(exc) from exc
        except OSError as exc:  # a full disk, a file that nobody may read ...
            reason = os.strerror(exc.errno or errno.EIO)
            what = f"{exc.filename}: " if isinstance(exc.filename, str) else ""
            raise UnionfsError(f"store {first}: {what}{reason}") from exc
    if first in ("-h", "--help", "help"):
        print(HELP, end="")
        raise SystemExit(int(ExitCode.OK))  # as argparse ends
    what = f"store {first} is no verb" if first else "store needs a verb"
    raise usage_error(what, f"the verbs are {', '.join(VERBS)}")
