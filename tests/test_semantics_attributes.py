# SPDX-License-Identifier: GPL-2.0-or-later
"""Owner, mode, times, ACLs, capabilities, xattrs, and inode numbers that stay."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rig import layers, namespace, snapshot, syscalls
from tests.rig.arena import Arena
from tests.rig.mounted import DRIVER_VARIABLE
from tests.rig.syscalls import UTIME_NOW, UTIME_OMIT

OLD = 1_000_000_000_123_456_789
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
NOBODY = 0xFFFF_FFFF
CAPABILITY = struct.pack("<IIIII", 0x0200_0001, 1 << 13, 0, 0, 0)


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


# user::rwx user:1001:rw- group::r-x mask::rwx other::r--
FULL = acl((1, 7, NOBODY), (2, 6, 1001), (4, 5, NOBODY), (16, 7, NOBODY), (32, 4, NOBODY))


def mode(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_times_keep_their_nanoseconds(arena: Arena) -> None:
    (arena.lower / "f").write_text("f")
    (arena.lower / "d").mkdir()
    (arena.lower / "s").symlink_to("f")
    values = [(0, 1), (OLD, OLD + 1), (-1, -999_999_999), ((2**31 + 5) * 10**9 + 7, 2**33 * 10**9)]
    with arena.mounted() as mnt:
        (mnt / "new").write_text("new")
        for name in ("f", "d", "s", "new"):
            for atime, mtime in values:
                before = time.time_ns() - 20_000_000
                os.utime(mnt / name, ns=(atime, mtime), follow_symlinks=False)
                st = os.lstat(mnt / name)
                assert (st.st_atime_ns, st.st_mtime_ns) == (atime, mtime), name
                assert st.st_ctime_ns >= before
        arena.remount()
        for name in ("f", "d", "new"):
            st = os.lstat(mnt / name)
            assert (st.st_atime_ns, st.st_mtime_ns) == values[-1], name


def test_utime_now_and_omit(arena: Arena) -> None:
    (arena.lower / "f").write_text("f")
    os.utime(arena.lower / "f", ns=(OLD, OLD))
    with arena.mounted() as mnt:
        path = os.fsencode(mnt / "f")
        before = time.time_ns() - 20_000_000
        syscalls.utimensat(path, (0, UTIME_OMIT), (0, UTIME_NOW), 0)
        st = os.stat(path)
        assert st.st_atime_ns == OLD
        assert st.st_mtime_ns >= before
        syscalls.utimensat(path, (5, 6), (0, UTIME_OMIT), 0)
        assert os.stat(path).st_atime_ns == 5 * 10**9 + 6
        assert os.stat(path).st_mtime_ns == st.st_mtime_ns


def test_changes_move_the_right_times(arena: Arena) -> None:
    for name in ("f", "g"):
        (arena.lower / name).write_text(name)
        os.utime(arena.lower / name, ns=(OLD, OLD))
    (arena.lower / "d").mkdir()
    os.utime(arena.lower / "d", ns=(OLD, OLD))
    with arena.mounted() as mnt:
        start = time.time_ns() - 20_000_000
        (mnt / "f").chmod(0o600)
        st = (mnt / "f").stat()
        assert (st.st_mtime_ns, st.st_ctime_ns >= start) == (OLD, True)
        os.rename(mnt / "f", mnt / "d" / "f")
        st = (mnt / "d" / "f").stat()
        assert (st.st_mtime_ns, st.st_ctime_ns >= start) == (OLD, True)
        assert (mnt / "d").stat().st_mtime_ns >= start
        os.utime(mnt / "d", ns=(OLD, OLD))
        os.link(mnt / "g", mnt / "d" / "g")
        assert (mnt / "g").stat().st_mtime_ns == OLD
        assert (mnt / "d").stat().st_mtime_ns >= start
        with open(mnt / "g", "a") as file:
            file.write("x")
        assert (mnt / "g").stat().st_mtime_ns >= start


def test_inode_numbers_stay(arena: Arena) -> None:
    low = arena.lower
    (low / "d" / "sub").mkdir(parents=True)
    (low / "d" / "f").write_text("f")
    (low / "s").symlink_to("d")
    os.mkfifo(low / "fifo")
    names = ["d", "d/sub", "d/f", "s", "fifo", "."]
    with arena.mounted() as mnt:
        (mnt / "new").write_text("new")
        (mnt / "newdir").mkdir()
        names += ["new", "newdir"]
        before = {name: os.lstat(mnt / name).st_ino for name in names}
        assert len(set(before.values())) == len(names)
        for entry in os.scandir(mnt):
            assert entry.inode() == before[entry.name], entry.name
        for name in names:
            os.utime(mnt / name, ns=(OLD, OLD), follow_symlinks=False)
        with open(mnt / "d" / "f", "a") as file:
            file.write("x")
        assert {name: os.lstat(mnt / name).st_ino for name in names} == before
        for entry in os.scandir(mnt):
            assert entry.inode() == before[entry.name], entry.name
        for _ in range(2):
            arena.remount()
            assert {name: os.lstat(mnt / name).st_ino for name in names} == before
        os.rename(mnt / "d", mnt / "moved")
        assert os.lstat(mnt / "moved" / "f").st_ino == before["d/f"]
        arena.remount()
        assert os.lstat(mnt / "moved").st_ino == before["d"]
        assert os.lstat(mnt / "moved" / "f").st_ino == before["d/f"]
        assert os.lstat(mnt / "moved" / "sub").st_ino == before["d/sub"]


def test_device_number_is_one_for_all(arena: Arena) -> None:
    (arena.lower / "d").mkdir()
    (arena.lower / "d" / "f").write_text("f")
    if arena.backend == "overlay" and os.geteuid() == 0:
        pytest.skip("kernel overlayfs: only with all layers on one file system")
    with arena.mounted() as mnt:
        (mnt / "new").write_text("new")
        numbers = {os.lstat(mnt / name).st_dev for name in (".", "d", "d/f", "new")}
        assert len(numbers) == 1


def test_acl_is_kept_and_inherited(arena: Arena) -> None:
    (arena.lower / "d").mkdir()
    (arena.lower / "f").write_text("f")
    os.setxattr(arena.lower / "f", ACCESS, FULL)
    os.setxattr(arena.lower / "d", DEFAULT, FULL)
    with arena.mounted() as mnt:
        assert os.getxattr(mnt / "f", ACCESS) == FULL
        (mnt / "f").write_text("copied up")
        assert os.getxattr(mnt / "f", ACCESS) == FULL
        assert mode(mnt / "f") == 0o774
        old = os.umask(0o077)
        try:
            # With a default ACL the umask does not count.
            os.close(os.open(mnt / "d" / "file", os.O_CREAT | os.O_WRONLY, 0o666))
            (mnt / "d" / "dir").mkdir(mode=0o777)
            os.mknod(mnt / "d" / "fifo", stat.S_IFIFO | 0o666)
            os.close(os.open(mnt / "plain", os.O_CREAT | os.O_WRONLY, 0o666))
            (mnt / "d" / "link").symlink_to("file")
        finally:
            os.umask(old)
        assert mode(mnt / "plain") == 0o600
        assert mode(mnt / "d" / "file") == 0o664
        assert mode(mnt / "d" / "fifo") == 0o664
        assert mode(mnt / "d" / "dir") == 0o774
        want = acl((1, 6, NOBODY), (2, 6, 1001), (4, 5, NOBODY), (16, 6, NOBODY), (32, 4, NOBODY))
        assert os.getxattr(mnt / "d" / "file", ACCESS) == want
        assert os.getxattr(mnt / "d" / "dir", DEFAULT) == FULL
        assert os.getxattr(mnt / "d" / "dir", ACCESS) == FULL
        os.chmod(mnt / "f", 0o640)
        masked = acl((1, 6, NOBODY), (2, 6, 1001), (4, 5, NOBODY), (16, 4, NOBODY), (32, 0, NOBODY))
        assert os.getxattr(mnt / "f", ACCESS) == masked
        arena.remount()
        assert os.getxattr(mnt / "f", ACCESS) == masked
        assert os.getxattr(mnt / "d" / "file", ACCESS) == want
        os.removexattr(mnt / "f", ACCESS)
        assert ACCESS not in os.listxattr(mnt / "f")
        (mnt / "d" / "made-after").write_text("x")
        assert ACCESS in os.listxattr(mnt / "d" / "made-after")


@pytest.mark.root
def test_acl_is_enforced(arena: Arena) -> None:
    (arena.lower / "f").write_text("f")
    (arena.lower / "f").chmod(0o600)
    os.setxattr(arena.lower / "f", ACCESS, FULL)
    with arena.mounted() as mnt:
        _open_to_all(arena.place, mnt)
        with syscalls.identity(1001, 1001), open(mnt / "f", "r+") as file:
            file.write("by 1001")
        with syscalls.identity(1002, 1002):
            assert (mnt / "f").read_text() == "by 1001"
            with pytest.raises(PermissionError):
                os.open(mnt / "f", os.O_RDWR)


def _open_to_all(place: Path, mnt: Path) -> None:
    for folder in [place, *place.parents]:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    mnt.chmod(0o777)


@pytest.mark.root
@pytest.mark.parametrize("change", ["write", "chown", "truncate"])
def test_capability_goes_with_a_change(arena: Arena, change: str) -> None:
    (arena.lower / "f").write_text("program")
    (arena.lower / "f").chmod(0o755)
    os.setxattr(arena.lower / "f", "security.capability", CAPABILITY)
    with arena.mounted() as mnt:
        path = mnt / "f"
        path.chmod(0o711)
        assert os.getxattr(path, "security.capability") == CAPABILITY
        if change == "write":
            with open(path, "r+") as file:
                file.write("P")
        elif change == "chown":
            os.chown(path, 1, 1)
        else:
            os.truncate(path, 3)
        assert "security.capability" not in os.listxattr(path)
        arena.remount()
        assert "security.capability" not in os.listxattr(path)


@pytest.mark.root
@pytest.mark.parametrize("size", [3, 1 << 20])
def test_a_capability_that_nobody_can_read(arena: Arena, size: int) -> None:
    """The kernel lists a malformed one, and does not say what it is: that refuses no change."""
    if arena.backend == "overlay":
        pytest.skip("kernel overlayfs refuses every change of such a file")
    name = "security.capability"
    (arena.lower / "f").write_bytes(bytes(size))
    if not arena.plain:
        os.setxattr(arena.lower / "f", name, b"")
    with arena.mounted() as mnt:
        (mnt / "f").chmod(0o700)
        with open(mnt / "f", "ab") as file:
            file.write(b"more")
        os.setxattr(mnt / "f", name, b"")
        if DRIVER_VARIABLE not in os.environ:  # pyfuse3 looks by itself, and cannot
            os.setxattr(mnt / "f", name, b"", os.XATTR_REPLACE)
        assert name in os.listxattr(mnt / "f")
        os.removexattr(mnt / "f", name)
        assert name not in os.listxattr(mnt / "f")
        arena.remount()
        assert mode(mnt / "f") == 0o700
        assert (mnt / "f").stat().st_size == size + 4


@pytest.mark.root
@pytest.mark.parametrize("change", ["write", "ftruncate", "truncate", "chown"])
@pytest.mark.parametrize("capable", [False, True])
def test_set_id_bits_and_who_changes_the_file(arena: Arena, change: str, capable: bool) -> None:
    """Set-group-ID without group execute goes too, if the writer is not of the group (ext4, xfs);
    root's writing takes nothing away but a capability, his chown does."""
    (arena.lower / "f").write_text("program")
    os.chown(arena.lower / "f", 1000, 3000)
    (arena.lower / "f").chmod(0o6666)
    if not (change == "chown" and capable):
        # With both, the kernel asks the same for root's chown to nobody and for his write.
        os.setxattr(arena.lower / "f", "security.capability", CAPABILITY)
    with arena.mounted() as mnt:
        _open_to_all(arena.place, mnt)
        path = mnt / "f"
        os.utime(path)
        caller = contextlib.nullcontext() if capable else syscalls.identity(1000, 1000, (2000,))
        with caller:
            if change == "chown":
                os.chown(path, -1, -1)
            elif change == "truncate":
                os.truncate(path, 3)
            else:
                fd = os.open(path, os.O_RDWR)
                if change == "write":
                    os.write(fd, b"P")
                else:
                    os.ftruncate(fd, 3)
                os.close(fd)
        left = 0o6666 if capable else 0o666
        if change == "chown":
            left = 0o2666 if capable else 0o666
        for _ in range(2):
            assert oct(mode(path)) == oct(left)
            assert "security.capability" not in os.listxattr(path)
            arena.remount()


