# SPDX-License-Identifier: GPL-2.0-or-later
"""The C module by itself, without a mount: what names mean, what is refused, what leaks.

Every entry point is in LEAKS, called many times; a new one without a line there fails a test.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rig import layers, syscalls
from unionfs import _native
from unionfs._native import ROOT_INO, Tree

PREFIX = "trusted.overlay." if os.geteuid() == 0 else "user.overlay."
TIMES = 2000  # calls of each entry point in the leak test


NOT_PLAIN: dict[str, object] = {
    "work_fd": -1,
    "plain": False,
    "all_ids": True,
    "sync_copies": True,
    "sync_names": False,
    "metacopy_bytes": 0,
}


class Stack:
    """A tree over directories of the test's own: upper, middle, bottom."""

    def __init__(self, place: Path, *, max_open_dirs: int = 16) -> None:
        self.place = place
        self.paths = [place / name for name in ("upper", "middle", "bottom")]
        self.index = place / "index"
        for path in (*self.paths, self.index):
            path.mkdir(exist_ok=True)
        self.upper, self.middle, self.bottom = self.paths
        flags = os.O_RDONLY | os.O_DIRECTORY
        self.fds = [os.open(path, flags) for path in (*self.paths, self.index)]
        self.max_open_dirs = max_open_dirs
        self.tree = self.make()
        self.changing: Tree | None = None

    def make(self, **changed: object) -> Tree:
        words: dict[str, object] = {
            "has_upper": True,
            "live": False,
            "upper_xattrs": True,
            "user_prefix": PREFIX.startswith("user"),
            "override": 0,
            "squash_uid": -1,
            "squash_gid": -1,
            "uids": [],
            "gids": [],
            "max_open_dirs": self.max_open_dirs,
            "index_fd": self.fds[3],
            "numbers_fd": -1,
            "static_nlink": False,
            "noxattrs": False,
            "noacl": False,
        } | NOT_PLAIN
        described = [(fd, 0, False, False, bytes(16)) for fd in self.fds[:3]]
        return Tree(described, **(words | changed))  # type: ignore[arg-type]

    def plain(self) -> Tree:
        """One that makes plain changes, over the same layers; it is made once."""
        if self.changing is None:
            work = self.place / "work"
            work.mkdir()
            self.fds.append(os.open(work, os.O_RDONLY | os.O_DIRECTORY))
            self.changing = self.make(
                plain=True, work_fd=self.fds[-1], index_fd=-1, sync_copies=False
            )
        return self.changing

    def ino(self, path: str) -> int:
        """Look a path up, one reference for each part."""
        at = ROOT_INO
        for name in os.fsencode(path).split(b"/"):
            at = self.tree.lookup(at, name)[0]
        return at

    def read(self, path: str) -> bytes:
        fh = self.tree.open(self.ino(path), os.O_RDONLY)
        try:
            return self.tree.read(fh, 0, 1 << 20, False) or b""
        finally:
            self.tree.release(fh)

    def list(self, path: str = "") -> set[bytes]:
        dh = self.tree.opendir(self.ino(path) if path else ROOT_INO)
        try:
            return {name for name, _, _ in self.tree.readdir(dh, 0, 100)} - {b".", b".."}
        finally:
            self.tree.releasedir(dh)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def mark(path: Path, name: str, value: bytes) -> None:
    os.setxattr(path, PREFIX + name, value)


@pytest.fixture
def stack(place: Path) -> Iterator[Stack]:
    stack = Stack(place)
    yield stack
    stack.close()


def refused(action: Callable[[], object]) -> int:
    """The errno of what must fail."""
    try:
        action()
    except OSError as error:
        return error.errno or 0
    raise AssertionError("it was not refused")


# ---- what names mean ----


def test_upper_wins(stack: Stack) -> None:
    (stack.bottom / "file").write_bytes(b"bottom")
    assert stack.read("file") == b"bottom"
    (stack.upper / "file").write_bytes(b"upper")
    assert stack.tree.entry(ROOT_INO, b"file")[2:] == (2, True)
    (stack.upper / "new").write_bytes(b"new")
    assert stack.tree.entry(ROOT_INO, b"new")[2:] == (2, False)
    assert stack.tree.entry(ROOT_INO, b"missing") == (0, 0, 0, False)
    assert refused(lambda: stack.tree.lookup(ROOT_INO, b"missing")) == errno.ENOENT


