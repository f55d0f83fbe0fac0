# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs unit`: the systemd units of a mount, printed or written.  Called by main.py.

Owns where they go and which program they start; what is in them is for boot/units.py.
"""

import os
import shutil
import sys
from collections.abc import Sequence

from unionfs.boot import devices, units
from unionfs.boot.units import Unit
from unionfs.cli.mount import add_layers, read_layers, words_of
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, UnionfsError, usage_error
from unionfs.runtime import name_of

USAGE = """\
unionfs unit LOWER[:LOWER...] UPPER MNT [-o OPT,...] [--service | --automount]
       unionfs unit LOWER[:LOWER...] MNT [--ro | --ephemeral[=SIZE]] ..."""

DESCRIPTION = """\
Prints the unit files for what `unionfs mount` would mount with the same arguments: a
.mount unit, which starts /sbin/mount.fuse.unionfs, or a service. With nofail among the
options the boot goes on without it, with device-timeout= the devices have a drop-in."""

EPILOG = """
example:
  unionfs unit /srv/base LABEL=changes /srv/tree --output /etc/systemd/system
  systemctl enable --now srv-tree.mount
"""

PROGRAM = "/usr/bin/unionfs"


def run(argv: Sequence[str]) -> int:
    """Print them."""
    parser = Parser(prog="unionfs unit", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add_layers(parser)
    add = parser.add_argument
    add("--service", action="store_true", help="a service: restarted if it fails, watched")
    add("--automount", action="store_true", help="mounted when it is used")
    add("--output", metavar="DIR", help="write the files there")
    given = parser.read(words_of(argv))
    if given.service and given.automount:
        raise usage_error("--service and --automount exclude each other", "give one of them")
    if given.output == "":
        raise usage_error("the DIR of --output is empty", "name one, or leave --output out")
    reader = read_layers(given)
    reader.place(given.places, source_first=False)
    asked = units.request(reader.build(), given.strings)
    if given.service:
        made = [units.service_unit(asked, _program())]
    else:
        made = units.mount_units(asked, automount=given.automount)
    made += _waits(asked)
    if given.output is not None:
        _write(given.output, made)
    else:
        print("\n".join(f"# {unit.name}\n{unit.text}" for unit in made), end="")
    return ExitCode.OK


def _waits(asked: units.Request) -> list[Unit]:
    """device-timeout=, for systemd too: else it waits for its own 90 seconds."""
    options = asked.options
    named = [*options.lowers, *([options.upper] if options.upper is not None else [])]
    file = f"50-unionfs-{name_of(asked.point)}.conf"
    return devices.drop_ins(named, options.device_timeout, file)


def _program() -> str:
    """As which we were started, if that is a file that others find too."""
    own = shutil.which(sys.argv[0])
    if own is not None and os.path.basename(own) == "unionfs":
        return os.path.abspath(own)
    return shutil.which("unionfs") or PROGRAM


def _write(directory: str, made: Sequence[Unit]) -> None:
    """Each under its name; nothing of others is overwritten."""
    for unit in made:
        path = os.path.join(directory, unit.name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "x", encoding="utf-8") as file:
                file.write(unit.text)
        except FileExistsError:
            raise UnionfsError(f"{path} exists", hint="remove it first") from None
        except OSError as exc:
            raise UnionfsError(f"cannot write {path}: {os.strerror(exc.errno or 0)}") from exc
        print(path)
