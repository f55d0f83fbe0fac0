# SPDX-License-Identifier: GPL-2.0-or-later
"""Bases that are mounted already: a store knows the file system beneath, wherever it is mounted."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.rig.mounted import program
from tests.rig.waiting import wait_until
from tests.test_boot import RUN, boot, end, is_changed, root, status, write_in
from tests.test_profile_mounts import System
from tests.test_stores import ARCH, base, change, check, label, need, refused, union

__all__ = ["base", "root"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root mounts file systems")


def system(image: Path, tree: Path, name: str = "SYSTEM", kind: str = "ext4") -> Path:
    """A system installed on a file system of its own."""
    need(kind)
    if kind == "squashfs":
        return images.squash(image, tree)
    images.make(image, kind, name)
    point = image.with_suffix(".filled")
    point.mkdir()
    ground.run("mount", "-o", "loop", image, point)
    ground.run("cp", "-a", f"{tree}/.", point)
    if (point / "lost+found").exists():
        (point / "lost+found").rmdir()
    ground.run("umount", point)
    point.rmdir()
    return image


class Slot:
    """Where one system or the other is mounted, as by an initramfs."""

    def __init__(self, point: Path) -> None:
        self.point = point
        self.point.mkdir(exist_ok=True)

    def holds(self, image: Path, *words: str) -> None:
        self.empty()
        ground.run("mount", "-o", "loop,ro", *words, image, self.point)

    def empty(self) -> None:
        for point in reversed(ground.mounts_below(self.point)):
            ground.run("umount", point)


@pytest.fixture
def slot(base: Path) -> Iterator[Slot]:
    made = Slot(base / "slot")
    yield made
    made.empty()


def versions(base: Path, kind: str = "ext4") -> tuple[Path, Path]:
    """Two of them, with one label; the second has a file more."""
    first = system(base / "a.img", base / "tree", kind=kind)
    (base / "tree/second").write_text("in version 2\n")
    second = system(base / "b.img", base / "tree", kind=kind)
    (base / "tree/second").unlink()
    return first, second


def remembered(upper: Path) -> dict[str, str] | None:
    found = json.loads((upper / ".unionfs/store").read_text())["base"]
    assert found is None or isinstance(found, dict)
    return found


def recognized(upper: Path) -> bool:
    """Whether another base could be told from what is remembered; a path is, to be shown."""
    found = remembered(upper)
    return found is not None and any(found[name] for name in ("uuid", "content", "label"))


def number_of(image: Path) -> str:
    return ground.run("blkid", "-p", "-s", "UUID", "-o", "value", image).strip()


# By mount


@pytest.mark.parametrize(
    ("kind", "store"), [("ext4", "directory"), ("btrfs", "image"), ("squashfs", "directory")]
)
def test_another_base_at_the_same_place(base: Path, slot: Slot, kind: str, store: str) -> None:
    first, second = versions(base, kind)
    upper = base / "up"
    if store == "image":
        need("ext4")
        upper = images.make(base / "store.img", "ext4")
    else:
        upper.mkdir()
    slot.holds(first)
    with union(base, slot.point, upper):
        change(base / "mnt")
    if store == "directory":
        found = remembered(upper)
        assert found is not None
        assert found["kind"] == kind
        assert found["uuid"] == number_of(first)
        assert bool(found["content"]) == (kind == "squashfs")

    slot.holds(second)
    said = refused(slot.point, upper, base / "mnt")
    assert "was made over" in said
    assert kind in said
    made = union(base, slot.point, upper, "fallback=tmpfs")
    made.expected = ["runs without its store"]
    with made:
        assert (base / "mnt/file").read_text() == "lower\n"
    made = union(base, slot.point, upper, "on-mismatch=ro")
    made.expected = ["but read-only"]
    with made:
        assert (base / "mnt/file").read_text() == "changed\n"
    with union(base, slot.point, upper, "on-mismatch=ignore"):
        assert (base / "mnt/file").read_text() == "changed\n"
        assert (base / "mnt/second").exists()
    slot.holds(first)
    with union(base, slot.point, upper):
        check(base / "mnt")


def test_the_device_and_where_it_is_mounted_are_one_base(base: Path, slot: Slot) -> None:
    first, second = versions(base)
    (base / "up").mkdir()
    with union(base, first, base / "up"):
        change(base / "mnt")
    slot.holds(first)
    with union(base, slot.point, base / "up"):
        check(base / "mnt")
    assert "was made over" in refused(second, base / "up", base / "mnt")


def test_an_upper_that_knew_no_base_learns_it(base: Path, slot: Slot) -> None:
    """As those do that were made before mounted bases were recognized, in either way."""
    first, second = versions(base)
    upper = base / "up"
    upper.mkdir()
    for before in (None, {"name": "slot", "kind": "directory", "path": str(slot.point)}):
        slot.holds(first)
        with union(base, slot.point, upper):
            pass
        record = json.loads((upper / ".unionfs/store").read_text())
        record["base"] = before and before | {"label": "", "uuid": "", "content": ""}
        (upper / ".unionfs/store").write_text(json.dumps(record))
        with union(base, slot.point, upper):
            pass
        found = remembered(upper)
        assert found is not None
        assert found["uuid"] == number_of(first)
        slot.holds(second)
        assert "was made over" in refused(slot.point, upper, base / "mnt")


def test_a_directory_within_a_file_system_is_no_base_of_its_own(base: Path, slot: Slot) -> None:
    """Nor a part of it that is seen elsewhere: what is around it may be installed anew."""
    first, second = versions(base)
    (base / "up").mkdir()
    (base / "part").mkdir()
    for image in (first, second):
        slot.holds(image)
        ground.run("mount", "--bind", slot.point / "dir", base / "part")
        for lower in (slot.point / "dir", base / "part"):
            with union(base, lower, base / "up"):
                pass
        ground.run("umount", base / "part")
    assert not recognized(base / "up")
    # The whole of it is.
    ground.run("mount", "--bind", slot.point, base / "part")
    with union(base, base / "part", base / "up"):
        pass
    ground.run("umount", base / "part")
    found = remembered(base / "up")
    assert found is not None
    assert found["label"] == "SYSTEM"


@pytest.mark.parametrize("kind", ["btrfs"])
def test_a_subvolume(base: Path, slot: Slot, kind: str) -> None:
    first = system(base / "a.img", base / "tree", kind=kind)
    ground.run("mount", "-o", "loop", first, slot.point)
    ground.run("btrfs", "subvolume", "create", slot.point / "@")
    slot.holds(first, "-o", "subvol=@")
    (base / "up").mkdir()
    with union(base, slot.point, base / "up"):
        pass
    found = remembered(base / "up")
    assert found is not None
    assert found["uuid"] == number_of(first)


def test_a_file_system_of_memory_is_not_recognized(base: Path, slot: Slot) -> None:
    (base / "up").mkdir()
    ground.run("mount", "-t", "tmpfs", "tmpfs", slot.point)
    with union(base, slot.point, base / "up"):
        pass
    assert not recognized(base / "up")


def test_the_directory_is_called_after_the_label(base: Path, slot: Slot) -> None:
    image = images.make(base / "store.img", "ext4")
    slot.holds(system(base / "a.img", base / "tree"))
    with union(base, slot.point, image) as made:
        assert made.status()["upper"] == f"{image}:/persistent_SYSTEM/{ARCH}"
        change(base / "mnt")
    with union(base, base / "a.img", image):
        check(base / "mnt")


def test_what_is_there_under_the_name_of_the_directory_is_used(base: Path, slot: Slot) -> None:
    image = images.make(base / "store.img", "ext4")
    first, second = versions(base)
    slot.holds(first)
    before = f"/persistent_slot/{ARCH}"
    with union(base, slot.point, f"{image}:{before}"):
        change(base / "mnt")
    with union(base, slot.point, image) as made:
        assert made.status()["upper"] == f"{image}:{before}"
        check(base / "mnt")
    # It is known to be the first one's: the second begins anew, under its label.
    slot.holds(second)
    with union(base, slot.point, image) as made:
        assert made.status()["upper"] == f"{image}:/persistent_SYSTEM/{ARCH}"
        assert (base / "mnt/file").read_text() == "lower\n"


def test_encrypting_finds_the_directory_as_a_mount_does(base: Path, slot: Slot) -> None:
    image = images.make(base / "store.img", "ext4")
    key = base / "key"
    key.write_text("a passphrase\n")
    slot.holds(system(base / "a.img", base / "tree"))
    words = (*program(), "store", "encrypt", str(image), "--key-file", str(key), "--base")
    asked = subprocess.run(
        [*words, str(slot.point), "-n"], capture_output=True, text=True, check=False
    )
    assert f"/persistent_SYSTEM/{ARCH}" in asked.stderr + asked.stdout
    with union(base, slot.point, f"{image}:/persistent_slot/{ARCH}"):
        change(base / "mnt")
    assert f"/persistent_slot/{ARCH}" in ground.run(*words, str(slot.point), "-n")


def test_an_image_that_has_another_name_is_the_same_base(base: Path) -> None:
    image = images.make(base / "store.img", "ext4")
    first = system(base / "one.squashfs", base / "tree", kind="squashfs")
    with union(base, first, image):
        change(base / "mnt")
    renamed = first.rename(base / "two.squashfs")
    with union(base, renamed, image) as made:
        assert made.status()["upper"] == f"{image}:/persistent_one/{ARCH}"
        check(base / "mnt")
    (base / "tree/second").write_text("in another system\n")
    system(first, base / "tree", kind="squashfs")
    said = refused(first, image, base / "mnt")
    assert "was made over one (squashfs" in said


def test_a_base_without_a_label_may_be_named_in_all_ways(base: Path) -> None:
    image = images.make(base / "store.img", "ext4")
    first = system(base / "a.img", base / "tree", name="")
    other = ground.run("losetup", "--find", "--show", "--offset", "0", first).strip()
    number = number_of(first)
    try:
        with union(base, other, image) as made:
            assert made.status()["upper"] == f"{image}:/persistent_a/{ARCH}"
            change(base / "mnt")
        for name in (first, other, f"UUID={number}", f"UUID={number.upper()}"):
            with union(base, name, image) as made:
                assert made.status()["upper"] == f"{image}:/persistent_a/{ARCH}"
                check(base / "mnt")
    finally:
        ground.run("losetup", "-d", other)


def test_a_device_without_a_label_is_called_by_its_number(base: Path) -> None:
    """What the kernel calls it is another name on each machine."""
    image = images.make(base / "store.img", "ext4")
    first = system(base / "a.img", base / "tree", name="")
    moved = base / "moved.img"
    with open(moved, "wb") as file:
        file.write(bytes(1 << 20) + first.read_bytes())
    device = ground.run("losetup", "--find", "--show", "-o", str(1 << 20), moved).strip()
    try:
        with union(base, device, image) as made:
            assert made.status()["upper"] == f"{image}:/persistent_{number_of(first)}/{ARCH}"
    finally:
        ground.run("losetup", "-d", device)


def _wait_for_the_next_second() -> None:
    now = int(time.time())
    wait_until(lambda: int(time.time()) > now)


def test_the_last_one_of_several_is_used(base: Path) -> None:
    image = images.make(base / "store.img", "ext4")
    first = system(base / "a.img", base / "tree", name="")
    for name in ("x", "y", "x"):
        with union(base, first, f"{image}:/persistent_{name}/{ARCH}"):
            (base / f"mnt/{name}").touch()
        _wait_for_the_next_second()  # it is told in seconds
    with union(base, first, image) as made:
        assert made.status()["upper"] == f"{image}:/persistent_x/{ARCH}"


# At boot


@pytest.mark.parametrize(("store", "mode"), [("image", "persist"), ("directory", "ro")])
def test_boot_with_another_base(root: Path, place: Path, store: str, mode: str) -> None:
    first = system(place / "a.img", root)
    second = system(place / "b.img", root)
    slot = Slot(root)
    if store == "image":
        changes = str(images.make(place / "store.img", "ext4"))
    else:
        changes = str(place / "changes")
        (place / "changes").mkdir()
    line = f"unionfs.store={changes}"
    slot.holds(first)
    boot(root, line)
    (root / "etc/name").write_text("changed\n")
    (root / "gone").unlink()
    end(root)

    line += f" unionfs.mode={mode}"
    slot.holds(second)
    told = boot(root, line, code=64)
    assert "was made over SYSTEM (ext4" in told
    assert "was made over" in (RUN / "root/degraded").read_text()
    assert not is_changed(root), "it runs in memory, as itself"
    end(root)
    slot.holds(second)
    boot(root, f"{line} unionfs.on-mismatch=ignore")
    assert is_changed(root)
    assert "was made over" in str(status(root)["mismatch"])
    end(root)
    slot.holds(first)
    boot(root, line)
    assert is_changed(root)
    end(root)


def test_boot_finds_what_was_changed_before_its_base_was_called_so(root: Path, place: Path) -> None:
    image = images.make(place / "store.img", "ext4")
    first = system(place / "one.squashfs", root, kind="squashfs")
    slot = Slot(root)
    with looped(first) as device:
        boot(root, f"unionfs.lower={device} unionfs.store={image}")
        (root / "etc/name").write_text("changed\n")
        (root / "gone").unlink()
        end(root)
    renamed = first.rename(place / "two.squashfs")
    slot.holds(renamed)
    boot(root, f"unionfs.store={image}")
    assert is_changed(root)
    assert status(root)["upper"] == f"{image}:/persistent_one/{ARCH}"
    end(root)
    slot.holds(renamed)
    boot(root, f"unionfs.store={image} unionfs.reset")
    assert not is_changed(root), "it was put aside there"
    assert status(root)["upper"] == f"{image}:/persistent_one/{ARCH}"
    end(root)


@contextlib.contextmanager
def looped(image: Path) -> Iterator[str]:
    """A loop device for it."""
    device = ground.run("losetup", "--find", "--show", "--read-only", image).strip()
    try:
        yield device
    finally:
        ground.run("losetup", "-d", device)


def test_boot_does_not_reset_another_base_s_store(root: Path, place: Path) -> None:
    first = system(place / "a.img", root)
    second = system(place / "b.img", root)
    slot = Slot(root)
    (place / "changes").mkdir()
    line = f"unionfs.store={place}/changes"
    slot.holds(first)
    boot(root, line)
    (root / "etc/name").write_text("changed\n")
    end(root)
    slot.holds(second)
    told = boot(root, f"{line} unionfs.reset", code=64)
    assert "the store is not reset" in told
    end(root)
    assert (place / "changes/etc/name").read_text() == "changed\n"
    slot.empty()


def test_boot_with_persistence_over_another_base(root: Path, place: Path) -> None:
    first = system(place / "a.img", root)
    second = system(place / "b.img", root)
    slot = Slot(root)
    name = label()
    store = images.make(place / "store.img", "ext4", name)
    write_in(store, place, "persistence.conf", "/ union\n")
    line = f"persistence persistence-label={name}"
    with images.attached(store):
        slot.holds(first)
        boot(root, line)
        (root / "etc/name").write_text("changed\n")
        end(root)
        for more, code in (("", 64), (" unionfs.on-mismatch=ignore", 0)):
            slot.holds(second)
            told = boot(root, line + more, code=code)
            assert ("was made over SYSTEM" in told) == bool(code)
            assert (root / "etc/name").read_text() == ("lower\n" if code else "changed\n")
            end(root)


# By a profile


def test_a_profile_over_another_base(place: Path) -> None:
    """The whole root refuses; a rule for a part of it does not ask what is around that."""
    made = System(place)
    first, second = (system(place / f"{name}.img", made.top) for name in "ab")
    slot = Slot(place / "sysroot")
    words = f'store = "{made.data}"\noptions = "fallback=tmpfs"\nbase = "/"\n[paths]\n'
    try:
        for rule, binds in (("/", True), ("/etc", False)):
            made.file.write_text(f'{words}"{rule}" = "persist"\n')
            slot.holds(first)
            made.up("--root", str(slot.point))
            (slot.point / "etc/file").write_text("mine\n")
            made.down()
            slot.holds(second)
            told = made.up("--root", str(slot.point))
            assert ("was made over SYSTEM" in told) == binds
            kept = (slot.point / "etc/file").read_text()
            assert kept == ("base etc\n" if binds else "mine\n")
            made.down()
    finally:
        made.clean()
        slot.empty()
