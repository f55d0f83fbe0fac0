# SPDX-License-Identifier: GPL-2.0-or-later
"""Two daemons never write one upper, however they are led to it; and the lock ends with its owner.

The lock is the kernel's own on open directories, so there is nothing to go stale: a killed daemon's
upper can be mounted at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tests.rig import ground, syscalls
from tests.rig.mounted import PATIENCE, Unionfs, is_mounted, program


@pytest.fixture
def layers(place: Path) -> Path:
    for name in ("lower", "upper", "other", "mnt", "mnt2", "work", "work2"):
        (place / name).mkdir()
    (place / "lower/file").write_bytes(b"lower")
    return place


def first(place: Path, *, work: bool = False, flags: list[str] | None = None) -> Unionfs:
    return Unionfs(
        [place / "lower"],
        place / "upper",
        place / "mnt",
        work=place / "work" if work else None,
        flags=flags or [],
    )


def second(place: Path, upper: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Another mount, of which it is expected that it fails."""
    command = [*program(), "mount", str(place / "lower"), str(upper), str(place / "mnt2"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], holder: Unionfs) -> None:
    """One line that names the holder; exit code as mount(8); nothing mounted, nothing changed."""
    assert done.returncode == 32, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in ("in use", str(holder.pid), str(holder.mnt)):
        assert word in done.stderr, done.stderr
    assert not is_mounted(holder.mnt.with_name("mnt2"))
    (holder.mnt / "still").write_bytes(b"works")
    (holder.mnt / "still").unlink()


def test_same_upper(layers: Path) -> None:
    with first(layers) as union:
        assert_refused(second(layers, layers / "upper"), union)


def test_same_upper_by_another_spelling(layers: Path) -> None:
    (layers / "link").symlink_to("upper")
    with first(layers) as union:
        assert_refused(second(layers, layers / "link"), union)
        assert_refused(second(layers, layers / "lower/../upper"), union)


def test_other_work_directory(layers: Path) -> None:
    with first(layers, work=True) as union:
        done = second(layers, layers / "upper", "-o", f"workdir={layers / 'work2'}")
        assert done.returncode == 32
        assert "in use" in done.stderr
        assert str(union.pid) in done.stderr
        assert list((layers / "work2").iterdir()) == [], "the refused one left something"


def test_work_directory_inside_the_upper_and_beside_it(layers: Path) -> None:
    with first(layers) as union:
        done = second(layers, layers / "upper", "-o", f"workdir={layers / 'work2'}")
        assert done.returncode == 32
        assert "in use" in done.stderr
        assert str(union.pid) in done.stderr


def test_same_work_directory_for_two_uppers(layers: Path) -> None:
    with first(layers, work=True) as union:
        done = second(layers, layers / "other", "-o", f"workdir={layers / 'work'}")
        assert_refused(done, union)
        assert list((layers / "other").iterdir()) == []


@pytest.mark.root
def test_through_a_bind_mount(layers: Path) -> None:
    (layers / "bound").mkdir()
    syscalls.mount(str(layers / "upper"), str(layers / "bound"), None, syscalls.MS_BIND)
    try:
        with first(layers) as union:
            assert_refused(second(layers, layers / "bound"), union)
    finally:
        syscalls.umount(layers / "bound", syscalls.MNT_DETACH)


@pytest.mark.root
def test_from_another_mount_namespace(layers: Path) -> None:
    with first(layers) as union:
        command = ["unshare", "-m", *program(), "mount", "-f", str(layers / "lower")]
        command += [str(layers / "upper"), str(layers / "mnt2")]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert_refused(done, union)


@pytest.mark.root
def test_from_another_pid_namespace(layers: Path) -> None:
    """The holder cannot be seen from there, and still it is refused."""
    with first(layers) as union:
        command = ["unshare", "-mpf", "--mount-proc", *program(), "mount", "-f"]
        command += [str(layers / name) for name in ("lower", "upper", "mnt2")]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 32
        assert "in use" in done.stderr
        assert union.status()["pid"] == union.pid


def test_after_kill_at_once(layers: Path) -> None:
    """No wait, no file to remove, also while the dead mount is still in the table."""
    union = first(layers)
    union.mount()
    (union.mnt / "file").write_bytes(b"upper")
    os.kill(union.pid, signal.SIGKILL)
    assert union.process is not None
    union.process.wait(PATIENCE)
    other = Unionfs([layers / "lower"], layers / "upper", layers / "mnt2")
    with other:
        assert (other.mnt / "file").read_bytes() == b"upper"
    union.process = None
    union.abandon()


def test_after_unmount_at_once(layers: Path) -> None:
    """A mount right after umount(8) waits for the daemon that is just ending."""
    union = first(layers)
    for number in range(10):
        union.mount()
        (union.mnt / f"file{number}").touch()
        tool = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
        ground.run(*tool, union.mnt)
        process, union.process = union.process, None
        other = Unionfs([layers / "lower"], layers / "upper", layers / "mnt2")
        with other:
            assert len(list(other.mnt.iterdir())) == number + 2
        assert process is not None
        assert process.wait(PATIENCE) == 0


def test_many_at_once(layers: Path) -> None:
    """Of many that start together exactly one gets the upper."""
    points = [layers / f"many{number}" for number in range(6)]
    for point in points:
        point.mkdir()
    results: dict[Path, subprocess.CompletedProcess[str]] = {}

    def mount(point: Path) -> None:
        command = [*program(), "mount", str(layers / "lower"), str(layers / "upper"), str(point)]
        results[point] = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    threads = [threading.Thread(target=mount, args=(point,)) for point in points]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mounted = [point for point in points if is_mounted(point)]
    try:
        assert len(mounted) == 1, results
        codes = sorted(done.returncode for done in results.values())
        assert codes == [0] + [32] * 5, results
        (mounted[0] / "file").write_bytes(b"written")
    finally:
        for point in mounted:
            ground.run(*program(), "umount", point)


def test_readers_share_an_upper_and_keep_writers_out(layers: Path) -> None:
    reader = first(layers, flags=["--ro"])
    other = Unionfs([layers / "lower"], layers / "upper", layers / "mnt2", flags=["--ro"])
    with reader:
        with other:
            assert (other.mnt / "file").read_bytes() == b"lower"
        done = second(layers, layers / "upper")
        assert done.returncode == 32, done
        assert "in use" in done.stderr
    with first(layers):
        done = second(layers, layers / "upper", "--ro")
        assert done.returncode == 32, done
        assert "in use" in done.stderr
        assert str(layers / "mnt") in done.stderr


def test_readers_write_nothing(layers: Path) -> None:
    before = os.stat(layers / "upper")
    with first(layers, flags=["--ro"]) as union, pytest.raises(OSError, match="Read-only"):
        (union.mnt / "new").touch()
    assert list((layers / "upper").iterdir()) == []
    assert os.stat(layers / "upper").st_mtime_ns == before.st_mtime_ns


def test_one_lower_for_many_unions(layers: Path) -> None:
    """Lowers are only read: any number of unions may have them."""
    other = Unionfs([layers / "lower"], layers / "other", layers / "mnt2")
    with first(layers) as union, other:
        (union.mnt / "file").write_bytes(b"one")
        assert (other.mnt / "file").read_bytes() == b"lower"


def test_someone_else_may_lock_inside_the_union(layers: Path) -> None:
    """A flock on the union's root is not the daemon's own."""
    import fcntl

    with first(layers) as union:
        fd = os.open(union.mnt, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(fd)
