# SPDX-License-Identifier: GPL-2.0-or-later
"""Choosing the next operation: shared by the seeded runner and by hypothesis.

A `Chooser` makes the choices (a random generator, or hypothesis's draws, which it can shrink); a
`Generator` turns them into operations that mostly hit something: existing names, held descriptors.
"""

from __future__ import annotations

import fcntl
import os
import random
import stat
import struct
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from tests.differential.operations import ACTORS, Json, Op
from tests.rig.syscalls import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    UTIME_NOW,
    UTIME_OMIT,
)

T = TypeVar("T")

SLOTS = 8
TOO_MANY = 400
LONG = "long-" + "n" * 250
NAMES = (
    *"abcdefgh",
    LONG,
    "\udcff\udcfe\udc80",
    "new\nline",
    "  space",
    "colon:comma,back\\slash",
    "umlaut-\u00fc",
    "-dash",
    ".hidden",
)
TOO_LONG = "x" * 256
XATTRS = ("user.one", "user.two", "user.a-much-longer-name-" + "z" * 100)
TRUSTED = ("trusted.one",)
MODES = (0o644, 0o600, 0o755, 0o700, 0o777, 0o000, 0o444, 0o4755, 0o2755, 0o6711, 0o2644)
DIRECTORY_MODES = (0o755, 0o700, 0o777, 0o1777, 0o2755, 0o2777, 0o3777, 0o500, 0o711)
UMASKS = (0o022, 0o022, 0o000, 0o077, 0o027)
# What the kernel lets through to a FUSE file system.
FALLOCATE_MODES = (
    0,
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE,
    FALLOC_ZERO_RANGE,
    FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
)
FLAGGING = ("flags", "xflags")
ENGINE_ONLY = (
    *("tmpfile", "tmpfile_excl", "link_fd", "seek_data", "fallocate", "copy_range"),
    *FLAGGING,
)
TIMES = (0, 1, 1_000_000_000, 1_234_567_890, 2**31 + 7, 2**33)


class Chooser(Protocol):
    def pick(self, choices: Sequence[T]) -> T: ...
    def number(self, low: int, high: int) -> int: ...


