# SPDX-License-Identifier: GPL-2.0-or-later
"""A store that is missing, broken or another base's: what the union does, and where it says so."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.rig.mounted import Unionfs, program
from tests.test_stores import base, change, check, mount, need, refused, union
from unionfs import identity, runtime
from unionfs.errors import UnionfsError
from unionfs.identity import Base

__all__ = ["base"]

SQUASH = Base(name="rootfs", kind="squashfs", path="/a/rootfs.squashfs", content="12")


# The rules


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"content": "1"}, {"content": "1", "path": "/elsewhere"}, True),
        ({"content": "1"}, {"content": "2"}, False),
        ({"uuid": "1", "label": "x"}, {"uuid": "1", "label": "renamed"}, True),
        ({"uuid": "1", "label": "x"}, {"uuid": "2", "label": "x"}, False),
        ({"label": "x"}, {"label": "y", "uuid": "1"}, False),
        ({}, {"uuid": "1"}, True),
        ({"kind": "directory"}, {"kind": "directory", "path": "/b"}, True),
    ],
)
def test_when_a_base_is_another(one: dict[str, str], other: dict[str, str], same: bool) -> None:
    plain = Base(name="x", kind="ext4", path="/x")
    record = identity.new_record(dataclasses.replace(plain, **one))
    found = identity.mismatch(record, dataclasses.replace(plain, **other), "LABEL=s")
    assert (found is None) == same
    if found is not None:
        assert "LABEL=s was made over x" in found.message
        assert "on-mismatch=ignore" in (found.hint or "")


def test_record_is_read_back() -> None:
    for made in (identity.new_record(SQUASH), identity.new_record(None)):
        assert identity.parse_store(made.text(), "p") == made
    assert identity.new_record(None).used_now(SQUASH).base == SQUASH
    other = dataclasses.replace(SQUASH, content="13")
    assert identity.new_record(SQUASH).used_now(other).base == SQUASH, "the first one stays"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"version": 1}',
        '{"version": 1, "uuid": 1, "created": "", "used": "", "base": null}',
        '{"version": 1, "uuid": "", "created": "", "used": "", "base": {}}',
        '{"version": 1, "uuid": "", "created": "", "used": "", "base": [1]}',
        "\x00\x01",
    ],
)
def test_damaged_record(text: str) -> None:
    with pytest.raises(UnionfsError, match="damaged"):
        identity.parse_store(text, "/area/store")


def test_newer_record() -> None:
    with pytest.raises(UnionfsError, match="newer"):
        identity.parse_store('{"version": 2, "what": "ever"}', "/area/store")


@pytest.mark.parametrize(
    ("point", "name"),
    [("/mnt", "mnt"), ("/", "-"), ("/srv/a b-c", r"srv-a\x20b\x2dc"), ("/.x", r"\x2ex")],
)
def test_names_as_systemd_escapes_them(point: str, name: str) -> None:
    assert runtime.name_of(point) == name


# On mounts


def _second(base: Path) -> Path:
    """Another base of the same name."""
    (base / "v2").mkdir()
    (base / "tree/new").write_text("in version 2\n")
    image = images.squash(base / "v2/rootfs.squashfs", base / "tree")
    (base / "tree/new").unlink()
    return image


def _told(made: Unionfs) -> dict[str, object]:
    told = made.status()["degraded"]
    assert isinstance(told, dict)
    return told


@pytest.fixture
def runtime_place(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where /run/unionfs/NAME is for the test's unions."""
    if os.geteuid() == 0:
        return Path(f"/run/unionfs/{runtime.name_of(str(base / 'mnt'))}")
    (base / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / "run"))
    return base / "run/unionfs" / runtime.name_of(str(base / "mnt"))


@pytest.mark.parametrize("how", ["missing", "random", "empty", "directory missing"])
def test_fallback_to_memory(base: Path, runtime_place: Path, how: str) -> None:
    store = base / "store.img"
    if how == "random":
        store.write_bytes(os.urandom(1 << 20))
    elif how == "empty":
        store.touch()
    upper: Path | str = "LABEL=not-there" if how == "missing" else store
    if how == "directory missing":
        upper = base / "no"
    before = store.read_bytes() if store.exists() else b""
    made = union(base, base / "tree", upper, "fallback=tmpfs")
    made.expected = ["runs without its store"]
    with made:
        change(base / "mnt")
        assert _told(made)["fallback"] == "tmpfs"
        line = (runtime_place / "degraded").read_text()
        assert "its changes are in memory and will be lost" in line
        assert str(upper) in line
        assert line.count("\n") == 1
        shown = ground.run(*program(), "status", base / "mnt")
        assert "degraded" in shown
        assert "fallback=tmpfs" in shown
    assert not runtime_place.exists()
    assert (store.read_bytes() if store.exists() else b"") == before


