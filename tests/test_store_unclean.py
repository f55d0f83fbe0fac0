# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store check` of what a power cut left: images copied while they were mounted."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.rig import as_user, ground, images
from tests.rig.mounted import program
from tests.test_store_commands import store
from tests.test_stores import base, change, check, need, union
from unionfs.stores import ext
from unionfs.stores.tools import find

__all__ = ["base"]

_ROOT = os.geteuid() == 0
_KINDS = ["ext4", "xfs", "btrfs"]
_UNREPLAYED = (
    "it was not unmounted; mounting it replays its journal; to check it, mount it first or"
)
_REPLAYED = "it was not unmounted, and its journal has been replayed"


def cut(base: Path, kind: str) -> Path:
    """base/cut.img: as the disk is when the power goes; some of it was synced, and some was not."""
    need(kind)
    if not _ROOT:
        pytest.skip("an ordinary user's stores have no journal")
    image = images.make(base / "s.img", kind, megabytes=320)
    left = base / "cut.img"
    with union(base, base / "tree", image):
        change(base / "mnt")
        ground.run("sync", base / "mnt/file")
        for number in range(20):
            (base / f"mnt/made/later{number}").write_text("not synced\n")
            (base / f"mnt/made/dir{number}").mkdir()
        with open(base / "mnt/synced", "w") as file:
            file.write("synced\n")
            file.flush()
            os.fsync(file.fileno())
        ground.run("cp", "--sparse=always", image, left)
    return left


def said(*words: object, code: int) -> str:
    """What is told of the file system."""
    found = store("check", *words, "--json")
    assert found.returncode == code, found
    assert found.stderr == ""
    told = json.loads(found.stdout)
    assert told["code"] == code
    return str(told["filesystem"])


@pytest.mark.parametrize("kind", _KINDS)
def test_its_journal_is_replayed_first(base: Path, kind: str) -> None:
    image = cut(base, kind)
    before = images.digest(image)
    told = said(image, code=8)
    assert told == f"{kind}: {_UNREPLAYED} use --repair"
    assert images.digest(image) == before
    assert images.loops_of(image) == []
    told = said(image, "--repair", code=1)
    assert re.fullmatch(f"{kind}: (clean|repaired); {_REPLAYED}", told), told
    assert images.loops_of(image) == []
    assert said(image, code=0) == f"{kind}: clean"
    with union(base, base / "tree", image):
        assert (base / "mnt/synced").read_text() == "synced\n"
        assert (base / "mnt/file").read_text() == "changed\n"


@pytest.mark.parametrize("kind", _KINDS)
def test_a_mount_replays_it_too(base: Path, kind: str) -> None:
    image = cut(base, kind)
    with union(base, base / "tree", image):
        assert (base / "mnt/synced").read_text() == "synced\n"
    assert said(image, code=0) == f"{kind}: clean"


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_device_that_was_pulled_out(base: Path, kind: str) -> None:
    image = cut(base, kind)
    with images.attached(image) as device:
        assert said(device, code=8).startswith(f"{kind}: it was not unmounted; ")
        assert said(device, "--repair", code=1).endswith(_REPLAYED)
        assert said(device, code=0) == f"{kind}: clean"


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_user_is_told_whom_to_ask(base: Path, kind: str) -> None:
    image = cut(base, kind)
    if why := as_user.why_impossible():
        pytest.skip(why)
    os.chown(image, as_user.UID, as_user.GID)
    before = images.digest(image)
    for words, told in (
        ([], f"{kind}: {_UNREPLAYED} use --repair\n"),
        (
            ["--repair"],
            f"{kind}: it was not unmounted; mounting it replays its journal, which only root can "
            "do: ask root to check it\n",
        ),
    ):
        done = as_user.run([*program(), "store", "check", str(image), *words])
        assert (done.returncode, done.stdout, done.stderr) == (8, told, "")
    assert images.digest(image) == before


def _spoil(image: Path, offset: int, length: int) -> None:
    with open(image, "r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * length)


def test_a_log_that_cannot_be_replayed(base: Path) -> None:
    image = cut(base, "xfs")
    with open(image, "rb") as file:
        block = file.read(512)
    size = int.from_bytes(block[4:8])
    start, per_group = int.from_bytes(block[48:56]), int.from_bytes(block[84:88])
    shift = block[124]
    offset = ((start >> shift) * per_group + (start & ((1 << shift) - 1))) * size
    _spoil(image, offset, int.from_bytes(block[96:100]) * size)
    assert said(image, code=4).startswith("xfs: damaged (Log inconsistent")
    told = said(image, "--repair", code=12)
    assert told.startswith("xfs: it was not unmounted, and its journal cannot be replayed (cannot ")
    assert told.endswith(f"; xfs_repair -L {image} gives up what is in it")
    assert images.loops_of(image) == []


def test_a_journal_for_a_user_too(base: Path) -> None:
    """debugfs writes one as the kernel does: here with a block that must become what it says."""
    need("ext4")
    debugfs = find("debugfs")
    if debugfs is None:
        pytest.skip("there is no debugfs")
    image = images.make(base / "s.img")
    with union(base, base / "tree", image):
        change(base / "mnt")
        (base / "mnt/journal").write_bytes(b"old" * 1000)
    inside = f"/persistent_tree/{os.uname().machine}/journal"
    (block,) = ground.run(debugfs, "-R", f"blocks {inside}", image).split()
    (base / "block").write_bytes(b"new " * 1024)
    (base / "commands").write_text(f"jo\njw -b {block} {base}/block\njc\n")
    ground.run(debugfs, "-w", "-f", base / "commands", image)
    assert ext.has_journal_to_replay(str(image))
    before = images.digest(image)
    assert said(image, code=8) == f"ext4: {_UNREPLAYED} use --repair"
    assert images.digest(image) == before
    assert said(image, "--repair", code=1).endswith(_REPLAYED)
    assert said(image, code=0) == "ext4: clean"
    with union(base, base / "tree", image):
        assert (base / "mnt/journal").read_bytes() == (b"new " * 1024)[:3000]
        (base / "mnt/journal").unlink()
        check(base / "mnt")


@pytest.mark.parametrize(
    ("kind", "edit", "told"),
    [
        ("ext4", (4096, 4096), "Corrupt group descriptor: bad block for block bitmap"),
        ("ext4", (1024 + 0x58, 2), "ext2fs_open2: Superblock checksum does not match superblock"),
        ("xfs", (512, 512), "agf has bad CRC for ag 0"),
        ("xfs", (224, 4), "bad primary superblock - bad CRC in superblock !!!"),
    ],
)
def test_what_fsck_says(base: Path, kind: str, edit: tuple[int, int], told: str) -> None:
    """A line that says something, not its last."""
    from unionfs.stores.checking import Report, check_filesystem
    from unionfs.stores.probe import Contents

    image = images.make(base / "s.img", kind)
    _spoil(image, *edit)
    report = Report()
    check_filesystem(Contents(str(image), kind), report, repair=False)
    assert told in report.filesystem
    assert report.code & 12


def test_a_truncated_ext4_is_not_clean(base: Path) -> None:
    """e2fsck -n ends with 0 where a part of the file system is not there."""
    need("ext4")
    image = images.make(base / "s.img")
    os.truncate(image, image.stat().st_size // 2)
    for words in ([], ["--repair"]):
        assert "damaged" in said(image, *words, code=4)
        assert "is truncated" in said(image, *words, code=4)
    e2fsck = find("e2fsck")
    assert e2fsck
    assert subprocess.run([e2fsck, "-fn", image], capture_output=True, check=False).returncode == 0
