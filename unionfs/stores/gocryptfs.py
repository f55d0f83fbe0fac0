# SPDX-License-Identifier: GPL-2.0-or-later
"""Encrypted uppers: a cipher directory of gocryptfs(1) lies where the upper would.

Owns how one is recognized, made and mounted.  The program is run as userspace.py runs those that
mount images, reads the passphrase from a pipe, and shares a lock on the cipher directory, since two
of them would destroy it.  Called by opening.py when a union is mounted, and by the verbs of stores.
"""

import contextlib
import errno
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from typing import Final

from unionfs.errors import UnionfsError
from unionfs.format import AREA_NAME, CIPHER_CONFIG
from unionfs.passphrase import Ask, wiped
from unionfs.stores import kernel, userspace
from unionfs.stores.tools import environment, lines_of, tool
from unionfs.syscalls import exists

KIND: Final = "gocryptfs"
# What its root has besides encrypted names.
OWN_FILES: Final = (CIPHER_CONFIG, "gocryptfs.diriv")
_WRONG_PASSPHRASE: Final = 12  # gocryptfs's exit code
_CONFIG_BYTES: Final = 65536


def is_encrypted(directory: int) -> bool:
    """Whether an open directory (O_PATH will do) is a cipher directory.

    A file of that name may also be in a plain upper, whose area then lies beside it.
    """
    try:
        if exists(directory, AREA_NAME):
            return False
        data = _read_config(directory)
    except PermissionError as exc:
        return str(exc.filename) == CIPHER_CONFIG  # not ours to read: gocryptfs will say so
    except OSError as exc:
        # Taken for a plain one, it would be written to in plain text.
        where = os.readlink(f"/proc/self/fd/{directory}")
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"cannot read {where}/{CIPHER_CONFIG}: {reason}") from exc
    try:
        found = json.loads(data)
    except ValueError:
        return False
    return isinstance(found, dict) and "EncryptedKey" in found


def _read_config(directory: int) -> bytes:
    """Nothing if there is none, or something else has its name; raises OSError."""
    try:
        status = os.stat(CIPHER_CONFIG, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return b""
    if not stat.S_ISREG(status.st_mode):
        return b""
    fd = os.open(CIPHER_CONFIG, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    with os.fdopen(fd, "rb") as file:
        return file.read(_CONFIG_BYTES)


def init(directory: int, name: str, secret: bytearray) -> None:
    """Make an empty directory a cipher directory."""
    command = [tool(KIND, KIND), "-init", "-q", "--", _path(directory)]
    with _pipe(secret) as stdin:
        done = subprocess.run(
            command,
            stdin=stdin,
            capture_output=True,
            pass_fds=[directory],
            env=environment(),
            check=False,
        )
    if done.returncode:
        said = lines_of(done.stderr or done.stdout)
        reason = said[-1] if said else f"exit code {done.returncode}"
        raise UnionfsError(f"cannot encrypt {name}: {reason}")


def start(directory: int, name: str, ask: Ask, *, readonly: bool) -> userspace.Helper:
    """Mount a cipher directory (an open one, not O_PATH) where nobody else sees it."""
    # As root with all that a file system has: ACLs that the kernel enforces, devices, capabilities.
    words = ["-acl", *(["-dev", "-suid"] if kernel.may_mount() else [])]
    if readonly:
        words.append("-ro")
    command = [
        tool(KIND, KIND),
        "-fg",
        "-q",
        "-nosyslog",
        *words,
        "-fsname",
        KIND,
        "--",
        _path(directory),
    ]
    patience = userspace.LOCK_SECONDS
    userspace.lock_patiently(directory, name, readonly=readonly, patience=patience)
    with wiped(ask(name)) as secret, _pipe(secret) as stdin:
        try:
            return userspace.launch(
                name,
                command,
                keep=directory,
                readonly=readonly,
                stdin=stdin,
                notify="-notifypid",
            )
        except userspace.Ended as exc:
            if exc.code == _WRONG_PASSPHRASE:
                raise UnionfsError(f"the passphrase of {name} is wrong") from None
            hint = f"what it is: gocryptfs -info {name}"
            wrong = f"cannot mount the encrypted {name}: {exc.reason}"
            raise UnionfsError(wrong, hint=hint) from exc


def _path(directory: int) -> str:
    """How the program reaches it: by a descriptor that it inherits, whatever is mounted where."""
    return f"/proc/self/fd/{directory}"


@contextlib.contextmanager
def _pipe(secret: bytearray) -> Iterator[int]:
    """What a program reads the passphrase from: it is short, so the pipe holds all of it."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        os.writev(writing, [secret, b"\n"])
        os.close(writing)
        yield reading
    finally:
        os.close(reading)
