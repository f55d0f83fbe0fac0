# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store list` and `info` of what is mounted: by the union that has it, and as it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.rig import ground, images
from tests.rig.mounted import program
from tests.test_store_commands import done, facts, fails, store
from tests.test_stores import base, change, check, label, mount, need, union
from unionfs.cli.stores import configured
from unionfs.stores.inspect import find_stores

__all__ = ["base"]

ARCH = os.uname().machine
UPPER = f"/persistent_tree/{ARCH}"
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="devices are root's")


def listed(place: Path) -> list[dict[str, Any]]:
    """What `list` finds by itself, of the stores below a place of ours."""
    found = json.loads(store("list", "--json").stdout)
    return [one for one in found if str(one["path"]).startswith(f"{place}/")]


def test_the_directory_of_a_mounted_union(base: Path) -> None:
    up = base / "up"
    up.mkdir()
    assert listed(base) == []
    with union(base, base / "tree", up):
        change(base / "mnt")
        (found,) = listed(base)
        assert (found["kind"], found["path"]) == ("directory", str(up))
        (upper,) = found["uppers"]
        assert upper["mounted"] == str(base / "mnt")
        assert upper["base"]["path"] == str(base / "tree")
        assert str(base / "tree") in done("list", up)
    assert listed(base) == []
    assert facts("info", up)["uppers"][0]["base"]["path"] == str(base / "tree"), "it is remembered"
    assert str(base / "tree") in done("info", up)


def test_a_base_that_is_known_takes_the_place_of_one_that_is_not(base: Path) -> None:
    """A directory cannot be told from another."""
    need("squashfs")
    up = base / "up"
    up.mkdir()
    for lower, kind in ((base / "tree", "directory"), (base / "rootfs.squashfs", "squashfs")):
        with union(base, lower, up):
            assert kind in facts("info", up)["uppers"][0]["base"]["told"]
    with union(base, base / "tree", up):
        assert "squashfs" in facts("info", up)["uppers"][0]["base"]["told"]


def test_a_copy_is_not_what_is_mounted(base: Path) -> None:
    """Though it has the same id."""
    need("ext4")
    image = images.make(base / "s.img")
    with union(base, base / "tree", image):
        change(base / "mnt")
    shutil.copyfile(image, base / "copy.img")
    with union(base, base / "tree", image):
        (there,) = facts("info", image)["uppers"]
        (copy,) = facts("info", base / "copy.img")["uppers"]
    assert there["id"] == copy["id"]
    assert (there["mounted"], copy["mounted"]) == (str(base / "mnt"), None)


def test_an_image_that_a_union_has(base: Path) -> None:
    """That of a user is fuse2fs's alone, which is joined."""
    need("ext4")
    image = images.make(base / "s.img", label="my stick", megabytes=32)
    with union(base, base / "tree", image):
        change(base / "mnt")
    before = facts("info", image)
    with union(base, base / "tree", image) as made:
        said = facts("info", image)
        for name in ("kind", "path", "fstype", "label", "uuid", "size", "problem"):
            assert said[name] == before[name]
        assert 0 < said["free"] <= said["size"]
        (upper,) = said["uppers"]
        assert upper["mounted"] == str(base / "mnt")
        for name in ("directory", "id", "created", "base"):
            assert upper[name] == before["uppers"][0][name]
        assert facts("list", image)[0]["uppers"][0]["mounted"] == str(base / "mnt")
        assert [one["path"] for one in listed(base)] == [str(image)], "not its loop device"
        shown = done("list", image)
        assert "my stick" in shown
        assert str(base / "mnt") in shown
        assert made.status()["upper"] == f"{image}:{UPPER}"
    assert facts("info", image) | {"allocated": 0, "free": 0, "used": 0, "uppers": []} == {
        **before,
        **{"allocated": 0, "free": 0, "used": 0, "uppers": []},
    }