class Seeded:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def pick(self, choices: Sequence[T]) -> T:
        return self._random.choice(choices)

    def number(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


class Known:
    """The names that exist on the control side, refreshed by the harness."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self.directories: list[str] = [""]

    def refresh(self, root: str) -> None:
        self.all, self.directories = [], [""]
        pending = [""]
        while pending:
            folder = pending.pop(0)
            names = sorted(os.listdir(f"{root}/{folder}")) if _may_list(f"{root}/{folder}") else []
            for name in names:
                path = f"{folder}/{name}" if folder else name
                self.all.append(path)
                mode = os.lstat(f"{root}/{path}").st_mode
                # The two roots differ in length, so stay well below PATH_MAX.
                if stat.S_ISDIR(mode) and len(os.fsencode(path)) < 1500:
                    self.directories.append(path)
                    pending.append(path)


def _may_list(path: str) -> bool:
    return os.access(path, os.R_OK | os.X_OK, effective_ids=True)


def acl(*entries: tuple[int, int, int]) -> str:
    """A raw POSIX ACL: (tag, permissions, id) each, in hex."""
    raw = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    return raw.hex()


_NOBODY = 0xFFFF_FFFF
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
ACLS = (
    acl((USER_OBJ, 7, _NOBODY), (GROUP_OBJ, 5, _NOBODY), (OTHER, 0, _NOBODY)),
    acl(
        (USER_OBJ, 7, _NOBODY),
        (USER, 6, 1001),
        (GROUP_OBJ, 5, _NOBODY),
        (MASK, 7, _NOBODY),
        (OTHER, 1, _NOBODY),
    ),
    acl(
        (USER_OBJ, 6, _NOBODY),
        (USER, 7, 1000),
        (GROUP_OBJ, 4, _NOBODY),
        (GROUP, 3, 2000),
        (MASK, 2, _NOBODY),
        (OTHER, 4, _NOBODY),
    ),
    acl((USER_OBJ, 7, _NOBODY)),  # malformed: EINVAL
)
CAPABILITY = struct.pack("<IIIII", 0x0200_0001, 1 << 13, 0, 0, 0).hex()


class Generator:
    def __init__(
        self,
        known: Known,
        *,
        root: bool,
        overlay: bool,
        links: bool = True,
        engine: bool = True,
    ) -> None:
        self.known = known
        self.root = root
        self.links = links
        # Kernel overlayfs, documented: a descriptor opened read-only before a copy-up goes on
        # reading the old file. Long-lived descriptors are therefore opened for writing there. A
        # write through a memory map does not move its mtime.
        self.overlay = overlay
        # Calls that the reference driver cannot express.
        self.engine = engine

    def next(self, choose: Chooser) -> Op:
        return self.make(choose, choose.pick(TABLE))

    def make(self, choose: Chooser, kind: str) -> Op:
        if len(self.known.all) > TOO_MANY and choose.number(0, 2) == 0:
            kind = choose.pick(("unlink", "unlink", "rmdir"))
        if kind == "link" and not self.links:
            kind = "symlink"
        if kind == "link_fd" and not self.links:
            kind = "tmpfile"
        if (kind in ENGINE_ONLY and not self.engine) or (kind in FLAGGING and self.overlay):
            kind = "stat"
        if kind == "map_write" and self.overlay:
            kind = "map_read"
        makers: dict[str, Callable[[Chooser], dict[str, Json]]] = MAKERS
        maker = getattr(self, f"_{kind}", None) or makers[kind]
        args: dict[str, Json] = maker(choose)
        actor = choose.number(0, len(ACTORS) - 1) if self.root and choose.number(0, 3) == 0 else 0
        name = _NAMED.get(kind, kind)
        return Op(name, args, actor, choose.pick(UMASKS), choose.number(0, 1) == 0)

    # Parts

    def _existing(self, choose: Chooser) -> str:
        return choose.pick(self.known.all) if self.known.all else "a"

    def _new(self, choose: Chooser) -> str:
        folder = choose.pick(self.known.directories)
        name = TOO_LONG if choose.number(0, 60) == 0 else choose.pick(NAMES)
        return f"{folder}/{name}" if folder else name

    def _path(self, choose: Chooser) -> str:
        return self._existing(choose) if choose.number(0, 9) < 8 else self._new(choose)

    def _folder(self, choose: Chooser) -> str:
        if choose.number(0, 9) < 8:
            return choose.pick(self.known.directories)
        return self._path(choose)

    # Makers that need to know what exists

    def _open(self, choose: Chooser) -> dict[str, Json]:
        flags = choose.pick((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR))
        for flag, odds in (
            (os.O_CREAT, 3),
            (os.O_EXCL, 8),
            (os.O_TRUNC, 5),
            (os.O_APPEND, 4),
            (os.O_NOFOLLOW, 8),
            (os.O_DIRECTORY, 12),
            (os.O_SYNC, 20),
        ):
            if choose.number(1, odds) == 1:
                flags |= flag
        if not flags & os.O_CREAT:
            flags &= ~os.O_EXCL
        if self.overlay and not flags & os.O_DIRECTORY and not flags & os.O_ACCMODE:
            flags |= os.O_RDWR
        path = self._new(choose) if flags & os.O_CREAT and choose.number(0, 1) else None
        # O_CREAT|O_DIRECTORY changed its meaning between kernels.
        if flags & os.O_CREAT:
            flags &= ~os.O_DIRECTORY
        slot = choose.number(0, SLOTS - 1)
        return {
            "slot": slot,
            "path": path if path is not None else self._path(choose),
            "flags": flags,
            "mode": choose.pick(MODES),
        }

    def _tmpfile(self, choose: Chooser) -> dict[str, Json]:
        flags = choose.pick((os.O_RDWR, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_EXCL, os.O_RDONLY))
        return {
            "slot": choose.number(0, SLOTS - 1),
            "path": self._folder(choose),
            "flags": flags,
            "mode": choose.pick(MODES),
        }

    def _link_fd(self, choose: Chooser) -> dict[str, Json]:
        return {"slot": choose.number(0, SLOTS - 1), "to": self._new(choose)}

    def _flags(self, choose: Chooser) -> dict[str, Json]:
        return {"path": self._path(choose), "bits": choose.pick((0, 0x40, 0x80, 0xC0))}

    _xflags = _flags

    def _tmpfile_excl(self, choose: Chooser) -> dict[str, Json]:
        path, to = self._folder(choose), self._new(choose)
        return {"path": path, "to": to, "mode": choose.pick(MODES)}

    def _opendir(self, choose: Chooser) -> dict[str, Json]:
        slot = choose.number(0, SLOTS - 1)
        return {"slot": slot, "path": self._folder(choose), "flags": os.O_DIRECTORY, "mode": 0}

    def _mkdir(self, choose: Chooser) -> dict[str, Json]:
        return {"path": self._new(choose), "mode": choose.pick(DIRECTORY_MODES)}

    def _rmdir(self, choose: Chooser) -> dict[str, Json]:
        return {"path": self._folder(choose) or "a"}

    def _unlink(self, choose: Chooser) -> dict[str, Json]:
        return {"path": self._path(choose)}

    _readlink = _unlink

    def _rename(self, choose: Chooser) -> dict[str, Json]:
        flags = choose.pick((0, 0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE))
        over = flags == RENAME_EXCHANGE or choose.number(0, 1) == 0
        source = choose.pick(self.known.directories) if choose.number(0, 2) == 0 else ""
        return {
            "path": source or self._path(choose),
            "to": self._path(choose) if over else self._new(choose),
            "flags": flags,
        }

    def _link(self, choose: Chooser) -> dict[str, Json]:
        follow = choose.number(0, 3) == 0
        return {"path": self._path(choose), "to": self._new(choose), "follow": follow}

    def _symlink(self, choose: Chooser) -> dict[str, Json]:
        target = choose.pick((*NAMES, "a/b", "b/c/d", ("d/" * 2048)[:4095], "e" * 4095, "./a"))
        return {"path": self._new(choose), "target": target}

    def _mknod(self, choose: Chooser) -> dict[str, Json]:
        kind, major, minor = choose.pick(
            (
                (stat.S_IFIFO, 0, 0),
                (stat.S_IFSOCK, 0, 0),
                (stat.S_IFREG, 0, 0),
                (stat.S_IFCHR, 1, 3),
                (stat.S_IFBLK, 259, 77),
            )
        )
        mode = kind | choose.pick(MODES)
        return {"path": self._new(choose), "mode": mode, "major": major, "minor": minor}

    def _truncate(self, choose: Chooser) -> dict[str, Json]:
        return {"path": self._path(choose), "size": _size(choose)}

    def _chmod(self, choose: Chooser) -> dict[str, Json]:
        return {"path": self._path(choose), "mode": choose.pick(MODES + DIRECTORY_MODES)}

    def _chown(self, choose: Chooser) -> dict[str, Json]:
        path, follow = self._path(choose), choose.number(0, 1) == 0
        return {"path": path, "uid": _owner(choose), "gid": _owner(choose), "follow": follow}

    def _utimens(self, choose: Chooser) -> dict[str, Json]:
        follow = choose.number(0, 1) == 0
        nanos = (0, 1, 123_456_789, 999_999_999, UTIME_NOW, UTIME_OMIT)
        return {
            "path": self._path(choose),
            "a_s": choose.pick(TIMES),
            "a_ns": choose.pick(nanos),
            "m_s": choose.pick(TIMES),
            "m_ns": choose.pick(nanos),
            "follow": follow,
        }

    def _xattr_name(self, choose: Chooser) -> str:
        return choose.pick(XATTRS + TRUSTED)

    def _setxattr(self, choose: Chooser) -> dict[str, Json]:
        return {
            "path": self._path(choose),
            "name": self._xattr_name(choose),
            "value": [choose.number(0, 250), choose.pick((0, 1, 20, 700))],
            "flags": choose.pick((0, 0, os.XATTR_CREATE, os.XATTR_REPLACE)),
            "follow": choose.number(0, 2) > 0,
        }

    def _acl(self, choose: Chooser) -> dict[str, Json]:
        name = choose.pick(("system.posix_acl_access", "system.posix_acl_default"))
        path = self._folder(choose) if name.endswith("default") else self._path(choose)
        return {"path": path, "name": name, "value": choose.pick(ACLS)}

    def _capability(self, choose: Chooser) -> dict[str, Json]:
        return {"path": self._path(choose), "name": "security.capability", "value": CAPABILITY}

    def _getxattr(self, choose: Chooser) -> dict[str, Json]:
        names = (
            *XATTRS,
            *TRUSTED,
            "system.posix_acl_access",
            "system.posix_acl_default",
            "security.capability",
        )
        follow = choose.number(0, 2) > 0
        return {"path": self._path(choose), "name": choose.pick(names), "follow": follow}

    _removexattr = _getxattr

    def _listxattr(self, choose: Chooser) -> dict[str, Json]:
        return {"path": self._path(choose), "follow": choose.number(0, 2) > 0}

    _stat = _listxattr

    def _access(self, choose: Chooser) -> dict[str, Json]:
        return {"path": self._path(choose), "mode": choose.number(0, 7)}

    def _statfs(self, choose: Chooser) -> dict[str, Json]:
        return {"path": self._path(choose)}

    def _listdir(self, choose: Chooser) -> dict[str, Json]:
        return {"path": self._folder(choose)}

    def _scan(self, choose: Chooser) -> dict[str, Json]:
        cut, size = choose.number(0, 30), choose.pick((400, 1024, 32768))
        return {"path": self._folder(choose), "cut": cut, "size": size}


def _size(choose: Chooser) -> int:
    return choose.pick((0, 1, 17, 4095, 4096, 4097, 20_000, 131_072, 300_000))


def _owner(choose: Chooser) -> int:
    return choose.pick((-1, 0, 1000, 1001, 2000, 54_321))


def _slot(choose: Chooser) -> Json:
    return choose.number(0, SLOTS - 1)


def _data(choose: Chooser) -> Json:
    return [choose.number(0, 250), choose.pick((1, 10, 4096, 5000, 70_000))]


MAKERS: dict[str, Callable[[Chooser], dict[str, Json]]] = {
    "openat": lambda c: {
        "slot": _slot(c),
        "at": _slot(c),
        "name": c.pick(NAMES),
        "flags": c.pick((os.O_RDWR, os.O_RDWR | os.O_CREAT)),
        "mode": c.pick(MODES),
    },
    "close": lambda c: {"slot": _slot(c)},
    "read": lambda c: {"slot": _slot(c), "size": _size(c)},
    "pread": lambda c: {"slot": _slot(c), "size": _size(c), "offset": _size(c)},
    "write": lambda c: {"slot": _slot(c), "data": _data(c)},
    "pwrite": lambda c: {"slot": _slot(c), "data": _data(c), "offset": _size(c)},
    "lseek": lambda c: {
        "slot": _slot(c),
        "offset": _size(c),
        "whence": c.pick((os.SEEK_SET, os.SEEK_CUR, os.SEEK_END)),
    },
    "seek_data": lambda c: {
        "slot": _slot(c),
        "offset": _size(c),
        "whence": c.pick((os.SEEK_DATA, os.SEEK_HOLE)),
    },
    "fallocate": lambda c: {
        "slot": _slot(c),
        "mode": c.pick(FALLOCATE_MODES),
        "offset": _size(c),
        "length": _size(c),
    },
    "copy_range": lambda c: {
        "slot": _slot(c),
        "source": _slot(c),
        "size": _size(c),
        "offset": _size(c),
        "source_offset": _size(c),
    },
    "clone": lambda c: {"slot": _slot(c), "source": _slot(c)},
    "poll": lambda c: {"slot": _slot(c)},
    "syncfs": lambda c: {"slot": _slot(c)},
    "fstat": lambda c: {"slot": _slot(c)},
    "ftruncate": lambda c: {"slot": _slot(c), "size": _size(c)},
    "fsync": lambda c: {"slot": _slot(c)},
    "fdatasync": lambda c: {"slot": _slot(c)},
    "fchmod": lambda c: {"slot": _slot(c), "mode": c.pick(MODES)},
    "fchown": lambda c: {"slot": _slot(c), "uid": _owner(c), "gid": _owner(c)},
    "futimens": lambda c: {
        "slot": _slot(c),
        "atime": c.pick(TIMES) * 10**9 + 5,
        "mtime": c.pick(TIMES) * 10**9 + 7,
    },
    "fsetxattr": lambda c: {
        "slot": _slot(c),
        "name": c.pick(XATTRS),
        "value": [c.number(0, 250), c.pick((0, 30))],
        "flags": c.pick((0, os.XATTR_CREATE, os.XATTR_REPLACE)),
    },
    "fgetxattr": lambda c: {"slot": _slot(c), "name": c.pick(XATTRS)},
    "fremovexattr": lambda c: {"slot": _slot(c), "name": c.pick(XATTRS)},
    "flistdir": lambda c: {"slot": _slot(c)},
    "mkdirat": lambda c: {"at": _slot(c), "name": c.pick(NAMES), "mode": c.pick(DIRECTORY_MODES)},
    "unlinkat": lambda c: {"at": _slot(c), "name": c.pick(NAMES)},
    "map": lambda c: {"slot": _slot(c)},
    "map_write": lambda c: {"slot": _slot(c), "offset": _size(c), "data": _data(c)},
    "map_read": lambda c: {"slot": _slot(c), "offset": _size(c), "size": _size(c)},
    "flock": lambda c: {
        "slot": _slot(c),
        "how": c.pick((fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN)),
    },
    "ofd_lock": lambda c: {
        "slot": _slot(c),
        "kind": c.pick((fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK)),
        "start": c.number(0, 50),
        "length": c.number(0, 50),
    },
}
WEIGHTS = {
    "open": 14,
    "opendir": 3,
    "rename": 14,
    "mkdir": 7,
    "rmdir": 4,
    "unlink": 6,
    "link": 6,
    "symlink": 4,
    "mknod": 4,
    "chmod": 5,
    "chown": 4,
    "utimens": 4,
    "setxattr": 4,
    "removexattr": 3,
    "getxattr": 3,
    "acl": 4,
    "capability": 2,
    "write": 5,
    "pwrite": 5,
    "read": 3,
    "pread": 4,
    "truncate": 3,
    "listdir": 3,
    "scan": 3,
    "stat": 3,
    "map": 3,
    "map_write": 3,
    "map_read": 3,
    "openat": 3,
    "tmpfile": 4,
    "link_fd": 4,
    "seek_data": 2,
    "fallocate": 4,
    "copy_range": 4,
    "flags": 3,
    "xflags": 2,
    "tmpfile_excl": 1,
    "clone": 3,
    "mkdirat": 2,
    "unlinkat": 2,
}
# Every kind at least once; hypothesis and the runner draw from the same table.
TABLE: tuple[str, ...] = tuple(
    kind
    for kind in sorted({*WEIGHTS, *MAKERS, "readlink", "listxattr", "access", "statfs"})
    for _ in range(WEIGHTS.get(kind, 1))
)
_NAMED = {"acl": "setxattr_raw", "capability": "setxattr_raw", "opendir": "open"}