def test_whiteout_and_opaque(stack: Stack) -> None:
    for name in ("gone", "kept"):
        (stack.bottom / name).touch()
    (stack.bottom / "dir").mkdir()
    (stack.bottom / "dir/below").touch()
    layers.whiteout(stack.upper / "gone")
    (stack.upper / "dir").mkdir()
    mark(stack.upper / "dir", "opaque", b"y")
    assert stack.list() == {b"kept", b"dir"}
    assert stack.list("dir") == set()
    assert stack.tree.is_empty(stack.ino("dir"))
    assert stack.tree.entry(ROOT_INO, b"gone") == (0, 0, 1, True)
    assert refused(lambda: stack.ino("dir/below")) == errno.ENOENT


def test_directories_merge(stack: Stack) -> None:
    for layer, name in zip(stack.paths, ("a", "b", "c"), strict=True):
        (layer / "dir").mkdir()
        (layer / "dir" / name).touch()
    assert stack.list("dir") == {b"a", b"b", b"c"}
    info = stack.tree.info(stack.ino("dir"))
    assert info[:2] == (stat.S_IFDIR, True)
    assert info[5] == 3


def test_relative_and_absolute_redirects(stack: Stack) -> None:
    (stack.bottom / "old/deep").mkdir(parents=True)
    (stack.bottom / "old/deep/file").write_bytes(b"found")
    for name, value in (("relative", b"old"), ("absolute", b"/old"), ("deeper", b"/old/deep")):
        (stack.upper / name).mkdir()
        mark(stack.upper / name, "redirect", value)
    assert stack.read("relative/deep/file") == b"found"
    assert stack.read("deeper/file") == b"found"
    assert stack.tree.redirect_path(stack.ino("deeper")) == b"/old/deep"


BAD_REDIRECTS = [
    b"../..",
    b"..",
    b".",
    b"a/b",
    b"/",
    b"//a",
    b"/a//b",
    b"/a/../b",
    b"/..",
    b"/a/.",
    b"/a/",
    b"",
    b"x" * 256,
    b"/" + b"y" * 256,
    b"/long" * 500,
]


@pytest.mark.parametrize("value", BAD_REDIRECTS)
def test_redirect_out_of_the_layers_is_refused(stack: Stack, value: bytes) -> None:
    (stack.place / "secret").mkdir()
    (stack.place / "secret/file").write_bytes(b"secret")
    (stack.upper / "dir").mkdir()
    (stack.bottom / "a/b").mkdir(parents=True)
    mark(stack.upper / "dir", "redirect", value)
    assert refused(lambda: stack.ino("dir")) == errno.EIO
    assert "dir" in (stack.tree.take_warning() or "")
    assert stack.tree.take_warning() is None
    (stack.upper / "still").touch()
    assert stack.ino("still")


@pytest.mark.parametrize("target", ["..", "/", "/etc", "../secret", "secret"])
def test_redirect_to_a_symlink_is_not_followed(stack: Stack, target: str) -> None:
    (stack.place / "secret").mkdir()
    (stack.place / "secret/file").write_bytes(b"secret")
    (stack.bottom / "secret").mkdir()
    (stack.bottom / "secret/inner").touch()
    for layer in (stack.middle, stack.bottom):
        (layer / "link").symlink_to(target)
    for name, value in (("dir", b"/link"), ("through", b"/link/secret")):
        (stack.upper / name).mkdir()
        mark(stack.upper / name, "redirect", value)
        assert stack.list(name) == set()


def test_metacopy_data_behind_a_symlink_is_not_followed(stack: Stack) -> None:
    (stack.place / "secret").write_bytes(b"secret")
    (stack.bottom / "link").symlink_to("../secret")
    (stack.upper / "file").touch()
    mark(stack.upper / "file", "metacopy", b"")
    mark(stack.upper / "file", "redirect", b"/link")
    assert refused(lambda: stack.ino("file")) == errno.EIO


def test_nonsense_in_marks(stack: Stack) -> None:
    (stack.bottom / "file").write_bytes(b"bottom")
    (stack.upper / "file").write_bytes(b"upper")
    for value in (b"", b"U", b"L", b"U+99999999999999999999", b"Lx", b"\xff" * 30, b"U-5"):
        mark(stack.upper / "file", "nlink", value)
        mark(stack.upper / "file", "origin", value)
        stack.tree = stack.make()
        assert stack.tree.lookup(ROOT_INO, b"file")[2] >= 1
        assert stack.read("file") == b"upper"


