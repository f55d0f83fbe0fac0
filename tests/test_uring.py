# SPDX-License-Identifier: GPL-2.0-or-later
"""FUSE over io_uring, with the kernel's parameter switched on for the time of these tests."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import mmap
import os
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Stores
from tests.rig import as_user, mounted, syscalls
from tests.rig.at_once import begin, soon
from tests.rig.mounted import PATIENCE, Unionfs
from tests.rig.slow_source import SlowSource, content
from tests.rig.waiting import wait_until
from tests.test_engine import requests
from unionfs import uring

pytestmark = pytest.mark.root
PARAMETER = Path(uring.ENABLED)
MIB = 1 << 20
STUCK = 24


@contextlib.contextmanager
def parameter(value: str) -> Iterator[None]:
    before = PARAMETER.read_text()
    try:
        PARAMETER.write_text(value)
    except OSError as error:
        pytest.skip(f"{PARAMETER} cannot be written: {error.strerror}")
    try:
        yield
    finally:
        PARAMETER.write_text(before)


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    """The parameter is the machine's: one run of the tests at a time has it."""
    if not PARAMETER.exists():
        pytest.skip("the kernel has no FUSE over io_uring")
    with open(Path(tempfile.gettempdir()) / "unionfs-enable-uring.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with parameter("Y"):
            rings, why = uring.prepare()
            if rings is None:
                pytest.skip(why)
            del rings
            yield


def make(place: Path, *options: str) -> Unionfs:
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir(exist_ok=True)
    # Data, too, shall come this way.
    words = ["passthrough=off", *options]
    return Unionfs([place / "lower"], place / "upper", place / "mnt", options=words)


@pytest.fixture
def union(place: Path) -> Iterator[Unionfs]:
    with make(place) as union:
        assert told(union) == (True, None)
        yield union


def told(union: Unionfs) -> tuple[bool, str | None]:
    """Whether requests come over io_uring, and why not."""
    status = json.loads(json.dumps(union.status()))
    return status["features"]["io_uring"], status["reasons"].get("io_uring")


def ring_threads(pid: int) -> int:
    names = [Path(task, "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()]
    return names.count("unionfs-ring")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def anonymous(pid: int) -> int:
    """KiB of its own memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError("no RssAnon")


def test_refused_and_switched_off(place: Path) -> None:
    with make(place, "io_uring=off") as union:
        assert told(union) == (False, uring.REFUSED)
        assert ring_threads(union.pid) == 0
    with make(place, "driver=pyfuse3") as union:
        assert told(union) == (False, "the pyfuse3 driver has no io_uring")
    with parameter("N"), make(place) as union:
        assert told(union) == (False, uring.SWITCHED_OFF)
        (union.mnt / "file").write_text("served all the same")


def test_goes_on_when_it_is_switched_off(union: Unionfs) -> None:
    with parameter("N"):
        (union.mnt / "file").write_text("text")
        assert (union.mnt / "file").read_text() == "text"
        assert told(union) == (True, None)


def test_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_rings(_count: int) -> object:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(uring, "open_rings", no_rings)
    assert uring.prepare() == (
        None,
        "io_uring cannot be used here: Operation not permitted "
        "(/proc/sys/kernel/io_uring_disabled)",
    )
    monkeypatch.setattr(uring, "_PROCESSORS", str(tmp_path))
    (tmp_path / "possible").write_text("0-3,128\n")
    assert "numbered up to 128" in uring.prepare()[1]
    (tmp_path / "possible").write_text("nonsense\n")
    assert "not known" in uring.prepare()[1]
    monkeypatch.setattr(uring, "ENABLED", str(tmp_path / "none"))
    assert uring.prepare() == (None, "the kernel has no FUSE over io_uring (Linux 6.14)")


def test_text_says_so(union: Unionfs) -> None:
    command = [*mounted.program(), "status", str(union.mnt)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "io uring" in said.partition("works")[2].partition("lacks")[0]


def test_may_not_run_everywhere(place: Path) -> None:
    """Requests of another processor could not be helped along."""
    processors = os.sched_getaffinity(0)
    if len(processors) < 2:
        pytest.skip("there is one processor")
    os.sched_setaffinity(0, {min(processors)})
    try:
        with make(place) as union:
            used, why = told(union)
            assert not used
            assert why is not None
            assert "unionfs may not run on processor" in why
    finally:
        os.sched_setaffinity(0, processors)


def test_files_of_all_kinds(union: Unionfs) -> None:
    mnt = union.mnt
    (mnt / "dir").mkdir()
    (mnt / "dir/file").write_text("text")
    (mnt / "link").symlink_to("dir/file")
    os.link(mnt / "dir/file", mnt / "second")
    os.mkfifo(mnt / "fifo")
    os.mknod(mnt / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(mnt / "socket"))
    for _ in range(2):
        assert (mnt / "link").read_text() == "text"
        assert os.readlink(mnt / "link") == "dir/file"
        assert (mnt / "second").stat().st_nlink == 2
        kinds = {
            entry.name: stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
            for entry in os.scandir(mnt)
            if entry.name != ".unionfs"
        }
        assert kinds == {
            "dir": stat.S_IFDIR,
            "link": stat.S_IFLNK,
            "second": stat.S_IFREG,
            "fifo": stat.S_IFIFO,
            "device": stat.S_IFCHR,
            "socket": stat.S_IFSOCK,
        }
        with open(mnt / "device", "wb") as null:
            null.write(b"gone")
        union.remount()
    os.rename(mnt / "dir", mnt / "renamed")
    assert not (mnt / "dir").exists()
    (mnt / "renamed/file").unlink()
    (mnt / "renamed").rmdir()
    with pytest.raises(OSError, match="long"):
        os.stat(mnt / ("n" * 256))
    os.stat(mnt / "second")
    assert os.statvfs(mnt).f_bfree == os.statvfs(union.upper or "").f_bfree


def test_large_reads_and_writes(union: Unionfs) -> None:
    data = bytes(range(256)) * (5 * MIB // 256) + b"odd"
    path = union.mnt / "large"
    for flags in (0, os.O_DIRECT):
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o600)
        os.close(fd)
        path.write_bytes(data)
        union.remount()
        fd = os.open(path, os.O_RDONLY | flags)
        with open(fd, "rb", buffering=0) as file:
            buffer = mmap.mmap(-1, MIB)  # aligned, as O_DIRECT wants it
            read = hashlib.sha256()
            while count := file.readinto(buffer):
                read.update(buffer[:count])
        assert read.digest() == hashlib.sha256(data).digest()
    fd = os.open(path, os.O_WRONLY)
    assert os.pwrite(fd, b"\xff" * MIB, 12345) == MIB
    os.close(fd)
    assert path.read_bytes() == data[:12345] + b"\xff" * MIB + data[12345 + MIB :]


def test_small_lower_files_are_given_ahead(place: Path) -> None:
    """The pages lie in the ring's payload behind the answer to OPEN (cext/ahead.c)."""
    texts = {f"file{size}": os.urandom(size) for size in (1, 4096, 4097, 65535, 65536)}
    many = {f"many{number}": os.urandom(65536) for number in range(40)}
    (place / "lower").mkdir()
    for name, data in (texts | many).items():
        (place / "lower" / name).write_bytes(data)
    with make(place) as union:
        assert told(union) == (True, None)
        for name, data in texts.items():
            assert (union.mnt / name).read_bytes() == data
        with ThreadPoolExecutor(8) as pool:
            read = pool.map(lambda name: (union.mnt / name).read_bytes(), many)
            assert list(read) == list(many.values())
        assert requests(union, "read") == 0
        with open(union.mnt / "file4097", "rb", buffering=0) as reader:
            (union.mnt / "file4097").write_bytes(b"new")
            assert reader.read() == b"new"


def test_writes_take_the_set_user_id_bit(union: Unionfs) -> None:
    path = union.mnt / "program"
    path.write_bytes(b"#" * 10_000)
    os.chmod(path, 0o4777)
    fd = os.open(path, os.O_WRONLY)
    with syscalls.identity(as_user.UID, as_user.GID):
        os.pwrite(fd, b"changed" * 1000, 5)
    os.close(fd)
    assert path.stat().st_mode & 0o7777 == 0o777
    union.remount()
    assert path.read_bytes() == b"#" * 5 + b"changed" * 1000 + b"#" * 2995


def test_many_entries(union: Unionfs) -> None:
    names = {f"{'name' * 30}{number}" for number in range(1500)}
    for name in names:
        (union.mnt / name).touch()
    union.remount()
    found = {entry.name: entry.stat().st_size for entry in os.scandir(union.mnt)}
    found.pop(".unionfs", None)
    assert found == dict.fromkeys(names, 0)


def test_large_attributes(stores: Stores) -> None:
    with make(stores.place("xfs")) as union:
        path = union.mnt / "file"
        path.touch()
        value = os.urandom(65536)
        os.setxattr(path, "user.large", value)
        for number in range(200):
            os.setxattr(path, f"user.{'n' * 200}{number}", b"x")
        union.remount()
        assert os.getxattr(path, "user.large") == value
        assert len(os.listxattr(path)) == 201
        os.removexattr(path, "user.large")
        with pytest.raises(OSError, match="No data"):
            os.getxattr(path, "user.large")


def test_many_threads(union: Unionfs) -> None:
    def work(which: int) -> None:
        top = union.mnt / str(which)
        top.mkdir()
        for number in range(60):
            path = top / f"{number}"
            path.write_bytes(bytes([which]) * (number * 1000))
            assert path.read_bytes() == bytes([which]) * (number * 1000)
            os.chmod(path, 0o600)
            path.rename(top / f"{number}.done")
            with pytest.raises(FileNotFoundError):
                path.stat()
        assert len(os.listdir(top)) == 60

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [None] * 8


@pytest.fixture
def slowly(place: Path) -> Iterator[tuple[Unionfs, SlowSource]]:
    """A lower whose reads wait; unmounted whatever fails."""
    for name in ("slow", "quick"):
        (place / name).mkdir()
    (place / "quick/file").write_text("quick")
    with SlowSource(place / "slow", [f"big{number}" for number in range(STUCK)]) as source:
        union = make(place)
        union.lowers = [place / "quick", place / "slow"]
        with union, contextlib.ExitStack() as stack:
            stack.callback(source.go)
            yield union, source


def test_slow_requests_hold_up_no_other(slowly: tuple[Unionfs, SlowSource]) -> None:
    """On each processor, more of them than there are threads at first."""
    union, source = slowly
    names = [f"big{number}" for number in range(STUCK)]
    opened = [begin(functools.partial(os.open, union.mnt / name, os.O_RDWR)) for name in names]
    source.expect(*[f"read {name}" for name in names])  # all of them have got that far

    def ask(processor: int) -> None:
        os.sched_setaffinity(0, {processor})
        assert (union.mnt / "file").read_text() == "quick"
        assert not (union.mnt / "none").exists()
        assert len(os.listdir(union.mnt)) >= STUCK + 1

    for processor in os.sched_getaffinity(0):
        soon(functools.partial(ask, processor))
    assert not any(future.done() for future in opened)
    threads, files = ring_threads(union.pid), descriptors(union.pid)
    assert threads >= STUCK + len(os.sched_getaffinity(0))
    source.go()
    for name, future in zip(names, opened, strict=True):
        fd = future.result(PATIENCE)
        assert isinstance(fd, int)
        assert os.pread(fd, 4096, 0) == content(name)[:4096]
        os.close(fd)
    # Those who have helped stay, and are enough for the next time.
    assert ring_threads(union.pid) <= threads + 2
    assert descriptors(union.pid) <= files + 2


def test_memory_is_given_back(union: Unionfs) -> None:
    path = union.mnt / "large"
    path.write_bytes(b"data" * (8 * MIB // 4))

    def read() -> None:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while os.read(fd, MIB):
            pass
        os.close(fd)

    idle = anonymous(union.pid)
    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    wait_until(lambda: anonymous(union.pid) <= idle + 1500)


def test_ends(place: Path) -> None:
    union = make(place)
    for end in ("umount", "stop", "kill", "busy"):
        union.mount()
        (union.mnt / "file").write_text(end)
        process = union.process
        assert process is not None
        if end == "umount":
            union.umount()
        elif end == "stop":
            process.terminate()
            assert process.wait(PATIENCE) == 0
        elif end == "kill":
            union.kill()
        else:
            with open(union.mnt / "file") as file:
                process.terminate()
                assert process.wait(PATIENCE) == 0
                with pytest.raises(OSError, match=r"connected|abort"):
                    os.statvfs(file.fileno())
        union.process = None
        assert not mounted.is_mounted(union.mnt)
        assert (place / "upper/file").read_text() == end


def test_ordinary_user(user_place: Path) -> None:
    """The kernel asks for no privilege."""
    if why := mounted.user_mount_possible():
        pytest.skip(why)
    lower, upper, mnt = (user_place / name for name in ("lower", "upper", "mnt"))
    for path in (lower, upper, mnt):
        path.mkdir()
        os.chown(path, as_user.UID, as_user.GID)
    script = (
        "import json, os, subprocess, sys\n"
        "*program, lower, upper, mnt = sys.argv[1:]\n"
        "subprocess.run([*program, 'mount', lower, upper, mnt], check=True)\n"
        "open(mnt + '/file', 'w').write('text')\n"
        "print(os.getxattr(mnt, 'user.unionfs.status').decode())\n"
        "subprocess.run([*program, 'umount', mnt], check=True)\n"
    )
    done = as_user.python("-c", script, *mounted.program(), str(lower), str(upper), str(mnt))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["features"]["io_uring"] is True
    assert (upper / "file").read_text() == "text"
