# SPDX-License-Identifier: GPL-2.0-or-later
"""A picture of a whole tree, and the difference of two pictures in words.

Everything a program can see and compare is in it; what a union cannot keep is not: st_dev, ctime,
atime, blocks, size and link count of directories. Inode numbers are kept beside the picture (they
differ between two trees, but which names share one does not). Called by the differential test,
the semantics tests and "the lower did not change".
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

Tree = dict[bytes, "Entry"]


class Entry(NamedTuple):
    kind: int
    mode: int
    uid: int
    gid: int
    size: int
    rdev: int
    mtime: int
    links: int
    target: bytes
    content: str
    xattrs: tuple[tuple[str, bytes], ...]
    group: bytes
    """The first name, in order, of the same inode: equal for the names of one file."""
    ino: int
    """For the caller's own checks; never compared."""


def xattrs(path: bytes) -> tuple[tuple[str, bytes], ...]:
    try:
        names = sorted(os.listxattr(path, follow_symlinks=False))
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EACCES, errno.EPERM):
            return ()
        raise
    found = []
    for name in names:
        try:
            found.append((name, os.getxattr(path, name, follow_symlinks=False)))
        except PermissionError:
            continue
        except OSError as error:
            if error.errno != errno.EINVAL:  # a malformed capability
                raise
            found.append((name, b""))
    return tuple(found)


def _content(path: bytes) -> str:
    digest = hashlib.blake2b(digest_size=12)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME)
    except PermissionError:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except PermissionError:
            return "unreadable"
    try:
        while block := os.read(fd, 1 << 20):
            digest.update(block)
    finally:
        os.close(fd)
    return digest.hexdigest()


def _entry(path: bytes, relative: bytes, groups: dict[tuple[int, int], bytes]) -> Entry:
    st = os.lstat(path)
    directory = stat.S_ISDIR(st.st_mode)
    return Entry(
        kind=stat.S_IFMT(st.st_mode),
        mode=stat.S_IMODE(st.st_mode),
        uid=st.st_uid,
        gid=st.st_gid,
        size=0 if directory else st.st_size,
        rdev=st.st_rdev if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode) else 0,
        mtime=st.st_mtime_ns,
        links=0 if directory else st.st_nlink,
        target=os.readlink(path) if stat.S_ISLNK(st.st_mode) else b"",
        content=_content(path) if stat.S_ISREG(st.st_mode) else "",
        xattrs=xattrs(path),
        group=groups.setdefault((st.st_dev, st.st_ino), relative),
        ino=st.st_ino,
    )


def take(root: str | bytes | os.PathLike[str], hide: Collection[bytes] = ()) -> Tree:
    """Picture of everything below root, and of root itself under the name `b"."`."""
    top = os.fsencode(root)
    groups: dict[tuple[int, int], bytes] = {}
    tree = {b".": _entry(top, b".", groups)}
    pending = [b""]
    while pending:
        folder = pending.pop()
        try:
            names = sorted(os.listdir(os.path.join(top, folder) if folder else top), reverse=True)
        except PermissionError:
            continue
        for name in names:
            relative = os.path.join(folder, name) if folder else name
            if relative in hide:
                continue
            try:
                entry = _entry(os.path.join(top, relative), relative, groups)
            except PermissionError:
                # Readable, but not to be searched: the names are all that can be seen.
                tree[relative] = Entry(0, 0, 0, 0, 0, 0, 0, 0, b"", "", (), relative, 0)
                continue
            tree[relative] = entry
            if stat.S_ISDIR(entry.kind):
                pending.append(relative)
    return _regroup(tree)


def _regroup(tree: Tree) -> Tree:
    """Name each link group after its first name in order, whatever order the walk took."""
    first: dict[bytes, bytes] = {}
    for name in sorted(tree):
        first.setdefault(tree[name].group, name)
    return {name: entry._replace(group=first[entry.group]) for name, entry in tree.items()}


def _show(name: bytes) -> str:
    shown = os.fsdecode(name).encode("unicode_escape", "surrogateescape").decode("ascii", "replace")
    return shown if len(shown) < 70 else f"{shown[:40]}…({len(name)} bytes)"


def _value(field: str, value: object) -> str:
    if field in ("kind", "mode"):
        return oct(int(str(value)))
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "…"


def differences(
    got: Tree,
    want: Tree,
    *,
    fresh: int | None = None,
    slack: int = 10_000_000_000,
    ignore: Collection[str] = (),
    timeless: Collection[int] = (),
) -> list[str]:
    """What is wrong with `got`, one line each; empty if nothing is.

    With `fresh`, a time in ns: modification times from then on need not be equal (the two trees
    were changed one after the other), but must be about the same. `timeless` are the kinds of file
    whose modification time is not compared.
    """
    lines = [f"{_show(name)}: missing" for name in sorted(want.keys() - got.keys())]
    lines += [f"{_show(name)}: should not be there" for name in sorted(got.keys() - want.keys())]
    for name in sorted(want.keys() & got.keys()):
        for field, mine, wanted in zip(Entry._fields, got[name], want[name], strict=True):
            if mine == wanted or field == "ino" or field in ignore:
                continue
            if field == "mtime" and want[name].kind in timeless:
                continue
            if (
                field == "mtime"
                and fresh is not None
                and min(got[name].mtime, want[name].mtime) >= fresh
                and abs(got[name].mtime - want[name].mtime) < slack
            ):
                continue
            shown = f"is {_value(field, mine)}, should be {_value(field, wanted)}"
            lines.append(f"{_show(name)}: {field} {shown}")
    return lines


def assert_same(
    got: Tree,
    want: Tree,
    what: str,
    *,
    fresh: int | None = None,
    ignore: Collection[str] = (),
) -> None:
    lines = differences(got, want, fresh=fresh, ignore=ignore)
    if lines:
        more = f"\n  … and {len(lines) - 40} more" if len(lines) > 40 else ""
        raise AssertionError(f"{what}:\n  " + "\n  ".join(lines[:40]) + more)


def listing(root: str | os.PathLike[str]) -> str:
    """`ls -lR` of a layer for a failure report, with overlay marks."""
    lines = []
    for name, entry in sorted(take(root).items()):
        marks = " ".join(f"{key}={value!r}" for key, value in entry.xattrs)
        device = " 0:0 whiteout" if stat.S_ISCHR(entry.kind) and entry.rdev == 0 else ""
        lines.append(
            f"{oct(entry.kind | entry.mode)} {entry.size:>8} {_show(name)}{device} {marks}"
        )
    return "\n".join(lines)


def blocks(path: Path) -> int:
    """Bytes really allocated."""
    return os.lstat(path).st_blocks * 512
