# SPDX-License-Identifier: GPL-2.0-or-later
"""What is timed. A workload takes the root of a fresh union and returns how many operations it did;
those of one union come in this order, each on files of its own.

The lower has `tree` (Python's standard library) and `big`.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

MIB = 1 << 20
BIG = 64 * MIB
NEW = 1000
MISSING = 2000
RANDOM_WRITES = 2000
CHANGED = 200

Workload = Callable[[Path], int]


def make_lower(lower: Path) -> None:
    """The standard library of the running Python, and one large file."""
    source = Path(os.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages")
    shutil.copytree(source, lower / "tree", symlinks=True, ignore=ignored)
    (lower / "big").write_bytes(os.urandom(MIB) * (BIG // MIB))


def _files(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root / "tree"):
        for name in sorted(names):
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                yield path


def walk(root: Path) -> int:
    count = 0
    for folder, _, names in os.walk(root / "tree"):
        for name in names:
            os.lstat(os.path.join(folder, name))
            count += 1
    return count


def read_all(root: Path) -> int:
    files = list(_files(root))
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, MIB)
        os.close(fd)
    return len(files)


def missing_names(root: Path) -> int:
    for number in range(MISSING):
        if os.path.lexists(root / "tree" / f"missing{number}"):
            raise AssertionError("it is there")
    return MISSING


def create(root: Path) -> int:
    (root / "new").mkdir()
    for number in range(NEW):
        fd = os.open(root / "new" / f"f{number}", os.O_CREAT | os.O_WRONLY, 0o644)
        os.write(fd, b"x" * 100)
        os.close(fd)
    return NEW


def rename(root: Path) -> int:
    for number in range(NEW):
        os.rename(root / "new" / f"f{number}", root / "new" / f"g{number}")
    return NEW


def unlink_new(root: Path) -> int:
    for number in range(NEW):
        os.unlink(root / "new" / f"g{number}")
    return NEW


def chmod_lower(root: Path) -> int:
    for path in list(_files(root))[:CHANGED]:
        os.chmod(path, 0o600)
    return CHANGED


def append_lower(root: Path) -> int:
    for path in list(_files(root))[CHANGED : 2 * CHANGED]:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"x")
        os.close(fd)
    return CHANGED


def unlink_lower(root: Path) -> int:
    for path in list(_files(root))[2 * CHANGED : 3 * CHANGED]:
        os.unlink(path)
    return CHANGED


def read_big(root: Path) -> int:
    fd = os.open(root / "big", os.O_RDONLY)
    while os.read(fd, MIB):
        pass
    os.close(fd)
    return BIG // MIB


def write_and_sync(root: Path) -> int:
    fd = os.open(root / "written", os.O_CREAT | os.O_WRONLY)
    data = bytes(range(256)) * 4096
    for _ in range(BIG // MIB):
        os.write(fd, data)
    os.fsync(fd)
    os.close(fd)
    return BIG // MIB


def write_at_random(root: Path) -> int:
    fd = os.open(root / "written", os.O_WRONLY)
    chance = random.Random(1)
    for _ in range(RANDOM_WRITES):
        os.pwrite(fd, b"y" * 4096, chance.randrange(BIG // 4096) * 4096)
    os.close(fd)
    return RANDOM_WRITES


WORKLOADS: dict[str, Workload] = {
    "walk, fresh": walk,
    "walk, again": walk,
    "open-read-close, first": read_all,
    "open-read-close, again": read_all,
    "missing names": missing_names,
    "create-write-close": create,
    "rename": rename,
    "unlink of new files": unlink_new,
    "chmod of lower files": chmod_lower,
    "append to lower files": append_lower,
    "unlink of lower files": unlink_lower,
    "sequential read, first, a MiB": read_big,
    "sequential read, again, a MiB": read_big,
    "write and fsync, a MiB": write_and_sync,
    "write of 4 KiB at random": write_at_random,
}
