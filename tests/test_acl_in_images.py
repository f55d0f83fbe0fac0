# SPDX-License-Identifier: GPL-2.0-or-later
"""Access ACLs and modes in an upper by fuse2fs, which keeps one as it is when the other changes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.rig import images
from tests.rig.mounted import Unionfs, user_mount_possible
from tests.test_store_commands import done
from unionfs.acl import ACCESS
from unionfs.stores.tools import find


@pytest.fixture
def base(place: Path) -> Path:
    why = user_mount_possible() or images.why_not("ext4")
    if why:
        pytest.skip(why)
    if not find("setfacl"):
        pytest.skip("there is no setfacl")
    for name in ("lower", "mnt", "plain", "upper"):
        (place / name).mkdir()
    return place


def state(path: Path) -> tuple[int, bytes]:
    try:
        return path.stat().st_mode, os.getxattr(path, ACCESS)
    except OSError:
        return path.stat().st_mode, b""


CHANGES: tuple[list[str] | int, ...] = (
    ["-m", "u:12:rwx"],
    0o755,
    0o604,
    ["-m", "o::-"],
    ["-b"],
    0o666,
    ["-m", "g::x"],
)


@pytest.mark.parametrize("copied", [False, True])
def test_the_mode_and_the_acl_say_the_same(base: Path, copied: bool) -> None:
    """As on a plain directory; also where the change is what copies it up."""
    with Unionfs([base / "lower"], images.make(base / "s.img"), base / "mnt") as union:
        for at, change in enumerate(CHANGES):
            for folder in (base / "lower" if copied else union.mnt, base / "plain"):
                file = folder / (f"f{at}" if copied else "f")
                if copied or at == 0:
                    file.write_text("x")
                    file.chmod(0o640)
                if copied:
                    subprocess.run(["setfacl", "-m", "u:13:rw", file], check=True)
            for folder in (union.mnt, base / "plain"):
                file = folder / (f"f{at}" if copied else "f")
                if isinstance(change, int):
                    file.chmod(change)
                else:
                    subprocess.run(["setfacl", *change, file], check=True)
            assert state(union.mnt / file.name) == state(base / "plain" / file.name), change


def test_a_clone_has_no_acl_that_was_not_there(base: Path) -> None:
    """tar gives each file one that says what its mode says."""
    with Unionfs([base / "lower"], base / "upper", base / "mnt") as union:
        (union.mnt / "file").write_text("x")
        (union.mnt / "dir").mkdir()
    done("clone", base / "upper", base / "s.img", "--size", "32M")
    with Unionfs([base / "lower"], base / "s.img", base / "mnt") as union:
        for name in ("file", "dir"):
            assert ACCESS not in os.listxattr(union.mnt / name)
