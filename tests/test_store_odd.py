# SPDX-License-Identifier: GPL-2.0-or-later
"""What is no store, or is looked at by somebody, or has an odd name: told as what it is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.rig.waiting import wait_until
from tests.test_store_commands import done, facts, fails, listing, store
from tests.test_stores import base, mount, need, union
from unionfs.cli.parser import Parser
from unionfs.errors import InUse, UnionfsError
from unionfs.stores import gocryptfs, inspect, kernel, users
from unionfs.stores.probe import probe

__all__ = ["base"]

_ROOT = os.geteuid() == 0
LONG = "n" * 251 + ".img"


@pytest.fixture
def fifo(base: Path) -> Path:
    os.mkfifo(base / "fifo")
    return base / "fifo"


@pytest.fixture
def listener(base: Path) -> Iterator[Path]:
    here = os.getcwd()
    os.chdir(base)  # its path is too long for a socket's name
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        os.chdir(here)
        yield base / "socket"


# What it is


def test_what_can_hold_no_file_system(fifo: Path, listener: Path) -> None:
    for path, kind in ((fifo, "a FIFO"), (listener, "a socket"), (Path("/dev/null"), "a char")):
        for words, code in ((["list"], 32), (["info"], 32), (["check"], 8), (["compact"], 32)):
            assert f"{path} is {kind}" in fails(*words, path, code=code)
        for verb in ("grow", "shrink"):
            assert f"{path} is {kind}" in fails(verb, path, "--size", "64M")


def test_a_place_that_is_no_store(base: Path) -> None:
    other = base / "b.zst"
    other.write_bytes(os.urandom(1 << 16))
    found = store("list", other)
    assert found.returncode == 32
    assert "holds no file system" in found.stdout
    assert f"{other} holds no file system" in found.stderr
    assert store("list", base).returncode == 0


def test_a_backup_is_no_pipe(fifo: Path, base: Path) -> None:
    assert f"{fifo} is no file; " in fails("restore", "--verify", fifo)
    assert f"{base} is no file; " in fails("restore", "--verify", base)


def test_a_directory_inside_is_told_of_alone(base: Path) -> None:
    (base / "stores/one").mkdir(parents=True)
    (base / "stores/two").mkdir()
    (base / "stores/plain").mkdir()
    for name in ("one", "two"):
        with union(base, base / "tree", base / "stores" / name):
            pass
    place = base / "stores"
    assert [u["directory"] for u in facts("info", place)["uppers"]] == ["/one", "/two"]
    assert [u["directory"] for u in facts("info", f"{place}:/two")["uppers"]] == ["/two"]
    assert facts("info", f"{place}:/plain")["uppers"] == []
    assert f"{place} has no /nope" in fails("info", f"{place}:/nope")
    need("ext4")
    image = images.make(base / "s.img")
    with union(base, base / "tree", f"{image}:/deep/er"):
        pass
    assert [u["directory"] for u in facts("info", f"{image}:/deep/er")["uppers"]] == ["/deep/er"]
    assert f"{image} has no /nope" in fails("info", f"{image}:/nope")


# Areas and ciphers


@pytest.mark.parametrize("how", ["file", "link"])
def test_an_area_that_is_no_directory(base: Path, how: str) -> None:
    up = base / "up"
    up.mkdir()
    if how == "file":
        (up / ".unionfs").touch()
    else:
        (up / ".unionfs").symlink_to("elsewhere")
    for place in (up, base):
        found = store("check", place)
        assert found.returncode == 4, found
        what = "is no directory" if how == "file" else "is "
        assert f"/.unionfs: {what}" in found.stdout


def test_a_work_directory_that_is_none(base: Path) -> None:
    (base / "up").mkdir()
    with union(base, base / "tree", base / "up"):
        pass
    work = base / "up/.unionfs/work"
    shutil.rmtree(work)
    work.symlink_to("/")
    found = store("check", base / "up", "--repair")
    assert found.returncode == 4, found
    assert "/.unionfs/work: is " in found.stdout


@pytest.mark.skipif(not _ROOT, reason="only root mounts here")
def test_a_mount_in_the_work_directory(base: Path) -> None:
    (base / "up").mkdir()
    with union(base, base / "tree", base / "up"):
        pass
    left = base / "up/.unionfs/work/#1f"
    left.mkdir(parents=True)
    ground.run("mount", "-t", "tmpfs", "none", str(left))
    try:
        found = store("check", base / "up", "--repair")
        assert found.returncode == 4, found
        said = "left by a killed daemon; cannot be removed: Device or resource busy"
        assert f"/.unionfs/work/#1f: {said}" in found.stdout
    finally:
        ground.run("umount", str(left))
    assert store("check", base / "up", "--repair").returncode == 1


def test_a_key_file_that_is_none(base: Path) -> None:
    up = base / "up"
    up.mkdir()
    (up / "gocryptfs.conf").write_text(json.dumps({"EncryptedKey": "x"}))
    told = fails("check", up, "--key-file", base, code=8)
    assert told == f"unionfs: cannot read the key file {base}: Is a directory"


def test_what_only_has_the_name_of_a_cipher(base: Path) -> None:
    place = base / "place"
    made: dict[str, Callable[[Path], object]] = {
        "directory": Path.mkdir,
        "link": lambda path: path.symlink_to("x"),
        "fifo": os.mkfifo,
        "empty": Path.touch,
    }
    for name, make in made.items():
        (place / name).mkdir(parents=True)
        make(place / name / "gocryptfs.conf")
        fd = os.open(place / name, os.O_PATH)
        assert not gocryptfs.is_encrypted(fd)
        os.close(fd)
    assert facts("info", place)["uppers"] == []


def test_what_cannot_be_read_is_not_taken_for_a_cipher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gocryptfs.conf").touch()
    fd = os.open(tmp_path, os.O_RDONLY)

    def refuse(code: int) -> None:
        def read(_: int) -> bytes:
            raise OSError(code, os.strerror(code), "gocryptfs.conf")

        monkeypatch.setattr(gocryptfs, "_read_config", read)

    refuse(errno.EACCES)
    assert gocryptfs.is_encrypted(fd)
    refuse(errno.EIO)
    with pytest.raises(UnionfsError, match=r"cannot read .*/gocryptfs.conf: Input/output error"):
        gocryptfs.is_encrypted(fd)
    os.close(fd)
    told = inspect.look(str(tmp_path), [])
    assert "Input/output error" in told.problem


# Somebody looks at it


@pytest.mark.skipif(not _ROOT, reason="fuse2fs waits for whom it serves")
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_who_looks_for_a_moment_is_waited_for(base: Path, kind: str) -> None:
    need(kind)
    image = images.make(base / "s.img", kind)
    with images.attached(image) as device:
        contents = probe(device)
        root, _ = kernel.mount(contents, readonly=True, untouched=True)
        ending = threading.Timer(1, os.close, [root])
        ending.start()
        try:
            with union(base, base / "tree", device):
                pass
        finally:
            ending.join()


@pytest.mark.skipif(not _ROOT, reason="fuse2fs waits for whom it serves")
@pytest.mark.parametrize("way", ["image", "device"])
def test_who_goes_on_looking_is_told(base: Path, way: str) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    if way == "image":
        root, _ = kernel.mount(probe(str(image)), readonly=True, untouched=True)
        try:
            _refused_by(image, base)
        finally:
            os.close(root)
        return
    with images.attached(image) as device:
        root, _ = kernel.mount(probe(device), readonly=True, untouched=True)
        try:
            _refused_by(Path(device), base)
        finally:
            os.close(root)
        (base / "seen").mkdir()
        ground.run("mount", "-o", "ro", device, str(base / "seen"))
        try:
            with pytest.raises(InUse, match=f"{device} is in use read-only at {base}/seen"):
                kernel.mount(probe(device), readonly=False)
        finally:
            ground.run("umount", str(base / "seen"))


def _refused_by(path: Path, base: Path) -> None:
    found = mount(base / "tree", path, base / "mnt")
    assert found.returncode == 32
    assert f"{path} is in use read-only by " in found.stderr
    assert f"(process {os.getpid()})" in found.stderr


def test_the_name_of_a_process() -> None:
    assert users._name("0") == "a program"
    assert users._name(str(os.getpid())) not in ("", "a program")


def test_a_look_at_an_upper_is_waited_for(base: Path) -> None:
    up = base / "up"
    up.mkdir()
    fd = os.open(up, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    found = mount(base / "tree", up, base / "mnt")
    assert found.returncode == 32
    assert f"{up} is in use by process {os.getpid()}" in found.stderr
    assert "wait for the end of what has it" in found.stderr
    ending = threading.Timer(1, os.close, [fd])
    ending.start()
    try:
        with union(base, base / "tree", up):
            pass
    finally:
        ending.join()


@pytest.mark.skipif(not _ROOT, reason="only root attaches images")
def test_what_cannot_be_written_to(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    with images.attached(image) as device:
        ground.run("blockdev", "--setro", device)
        try:
            for verb in ("grow", "compact"):
                told = fails(verb, device)
                assert "Permission denied; it must be writable; a mount can do without" in told
                assert "fsconfig" not in told
        finally:
            ground.run("blockdev", "--setrw", device)


# Names


def test_paths_that_name_no_file(base: Path) -> None:
    for path in ("", f"{base}/s.img/", f"{base}/.."):
        assert "is no name of a file" in fails("create", path, "--size", "8M", code=1)
    missing = base / "nope.img"
    assert f"cannot read {missing}: No such file" in fails("grow", missing, "--size", "+8M")
    assert [n for n in listing(base) if n.endswith(".new")] == []


def test_arguments_are_shown_as_they_were_typed() -> None:
    told = fails("create", "--", "-d.img", "--size", "8M", code=1)
    assert "unrecognized arguments: --size 8M; " in told
    assert "x00" not in told
    with pytest.raises(UnionfsError, match=r"unrecognized arguments: a$"):
        Parser(prog="x", usage="x", description="").read(["--", "a"])


def test_a_name_that_has_no_room_for_more(base: Path) -> None:
    need("ext4")
    image = base / LONG
    done("create", image, "--size", "16M")
    done("grow", image, "--size", "24M")
    left = [f".{'n' * 120}{LONG[-120:]}.01234567.new", ".nnn.img.01234567.new"]
    for name in left:
        (base / name).touch()
    done("shrink", image, "--size", "20M")
    assert stat.S_ISREG(image.stat().st_mode)
    assert [n for n in listing(base) if n.endswith(".new")] == left[1:]
    other = base / ("é" * 127)
    done("create", other, "--size", "16M")
    wait_until(other.exists)
