# SPDX-License-Identifier: GPL-2.0-or-later
"""argparse as the verbs want it: errors are UnionfsError, help keeps its lines.

Called by every verb; knows none of them.
"""

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from unionfs.errors import usage_error

MARK = "\0"


def system_root(text: str) -> str:
    """What --root says, for argparse: free of links, and whole, whatever is made of it later."""
    if not os.path.isdir(text):
        raise usage_error(f"{text} is no directory", "--root names where a system is mounted")
    return os.path.realpath(text)


class Parser(argparse.ArgumentParser):
    """A parser for one verb."""

    def __init__(self, *, prog: str, usage: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Options and arguments in any order; after -- there are arguments only.

        argparse forgets -- when they are mixed.  So what follows it is marked, by a character
        that no argument can hold, and unmarked at the end.
        """
        end = argv.index("--") if "--" in argv else len(argv)
        words = [*argv[:end], *(MARK + word for word in argv[end + 1 :])]
        given = self.parse_intermixed_args(words)
        for name, value in vars(given).items():
            if isinstance(value, list):
                setattr(given, name, [word.removeprefix(MARK) for word in value])
            elif isinstance(value, str):
                setattr(given, name, value.removeprefix(MARK))
        return given

    def error(self, message: str) -> NoReturn:
        """Called by argparse for what it cannot read."""
        raise usage_error(message.replace(MARK, ""), f"see {self.prog} --help")