@pytest.mark.root
@pytest.mark.parametrize("change", ["write", "ftruncate", "truncate", "O_TRUNC"])
@pytest.mark.parametrize("where", ["lower", "upper"])
def test_set_id_bits_and_a_root_without_cap_fsetid(arena: Arena, change: str, where: str) -> None:
    if change == "O_TRUNC" and DRIVER_VARIABLE in os.environ:
        pytest.skip("pyfuse3 does not tell of FUSE_OPEN_KILL_SUIDGID")
    (arena.lower / "f").write_text("program")
    (arena.lower / "f").chmod(0o6777)
    program = (
        "import os, sys\n"
        "change, path = sys.argv[1:]\n"
        "if change == 'truncate':\n"
        "    os.truncate(path, 3)\n"
        "    sys.exit()\n"
        "fd = os.open(path, os.O_RDWR | (os.O_TRUNC if change == 'O_TRUNC' else 0))\n"
        "if change == 'write':\n"
        "    os.write(fd, b'P')\n"
        "elif change == 'ftruncate':\n"
        "    os.ftruncate(fd, 3)\n"
    )
    with arena.mounted() as mnt:
        if where == "upper":
            os.utime(mnt / "f")
        less = ["setpriv", "--bounding-set=-fsetid", "--inh-caps=-fsetid", sys.executable, "-c"]
        subprocess.run([*less, program, change, mnt / "f"], check=True)
        assert oct(mode(mnt / "f")) == oct(0o777)
        arena.remount()
        assert oct(mode(mnt / "f")) == oct(0o777)


