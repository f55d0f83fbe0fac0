# SPDX-License-Identifier: GPL-2.0-or-later
"""One program for all unions of a user that have the same image: two would destroy it.

Owns the register of an image: which program mounts it, and who has that mount open.  It starts,
watches and ends nothing (userspace.py, which alone calls this).

The mount is attached nowhere and lives as long as descriptors on it do, whose ever they are.  So
whoever comes later opens it by /proc/PID/fd/N of one who has it, and the kernel counts: the program
goes on when the one who started it ends or is killed, and ends with the last of them, however that
ends (docs/adr/0025).

    PLACE/.image-8:1-4711/    locked (flock) by who joins or leaves; there while it is of use
        users                 replaced whole: the program, the root of its mount, who has it open

What stands there is believed only as far as it can be seen: the program lives, and the descriptor
leads to the root of its mount.  Whoever is not seen, as from another pid namespace, is not joined.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import select
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from unionfs import runtime
from unionfs.mounts import read_mounts

log = logging.getLogger("unionfs")

_PREFIX: Final = ".image-"
_USERS: Final = "users"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_PINNED: Final = os.O_PATH | os.O_DIRECTORY
_START_TIME: Final = 19  # in /proc/PID/stat, after the name of the command


@dataclass(frozen=True, slots=True)
class Process:
    """A process, also after its number was given to another."""

    pid: int
    started: int  # clock ticks after the boot
    namespace: str  # of pids

    @classmethod
    def of(cls, pid: int) -> "Process":
        """One that is there; raises OSError."""
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
        return cls(pid, int(words[_START_TIME]), os.readlink("/proc/self/ns/pid"))

    def is_here(self) -> bool:
        """Whether its number means in our pid namespace what it says."""
        return self.namespace == os.readlink("/proc/self/ns/pid")

    def hold(self) -> int:
        """A pidfd; raises OSError if it has ended."""
        fd = os.pidfd_open(self.pid)
        with contextlib.suppress(OSError):
            if Process.of(self.pid) == self and not has_ended(fd):
                return fd
        os.close(fd)
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


def has_ended(pidfd: int, patience: float | None = 0) -> bool:
    """Whether a process has ended, reaped or not, within so many seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if patience is None else patience * 1000))


@dataclass(frozen=True, slots=True)
class User:
    """Who has a mount open, and by which descriptor (O_PATH)."""

    process: Process
    fd: int

    def open(self, root: tuple[int, int]) -> int:
        """What he has open; raises OSError, ENOENT or ESRCH if that is no more this root."""
        if not self.process.is_here():
            raise PermissionError(errno.EPERM, "another pid namespace")
        if Process.of(self.process.pid) != self.process:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        fd = os.open(f"/proc/{self.process.pid}/fd/{self.fd}", _PINNED)
        if _identity(fd) == root:
            return fd
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def has(self, root: tuple[int, int]) -> bool:
        """Whether he has it still, as far as can be seen."""
        try:
            os.close(self.open(root))
        except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
            return False
        except OSError:  # not ours to see
            return True
        return True


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


@dataclass(frozen=True, slots=True)
class Record:
    """A program, and who has its mount open."""

    program: Process
    root: tuple[int, int]  # device and inode of the mount's root
    users: tuple[User, ...] = ()

    def text(self) -> str:
        """As it stands in the register."""
        return json.dumps(dataclasses.asdict(self))


