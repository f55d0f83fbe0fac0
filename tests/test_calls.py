# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls that the reference driver cannot express, by the engine: the same as on a plain directory
of the upper's file system. Files without a name, times of birth, poll, syncfs."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path
from typing import cast

import pytest

from tests.rig import syscalls
from tests.rig.mounted import Unionfs
from tests.rig.pair import Pair, outcome

DEFAULT = "system.posix_acl_default"
# user::rwx user:1001:rw- group::r-x mask::rwx other::r--
ACL = bytes.fromhex(
    "02000000 01000700ffffffff 02000600e9030000 04000500ffffffff 10000700ffffffff 20000400ffffffff"
)

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


def folders_to_inherit(root: Path) -> None:
    for name in ("bare", "acl"):
        (root / name).mkdir()
        os.chown(root / name, -1, 2000 if os.geteuid() == 0 else -1)
        (root / name).chmod(0o2777)
    os.setxattr(root / "acl", DEFAULT, ACL)


def inherit(root: Path, name: str, umask: int) -> object:
    folder = root / name
    old = os.umask(umask)
    try:
        fd = nameless(folder, 0o6775)
    finally:
        os.umask(old)
    try:
        syscalls.link_descriptor(fd, os.fsencode(folder / str(len(os.listdir(folder)))))
        names = sorted(os.listxattr(fd))
        return facts(os.fstat(fd)), names, [os.getxattr(fd, name) for name in names]
    finally:
        os.close(fd)


def test_nameless_inherits(single: Pair) -> None:
    """Default ACL, set-group-ID, umask; from a directory of the lower and from one of the upper,
    as oneself and as another."""
    single.fill(folders_to_inherit)
    actors = [(os.geteuid(), os.getegid())]
    if os.geteuid() == 0:
        single.union.options.append("allow_other")
        actors.append((1000, 1000))
    with single.mounted():
        for uid, gid in actors:
            for umask in (0o022, 0o077, 0):
                for name in ("bare", "acl"):
                    with syscalls.identity(uid, gid):
                        single.both(inherit, name, umask)


def test_nameless_leaves_nothing(single: Pair) -> None:
    """Nothing is copied up for a file that gets no name, and nothing is left when the daemon dies
    with one open."""
    single.fill(lambda root: (root / "folder").mkdir())

    def below(path: Path) -> list[str]:
        # Who has it, and while it is checked after a kill, that it is.
        passing = ("owner", "unchecked")
        return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.name not in passing)

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


# The rest


def test_poll_is_asked_once(single: Pair) -> None:
    single.fill(lambda root: (root / "file").touch())

    def ready(root: Path) -> object:
        with open(root / "file", "r+b") as file:
            poll = select.poll()
            poll.register(file, select.POLLIN | select.POLLOUT | select.POLLPRI)
            return [event for _, event in poll.poll(0)]

    with single.mounted():
        for _ in range(3):
            single.both(ready)
        assert single.requests("poll") <= 1


def test_syncfs(single: Pair) -> None:
    """It succeeds; the kernel asks us nothing, so that what it makes durable is not ours to say."""
    single.fill(lambda root: (root / "file").write_bytes(bytes(8192)))
    with single.mounted(), open(single.mnt / "file", "r+b", buffering=0) as file:
        file.write(b"text")
        single.both(lambda root: syscalls.syncfs(file.fileno()))
        assert (single.upper / "file").read_bytes()[:4] == b"text"
