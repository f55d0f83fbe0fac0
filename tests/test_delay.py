# SPDX-License-Identifier: GPL-2.0-or-later
"""A copy-up that takes for ever delays nobody but those who need that very copy.

The lower is a file system whose reads wait until they are told to go on, so that "while a copy-up
is going on" is a state and not a matter of luck. Nothing here is measured by a clock; what would be
delayed would wait for ever, and the deadline of `soon` says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest

from tests.rig.at_once import begin, soon
from tests.rig.mounted import PATIENCE, Unionfs
from tests.rig.slow_source import SIZE, SlowSource, content

pytestmark = pytest.mark.root
T = TypeVar("T")
MANY = 50  # more than the 40 threads that trio gives out by default


class Slowly:
    def __init__(self, union: Unionfs, source: SlowSource) -> None:
        self.union = union
        self.source = source
        self.mnt = union.mnt

    def copying(self, name: str, flags: int = os.O_RDWR) -> Future[int]:
        """An open for writing, whose copy-up is going on when this returns."""
        opened = begin(lambda: os.open(self.mnt / name, flags))
        self.source.expect(f"read {name}")
        assert not opened.done()
        return opened

    def temporaries(self) -> list[str]:
        assert self.union.upper is not None
        names = os.listdir(self.union.upper / ".unionfs/work")
        return [name for name in names if name.startswith("#")]


@pytest.fixture
def slowly(place: Path) -> Iterator[Slowly]:
    for name in ("slow", "lower", "upper", "mnt"):
        (place / name).mkdir()
    for number in range(5):
        (place / f"lower/quick{number}").write_bytes(b"quick" * 40_000)
    (place / "lower/directory").mkdir()
    names = [f"big{number}" for number in range(MANY)]
    with SlowSource(place / "slow", names) as source:
        union = Unionfs([place / "lower", place / "slow"], place / "upper", place / "mnt")
        with union, contextlib.ExitStack() as stack:
            # Whatever fails: nothing may hang when it is unmounted.
            stack.callback(source.go)
            yield Slowly(union, source)


def test_other_requests_go_on(slowly: Slowly) -> None:
    mnt = slowly.mnt
    opened = slowly.copying("big0")

    assert soon(lambda: os.stat(mnt / "big0")).st_size == SIZE
    assert soon(lambda: len(os.listdir(mnt))) == MANY + 6
    assert not soon((mnt / "missing").exists)
    assert soon((mnt / "quick0").read_bytes) == b"quick" * 40_000
    soon((mnt / "new").touch)
    soon((mnt / "newdir").mkdir)
    soon(lambda: (mnt / "quick1").rename(mnt / "renamed"))
    soon((mnt / "quick2").unlink)
    soon(lambda: os.chmod(mnt / "quick3", 0o600))
    soon(lambda: os.setxattr(mnt / "directory", "user.x", b"y"))
    soon(lambda: (mnt / "directory").rename(mnt / "newdir/directory"))
    with soon(lambda: open(mnt / "quick4", "r+b")) as file:
        soon(lambda: file.write(b"QUICK"))
        soon(lambda: os.fsync(file.fileno()))
    soon(lambda: os.statvfs(mnt))
    soon(lambda: slowly.union.status())

    assert not opened.done()
    slowly.source.go()
    fd = opened.result(PATIENCE)
    assert os.pread(fd, SIZE, 0) == content("big0")
    os.close(fd)


def test_metadata_of_the_file_being_copied(slowly: Slowly) -> None:
    """A change of the same file may wait for its copy; it is right in the end."""
    opened = slowly.copying("big0")
    changed = begin(lambda: os.chmod(slowly.mnt / "big0", 0o640))
    slowly.source.go()
    os.close(opened.result(PATIENCE))
    changed.result(PATIENCE)
    slowly.union.remount()
    assert (slowly.mnt / "big0").stat().st_mode & 0o777 == 0o640
    assert (slowly.mnt / "big0").read_bytes() == content("big0")


def test_metadata_of_a_file_being_completed(slowly: Slowly) -> None:
    """A metadata-only copy gets its data; what is changed meanwhile is not lost."""
    path = slowly.mnt / "big0"
    os.chmod(path, 0o600)
    opened = slowly.copying("big0")
    soon(lambda: os.chmod(path, 0o640))
    soon(lambda: os.setxattr(path, "user.meanwhile", b"kept"))
    soon(lambda: os.utime(path, ns=(5, 7)))
    soon(lambda: os.rename(path, slowly.mnt / "moved"))
    path = slowly.mnt / "moved"
    assert not opened.done()
    slowly.source.go()
    os.close(opened.result(PATIENCE))
    for _ in range(2):
        status = path.stat()
        assert (status.st_mode & 0o777, status.st_mtime_ns) == (0o640, 7)
        assert os.getxattr(path, "user.meanwhile") == b"kept"
        assert path.read_bytes() == content("big0")
        slowly.union.remount()


def test_second_name_of_a_file_being_completed(slowly: Slowly) -> None:
    """Then the data are written into the file that both names have."""
    os.chmod(slowly.mnt / "big0", 0o600)
    opened = slowly.copying("big0")
    soon(lambda: os.link(slowly.mnt / "big0", slowly.mnt / "second"))
    slowly.source.go()
    fd = opened.result(PATIENCE)
    os.pwrite(fd, b"seen", 0)
    os.close(fd)
    for _ in range(2):
        assert (slowly.mnt / "second").read_bytes() == b"seen" + content("big0")[4:]
        assert (slowly.mnt / "big0").samefile(slowly.mnt / "second")
        slowly.union.remount()


def test_several_copies_at_once(slowly: Slowly) -> None:
    names = [f"big{number}" for number in range(MANY)]
    opened = [
        begin(lambda name=name: os.open(slowly.mnt / name, os.O_RDWR))  # type: ignore[misc]
        for name in names
    ]
    # All of them are at their first read: none waits for another.
    slowly.source.expect(*[f"read {name}" for name in names])
    assert len(slowly.temporaries()) == MANY
    assert soon((slowly.mnt / "quick0").read_bytes)
    slowly.source.go()
    for name, future in zip(names, opened, strict=True):
        fd = future.result(PATIENCE)
        assert os.pread(fd, SIZE, 0) == content(name)
        os.close(fd)
    assert slowly.temporaries() == []


def test_two_writers_make_one_copy(slowly: Slowly) -> None:
    first = slowly.copying("big0")
    second = [
        begin(lambda: os.open(slowly.mnt / "big0", os.O_RDWR)),
        begin(lambda: os.open(slowly.mnt / "big0", os.O_WRONLY | os.O_APPEND)),
    ]
    # A later request of each thread's kind has been answered, so theirs have arrived.
    soon(lambda: os.chmod(slowly.mnt / "quick0", 0o600))
    assert len(slowly.temporaries()) == 1
    slowly.source.go()
    fds = [future.result(PATIENCE) for future in (first, *second)]
    os.pwrite(fds[0], b"one", 0)
    os.pwrite(fds[1], b"two", 3)
    os.write(fds[2], b"end")
    assert os.pread(fds[1], 6, 0) == b"onetwo"
    assert os.fstat(fds[0]).st_size == SIZE + 3
    assert len({os.fstat(fd).st_ino for fd in fds}) == 1
    for fd in fds:
        os.close(fd)
    slowly.union.remount()
    assert (slowly.mnt / "big0").read_bytes() == b"onetwo" + content("big0")[6:] + b"end"


def test_unlink_of_the_file_being_copied(slowly: Slowly) -> None:
    opened = slowly.copying("big0")
    soon((slowly.mnt / "big0").unlink)
    assert not soon((slowly.mnt / "big0").exists)
    soon((slowly.mnt / "big0").mkdir)
    slowly.source.go()
    fd = opened.result(PATIENCE)
    os.pwrite(fd, b"unseen", 0)
    assert os.pread(fd, SIZE, 0) == b"unseen" + content("big0")[6:]
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)
    assert (slowly.mnt / "big0").is_dir()
    assert slowly.temporaries() == []
    slowly.union.remount()
    assert (slowly.mnt / "big0").is_dir()


def test_replacement_of_the_file_being_copied(slowly: Slowly) -> None:
    opened = slowly.copying("big0")
    (slowly.mnt / "other").write_bytes(b"other")
    soon(lambda: os.replace(slowly.mnt / "other", slowly.mnt / "big0"))
    slowly.source.go()
    fd = opened.result(PATIENCE)
    os.pwrite(fd, b"unseen", 0)
    assert os.pread(fd, SIZE, 0) == b"unseen" + content("big0")[6:]
    os.close(fd)
    assert (slowly.mnt / "big0").read_bytes() == b"other"
    slowly.union.remount()
    assert (slowly.mnt / "big0").read_bytes() == b"other"
    assert slowly.temporaries() == []


def test_rename_of_the_file_being_copied(slowly: Slowly) -> None:
    opened = slowly.copying("big0")
    renamed = begin(lambda: os.rename(slowly.mnt / "big0", slowly.mnt / "directory/moved"))
    slowly.source.go()
    fd = opened.result(PATIENCE)
    renamed.result(PATIENCE)
    os.pwrite(fd, b"seen", 0)
    os.close(fd)
    assert not (slowly.mnt / "big0").exists()
    for _ in range(2):
        moved = (slowly.mnt / "directory/moved").read_bytes()
        assert moved == b"seen" + content("big0")[4:]
        slowly.union.remount()


def test_rename_of_its_directory(place: Path) -> None:
    """The directory moves while a file in it is copied: the copy goes where the file is."""
    for name in ("slow", "lower", "upper", "mnt"):
        (place / name).mkdir()
    (place / "lower/dir").mkdir()
    with SlowSource(place / "slow", ["big"]) as source:
        # The slow file as a lower's dir/big: the lower is a union's view of both.
        lower = place / "lower2"
        (lower / "dir").mkdir(parents=True)
        redirect = os.open(lower / "dir/big", os.O_CREAT | os.O_WRONLY)
        os.ftruncate(redirect, SIZE)
        os.close(redirect)
        for name, value in (("metacopy", b""), ("redirect", b"/big")):
            os.setxattr(lower / "dir/big", f"trusted.overlay.{name}", value)
        os.setxattr(lower / "dir", "trusted.overlay.impure", b"y")
        union = Unionfs([lower, place / "slow"], place / "upper", place / "mnt")
        with union, contextlib.ExitStack() as stack:
            stack.callback(source.go)
            opened = begin(lambda: os.open(union.mnt / "dir/big", os.O_RDWR))
            source.expect("read big")
            soon(lambda: os.rename(union.mnt / "dir", union.mnt / "moved"))
            source.go()
            fd = opened.result(PATIENCE)
            os.pwrite(fd, b"seen", 0)
            os.close(fd)
            for _ in range(2):
                assert (union.mnt / "moved/big").read_bytes() == b"seen" + content("big")[4:]
                assert not (union.mnt / "dir").exists()
                union.remount()


def test_waiting_process_is_killed(slowly: Slowly) -> None:
    """Its request is taken back; the union and the file are none the worse."""
    script = "import os, sys; os.open(sys.argv[1], os.O_RDWR)"
    process = subprocess.Popen([sys.executable, "-c", script, str(slowly.mnt / "big0")])
    slowly.source.expect("read big0")
    process.send_signal(signal.SIGKILL)
    assert soon((slowly.mnt / "quick0").read_bytes)
    slowly.source.go()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    with open(slowly.mnt / "big0", "r+b") as file:
        file.write(b"later")
    slowly.union.remount()
    assert (slowly.mnt / "big0").read_bytes() == b"later" + content("big0")[5:]


def test_slow_reads_delay_no_other_file(slowly: Slowly) -> None:
    """Not only copy-ups: a read that waits for a lower."""
    reading = begin((slowly.mnt / "big1").read_bytes)
    slowly.source.expect("read big1")
    assert soon((slowly.mnt / "quick0").read_bytes)
    assert soon(lambda: len(os.listdir(slowly.mnt))) == MANY + 6
    soon((slowly.mnt / "new").touch)
    slowly.source.go()
    assert reading.result(PATIENCE) == content("big1")


def test_killed_while_copying(slowly: Slowly) -> None:
    """The daemon dies in the middle; the file is the old one, and no temporary is left."""
    opened = slowly.copying("big0")
    slowly.union.die()
    with pytest.raises(OSError, match=r"connected|abort"):
        opened.result(PATIENCE)
    slowly.union.clear()
    slowly.source.go()
    slowly.union.mount()
    assert slowly.temporaries() == []
    assert (slowly.mnt / "big0").read_bytes() == content("big0")
