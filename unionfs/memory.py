# SPDX-License-Identifier: GPL-2.0-or-later
"""An upper in memory, gone with its union.

Owns where the memory comes from: a tmpfs that is mounted nowhere.  An ordinary user may make one
in a user namespace only; it is made there by a process of ours that hands over its root and ends.
Where no size is asked for, his upper is a directory in a tmpfs that is there.  Called by opened.py.
"""

import errno
import os
import socket
import tempfile
from pathlib import Path
from typing import Final, Never

from unionfs import syscalls
from unionfs.errors import UnionfsError
from unionfs.layer import Layer
from unionfs.removal import remove_path

_SAID: Final = 1024
# What unshare(2) answers where user namespaces are switched off, used up, or not built in.
_REFUSED: Final = (errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EUSERS, errno.EINVAL)


def open_memory(size: str | None) -> Layer:
    """An upper in memory; `size` as tmpfs(5) takes it (bytes with K, M, G, or %), None: half of
    the memory, or what the user's own tmpfs has.

    Raises UnionfsError where there is no such memory, or no such size.
    """
    options = {"mode": "0755"} | ({"size": size} if size is not None else {})
    try:
        base = _tmpfs(options, lent=size is not None)
    except OSError as exc:
        if exc.errno == errno.EINVAL and size is not None:
            raise UnionfsError(
                f"ephemeral size {size!r} is not understood by tmpfs",
                hint="give a number of bytes with K, M or G, or a percentage of memory",
            ) from exc
        if exc.errno not in (errno.EPERM, errno.ENOSYS):
            raise
    else:
        keep = os.dup(base)
        layer = Layer("(memory)", base, upper=True, mounts=[], detach="no")
        layer.careful = False
        layer.on_close(lambda: os.close(keep))
        return layer
    if size is not None:
        raise UnionfsError(
            "an ephemeral upper with a size needs a tmpfs, which this system lets no user make",
            hint="leave the size out, or mount as root",
        )
    return _directory()


def _directory() -> Layer:
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm"):
        if parent and os.access(parent, os.W_OK | os.X_OK):
            break
    else:
        raise UnionfsError(
            "no tmpfs for an ephemeral upper",
            hint="set XDG_RUNTIME_DIR to a writable directory, or name an upper",
        )
    path = tempfile.mkdtemp(prefix="unionfs-", dir=parent)
    base = os.open(path, os.O_PATH | os.O_DIRECTORY)
    layer = Layer(path, base, upper=True, mounts=[], detach="no")
    os.fchmod(layer.fd, 0o755)
    layer.on_close(lambda: remove_path(Path(path)))
    return layer


def _tmpfs(options: dict[str, str], *, lent: bool) -> int:
    """The root of a tmpfs that is mounted nowhere; `lent`: if need be, of a user namespace."""
    try:
        return syscalls.private_tmpfs(options)
    except PermissionError:
        if not lent:
            raise
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = os.fork()
        if child == 0:
            _lend(theirs, options)
        try:
            theirs.close()
            said, fds, _, _ = socket.recv_fds(ours, _SAID, 1, socket.MSG_CMSG_CLOEXEC)
        finally:
            os.waitpid(child, 0)
    if fds:
        return fds[0]
    code, _, text = os.fsdecode(said).partition(" ")
    raise OSError(int(code) if code else errno.EPERM, text)


def _lend(to: socket.socket, options: dict[str, str]) -> Never:
    """In a child: send the root, or the number and the words of an error."""
    try:
        _enter_user_namespace()
        socket.send_fds(to, [b"0"], [syscalls.private_tmpfs(options)])
    except OSError as exc:
        to.send(os.fsencode(f"{exc.errno or errno.EIO} {exc.strerror}")[:_SAID])
    finally:
        os._exit(0)


def _enter_user_namespace() -> None:
    """With the user's own numbers in it, as user_namespaces(7) lets everybody."""
    user, group = os.geteuid(), os.getegid()
    try:
        syscalls.unshare_user()
    except OSError as exc:
        if exc.errno in _REFUSED:
            raise PermissionError(errno.EPERM, exc.strerror) from exc
        raise
    Path("/proc/self/setgroups").write_text("deny", "ascii")  # else no gid_map
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1", "ascii")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1", "ascii")
