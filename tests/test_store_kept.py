# SPDX-License-Identifier: GPL-2.0-or-later
"""What `unionfs store` keeps of changes that it takes away: seen, never taken for the store itself,
never replaced, and forgotten when that is asked for."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images, secret
from tests.test_store_commands import done, facts, fails, listing
from tests.test_stores import base, change, check, need, refused, union
from unionfs.stores import kept

__all__ = ["base"]

ARCH = os.uname().machine
UPPER = f"/persistent_tree/{ARCH}"
KEPT = re.compile(rf"{UPPER}\.before-[0-9]{{8}}-[0-9]{{6}}")


@contextlib.contextmanager
def place_of(base: Path, kind: str) -> Iterator[str]:
    """An image, or a loop device on one, with changes in it."""
    need("ext4")
    image = images.make(base / "s.img", megabytes=32)
    with contextlib.ExitStack() as stack:
        if kind == "device":
            if os.geteuid() != 0:
                pytest.skip("devices are root's")
            place = stack.enter_context(images.attached(image))
        else:
            place = str(image)
        with union(base, base / "tree", place):
            change(base / "mnt")
        yield place


def only(place: object) -> dict[str, object]:
    """What `info` tells of the one upper in a store."""
    (upper,) = facts("info", place)["uppers"]
    assert isinstance(upper, dict)
    return upper


def kept_in(place: object) -> list[str]:
    """The directories that are kept."""
    found = only(place)["kept"]
    assert isinstance(found, list)
    return [item["directory"] for item in found]


def seen_as_kept(base: Path, place: str, *, times: int = 1) -> list[str]:
    """What was kept is told of as such, and no verb takes it for the store."""
    names = kept_in(place)
    assert len(names) == times
    assert all(KEPT.fullmatch(name) for name in names)
    assert only(place)["directory"] == UPPER
    (listed,) = facts("list", place)
    assert [upper["directory"] for upper in listed["uppers"]] == [UPPER]
    shown = done("list", place)
    assert all(re.search(rf"{re.escape(name)} +\(kept\)", shown) for name in names)
    told = done("info", place)
    assert all(re.search(rf"kept +{re.escape(name)} of 20", told) for name in names)
    done("check", place)
    for number, name in enumerate(names):  # and can be had by its name
        done("backup", f"{place}:{name}", base / f"kept{number}-{len(listing(base))}")
    return names


DEVICE = pytest.param("device", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "mounted"),
    [
        ("image", False),
        ("device", True),
        pytest.param("image", True, marks=pytest.mark.slow),
        pytest.param("device", False, marks=pytest.mark.slow),
    ],
)
def test_reset_and_what_is_done_then(base: Path, kind: str, mounted: bool) -> None:
    with place_of(base, kind) as place:
        done("backup", place, base / "saved")
        done("reset", place)
        if mounted:
            with union(base, base / "tree", place):
                assert (base / "mnt/gone").exists()
        (name,) = seen_as_kept(base, place)
        done("backup", place, base / "empty")
        (base / "clone").mkdir()
        done("clone", place, base / "clone")
        with union(base, base / "tree", base / "clone"):
            assert (base / "mnt/gone").exists(), "that of the store, not of what is kept"
        done("restore", base / "saved", place)
        assert kept_in(place) == [name]
        for upper in (place, f"{place}:{name}"):
            with union(base, base / "tree", upper):
                check(base / "mnt")
        done("restore", base / "empty", place)
        with union(base, base / "tree", place):
            assert (base / "mnt/gone").exists()
        with union(base, base / "tree", f"{place}:{name}"):
            check(base / "mnt")


def test_a_reset_by_those_before(base: Path) -> None:
    """Which left a directory without anything in it: that is the store nevertheless."""
    with place_of(base, "image") as place:
        done("backup", place, base / "saved")
        done("reset", place)
        (name,) = kept_in(place)
        for what in (f"rm {UPPER}/.unionfs/store", f"rmdir {UPPER}/.unionfs"):
            ground.run("debugfs", "-w", "-R", what, place)
        assert kept_in(place) == [name]
        assert only(place)["id"] is None
        done("restore", base / "saved", place)
        for upper in (place, f"{place}:{name}"):
            with union(base, base / "tree", upper):
                check(base / "mnt")
        assert kept_in(place) == [name]


@pytest.mark.parametrize("kind", ["image", DEVICE])
def test_restore_that_keeps(base: Path, kind: str) -> None:
    with place_of(base, kind) as place:
        done("backup", place, base / "saved")
        for number in (1, 2):
            said = done("restore", "--keep", base / "saved", place)
            assert ".before-" in said
            seen_as_kept(base, place, times=number)
        with union(base, base / "tree", place):
            check(base / "mnt")


@pytest.mark.skipif(bool(secret.why_not()), reason=secret.why_not() or "-")
@pytest.mark.parametrize("kind", ["image", DEVICE])
def test_encrypt_and_what_is_done_then(base: Path, kind: str) -> None:
    key = secret.key_file(base)
    with place_of(base, kind) as place:
        done("encrypt", place, "--key-file", key)
        names = kept_in(place)
        assert len(names) == 1
        assert only(place)["encrypted"] == "gocryptfs"
        done("check", place, "--key-file", key)
        done("backup", place, base / "saved")
        done("reset", place)
        assert len(kept_in(place)) == 2
        assert "encrypted" in done("info", place)
        done("restore", base / "saved", place)
        assert len(kept_in(place)) == 2
        with union(base, base / "tree", place, f"key-file={key}"):
            check(base / "mnt")
        with union(base, base / "tree", f"{place}:{names[0]}"):
            check(base / "mnt")
        kinds = [item["encrypted"] for item in facts("info", place)["uppers"][0]["kept"]]
        assert sorted(map(str, kinds)) == ["None", "gocryptfs"]


def test_in_a_directory(base: Path) -> None:
    up = base / "up"
    up.mkdir()
    with union(base, base / "tree", up):
        change(base / "mnt")
        (base / "mnt/made.before-20200101-000000").mkdir()
    done("reset", up, "/file")
    done("reset", up)
    done("reset", up)
    names = kept_in(up)
    assert len(names) == 2
    assert all(name.startswith("../up.before-2") for name in names)
    assert str(base / names[0][3:]) in done("info", up)
    own = only(base / names[0][3:])
    assert own["kept"] == [
        {
            "directory": f"/.unionfs/{p.name}",
            "date": kept.told(p.name.removeprefix("reset-")),
            "size": p.stat().st_blocks * 512 + (p / "0-file").stat().st_blocks * 512,
            "encrypted": None,
        }
        for p in (base / names[0][3:]).glob(".unionfs/reset-*")
    ], "not what the union has of such a name"


@pytest.mark.parametrize("encrypted", ["", "with the key", "without"])
def test_a_reset_store_is_the_same_and_of_the_same_base(base: Path, encrypted: str) -> None:
    need("squashfs")
    if encrypted and secret.why_not():
        pytest.skip(secret.why_not())
    (base / "tree/more").write_text("another")
    other = images.squash(base / "other.squashfs", base / "tree")
    up = base / "up"
    up.mkdir()
    with union(base, base / "rootfs.squashfs", up) as made:
        change(base / "mnt")
        was = made.status()["store"]
    keys: list[str] = []
    words: list[object] = []
    if encrypted:
        key = secret.key_file(base)
        done("encrypt", up, "--key-file", key)
        keys = [f"key-file={key}"]
        words = ["--key-file", key] if encrypted == "with the key" else []
    done("reset", up, *words)
    if encrypted != "without":
        options = [word for option in keys for word in ("-o", option)]
        assert "was made over rootfs" in refused(other, up, base / "mnt", *options)
    lower = other if encrypted == "without" else base / "rootfs.squashfs"
    with union(base, lower, up, *keys) as made:
        assert (base / "mnt/gone").exists()
        store = made.status()["store"]
        assert isinstance(store, dict)
        assert isinstance(was, dict)
        assert (store["id"] == was["id"]) == (encrypted != "without")
        if encrypted != "without":
            assert store["created"] == was["created"]


def test_a_reset_of_what_was_never_mounted(base: Path) -> None:
    (base / "up").mkdir()
    done("reset", base / "up", "--discard")
    number = only(base / "up")["id"]
    assert number is not None
    with union(base, base / "tree", base / "up") as made:
        store = made.status()["store"]
        assert isinstance(store, dict)
        assert store["id"] == number


# Forgotten


@pytest.mark.parametrize("kind", ["image", DEVICE, "directory"])
def test_forget(base: Path, kind: str) -> None:
    with contextlib.ExitStack() as stack:
        if kind == "directory":
            (base / "up").mkdir()
            place = str(base / "up")
            with union(base, base / "tree", place):
                change(base / "mnt")
                (base / "mnt/large").write_bytes(bytes(1 << 20))
        else:
            place = stack.enter_context(place_of(base, kind))
        assert "nothing is kept" in done("reset", place, "--forget")
        done("reset", place, "/file")
        done("backup", place, base / "saved")
        done("reset", place)
        done("restore", "--keep", base / "saved", place)
        found = only(place)["kept"]
        assert isinstance(found, list)
        assert len(found) == 3, "two, and the paths that came back with the backup"
        if kind == "directory":
            assert max(item["size"] for item in found) > 1 << 20
        assert done("reset", place, "--forget", "-n").count("would be forgotten") == 3
        assert "keeps nothing of 1999" in fails("reset", place, "--forget", "1999")
        one = next(item for item in found if "before" in item["directory"])
        said = done("reset", place, "--forget", one["date"])
        assert one["directory"].removeprefix("..") in said
        assert one["directory"] not in kept_in(place)
        assert len(kept_in(place)) >= 1
        done("reset", place, "--forget")
        assert kept_in(place) == []
        with union(base, base / "tree", place):
            assert (base / "mnt/file").read_text() == "lower\n", "as it was reset"
            assert not (base / "mnt/gone").exists()
        for words in (["/file"], ["--discard"]):
            assert "stands alone" in fails("reset", place, *words, "--forget", code=1)


@pytest.mark.parametrize("kind", ["image", "directory"])
def test_forget_while_it_is_mounted(base: Path, kind: str) -> None:
    """As what a kernel's command line keeps at each boot, of the root itself."""
    with contextlib.ExitStack() as stack:
        if kind == "directory":
            (base / "up").mkdir()
            place = str(base / "up")
            with union(base, base / "tree", place):
                change(base / "mnt")
        else:
            if os.geteuid() != 0:
                pytest.skip("an image of a user's is that of fuse2fs alone")
            place = stack.enter_context(place_of(base, kind))
        done("reset", place, "/file")
        done("reset", place)
        name = kept_in(place)[0]
        where = str(base / name[3:]) if kind == "directory" else f"{place}:{name}"
        with union(base, base / "tree", where):
            said = fails("reset", place, "--forget")
            assert f"is in use by the union at {base / 'mnt'}" in said
        with union(base, base / "tree", place):
            change(base / "mnt")
            assert "is forgotten" in done("reset", place, "--forget")
        assert kept_in(place) == []
        with union(base, base / "tree", place):
            check(base / "mnt")


