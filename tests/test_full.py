# SPDX-License-Identifier: GPL-2.0-or-later
"""A full upper: the error is ENOSPC, the old content is intact, the next request works.

First on small file systems that really are full, then with each single step of each kind of change
failing as it would on one.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.rig import ground, snapshot
from tests.rig.ground import Ground, Kind
from tests.rig.mounted import Unionfs
from tests.test_crash import CASES, PAST, Rig, compare, left_overs, steps_of

pytestmark = pytest.mark.root

MIB = 1 << 20
BIG = bytes(range(256)) * (8 * MIB // 256)


def code_of(change: Callable[[], object]) -> int:
    """The errno with which a change fails; 0 if it does not."""
    try:
        change()
    except OSError as error:
        return error.errno or -1
    return 0


class Small:
    """A union whose upper lies on a small file system, with a ballast that can fill it."""

    def __init__(self, base: Ground, kind: Kind, options: str = "") -> None:
        self.disk = base.filesystem("disk", kind, 24) if not options else base.directory("disk")
        if options:
            ground.run("mount", "-t", kind, "-o", options, kind, self.disk)
            base.later(lambda: ground.run("umount", self.disk))
        self.lower = base.directory("lower")
        (self.lower / "big").write_bytes(BIG)
        (self.lower / "little").write_bytes(b"little")
        (self.lower / ("d" * 200)).mkdir()
        (self.lower / ("d" * 200) / ("e" * 200)).mkdir()
        (self.lower / ("d" * 200) / ("e" * 200) / "file").write_bytes(b"deep")
        for path in sorted(self.lower.rglob("*"), reverse=True):
            os.utime(path, ns=(PAST, PAST))
        self.before = snapshot.take(self.lower)
        (self.disk / "upper").mkdir()
        self.union = Unionfs([self.lower], self.disk / "upper", base.directory("mnt"))
        self.mnt = self.union.mnt

    def fill(self, free: int = 0) -> None:
        """Leave so many bytes, no more."""
        with open(self.disk / "ballast", "ab", buffering=0) as file:
            size = MIB
            while size >= 512:
                if code_of(partial(file.write, bytes(size))) == errno.ENOSPC:
                    size //= 2
            os.fsync(file.fileno())
            file.truncate(max(0, os.fstat(file.fileno()).st_size - free))

    def drain(self) -> None:
        (self.disk / "ballast").unlink()

    def fill_inodes(self) -> None:
        (self.disk / "inodes").mkdir()
        made = (partial(os.mknod, self.disk / "inodes" / str(number)) for number in range(10**6))
        assert next(filter(None, map(code_of, made))) == errno.ENOSPC

    def drain_inodes(self) -> None:
        for path in sorted((self.disk / "inodes").iterdir())[:50]:
            path.unlink()

    def refused(self, change: Callable[[], object], *codes: int, remount: bool = True) -> None:
        """The change fails with ENOSPC, nothing of it is left, and the union goes on."""
        assert self.union.upper is not None
        shown = snapshot.take(self.mnt)
        assert code_of(change) in (codes or (errno.ENOSPC,))
        assert left_overs(self.union.upper) == []
        assert not compare(snapshot.take(self.mnt), shown, time.time_ns() - 60 * 10**9)
        assert (self.mnt / "little").read_bytes() == b"little"
        if remount:
            self.union.remount()
        assert not compare(snapshot.take(self.mnt), shown, time.time_ns() - 60 * 10**9)


@pytest.fixture(params=["ext4", "tmpfs"])
def small(request: pytest.FixtureRequest) -> Iterator[Small]:
    with Ground("unionfs-full-") as base:
        small = Small(base, request.param)
        with small.union:
            yield small
        snapshot.assert_same(snapshot.take(small.lower), small.before, "the lower")


@pytest.fixture
def few_inodes() -> Iterator[Small]:
    with Ground("unionfs-full-") as base:
        small = Small(base, "tmpfs", "mode=0755,size=24m,nr_inodes=200")
        with small.union:
            yield small


def test_copy_up(small: Small) -> None:
    small.fill(2 * MIB)
    small.refused(lambda: os.open(small.mnt / "big", os.O_RDWR))
    assert (small.mnt / "big").read_bytes() == BIG
    small.drain()
    with open(small.mnt / "big", "r+b") as file:
        file.write(b"new")
    assert (small.mnt / "big").read_bytes() == b"new" + BIG[3:]


def test_completion_of_data(small: Small) -> None:
    os.chmod(small.mnt / "big", 0o600)
    small.fill(2 * MIB)
    small.refused(lambda: os.open(small.mnt / "big", os.O_RDWR))
    assert (small.mnt / "big").read_bytes() == BIG
    small.drain()
    with open(small.mnt / "big", "r+b") as file:
        file.write(b"new")
    small.union.remount()
    assert (small.mnt / "big").read_bytes() == b"new" + BIG[3:]


def test_completion_gives_its_space_back(small: Small) -> None:
    os.chmod(small.mnt / "big", 0o600)
    small.fill(4 * MIB)
    free = os.statvfs(small.disk).f_bfree
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        os.open(small.mnt / "big", os.O_RDWR)
    os.sync()
    assert os.statvfs(small.disk).f_bfree >= free - 16, "the half of the data stays allocated"


def test_write(small: Small) -> None:
    path = small.mnt / "little"
    fd = os.open(path, os.O_RDWR)
    try:
        small.fill()
        written = (partial(os.pwrite, fd, bytes(MIB), at * MIB) for at in range(1, 100))
        assert next(filter(None, map(code_of, written))) == errno.ENOSPC
        assert os.pread(fd, 6, 0) == b"little"
        small.drain()
        assert os.pwrite(fd, b"later", 6) == 5
    finally:
        os.close(fd)
    assert path.read_bytes()[:11] == b"littlelater"


def test_large_write_is_short_or_fails(small: Small) -> None:
    """What write(2) says to have written can be read back."""
    small.fill(100_000)
    fd = os.open(small.mnt / "new", os.O_CREAT | os.O_RDWR)
    try:
        said: list[int] = []
        code = code_of(lambda: said.append(os.write(fd, b"x" * MIB)))
        assert code == (0 if said else errno.ENOSPC)
        size = os.fstat(fd).st_size
        assert [size] == said or (not said and size == 0)
        assert size < MIB
        assert os.pread(fd, MIB, 0) == b"x" * size
    finally:
        os.close(fd)


def test_rename_that_needs_a_redirect(small: Small) -> None:
    """Of 400 bytes: ext4 needs a block for it."""
    old, new = small.mnt / ("d" * 200) / ("e" * 200), small.mnt / ("d" * 200) / "moved"
    os.chmod(old, 0o700)
    small.fill()
    if code := code_of(lambda: os.rename(old, new)):
        assert code == errno.ENOSPC
        assert (old / "file").read_bytes() == b"deep"
        assert not new.exists()
        small.refused(lambda: os.rename(old, new))
        small.drain()
        os.rename(old, new)
    small.union.remount()
    assert (new / "file").read_bytes() == b"deep"


def test_mkdir_and_create(small: Small) -> None:
    """Until nothing fits any more: each one is there or not."""
    small.fill()
    made = []
    name = "n" * 240
    for number in range(3000):
        path = small.mnt / f"{name}{number}"
        if code := code_of(path.mkdir if number % 2 else path.touch):
            assert code == errno.ENOSPC
            small.refused(lambda: (small.mnt / "one-more").mkdir())
            break
        made.append(path.name)
    small.union.remount()
    assert {p.name for p in small.mnt.iterdir() if p.name.startswith("nn")} == set(made)
    small.drain()
    (small.mnt / "one-more").mkdir()


def test_no_inodes_left(few_inodes: Small) -> None:
    small = few_inodes
    small.fill_inodes()
    deep = small.mnt / ("d" * 200)
    changes: list[Callable[[], object]] = [
        lambda: (small.mnt / "new").touch(),
        lambda: (small.mnt / "new").mkdir(),
        lambda: (small.mnt / "new").symlink_to("x"),
        lambda: os.open(small.mnt / "little", os.O_RDWR),
        lambda: (small.mnt / "little").unlink(),
        lambda: os.chmod(deep, 0o700),
        lambda: os.rename(deep, small.mnt / "moved"),
        lambda: os.rename(small.mnt / "little", deep / "moved"),
    ]
    for change in changes:
        small.refused(change, remount=False)
    small.drain_inodes()
    os.rename(deep, small.mnt / "moved")
    (small.mnt / "little").unlink()
    (small.mnt / "little").mkdir()
    small.union.remount()
    assert (small.mnt / "little").is_dir()
    assert (small.mnt / "moved" / ("e" * 200) / "file").read_bytes() == b"deep"


def test_mount_without_inodes(few_inodes: Small) -> None:
    """What is full can be mounted, else nobody could remove anything through the union."""
    few_inodes.fill_inodes()
    few_inodes.union.remount()
    assert (few_inodes.mnt / "little").read_bytes() == b"little"
    few_inodes.drain_inodes()
    (few_inodes.mnt / "new").write_bytes(b"new")


class Busy:
    """Programs that open and close a file all the time, so that several threads answer."""

    def __init__(self, path: Path) -> None:
        program = "import os, sys\nwhile True: os.close(os.open(sys.argv[1], os.O_RDONLY))"
        command = [sys.executable, "-c", program, str(path)]
        self._programs = [subprocess.Popen(command) for _ in range(2)]

    def __enter__(self) -> Busy:
        return self

    def __exit__(self, *_exc: object) -> None:
        for program in self._programs:
            program.kill()
            program.wait()


def _write_and_remove(path: Path, size: int) -> int:
    """What writing fails with; 0 if it does not."""
    with open(path, "wb", buffering=0) as file:
        code = code_of(lambda: [file.write(BIG[:MIB]) for _ in range(size)])
    path.unlink()
    return code


@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_what_was_removed_has_left_its_room(passthrough: str) -> None:
    """Also to who writes past the daemon, or asks how much there is."""
    with Ground("unionfs-full-") as base:
        disk, lower = base.filesystem("disk", "tmpfs", 12), base.directory("lower")
        (lower / "little").write_bytes(b"little")
        (disk / "upper").mkdir()
        options = [f"passthrough={passthrough}"]
        with Unionfs([lower], disk / "upper", base.directory("mnt"), options=options) as union:
            empty = os.statvfs(union.mnt).f_bfree
            with Busy(union.mnt / "little"):
                time.sleep(0.2)
                failed = [_write_and_remove(union.mnt / "new", 9) for _ in range(250)]
                free = []
                for _ in range(150):
                    _write_and_remove(union.mnt / "new", 4)
                    free.append(os.statvfs(union.mnt).f_bfree)
            assert not any(failed)
            assert min(free) > empty - 512


def test_who_keeps_what_he_removed_holds_up_nobody() -> None:
    with Ground("unionfs-full-") as base:
        disk, lower = base.filesystem("disk", "tmpfs", 12), base.directory("lower")
        (disk / "upper").mkdir()
        with Unionfs([lower], disk / "upper", base.directory("mnt")) as union:
            path = union.mnt / "kept"
            with open(path, "wb") as kept:
                kept.write(BIG)
                path.unlink()
                os.statvfs(union.mnt)
                before = time.monotonic()
                for _ in range(100):
                    assert _write_and_remove(union.mnt / "new", 1) == 0
                    assert os.statvfs(union.mnt).f_bfree < 1024
                assert time.monotonic() - before < 5


def test_quota() -> None:
    """EDQUOT comes through as what it is; checked with tmpfs's quota, where the kernel has it."""
    with Ground("unionfs-full-") as base:
        point = base.directory("probe")
        options = "mode=0755,usrquota,usrquota_block_hardlimit=4M"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        probe = subprocess.run(command, capture_output=True, text=True, check=False)
        if probe.returncode:
            pytest.skip(f"no quota on tmpfs: {probe.stderr.strip()}")
        if code_of(lambda: (point / "file").write_bytes(BIG)) != errno.EDQUOT:
            pytest.skip("root's quota is not enforced here")
        ground.run("umount", point)
        small = Small(base, "tmpfs", options)
        with small.union:
            small.refused(lambda: os.open(small.mnt / "big", os.O_RDWR), errno.EDQUOT)