@pytest.mark.root
def test_set_group_id_and_root_of_a_user_namespace(arena: Arena) -> None:
    """He is above groups where the namespace knows the file's owner and group, and only there."""
    given = {"known": 100_005, "foreign": 3000, "kept": 100_005}
    for name, group in given.items():
        (arena.lower / name).write_text("program")
        os.chown(arena.lower / name, 100_000, group)
    (arena.lower / "kept").chmod(0o2745)
    with arena.mounted() as mnt:
        _open_to_all(arena.place, mnt)

        def change() -> None:
            for name in ("known", "foreign"):
                (mnt / name).chmod(0o2755)
            with open(mnt / "kept", "r+") as file:
                file.write("P")

        namespace.as_root_of(100_000, change)
        for _ in range(2):
            left = [oct(mode(mnt / name)) for name in given]
            assert left == [oct(0o2755), oct(0o755), oct(0o2745)]
            arena.remount()


@pytest.mark.root
def test_set_group_id_and_a_root_who_is_not_above_groups(arena: Arena) -> None:
    (arena.lower / "f").write_text("program")
    os.chown(arena.lower / "f", 1000, 3000)
    (arena.lower / "f").chmod(0o2745)
    with arena.mounted() as mnt:
        less = ["setpriv", "--bounding-set=-fsetid", "--inh-caps=-fsetid", "--clear-groups"]
        subprocess.run([*less, "sh", "-c", 'printf P >>"$0"', mnt / "f"], check=True)
        assert oct(mode(mnt / "f")) == oct(0o745)
        arena.remount()
        assert oct(mode(mnt / "f")) == oct(0o745)


