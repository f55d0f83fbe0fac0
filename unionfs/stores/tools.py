# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of others that know file systems: where they are, and what they said.

Called by everything in stores/.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Final

from unionfs.errors import ExitCode, UnionfsError

_SBIN: Final = "/usr/sbin:/sbin:/usr/bin:/bin"


def find(name: str) -> str | None:
    """The path of a program that may lie where users do not look."""
    return shutil.which(name) or shutil.which(name, path=_SBIN)


def tool(name: str, package: str) -> str:
    """The same; raises UnionfsError that names the package if it is not installed."""
    found = find(name)
    if found is None:
        hint = f"install the package {package}"
        raise UnionfsError(f"{name} is not installed", hint=hint, code=ExitCode.SYSTEM)
    return found


def environment() -> dict[str, str]:
    """In which a program says what we can show or read, whatever the user's language."""
    return {**os.environ, "LC_ALL": "C"}


def run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Run it to its end, with nothing to read; what it ends with is for the caller to judge."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env=environment(),
    )


def lines_of(output: bytes) -> list[str]:
    """What a program said."""
    return [line.strip() for line in os.fsdecode(output).strip().splitlines()]
