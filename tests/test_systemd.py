# SPDX-License-Identifier: GPL-2.0-or-later
"""Under a real systemd: mounts by fstab and by units, services, profiles, users, the shutdown.

One boot serves many tests: each has a script in tests/systemd that runs in the container.  What
boots with it is prepared before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import container, ground, images
from tests.rig.container import Machine
from tests.rig.ground import Ground
from tests.rig.sanitized import not_sanitized
from unionfs.stores.tools import find

pytestmark = [
    pytest.mark.root,
    not_sanitized("the container's systemd starts services without the sanitizers' libraries"),
]

USER = "stranger"
UID = 1234

FSTAB = """\
/srv/disk /data none bind 0 0
t /srv/tree fuse.unionfs lowerdir=/srv/base,upperdir=/data/up,{needs}
gone /srv/gone unionfs lowerdir=/srv/base,upperdir=/srv/nowhere,nofail
auto /srv/auto unionfs upperdir=/data/up2,lowerdir=/srv/base,{needs},noauto,x-systemd.automount
lost /srv/lost unionfs lowerdir=/srv/base,upperdir=/data/later,fallback=tmpfs,{needs}
last /srv/last unionfs lowerdir=/srv/base,upperdir=/data/store.img:/changes,{needs}
"""
PROFILE = """\
store = "/data/store2.img"
base = "/srv/system"
boot = true
description = "What stays"
[paths]
"/etc" = "persist"
"/var" = "persist"
"/var/cache" = { kind = "tmpfs", size = "10M" }
"""
# Not on the base of the other: who has a union as its lower keeps the daemon of that from ending.
DEGRADED = """\
store = "/data/broken.img"
base = "/srv/alone"
target = "/srv/degraded"
boot = true
options = "fallback=tmpfs"
[paths]
"/etc" = "persist"
"""
BROKEN = """\
store = "/data/broken.img"
base = "/srv/other"
boot = true
[paths]
"/etc" = "persist"
"""
WRONG = 'boot = true\nno such key = "x"\n'
OF_USER = """\
store = "/home/stranger/store"
base = "/srv/base"
target = "/home/stranger/view"
[paths]
"/" = "persist"
"""
OF_USER_TOO = """\
store = "/home/stranger/store.img:/%i"
base = "/srv/base"
target = "/home/stranger/%i"
[paths]
"/" = "persist"
"""
HERE = Path(__file__).resolve().parent
# The last one has just written when the shutdown begins.
SCRIPTS = (
    "units",
    "automount",
    "remount",
    "profile",
    "degraded",
    "broken",
    "heal",
    "service",
    "names",
    "user",
    "writes",
)
ON_DEVICES = ("devices", "cmdline")
LABELLED = """\
store = "LABEL=my store"
base = "/srv/system"
boot = true
[paths]
"/etc" = "persist"
"""
MISSING = """\
store = "LABEL=not-there"
base = "/srv/alone"
target = "/srv/missing"
boot = true
options = "fallback=tmpfs,device-timeout=1"
[paths]
"/etc" = "persist"
"""
ASKED = """\
store = "/srv/kept"
base = "/srv/alone"
target = "/srv/asked"
[paths]
"/etc" = "persist"
"""
# As a device that takes its time. Where /dev is no devtmpfs, systemd listens to no udev and has to
# be told to look.
LATE = """\
[Unit]
DefaultDependencies=no
After=systemd-udevd.service
[Service]
Type=oneshot
ExecStart=/bin/sleep 0.5
ExecStart=/bin/udevadm trigger --action=change --subsystem-match=block --sysname-match={device}
ExecStart=/bin/udevadm settle
ExecStart=/bin/systemctl daemon-reload
"""
# To wait for a state that is told by nobody: up to the script's time.
AWAIT = """\
await() {
    local -
    set +x
    while ! eval "$1" >/dev/null; do sleep 0.05; done
}
set -x
"""


def _script(machine: Machine, name: str) -> None:
    machine.script(name, AWAIT + (HERE / f"systemd/{name}.sh").read_text())


def _prepare(machine: Machine) -> None:
    install(machine.root)
    for path in (
        "base",
        "tree",
        "gone",
        "auto",
        "lost",
        "last",
        "disk/up",
        "disk/up2",
        "system/etc",
        "alone/etc",
    ):
        machine.below(f"/srv/{path}").mkdir(parents=True)
    for path in ("/srv/system/var/cache", "/srv/degraded/etc", "/srv/other/etc", "/data"):
        machine.below(path).mkdir(parents=True)
    machine.write("/srv/base/file", "hello\n")
    disk = machine.below("/srv/disk")
    images.make(disk / "store.img", "ext4", megabytes=64)
    images.make(disk / "store2.img", "ext4", megabytes=64)
    (disk / "broken.img").write_bytes(os.urandom(1 << 20))
    machine.write("/etc/fstab", FSTAB.format(needs="x-systemd.requires-mounts-for=/data"))
    machine.write("/etc/unionfs/system.toml", PROFILE)
    machine.write("/etc/unionfs/degraded.toml", DEGRADED)
    machine.write("/etc/unionfs/broken.toml", BROKEN)
    machine.below("/etc/unionfs/broken.toml.d").mkdir()
    machine.write("/etc/unionfs/wrong.toml", WRONG)
    home = machine.below(f"/home/{USER}")
    for name in (".config/unionfs", "store", "view", "one", "two"):
        (home / name).mkdir(parents=True)
    (home / ".config/unionfs/mine.toml").write_text(OF_USER)
    (home / ".config/unionfs/app@.toml").write_text(OF_USER_TOO)
    images.make(home / "store.img", "ext4", megabytes=32)
    for made in [home, *home.rglob("*")]:
        os.chown(made, UID, UID)
    for file in ("passwd", "group"):
        words = f"{UID}::/home/{USER}:/bin/sh" if file == "passwd" else ""
        with open(machine.below(f"/etc/{file}"), "a") as lines:
            lines.write(f"{USER}:x:{UID}:{words}\n")
    with open(machine.below("/etc/shadow"), "a") as shadow:
        shadow.write(f"{USER}:*:19000:0:99999:7:::\n")


def install(root: Path) -> None:
    """What this interpreter runs, where a system looks for it."""
    for name in ("bin/unionfs", "sbin/mount.unionfs"):  # of unionfs-fuse, which is to be removed
        (root / "usr" / name).unlink(missing_ok=True)
    words = ("env", f"UNIONFS_VENV={sys.prefix}", HERE.parent / "tools/install")
    ground.run(*words, "--destdir", root)


@pytest.fixture(scope="module")
def booted() -> Iterator[Machine]:
    """A machine that was booted, used and shut down."""
    if why := container.why_not():
        pytest.skip(why)
    with Ground("unionfs-container-") as base, container.machine(base.base) as machine:
        _prepare(machine)
        for name in SCRIPTS:
            _script(machine, name)
        machine.boot()
        yield machine


@pytest.mark.parametrize("name", SCRIPTS)
def test_in_the_container(booted: Machine, name: str) -> None:
    said = booted.said(name)
    assert said.status == 0, said.text


def test_shutdown_loses_nothing(booted: Machine) -> None:
    """What was written last is in the stores, which were unmounted in order and in time."""
    assert booted.said("writes").status == 0
    first, second = (booted.below("/srv/disk") / name for name in ("store.img", "store2.img"))
    for image in (first, second):
        ground.run("e2fsck", "-fn", image)
    found = booted.base / "found"
    ground.run("debugfs", "-R", f"dump /changes/big {found}", first)
    expected = (booted.out / "sum").read_text().split()[0]
    assert hashlib.sha256(found.read_bytes()).hexdigest() == expected
    ground.run("debugfs", "-R", f"dump /changes/mapped {found}", first)
    assert found.read_bytes() == b"m" * (1 << 20)
    assert ground.run("debugfs", "-R", "cat /changes/end", first) == "end\n"
    assert ground.run("debugfs", "-R", "cat /persistent_system/etc/end", second) == "end\n"
    journal = booted.journal()
    assert "/srv/last is unmounted" in journal
    assert "/srv/system/etc is unmounted" in journal.partition("the shutdown begins")[2]
    for line in journal.splitlines():
        # What a user's manager leaves is unmounted by two at once.
        assert "Failed unmounting" not in line or "run-user" in line, line


@pytest.fixture(scope="module")
def on_devices() -> Iterator[Machine]:
    """The same with udev, and a store on a device that has a label."""
    why = container.why_not() or (None if find("udevadm") else "there is no udev")
    if why:
        pytest.skip(why)
    with Ground("unionfs-container-") as base:
        store = images.make(base.base / "store.img", "ext4", "my store", megabytes=64)
        (base.base / "machine").mkdir()
        with images.attached(store) as device, container.machine(base.base / "machine") as machine:
            install(machine.root)
            for path in (
                "base",
                "tree",
                "system/etc",
                "alone/etc",
                "missing/etc",
                "asked/etc",
                "kept",
                "line",
            ):
                machine.below(f"/srv/{path}").mkdir(parents=True)
            machine.write("/srv/base/file", "hello\n")
            for name, text in (("labelled", LABELLED), ("missing", MISSING), ("asked", ASKED)):
                machine.write(f"/etc/unionfs/{name}.toml", text)
            late = LATE.format(device=os.path.basename(device))
            machine.write("/etc/systemd/system/late.service", late)
            wants = machine.below("/etc/systemd/system/sysinit.target.wants")
            wants.mkdir(exist_ok=True)
            (wants / "late.service").symlink_to("../late.service")
            line = r"upperdir=LABEL=my\040store:/three,device-timeout=20"
            machine.write("/etc/fstab", f"/srv/base /srv/line unionfs {line} 0 0\n")
            for name in ON_DEVICES:
                _script(machine, name)
            machine.boot("unionfs.profile=asked", devices=True)
            yield machine


@pytest.mark.parametrize("name", ON_DEVICES)
def test_with_devices(on_devices: Machine, name: str) -> None:
    said = on_devices.said(name)
    assert said.status == 0, said.text


def test_device_is_clean(on_devices: Machine) -> None:
    store = on_devices.base.parent / "store.img"
    ground.run("e2fsck", "-fn", store)
    for path, text in (("/persistent_labelled/etc/kept", "kept"), ("/two/new", "new")):
        assert ground.run("debugfs", "-R", f"cat {path}", store) == f"{text}\n"


SYSROOT = """\
[Unit]
DefaultDependencies=no
[Mount]
What=/srv/system.squashfs
Where=/sysroot
Type=squashfs
Options=loop,ro
"""


def test_the_root_by_a_unit(tmp_path: Path) -> None:
    """As in an initrd of units: between the mount of the root and what needs it.

    The container's systemd itself is none of an initrd, whose target would end in a new root.
    """
    settings = ["SYSTEMD_IN_INITRD=0"]
    if why := container.why_not():
        pytest.skip(why)
    with Ground("unionfs-container-") as base, container.machine(base.base) as machine:
        install(machine.root)
        for path in ("/sysroot", "/srv"):
            machine.below(path).mkdir(exist_ok=True)
        (tmp_path / "tree/etc").mkdir(parents=True)
        (tmp_path / "tree/etc/name").write_text("lower\n")
        images.squash(machine.below("/srv/system.squashfs"), tmp_path / "tree")
        store = images.make(machine.below("/srv/store.img"), "ext4", megabytes=64)
        machine.write("/etc/initrd-release", "ID=test\n")
        machine.write("/etc/systemd/system/sysroot.mount", SYSROOT)
        words = ["unionfs.store=/srv/store.img", "unionfs.dir=/here"]
        machine.write("/srv/cmdline", " ".join(words) + "\n")
        _script(machine, "initrd")
        # The generator reads what the container was started with.
        machine.boot(*words, settings=settings)
        said = machine.said("initrd")
        assert said.status == 0, said.text
        ground.run("e2fsck", "-fn", store)
        assert ground.run("debugfs", "-R", "cat /here/etc/name", store) == "changed\n"
        # The emergency, which in the container is its end, is reached only where that is asked for.
        words = ["unionfs.store=/srv/nothing.img", "unionfs.fallback=fail"]
        machine.write("/srv/cmdline", " ".join(words) + "\n")
        machine.write("/etc/systemd/system/sysroot.mount", SYSROOT)
        machine.boot(*words, settings=settings, ends=9)
        said_then = next(machine.out.glob("*-initrd.log")).read_text()
        assert "systemctl start initrd-root-fs.target" in said_then
        assert "findmnt" not in said_then, "what comes after the root's target was reached"


ASKS = """\
[Service]
ExecStart=
ExecStart=/usr/bin/unionfs boot --root /sysroot --cmdline unionfs.store=/out/changes
"""


def test_systemd_changes_to_a_root_that_is_a_union() -> None:
    """A systemd in an initrd hands over to the one on the union, and spares its daemon."""
    if why := container.why_not():
        pytest.skip(why)
    with Ground("unionfs-container-") as base, contextlib.ExitStack() as stack:
        for name in ("initrd", "system"):
            (base.base / name).mkdir()
        initrd = stack.enter_context(container.machine(base.base / "initrd"))
        system = stack.enter_context(container.machine(base.base / "system"))
        for machine in (initrd, system):
            install(machine.root)
        initrd.write("/etc/initrd-release", "ID=test\n")
        initrd.below("/sysroot").mkdir(exist_ok=True)
        units = initrd.below("/etc/systemd/system")
        (units / "initrd-root-fs.target.requires").mkdir()
        link = units / "initrd-root-fs.target.requires/unionfs-boot.service"
        link.symlink_to("/usr/lib/systemd/system/unionfs-boot.service")
        initrd.write("/etc/systemd/system/unionfs-boot.service.d/asks.conf", ASKS)
        (initrd.out / "changes").mkdir()
        # What is run lies in the system, and what that says in the changes to it.
        _script(system, "root")
        shutil.copytree(system.out, system.below("/out"), dirs_exist_ok=True)
        initrd.boot(binds=[f"{system.root}:/sysroot"])
        found = initrd.out / "changes/out"
        assert (found / "01-root.status").read_text() == "0\n", (found / "01-root.log").read_text()
        assert (initrd.out / "changes/etc/by-the-system").exists()
        assert not system.below("/etc/by-the-system").exists()
