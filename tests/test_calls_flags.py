# SPDX-License-Identifier: GPL-2.0-or-later
"""File flags (ioctl_iflags(2)): as on a plain directory of the upper's file system, and as kernel
overlayfs heeds those of a lower."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rig import as_user, snapshot, syscalls
from tests.rig.pair import Pair, outcome

ACCESS = "system.posix_acl_access"
# user::rwx user:1001:rw- group::r-x mask::rwx other::r--
ACL = bytes.fromhex(
    "02000000 01000700ffffffff 02000600e9030000 04000500ffffffff 10000700ffffffff 20000400ffffffff"
)

SYNC, IMMUTABLE, APPEND, NODUMP, NOATIME, DIRSYNC = 0x8, 0x10, 0x20, 0x40, 0x80, 0x10000
INDEXED = 0x1000  # ext4: a directory's own doing


def flags(path: Path) -> int:
    return syscalls.get_flags(path) & ~INDEXED


def toggle(path: Path, bits: int) -> int:
    syscalls.set_flags(path, syscalls.get_flags(path) ^ bits)
    return flags(path)


def tree_for_flags(root: Path) -> None:
    (root / "folder").mkdir()
    (root / "folder/file").write_text("text")
    (root / "large").write_bytes(b"large " * 40_000)
    (root / "link").symlink_to("large")
    os.mkfifo(root / "fifo")


def test_file_flags(pair: Pair) -> None:
    """Each flag of a file and of a directory, set and taken away; as the file system takes it."""
    pair.fill(tree_for_flags)
    names = ["folder/file", "large", "folder", "new", ""]
    with pair.mounted():
        for root in (pair.mnt, pair.plain):
            (root / "new").touch()
        for name in names:
            pair.both(lambda root, name: flags(root / name), name)
            pair.both(lambda root, name: syscalls.get_xflags(root / name)[0] & 0x7FFF_FFFF, name)
        for bits in (NODUMP, NOATIME, SYNC, DIRSYNC, NODUMP | NOATIME, 0x4000, 0x4, 0x80_0000):
            for name in names:
                pair.both(lambda root, name, bits: toggle(root / name, bits), name, bits)
        pair.union.remount()
        for name in names:
            pair.both(lambda root, name: flags(root / name), name)
            assert (pair.mnt / name).stat().st_ino
        assert (pair.mnt / "large").read_bytes() == (pair.plain / "large").read_bytes()
        with pytest.raises(OSError, match="ioctl"):
            flags(pair.mnt / "fifo")  # the kernel asks a FUSE file system for no other kind's


def test_extended_flags(pair: Pair) -> None:
    pair.fill(tree_for_flags)

    def change(root: Path, xflags: int, project: int = 0) -> object:
        old = syscalls.get_xflags(root / "folder/file")
        syscalls.set_xflags(root / "folder/file", (old[0] ^ xflags, old[1], 0, project, old[4]))
        return change_of(root)

    def change_of(root: Path) -> object:
        got = syscalls.get_xflags(root / "folder/file")
        return got[0] & 0x7FFF_FFFF, got[1], got[3], flags(root / "folder/file")

    with pair.mounted():
        pair.both(change_of)
        pair.both(lambda root: change(root, 0x80))  # FS_XFLAG_NODUMP
        pair.both(lambda root: change(root, 0x40, 77))  # FS_XFLAG_NOATIME
        pair.both(lambda root: change(root, 0x2))  # FS_XFLAG_PREALLOC
        pair.union.remount()
        pair.both(change_of)


def test_flags_move_ctime(single: Pair) -> None:
    """The kernel does not know that they do, and is told."""
    single.fill(lambda root: (root / "file").touch())
    with single.mounted():
        os.utime(single.mnt / "file")
        before = os.stat(single.mnt / "file")
        toggle(single.mnt / "file", NODUMP)
        after = os.stat(single.mnt / "file")
        assert after.st_ctime_ns > before.st_ctime_ns
        assert after.st_mtime_ns == before.st_mtime_ns


def test_generation(single: Pair) -> None:
    single.fill(lambda root: (root / "file").touch())

    def generation(root: Path) -> bytes:
        with open(root / "file", "rb") as file:
            return fcntl.ioctl(file, syscalls.FS_IOC_GETVERSION, bytes(8))

    with single.mounted():
        assert generation(single.mnt) == generation(single.lower)
        with open(single.mnt / "file", "rb") as file, pytest.raises(OSError, match="ioctl"):
            fcntl.ioctl(file, 0x5401, bytes(60))  # TCGETS


def test_copies_keep_flags(pair: Pair) -> None:
    """As kernel overlayfs's copies do, as far as the upper's file system has them."""
    for name, bits in (("file", NODUMP | NOATIME | SYNC), ("folder", NODUMP | NOATIME | DIRSYNC)):

        def make(root: Path, name: str = name, bits: int = bits) -> None:
            (root / name).mkdir() if name == "folder" else (root / name).write_bytes(bytes(100_000))
            for bit in (NODUMP, NOATIME, SYNC, DIRSYNC):
                with contextlib.suppress(OSError):
                    toggle(root / name, bits & bit)

        pair.fill(make)
    with pair.mounted():
        for name in ("file", "folder"):
            pair.both(lambda root, name: flags(root / name), name)
            os.utime(pair.mnt / name)
            pair.both(lambda root, name: flags(root / name), name)
        with open(pair.mnt / "file", "r+b") as file:  # completes the metadata-only copy
            file.write(b"data")
        pair.union.remount()
        for name in ("file", "folder"):
            pair.both(lambda root, name: flags(root / name), name)


CHANGES: dict[str, Callable[[Path], object]] = {
    "read": lambda p: p.read_bytes() if p.is_file() else sorted(os.listdir(p)),
    "write": lambda p: os.close(os.open(p, os.O_WRONLY)),
    "truncate at open": lambda p: os.close(os.open(p, os.O_RDONLY | os.O_TRUNC)),
    "truncate": lambda p: os.truncate(p, 1),
    "chmod": lambda p: os.chmod(p, 0o600),
    "chown": lambda p: os.chown(p, os.geteuid(), -1),
    "times": lambda p: os.utime(p, ns=(5, 5)),
    "setxattr": lambda p: os.setxattr(p, "user.new", b"1"),
    "removexattr": lambda p: os.removexattr(p, "user.old"),
    "acl": lambda p: os.setxattr(p, ACCESS, ACL),
    "link": lambda p: os.link(p, p.with_name("linked")),
    "rename": lambda p: os.rename(p, p.with_name("renamed")),
    "exchange": lambda p: syscalls.renameat2(
        os.fsencode(p), os.fsencode(p.with_name("other")), syscalls.RENAME_EXCHANGE
    ),
    "replace": lambda p: os.rename(p.with_name("other"), p),
    "unlink": lambda p: os.rmdir(p) if p.is_dir() else os.unlink(p),
    "append": lambda p: append(p),
    "make": lambda p: (p / "made").touch(),
    "make nameless": lambda p: os.close(os.open(p, os.O_TMPFILE | os.O_RDWR)),
    "make directory": lambda p: (p / "made too").mkdir(),
    "chmod within": lambda p: os.chmod(p / "within", 0o640),
    "append within": lambda p: append(p / "second"),
    "unlink within": lambda p: (p / "within").unlink(),
    "rename within": lambda p: os.rename(p / "second", p / "third"),
    "rename over": lambda p: os.rename(p.with_name("spare"), p / "second"),
    "unflag": lambda p: toggle(p, flags(p) & (IMMUTABLE | APPEND)),
}


def append(path: Path) -> bytes:
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        os.write(fd, b"more")
        os.write(fd, b"and more")
        return os.pread(fd, 1000, 0)
    finally:
        os.close(fd)


def store(path: Path) -> None:
    """Through a mapping."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        with mmap.mmap(fd, 0) as data:
            data[:8] = b"tampered"
            data.flush()
    finally:
        os.close(fd)


