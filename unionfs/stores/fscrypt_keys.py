# SPDX-License-Identifier: GPL-2.0-or-later
"""Keys of fscrypt: whose key a directory is encrypted with, and which keys a file system has.

Owns the kernel's calls (linux/fscrypt.h), and when a key is taken away.  Called by fscrypt.py, and
by whoever unmounts a union whose daemon was killed.

A key that a file system has shows its files to all who may look at them.  So the last of us who
uses it takes it away: each holds a lock on a file for it below /run, which also has where the file
system is seen.  What a daemon that was killed has left there is found by whoever comes next.
"""

import contextlib
import errno
import fcntl
import logging
import os
import struct
from dataclasses import dataclass
from typing import Final, Self

from unionfs.errors import UnionfsError, printable
from unionfs.mounts import read_mounts
from unionfs.passphrase import wiped

log = logging.getLogger("unionfs")

SIZE: Final = 64  # bytes of a key

_SET_POLICY: Final = 0x800C6613
_GET_POLICY_EX: Final = 0xC0096616
_ADD_KEY: Final = 0xC0506617
_REMOVE_KEY: Final = 0xC0406618
_GET_KEY_STATUS: Final = 0xC080661A
_POLICY: Final = struct.Struct("=4B4x16s")  # version, contents, names, flags, identifier
_SPECIFIER: Final = struct.Struct("=2I16s16x")
_ADDING: Final = struct.Struct("=2I16s16xI36x")  # specifier, size of the key that follows
_V2: Final = 2
_AES_256_XTS: Final = 1
_AES_256_CTS: Final = 4
_PAD_32: Final = 3
_IDENTIFIER: Final = 2  # FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER
_STATUS: Final = (struct.Struct("=I"), 64)  # where, in what GET_KEY_STATUS answers
_PRESENT: Final = 2
_LEFT: Final = (struct.Struct("=I"), 40)  # in what REMOVE_KEY answers
_FILES_BUSY: Final = 1

_PLACE: Final = "/run/unionfs"
_PREFIX: Final = ".fscrypt-"
_PATH_BYTES: Final = 4096
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def identifier_of(directory: int) -> bytes | None:
    """Of the key of an open directory; None if it is not encrypted, empty if in the older way.

    Raises OSError where nothing can be: ENOTTY without such calls, EOPNOTSUPP without the feature.
    """
    answer = bytearray(8 + _POLICY.size)
    struct.pack_into("=Q", answer, 0, _POLICY.size)
    try:
        fcntl.ioctl(directory, _GET_POLICY_EX, answer)
    except OSError as exc:
        if exc.errno == errno.ENODATA:
            return None
        raise
    version, *_, identifier = _POLICY.unpack_from(answer, 8)
    return bytes(identifier) if version == _V2 else b""


def encrypt(directory: int, identifier: bytes) -> None:
    """Have all that will be in an open, empty directory encrypted with a key that is there."""
    policy = _POLICY.pack(_V2, _AES_256_XTS, _AES_256_CTS, _PAD_32, identifier)
    fcntl.ioctl(directory, _SET_POLICY, bytearray(policy))


def is_present(filesystem: int, identifier: bytes) -> bool:
    """Whether the file system of an open directory has a key."""
    answer = bytearray(128)
    _SPECIFIER.pack_into(answer, 0, _IDENTIFIER, 0, identifier)
    fcntl.ioctl(filesystem, _GET_KEY_STATUS, answer)
    word, offset = _STATUS
    return bool(word.unpack_from(answer, offset)[0] == _PRESENT)


def _remove(filesystem: int, identifier: bytes) -> bool:
    """Whether nothing is left that the key was for."""
    words = bytearray(64)
    _SPECIFIER.pack_into(words, 0, _IDENTIFIER, 0, identifier)
    try:
        fcntl.ioctl(filesystem, _REMOVE_KEY, words)
    except OSError as exc:
        if exc.errno == errno.ENOKEY:
            return True
        raise
    word, offset = _LEFT
    return not word.unpack_from(words, offset)[0] & _FILES_BUSY


