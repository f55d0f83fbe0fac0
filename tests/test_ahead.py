# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that the kernel is given at the first open of a small lower file (cext/ahead.c): no READ is
needed, and what is read is never older than what was written."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.mounted import Unionfs
from tests.test_engine import requests

PAGE, MOST = 4096, 64 * 1024
SIZES = (0, 1, PAGE - 1, PAGE, PAGE + 1, MOST - 1, MOST)
MANY = 400


def content(size: int) -> bytes:
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


@pytest.fixture
def union(place: Path) -> Iterator[Unionfs]:
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    for size in (*SIZES, MOST + 1):
        (place / "lower" / f"file{size}").write_bytes(content(size))
    for i in range(MANY):
        (place / "lower" / f"many{i}").write_bytes(content(PAGE * 2 + i))
    with Unionfs(
        [place / "lower"], place / "upper", place / "mnt", options=["driver=engine"]
    ) as union:
        yield union


@pytest.mark.root
def test_a_metadata_only_copy_in_a_lower_keeps_its_size(place: Path) -> None:
    """What is given must not make it as large as its data are."""
    for name in ("bottom", "middle", "upper", "mnt"):
        (place / name).mkdir()
    (place / "bottom/file").write_bytes(content(PAGE * 2))
    (place / "middle/file").touch()
    os.truncate(place / "middle/file", 100)
    for path, name, value in (
        ("middle", "impure", b"y"),
        ("middle/file", "metacopy", b""),
        ("middle/file", "redirect", b"/file"),
    ):
        os.setxattr(place / path, f"trusted.overlay.{name}", value)
    lowers = [place / "middle", place / "bottom"]
    with Unionfs(lowers, place / "upper", place / "mnt", options=["driver=engine"]) as union:
        file = union.mnt / "file"
        fd = os.open(file, os.O_RDONLY)  # open() would ask for the size, and so put it right
        try:
            assert os.pread(fd, 50, 200) == b""
            assert os.pread(fd, PAGE, 0) == content(100)
            assert os.fstat(fd).st_size == 100
        finally:
            os.close(fd)


