# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store restore`."""

import os
import stat
from collections.abc import Sequence
from typing import IO

from unionfs import locator
from unionfs.cli import show
from unionfs.cli.parser import Parser
from unionfs.cli.stores.standard import STANDARD, taken_in
from unionfs.errors import ExitCode, UnionfsError, printable, usage_error

USAGE = """\
unionfs store restore FILE STORE [--keep] [-q]
       unionfs store restore --verify FILE [-q]"""

DESCRIPTION = """\
Puts what the backup FILE has in the place of the changes in STORE, which must not be in use.
It is unpacked beside them first, and takes their place by one call when all of it is there
and its checksum is right: on any error, and if it is killed, they are as they were. A directory
that is not there is made; in a file system without changes they come where they were."""

EPILOG = """
exit codes: 0 restored (--verify: it is whole), 1 wrong usage, 2 a program is missing,
8 interrupted, 32 failed, or FILE is damaged
"""


def run(argv: Sequence[str]) -> int:
    """Restore."""
    parser = Parser(
        prog="unionfs store restore", usage=USAGE, description=DESCRIPTION, epilog=EPILOG
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="the backup; -: standard input")
    add("store", nargs="?", metavar="STORE", help="DIR, IMAGE, /dev/NAME, LABEL=..., with :/dir")
    add("--keep", action="store_true", help="keep the old changes, as DIR.before-DATE")
    add("--verify", action="store_true", help="only read the backup, and check it")
    add("-q", "--quiet", action="store_true", help="no progress bar, no report")
    given = parser.read(argv)
    if given.verify == (given.store is not None):
        raise usage_error("name either a STORE or --verify", "see unionfs store restore --help")
    from unionfs.stores import archive, backing

    with _opened(given.file) as source:
        header = archive.read_header(source, given.file)
        trailer = archive.read_trailer(source, given.file)
        with show.progress(given.file, trailer.bytes, quiet=given.quiet) as advance:
            if given.store is None:
                archive.extract(source, trailer, given.file, None, advance)
                kept = None
            else:
                source.seek(0)
                image = locator.parse(given.store).source
                hint = f"make it first: unionfs store create {image} --size SIZE"
                place = backing.place_of(header)
                with backing.target(given.store, missing=hint, otherwise=place) as upper:
                    kept = backing.restore(upper, source, given.file, advance, keep=given.keep)
    if not given.quiet:
        of = f"{header.store} of {header.created}"
        done = "is whole" if given.store is None else f"is restored to {given.store}"
        done += f", encrypted ({header.encrypted})" if header.encrypted else ""
        done += f"; the old changes: {kept}" if kept else ""
        print(printable(f"{given.file} ({of}) {done}"))
    return ExitCode.OK


def _opened(path: str) -> IO[bytes]:
    """The backup; its end is read first, so a pipe is taken in before."""
    if path == STANDARD:
        return taken_in()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise UnionfsError(f"cannot open {path}: {exc.strerror}") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UnionfsError(f"{path} is no file", hint="a pipe is read by - for FILE")
    return open(fd, "rb", buffering=0)
