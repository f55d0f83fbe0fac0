# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole check of a store, file system and uppers, in the order that finds most.

Owns the order: fsck first, since a damaged file system must not be mounted; then it is mounted
to look at the uppers, each locked so that no union changes it meanwhile; the lowers that were
named are opened beside them.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from unionfs import holder, identity, locator
from unionfs.errors import UnionfsError
from unionfs.format import AREA_NAME, Record
from unionfs.identity import Base
from unionfs.layer import Layer
from unionfs.mounts import read_mounts
from unionfs.opened import open_lowers
from unionfs.options import MountOptions
from unionfs.passphrase import Ask
from unionfs.stores import (
    ext,
    find,
    fscrypt,
    fscrypt_keys,
    gocryptfs,
    references,
    unlocking,
)
from unionfs.stores.checking import Code, Problem, Report, check_filesystem, refuse_used
from unionfs.stores.inspect import read_record, uppers_of, wrong_areas
from unionfs.stores.opening import Stores
from unionfs.stores.probe import probe, require_filesystem
from unionfs.stores.references import Lowers
from unionfs.stores.tools import Progress
from unionfs.stores.uppers import UpperCheck
from unionfs.stores.volume import Volume, guarded, open_volume, walk
from unionfs.union import Union

_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Wish:
    """How a store is to be checked."""

    repair: bool = False
    take: bool = False  # from another machine that has not let it go
    lowers: tuple[str, ...] = ()  # locators, top-most first; to follow what leads into them
    ask: Ask | None = (
        None  # for the passphrase of an encrypted upper, which else is not looked into
    )


@dataclass(frozen=True, slots=True)
class _Below:
    """The lowers, open."""

    options: MountOptions
    layers: list[Layer]
    base: Base | None


def examine(text: str, report: Report, wish: Wish, progress: Progress) -> None:
    """Check everything; raises UnionfsError if it cannot be looked at at all."""
    fscrypt_keys.tidy()  # before anything is open where a daemon was killed
    where = locator.parse(text)
    path = find.find(where, search="images")
    if not os.path.exists(path):
        raise UnionfsError(f"there is no {path}", hint="correct the path")
    if not stat.S_ISDIR(os.stat(path).st_mode):
        contents = probe(path)
        require_filesystem(contents)
        refuse_used(contents)
        with guarded(where, contents, when=wish.repair and not wish.take, write=True):
            pass  # nothing is repaired under another machine that uses it
        progress.phase(f"checking the {contents.fstype}")
        if not check_filesystem(contents, report, repair=wish.repair):
            return
    volume = open_volume(text, readonly=not wish.repair, untouched=not wish.repair, search="images")
    try:
        if _is_hidden(volume):
            why = "has the feature encrypt: only root can look at what lies there"
            _not_looked_at(report, "/", why)
            return
        inside = where.directory
        found = [inside] if inside is not None else wrong_areas(volume)
        if inside is None:
            found += [upper.directory for upper in uppers_of(volume)]
        with _opened_lowers(wish.lowers) as below:
            for directory in found:
                _examine_upper(volume, directory, report, wish, below, progress)
    finally:
        volume.close()


def _examine_upper(
    volume: Volume,
    directory: str,
    report: Report,
    wish: Wish,
    below: _Below | None,
    progress: Progress,
) -> None:
    try:
        fd = walk(volume, directory)
    except FileNotFoundError as exc:
        raise UnionfsError(f"{volume.locator.source} has no {directory}") from exc
    upper = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
    os.close(fd)
    try:
        kind = unlocking.kind_of(upper)
        if kind != gocryptfs.KIND:
            _lock(volume, upper, directory, exclusive=wish.repair)
        if kind:
            _check_encrypted(volume, directory, upper, report, wish, below, progress)
            return
        fscrypt.refuse_locked(upper, unlocking.name_of(volume, directory))
        _check_upper(upper, "" if directory == "/" else directory, report, wish, below, progress)
    finally:
        os.close(upper)


