# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store clone`."""

from collections.abc import Sequence

from unionfs import locator
from unionfs.cli import show
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode

USAGE = """\
unionfs store clone STORE NEW [--size SIZE [--fs FS] [--label LABEL]] [-q]"""

DESCRIPTION = """\
Copies the changes in STORE, which must not be in use, to NEW: a directory, an image or a
device, with or without :/dir. A directory that is not there is made; with --size NEW is an
image that is made for it. What is in NEW is not overwritten, and the copy is there when it is
complete. It is a store of its own, over the same base."""

EPILOG = """
exit codes: 0 done, 1 wrong usage, 2 a program is missing, 8 interrupted, 32 failed

example:
  unionfs store clone changes.img LABEL=stick
  unionfs store clone changes.img /srv/changes
  unionfs store clone /srv/changes changes.img:/work --size 4G
"""


def run(argv: Sequence[str]) -> int:
    """Clone it."""
    parser = Parser(prog="unionfs store clone", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("store", metavar="STORE", help="what is copied")
    add("new", metavar="NEW", help="where to")
    add("--size", help="make NEW, an image of this size")
    add("--fs", choices=["btrfs", "ext4", "xfs"], default="ext4", help="its file system; ext4")
    add("--label", default="", help="its label")
    add("-q", "--quiet", action="store_true", help="no progress bar")
    given = parser.read(argv)
    from unionfs.stores import backing, changing, making

    with backing.chosen(given.store, write=False) as source:
        changing.refuse_used(source)
        where = locator.parse(given.new)
        total = backing.tree_bytes(source.fd)
        with show.progress(given.new, total, quiet=given.quiet) as advance:
            if given.size is None:
                text = given.new
                changing.refuse_same(source, where)
                if where.directory is None and not locator.is_directory(text):
                    text = f"{where.source}:{changing.default_directory(source)}"
                hint = "say how large the image shall be: --size 8G"
                with backing.target(text, missing=hint) as target:
                    changing.clone(source, target, advance)
                return ExitCode.OK
            size = show.read_size(given.size)
            making.check_wish(given.fs, size, given.label)
            directory = where.directory or changing.default_directory(source)
            with making.new_image(where.value, size, given.fs, given.label) as temporary:
                text = f"{temporary}:{directory}"
                with backing.chosen(text, write=True, make=True) as target:
                    changing.clone(source, target, advance)
    return ExitCode.OK
