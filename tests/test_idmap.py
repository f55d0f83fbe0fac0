# SPDX-License-Identifier: GPL-2.0-or-later
"""Owners and modes that are not what is on disk: mappings, squashing, xattr_permissions.

As fuse-overlayfs's manual page and its sources have them; where it is installed it reads what we
wrote.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig import ground
from tests.rig.mounted import Unionfs

pytestmark = pytest.mark.root
OVERRIDE = "user.containers.override_stat"
CAPABILITY = bytes.fromhex("0100000202000000000000000000000000000000")


def union(place: Path, *options: str) -> Unionfs:
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir(exist_ok=True)
    return Unionfs([place / "lower"], place / "upper", place / "mnt", options=options)


def owner(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


def make(path: Path, uid: int, gid: int, mode: int = 0o644) -> None:
    path.write_text(path.name)
    os.chown(path, uid, gid)
    path.chmod(mode)


def as_id(uid: int, gid: int, code: str) -> subprocess.CompletedProcess[str]:
    """A few lines of Python by another user."""
    prefix = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--"]
    return subprocess.run(
        [*prefix, sys.executable, "-c", f"import os\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )


MAPS = "uidmapping=0:1000:1:1:110000:65535,gidmapping=0:1000:1:1:110000:65535"


def test_mapping_of_what_is_there(place: Path) -> None:
    """The example of fuse-overlayfs's manual page, and an id that no range has."""
    (place / "lower").mkdir()
    make(place / "lower" / "a", 0, 0)
    make(place / "lower" / "b", 1, 1)
    make(place / "lower" / "c", 100_000, 100_001)
    with union(place, MAPS) as u:
        assert owner(u.mnt / "a") == (1000, 1000)
        assert owner(u.mnt / "b") == (110000, 110000)
        assert owner(u.mnt / "c") == (65534, 65534)


@pytest.mark.parametrize("shown", [True, False], ids=["shown", "on-disk"])
def test_set_group_id_is_for_the_group_that_is_shown(place: Path, shown: bool) -> None:
    (place / "lower").mkdir()
    make(place / "lower" / "f", 1000, 1005, 0o2645)
    with union(place, "uidmapping=0:2000:60000", "gidmapping=0:2000:60000") as u:
        u.mnt.chmod(0o777)
        groups = "3001,3005" if shown else "3001,1005"
        prefix = ["setpriv", "--reuid=3000", "--regid=3000", f"--groups={groups}", "--"]
        ground.run(*prefix, "chgrp", "3001", u.mnt / "f")
        assert owner(u.mnt / "f") == (3000, 3001)
        assert oct(stat.S_IMODE((u.mnt / "f").stat().st_mode)) == oct(0o2645 if shown else 0o645)


def test_mapping_of_changes(place: Path) -> None:
    (place / "lower").mkdir()
    make(place / "lower" / "a", 0, 0)
    make(place / "lower" / "c", 100_000, 100_001)
    with union(place, MAPS) as u:
        u.mnt.chmod(0o777)
        # Copy-up keeps the owner on disk, also one that is not mapped.
        (u.mnt / "a").chmod(0o600)
        (u.mnt / "c").chmod(0o600)
        assert owner(place / "upper" / "a") == (0, 0)
        assert owner(place / "upper" / "c") == (100_000, 100_001)
        assert owner(u.mnt / "a") == (1000, 1000)
        os.chown(u.mnt / "a", 110004, 110005)
        assert owner(u.mnt / "a") == (110004, 110005)
        assert owner(place / "upper" / "a") == (5, 6)
        os.chown(u.mnt / "a", -1, 1000)
        assert owner(place / "upper" / "a") == (5, 0)
        # What has no place on disk becomes nobody's: as it is, it could be somebody's.
        os.chown(u.mnt / "a", 7, 8)
        assert owner(place / "upper" / "a") == (65534, 65534)
        done = as_id(
            110009, 110009, f"open({str(u.mnt / 'new')!r}, 'w'); os.mkdir({str(u.mnt / 'd')!r})"
        )
        assert done.returncode == 0, done.stderr
        assert owner(u.mnt / "new") == (110009, 110009)
        assert owner(place / "upper" / "new") == (10, 10)
        assert owner(place / "upper" / "d") == (10, 10)
        done = as_id(77, 77, f"open({str(u.mnt / 'stranger')!r}, 'w')")
        assert done.returncode == 0, done.stderr
        assert owner(place / "upper" / "stranger") == (65534, 65534)
        u.remount()
        assert owner(u.mnt / "new") == (110009, 110009)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (("squash_to_root",), (0, 0)),
        (("squash_to_uid=500",), (500, 6)),
        (("squash_to_gid=600",), (5, 600)),
        (("squash_to_root", "squash_to_uid=7"), (7, 0)),
        (("squash_to_uid=7", "uidmapping=5:100:1", "gidmapping=0:100:10"), (7, 106)),
    ],
    ids=lambda value: "+".join(map(str, value)),
)
def test_squash(place: Path, options: tuple[str, ...], want: tuple[int, int]) -> None:
    (place / "lower").mkdir()
    make(place / "lower" / "a", 5, 6)
    with union(place, *options) as u:
        assert owner(u.mnt / "a") == want
        (u.mnt / "a").write_text("copied up")
        assert owner(u.mnt / "a") == want
        assert owner(place / "upper" / "a") == (5, 6)
        (u.mnt / "new").mkdir()
        os.chown(u.mnt / "new", 9, 9)
        found = owner(u.mnt / "new")
        if "squash_to_root" in options:
            assert found == want
        u.remount()
        assert owner(u.mnt / "a") == want


