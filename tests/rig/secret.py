# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests of encrypted stores have in common: a passphrase, and who types it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.rig.mounted import PATIENCE, program

_IMPATIENT = """
import sys
from unionfs import passphrase
from unionfs.cli.main import main
passphrase.SECONDS = float(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""
PASSPHRASE = "correct horse battery staple"


def why_not() -> str:
    return "" if shutil.which("gocryptfs") else "gocryptfs is not installed"


def key_file(place: Path, passphrase: str = PASSPHRASE, name: str = "key") -> Path:
    path = place / name
    path.write_text(passphrase + "\n")
    path.chmod(0o600)
    return path


def run(
    *arguments: object, given: str | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`unionfs ...` where there is no terminal, with `given` on its standard input."""
    return subprocess.run(
        [*program(), *map(str, arguments)],
        input=given if given is not None else "",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )


def typed(
    arguments: Sequence[object], answers: Sequence[str], *, seconds: float | None = None
) -> tuple[int, str]:
    """`unionfs ...` on a terminal of its own: each question gets the next answer.

    Its exit code, and all that the terminal showed.  `seconds`: of its patience, where it has any.
    """
    started = program() if seconds is None else [sys.executable, "-c", _IMPATIENT, str(seconds)]
    pid, terminal = os.forkpty()
    if pid == 0:
        signal.alarm(int(PATIENCE))
        words = [*started, *map(str, arguments)]
        os.execv(words[0] if words[0].startswith("/") else sys.executable, words)
    shown = b""
    left = list(answers)
    while True:
        try:
            more = os.read(terminal, 4096)
        except OSError:  # the terminal has no other end any more
            break
        if not more:
            break
        shown += more
        if left and more.endswith(b": "):
            os.write(terminal, os.fsencode(left.pop(0)) + b"\n")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode(errors="replace")


def visible(place: Path) -> bytes:
    """All names and all contents below a directory, as somebody without the key sees them."""
    found = bytearray()
    for folder, folders, names in os.walk(place):
        for name in (*folders, *names):
            path = Path(folder, name)
            found += os.fsencode(name) + b"\n"
            if path.is_symlink():
                found += os.fsencode(os.readlink(path))
            elif path.is_file():
                found += path.read_bytes()
            for mark in os.listxattr(path, follow_symlinks=False):
                found += os.fsencode(mark) + os.getxattr(path, mark, follow_symlinks=False)
    return bytes(found)


def seen_in_processes(text: str) -> list[str]:
    """Which processes have a text in their arguments or their environment."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        for name in ("cmdline", "environ"):
            try:
                data = Path("/proc", entry, name).read_bytes()
            except OSError:
                continue
            if os.fsencode(text) in data:
                found.append(f"{entry}/{name}")
    return found
