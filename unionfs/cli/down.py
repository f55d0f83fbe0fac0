# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs down`: unmount what `unionfs up` mounted.  Called by main.py."""

from collections.abc import Sequence

from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, UnionfsError

USAGE = "unionfs down NAME [-l | --lazy]"

DESCRIPTION = """\
Unmounts what `unionfs up NAME` mounted, the last first. When it returns, the daemons
have ended and the stores are free."""

EPILOG = """
exit codes:
  0 done    1 wrong usage    32 failed: something is in use, and what is above it stays
"""


def run(argv: Sequence[str]) -> int:
    """Take it down."""
    parser = Parser(prog="unionfs down", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("name", metavar="NAME", help="the profile")
    parser.add_argument("-l", "--lazy", action="store_true", help="also what is in use")
    given = parser.read(argv)
    from unionfs.profiles import running, supervise
    from unionfs.profiles.files import own_name

    name = own_name(given.name)
    if not running.standing(name):
        raise UnionfsError(f"{name} is not up", hint="unionfs status lists the unions")
    if given.lazy:
        supervise.stop(name)
    else:
        running.down(name)
    return ExitCode.OK