def test_names_that_are_no_names(stack: Stack) -> None:
    assert refused(lambda: stack.tree.lookup(ROOT_INO, b"x" * 256)) == errno.ENAMETOOLONG
    assert refused(lambda: stack.tree.lookup(12345, b"x")) == errno.ESTALE
    with pytest.raises(ValueError, match="null"):
        stack.tree.lookup(ROOT_INO, b"a\0b")
    assert refused(lambda: stack.tree.lookup(ROOT_INO, b".unionfs")) == errno.ENOENT


def test_unknown_numbers(stack: Stack) -> None:
    tree = stack.tree
    for call in (tree.getattr, tree.readlink, tree.opendir, tree.info):
        assert refused(lambda call=call: call(777)) == errno.ESTALE  # type: ignore[misc]
    assert refused(lambda: tree.read(777, 0, 1, False)) == errno.EBADF
    assert refused(lambda: tree.readdir(777, 0, 1)) == errno.EBADF
    tree.release(777)
    tree.releasedir(777)
    tree.forget(777, 1)


def test_forgetting(stack: Stack) -> None:
    (stack.bottom / "a/b/c").mkdir(parents=True)
    inos = [stack.tree.lookup(ROOT_INO, b"a")[0]]
    for name in (b"b", b"c"):
        inos.append(stack.tree.lookup(inos[-1], name)[0])
    assert stack.tree.counts()["nodes"] == 4
    # Parents first, as the kernel may send it: they stay as long as something is in them.
    for ino in inos:
        stack.tree.forget(ino, 1)
    assert stack.tree.counts()["nodes"] == 1
    assert stack.tree.counts()["names"] == 0


def test_descriptors_of_directories_are_bounded(stack: Stack) -> None:
    for number in range(100):
        (stack.bottom / f"dir{number}/inner").mkdir(parents=True)
        (stack.bottom / f"dir{number}/inner/file").touch()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(100):
        stack.ino(f"dir{number}/inner/file")
    assert stack.tree.counts()["open_dirs"] <= stack.max_open_dirs
    assert len(os.listdir("/proc/self/fd")) <= before + stack.max_open_dirs


DEPTH = 100_000


def test_very_deep_directories(stack: Stack) -> None:
    """Anybody may make a path longer than the stack of a thread would take recursion for."""
    fd = os.dup(stack.fds[2])
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    try:
        inos = [ROOT_INO]
        for _ in range(DEPTH):
            inos.append(stack.tree.lookup(inos[-1], b"d")[0])
        # Let the cached descriptors near the bottom go.
        for number in range(2 * stack.max_open_dirs):
            (stack.upper / f"dir{number}").mkdir()
            stack.list(f"dir{number}")
        assert stat.S_ISREG(stack.tree.lookup(inos[-1], b"file")[1])
        assert stack.tree.getattr(inos[-1])[0] == inos[-1]
        for ino in inos[1:]:
            stack.tree.forget(ino, 1)
    finally:
        _remove_chain(stack.bottom)


def _remove_chain(top: Path) -> None:
    """From the top: move what is inside up, then remove the empty one; no path gets long."""
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(FileNotFoundError):
        while True:
            os.rename("d/d", "e", src_dir_fd=fd, dst_dir_fd=fd)
            os.rmdir("d", dir_fd=fd)
            os.rename("e", "d", src_dir_fd=fd, dst_dir_fd=fd)
    os.close(fd)


# ---- leaks ----


def _fill(stack: Stack) -> None:
    (stack.bottom / "dir").mkdir()
    (stack.bottom / "dir/file").write_bytes(b"x" * 5000)
    (stack.upper / "dir").mkdir()
    (stack.upper / "file").write_bytes(b"upper")
    os.setxattr(stack.upper / "file", "user.name", b"value" * 50)
    (stack.bottom / "link").symlink_to("target")
    (stack.bottom / "lower").write_bytes(b"lower")