@pytest.fixture
def flagged(single: Pair) -> Iterator[Pair]:
    yield single
    for top in (single.lower, single.plain, single.place / "upper"):
        for path in (top, *top.rglob("*")):
            if not path.is_symlink() and (path.is_file() or path.is_dir()):
                toggle(path, flags(path) & (IMMUTABLE | APPEND))


THINGS = {"fi": IMMUTABLE, "fa": APPEND, "di": IMMUTABLE, "da": APPEND}


def make_things(root: Path) -> None:
    """A file and a directory for each flag, each in a directory of its own with what it needs."""
    for name in THINGS:
        thing = root / name / "thing"
        thing.parent.mkdir()
        if name[0] == "d":
            for path in (thing, thing.with_name("other")):
                path.mkdir()
            for inner in ("within", "second"):
                (thing / inner).write_text(inner)
        else:
            thing.write_text("text")
            thing.with_name("other").write_text("other")
        os.setxattr(thing, "user.old", b"1")
        thing.with_name("spare").write_text("spare")


def protect(root: Path) -> None:
    for name, bit in THINGS.items():
        toggle(root / name / "thing", bit)


@pytest.mark.root
@pytest.mark.parametrize("where", ["lower", "upper", "mount"])
def test_protected(flagged: Pair, where: str) -> None:
    """What may not be done to an immutable or append-only file or directory; each after the other,
    so that what may be done has been, and is there after a remount."""
    flagged.fill(make_things)
    if where == "lower":
        flagged.fill(protect)
    with flagged.mounted():
        if where == "upper":
            for root in (flagged.mnt, flagged.plain):
                for path in (p for p in root.rglob("*") if "thing" in p.parts):
                    os.utime(path, ns=(10**9, 10**9))
            flagged.union.umount()
            for root in (flagged.upper, flagged.plain):
                protect(root)
            flagged.union.mount()
        elif where == "mount":
            flagged.both(protect)
        for thing in THINGS:
            flagged.both(lambda root, name: flags(root / name / "thing"), thing)
            for name, change in CHANGES.items():
                got, want = (
                    outcome(change, root / thing / "thing") for root in (flagged.mnt, flagged.plain)
                )
                assert got == want, (thing, name)
        flagged.union.remount()
        assert (
            snapshot.differences(snapshot.take(flagged.mnt), snapshot.take(flagged.plain), fresh=0)
            == []
        ), "after all"


