# SPDX-License-Identifier: GPL-2.0-or-later
"""Several unions of a user in one image: one fuse2fs for all, as long as one of them is there."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.rig.mounted import PATIENCE, Unionfs, is_mounted, program
from tests.rig.waiting import wait_until
from tests.test_stores import base, mount, need, refused
from unionfs import runtime
from unionfs.stores import sharing

__all__ = ["base"]


@pytest.fixture
def image(base: Path) -> Iterator[Path]:
    need("ext4")
    if os.geteuid() == 0:
        pytest.skip("the kernel mounts root's images")
    made = images.make(base / "store.img")
    yield made
    wait_until(lambda: not serving(made))
    ground.run("e2fsck", "-fn", made)
    assert not registers()
    assert not [p for p in ground.mounts_below("/") if "unionfs-stage" in p]


def serving(image: Path) -> list[int]:
    """The programs that have an image."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"fuse2fs" in words[0] and os.fsencode(image) in words:
            found.append(int(pid))
    return found


def registers() -> list[Path]:
    private = runtime.private()
    assert private is not None
    return list(Path(private).glob(".image-*"))


def one(image: Path, name: str) -> Unionfs:
    """The union in `image:/NAME`, mounted on MNT-NAME."""
    base = image.parent
    mnt = base / f"mnt-{name}"
    mnt.mkdir(exist_ok=True)
    return Unionfs([base / "tree"], Path(f"{image}:/{name}"), mnt)


@contextmanager
def two(image: Path) -> Iterator[tuple[Unionfs, Unionfs]]:
    first, second = one(image, "a"), one(image, "b")
    try:
        first.mount()
        second.mount()
        yield first, second
    finally:
        first.abandon()
        second.abandon()


def test_two_unions_in_one_image(image: Path) -> None:
    with two(image) as (first, second):
        (program_,) = serving(image)
        (first.mnt / "file").write_text("a\n")
        (second.mnt / "file").write_text("b\n")
        first.umount()
        assert serving(image) == [program_]
        (second.mnt / "more").write_text("more\n")
        first.mount()
        assert serving(image) == [program_]
        assert (first.mnt / "file").read_text() == "a\n"
        second.umount()
        first.umount()
        assert not serving(image), "its end was waited for"
        second.mount()
        assert (second.mnt / "more").read_text() == "more\n"
        assert (second.mnt / "file").read_text() == "b\n"
        second.umount()


