# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls that the reference driver cannot express, by the engine: the same as on a plain directory
of the upper's file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast, get_args

import pytest

from tests.conftest import Stores
from tests.rig import snapshot, syscalls
from tests.rig.ground import Kind
from tests.rig.mounted import Unionfs

KINDS: tuple[Kind, ...] = get_args(Kind) if os.geteuid() == 0 else ("ext4",)
DEFAULT = "system.posix_acl_default"
ACCESS = "system.posix_acl_access"
# user::rwx user:1001:rw- group::r-x mask::rwx other::r--
ACL = bytes.fromhex(
    "02000000 01000700ffffffff 02000600e9030000 04000500ffffffff 10000700ffffffff 20000400ffffffff"
)


class Pair:
    """A union, and beside it, on the file system of its upper, a plain copy of what it shows."""

    def __init__(self, place: Path, upper: Path | None = None) -> None:
        self.place = place
        self.lower, self.plain = place / "lower", place / "plain"
        for name in ("lower", "plain", "upper", "mnt"):
            (place / name).mkdir()
        self.union = Unionfs(
            [self.lower],
            upper or place / "upper",
            place / "mnt",
            options=["driver=engine"],
        )
        self.upper, self.mnt = upper or place / "upper", self.union.mnt

    def fill(self, make: Callable[[Path], object]) -> None:
        """Make something in the lower and in the plain copy."""
        for root in (self.lower, self.plain):
            make(root)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """Mounted inside; the lower must be what it was."""
        before = snapshot.take(self.lower)
        with self.union:
            yield
        snapshot.assert_same(snapshot.take(self.lower), before, "the lower changed")

    def both(self, action: Callable[..., object], *args: object) -> object:
        """The same on both; what both came to."""
        got, want = outcome(action, self.mnt, *args), outcome(action, self.plain, *args)
        assert got == want
        return got

    def requests(self, kind: str) -> int:
        counted = cast("dict[str, dict[str, int]]", self.union.status()["requests"])
        return sum(who.get(kind, 0) for who in counted.values())


def outcome(action: Callable[..., object], root: Path, *args: object) -> object:
    try:
        return action(root, *args)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, stores: Stores) -> Iterator[Pair]:
    """A pair on each kind of file system; as an ordinary user on the one there is."""
    place = stores.place(request.param)
    yield Pair(place)
    stores.base.remove(place)


@pytest.fixture
def single(place: Path) -> Pair:
    """A pair on one file system, for what does not depend on it."""
    return Pair(place)


# O_TMPFILE and linkat


def nameless(folder: Path, mode: int = 0o666, flags: int = os.O_RDWR) -> int:
    return os.open(folder, os.O_TMPFILE | flags, mode)


def facts(status: os.stat_result) -> tuple[object, ...]:
    return oct(status.st_mode), status.st_nlink, status.st_size, status.st_uid, status.st_gid


def life_of_nameless(root: Path) -> object:
    """Made, used, named twice, one of the names over one that was removed before."""
    seen: list[object] = []
    (root / "folder/gone").unlink()
    fd = nameless(root / "folder", 0o640)
    try:
        seen += [facts(os.fstat(fd)), os.listdir(root / "folder")]
        os.write(fd, b"some text")
        os.fsync(fd)
        os.fchmod(fd, 0o604)
        os.setxattr(fd, "user.one", b"1")
        os.utime(fd, ns=(5, 10**9 + 7))
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        seen += [facts(os.fstat(fd)), os.read(again, 100), os.getxattr(fd, "user.one")]
        os.close(again)
        syscalls.link_descriptor(fd, os.fsencode(root / "folder/gone"))
        os.link(root / "folder/gone", root / "second")
        seen += [facts(os.fstat(fd)), os.fstat(fd).st_mtime_ns, sorted(os.listdir(root / "folder"))]
        assert os.stat(root / "second").st_ino == os.fstat(fd).st_ino
        seen.append(outcome(lambda root: syscalls.link_descriptor(fd, os.fsencode(root)), root))
        os.pwrite(fd, b"SOME", 0)
    finally:
        os.close(fd)
    (root / "second").unlink()
    return [*seen, facts(os.stat(root / "folder/gone")), (root / "folder/gone").read_bytes()]


