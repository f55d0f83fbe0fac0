# SPDX-License-Identifier: GPL-2.0-or-later
"""fallocate(2), lseek(2) for data and holes, copy_file_range(2): as on a plain directory of the
upper's file system, whatever a file's way into the upper was."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import struct
import subprocess
import threading
import zlib
from pathlib import Path

import pytest

from tests.conftest import Stores
from tests.rig import syscalls
from tests.rig.ground import Kind
from tests.rig.mounted import Unionfs
from tests.rig.pair import Pair, outcome

KEEP, PUNCH, ZERO = (
    syscalls.FALLOC_KEEP_SIZE,
    syscalls.FALLOC_PUNCH_HOLE,
    syscalls.FALLOC_ZERO_RANGE,
)
MODES = (0, KEEP, PUNCH | KEEP, PUNCH, ZERO, ZERO | KEEP, 0x80, 1 << 30)
RANGES = ((0, 10_000), (5000, 100_000), (190_000, 50_000), (300_000, 1), (0, 0), (-1, 5), (5, -1))


def fill_for_data(root: Path) -> None:
    (root / "large").write_bytes(b"0123456789" * 20_000)
    (root / "meta").write_bytes(b"0123456789" * 20_000)
    with open(root / "holes", "wb") as file:
        file.write(b"start")
        file.seek(1 << 20)
        file.write(b"middle")
        file.truncate(3 << 20)


def read_through(fd: int) -> tuple[int, int, bytes]:
    """Size, checksum, and what the descriptor says of the start."""
    size = os.fstat(fd).st_size
    return size, zlib.crc32(os.pread(fd, size + 10, 0)), os.pread(fd, 20, 4990)


@pytest.mark.parametrize("passthrough", ["all", "off"])
def test_large_reads(place: Path, passthrough: str) -> None:
    """Answers of any length from any place, also where a file ends or is cut meanwhile."""
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    rng = random.Random(7)
    sizes = [1, 65_535, 65_536, 65_537, 200_000, 1 << 20, (1 << 20) + 1, (3 << 20) + 12_345]
    contents = {f"f{size}": rng.randbytes(size) for size in sizes}
    for name, content in contents.items():
        (place / "lower" / name).write_bytes(content)
    options = [f"passthrough={passthrough}"]
    with Unionfs([place / "lower"], place / "upper", place / "mnt", options=options) as union:
        for round_ in range(2):
            for name, content in contents.items():
                with open(union.mnt / name, "rb", buffering=0) as file:
                    for _ in range(20):
                        at, length = rng.randrange(len(content)), rng.randrange(1 << 21)
                        assert os.pread(file.fileno(), length, at) == content[at : at + length]
                assert (union.mnt / name).read_bytes() == content
                if round_ == 0:
                    with open(union.mnt / name, "r+b") as file:
                        file.write(content[:1])
            union.remount()
        _read_what_is_cut(union.mnt / "cut")


def _read_what_is_cut(path: Path) -> None:
    """A file is as long as it was or as it is, and has its bytes or zeros, at each read."""
    whole = b"x" * (4 << 20)
    path.write_bytes(whole)
    over = threading.Event()

    def cut() -> None:
        while not over.is_set():
            os.truncate(path, 70_000)
            os.truncate(path, len(whole))

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        for _ in range(100):
            with open(path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                got = file.read(1 << 20)
                assert len(got) >= 70_000
                assert set(got) <= set(b"x\0")
    finally:
        over.set()
        thread.join()


HOW = {"plain": os.O_RDWR, "append": os.O_RDWR | os.O_APPEND, "read": os.O_RDONLY}


def allocate(root: Path, name: str, how: str) -> list[object]:
    seen: list[object] = []
    early = os.open(root / name, os.O_RDONLY)
    fd = os.open(root / name, HOW[how])
    try:
        for mode in MODES:
            for start, length in RANGES:
                done = outcome(lambda _: syscalls.fallocate(fd, mode, start, length), root)  # noqa: B023
                seen.append((how, mode, start, length, done, read_through(early)))
        if how == "append":
            os.write(fd, b"appended")
        seen.append((read_through(early), read_through(fd), os.stat(root / name).st_size))
    finally:
        os.close(fd)
        os.close(early)
    return seen


def test_fallocate(pair: Pair) -> None:
    """Every mode, on a file that was open before it was copied up and on a metadata-only copy."""

    def make(root: Path) -> None:
        for how in HOW:
            for name in ("large", "meta"):
                (root / f"{how}-{name}").write_bytes(b"0123456789" * 20_000)

    pair.fill(make)
    with pair.mounted():
        for how in HOW:
            for root in (pair.mnt, pair.plain):
                (root / f"{how}-meta").chmod(0o640)  # of its metadata alone
            for name in ("large", "meta"):
                got, want = (
                    allocate(root, f"{how}-{name}", how) for root in (pair.mnt, pair.plain)
                )
                for mine, other in zip(got, want, strict=True):
                    assert mine == other
        # The kernel lets no other mode through to a FUSE file system.
        with open(pair.mnt / "plain-large", "r+b") as file:
            for mode in (syscalls.FALLOC_COLLAPSE_RANGE, syscalls.FALLOC_INSERT_RANGE):
                with pytest.raises(OSError, match="not supported"):
                    syscalls.fallocate(file.fileno(), mode, 0, 4096)


def data_map(fd: int) -> list[tuple[int, int]]:
    """Where the data of a file begin and end."""
    found: list[tuple[int, int]] = []
    at, size = 0, os.fstat(fd).st_size
    with contextlib.suppress(OSError):  # ENXIO: a hole up to the end
        while at < size:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, at))
    return found


def test_holes(pair: Pair) -> None:
    """Of a lower file, of its metadata-only copy, of what is copied up while it is open."""
    pair.fill(fill_for_data)

    def act(root: Path) -> object:
        fd = os.open(root / "holes", os.O_RDONLY)
        seen = [data_map(fd)]
        (root / "holes").chmod(0o640)
        seen.append(data_map(fd))
        with open(root / "holes", "r+b") as file:
            seen.append(data_map(fd))
            os.pwrite(file.fileno(), b"more", 2 << 20)
            os.fsync(file.fileno())
            seen.append(data_map(fd))
            syscalls.fallocate(file.fileno(), PUNCH | KEEP, 0, 1 << 20)
            seen.append(data_map(fd))
        seen.append([(os.fstat(fd).st_size, 0)])
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with pytest.raises(OSError, match="No such device"):
                os.lseek(fd, 3 << 20, whence)
        os.close(fd)
        return seen

    with pair.mounted():
        pair.both(act)
        pair.union.remount()
        with open(pair.mnt / "holes", "rb") as mine, open(pair.plain / "holes", "rb") as other:
            assert data_map(mine.fileno()) == data_map(other.fileno())
            assert mine.read() == other.read()


def test_copy_file_range(pair: Pair) -> None:
    """From a lower file, a metadata-only copy, a file copied up meanwhile; within one file; to the
    end; to what is open to be appended to."""
    pair.fill(fill_for_data)

    def copy(source: int, target: int, size: int, start: int, to: int) -> object:
        try:
            done = os.copy_file_range(source, target, size, start, to)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return done, os.fstat(target).st_size, zlib.crc32(os.pread(target, 1 << 22, 0))

    def act(root: Path) -> object:
        source = os.open(root / "meta", os.O_RDONLY)
        target = os.open(root / "large", os.O_RDWR)
        holes = os.open(root / "holes", os.O_RDONLY)
        append = os.open(root / "large", os.O_WRONLY | os.O_APPEND)
        try:
            seen = [copy(source, target, 4096, 100, 5), copy(holes, target, 1 << 22, 0, 70_000)]
            (root / "meta").chmod(0o640)
            seen.append(copy(source, target, 8192, 4096, 0))
            with open(root / "meta", "r+b") as file:
                os.pwrite(file.fileno(), b"changed", 100)
                seen.append(copy(source, target, 4096, 0, 8192))
            seen.append(copy(target, target, 4096, 0, 65_536))
            seen.append(copy(target, target, 4096, 0, 10))
            seen.append(copy(source, target, 100, 1 << 22, 0))
            seen.append(copy(source, append, 100, 0, 0))
            seen.append(copy(source, source, 100, 0, 0))
        finally:
            for fd in (source, target, holes, append):
                os.close(fd)
        return seen

    with pair.mounted():
        pair.both(act)


FIEMAP, SHARED = 0xC020_660B, 0x2000


def shares_extents(path: Path) -> bool:
    with open(path, "rb") as file:
        asked = struct.pack("=QQIIII", 0, 2**64 - 1, 1, 0, 1, 0) + bytes(56)
        told = fcntl.ioctl(file, FIEMAP, asked)
        return bool(struct.unpack_from("=QQQQQI", told, 32)[5] & SHARED)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_copies_share_their_data(stores: Stores, kind: Kind) -> None:
    """cp(1) by copy_file_range: the upper's file system copies no byte; FICLONE itself the kernel
    passes on to no FUSE file system."""
    pair = Pair(stores.place(kind))
    pair.fill(lambda root: (root / "file").write_bytes(os.urandom(1 << 20)))
    with pair.mounted():
        for number, source in enumerate((pair.mnt / "file", pair.mnt / "copy0")):
            target = pair.mnt / f"copy{number}"
            subprocess.run(["cp", "--reflink=auto", source, target], check=True)
            assert target.read_bytes() == source.read_bytes()
            assert shares_extents(pair.upper / target.name)
        with (
            open(pair.mnt / "file", "rb") as file,
            open(pair.mnt / "clone", "wb") as clone,
            pytest.raises(OSError, match="not supported"),
        ):
            fcntl.ioctl(clone, 0x4004_9409, file.fileno())
    stores.base.remove(pair.place)
