# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine: what pyfuse3 cannot express, its counts, its end, and its edge to Python."""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.rig import syscalls
from tests.rig.mounted import PATIENCE, Unionfs
from tests.rig.waiting import wait_until
from unionfs.engine import Opcode, Requests
from unionfs.operations import UnionOperations

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
MIB = 1 << 20


@pytest.fixture
def union(place: Path) -> Iterator[Unionfs]:
    for name in ("lower", "upper", "mnt", "plain"):
        (place / name).mkdir()
    for tree in (place / "lower", place / "plain"):
        with open(tree / "sparse", "wb") as file:
            file.write(b"start")
            file.seek(3 * MIB)
            file.write(b"end")
        (tree / "text").write_bytes(b"some text " * 1000)
        (tree / "link").symlink_to("text")
    options = ["driver=engine"]
    union = Unionfs([place / "lower"], place / "upper", place / "mnt", options=options)
    with union:
        yield union


def requests(union: Unionfs, kind: str, who: str = "engine") -> int:
    """How many requests of a kind there were."""
    counted = cast("dict[str, dict[str, int]]", union.status()["requests"])
    return counted[who].get(kind, 0)


def both(union: Unionfs, action: Callable[[Path], object]) -> object:
    """The same on the union and on a plain directory; what both came to."""

    def outcome(root: Path) -> object:
        try:
            return action(root)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    got, want = outcome(union.mnt), outcome(union.mnt.parent / "plain")
    assert got == want
    return got


def extents(path: Path) -> list[tuple[int, int]]:
    """Where the data of a file begin and end."""
    found: list[tuple[int, int]] = []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, at))
        with pytest.raises(OSError, match="No such device"):
            os.lseek(file.fileno(), size, os.SEEK_DATA)
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="/sys/class/bdi is root's to change")
def test_reads_ahead_as_much_as_goes_by_splice(place: Path) -> None:
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    # In the foreground the first answer may be there before: the command's return is the promise.
    with Unionfs(
        [place / "lower"],
        place / "upper",
        place / "mnt",
        options=["driver=engine"],
        daemonised=True,
    ) as union:
        device = os.stat(union.mnt).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        assert Path(f"/sys/class/bdi/{number}/read_ahead_kb").read_text() == "1016\n"


def test_holes_are_found(union: Unionfs) -> None:
    found = both(union, lambda root: extents(root / "sparse"))
    if found == [(0, 3 * MIB + 3)]:
        pytest.skip("this file system tells nothing of holes")
    os.close(os.open(union.mnt / "sparse", os.O_RDWR))  # copied up
    assert both(union, lambda root: extents(root / "sparse")) == found


def test_fallocate(union: Unionfs) -> None:
    def change(root: Path, mode: int, start: int, length: int) -> object:
        with open(root / "text", "r+b") as file:
            _fallocate(file.fileno(), mode, start, length)
        return os.stat(root / "text").st_size, (root / "text").read_bytes()

    both(union, lambda root: change(root, 0, 0, 64 * 1024))
    both(union, lambda root: change(root, FALLOC_FL_KEEP_SIZE, 0, MIB))
    both(
        union,
        lambda root: change(root, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 4096, 8192),
    )
    both(union, lambda root: change(root, 1 << 30, 0, 1))
    both(union, lambda root: change(root, 0, -1, 1))


def _fallocate(fd: int, mode: int, start: int, length: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(mode), ctypes.c_int64(start), ctypes.c_int64(length))
    if libc.fallocate(ctypes.c_int(fd), *arguments) < 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def test_copy_file_range(union: Unionfs) -> None:
    """From a lower file into a new one, and within one file."""

    def copy(root: Path) -> object:
        with open(root / "text", "rb") as source, open(root / "copy", "w+b") as target:
            done = os.copy_file_range(source.fileno(), target.fileno(), 5000, 10, 20)
            again = os.copy_file_range(target.fileno(), target.fileno(), 100, 20, 9000)
        return done, again, (root / "copy").read_bytes()

    both(union, copy)


