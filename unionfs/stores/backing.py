# SPDX-License-Identifier: GPL-2.0-or-later
"""Backing up and restoring the changes of one upper, whole or not at all.

Owns which upper is meant, what is read of it, and when that is consistent.

A backup of a mounted store is read while the union works, then everything is looked at again: if
anything changed since the start it is read anew.  After a few attempts writers are held up while
it is read once more (holding.py).  An image that a program has mounted is read by that program too:
so the union may be unmounted meanwhile, and we are the last whom it serves (sharing.py).

A restore unpacks beside the old upper; how it takes its place is for replacing.py.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import os
import resource
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Final

from unionfs import holder, locator, syscalls
from unionfs.errors import InUse, UnionfsError, usage_error
from unionfs.format import AREA_NAME
from unionfs.identity import FILE
from unionfs.mounts import FSTYPE, locate, read_mounts
from unionfs.passphrase import Ask
from unionfs.stores import archive, exchange, foreign, fscrypt, holding, unlocking
from unionfs.stores.archive import Advance, Header
from unionfs.stores.inspect import read_record, uppers_of
from unionfs.stores.mounted import union_of
from unionfs.stores.replacing import replace
from unionfs.stores.volume import (
    Volume,
    lost_and_found,
    make_directory,
    moved_aside,
    open_volume,
    put_back,
    walk,
)
from unionfs.unions import ask_in_child

_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_IMAGES: Final = (".img", ".raw", ".ext4", ".xfs", ".btrfs")  # meant to be one
_ATTEMPTS: Final = 3
PRIVATE: Final = 0o700  # what make_directory() makes
_CLOCK_REALTIME_COARSE: Final = 5  # linux/time.h
_SECOND: Final = 1_000_000_000  # nanoseconds
_TICK: Final = 1_000_000  # less than one of a clock

Read = Callable[[Advance], archive.Trailer]


@dataclass(slots=True)
class Chosen:
    """One upper in a volume."""

    volume: Volume
    directory: str
    fd: int
    in_use: bool  # a union has it
    encrypted: str = ""  # how, if `fd` is a cipher directory
    made: bool = False  # there was nothing before

    @property
    def name(self) -> str:
        """For messages."""
        source = self.volume.locator.source
        alone = self.volume.contents is None and self.directory == "/"
        return source if alone else f"{source}:{self.directory}"

    def not_its_own(self) -> set[str]:
        """The names in it that are its file system's, and no changes."""
        return lost_and_found(self.volume, self.directory, self.fd)

    def in_use_by_a_union(self) -> InUse:
        """The error that it is."""
        return unlocking.in_use(self.volume, self.directory, self.fd)

    def beside(self, name: str) -> str:
        """The name, for messages, of what is kept beside it, or in its area."""
        if name.startswith(f"{AREA_NAME}/"):
            return os.path.join(self.name, name)
        parent = os.path.dirname(self.directory)
        if self.volume.contents is None and parent == self.directory:
            return os.path.join(os.path.dirname(self.volume.mountpoint), name)
        return f"{self.volume.locator.source}:{os.path.join(parent, name)}"


class NoUpper(UnionfsError):
    """A store has nothing where it was looked for."""


