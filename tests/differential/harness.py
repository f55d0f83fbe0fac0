# SPDX-License-Identifier: GPL-2.0-or-later
"""Two trees side by side: apply each operation to both, and find the first difference.

`Harness.step` compares result and errno, what the operands' stat says afterwards and which times
moved; `check_tree` compares everything, and each file's inode number with the one it had before;
`remount` and `rotate` change nothing that a program could see. A difference is a `Divergence`.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

from tests.differential.operations import Op, Result, Side, facts
from tests.differential.watchdog import Watchdog
from tests.rig import snapshot, syscalls
from tests.rig.mounted import Backend, Mounted, Unionfs

# The coarse clock that stamps files may lag by a tick.
TICK = 20_000_000
# What goes through them never reaches a file system in user space, nor kernel overlayfs.
TIMELESS = (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK)


class Divergence(AssertionError):
    """The union is not what the plain directory is."""


def tolerated(op: Op, got: Result, want: Result, backend: Backend) -> bool:
    """Differences that are no fault; each with its reason."""
    # POSIX allows either for a directory that is not empty; xfs and a union say different ones.
    if op.name in ("rename", "rmdir") and {got, want} == {
        ("error", "EEXIST"),
        ("error", "ENOTEMPTY"),
    }:
        return True
    # At the end of a directory ext4's position is the largest there is, and a read past it EINVAL
    # before it is EISDIR.
    if op.name in ("read", "pread") and {got, want} == {("error", "EISDIR"), ("error", "EINVAL")}:
        return True
    if backend != "overlay":
        return False
    # A name of 256 bytes is looked up and not found where the lower is squashfs.
    if "x" * 256 in str(op.args) and {got, want} <= {
        ("error", "ENOENT"),
        ("error", "ENAMETOOLONG"),
    }:
        return True
    if op.name == "statfs" and str(got)[: -len("256))")] == str(want)[: -len("255))")]:
        return True  # f_namelen is squashfs's, the largest of the layers'
    # Taking away an ACL that is not there: no error on ext4 and xfs, ENODATA on kernel overlayfs.
    absent = ("error", "ENODATA"), ("ok", None)
    acl = str(op.args.get("name", "")).startswith("system.posix_acl_")
    return op.name == "removexattr" and acl and (got, want) == absent


def has_engine(root: Path) -> bool:
    """Whether the calls are there that the reference driver cannot express."""
    try:
        os.close(os.open(root, os.O_TMPFILE | os.O_RDWR))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    return True


Watch = dict[str, os.stat_result | None]


class Harness:
    def __init__(self, subject: Mounted, control: Path, watchdog: Watchdog | None = None) -> None:
        self.union = subject
        self.watchdog = watchdog
        self._guard()
        self.subject = Side(str(subject.mnt))
        self.control = Side(str(control))
        self.start = time.time_ns() - TICK
        # By the control's number and birth: number, birth and name in the union.
        self._inodes: dict[tuple[int, int], tuple[int, int, bytes]] = {}
        self.engine = has_engine(subject.mnt)
        self.done = 0

    def step(self, op: Op) -> Result:
        if self.watchdog is not None:
            self.watchdog.feed()
        if op.name == "remount":
            self.remount()
        elif op.name == "rotate":
            self.rotate()
        elif op.name == "check":
            self.check_tree()
        else:
            return self._step(op)
        return "ok", None

    def _guard(self) -> None:
        if self.watchdog is not None and isinstance(self.union, Unionfs):
            self.watchdog.guard(self.union.process.pid if self.union.process else 0)

    def _step(self, op: Op) -> Result:
        before = [self._look(side, op) for side in (self.subject, self.control)]
        began = time.time_ns() - TICK
        got, want = self.subject.apply(op), self.control.apply(op)
        self.done += 1
        if got != want:
            if tolerated(op, got, want, self.union.backend):
                return got
            raise Divergence(f"{op}\n  union gives {_show(got)}\n  plain gives {_show(want)}")
        after = [self._look(side, op) for side in (self.subject, self.control)]
        for path in after[0]:
            self._compare(op, path, [before[0][path], after[0][path]],
                          [before[1][path], after[1][path]], began)  # fmt: skip
        slot = op.args.get("slot")
        if isinstance(slot, int) and slot in self.subject.fds:
            mine, other = (facts(os.fstat(side.fds[slot])) for side in (self.subject, self.control))
            if mine != other:
                raise Divergence(f"{op}: then fstat\n  union gives {mine}\n  plain gives {other}")
        return got

    def _look(self, side: Side, op: Op) -> Watch:
        found: Watch = {}
        if not op.watch:
            return found
        for path in op.paths():
            for place in (path, path.rpartition("/")[0]):
                try:
                    found[place] = os.lstat(side.path(place))
                except OSError:
                    found[place] = None
        return found

    def _compare(
        self,
        op: Op,
        path: str,
        subject: list[os.stat_result | None],
        control: list[os.stat_result | None],
        began: int,
    ) -> None:
        mine, other = subject[1], control[1]
        if mine is None or other is None:
            if mine is not other:
                which = "plain" if mine is None else "union"
                raise Divergence(f"{op}: afterwards {path!r} exists in the {which} tree only")
            return
        if facts(mine) != facts(other):
            raise Divergence(
                f"{op}: afterwards lstat({path!r})\n"
                f"  union gives {facts(mine)}\n  plain gives {facts(other)}"
            )
        was, wanted = subject[0], control[0]
        if stat.S_IFMT(other.st_mode) in TIMELESS:
            return
        if was is None or wanted is None or wanted.st_ino != other.st_ino:
            return
        if was.st_ino != mine.st_ino:
            raise Divergence(f"{op}: st_ino of {path!r} went from {was.st_ino} to {mine.st_ino}")
        moved = other.st_mtime_ns != wanted.st_mtime_ns
        fresh = mine.st_mtime_ns >= began
        if moved and not (fresh or mine.st_mtime_ns != was.st_mtime_ns):
            raise Divergence(f"{op}: mtime of {path!r} did not move, as it does on a plain tree")
        if not moved and mine.st_mtime_ns != was.st_mtime_ns:
            raise Divergence(
                f"{op}: mtime of {path!r} moved from {was.st_mtime_ns} to {mine.st_mtime_ns}, "
                "and does not on a plain tree"
            )
        # A copy-up gives a new ctime, so only this direction is a promise.
        if other.st_ctime_ns != wanted.st_ctime_ns and mine.st_ctime_ns < began:
            raise Divergence(f"{op}: ctime of {path!r} did not move, as it does on a plain tree")

    def check_tree(self) -> None:
        self._alive()
        got, want = snapshot.take(self.subject.root), snapshot.take(self.control.root)
        lines = snapshot.differences(got, want, fresh=self.start, timeless=TIMELESS)
        if lines:
            raise Divergence("the trees differ:\n  " + "\n  ".join(lines[:30]))
        self._check_inodes(got, want)

    def _check_inodes(self, got: snapshot.Tree, want: snapshot.Tree) -> None:
        """An inode of the control, known by number and birth, keeps its number in the union."""
        now: dict[tuple[int, int], tuple[int, int, bytes]] = {}
        taken: dict[int, tuple[bytes, tuple[int, int]]] = {}
        for name in sorted(want):
            if not want[name].ino:
                continue
            try:
                key = want[name].ino, syscalls.birth(self.control.path(os.fsdecode(name)))
            except PermissionError:
                continue  # in a directory that its owner has closed to himself
            number = got[name].ino
            old = self._inodes.get(key)
            if old is not None and old[0] != number:
                raise Divergence(
                    f"st_ino of {name!r} is {number}, was {old[0]} (then named {old[2]!r})"
                )
            born = 0
            if self.engine and self.union.backend == "unionfs":
                born = syscalls.birth(self.subject.path(os.fsdecode(name)))
            if old is not None and old[1] != born:
                raise Divergence(f"{name!r} was born at {born}, was {old[1]} (then {old[2]!r})")
            other = taken.setdefault(number, (name, key))
            if other[1] != key:
                raise Divergence(f"{name!r} and {other[0]!r} are two files, both with ino {number}")
            now[key] = number, born, name
        self._inodes = now

    def _alive(self) -> None:
        process = self.union.process if isinstance(self.union, Unionfs) else None
        if process is not None and process.poll() is not None:
            raise Divergence(f"the daemon died with exit code {process.returncode}")

    def remount(self) -> None:
        """Nobody may notice; descriptors cannot survive it, so both sides lose theirs."""
        self.check_tree()
        self._between_mounts()
        self.union.mount()
        self._guard()
        self.check_tree()

    def rotate(self) -> None:
        """The upper becomes the topmost lower below a new, empty upper: the same tree again."""
        if os.geteuid() != 0:
            # Nothing is lent in a lower: what its user has closed to himself stays closed there.
            for side in (self.subject, self.control):
                open_to_owner(os.fsencode(side.root))
        self.check_tree()
        self._between_mounts()
        assert self.union.upper is not None
        place = self.union.upper.parent
        generation = len(self.union.lowers)
        self.union.lowers.insert(0, self.union.upper)
        self.union.upper = place / f"upper{generation}"
        self.union.upper.mkdir(mode=0o755)
        layers_root = os.stat(self.union.lowers[0])
        if os.geteuid() == 0:
            os.chown(self.union.upper, layers_root.st_uid, layers_root.st_gid)
        self.union.upper.chmod(layers_root.st_mode & 0o7777)
        for name, value in snapshot.xattrs(os.fsencode(self.union.lowers[0])):
            if not name.startswith(("trusted.overlay.", "user.overlay.", "user.unionfs.")):
                os.setxattr(self.union.upper, name, value)
        os.utime(self.union.upper, ns=(layers_root.st_atime_ns, layers_root.st_mtime_ns))
        if self.union.work is not None:
            self.union.work = place / f"work{generation}"
            self.union.work.mkdir()
        self._inodes.clear()
        self.union.mount()
        self._guard()
        self.check_tree()

    def _between_mounts(self) -> None:
        self.subject.close()
        self.control.close()
        if self.watchdog is not None:
            self.watchdog.guard(0)
        try:
            self.union.umount()
        except AssertionError as error:
            raise Divergence(f"unmount: {error}") from error


def open_to_owner(name: bytes, dirfd: int | None = None) -> None:
    """Have all directories below searched and all files read by their owner."""
    status = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    wanted = 0o700 if stat.S_ISDIR(status.st_mode) else 0o400 if stat.S_ISREG(status.st_mode) else 0
    if status.st_mode & wanted != wanted:
        os.chmod(name, stat.S_IMODE(status.st_mode) | wanted, dir_fd=dirfd)
    if stat.S_ISDIR(status.st_mode):
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=dirfd)
        try:
            for entry in os.listdir(fd):
                open_to_owner(os.fsencode(entry), fd)
        finally:
            os.close(fd)


def _show(result: Result) -> str:
    text = f"{result[0]} {result[1]!r}"
    return text if len(text) < 1500 else text[:700] + " … " + text[-700:]
