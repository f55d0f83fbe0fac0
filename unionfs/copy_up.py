# SPDX-License-Identifier: GPL-2.0-or-later
"""Copy-up: bringing a file of a lower layer into the upper.

A temporary in the work directory gets data and metadata, is synced, and is published by one rename
or link; a cut at any point leaves the old file or the new one. So is the whole file that takes the
place of a metadata-only copy. Only where that has several names, the data are written into the
upper file itself, which nobody reads until the mark is removed (as kernel overlayfs does).

Called by every family of changes before it changes anything.
"""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence

from unionfs import _native, acl, numbers
from unionfs.marks import fd_path, lent, publish
from unionfs.options import IdRange
from unionfs.syscalls import syncfs
from unionfs.union import METACOPY_BYTES, Info, Union

# chown of what is not ours: see give_owner.
OVERFLOW_ID = 65534  # the kernel's, which the table (cext/place.c) shows for what is not mapped
_STANDS_FOR = {
    stat.S_IFIFO: b"pipe",
    stat.S_IFSOCK: b"socket",
    stat.S_IFCHR: b"char",
    stat.S_IFBLK: b"block",
}


def ensure_upper(
    union: Union, ino: int, *, data: bool = False, truncate: int | None = None
) -> None:
    """Make sure that an inode lies in the upper, `data`: with its bytes.

    `truncate`: no more than so many bytes are wanted. Raises LongWork where bytes would move and
    this thread must not wait for them.
    """
    info = union.info(ino)
    if info.upper and not (data and info.metacopy):
        return
    if union.readonly:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    if stat.S_ISREG(info.type):
        union.check_long()
    if not info.upper:
        # From the top downwards, in a loop: paths have no limit of depth.
        missing = []
        name = union.tree.name_of(ino)
        while name is not None and not union.info(name[0]).upper:
            missing.append(name[0])
            name = union.tree.name_of(name[0])
        for directory in reversed(missing):
            _ensure_one(union, directory, data=False, truncate=None)
    _ensure_one(union, ino, data=data, truncate=truncate)


def _ensure_one(union: Union, ino: int, *, data: bool, truncate: int | None) -> None:
    """Preconditions: the parent is in the upper (or is moving there: _publish looks again)."""
    if truncate is None and union.tree.plain_copy_up(ino, data):
        return
    with union.copying(ino):
        info = union.info(ino)
        if not info.upper:
            _copy_node(union, ino, info, data=data, truncate=truncate)
        elif data and info.metacopy:
            _complete(union, ino, truncate)


def ensure_name(union: Union, parent: int, name: bytes, ino: int) -> None:
    """Make sure that this very name of a copied-up hard link exists in the upper."""
    ensure_upper(union, ino)
    info = union.info(ino)
    if not info.indexed or union.tree.name_is_real(parent, name):
        return
    assert union.work is not None
    union.tree.make_impure(parent)
    with union.committing(ino), union.tree.upper_dir(parent) as dirfd:
        if union.tree.name_is_real(parent, name):
            return
        diff = union.info(ino).nlink_diff - 1
        # The count stays as it is, but what nlink is relative to changes: for this moment it is
        # written down by itself.
        _mark_file(union, ino, "unionfs.links", b"%d" % union.tree.getattr(ino)[2])
        with union.entering(parent), times_kept(dirfd):
            _link_entry(union.work.index, info.index_name, dirfd, name)
            union.tree.ask_anew(dirfd, name)
        try:
            write_nlink(union, ino, diff)
        except BaseException:
            os.unlink(name, dir_fd=dirfd)
            raise
        union.tree.set_nlink_diff(ino, diff)
        union.tree.name_made_real(parent, name)


def write_nlink(union: Union, ino: int, diff: int) -> None:
    """overlay.nlink: the union's link count relative to the upper inode's (ovl_set_nlink_upper).

    Written before a link is made or removed, so that the count changes with that one call.
    """
    _mark_file(union, ino, "nlink", b"U%+d" % diff)
    _mark_file(union, ino, "unionfs.links", None)