def test_fallback_is_said_to_who_mounts(base: Path, runtime_place: Path) -> None:
    done = mount("-o", "fallback=ro", base / "tree", "LABEL=not-there", base / "mnt")
    assert done.returncode == 0
    assert done.stderr.startswith("unionfs: warning: ")
    assert "read-only" in done.stderr
    try:
        assert runtime_place.exists()
        with pytest.raises(OSError, match="Read-only"):
            (base / "mnt/x").touch()
    finally:
        ground.run(*program(), "umount", base / "mnt")
    assert not runtime_place.exists()


def test_a_killed_daemon_s_word_does_not_stay(base: Path, runtime_place: Path) -> None:
    made = union(base, base / "tree", "LABEL=not-there", "fallback=tmpfs")
    made.mount()
    made.kill()
    assert (runtime_place / "degraded").exists()
    (base / "up").mkdir()
    with union(base, base / "tree", base / "up"):
        assert not runtime_place.exists()


def test_what_is_wrong_elsewhere_is_an_error_all_the_same(base: Path) -> None:
    (base / "up").mkdir()
    for lower, point in ((base / "no", base / "mnt"), (base / "tree", base / "no")):
        said = refused("-o", "fallback=tmpfs", lower, base / "up", point)
        assert f"{base}/no" in said
    assert "LABEL=nowhere" in refused(
        "-o", "fallback=ro", base / "tree", "LABEL=nowhere", base / "no"
    )


def test_another_base_is_refused(base: Path, runtime_place: Path) -> None:
    need("squashfs")
    (base / "up").mkdir()
    first, second = base / "rootfs.squashfs", _second(base)
    made = union(base, first, base / "up")
    with made:
        change(base / "mnt")
        store = made.status()["store"]
        assert isinstance(store, dict)
        assert "rootfs (squashfs, content" in str(store["base"])
    record = base / "up/.unionfs/store"
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    before = identity.parse_store(record.read_text(), "")
    assert before.base is not None
    assert before.base.path == str(first)

    said = refused(second, base / "up", base / "mnt")
    assert f"the store {base}/up was made over rootfs (squashfs" in said
    assert ":/dir" in said
    refused("--ro", second, base / "up", base / "mnt")
    assert identity.parse_store(record.read_text(), "") == before

    other = union(base, second, base / "up", "on-mismatch=ro")
    other.expected = ["shows what its store has, but read-only"]
    with other:
        assert (base / "mnt/file").read_text() == "changed\n"
        assert (base / "mnt/new").read_text() == "in version 2\n"
        with pytest.raises(OSError, match="Read-only"):
            (base / "mnt/x").touch()
        told = _told(other)
        assert (told["on-mismatch"], "fallback" in told) == ("ro", False)
        assert f"on-mismatch=ro: the store {base}/up was made over" in ground.run(
            *program(), "status", base / "mnt"
        )
        line = (runtime_place / "degraded").read_text()
        assert line.startswith(f"{base}/mnt shows what its store has, but read-only: the store")
    memory = union(base, second, base / "up", "fallback=tmpfs")
    memory.expected = ["runs without its store"]
    with memory:
        assert (base / "mnt/file").read_text() == "lower\n"

    third = union(base, second, base / "up", "on-mismatch=ignore")
    with third:
        assert (base / "mnt/new").read_text() == "in version 2\n"
        assert (base / "mnt/file").read_text() == "changed\n"
        (base / "mnt/new").unlink()
        assert "was made over" in str(third.status()["mismatch"])
    after = identity.parse_store(record.read_text(), "")
    assert (after.uuid, after.base) == (before.uuid, before.base)
    with made:
        check(base / "mnt")


def test_plain_directories_are_never_another_base(base: Path) -> None:
    (base / "up").mkdir()
    (base / "tree2").mkdir()
    with union(base, base / "tree", base / "up"):
        change(base / "mnt")
    with union(base, base / "tree2", base / "up"):
        pass
    record = identity.parse_store((base / "up/.unionfs/store").read_text(), "")
    assert record.base is not None
    assert record.base.path == str(base / "tree2"), "the last is remembered, to be told"


def test_damaged_record_on_a_mount(base: Path) -> None:
    (base / "up").mkdir()
    with union(base, base / "tree", base / "up"):
        pass
    (base / "up/.unionfs/store").write_text("{")
    assert "store is damaged" in refused(base / "tree", base / "up", base / "mnt")
