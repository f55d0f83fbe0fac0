# SPDX-License-Identifier: GPL-2.0-or-later
"""Workloads of data: large copy-ups, reading and writing in sequence and at random, syncing."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Callable

from benchmarks.workload import KIB, MIB, Place, Skipped, Timed, folder, workload

BLOCK = 4 * KIB


def _first_write(path: str) -> Timed:
    data = b"y" * BLOCK

    def run() -> None:
        fd = os.open(path, os.O_WRONLY)
        os.pwrite(fd, data, MIB)
        os.close(fd)

    return Timed(1, run)


@workload("first write into a large lower file", "file", "4 KiB into a file of 512 MiB")
def first_write(place: Place) -> Timed:
    return _first_write(f"{place.root}/large/first-write")


@workload("first write into a huge lower file", "file", "4 KiB into a file of 4 GiB")
def first_write_huge(place: Place) -> Timed:
    if not place.sizes.huge:
        raise Skipped("only with --large")
    return _first_write(f"{place.root}/large/huge")


def _sequential(path: str, size: int) -> Timed:
    buffers = [bytearray(MIB)]

    def run() -> None:
        fd = os.open(path, os.O_RDONLY)
        while os.readv(fd, buffers):
            pass
        os.close(fd)

    return Timed(size // MIB, run)


@workload("sequential read, first", "MiB", "a file of 64 MiB of the lower that nobody has read")
def read_first(place: Place) -> Timed:
    return _sequential(f"{place.root}/data/read", place.sizes.data)


@workload("sequential read, again", "MiB", "the same file, whose pages the kernel may have kept")
def read_again(place: Place) -> Timed:
    timed = _sequential(f"{place.root}/data/read", place.sizes.data)
    timed.run()
    return timed


@workload("random read, again", "4 KiB", "blocks of a lower file that was read before")
def read_random(place: Place) -> Timed:
    path = f"{place.root}/data/random"
    _sequential(path, place.sizes.data).run()
    fd = os.open(path, os.O_RDONLY)
    buffers = [bytearray(BLOCK)]
    offsets = _offsets(place)

    def run() -> None:
        for offset in offsets:
            os.preadv(fd, buffers, offset)
        os.close(fd)

    return Timed(len(offsets), run)


def _offsets(place: Place) -> list[int]:
    chance = random.Random(1)
    blocks = place.sizes.data // BLOCK
    return [chance.randrange(blocks) * BLOCK for _ in range(place.sizes.random)]


def _write_whole(path: str, size: int) -> None:
    data = bytes(range(256)) * (MIB // 256)
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    for _ in range(size // MIB):
        os.write(fd, data)
    os.fsync(fd)
    os.close(fd)


@workload("write and fsync", "MiB", "a new file of 64 MiB, synced at its end")
def write_and_sync(place: Place) -> Timed:
    path = f"{place.root}/written"
    return Timed(place.sizes.data // MIB, lambda: _write_whole(path, place.sizes.data))


@workload("random write", "4 KiB", "blocks of a new file")
def write_random(place: Place) -> Timed:
    path = f"{place.root}/written-random"
    _write_whole(path, place.sizes.data)
    fd = os.open(path, os.O_WRONLY)
    offsets = _offsets(place)
    data = b"y" * BLOCK

    def run() -> None:
        for offset in offsets:
            os.pwrite(fd, data, offset)
        os.close(fd)

    return Timed(len(offsets), run)


@workload("SQLite", "transaction", "a new database, one row a transaction, the journal it has")
def sqlite(place: Place) -> Timed:
    path = f"{folder(place, 'sqlite')}/db"

    def run() -> None:
        with sqlite3.connect(path) as base:
            base.execute("create table entry (number integer primary key, words text)")
            for number in range(place.sizes.transactions):
                base.execute("insert into entry values (?, ?)", (number, "words " * 20))
                base.commit()
        base.close()

    return Timed(place.sizes.transactions, run)


def _fio(place: Place, kind: str, how: str) -> Timed:
    """The mean latency that fio itself tells; its start is not counted."""
    if shutil.which("fio") is None:
        raise Skipped("fio is not installed")
    sizes = place.sizes
    at_random = kind.startswith("rand")
    path = f"{place.root}/data/fio"
    if kind.endswith("write"):
        path = f"{place.root}/fio-{kind}-{how}"
        _write_whole(path, sizes.data)
    count = sizes.random if at_random else sizes.data // MIB
    block = BLOCK if at_random else MIB
    command = [
        *("fio", "--name=benchmark", f"--filename={path}", f"--rw={kind}", f"--bs={block}"),
        *(f"--size={sizes.data}", f"--io_size={count * block}", "--thread", "--randseed=1"),
        *("--fallocate=none", "--output-format=json", f"--direct={int(how == 'O_DIRECT')}"),
        "--ioengine=" + ("mmap" if how == "mmap" else "psync"),
    ]

    def run() -> float:
        done = subprocess.run(command, capture_output=True, text=True, cwd=place.root, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
        told = json.loads(done.stdout[done.stdout.index("{") :])
        side = told["jobs"][0]["write" if kind.endswith("write") else "read"]
        if side["total_ios"] != count:
            raise RuntimeError(f"fio did {side['total_ios']} of {count}")
        return float(side["lat_ns"]["mean"]) * count / 1e9

    return Timed(count, run)


def _with_fio(kind: str, how: str) -> Callable[[Place], Timed]:
    return lambda place: _fio(place, kind, how)


for _how in ("buffered", "O_DIRECT", "mmap"):
    for _kind, _unit, _name in (
        ("read", "MiB", "sequential read"),
        ("write", "MiB", "sequential write"),
        ("randread", "4 KiB", "random read"),
        ("randwrite", "4 KiB", "random write"),
    ):
        workload(f"fio {_name}, {_how}", _unit, f"fio: {_kind}, {_how}, 64 MiB, nothing cached")(
            _with_fio(_kind, _how)
        )
