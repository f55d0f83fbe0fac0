# SPDX-License-Identifier: GPL-2.0-or-later
"""An upper that another machine has, or has not let go: refused, told, and taken if one says so."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.rig.mounted import program
from tests.test_store_commands import done, facts, fails, store
from tests.test_stores import ARCH, base, change, check, mount, need, refused, union
from unionfs import holder
from unionfs.holder import Owner, parse_owner

__all__ = ["base"]

OTHER = Owner(
    pid=1,
    mountpoint="/there",
    machines=("0" * 32,),
    boot="other-boot",
    host="elsewhere",
    since="2026-01-02T03:04:05+00:00",
)


# The rules


def test_the_record_is_read_back() -> None:
    for owner in (OTHER, holder.here("/mnt"), Owner()):
        assert parse_owner(owner.text()) == owner


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", '{"pid": "x", "machines": [1], "boot": 2}', "\x00"]
)
def test_a_damaged_record_says_nothing(text: str) -> None:
    assert parse_owner(text) == Owner()
    assert not parse_owner(text).elsewhere(OTHER)


def test_an_older_record_says_nothing_of_machines() -> None:
    owner = parse_owner('{"pid": 7, "mountpoint": "/m"}')
    assert (owner.pid, owner.mountpoint) == (7, "/m")
    assert not owner.elsewhere(OTHER)


@pytest.mark.parametrize(
    ("change", "elsewhere"),
    [
        ({}, False),
        ({"boot": "b2", "machines": ("m2",)}, True),
        ({"boot": "b2"}, False),  # this machine, started anew
        ({"machines": ("m2",)}, False),  # this kernel: a container's machine-id
        ({"boot": "b2", "machines": ("m2", "hardware")}, False),  # a new machine-id at each boot
        ({"boot": "b2", "machines": ()}, False),
        ({"boot": "", "machines": ("m2",)}, False),
    ],
)
def test_what_is_another_machine(change: dict[str, object], elsewhere: bool) -> None:
    here = Owner(boot="b1", machines=("m1", "hardware"))
    other = replace(here, **change)  # type: ignore[arg-type]
    assert other.elsewhere(here) == elsewhere
    assert here.elsewhere(other) == elsewhere


def test_this_machine() -> None:
    here = holder.here()
    assert not here.elsewhere(holder.here())
    assert here.boot
    assert len(here.machines) == len(set(here.machines))
    if os.path.exists("/etc/machine-id"):
        told = Path("/etc/machine-id").read_text().strip()
        assert here.machines
        assert told not in here.text(), "it is nobody else's to know"


# On mounts


def need_a_machine() -> None:
    if not holder.here().machines:
        pytest.skip("nothing tells this machine from others (no /etc/machine-id)")


def leave(area: Path, owner: Owner = OTHER) -> None:
    """As another machine that was cut off leaves it."""
    (area / "owner").write_text(owner.text())


@pytest.fixture
def left(base: Path) -> Path:
    """base/up, with changes, in the hands of another machine."""
    need_a_machine()
    (base / "up").mkdir()
    with union(base, base / "tree", base / "up"):
        change(base / "mnt")
        told = json.loads((base / "up/.unionfs/owner").read_text())
        assert told["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert told["host"] == os.uname().nodename
    assert not (base / "up/.unionfs/owner").exists()
    leave(base / "up/.unionfs")
    return base


def test_another_machine_s_is_refused(left: Path) -> None:
    up = left / "up"
    for words in ((), ("--ro",)):
        said = refused(*words, left / "tree", up, left / "mnt")
        assert f"{up} is in use by the machine elsewhere since 2026-01-02T03:04:05+00:00" in said
        assert "-o other-machine=take" in said
        assert f"unionfs store check --repair --take {up}" in said
    assert parse_owner((up / ".unionfs/owner").read_text()) == OTHER
    memory = union(left, left / "tree", up, "fallback=tmpfs")
    memory.expected = ["runs without its store"]
    with memory:
        assert (left / "mnt/file").read_text() == "lower\n"
    assert parse_owner((up / ".unionfs/owner").read_text()) == OTHER


def test_it_is_taken_if_one_says_so(left: Path) -> None:
    made = union(left, left / "tree", left / "up", "other-machine=take")
    with made:
        check(left / "mnt")
        assert "the machine elsewhere since" in str(made.status()["recovered"])
        shown = ground.run(*program(), "status", left / "mnt")
        assert re.search(r"^  recovered +the daemon before", shown, re.MULTILINE)
        assert "the machine elsewhere" in made.words()
    with union(left, left / "tree", left / "up") as again:
        check(left / "mnt")
        assert "recovered" not in again.status()


def test_it_is_freed_by_check(left: Path) -> None:
    up = left / "up"
    found = store("check", up)
    assert found.returncode == 4
    assert "in use by the machine elsewhere since" in found.stdout
    assert "--repair" in fails("check", up, "--take", code=16)
    (up / ".unionfs/work/#1").touch()  # its daemon may need it
    found = store("check", up, "--repair")
    assert found.returncode == 4
    assert (up / ".unionfs/owner").exists()
    assert (up / ".unionfs/work/#1").exists()
    assert store("check", up, "--repair", "--take").returncode == 1
    with union(left, left / "tree", up):
        check(left / "mnt")


def test_other_verbs_keep_off(left: Path) -> None:
    up, saved = left / "up", left / "saved.tar.zst"
    (left / "new").mkdir()
    for words in (("backup", up, saved), ("clone", up, left / "new"), ("reset", up)):
        assert "is in use by the machine elsewhere" in fails(*words)
    assert not saved.exists()
    assert facts("info", up)["uppers"][0]["elsewhere"].startswith("the machine elsewhere")
    assert "the machine elsewhere" in done("info", up)
    assert "the machine elsewhere" in done("list", up)
    store("check", up, "--repair", "--take")
    with union(left, left / "tree", up):
        done("backup", up, saved)
    done("restore", saved, left / "new")
    assert not (left / "new/.unionfs/owner").exists(), "a backup is in nobody's hands"
    (left / "clone").mkdir()
    done("clone", up, left / "clone")
    assert not (left / "clone/.unionfs/owner").exists()


@pytest.mark.parametrize(
    "owner",
    [
        replace(OTHER, machines=holder.here().machines),
        replace(OTHER, boot=holder.here().boot),
        replace(OTHER, machines=()),
        Owner(),
    ],
    ids=["started anew", "container", "unknown", "damaged"],
)
def test_this_machine_s_own_is_taken_by_itself(left: Path, owner: Owner) -> None:
    leave(left / "up/.unionfs", owner)
    with union(left, left / "tree", left / "up") as made:
        check(left / "mnt")
        assert "the daemon before was killed" in str(made.status()["recovered"])


def _dirty(base: Path, kind: str) -> Path:
    """An image as another machine has it that uses it now: its journal not yet replayed."""
    image = images.make(base / "s.img", kind)
    cut = base / "cut.img"
    made = union(base, base / "tree", image)
    with made:
        change(base / "mnt")
        point = _area_of(made)
        leave(point)
        # Not only in the journal, as it is after a while; and then the journal has something new.
        ground.run("sync", "-f", point)
        ground.run("fsfreeze", "-f", point)
        ground.run("fsfreeze", "-u", point)
        (base / "mnt/made/later").touch()
        ground.run("sync", "-f", point)
        ground.run("sync", image)
        ground.run("cp", "--sparse=always", image, cut)
    image.unlink()
    return cut


def _area_of(made: object) -> Path:
    """The area in a store that is mounted nowhere, through the daemon's own descriptors."""
    pid = made.pid  # type: ignore[attr-defined]
    for path in Path(f"/proc/{pid}/fd").iterdir():
        if (path / "owner").exists() and (path / "work").exists():
            return path
    raise AssertionError("the daemon has no area open")