def _mark_file(union: Union, ino: int, mark: str, value: bytes | None) -> None:
    """Set a mark, or remove it with None, where the file can carry one."""
    if not union.marks.xattrs:
        return
    fd = union.tree.open_node(ino, os.O_PATH | os.O_NOFOLLOW)
    try:
        if value is None:
            union.marks.remove(fd, mark)
        else:
            union.marks.set(fd, mark, value)
    except OSError as exc:
        # A user's symbolic link or special file; not there.
        if exc.errno not in (errno.EPERM, errno.ENODATA):
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def times_kept(dirfd: int) -> Iterator[None]:
    """What copies up into a directory does not change the directory for its users."""
    before = os.stat(dirfd)
    yield
    os.utime(fd_path(dirfd), ns=(before.st_atime_ns, before.st_mtime_ns))


@contextlib.contextmanager
def temporary(union: Union, name: bytes, *, directory: bool = False) -> Iterator[None]:
    """Remove work/NAME if what is prepared there does not come to be published."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if directory:
                os.rmdir(name, dir_fd=union.work_fd)
            else:
                os.unlink(name, dir_fd=union.work_fd)
        raise


def give_owner(union: Union, fd: int, uid: int, gid: int, mode: int) -> int:
    """Give owner and group; the mode that may be set afterwards.

    What we may not give is kept in the override attribute with xattr_permissions; else it is
    ours, and as with cp(1) it then loses set-user-ID and set-group-ID.
    """
    given = _native.give_owner(fd, uid, gid, mode)
    return given if union.override is None else mode


def set_override(
    union: Union, fd: int, uid: int, gid: int, mode: int, kind: int = 0, rdev: int = 0
) -> None:
    """Keep owner and mode as xattr_permissions asks (containers/storage's format).

    `kind`: the type bits of what a regular file stands for.
    """
    assert union.override is not None
    value = b"%d:%d:%o" % (uid, gid, stat.S_IMODE(mode))
    if word := _STANDS_FOR.get(stat.S_IFMT(kind)):
        value += b":" + word
    if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
        value += b"-%d-%d" % (os.major(rdev), os.minor(rdev))
    with lent(fd, stat.S_IWUSR):
        os.setxattr(fd_path(fd), union.override, value)


def override_mode(mode: int, *, directory: bool) -> int:
    """The mode on disk where the attribute keeps the real one: ours to read and write."""
    return mode & 0o777 | (0o700 if directory else 0o600)


def can_override(mode: int) -> bool:
    """Whether a file of this type can carry the override attribute (xattr(7))."""
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def disk_ids(union: Union, uid: int, gid: int) -> tuple[int, int]:
    """The owner on disk for one that the union shows (uidmapping, gidmapping backwards)."""
    options = union.options
    return _disk_id(uid, options.uidmapping), _disk_id(gid, options.gidmapping)


def _disk_id(number: int, ranges: Sequence[IdRange]) -> int:
    for r in ranges:
        if r.outside <= number < r.outside + r.length:
            return r.inside + number - r.outside
    # Unmapped: were it kept as it is, it could be shown as somebody else.
    return OVERFLOW_ID if ranges else number


def _wants_metacopy(
    union: Union, ino: int, info: Info, status: os.stat_result, src: int, *, data: bool
) -> bool:
    """Whether data that nobody asked for stay below. So do those that an ordinary user's daemon
    may not read: the user may rename such a file all the same. Of a file that has no name any more
    nothing leads to them."""
    if not stat.S_ISREG(info.type) or data or not (union.options.metacopy and union.marks.xattrs):
        return False
    if union.tree.name_of(ino) is None:
        return False
    if info.metacopy or status.st_size >= METACOPY_BYTES:
        return True
    return status.st_size > 0 and not os.access(fd_path(src), os.R_OK, effective_ids=True)


def _copy_node(union: Union, ino: int, info: Info, *, data: bool, truncate: int | None) -> None:
    """One copy-up. Preconditions: copying(ino) is held, the parent is in the upper."""
    src = union.tree.open_node(ino, os.O_PATH | os.O_NOFOLLOW)
    temp = union.temp_name()
    is_dir = stat.S_ISDIR(info.type)
    try:
        status = os.stat(fd_path(src)) if not stat.S_ISLNK(info.type) else os.fstat(src)
        metacopy = truncate is None and _wants_metacopy(union, ino, info, status, src, data=data)
        with temporary(union, temp, directory=is_dir):
            fd, settled = _make_temp(
                union, ino, temp, status, src, metacopy=metacopy, truncate=truncate
            )
            try:
                index = _prepare_metadata(union, ino, src, fd, status, metacopy=metacopy)
                late = _flags_of_copy(src, fd, info.type)
                if _must_sync(union, settled=settled):
                    _sync(fd, info.type)
                _publish(union, ino, temp, fd, status, index, metacopy=metacopy)
                if late:
                    _native.add_flags(fd, late)
            finally:
                os.close(fd)
    finally:
        os.close(src)


def _flags_of_copy(src: int, fd: int, kind: int) -> int:
    """File flags go with the copy; those to be added when it is published, or 0."""
    return _native.copy_flags(src, fd) if stat.S_ISREG(kind) or stat.S_ISDIR(kind) else 0


@contextlib.contextmanager
def unprotected(dirfd: int) -> Iterator[None]:
    """What a union copies up into an immutable or append-only directory is no change of it."""
    lifted = _native.lift_flags(dirfd)
    try:
        yield
    finally:
        if lifted:
            _native.add_flags(dirfd, lifted)


def _must_sync(union: Union, *, settled: bool) -> bool:
    """Whether a copy is synced before it gets its name; `settled` as _make_temp() tells."""
    return union.options.fsync == "strict" or (union.options.fsync == "auto" and not settled)


def _sync(fd: int, kind: int) -> None:
    if stat.S_ISREG(kind) or stat.S_ISDIR(kind):
        os.fsync(fd)


def _copy_data(union: Union, ino: int, fd: int, size: int) -> bool:
    """Copy that much of a file's data, if there is room; whether none of it has to be synced."""
    data = union.tree.open_node(ino, os.O_RDONLY | os.O_NONBLOCK, True)
    try:
        _native.check_room(data, fd, union.image, size)
        return _native.copy_data(data, fd, size)
    finally:
        os.close(data)


def _make_temp(
    union: Union,
    ino: int,
    temp: bytes,
    status: os.stat_result,
    src: int,
    *,
    metacopy: bool,
    truncate: int | None,
) -> tuple[int, bool]:
    """Make work/TEMP of the same kind, with its data.

    An open descriptor of it, and whether it has no data that would have to be synced.
    """
    work = union.work_fd
    settled = metacopy or not stat.S_ISREG(status.st_mode)
    if stat.S_ISREG(status.st_mode):
        fd = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=work)
        try:
            size = status.st_size if truncate is None else min(truncate, status.st_size)
            if metacopy:
                os.ftruncate(fd, status.st_size)
            elif size:
                settled = _copy_data(union, ino, fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd, settled
    if stat.S_ISDIR(status.st_mode):
        os.mkdir(temp, 0o700, dir_fd=work)
        return os.open(temp, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=work), settled
    if stat.S_ISLNK(status.st_mode):
        os.symlink(union.tree.readlink(ino), temp, dir_fd=work)
    else:
        _make_special(union, temp, status)
    return os.open(temp, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=work), settled


def _make_special(union: Union, temp: bytes, status: os.stat_result) -> None:
    work = union.work_fd
    try:
        os.mknod(temp, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev, dir_fd=work)
    except PermissionError:
        if union.override is None:
            raise
        # A device that a user may not make: a regular file whose attribute says so.
        os.close(os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=work))