@pytest.mark.root
def test_chown_to_nobody_takes_set_id_bits_of_special_files(arena: Arena) -> None:
    os.mkfifo(arena.lower / "fifo")
    os.mknod(arena.lower / "device", stat.S_IFCHR, os.makedev(1, 3))
    for name in ("fifo", "device"):
        os.chmod(arena.lower / name, 0o6755)
    with arena.mounted() as mnt:
        for name in ("fifo", "device"):
            os.chown(mnt / name, -1, -1)
            assert stat.S_IMODE(os.stat(mnt / name).st_mode) == 0o755


@pytest.mark.root
@pytest.mark.parametrize("groups", [(1000,), (1000, 5000)])
def test_chgrp_by_an_owner_in_and_out_of_the_old_group(
    arena: Arena, groups: tuple[int, ...]
) -> None:
    """Set-group-ID without group execute stays only with who is in the group (chown_common)."""
    (arena.lower / "f").write_text("program")
    os.chown(arena.lower / "f", 1000, 5000)
    (arena.lower / "f").chmod(0o2644)
    with arena.mounted() as mnt:
        _open_to_all(arena.place, mnt)
        with syscalls.identity(1000, 1000, groups):
            os.chown(mnt / "f", -1, 1000)
        assert oct(mode(mnt / "f")) == oct(0o2644 if 5000 in groups else 0o644)


