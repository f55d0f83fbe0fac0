# SPDX-License-Identifier: GPL-2.0-or-later
"""New names: files, directories, symbolic links, special files, hard links.

A new file whose owner is the daemon's own and whose name is free in the upper is made there by one
call. Any other is prepared in the work directory and published by one rename: over a whiteout, if
the name is whited out (a directory is then opaque, and changes places with the whiteout).
"""

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import Protocol

from unionfs import acl
from unionfs._native import ROOT_INO, renameat2
from unionfs.copy_up import (
    can_override,
    disk_ids,
    ensure_upper,
    give_owner,
    override_mode,
    set_override,
    temporary,
    write_nlink,
)
from unionfs.marks import RENAME_EXCHANGE, WH, fd_path, lent, publish
from unionfs.union import UPPER_ENTRY, UPPER_WHITEOUT, Entry, Union
from unionfs.work import AREA_NAME


class Caller(Protocol):
    """Who asks: pyfuse3's RequestContext, or the engine's."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def umask(self) -> int: ...


@dataclass(frozen=True, slots=True)
class New:
    """A file to be made: `mode` with its type, as asked for, the umask not yet taken off."""

    mode: int
    rdev: int = 0
    target: bytes = b""
    flags: int = os.O_RDWR


def _error(code: int, name: bytes) -> OSError:
    return OSError(code, os.strerror(code), name)


def check_name(union: Union, parent: int, name: bytes) -> None:
    """Names that are the union's own."""
    if parent == ROOT_INO and name == os.fsencode(AREA_NAME):
        raise _error(errno.EPERM, name)
    if union.marks.wh and name.startswith(WH):
        raise _error(errno.EINVAL, name)


def create(union: Union, parent: int, name: bytes, new: New, ctx: Caller) -> int:
    """Make NAME; a descriptor of it (a regular file's is open with new.flags)."""
    check_name(union, parent, name)
    union.tree.changeable(parent, True, False)
    ensure_upper(union, parent)
    made = union.tree.plain_make(
        parent, name, new.mode, ctx.umask, new.rdev, new.target, new.flags, ctx.uid, ctx.gid
    )
    if made is not None:
        return made
    with union.tree.upper_dir(parent) as dirfd, union.entering(parent):
        default = None if stat.S_ISLNK(new.mode) else acl.default_acl(dirfd)
        uid, gid = disk_ids(union, ctx.uid, ctx.gid)
        mode = new.mode if default is not None else new.mode & ~ctx.umask
        entry = union.entry(parent, name)
        if entry.ino or entry.upper == UPPER_ENTRY:
            raise _error(errno.EEXIST, name)
        return _make_in_work(union, dirfd, name, new, mode, (uid, gid), default, entry)


def _make_at(union: Union, dirfd: int, name: bytes, new: New, mode: int) -> int:
    """Make NAME in a directory. The daemon's own umask is 0."""
    if stat.S_ISREG(mode):
        flags = (new.flags & (os.O_ACCMODE | os.O_SYNC | os.O_DSYNC)) | os.O_NONBLOCK
        flags |= os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(name, flags, stat.S_IMODE(mode), dir_fd=dirfd)
    if stat.S_ISDIR(mode):
        os.mkdir(name, stat.S_IMODE(mode), dir_fd=dirfd)
        union.tree.ask_anew(dirfd, name)
        return -1
    if stat.S_ISLNK(mode):
        os.symlink(new.target, name, dir_fd=dirfd)
        return -1
    os.mknod(name, mode, new.rdev, dir_fd=dirfd)
    return -1


def create_nameless(union: Union, parent: int, new: New, ctx: Caller) -> int:
    """O_TMPFILE: a file in the upper's file system that has no name yet; a descriptor of it.

    Of PARENT only its default ACL and its set-group-ID count, so it is not copied up: that is for
    who gives the file a name.
    """
    union.tree.changeable(parent, True, True)
    dirfd = union.tree.open_node(parent, os.O_PATH | os.O_DIRECTORY)
    try:
        default = acl.default_acl(dirfd)
        uid, gid = disk_ids(union, ctx.uid, ctx.gid)
        mode = new.mode if default is not None else new.mode & ~ctx.umask
        gid = _inherited_gid(dirfd, gid)
    finally:
        os.close(dirfd)
    fd = _open_nameless(union.work_fd, new.flags)
    try:
        _dress(union, fd, mode, uid, gid, default)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_nameless(dirfd: int, flags: int) -> int:
    kept = flags & (os.O_ACCMODE | os.O_SYNC | os.O_DSYNC)
    try:
        return os.open(".", kept | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=dirfd)
    except IsADirectoryError as exc:  # of file systems that know nothing of it (open(2))
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from exc


def _inherited_gid(dirfd: int, gid: int) -> int:
    """The group of what is made in a directory: the directory's own if it is set-group-ID."""
    parent = os.stat(dirfd)
    return parent.st_gid if parent.st_mode & stat.S_ISGID else gid


def _make_in_work(
    union: Union,
    dirfd: int,
    name: bytes,
    new: New,
    mode: int,
    owner: tuple[int, int],
    default: bytes | None,
    entry: Entry,
) -> int:
    work, temp = union.work_fd, union.temp_name()
    directory = stat.S_ISDIR(mode)
    uid, gid = owner
    parent = os.stat(dirfd)
    if parent.st_mode & stat.S_ISGID:
        gid = parent.st_gid
        if directory:
            mode |= stat.S_ISGID
    # With all rights for now: the mode comes last.
    fd = _make_at(union, work, temp, new, stat.S_IFMT(mode) | (0o700 if directory else 0o600))
    with temporary(union, temp, directory=directory), contextlib.ExitStack() as stack:
        if fd >= 0:
            held = fd
        else:
            flags = (os.O_RDONLY | os.O_DIRECTORY) if directory else (os.O_PATH | os.O_NOFOLLOW)
            held = os.open(temp, flags | os.O_CLOEXEC, dir_fd=work)
            stack.callback(os.close, held)
        try:
            _dress(union, held, mode, uid, gid, default)
            with lent(held, stat.S_IWUSR, when=directory):
                _publish_new(union, dirfd, name, temp, held, entry, directory=directory)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
    return fd