def test_static_nlink(place: Path) -> None:
    (place / "lower" / "d" / "sub").mkdir(parents=True)
    with union(place, "static_nlink") as u:
        (u.mnt / "new" / "sub").mkdir(parents=True)
        assert [(u.mnt / name).stat().st_nlink for name in ("", "d", "d/sub", "new")] == [1] * 4


def test_noxattrs_and_noacl(place: Path) -> None:
    (place / "lower").mkdir()
    make(place / "lower" / "a", 0, 0)
    os.setxattr(place / "lower" / "a", "user.x", b"1")
    subprocess.run(["setfacl", "-m", "u:5:r", place / "lower" / "a"], check=True)
    with union(place, "noxattrs") as u:
        with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
            os.getxattr(u.mnt / "a", "user.x")
        with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
            os.setxattr(u.mnt / "a", "user.y", b"1")
    with union(place, "noacl") as u:
        assert os.listxattr(u.mnt / "a") == ["user.x"]
        with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
            os.setxattr(u.mnt / "a", "system.posix_acl_access", b"\2\0\0\0")


def test_attribute_of_lowers(place: Path) -> None:
    """Layers as containers/storage leaves them: all the files of one, owner and mode beside."""
    low = place / "lower"
    (low / "d").mkdir(parents=True)
    make(low / "a", 1000, 1000)
    make(low / "null", 1000, 1000)
    make(low / "pipe", 1000, 1000)
    for name, value in {
        "a": b"5:6:4755",
        "d": b"7:8:01777:dir",
        "null": b"0:0:0666:char-1-3",
        "pipe": b"1:1:0600:pipe",
    }.items():
        os.setxattr(low / name, OVERRIDE, value)
    with union(place, "xattr_permissions=2") as u:
        for _ in range(2):
            found = (u.mnt / "a").stat()
            assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (5, 6, 0o4755)
            found = (u.mnt / "d").stat()
            assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (7, 8, 0o1777)
            found = (u.mnt / "null").stat()
            assert stat.S_ISCHR(found.st_mode)
            assert found.st_rdev == os.makedev(1, 3)
            assert stat.S_ISFIFO((u.mnt / "pipe").stat().st_mode)
            assert OVERRIDE not in os.listxattr(u.mnt / "a")
            # Copied up for the second round.
            os.utime(u.mnt / "a", (1, 1))
            os.utime(u.mnt / "d", (1, 1))
            os.utime(u.mnt / "null", (1, 1))
            u.remount()
        os.chown(u.mnt / "null", 3, 4)
        assert os.getxattr(place / "upper" / "null", OVERRIDE) == b"3:4:666:char-1-3"
        os.rename(u.mnt / "null", u.mnt / "d" / "null")
        assert stat.S_ISCHR((u.mnt / "d" / "null").stat().st_mode)
    with union(place) as u:  # not asked for: plain files with an attribute
        assert stat.S_ISREG((u.mnt / "d" / "null").stat().st_mode)


