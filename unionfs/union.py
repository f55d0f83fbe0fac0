# SPDX-License-Identifier: GPL-2.0-or-later
"""class Union: the layers, the node table, and what all families of changes share.

Glossary. A *layer* is a directory tree; the *upper* is the one that takes changes, the *lowers*
lie below it, the top-most first. A *whiteout* in a layer hides a name of the layers below; an
*opaque* directory hides the whole directory of that name. *Copy-up* brings a file of a lower layer
into the upper; a *metadata-only copy* (metacopy) leaves its data behind. A *redirect* says at which
path the lower layers have a directory, or the data of a metadata-only copy. The *origin* of a copy
is the lower file it was made of; an *impure* directory holds such copies. The *index* has an entry
for each copied-up file with several links, so that they stay links. The *work* directory is where a
change is prepared before one system call commits it.

Lock order, outermost first:
    copying(ino)     one copy-up of this inode at a time; held while bytes move, so only where
                     long work is allowed (a worker thread, or the engine's own). A directory's is
                     taken inside its child's.
    committing(...)  the inodes whose names or attributes change; in ascending order; held for the
                     commit and the table's update only
    entering(...)    the directories whose entries or times change, in the upper: a copy-up changes
                     the times of the one that it is put into, and puts them back
    the tree's mutex (C)
No request waits for a stranger's copy-up: only requests that need the copy of the same inode take
its copying lock.
"""

import fcntl
import os
import struct
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

from unionfs import inherited, syscalls
from unionfs._native import Tree
from unionfs.acl import reads_all_ids
from unionfs.format import AREA_NAME, OPEN_DIRECTORY, Record, parse_record
from unionfs.layer import Layer
from unionfs.marks import OVERRIDE, Marks, fd_path
from unionfs.options import MountOptions
from unionfs.work import Work

P = ParamSpec("P")
R = TypeVar("R")

# Smaller files are copied whole when their metadata change: that costs about the same, and kernel
# overlayfs then reads them without metacopy=on.
METACOPY_BYTES = 64 * 1024
FS_IOC_GETFSUUID = 0x80111500  # linux/fs.h: _IOR(0x15, 0, struct fsuuid2), Linux 6.9
EXT4_IOC_GETFSUUID = 0x8008662C  # fs/ext4/ext4.h


class Info(NamedTuple):
    """What the table knows of a node (Tree.info)."""

    type: int
    upper: bool
    metacopy: bool
    indexed: bool
    unlinked: bool
    ndirs: int
    index_name: bytes
    redirect: bytes | None
    nlink_diff: int
    foreign: bool


class Entry(NamedTuple):
    """What a name means (Tree.entry)."""

    ino: int
    type: int
    upper: int  # UPPER_*
    lower: bool


UPPER_NONE, UPPER_WHITEOUT, UPPER_ENTRY = 0, 1, 2


class LongWork(Exception):
    """Raised, before anything has changed, by what must not be done on the event loop's thread."""


def fs_uuid(fd: int) -> bytes:
    """The UUID of a file system as kernel overlayfs writes it into origins; zeros if unknown."""
    buf = bytearray(17)
    try:
        fcntl.ioctl(fd, FS_IOC_GETFSUUID, buf)
        return bytes(buf[1:17])
    except OSError:
        pass
    try:
        ext4 = bytearray(struct.pack("II", 16, 0) + bytes(16))
        fcntl.ioctl(fd, EXT4_IOC_GETFSUUID, ext4)
        return bytes(ext4[8:24])
    except OSError:
        return bytes(16)


def number_filesystems(layers: list[Layer], has_upper: bool) -> list[int]:
    """A number for each layer's file system, for inode numbers: all 0 if there is only one."""
    devs = [layer.dev for layer in layers]
    if len(set(devs)) == 1:
        return [0] * len(layers)
    lowers = devs[1:] if has_upper else devs
    order = {dev: i + 1 for i, dev in enumerate(dict.fromkeys(lowers))}
    numbers = [order[dev] for dev in lowers]
    return [0, *numbers] if has_upper else numbers


def _numbers_last(layer: Layer) -> bool:
    """Whether its files have the same numbers at the next mount.

    libfuse gives a program that has none to say, such as sshfs, those of the kernel's requests.
    """
    return layer.lasting or syscalls.node_of_fuse(layer.fd) != os.fstat(layer.fd).st_ino