def _prepare_metadata(
    union: Union, ino: int, src: int, fd: int, status: os.stat_result, *, metacopy: bool
) -> str | None:
    """Owner, attributes, mode, times, marks; the name in the index if it gets one."""
    marks = union.marks
    mode = stat.S_IMODE(_native.mode_of(src))
    # The owner first: chown clears set-ID bits and capabilities.
    mode = give_owner(union, fd, status.st_uid, status.st_gid, mode)
    _native.copy_xattrs(src, fd, marks.prefix, union.override)
    mode = acl.mode_if_lost(src, fd, mode)
    if union.override is not None and can_override(os.stat(fd).st_mode):
        shown = union.tree.getattr(ino)
        owner = disk_ids(union, shown[3], shown[4])
        set_override(union, fd, *owner, shown[1], shown[1], shown[5])
        mode = override_mode(mode, directory=stat.S_ISDIR(status.st_mode))
    index = None
    if not stat.S_ISDIR(status.st_mode):
        if not union.tree.mark_origin(ino, src, fd):
            numbers.keep(union, fd, ino, union.tree.birth(ino))
        if status.st_nlink > 1 and union.work is not None and union.work.index >= 0:
            index = union.tree.index_name(ino) or None
            if marks.xattrs and index:
                with contextlib.suppress(PermissionError):  # a user's symbolic link
                    marks.set(fd, "nlink", b"L+0")
    if metacopy:
        union.note_incompat()
        marks.set(fd, "metacopy", b"")
    path = fd_path(fd)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(path, mode)
    # A copy cut short for a truncation is a changed file from the moment it is seen.
    short = stat.S_ISREG(status.st_mode) and os.stat(path).st_size != status.st_size
    mtime = time.time_ns() if short else status.st_mtime_ns
    os.utime(path, ns=(status.st_atime_ns, mtime))
    return index


