# SPDX-License-Identifier: GPL-2.0-or-later
"""An ext4 that grows while it is mounted: what is asked of the kernel, and what becomes of a no.

The kernel wants CAP_SYS_RESOURCE for EXT4_IOC_RESIZE_FS.  Where it is missing a library stands in
for that ioctl alone: it writes down what it was asked, and says yes.  All else is real.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.rig.waiting import wait_until
from tests.test_store_commands import done, facts, store
from tests.test_stores import base, change, check, need, union
from unionfs.stores.tools import find

__all__ = ["base"]

_RESIZE_FS = 0x40086610
MIB = 1 << 20

_STAND_IN = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

int ioctl(int fd, unsigned long request, ...)
{
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (request != 0x40086610) {
        int (*real)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
        return real(fd, request, argument);
    }
    struct stat status;
    FILE *told = fopen(getenv("STAND_IN"), "a");
    fstat(fd, &status);
    fprintf(told, "%lu %llu\n", (unsigned long)status.st_dev,
            (unsigned long long)*(uint64_t *)argument);
    fclose(told);
    return 0;
}
"""


@pytest.fixture
def image(base: Path) -> Path:
    need("ext4")
    if os.geteuid() != 0:
        pytest.skip("an ordinary user's ext4 is grown when it is not mounted")
    return images.make(base / "s.img", megabytes=32)


@pytest.fixture
def asked(base: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the stand-in was asked, one line each: the device, and how many blocks it shall have."""
    if (gcc := find("gcc")) is None:
        pytest.skip("there is no gcc")
    (base / "stand_in.c").write_text(_STAND_IN)
    library = base / "stand_in.so"
    ground.run(gcc, "-shared", "-fPIC", "-o", library, base / "stand_in.c")
    before = os.environ.get("LD_PRELOAD")
    monkeypatch.setenv("LD_PRELOAD", f"{before}:{library}" if before else str(library))
    monkeypatch.setenv("STAND_IN", str(base / "asked"))
    yield base / "asked"
    monkeypatch.undo()


def permitted(image: Path) -> bool:
    """Whether the kernel resizes it while it is mounted: asked for the size that it has."""
    point = image.parent / "probe"
    point.mkdir()
    ground.run("mount", "-o", "loop", image, point)
    try:
        fd = os.open(point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _RESIZE_FS, struct.pack("=Q", image.stat().st_size // 4096))
        except OSError as exc:
            assert exc.errno == errno.EPERM  # noqa: PT017
            return False
        finally:
            os.close(fd)
    finally:
        ground.run("umount", point)
    return True


def device_of(image: Path) -> int:
    (device,) = images.loops_of(image)
    return os.stat(device).st_rdev


def test_grow(base: Path, image: Path) -> None:
    """For real; where the kernel says no, nothing has changed, and how to do it is told."""
    may = permitted(image)
    with union(base, base / "tree", image) as made:
        change(base / "mnt")
        found = store("grow", image, "--size", "64M")
        if may:
            assert found.returncode == 0, found
            assert int(str(made.status()["size"])) > 48 * MIB
        else:
            assert found.returncode == 32
            assert found.stderr == (
                f"unionfs: {image} cannot be grown: this kernel does not let us resize a mounted "
                "ext4 (CAP_SYS_RESOURCE is missing); unmount the union, and grow it then\n"
            )
            assert image.stat().st_size == 32 * MIB
            sectors = Path("/sys/class/block", Path(images.loops_of(image)[0]).name, "size")
            assert int(sectors.read_text()) * 512 == 32 * MIB
        (base / "mnt/more").write_bytes(os.urandom(MIB))
    assert store("check", image).returncode == 0
    if not may:
        done("grow", image, "--size", "64M")
    assert facts("info", image)["size"] > 48 * MIB
    with union(base, base / "tree", image):
        (base / "mnt/more").unlink()
        check(base / "mnt")


def test_what_grow_asks_for(base: Path, image: Path, asked: Path) -> None:
    with union(base, base / "tree", image):
        change(base / "mnt")
        number = device_of(image)
        done("grow", image, "--size", "64M")
        assert asked.read_text() == f"{number} {64 * MIB // 4096}\n"
        assert image.stat().st_size == 64 * MIB
    # Longer than its file system, which the next grow makes good.
    assert store("check", image).returncode == 0
    done("grow", image, "--size", "64M")
    assert facts("info", image)["size"] > 48 * MIB


def test_what_autogrow_asks_for(base: Path, image: Path, asked: Path) -> None:
    """Step by step to the largest: what is always said yes to, and never helps."""
    made = union(base, base / "tree", image, "autogrow=128M", "low-water=1K")
    with made:
        number = device_of(image)
        wait_until(lambda: image.stat().st_size == 128 * MIB)
        wait_until(lambda: f"has grown to {128}" in made.words())
        change(base / "mnt")
    lines = [line.split() for line in asked.read_text().splitlines()]
    assert {int(device) for device, _ in lines} == {number}
    sizes = [int(blocks) * 4096 for _, blocks in lines]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 128 * MIB
    grown = re.findall(r"has grown to (\d+) MiB", made.words())
    assert [int(size) for size in grown] == [size // MIB for size in sizes]
    done("grow", image, "--size", "128M")
    with union(base, base / "tree", image):
        check(base / "mnt")


def test_autogrow(base: Path, image: Path) -> None:
    """For real: it grows, or says once why it does not, and the union goes on as it is."""
    may = permitted(image)
    made = union(base, base / "tree", image, "autogrow=128M", "low-water=1K")
    made.expected = [] if may else ["does not grow"]
    with made:
        change(base / "mnt")
        if may:
            wait_until(lambda: image.stat().st_size == 128 * MIB)
        else:
            wait_until(lambda: bool((made.status().get("space") or {}).get("problem")))  # type: ignore[attr-defined]
            told = made.status()["space"]
            assert isinstance(told, dict)
            assert told["problem"].endswith(" does not grow: Operation not permitted")
            assert image.stat().st_size == 32 * MIB
        (base / "mnt/more").write_bytes(os.urandom(MIB))
    assert made.words().count("does not grow") <= 1
    assert store("check", image).returncode == 0