def origin_uuids(layers: list[Layer], has_upper: bool) -> list[bytes]:
    """What stands for each layer's file system in origins, and so in the index: its UUID.

    squashfs has none, and one may come in the place of another: there what is known of it stands
    for it, followed by what kernel overlayfs writes, if the file system is the only one without.
    Several file systems have the same one (copies of one image): all but the lowest of them get
    one made of it, or a file of one would be taken for that of another.  b"" for a lower whose
    files have other numbers at the next mount.
    """
    told = [fs_uuid(layer.fd) for layer in layers]
    without = {layer.dev for layer, uuid in zip(layers, told, strict=True) if not any(uuid)}
    taken: dict[bytes, int] = {}
    found = []
    for at, layer in reversed(list(enumerate(layers))):
        uuid = told[at]
        if has_upper and at == 0:
            found.append(uuid)
            continue
        if not any(uuid) and layer.fs_id:
            uuid = layer.fs_id
        while taken.setdefault(uuid, layer.dev) != layer.dev:
            uuid = ((int.from_bytes(uuid, "big") + 1) % (1 << 128)).to_bytes(16, "big")
        if without == {layer.dev} and uuid != told[at]:
            uuid += told[at]
        found.append(uuid if _numbers_last(layer) else b"")
    return found[::-1]


class CapabilitiesKilled:
    """Whose capability was taken away by which process a moment ago (attributes.py).

    Several processes do so at once.  Protected by the interpreter's lock: each step is one call.
    """

    _MOMENT: Final = 10**9  # ns: how long the request that follows may take
    _MANY: Final = 64

    def __init__(self) -> None:
        self._killed: dict[int, tuple[int, int]] = {}  # by process: inode, time

    def note(self, pid: int, ino: int, now: int) -> None:
        """`now` in nanoseconds (CLOCK_MONOTONIC)."""
        if len(self._killed) >= self._MANY:
            for other, (_, at) in list(self._killed.items()):
                if now - at > self._MOMENT:
                    self._killed.pop(other, None)
        self._killed[pid] = (ino, now)

    def take(self, pid: int, ino: int, now: int) -> bool:
        """Whether it was this one's; asked once."""
        killed, at = self._killed.pop(pid, (0, 0))
        return killed == ino and now - at <= self._MOMENT