def test_names_of_one_file(image: Path) -> None:
    """To the kernel each is a file of its own in what fuse2fs shows: none shows what was before."""
    with two(image) as (first, _):
        a, b = first.mnt / "a", first.mnt / "b"
        a.write_text("before")
        os.link(a, b)
        for names in ((a, b), (b, a)):
            first.remount()
            assert [name.read_text() for name in names] == ["before"] * 2
        first.remount()
        b.write_text("after!")
        first.remount()
        assert [name.read_text() for name in (a, b)] == ["after!"] * 2
        b.rename(first.mnt / "c")
        (first.mnt / "c").write_text("again!")
        a.rename(first.mnt / "z")
        fd = os.open(first.mnt / "z", os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # the union's own
            assert os.pread(fd, 10, 0) == b"again!"
        finally:
            os.close(fd)


def test_one_that_is_killed_takes_nothing_away(image: Path) -> None:
    with two(image) as (first, second):
        (program_,) = serving(image)
        (second.mnt / "before").write_text("before\n")
        first.kill()
        (second.mnt / "after").write_text("after\n")
        assert serving(image) == [program_]
        first.mount()
        assert serving(image) == [program_]
        second.kill()
        (first.mnt / "file").write_text("a\n")
        first.umount()
        assert not serving(image)
    with one(image, "b") as again:
        assert (again.mnt / "after").read_text() == "after\n"


def test_all_that_are_killed_end_it(image: Path) -> None:
    with two(image) as (first, second):
        (first.mnt / "kept").write_text("kept\n")
        ground.run("sync", "-f", first.mnt)
        first.die()
        second.die()
        wait_until(lambda: not serving(image))
        first.clear()
        second.clear()
    with one(image, "a") as again:  # finds the register of the dead
        assert (again.mnt / "kept").read_text() == "kept\n"


def test_an_image_that_is_gone_since(image: Path) -> None:
    """The register of the dead is in nobody's way, and is not left for ever."""
    other = images.make(image.parent / "other.img")
    dead = one(other, "dead")
    try:
        dead.mount()
        (left,) = registers()
        dead.die()
        wait_until(lambda: not serving(other))
        other.unlink()
        dead.clear()
    finally:
        dead.abandon()
    assert registers() == [left]
    with one(image, "a"):
        assert left not in registers()


def test_all_are_told_that_it_was_killed(image: Path) -> None:
    with two(image) as (first, second):
        for made in (first, second):
            made.expected = ["fuse2fs of .* has ended", "fuse2fs of .* ended", "umount"]
        (program_,) = serving(image)
        os.kill(program_, 9)
        for made in (first, second):
            wait_until(lambda made=made: "broken" in made.status())  # type: ignore[misc]
            assert "has ended" in str(made.status()["broken"])
        second.umount()
        with one(image, "c"):  # the image is free, though the first is there still
            (fresh,) = serving(image)
            assert fresh != program_
            first.umount()
            assert serving(image) == [fresh]
            second.mount()
            assert serving(image) == [fresh]
            second.umount()


def test_many_at_once(image: Path) -> None:
    """Each finds what the first has begun; and each may be the last."""
    names = [f"n{number}" for number in range(5)]
    unions = [one(image, name) for name in names]
    for _ in range(2):
        _all_at_once([made.command() for made in unions], image, names)
        assert len(serving(image)) == 1
        for made in unions:
            (made.mnt / "new").touch()
        _all_at_once([[*program(), "umount", str(made.mnt)] for made in unions], image, [])
        assert not serving(image)


def _all_at_once(commands: list[list[str]], image: Path, names: list[str]) -> None:
    calls = [
        subprocess.Popen([word for word in words if word != "-f"], stderr=subprocess.PIPE)
        for words in commands
    ]
    for call in calls:
        _out, said = call.communicate(timeout=PATIENCE)
        assert call.returncode == 0, said
    assert all(is_mounted(one(image, name).mnt) for name in names)


def test_the_same_upper_twice(image: Path) -> None:
    (image.parent / "other").mkdir()
    with one(image, "a") as made:
        said = refused(image.parent / "tree", f"{image}:/a", image.parent / "other")
        assert f"process {made.pid}" in said
        assert f"mounted on {made.mnt}" in said
        (made.mnt / "new").touch()


def test_who_only_reads_joins(image: Path) -> None:
    other = image.parent / "other"
    other.mkdir()
    with one(image, "a") as made:
        (made.mnt / "new").touch()
        done = mount("-o", f"lowerdir+={image}:/a", "-o", f"upperdir={image}:/b", other)
        assert done.returncode == 0, done.stderr
        assert (other / "new").exists()
        assert len(serving(image)) == 1
        ground.run(*program(), "umount", other)
        (made.mnt / "more").touch()
        done = mount(image.parent / "tree", f"{image}:/b", other, "--ro")
        assert done.returncode == 0, done.stderr
        with pytest.raises(OSError, match="Read-only"):
            (other / "no").touch()
        ground.run(*program(), "umount", other)
    assert not serving(image)


def test_a_failed_mount_leaves(image: Path) -> None:
    with one(image, "a") as made:
        said = refused(image.parent / "none", f"{image}:/b", image.parent / "mnt")
        assert "none" in said
        (made.mnt / "new").touch()
    assert not serving(image)


def test_a_register_that_lies(image: Path) -> None:
    """What it says is looked at, not believed."""
    with one(image, "a") as made:
        (register,) = registers()
        users = register / "users"
        told = users.read_text()
        users.write_text(told.replace('"fd": ', '"fd": 1'))
        done = mount(image.parent / "tree", f"{image}:/b", image.parent / "mnt")
        assert done.returncode == 32
        assert "in use" in done.stderr
        users.write_text(told)
        (made.mnt / "new").touch()


def test_what_a_register_says(tmp_path: Path) -> None:
    us = sharing.Process.of(os.getpid())
    fd = os.open(tmp_path, os.O_PATH)
    status = os.fstat(fd)
    root = (status.st_dev, status.st_ino)
    user = sharing.User(us, fd)
    record = sharing.Record(us, root, (user,))
    assert sharing.parse(record.text()) == record
    for lie in ("", "{", "[]", "{}", "7", record.text().replace("users", "user")):
        assert sharing.parse(lie) is None
    assert user.has(root)
    assert not user.has((root[0], root[1] + 1))
    assert not dataclasses.replace(user, fd=fd + 100).has(root)
    later = dataclasses.replace(us, started=us.started + 1)
    assert not dataclasses.replace(user, process=later).has(root)
    with pytest.raises(ProcessLookupError):
        later.hold()
    elsewhere = dataclasses.replace(us, namespace="pid:[1]")
    assert dataclasses.replace(user, process=elsewhere).has(root), "it cannot be seen that not"
    with pytest.raises(PermissionError):
        dataclasses.replace(user, process=elsewhere).open(root)
    os.close(fd)
    assert not user.has(root)
