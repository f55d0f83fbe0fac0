# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole way: an initramfs with the files that `--files` lists and no others, switch_root(8),
and a system that works on its root until it is cut off."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images, initramfs
from tests.rig.mounted import program
from tests.rig.sanitized import not_sanitized
from tests.test_stores import label, need

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="a system is booted by root"),
    not_sanitized("the sanitizers' libraries are not in the initramfs"),
]

SYSTEM = ("sh", "cat", "ls", "mkdir", "mv", "rm", "ln", "chmod", "chown", "touch", "sync", "stat")
# What the system's init does in its first start and in each later one.
OPERATIONS = """\
#!/bin/sh
exec 2>&1
cat /etc/name
if [ -e /etc/soft ]; then
    ls -1 /etc /moved/deep; cat /etc/soft; stat -c "%a %u:%g %Y" /etc/kept
    exit
fi
echo changed >/etc/name && echo more >>/etc/long && : >/etc/empty && : >/etc/kept
mkdir -p /new/deep && echo text >/new/deep/file && mv /new /moved && mv /etc/dir /etc/renamed
rm /etc/unwanted && ln /etc/long /etc/hard && ln -s long /etc/soft
chmod 600 /etc/kept && chown 7:8 /etc/kept && touch -d @1 /etc/kept
rm -r /var/spool && mkdir /var/spool && mv /etc/one /etc/other
mkdir /etc; rm /nothing; cat /etc/renamed/below
cat /run/unionfs/root/boot
for process in /proc/[0-9]*; do cat "$process/cmdline"; echo; done | cat -v >/tmp/processes
while read -r line; do case $line in @*) echo "spared ${#line}";; esac; done </tmp/processes
sync
echo end of the first start
"""


@pytest.fixture(scope="module")
def listed() -> list[str]:
    command = [*program(), "boot", "--files"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture
def tree(place: Path, listed: list[str]) -> Iterator[initramfs.Tree]:
    """The initramfs, in memory."""
    need("squashfs")
    top = place / "initramfs"
    top.mkdir()
    ground.run("mount", "-t", "tmpfs", "tmpfs", str(top))
    try:
        made = initramfs.Tree(top)
        fill(made, listed)
        yield made
    finally:
        ground.run("umount", str(top))


def fill(tree: initramfs.Tree, listed: list[str]) -> None:
    """switch_root(8) takes all of it away."""
    tree.make()
    tree.files(listed)
    tree.programs("sh", "mount", "umount", "rmdir", "switch_root")


@pytest.fixture
def base(place: Path) -> Path:
    """The image of a small system."""
    made = initramfs.Tree(place / "system")
    made.make()
    made.programs(*SYSTEM)
    made.script("/sbin/init", OPERATIONS)
    for name in ("name", "long", "kept", "unwanted", "one", "dir/below"):
        path = made.top / "etc" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"lower {name}\n")
    (made.top / "var/spool/old").mkdir(parents=True)
    return images.squash(place / "base.squashfs", made.top)


def start(tree: initramfs.Tree, base: str, boot: str) -> str:
    mount = f"mount -o ro {base} /sysroot || exit 92"
    tree.script("/init", initramfs.INIT.format(mount=mount, boot=boot))
    return initramfs.start(tree).stdout


SECOND = """\
changed
/etc:
empty
hard
kept
long
name
other
renamed
soft

/moved/deep:
file
lower long
more
600 7:8 1
"""


def test_changes_persist(tree: initramfs.Tree, base: Path, place: Path, listed: list[str]) -> None:
    name = label()
    store = images.make(place / "store.img", label=name, megabytes=32)
    boot = f"{' '.join(program())} boot --cmdline 'quiet cow_label={name} cow_directory=here'"
    with images.attached(base) as lower, images.attached(store):
        first = start(tree, lower, boot)
        assert "lower name\n" in first
        assert f"is a union, with changes in LABEL={name}:/here" in first
        assert "lower dir/below\n" in first
        assert "spared" in first, "systemd would kill the daemon"
        assert first.endswith("end of the first start\n"), first
        assert "Input/output error" not in first
        assert not (tree.top / "usr").exists(), "switch_root has not removed the initramfs"
        fill(tree, listed)
        assert start(tree, lower, boot).endswith(SECOND)


def test_store_is_missing(tree: initramfs.Tree, base: Path) -> None:
    boot = (
        f"{' '.join(program())} boot --cmdline 'cow_label={label()} unionfs.timeout=0' || echo $?"
    )
    with images.attached(base) as lower:
        first = start(tree, lower, boot)
    assert "\n64\n" in first
    assert first.count("its changes are in memory and will be lost") == 2, "told, and kept in /run"
    assert first.endswith("end of the first start\n"), first


# As systemd ends a system: what it has not unmounted is read-only, and then the hook is run.
ENDING = """\
#!/bin/sh
exec 2>&1
echo changed >/etc/name
{before}
mount -i -o remount,ro /
sh /hook poweroff
set -- /run/sendsigs.omit.d/unionfs-*
[ -e "$1" ] && echo not told || echo told
cat /etc/name
[ {device} = memory ] || od -A n -t x4 -j 1120 -N 4 {device}
"""
HOOK = Path(__file__).parents[1] / "system/system-shutdown/unionfs"
NEEDS_RECOVERY = 0x4


def ended(tree: initramfs.Tree, place: Path, store: str, device: str, before: str) -> list[str]:
    """What a system has said at its end, which is a power cut."""
    made = initramfs.Tree(place / "system")
    made.make()
    made.programs("sh", "cat", "mount", "od", "sleep")
    made.script("/sbin/init", ENDING.format(device=device, before=before))
    made.script("/hook", HOOK.read_text())
    (made.top / "etc/name").write_text("lower\n")
    base = images.squash(place / "base.squashfs", made.top)
    boot = f"{' '.join(program())} boot --cmdline 'unionfs.store={store} cow_directory=here'"
    with images.attached(base) as lower:
        return start(tree, lower, boot).splitlines()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_the_end_is_clean(tree: initramfs.Tree, place: Path, kind: str) -> None:
    need(kind)
    store = images.make(place / "store.img", kind)
    with images.attached(store) as device:
        said = ended(tree, place, device, device, "")
        told = said.index("told")
        assert said[told + 1] == "changed", "the root can be read to the very end"
        if kind == "ext4":
            assert not int(said[told + 2], 16) & NEEDS_RECOVERY
        look = place / "look"
        look.mkdir()
        ground.run("mount", "-o", "ro", device, look)
        try:
            assert (look / "here/etc/name").read_text() == "changed\n"
            assert (look / "here/.unionfs/format").exists()
            assert not (look / "here/.unionfs/owner").exists()
        finally:
            ground.run("umount", look)


def test_the_end_of_what_is_still_written(tree: initramfs.Tree, place: Path) -> None:
    """Somebody has a file open, so that the root stays writable: it is a power cut, and is so."""
    store = images.make(place / "store.img")
    with images.attached(store) as device:
        said = ended(tree, place, device, device, "exec 3>/etc/open")
        told = said.index("not told")
        assert int(said[told + 2], 16) & NEEDS_RECOVERY
    assert "owner" in ground.run("debugfs", "-R", "ls -p /here/.unionfs", store)


def test_the_end_without_a_store(tree: initramfs.Tree, place: Path) -> None:
    assert "told" in ended(tree, place, "tmpfs", "memory", "")