def _publish(
    union: Union,
    ino: int,
    temp: bytes,
    fd: int,
    status: os.stat_result,
    index: str | None,
    *,
    metacopy: bool,
) -> None:
    """The commit. Nothing but the copy itself changes for the union's users."""
    tree, work = union.tree, union.work_fd
    with union.committing(ino):
        place = tree.name_of(ino)
        if place is None:
            # Unlinked, it may be while its bytes moved; open descriptors live on.
            if metacopy:
                _write_data(union, ino, fd, None)
            (os.rmdir if stat.S_ISDIR(status.st_mode) else os.unlink)(temp, dir_fd=work)
            tree.copied_up(ino, 0, b"", metacopy=False, orphan_fd=fd)
            return
        parent, name, _ = place
        ensure_upper(union, parent)
        directory = stat.S_ISDIR(status.st_mode)
        with (
            tree.upper_dir(parent) as dirfd,
            unprotected(dirfd),
            union.entering(parent),
            times_kept(dirfd),
            lent(dirfd, 0o300),
            lent(fd, stat.S_IWUSR, when=directory),
        ):
            if union.marks.xattrs and not directory:
                tree.make_impure(parent)
            if index is None:
                publish(work, temp, dirfd, name)
            else:
                assert union.work is not None
                publish(work, temp, union.work.index, index.encode())
                try:
                    _link_entry(union.work.index, index, dirfd, name)
                    union.tree.ask_anew(dirfd, name)
                except BaseException:
                    # Else the next copy-up would find the index's name taken.
                    os.unlink(index, dir_fd=union.work.index)
                    raise
            if union.options.fsync == "strict":
                sync_dir(dirfd)
        tree.copied_up(
            ino,
            parent,
            name,
            metacopy=metacopy,
            index_name=index,
            nlink_diff=status.st_nlink - 2 if index else 0,
        )


def _link_entry(index: int, entry: str | bytes, dirfd: int, name: bytes) -> None:
    """One more name for what is in the index: of a symbolic link never for what that leads to."""
    os.link(entry, name, src_dir_fd=index, dst_dir_fd=dirfd, follow_symlinks=False)


