# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole check of a store, file system and uppers, in the order that finds most.

Owns the order: fsck first, since a damaged file system must not be mounted; then it is mounted
to look at the uppers, each locked so that no union changes it meanwhile.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator

from unionfs import locator
from unionfs.errors import UnionfsError
from unionfs.passphrase import Ask
from unionfs.stores import find, gocryptfs, userspace
from unionfs.stores.checking import (
    Code,
    Problem,
    Report,
    check_filesystem,
    check_upper,
    refuse_used,
)
from unionfs.stores.inspect import uppers_of
from unionfs.stores.opening import Volume, open_volume, unlock, walk
from unionfs.stores.probe import probe, require_filesystem


def examine(text: str, report: Report, *, repair: bool, ask: Ask | None = None) -> None:
    """Check everything; raises UnionfsError if it cannot be looked at at all.

    `ask`: for the passphrase of an encrypted upper; without it that is not looked into.
    """
    where = locator.parse(text)
    path = find.find(where)
    if not os.path.exists(path):
        raise UnionfsError(f"there is no {path}", hint="correct the path")
    if not stat.S_ISDIR(os.stat(path).st_mode):
        contents = probe(path)
        require_filesystem(contents)
        refuse_used(contents)
        with _locked(path, write=repair):
            check_filesystem(contents, report, repair=repair)
        if report.code & (Code.UNCORRECTED | Code.TROUBLE):
            return
    volume = open_volume(text, readonly=not repair, untouched=not repair)
    try:
        inside = where.directory
        found = [inside] if inside is not None else uppers_of(volume)
        for directory in found:
            try:
                fd = walk(volume, directory)
            except FileNotFoundError as exc:
                raise UnionfsError(f"{volume.locator.source} has no {directory}") from exc
            upper = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            try:
                shown = "" if directory == "/" else directory
                if gocryptfs.is_encrypted(upper):
                    _check_encrypted(volume, directory, upper, report, ask)
                    continue
                _lock(upper, directory, exclusive=repair)
                check_upper(upper, shown, report, repair=repair)
            finally:
                os.close(upper)
    finally:
        volume.close()


def _check_encrypted(
    volume: Volume, directory: str, cipher: int, report: Report, ask: Ask | None
) -> None:
    if ask is None:
        what = f"is encrypted ({gocryptfs.KIND}): --key-file or --credential lets it be checked"
        report.problems.append(Problem(directory, what))
        report.code |= Code.TROUBLE
        return
    plain = unlock(volume, directory, cipher, ask, readonly=volume.readonly)
    try:
        upper = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=plain.root)
        try:
            shown = "" if directory == "/" else directory
            check_upper(upper, shown, report, repair=not volume.readonly)
        finally:
            os.close(upper)
    finally:
        plain.close()


@contextlib.contextmanager
def _locked(path: str, *, write: bool) -> Iterator[None]:
    """An image, so that nobody mounts it; a device is held by the file system's own fsck."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        yield
        return
    lock = userspace.lock_image(path, readonly=not write)
    try:
        yield
    finally:
        os.close(lock)


def _lock(upper: int, directory: str, *, exclusive: bool) -> None:
    try:
        fcntl.flock(upper, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        hint = "unmount that union first"
        raise UnionfsError(f"{directory} is in use by a union", hint=hint) from None
