# SPDX-License-Identifier: GPL-2.0-or-later
"""A power cut after a copy-up has been published: the name is never on disk without the data.

The file system of both layers is stopped as ext4 and xfs can be for tests (EXT4_IOC_SHUTDOWN,
XFS_IOC_GOINGDOWN without a flush): what lies in memory only is lost, and the next mount replays the
journal. A file beside the union is synced just before, which carries the journal on.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rig import ground
from tests.rig.ground import Ground, Kind
from tests.rig.mounted import Unionfs

pytestmark = pytest.mark.root

_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32) of fs/xfs/xfs_fs.h and of linux/ext4.h
_WITHOUT_FLUSH = struct.pack("I", 2)
SMALL, LARGE, SPARSE = b"small " * 100, bytes(range(256)) * 1024, b"\0" * 300_000 + b"end"
CONTENTS = {"small": SMALL, "large": LARGE, "sparse": SPARSE, "empty": b"", "linked": LARGE}
COUNT = 8


def _open_only(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY))


def _completed(path: Path) -> None:
    """A metadata-only copy first, then its data."""
    path.chmod(0o600)
    _open_only(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "open": _open_only,
    "mode": lambda path: path.chmod(0o600),
    "completed": _completed,
}


class Disk:
    """Both layers on one file system, and a union over them."""

    def __init__(self, base: Ground, kind: Kind, *options: str) -> None:
        self.kind = kind
        self.point = base.filesystem("disk", kind, 512)
        self.image = base.base / "disk.img"
        self.lower, self.upper = self.point / "lower", self.point / "upper"
        self.lower.mkdir()
        self.upper.mkdir()
        for name, content in CONTENTS.items():
            for i in range(COUNT):
                with open(self.lower / f"{name}{i}", "wb") as file:
                    _write_sparse(file.fileno(), content)
                if name == "linked":
                    os.link(self.lower / f"{name}{i}", self.lower / f"other-{name}{i}")
        self._sync("before")
        self.union = Unionfs(
            [self.lower], self.upper, base.directory("mnt"), options=["lower=sealed", *options]
        )
        self.union.mount()

    def _sync(self, name: str) -> None:
        with open(self.point / name, "wb") as file:
            os.fsync(file.fileno())
        if name == "before":
            os.sync()

    def cut(self) -> None:
        """The power fails, and comes back."""
        self._sync("after")
        fd = os.open(self.point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, _WITHOUT_FLUSH)
        finally:
            os.close(fd)
        self.union.kill()
        ground.run("umount", self.point)
        ground.run("mount", "-t", self.kind, "-o", "loop", self.image, self.point)


def _write_sparse(fd: int, content: bytes) -> None:
    kept = content.lstrip(b"\0")
    os.ftruncate(fd, len(content))
    os.pwrite(fd, kept, len(content) - len(kept))


@pytest.fixture
def base() -> Iterator[Ground]:
    with Ground() as made:
        yield made


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_a_copy_is_not_there_without_its_data(base: Ground, kind: Kind, change: str) -> None:
    disk = Disk(base, kind, "metacopy=on")
    names = sorted(path.name for path in disk.union.mnt.iterdir() if "other" not in path.name)
    for name in names:
        CHANGES[change](disk.union.mnt / name)
    disk.cut()
    if kind == "xfs":  # in whose log they come before the file that was synced
        assert set(names) <= {path.name for path in disk.upper.iterdir()}
    disk.union.mount()
    try:
        for name in names:
            content = (disk.union.mnt / name).read_bytes()
            assert content == CONTENTS[name.rstrip("0123456789")], name
            if change != "open" and kind == "xfs":
                assert (disk.union.mnt / name).stat().st_mode & 0o7777 == 0o600, name
    finally:
        disk.union.umount()


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_what_was_synced_by_its_user_is_there(base: Ground, kind: Kind) -> None:
    """What is written after the copy-up, and fsync(2) by him."""
    disk = Disk(base, kind)
    for name, content in CONTENTS.items():
        fd = os.open(disk.union.mnt / f"{name}0", os.O_WRONLY)
        try:
            os.pwrite(fd, b"appended", len(content))
            os.fsync(fd)
        finally:
            os.close(fd)
    disk.cut()
    disk.union.mount()
    try:
        for name, content in CONTENTS.items():
            assert (disk.union.mnt / f"{name}0").read_bytes() == content + b"appended", name
    finally:
        disk.union.umount()
