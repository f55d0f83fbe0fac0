# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done to a whole image so that it is none any more, and what is no image at all.

An edit changes a few bytes of a copy; a thing is made where an image was expected.
"""

from __future__ import annotations

import gzip
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from tests.rig import ground, images
from unionfs.stores.tools import find

Edit = Callable[[Path], object]
KIB, MIB = 1 << 10, 1 << 20
_SUPER = 1024  # ext4's and erofs's
_BTRFS_SUPER = 64 * KIB
_BLOCK = 4096


def whole(kind: str, place: Path) -> Path:
    """An image of this kind, with a little in it where it is for reading only."""
    path = place / f"whole.{kind}"
    if kind in images.WRITABLE:
        return images.make(path, kind)
    tree = place / f"tree.{kind}"
    (tree / "directory").mkdir(parents=True)
    (tree / "file").write_text("lower\n")
    (tree / "big").write_bytes(random.Random(1).randbytes(300_000))
    if kind == "squashfs":
        return images.squash(path, tree)
    ground.run("mkfs.erofs", "--quiet", path, tree)
    return path


def write(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def _read(path: Path, offset: int, form: str) -> int:
    with open(path, "rb") as file:
        file.seek(offset)
        return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])


def _at(offset: int, data: bytes) -> Edit:
    return lambda path: write(path, offset, data)


def _noise(offset: int, length: int) -> Edit:
    return _at(offset, random.Random(offset).randbytes(length))


def _cut(length: int) -> Edit:
    """A negative length is counted from the end."""
    return lambda path: os.truncate(path, length if length >= 0 else path.stat().st_size + length)


def _half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _hollow(path: Path) -> None:
    """Nothing but the first MiB is there."""
    size = path.stat().st_size
    os.truncate(path, MIB)
    os.truncate(path, size)


def _inode(number: int, count: int = 1) -> Edit:
    """Inodes of ext4 that are all zeros; where they are, the second block says."""

    def edit(path: Path) -> None:
        table = _read(path, _BLOCK + 8, "<I") * _BLOCK
        write(path, table + (number - 1) * 256, bytes(256 * count))

    return edit


def _no_journal(path: Path) -> None:
    """It is needed, and is not one."""
    write(path, _SUPER + 0x60, struct.pack("<I", _read(path, _SUPER + 0x60, "<I") | 4))
    _inode(8)(path)


def _noted_errors(path: Path) -> None:
    """So it is repaired before it is mounted, which this cannot be."""
    write(path, _SUPER + 0x3A, b"\x02\x00")
    _inode(2)(path)
    _at(_BLOCK, bytes(64))(path)


def _xfs_root(path: Path) -> None:
    write(path, _read(path, 56, ">Q") * _read(path, 104, ">H"), bytes(512))


def _squash_table(number: int) -> Edit:
    """A table of squashfs lies beyond its end: ids, attributes, inodes, directories, fragments."""
    return lambda path: write(path, 48 + 8 * number, struct.pack("<Q", path.stat().st_size + MIB))


def _within_inodes(path: Path) -> None:
    os.truncate(path, _read(path, 64, "<Q") + 20)


EDITS: dict[str, dict[str, Edit]] = {
    "ext4": {
        "cut in its super block": _cut(_SUPER + 100),
        "cut after 68 KiB": _cut(68 * KIB),
        "cut by half": _half,
        "cut by a block": _cut(-_BLOCK),
        "noise in its super block": _noise(_SUPER, 60),
        "no first super block": _at(_SUPER, bytes(1024)),
        "unknown features": _at(_SUPER + 0x60, b"\xff" * 4),
        "a huge size": _at(_SUPER + 4, b"\xff" * 4),
        "an absurd block size": _at(_SUPER + 24, b"\xff" * 4),
        "absurd inodes": _at(_SUPER + 0x58, b"\x03\x00"),
        "no inodes in a group": _at(_SUPER + 40, bytes(4)),
        "no group descriptors": _at(_BLOCK, bytes(_BLOCK)),
        "noise in its group descriptors": _noise(_BLOCK, 64),
        "no root": _inode(2),
        "a hole in its inodes": _inode(1, 64),
        "no journal": _no_journal,
        "noted errors": _noted_errors,
    },
    "xfs": {
        "cut after 68 KiB": _cut(68 * KIB),
        "cut by half": _half,
        "noise in its super block": _noise(0, 40),
        "a wrong checksum": _at(224, b"\xff" * 4),
        "an absurd block size": _at(4, b"\x00\x00\x00\x01"),
        "a hole in its headers": _at(512, bytes(3 * 512)),
        "no root": _xfs_root,
    },
    "btrfs": {
        "cut after 68 KiB": _cut(68 * KIB),
        "cut by half": _half,
        "noise in its super block": _noise(_BTRFS_SUPER, 40),
        "a wrong checksum": _at(_BTRFS_SUPER, b"\xff" * 4),
        "nothing but its super block": _hollow,
    },
    "squashfs": {
        "cut after 100 bytes": _cut(100),
        "cut by half": _half,
        "cut within its inodes": _within_inodes,
        "noise in its super block": _noise(8, 40),
        "an unknown compression": _at(20, b"\x63\x00"),
        "an absurd block size": _at(12, b"\xff" * 4),
        "a huge size": _at(40, b"\xff" * 7 + b"\x0f"),
        "no ids": _squash_table(0),
        "inodes beyond its end": _squash_table(2),
    },
    "erofs": {
        "cut after 1100 bytes": _cut(1100),
        "noise in its super block": _noise(_SUPER, 40),
        "a wrong checksum": _at(_SUPER + 4, b"\xff" * 4),
        "an absurd block size": _at(_SUPER + 12, b"\x40"),
    },
}


# Things that hold no file system


def _table(kind: str) -> Edit:
    def make(path: Path) -> None:
        _zeros(4 * MIB)(path)
        sfdisk = find("sfdisk")
        assert sfdisk is not None
        ground.run("sh", "-c", f"echo 'size=1MiB' | {sfdisk} -q -X {kind} {path}")

    return make


def _zeros(length: int) -> Edit:
    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(length)

    return make


def _holding(offset: int, data: bytes, length: int = MIB) -> Edit:
    def make(path: Path) -> None:
        _zeros(length)(path)
        write(path, offset, data)

    return make


def _swap(path: Path) -> None:
    _zeros(MIB)(path)
    mkswap = find("mkswap")
    assert mkswap is not None
    ground.run(mkswap, "-q", path)


def _gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress(b"whatever it was" * 1000))


def _tar(path: Path) -> None:
    ground.run("tar", "-cf", path, "-C", "/", "--files-from", "/dev/null")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        folder = os.open(path.parent, os.O_PATH)
        try:  # the path itself may be too long for a socket
            listening.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)


def _unreadable(path: Path) -> None:
    images.make(path)
    path.chmod(0)


def _locked(path: Path) -> None:
    images.make(path)
    path.chmod(0o400)


def _self(path: Path) -> None:
    path.symlink_to(path.name)


# iso9660's descriptor, in its sector 16, and no more.
_ISO = b"\x01CD001\x01" + bytes(33) + b"LABEL".ljust(32)


def _made_by(mkfs: str) -> Edit:
    def make(path: Path) -> None:
        _zeros(MIB)(path)
        program = find(mkfs)
        assert program is not None
        ground.run(program, path)

    return make


def _vfat(path: Path) -> None:
    """The smallest there is: a boot sector and the beginnings of its two tables."""
    boot = struct.pack(
        "<3s8sHBHBHHBHHHIIBBBI11s8s",
        *(b"\xeb\x3c\x90", b"MSDOS5.0", 512, 1, 1, 2, 512, 2048, 0xF8, 6, 32, 64, 0, 0),
        *(0x80, 0, 0x29, 0x1234, b"LABEL".ljust(11), b"FAT12".ljust(8)),
    )
    _zeros(MIB)(path)
    write(path, 0, boot.ljust(510, b"\0") + b"\x55\xaa")
    for table in (1, 7):
        write(path, table * 512, b"\xf8\xff\xff")


THINGS: dict[str, Edit] = {
    "empty": _zeros(0),
    "one byte": lambda path: path.write_bytes(b"x"),
    "text": lambda path: path.write_text("no image\n" * 100),
    "noise": lambda path: path.write_bytes(random.Random(7).randbytes(MIB)),
    "zeros": _zeros(MIB),
    "a huge hole": _zeros(1 << 42),
    "gzip": _gzipped,
    "tar": _tar,
    "partitions (dos)": _table("dos"),
    "partitions (gpt)": _table("gpt"),
    "swap": _swap,
    "LUKS": _holding(0, b"LUKS\xba\xbe\x00\x01" + b"aes".ljust(32, b"\0") + bytes(500)),
    "LVM": _holding(512, b"LABELONE\x01" + bytes(7) + bytes(8) + b"LVM2 001"),
    "iso9660 without content": _holding(32 * KIB, _ISO),
    "a FIFO": lambda path: os.mkfifo(path),
    "a socket": _socket,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": _self,
}
# File systems of others, by their names; where the kernel has one it is an upper like any other.
FOREIGN: dict[str, Edit] = {
    "bfs": _made_by("mkfs.bfs"),
    "minix": _made_by("mkfs.minix"),
    "vfat": _vfat,
}
# For a user only: root reads and writes them.
LOCKED: dict[str, Edit] = {"unreadable": _unreadable, "read-only": _locked}