def _dress(union: Union, fd: int, mode: int, uid: int, gid: int, default: bytes | None) -> None:
    """Owner, inherited ACL, mode."""
    given = give_owner(union, fd, uid, gid, mode)
    if stat.S_ISLNK(mode):
        return
    if default is not None:
        given = acl.apply(fd, default, given, directory=stat.S_ISDIR(mode))
    if union.override is not None and can_override(mode):
        set_override(union, fd, uid, gid, given)
        given = override_mode(given, directory=stat.S_ISDIR(mode))
    os.chmod(fd_path(fd), stat.S_IMODE(given))


def _publish_new(
    union: Union,
    dirfd: int,
    name: bytes,
    temp: bytes,
    fd: int,
    entry: Entry,
    *,
    directory: bool,
) -> None:
    """Bring work/TEMP to its name, over a whiteout if there is one."""
    work = union.work_fd
    if entry.upper != UPPER_WHITEOUT:
        publish(work, temp, dirfd, name)
        return
    if directory:
        union.marks.set_opaque(fd)
    if union.marks.wh:
        publish(work, temp, dirfd, name)
        union.marks.drop_wh(dirfd, name)
    elif directory:
        renameat2(work, temp, dirfd, name, RENAME_EXCHANGE)
        os.unlink(temp, dir_fd=work)
    else:
        os.rename(temp, name, src_dir_fd=work, dst_dir_fd=dirfd)


def link(union: Union, ino: int, parent: int, name: bytes) -> None:
    """A further name for a file, or the first of one made by O_TMPFILE. A lower file is copied up,
    its metadata only if it is large."""
    check_name(union, parent, name)
    union.tree.changeable(ino, False, False)
    union.tree.changeable(parent, True, False)
    ensure_upper(union, ino)
    ensure_upper(union, parent)
    if union.tree.plain_link(ino, parent, name):
        return
    ensure_found(union, ino)
    with union.committing(ino):  # not replaced meanwhile by its completed copy
        _link(union, ino, parent, name)


def _link(union: Union, ino: int, parent: int, name: bytes) -> None:
    """Preconditions: both are in the upper; committing(ino)."""
    info = union.info(ino)
    fd = union.tree.open_node(ino, os.O_PATH | os.O_NOFOLLOW)
    try:
        if info.metacopy:
            set_data_redirect(union, ino, fd)
        if info.indexed:
            write_nlink(union, ino, info.nlink_diff)
        if info.foreign and union.marks.xattrs:
            union.tree.make_impure(parent)
        with union.tree.upper_dir(parent) as dirfd, union.entering(parent):
            entry = union.entry(parent, name)
            if entry.ino or entry.upper == UPPER_ENTRY:
                raise _error(errno.EEXIST, name)
            _link_at(union, fd, dirfd, name, entry)
            if info.unlinked:
                union.tree.named(ino)
    finally:
        os.close(fd)


def _link_at(union: Union, fd: int, dirfd: int, name: bytes, entry: Entry) -> None:
    source = fd_path(fd)
    if entry.upper != UPPER_WHITEOUT:
        os.link(source, name, dst_dir_fd=dirfd, follow_symlinks=True)
        union.tree.ask_anew(dirfd, name)
        return
    if union.marks.wh:
        os.link(source, name, dst_dir_fd=dirfd, follow_symlinks=True)
        union.tree.ask_anew(dirfd, name)
        union.marks.drop_wh(dirfd, name)
        return
    temp = union.temp_name()
    os.link(source, temp, dst_dir_fd=union.work_fd, follow_symlinks=True)
    with temporary(union, temp):
        os.rename(temp, name, src_dir_fd=union.work_fd, dst_dir_fd=dirfd)
    union.tree.ask_anew(dirfd, name)


def ensure_found(union: Union, ino: int) -> None:
    """Before a file gets another name: a metadata-only copy gets its data if they lie too deep for
    a redirect. EXDEV would be a surprise, also within one directory."""
    info = union.info(ino)
    if not info.metacopy or _leads(info.redirect):
        return
    try:
        union.tree.redirect_path(ino)
    except OSError as exc:
        if exc.errno != errno.ENAMETOOLONG:
            raise
        ensure_upper(union, ino, data=True)


def _leads(redirect: bytes | None) -> bool:
    """Whether it says where the data are wherever it stands."""
    return redirect is not None and redirect.startswith(b"/")


def set_data_redirect(union: Union, ino: int, fd: int) -> None:
    """Before a metadata-only copy gets another name: say where its data are (absolute path)."""
    info = union.info(ino)
    if _leads(info.redirect):
        return
    path = redirect_path(union, ino)
    union.note_incompat()
    union.marks.set(fd, "redirect", path)
    union.tree.set_redirect(ino, path)


def redirect_path(union: Union, ino: int) -> bytes:
    """Where the lower layers have an inode; EXDEV if that is too long for a redirect, so that mv(1)
    copies."""
    try:
        return union.tree.redirect_path(ino)
    except OSError as exc:
        if exc.errno == errno.ENAMETOOLONG:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV)) from exc
        raise