class Union:
    """One mounted union. Immutable after construction but for `facts` and what locks protect."""

    def __init__(
        self, options: MountOptions, lowers: list[Layer], upper: Layer | None, work: Work | None
    ) -> None:
        self.options = options
        self.lowers = lowers
        self.upper = upper
        self.work = work
        self.readonly = work is None
        self.facts: dict[str, object] = {}
        self.euid = os.geteuid()
        self.egid = os.getegid()
        self.record = self._read_record()
        namespace = self._namespace()
        self.marks = Marks(
            prefix=f"{namespace or 'user'}.overlay.",
            xattrs=namespace is not None,
            wh=work is not None and work.whiteout == "wh",
        )
        # FUSE_HANDLE_KILLPRIV_V2 was agreed upon.
        self.kills_privileges = False
        self.capabilities_killed = CapabilitiesKilled()
        self.requests: Callable[[], dict[str, dict[str, int]]] | None = None  # the driver's counts
        # The engine's; it replaces this.
        self.passthrough: Callable[[], dict[str, Any]] = lambda: {
            "active": False,
            "reason": f"the {options.driver} driver has no FUSE passthrough",
        }
        # Why requests do not come over io_uring; empty if they do.
        self.without_io_uring: Callable[[], str] = lambda: (
            f"the {options.driver} driver has no io_uring"
        )
        self._allowed = threading.local()
        self._incompat = False
        # Descriptors; -1: none.
        self.image = upper.image if upper is not None else -1  # see Layer
        self.index = work.index if work is not None else self._open_area("index")
        self.numbers = work.numbers if work is not None else self._open_area("numbers")
        self.tree = self._make_tree()
        # Locks by number, for `with`; C takes the same ones.
        self.copying = self.tree.copying
        self.committing = self.tree.committing
        self.entering = self.tree.entering

    def _namespace(self) -> str | None:
        if self.upper is not None and self.work is not None:
            return self.work.xattrs
        if self.options.userxattr is not None:
            return "user" if self.options.userxattr else "trusted"
        if self.record is not None and self.record.xattrs is not None:
            return self.record.xattrs
        return "trusted" if self.euid == 0 and reads_all_ids() else "user"

    def _open_area(self, name: str) -> int:
        """A directory beside an upper that is only read here; -1 if there is none."""
        if self.upper is None or (name == "index" and not self.options.index):
            return -1
        try:
            return os.open(f"{self._area()}/{name}", OPEN_DIRECTORY)
        except OSError:
            return -1

    def _area(self) -> str:
        assert self.upper is not None
        return self.options.work or f"{fd_path(self.upper.fd)}/{AREA_NAME}"

    def _read_record(self) -> Record | None:
        """In which marks an upper is written that is only read here; None if it does not say."""
        if self.upper is None or self.work is not None:
            return None
        area = self._area()
        try:
            with open(f"{area}/format", encoding="utf-8", errors="replace") as file:
                return parse_record(file.read(65536), f"{area}/format")
        except OSError:
            return None  # none, or not ours to read

    def _make_tree(self) -> Tree:
        layers = ([self.upper] if self.upper is not None else []) + self.lowers
        numbers = number_filesystems(layers, self.upper is not None)
        uuids = origin_uuids(layers, self.upper is not None)
        bottom = len(layers) - 1
        options = self.options
        return Tree(
            [
                (
                    layer.fd,
                    number,
                    layer.careful,
                    self._reads_wh(i, bottom),
                    uuid,
                )
                for i, (layer, number, uuid) in enumerate(zip(layers, numbers, uuids, strict=True))
            ],
            has_upper=self.upper is not None,
            live=options.lower_live,
            static_nlink=options.static_nlink,
            noxattrs=options.noxattrs,
            noacl=options.noacl,
            upper_xattrs=self.marks.xattrs,
            user_prefix=self.marks.prefix.startswith("user."),
            override=options.xattr_permissions,
            squash_uid=-1 if options.squash_to_uid is None else options.squash_to_uid,
            squash_gid=-1 if options.squash_to_gid is None else options.squash_to_gid,
            uids=[(r.inside, r.outside, r.length) for r in options.uidmapping],
            gids=[(r.inside, r.outside, r.length) for r in options.gidmapping],
            max_open_dirs=inherited.open_directories(),
            index_fd=self.index,
            numbers_fd=self.numbers,
            image_fd=self.image,
            work_fd=-1 if self.work is None else self.work.fd,
            plain=self._is_plain(),
            all_ids=reads_all_ids(),
            sync_copies=options.fsync != "volatile",
            sync_names=options.fsync == "strict",
            metacopy_bytes=METACOPY_BYTES if options.metacopy else 0,
        )

    def _is_plain(self) -> bool:
        """Whether changes of the plain kind are made in C (cext/plain.h)."""
        options = self.options
        return (
            self.work is not None
            and self.marks.xattrs
            and not self.marks.wh
            and not options.xattr_permissions
            and not (options.uidmapping or options.gidmapping)
            and options.squash_to_uid is None
            and options.squash_to_gid is None
        )

    def _reads_wh(self, i: int, bottom: int) -> bool:
        """Whether `.wh.NAME` is a whiteout in layer `i`, or an ordinary name.

        In the upper as its record says; in the lowest layer it could hide nothing; in between
        it is read, as fuse-overlayfs reads it, unless whiteout=char says otherwise.
        """
        if i == 0 and self.upper is not None:
            if self.work is not None:
                return self.marks.wh
            if self.record is not None:
                return self.record.whiteout == "wh"
        return i != bottom and self.options.whiteout != "char"

    # ---- shared by the changes ----

    def info(self, ino: int) -> Info:
        """What the table knows of a node."""
        return Info(*self.tree.info(ino))

    def info_or_none(self, ino: int) -> Info | None:
        """The same; None if the table does not know it (any more)."""
        try:
            return self.info(ino)
        except OSError:
            return None

    def entry(self, parent: int, name: bytes) -> Entry:
        """What a name means now."""
        return Entry(*self.tree.entry(parent, name))

    def temp_name(self) -> bytes:
        """A name for a temporary in the work directory, as kernel overlayfs names its own."""
        return self.tree.temp_name()

    @property
    def work_fd(self) -> int:
        """The work directory. Only where the union is writable."""
        if self.work is None:
            raise AssertionError("a read-only union has no work directory")
        return self.work.fd

    @property
    def override(self) -> str | None:
        """The attribute that keeps owner and mode, with xattr_permissions."""
        return OVERRIDE.get(self.options.xattr_permissions)

    def note_incompat(self) -> None:
        """Before a mark is written that kernel overlayfs's userxattr mode would misread."""
        if self._incompat or not self.marks.prefix.startswith("user.") or self.work is None:
            return
        self.work.mark_incompat("unionfs-userxattr-redirect")
        self._incompat = True
        self.tree.metacopy_noted()

    # ---- long work ----

    def check_long(self) -> None:
        """Raise LongWork where this thread must not block."""
        if not getattr(self._allowed, "long", False):
            raise LongWork

    def long(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function on a thread that may block."""
        self._allowed.long = True
        try:
            return function(*args, **kwargs)
        finally:
            self._allowed.long = False

    # ---- for the daemon ----

    def status(self) -> dict[str, Any]:
        """What `unionfs status` tells, JSON-able."""
        from unionfs.status import describe

        return describe(self)

    def close(self) -> None:
        """Layers and work area are closed by who opened them (daemon.py).

        Nobody uses the union any more.  What the table has open in the layers would keep a file
        system in use, or the key of an encrypted one, for as long as Python keeps the table.
        """
        self.tree.close()
        if self.work is None:
            for fd in (self.index, self.numbers):
                if fd >= 0:
                    os.close(fd)
        self.index = self.numbers = -1