def _check_encrypted(
    volume: Volume,
    directory: str,
    cipher: int,
    report: Report,
    wish: Wish,
    below: _Below | None,
    progress: Progress,
) -> None:
    how = unlocking.hides(cipher)
    if how and wish.ask is None:
        what = f"is encrypted ({how}): --key-file or --credential lets it be checked"
        _not_looked_at(report, directory, what)
        return
    with unlocking.shown(volume, directory, cipher, wish.ask, readonly=volume.readonly) as upper:
        _check_upper(upper, "" if directory == "/" else directory, report, wish, below, progress)


def _is_hidden(volume: Volume) -> bool:
    """Whether fuse2fs does not say what in it is encrypted."""
    contents = volume.contents
    if volume.helper is None or contents is None or contents.fstype not in ext.TYPES:
        return False
    return ext.may_be_encrypted(contents.path)


def _not_looked_at(report: Report, directory: str, why: str) -> None:
    report.problems.append(Problem(directory, why))
    report.code |= Code.TROUBLE


def _check_upper(
    upper: int,
    where: str,
    report: Report,
    wish: Wish,
    below: _Below | None,
    progress: Progress,
) -> None:
    owner = holder.read_owner_at(upper)
    if owner is not None and owner.elsewhere(holder.here()) and not wish.take:
        wish = replace(wish, repair=False)  # it may be at work
    check = UpperCheck(upper, where, report)
    told = 0

    def step() -> bool:
        nonlocal told
        progress(check.directories - told)
        told = check.directories
        return False

    check.step = step
    progress.phase("looking at the changes", "directories")
    record = check.area(repair=wish.repair)
    with contextlib.ExitStack() as stack:
        if below is not None and _is_base(upper, where, report, below):
            options = replace(below.options, userxattr=_userxattr(record))
            union = Union(options, below.layers, None, None)
            stack.callback(union.close)
            check.lowers = Lowers(union)
            _check_names(upper, where, report, wish, replace(below, options=options), union)
        check.marks()


def _userxattr(record: Record | None) -> bool | None:
    return None if record is None or record.xattrs is None else record.xattrs == "user"


def _is_base(upper: int, where: str, report: Report, below: _Below) -> bool:
    """Whether nothing says that the upper was made over other lowers."""
    error = identity.mismatch(read_record(upper), below.base, where or "/")
    if error is not None:
        report.notes.append(f"{error.message}: nothing was followed into it")
    return error is None


def _check_names(
    upper: int, where: str, report: Report, wish: Wish, below: _Below, lowers: Union
) -> None:
    """Entries of the index that no name refers to."""
    try:
        area = os.open(AREA_NAME, _OPEN, dir_fd=upper)
    except FileNotFoundError:
        return
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, area)
        base = os.open(".", os.O_PATH | os.O_DIRECTORY, dir_fd=upper)
        top = Layer(where or "/", base, upper=True, mounts=[], detach="no")
        stack.callback(top.close)
        union = Union(replace(below.options, upper=where or "/"), below.layers, top, None)
        stack.callback(union.close)
        for name, what, spare in references.unnamed(area, union, lowers):
            if repair := wish.repair and spare:
                references.set_aside(area, name)
                what += f"; moved to {AREA_NAME}/{references.LOST}"
            report.add(f"{where}/{AREA_NAME}/index/{name}", what, repaired=repair)


def _ask_nobody(store: str) -> bytearray:
    """Lowers are never encrypted."""
    raise AssertionError(store)


@contextlib.contextmanager
def _opened_lowers(texts: Sequence[str]) -> Iterator[_Below | None]:
    """The lowers of a union, as a mount opens them."""
    if not texts:
        yield None
        return
    options = MountOptions(lowers=tuple(texts), mountpoint="/", readonly=True)
    mounts = read_mounts()
    with contextlib.ExitStack() as stack:
        stores = Stores(options, _ask_nobody)
        stack.callback(stores.close)
        stores.open(mounts, readonly=True)
        layers = open_lowers(stores.options.lowers, stores.opened(), mounts, stack)
        yield _Below(options, layers, stores.base)


def _lock(volume: Volume, upper: int, directory: str, *, exclusive: bool) -> None:
    try:
        fcntl.flock(upper, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise unlocking.in_use(volume, directory, upper) from None
