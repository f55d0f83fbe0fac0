# SPDX-License-Identifier: GPL-2.0-or-later
"""A lower file is copied up that somebody has open: as a plain directory has it, and with
passthrough=all nobody gets an error, and who opens it afterwards sees the new content."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.conftest import Stores
from tests.rig.mounted import PATIENCE, Unionfs
from tests.rig.spots import (
    BIG,
    Spot,
    bytes_moved,
    make,
    open_files,
    opened,
    shared,
    skip_without,
    told,
)
from tests.rig.waiting import wait_until

pytestmark = pytest.mark.root
SECONDS = 3.0


@pytest.fixture(scope="module")
def spots_auto(stores: Stores) -> Iterator[Iterator[Spot]]:
    with shared(stores) as found:
        yield found


@pytest.fixture
def spot_auto(spots_auto: Iterator[Spot]) -> Spot:
    return next(spots_auto)


# ---- a file of a lower that is changed while it is open ----


def grow(path: Path) -> bytes:
    with open(path, "ab") as file:
        file.write(b"more")
    return BIG + b"more"


def overwrite(path: Path) -> bytes:
    with open(path, "r+b") as file:
        file.write(b"NEW")
    return b"NEW" + BIG[3:]


def replace(path: Path) -> bytes:
    with open(path, "wb") as file:
        file.write(b"whole")
    return b"whole"


def shorten(path: Path) -> bytes:
    os.truncate(path, 10)
    return BIG[:10]


def write_mapped(path: Path) -> bytes:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:6] = b"MAPPED"
    return b"MAPPED" + BIG[6:]


def after_chmod(path: Path) -> bytes:
    os.chmod(path, 0o600)  # a metadata-only copy first
    assert path.read_bytes() == BIG
    return overwrite(path)


CHANGES = [grow, overwrite, replace, shorten, write_mapped, after_chmod]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["big", "other"])
def test_changed_while_it_is_read(spot: Spot, name: str, change: Callable[[Path], bytes]) -> None:
    """Nobody gets an error; who opens afterwards sees the new content, who had it open before sees
    the new or, as with kernel overlayfs, the old."""
    path = spot.mnt / name
    number = path.stat().st_ino
    with opened(path, os.O_RDONLY) as early:
        assert os.pread(early, 3, 0) == BIG[:3]
        mapped = mmap.mmap(early, 0, prot=mmap.PROT_READ)
        content = change(path)
        for _ in range(2):
            assert path.read_bytes() == content
            with opened(path, os.O_RDWR) as late:
                assert os.pread(late, len(content) + 1, 0) == content
                with mmap.mmap(late, 0) as again:
                    assert again[:] == content
                assert os.fstat(late).st_ino == os.fstat(early).st_ino == number
            content = b"X" + content[1:]
            with open(path, "r+b") as file:
                file.write(b"X")
        if change is not shorten:  # the kernel itself cuts what is mapped of the old inode
            assert os.pread(early, len(BIG), 0) in (BIG, content)
            assert mapped[:3] in (BIG[:3], content[:3])
        assert os.fstat(early).st_size == path.stat().st_size == len(content)
        os.fchmod(early, 0o640)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        assert stat.S_IMODE(os.fstat(early).st_mode) == 0o604
        mapped.close()
    counted = bytes_moved(spot.whole)
    assert path.read_bytes() == content
    assert bytes_moved(spot.whole) == counted, "no passthrough after the old descriptor was closed"
    if name == "other":
        assert (spot.mnt / "linked").read_bytes() == content
    spot.whole.remount()
    assert path.read_bytes() == content
    assert path.stat().st_ino == number
    assert (spot.lower / name).read_bytes() == BIG


@pytest.mark.parametrize("change", CHANGES)
def test_right_unless_asked(spot_auto: Spot, change: Callable[[Path], bytes]) -> None:
    """By default who had a lower file open sees what is written later, by read(2) and mapped."""
    path = spot_auto.mnt / "big"
    with opened(path, os.O_RDONLY) as early:
        mapped = mmap.mmap(early, 0, prot=mmap.PROT_READ)
        assert mapped[:3] == BIG[:3]
        content = change(path)
        assert os.pread(early, len(BIG) * 2, 0) == content == path.read_bytes()
        assert mapped[: len(content)][:3] == content[:3]
        mapped.close()
    counted = bytes_moved(spot_auto.whole)
    assert path.read_bytes() == content
    with open(path, "ab") as file:
        file.write(b"end")
    assert path.read_bytes() == content + b"end"
    assert bytes_moved(spot_auto.whole) == counted


def test_locks_meet_unless_asked(spot_auto: Spot) -> None:
    """Of who opened it in the lower, and who opened it to write; it can be opened anew by its
    descriptor."""
    path = spot_auto.mnt / "big"
    with opened(path, os.O_RDONLY) as early:
        fcntl.flock(early, fcntl.LOCK_EX)
        fcntl.lockf(early, fcntl.LOCK_SH, 10)
        with open(path, "r+b") as file:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            code = (
                "import fcntl, sys\n"
                "with open(sys.argv[1], 'r+b') as file:\n"
                "    try:\n"
                "        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)\n"
                "    except BlockingIOError:\n"
                "        sys.exit(77)\n"
            )
            done = subprocess.run([sys.executable, "-c", code, path], check=False)
            assert done.returncode == 77
            file.write(b"new")
        with open(f"/proc/self/fd/{early}", "r+b") as file:
            file.write(b"NEW")
        assert os.pread(early, 3, 0) == b"NEW"


def test_small_lower_files_stay_right(spot: Spot) -> None:
    with opened(spot.mnt / "small", os.O_RDONLY) as early:
        assert os.pread(early, 9, 0) == b"small"
        with open(spot.mnt / "small", "ab") as file:
            file.write(b"er")
        assert os.pread(early, 9, 0) == b"smaller"
    with open(spot.mnt / "small", "ab") as file:  # and now in passthrough
        file.write(b"!")
    with opened(spot.mnt / "small", os.O_RDONLY) as fd:
        assert os.pread(fd, 9, 0) == b"smaller!"


def test_pages_of_before_are_not_seen_again(spot: Spot) -> None:
    """Cached, then written in passthrough, then cached."""
    path = spot.mnt / "small"
    assert path.read_bytes() == b"small"
    with open(path, "r+b") as file:
        file.write(b"SMALL")
    with (
        opened(path, os.O_RDONLY) as fd,
        mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped,
    ):
        assert mapped[:] == b"SMALL" == path.read_bytes()


def test_two_writers_after_a_reader(spot: Spot) -> None:
    path = spot.mnt / "big"
    with (
        opened(path, os.O_RDONLY),
        opened(path, os.O_RDWR) as one,
        opened(path, os.O_RDWR) as two,
        mmap.mmap(one, 0) as mapped,
    ):
        os.pwrite(one, b"one", 0)
        os.pwrite(two, b"two", 3)
        mapped[6:9] = b"map"
        for fd in (one, two):
            assert os.pread(fd, 9, 0) == b"onetwomap"
        assert mapped[:9] == b"onetwomap"
        with opened(path, os.O_WRONLY | os.O_APPEND) as three:
            os.write(three, b"end")
        assert os.pread(two, 9, len(BIG)) == b"end"


def test_changed_by_another_process(spot: Spot) -> None:
    """Reader and writer know nothing of each other; neither sees an error."""
    path = spot.mnt / "big"
    reader = subprocess.Popen(
        ["tail", "-c", "+1", "-f", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert reader.stdout is not None
    assert reader.stdout.read(len(BIG)) == BIG
    subprocess.run(["sh", "-c", 'echo more >> "$1"', "sh", path], check=True)
    assert subprocess.run(["tail", "-c", "5", path], capture_output=True, check=True).stdout == (
        b"more\n"
    )
    assert reader.poll() is None
    reader.send_signal(signal.SIGTERM)
    assert reader.communicate(timeout=PATIENCE)[1] == b""


def test_opened_through_proc(spot: Spot) -> None:
    """An open file that is opened once more by /proc has no name that could lead elsewhere."""
    path = spot.mnt / "big"
    with opened(path, os.O_RDONLY) as early:
        overwrite(path)
        again = Path(f"/proc/self/fd/{early}")
        with opened(again, os.O_RDONLY) as fd:
            assert os.pread(fd, 3, 0) == b"NEW"
        with pytest.raises(OSError, match="Stale"), opened(again, os.O_RDWR):
            pass  # what the documents say
    with opened(path, os.O_RDONLY) as fd, opened(Path(f"/proc/self/fd/{fd}"), os.O_RDWR) as late:
        os.pwrite(late, b"now", 0)
        assert os.pread(fd, 3, 0) == b"now"


def test_renamed_unlinked_and_linked_while_open(spot: Spot) -> None:
    path = spot.mnt / "big"
    with opened(path, os.O_RDONLY) as early:
        overwrite(path)
        path.rename(spot.mnt / "moved")
        with opened(spot.mnt / "moved", os.O_RDWR) as late:
            os.link(spot.mnt / "moved", spot.mnt / "second")
            assert os.fstat(late).st_nlink == os.fstat(early).st_nlink == 2
            (spot.mnt / "moved").unlink()
            (spot.mnt / "second").unlink()
            assert os.fstat(early).st_nlink == os.fstat(late).st_nlink == 0
            os.pwrite(late, b"gone", 0)
            assert os.pread(late, 4, 0) == b"gone"
            assert len(os.pread(early, 4, 0)) == 4
    assert not path.exists()


def test_unlinked_and_then_written(spot: Spot) -> None:
    """Only a descriptor leads to it."""
    path = spot.mnt / "big"
    with opened(path, os.O_RDWR) as fd:
        path.unlink()
        os.pwrite(fd, b"later", 0)
        assert os.pread(fd, 5, 0) == b"later"
        assert os.fstat(fd).st_size == len(BIG)


def test_readers_come_and_go_beside_a_writer(place: Path) -> None:
    """Who was sent to look anew finds that the last reader has gone, and another one come."""
    names = [f"f{number}" for number in range(300)]
    (place / "lower").mkdir()
    for name in names:
        (place / "lower" / name).write_bytes(BIG)
    wrong: list[str] = []
    with make(place, "passthrough=all") as union:
        skip_without(union)
        for name in names:
            path, stop = union.mnt / name, threading.Event()

            def read(path: Path = path, stop: threading.Event = stop) -> None:
                while not stop.is_set():
                    os.close(os.open(path, os.O_RDONLY))

            readers = [threading.Thread(target=read) for _ in range(2)]
            for reader in readers:
                reader.start()
            try:
                os.close(os.open(path, os.O_RDWR))
            except OSError as error:
                wrong.append(f"{name}: {error!r}")
            stop.set()
            for reader in readers:
                reader.join(PATIENCE)
    assert not wrong


class Sharer(threading.Thread):
    """Writes its own part of files that all open, close, map and copy up, on the union and on a
    plain directory."""

    def __init__(self, union: Unionfs, plain: Path, number: int) -> None:
        super().__init__()
        self.roots = (union.mnt, plain)
        self.number = number
        self.rng = random.Random(number)
        self.wrong: list[str] = []

    def run(self) -> None:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and not self.wrong:
            try:
                self.step()
            except OSError as error:
                self.wrong.append(repr(error))

    def step(self) -> None:
        name = self.rng.choice(["big", "other", "third", "linked", "small2"])
        at = self.number * 1000
        how = self.rng.randrange(6)
        word = os.urandom(self.rng.randrange(1, 500))
        got = []
        for root in self.roots:
            if how <= 2:
                with opened(root / name, os.O_RDONLY) as fd:
                    got.append(os.pread(fd, 1000, at))
            elif how == 3:
                with opened(root / name, os.O_RDWR) as fd:
                    os.pwrite(fd, word, at)
                    got.append(os.pread(fd, 1000, at))
            elif how == 4:
                with opened(root / name, os.O_RDWR) as fd, mmap.mmap(fd, 65536) as mapped:
                    mapped[at : at + len(word)] = word
                    got.append(os.pread(fd, 1000, at))
            else:
                os.chmod(root / name, self.rng.choice([0o600, 0o644]))
        if got and got[0] != got[1]:
            self.wrong.append(f"{name} at {at}, way {how}: {got}")


@pytest.mark.parametrize("options", ["auto", "all"])
def test_storm(place: Path, options: str) -> None:
    union = make(place, f"passthrough={options}")
    (place / "lower/small2").write_bytes(BIG[:100_000])
    plain = place / "plain"
    plain.mkdir()
    for name in ("big", "other", "third", "small2"):
        (plain / name).write_bytes((place / "lower" / name).read_bytes())
    os.link(plain / "other", plain / "linked")
    with union:
        # Readers from before, for whom some files get a second number.
        early = [os.open(union.mnt / name, os.O_RDONLY) for name in ("big", "linked", "small2")]
        threads = [Sharer(union, plain, number) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not [wrong for thread in threads for wrong in thread.wrong]
        for name in ("big", "other", "third", "linked", "small2"):
            assert (union.mnt / name).read_bytes() == (plain / name).read_bytes()
        for fd in early:
            os.close(fd)
        wait_until(lambda: open_files(union) == 0)
        union.remount()
        for name in ("big", "other", "third", "linked", "small2"):
            assert (union.mnt / name).read_bytes() == (plain / name).read_bytes()
            assert (place / "lower" / name).read_bytes()[:1000] == BIG[:1000]


def test_forgotten_while_it_is_opened_anew(place: Path) -> None:
    """The kernel forgets numbers while others are sent from one to the other."""
    (place / "lower").mkdir()
    names = [f"f{number}" for number in range(60)]
    for name in names:
        (place / "lower" / name).write_bytes(BIG)
    wrong: list[str] = []
    done = threading.Event()

    def drop() -> None:
        while not done.wait(0.005):
            Path("/proc/sys/vm/drop_caches").write_text("2")

    def write(union: Unionfs, number: int) -> None:
        word = b"%d" % number
        for name in names:
            path = union.mnt / name
            try:
                with opened(path, os.O_RDONLY) as early, opened(path, os.O_RDWR) as late:
                    os.pwrite(late, word, number)
                    with opened(path, os.O_RDONLY) as after:
                        got = {os.pread(fd, 1, number) for fd in (late, after)}
                    if got != {word} or os.fstat(early).st_ino != path.stat().st_ino:
                        wrong.append(f"{name}: {got!r}")
            except OSError as error:
                wrong.append(repr(error))

    (place / "upper").mkdir()
    (place / "mnt").mkdir()
    options = ["passthrough=all"]
    with Unionfs([place / "lower"], place / "upper", place / "mnt", options=options) as union:
        skip_without(union)
        dropper = threading.Thread(target=drop)
        writers = [threading.Thread(target=write, args=(union, number)) for number in range(6)]
        for thread in (dropper, *writers):
            thread.start()
        for thread in writers:
            thread.join(PATIENCE)
        done.set()
        dropper.join(PATIENCE)
        assert not wrong
        for name in names:
            assert (union.mnt / name).read_bytes() == b"012345" + BIG[6:]
        assert cast("int", told(union)["opened_anew"]) > 0
