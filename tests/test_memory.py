# SPDX-License-Identifier: GPL-2.0-or-later
"""An upper in memory: how large it is, who sees it, and that nothing is left of it."""

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.rig.mounted import Unionfs
from unionfs import memory, mounts, syscalls
from unionfs.errors import UnionfsError


def _may_make_namespaces() -> bool:
    return subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not _may_make_namespaces(), reason="this user may make no user namespace"
)


def directories() -> set[Path]:
    """Where uppers of users lie for which no size was asked."""
    places = {Path("/dev/shm"), Path(os.environ.get("XDG_RUNTIME_DIR", "/dev/shm"))}
    return {found for place in places for found in place.glob("unionfs-*")}


def size_of(fd: int) -> int:
    space = os.fstatvfs(fd)
    return space.f_blocks * space.f_frsize


@needs_namespaces
def test_a_tmpfs_of_its_size_that_nobody_sees() -> None:
    before = mounts.read_mounts()
    upper = memory.open_memory("4M")
    assert mounts.read_mounts() == before
    assert size_of(upper.fd) == 4 << 20
    root = os.fstat(upper.fd)
    assert stat.S_IMODE(root.st_mode) == 0o755
    assert (root.st_uid, root.st_gid) == (os.geteuid(), os.getegid())
    upper.close()


@needs_namespaces
def test_a_size_that_tmpfs_does_not_understand() -> None:
    with pytest.raises(UnionfsError, match="not understood"):
        memory.open_memory("4 apples")


def _refuse(*_: object) -> int:
    raise PermissionError(errno.EPERM, "no")


def test_a_directory_of_a_user_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "private_tmpfs", _refuse)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    upper = memory.open_memory(None)
    assert upper.path.startswith("/dev/shm/unionfs-")
    os.mkdir("locked", 0o700, dir_fd=upper.fd)
    (Path(upper.path) / "locked/file").touch()
    os.chmod("locked", 0, dir_fd=upper.fd)
    upper.close()
    assert not os.path.exists(upper.path)


@pytest.mark.parametrize("step", ["private_tmpfs", "unshare_user"])
def test_a_size_where_no_user_may_make_a_tmpfs(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(syscalls, "private_tmpfs", _refuse)
    monkeypatch.setattr(syscalls, step, _refuse)
    with pytest.raises(UnionfsError, match="no user make"):
        memory.open_memory("1M")


@needs_namespaces
def test_a_union_with_room_for_so_much(place: Path) -> None:
    for name in ("low", "mnt"):
        (place / name).mkdir()
    (place / "low/file").write_bytes(b"x" * 1000)
    mnt = place / "mnt"
    with Unionfs([place / "low"], None, mnt, options=["ephemeral=1M"]) as made:
        assert made.status()["upper"] == "(memory)"
        (mnt / "file").chmod(0o600)
        (mnt / "dir").mkdir()
        with pytest.raises(OSError, match="No space left on device"):
            (mnt / "large").write_bytes(bytes(2 << 20))
        (mnt / "large").unlink()
        (mnt / "small").write_bytes(b"fits")
        assert (mnt / "file").stat().st_mode & 0o777 == 0o600
    assert os.listdir(place / "low") == ["file"]


@needs_namespaces
def test_nothing_is_left_of_a_killed_one(place: Path) -> None:
    before = directories()
    for name in ("low", "mnt"):
        (place / name).mkdir()
    made = Unionfs([place / "low"], None, place / "mnt", options=["ephemeral=1M"])
    made.mount()
    (place / "mnt/file").write_bytes(b"gone")
    made.kill()
    assert directories() == before
