# SPDX-License-Identifier: GPL-2.0-or-later
"""One layer of a union: its root descriptor, and what its file system can do.

Owns the opening of layers and the probes.  Does not own what names in it mean (the resolver),
nor what the union keeps beside the upper (work.py).  Called by daemon.py; read by the union.

A lower is opened, where the kernel lets us, through a private, detached, read-only copy of its
mount: then the daemon cannot write to it nor change its access times, and does not see what is
mounted beneath it, as kernel overlayfs does not.  Else it is opened plainly and marked careful
if there are mount points beneath it.  So is an upper, writable and together with its work
directory: both must be reached through one mount, or nothing could be renamed from one to the
other.  A mount of which we hold a copy can be unmounted while the union is mounted, and as soon
as it is unmounted.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from unionfs import syscalls
from unionfs.errors import UnionfsError
from unionfs.mounts import (
    FSTYPE,
    MountEntry,
    Position,
    locate,
    mount_number,
    mounted_beneath,
    path_of,
)
from unionfs.syscalls import MountAttr, RenameFlag

Namespace = Literal["trusted", "user"]

# What a full file system answers, or one whose user has no quota left.
FULL: Final = (errno.ENOSPC, errno.EDQUOT)

# Set and removed again by the probes; below the name that is ours to write in an upper.
PROBE_XATTR = "overlay.unionfs_probe"


@dataclass(frozen=True, slots=True)
class Features:
    """What the upper's file system can do, and why not (`reasons`, by field name)."""

    xattrs: Namespace | None = None  # where marks can be kept
    whiteout: bool = False  # a character device 0:0 can be made
    rename_exchange: bool = False
    rename_noreplace: bool = False
    rename_whiteout: bool = False
    tmpfile: bool = False  # O_TMPFILE, and linkat of it
    reflink: bool = False
    device_nodes: bool = False  # others than 0:0
    link_xattrs: bool = False  # trusted.* marks on symbolic links too
    file_handles: bool = False
    acl: bool = False
    reasons: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class Layer:
    """The root of one layer.

    All fields are immutable after the daemon's checks, but for `features`, set by Work.open().
    `image`: a descriptor of the file that the file system lies in, or -1; closed with the layer.
    `fs_id`: 16 bytes for the UUID of its file system, where the kernel tells none; or b"".
    `lasting`: known to have the same inode numbers at each mount, as a union has.
    """

    __slots__ = (
        "_cleanup",
        "_top",
        "_tree",
        "careful",
        "dev",
        "fd",
        "features",
        "fs_id",
        "image",
        "ino",
        "lasting",
        "mount",
        "path",
        "position",
        "readonly",
        "upper",
    )

    def __init__(
        self,
        path: str,
        base: int,
        *,
        upper: bool,
        mounts: list[MountEntry],
        detach: Literal["readonly", "writable", "no"],
        beside: str | None = None,
        tree: int = -1,
    ) -> None:
        """Take over `base`, a descriptor of the root directory (O_PATH will do).

        `beside`: another directory of the same mount that must be reachable (see open_beside).
        `tree`: a descriptor of the mount that `base` is on, taken over too, if nobody else sees it.
        """
        self.path = path
        self.upper = upper
        self.readonly = not upper or detach == "readonly"
        self.features = Features()
        self.fs_id = b""
        self.image = -1
        self.mount = mount_number(base)
        self.lasting = any(e.number == self.mount and e.fstype == FSTYPE for e in mounts)
        self.position: Position | None = locate(base, mounts)
        self._cleanup: Callable[[], object] | None = None
        self._tree, self._top = tree, ""
        if detach != "no":
            self._tree, self._top = _detached_copy(base, beside, readonly=self.readonly)
        try:
            if self._tree < 0 or tree >= 0:
                self.fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=base)
            else:
                self.fd = self.open_beside(base)
            self.careful = (
                self._tree < 0 and bool(mounts) and mounted_beneath(path_of(base), mounts)
            )
        except BaseException:
            if self._tree >= 0:
                os.close(self._tree)
            raise
        finally:
            os.close(base)
        status = os.fstat(self.fd)
        self.dev = status.st_dev
        self.ino = status.st_ino

    @property
    def detached(self) -> bool:
        """Whether nothing mounted beneath the root, now or later, can be seen through `fd`."""
        return self._tree >= 0

    def open_beside(self, fd: int) -> int:
        """Open a directory of this layer's mount again, as the layer itself is reached."""
        if self._tree < 0:
            return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        below = os.path.relpath(path_of(fd), self._top) if self._top else "."
        again = os.open(below, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._tree)
        if not os.path.sameopenfile(fd, again):
            os.close(again)
            raise OSError(errno.ESTALE, "it was moved while the union was being mounted")
        return again

    def on_close(self, cleanup: Callable[[], object]) -> None:
        """What to do when the layer is closed."""
        self._cleanup = cleanup

    def close(self) -> None:
        """Close the descriptors; a second call does nothing."""
        fds = (self.fd, self._tree, self.image)
        self.fd = self._tree = self.image = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)
        cleanup, self._cleanup = self._cleanup, None
        if cleanup is not None:
            cleanup()


