# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounting an image by a FUSE program, for whom the kernel does not: fuse2fs, squashfuse ...

Owns the life of that program.  It is mounted on a directory of ours, opened, and unmounted lazily
at once: from then on it lives as long as descriptors on it do, so it ends, written out, when the
daemon closes them or is killed.  The image is locked (flock) by an open file that the program
shares: who comes next waits until it has ended, or joins it (sharing.py).
"""

import contextlib
import errno
import fcntl
import logging
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Final

from unionfs import runtime, syscalls
from unionfs.errors import ExitCode, InUse, UnionfsError
from unionfs.mounts import mount_number, read_mounts, topmost
from unionfs.stores import ext, sharing, squash, whole
from unionfs.stores.probe import Contents
from unionfs.stores.tools import find, tool
from unionfs.syscalls import UnmountFlag

log = logging.getLogger(__name__)

_PREFIX: Final = "unionfs-stage-"
_START_SECONDS: Final = 30
LOCK_SECONDS: Final = 10
_END_SECONDS: Final = 60
_LEFT_SECONDS: Final = 2  # for a program to end that nobody uses any more


@dataclass(frozen=True, slots=True)
class Program:
    """A program for some kinds of file system."""

    name: str
    package: str
    readonly: tuple[str, ...]  # its arguments for reading
    writable: tuple[str, ...] | None  # and for writing; None: it cannot


# use_ino: the file system's own numbers; else each name of a file has one of its own, and another
# one at the next mount.  fakeroot: its own checks would refuse what the union has to do in its
# owner's name.  The rest is what it has by default, but for kernel_cache: to the kernel each name
# of a file is a file of its own, and would go on showing what was read before it was written by
# another name.
_BIG_WRITES: Final = ",big_writes"  # of libfuse 2; the later ones know only that
_FUSE2FS: Final = Program(
    "fuse2fs",
    "fuse2fs",
    ("-f", "-o", "ro,fakeroot,use_ino"),
    (
        "-f",
        "-o",
        f"rw,fakeroot,no_default_opts,subtype=ext4,use_ino,attr_timeout=0{_BIG_WRITES}",
    ),
)
PROGRAMS: Final = {
    "ext2": _FUSE2FS,
    "ext3": _FUSE2FS,
    "ext4": _FUSE2FS,
    "squashfs": Program("squashfuse_ll", "squashfuse", ("-f",), None),
    "erofs": Program("erofsfuse", "erofsfuse", ("-f",), None),
}


# For who has it not: it numbers files as they are looked up, so hard links are files of their own.
_OTHERWISE: Final = {"squashfuse_ll": replace(PROGRAMS["squashfs"], name="squashfuse")}
# With the same inode numbers at each mount.
LASTING: Final = frozenset({"fuse2fs", "squashfuse_ll"})


class Ended(Exception):
    """A program that has mounted nothing: its exit code (None: it was ended), and why."""

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Helper:
    """A running program and its mount: `root` is an O_PATH descriptor of its root directory.

    `said`: the file of its output, which is closed with the helper.  `share`: of one that others
    may use as well.
    """

    def __init__(
        self,
        name: str,
        path: str,
        root: int,
        *,
        watch: int,
        readonly: bool,
        process: "subprocess.Popen[bytes] | None" = None,
        said: IO[bytes] | None = None,
        share: sharing.Share | None = None,
    ) -> None:
        self.name = name
        self.path = path
        self.root = root
        self.watch = watch  # a pidfd
        self.share = share
        self._process = process  # None: started by another of us
        self._said = said
        self._readonly = readonly
        self._mount = mount_number(root)

    def ended(self) -> int | None:
        """Its exit code, if it has ended and that can be known."""
        return None if self._process is None else self._process.poll()

    def offer(self, register: sharing.Register) -> None:
        """Let others use it too, from now on."""
        assert self._process is not None
        self.share = register.begin(self._process.pid, self.root)

    def close(self) -> bool:
        """Let it end and wait until it has written everything; whether it ended well.

        If others use it too, that is for the last of them.  One that only read has nothing to lose:
        libfuse's exit code then tells how its last request ended, which is now and then in the
        middle of the unmount.  A second call does nothing.
        """
        if self.watch < 0:
            return True
        try:
            left = self.share.leave() if self.share is not None else sharing.ALONE
            if not left.ours:
                self._release()
            if left.ours or left.others:
                return True
            problem = self._await_end()
            if problem:
                level = logging.INFO if self._readonly else logging.ERROR
                log.log(level, "%s of %s ended %s", self.name, self.path, problem)
            return not problem or self._readonly
        except TimeoutError:
            log.error("%s of %s does not end: ending it", self.name, self.path)
            signal.pidfd_send_signal(self.watch, signal.SIGTERM)
            self._await_end(None)
            return False
        finally:
            if self._said is not None:
                self._said.close()
            os.close(self.watch)
            self.watch = -1

    def _await_end(self, seconds: float | None = _END_SECONDS) -> str:
        """Wait until it has ended; what was wrong with that.  Raises TimeoutError."""
        if not sharing.has_ended(self.watch, seconds):
            raise TimeoutError(errno.ETIMEDOUT, "it does not end")
        if self._process is None:  # its exit code is for its parent
            return "" if ext.was_unmounted(self.path) else "before it had written everything"
        code = self._process.wait()
        return f"with exit code {code}{_last_words(self._said, before=': ')}" if code else ""

    def _release(self) -> None:
        """The node table keeps directories open until it is freed: let it keep nothing instead.

        The numbers stay taken, so that closing them later closes nothing else.
        """
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for fd in map(int, os.listdir("/proc/self/fd")):
                if mount_number(fd) == self._mount:
                    os.dup2(null, fd, inheritable=False)
        finally:
            os.close(null)


def start(
    contents: Contents,
    *,
    readonly: bool,
    patience: float = LOCK_SECONDS,
    replay: bool = False,
    share: bool = False,
) -> Helper:
    """Mount an image for a user.

    `patience`: seconds to wait for another program to end; `replay`: with readonly, replay a
    journal first.  `share`: one that another union of this user has started will do, and if it
    is started to write, the others may use it.
    """
    program, path = _program(contents, readonly=readonly)
    if not share or program.writable is None:
        return _start(contents, program, path, readonly=readonly, patience=patience, replay=replay)
    with sharing.register(contents.path) as register:
        joined = register.join() if register is not None else None
        if joined is not None:
            return Helper(
                program.name,
                contents.path,
                joined.root,
                watch=joined.watch,
                readonly=False,
                share=joined.share,
            )
        helper = _start(
            contents, program, path, readonly=readonly, patience=patience, replay=replay
        )
        if register is not None and not readonly:
            helper.offer(register)
        return helper


def _start(
    contents: Contents,
    program: Program,
    path: str,
    *,
    readonly: bool,
    patience: float,
    replay: bool,
) -> Helper:
    arguments = program.readonly if readonly else program.writable or ()
    if replay and readonly and program is _FUSE2FS and os.access(contents.path, os.W_OK):
        held = lock_image(contents.path, readonly=False, patience=patience)
        try:
            whole.check_whole(contents.path, contents.fstype)
            ext.preen(contents.path)
        finally:
            os.close(held)
    lock = lock_image(contents.path, readonly=readonly, patience=patience)
    try:
        if program is _FUSE2FS:
            whole.check_whole(contents.path, contents.fstype)
            if not readonly:
                ext.preen(contents.path)
        elif contents.fstype == "squashfs":
            squash.check_whole(contents.path)
        command = [path, *arguments, contents.path]
        try:
            try:
                return launch(contents.path, command, keep=lock, readonly=readonly)
            except Ended as exc:
                if _BIG_WRITES[1:] not in exc.reason:
                    raise
            command = [word.removesuffix(_BIG_WRITES) for word in command]
            return launch(contents.path, command, keep=lock, readonly=readonly)
        except Ended as exc:
            hint = f"check it: unionfs store check {contents.path}"
            raise UnionfsError(
                f"cannot mount the {contents.fstype} of {contents.path}: {exc.reason}", hint=hint
            ) from exc
    finally:
        os.close(lock)


def launch(
    source: str,
    command: Sequence[str],
    *,
    keep: int,
    readonly: bool,
    stdin: int = subprocess.DEVNULL,
    notify: str = "",
) -> Helper:
    """Start a program that stays in the foreground and mounts `source`; raises Ended.

    Where to comes last in its arguments.  `keep`: a descriptor that it inherits.  `notify`: its
    option that names a process to be sent SIGUSR1 when it serves; it looks at its mount until then.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener()) if notify else None
        words = [notify, str(listener.pid)] if listener is not None else []
        command = [command[0], *words, *command[1:]]
        return _launch(source, command, keep, stdin, listener, readonly=readonly)


