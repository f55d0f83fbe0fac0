# SPDX-License-Identifier: GPL-2.0-or-later
"""The C module by itself, called many times: memory and descriptors stay where they are.

Every entry point is in LEAKS; a new one without a line there fails a test.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import stat
from collections.abc import Callable

import pytest

from tests.rig.native import NOT_PLAIN, PREFIX, Stack, refused
from tests.rig.sanitized import SANITIZED
from unionfs import _native
from unionfs._native import ROOT_INO, Tree

TIMES = 2000  # calls of each entry point in the leak test


def _fill(stack: Stack) -> None:
    (stack.bottom / "dir").mkdir()
    (stack.bottom / "dir/file").write_bytes(b"x" * 5000)
    (stack.upper / "dir").mkdir()
    (stack.upper / "file").write_bytes(b"upper")
    os.setxattr(stack.upper / "file", "user.name", b"value" * 50)
    (stack.bottom / "link").symlink_to("target")
    (stack.bottom / "lower").write_bytes(b"lower")


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
    stack.plain().make_whiteout(stack.fds[0], b"gone")
    (stack.upper / "gone").unlink()
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
                "image_fd": -1,
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
    with tree.copying(lower + 1), tree.committing(lower, lower + 1), tree.entering(lower):
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
            s.tree.is_written(s.ino("file")),
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
            "is_written",
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
            "entering",
            "temp_name",
            "metacopy_noted",
        },
    ),
    "nameless": (_nameless, {"made_nameless", "named"}),
    "directories": (_list_and_release, {"opendir", "readdir", "dir_ino", "releasedir"}),
    "upper_dir": (_upper_dir, {"upper_dir"}),
    "renamed": (_rename, {"renamed", "set_nlink_diff", "name_made_real", "name_is_real"}),
    "unlinked": (_unlink, {"prepare_unlink", "abandon_unlink", "unlinked"}),
    "copied_up": (
        _copy_up,
        {"copied_up", "data_copied", "index_name", "ask_anew", "make_whiteout"},
    ),
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
    if not SANITIZED:
        assert _resident() - memory < 100_000, "memory grows"