def _detached_copy(base: int, beside: str | None, *, readonly: bool) -> tuple[int, str]:
    """A copy of the mount below `base` that nobody else sees; -1 if not allowed.

    With `beside`, below the deepest directory that holds both; its path is given too, since a
    mount of two directories lies on all that is between them.
    """
    try:
        if beside is None:
            top, tree = "", syscalls.clone_mount(base)
        else:
            top = os.path.commonpath([path_of(base), os.path.realpath(beside)])
            fd = os.open(top, os.O_PATH | os.O_DIRECTORY)
            try:
                if mount_number(fd) != mount_number(base):
                    return -1, ""  # not on one mount: for the checks to say
                tree = syscalls.clone_mount(fd)
            finally:
                os.close(fd)
    except OSError as exc:
        # EPERM: no CAP_SYS_ADMIN.  EINVAL: would uncover what is hidden from this user namespace,
        # or an unbindable mount.  ENOSYS: a seccomp filter.
        if exc.errno in (errno.EPERM, errno.EINVAL, errno.ENOSYS):
            return -1, ""
        raise
    try:
        _make_private(tree, readonly=readonly)
    except OSError as exc:
        os.close(tree)
        if exc.errno in (errno.EPERM, errno.EINVAL, errno.ENOSYS):
            return -1, ""
        raise
    return tree, top


def _make_private(tree: int, *, readonly: bool) -> None:
    """No mounts that others make come into the copy; a lower's is not written to."""
    if not readonly:
        syscalls.set_mount_attributes(tree, MountAttr(0), MountAttr(0))
        return
    quiet = MountAttr.RDONLY | MountAttr.NODEV | MountAttr.NOATIME
    try:
        syscalls.set_mount_attributes(tree, quiet, MountAttr.ATIME_MASK)
    except PermissionError:
        # A user namespace may not change atime flags that are locked.
        syscalls.set_mount_attributes(tree, MountAttr.RDONLY, MountAttr(0))


def _open_base(kind: str, path: str) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY)
    except OSError as exc:
        raise layer_error(kind, path, exc) from exc


def layer_error(kind: str, path: str, exc: OSError) -> UnionfsError:
    """A layer's directory that cannot be used, as its user is told it."""
    hints = {
        errno.ENOENT: f"create the directory, or correct the path of the {kind}",
        errno.ENOTDIR: "a layer is a directory, an image or a device",
        errno.ELOOP: "a symbolic link on the way leads in a circle",
        errno.EACCES: f"the {kind} must be readable and searchable by the user who mounts",
    }
    code = exc.errno or errno.EIO
    return UnionfsError(f"cannot open the {kind} {path}: {os.strerror(code)}", hint=hints.get(code))


