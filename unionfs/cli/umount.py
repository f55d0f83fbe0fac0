# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs umount`: unmount, and return when the daemon has ended and the layers are free.

Called by main.py.
"""

from collections.abc import Sequence

from unionfs.cli.main import report
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, UnionfsError
from unionfs.unmounting import unmount

USAGE = "unionfs umount [-l | --lazy] [-f | --force] MNT..."

DESCRIPTION = """\
Unmounts the unions at MNT. When it returns, the daemons have ended and the layers
are free to be changed, mounted elsewhere or removed. The user who mounted a union
may unmount it, and root."""

EPILOG = """
exit codes, as of umount(8):
  0 unmounted    1 wrong usage, or not permitted    2 system error
  32 failed: not mounted, or busy                   64 some of several failed
"""


def run(argv: Sequence[str]) -> int:
    """Unmount all that is named."""
    parser = Parser(prog="unionfs umount", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("places", nargs="+", metavar="MNT", help="where a union is mounted")
    parser.add_argument(
        "-l", "--lazy", action="store_true", help="detach now, end when nobody uses it any more"
    )
    parser.add_argument(
        "-f", "--force", action="store_true", help="abort requests, if the daemon hangs"
    )
    given = parser.read(argv)
    places: list[str] = given.places
    errors: list[UnionfsError] = []
    for path in places:
        try:
            unmount(path, lazy=given.lazy, force=given.force)
        except UnionfsError as error:
            errors.append(error)
    if not errors:
        return ExitCode.OK
    for earlier in errors[:-1]:
        report("unionfs", earlier)
    if len(errors) < len(places):
        errors[-1].code = ExitCode.PARTIAL
    raise errors[-1]
