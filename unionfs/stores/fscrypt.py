# SPDX-License-Identifier: GPL-2.0-or-later
"""Encrypted uppers: a directory that the kernel encrypts (Documentation/filesystems/fscrypt.rst).

Owns how one is recognized, made and unlocked, and how its key is made of a passphrase.  The kernel
is called directly (fscrypt_keys.py): fscrypt(1) asks for a file system that is mounted somewhere,
and ours are mounted nowhere.  Root's only.  Called by opening.py when a union is mounted, and by
the verbs of stores.

The key is made of the passphrase by scrypt.  What that takes besides lies in an attribute of the
directory, so that both take effect together.  Each directory has a key of its own.  The kernel
knows a key by its identifier, which is made of it, and which a directory keeps: so a wrong
passphrase is known before anything is done with it.
"""

import contextlib
import errno
import hashlib
import hmac
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from unionfs import syscalls
from unionfs.errors import UnionfsError, usage_error
from unionfs.format import KEY_ATTRIBUTE
from unionfs.passphrase import Ask, wiped
from unionfs.stores import fscrypt_keys, kernel
from unionfs.stores.fscrypt_keys import Key

KIND: Final = "fscrypt"

# The attribute: version, log2(n), r, p, salt.
_MADE_OF: Final = struct.Struct("=4B32s")
_VERSION: Final = 1
_LOG_N, _R, _P = 16, 8, 1  # 64 MiB for about a quarter of a second
# More than anybody meant.
_MOST_MEMORY: Final = 1 << 30
_MOST_P: Final = 16
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class MadeOf(NamedTuple):
    """What a key is made of besides the passphrase."""

    log_n: int
    r: int
    p: int
    salt: bytes

    def text(self) -> bytes:
        """As it stands in the attribute."""
        return _MADE_OF.pack(_VERSION, *self)

    def key(self, secret: bytearray) -> bytearray:
        """The kernel's key; raises ValueError for what scrypt does not know."""
        n = 1 << self.log_n
        memory = 128 * self.r * (n + self.p + 2)
        size = fscrypt_keys.SIZE
        made = hashlib.scrypt(
            secret, salt=self.salt, n=n, r=self.r, p=self.p, maxmem=memory, dklen=size
        )
        return bytearray(made)

    def is_sensible(self) -> bool:
        """Whether it takes no more memory and time than anybody would have meant."""
        if not (0 < self.log_n < 32 and self.r and 0 < self.p <= _MOST_P):
            return False
        return 128 * self.r << self.log_n <= _MOST_MEMORY


def _read_made_of(data: bytes, name: str) -> MadeOf:
    if len(data) > 1 and data[0] != _VERSION:
        hint = "mount it with a newer unionfs"
        raise UnionfsError(f"{name} is encrypted in a way that is not known: {data[0]}", hint=hint)
    if len(data) == _MADE_OF.size:
        found = MadeOf(*_MADE_OF.unpack(data)[1:])
        if found.is_sensible():
            return found
    raise _damaged(name)


def _damaged(name: str) -> UnionfsError:
    hint = "put the attribute back: without it the passphrase alone unlocks nothing"
    return UnionfsError(f"the attribute {KEY_ATTRIBUTE} of {name} is damaged", hint=hint)


def identifier_of_key(key: bytearray) -> bytes:
    """What the kernel calls a key: HKDF-SHA512 without a salt (fs/crypto/hkdf.c)."""
    extracted = hmac.new(bytes(64), key, "sha512").digest()
    return hmac.new(extracted, b"fscrypt\0\1\1", "sha512").digest()[:16]


# What there is


@contextlib.contextmanager
def _readable(directory: int) -> Iterator[int]:
    fd = os.open(".", _DIRECTORY, dir_fd=directory)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_marked(directory: int) -> bool:
    """Whether a directory (O_PATH will do) is encrypted, by whomever."""
    with contextlib.suppress(OSError), _readable(directory) as fd:
        return syscalls.is_encrypted(fd)
    return False


def _attribute(directory: int) -> bytes:
    with contextlib.suppress(OSError):
        return os.getxattr(f"/proc/self/fd/{directory}", KEY_ATTRIBUTE)
    return b""


def is_encrypted(directory: int) -> bool:
    """Whether an open directory (O_PATH will do) is encrypted, by us; unlocked or not.

    One that was encrypted by another program, and unlocked, is a directory like any other.  To an
    ordinary user the attribute is not shown, so one that is locked counts.
    """
    if not kernel.may_mount():
        return is_locked(directory)
    return bool(_attribute(directory)) and _is_marked(directory)


def is_locked(directory: int) -> bool:
    """Whether its key, whoever made it, is not there."""
    if not _is_marked(directory):
        return False
    with contextlib.suppress(OSError), _readable(directory) as fd:
        identifier = fscrypt_keys.identifier_of(fd)
        return bool(identifier) and not fscrypt_keys.is_present(fd, identifier or b"")
    return True  # neither this kernel nor this program can unlock it