def test_mapped_and_written(union: Unionfs) -> None:
    def change(root: Path) -> object:
        with open(root / "text", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            mapped[100:103] = b"new"
            mapped.flush()
            os.pwrite(file.fileno(), b"too", 200)
            return bytes(mapped)

    both(union, change)


@pytest.mark.parametrize("change", ["nothing", "merged", "removed", "made"])
def test_a_kept_listing_is_gone_on_with(union: Unionfs, change: str) -> None:
    """The kernel keeps what it has read of a directory. Where that has changed it asks us to go on,
    with the offsets of a handle that is closed by now: what was there all the time is seen once."""
    names = {f"name-of-a-file-{number:04}" for number in range(2000)}
    (union.lowers[0] / "wide").mkdir()
    for name in names:
        (union.lowers[0] / "wide" / name).touch()
    wide = union.mnt / "wide"
    assert set(os.listdir(wide)) == names  # kept from now on
    counted = requests(union, "readdirplus")
    assert set(os.listdir(wide)) == names
    assert requests(union, "readdirplus") == counted, "the listing is not kept"
    fd = os.open(wide, os.O_RDONLY | os.O_DIRECTORY)
    try:
        seen = [os.fsdecode(entry.name) for entry in syscalls.getdents(fd, 4096)]
        changed = {seen[5]} if change == "removed" else set()
        if change == "merged":
            os.chmod(wide / seen[5], 0o600)
        elif change == "removed":
            (wide / seen[5]).unlink()
        elif change == "made":
            (wide / "new").touch()
        seen += [os.fsdecode(entry.name) for entry in syscalls.read_directory(fd, 4096)]
    finally:
        os.close(fd)
    assert len(seen) == len(set(seen))
    assert names - changed <= set(seen)
    assert set(os.listdir(wide)) == (names - changed) | ({"new"} if change == "made" else set())


def test_requests_are_counted(union: Unionfs) -> None:
    (union.mnt / "made").mkdir()
    os.readlink(union.mnt / "link")
    os.setxattr(union.mnt / "made", "user.name", b"value")
    assert requests(union, "lookup") >= 2
    assert requests(union, "readlink") == 1
    assert requests(union, "mkdir") == 1
    assert requests(union, "setxattr", "python") == 1
    assert requests(union, "lookup", "python") == requests(union, "setxattr") == 0


def test_what_cannot_change_is_opened_by_the_kernel(place: Path) -> None:
    """A read-only union without passthrough: one OPEN and one FSYNC ever, pages kept."""
    for name in ("lower", "mnt"):
        (place / name).mkdir()
    (place / "lower/file").write_bytes(b"some text " * 1000)
    os.symlink("file", place / "lower/link")
    union = Unionfs([place / "lower"], None, place / "mnt", options=["passthrough=off"])
    with union:
        for _ in range(5):
            assert (union.mnt / "link").read_bytes() == b"some text " * 1000
            with open(union.mnt / "file", "rb") as file:
                os.fsync(file.fileno())
                assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 10_000
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                    assert view[9_990:] == b"some text "
        assert [requests(union, kind) for kind in ("open", "fsync", "read")] == [1, 1, 1]
        assert requests(union, "release") == 0
        with pytest.raises(OSError, match="Read-only"):
            (union.mnt / "file").write_bytes(b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("used", [False, True])
def test_signal(union: Unionfs, number: signal.Signals, used: bool) -> None:
    """It ends by itself, and what was written is there; who still uses it gets an error."""
    process = union.process
    assert process is not None
    file = open(union.mnt / "text", "r+b") if used else None  # noqa: SIM115
    if file is not None:
        file.write(b"SOME")
        file.flush()
    process.send_signal(number)
    assert process.wait(PATIENCE) == 0
    union.process = None
    if file is not None:
        with pytest.raises(OSError, match=r"connected|abort"):
            os.fstat(file.fileno())
        with contextlib.suppress(OSError):
            file.close()
        assert (union.mnt.parent / "upper/text").read_bytes()[:4] == b"SOME"
    assert not os.path.ismount(union.mnt)
    union.mount()


def skip_if_shared(place: Path) -> None:
    for name in ("one", "other"):
        (place / name).write_bytes(b"data")
    with (
        open(place / "one", "rb") as source,
        open(place / "other", "r+b") as target,
        contextlib.suppress(OSError),
    ):
        syscalls.clone(target.fileno(), source.fileno())
        pytest.skip("copies share their data here, and take no time")


def test_a_range_is_copied_until_its_asker_is_killed(union: Unionfs) -> None:
    upper = union.mnt.parent / "upper"
    skip_if_shared(upper.parent)
    with open(union.mnt / "large", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 640 * MIB)
    code = (
        "import os\n"
        "source, target = os.open('large', 0), os.open('copy', os.O_RDWR | os.O_CREAT)\n"
        "os.copy_file_range(source, target, 1 << 30, 0, 0)\n"
        "input()\n"
    )
    sizes = []
    for _ in range(3):
        asker = subprocess.Popen([sys.executable, "-c", code], cwd=union.mnt, stdin=subprocess.PIPE)
        copy = upper / "copy"
        wait_until(lambda: copy.exists() and copy.stat().st_size > 0)  # noqa: B023
        asker.kill()
        asker.communicate(timeout=PATIENCE)
        assert asker.returncode == -signal.SIGKILL
        sizes.append(copy.stat().st_size)
        assert (union.mnt / "copy").stat().st_size == sizes[-1]
        (union.mnt / "copy").unlink()
    assert min(sizes) < 640 * MIB  # not all on a machine that looks too late


def test_a_copy_ends_with_who_asked_for_it(place: Path) -> None:
    """Ctrl-C or kill -9 is not waited for until a large file is in the upper."""
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    skip_if_shared(place)
    for number in range(2):
        with open(place / "lower" / f"large{number}", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 512 * MIB)
    work = place / "upper/.unionfs/work"
    code = "import sys; open(sys.argv[1], 'r+b'); input()"
    with Unionfs([place / "lower"], place / "upper", place / "mnt") as union:
        ended = 0
        for number, last in enumerate((signal.SIGKILL, signal.SIGTERM)):
            path = union.mnt / f"large{number}"
            asker = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE)
            wait_until(lambda: any(work.iterdir()))
            asker.send_signal(last)
            asker.communicate(timeout=PATIENCE)
            assert asker.returncode == -last
            assert not any(work.iterdir())
            ended += not (place / "upper" / path.name).exists()
            os.truncate(path, 5)
            assert path.read_bytes() == bytes(5)
        assert ended > 0  # not all on a machine that looks too late


def test_askers_are_killed(union: Unionfs) -> None:
    """Their requests are taken back, and nothing is held for nobody."""
    for number in range(200):
        (union.mnt / f"file{number}").touch()
    code = (
        "import os, sys\n"
        "while True:\n"
        "    for name in os.listdir('.'):\n"
        "        os.close(os.open(name, os.O_RDONLY))\n"
    )
    for _ in range(5):
        askers = [
            subprocess.Popen([sys.executable, "-c", code], cwd=union.mnt, stdin=subprocess.DEVNULL)
            for _ in range(4)
        ]
        for asker in askers:
            with pytest.raises(subprocess.TimeoutExpired):
                asker.wait(0.1)
        for asker in askers:
            asker.kill()
        for asker in askers:
            asker.wait(PATIENCE)
    table = cast("dict[str, int]", union.status()["table"])
    assert table["open_files"] == 0


def test_many_at_once(union: Unionfs) -> None:
    """Changes in many directories by many threads: each is there, and none twice."""

    def work(number: int) -> None:
        here = union.mnt / f"dir{number}"
        here.mkdir()
        for at in range(30):
            (here / f"new{at}").write_bytes(b"%d" % at)
            (here / f"new{at}").rename(here / f"moved{at}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    for _ in range(2):
        for number in range(16):
            found = {p.name: p.read_bytes() for p in (union.mnt / f"dir{number}").iterdir()}
            assert found == {f"moved{at}": b"%d" % at for at in range(30)}
        union.remount()


class _Broken:
    """Operations whose handlers fail in ways that none should."""

    async def mkdir(self, *_arguments: object) -> None:
        raise RuntimeError("a bug")

    async def fsync(self, *_arguments: object) -> None:
        await _never()


class _Never:
    def __await__(self) -> Generator[None, None, None]:
        yield


def _never() -> _Never:
    return _Never()


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.MKDIR, struct.pack("=II", 0o755, 0) + b"name\0"),
        (Opcode.FSYNC, bytes(16)),
        (Opcode.MKDIR, b""),
        (Opcode.POLL, b""),
    ],
)
def test_a_bug_costs_one_request(
    opcode: Opcode, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    called = Requests(cast(UnionOperations, _Broken()))
    with caplog.at_level(logging.ERROR):
        assert called(opcode, 1, 0, 0, 1, body) == -errno.EIO
    assert caplog.records[-1].exc_info


def test_the_table_of_descriptors_does_not_grow(union: Unionfs) -> None:
    """With threads each time waits for a grace period of RCU."""
    words = Path(f"/proc/{union.pid}/status").read_text().split()
    assert int(words[words.index("FDSize:") + 1]) >= 4000


def affinities(union: Unionfs, name: str) -> list[set[int]]:
    """Where the daemon's threads of a name may run."""
    found = []
    for thread in os.listdir(f"/proc/{union.pid}/task"):
        with contextlib.suppress(OSError):
            comm = Path(f"/proc/{union.pid}/task/{thread}/comm").read_text().strip()
            if comm == name:
                found.append(os.sched_getaffinity(int(thread)))
    return found


@contextlib.contextmanager
def asking(union: Unionfs) -> Iterator[None]:
    """One program that asks for one thing after another."""
    going_on = threading.Event()
    going_on.set()

    def ask() -> None:
        number = 0
        while going_on.is_set():
            number += 1
            (union.mnt / f"missing{number}").exists()

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield
    finally:
        going_on.clear()
        asker.join()


def apart(union: Unionfs) -> bool:
    """Is the decoy on one processor, and the engine on the other?"""
    decoys = affinities(union, "unionfs-decoy")
    near = affinities(union, "unionfs-engine")
    return len(decoys) == 1 and all(len(at) == 1 and at != decoys[0] for at in near)


def came_apart(union: Unionfs) -> set[int]:
    """The two processors, once the decoy was on one of them and has been called back."""
    both = os.sched_getaffinity(0)
    if len(both) != 2:
        pytest.skip("there are not two processors")
    with asking(union):
        wait_until(lambda: apart(union))
    wait_until(lambda: all(at == both for at in affinities(union, "unionfs-engine")))
    return both


def test_the_engine_stays_with_who_asks(union: Unionfs) -> None:
    """And a decoy takes the other processor, until nobody asks any more (docs/adr/0027)."""
    came_apart(union)


def test_the_engine_stays_where_its_user_puts_it(union: Unionfs) -> None:
    """taskset -ap: what it was free to choose before it is not any more."""
    only = {min(came_apart(union))}
    for thread in os.listdir(f"/proc/{union.pid}/task"):
        os.sched_setaffinity(int(thread), only)
    before = requests(union, "lookup")
    with asking(union):
        wait_until(lambda: requests(union, "lookup") > before + 3000)
        for name in ("unionfs-engine", "unionfs-watch", "unionfs-decoy"):
            assert all(at == only for at in affinities(union, name)), name


def test_what_is_read_stays_in_the_cache_of_the_lower(place: Path) -> None:
    """Whoever reads it next, by another way, has not to go to the disk."""
    content = os.urandom(512 << 10)
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    (place / "lower/f").write_bytes(content)
    options = ["driver=engine", "passthrough=off"]
    with Unionfs([place / "lower"], place / "upper", place / "mnt", options=options) as union:
        assert (union.mnt / "f").read_bytes() == content
    with open(place / "lower/f", "rb") as file:
        found = bytearray(len(content))
        try:
            assert os.preadv(file.fileno(), [found], 0, os.RWF_NOWAIT) == len(content)
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            pytest.skip("this file system does not tell what it has in memory")
    assert found == content
