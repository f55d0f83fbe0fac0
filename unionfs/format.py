# SPDX-License-Identifier: GPL-2.0-or-later
"""In which of the known ways the marks of one upper are written: its format record.

Owns AREA/format, and the examination of an upper that has none because another program wrote it.
Does not own the marks themselves (marks.py).  Called by work.py when an upper is opened.

    unionfs 1                  the version of the format
    whiteout=char              or wh: what a new whiteout is
    xattrs=trusted             or user, none: where opaque, redirect ... are kept

All known forms are read whatever the record says; it decides what is written.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from typing import Final, Literal, NamedTuple, TypeVar

from unionfs.errors import UnionfsError
from unionfs.layer import Namespace

AREA_NAME: Final = ".unionfs"
# Of gocryptfs, where an encrypted upper lies (stores/gocryptfs.py).
CIPHER_CONFIG: Final = "gocryptfs.conf"
# Of an encrypted upper of fscrypt: what its key is made of (stores/fscrypt.py, cext/xattrs.c).
KEY_ATTRIBUTE: Final = "trusted.overlay.unionfs_fscrypt"
FORMAT_VERSION: Final = 1
# How deep to look for evidence: a hostile tree has no end, our stack has.
_DEPTH: Final = 400
OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW

Whiteout = Literal["char", "wh"]
WHITEOUTS: Final[dict[str, Whiteout]] = {"char": "char", "wh": "wh"}
NAMESPACES: Final[dict[str, Namespace | None]] = {
    "trusted": "trusted",
    "user": "user",
    "none": None,
}
T = TypeVar("T")


class Record(NamedTuple):
    """Decided at the first mount of an upper and kept for its life."""

    whiteout: Whiteout
    xattrs: Namespace | None

    def text(self) -> str:
        """As it stands in AREA/format."""
        xattrs = self.xattrs or "none"
        return f"unionfs {FORMAT_VERSION}\nwhiteout={self.whiteout}\nxattrs={xattrs}\n"


class Evidence(NamedTuple):
    """What the marks in an upper without a record say about who wrote it."""

    whiteout: Whiteout | None = None
    xattrs: Namespace | None = None


def _damaged(path: str, what: str) -> UnionfsError:
    hint = "remove the file to have the upper examined anew"
    return UnionfsError(f"{path} is damaged: {what}", hint=hint)


def _one_of(fields: Mapping[str, str], name: str, values: Mapping[str, T], path: str) -> T:
    value = fields.get(name, "")
    if value not in values:
        raise _damaged(path, f"{name}={value}")
    return values[value]


def parse_record(text: str, path: str) -> Record:
    """Read AREA/format; an error names the newer version or what is damaged."""
    lines = text.splitlines()
    words = lines[0].split() if lines else []
    if len(words) != 2 or words[0] != "unionfs" or not words[1].isdecimal():
        raise _damaged(path, f"it does not start with 'unionfs {FORMAT_VERSION}'")
    if int(words[1]) > FORMAT_VERSION:
        raise UnionfsError(
            f"{path} says format version {words[1]}, newer than this program's {FORMAT_VERSION}",
            hint="mount it with a newer unionfs",
        )
    fields = dict(line.partition("=")[::2] for line in lines[1:] if line)
    return Record(
        _one_of(fields, "whiteout", WHITEOUTS, path), _one_of(fields, "xattrs", NAMESPACES, path)
    )


def examine(upper: int) -> Evidence:
    """Look through an upper that has no record for the marks of whoever wrote it before.

    Reads every directory once, unless .wh. names are found: fuse-overlayfs writes those beside
    devices 0:0.
    """
    whiteout: Whiteout | None = None
    xattrs: Namespace | None = None
    root = os.open(".", OPEN_DIRECTORY, dir_fd=upper)
    for fd, name in _walk(root, os.fstat(upper).st_dev):
        if name is None:
            xattrs = xattrs or _mark_namespace(fd)
        elif name.startswith(".wh."):
            whiteout = "wh"
        elif whiteout is None:
            whiteout = _char_whiteout(fd, name)
        if whiteout == "wh" and xattrs is not None:
            break
    return Evidence(whiteout, xattrs)


def _walk(fd: int, dev: int, depth: int = 0) -> Iterator[tuple[int, str | None]]:
    """Each directory (name None), then the names in it that may be whiteouts.  Closes `fd`."""
    try:
        yield fd, None
        children = []
        with os.scandir(fd) as entries:
            for entry in entries:
                if depth == 0 and entry.name == AREA_NAME:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if depth < _DEPTH:
                        children.append(entry.name)
                elif entry.name.startswith(".wh.") or not (
                    entry.is_symlink() or entry.is_file(follow_symlinks=False)
                ):
                    yield fd, entry.name
        for name in children:
            try:
                child = os.open(name, OPEN_DIRECTORY, dir_fd=fd)
            except OSError:
                continue  # not ours to read, or gone: there is only less evidence
            if os.fstat(child).st_dev == dev:
                yield from _walk(child, dev, depth + 1)
            else:
                os.close(child)
    finally:
        os.close(fd)


def is_marked(directory: int) -> bool:
    """Whether an open directory has marks itself, as the root of many uppers has."""
    return _mark_namespace(directory) is not None


def _mark_namespace(fd: int) -> Namespace | None:
    try:
        names = [name for name in os.listxattr(fd) if name != KEY_ATTRIBUTE]
    except OSError:
        return None  # a file system without xattrs
    if any(name.startswith("trusted.overlay.") for name in names):
        return "trusted"
    if any(name.startswith(("user.overlay.", "user.fuseoverlayfs.")) for name in names):
        return "user"
    return None


def _char_whiteout(fd: int, name: str) -> Whiteout | None:
    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
    return "char" if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0 else None