def refuse_locked(directory: int, name: str) -> None:
    """Called for one that is not known as ours: raise an error if its key is not there."""
    if is_locked(directory):
        hint = "unlock it by the program that has encrypted it, such as fscrypt(1)"
        raise UnionfsError(f"{name} is encrypted by fscrypt, and locked", hint=hint)


def refuse_user() -> None:
    """Raise an error for those to whom a file system gives no keys that others may use."""
    if not kernel.may_mount():
        hint = "leave --kind out: gocryptfs works for everybody"
        raise usage_error("only root can encrypt by fscrypt", hint)


def refuse_impossible(directory: int, name: str) -> None:
    """Raise an error if a directory like this open one cannot be encrypted, before anything is."""
    parent = os.open("..", _DIRECTORY, dir_fd=directory)
    try:
        if all(fscrypt_keys.identifier_of(fd) is None for fd in (directory, parent)):
            return
    except OSError as exc:
        raise _impossible(name, exc) from exc
    finally:
        os.close(parent)
    hint = "take it out of there first, or encrypt it with --kind gocryptfs"
    raise UnionfsError(f"{name} lies in what fscrypt encrypts already", hint=hint)


def _impossible(name: str, exc: OSError) -> UnionfsError:
    if exc.errno == errno.ENOTTY:
        hint = "ext4 has it; elsewhere leave --kind out: gocryptfs works anywhere"
        return UnionfsError(f"{name}: this file system has no encryption (fscrypt)", hint=hint)
    if exc.errno == errno.EOPNOTSUPP:
        hint = "add it while nobody has it mounted: tune2fs -O encrypt IMAGE-OR-DEVICE"
        what = "the file system has no feature encrypt, or this kernel has no fscrypt"
        return UnionfsError(f"{name}: {what}", hint=hint)
    if exc.errno == errno.ENOPKG:
        return UnionfsError(f"{name}: this kernel lacks AES-256-XTS or AES-256-CTS-CBC")
    return UnionfsError(f"cannot encrypt {name}: {os.strerror(exc.errno or errno.EIO)}")


# Unlocking and making


def unlock(directory: int, name: str, ask: Ask | None, keys: list[Key]) -> None:
    """Have an encrypted directory (O_PATH will do) show what it has, until its key is closed.

    That is put with `keys`, also on an error: it is to be closed when nothing is open there any
    more.  The passphrase is asked for also if somebody has unlocked it before: a wrong one never
    does.  Without `ask` it is unlocked, and stays so.
    """
    if not kernel.may_mount():
        raise UnionfsError(f"{name} is encrypted by fscrypt", hint="only root can unlock it")
    try:
        identifier = _identifier_at(directory)
        key = Key.held(directory, identifier, name)
        keys.append(key)
        if ask is not None:
            with (
                wiped(ask(name)) as secret,
                wiped(_right_key(directory, identifier, name, secret)) as raw,
            ):
                key.add(raw)
        elif not key.is_present():
            raise UnionfsError(f"{name} was locked a moment ago", hint="try again")
    except OSError as exc:
        raise _cannot_unlock(name, exc) from exc


def _cannot_unlock(name: str, exc: OSError) -> UnionfsError:
    if exc.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
        return UnionfsError(f"{name} is encrypted by fscrypt, which this kernel does not have")
    return UnionfsError(f"cannot unlock {name}: {os.strerror(exc.errno or errno.EIO)}")


def _identifier_at(directory: int) -> bytes:
    with _readable(directory) as fd:
        return fscrypt_keys.identifier_of(fd) or b""


def _right_key(directory: int, identifier: bytes, name: str, secret: bytearray) -> bytearray:
    try:
        raw = _read_made_of(_attribute(directory), name).key(secret)
    except ValueError:
        raise _damaged(name) from None
    if identifier_of_key(raw) != identifier:
        raw[:] = bytes(len(raw))
        raise UnionfsError(f"the passphrase of {name} is wrong")
    return raw


def refuse_wrong(directory: int, name: str, secret: bytearray) -> None:
    """Raise an error if this is not the passphrase of an encrypted directory."""
    with wiped(_right_key(directory, _identifier_at(directory), name, secret)):
        pass


def make(directory: int, name: str, secret: bytearray, keys: list[Key]) -> MadeOf:
    """Have an empty directory (an open one) encrypted, and unlocked; remember() is to follow.

    Its key is put with `keys`, as by unlock().
    """
    made_of = MadeOf(_LOG_N, _R, _P, os.urandom(32))
    with wiped(made_of.key(secret)) as raw:
        key = Key.held(directory, identifier_of_key(raw), name)
        keys.append(key)
        try:
            key.add(raw)
            fscrypt_keys.encrypt(directory, key.identifier)
            # Whether the kernel has the ciphers shows when something is made.
            os.close(os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600, dir_fd=directory))
        except OSError as exc:
            raise _impossible(name, exc) from exc
    return made_of


def remember(directory: int, made_of: MadeOf) -> None:
    """Write down what its key is made of: last, since what was copied there may have brought its
    own."""
    os.setxattr(f"/proc/self/fd/{directory}", KEY_ATTRIBUTE, made_of.text())
