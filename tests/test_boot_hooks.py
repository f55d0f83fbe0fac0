# SPDX-License-Identifier: GPL-2.0-or-later
"""The hooks in system/: initramfses that initramfs-tools and dracut make with them, started.

Those are installed by apt-get into an overlay over this machine's root, which is thrown away.
mkinitcpio is not in Debian: its hooks are run with functions that stand for its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images, initramfs
from tests.rig.mounted import program
from tests.test_boot_initramfs import SECOND, base
from tests.test_stores import label
from unionfs.stores.tools import find

__all__ = ["base"]

SYSTEM = Path(__file__).parents[1] / "system"
VERSION = "1.0-test"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a system is booted by root")


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """This machine's root with both tools, for a kernel that has no modules."""
    place = tmp_path_factory.mktemp("debian")
    with ground.Ground() as own:
        ground.run("mount", "-t", "tmpfs", "tmpfs", str(place))
        own.later(lambda: ground.run("umount", str(place)))
        for name in ("up", "work", "root"):
            (place / name).mkdir()
        words = f"lowerdir=/,upperdir={place}/up,workdir={place}/work"
        root = place / "root"
        ground.run("mount", "-t", "overlay", "overlay", "-o", words, str(root))
        own.later(lambda: ground.run("umount", "-R", str(root)))
        ground.run("mount", "-t", "proc", "proc", str(root / "proc"))
        ground.run("mount", "--bind", "/dev", str(root / "dev"))
        ground.run("mount", "-t", "tmpfs", "tmpfs", str(root / "run"))
        install = "apt-get install -y -q --no-install-recommends initramfs-tools-core dracut-core"
        done = inside(root, f"DEBIAN_FRONTEND=noninteractive {install} busybox")
        if done.returncode:
            pytest.skip(f"apt-get cannot install the tools: {done.stdout.splitlines()[-1:]}")
        modules = root / "lib/modules" / VERSION
        modules.mkdir(parents=True)
        for name in ("modules.order", "modules.builtin"):
            (modules / name).touch()
        (root / "boot" / f"config-{VERSION}").write_text("CONFIG_RD_GZIP=y\n")
        assert inside(root, f"depmod {VERSION}").returncode == 0
        yield root