def test_nameless_file(pair: Pair) -> None:
    def make(root: Path) -> None:
        (root / "folder").mkdir()
        (root / "folder/gone").write_text("old")
        (root / "folder/kept").write_text("kept")

    pair.fill(make)
    with pair.mounted():
        pair.both(life_of_nameless)
        ino = os.stat(pair.mnt / "folder/gone").st_ino
        pair.union.remount()
        pair.both(lambda root: facts(os.stat(root / "folder/gone")))
        assert os.stat(pair.mnt / "folder/gone").st_ino == ino
        assert (pair.mnt / "folder/gone").read_bytes() == b"SOME text"


def test_nameless_forbidden_to_be_named(single: Pair) -> None:
    with single.mounted():

        def exclusive(root: Path) -> None:
            fd = nameless(root, flags=os.O_WRONLY | os.O_EXCL)
            try:
                syscalls.link_descriptor(fd, os.fsencode(root / "name"))
            finally:
                os.close(fd)

        assert single.both(exclusive) == "ENOENT"
        assert single.both(lambda root: nameless(root, flags=os.O_RDONLY)) == "EINVAL"
        single.both(lambda root: nameless(root / "missing"))
        assert os.listdir(single.mnt) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0])
@pytest.mark.parametrize("bare", [True, False])
def test_nameless_inherits(single: Pair, umask: int, bare: bool) -> None:
    """Default ACL, set-group-ID, umask; from a directory of the lower and from one of the upper."""

    def make(root: Path) -> None:
        (root / "folder").mkdir()
        if not bare:
            os.setxattr(root / "folder", DEFAULT, ACL)
        os.chown(root / "folder", -1, 2000 if os.geteuid() == 0 else -1)
        (root / "folder").chmod(0o2777)

    def act(root: Path) -> object:
        fd = nameless(root / "folder", 0o6775)
        try:
            syscalls.link_descriptor(fd, os.fsencode(root / f"folder/{len(os.listdir(root))}"))
            names = sorted(os.listxattr(fd))
            return facts(os.fstat(fd)), names, [os.getxattr(fd, name) for name in names]
        finally:
            os.close(fd)

    single.fill(make)
    old = os.umask(umask)
    try:
        with single.mounted():
            single.both(act)
            for root in (single.mnt, single.plain):
                (root / "another").touch()
            single.both(act)
    finally:
        os.umask(old)


@pytest.mark.root
@pytest.mark.parametrize("acl", [True, False])
def test_nameless_of_another_user(single: Pair, acl: bool) -> None:
    def make(root: Path) -> None:
        (root / "folder").mkdir()
        if acl:
            os.setxattr(root / "folder", DEFAULT, ACL)
        (root / "folder").chmod(0o777)

    def act(root: Path) -> object:
        fd = nameless(root / "folder", 0o640)
        try:
            os.write(fd, b"mine")
            syscalls.link_descriptor(fd, os.fsencode(root / "folder/name"))
            return facts(os.fstat(fd)), sorted(os.listxattr(fd))
        finally:
            os.close(fd)

    single.fill(make)
    single.union.options.append("allow_other")
    with single.mounted(), syscalls.identity(1000, 1000, (1000,)):
        single.both(act)


