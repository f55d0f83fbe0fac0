# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs generate`, started by systemd's generator; see boot/generator.py.  Called by main.py."""

import os
import sys
from collections.abc import Sequence

from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode

USAGE = "unionfs generate NORMAL [EARLY LATE]"

DESCRIPTION = """\
Writes into the directory NORMAL what systemd needs to know of profiles, and of unionfs.* on the
kernel's command line. systemd starts it by unionfs-generator, at boot and at daemon-reload."""


def run(argv: Sequence[str]) -> int:
    """Write them.  What cannot be done is said, and never fails a boot."""
    parser = Parser(prog="unionfs generate", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("places", nargs="+", metavar="DIR", help="as systemd gives them")
    given = parser.read(argv)
    from unionfs.boot import generator

    for problem in generator.generate(given.places[0], cmdline=_command_line()):
        _say(problem)
    return ExitCode.OK


def _command_line() -> str:
    """As systemd itself reads it: from the environment in a test, in a container from PID 1."""
    if (text := os.environ.get("SYSTEMD_PROC_CMDLINE")) is not None:
        return text
    contained = os.path.exists("/run/systemd/container")
    try:
        with open("/proc/1/cmdline" if contained else "/proc/cmdline", "rb") as file:
            return os.fsdecode(file.read()).replace("\0", " ")
    except OSError:
        return ""


def _say(line: str) -> None:
    """To the kernel's log, as nothing else listens so early."""
    try:
        with open("/dev/kmsg", "w") as file:
            file.write(f"<4>unionfs-generator: {line}\n")
    except OSError:
        print(f"unionfs-generator: {line}", file=sys.stderr)
