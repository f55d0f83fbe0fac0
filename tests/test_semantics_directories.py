# SPDX-License-Identifier: GPL-2.0-or-later
"""Directories: listing while they change, many entries, positions that stay valid."""

from __future__ import annotations

import os
import stat
from collections import Counter
from pathlib import Path

import pytest

from tests.rig import layers, syscalls
from tests.rig.arena import Arena

MANY = [20_000, pytest.param(100_000, marks=pytest.mark.slow)]


def names(path: Path) -> set[str]:
    return {name for name in os.listdir(path) if name != ".unionfs"}


def read_some(fd: int, count: int, size: int = 4096) -> list[syscalls.Dirent]:
    """At least `count` entries, in whole getdents calls."""
    found: list[syscalls.Dirent] = []
    while len(found) < count:
        batch = syscalls.getdents(fd, size)
        if not batch:
            break
        found += batch
    return found


@pytest.mark.parametrize("many", MANY)
def test_many_entries_while_they_change(arena: Arena, many: int) -> None:
    """POSIX: what was there all along is given exactly once, whatever else comes and goes."""
    of_lower = many * 6 // 10
    big = arena.lower / "big"
    big.mkdir()
    for number in range(of_lower):
        os.mknod(big / f"n{number}")
    with arena.mounted() as mnt:
        top = mnt / "big"
        for number in range(of_lower, many):
            os.mknod(top / f"n{number}")
        fd = os.open(top, os.O_RDONLY)
        entries = list(syscalls.read_directory(fd))
        counted = Counter(entry.name for entry in entries)
        assert len(counted) == many + 2
        assert max(counted.values()) == 1
        assert len({entry.cookie for entry in entries}) == len(entries)

        syscalls.lseek(fd, 0)
        first = read_some(fd, many * 3 // 10, 32768)
        gone = {f"n{number}" for number in range(0, many, 97)}
        for name in gone:
            os.unlink(top / name)
        for number in range(1000):
            os.mknod(top / f"fresh{number}")
        os.rename(top / "n1", top / "renamed")
        rest = list(syscalls.read_directory(fd))
        seen = Counter(entry.name.decode() for entry in first + rest)
        stayed = {f"n{number}" for number in range(2, many)} - gone
        missing = [name for name in stayed if seen[name] != 1]
        assert not missing, f"{len(missing)} given not exactly once, such as {missing[:5]}"

        # Back to positions told before the changes: what follows is what followed then.
        for cut in (len(first) - 1, many // 8, 0):
            syscalls.lseek(fd, first[cut].cookie)
            again = Counter(entry.name.decode() for entry in syscalls.read_directory(fd))
            want = {entry.name.decode() for entry in [*first[cut + 1 :], *rest]} & stayed
            missing = [name for name in want if again[name] != 1]
            assert not missing, f"after seekdir to {cut}: {len(missing)}, such as {missing[:5]}"
            before = {entry.name.decode() for entry in first[: cut + 1]} & stayed
            doubled = [name for name in before if again[name]]
            assert not doubled, f"after seekdir to {cut}: {doubled[:5]} come again"
        os.close(fd)
        want = (stayed | {f"fresh{number}" for number in range(1000)} | {"renamed"}) - {"n1"}
        assert names(top) == want
        arena.remount()
        assert names(top) == want


def test_every_position_leads_back(arena: Arena) -> None:
    for number in range(300):
        (arena.lower / f"l{number}").touch()
    with arena.mounted() as mnt:
        for number in range(300):
            (mnt / f"u{number}").touch()
        fd = os.open(mnt, os.O_RDONLY)
        entries = [entry for entry in syscalls.read_directory(fd, 1000)]
        for cut in range(0, len(entries), 7):
            syscalls.lseek(fd, entries[cut].cookie)
            rest = list(syscalls.read_directory(fd, 700))
            assert rest == entries[cut + 1 :], cut
        os.close(fd)


def test_rewinddir_shows_what_was_made_since(arena: Arena) -> None:
    (arena.lower / "old").touch()
    with arena.mounted() as mnt:
        fd = os.open(mnt, os.O_RDONLY)
        list(syscalls.read_directory(fd))
        (mnt / "new").touch()
        (mnt / "old").unlink()
        syscalls.lseek(fd, 0)
        again = {entry.name for entry in syscalls.read_directory(fd)}
        assert again == {b".", b"..", b"new"}
        os.close(fd)


def test_dots_have_their_numbers(arena: Arena) -> None:
    """Of the directory and of the one it lies in, as it is now; of the root its own."""
    (arena.lower / "outer" / "inner").mkdir(parents=True)
    (arena.lower / "other").mkdir()
    with arena.mounted() as mnt:

        def dots(path: Path) -> tuple[int, int]:
            fd = os.open(path, os.O_RDONLY)
            try:
                found = {entry.name: entry.ino for entry in syscalls.read_directory(fd)}
            finally:
                os.close(fd)
            return found[b"."], found[b".."]

        def numbers(*paths: Path) -> tuple[int, ...]:
            return tuple(path.stat().st_ino for path in paths)

        assert dots(mnt / "outer" / "inner") == numbers(mnt / "outer" / "inner", mnt / "outer")
        assert dots(mnt / "outer") == numbers(mnt / "outer", mnt)
        if arena.backend == "unionfs":  # kernel overlayfs has the number that its upper tells
            assert dots(mnt) == numbers(mnt, mnt)
        os.rename(mnt / "outer" / "inner", mnt / "other" / "inner")
        (mnt / "other" / "inner" / "new").touch()
        assert dots(mnt / "other" / "inner") == numbers(mnt / "other" / "inner", mnt / "other")


def test_removing_all_while_reading(arena: Arena) -> None:
    """What `rm -r` does: each batch is removed before the next is read."""
    for number in range(3000):
        (arena.lower / f"l{number}").touch()
    with arena.mounted() as mnt:
        for number in range(3000):
            (mnt / f"u{number}").touch()
        fd = os.open(mnt, os.O_RDONLY)
        while batch := syscalls.getdents(fd, 2048):
            for entry in batch:
                if entry.name not in (b".", b".."):
                    os.unlink(entry.name, dir_fd=fd)
        os.close(fd)
        assert names(mnt) == set()


def test_two_readers_at_once(arena: Arena) -> None:
    for number in range(500):
        (arena.lower / f"l{number}").touch()
    with arena.mounted() as mnt:
        one, two = (os.open(mnt, os.O_RDONLY) for _ in range(2))
        found: dict[int, list[bytes]] = {one: [], two: []}
        while True:
            batches = {fd: syscalls.getdents(fd, 1024) for fd in (one, two)}
            for fd, batch in batches.items():
                found[fd] += [entry.name for entry in batch]
            if not any(batches.values()):
                break
        assert sorted(found[one]) == sorted(found[two])
        assert len(found[one]) == 502
        os.close(one)
        os.close(two)


def test_removed_open_directory(arena: Arena) -> None:
    (arena.lower / "d").mkdir()
    (arena.lower / "d" / "f").touch()
    with arena.mounted() as mnt:
        fd = os.open(mnt / "d", os.O_RDONLY)
        os.unlink(mnt / "d" / "f")
        os.rmdir(mnt / "d")
        with pytest.raises(FileNotFoundError):
            os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        with pytest.raises(FileNotFoundError):
            syscalls.getdents(fd, 4096)
        os.fsync(fd)
        os.fchmod(fd, 0o711)
        os.fsync(fd)
        os.utime(fd, ns=(5, 7))
        os.setxattr(fd, "user.x", b"y")
        status = os.fstat(fd)
        assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o711, 7)
        assert os.getxattr(fd, "user.x") == b"y"
        (mnt / "d").mkdir()
        (mnt / "d" / "other").touch()
        with pytest.raises(FileNotFoundError):
            os.stat("other", dir_fd=fd)
        os.close(fd)


def test_one_name_of_many_layers_is_listed_once(arena: Arena) -> None:
    stack = [arena.lower, *(arena.add_lower(f"layer{number}") for number in range(5))]
    for number, layer in enumerate(stack):
        (layer / "d").mkdir()
        (layer / "d" / "same").write_text(str(number))
        (layer / "d" / f"own{number}").touch()
    layers.whiteout(stack[3] / "d" / "own1")
    with arena.mounted() as mnt:
        (mnt / "d" / "same").chmod(0o600)
        want = ["own0", "own2", "own3", "own4", "own5", "same"]
        assert sorted(os.listdir(mnt / "d")) == want
        assert (mnt / "d" / "same").read_text() == "5"


def test_link_count_of_directories_is_not_wrong(arena: Arena) -> None:
    """1 (unknown) or 2 + subdirectories: find and fts take either, but no other."""
    for name in ("a", "b"):
        (arena.lower / name).mkdir()
    with arena.mounted() as mnt:
        (mnt / "c").mkdir()
        assert mnt.stat().st_nlink in (1, 5)
        assert (mnt / "c").stat().st_nlink in (1, 2)
        (mnt / "a").rmdir()
        assert mnt.stat().st_nlink in (1, 4)
