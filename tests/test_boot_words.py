# SPDX-License-Identifier: GPL-2.0-or-later
"""Each word of the kernel's command line, booted on a real device: what is mounted is what it says.

How words are read is in test_cmdline.py. What takes more than one boot to see is in test_boot.py
(encryption, copies in memory, fallbacks) and in the files beside it; here is what a single word or
alias says of the store, the memory and the flags.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.test_boot import INSIDE, boot, end, is_changed, root, status
from tests.test_boot_layouts import named
from tests.test_stores import need
from unionfs.boot.readers import no_effect
from unionfs.boot.words import WORDS

__all__ = ["root"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a system is booted by root")

LABEL = "writable"  # casper's, which no word changes
# Directories of the store in which `etc/name` and `gone` are changed.
UPPERS = (INSIDE, "own", "rw", "live/rw")
_ST_NOATIME = 1024  # bits/statvfs.h


@dataclass(frozen=True)
class Case:
    """A line, {0} the store's device and {1} its label, and what it makes.

    upper: the directory in the store; None: no store. only_read: it is beneath memory. changed: it
    has the changes of before. size: of the memory, in MiB. noatime: how the store is mounted.
    """

    line: str
    upper: str | None = INSIDE
    only_read: bool = False
    changed: bool = True
    size: int | None = None
    noatime: bool = False
    source: str | None = None


def memory(line: str, size: int | None = None) -> Case:
    return Case(line, upper=None, changed=False, size=size)


LIVE = "persistence persistence-label={1}"
CASES = [
    # Our own.
    Case("unionfs.store={0}"),
    Case("unionfs.store={0}:/own", "own"),
    Case("unionfs.store={0} unionfs.dir=own", "own"),
    Case("unionfs.store={0} unionfs.flags=noatime", noatime=True),
    memory("unionfs.size=8M", 8),
    memory("unionfs.mode=ram unionfs.store={0}"),
    Case("unionfs.mode=ro unionfs.store={0} unionfs.size=8M", only_read=True, size=8),
    Case("unionfs.store={0} unionfs.options=fsname=chosen", source="chosen"),
    Case("unionfs.store={0} unionfs.reset", changed=False),
    # archiso
    Case("cow_label={1}"),
    Case("cow_device={0} cow_directory=/own", "own"),
    Case("cow_device={0} cow_flags=noatime", noatime=True),
    memory("cow_spacesize=8M", 8),
    Case("cow_label={1} cow_persistent=P"),
    memory("cow_label={1} cow_persistent=N"),
    # dracut
    memory("rd.overlay"),
    Case("rd.overlay={0}:/own", "own"),
    Case("rd.overlay=LABEL={1} rd.overlay.readonly", only_read=True),
    Case("rd.overlay=LABEL={1} rd.overlay.reset", changed=False),
    Case("rd.live.overlay=LABEL={1}:/own rd.live.overlay.readonly", "own", only_read=True),
    Case("rd.live.overlay={0} rd.live.overlay.reset", changed=False),
    memory("rd.live.overlay=1 rd.live.overlay.size=8", 8),
    # live-boot
    Case(LIVE, "rw"),
    Case(f"{LIVE} persistence-path=/live", "live/rw"),
    Case(f"{LIVE} persistence-read-only overlay-size=8M", "rw", only_read=True, size=8),
    Case(f"{LIVE} persistence-encryption=none", "rw"),
    memory(f"{LIVE} nopersistence"),
    # casper
    Case("persistent"),
    Case("persistent persistent-path=own", "own"),
    memory("persistent nopersistent"),
    # overlayroot
    memory("overlayroot=tmpfs:size=8M", 8),
    Case("overlayroot=device:dev={0},dir=own", "own"),
    # Yocto's
    Case("overlayrootrwdev={0} overlayrootfsflags=noatime", noatime=True),
    Case("rootrw={0}"),
    # Slax, and Porteus
    Case("perchdir={0}/own", "own"),
    memory("overlayroot=tmpfs perchsize=8", 8),
    Case("changes=LABEL:{1}/own", "own"),
    # systemd
    memory("systemd.volatile=overlay"),
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with changes in each of the directories, as kernel overlayfs writes them."""
    need("ext4")
    place = tmp_path_factory.mktemp("words")
    tree = place / "tree"
    for upper in UPPERS:
        (tree / upper / "etc").mkdir(parents=True)
        (tree / upper / "etc/name").write_text("changed\n")
        os.mknod(tree / upper / "gone", stat.S_IFCHR, os.makedev(0, 0))
    for top in ("", "live"):
        (tree / top / "persistence.conf").write_text("/ union,source=.\n")
    image = place / "store.img"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    ground.run("mkfs.ext4", "-q", "-F", "-b", "4096", "-d", tree, image)
    return image


@pytest.fixture
def store(filled: Path, place: Path) -> Path:
    ground.run("cp", "--sparse=always", filled, place / "store.img")
    return place / "store.img"


@pytest.fixture
def device(store: Path) -> Iterator[str]:
    with named(store, LABEL) as found:
        yield found


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: case.line.replace("{", "").replace("}", "")
)
def test_what_is_mounted(root: Path, store: Path, device: str, case: Case, place: Path) -> None:
    before = images.digest(store)
    boot(root, case.line.format(device, LABEL) + " unionfs.timeout=0")
    assert is_changed(root) == case.changed
    facts = status(root)
    assert case.source in (None, facts["source"])
    in_memory = case.upper is None or case.only_read
    assert facts["ephemeral"] == in_memory
    lowers = facts["lowers"]
    assert isinstance(lowers, list)
    place_of_changes = lowers[0] if case.only_read else facts["upper"]
    assert str(place_of_changes).endswith(f":/{case.upper}" if case.upper else "(memory)")
    if case.size is not None:
        assert facts["size"] == case.size << 20
    if not in_memory:
        assert is_noatime(facts["pid"], device) == case.noatime
    (root / "more").touch()
    end(root)
    kept = not in_memory
    assert (images.digest(store) == before) != kept
    assert has(store, place, f"{case.upper}/more") == kept


def is_noatime(pid: object, device: str) -> bool:
    """How the daemon has mounted a device, where nobody else sees it."""
    number = os.stat(device).st_rdev
    opened = [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    found = {os.statvfs(path).f_flag & _ST_NOATIME for path in opened if is_on(path, number)}
    assert len(found) == 1, "all that is open of it is on one mount"
    return found != {0}


def is_on(path: str, number: int) -> bool:
    try:
        return os.stat(path).st_dev == number
    except OSError:
        return False


def has(image: Path, place: Path, name: str) -> bool:
    point = place / "inside"
    point.mkdir()
    ground.run("mount", "-o", "loop,ro", image, point)
    try:
        return (point / name).exists()
    finally:
        ground.run("umount", point)


def test_each_word_is_booted() -> None:
    """Here or in the files beside: those that say something of what is mounted."""
    text = " ".join(case.line for case in CASES)
    for path in Path(__file__).parent.glob("test_boot*.py"):
        if path != Path(__file__):
            text += path.read_text()
    words = [word for word, reader in WORDS.items() if reader is not no_effect]
    missing = [w for w in words if not re.search(rf"(?<![\w.-]){re.escape(w)}(?![\w.-])", text)]
    assert missing == []