def open_lower(path: str, mounts: list[MountEntry], *, kind: str = "lower directory") -> Layer:
    """Open a layer that is only read."""
    base = _open_base(kind, path)
    try:
        return Layer(path, base, upper=False, mounts=mounts, detach="readonly")
    except OSError as exc:
        raise layer_error(kind, path, exc) from exc


def open_upper(
    path: str, mounts: list[MountEntry], *, work: str | None = None, readonly: bool = False
) -> Layer:
    """Open the layer that takes the changes; `readonly` for a union that takes none.

    `work`: the work directory, if it is not in the upper.
    """
    kind = "upper directory"
    base = _open_base(kind, path)
    try:
        layer = Layer(
            path,
            base,
            upper=True,
            mounts=mounts,
            detach="readonly" if readonly else "writable",
            beside=None if readonly else work,
        )
    except OSError as exc:
        raise layer_error(kind, path, exc) from exc
    if readonly:
        return layer
    try:
        check_writable(layer)
    except UnionfsError:
        layer.close()
        raise
    return layer


def open_private(
    path: str, base: int, tree: int, position: Position, *, upper: bool, readonly: bool
) -> Layer:
    """A layer on a mount that only we see; `base` and `tree` are taken over (see Layer)."""
    layer = Layer(path, base, upper=upper, mounts=[], detach="no", tree=tree)
    layer.position = position
    layer.readonly = readonly
    if upper and not readonly:
        try:
            check_writable(layer)
        except UnionfsError:
            layer.close()
            raise
    return layer


def check_writable(upper: Layer) -> None:
    """Raise an error where an upper cannot take changes."""
    hint = "choose another upper, or mount with --ro"
    if os.fstatvfs(upper.fd).f_flag & os.ST_RDONLY:
        raise UnionfsError(f"the upper directory {upper.path} is on a read-only mount", hint=hint)
    # One that its own user has locked (chmod of the union's root) is his to write all the same.
    mine = os.fstat(upper.fd).st_uid == os.geteuid()
    if not mine and not os.access(".", os.W_OK | os.X_OK, dir_fd=upper.fd, effective_ids=True):
        raise UnionfsError(
            f"the upper directory {upper.path} is not writable by user {os.geteuid()}", hint=hint
        )