@pytest.mark.skipif(bool(secret.why_not()), reason=secret.why_not() or "-")
def test_forget_of_an_encrypted_one(base: Path) -> None:
    up = base / "up"
    up.mkdir()
    key = secret.key_file(base)
    with union(base, base / "tree", up):
        change(base / "mnt")
    done("encrypt", up, "--key-file", key)
    done("reset", up, "/file", "--key-file", key)
    assert "before" in done("reset", up, "--forget")
    assert list(base.glob("up.before-*")) == []
    assert "nothing is kept" in done("reset", up, "--forget"), "that can be seen"
    assert "reset-" in done("reset", up, "--forget", "--key-file", key)
    with union(base, base / "tree", up, f"key-file={key}"):
        assert (base / "mnt/file").read_text() == "lower\n"


def test_names() -> None:
    assert kept.split("up.before-20260102-030405") == ("up", "20260102-030405")
    assert kept.split("a.before-20260102-030405.before-20270102-030405") == ("a", "20270102-030405")
    for other in ("up", "up.before-2026", "up.before-20260102-030405x", ".before-20260102-030405"):
        assert kept.split(other) is None
    assert kept.of(["a.before-20270102-030405", "a.b.before-20260102-030405"], "a") == [
        "a.before-20270102-030405"
    ]
    assert kept.told("20260102-030405") == "2026-01-02T03:04:05"
    assert kept.told("20269902-030405") == "20269902-030405"
    assert kept.is_temporary(".up.0123abcd.restore")
    assert kept.temporaries([".a.b.0123abcd.restore"], "a", kept.NEW) == [], "it is that of a.b"


def test_a_name_that_is_taken(base: Path) -> None:
    """What is kept within one second has two names."""
    fd = os.open(base, os.O_RDONLY)
    try:
        for _ in range(3):
            os.mkdir(kept.new_name(fd, "up"), dir_fd=fd)
    finally:
        os.close(fd)
    assert len(kept.of(listing(base), "up")) == 3
