# SPDX-License-Identifier: GPL-2.0-or-later
"""Finding mounted unions, and asking their daemons.

Owns how a path given by the user becomes a mount, and the question that never hangs its asker.
Does not unmount nor print.  Called by status, umount and helper.
"""

import errno
import json
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from unionfs.mounts import MountEntry, topmost

STATUS_XATTR = "user.unionfs.status"
DEADLINE = 10.0  # seconds; a daemon that says nothing for so long hangs or is stopped

State = Literal["ok", "dead", "silent", "no access", "covered"]


class Answer(NamedTuple):
    """What a daemon says of its union; facts are empty unless the state is ok."""

    state: State
    facts: dict[str, object]
    reason: str = ""


def find(path: str, mounts: Sequence[MountEntry]) -> MountEntry | None:
    """The mount whose mount point is `path`.  Asks no daemon if the path is plain."""
    if ".." not in path.split("/") and (entry := topmost(os.path.abspath(path), mounts)):
        return entry
    return topmost(os.path.realpath(path), mounts)


def owner(entry: MountEntry) -> tuple[int, int]:
    """The user and group whose mount it is, in the eyes of FUSE."""
    options = dict(item.partition("=")[::2] for item in entry.options.split(","))
    return int(options.get("user_id") or 0), int(options.get("group_id") or 0)


def integer(facts: dict[str, object], name: str) -> int | None:
    """A whole number among the facts of an answer."""
    value = facts.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def texts(value: object) -> list[str]:
    """The strings of a fact that is one string, a list of them, or nothing."""
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def ask(entry: MountEntry, mounts: Sequence[MountEntry], deadline: float = DEADLINE) -> Answer:
    """The status of one union, from its daemon."""
    if topmost(entry.point, mounts) != entry:
        return Answer("covered", {}, "another mount lies over it")
    reply = ask_in_child(lambda: _status(entry), deadline)
    if reply is None:
        return Answer("silent", {}, f"the daemon has not answered for {deadline:g} s")
    if isinstance(reply, int):
        return _failed(reply)
    try:
        facts = json.loads(reply)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        return Answer("no access", {}, "the daemon's answer is not understood")
    return Answer("ok", facts)


def _failed(code: int) -> Answer:
    if code in (errno.ENOTCONN, errno.ECONNABORTED):
        return Answer("dead", {}, "the daemon is gone; unionfs umount removes the mount")
    if code in (errno.EACCES, errno.EPERM):
        return Answer("no access", {}, "only its owner may ask (allow_other was not given)")
    if code in (errno.ENODATA, errno.ENOTSUP):
        return Answer("covered", {}, "what is seen at this path is not this union")
    return Answer("no access", {}, os.strerror(code))


def ask_in_child(question: Callable[[], bytes], deadline: float) -> bytes | int | None:
    """What is asked of a daemon: the answer, an errno, or None when the time (seconds) is over.

    A request that a daemon has taken and does not answer cannot be left, not even by SIGKILL.  So
    a child asks, holding nothing of ours (a store that must be able to end), and is left behind if
    need be.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.closerange(0, write_end)
        os.closerange(write_end + 1, os.sysconf("SC_OPEN_MAX"))
        _child(question, write_end)
    os.close(write_end)
    reply = _read_until(read_end, time.monotonic() + deadline)
    os.close(read_end)
    if reply is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, os.WNOHANG)
        return None
    os.waitpid(child, 0)
    return reply[1:] if reply[:1] == b"+" else int(reply[1:] or errno.EIO)


def _child(question: Callable[[], bytes], write_end: int) -> None:
    """Ask, write +ANSWER or -ERRNO, and end without any of Python's farewells."""
    try:
        reply = b"+" + question()
    except OSError as error:
        reply = b"-%d" % (error.errno or errno.EIO)
    except BaseException:
        os._exit(1)
    with open(write_end, "wb", buffering=0) as file:
        while reply:
            reply = reply[file.write(reply) :]
    os._exit(0)


def _status(entry: MountEntry) -> bytes:
    """As the user whose mount it is, for whom alone it may be.  In a child."""
    uid, gid = owner(entry)
    if os.geteuid() == 0 and uid != 0:
        # Without allow_other FUSE answers its owner only, and not even root.
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    return os.getxattr(entry.point, STATUS_XATTR)


def _read_until(fd: int, end: float) -> bytes | None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    reply = b""
    while poll.poll(max(0.0, end - time.monotonic()) * 1000):
        if not (piece := os.read(fd, 65536)):
            return reply
        reply += piece
    return None