def test_an_image_that_several_unions_have(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    points = [base / "mnt", base / "mnt2"]
    points[1].mkdir()
    with union(base, base / "tree", f"{image}:/c"):
        change(points[0])
    with union(base, base / "tree", f"{image}:/a"):
        assert mount(base / "tree", f"{image}:/b", points[1]).returncode == 0
        told = {u["directory"]: u["mounted"] for u in facts("info", image)["uppers"]}
        assert told == {"/a": str(points[0]), "/b": str(points[1]), "/c": None}
        assert facts("list", image)[0]["uppers"] == facts("info", image)["uppers"]
        said = fails("shrink", image, "--size", "16M")
        assert f"by the unions at {points[0]}, {points[1]}" in said
        assert "; unmount them first" in said
        ground.run(*program(), "umount", points[1])


def test_who_has_what_a_verb_wants(base: Path) -> None:
    """It is said where it is mounted, and how that is ended."""
    need("ext4")
    image = images.make(base / "s.img", megabytes=32)
    up = base / "up"
    up.mkdir()
    (base / "new").mkdir()
    for upper in (image, up):
        with union(base, base / "tree", upper):
            change(base / "mnt")
            verbs: list[list[object]] = [["reset", upper], ["clone", upper, base / "new"]]
            if upper == image:
                verbs += [["shrink", upper, "--size", "16M"]]
                if os.geteuid() != 0:
                    verbs += [["grow", upper, "--size", "64M"]]
            for words in verbs:
                said = fails(*words)
                assert f"is in use by the union at {base / 'mnt'}" in said
                assert str(upper) in said
                assert f"unionfs umount {base / 'mnt'}" in said
            checked = store("check", upper)
            if checked.returncode:  # root may look at a directory that is in use
                assert f"{upper} is in use by the union at {base / 'mnt'}" in checked.stderr
        with union(base, base / "tree", upper):
            check(base / "mnt")


@root_only
def test_two_devices_with_one_uuid(base: Path) -> None:
    """Both are told of; an image and its loop device are one."""
    need("ext4")
    (base / "a").mkdir()
    (base / "b").mkdir()
    name = label()
    one = images.make(base / "a/s.img", label=name)
    with union(base, base / "tree", one):
        change(base / "mnt")
    shutil.copyfile(one, base / "b/s.img")
    with images.attached(one), images.attached(base / "b/s.img") as device:
        found = sorted(str(x["path"]) for x in facts("list") if x["label"] == name)
        assert found == [str(one), str(base / "b/s.img")]
        assert [x["path"] for x in facts("list", device)] == [device], "as it was named"
        with union(base, base / "tree", device):
            (told,) = [x for x in facts("list") if x["path"] == str(base / "b/s.img")]
            assert told["uppers"][0]["mounted"] == str(base / "mnt")
            (other,) = [x for x in facts("list") if x["path"] == str(one)]
            assert other["uppers"][0]["mounted"] is None


@root_only
@pytest.mark.slow
def test_a_btrfs_of_two_devices_is_one(base: Path) -> None:
    need("btrfs")
    name = label()
    for number in "ab":
        with open(base / number, "wb") as file:
            file.truncate(128 << 20)
    with images.attached(base / "a") as first, images.attached(base / "b") as second:
        ground.run("mkfs.btrfs", "-q", "-f", "-L", name, first, second)
        with union(base, base / "tree", first):
            change(base / "mnt")
            assert len([x for x in facts("list") if x["label"] == name]) == 1


def test_what_profiles_and_fstab_name(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories and images anywhere, that are not mounted now."""
    (base / "data/of one").mkdir(parents=True)
    (base / "conf").mkdir()
    (base / "up").mkdir()
    for upper in (base / "data/of one", base / "up"):
        with union(base, base / "tree", upper):
            change(base / "mnt")
    (base / "conf/one.toml").write_text(
        f'base = "{base}/tree"\nstore = "{base}/data"\n[paths]\n"/dir" = "persist"\n'
    )
    (base / "conf/wrong.toml").write_text("base = 7\n")
    (base / "conf/all@.toml").write_text("")
    (base / "fstab").write_text(
        f"# {base}/no {base}/mnt unionfs upperdir={base}/commented 0 0\n"
        f"{base}/tree {base}/mnt unionfs upperdir={base}/up,nofail 0 0\n"
        f"{base}/tree {base}/mnt fuse.unionfs upperdir={base}/data/of\\040one 0 0\n"
        f"{base}/tree {base}/mnt unionfs upperdir={base}/nowhere 0 0\n"
        f"{base}/tree {base}/mnt unionfs bad=,upperdir={base}/bad 0 0\n"
        "UUID=1 / ext4 errors=remount-ro 0 1\n\nshort line\n"
    )
    monkeypatch.setattr("unionfs.profiles.files.directories", lambda root="/": [f"{base}/conf"])
    named = list(configured.stores(f"{base}/fstab"))
    assert named == [f"{base}/data", f"{base}/up", f"{base}/data/of one"]
    assert list(configured.stores(f"{base}/none")) == [f"{base}/data"]
    found = [s for s in find_stores([], named) if s.path.startswith(f"{base}/")]
    assert [s.path for s in found] == [f"{base}/data", f"{base}/up"]
    assert [u.directory for u in found[0].uppers] == ["/of one"]
    shown = done("list", base / "up")
    assert "KIND" in shown
    assert "directory" in shown


def test_a_profile_of_ones_own(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        pytest.skip("root's profiles are the system's")
    (base / "conf/unionfs").mkdir(parents=True)
    (base / "up").mkdir()
    with union(base, base / "tree", base / "up"):
        change(base / "mnt")
    (base / "conf/unionfs/one.toml").write_text(
        f'base = "{base}/tree"\nstore = "{base}/up"\n[paths]\n"/dir" = "persist"\n'
    )
    monkeypatch.setenv("XDG_CONFIG_HOME", f"{base}/conf")
    assert [one["path"] for one in listed(base)] == [f"{base}/up"]