@contextlib.contextmanager
def _listener() -> "Iterator[subprocess.Popen[bytes]]":
    """A process that SIGUSR1 ends: ours has a mount to care for, and perhaps threads."""
    process = subprocess.Popen([tool("sleep", "coreutils"), str(_START_SECONDS)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _launch(
    source: str,
    command: Sequence[str],
    keep: int,
    stdin: int,
    listener: "subprocess.Popen[bytes] | None",
    *,
    readonly: bool,
) -> Helper:
    clear_stages()
    name = os.path.basename(command[0])
    stage = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=runtime.stages())
    try:
        with contextlib.ExitStack() as stack:
            said = stack.enter_context(open(os.memfd_create(name), "w+b"))
            process = subprocess.Popen(
                [*command, stage],
                stdin=stdin,
                stdout=said,
                stderr=said,
                pass_fds=[keep],
                start_new_session=True,
                cwd="/",
            )
            root = _take(process, stage, said, listener)
            watch = os.pidfd_open(process.pid)
            helper = Helper(
                name, source, root, watch=watch, readonly=readonly, process=process, said=said
            )
            stack.pop_all()
            return helper
    finally:
        _unmount(stage)
        with contextlib.suppress(OSError):
            os.rmdir(stage)


def _program(contents: Contents, *, readonly: bool) -> tuple[Program, str]:
    path, fstype = contents.path, contents.fstype
    program = PROGRAMS.get(fstype)
    hint = "mount as root, or use ext4 (uppers) or squashfs (lowers)"
    if program is None:
        raise UnionfsError(f"{path}: an ordinary user cannot mount {fstype}", hint=hint)
    if not readonly and program.writable is None:
        raise UnionfsError(f"{path}: {fstype} cannot be written to", hint="use ext4 for the upper")
    found = find(program.name)
    if found is None and program.name in _OTHERWISE:
        program = _OTHERWISE[program.name]
        found = find(program.name)
    if found is None:
        raise UnionfsError(
            f"{path}: {program.name} is not installed, and without it an ordinary user cannot "
            f"mount {fstype}",
            hint=f"install the package {program.package}, or mount as root",
            code=ExitCode.SYSTEM,
        )
    return program, found


def lock_image(path: str, *, readonly: bool, patience: float = 0) -> int:
    """The image, locked: two writers would destroy it.  Waits for a program that is ending."""
    try:
        fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        hint = None if readonly else "it must be writable by you; a mount can do without, by --ro"
        raise UnionfsError(f"cannot open {path}: {reason}", hint=hint) from exc
    try:
        lock_patiently(fd, path, readonly=readonly, patience=patience)
    except BaseException:
        os.close(fd)
        raise
    return fd


def lock_patiently(fd: int, path: str, *, readonly: bool, patience: float = 0) -> None:
    """flock, once a program that is ending has ended; one that a union uses hardly will."""
    how = fcntl.LOCK_SH if readonly else fcntl.LOCK_EX
    if patience > _LEFT_SECONDS and sharing.is_used(path):
        patience = _LEFT_SECONDS
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if clear_stages():
                end = max(end, time.monotonic() + _LEFT_SECONDS)
            if time.monotonic() > end:
                hint = "unmount the union that uses it first"
                raise InUse(path, path, "by another program", hint=hint) from None
            time.sleep(0.1)


def _take(
    process: "subprocess.Popen[bytes]",
    stage: str,
    said: IO[bytes],
    listener: "subprocess.Popen[bytes] | None",
) -> int:
    """Wait for the mount and open its root; end the program if that fails."""
    try:
        _await_mount(process, stage, listener)
        return os.open(stage, os.O_PATH | os.O_DIRECTORY)
    except (OSError, TimeoutError) as exc:
        code = process.poll()
        process.send_signal(signal.SIGTERM)
        _unmount(stage)
        process.wait()
        raise Ended(code, _last_words(said) or exc.strerror or str(exc)) from exc
    except BaseException:
        process.kill()
        process.wait()
        raise


def _last_words(said: IO[bytes] | None, before: str = "") -> str:
    """The last line of a program's output, after `before`; nothing if it said nothing."""
    if said is None:
        return ""
    said.seek(0)
    lines = [line for line in os.fsdecode(said.read(4096)).splitlines() if line.strip()]
    return before + lines[-1].strip() if lines else ""


def _await_mount(
    process: "subprocess.Popen[bytes]",
    stage: str,
    listener: "subprocess.Popen[bytes] | None",
) -> None:
    """The kernel marks the mount table with POLLPRI whenever it changes."""
    end = time.monotonic() + _START_SECONDS
    pidfds = [os.pidfd_open(each.pid) for each in (process, listener) if each is not None]
    try:
        with open("/proc/self/mountinfo", "rb") as table:
            poll = select.poll()
            poll.register(table, select.POLLPRI)
            for pidfd in pidfds:
                poll.register(pidfd, select.POLLIN)
            while topmost(stage, read_mounts()) is None or (
                listener is not None and listener.poll() is None
            ):
                if process.poll() is not None:
                    raise OSError(errno.EIO, f"exit code {process.returncode}")
                left = end - time.monotonic()
                if left < 0:
                    raise OSError(errno.ETIMEDOUT, "it does not start")
                poll.poll(left * 1000)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    os.stat(stage)  # answered by the program


def _unmount(stage: str) -> None:
    if topmost(stage, read_mounts()) is None:
        return
    with contextlib.suppress(OSError):
        syscalls.umount(stage, UnmountFlag.DETACH | UnmountFlag.NOFOLLOW)
        return
    for name in ("fusermount3", "fusermount"):
        if (found := find(name)) is not None:
            command = [found, "-u", "-z", "-q", "--", stage]
            if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode == 0:
                return


def clear_stages() -> bool:
    """Let programs end that were left by who was killed between mounting and opening; whether any
    was.

    One of them has the lock of what it shows, or keeps its device busy, until then.
    """
    folder = runtime.stages()
    cleared = False
    for name in os.listdir(folder):
        if not name.startswith(_PREFIX):
            continue
        pid = name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError, ValueError):
            stage = f"{folder}/{name}"
            if _lives(int(pid)) or os.lstat(stage).st_uid != os.geteuid():
                continue
            _unmount(stage)
            os.rmdir(stage)
            cleared = True
    return cleared


def _lives(pid: int) -> bool:
    """Whether it does something yet: who was killed in a container may never be waited for."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] not in (b"Z", b"X", b"")
    except (FileNotFoundError, ProcessLookupError):
        return False


def once_left(used_by: Callable[[], list[str]]) -> list[str]:
    """What uses something, without what only was left by who was killed."""
    found = used_by()
    if found and clear_stages():
        end = time.monotonic() + _LEFT_SECONDS
        while found and time.monotonic() < end:
            time.sleep(0.02)
            found = used_by()
    return found