def test_nameless_leaves_nothing(single: Pair) -> None:
    """Nothing is copied up for a file that gets no name, and nothing is left when the daemon dies
    with one open."""
    single.fill(lambda root: (root / "folder").mkdir())

    def below(path: Path) -> list[str]:
        return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.name != "owner")

    with single.mounted():
        before = below(single.upper)
        for _ in range(50):
            os.close(nameless(single.mnt / "folder"))
        held = nameless(single.mnt / "folder")
        os.write(held, b"lost")
        assert below(single.upper) == before
        table = cast("dict[str, int]", single.union.status()["table"])
        assert table["open_files"] == 1
        assert table["nodes"] <= 4
        os.kill(single.union.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.close(held)
        single.union.kill()
        assert below(single.upper) == before
        single.union.mount()
        assert os.listdir(single.mnt / "folder") == []
        assert below(single.upper) == before


def test_nameless_where_nothing_is_written(place: Path) -> None:
    pair = Pair(place)
    pair.union.flags = ["--ro"]
    with pair.union, pytest.raises(OSError, match="Read-only file system"):
        nameless(pair.mnt)


def test_nameless_by_the_reference_driver(place: Path) -> None:
    """It has no such call; nor has the engine over an upper that has none."""
    for name in ("below", "inner", "middle"):
        (place / name).mkdir()
    middle = Unionfs(
        [place / "below"], place / "inner", place / "middle", options=["driver=pyfuse3"]
    )
    with middle:
        (place / "middle/upper").mkdir()
        with pytest.raises(OSError, match="not supported"):
            nameless(place / "middle")
        pair = Pair(place, upper=place / "middle/upper")
        with pair.union, pytest.raises(OSError, match="not supported"):
            nameless(pair.mnt)


# Birth time


def birth(path: Path) -> int:
    return syscalls.birth(os.fsencode(path))


def test_birth_time(pair: Pair) -> None:
    """It stays what it is of the lower file, over copy-up, completion, rename, and a remount."""

    def make(root: Path) -> None:
        (root / "folder").mkdir()
        (root / "folder/file").write_text("text")
        (root / "large").write_bytes(bytes(200_000))
        (root / "link").symlink_to("file")
        os.mkfifo(root / "fifo")
        (root / "one").write_text("linked")
        os.link(root / "one", root / "two")

    pair.fill(make)
    names = ["folder", "folder/file", "large", "link", "fifo", "one", "two"]
    wanted = {name: birth(pair.lower / name) for name in names}
    with pair.mounted():

        def all_as_wanted() -> None:
            assert {name: birth(pair.mnt / name) for name in names} == wanted

        all_as_wanted()
        for name in names:
            os.utime(pair.mnt / name, ns=(1, 1), follow_symlinks=False)
        all_as_wanted()
        pair.union.remount()
        all_as_wanted()
        with open(pair.mnt / "large", "r+b") as file:  # completes the metadata-only copy
            file.write(b"data")
        os.rename(pair.mnt / "folder", pair.mnt / "moved")
        os.rename(pair.mnt / "moved", pair.mnt / "folder")
        before = max(wanted.values())
        (pair.mnt / "new").touch()
        (pair.mnt / "folder/directory").mkdir()
        made = [birth(pair.mnt / "new"), birth(pair.mnt / "folder/directory")]
        assert all(time >= before for time in made) or not before
        pair.union.remount()
        all_as_wanted()
        assert [birth(pair.mnt / "new"), birth(pair.mnt / "folder/directory")] == made


def test_birth_time_costs_who_asks(single: Pair) -> None:
    single.fill(lambda root: (root / "file").touch())
    with single.mounted():
        for _ in range(3):
            os.stat(single.mnt / "file")
        assert single.requests("statx") == 0
        wanted = birth(single.mnt / "file")
        asked = single.requests("statx"), single.requests("getattr")
        if not asked[0]:
            pytest.skip("this kernel does not ask a FUSE file system for times of birth")
        for _ in range(3):
            os.stat(single.mnt / "file")
            assert birth(single.mnt / "file") == wanted
        assert (single.requests("statx"), single.requests("getattr")) == asked == (1, asked[1])


def test_birth_time_of_a_former_upper(single: Pair) -> None:
    """What was copied up into an upper that is a lower now is as old as it was."""
    single.fill(lambda root: (root / "file").write_text("text"))
    wanted = birth(single.lower / "file")
    with single.union:
        os.utime(single.mnt / "file")
        assert birth(single.mnt / "file") == wanted
    (single.place / "upper2").mkdir()
    again = Unionfs(
        [single.upper, single.lower],
        single.place / "upper2",
        single.mnt,
        options=["driver=engine"],
    )
    with again:
        assert birth(single.mnt / "file") == wanted
        (single.mnt / "file").write_text("other")
        again.remount()
        assert birth(single.mnt / "file") == wanted


# File flags

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
    "make nameless": lambda p: os.close(nameless(p)),
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
