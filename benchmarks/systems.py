# SPDX-License-Identifier: GPL-2.0-or-later
"""What is compared: each system mounted the same way, over one lower, on an upper of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.rig import as_user, mounted

PLAIN, OVERLAY, UNIONFS, UNIONFS_USER = "plain", "overlay", "unionfs", "unionfs-user"


class Layers(NamedTuple):
    lower: Path
    upper: Path
    work: Path
    mnt: Path


Command = Callable[[Layers], list[str]]


class System(NamedTuple):
    """`mount` is None for the plain directory; `user`: mounted and used by an ordinary user."""

    name: str
    user: bool
    mount: Command | None
    umount: Command = lambda at: ["umount", str(at.mnt)]

    @property
    def ours(self) -> bool:
        return self.name.startswith(UNIONFS) and not self.name.startswith("unionfs-fuse")

    @property
    def peer(self) -> bool:
        return not self.ours and self.name not in (PLAIN, OVERLAY)

    def command(self, words: Sequence[str]) -> list[str]:
        """As whoever this system belongs to."""
        return as_user.command(words) if self.user else list(words)


def call(command: Sequence[str]) -> None:
    """Run a command as it is; RuntimeError with its words if it fails."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=as_user.environment(),
        cwd=as_user.PROJECT,
        check=False,
    )
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())
        raise RuntimeError(words or f"{os.path.basename(command[0])}: exit {done.returncode}")


def _places(at: Layers) -> str:
    return f"lowerdir={at.lower},upperdir={at.upper},workdir={at.work}"


def _unionfs(name: str, user: bool, options: str = "") -> System:
    program = mounted.program()
    extra = ["-o", options] if options else []
    return System(
        name,
        user,
        lambda at: [*program, "mount", str(at.lower), str(at.upper), str(at.mnt), *extra],
        lambda at: [*program, "umount", str(at.mnt)],
    )


def _fuse_overlayfs(name: str, program: str, user: bool) -> System:
    # Both of its generations add default_permissions by themselves, and for root allow_other.
    leave = ["fusermount3", "-u"] if user else ["umount"]
    return System(
        name,
        user,
        lambda at: [program, "-o", _places(at), str(at.mnt)],
        lambda at: [*leave, str(at.mnt)],
    )


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"fuse-overlayfs[: ]+(?:version )?v?([0-9.]+)", done.stdout + done.stderr)
    return found.group(1) if found else "unknown"


def known(programs: Sequence[str], options: Sequence[str]) -> Iterator[System]:
    """All systems that can be here: fuse-overlayfs in PATH and in `programs`, unionfs once more
    for each of `options`."""
    root = os.geteuid() == 0
    yield System(PLAIN, user=not root, mount=None)
    if root:
        yield System(
            OVERLAY,
            False,
            lambda at: [
                *("mount", "-t", "overlay", "overlay", str(at.mnt)),
                *("-o", f"{_places(at)},redirect_dir=on,index=on,metacopy=off"),
            ],
        )
        yield _unionfs(UNIONFS, False)
        for words in options:
            yield _unionfs(f"{UNIONFS}:{words}", False, words)
    yield _unionfs(UNIONFS_USER, True)
    found = shutil.which("fuse-overlayfs")
    for program in [*([found] if found else []), *programs]:
        name = f"fuse-overlayfs-{_version(program)}"
        if root:
            yield _fuse_overlayfs(name, program, False)
        yield _fuse_overlayfs(f"{name}-user", program, True)
    if root and shutil.which("unionfs-fuse"):
        yield System(
            "unionfs-fuse",
            False,
            lambda at: [
                *("unionfs-fuse", "-o", "cow,allow_other,default_permissions,use_ino,suid,dev"),
                *(f"{at.upper}=RW:{at.lower}=RO", str(at.mnt)),
            ],
        )


def choose(
    wanted: Sequence[str] | None, programs: Sequence[str], options: Sequence[str]
) -> dict[str, System]:
    """The systems that are here and asked for; why others are not is said."""
    found = {each.name: each for each in known(programs, options)}
    for name in wanted or ():
        if name not in found:
            sys.exit(f"benchmarks/run: --system {name}: not here; here are: {', '.join(found)}")
    chosen = {name: each for name, each in found.items() if name in (wanted or found)}
    why = as_user.why_impossible() or mounted.user_mount_possible()
    if why and any(each.user and each.mount for each in chosen.values()):
        print(f"benchmarks/run: nothing as an ordinary user: {why}", file=sys.stderr)
        chosen = {name: each for name, each in chosen.items() if not (each.user and each.mount)}
    return chosen