def parse(text: str) -> Record | None:
    """Read the register; what is damaged says nothing."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        found = json.loads(text)
        device, inode = found["root"]
        users = tuple(User(Process(**user["process"]), int(user["fd"])) for user in found["users"])
        program = Process(**found["program"])
        return Record(program, (int(device), int(inode)), users)
    return None


@dataclass(frozen=True, slots=True)
class Left:
    """What there is still when one has left."""

    ours: bool  # another user of the same program in this process
    others: bool  # in other ones


ALONE: Final = Left(ours=False, others=False)


@dataclass(slots=True)
class Share:
    """One entry of ours in a register; its descriptor keeps the mount."""

    place: str
    program: Process
    pin: int  # -1 once it was left

    def leave(self) -> Left:
        """Let it go.  A second call does nothing."""
        if self.pin < 0:
            return ALONE
        try:
            with _locked(self.place):
                return Register(self.place).remove(self)
        except OSError as exc:
            log.warning("%s: %s, ignoring", self.place, exc.strerror)
            return Left(ours=False, others=True)  # who cannot know waits for nobody
        finally:
            os.close(self.pin)
            self.pin = -1


@dataclass(frozen=True, slots=True)
class Joined:
    """A program of another of us, and its mount."""

    watch: int  # a pidfd
    root: int  # O_PATH
    share: Share


class Register:
    """That of one image; whoever has it is alone with it."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._path = f"{place}/{_USERS}"

    def join(self) -> Joined | None:
        """The mount of a program that runs already; None if there is none that can be had."""
        record = self._read()
        if record is None or not record.program.is_here():
            return None
        try:
            watch = record.program.hold()
        except OSError:
            return None
        for user in record.users:
            try:
                root = user.open(record.root)
            except OSError:
                continue
            try:
                share = self._add(record, root)
            except OSError as exc:
                log.warning("%s: %s, ignoring", self._path, exc.strerror)
                os.close(root)
                break
            return Joined(watch, root, share)
        os.close(watch)
        return None

    def begin(self, pid: int, root: int) -> Share | None:
        """A program that was just started is there for the others too; None if it cannot be."""
        try:
            return self._add(Record(Process.of(pid), _identity(root)), root)
        except OSError as exc:
            log.warning("%s: %s, ignoring", self._path, exc.strerror)
            return None

    def _add(self, record: Record, root: int) -> Share:
        pin = os.dup(root)
        try:
            users = [user for user in record.users if user.has(record.root)]
            users.append(User(Process.of(os.getpid()), pin))
            self._write(dataclasses.replace(record, users=tuple(users)))
        except BaseException:
            os.close(pin)
            raise
        return Share(self._place, record.program, pin)

    def remove(self, share: Share) -> Left:
        """Take one entry away, and those of whoever was killed."""
        record = self._read()
        if record is None or record.program != share.program:
            return ALONE
        us = Process.of(os.getpid())
        mine = User(us, share.pin)
        users = [user for user in record.users if user != mine and user.has(record.root)]
        with contextlib.suppress(OSError):  # full: what stands there is looked at, not believed
            if users:
                self._write(dataclasses.replace(record, users=tuple(users)))
            else:
                for name in (f"{self._path}.new", self._path):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name)
        ours = any(user.process == us for user in users)
        others = [user.process for user in users if user.process != us]
        if others and not ours:
            _entrust(record.program, others[0])
        return Left(ours, bool(others))

    def is_used(self) -> bool:
        """Whether one of those who stand there is there still."""
        record = self._read()
        return record is not None and any(user.has(record.root) for user in record.users)

    def is_left(self) -> bool:
        """Whether nobody and nothing of it is there any more."""
        record = self._read()
        if record is None:
            return True
        if self.is_used() or not record.program.is_here():
            return False
        try:
            os.close(record.program.hold())
        except OSError:
            return True
        return False

    def entrust(self) -> None:
        """As if we left."""
        record = self._read()
        if record is not None:
            users = [user.process for user in record.users if user.has(record.root)]
            outside = [user for user in users if _cgroup(user) not in (None, _own_cgroup())]
            if outside:
                _entrust(record.program, outside[0])

    def _read(self) -> Record | None:
        with contextlib.suppress(OSError), open(self._path, encoding="utf-8") as file:
            return parse(file.read())
        return None

    def _write(self, record: Record) -> None:
        with open(f"{self._path}.new", "w", encoding="utf-8") as file:
            file.write(record.text())
        os.rename(f"{self._path}.new", self._path)


def entrust_all() -> None:
    """Our service ends: what others still use of what those of us have started who were killed."""
    top = runtime.private()
    for name in os.listdir(top) if top is not None else []:
        if name.startswith(_PREFIX):
            with contextlib.suppress(OSError), _locked(f"{top}/{name}"):
                Register(f"{top}/{name}").entrust()


def _entrust(program: Process, other: Process) -> None:
    """Have a program ended with the service of another: systemd kills what ours leaves behind."""
    try:
        where, theirs = _own_cgroup(), _cgroup(other)
        if theirs not in (None, where) and _cgroup(program) == where:
            with open(f"{theirs}/cgroup.procs", "w") as file:
                file.write(str(program.pid))
    except OSError as exc:  # as of a session, which systemd does not give to its user
        log.info("process %d stays in our cgroup: %s", program.pid, exc.strerror)


def _own_cgroup() -> str | None:
    return _cgroup(Process.of(os.getpid()))


def _cgroup(process: Process) -> str | None:
    """The directory of a process's cgroup (version 2)."""
    mount = next((entry for entry in read_mounts() if entry.fstype == "cgroup2"), None)
    if mount is None or not process.is_here():
        return None
    with open(f"/proc/{process.pid}/cgroup", encoding="utf-8") as file:
        paths = [line.strip()[3:] for line in file if line.startswith("0::")]
    return None if not paths else mount.point + paths[0].removeprefix(mount.root.rstrip("/"))


@contextlib.contextmanager
def register(image: str) -> Iterator[Register | None]:
    """That of an image, for who joins or begins; None where there can be none."""
    with contextlib.ExitStack() as stack:
        found = None
        try:
            place = _place(image)
            if place is not None:
                _sweep(os.path.dirname(place))
                stack.enter_context(_locked(place))
                found = Register(place)
        except OSError as exc:
            log.warning("%s cannot be shared: %s, ignoring", image, exc.strerror)
        yield found


def _sweep(top: str) -> None:
    """Take away the registers in which only those stand who were killed.

    Who comes to the same image does so too; but it may be gone, or another one by now.
    """
    for name in os.listdir(top):
        if not name.startswith(_PREFIX):
            continue
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            fd = os.open(f"{top}/{name}", _DIRECTORY)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if Register(f"{top}/{name}").is_left():
                shutil.rmtree(f"{top}/{name}", ignore_errors=True)


def is_used(image: str) -> bool:
    """Whether somebody is seen to have the mount of an image open; who is about to end may be."""
    with contextlib.suppress(OSError):
        place = _place(image)
        return place is not None and Register(place).is_used()
    return False


def _place(image: str) -> str | None:
    top = runtime.private()
    status = os.stat(image)
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    return None if top is None else f"{top}/{_PREFIX}{device}-{status.st_ino}"


@contextlib.contextmanager
def _locked(place: str) -> Iterator[None]:
    """One at a time; nothing is left of a register in which nobody stands."""
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(place, 0o700)
        try:
            fd = os.open(place, _DIRECTORY)
        except FileNotFoundError:
            continue  # the last has left meanwhile
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_at(fd, place):
                break
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(place)
        os.close(fd)


def _is_at(fd: int, place: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(fd), os.stat(place))
    return False