def inside(root: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["chroot", root, "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "UNIONFS": program()[0]},
    )


INIT = """\
#!/bin/sh
mkdir -p /proc /sys /dev /run {root}; mount -t proc proc /proc; umount -l /old
mount -t sysfs sysfs /sys; mount -t tmpfs tmpfs /run; mount -t devtmpfs dev /dev
mount -o bind /cmdline /proc/cmdline
mount -t squashfs -o ro {base} {root}
{hook}
for point in run dev sys proc; do mount -o move /$point {root}/$point; done
exec {leave} {root} /sbin/init
"""


def boot_twice(made: Path, base: Path, place: Path, *, root: str, hook: str, leave: str) -> None:
    """Start the system from an initramfs, twice with one store and once without."""
    name = label()
    store = images.make(place / "store.img", label=name, megabytes=32)
    with images.attached(base) as lower, images.attached(store):
        ends = [
            (name, "end of the first start\n"),
            (name, SECOND),
            ("", "end of the first start\n"),
        ]
        for wanted, end in ends:
            told = _boot(
                made,
                place,
                wanted or label(),
                INIT.format(root=root, base=lower, hook=hook, leave=leave),
            )
            assert told.endswith(end), told
            assert ("its changes are in memory" in told) == (not wanted), told


def _boot(made: Path, place: Path, wanted: str, init: str) -> str:
    top = place / "initramfs"
    top.mkdir(exist_ok=True)
    ground.run("mount", "-t", "tmpfs", "tmpfs", str(top))
    try:
        ground.run("cp", "-a", f"{made}/.", str(top))
        tree = initramfs.Tree(top)
        (top / "cmdline").write_text(f"quiet cow_label={wanted} unionfs.timeout=0\n")
        tree.script("/init", init)
        return initramfs.start(tree).stdout
    finally:
        ground.run("umount", str(top))


@pytest.mark.slow
@needs_root
def test_initramfs_tools(debian: Path, base: Path, place: Path) -> None:
    ours = SYSTEM / "initramfs-tools"
    etc = debian / "etc/initramfs-tools"
    shutil.copytree(ours, etc, dirs_exist_ok=True)
    others = etc / "scripts/init-bottom/udev"
    others.write_text("#!/bin/sh\n")
    others.chmod(0o755)
    done = inside(debian, f"mkinitramfs -o /i.img {VERSION} && unmkinitramfs /i.img /initramfs")
    assert done.returncode == 0, done.stdout
    made = debian / "initramfs"
    order = (made / "scripts/init-bottom/ORDER").read_text()
    assert order.index("/00unionfs") < order.index("/udev"), "udev's takes /dev away"
    hook = "export rootmnt=/root quiet=y panic=; /scripts/init-bottom/00unionfs"
    boot_twice(made, base, place, root="/root", hook=hook, leave="run-init")


@pytest.mark.slow
@needs_root
def test_dracut(debian: Path, base: Path, place: Path) -> None:
    module = debian / "usr/lib/dracut/modules.d/90unionfs"
    shutil.copytree(SYSTEM / "dracut/90unionfs", module)
    words = f"--no-kernel --force --kver {VERSION} -m 'base unionfs'"
    done = inside(debian, f"dracut {words} /d.img && mkdir /d && cd /d && lsinitrd --unpack /d.img")
    assert done.returncode == 0, done.stdout
    hook = "NEWROOT=/sysroot; . /lib/dracut/hooks/pre-pivot/10-unionfs-mount.sh"
    boot_twice(debian / "d", base, place, root="/sysroot", hook=hook, leave="switch_root")


@pytest.mark.slow
@needs_root
def test_dracut_with_systemd(debian: Path) -> None:
    """There it is a unit, which is there once the root is mounted and before fstab's mounts."""
    module = debian / "usr/lib/dracut/modules.d/90unionfs"
    shutil.copytree(SYSTEM / "dracut/90unionfs", module, dirs_exist_ok=True)
    units = "lib/systemd/system"
    text = (SYSTEM / "unionfs-boot.service").read_text().replace("@UNIONFS@", "/usr/bin/unionfs")
    (debian / units / "unionfs-boot.service").write_text(text)
    words = f"--no-kernel --force --kver {VERSION} -m 'systemd-initrd dracut-systemd base unionfs'"
    done = inside(debian, f"dracut {words} /s.img && mkdir /s && cd /s && lsinitrd --unpack /s.img")
    assert done.returncode == 0, done.stdout
    made = debian / "s"
    link = made / units / "initrd-root-fs.target.requires/unionfs-boot.service"
    assert link.readlink() == Path("../unionfs-boot.service")
    assert (link.parent / link.readlink()).read_text() == text
    assert not (made / "lib/dracut/hooks/pre-pivot/10-unionfs-mount.sh").exists()
    script = (made / "usr/bin/unionfs").readlink()
    assert (made / str(script).lstrip("/")).exists()


def sh(text: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", textwrap.dedent(text), "bash", *words]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "UNIONFS": program()[0]},
    )


@pytest.mark.parametrize("systemd", [False, True])
def test_mkinitcpio_install(tmp_path: Path, systemd: bool) -> None:
    """Each file is added once, programs as such; where units run, ours is one of them."""
    units = tmp_path / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    if systemd:
        (units / "initrd-root-fs.target").touch()
    done = sh(
        """\
        export BUILDROOT=$2 UNIONFS_UNITS=$3
        error() { echo "error $*"; }
        add_file() { echo "file $*"; }
        add_binary() { echo "binary $*"; }
        add_symlink() { echo "link $*"; }
        add_module() { echo "module $*"; }
        add_runscript() { echo script; }
        map() { local f=$1; shift; for word; do "$f" "$word"; done; }
        . "$1" && build && help >/dev/null
        """,
        str(SYSTEM / "mkinitcpio/install/unionfs"),
        str(tmp_path),
        str(SYSTEM),
    )
    assert done.returncode == 0, done
    listed = subprocess.run(
        [*program(), "boot", "--files"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in ("cryptsetup", "gocryptfs"):  # as far as they are installed
        assert find(name) in (None, *listed)
    lines = done.stdout.splitlines()
    last = lines.pop()
    if systemd:
        link = "/usr/lib/systemd/system/initrd-root-fs.target.requires/unionfs-boot.service"
        assert last == f"link {link} ../unionfs-boot.service"
        assert lines.pop().startswith(f"file {SYSTEM}/unionfs-boot.service /usr/lib/systemd/")
    else:
        assert last == "script"
    assert [line.split(" ")[1] for line in lines if line.startswith(("file", "binary"))] == listed
    assert "module fuse" in lines
    text = (".py", ".pyc", ".pth", ".cfg")
    assert all(
        line.endswith(text) == line.startswith("file")
        for line in lines
        if " /" in line and "link" not in line
    )


@pytest.mark.parametrize(
    ("status", "told"),
    [(0, ""), (64, ""), (32, "error cannot be mounted shell"), (4, "error the root is as it was")],
)
@pytest.mark.parametrize("hook", ["mkinitcpio/hooks/unionfs", "dracut/90unionfs/unionfs-mount.sh"])
def test_what_a_hook_makes_of_the_end(hook: str, status: int, told: str) -> None:
    """A boot is stopped only if that was asked for."""
    done = sh(
        """\
        err() { echo "error $*"; }
        warn() { err "$@"; }
        launch_interactive_shell() { echo shell; }
        die() { err "$@"; launch_interactive_shell; }
        modprobe() { :; }
        unionfs() { [ "$1 $2" = "boot --root" ] && return "$STATUS"; }
        set -e
        STATUS=$2
        . "$1"
        if command -v run_latehook >/dev/null; then run_latehook; fi
        echo went on
        """,
        str(SYSTEM / hook),
        str(status),
    )
    lines = done.stdout.split()
    assert done.stdout.endswith("went on\n"), done
    assert all(word in lines or word + "." in lines for word in told.split()), done
    assert ("error" in lines) == bool(told)
