# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store`: made, listed, checked, grown; nothing is ever lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import ground, images, snapshot
from tests.rig.mounted import PATIENCE, program
from tests.rig.waiting import wait_until
from tests.test_stores import base, change, check, need, union
from unionfs.cli import show
from unionfs.errors import UnionfsError
from unionfs.stores.tools import find
from unionfs.stores.uppers import wrong_mark

__all__ = ["base"]

ARCH = os.uname().machine


def store(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`unionfs store ...`; `path` comes first in PATH."""
    environment = dict(os.environ)
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        [*program(), "store", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=environment,
    )


def done(*arguments: object) -> str:
    """Its output; it must succeed."""
    found = store(*arguments)
    assert found.returncode == 0, found
    return found.stdout


def fails(*arguments: object, code: int = 32) -> str:
    """The one line of an error."""
    found = store(*arguments)
    assert found.returncode == code, found
    assert "Traceback" not in found.stderr
    lines = found.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def facts(*arguments: object) -> Any:  # noqa: ANN401
    return json.loads(done(*arguments, "--json"))


def listing(place: Path) -> list[str]:
    return sorted(p.name for p in place.iterdir())


@pytest.fixture
def shim(base: Path) -> Iterator[Callable[[str], Path]]:
    """A directory for PATH with a program that says it is there, and then waits for ever."""
    folder = base / "shim"
    folder.mkdir()
    pids = []

    def make(name: str) -> Path:
        script = folder / name
        script.write_text(
            f"#!/bin/sh\necho $$ >{folder}/reached.new\nmv {folder}/reached.new "
            f"{folder}/reached\nexec sleep 1000\n"
        )
        script.chmod(0o755)
        return folder

    yield make
    reached = folder / "reached"
    if reached.exists():
        pids.append(int(reached.read_text()))
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def killed_at(folder: Path, *arguments: object) -> None:
    """Run a verb, and kill it -9 when the program in `folder` has been reached."""
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [*program(), "store", *map(str, arguments)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until((folder / "reached").exists)
    process.kill()
    process.wait()
    os.kill(int((folder / "reached").read_text()), signal.SIGKILL)
    for name in ("reached", *(p.name for p in folder.iterdir() if p.name != "reached")):
        (folder / name).unlink()


# The rules


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("1K", 1024),
        ("2M", 2 << 20),
        ("1.5g", 3 << 29),
        ("8GiB", 8 << 30),
        ("1TB", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert show.read_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "G", "1X", "1 G x", "50%"])
def test_sizes_misspelt(text: str) -> None:
    with pytest.raises(UnionfsError, match="is not a size"):
        show.read_size(text)


@pytest.mark.parametrize(
    ("mark", "value", "directory", "wrong"),
    [
        ("opaque", b"y", True, ""),
        ("opaque", b"z", True, "neither y nor x"),
        ("opaque", b"y", False, "only a directory"),
        ("redirect", b"name", True, ""),
        ("redirect", b"/a/b", True, ""),
        ("redirect", b"", True, "empty"),
        ("redirect", b"a/b", True, "neither a name"),
        ("redirect", b"/a/../../etc", True, "leaves the layer"),
        ("redirect", b"..", True, "leaves the layer"),
        ("redirect", b"/a//b", True, "names nothing"),
        ("metacopy", b"", False, ""),
        ("metacopy", b"", True, "no data"),
        ("origin", b"\x00", False, ""),
    ],
)
def test_marks(mark: str, value: bytes, directory: bool, wrong: str) -> None:
    found = wrong_mark(mark, value, directory=directory)
    assert (wrong in found) if wrong else not found


def test_help_and_strange_verbs() -> None:
    assert "backup" in done("--help")
    for verb in ("create", "list", "info", "check", "grow", "backup", "restore"):
        assert "exit codes" in done(verb, "--help")
    assert "is no verb" in fails("mend", code=1)
    assert "needs a verb" in fails(code=1)


@pytest.mark.parametrize(
    "words",
    [
        ["info"],
        ["list"],
        ["grow", "--size", "+1G"],
        ["shrink", "--size", "1G"],
        ["compact"],
        ["backup"],
        ["clone"],
        ["reset"],
        ["restore"],
    ],
)
def test_what_is_not_there(base: Path, words: list[str]) -> None:
    verb, *options = words
    places = [base / "no.img"]
    if verb in ("backup", "clone"):
        places.append(base / "other")
    if verb == "restore":
        places = [base / "no.tar.zst", base / "no.img"]
    said = fails(verb, *places, *options)
    assert str(base / "no") in said


def test_a_place_that_takes_nothing(base: Path) -> None:
    upper = base / "up"
    upper.mkdir()
    with union(base, base / "tree", upper):
        change(base / "mnt")
    target = "/proc" if os.geteuid() == 0 else "/usr"
    assert target in fails("backup", upper, f"{target}/saved.tar.zst")
    assert target in fails("create", f"{target}/s.img", "--size", "16M")


# create


@pytest.mark.parametrize("kind", images.OTHERS_SLOWLY)
def test_create_and_use(base: Path, kind: str) -> None:
    need(kind)
    image = base / "s.img"
    size = {"ext4": "16M", "xfs": "300M", "btrfs": "114M"}[kind]
    done("create", image, "--size", size, "--fs", kind, "--label", "my stick")
    assert image.stat().st_mode & 0o777 == 0o600
    assert image.stat().st_blocks * 512 < image.stat().st_size // 2, "sparse"
    with union(base, base / "tree", image):
        change(base / "mnt")
        said = facts("info", image) if os.geteuid() == 0 else None
        if said is not None:
            assert said["uppers"][0]["mounted"] == str(base / "mnt")
    said = facts("info", image)
    assert (said["fstype"], said["label"], said["kind"]) == (kind, "my stick", "image")
    (upper,) = said["uppers"]
    assert upper["directory"] == f"/persistent_tree/{ARCH}"
    assert upper["base"]["name"] == "tree"
    assert upper["mounted"] is None
    assert said["used"] + said["free"] <= said["size"]
    assert facts("list", base)[0]["uppers"][0]["id"] == upper["id"]
    shown = done("list", base)
    assert "my stick" in shown
    assert str(image) in shown
    assert upper["id"] in done("info", image)
    assert done("check", image).startswith(f"{kind}: clean")
    with union(base, base / "tree", image):
        check(base / "mnt")
    assert images.loops_of(image) == []


def test_create_never_overwrites(base: Path) -> None:
    image = base / "s.img"
    image.write_text("mine")
    assert "is not overwritten" in fails("create", image, "--size", "16M")
    (base / "link.img").symlink_to("nowhere")
    assert "is not overwritten" in fails("create", base / "link.img", "--size", "16M")
    assert image.read_text() == "mine"
    assert [n for n in listing(base) if n.startswith(".")] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "1M"], "too small for ext4"),
        (["--size", "200M", "--fs", "xfs"], "too small for xfs"),
        (["--size", "16M", "--label", "x" * 17], "too long"),
        (["--size", "16M", "--label", "é" * 9], "too long"),
        (["--size", "16M", "--label", "a\nb"], "not printable"),
        (["--size", "16M", "--label", "a "], "ends in a blank"),
        (["--size", "0"], "not a size"),
        (["--size", "9" * 400], "too large"),
        (["--size", "99999999T"], "too large"),
        ([], "no --size"),
    ],
)
def test_create_refuses(base: Path, words: list[str], said: str) -> None:
    assert said in fails("create", base / "s.img", *words, code=1)
    assert not (base / "s.img").exists()


def test_create_full_takes_the_space(base: Path) -> None:
    done("create", base / "s.img", "--size", "16M", "--full")
    assert (base / "s.img").stat().st_blocks * 512 >= 15 << 20


def test_create_killed(base: Path, shim: Callable[[str], Path]) -> None:
    image = base / "s.img"
    killed_at(shim("mkfs.ext4"), "create", image, "--size", "16M")
    assert not image.exists()
    done("create", image, "--size", "16M")
    assert [n for n in listing(base) if n.startswith(".")] == [], "the next one tidies up"


def test_create_on_a_device(base: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("devices are root's")
    blank = base / "blank.img"
    with open(blank, "wb") as file:
        file.truncate(16 << 20)
    with images.attached(blank) as device:
        done("create", device, "--label", "first")
        assert "holds ext4 'first': it is not overwritten" in fails("create", device)
        assert "--size is for images" in fails("create", device, "--size", "1G", code=1)
        assert facts("info", device)["label"] == "first"


# check


def test_check_repairs(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    made = union(base, base / "tree", image)
    made.mount()
    change(base / "mnt")
    ground.run("sync", "-f", base / "mnt")
    if os.geteuid() == 0:
        assert "in use" in fails("check", image, code=8)
    made.kill()
    if os.geteuid() != 0:  # fuse2fs is still writing
        wait_until(lambda: "in use" not in store("check", image).stderr)
    found = store("check", image)
    assert found.returncode == 4
    assert f"/persistent_tree/{ARCH}/.unionfs/owner: the daemon was killed" in found.stdout
    found = store("check", "--repair", image, "--json")
    assert found.returncode == 1, found
    assert all(problem["repaired"] for problem in json.loads(found.stdout)["problems"])
    assert store("check", image).returncode == 0
    with union(base, base / "tree", image):
        check(base / "mnt")


def test_check_of_a_directory_with_bad_marks(base: Path) -> None:
    upper = base / "up"
    upper.mkdir()
    with union(base, base / "tree", upper):
        change(base / "mnt")
    assert store("check", upper).returncode == 0
    os.setxattr(upper / "made", "user.overlay.redirect", b"/../etc")
    (upper / "made/x").touch()
    (upper / "made/.wh.x").touch()
    (upper / ".unionfs/store").write_text("{")
    before = snapshot.take(upper)
    found = store("check", upper)
    assert found.returncode == 4
    assert "/made: user.overlay.redirect: it leaves the layer" in found.stdout
    assert "/made/.wh.x: hides x, which is beside it" in found.stdout
    assert "/.unionfs/store: is damaged" in found.stdout
    assert snapshot.take(upper) == before


@pytest.mark.parametrize("how", ["random", "empty", "missing"])
def test_check_of_what_is_no_store(base: Path, how: str) -> None:
    image = base / "s.img"
    if how != "missing":
        image.write_bytes(os.urandom(1 << 20) if how == "random" else b"")
    assert str(image) in fails("check", image, code=8)
    fails("check", code=16)


def test_check_of_a_damaged_file_system(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    debugfs = find("debugfs")
    if debugfs is None:
        pytest.skip("there is no debugfs")
    ground.run(debugfs, "-w", "-R", "clri <11>", image)  # lost+found
    assert store("check", image).returncode == 4
    assert store("check", "--repair", image).returncode == 1
    assert store("check", image).returncode == 0


# grow


@pytest.mark.parametrize("kind", images.OTHERS_SLOWLY)
def test_grow(base: Path, kind: str) -> None:
    need(kind)
    image = images.make(base / "s.img", kind)
    before = image.stat().st_size
    more = 192 if kind == "btrfs" else 64
    room = facts("info", image)["size"]
    with union(base, base / "tree", image) as made:
        change(base / "mnt")
        size = made.status()["size"]
        assert isinstance(size, int)
        found = store("grow", image, "--size", f"+{more}M")
        if found.returncode == 0:
            grown = made.status()["size"]
            assert isinstance(grown, int)
            assert grown > size + (32 << 20)
        else:
            assert kind == "ext4"
            assert "CAP_SYS_RESOURCE" in found.stderr or "in use" in found.stderr
            assert image.stat().st_size == before
    if image.stat().st_size == before:
        done("grow", image, "--size", f"+{more}M")
    assert image.stat().st_size == before + (more << 20)
    assert facts("info", image)["size"] > room + (32 << 20)
    assert store("check", image).returncode == 0
    with union(base, base / "tree", image):
        check(base / "mnt")
    assert "grow makes it larger" in fails("grow", image, "--size", "1M", code=1)
    if kind == "btrfs":
        small = images.make(base / "small.img", kind)
        assert "256M" in fails("grow", small, "--size", "+64M", code=1)
    assert images.loops_of(image) == []


def test_grow_offline_keeps_owner_and_mode(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    image.chmod(0o640)
    done("grow", image, "--size", "32M")
    assert image.stat().st_mode & 0o777 == 0o640


def test_what_resize2fs_refuses(base: Path) -> None:
    """The way out is no fsck."""
    need("ext4")
    image = images.make(base / "s.img", megabytes=32)
    told = fails("shrink", image, "--size", "1M")
    smallest = re.search("it has more in it than that; write --size ([0-9]+M) or more", told)
    assert smallest is not None, told
    done("shrink", image, "--size", smallest[1])
    assert "check it" not in fails("grow", image, "--size", "4000000T")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_clone_to_a_full_disk(base: Path) -> None:
    (base / "up").mkdir()
    with union(base, base / "tree", base / "up"):
        (base / "mnt/large").write_bytes(os.urandom(8 << 20))
    disk = base / "disk"
    disk.mkdir()
    ground.run("mount", "-t", "tmpfs", "-o", "size=6M", "tmpfs", str(disk))
    try:
        told = fails("clone", base / "up", disk / "s.img", "--size", "64M")
        assert "the disk that it lies on is full" in told
        assert not listing(disk)
        assert "too large" in fails(
            "clone", base / "up", disk / "s.img", "--size", "9999999T", code=1
        )
    finally:
        ground.run("umount", str(disk))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts read-only")
def test_verbs_where_nothing_can_be_written(base: Path) -> None:
    (base / "disk/up").mkdir(parents=True)
    with union(base, base / "tree", base / "disk/up"):
        change(base / "mnt")
    ground.run("mount", "--bind", str(base / "disk"), str(base / "disk"))
    ground.run("mount", "-o", "remount,bind,ro", str(base / "disk"))
    try:
        told = fails("reset", base / "disk/up")
        assert f"cannot write beside {base / 'disk/up'}: Read-only file system" in told
    finally:
        ground.run("umount", str(base / "disk"))


def test_grow_killed(base: Path, shim: Callable[[str], Path]) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    with union(base, base / "tree", image):
        change(base / "mnt")
    before = image.read_bytes()
    killed_at(shim("resize2fs"), "grow", image, "--size", "64M")
    assert image.read_bytes() == before
    done("grow", image, "--size", "64M")
    assert [n for n in listing(base) if n.startswith(".")] == []