@pytest.mark.parametrize("kind", ["1", "2"])
def test_attribute_of_changes(place: Path, kind: str) -> None:
    name = {"1": "security.fuseoverlayfs.override_stat", "2": OVERRIDE}[kind]
    (place / "lower").mkdir()
    make(place / "lower" / "a", 5, 6, 0o444)
    os.setxattr(place / "lower" / "a", "security.capability", CAPABILITY)
    with union(place, f"xattr_permissions={kind}") as u:
        upper = place / "upper"
        (u.mnt / "a").chmod(0o440)
        assert os.getxattr(upper / "a", name) == b"5:6:440"
        os.chown(u.mnt / "a", 50, 60)
        assert os.getxattr(upper / "a", name) == b"50:60:440"
        (u.mnt / "new").write_text("1")
        (u.mnt / "new").chmod(0o4711)
        assert os.getxattr(upper / "new", name) == b"0:0:4711"
        # On disk nothing that the attribute's owner did not ask the real file to be.
        assert stat.S_IMODE((upper / "new").stat().st_mode) == 0o711
        os.chown(u.mnt / "new", 9, -1)
        assert os.getxattr(upper / "new", name) == b"9:0:711"
        (u.mnt / "d").mkdir(0o2750)
        os.mkfifo(u.mnt / "fifo", 0o600)
        (u.mnt / "fifo").chmod(0o640)
        assert stat.S_IMODE((u.mnt / "fifo").stat().st_mode) == 0o640
        os.symlink("x", u.mnt / "link")
        if kind == "2":
            os.setxattr(u.mnt / "new", "security.capability", CAPABILITY)
            stored = "user.containers.override_security.capability"
            assert os.getxattr(upper / "new", stored) == CAPABILITY
            assert "security.capability" not in os.listxattr(upper / "new")
            assert os.listxattr(u.mnt / "new") == ["security.capability"]
        for forged in (name, "user.fuseoverlayfs.override_stat"):
            with pytest.raises(PermissionError):
                os.setxattr(u.mnt / "new", forged, b"0:0:4777")
            with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
                os.getxattr(u.mnt / "new", forged)
        u.remount()
        assert owner(u.mnt / "new") == (9, 0)
        assert stat.S_IMODE((u.mnt / "new").stat().st_mode) == 0o711
        (u.mnt / "new").write_text("writing clears capabilities")
        assert "security.capability" not in os.listxattr(u.mnt / "new")


def test_fuse_overlayfs_reads_it(place: Path) -> None:
    """The other program, over our upper as a lower: the same owners and modes."""
    if shutil.which("fuse-overlayfs") is None:
        pytest.skip("there is no fuse-overlayfs")
    (place / "lower").mkdir()
    make(place / "lower" / "a", 5, 6, 0o4755)
    with union(place, "xattr_permissions=1") as u:
        (u.mnt / "d").mkdir(0o750)
        os.chown(u.mnt / "d", 7, 8)
        os.chown(u.mnt / "a", 1, 2)
        (u.mnt / "a").chmod(0o2711)
    theirs = place / "theirs"
    theirs.mkdir()
    shutil.rmtree(place / "upper" / ".unionfs")
    layers = f"lowerdir={place / 'upper'}:{place / 'lower'},xattr_permissions=1"
    ground.run("fuse-overlayfs", "-o", layers, theirs)
    try:
        assert owner(theirs / "a") == (1, 2)
        assert (theirs / "a").stat().st_mode & 0o777 == 0o711  # 1.10 shows no set-ID bits
        assert owner(theirs / "d") == (7, 8)
    finally:
        ground.run("umount", theirs)


def test_attribute_that_cannot_be_kept(place: Path) -> None:
    """One line and nothing mounted, instead of a union in which nothing can be made."""
    u = union(place, "xattr_permissions=2")
    ground.run("mount", "-t", "ramfs", "ramfs", place / "upper")
    try:
        with pytest.raises(AssertionError, match="does not take the attribute"):
            u.mount()
        assert os.listdir(place / "upper") == []
    finally:
        ground.run("umount", place / "upper")
