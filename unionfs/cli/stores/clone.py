# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store clone`."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from unionfs import locator
from unionfs.cli import show
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, UnionfsError

_IMAGES = (".img", ".ext4", ".raw")  # meant to be one

USAGE = """\
unionfs store clone STORE NEW [--size SIZE [--fs FS] [--label LABEL]]"""

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
        new = given.size is None and where.tag is None and not os.path.lexists(where.value)
        if new and (where.directory is not None or where.value.endswith(_IMAGES)):
            hint = "say how large the image shall be: --size 8G"
            raise UnionfsError(f"there is no {where.value}", hint=hint)
        total = backing.tree_bytes(source.fd)
        with show.progress(given.new, total, quiet=given.quiet) as advance:
            if given.size is None:
                directory = None if locator.is_directory(given.new) else where.directory
                if directory is None and not locator.is_directory(given.new):
                    directory = changing.default_directory(source)
                text = given.new if directory is None else f"{where.source}:{directory}"
                with (
                    _made(where.value) if new else nullcontext(),
                    backing.chosen(text, write=True, make=True) as target,
                ):
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


@contextmanager
def _made(directory: str) -> Iterator[None]:
    """A new directory, which is not there if it was in vain."""
    os.mkdir(directory)
    try:
        yield
    except BaseException:
        os.rmdir(directory)
        raise
