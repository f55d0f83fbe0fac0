# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs up`: mount what a profile says.  Called by main.py."""

import sys
from collections.abc import Sequence

from unionfs.cli.parser import Parser, system_root
from unionfs.errors import ExitCode, counted, printable

USAGE = "unionfs up NAME [--root DIR] [-f] [-q]"

DESCRIPTION = """\
Mounts what the profile NAME says (unionfs-profile(5)): /etc/unionfs/NAME.toml, for an
ordinary user ~/.config/unionfs/NAME.toml, or the file itself if NAME has a slash.
With --root it is the profile of the system there, or of this one if that has none.
What is mounted already stays; a union whose daemon has died is mounted anew. After an
error all is as it was before."""

EPILOG = """
exit codes: 0 mounted (nofail: what could be), 1 wrong usage, 2 the system lacks
  something, 8 interrupted, 32 failed; unless it is 0, all is as it was before
"""


def run(argv: Sequence[str]) -> int:
    """Bring it up."""
    parser = Parser(prog="unionfs up", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("name", metavar="NAME", help="the profile")
    add("--root", type=system_root, default="/", metavar="DIR", help="the system it is for")
    add("-f", "--foreground", action="store_true", help="stay, and end when a daemon ends")
    add("-q", "--quiet", action="store_true", help="say nothing of what was mounted, no progress")
    given = parser.read(argv)
    from unionfs import logs
    from unionfs.cli import show
    from unionfs.profiles import files, running, supervise

    logs.to_stderr(debug=False)
    said_in = files.said_in(given.name, given.root)
    profile = files.load(given.name, said_in)
    if said_in != given.root and not given.quiet:
        what = f"{given.root} has no profile {profile.name}: {profile.files[0]} is taken"
        print(printable(f"unionfs: {what}"), file=sys.stderr)
    if given.foreground:
        return supervise.run(profile, given.root)
    shown = show.progress if sys.stderr.isatty() and not given.quiet else None
    outcome = running.up(profile, given.root, shown=shown)
    for warning in outcome.warnings:
        print(printable(f"unionfs: warning: {warning}"), file=sys.stderr)
    if not given.quiet:
        again = "" if outcome.fresh else ", which was up already"
        print(f"{profile.name}: {counted(len(outcome.made), 'mount')}{again}")
    return ExitCode.OK
