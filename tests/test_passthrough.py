# SPDX-License-Identifier: GPL-2.0-or-later
"""Passthrough: the kernel reads and writes the layers' files by itself, and nobody sees more of it
than that no READ and no WRITE comes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import pytest

from tests.rig import ground
from tests.rig.mounted import PATIENCE, Unionfs
from tests.rig.spots import (
    BIG,
    Spot,
    asked,
    bytes_moved,
    descriptors,
    make,
    open_files,
    opened,
    told,
)
from tests.rig.waiting import wait_until

pytestmark = pytest.mark.root


# ---- one who reads and writes ----


def test_a_lower_file_is_read(spot: Spot) -> None:
    moved = bytes_moved(spot.whole)
    with opened(spot.mnt / "big", os.O_RDONLY) as fd:
        assert os.pread(fd, len(BIG) + 1, 0) == BIG
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == BIG
        out = spot.scratch / "out"
        with opened(out, os.O_CREAT | os.O_RDWR) as target:
            assert os.sendfile(target, fd, 0, len(BIG)) == len(BIG)
        assert out.read_bytes() == BIG
        assert os.lseek(fd, 0, os.SEEK_END) == len(BIG)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
    assert bytes_moved(spot.whole) == moved
    assert cast("int", told(spot.whole)["opened"]) > 0


def test_a_new_file_is_written(spot: Spot) -> None:
    moved = bytes_moved(spot.whole)
    path = spot.mnt / "new"
    with opened(path, os.O_CREAT | os.O_RDWR) as fd:
        assert os.pwrite(fd, b"x" * 10_000, 0) == 10_000
        assert os.fstat(fd).st_size == path.stat().st_size == 10_000
        with opened(path, os.O_WRONLY | os.O_APPEND) as appending:
            assert os.write(appending, b"end") == 3
            assert os.write(appending, b"END") == 3
        with mmap.mmap(fd, 0) as mapped:
            mapped[:5] = b"first"
            assert os.pread(fd, 5, 0) == b"first"
            assert mapped[-6:] == b"endEND"
        os.ftruncate(fd, 10_003)
        assert os.pread(fd, 100, 10_000) == b"end"
        os.posix_fallocate(fd, 0, 20_000)
        assert path.stat().st_size == 20_000
        os.fsync(fd)
        os.truncate(path, 5)
        assert os.pread(fd, 100, 0) == b"first"
        assert os.copy_file_range(fd, fd, 5, 0, 5) == 5
    assert path.read_bytes() == b"firstfirst"
    with open(path, "wb") as file:
        file.write(b"short")
    assert path.stat().st_size == 5
    assert bytes_moved(spot.whole) == moved
    assert (spot.upper / "new").read_bytes() == b"short"
    spot.whole.remount()
    assert path.read_bytes() == b"short"


def test_with_o_direct(spot: Spot) -> None:
    moved = bytes_moved(spot.whole)
    block = mmap.mmap(-1, 4096)
    block[:] = b"d" * 4096
    with opened(spot.mnt / "direct", os.O_CREAT | os.O_RDWR | os.O_DIRECT) as fd:
        assert os.pwrite(fd, block, 0) == 4096
        assert os.preadv(fd, [block], 0) == 4096
    assert (spot.mnt / "direct").read_bytes() == b"d" * 4096
    assert bytes_moved(spot.whole) == moved


def test_an_end_without_o_direct(spot: Spot) -> None:
    """dd oflag=direct writes what fills no block so."""
    path, block = spot.mnt / "direct", mmap.mmap(-1, 4096)
    block[:] = b"d" * 4096
    for more in (0, os.O_APPEND):
        path.write_bytes(b"")
        with (
            opened(path, os.O_RDONLY) as reader,
            opened(path, os.O_WRONLY | os.O_DIRECT | more) as fd,
        ):
            assert os.write(fd, block) == 4096
            fcntl.fcntl(fd, fcntl.F_SETFL, more)
            assert os.write(fd, b"end") == 3
            assert os.pread(reader, 5000, 0) == block[:] + b"end"
        assert path.stat().st_size == 4099
    path.unlink()
    with opened(path, os.O_WRONLY | os.O_DIRECT | os.O_CREAT | os.O_EXCL) as fd:
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        assert os.write(fd, b"alone") == 5
    assert (spot.upper / "direct").read_bytes() == b"alone"


def test_where_there_is_no_o_direct(place: Path) -> None:
    """squashfs has none: plain open(2) of it fails, and this one need not, but never with EIO."""
    if shutil.which("mksquashfs") is None:
        pytest.skip("there is no mksquashfs")
    (place / "tree").mkdir()
    (place / "tree" / "file").write_bytes(BIG)
    image, lower = place / "image", place / "lower"
    ground.run("mksquashfs", place / "tree", image, "-quiet", "-no-progress")
    for name in (lower, place / "upper", place / "mnt"):
        name.mkdir()
    ground.run("mount", "-o", "loop,ro", image, lower)
    try:
        with Unionfs([lower], place / "upper", place / "mnt") as union:
            for flags in (0, os.O_DIRECT, 0):
                with opened(union.mnt / "file", os.O_RDONLY | flags) as fd:
                    block = mmap.mmap(-1, 4096)
                    assert os.preadv(fd, [block], 0) == 4096
                    assert block[:] == BIG[:4096]
            with (
                opened(union.mnt / "file", os.O_RDONLY),
                contextlib.suppress(OSError),
                opened(union.mnt / "file", os.O_RDONLY | os.O_DIRECT) as fd,
            ):
                assert os.preadv(fd, [mmap.mmap(-1, 4096)], 0) == 4096
            with open(union.mnt / "file", "r+b") as file:
                file.write(b"written")
            assert (union.mnt / "file").read_bytes() == b"written" + BIG[7:]
    finally:
        ground.run("umount", lower)


def test_attributes_follow_what_is_mapped(spot: Spot) -> None:
    """The kernel does not note a change through a mapping, which may live longer than its file."""
    path = spot.mnt / "new"
    path.write_bytes(bytes(8192))
    with opened(path, os.O_RDWR) as fd:
        mapped = mmap.mmap(fd, 4096)
    before = path.stat()
    wait_for_a_later_time(path.parent)
    mapped[0] = 1
    after = path.stat()
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_mtime_ns == os.stat(spot.upper / "new").st_mtime_ns
    mapped.close()
    path.stat()
    counted = asked(spot.whole, "getattr")
    for _ in range(5):
        path.stat()
    assert asked(spot.whole, "getattr") == counted, "attributes are not kept again"


def wait_for_a_later_time(directory: Path) -> None:
    """Until the clock that files are stamped with has moved on."""
    probe = directory / "probe"
    probe.touch()
    start = probe.stat().st_mtime_ns
    while probe.stat().st_mtime_ns == start:
        time.sleep(0.002)
        os.utime(probe)
    probe.unlink()


@pytest.mark.parametrize("way", ["write", "truncate", "append"])
def test_a_users_write_takes_set_id_away(spot: Spot, way: str) -> None:
    path = spot.mnt / "program"
    path.write_bytes(b"program")
    os.chmod(path, 0o6777)
    code = {
        "write": "import os, sys; os.pwrite(os.open(sys.argv[1], os.O_RDWR), b'x', 0)",
        "append": "import sys; open(sys.argv[1], 'ab').write(b'x')",
        "truncate": "import sys; open(sys.argv[1], 'wb').write(b'x')",
    }[way]
    subprocess.run([sys.executable, "-c", code, path], check=True, user=65534, group=65534)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777
    os.chmod(path, 0o6777)
    with open(path, "r+b") as file:
        file.write(b"root may")
    assert stat.S_IMODE(path.stat().st_mode) == 0o6777


def test_a_write_takes_capabilities_away(spot: Spot) -> None:
    path = spot.mnt / "program"
    path.write_bytes(b"program")
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    os.setxattr(path, "security.capability", capability)
    with open(path, "r+b") as file:
        file.write(b"P")
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, "security.capability")


def test_limits_of_size(spot: Spot) -> None:
    code = (
        "import os, resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)\n"
        "assert os.write(fd, bytes(9000)) == 5000\n"
        "try:\n"
        "    os.write(fd, b'x')\n"
        "except OSError as error:\n"
        "    sys.exit(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, spot.mnt / "new"], check=False)
    assert done.returncode == errno.EFBIG
    assert (spot.mnt / "new").stat().st_size == 5000


def test_read_only_unions_pass_everything(place: Path) -> None:
    with make(place, upper=False) as union:
        if not told(union)["active"]:
            pytest.skip(f"no passthrough: {told(union)['reason']}")
        assert (union.mnt / "small").read_bytes() == b"small"
        assert (union.mnt / "big").read_bytes() == BIG
        assert bytes_moved(union) == 0


# ---- what is said of it, and where it is not to be had ----


def test_turned_off(place: Path) -> None:
    with make(place, "passthrough=off") as union:
        assert told(union) | {"opened": 0} == {
            "mode": "off",
            "active": False,
            "opened": 0,
            "opened_anew": 0,
            "reason": "turned off by passthrough=off",
        }
        assert (union.mnt / "big").read_bytes() == BIG
        assert asked(union, "read") > 0


def test_stacked_on_another_union(spot: Spot) -> None:
    """A layer on a stacked file system cannot be passed through; it works all the same."""
    above = spot.scratch
    for name in ("upper", "mnt"):
        (above / name).mkdir(parents=True)
    options = ["passthrough=all"]
    with Unionfs([spot.mnt], above / "upper", above / "mnt", options=options) as second:
        assert (second.mnt / "big").read_bytes() == BIG
        assert "stacked" in str(told(second)["reason"])
        with open(second.mnt / "big", "r+b") as file:
            file.write(b"NEW")
        assert (second.mnt / "big").read_bytes()[:3] == b"NEW"


def test_below_an_overlay(spot: Spot) -> None:
    """The depth that passthrough claims leaves room for one."""
    above = spot.scratch
    for name in ("upper", "work", "mnt"):
        (above / name).mkdir(parents=True)
    words = f"lowerdir={spot.mnt},upperdir={above}/upper,workdir={above}/work"
    ground.run("mount", "-t", "overlay", "overlay", "-o", words, above / "mnt")
    try:
        assert (above / "mnt/big").read_bytes() == BIG
    finally:
        ground.run("umount", above / "mnt")


def test_without_privilege(place: Path) -> None:
    """Root of a user namespace only: silently without."""
    union = make(place)
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces")
    code = (
        "import os, json, subprocess, sys, time\n"
        "mnt, big, *command = sys.argv[1:]\n"
        "daemon = subprocess.Popen(command)\n"
        "while not os.path.ismount(mnt):\n"
        "    assert daemon.poll() is None\n"
        "    time.sleep(0.01)\n"
        "assert len(open(mnt + '/big', 'rb').read()) == int(big)\n"
        "told = json.loads(os.getxattr(mnt, 'user.unionfs.status'))['passthrough']\n"
        "print(told['active'], told['reason'])\n"
        "subprocess.run(['umount', mnt], check=True)\n"
        "sys.exit(daemon.wait())\n"
    )
    done = subprocess.run(
        ["unshare", "-Urm", sys.executable, "-c", code, union.mnt, str(len(BIG)), *union.command()],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False only root of the whole machine may have it\n"


# ---- many at once ----


def test_many_files_open(spot: Spot) -> None:
    """Each has a number with the kernel, and none is left when they are closed."""
    moved = bytes_moved(spot.whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    try:
        before = descriptors(spot.whole)
        for _ in range(3):
            fds = [
                os.open(spot.mnt / f"many{number}", os.O_CREAT | os.O_RDWR) for number in range(500)
            ]
            for number, fd in enumerate(fds):
                os.write(fd, b"%d" % number)
            for number in range(500):
                assert (spot.mnt / f"many{number}").read_bytes() == b"%d" % number
            for fd in fds:
                os.close(fd)
                os.unlink(spot.mnt / f"many{fds.index(fd)}")
        wait_until(lambda: open_files(spot.whole) == 0)
        assert descriptors(spot.whole) <= before + 300  # cached directories
        assert bytes_moved(spot.whole) == moved
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
