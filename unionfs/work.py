# SPDX-License-Identifier: GPL-2.0-or-later
"""What a union needs beside its upper: lock, format record, work directory, index.

Owns the area (UPPER/.unionfs, or the directory of workdir=) and decides how marks are written in
this upper.  Does not own the marks (marks.py) nor what is done in the work directory.  Called by
daemon.py; the union uses the descriptors.

    AREA/format     in what this upper is written: see format.py
    AREA/owner      who holds it now, for messages and for other machines (holder.py)
    AREA/work/      temporaries; emptied at every start and stop
    AREA/work/incompat/NAME/   makes kernel overlayfs refuse what it would misread
    AREA/unchecked  a check after an unclean end was not finished (recovery.py)
    AREA/reserve    space for removing (reserve.py)
    AREA/whiteout   what whiteouts are names of, where they are devices (cext/whiteout.h)
    AREA/index/     kernel overlayfs's hard link index
    AREA/numbers/   inode numbers of copies that can carry no xattr (a user's symbolic links ...)

The lock is on the open root directory of the upper and on the open area, so it ends with the
process that holds it, however that ends.  It is taken before anything is read or written.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from types import MappingProxyType
from typing import Final

from unionfs import holder, reserve
from unionfs.acl import ACCESS, DEFAULT
from unionfs.errors import UnionfsError
from unionfs.format import (
    AREA_NAME,
    OPEN_DIRECTORY,
    Evidence,
    Record,
    Whiteout,
    examine,
    parse_record,
)
from unionfs.holder import Owner
from unionfs.layer import FULL, Features, Layer, Namespace, probe_features
from unionfs.marks import OVERRIDE, fd_path, lent
from unionfs.mounts import locate, mount_number, read_mounts
from unionfs.options import MountOptions
from unionfs.reserve import Reserve

__all__ = ["AREA_NAME", "INCOMPAT_USERXATTR", "UNCHECKED", "Work", "empty_directory", "lock_shared"]

UNCHECKED: Final = "unchecked"  # a check of the upper was not finished (recovery.py)
INCOMPAT_USERXATTR: Final = "unionfs-userxattr-redirect"
_INCOMPAT: Final = "incompat"
_WHITEOUT: Final = "whiteout"
_OUR_INCOMPAT: Final = frozenset({INCOMPAT_USERXATTR})
# A file system (NFS, some FUSE ones) on which a directory cannot be locked.
_NO_DIRECTORY_LOCKS: Final = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP)


def without_acl(directory: int) -> None:
    """Take off the ACLs that a directory has inherited: what is prepared in it would inherit them.

    As kernel overlayfs does (ovl_workdir_create of fs/overlayfs/super.c).
    """
    for name in (ACCESS, DEFAULT):
        try:
            os.getxattr(directory, name)  # fuse2fs, if full, refuses to remove what is not there
            os.removexattr(directory, name)
        except OSError as exc:
            if exc.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise


def empty_directory(fd: int, keep: frozenset[str] = frozenset()) -> None:
    """Remove all that is in the directory `fd`, but for `keep`, whatever modes it has."""
    # Opened anew: btrfs lists no name that is younger than the descriptor.
    fresh = os.open(".", OPEN_DIRECTORY, dir_fd=fd)
    try:
        with os.scandir(fresh) as entries:
            found = [(e.name, e.is_dir(follow_symlinks=False)) for e in entries]
    finally:
        os.close(fresh)
    for name, is_directory in found:
        if name in keep:
            continue
        if not is_directory:
            os.unlink(name, dir_fd=fd)
            continue
        try:
            os.rmdir(name, dir_fd=fd)
            continue
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # A copy of a directory that its owner may not enter.  By a descriptor: were the name a
        # symlink by now (the upper may be somebody's), chmod would follow it.
        held = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        try:
            os.chmod(fd_path(held), 0o700)
            child = os.open(".", OPEN_DIRECTORY, dir_fd=held)
        finally:
            os.close(held)
        try:
            empty_directory(child)
        finally:
            os.close(child)
        os.rmdir(name, dir_fd=fd)


def lock_shared(upper: Layer, options: MountOptions) -> int:
    """For a read-only union: keep others from writing this upper, writing nothing ourselves."""
    fd = os.open(".", OPEN_DIRECTORY, dir_fd=upper.fd)
    try:
        area = options.work or f"{fd_path(upper.fd)}/{AREA_NAME}"
        holder.lock(fd, fcntl.LOCK_SH, upper.path, area)
        if options.other_machine == "refuse":
            holder.refuse_elsewhere(holder.read_owner(area), upper.path)
        _refuse_cut(fd, upper.path)
    except OSError as exc:
        if exc.errno not in _NO_DIRECTORY_LOCKS:
            raise
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_cut(upper: int, path: str) -> None:
    from unionfs.stores import exchange

    exchange.refuse_cut(upper, path)


class Work:
    """The area of one upper, locked for the life of this object.

    `fd` (work directory), `index` and `numbers` (-1: none) are immutable until close().
    `whiteout` and `xattrs` say which marks are written; `upper.features.xattrs` is set to agree
    with them.
    """

    def __init__(self, upper: Layer, path: str) -> None:
        self.path = path
        self.area = self.fd = self.index = self.numbers = -1
        self.whiteout: Whiteout = "char"
        self.xattrs: Namespace | None = None
        self.reserve: Reserve | None = None
        self.before: Owner | None = None  # who had it before and has not let it go
        self._upper = upper
        self._locks: list[int] = []
        self._owner = False  # AREA/owner is ours
        self._made: list[tuple[int, str, bool]] = []  # directory, name, is a directory itself

    @classmethod
    def open(cls, upper: Layer, options: MountOptions) -> "Work":
        """Lock the upper and make or take over its area; on an error nothing is left behind."""
        area = options.work if options.work is not None else f"{upper.path}/{AREA_NAME}"
        work = cls(upper, area)
        try:
            work._lock_upper()
            work._enter(options)
            work._prepare(options)
        except OSError as exc:
            work.abandon()
            reason = os.strerror(exc.errno or errno.EIO)
            raise UnionfsError(f"cannot prepare the work directory {area}: {reason}") from exc
        except BaseException:
            work.abandon()
            raise
        return work

    def keep_reserve(self) -> Reserve | None:
        """Keep space for removing in this upper's file system, which has nobody else's files."""
        with contextlib.suppress(OSError):  # where it cannot be made, it is done without
            known = os.access(reserve.FILE, os.F_OK, dir_fd=self.area, follow_symlinks=False)
            self.reserve = Reserve(self.area)
            if not known:
                self._made.append((self.area, reserve.FILE, False))
        return self.reserve

    def mark_incompat(self, name: str) -> None:
        """From now on kernel overlayfs, which would misread this upper, refuses it."""
        for parent, child in ((self.fd, _INCOMPAT), (self.fd, f"{_INCOMPAT}/{name}")):
            with contextlib.suppress(FileExistsError):
                os.mkdir(child, 0o700, dir_fd=parent)
        fd = os.open(_INCOMPAT, OPEN_DIRECTORY, dir_fd=self.fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.fsync(self.fd)

    def rest(self) -> None:
        """Leave the upper as close() does, though it stays open: nothing is written any more."""
        self._tidy()
        if self.reserve is not None:
            self.reserve.close()

    def close(self) -> None:
        """Remove the temporaries and let the upper go; a second call does nothing."""
        self._tidy()
        if self.reserve is not None:
            self.reserve.close()
        # The locks last: when they are free, so is all else.
        for fd in (self.index, self.numbers, self.fd, self.area, *self._locks):
            if fd >= 0:
                os.close(fd)
        self.index = self.numbers = self.fd = self.area = -1
        self._locks.clear()

    def abandon(self) -> None:
        """close(), and take away what open() made: the union was not mounted after all."""
        self._tidy()
        for parent, name, is_directory in reversed(self._made):
            with contextlib.suppress(OSError), self._times_kept(parent):
                (os.rmdir if is_directory else os.unlink)(name, dir_fd=parent)
        self._made.clear()
        self.close()

    def _tidy(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                empty_directory(self.fd, keep=frozenset({_INCOMPAT}))
        if self._owner:
            self._owner = False
            with contextlib.suppress(OSError):
                os.unlink(holder.FILE, dir_fd=self.area)

    # Opening: lock, enter, prepare

    def _reachable(self) -> str:
        """The area's path, also where the upper's is only a name (stores)."""
        inside = f"{self._upper.path}/{AREA_NAME}"
        return f"{fd_path(self._upper.fd)}/{AREA_NAME}" if self.path == inside else self.path

    def _lock_upper(self) -> None:
        fd = os.open(".", OPEN_DIRECTORY, dir_fd=self._upper.fd)
        self._locks.append(fd)
        try:
            holder.lock(fd, fcntl.LOCK_EX, self._upper.path, self._reachable())
        except OSError as exc:
            if exc.errno not in _NO_DIRECTORY_LOCKS:
                raise  # else the lock of the area must do

    def _lock_area(self) -> None:
        fd = os.open(".", OPEN_DIRECTORY, dir_fd=self.area)
        self._locks.append(fd)
        try:
            holder.lock(fd, fcntl.LOCK_EX, self.path, self._reachable())
        except OSError as exc:
            if exc.errno not in _NO_DIRECTORY_LOCKS:
                raise
            file = os.open("lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600, dir_fd=self.area)
            self._locks.append(file)
            holder.lock(file, fcntl.LOCK_EX, self.path, self._reachable())

    def _enter(self, options: MountOptions) -> None:
        """Open the area; make it if it is ours to make."""
        if options.work is None:
            self._make_directory(self._upper.fd, AREA_NAME)
            self.area = os.open(AREA_NAME, OPEN_DIRECTORY, dir_fd=self._upper.fd)
            without_acl(self.area)
        else:
            found = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._check_place(found)
                self.area = self._upper.open_beside(found)
            finally:
                os.close(found)
        self._lock_area()
        text = self.read(holder.FILE)
        self.before = None if text is None else holder.parse_owner(text)
        if options.other_machine == "refuse":
            holder.refuse_elsewhere(self.before, self._upper.path)
        self._settle()

    def _settle(self) -> None:
        """A verb that was killed may have left the upper between two contents."""
        from unionfs.stores import exchange

        exchange.settle(self._locks[0])

    def _check_place(self, found: int) -> None:
        """A work directory of its own must be beside the upper, on the same mount."""
        upper = self._upper
        if os.fstat(found).st_dev != upper.dev or mount_number(found) != upper.mount:
            raise UnionfsError(
                f"the work directory {self.path} is not on the mount of the upper {upper.path}",
                hint="both must be on one file system, reached through one mount",
            )
        place = locate(found, read_mounts())
        if place is None or upper.position is None:
            return
        if place.inside(upper.position) or upper.position.inside(place):
            raise UnionfsError(
                f"the work directory {self.path} and the upper {upper.path} contain each other",
                hint="choose two separate directories, or leave workdir out",
            )

    def _prepare(self, options: MountOptions) -> None:
        text = self.read("format")
        record = None if text is None else parse_record(text, f"{self.path}/format")
        self._make_directory(self.area, "work")
        work = self._open_directory("work")
        try:
            self._check_incompat(work)
        except BaseException:
            os.close(work)  # nothing in it is ours to remove
            raise
        self.fd = work
        empty_directory(self.fd, keep=frozenset({_INCOMPAT}))
        if options.index:
            self._make_directory(self.area, "index")
            self.index = self._open_directory("index")
        self._decide(options, record)
        if self.whiteout == "char":
            self._share_whiteout()
        if self.xattrs != "trusted" or not self._upper.features.link_xattrs:
            self._make_directory(self.area, "numbers")
            self.numbers = self._open_directory("numbers")
        decided = Record(self.whiteout, self.xattrs)
        if record != decided:
            self.write("format", decided.text(), durable=True)
        self._owner = True
        try:
            told = options.fsync != "volatile"
            self.write(holder.FILE, holder.here(options.mountpoint).text(), told=told)
        except OSError as exc:
            if exc.errno not in FULL:  # what is full can be mounted, to remove things
                raise

    def _share_whiteout(self) -> None:
        """What all whiteouts are names of (cext/whiteout.h). Without it each is an inode."""
        try:
            found = os.stat(_WHITEOUT, dir_fd=self.area, follow_symlinks=False)
            if stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
                return
            os.unlink(_WHITEOUT, dir_fd=self.area)
        except FileNotFoundError:
            pass
        with contextlib.suppress(OSError):  # no inode is left
            os.mknod(_WHITEOUT, stat.S_IFCHR, 0, dir_fd=self.area)
            self._made.append((self.area, _WHITEOUT, False))

    def _open_directory(self, name: str) -> int:
        """One of the area's; kernel overlayfs leaves them with no mode bits at all."""
        try:
            fd = os.open(name, OPEN_DIRECTORY, dir_fd=self.area)
        except PermissionError:
            os.chmod(name, 0o700, dir_fd=self.area)
            fd = os.open(name, OPEN_DIRECTORY, dir_fd=self.area)
        without_acl(fd)
        return fd

    def _check_incompat(self, work: int) -> None:
        """Refuse what another program marked as not to be read by those who do not know it."""
        try:
            fd = os.open(_INCOMPAT, OPEN_DIRECTORY, dir_fd=work)
        except FileNotFoundError:
            return
        try:
            unknown = sorted(set(os.listdir(fd)) - _OUR_INCOMPAT)
        finally:
            os.close(fd)
        if unknown:
            mark = f"{self.path}/work/{_INCOMPAT}/{unknown[0]}"
            raise UnionfsError(
                f"the upper {self._upper.path} is marked with the feature {unknown[0]!r}, "
                "which this program does not know",
                hint=f"if its content is known to be good, remove {mark}",
            )

    # How marks are written

    def _decide(self, options: MountOptions, record: Record | None) -> None:
        """Set whiteout and xattrs: the record, else what is found in the upper, else the probes."""
        evidence = examine(self._upper.fd) if record is None else Evidence(*record)
        features = self._probe(options, record, evidence)
        if evidence.xattrs is not None and features.xattrs is None:
            raise UnionfsError(
                f"the marks in the upper {self._upper.path} are {evidence.xattrs}.* xattrs, which "
                f"user {os.geteuid()} cannot write ({features.reasons.get('xattrs', 'refused')})",
                hint="mount it as the user who made it, or start with an empty upper",
            )
        self._check_permissions_kept(options)
        self.xattrs = features.xattrs
        self.whiteout = self._chosen_whiteout(options, evidence, features)
        if features.xattrs is None:
            reason = "opaque directories need xattrs, so .wh. names are used"
            features = _with_reason(features, "marks", reason)
        self._upper.features = features

    def _probe(self, options: MountOptions, record: Record | None, evidence: Evidence) -> Features:
        try:
            if record is None or record.xattrs is not None:
                return probe_features(self.fd, self._wanted_namespace(options, evidence))
            features = dataclasses.replace(probe_features(self.fd), xattrs=None)
            return _with_reason(features, "xattrs", "the upper was first mounted without them")
        except OSError as exc:
            # What is full can be mounted again, else nobody could remove anything through it.
            if record is None or exc.errno not in FULL:
                raise
            return self._recorded(record)

    def _recorded(self, record: Record) -> Features:
        """What the record tells of a full file system; things can still be removed from it."""
        char = record.whiteout == "char"
        return _with_reason(
            Features(
                xattrs=record.xattrs,
                whiteout=char,
                rename_exchange=char,
                rename_noreplace=True,
                rename_whiteout=char,
                link_xattrs=record.xattrs == "trusted",
            ),
            "tmpfile",
            "not probed: the upper's file system is full",
        )

    def _check_permissions_kept(self, options: MountOptions) -> None:
        """xattr_permissions: without its attribute nothing could be made in this union."""
        attribute = OVERRIDE.get(options.xattr_permissions)
        if attribute is None:
            return
        try:
            os.setxattr(self.fd, attribute, b"0:0:700")
            os.removexattr(self.fd, attribute)
        except OSError as exc:
            if exc.errno in FULL:
                return
            reason = os.strerror(exc.errno or errno.EIO)
            raise UnionfsError(
                f"xattr_permissions={options.xattr_permissions}: the upper {self._upper.path} "
                f"does not take the attribute {attribute} ({reason})",
                hint="use xattr_permissions=2, or an upper on another file system",
            ) from exc

    def _wanted_namespace(self, options: MountOptions, evidence: Evidence) -> bool | None:
        """probe_features()'s userxattr: user.*, trusted.* or whichever works."""
        found = None if evidence.xattrs is None else evidence.xattrs == "user"
        if options.userxattr is None or found is None:
            return options.userxattr if found is None else found
        if options.userxattr != found:
            raise UnionfsError(
                f"the marks in the upper {self._upper.path} are {evidence.xattrs}.* xattrs",
                hint="leave userxattr out" if options.userxattr else "mount with userxattr",
            )
        return found

    def _chosen_whiteout(
        self, options: MountOptions, evidence: Evidence, features: Features
    ) -> Whiteout:
        if options.whiteout == "char" and not features.whiteout:
            reason = features.reasons.get("whiteout", "refused")
            raise UnionfsError(
                f"whiteout=char: no device 0:0 can be made in {self._upper.path} ({reason})",
                hint="use whiteout=auto",
            )
        if options.whiteout != "auto":
            return options.whiteout
        # Without RENAME_EXCHANGE a directory could not be replaced by a device at once.
        lacking = not features.whiteout or not features.rename_exchange
        if evidence.whiteout == "wh" or features.xattrs is None or lacking:
            return "wh"
        return "char"

    # Files of the area

    @contextlib.contextmanager
    def _times_kept(self, directory: int) -> Iterator[None]:
        """The upper's root is the union's root: making our area must not change its times."""
        before = os.fstat(directory)
        yield
        if directory == self._upper.fd:
            with contextlib.suppress(OSError):
                os.utime(directory, ns=(before.st_atime_ns, before.st_mtime_ns))

    def _make_directory(self, parent: int, name: str) -> None:
        with contextlib.suppress(FileExistsError), self._times_kept(parent):
            with lent(parent, 0o300):
                os.mkdir(name, 0o700, dir_fd=parent)
            self._made.append((parent, name, True))

    def read(self, name: str) -> str | None:
        """A small file of the area; None if it is not there."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.area)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
            return file.read(65536)

    def write(self, name: str, text: str, *, durable: bool = False, told: bool = False) -> None:
        """Replace a small file of the area by rename, so that it is whole at any moment.

        `told`: others shall find it on the disk at once.
        """
        temporary = f"{name}.new"
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW
        fd = os.open(temporary, flags, 0o600, dir_fd=self.area)
        with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(fd)
                if self.read(name) is None:
                    self._made.append((self.area, name, False))
            os.rename(temporary, name, src_dir_fd=self.area, dst_dir_fd=self.area)
            if told:
                os.fsync(fd)


def _with_reason(features: Features, feature: str, reason: str) -> Features:
    reasons = MappingProxyType({**features.reasons, feature: reason})
    return dataclasses.replace(features, reasons=reasons)
