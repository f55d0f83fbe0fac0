# SPDX-License-Identifier: GPL-2.0-or-later
"""Unions of an ordinary user: with fusermount3, and inside user namespaces of his.

The checks themselves are in tests/rootless.py; here are the lower they need and the settings.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import rootless
from tests.rig import as_user, ground, mounted, syscalls

CHECKS = [name for name in dir(rootless) if name.startswith("check_")]
SETTINGS = {
    "user": [],
    "mapped": ["unshare", "-Urm", "--"],
    "subids": ["unshare", "-U", "--map-auto", "--map-root-user", "-m", "--"],
}
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in [
        (0x01, 6, 0xFFFFFFFF),
        (0x02, 7, 4000),
        (0x04, 4, 0xFFFFFFFF),
        (0x10, 7, 0xFFFFFFFF),
        (0x20, 4, 0xFFFFFFFF),
    ]
)


def make_lower(lower: Path) -> None:
    """Files of the user; those of others too, if root makes it."""
    lower.mkdir()
    for name in ("mine", "mine000", "mine200", "ro444", "link1", "linkro1"):
        (lower / name).write_text(name)
    os.link(lower / "link1", lower / "link2")
    os.link(lower / "linkro1", lower / "linkro2")
    (lower / "big").write_bytes(os.urandom(300_000))
    for name in ("tree", "tree/sub", "dir555", "hidden", "hidden2", "full", "full2"):
        (lower / name).mkdir()
    for name in ("tree/x", "tree/sub/y", "full/x", "full2/x", "dir555/f"):
        (lower / name).write_text(name)
    (lower / "dir555" / "big").write_bytes(os.urandom(100_000))
    for number in range(rootless.MANY):
        (lower / "dir555" / f"many{number}").touch()
    (lower / "symlink").symlink_to("mine")
    os.mkfifo(lower / "fifo")
    if os.geteuid() == 0:
        for path in [lower, *lower.rglob("*")]:
            os.chown(path, as_user.UID, as_user.GID, follow_symlinks=False)
        make_others(lower)
    for name, mode in {"mine000": 0, "mine200": 0o200, "ro444": 0o444, "linkro1": 0o444}.items():
        (lower / name).chmod(mode)
    (lower / "dir555").chmod(0o555)


def make_others(lower: Path) -> None:
    for name, mode in {"others": 0o644, "secret": 0o600, "suid": 0o4755, "group": 0o664}.items():
        (lower / name).write_text(name)
        (lower / name).chmod(mode)
    os.chown(lower / "group", 0, as_user.GROUPS[1])
    (lower / "closed").mkdir(0o700)
    (lower / "closed" / "x").write_text("x")
    (lower / "acl").write_text("acl")
    os.chown(lower / "acl", as_user.UID, as_user.GID)
    with contextlib.suppress(OSError):
        os.setxattr(lower / "acl", "system.posix_acl_access", ACL)
    if "system.posix_acl_access" not in os.listxattr(lower / "acl"):
        (lower / "acl").unlink()


@contextlib.contextmanager
def subordinate_ids() -> Iterator[None]:
    """A range for the user in /etc/subuid and /etc/subgid of the tests' own mount namespace."""
    with ground.Ground("unionfs-subids-") as place:
        (place.base / "range").write_text("rootless:200000:65536\n")
        passwd = Path("/etc/passwd").read_text()
        line = f"rootless:x:{as_user.UID}:{as_user.GID}::/:/bin/sh\n"
        (place.base / "passwd").write_text(line + passwd)
        laid = []
        for file, over in (("passwd", "passwd"), ("range", "subuid"), ("range", "subgid")):
            if not os.path.exists(f"/etc/{over}"):
                pytest.skip(f"there is no /etc/{over} (package uidmap)")
            syscalls.mount(str(place.base / file), f"/etc/{over}", None, syscalls.MS_BIND)
            laid.append(f"/etc/{over}")
        try:
            yield
        finally:
            for path in laid:
                syscalls.umount(path, syscalls.MNT_DETACH)


@pytest.fixture(params=list(SETTINGS))
def setting(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "user" and (why := mounted.user_mount_possible()):
        pytest.skip(why)
    with contextlib.ExitStack() as stack:
        if request.param == "subids":
            if shutil.which("newuidmap") is None:
                pytest.skip("there is no newuidmap (package uidmap)")
            if os.geteuid() == 0:
                stack.enter_context(subordinate_ids())
        prefix = SETTINGS[request.param]
        if prefix and (done := as_user.run([*prefix, "true"])).returncode:
            pytest.skip(f"{' '.join(prefix)}: {done.stderr.strip()}")
        yield request.param


def run_check(name: str, setting: str, place: Path) -> None:
    done = as_user.run(
        [*SETTINGS[setting], sys.executable, "-m", "tests.rootless", name, str(place)], timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CHECKS)
def test_rootless(name: str, setting: str, user_place: Path) -> None:
    if name == "check_owner_in_namespace" and setting != "subids":
        pytest.skip("there are no other ids in this setting")
    make_lower(user_place / "lower")
    run_check(name, setting, user_place)


@pytest.mark.root
def test_root_reads_what_a_user_wrote(user_place: Path) -> None:
    """A user's upper, mounted by root: written on in the user's marks, read-only too."""
    make_lower(user_place / "lower")
    run_check("check_readonly", "user", user_place)
    lower, upper, mnt = (user_place / name for name in ("lower", "upper", "mnt"))
    for flags in (["--ro"], []):
        with mounted.Unionfs([lower], upper, mnt, flags=flags):
            assert sorted(os.listdir(mnt / "moved")) == ["sub", "x"]
            assert (mnt / "big").read_bytes() == (lower / "big").read_bytes()
            assert not (mnt / "mine").exists()


def test_subprocess_is_the_user() -> None:
    """The rig itself: the checks do not run as root."""
    if why := as_user.why_impossible():
        pytest.skip(why)
    done: subprocess.CompletedProcess[str] = as_user.run(["id", "-u"])
    assert int(done.stdout) != 0
