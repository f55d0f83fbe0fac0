# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs boot` where only parts of the root persist: persistence.conf with the other words of
live-boot beside it, and a profile with the other words of the command line beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images, snapshot
from tests.test_boot import RUN, boot, change, end, image, is_changed, root, status
from tests.test_stores import label, need

__all__ = ["image", "root"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a system is booted by root")

CONF = "/etc union,source=settings\n/home bind\n/srv link\n"


def fill(image: Path, place: Path, files: dict[str, str]) -> None:
    """Put files into a store."""
    point = place / "inside"
    point.mkdir(exist_ok=True)
    with images.attached(image) as device:
        ground.run("mount", device, str(point))
        for name, text in files.items():
            (point / name).parent.mkdir(parents=True, exist_ok=True)
            (point / name).write_text(text)
        ground.run("umount", str(point))


def label_of(image: Path) -> str:
    return ground.run("blkid", "-p", "-s", "LABEL", "-o", "value", str(image)).strip()


@pytest.fixture
def line(root: Path, image: Path) -> Iterator[str]:
    """What asks for the store of the image, for a root with some content."""
    for name in ("home/me", "srv"):
        (root / name).mkdir(parents=True)
    (root / "home/me/kept").write_text("lower\n")
    name = label_of(image)
    with images.attached(image):
        yield f"boot=live persistence persistence-label={name} unionfs.timeout=0"


def test_store_is_only_read(root: Path, image: Path, place: Path, line: str) -> None:
    """What persists is seen, and what changes is gone, for each rule of the file."""
    fill(image, place, {"persistence.conf": CONF, "srv/linked": "stored\n"})
    boot(root, line)
    (root / "etc/name").write_text("changed\n")
    (root / "home/me/mine").write_text("mine\n")
    (root / "home/me/kept").unlink()
    end(root)
    end(RUN / "root")  # where the links point to
    before = images.digest(image)
    for _ in range(2):
        told = boot(root, f"{line} persistence-read-only overlay-size=8M")
        assert "over what persists where LABEL=" in told
        assert not (RUN / "root/degraded").exists()
        assert (root / "etc/name").read_text() == "changed\n"
        assert sorted(os.listdir(root / "home/me")) == ["mine"], "a bind is what the store has"
        assert (root / "srv/linked").read_text() == "stored\n"
        for part in ("", "etc", "home"):
            found = os.statvfs(root / part)
            assert found.f_blocks * found.f_frsize == 8 << 20
        for name in ("etc/name", "etc/new", "home/me/mine", "home/me/new", "srv/linked", "new"):
            (root / name).write_text("again\n")
        end(root)
        end(RUN / "root")
    assert images.digest(image) == before


def test_what_a_store_that_is_only_read_does_not_have(
    root: Path, image: Path, place: Path, line: str
) -> None:
    """It is not made there: the base is seen."""
    fill(image, place, {"persistence.conf": "/ union\n/home bind\n"})
    before = images.digest(image)
    boot(root, f"{line} persistence-read-only")
    assert ground.mounts_below(root) == [str(root)]
    assert (root / "home/me/kept").read_text() == "lower\n"
    change(root)
    end(root)
    assert images.digest(image) == before


def test_lines_that_are_skipped_are_told_of(
    root: Path, image: Path, place: Path, line: str
) -> None:
    """With all else that a boot says; and a file that nothing is left of is none."""
    fill(image, place, {"persistence.conf": "/etc union\n/srv loud\n"})
    skipped = "persistence.conf:2: the option loud is unknown: skipped"
    assert boot(root, line).count(skipped) == 1
    assert f"warning: {skipped}\n" in (RUN / "root/boot").read_text()
    end(root)
    fill(image, place, {"persistence.conf": "# /etc union\n/ bind\n"})
    assert "names nothing that persists" in boot(root, line, code=64)
    assert "nothing that persists" in (RUN / "root/degraded").read_text()
    end(root)


def test_links_in_the_root(root: Path, image: Path, place: Path, line: str) -> None:
    """They lie in memory, as the rest of the root does: the base has none afterwards."""
    before = snapshot.take(root)
    fill(image, place, {"persistence.conf": "/ link,source=files\n", "files/etc/linked": "x\n"})
    boot(root, f"{line} overlay-size=8M")
    assert (root / "etc/linked").read_text() == "x\n"
    (root / "new").touch()
    found = os.statvfs(root)
    assert found.f_blocks * found.f_frsize == 8 << 20
    end(root)
    end(RUN / "root")
    snapshot.assert_same(before, snapshot.take(root), "the base")


@pytest.mark.parametrize("word", ["nopersistence", "unionfs.mode=ram", "overlayroot=tmpfs"])
def test_no_persistence(root: Path, image: Path, place: Path, line: str, word: str) -> None:
    fill(image, place, {"persistence.conf": "/ union\n"})
    for words in (line, "persistence unionfs.timeout=0"):  # the store need not be there
        boot(root, f"{words} {word} unionfs.fallback=fail")
        assert "persistence =" not in boot(root, f"{words} {word}", "-n")
        assert not (RUN / "root/degraded").exists()
        change(root)
        end(root)
        assert not is_changed(root)


def test_persistence_path(root: Path, image: Path, place: Path, line: str) -> None:
    """Both the file and what it names lie there."""
    told = boot(root, f"{line} persistence-path=/live", "-n")
    assert f"with changes in memory on {root}\n" in told
    assert f"what persistence.conf in LABEL={label_of(image)}:/live names persists" in told
    files = {"persistence.conf": "/home bind\n", "live/persistence.conf": "/etc union\n"}
    fill(image, place, files)
    for changed in (False, True):
        boot(root, f"{line} persistence-path=/live")
        assert ((root / "etc/name").read_text() == "changed\n") == changed
        (root / "etc/name").write_text("changed\n")
        (root / "home/me/mine").write_text("mine\n")
        end(root)
    point = place / "inside"
    ground.run("mount", "-o", "loop,ro", image, point)
    assert (point / "live/etc/rw/name").read_text() == "changed\n"
    assert not (point / "home").exists()
    assert not (point / "etc").exists()
    ground.run("umount", point)
    told = boot(root, f"{line} persistence-path=/none", code=64)
    assert "has no persistence.conf in /none: No such file" in told


def test_reset(root: Path, image: Path, place: Path, line: str) -> None:
    """Of what is a union; what is none is told of."""
    fill(image, place, {"persistence.conf": CONF})
    boot(root, line)
    (root / "etc/name").write_text("changed\n")
    (root / "home/me/mine").write_text("mine\n")
    end(root)
    told = boot(root, f"{line} rd.overlay.reset")
    assert "its changes are kept in" in told
    assert "rd.overlay.reset: without effect on /home, /srv, which are no unions" in told
    assert (root / "etc/name").read_text() == "lower\n"
    assert (root / "home/me/mine").exists()
    end(root)
    told = boot(root, f"{line} rd.overlay.reset persistence-read-only")
    assert "rd.overlay.reset: without effect, as nothing is written to a store" in told


def test_flags(root: Path, image: Path, place: Path, line: str) -> None:
    fill(image, place, {"persistence.conf": CONF})
    boot(root, f"{line} cow_flags=noatime,nodiratime")
    rows = Path("/proc/mounts").read_text().splitlines()
    (mount,) = [row for row in rows if f" {root}/home " in row]
    assert ",noatime,nodiratime" in mount
    end(root)
    told = boot(root, f"{line} cow_flags=nofial", code=64)
    assert "Unknown parameter 'nofial'" in told


def test_base_in_memory(root: Path, image: Path, place: Path, line: str) -> None:
    """As without persistence.conf: the medium may be taken out."""
    need("squashfs")
    fill(image, place, {"persistence.conf": CONF})
    lower = images.squash(place / "base.squashfs", root)
    point = place / "point"
    point.mkdir()
    for turn in range(2):
        boot(point, f"{line} unionfs.lower={lower}" + " toram" * turn)
        assert ((point / "etc/name").read_text() == "changed\n") == bool(turn)
        if turn:
            os.truncate(lower, 0)
        assert (point / "gone").read_text() == "lower\n"
        assert (point / "home/me/kept").read_text() == "lower\n"
        (point / "etc/name").write_text("changed\n")
        (point / "gone").unlink()
        end(point)
    assert not (RUN / "toram").exists()


def test_base_in_memory_without_the_store(root: Path, place: Path) -> None:
    """The medium may be taken out then, too."""
    need("squashfs")
    lower = images.squash(place / "base.squashfs", root)
    point = place / "point"
    point.mkdir()
    line = f"persistence persistence-label={label()} unionfs.timeout=0 toram"
    told = boot(point, f"{line} unionfs.lower={lower}", code=64)
    assert "is copied to memory" in told
    os.truncate(lower, 0)
    change(point)
    assert is_changed(point)
    end(point)


@pytest.mark.parametrize("word", ["unionfs.mode=ro", "cow_persistent=N"])
def test_words_about_writing_where_nothing_is_written(root: Path, image: Path, word: str) -> None:
    boot(root, f"cow_device={image}")
    end(root)
    told = boot(root, f"cow_device={image} {word} cow_flags=noatime unionfs.reset")
    for idle in ("cow_flags=noatime", "unionfs.reset"):
        assert told.count(f"{idle}: without effect, as nothing is written to a store") == 1


# A profile, with words beside it


def write_profile(root: Path, text: str) -> None:
    (root / "etc/unionfs").mkdir(exist_ok=True)
    (root / "etc/unionfs/kiosk.toml").write_text(text)
    (root / "home").mkdir(exist_ok=True)


@pytest.mark.parametrize("said", ["", 'options = "fallback=ro"\n'])
def test_profile_without_its_store(root: Path, said: str) -> None:
    """It is waited for once, and the fallback of a boot is memory, unless the profile has one."""
    rules = '"/home" = "persist"\n"/etc" = "persist"\n'
    write_profile(root, f'store = "LABEL={label()}"\n{said}[paths]\n{rules}')
    start = time.monotonic()
    told = boot(root, "unionfs.profile=kiosk unionfs.timeout=1", code=64)
    assert 1 <= time.monotonic() - start < 15
    assert "no device has LABEL" in told
    for name in ("root", "kiosk"):
        assert "no device has LABEL" in (RUN / name / "degraded").read_text()
    degraded = status(root / "home")["degraded"]
    assert isinstance(degraded, dict)
    assert degraded["fallback"] == ("ro" if said else "tmpfs")
    end(root)
    told = boot(root, "unionfs.profile=kiosk unionfs.timeout=0 unionfs.fallback=fail", code=32)
    assert "no device has LABEL" in told
    assert not ground.mounts_below(root)


def test_profile_waits_as_long_as_it_says(root: Path) -> None:
    options = 'options = "device-timeout=0,fallback=tmpfs"\n'
    write_profile(root, f'store = "LABEL={label()}"\n{options}[paths]\n"/home" = "persist"\n')
    start = time.monotonic()
    boot(root, "unionfs.profile=kiosk", code=64)
    assert time.monotonic() - start < 15


def test_options_beside_a_profile(root: Path, place: Path) -> None:
    """They win over the profile's own, and over a rule's."""
    (place / "changes").mkdir()
    options = 'options = "on-mismatch=refuse,fallback=fail"\n'
    rule = '"/home" = { kind = "persist", options = "fsname=rule" }\n'
    write_profile(root, f'store = "{place}/changes"\n{options}[paths]\n{rule}')
    boot(root, "unionfs.profile=kiosk unionfs.options=fsname=line unionfs.on-mismatch=ignore")
    assert f"line {root}/home fuse.unionfs" in Path("/proc/mounts").read_text()


def test_words_without_effect_beside_a_profile(root: Path, place: Path) -> None:
    (place / "changes").mkdir()
    text = f'store = "{place}/changes"\n[paths]\n'
    write_profile(root, f'{text}"/home" = "persist"\n')
    idle = "unionfs.reset, rd.live.ram: without effect beside unionfs.profile=kiosk"
    line = "unionfs.profile=kiosk unionfs.reset rd.live.ram unionfs.timeout=0"
    assert boot(root, line).count(idle) == 1
    end(root)
    told = boot(root, line, "-n")
    assert idle in told
    assert "reset = " not in told
    assert "timeout = 0.0" in told
    # Here they are for the union of the root.
    assert "without effect beside" not in boot(root, f"{line} overlayroot=tmpfs")
    end(root)
    write_profile(root, f'{text}"/" = "persist"\n"/home" = "tmpfs"\n')
    told = boot(root, "unionfs.profile=kiosk unionfs.mode=ro")
    assert "unionfs.mode=ro: without effect beside unionfs.profile=kiosk" in told
    change(root)
    end(root)
    boot(root, "unionfs.profile=kiosk")
    assert is_changed(root)
