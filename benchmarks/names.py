# SPDX-License-Identifier: GPL-2.0-or-later
"""Workloads of names and attributes: looking, opening, making, renaming, removing, copying up."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

from benchmarks.workload import (
    MIB,
    Place,
    Skipped,
    Timed,
    files,
    folder,
    in_processes,
    workload,
)

THREADS = (1, 4, 16)
_BUFFERS = [bytearray(MIB)]


def _walk(path: str) -> int:
    """As `find -ls`: all names and all attributes."""
    count = 0
    pending = [path]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                os.lstat(entry.path)
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return count


def _walking(place: Place) -> Timed:
    count = sum(len(folders) + len(names) for _, folders, names in os.walk(f"{place.lower}/walk"))
    path = f"{place.root}/walk"

    def run() -> None:
        if _walk(path) != count:
            raise AssertionError("not all names were there")

    return Timed(count, run)


@workload("walk, fresh", "name", "readdir and lstat of a tree that nobody has looked at")
def walk_fresh(place: Place) -> Timed:
    return _walking(place)


@workload("walk, again", "name", "the same tree once more")
def walk_again(place: Place) -> Timed:
    _walk(f"{place.root}/walk")
    return _walking(place)


def _read(paths: Sequence[str]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.readv(fd, _BUFFERS)
        os.close(fd)


def _reading(number: int, again: bool) -> Callable[[Place], Timed]:
    def prepare(place: Place) -> Timed:
        paths = files(place, f"read{number}")
        if again:
            _read(paths)
        if number == 1:
            return Timed(len(paths), lambda: _read(paths))
        shares = [paths[part::number] for part in range(number)]
        works = [functools.partial(_read, share) for share in shares]
        return Timed(len(paths), in_processes(works))

    return prepare


for _number in THREADS:
    _many = f"{_number} at once" if _number > 1 else "by one process"
    for _turn, _again in (("first", False), ("again", True)):
        _seen = "seen before" if _again else "not seen before"
        workload(
            f"open-read-close, {_turn}" + (f", {_number} at once" if _number > 1 else ""),
            "file",
            f"every small file of a tree {_seen} is opened, read and closed, {_many}",
        )(_reading(_number, _again))


@workload("missing names", "name", "lstat of names that are not there, each asked for once")
def missing(place: Place) -> Timed:
    paths = [f"{place.root}/missing/none{number}" for number in range(place.sizes.missing)]

    def run() -> None:
        for path in paths:
            if os.path.lexists(path):
                raise AssertionError("it is there")

    return Timed(len(paths), run)


def _write_all(paths: Sequence[str]) -> None:
    data = b"x" * 100
    for path in paths:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(fd, data)
        os.close(fd)


def _new(place: Place, name: str) -> list[str]:
    top = folder(place, name)
    return [f"{top}/f{number}" for number in range(place.sizes.new)]


@workload("create-write-close", "file", "new files of 100 bytes in one new directory")
def create(place: Place) -> Timed:
    paths = _new(place, "create")
    return Timed(len(paths), lambda: _write_all(paths))


@workload("rename", "file", "new files get other names in their directory")
def rename(place: Place) -> Timed:
    paths = _new(place, "rename")
    _write_all(paths)
    head = len(f"{place.root}/rename/")
    pairs = [(path, f"{path[:head]}g{path[head + 1 :]}") for path in paths]

    def run() -> None:
        for old, new in pairs:
            os.rename(old, new)

    return Timed(len(pairs), run)


def _unlink_all(paths: Sequence[str]) -> None:
    for path in paths:
        os.unlink(path)


@workload("unlink of new files", "file", "files made in the union are unlinked")
def unlink_new(place: Place) -> Timed:
    paths = _new(place, "unlink-new")
    _write_all(paths)
    return Timed(len(paths), lambda: _unlink_all(paths))


@workload("unlink of lower files", "file", "files of the lower are unlinked")
def unlink_lower(place: Place) -> Timed:
    paths = files(place, "unlink", place.sizes.changed)
    return Timed(len(paths), lambda: _unlink_all(paths))


def remove_tree(path: str) -> int:
    """As `rm -rf`; how many names."""
    count = 1
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                count += remove_tree(entry.path)
            else:
                os.unlink(entry.path)
                count += 1
    os.rmdir(path)
    return count


def count_names(path: str) -> int:
    return 1 + sum(len(folders) + len(names) for _, folders, names in os.walk(path))


def _removing(path: str, count: int) -> Timed:
    def run() -> None:
        if remove_tree(path) != count:
            raise AssertionError("not all names were there")

    return Timed(count, run)


@workload("rm -rf of a new tree", "name", "a tree that was made in the union")
def remove_new(place: Place) -> Timed:
    top = folder(place, "remove-new")
    source = f"{place.lower}/remove"
    for where, folders, names in os.walk(source):
        here = top + where[len(source) :]
        for name in folders:
            os.mkdir(f"{here}/{name}")
        _write_all([f"{here}/{name}" for name in names])
    return _removing(top, count_names(source))


@workload("rm -rf of a lower tree", "name", "a tree of the lower that nobody has looked at")
def remove_lower(place: Place) -> Timed:
    return _removing(f"{place.root}/remove", count_names(f"{place.lower}/remove"))


@workload("append to lower files", "file", "open, write of one byte at the end, close: a copy-up")
def append(place: Place) -> Timed:
    paths = files(place, "append", place.sizes.changed)

    def run() -> None:
        for path in paths:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.write(fd, b"x")
            os.close(fd)

    return Timed(len(paths), run)


def _chmod(paths: Sequence[str]) -> Timed:
    def run() -> None:
        for path in paths:
            os.chmod(path, 0o600)

    return Timed(len(paths), run)


def _chown(paths: Sequence[str]) -> Timed:
    """To another group, which an ordinary user may do, too, where he is in several."""
    groups = [2000] if os.geteuid() == 0 else sorted({*os.getgroups()} - {os.getegid()})
    if not groups:
        raise Skipped("this user is in one group only")

    def run() -> None:
        for path in paths:
            os.chown(path, -1, groups[-1])

    return Timed(len(paths), run)


@workload("chmod of lower files", "file", "another mode for small files of the lower")
def chmod(place: Place) -> Timed:
    return _chmod(files(place, "chmod", place.sizes.changed))


@workload("chown of lower files", "file", "another group for small files of the lower")
def chown(place: Place) -> Timed:
    return _chown(files(place, "chown", place.sizes.changed))


@workload("chmod of large lower files", "file", "another mode for files of 64 MiB")
def chmod_large(place: Place) -> Timed:
    return _chmod(files(place, "large/chmod"))


@workload("chown of large lower files", "file", "another group for files of 64 MiB")
def chown_large(place: Place) -> Timed:
    return _chown(files(place, "large/chown"))