class _Probe:
    """Files in a directory of their own inside the work directory, and what was learned."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.reasons: dict[str, str] = {}

    def attempt(self, feature: str, action: Callable[[], object]) -> bool:
        """Whether `action` works; an error of the file system is the reason why not.

        Raises OSError where a full file system does not let it be known.
        """
        try:
            action()
        except OSError as exc:
            if exc.errno in FULL:
                raise
            self.reasons[feature] = os.strerror(exc.errno or errno.EIO)
            return False
        return True

    def make(self, name: str) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        os.close(os.open(name, flags, 0o600, dir_fd=self.fd))

    def set_xattr(self, namespace: Namespace) -> None:
        """On a directory (opaque, redirect) and on a file (metacopy, origin)."""
        name = f"{namespace}.{PROBE_XATTR}"
        file = os.open("a", os.O_RDWR, dir_fd=self.fd)
        try:
            for fd in (self.fd, file):
                os.setxattr(fd, name, b"y")
                if os.getxattr(fd, name) != b"y":
                    raise OSError(errno.EOPNOTSUPP, "xattr not kept")
        finally:
            os.close(file)

    def marks_links(self) -> bool:
        """No reason is kept: nobody but us misses it."""
        os.symlink("a", "link", dir_fd=self.fd)
        fd = os.open("link", os.O_PATH | os.O_NOFOLLOW, dir_fd=self.fd)
        try:
            os.setxattr(f"/proc/self/fd/{fd}", f"trusted.{PROBE_XATTR}", b"y")
        except OSError as exc:
            if exc.errno in FULL:
                raise
            return False
        finally:
            os.close(fd)
        return True

    def tmpfile(self) -> None:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600, dir_fd=self.fd)
        try:
            syscalls.link_descriptor(fd, self.fd, "tmpfile")
        finally:
            os.close(fd)

    def reflink(self) -> None:
        source = os.open("a", os.O_RDWR, dir_fd=self.fd)
        target = os.open("b", os.O_RDWR, dir_fd=self.fd)
        try:
            os.pwrite(source, b"x" * 4096, 0)  # some answer for an empty file without trying
            syscalls.clone_file(source, target)
        finally:
            os.close(source)
            os.close(target)

    def acl(self) -> None:
        try:
            os.getxattr(self.fd, "system.posix_acl_access")
        except OSError as exc:
            if exc.errno != errno.ENODATA:  # supported, only not set
                raise

    def handles(self) -> None:
        if not syscalls.has_file_handles(self.fd):
            raise OSError(errno.EOPNOTSUPP, "no file handles")


@contextlib.contextmanager
def _probe_directory(work: int) -> Iterator[_Probe]:
    name = f"probe-{os.getpid()}-{secrets.token_hex(4)}"
    os.mkdir(name, 0o700, dir_fd=work)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=work)
    try:
        yield _Probe(fd)
    finally:
        os.close(fd)
        # Opened anew: btrfs lists no name that is younger than the descriptor.
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=work)
        for entry in os.listdir(fd):
            os.unlink(entry, dir_fd=fd)
        os.close(fd)
        try:
            os.rmdir(name, dir_fd=work)
        except OSError as exc:
            # FUSE tells a program late that a file was closed; unlinked before that, fuse2fs keeps
            # it under a name of its own for the moment.  The work directory is emptied at the end.
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _probe_namespace(probe: _Probe, userxattr: bool | None) -> Namespace | None:
    """trusted.* if we may, else user.*; `userxattr` asks for one and only one of them."""
    reasons = []
    candidates: dict[bool | None, tuple[Namespace, ...]] = {
        None: ("trusted", "user"),
        True: ("user",),
        False: ("trusted",),
    }
    for namespace in candidates[userxattr]:
        try:
            probe.set_xattr(namespace)
        except OSError as exc:
            reasons.append(f"{namespace}.*: {os.strerror(exc.errno or errno.EIO)}")
        else:
            return namespace
    probe.reasons["xattrs"] = ", ".join(reasons)
    return None


def probe_features(work: int, userxattr: bool | None = None) -> Features:
    """Try out, in the directory `work`, what its file system can do; leaves nothing behind.

    Raises OSError (of FULL) if there is no space to try it in.
    """
    with _probe_directory(work) as probe:
        at = probe.fd
        probe.make("a")
        probe.make("b")

        def node(name: str, number: int) -> Callable[[], None]:
            return lambda: os.mknod(name, stat.S_IFCHR | 0o600, number, dir_fd=at)

        def rename(source: str, target: str, flags: RenameFlag) -> Callable[[], None]:
            return lambda: syscalls.renameat2(at, source, at, target, flags)

        return Features(
            xattrs=_probe_namespace(probe, userxattr),
            reflink=probe.attempt("reflink", probe.reflink),
            whiteout=probe.attempt("whiteout", node("w", os.makedev(0, 0))),
            device_nodes=probe.attempt("device_nodes", node("d", os.makedev(1, 3))),
            rename_exchange=probe.attempt("rename_exchange", rename("a", "b", RenameFlag.EXCHANGE)),
            rename_noreplace=probe.attempt(
                "rename_noreplace", rename("a", "c", RenameFlag.NOREPLACE)
            ),
            rename_whiteout=probe.attempt("rename_whiteout", rename("b", "e", RenameFlag.WHITEOUT)),
            tmpfile=probe.attempt("tmpfile", probe.tmpfile),
            file_handles=probe.attempt("file_handles", probe.handles),
            acl=probe.attempt("acl", probe.acl),
            link_xattrs=probe.marks_links(),
            reasons=MappingProxyType(probe.reasons),
        )