def test_a_file_without_a_name_gets_one(stack: Stack) -> None:
    """One node before and after, with the number that its name will have at the next mount."""
    fd = os.open(stack.upper, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, b"some")
    made = stack.tree.made_nameless(fd)
    os.close(fd)
    ino = made[0]
    assert (made[1], made[2], made[6]) == (stat.S_IFREG | 0o600, 0, 4)
    assert stack.tree.info(ino)[4], "it has a name"
    assert stack.tree.name_of(ino) is None
    held = stack.tree.open_node(ino, os.O_PATH)
    syscalls.link_descriptor(held, os.fsencode(stack.upper / "name"))
    os.close(held)
    stack.tree.named(ino)
    assert stack.tree.lookup(ROOT_INO, b"name")[:3] == (ino, stat.S_IFREG | 0o600, 1)
    assert stack.tree.name_of(ino) == (ROOT_INO, b"name", True)
    assert stack.read("name") == b"some"
    assert stack.make().lookup(ROOT_INO, b"name")[0] == ino


def _open_and_release(stack: Stack) -> None:
    fh = stack.tree.open(stack.ino("file"), os.O_RDWR)
    stack.tree.read(fh, 0, 100_000, True)
    stack.tree.write(fh, 0, b"upper")
    stack.tree.fsync(fh, True)
    stack.tree.file_info(fh)
    stack.tree.release(fh)


def _list_and_release(stack: Stack) -> None:
    for name in ("dir", ""):
        dh = stack.tree.opendir(stack.ino(name) if name else ROOT_INO)
        stack.tree.readdir(dh, 0, 100)
        stack.tree.dir_ino(dh)
        stack.tree.releasedir(dh)


def _adopt(stack: Stack) -> None:
    fd = os.open(stack.upper / "file", os.O_RDWR)
    stack.tree.release(stack.tree.adopt(stack.ino("file"), fd, os.O_RDWR))


def _upper_dir(stack: Stack) -> None:
    with stack.tree.upper_dir(ROOT_INO) as fd:
        os.fstat(fd)
    stack.tree.upper_dir(stack.ino("dir"))  # given up without being entered


def _rename(stack: Stack) -> None:
    ino = stack.ino("file")
    for old, new in ((b"file", b"moved"), (b"moved", b"file")):
        stack.tree.entry(ROOT_INO, new)
        _native.renameat2(stack.fds[0], old, stack.fds[0], new, 0)
        stack.tree.renamed(ROOT_INO, old, ROOT_INO, new, False)
    stack.tree.set_nlink_diff(ino, 0)
    stack.tree.name_made_real(ROOT_INO, b"file")
    stack.tree.name_is_real(ROOT_INO, b"file")


def _unlink(stack: Stack) -> None:
    (stack.upper / "short").touch()
    ino = stack.ino("short")
    stack.tree.prepare_unlink(ROOT_INO, b"short")
    stack.tree.abandon_unlink(ROOT_INO, b"short")
    stack.tree.prepare_unlink(ROOT_INO, b"short")
    (stack.upper / "short").unlink()
    stack.tree.unlinked(ROOT_INO, b"short")
    stack.tree.getattr(ino)
    stack.tree.forget(ino, 1)


def _copy_up(stack: Stack) -> None:
    ino = stack.ino("lower")
    stack.tree.index_name(ino)
    stack.tree.ask_anew(stack.fds[0], b"lower")
    fh = stack.tree.open(ino, os.O_RDONLY)
    src = stack.tree.open_node(ino, os.O_RDONLY, True)
    dst = os.open("lower", os.O_CREAT | os.O_RDWR, dir_fd=stack.fds[0])
    _native.copy_data(src, dst, 5)
    _native.copy_xattrs(src, dst, PREFIX, None)
    for fd in (src, dst):
        os.close(fd)
    stack.tree.copied_up(ino, ROOT_INO, b"lower", metacopy=True)
    stack.tree.data_copied(ino)
    stack.tree.release(fh)
    stack.tree.forget(ino, 1)
    (stack.upper / "lower").unlink()


def _directory_marks(stack: Stack) -> None:
    ino = stack.ino("dir")
    stack.tree.set_redirect(ino, b"/dir")
    stack.tree.redirect_path(ino)
    stack.tree.make_impure(ino)
    stack.tree.made_opaque(stack.ino("dir"))
    stack.tree.take_warning()