@pytest.mark.root
@pytest.mark.parametrize("change", ["write", "chown", "truncate"])
def test_setuid_goes_when_an_ordinary_user_changes_the_file(arena: Arena, change: str) -> None:
    (arena.lower / "f").write_text("program")
    os.chown(arena.lower / "f", 1000, 1000)
    (arena.lower / "f").chmod(0o6777)
    with arena.mounted() as mnt:
        _open_to_all(arena.place, mnt)
        assert mode(mnt / "f") == 0o6777
        with syscalls.identity(1000, 1000, (1000, 2000)):
            if change == "write":
                with open(mnt / "f", "r+") as file:
                    file.write("P")
            elif change == "chown":
                os.chown(mnt / "f", -1, 2000)
            else:
                os.truncate(mnt / "f", 3)
        assert mode(mnt / "f") == 0o777
        arena.remount()
        assert mode(mnt / "f") == 0o777


@pytest.mark.root
def test_setgid_directory_gives_its_group(arena: Arena) -> None:
    (arena.lower / "d").mkdir()
    os.chown(arena.lower / "d", 1000, 2000)
    (arena.lower / "d").chmod(0o2777)
    with arena.mounted() as mnt:
        _open_to_all(arena.place, mnt)
        for who in ((0, 0, ()), (1001, 1001, ())):
            with syscalls.identity(*who):
                (mnt / "d" / f"file{who[0]}").write_text("x")
                (mnt / "d" / f"dir{who[0]}").mkdir()
                os.mkfifo(mnt / "d" / f"fifo{who[0]}")
                (mnt / "d" / f"link{who[0]}").symlink_to("x")
        for path in (mnt / "d").iterdir():
            assert os.lstat(path).st_gid == 2000, path
            assert bool(mode(path) & 0o2000) == path.name.startswith("dir"), path
        # Not a member of the group: the bit is not given to a file.
        with syscalls.identity(1001, 1001):
            fd = os.open(mnt / "d" / "program", os.O_CREAT | os.O_WRONLY, 0o2775)
            os.close(fd)
        assert mode(mnt / "d" / "program") & 0o2000 == 0


@pytest.mark.root
def test_sticky_directory_protects(arena: Arena) -> None:
    (arena.lower / "tmp").mkdir()
    (arena.lower / "tmp").chmod(0o1777)
    (arena.lower / "tmp" / "mine").write_text("x")
    os.chown(arena.lower / "tmp" / "mine", 1000, 1000)
    with arena.mounted() as mnt:
        _open_to_all(arena.place, mnt)
        with syscalls.identity(1001, 1001):
            for call in (os.unlink, lambda path: os.rename(path, mnt / "tmp" / "yours")):
                with pytest.raises(PermissionError):
                    call(mnt / "tmp" / "mine")
        with syscalls.identity(1000, 1000):
            os.rename(mnt / "tmp" / "mine", mnt / "tmp" / "renamed")
            os.unlink(mnt / "tmp" / "renamed")


