# SPDX-License-Identifier: GPL-2.0-or-later
"""What the union writes to disk besides files: the one place where marks are written.

Kernel overlayfs's names and values (Documentation/filesystems/overlayfs.rst), or `.wh.` names
where the upper cannot hold those. They are read in C (cext/resolve.c), the one place that knows
what they mean. Called by the families of changes; docs/on-disk-format.md says it to the byte.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import xattr

from unionfs import _native
from unionfs._native import renameat2

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

WH = b".wh."
WH_OPAQUE = b".wh..wh..opq"
OVERRIDE = {1: "security.fuseoverlayfs.override_stat", 2: "user.containers.override_stat"}


def fd_path(fd: int) -> str:
    """A path that leads to what an open descriptor stands for, O_PATH or not."""
    return f"/proc/self/fd/{fd}"


def publish(work: int, temp: bytes, dirfd: int, name: bytes) -> None:
    """Give what was prepared its name, which must be free.

    A file system without RENAME_NOREPLACE (fuse2fs) is looked at before: the upper is ours alone.
    """
    try:
        renameat2(work, temp, dirfd, name, RENAME_NOREPLACE)
        return
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
    try:
        os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(temp, name, src_dir_fd=work, dst_dir_fd=dirfd)
    else:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


@contextlib.contextmanager
def lent(fd: int, bits: int, *, when: bool = True) -> Iterator[None]:
    """Have owner's mode bits that a file or directory of ours lacks, for a while.

    An ordinary user's daemon needs them for what the kernel lets the user do all the same: chmod a
    file in a directory that he cannot write, say (cext/loan.h). A cut in between leaves them set.
    """
    if not when or os.geteuid() == 0:
        yield
        return
    loan = _native.lend(fd, bits)
    try:
        yield
    finally:
        _native.give_back(loan)


@contextlib.contextmanager
def lent_at(dirfd: int, name: bytes, bits: int) -> Iterator[None]:
    """The same for a directory by its name: to move it elsewhere, its owner must be able to write
    it (its `..` changes)."""
    if os.geteuid() == 0:
        yield
        return
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=dirfd)
    try:
        with lent(fd, bits):
            yield
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Marks:
    """How marks are written in one upper.

    prefix: "trusted.overlay." or "user.overlay.". xattrs: whether the upper holds any.
    wh: whiteouts are files named .wh.NAME, else character devices 0:0.
    """

    prefix: str
    xattrs: bool
    wh: bool

    def set(self, fd: int, mark: str, value: bytes) -> None:
        """Set overlay.MARK of an open descriptor."""
        with lent(fd, stat.S_IWUSR, when=self.prefix.startswith("user.")):
            xattr.setxattr(fd_path(fd), self.prefix + mark, value)

    def remove(self, fd: int, mark: str) -> None:
        """Remove overlay.MARK; that commits a completed metadata-only copy, for one."""
        with lent(fd, stat.S_IWUSR, when=self.prefix.startswith("user.")):
            xattr.removexattr(fd_path(fd), self.prefix + mark)

    def set_opaque(self, fd: int) -> None:
        """Nothing of the lower layers shows through this directory (a readable descriptor)."""
        if self.xattrs:
            self.set(fd, "opaque", b"y")
        else:
            os.close(os.open(WH_OPAQUE, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=fd))

    def make_whiteout(self, tree: _native.Tree, dirfd: int, name: bytes) -> None:
        """A whiteout where nothing is yet. Atomic."""
        if self.wh:
            os.close(
                os.open(WH + name, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=dirfd)
            )
        else:
            tree.make_whiteout(dirfd, name)

    def whiteout_over(
        self, tree: _native.Tree, work: int, temp: bytes, dirfd: int, name: bytes
    ) -> None:
        """Replace a file by a whiteout."""
        if self.wh:
            # While both are there, the file of the same layer counts.
            self.make_whiteout(tree, dirfd, name)
            os.unlink(name, dir_fd=dirfd)
            return
        tree.make_whiteout(work, temp)
        try:
            os.rename(temp, name, src_dir_fd=work, dst_dir_fd=dirfd)
        except OSError:
            os.unlink(temp, dir_fd=work)
            raise

    def whiteout_over_dir(
        self, tree: _native.Tree, work: int, temp: bytes, dirfd: int, name: bytes
    ) -> None:
        """Replace a directory by a whiteout; the directory is work/TEMP then."""
        if self.wh:
            self.make_whiteout(tree, dirfd, name)
            with lent_at(dirfd, name, stat.S_IWUSR):
                os.rename(name, temp, src_dir_fd=dirfd, dst_dir_fd=work)
            return
        tree.make_whiteout(work, temp)
        try:
            with lent_at(dirfd, name, stat.S_IWUSR):
                renameat2(work, temp, dirfd, name, RENAME_EXCHANGE)
        except OSError:
            os.unlink(temp, dir_fd=work)
            raise

    def drop_wh(self, dirfd: int, name: bytes) -> None:
        """Remove a .wh. file that something has taken the place of."""
        if self.wh:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(WH + name, dir_fd=dirfd)