def sync_dir(dirfd: int) -> None:
    """fsync of a directory known by an O_PATH descriptor."""
    with lent(dirfd, stat.S_IRUSR):
        fd = os.open(fd_path(dirfd), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _complete(union: Union, ino: int, truncate: int | None) -> None:
    """Give a metadata-only copy its data. Preconditions: copying(ino) is held."""
    src = union.tree.open_node(ino, os.O_PATH | os.O_NOFOLLOW)
    try:
        before = os.stat(src)
        replaced = before.st_nlink == 1 and not union.info(ino).indexed
        if not (replaced and _replace(union, ino, src, before, truncate)):
            with union.committing(ino):  # a change of attributes meanwhile would be undone
                _write_data(union, ino, src, truncate)
                union.tree.data_copied(ino)
    finally:
        os.close(src)


def _replace(
    union: Union, ino: int, src: int, before: os.stat_result, truncate: int | None
) -> bool:
    """Put a whole file in the place of a metadata-only copy; False if it is at no one place."""
    temp = union.temp_name()
    tree, work = union.tree, union.work_fd
    with temporary(union, temp):
        fd, settled = _make_temp(union, ino, temp, before, src, metacopy=False, truncate=truncate)
        try:
            synced = _must_sync(union, settled=settled)
            if synced:
                os.fsync(fd)  # what takes long, before the lock
            with union.committing(ino):
                now = os.stat(src)  # attributes may have been changed meanwhile
                place = tree.name_of(ino)
                if place is None or now.st_nlink != 1:
                    os.unlink(temp, dir_fd=work)
                    return False
                with lent(src, stat.S_IRUSR):
                    _prepare_metadata(union, ino, src, fd, now, metacopy=False)
                    _flags_of_copy(src, fd, now.st_mode)
                if synced:
                    os.fsync(fd)
                with (
                    tree.upper_dir(place[0]) as dirfd,
                    unprotected(dirfd),
                    union.entering(place[0]),
                    times_kept(dirfd),
                    lent(dirfd, 0o300),
                ):
                    os.rename(temp, place[1], src_dir_fd=work, dst_dir_fd=dirfd)
                tree.copied_up(ino, place[0], place[1], metacopy=False)
        finally:
            os.close(fd)
    return True


def _write_data(union: Union, ino: int, path_fd: int, truncate: int | None) -> None:
    """Write the data into a metadata-only copy, which has its place, or will have none."""
    before, mode = os.stat(path_fd), _native.mode_of(path_fd)
    caps = _capabilities(path_fd)
    size = before.st_size if truncate is None else min(truncate, before.st_size)
    with lent(path_fd, 0o600):
        fd = os.open(fd_path(path_fd), os.O_RDWR | os.O_CLOEXEC)
    try:
        if size < before.st_size:
            # This is the truncation: the size shown is the upper file's. An enlargement has to
            # wait for the data.
            os.ftruncate(fd, size)
            before = os.stat(path_fd)
        settled = False
        try:
            if size:
                settled = _copy_data(union, ino, fd, size)
        finally:
            # Writing has cleared what writing clears; it was not the user who wrote.
            _restore_privileges(path_fd, mode, caps)
            os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
        if _must_sync(union, settled=settled):
            os.fsync(fd)
        union.marks.remove(path_fd, "metacopy")
    finally:
        os.close(fd)


def _capabilities(path_fd: int) -> bytes | None:
    try:
        return os.getxattr(fd_path(path_fd), "security.capability")
    except OSError:
        return None  # none, or none that we could set again


def _restore_privileges(path_fd: int, mode: int, caps: bytes | None) -> None:
    if _native.mode_of(path_fd) != mode:
        _native.set_mode(path_fd, stat.S_IMODE(mode))
    if caps is not None and _capabilities(path_fd) is None:
        os.setxattr(fd_path(path_fd), "security.capability", caps)


def sync_names(union: Union, ino: int) -> None:
    """After fsync of a file that was copied up: its name too must be on disk, or a power cut would
    show the lower file again. A plain directory had the name long before."""
    info = union.info_or_none(ino)
    if info is None or not info.upper or not info.foreign:
        return
    place = union.tree.name_of(ino)
    while place is not None:
        parent = place[0]
        sync_directory(union, parent)
        if parent == _native.ROOT_INO or not union.info(parent).foreign:
            return
        place = union.tree.name_of(parent)


def sync_directory(union: Union, ino: int) -> None:
    """fsync of a directory's upper part; what lies in lower layers is on disk, and of what has been
    removed nothing is to be."""
    info = union.info(ino)
    if not info.upper or info.unlinked:
        return
    try:
        with union.tree.upper_dir(ino) as dirfd:
            sync_dir(dirfd)
    except PermissionError:
        # A user's directory that he has closed to himself, or one above it, since it was opened.
        assert union.upper is not None
        syncfs(union.upper.fd)
