# SPDX-License-Identifier: GPL-2.0-or-later
"""Making a store: an image, under a temporary name until it is complete, or on a device.

Owns mkfs and its limits.  What is there is never overwritten.  Called by `unionfs store`.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from unionfs import syscalls
from unionfs.errors import ExitCode, UnionfsError, usage_error
from unionfs.stores.probe import probe
from unionfs.stores.tools import lines_of, run, tool, uninterrupted
from unionfs.syscalls import RenameFlag

FileSystem = Literal["ext4", "xfs", "btrfs"]
_MIB: Final = 1 << 20
_STEP: Final = 64 * _MIB
_AFTER: Final = ".new"  # of a temporary name, after 8 digits
_LONGEST: Final = 255 - len("..01234567.new")  # bytes of a name


@dataclass(frozen=True, slots=True)
class Kind:
    """What mkfs needs and allows."""

    package: str
    smallest: int  # MiB
    label: int  # bytes
    arguments: tuple[str, ...]
    keep: tuple[str, ...]  # not to discard what the image has been given


# 1 KiB blocks, which mkfs.ext4 picks for small images, refuse attributes of 1000 bytes.
KINDS: Final[dict[str, Kind]] = {
    "ext4": Kind("e2fsprogs", 8, 16, ("-q", "-F", "-b", "4096", "-m", "1"), ()),
    "xfs": Kind("xfsprogs", 300, 12, ("-q", "-f"), ("-K",)),
    "btrfs": Kind("btrfs-progs", 114, 255, ("-q", "-f"), ("-K",)),
}


def check_wish(fstype: str, size: int | None, label: str) -> None:
    """Raise a usage error for what mkfs would refuse, or cut."""
    kind = KINDS[fstype]
    if size is not None and size < kind.smallest * _MIB:
        hint = f"{fstype} needs {kind.smallest}M" + ("" if fstype == "ext4" else "; ext4 needs 8M")
        raise usage_error(f"--size is too small for {fstype}", hint)
    if len(os.fsencode(label)) > kind.label:
        hint = f"a label of {fstype} has {kind.label} bytes at most"
        raise usage_error(f"the label {label!r} is too long", hint)
    if any(not c.isprintable() for c in label):
        raise usage_error(f"the label {label!r} has a character that is not printable")
    if label != label.rstrip():
        raise usage_error(f"the label {label!r} ends in a blank, which blkid does not show")


def make_filesystem(path: str, fstype: str, label: str, *, discard: bool = True) -> None:
    """mkfs, for whoever runs us: a user owns its root."""
    kind = KINDS[fstype]
    command = [tool(f"mkfs.{fstype}", kind.package), *kind.arguments]
    if fstype == "ext4":
        words = "discard" if discard else "nodiscard"
        if os.geteuid() != 0:
            words += f",root_owner={os.geteuid()}:{os.getegid()}"
        command += ["-E", words]
    elif not discard:
        command += kind.keep
    command += [*(["-L", label] if label else []), "--", path]
    done = run(command)
    if done.returncode:
        said = lines_of(done.stderr or done.stdout)
        reason = said[-1] if said else f"exit code {done.returncode}"
        raise UnionfsError(f"mkfs.{fstype} of {path} failed: {reason}")


@contextlib.contextmanager
def new_file(path: str, *, replace: bool = False) -> Iterator[tuple[int, str]]:
    """A temporary beside `path`, locked, given that name at the end; gone on errors.

    What has the name already is an error, or with `replace` replaced at once.  A kill leaves the
    temporary, which the next one for the same name removes.
    """
    if os.path.basename(path) in ("", ".", ".."):
        raise usage_error(f"{path!r} is no name of a file", "write the path of a file")
    folder, name = os.path.split(os.path.abspath(path))
    if not replace:
        check_free(path)
    _remove_abandoned(folder, name)
    temporary = f"{folder}/{_before(name)}{secrets.token_hex(4)}{_AFTER}"
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"cannot make {path}: {reason}") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd, temporary
        os.fsync(fd)
        with uninterrupted():
            if replace:
                os.rename(temporary, path)
            else:
                take_name(temporary, path)
            _sync_directory(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(fd)


def check_free(path: str) -> None:
    """Raise an error if something has this name."""
    if os.path.lexists(path):
        hint = "choose another name, or remove it first"
        raise UnionfsError(f"{path} exists: it is not overwritten", hint=hint)


def take_name(temporary: str, path: str) -> None:
    """Rename without replacing anything."""
    try:
        try:
            syscalls.renameat2(
                syscalls.AT_FDCWD, temporary, syscalls.AT_FDCWD, path, RenameFlag.NOREPLACE
            )
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # of a file system without the flag
                raise
            os.link(temporary, path)
            os.unlink(temporary)
    except FileExistsError:
        raise UnionfsError(f"{path} was made meanwhile: it is not overwritten") from None


def _sync_directory(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _before(name: str) -> str:
    """How the temporaries for a name begin; the middle of one that is too long is left out."""
    raw = os.fsencode(name)
    if len(raw) > _LONGEST:
        raw = raw[: _LONGEST // 2] + raw[-(_LONGEST // 2) :]
    return f".{os.fsdecode(raw)}."


def _remove_abandoned(folder: str, name: str) -> None:
    """Temporaries for this name that nobody locks."""
    with contextlib.suppress(OSError):
        for found in os.listdir(folder):
            if not (found.startswith(_before(name)) and found.endswith(_AFTER)):
                continue
            with contextlib.suppress(OSError), open(f"{folder}/{found}", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(f"{folder}/{found}")


def create_image(
    path: str,
    size: int,
    fstype: FileSystem,
    label: str,
    *,
    sparse: bool,
    advance: Callable[[int], None],
) -> None:
    """A new image file of `size` bytes."""
    with new_file(path) as (fd, temporary):
        try:
            os.ftruncate(fd, size)
            for start in range(0, 0 if sparse else size, _STEP):
                step = min(_STEP, size - start)
                os.posix_fallocate(fd, start, step)
                advance(step)
        except OSError as exc:
            hint = "choose a smaller --size" + (", or leave --full out" if not sparse else "")
            reason = os.strerror(exc.errno or errno.EIO)
            raise UnionfsError(f"cannot make {path}: {reason}", hint=hint) from exc
        make_filesystem(temporary, fstype, label, discard=sparse)


@contextlib.contextmanager
def new_image(path: str, size: int, fstype: FileSystem, label: str) -> Iterator[str]:
    """A sparse image under its temporary name, to be filled; at the end it gets its own."""
    with new_file(path) as (fd, temporary):
        try:
            os.ftruncate(fd, size)
        except OSError as exc:
            reason = os.strerror(exc.errno or errno.EIO)
            hint = "choose a smaller --size"
            raise UnionfsError(f"cannot make {path}: {reason}", hint=hint) from exc
        make_filesystem(temporary, fstype, label)
        # Whoever mounts it takes a lock of his own.
        fcntl.flock(fd, fcntl.LOCK_UN)
        try:
            yield temporary
        except (OSError, UnionfsError) as exc:
            # What is in the image sees an I/O error, or an ENOSPC that it takes for its own.
            if os.statvfs(temporary).f_bavail:
                raise
            raise UnionfsError(f"cannot fill {path}: the disk that it lies on is full") from exc


def format_device(path: str, fstype: FileSystem, label: str) -> None:
    """A file system on an empty block device."""
    if not stat.S_ISBLK(os.stat(path).st_mode):
        raise usage_error(f"{path} is no block device")
    contents = probe(path)
    what = contents.fstype or contents.table
    if what:
        named = f" {contents.label!r}" if contents.label else ""
        hint = f"if nobody needs what is on it: wipefs --all {path}"
        raise UnionfsError(f"{path} holds {what}{named}: it is not overwritten", hint=hint)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"{path} cannot be written: {reason}", code=ExitCode.FAIL) from exc
    make_filesystem(path, fstype, label)