# ---- each step ----

# What allocates; the others do not fail for want of space.
_ALLOCATES = (
    "open",
    "mkdir",
    "mknod",
    "symlink",
    "link",
    "rename",
    "renameat2",
    "setxattr",
    "xattr.setxattr",
    "tree.make_impure",
    "tree.make_whiteout",
    "copy_data",
    "copy_data, half way",
    "copy_xattrs",
)
_STEPPED = [
    "full copy-up",
    "full copy-up in a lower directory",
    "metadata-only copy-up, chmod",
    "completion of the data",
    "hard link copied up",
    "second name of a hard link copied up",
    "link over a whiteout",
    "link to an indexed file",
    "create over a whiteout",
    "create by a user over a whiteout",
    "mkdir over a whiteout",
    "unlink of a copied-up file",
    "unlink of a lower hard link",
    "unlink of a copied-up hard link",
    "rmdir of a lower directory",
    "rmdir of a directory of whiteouts",
    "rename over a hard link",
    "rename of a metadata-only copy",
    "rename of a lower directory",
    "rename of a directory over a whiteout",
    "rename over a directory of whiteouts",
    "exchange of a file and a directory",
]


@pytest.mark.parametrize("name", _STEPPED)
def test_each_step_fails(place: Path, name: str) -> None:
    """The tree is the old one after ENOSPC at any step, and the change goes through later."""
    fresh = time.time_ns() - 10**7
    case = CASES[name]
    rig = Rig(place, case)
    before, after, steps = steps_of(rig, fresh)
    wrong: list[str] = []
    for at, step in enumerate(steps, 1):
        if step not in _ALLOCATES:
            continue
        union = rig.prepared(at, errno.ENOSPC)
        union.arm()
        code = code_of(partial(case.change, union.mnt))
        union.disarm()
        assert union.upper is not None
        found = [f"errno {code}"] if code not in (0, errno.ENOSPC) else []
        found += [f"left over: {name}" for name in left_overs(union.upper)]
        found += compare(snapshot.take(union.mnt), before if code else after, fresh)[:6]
        if code:
            # In the same daemon: nothing of the failure may stick.
            if again := code_of(partial(case.change, union.mnt)):
                found.append(f"the change does not go through afterwards: errno {again}")
            else:
                union.remount()
                late = compare(snapshot.take(union.mnt), after, fresh)
                found += [f"done afterwards: {line}" for line in late[:6]]
        union.umount()
        wrong += [f"step {at} of {len(steps)} ({step}) fails: {line}" for line in found]
    assert not wrong, "\n".join(["; ".join(steps), *wrong])