@pytest.mark.root
def test_permissions_are_the_unions(arena: Arena) -> None:
    (arena.lower / "secret").mkdir()
    (arena.lower / "secret").chmod(0o700)
    (arena.lower / "secret" / "f").write_text("x")
    (arena.lower / "readonly").write_text("x")
    with arena.mounted() as mnt:
        _open_to_all(arena.place, mnt)
        with syscalls.identity(1001, 1001):
            for call in (
                lambda: os.listdir(mnt / "secret"),
                lambda: (mnt / "secret" / "f").read_text(),
                lambda: (mnt / "readonly").write_text("y"),
                lambda: (mnt / "readonly").chmod(0o777),
            ):
                with pytest.raises(PermissionError):
                    call()
            assert (mnt / "readonly").read_text() == "x"
            (mnt / "own").write_text("mine")
        assert (mnt / "own").stat().st_uid == 1001
        if not arena.plain:
            assert not (arena.upper / "readonly").exists(), "copied up by a refused change"


def test_xattrs(arena: Arena) -> None:
    (arena.lower / "f").write_text("f")
    (arena.lower / "d").mkdir()
    (arena.lower / "s").symlink_to("f")
    os.setxattr(arena.lower / "f", "user.lower", b"from below")
    os.setxattr(arena.lower / "d", "user.lower", b"from below")
    with arena.mounted() as mnt:
        for name in ("f", "d"):
            path = mnt / name
            assert os.listxattr(path) == ["user.lower"]
            with pytest.raises(FileExistsError):
                os.setxattr(path, "user.lower", b"x", os.XATTR_CREATE)
            with pytest.raises(OSError, match="No data"):
                os.setxattr(path, "user.none", b"x", os.XATTR_REPLACE)
            if arena.backend == "unionfs":
                assert not (arena.upper / name).exists(), "a refused change copied up"
            os.setxattr(path, "user.new", b"\0binary\xff" * 50)
            os.setxattr(path, "user.empty", b"")
            assert sorted(os.listxattr(path)) == ["user.empty", "user.lower", "user.new"]
            os.removexattr(path, "user.lower")
            with pytest.raises(OSError, match="No data"):
                os.getxattr(path, "user.lower")
            arena.remount()
            assert sorted(os.listxattr(path)) == ["user.empty", "user.new"]
            assert os.getxattr(path, "user.new") == b"\0binary\xff" * 50
            assert os.getxattr(path, "user.empty") == b""
        with pytest.raises(PermissionError):
            os.setxattr(mnt / "s", "user.no", b"x", follow_symlinks=False)


@pytest.mark.root
def test_the_unions_own_marks_are_not_seen(arena: Arena) -> None:
    (arena.lower / "d").mkdir()
    (arena.lower / "f").write_text("x")
    os.setxattr(arena.lower / "f", "trusted.other", b"seen")
    if arena.plain:
        pytest.skip("a plain directory has no marks")
    with arena.mounted() as mnt:
        os.rename(mnt / "d", mnt / "e")
        (mnt / "d").mkdir()
        (mnt / "f").chmod(0o600)
        assert [name for name in os.listxattr(mnt / "e") if "overlay" in name] == []
        assert os.listxattr(mnt / "d") == []
        assert os.listxattr(mnt / "f") == ["trusted.other"]
        assert ".unionfs" not in os.listdir(mnt)
        with pytest.raises(FileNotFoundError):
            os.stat(mnt / ".unionfs" / "format")


