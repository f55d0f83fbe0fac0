# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs mount`, and the command line of fuse-overlayfs, which has no verb.

Owns the flags; what they mean together is for options.py, and the mounting for daemon.py.
Called by main.py.
"""

from argparse import SUPPRESS, Namespace
from collections.abc import Sequence

from unionfs.cli.parser import Parser
from unionfs.options import MountOptions, OptionReader, read_strings

USAGE = """\
unionfs mount LOWER[:LOWER...] UPPER MNT [-o OPT,...] [-f] [-d] [-s]
       unionfs mount LOWER[:LOWER...] MNT [--ro | --ephemeral[=SIZE]] ...
       unionfs mount -o lowerdir=A:B,upperdir=U[,workdir=W] MNT ...
       unionfs [-f] [-d] -o lowerdir=A:B,upperdir=U,workdir=W MNT"""

DESCRIPTION = """\
Shows LOWER, which is never written to, and UPPER, which takes all changes, as one
file system at MNT. Several lowers: the left-most is on top; \\: is a colon in a name.
Without UPPER the union is read-only, or (--ephemeral) forgets its changes."""

EPILOG = r"""
options of -o (more in unionfs(8)):
  lowerdir=A:B, lowerdir+=A   lower layers, top-most first; \: \, \\ escape
  upperdir=U  workdir=W       upper layer; work directory (default U/.unionfs)
  ro  ephemeral[=SIZE]        as --ro, --ephemeral
  fsname=NAME                 the source that /proc/mounts shows
  allow_other  allow_root     who else may use a user's mount
  nonempty                    MNT may hold files
  nodev nosuid noexec sync dirsync noatime   as in mount(8)
  redirect_dir= metacopy= index=on|off       as in kernel overlayfs, all on
  fsync=auto|strict|volatile  what is made durable when; volatile is fsync=volatile
  userxattr                   keep marks in user.overlay.*, as a user's mount does
  whiteout=auto|char|wh       how a removed name is marked
  timeout=SECONDS  lower=live|sealed         for lowers that others change
  uidmapping= gidmapping=INSIDE:OUTSIDE:LENGTH[:...]
  squash_to_root squash_to_uid=UID squash_to_gid=GID
  xattr_permissions=0|1|2  noacl  noxattrs  static_nlink   as in fuse-overlayfs
"""


def _parser() -> Parser:
    parser = Parser(prog="unionfs mount", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add_layers(parser)
    add("-f", "--foreground", action="store_true", help="stay, and log to stderr")
    add("-d", "--debug", action="store_true", help="log every request; implies -f")
    add("-s", "--sloppy", action="store_true", help="let unknown options pass")
    return parser


def add_layers(parser: Parser) -> None:
    """The arguments that say what is mounted, and where."""
    add = parser.add_argument
    add("places", nargs="*", help=SUPPRESS)
    add("-o", action="append", default=[], metavar="OPT,...", dest="strings", help="options")
    add("--ro", action="store_true", help="a read-only union")
    add("--ephemeral", nargs="?", metavar="=SIZE", help="an upper in memory, gone with the mount")


def words_of(argv: Sequence[str]) -> list[str]:
    """argparse would take the argument that follows --ephemeral for the size."""
    return ["--ephemeral=" if word == "--ephemeral" else word for word in argv]


def read_layers(given: Namespace) -> OptionReader:
    """What those arguments say."""
    strings: list[str] = given.strings
    reader = read_strings(strings)
    if given.ephemeral is not None:
        reader.set_word("ephemeral", given.ephemeral or None, "--ephemeral")
    if given.ro:
        reader.set("readonly", True, "--ro")
    return reader


def parse(argv: Sequence[str], *, source_first: bool = False) -> MountOptions:
    """The options that a command line asks for."""
    given = _parser().read(words_of(argv))
    reader = read_layers(given)
    if given.sloppy:
        reader.set("sloppy", True, "-s")
    if given.debug:
        reader.set("debug", True, "-d")
    if given.foreground or reader.has("debug"):
        reader.set("foreground", True, "-f")
    reader.place(given.places, source_first=source_first)
    return reader.build()


def run(argv: Sequence[str], *, source_first: bool = False) -> int:
    """Mount."""
    options = parse(argv, source_first=source_first)
    from unionfs import daemon  # heavy: only once the command line is known to be right

    return daemon.run(options)
