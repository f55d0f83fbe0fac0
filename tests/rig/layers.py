# SPDX-License-Identifier: GPL-2.0-or-later
"""What a stack of lowers shows, worked out the slow and simple way: the plain copy of a union.

Whiteouts (character device 0:0), opaque directories (`trusted.overlay.opaque`,
`user.overlay.opaque` = y), everything else as it lies there, with owners, modes, times, xattrs and
hard links. This is the oracle, so it shares nothing with the product. Redirects and metadata-only
copies are not read: the tests' own lowers have none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Sequence

OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")
_PRIVATE = ("trusted.overlay.", "user.overlay.", "trusted.SGI_ACL_")


def is_whiteout(st: os.stat_result) -> bool:
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0


def whiteout(path: str | bytes | os.PathLike[str]) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(0, 0))


def make_opaque(path: str | bytes | os.PathLike[str]) -> None:
    name = OPAQUE[0] if os.geteuid() == 0 else OPAQUE[1]
    os.setxattr(path, name, b"y")


def _is_opaque(path: bytes) -> bool:
    for name in OPAQUE:
        with contextlib.suppress(OSError):
            if os.getxattr(path, name, follow_symlinks=False) == b"y":
                return True
    return False


def merge(lowers: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str]) -> None:
    """Fill the existing directory `target` with what the lowers (top-most first) show."""
    top = os.fsencode(target)
    for layer in reversed(lowers):
        links: dict[int, bytes] = {}
        _apply(os.fsencode(layer), top, links)
    # Times last: filling a directory changes them.
    for layer in reversed(lowers):
        _times(os.fsencode(layer), top)


def _apply(source: bytes, target: bytes, links: dict[int, bytes]) -> None:
    copy_metadata(source, target)
    for name in sorted(os.listdir(source)):
        here, there = os.path.join(source, name), os.path.join(target, name)
        st = os.lstat(here)
        old = os.lstat(there) if os.path.lexists(there) else None
        both = stat.S_ISDIR(st.st_mode) and old is not None and stat.S_ISDIR(old.st_mode)
        if old is not None and (not both or _is_opaque(here)):
            _remove(there)
            both = False
        if is_whiteout(st):
            continue
        if stat.S_ISDIR(st.st_mode):
            if not both:
                os.mkdir(there)
            _apply(here, there, links)
        elif st.st_ino in links:
            os.link(links[st.st_ino], there, follow_symlinks=False)
        else:
            links[st.st_ino] = there
            _copy(here, there, st)


def _remove(path: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _copy(source: bytes, target: bytes, st: os.stat_result) -> None:
    if stat.S_ISLNK(st.st_mode):
        os.symlink(os.readlink(source), target)
    elif stat.S_ISREG(st.st_mode):
        shutil.copyfile(source, target)
    else:
        os.mknod(target, st.st_mode, st.st_rdev)
    # With the time of access from before the copy.
    copy_metadata(source, target, st)


def copy_metadata(source: bytes, target: bytes, st: os.stat_result | None = None) -> None:
    """Owner, mode, xattrs (ACLs and capabilities among them) and times, in the order they need."""
    st = st or os.lstat(source)
    os.chown(target, st.st_uid, st.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(st.st_mode):
        os.chmod(target, stat.S_IMODE(st.st_mode))
    for name in os.listxattr(target, follow_symlinks=False):
        # xfs shows each ACL twice, so the second name is gone with the first.
        with contextlib.suppress(OSError):
            os.removexattr(target, name, follow_symlinks=False)
    for name in os.listxattr(source, follow_symlinks=False):
        if not name.startswith(_PRIVATE):
            value = os.getxattr(source, name, follow_symlinks=False)
            os.setxattr(target, name, value, follow_symlinks=False)
    os.utime(target, ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)


def _times(source: bytes, target: bytes) -> None:
    """Directory times again, where this layer's directory is the one that is seen."""
    for name in os.listdir(source):
        here, there = os.path.join(source, name), os.path.join(target, name)
        directory = os.path.isdir(here) and not os.path.islink(here)
        if directory and os.path.isdir(there) and not os.path.islink(there):
            _times(here, there)
    st = os.lstat(source)
    os.utime(target, ns=(st.st_atime_ns, st.st_mtime_ns))