def dropped(file: Path) -> None:
    """The kernel forgets its pages of a file."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_asked_for(union: Unionfs, size: int) -> None:
    before = requests(union, "read")
    assert (union.mnt / f"file{size}").read_bytes() == content(size)
    assert requests(union, "read") == before


def test_what_is_larger_is_asked_for(union: Unionfs) -> None:
    before = requests(union, "read")
    assert (union.mnt / f"file{MOST + 1}").read_bytes() == content(MOST + 1)
    assert requests(union, "read") > before


def test_mapped(union: Unionfs) -> None:
    before = requests(union, "read")
    with (
        open(union.mnt / f"file{PAGE + 1}", "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        assert mapped[:] == content(PAGE + 1)
    assert requests(union, "read") == before


def test_what_the_kernel_dropped_is_asked_for(union: Unionfs) -> None:
    file = union.mnt / f"file{PAGE}"
    assert file.read_bytes() == content(PAGE)
    dropped(file)
    before = requests(union, "read")
    assert file.read_bytes() == content(PAGE)
    assert requests(union, "read") == before + 1


def test_first_open_with_o_direct(union: Unionfs) -> None:
    """Such a handle wants no pages; who opens it later without is given them all the same."""
    file = union.mnt / f"file{PAGE + 1}"
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 2 * PAGE) as buffer:
            assert os.preadv(fd, [buffer], 0) == PAGE + 1
            assert buffer[: PAGE + 1] == content(PAGE + 1)
    finally:
        os.close(fd)
    assert file.read_bytes() == content(PAGE + 1)


@pytest.mark.root
def test_two_names_of_one_inode(place: Path) -> None:
    """What was given by one name is there by the other, and what is written by it, too."""
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    (place / "lower/one").write_bytes(content(PAGE))
    os.link(place / "lower/one", place / "lower/two")
    options = ["driver=engine", "index=on"]
    with Unionfs([place / "lower"], place / "upper", place / "mnt", options=options) as union:
        one, two = union.mnt / "one", union.mnt / "two"
        assert one.stat().st_ino == two.stat().st_ino
        before = requests(union, "read")
        assert one.read_bytes() == two.read_bytes() == content(PAGE)
        assert requests(union, "read") == before
        with open(one, "rb", buffering=0) as reader:
            two.write_bytes(b"other")
            assert reader.read() == one.read_bytes() == two.read_bytes() == b"other"


@pytest.mark.parametrize("change", ["unlink", "rename", "rename over", "replace"])
def test_names_change_between_open_and_read(union: Unionfs, change: str) -> None:
    file, other = union.mnt / f"file{PAGE}", union.mnt / f"file{PAGE + 1}"
    before = requests(union, "read")
    with open(file, "rb", buffering=0) as reader:
        if change == "unlink":
            file.unlink()
        elif change == "rename":
            file.rename(union.mnt / "new")
        elif change == "rename over":
            file.rename(other)
        else:
            other.rename(file)
        assert reader.read() == content(PAGE)
        assert requests(union, "read") == before
    if change == "rename":
        assert (union.mnt / "new").read_bytes() == content(PAGE)
    elif change == "rename over":
        assert other.read_bytes() == content(PAGE)
    elif change == "replace":
        assert file.read_bytes() == content(PAGE + 1)


def test_what_is_not_in_memory(union: Unionfs) -> None:
    """It may be given or left to READ: what comes is right, also where a part alone is there."""
    for size in SIZES:
        lower = union.lowers[0] / f"file{size}"
        with open(lower, "rb") as file:
            os.fsync(file.fileno())  # only what is on the disk can be dropped
        dropped(lower)
        if size > PAGE:
            with open(lower, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                file.read(1)
        for _ in range(2):
            assert (union.mnt / lower.name).read_bytes() == content(size)


@pytest.mark.parametrize("change", ["append", "truncate", "replace", "inside"])
def test_a_reader_from_before_sees_what_is_written(union: Unionfs, change: str) -> None:
    file, old = union.mnt / f"file{PAGE + 1}", content(PAGE + 1)
    with open(file, "rb", buffering=0) as reader:
        with open(file, "r+b", buffering=0) as writer:
            if change == "append":
                writer.seek(0, os.SEEK_END)
                writer.write(b"more")
                new = old + b"more"
            elif change == "truncate":
                writer.truncate(10)
                new = old[:10]
            elif change == "replace":
                writer.truncate(0)
                writer.write(b"other")
                new = b"other"
            else:
                os.pwrite(writer.fileno(), b"XXXX", 10)
                new = old[:10] + b"XXXX" + old[14:]
        assert reader.read() == new
    assert file.read_bytes() == new
    assert union.upper is not None
    assert (union.upper / file.name).read_bytes() == new


def test_first_open_beside_a_writer(union: Unionfs) -> None:
    """Each file is opened for the first time by two readers while a writer changes it: once he has
    closed it nobody is shown the old pages."""
    start = threading.Barrier(3)
    wrong: list[str] = []

    def read() -> None:
        for i in range(MANY):
            start.wait()
            seen = (union.mnt / f"many{i}").read_bytes()
            if len(seen) != PAGE * 2 + i:
                wrong.append(f"many{i} while it was written: {len(seen)} bytes")

    def write() -> None:
        for i in range(MANY):
            start.wait()
            file = union.mnt / f"many{i}"
            with open(file, "r+b", buffering=0) as writer:
                writer.write(b"X" * (PAGE * 2 + i))
            if set(file.read_bytes()) != {ord("X")}:
                wrong.append(f"many{i} after it was written")

    threads = [threading.Thread(target=target) for target in (read, read, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for i in range(MANY):
        assert set((union.mnt / f"many{i}").read_bytes()) == {ord("X")}, i