def _tree(stack: Stack) -> None:
    old, stack.tree = stack.tree, stack.make(uids=[(0, 1, 2)], gids=[(3, 4, 5)])
    stack.ino("dir/file")
    fh = stack.tree.open(stack.ino("file"), os.O_RDONLY)
    assert fh
    stack.tree.opendir(ROOT_INO)
    stack.tree.close()
    stack.tree = old
    with pytest.raises(OSError, match="descriptor"):
        Tree(
            [(-1, 0, False, False, bytes(16))],
            **{  # type: ignore[arg-type]
                "has_upper": False,
                "live": False,
                "upper_xattrs": False,
                "user_prefix": False,
                "override": 0,
                "squash_uid": -1,
                "squash_gid": -1,
                "uids": [],
                "gids": [],
                "max_open_dirs": 1,
                "index_fd": -1,
                "numbers_fd": -1,
                "static_nlink": False,
                "noxattrs": False,
                "noacl": False,
            }
            | NOT_PLAIN,
        )


def _failures(stack: Stack) -> None:
    for call in (
        lambda: stack.tree.lookup(ROOT_INO, b"missing"),
        lambda: stack.tree.getxattr(ROOT_INO, b"user.missing"),
        lambda: stack.tree.readlink(stack.ino("file")),
        lambda: stack.tree.open_node(99, os.O_RDONLY),
        lambda: stack.tree.upper_dir(stack.ino("file")),
        lambda: stack.tree.copied_up(99, ROOT_INO, b"x"),
        lambda: _native.copy_data(-1, -1, 1),
        lambda: _native.copy_xattrs(-1, -1, PREFIX, None),
        lambda: _native.renameat2(-1, b"x", -1, b"y", 0),
    ):
        with contextlib.suppress(OSError):
            call()


def _plain(s: Stack) -> None:
    """Everything made, moved and removed in C, so that each round finds what the first found."""
    tree = s.plain()
    us = (os.geteuid(), os.getegid())
    regular, directory = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755
    fd = tree.plain_make(ROOT_INO, b"made", regular, 0o22, 0, b"", os.O_RDWR, *us)
    assert fd is not None
    assert tree.plain_make(ROOT_INO, b"folder", directory, 0o22, 0, b"", 0, *us) == -1
    made, folder = (tree.lookup(ROOT_INO, name)[0] for name in (b"made", b"folder"))
    assert tree.plain_link(made, folder, b"linked")
    tree.lookup(folder, b"linked")
    assert tree.plain_rename(ROOT_INO, b"made", folder, b"moved")
    assert not tree.plain_rmdir(ROOT_INO, b"folder")
    for name in (b"moved", b"linked"):
        assert tree.plain_unlink(folder, name)
    assert tree.plain_rmdir(ROOT_INO, b"folder")
    os.close(fd)
    tree.forget(made, 2)
    tree.forget(folder, 1)
    lower = tree.lookup(ROOT_INO, b"lower")[0]
    for parent, to in ((ROOT_INO, 1 << 40), (1 << 40, ROOT_INO)):
        with pytest.raises(OSError, match="Stale"):
            tree.plain_rename(parent, b"lower", to, b"elsewhere")
    with tree.copying(lower + 1), tree.committing(lower, lower + 1):
        fd = os.open(s.upper / "file", os.O_RDWR)
        assert tree.mark_origin(lower, fd, fd)
        os.close(fd)
    assert tree.plain_copy_up(lower, True)
    assert (s.upper / "lower").read_bytes() == b"lower"
    os.unlink(s.upper / "lower")  # behind its back: so it is a lower file again next time
    tree.unlinked(ROOT_INO, b"lower")
    tree.forget(lower, 1)
    tree.temp_name()
    tree.metacopy_noted()


def _flags(s: Stack) -> None:
    with contextlib.suppress(OSError):  # a file system without flags
        s.tree.flags(s.ino("file"), False)
        s.tree.flags(s.ino("dir"), True)
    s.tree.changeable(s.ino("file"), False, True)
    held = s.tree.open_node(s.ino("file"), os.O_PATH)
    _native.copy_flags(held, held)
    assert not _native.lift_flags(held)
    os.close(held)


def _nameless(s: Stack) -> None:
    fd = os.open(s.upper, os.O_TMPFILE | os.O_RDWR, 0o600)
    ino = s.tree.made_nameless(fd)[0]
    s.tree.named(ino)
    s.tree.forget(ino, 1)
    os.close(fd)


