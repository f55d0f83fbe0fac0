# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounting an image by a FUSE program, for whom the kernel does not: fuse2fs, squashfuse ...

Owns the life of that program.  It is mounted on a directory of ours, opened, and unmounted lazily
at once: from then on it lives as long as descriptors on it do, so it ends, written out, when the
daemon closes them or is killed.  The image is locked (flock) by an open file that the program
shares: who comes next waits until it has ended.
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
from dataclasses import dataclass
from typing import IO, Final

from unionfs import syscalls
from unionfs.errors import ExitCode, UnionfsError
from unionfs.mounts import mount_number, read_mounts, topmost
from unionfs.stores import ext, squash
from unionfs.stores.probe import Contents
from unionfs.stores.tools import find
from unionfs.syscalls import UnmountFlag

log = logging.getLogger(__name__)

_PREFIX: Final = "unionfs-stage-"
_START_SECONDS: Final = 30
LOCK_SECONDS: Final = 10
_END_SECONDS: Final = 60


@dataclass(frozen=True, slots=True)
class Program:
    """A program for some kinds of file system."""

    name: str
    package: str
    readonly: tuple[str, ...]  # its arguments for reading
    writable: tuple[str, ...] | None  # and for writing; None: it cannot


# fakeroot: its own checks would refuse what the union has to do in its owner's name.
_FUSE2FS: Final = Program(
    "fuse2fs", "fuse2fs", ("-f", "-o", "ro,fakeroot"), ("-f", "-o", "rw,fakeroot")
)
PROGRAMS: Final = {
    "ext2": _FUSE2FS,
    "ext3": _FUSE2FS,
    "ext4": _FUSE2FS,
    "squashfs": Program("squashfuse", "squashfuse", ("-f",), None),
    "erofs": Program("erofsfuse", "erofsfuse", ("-f",), None),
}


class Helper:
    """A running program and its mount: `root` is an O_PATH descriptor of its root directory."""

    def __init__(
        self, contents: Contents, program: Program, process: "subprocess.Popen[bytes]", root: int
    ) -> None:
        self.name = program.name
        self.path = contents.path
        self.root = root
        self.pid = process.pid
        self._process = process
        self._mount = mount_number(root)
        self.watch = os.pidfd_open(process.pid)

    def ended(self) -> int | None:
        """Its exit code, if it has ended."""
        return self._process.poll()

    def close(self) -> None:
        """Let it end and wait until it has written everything.  A second call does nothing."""
        if self.watch < 0:
            return
        try:
            self._release()
            code = self._process.wait(_END_SECONDS)
            if code:
                log.error("%s of %s ended with exit code %s", self.name, self.path, code)
        except subprocess.TimeoutExpired:
            log.error("%s of %s does not end: ending it", self.name, self.path)
            self._process.terminate()
            self._process.wait()
        finally:
            os.close(self.watch)
            self.watch = -1

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
) -> Helper:
    """Mount an image for a user.

    `patience`: seconds to wait for another program to end; `replay`: with readonly, replay a
    journal first.
    """
    program, path = _program(contents, readonly=readonly)
    arguments = program.readonly if readonly else program.writable or ()
    _clear_stages()
    if replay and readonly and program is _FUSE2FS and os.access(contents.path, os.W_OK):
        held = lock_image(contents.path, readonly=False, patience=patience)
        try:
            ext.check_whole(contents.path)
            ext.preen(contents.path)
        finally:
            os.close(held)
    lock = lock_image(contents.path, readonly=readonly, patience=patience)
    try:
        if program is _FUSE2FS:
            ext.check_whole(contents.path)
            if not readonly:
                ext.preen(contents.path)
        elif contents.fstype == "squashfs":
            squash.check_whole(contents.path)
        stage = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_stages())
        try:
            with open(os.memfd_create(program.name), "w+b") as said:
                process = subprocess.Popen(
                    [path, *arguments, contents.path, stage],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    pass_fds=[lock],
                    start_new_session=True,
                    cwd="/",
                )
                return Helper(contents, program, process, _take(contents, process, stage, said))
        finally:
            _unmount(stage)
            with contextlib.suppress(OSError):
                os.rmdir(stage)
    finally:
        os.close(lock)


def _program(contents: Contents, *, readonly: bool) -> tuple[Program, str]:
    path, fstype = contents.path, contents.fstype
    program = PROGRAMS.get(fstype)
    hint = "mount as root, or use ext4 (uppers) or squashfs (lowers)"
    if program is None:
        raise UnionfsError(f"{path}: an ordinary user cannot mount {fstype}", hint=hint)
    if not readonly and program.writable is None:
        raise UnionfsError(f"{path}: {fstype} cannot be written to", hint="use ext4 for the upper")
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
        hint = None if readonly else "it must be writable by the user who mounts; or use --ro"
        raise UnionfsError(f"cannot open {path}: {reason}", hint=hint) from exc
    how = fcntl.LOCK_SH if readonly else fcntl.LOCK_EX
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(fd)
                hint = "unmount the union that uses it first"
                raise UnionfsError(f"{path} is in use by another program", hint=hint) from None
            time.sleep(0.1)


def _take(
    contents: Contents, process: "subprocess.Popen[bytes]", stage: str, said: IO[bytes]
) -> int:
    """Wait for the mount and open its root; end the program if that fails."""
    try:
        _await_mount(process, stage)
        return os.open(stage, os.O_PATH | os.O_DIRECTORY)
    except (OSError, TimeoutError) as exc:
        process.send_signal(signal.SIGTERM)
        _unmount(stage)
        process.wait()
        said.seek(0)
        lines = [line for line in os.fsdecode(said.read(4096)).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else exc.strerror or str(exc)
        hint = f"check it: unionfs store check {contents.path}"
        raise UnionfsError(
            f"cannot mount the {contents.fstype} of {contents.path}: {reason}", hint=hint
        ) from exc
    except BaseException:
        process.kill()
        process.wait()
        raise


def _await_mount(process: "subprocess.Popen[bytes]", stage: str) -> None:
    """The kernel marks the mount table with POLLPRI whenever it changes."""
    end = time.monotonic() + _START_SECONDS
    pidfd = os.pidfd_open(process.pid)
    try:
        with open("/proc/self/mountinfo", "rb") as table:
            poll = select.poll()
            poll.register(table, select.POLLPRI)
            poll.register(pidfd, select.POLLIN)
            while topmost(stage, read_mounts()) is None:
                if process.poll() is not None:
                    raise OSError(errno.EIO, f"exit code {process.returncode}")
                left = end - time.monotonic()
                if left < 0:
                    raise OSError(errno.ETIMEDOUT, "it does not start")
                poll.poll(left * 1000)
    finally:
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


def _stages() -> str:
    """Where mounts are made for a moment."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = runtime and os.access(runtime, os.W_OK | os.X_OK)
    return os.path.realpath(runtime if usable else tempfile.gettempdir())


def _clear_stages() -> None:
    """What a process left that was killed between mounting and opening."""
    folder = _stages()
    for name in os.listdir(folder):
        if not name.startswith(_PREFIX):
            continue
        pid = name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError, ValueError):
            stage = f"{folder}/{name}"
            if os.path.exists(f"/proc/{int(pid)}") or os.lstat(stage).st_uid != os.geteuid():
                continue
            _unmount(stage)
            os.rmdir(stage)
