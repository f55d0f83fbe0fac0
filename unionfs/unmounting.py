# SPDX-License-Identifier: GPL-2.0-or-later
"""Unmounting a union that some other process serves, and waiting until its layers are free.

Owns the order: learn the daemon and hold it by a pidfd, unmount, wait.  Called by `umount` and by
`down`.
"""

import errno
import os
import select
import time
from collections.abc import Callable, Iterator, Sequence

from unionfs.errors import ExitCode, UnionfsError, usage_error
from unionfs.mounts import FSTYPE, MountEntry, read_mounts
from unionfs.unions import DEADLINE, ask, find, integer, owner

PATIENCE = 120.0  # seconds for a daemon to write out and end
FORCED_PATIENCE = 3.0  # seconds for aborted requests to end
MNT_FORCE = 1


class Busy(UnionfsError):
    """Somebody uses what is to be unmounted."""


def unmount(path: str, *, lazy: bool, force: bool) -> None:
    """Unmount one union and wait for its daemon (not if lazy: others may use it for long)."""
    mounts = read_mounts()
    entry = find(path, mounts)
    if entry is None:
        message = f"{path} is not mounted" if os.path.lexists(path) else f"{path} does not exist"
        raise UnionfsError(message, hint="unionfs status lists the unions")
    if entry.fstype != FSTYPE:
        raise usage_error(f"{path} is a mount of {entry.fstype}, not a union", "use umount")
    daemon = None if lazy else hold_daemon(entry, mounts, force=force)
    try:
        if force:
            _abort(entry)
        _detach(entry, lazy=lazy, force=force)
        if daemon is not None:
            _wait(daemon, entry.point)
        else:
            _tidy()
    finally:
        if daemon is not None:
            os.close(daemon)


def hold_daemon(entry: MountEntry, mounts: Sequence[MountEntry], *, force: bool) -> int | None:
    """A pidfd of the daemon; None if it is gone or cannot be known."""
    answer = ask(entry, mounts, deadline=2.0 if force else DEADLINE)
    if answer.state == "silent" and not force:
        hint = "use unionfs umount --force, or --lazy"
        raise UnionfsError(f"{entry.point}: {answer.reason}", hint=hint)
    pid = integer(answer.facts, "pid")
    if pid is None or answer.facts.get("pid_namespace") != os.readlink("/proc/self/ns/pid"):
        return None
    try:
        daemon = os.pidfd_open(pid)
    except OSError:  # it just ended
        return None
    # Still answering under that number: then the pidfd is the daemon's and not a successor's.
    if integer(ask(entry, mounts).facts, "pid") == pid:
        return daemon
    os.close(daemon)
    return None


def _detach(entry: MountEntry, *, lazy: bool, force: bool) -> None:
    from unionfs.syscalls import UnmountFlag, umount

    flags = UnmountFlag.NOFOLLOW
    if lazy:
        flags |= UnmountFlag.DETACH
    if force:
        flags |= UnmountFlag(MNT_FORCE)
    end = time.monotonic() + (FORCED_PATIENCE if force else 0.0)
    try:
        # Aborted requests need a moment to leave the file system.
        while not _try(lambda: umount(entry.point, flags), errno.EBUSY, end):
            time.sleep(0.02)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise busy(entry.point) from None
        if error.errno == errno.EPERM:
            _detach_as_user(entry, lazy=lazy)
            return
        if error.errno == errno.EINVAL:
            hint = "unmount it in the namespace that mounted it"
            raise UnionfsError(f"{entry.point} cannot be unmounted from here", hint=hint) from None
        raise UnionfsError(
            f"{entry.point} cannot be unmounted: {os.strerror(error.errno or 0)}",
            code=ExitCode.SYSTEM,
        ) from None


def _try(call: Callable[[], None], tolerated: int, end: float) -> bool:
    """Whether the call is done; an error that is not tolerated, or no longer, is raised."""
    try:
        call()
    except OSError as error:
        if error.errno != tolerated or time.monotonic() >= end:
            raise
        return False
    return True


def _detach_as_user(entry: MountEntry, *, lazy: bool) -> None:
    import subprocess

    uid, _gid = owner(entry)
    if uid != os.getuid():
        hint = "ask that user, or root"
        raise usage_error(f"{entry.point} was mounted by user {uid}: not permitted", hint)
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", entry.point]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        hint = "install fuse3, or unmount as root"
        raise UnionfsError("fusermount3 is not found", hint=hint, code=ExitCode.SYSTEM) from None
    if done.returncode == 0:
        return
    if os.strerror(errno.EBUSY) in done.stderr or "busy" in done.stderr:
        raise busy(entry.point)
    told = done.stderr.strip().removeprefix("fusermount3: ") or f"exit code {done.returncode}"
    raise UnionfsError(f"{entry.point} cannot be unmounted: fusermount3 says: {told}")


def _abort(entry: MountEntry) -> None:
    """Break the connection, which its owner may: every request ends with an error."""
    minor = entry.device.partition(":")[2]
    try:
        with open(f"/sys/fs/fuse/connections/{minor}/abort", "w") as file:
            file.write("1")
    except OSError:
        pass  # not there (fusectl is not mounted), or not ours: then umount says so


def _wait(daemon: int, point: str) -> None:
    poll = select.poll()
    poll.register(daemon, select.POLLIN)
    if not poll.poll(PATIENCE * 1000):
        message = f"{point} is unmounted, but its daemon has not ended after {PATIENCE:g} s"
        hint = "see its log, and whether another union has it as a layer; its own are still in use"
        raise UnionfsError(message, hint=hint)


def _tidy() -> None:
    """A daemon that was killed may have left a store unlocked."""
    if os.geteuid() == 0:
        from unionfs.stores import fscrypt_keys

        fscrypt_keys.tidy()


def busy(point: str) -> UnionfsError:
    users = [f"{name} (pid {pid})" for pid, name in _users(point)]
    shown = ", ".join(users[:3]) + (" and others" if len(users) > 3 else "")
    message = f"{point} is busy" + (f", used by {shown}" if users else "")
    return Busy(message, hint="end what uses it, or use unionfs umount --lazy")


def _users(point: str) -> Iterator[tuple[str, str]]:
    """Processes that we may look into whose directories or open files lie below point."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        links = [f"/proc/{pid}/{name}" for name in ("cwd", "root", "exe")]
        try:
            links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue  # ended, or not ours to see
        if any(_below(link, point) for link in links):
            try:
                with open(f"/proc/{pid}/comm", errors="replace") as file:
                    yield pid, file.read().strip()
            except OSError:
                continue


def _below(link: str, point: str) -> bool:
    try:
        target = os.readlink(link)
    except OSError:
        return False
    return target == point or target.startswith(point.rstrip("/") + "/")
