# SPDX-License-Identifier: GPL-2.0-or-later
"""What is stored through a mapping takes no privilege from a file, on a union as in a directory."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground
from tests.rig.mounted import Unionfs

SIZE = 3 * mmap.PAGESIZE + 100
CAPABILITY = bytes.fromhex("01000002 00200000 00000000 00000000 00000000")


@pytest.fixture(params=["plain", "by default", "by the daemon"])
def folder(request: pytest.FixtureRequest, place: Path) -> Iterator[Path]:
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    if request.param == "plain":
        yield place / "lower"
        return
    options = ["driver=engine"] + ["passthrough=off"] * (request.param == "by the daemon")
    with Unionfs([place / "lower"], place / "upper", place / "mnt", options=options) as union:
        yield union.mnt


def store(path: Path, *, only_writer_last: bool = False) -> bytes:
    """Into the middle, to the last byte. The kernel writes back by who opened last."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as held:
        last = os.open(path, os.O_WRONLY) if only_writer_last else None
        held[mmap.PAGESIZE - 5 : 2 * mmap.PAGESIZE] = b"s" * (mmap.PAGESIZE + 5)
        held[-50:] = b"e" * 50
        held.flush()
        if last is not None:
            os.close(last)
        return held[:]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6777, 0o2644], ids=oct)
def test_set_id_bits_stay(folder: Path, mode: int, last: bool) -> None:
    path = folder / "f"
    path.write_bytes(b"x" * SIZE)
    path.chmod(mode)
    content = store(path, only_writer_last=last)
    assert len(content) == SIZE
    assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(mode)
    assert path.read_bytes() == content


@pytest.mark.root
def test_a_capability_stays(folder: Path) -> None:
    path = folder / "f"
    path.write_bytes(b"x" * SIZE)
    os.setxattr(path, "security.capability", CAPABILITY)
    content = store(path)
    assert os.getxattr(path, "security.capability") == CAPABILITY
    assert path.read_bytes() == content


def test_who_may_not_read_his_file_keeps_what_he_stored(folder: Path) -> None:
    path = folder / "f"
    path.write_bytes(b"x" * SIZE)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as held:
        path.chmod(0o4200)
        held[100:105] = b"store"
        held.flush()
    path.chmod(0o600)
    assert path.read_bytes() == b"x" * 100 + b"store" + b"x" * (SIZE - 105)


@pytest.mark.root
def test_on_a_full_disk() -> None:
    """Holes have no room there: the program is told when it syncs, and the daemon goes on."""
    with ground.Ground("unionfs-mapped-") as base:
        store_on = base.filesystem("store", "tmpfs", 4)
        for name in ("lower", "upper", "mnt"):
            (store_on / name).mkdir()
        options = ["driver=engine", "passthrough=off"]
        with Unionfs(
            [store_on / "lower"], store_on / "upper", store_on / "mnt", options=options
        ) as union:
            path = union.mnt / "f"
            path.touch()
            os.truncate(path, 8 << 20)
            path.chmod(0o4755)
            with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as held:
                held[:] = b"y" * len(held)
                with pytest.raises(OSError, match=r"No space|Input/output"):
                    held.flush()
            assert path.stat().st_size == 8 << 20
