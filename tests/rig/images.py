# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of file systems for tests of stores, and the loop devices of our own."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground
from unionfs.stores.tools import find

# The smallest that each mkfs takes.
_SIZES = {"ext4": 16, "xfs": 300, "btrfs": 114}
_BLOCK = 1 << 16
WRITABLE = ("ext4", "xfs", "btrfs")
# For what has been tried on one kind in each run already.
OTHERS_SLOWLY = ("ext4", "xfs", pytest.param("btrfs", marks=pytest.mark.slow))


def why_not(kind: str) -> str | None:
    """Why an image of this kind cannot be mounted here, or None."""
    if os.geteuid() == 0:
        return None if os.path.exists("/dev/loop-control") else "there are no loop devices"
    programs = {"ext4": "fuse2fs", "squashfs": "squashfuse", "erofs": "erofsfuse"}
    if kind not in programs:
        return f"an ordinary user cannot mount {kind}"
    return None if find(programs[kind]) else f"there is no {programs[kind]}"


def make(path: Path, kind: str = "ext4", label: str = "", megabytes: int = 0) -> Path:
    """A writable file system in a sparse file, owned by who runs the test."""
    with open(path, "wb") as file:
        file.truncate((megabytes or _SIZES[kind]) << 20)
    mkfs = find(f"mkfs.{kind}")
    assert mkfs is not None
    words = {
        "ext4": ["-q", "-F", "-b", "4096", "-E", f"root_owner={os.getuid()}:{os.getgid()}"],
        "xfs": ["-q", "-f"],
        "btrfs": ["-q", "-f"],
    }[kind]
    ground.run(mkfs, *words, *(["-L", label] if label else []), path)
    return path


def digest(image: Path) -> str:
    """Of what is in it, holes passed over, and its length."""
    found = hashlib.sha256(str(image.stat().st_size).encode())
    with open(image, "rb", buffering=0) as file:
        position = 0
        while True:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA) & -_BLOCK
            except OSError:  # ENXIO: only a hole is left
                return found.hexdigest()
            data = os.pread(file.fileno(), _BLOCK, start)
            if data.strip(b"\0"):  # zeros may be a hole the next time
                found.update(start.to_bytes(8) + data)
            position = start + _BLOCK


def squash(path: Path, tree: Path) -> Path:
    ground.run("mksquashfs", tree, path, "-no-progress", "-quiet", "-comp", "gzip")
    return path


@contextlib.contextmanager
def attached(image: Path, *, partitions: bool = False) -> Iterator[str]:
    """A loop device of our own for an image (root only).

    `partitions`: it gets devices for those too, also from a kernel that reads no partition tables.
    """
    device = ground.run("losetup", "-f", "--show", image).strip()
    try:
        if partitions:
            subprocess.run(["partx", "-a", device], capture_output=True, check=False)
        yield device
    finally:
        if partitions:
            subprocess.run(["partx", "-d", device], capture_output=True, check=False)
        subprocess.run(["losetup", "-d", device], check=False)


@contextlib.contextmanager
def node_of(device: str) -> Iterator[bool]:
    """The node of a device, also where nobody makes nodes; False: the kernel does not know it."""
    number = Path("/sys/class/block", os.path.basename(device), "dev")
    if not number.exists():
        yield False
        return
    made = not os.path.exists(device)
    if made:
        major, _, minor = number.read_text().partition(":")
        os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(int(major), int(minor)))
    try:
        yield True
    finally:
        if made:
            os.unlink(device)


def loops_of(image: Path) -> list[str]:
    """The loop devices that are bound to an image."""
    if os.geteuid() != 0:
        return []
    out = ground.run("losetup", "-n", "-O", "NAME", "-j", image)
    return out.split()