@pytest.mark.root
def test_lower_owner_and_mode_are_kept_by_a_copy_up(arena: Arena) -> None:
    (arena.lower / "d").mkdir()
    (arena.lower / "d" / "f").write_text("x" * 100)
    os.chown(arena.lower / "d", 12, 34)
    (arena.lower / "d").chmod(0o3751)
    os.chown(arena.lower / "d" / "f", 56, 78)
    (arena.lower / "d" / "f").chmod(0o4751)
    os.setxattr(arena.lower / "d", "trusted.one", b"1")
    layers.copy_metadata(os.fsencode(arena.lower), os.fsencode(arena.lower))
    with arena.mounted() as mnt:
        want = snapshot.take(mnt)
        with open(mnt / "d" / "f", "r+") as file:
            file.write("y")
        os.utime(mnt / "d" / "f", ns=(OLD, want[b"d/f"].mtime))
        got = snapshot.take(mnt)
        snapshot.assert_same(got, want, "after the copy-up", ignore=("content",))
        arena.remount()
        got = snapshot.take(mnt)
        snapshot.assert_same(got, want, "after a remount", ignore=("content",))


def test_mode_and_umask_of_new_files(arena: Arena) -> None:
    with arena.mounted() as mnt:
        for umask in (0o000, 0o022, 0o077, 0o777):
            old = os.umask(umask)
            try:
                name = f"{umask:o}"
                os.close(os.open(mnt / f"f{name}", os.O_CREAT | os.O_WRONLY, 0o7777))
                (mnt / f"d{name}").mkdir(mode=0o1777)
                os.mknod(mnt / f"p{name}", stat.S_IFIFO | 0o666)
            finally:
                os.umask(old)
            assert mode(mnt / f"f{name}") == 0o7777 & ~umask
            assert mode(mnt / f"d{name}") == 0o1777 & ~umask
            assert mode(mnt / f"p{name}") == 0o666 & ~umask


def test_errno_of_attributes(arena: Arena) -> None:
    (arena.lower / "f").write_text("x")
    with arena.mounted() as mnt:
        calls: list[Callable[[], None]] = [
            lambda: os.chmod(mnt / "none", 0o600),
            lambda: os.utime(mnt / "none"),
            lambda: os.setxattr(mnt / "none", "user.x", b""),
            lambda: os.truncate(mnt / "none", 0),
        ]
        for call in calls:
            with pytest.raises(FileNotFoundError):
                call()
        with pytest.raises(OSError, match="not supported") as caught:
            os.setxattr(mnt / "f", "nonsense.x", b"")
        assert caught.value.errno == errno.EOPNOTSUPP
        with pytest.raises(OSError, match="Invalid"):
            os.setxattr(mnt / "f", ACCESS, acl((1, 7, NOBODY)))


@pytest.mark.root
def test_a_stranger_changes_nothing_of_set_id_bits(arena: Arena) -> None:
    """A chown of nothing takes them away, so it is not his to do; what he may write loses them."""
    for name in ("lower", "new"):
        (arena.lower / name).write_text("program")
        os.chown(arena.lower / name, 1000, 3000)
        (arena.lower / name).chmod(0o6757)
    with arena.mounted() as mnt:
        _open_to_all(arena.place, mnt)
        os.utime(mnt / "new")  # in the upper
        for name in ("lower", "new"):
            with syscalls.identity(1001, 1001), pytest.raises(PermissionError):
                os.chown(mnt / name, -1, -1)
            assert mode(mnt / name) == 0o6757
            with syscalls.identity(1001, 1001), open(mnt / name, "r+") as file:
                file.write("P")
            assert mode(mnt / name) == 0o757
        with syscalls.identity(1001, 1001):
            os.chown(mnt / "new", -1, -1)  # there is nothing to take away


def test_an_attribute_of_what_its_owner_may_only_write(arena: Arena) -> None:
    """XATTR_CREATE and XATTR_REPLACE ask for no permission to read."""
    (arena.lower / "f").write_text("text")
    with arena.mounted() as mnt:
        os.chmod(mnt / "f", 0o200)
        os.setxattr(mnt / "f", "user.one", b"1", os.XATTR_CREATE)
        with pytest.raises(FileExistsError):
            os.setxattr(mnt / "f", "user.one", b"2", os.XATTR_CREATE)
        os.setxattr(mnt / "f", "user.one", b"3", os.XATTR_REPLACE)
        os.chmod(mnt / "f", 0o600)
        assert os.getxattr(mnt / "f", "user.one") == b"3"
