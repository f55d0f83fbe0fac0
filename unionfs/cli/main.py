# SPDX-License-Identifier: GPL-2.0-or-later
"""The entry of the command line: which verb, and the one edge where errors become exit codes.

Owns the dispatch and guarded().  Each verb's parser stands beside its action in a module of its
own, which is imported only when it is asked for: a mount must not wait for what it does not need.
Called by the console script `unionfs`, and by helper.py for guarded().
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from unionfs.errors import ExitCode, UnionfsError, usage_error

VERBS = {
    "mount": "show lower layers and an upper as one file system",
    "umount": "unmount, and wait until the layers are free",
    "status": "tell what is mounted, since when, and what works on it",
    "up": "mount what a profile says",
    "down": "unmount what a profile has mounted",
    "unit": "print the systemd units of a mount",
    "policy": "tell what profiles say of a path",
    "boot": "mount what the kernel command line asks for over the root",
    "store": "make, look at, check, grow, back up and restore what holds the changes",
}

HELP = f"""\
usage: unionfs VERB ...
       unionfs [-f] [-d] -o OPT[,OPT...] MNT      as fuse-overlayfs is called

One file system out of read-only lower directories and a writable upper one.

verbs:
{chr(10).join(f"  {verb:<8} {meaning}" for verb, meaning in VERBS.items())}

options:
  -h, --help     show this help; unionfs VERB --help tells more
  -V, --version  show the version

example:
  unionfs mount /usr/share changes merged
  unionfs umount merged
"""


class Verb(Protocol):
    """A module of a verb."""

    def run(self, argv: Sequence[str]) -> int:
        """Do it; argv is what follows the verb."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return guarded("unionfs", lambda: dispatch(arguments, last=argv is None))


def dispatch(argv: Sequence[str], *, last: bool = False) -> int:
    """Find the verb and run it; `last`: it is all that this process is for."""
    first = argv[0] if argv else ""
    if first == "store":
        from unionfs.cli import store

        return store.run(argv[1:], last=last)
    if first in VERBS:
        return cast(Verb, importlib.import_module(f"unionfs.cli.{first}")).run(argv[1:])
    if first == "generate":  # for systemd only
        from unionfs.cli import generate

        return generate.run(argv[1:])
    if first in ("-h", "--help", "help"):
        print(HELP, end="")
        return ExitCode.OK
    if first in ("-V", "--version"):
        print(f"unionfs {version()}")
        return ExitCode.OK
    if first.startswith("-") or any(word.startswith("-o") for word in argv):
        # fuse-overlayfs's command line, and what mount.fuse3 makes of an fstab line.
        from unionfs.cli import mount

        return mount.run(argv, source_first=True)
    if not argv:
        raise usage_error("nothing to do", "see unionfs --help")
    raise usage_error(f"{first} is no verb of unionfs", _hint(first))


def _hint(word: str) -> str:
    import difflib  # slow to load, and needed on errors only

    near = difflib.get_close_matches(word, [*VERBS, "unmount"], n=1)
    verb = "umount" if near == ["unmount"] else "".join(near)
    return f"did you mean {verb}?" if verb else f"the verbs are {', '.join(VERBS)}"


def version() -> str:
    """The version of the installed package."""
    from importlib import metadata  # slow to load

    try:
        return metadata.version("unionfs")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def guarded(program: str, action: Callable[[], int]) -> int:
    """Run action; what it raises becomes one line on stderr and an exit code.  The only edge."""
    _fill_standard_descriptors()
    try:
        code = action()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except SystemExit:
        raise
    except BaseException as error:
        return _explain(program, error)


def _explain(program: str, error: BaseException) -> int:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]  # a nursery of trio wraps what its tasks raise
    if isinstance(error, UnionfsError):
        report(program, error)
        return error.code
    if isinstance(error, KeyboardInterrupt):
        _say(f"{program}: interrupted")
        return ExitCode.INTERRUPT
    if isinstance(error, BrokenPipeError):
        # The reader went away.  Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
        return ExitCode.USAGE
    import traceback

    traceback.print_exception(error)
    _say(f"{program}: this is a bug in unionfs: {error!r}; please report it with the lines above")
    return ExitCode.INTERNAL


def report(program: str, error: UnionfsError) -> None:
    """The one line of an error."""
    _say(f"{program}: {error.line()}")


def _say(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr)


def _fill_standard_descriptors() -> None:
    """Keep 0, 1 and 2 taken: a file of ours must never become the daemon's stderr."""
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