def test_a_closed_tree_has_nothing_open(stack: Stack) -> None:
    _fill(stack)
    before = set(os.listdir("/proc/self/fd"))
    for path in ("dir/file", "file"):
        stack.tree.open(stack.ino(path), os.O_RDONLY)
    stack.tree.readdir(stack.tree.opendir(stack.ino("dir")), 0, 1)
    ino = stack.ino("file")
    stack.tree.prepare_unlink(ROOT_INO, b"file")
    (stack.upper / "file").unlink()
    stack.tree.unlinked(ROOT_INO, b"file")
    held = stack.tree.upper_dir(stack.ino("dir"))
    assert len(set(os.listdir("/proc/self/fd")) - before) >= 4
    for _ in range(2):
        stack.tree.close()
    with held as fd:
        os.fstat(fd)
    assert set(os.listdir("/proc/self/fd")) == before
    assert {refused(lambda: stack.tree.getattr(ino)), refused(lambda: stack.list("dir"))} <= {
        errno.EBADF,
        errno.ENOENT,
        errno.ESTALE,
    }


LEAKS: dict[str, tuple[Callable[[Stack], object], set[str]]] = {
    "lookup": (
        lambda s: s.tree.forget(s.tree.lookup(ROOT_INO, b"file")[0], 1),
        {"lookup", "forget"},
    ),
    "attributes": (
        lambda s: (
            s.tree.getattr(s.ino("dir/file")),
            s.tree.entry(ROOT_INO, b"dir"),
            s.tree.info(s.ino("dir")),
            s.tree.name_of(s.ino("dir/file")),
            s.tree.readlink(s.ino("link")),
            s.tree.birth(s.ino("file")),
            s.tree.is_empty(s.ino("dir")),
            s.tree.counts(),
            os.close(s.tree.open_node(s.ino("file"), os.O_PATH)),  # type: ignore[func-returns-value]
        ),
        {
            "getattr",
            "entry",
            "info",
            "name_of",
            "readlink",
            "birth",
            "is_empty",
            "counts",
            "open_node",
        },
    ),
    "xattrs": (
        lambda s: (
            s.tree.getxattr(s.ino("file"), b"user.name"),
            s.tree.listxattr(s.ino("file"), True),
            s.tree.xattr_stored(b"user.x"),
        ),
        {"getxattr", "listxattr", "xattr_stored"},
    ),
    "flags": (_flags, {"flags", "changeable"}),
    "files": (_open_and_release, {"open", "read", "write", "fsync", "file_info", "release"}),
    "adopt": (_adopt, {"adopt"}),
    "plain": (
        _plain,
        {
            "plain_make",
            "plain_link",
            "plain_rename",
            "plain_unlink",
            "plain_rmdir",
            "plain_copy_up",
            "mark_origin",
            "copying",
            "committing",
            "temp_name",
            "metacopy_noted",
        },
    ),
    "nameless": (_nameless, {"made_nameless", "named"}),
    "directories": (_list_and_release, {"opendir", "readdir", "dir_ino", "releasedir"}),
    "upper_dir": (_upper_dir, {"upper_dir"}),
    "renamed": (_rename, {"renamed", "set_nlink_diff", "name_made_real", "name_is_real"}),
    "unlinked": (_unlink, {"prepare_unlink", "abandon_unlink", "unlinked"}),
    "copied_up": (_copy_up, {"copied_up", "data_copied", "index_name", "ask_anew"}),
    "marks": (
        _directory_marks,
        {"set_redirect", "redirect_path", "make_impure", "made_opaque", "take_warning"},
    ),
    "tree": (_tree, {"close"}),
    "failures": (_failures, set()),
}


def test_every_entry_point_has_a_leak_test() -> None:
    tested = set().union(*(names for _, names in LEAKS.values()))
    there = {name for name in dir(Tree) if not name.startswith("_")}
    assert there <= tested, f"no leak test: {sorted(there - tested)}"


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("name", LEAKS)
def test_nothing_leaks(stack: Stack, name: str) -> None:
    call, _ = LEAKS[name]
    _fill(stack)
    for _ in range(TIMES // 4):
        call(stack)
    gc.collect()
    memory, descriptors = _resident(), len(os.listdir("/proc/self/fd"))
    for _ in range(TIMES):
        call(stack)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    # 64 bytes a call would be 128 kB. A sanitizer keeps what was freed for a while.
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        assert _resident() - memory < 100_000, "memory grows"
