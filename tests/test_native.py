# SPDX-License-Identifier: GPL-2.0-or-later
"""The C module by itself, without a mount: what names mean, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

import pytest

from tests.rig import layers, syscalls
from tests.rig.native import Stack, mark, refused
from unionfs._native import ROOT_INO


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
