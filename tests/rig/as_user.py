# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a test's body as an ordinary user: another process, other ids, no capabilities.

`/dev/fuse` may be 0600 on a machine without udev: the body gets one that it may open. The
interpreter and the project must be readable by that user, else the test is
skipped with the reason. When the tests themselves run as an ordinary user, the body simply runs.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.rig import ground, syscalls

UID, GID = 1000, 1000
GROUPS = (1000, 2000)
PROJECT = Path(__file__).resolve().parents[2]
_DEVICE = "/dev/fuse"


class Impossible(Exception):
    """This machine cannot run anything as an ordinary user; the message says why."""


def why_impossible() -> str | None:
    if os.geteuid() != 0:
        return None
    if not os.path.exists(_DEVICE):
        return f"there is no {_DEVICE}"
    probe = [*_prefix(), sys.executable, "-c", "import pyfuse3, tests.rig"]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, cwd=PROJECT, check=False)
    except FileNotFoundError:
        return "there is no setpriv (package util-linux)"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"an ordinary user cannot run {sys.executable} in {PROJECT}: {last}"
    return None


def _prefix() -> list[str]:
    return [
        "setpriv",
        f"--reuid={UID}",
        f"--regid={GID}",
        "--groups=" + ",".join(map(str, GROUPS)),
        "--inh-caps=-all",
        "--",
    ]


def command(arguments: Sequence[str]) -> list[str]:
    """What runs these words as the ordinary user."""
    return list(arguments) if os.geteuid() != 0 else [*_prefix(), *arguments]


@contextlib.contextmanager
def fuse_for_all() -> Iterator[None]:
    """A /dev/fuse that everybody may open.

    In the tests' own mount namespace (see ground.py) that is a second node laid over the first, so
    the machine's own is not touched. Outside one the mode is changed and put back.
    """
    if not os.path.exists(_DEVICE):
        raise Impossible(f"there is no {_DEVICE}")
    mode = stat.S_IMODE(os.stat(_DEVICE).st_mode)
    if os.geteuid() != 0 or mode & 0o006 == 0o006:
        yield
    elif ground.isolate():
        with ground.Ground("unionfs-dev-") as place:
            node = place.filesystem("dev", "tmpfs") / "fuse"
            os.mknod(node, stat.S_IFCHR, os.stat(_DEVICE).st_rdev)
            node.chmod(0o666)
            syscalls.mount(str(node), _DEVICE, None, syscalls.MS_BIND)
            try:
                yield
            finally:
                syscalls.umount(_DEVICE, syscalls.MNT_DETACH)
    else:
        os.chmod(_DEVICE, 0o666)
        try:
            yield
        finally:
            os.chmod(_DEVICE, mode)


def environment() -> dict[str, str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if key in ("PATH", "LANG", "LC_ALL", "LD_PRELOAD")
        or key.startswith(("UNIONFS_", "ASAN_", "UBSAN_"))
    }
    # The helpers of mount(8) lie in sbin, and the bytecode of the user's run must not be written.
    kept["PATH"] = kept.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
    return kept | {"HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}


def run(arguments: Sequence[str], *, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's directory as the ordinary user; output is captured."""
    with fuse_for_all():
        return subprocess.run(
            command(arguments),
            cwd=PROJECT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def python(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, *arguments], timeout=timeout)
