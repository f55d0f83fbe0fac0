# SPDX-License-Identifier: GPL-2.0-or-later
"""How layers are named: the grammar, and what it means among the options; no mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unionfs import locator
from unionfs.errors import UnionfsError
from unionfs.options import MountOptions, OptionReader
from unionfs.stores import base, find
from unionfs.stores.loop import _real_device
from unionfs.stores.probe import Contents


@pytest.mark.parametrize(
    ("text", "tag", "value", "inside"),
    [
        ("LABEL=persist", "LABEL", "persist", None),
        ("LABEL=persist:/a/b", "LABEL", "persist", "/a/b"),
        ("LABEL=persist:/", "LABEL", "persist", "/"),
        ("LABEL=persist://a/../b/", "LABEL", "persist", "/b"),
        ('LABEL="my stick"', "LABEL", "my stick", None),
        ('LABEL="a:/b":/c', "LABEL", "a:/b", "/c"),
        (r"LABEL=my\x20stick", "LABEL", "my stick", None),
        (r"LABEL=a\x3a/b:/c", "LABEL", "a:/b", "/c"),
        (r"LABEL=\xc3\xbc", "LABEL", "ü", None),
        ("LABEL=q\"uo'te", "LABEL", "q\"uo'te", None),
        ("LABEL=a:b", "LABEL", "a:b", None),
        ("UUID=0-1", "UUID", "0-1", None),
        ("PARTLABEL=x y", "PARTLABEL", "x y", None),
        ("PARTUUID=1", "PARTUUID", "1", None),
        ("/dev/sdz9:/dir", None, "/dev/sdz9", "/dir"),
        ("/nowhere/x.img", None, "/nowhere/x.img", None),
    ],
)
def test_grammar(text: str, tag: str | None, value: str, inside: str | None) -> None:
    where = locator.parse(text)
    assert (where.tag, where.value, where.directory) == (tag, value, inside)


def test_path_with_a_directory_inside(tmp_path: Path) -> None:
    image = tmp_path / "x.img"
    image.touch()
    assert locator.parse(f"{image}:/a").directory == "/a"
    assert not locator.is_directory(f"{image}:/a")
    assert not locator.is_directory(str(image))
    strange = tmp_path / "x.img:"
    (strange / "a").mkdir(parents=True)
    assert locator.parse(f"{image}:/a").value == f"{image}:/a", "a path that exists stays whole"
    assert locator.is_directory(f"{image}:/a")
    assert locator.is_directory(str(tmp_path))


def test_what_is_a_directory() -> None:
    assert locator.is_directory("/nowhere/at/all"), "the checks say what is wrong with it"
    assert not locator.is_directory("/dev/not-there-yet"), "it may be waited for"
    assert not locator.is_directory("LABEL=x")
    assert locator.is_directory("./LABEL=x")


def _options(*places: str, words: str = "") -> MountOptions:
    reader = OptionReader()
    if words:
        reader.take(words)
    reader.place(places, source_first=False)
    return reader.build()


def test_tags_stay_as_they_are_written() -> None:
    options = _options("LABEL=base", "LABEL=persist:/dir", "/mnt")
    assert options.lowers == ("LABEL=base",)
    assert options.upper == "LABEL=persist:/dir"
    assert _options(r"LABEL=base\:/dir", "/mnt").lowers == ("LABEL=base:/dir",)


def test_relative_paths_with_a_directory_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert _options("/l", "x.img:/dir", "/mnt").upper == "/x.img:/dir"


@pytest.mark.parametrize(
    ("text", "size"), [("tmpfs:", None), ("tmpfs:size=1G", "1G"), ("tmpfs:size=50%", "50%")]
)
def test_memory(text: str, size: str | None) -> None:
    options = _options("/l", text, "/mnt")
    assert options.ephemeral
    assert options.ephemeral_size == size
    assert options.upper is None


@pytest.mark.parametrize("text", ["tmpfs:size=", "tmpfs:size=-1", "tmpfs:1G", "tmpfs:size=0"])
def test_memory_misspelt(text: str) -> None:
    with pytest.raises(UnionfsError, match=r"size|tmpfs"):
        _options("/l", text, "/mnt")


def test_timeouts_are_two_options() -> None:
    options = _options("/l", "LABEL=u", "/mnt", words="timeout=1,device-timeout=2.5")
    assert (options.timeout, options.device_timeout) == (1, 2.5)
    assert _options("/l", "/mnt", words="search=images").search == "images"
    with pytest.raises(UnionfsError, match="search=all"):
        _options("/l", "/mnt", words="search=all")


@pytest.mark.parametrize(
    ("path", "label", "name"),
    [
        ("/x/rootfs.squashfs", "", "rootfs"),
        ("/x/rootfs.squashfs", "SYSTEM v2", "SYSTEM v2"),
        ("/srv/base", "", "base"),
        ("/srv/base/", "", "base"),
        ("/", "", "root"),
        ("/x/.img", "", ".img"),
        ("/x/a.img", "a/../b", "a_.._b"),
        ("/x/a.img", "..", "root"),
    ],
)
def test_the_default_directory_is_called_after_the_base(path: str, label: str, name: str) -> None:
    found = base.base_name(locator.Locator(path, path), Contents(path, label=label))
    assert found == name


def test_numbers_of_devices() -> None:
    for major, minor in ((254, 0), (8, 17), (259, 70000), (0, 41)):
        encoded = (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12
        assert _real_device(encoded) == os.makedev(major, minor)


def _devices(monkeypatch: pytest.MonkeyPatch, *devices: Contents) -> None:
    known = {contents.path: contents for contents in devices}
    monkeypatch.setattr(find, "block_devices", lambda: iter(known))
    monkeypatch.setattr(find, "probe", known.__getitem__)


def test_tags_of_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Contents("/dev/a1", "ext4", "same", "AB-CD", partlabel="p x", partuuid="12-ef")
    two = Contents("/dev/a2", "ext4", "other", "00-00", partlabel="same", partuuid="12-00")
    _devices(monkeypatch, one, two)
    assert find.look("PARTLABEL", "p x", "devices") == "/dev/a1"
    assert find.look("PARTUUID", "12-EF", "devices") == "/dev/a1"
    assert find.look("PARTLABEL", "same", "devices") == "/dev/a2"
    assert find.look("LABEL", "same", "devices") == "/dev/a1"
    assert find.look("UUID", "ab-cd", "devices") == "/dev/a1"
    assert find.look("LABEL", "Same", "devices") is None


def test_a_file_system_of_several_devices_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [Contents(f"/dev/{i}", "btrfs", "x", "u", member=f"m{i}") for i in range(3)]
    _devices(monkeypatch, *members)
    assert find.look("LABEL", "x", "devices") == "/dev/0"
    copies = [Contents(f"/dev/{i}", "btrfs", "x", "u", member="m") for i in range(2)]
    _devices(monkeypatch, *copies)
    with pytest.raises(UnionfsError, match="/dev/0 and /dev/1 have it"):
        find.look("LABEL", "x", "devices")


def test_what_is_nobody_s_store_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(path: str) -> Contents:
        if path == "/dev/bad":
            raise UnionfsError("it could be several things")
        return Contents(path, "ext4", "x")

    monkeypatch.setattr(find, "block_devices", lambda: iter(["/dev/bad", "/dev/good"]))
    monkeypatch.setattr(find, "probe", probe)
    assert find.look("LABEL", "x", "devices") == "/dev/good"


@pytest.mark.parametrize("text", ["", ":/", ":/dir", "LABEL=", "UUID=:/dir", 'LABEL=""'])
def test_what_names_nothing(text: str) -> None:
    with pytest.raises(UnionfsError) as caught:
        locator.parse(text)
    assert caught.value.code == 1
