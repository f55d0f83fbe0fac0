# SPDX-License-Identifier: GPL-2.0-or-later
"""Names: rename of everything, whiteouts, opaque directories, hard links, special files."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
from pathlib import Path

import pytest

from tests.rig import layers, snapshot, syscalls
from tests.rig.arena import Arena
from tests.rig.mounted import Unionfs
from tests.rig.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE


def rename(source: Path, target: Path, flags: int = 0) -> None:
    syscalls.renameat2(os.fsencode(source), os.fsencode(target), flags)


def errno_of(call: object, *args: object) -> int:
    assert callable(call)
    try:
        call(*args)
    except OSError as error:
        return error.errno or 0
    return 0


def tree(arena: Arena) -> None:
    """Files and directories only in the lower, and (made later by the tests) in both."""
    low = arena.lower
    for name in ("d", "e", "empty"):
        (low / name).mkdir()
    (low / "d" / "sub").mkdir()
    (low / "d" / "sub" / "deep").write_text("deep")
    (low / "d" / "x").write_text("d/x")
    (low / "e" / "y").write_text("e/y")
    (low / "f").write_text("f")
    (low / "g").write_text("g")
    (low / "s").symlink_to("f")


def names(path: Path) -> set[str]:
    return {name for name in os.listdir(path) if name != ".unionfs"}


def test_rename_of_files(arena: Arena) -> None:
    tree(arena)
    with arena.mounted() as mnt:
        inode = (mnt / "f").stat().st_ino
        rename(mnt / "f", mnt / "new")
        assert (mnt / "new").stat().st_ino == inode
        assert (mnt / "new").read_text() == "f"
        rename(mnt / "new", mnt / "g")
        assert (mnt / "g").read_text() == "f"
        rename(mnt / "g", mnt / "d" / "moved")
        rename(mnt / "s", mnt / "d" / "link")
        assert names(mnt) == {"d", "e", "empty"}
        assert names(mnt / "d") == {"sub", "x", "moved", "link"}
        arena.remount()
        assert names(mnt) == {"d", "e", "empty"}
        assert (mnt / "d" / "moved").read_text() == "f"
        assert (mnt / "d" / "moved").stat().st_ino == inode
        assert os.readlink(mnt / "d" / "link") == "f"


@pytest.mark.parametrize("merged", [False, True], ids=["lower", "merged"])
def test_rename_of_directories(arena: Arena, merged: bool) -> None:
    tree(arena)
    with arena.mounted() as mnt:
        if merged:
            (mnt / "d" / "upper-only").write_text("u")
            (mnt / "d" / "x").unlink()
        want = snapshot.take(mnt / "d")
        inode = (mnt / "d").stat().st_ino
        rename(mnt / "d", mnt / "moved")
        snapshot.assert_same(snapshot.take(mnt / "moved"), want, "renamed")
        assert (mnt / "moved").stat().st_ino == inode
        assert not (mnt / "d").exists()
        rename(mnt / "moved", mnt / "e" / "inside")
        rename(mnt / "e", mnt / "outer")
        rename(mnt / "outer" / "inside" / "sub", mnt / "sub")
        arena.remount()
        assert (mnt / "sub" / "deep").read_text() == "deep"
        assert names(mnt / "outer") == {"y", "inside"}
        assert "sub" not in names(mnt / "outer" / "inside")
        assert (mnt / "outer" / "inside").stat().st_ino == inode
        # A new directory of the old name shows nothing of the one that went away.
        (mnt / "d").mkdir()
        assert names(mnt / "d") == set()
        arena.remount()
        assert names(mnt / "d") == set()


def test_rename_of_a_directory_over_an_empty_one(arena: Arena) -> None:
    tree(arena)
    with arena.mounted() as mnt:
        rename(mnt / "d", mnt / "empty")
        assert names(mnt / "empty") == {"sub", "x"}
        (mnt / "e" / "y").unlink()
        rename(mnt / "empty", mnt / "e")
        assert names(mnt / "e") == {"sub", "x"}
        arena.remount()
        assert names(mnt) == {"e", "f", "g", "s"}
        assert names(mnt / "e") == {"sub", "x"}


def test_rename_noreplace_and_exchange(arena: Arena) -> None:
    tree(arena)
    with arena.mounted() as mnt:
        assert errno_of(rename, mnt / "f", mnt / "g", RENAME_NOREPLACE) == errno.EEXIST
        assert errno_of(rename, mnt / "f", mnt / "no", RENAME_EXCHANGE) == errno.ENOENT
        assert errno_of(rename, mnt / "f", mnt / "g", 3) == errno.EINVAL
        rename(mnt / "f", mnt / "h", RENAME_NOREPLACE)
        rename(mnt / "h", mnt / "g", RENAME_EXCHANGE)
        assert ((mnt / "g").read_text(), (mnt / "h").read_text()) == ("f", "g")
        rename(mnt / "d", mnt / "e", RENAME_EXCHANGE)
        assert names(mnt / "d") == {"y"}
        assert names(mnt / "e") == {"sub", "x"}
        rename(mnt / "d", mnt / "h", RENAME_EXCHANGE)
        assert (mnt / "d").read_text() == "g"
        assert names(mnt / "h") == {"y"}
        arena.remount()
        assert (mnt / "d").read_text() == "g"
        assert names(mnt / "h") == {"y"}
        assert names(mnt / "e") == {"sub", "x"}


def test_errors_of_rename_and_remove(arena: Arena) -> None:
    tree(arena)
    with arena.mounted() as mnt:
        full = {errno.ENOTEMPTY, errno.EEXIST}
        assert errno_of(rename, mnt / "e", mnt / "d") in full
        assert errno_of(rename, mnt / "d", mnt / "d" / "sub" / "in") == errno.EINVAL
        assert errno_of(rename, mnt / "f", mnt / "d") == errno.EISDIR
        assert errno_of(rename, mnt / "d", mnt / "f") == errno.ENOTDIR
        assert errno_of(rename, mnt / "none", mnt / "f") == errno.ENOENT
        assert errno_of(os.rmdir, mnt / "d") in full
        assert errno_of(os.rmdir, mnt / "f") == errno.ENOTDIR
        assert errno_of(os.unlink, mnt / "d") == errno.EISDIR
        assert errno_of(os.unlink, mnt / "none") == errno.ENOENT
        assert errno_of(os.mkdir, mnt / "f") == errno.EEXIST
        assert errno_of(os.link, mnt / "d", mnt / "l") == errno.EPERM
        for call in (os.mkdir, os.unlink, os.rmdir, os.readlink, os.stat):
            assert errno_of(call, mnt / ("x" * 256)) == errno.ENAMETOOLONG, call
        assert errno_of(os.symlink, "t", mnt / ("x" * 256)) == errno.ENAMETOOLONG
        assert errno_of(os.link, mnt / "f", mnt / ("x" * 256)) == errno.ENAMETOOLONG
        assert errno_of(rename, mnt / "f", mnt / ("x" * 256)) == errno.ENAMETOOLONG
        assert errno_of(os.mknod, mnt / ("x" * 256)) == errno.ENAMETOOLONG


def test_directory_is_empty_when_all_of_it_is_hidden(arena: Arena) -> None:
    tree(arena)
    with arena.mounted() as mnt:
        (mnt / "e" / "y").unlink()
        assert names(mnt / "e") == set()
        (mnt / "e").rmdir()
        assert not (mnt / "e").exists()
        (mnt / "e").mkdir()
        assert names(mnt / "e") == set()
        (mnt / "e" / "y").write_text("again")
        arena.remount()
        assert (mnt / "e" / "y").read_text() == "again"
        assert names(mnt / "e") == {"y"}


@pytest.mark.parametrize("workdir", [False, True], ids=["inside", "workdir"])
def test_marks_on_disk_are_kernel_overlayfs_own(arena: Arena, workdir: bool) -> None:
    if arena.plain:
        pytest.skip("a plain directory has no upper")
    tree(arena)
    arena.workdir = workdir
    with arena.mounted() as mnt:
        (mnt / "f").unlink()
        rename(mnt / "g", mnt / "h")
        (mnt / "e" / "y").unlink()
        (mnt / "e").rmdir()
        (mnt / "e").mkdir()
        rename(mnt / "d", mnt / "moved")
    upper = arena.upper
    prefix = "trusted.overlay." if os.geteuid() == 0 else "user.overlay."
    for name in ("f", "g", "d"):
        st = os.lstat(upper / name)
        assert stat.S_ISCHR(st.st_mode), name
        assert st.st_rdev == 0, name
    assert os.getxattr(upper / "e", prefix + "opaque") == b"y"
    assert os.getxattr(upper / "moved", prefix + "redirect") in (b"d", b"/d")
    assert os.listdir(upper / "moved") == []
    extra = set() if workdir or arena.backend == "overlay" else {".unionfs"}
    assert set(os.listdir(upper)) == {"f", "g", "h", "e", "d", "moved"} | extra


def test_whiteouts_and_opaque_directories_of_the_middle(arena: Arena) -> None:
    tree(arena)
    middle = arena.add_lower("middle")
    layers.whiteout(middle / "f")
    (middle / "d").mkdir()
    layers.make_opaque(middle / "d")
    (middle / "d" / "z").write_text("z")
    (middle / "e").write_text("e is a file now")
    with arena.mounted() as mnt:
        assert names(mnt) == {"d", "e", "empty", "g", "s"}
        assert names(mnt / "d") == {"z"}
        assert (mnt / "e").read_text() == "e is a file now"
        (mnt / "f").write_text("new f")
        (mnt / "e").unlink()
        (mnt / "e").mkdir()
        assert names(mnt / "e") == set()
        rename(mnt / "d", mnt / "e" / "d")
        (mnt / "d").mkdir()
        arena.remount()
        assert (mnt / "f").read_text() == "new f"
        assert names(mnt / "e") == {"d"}
        assert names(mnt / "e" / "d") == {"z"}
        assert names(mnt / "d") == set()


def test_hard_links_stay_links(arena: Arena) -> None:
    (arena.lower / "d").mkdir()
    (arena.lower / "a").write_text("content")
    os.link(arena.lower / "a", arena.lower / "d" / "b")
    os.link(arena.lower / "a", arena.lower / "c")
    with arena.mounted() as mnt:
        paths = [mnt / "a", mnt / "d" / "b", mnt / "c"]
        before = {path.stat().st_ino for path in paths}
        assert len(before) == 1
        with open(paths[1], "a") as file:
            file.write(", more")
        for path in paths:
            assert path.read_text() == "content, more"
            assert path.stat().st_nlink == 3
            assert path.stat().st_ino in before
        paths[2].chmod(0o600)
        assert stat.S_IMODE(paths[0].stat().st_mode) == 0o600
        os.link(paths[0], mnt / "fourth")
        assert paths[1].stat().st_nlink == 4
        paths[0].unlink()
        assert paths[1].stat().st_nlink == 3
        arena.remount()
        (mnt / "d" / "b").write_text("after the remount")
        for path in (mnt / "d" / "b", mnt / "c", mnt / "fourth"):
            assert path.read_text() == "after the remount"
            assert path.stat().st_nlink == 3
            assert path.stat().st_ino in before
        rename(mnt / "c", mnt / "fourth")  # two names of one file: nothing happens
        assert (mnt / "c").exists()
        (mnt / "c").unlink()
        (mnt / "fourth").unlink()
        assert (mnt / "d" / "b").stat().st_nlink == 1


def test_special_files(arena: Arena) -> None:
    low = arena.lower
    os.mkfifo(low / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(low / "sock"))
    root = os.geteuid() == 0
    if root:
        os.mknod(low / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (low / "null").chmod(0o666)
    with arena.mounted() as mnt:
        old = os.umask(0o027)
        try:
            os.mkfifo(mnt / "newfifo", 0o666)
            os.mknod(mnt / "newsock", stat.S_IFSOCK | 0o666)
            os.mknod(mnt / "newfile", stat.S_IFREG | 0o666)
        finally:
            os.umask(old)
        for name in ("newfifo", "newsock", "newfile"):
            assert stat.S_IMODE(os.lstat(mnt / name).st_mode) == 0o640, name
        assert stat.S_ISFIFO(os.lstat(mnt / "fifo").st_mode)
        assert stat.S_ISSOCK(os.lstat(mnt / "sock").st_mode)
        os.chmod(mnt / "fifo", 0o600)
        reader = os.open(mnt / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(mnt / "fifo", os.O_WRONLY)
        os.write(writer, b"through the fifo")
        assert os.read(reader, 100) == b"through the fifo"
        os.close(reader)
        os.close(writer)
        if root:
            os.chown(mnt / "null", 5, 5)
            assert os.lstat(mnt / "null").st_rdev == os.makedev(1, 3)
            with open(mnt / "null", "wb") as null:
                null.write(b"gone")
            os.mknod(mnt / "zero", stat.S_IFCHR | 0o600, os.makedev(1, 5))
            with open(mnt / "zero", "rb") as zero:
                assert zero.read(3) == b"\0\0\0"
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            here = os.open(mnt, os.O_RDONLY)
            server.bind(f"/proc/self/fd/{here}/bound")
            server.listen()
            client.connect(f"/proc/self/fd/{here}/bound")
            os.close(here)
        arena.remount()
        assert stat.S_ISFIFO(os.lstat(mnt / "newfifo").st_mode)
        assert stat.S_ISSOCK(os.lstat(mnt / "bound").st_mode)


@pytest.mark.root
def test_devices_with_large_numbers(arena: Arena) -> None:
    """A minor number of more than 8 bits, as the three hundredth loop device's or terminal's."""
    loop, other = os.makedev(7, 300), os.makedev(0xFFE, 0x3FF03)
    for name, number in (("loop", loop), ("other", other)):
        os.mknod(arena.lower / name, stat.S_IFBLK | 0o600, number)
    with arena.mounted() as mnt:
        for name, number in (("newloop", loop), ("newother", other)):
            os.mknod(mnt / name, stat.S_IFBLK | 0o600, number)
        os.chmod(mnt / "loop", 0o640)
        for _ in range(2):
            for name, number in (("loop", loop), ("other", other)):
                assert os.lstat(mnt / name).st_rdev == number
                assert os.lstat(mnt / f"new{name}").st_rdev == number
            arena.remount()


ODD = [
    b"n" * 255,
    b"\xff\xfe\x80\x01\x1f",
    b"new\nline",
    b" ",
    b"...",
    b"-",
    "\u00fc".encode() * 127,
    b"a:b,c\\d=e",
    bytes(byte for byte in range(1, 256) if byte != ord("/")),
]


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_odd_names(arena: Arena, name: bytes) -> None:
    low = os.fsencode(arena.lower)
    os.mkdir(os.path.join(low, name))
    with open(os.path.join(low, name, name), "wb") as file:
        file.write(b"content")
    with arena.mounted() as mnt:
        top = os.fsencode(mnt)
        inside = os.path.join(top, name, name)
        assert os.listdir(top) == [name] or set(os.listdir(top)) == {name}
        with open(inside, "ab") as file:
            file.write(b", more")
        os.link(inside, os.path.join(top, b"link"))
        os.rename(os.path.join(top, name), os.path.join(top, b"dir"))
        os.symlink(name, os.path.join(top, name))
        assert os.readlink(os.path.join(top, name)) == name
        arena.remount()
        with open(os.path.join(top, b"dir", name), "rb") as file:
            assert file.read() == b"content, more"
        os.unlink(os.path.join(top, b"dir", name))
        os.unlink(os.path.join(top, name))
        assert sorted(os.listdir(top)) == [b"dir", b"link"]
        os.rmdir(os.path.join(top, b"dir"))


def test_symlinks_of_4095_bytes(arena: Arena) -> None:
    target = ("t" * 15 + "/") * 255 + "t" * 15
    assert len(target) == 4095
    os.symlink(target, arena.lower / "long")
    with arena.mounted() as mnt:
        assert os.readlink(mnt / "long") == target
        assert os.lstat(mnt / "long").st_size == 4095
        os.lchown(mnt / "long", os.geteuid(), os.getegid())
        os.symlink(target, mnt / "new")
        rename(mnt / "long", mnt / "moved")
        assert errno_of(os.symlink, target + "x" * 2, mnt / "over") == errno.ENAMETOOLONG
        arena.remount()
        assert os.readlink(mnt / "moved") == target
        assert os.readlink(mnt / "new") == target


def test_deep_paths_by_descriptor(arena: Arena) -> None:
    """Paths longer than PATH_MAX are reached step by step."""
    with arena.mounted() as mnt:
        fd = os.open(mnt, os.O_RDONLY)
        for _ in range(20):
            os.mkdir("d" * 250, dir_fd=fd)
            below = os.open("d" * 250, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        made = os.open("file", os.O_RDWR | os.O_CREAT, dir_fd=fd)
        os.write(made, b"deep")
        os.close(made)
        os.rename("file", "renamed", src_dir_fd=fd, dst_dir_fd=fd)
        assert os.listdir(fd) == ["renamed"]
        os.chmod("renamed", 0o600, dir_fd=fd)
        os.unlink("renamed", dir_fd=fd)
        os.close(fd)
        shutil.rmtree(mnt / ("d" * 250))
        assert names(mnt) == set()


def test_parents_time_is_untouched_by_a_copy_up(arena: Arena) -> None:
    tree(arena)
    old = 1_000_000_000_123_456_789
    os.utime(arena.lower / "d" / "sub", ns=(old, old))
    os.utime(arena.lower / "d", ns=(old + 1, old + 1))
    os.utime(arena.lower / "e", ns=(old + 2, old + 2))
    with arena.mounted() as mnt:
        with open(mnt / "d" / "sub" / "deep", "a") as file:
            file.write("x")
        os.setxattr(mnt / "d" / "x", "user.one", b"1")
        assert (mnt / "d" / "sub").stat().st_mtime_ns == old
        assert (mnt / "d").stat().st_mtime_ns == old + 1
        arena.remount()
        assert (mnt / "d" / "sub").stat().st_mtime_ns == old
        assert (mnt / "d").stat().st_mtime_ns == old + 1
        (mnt / "e" / "y").unlink()
        assert (mnt / "e").stat().st_mtime_ns > old + 2


def test_files_too_deep_for_a_redirect(place: Path) -> None:
    """More than 2 047 bytes: a large file is renamed and linked all the same, with its data."""
    size = 1 << 20
    deep = Path(*["d" * 200] * 12)
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    (place / "lower" / deep).mkdir(parents=True)
    for name in ("moved", "linked", "one"):
        (place / "lower" / deep / name).write_bytes(bytes(size))
    os.link(place / "lower" / deep / "one", place / "lower" / deep / "two")
    union = Unionfs([place / "lower"], place / "upper", place / "mnt")
    with union:
        folder = union.mnt / deep
        for name in ("moved", "two"):
            (folder / name).chmod(0o600)
        rename(folder / "moved", folder / "there")
        rename(folder / "two", union.mnt / "two")
        os.link(folder / "linked", union.mnt / "linked")
        union.remount()
        assert names(folder) == {"there", "linked", "one"}
        for path in (folder / "there", folder / "one", union.mnt / "two", union.mnt / "linked"):
            assert path.read_bytes() == bytes(size)
        assert (union.mnt / "two").stat().st_ino == (folder / "one").stat().st_ino


def test_redirect_of_a_former_upper(place: Path) -> None:
    """A metadata-only copy in a lower that was an upper says where its data are as seen from there.
    A copy of it must not say so anew: above there may be another file at that place."""
    for name in ("lower", "first", "second", "mnt"):
        (place / name).mkdir()
    (place / "lower/file").write_bytes(b"large" * 40_000)
    with Unionfs([place / "lower"], place / "first", place / "mnt") as union:
        (union.mnt / "file").rename(union.mnt / "moved")
        (union.mnt / "file").write_bytes(b"another")
    stack = [place / "first", place / "lower"]
    with Unionfs(stack, place / "second", place / "mnt") as union:
        (union.mnt / "moved").chmod(0o600)
        for _ in range(2):
            assert (union.mnt / "moved").read_bytes() == b"large" * 40_000
            union.remount()
        (union.mnt / "moved").rename(union.mnt / "again")
        for _ in range(2):
            assert (union.mnt / "again").read_bytes() == b"large" * 40_000
            union.remount()
        os.close(os.open(union.mnt / "again", os.O_WRONLY))
        assert (union.mnt / "again").read_bytes() == b"large" * 40_000
        assert (union.mnt / "file").read_bytes() == b"another"


def test_redirect_through_an_opaque_directory(place: Path) -> None:
    """A lower directory moved below a new one, which is opaque, in a lower that was an upper: what
    is moved out of it again is found through both."""
    for name in ("lower/old/sub", "lower/new", "first", "second", "mnt"):
        (place / name).mkdir(parents=True)
    (place / "lower/old/sub/file").write_text("content")
    with Unionfs([place / "lower"], place / "first", place / "mnt") as union:
        (union.mnt / "new").rmdir()
        (union.mnt / "new").mkdir()
        (union.mnt / "old").rename(union.mnt / "new/moved")
    stack = [place / "first", place / "lower"]
    with Unionfs(stack, place / "second", place / "mnt") as union:
        (union.mnt / "new/moved/sub").rename(union.mnt / "sub")
        for _ in range(2):
            assert (union.mnt / "sub/file").read_text() == "content"
            union.remount()