@pytest.mark.root
@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_an_append_only_file_is_not_stored_to(flagged: Pair, passthrough: str) -> None:
    """A plain one is not mapped writable (EACCES), which FUSE cannot say: the store fails."""
    flagged.fill(lambda root: (root / "log").write_text("an important line\n"))
    flagged.union.options.append(f"passthrough={passthrough}")
    with flagged.mounted():
        log = flagged.mnt / "log"
        append(log)
        toggle(log, APPEND)
        before = (flagged.upper / "log").read_bytes()
        with pytest.raises(PermissionError):
            store(log)
        assert (flagged.upper / "log").read_bytes() == before
        append(log)
        assert (flagged.upper / "log").read_bytes() == before + b"moreand more"


@pytest.mark.root
@pytest.mark.parametrize("gid", [0, as_user.GID])
def test_an_acl_removed_by_another_group(pair: Pair, gid: int) -> None:
    """tmpfs takes set-group-ID away then, as with an ACL that is set; others leave it."""

    def make(root: Path) -> None:
        for kind in ("dir", "file"):
            path = root / kind
            path.mkdir() if kind == "dir" else path.touch()
            os.chown(path, as_user.UID, gid)
            path.chmod(0o2775)

    def remove(root: Path, name: str) -> int:
        with syscalls.identity(as_user.UID, as_user.GID):
            os.removexattr(root / name, ACCESS)
        return (root / name).stat().st_mode

    pair.fill(make)
    for place in (pair.place, *pair.place.parents):
        if not place.stat().st_mode & 0o001:
            place.chmod(place.stat().st_mode | 0o011)
    with pair.mounted():
        for name in ("dir", "file"):
            pair.both(remove, name)