@dataclass(slots=True)
class Key:
    """A key that nobody of us takes away as long as this is open; it need not be there yet.

    The file of one that could not be taken away stays too: the next of us tries again.
    """

    filesystem: int  # a directory there
    lock: int
    identifier: bytes
    name: str

    @classmethod
    def held(cls, directory: int, identifier: bytes, name: str) -> Self:
        """Of the file system of a directory (O_PATH will do) that is or will be encrypted."""
        tidy()
        filesystem = _open_outside(directory)
        try:
            where = os.readlink(f"/proc/self/fd/{filesystem}")
            return cls(filesystem, _lock(identifier, where), identifier, name)
        except OSError as exc:
            os.close(filesystem)
            reason = os.strerror(exc.errno or errno.EIO)
            raise UnionfsError(f"cannot lock {_path(identifier)}: {reason}") from exc

    def is_present(self) -> bool:
        """Whether the kernel has it."""
        return is_present(self.filesystem, self.identifier)

    def add(self, key: bytearray) -> None:
        """Give it to the kernel, which may have it already."""
        words = bytearray(_ADDING.size)
        _ADDING.pack_into(words, 0, _IDENTIFIER, 0, b"", len(key))
        with wiped(words + key) as told:
            fcntl.ioctl(self.filesystem, _ADD_KEY, told)
            assert told[8:24] == self.identifier

    def close(self) -> None:
        """Take it away, unless others of us use it.  A second call does nothing."""
        if self.lock < 0:
            return
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._remove():
                _unlink(_path(self.identifier))
        os.close(self.lock)
        os.close(self.filesystem)
        self.lock = self.filesystem = -1

    def _remove(self) -> bool:
        reason = "what is open there stays so"
        try:
            if _remove(self.filesystem, self.identifier):
                return True
        except OSError as exc:
            reason = os.strerror(exc.errno or errno.EIO)
        log.warning("%s is not locked: %s", printable(self.name), reason)
        return False


def _open_outside(directory: int) -> int:
    """A directory of the same file system, and not that one, which would be open itself when the
    key is taken away."""
    filesystem = os.open("..", _DIRECTORY, dir_fd=directory)
    wanted = os.fstat(directory).st_dev
    if os.fstat(filesystem).st_dev == wanted:
        return filesystem
    os.close(filesystem)
    device = f"{os.major(wanted)}:{os.minor(wanted)}"
    for entry in read_mounts():  # it is the root of a bind mount
        if entry.device == device and entry.root == "/":
            with contextlib.suppress(OSError):
                filesystem = os.open(entry.point, _DIRECTORY)
                if os.fstat(filesystem).st_dev == wanted:  # nothing else is mounted over it
                    return filesystem
                os.close(filesystem)
    return os.open(".", _DIRECTORY, dir_fd=directory)


def _path(identifier: bytes) -> str:
    return f"{_PLACE}/{_PREFIX}{identifier.hex()}"


def _lock(identifier: bytes, where: str) -> int:
    """Shared; whoever takes the key away has it alone, and then removes the file."""
    os.makedirs(_PLACE, 0o755, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        fd = os.open(_path(identifier), flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            if os.fstat(fd).st_nlink:
                os.pwrite(fd, os.fsencode(where) + b"\0", 0)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def tidy() -> None:
    """Take away the keys that were added by processes which have been killed since."""
    try:
        names = os.listdir(_PLACE)
    except OSError:
        return
    for name in names:
        if name.startswith(_PREFIX):
            with contextlib.suppress(OSError, ValueError):
                _tidy(f"{_PLACE}/{name}", bytes.fromhex(name.removeprefix(_PREFIX)))


def _tidy(path: str, identifier: bytes) -> None:
    """Raises OSError if it is not ours to read, or not to be taken away now."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            where = os.pread(fd, _PATH_BYTES, 0).partition(b"\0")[0]
            if _remove_at(where, identifier):
                _unlink(path)
    finally:
        os.close(fd)


def _remove_at(where: bytes, identifier: bytes) -> bool:
    """Whether nothing is left; a file system that is not mounted there any more has no keys."""
    with contextlib.suppress(OSError):
        filesystem = os.open(where, _DIRECTORY)
        try:
            return _remove(filesystem, identifier)
        finally:
            os.close(filesystem)
    return True


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
