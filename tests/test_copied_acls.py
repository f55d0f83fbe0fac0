# SPDX-License-Identifier: GPL-2.0-or-later
"""ACLs of copies: none that only the work directory had, and no rights for one that is lost."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.rig import ground
from tests.rig.mounted import Unionfs

DEFAULT = "u:1234:rwx,g::rwx,o::rwx"


def acls(path: Path) -> list[str]:
    return [name for name in os.listxattr(path) if name.startswith("system.posix_acl")]


def set_acl(path: Path, entries: str, *options: str) -> None:
    done = subprocess.run(
        ["setfacl", *options, "-m", entries, path], capture_output=True, text=True, check=False
    )
    if "not supported" in done.stderr:
        pytest.skip(f"no ACLs on this file system: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


def trees(place: Path) -> Path:
    lower = place / "lower"
    (lower / "dir" / "gone").mkdir(parents=True)
    (lower / "dir" / "sub").mkdir()
    for name in ("file", "old", "sub/deep"):
        (lower / "dir" / name).write_text("text")
        (lower / "dir" / name).chmod(0o664)
    (place / "mnt").mkdir()
    return lower


@pytest.mark.parametrize("where", ["upper", "workdir"])
def test_the_work_directory_hands_on_none(place: Path, where: str) -> None:
    lower = trees(place)
    beside = place / "beside"
    beside.mkdir()
    options = []
    if where == "workdir":
        (beside / "upper").mkdir()
        set_acl(beside, DEFAULT, "-d")
        (beside / "work").mkdir()
        options = [f"workdir={beside}/work"]
    else:
        (beside / "upper").mkdir()
        set_acl(beside / "upper", DEFAULT, "-d")
    union = Unionfs([lower], beside / "upper", place / "mnt", options=options)
    with union:
        top = union.mnt / "dir"
        (top / "file").chmod(0o660)
        with open(top / "sub" / "deep", "a") as file:
            file.write("more")
        (top / "old").unlink()
        (top / "gone").rmdir()
        umask = os.umask(0o077)
        try:
            (top / "old").touch(0o666)
            (top / "gone").mkdir(0o777)
        finally:
            os.umask(umask)
        for name in (".", "file", "sub", "sub/deep", "old", "gone"):
            assert acls(top / name) == [], name
            assert acls(beside / "upper" / "dir" / name) == [], name
        modes = {
            name: stat.S_IMODE((top / name).stat().st_mode) for name in ("file", "old", "gone")
        }
        assert modes == {"file": 0o660, "old": 0o600, "gone": 0o700}


@pytest.mark.root
@pytest.mark.parametrize("change", ["append", "chown", "touch"])
def test_one_that_the_upper_cannot_hold_gives_the_group_nothing(place: Path, change: str) -> None:
    lower = trees(place)
    file = lower / "dir" / "file"
    set_acl(file, "u:1234:rw,g::---,m::rw,o::---")
    assert stat.S_IMODE(file.stat().st_mode) == 0o660
    ground.run("mount", "-t", "ramfs", "ramfs", place / "mnt")
    inside = place / "mnt"
    (inside / "upper").mkdir()
    (inside / "mnt").mkdir()
    try:
        with Unionfs([lower], inside / "upper", inside / "mnt") as union:
            copied = union.mnt / "dir" / "file"
            if change == "append":
                with open(copied, "a") as opened:
                    opened.write("more")
            elif change == "chown":
                os.chown(copied, 1, -1)
            else:
                os.utime(copied)
            for seen in (copied, inside / "upper" / "dir" / "file"):
                assert stat.S_IMODE(seen.stat().st_mode) == 0o600
    finally:
        ground.run("umount", place / "mnt")