@pytest.mark.parametrize("kind", ["ext4", "xfs", pytest.param("btrfs", marks=pytest.mark.slow)])
def test_a_file_system_in_use_elsewhere_is_not_written_to(base: Path, kind: str) -> None:
    """Not even its journal is replayed."""
    if os.geteuid() != 0:
        pytest.skip("fuse2fs writes no journal")
    need(kind)
    need_a_machine()
    cut = _dirty(base, kind)
    before = images.digest(cut)
    place = f"{cut}:/persistent_tree/{ARCH}"
    said = refused(base / "tree", cut, base / "mnt")
    assert f"{place} is in use by the machine elsewhere" in said
    assert images.digest(cut) == before
    assert "is in use by the machine elsewhere" in refused(
        base / "tree", f"{cut}:/another", base / "mnt"
    )
    for words in (
        ("backup", cut, base / "saved"),
        ("reset", cut),
        ("check", "--repair", cut),
    ):
        assert "elsewhere" in fails(*words, code=8 if words[0] == "check" else 32)
        assert images.digest(cut) == before, words
    assert images.digest(cut) == before
    assert images.loops_of(cut) == []
    with union(base, base / "tree", cut, "other-machine=take", "ro") as made:
        assert (base / "mnt/file").read_text() == "changed\n"
        assert kind == "btrfs" or "WARNING" in made.words(), "its journal is not replayed"
        made.expected = ["was not unmounted; its journal is not replayed"]
    assert images.digest(cut) == before
    with union(base, base / "tree", cut, "other-machine=take"):
        check(base / "mnt")
    with union(base, base / "tree", cut):
        check(base / "mnt")


def test_of_an_image_that_was_unmounted(base: Path) -> None:
    """The record is found once it is mounted: a user's, or one whose file system is clean."""
    need("ext4")
    need_a_machine()
    image = images.make(base / "s.img")
    with union(base, base / "tree", image):
        change(base / "mnt")
    debug = f"/persistent_tree/{ARCH}/.unionfs/owner"
    (base / "owner").write_text(OTHER.text())
    ground.run("debugfs", "-w", "-R", f"write {base}/owner {debug}", image)
    said = refused(base / "tree", image, base / "mnt")
    assert f"{image}:/persistent_tree/{ARCH} is in use by the machine elsewhere" in said
    freed = said.split()[-1]
    assert freed == f"{image}:/persistent_tree/{ARCH}"
    assert store("check", "--repair", "--take", freed).returncode == 1
    with union(base, base / "tree", image):
        check(base / "mnt")
    assert images.loops_of(image) == []


def test_a_kill_here_needs_nothing(base: Path) -> None:
    (base / "up").mkdir()
    made = union(base, base / "tree", base / "up")
    made.mount()
    change(base / "mnt")
    made.kill()
    assert (base / "up/.unionfs/owner").exists()
    with made:
        check(base / "mnt")
        assert mount(base / "tree", base / "up", base / "mnt").returncode == 32