@contextlib.contextmanager
def chosen(
    text: str,
    *,
    write: bool,
    make: bool = False,
    ask: Ask | None = None,
    beside: bool = False,
    otherwise: str | None = None,
) -> Iterator[Chosen]:
    """The upper that a locator names; without `:/dir` the only one in the store, or `otherwise`.

    With `write` it must not be in use, and is locked; but `beside`: what is written is not the
    union's.  `make`: it need not be there.  `ask`: for the passphrase of an encrypted one, so that
    it is seen as it is; without it its cipher directory is.
    """
    try:
        volume = open_volume(
            text,
            readonly=not write,
            search="images",
            replay=True,
            guard=True,
            share=not write,
        )
    except InUse as exc:
        exc.shared = not write
        raise
    try:
        directory = volume.locator.directory or _only(volume, otherwise)
        try:
            fd = walk(volume, directory)
        except FileNotFoundError:
            if write and put_back(volume, directory):
                fd = walk(volume, directory)
            elif not write and (aside := moved_aside(volume, directory)) is not None:
                fd = walk(volume, aside)
            elif make:
                fd = make_directory(volume, directory, None)
            else:
                raise NoUpper(f"{volume.locator.source} has no {directory}") from None
        upper = os.open(".", _OPEN, dir_fd=fd)
        os.close(fd)
        try:
            holder.refuse_elsewhere(holder.read_owner_at(upper), f"{volume.locator.text}")
            found = unlocking.kind_of(upper)
            if not found:
                fscrypt.refuse_locked(upper, unlocking.name_of(volume, directory))
            alone = write and not beside
            if found and ask is not None:
                in_use = found == fscrypt.KIND and _lock(upper, write=write)
                if in_use and alone:
                    raise unlocking.in_use(volume, directory, upper)
                with unlocking.shown(volume, directory, upper, ask, readonly=not write) as plain:
                    yield Chosen(volume, directory, plain, in_use)
            else:
                in_use = _lock(upper, write=write)
                if in_use and alone:
                    raise unlocking.in_use(volume, directory, upper)
                if not in_use:
                    if alone:
                        exchange.settle(upper)
                    else:
                        exchange.refuse_cut(upper, unlocking.name_of(volume, directory))
                yield Chosen(volume, directory, upper, in_use, found)
        finally:
            os.close(upper)
    finally:
        volume.close()


@contextlib.contextmanager
def target(text: str, *, missing: str, otherwise: str | None = None) -> Iterator[Chosen]:
    """The upper that a whole one is written to; it need not be there.

    A directory that is not there is made, and is gone again if it was in vain.  `missing`: what
    is to be done if an image is not there.
    """
    where = locator.parse(text)
    new = where.tag is None and not os.path.lexists(where.value)
    if new:
        refuse_misread(text)
    if new and not (locator.is_directory(text) and not where.value.endswith(_IMAGES)):
        raise UnionfsError(f"there is no {where.value}", hint=missing)
    with contextlib.ExitStack() as stack:
        if new:
            stack.enter_context(_made(where.value))
        found = stack.enter_context(chosen(text, write=True, make=True, otherwise=otherwise))
        found.made = new
        yield found


def refuse_misread(text: str) -> None:
    """Raise an error for what is no name of a directory to be made, though it could be one."""
    if text.startswith("tmpfs:"):
        what = f"{text} is memory, which ends with its union"
        raise usage_error(what, f"name a directory, or ./{text} if it is one")
    image, colon, inside = text.partition(":")
    if colon and os.path.isfile(image):
        raise usage_error(f"there is no {text}", f"a directory in it is {image}:/{inside}")


@contextlib.contextmanager
def _made(directory: str) -> Iterator[None]:
    """A new directory, which is not there if it was in vain."""
    try:
        os.mkdir(directory)
    except OSError as exc:
        raise UnionfsError(f"cannot make {directory}: {exc.strerror}") from exc
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.rmdir(directory)
        raise


def _only(volume: Volume, otherwise: str | None) -> str:
    if volume.contents is None:
        return "/"
    found = [upper.directory for upper in uppers_of(volume)]
    if len(found) == 1:
        return found[0]
    source = volume.locator.source
    if found:
        hint = f"name one: {', '.join(f'{source}:{directory}' for directory in found)}"
        raise UnionfsError(f"{source} has the changes of {len(found)} unions", hint=hint)
    if otherwise is not None:
        return otherwise
    hint = "name the directory by :/dir"
    raise UnionfsError(f"{source} has no changes of a union in it", hint=hint)


def _lock(upper: int, *, write: bool) -> bool:
    """Lock it, or tell that a union has it."""
    try:
        fcntl.flock(upper, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def refuse_bound(upper: Chosen) -> None:
    """Raise an error if a copy of an upper would not be encrypted as it is."""
    if upper.encrypted == fscrypt.KIND:
        what = "is encrypted by fscrypt: a copy would be in plain text"
        hint = "copy the image or device that it lies in, while nobody has it mounted"
        raise UnionfsError(f"{upper.name} {what}", hint=hint)


def refuse_target(upper: Chosen, folder: str) -> None:
    """A backup in the store would be in itself, and must not wait for writers to be let go on.

    `folder`: what it is to lie in.
    """
    try:
        place = os.open(folder, _OPEN & ~os.O_NOFOLLOW)
    except OSError as exc:
        raise UnionfsError(f"cannot open {folder}: {os.strerror(exc.errno or 0)}") from exc
    try:
        where = _own_place(upper, place)
    finally:
        os.close(place)
    if where:
        hint = "write it to another place, on no file system of the union"
        raise UnionfsError(f"the backup would lie in {where} itself", hint=hint)


def _own_place(upper: Chosen, place: int) -> str:
    """The store or the union that an open directory belongs to; empty if it does to none."""
    mounts = read_mounts()
    number = os.fstat(place).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    for entry in mounts:
        if entry.fstype == FSTYPE and entry.device == device:
            return entry.point
    if upper.volume.contents is not None:
        own = number == os.fstat(upper.fd).st_dev
    else:
        inner, outer = locate(place, mounts), locate(upper.fd, mounts)
        own = inner is not None and outer is not None and inner.inside(outer)
    return upper.name if own else ""


def backup(upper: Chosen, target: IO[bytes], advance: Advance) -> archive.Trailer:
    """Archive one upper, as it was at one moment."""
    record = read_record(upper.fd)
    base = None
    if record is not None and record.base is not None:
        base = {"name": record.base.name, "told": str(record.base)}
    header = Header(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        store=upper.name,
        id=record.uuid if record is not None else None,
        base=base,
        encrypted=upper.encrypted,
        bytes=tree_bytes(upper.fd),
    )
    path = f"/proc/{os.getpid()}/fd/{upper.fd}"

    def read(advance: Advance) -> archive.Trailer:
        target.seek(0)
        target.truncate()
        return archive.write(target, header, path, advance, upper.not_its_own())

    _raise_limit()
    if not upper.in_use:
        return read(advance)
    for _ in range(_ATTEMPTS):
        start = _settle(upper.fd, shared=upper.volume.shared)
        with contextlib.suppress(archive.Changed):
            trailer = read(advance)
            if not changed_since(upper.fd, start):
                return trailer
    if upper.volume.contents is None or upper.volume.shared:
        return _read_while_held(upper, read, advance)
    with holding.frozen(upper.fd, upper.name) as beat:
        return read(_both(beat, advance))


def _read_while_held(upper: Chosen, read: Read, advance: Advance) -> archive.Trailer:
    """Read what the daemon of a union writes to, while it keeps those waiting who change it.

    It may end meanwhile, even be killed, and another one begin.
    """
    for _ in range(_ATTEMPTS):
        union = union_of(upper.volume.path, upper.directory)
        if union is None:  # it was unmounted: so it stays while we read
            area = f"/proc/self/fd/{upper.fd}/{AREA_NAME}"
            holder.lock(upper.fd, fcntl.LOCK_SH, upper.name, area)
            return read(advance)
        _write_out(union.point)
        with (
            contextlib.suppress(holding.Ended, archive.Changed),
            holding.held(union.point, upper.name) as beat,
        ):
            start = _settle(upper.fd, shared=upper.volume.shared)
            trailer = read(_both(beat, advance))
            if not changed_since(upper.fd, start, beat):  # by passthrough, or through a mapping
                return trailer
    raise UnionfsError(f"{upper.name} changes all the time", hint=holding.HINT)


def _both(beat: holding.Beat, advance: Advance) -> Advance:
    def step(count: int) -> None:
        beat()
        advance(count)

    return step


def _raise_limit() -> None:
    """A directory has a descriptor while what it has is looked at."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _write_out(point: str) -> None:
    """What is stored to mapped files of a union is not held up: so it is written before."""

    def question() -> bytes:
        syscalls.syncfs(os.open(point, os.O_RDONLY | os.O_DIRECTORY))
        return b""

    ask_in_child(question, holding.PATIENCE)


def _settle(fd: int, *, shared: bool) -> int:
    """The time from which on changes are later than now, and none before.

    By the clock that inodes get their ctime from, or a later one within the same tick: so a new
    tick of it is waited for.  What a program has mounted (`shared`) shows whole seconds.  Then what
    is held back is written: a page that was stored to gets a new ctime once it is stored to again.
    """
    before = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    if shared:
        syscalls.syncfs(fd)  # changes a ctime too
        before = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) // _SECOND * _SECOND + _SECOND - 1
    while (now := time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)) <= before:
        time.sleep(max(before - now, _TICK) / _SECOND)
    if not shared:
        syscalls.syncfs(fd)
    return before + 1 if shared else now


def _walk(fd: int) -> Iterator[os.stat_result]:
    stack = [os.open(".", _OPEN, dir_fd=fd)]
    top = True
    try:
        while stack:
            current = stack.pop()
            try:
                yield os.fstat(current)
                with os.scandir(current) as entries:
                    found = [(e.name, e.is_dir(follow_symlinks=False)) for e in entries]
                for name, is_directory in found:
                    if top and name == AREA_NAME:
                        continue
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                        if is_directory:
                            stack.append(os.open(name, _OPEN, dir_fd=current))
                        else:
                            yield os.stat(name, dir_fd=current, follow_symlinks=False)
                top = False
            finally:
                os.close(current)
    finally:
        for left in stack:
            os.close(left)


def changed_since(fd: int, start: int, beat: holding.Beat = lambda: None) -> bool:
    """Whether anything in a tree was changed, made or removed: its ctime, or its directory's."""
    for status in _walk(fd):
        beat()
        if status.st_ctime_ns >= start:
            return True
    return False


def tree_bytes(fd: int) -> int:
    """About how long an archive of a tree will be."""
    return sum(
        1024 + (status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0)
        for status in _walk(fd)
    )


def place_of(header: Header) -> str | None:
    """Where what a backup has lies in a file system: where it lay, or as a mount would have it."""
    from unionfs.stores.base import default_directory

    _, directory = locator.cut(header.store)
    name = header.base.get("name") if header.base is not None else None
    if directory is None and name and "/" not in name and name not in (".", ".."):
        return default_directory(name)
    return directory


def restore(
    upper: Chosen, source: IO[bytes], path: str, advance: Advance, *, keep: bool
) -> str | None:
    """Put what a backup has in the place of an upper; where the old one is kept, if it is."""
    header = archive.read_header(source, path)
    if upper.encrypted and not header.encrypted:
        hint = "restore it to a store that is not, and encrypt that: unionfs store encrypt"
        raise UnionfsError(f"{upper.name} is encrypted, but {path} is not", hint=hint)
    trailer = archive.read_trailer(source, path)

    def fill(into: str) -> None:
        archive.extract(source, trailer, path, into, advance)
        if (own := _own_id(upper, header)) != header.id:
            give_id(into, own)

    return replace(
        upper,
        fill,
        keep=keep and not upper.made,
        hint=foreign.BY_KEEP,
        encrypted=bool(header.encrypted),
    )


def _own_id(upper: Chosen, header: Header) -> str | None:
    """The id of what is restored to a place: that of the store there, or of one called the same.

    Anywhere else it is one more store, as a clone is.
    """
    record = read_record(upper.fd)
    if record is not None:
        return record.uuid
    return header.id if header.store == upper.name else str(uuid.uuid4())


def give_id(into: str, own: str | None) -> None:
    """Have a copy of an upper be a store of its own; one that nobody can read stays as it is."""
    fd = os.open(into, os.O_RDONLY | os.O_DIRECTORY)
    try:
        record = read_record(fd)
    finally:
        os.close(fd)
    if record is not None:
        changed = dataclasses.replace(record, uuid=own or str(uuid.uuid4()))
        with open(f"{into}/{AREA_NAME}/{FILE}", "w", encoding="utf-8") as file:
            file.write(changed.text())
