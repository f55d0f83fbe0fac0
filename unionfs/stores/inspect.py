# SPDX-License-Identifier: GPL-2.0-or-later
"""What stores there are, and what lies in them.

Owns the look: file systems are mounted privately and read-only, without replaying their journals.
Called by `unionfs store list` and `info`.

Uppers are looked for where unionfs makes them: the root of a file system, its directories, and
/persistent_NAME/ARCH.  What is kept of one (kept.py) is none: it is told of with the one that it
was kept of, and where only that is left, there is an upper without anything.
"""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from unionfs import identity
from unionfs.errors import UnionfsError
from unionfs.format import AREA_NAME
from unionfs.holder import Owner, here, read_owner_at
from unionfs.identity import StoreRecord, parse_store
from unionfs.mounts import read_mounts
from unionfs.stores import find, fscrypt, gocryptfs, kernel, unlocking
from unionfs.stores import kept as names
from unionfs.stores.mounted import Mounted, mounted_unions
from unionfs.stores.probe import refuse_kind
from unionfs.stores.volume import Volume, open_volume, walk
from unionfs.unions import integer

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_MOUNTABLE = ("ext2", "ext3", "ext4", "xfs", "btrfs")


@dataclass(slots=True)
class Kept:
    """What was taken away from an upper, and is kept."""

    directory: str  # within the store; beside one that is a directory: ../NAME
    date: str  # ISO 8601, local
    encrypted: str = ""
    size: int | None = None  # what it takes on the disk, if it was counted

    @property
    def in_area(self) -> bool:
        """Whether it is some paths, or what could not be beside it."""
        return os.path.basename(os.path.dirname(self.directory)) == AREA_NAME

    def shown(self, store: str) -> str:
        """For people, who are told of a store by its path already."""
        beside = self.directory.startswith("../")
        return os.path.normpath(f"{store}/{self.directory}") if beside else self.directory

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "directory": self.directory,
            "date": self.date,
            "size": self.size,
            "encrypted": self.encrypted or None,
        }


@dataclass(slots=True)
class Upper:
    """One directory with changes in a store."""

    directory: str  # within the store
    record: StoreRecord | None
    owner: Owner | None = None  # who holds it, or has not let it go
    mounted: str = ""  # the mount point of its union
    encrypted: str = ""  # how; then nothing else is known of it, unless it is unlocked
    over: str = ""  # the base of a union that has it
    kept: list[Kept] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        record = self.record
        base = record.base if record is not None else None
        return {
            "directory": self.directory,
            "id": record.uuid if record is not None else None,
            "created": record.created if record is not None else None,
            "used": record.used if record is not None else None,
            "base": None
            if base is None
            else {"name": base.name, "told": str(base), "path": base.path},
            "mounted": self.mounted or None,
            "elsewhere": self.elsewhere() or None,
            "encrypted": self.encrypted or None,
            "kept": [kept.facts() for kept in self.kept],
        }

    def base_shown(self) -> str:
        """The base for people: of a directory its path, which is all that is known of it."""
        base = self.record.base if self.record is not None else None
        if base is None:
            return self.over or "-"
        return base.path if base.kind == "directory" else base.name

    def elsewhere(self) -> str:
        """The other machine that has it, or has not let it go."""
        other = self.owner is not None and self.owner.elsewhere(here())
        return self.owner.who() if other and self.owner is not None else ""


@dataclass(slots=True)
class Store:
    """A place that can hold uppers."""

    kind: str  # directory, image, device
    path: str
    fstype: str = ""
    label: str = ""
    uuid: str = ""
    size: int | None = None  # of the file system
    free: int | None = None
    allocated: int | None = None  # of the image: what it takes on its own disk
    uppers: list[Upper] = field(default_factory=list)
    problem: str = ""  # why nothing is known of what lies in it
    asked: bool = False  # it was named itself, not a place that it is in

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        used = None if self.size is None or self.free is None else self.size - self.free
        return {
            "kind": self.kind,
            "path": self.path,
            "fstype": self.fstype or None,
            "label": self.label or None,
            "uuid": self.uuid or None,
            "size": self.size,
            "used": used,
            "free": self.free,
            "allocated": self.allocated,
            "uppers": [upper.facts() for upper in self.uppers],
            "problem": self.problem or None,
        }


def read_record(upper: int) -> StoreRecord | None:
    """AREA/store of the open directory `upper`; None if there is none that is understood."""
    path = f"/proc/self/fd/{upper}/{AREA_NAME}/{identity.FILE}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
            return parse_store(file.read(65536), path)
    except (OSError, UnionfsError):
        return None


def find_uppers(root: int) -> Iterator[Upper]:
    """The uppers on the file system of the open directory `root`."""
    top = upper_at(root, "/")
    if top is not None:
        yield top
    # Below an upper, what is called as if it were kept is its own.
    for name, upper in _uppers_in(root, "/", keeps=top is None):
        if upper is not None:
            yield upper
        if name.startswith("persistent_"):
            with _opened(root, name) as fd:
                if fd >= 0:
                    yield from (u for _, u in _uppers_in(fd, f"/{name}") if u is not None)


def _uppers_in(parent: int, path: str, *, keeps: bool = True) -> Iterator[tuple[str, Upper | None]]:
    """Each directory in an open one, and the upper that it is."""
    found = directories(parent)
    there = [name for name in found if not names.is_temporary(name)]
    if keeps:
        # Also what is not there: only what is kept of it, or itself moved aside by who was killed.
        parts = (names.split(name) for name in there)
        of_others = {part[0] for part in parts if part is not None}
        there = [name for name in there if names.split(name) is None]
        there += sorted(of_others - set(there))
        there += sorted(names.all_moved_aside(found) - set(there))
    for name in there:
        directory = os.path.join(path, name)
        place = name if name in found else names.moved_aside(found, name) or name
        with _opened(parent, place) as fd:
            upper = None if fd < 0 else upper_at(fd, directory)
        if keeps:
            kept = list(kept_beside(parent, found, directory, plain=upper is None))
            if kept:
                upper = upper or Upper(directory, None)
                upper.kept = sorted([*kept, *upper.kept], key=lambda k: k.date)
        yield name, upper


def kept_beside(parent: int, found: list[str], directory: str, *, plain: bool) -> Iterator[Kept]:
    """What is kept of an upper; of what is `plain` only what was one."""
    for name in names.of(found, os.path.basename(directory)):
        with _opened(parent, name) as fd:
            was = None if fd < 0 else upper_at(fd, directory)
        if was is None and plain:
            continue
        encrypted = "" if was is None else was.encrypted
        parts = names.split(name)
        assert parts is not None
        where = os.path.join(os.path.dirname(directory), name)
        yield Kept(where, names.told(parts[1]), encrypted)


def upper_at(fd: int, directory: str) -> Upper | None:
    """The upper that an open directory is."""
    kind = unlocking.kind_of(fd)
    if kind == gocryptfs.KIND or (kind and fscrypt.is_locked(fd)):
        return Upper(directory, None, encrypted=kind)
    try:
        status = os.stat(AREA_NAME, dir_fd=fd, follow_symlinks=False)
    except OSError:
        return None
    if not stat.S_ISDIR(status.st_mode):
        return None
    with _opened(fd, AREA_NAME) as area:  # not everybody may
        dates = {n: names.date_in_area(n) for n in sorted(directories(area))}
    inside = os.path.join(directory, AREA_NAME)
    kept = [Kept(f"{inside}/{n}", names.told(date)) for n, date in dates.items() if date]
    return Upper(directory, read_record(fd), read_owner_at(fd), encrypted=kind, kept=kept)


def directories(fd: int) -> list[str]:
    """The names of the directories in an open one, but for an area."""
    try:
        with os.scandir(fd) as entries:
            return sorted(
                e.name for e in entries if e.name != AREA_NAME and e.is_dir(follow_symlinks=False)
            )
    except OSError:
        return []


@contextlib.contextmanager
def _opened(parent: int | None, name: str) -> Iterator[int]:
    """A directory below; -1 if it cannot be opened."""
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
    except OSError:
        yield -1
        return
    try:
        yield fd
    finally:
        os.close(fd)


def uppers_of(volume: Volume) -> list[Upper]:
    """The uppers in a volume."""
    root = os.open(".", _DIRECTORY, dir_fd=volume.root)
    try:
        return list(find_uppers(root))
    finally:
        os.close(root)


def wrong_areas(volume: Volume) -> list[str]:
    """Directories that would be uppers, if what has the name of their area were a directory."""
    with _opened(volume.root, ".") as root:
        places = ["/", *(f"/{name}" for name in directories(root))]
        for name in directories(root):
            if name.startswith("persistent_"):
                with _opened(root, name) as fd:
                    places += [f"/{name}/{below}" for below in directories(fd)] if fd >= 0 else []
        return [place for place in places if _has_wrong_area(root, place)]


def _has_wrong_area(root: int, place: str) -> bool:
    try:
        status = os.stat(f".{place}/{AREA_NAME}", dir_fd=root, follow_symlinks=False)
    except OSError:
        return False
    return not stat.S_ISDIR(status.st_mode)


def owners(volume: Volume) -> list[tuple[str, Owner]]:
    """Who holds the uppers in a volume, or has not let them go; by their directories."""
    return [(u.directory, u.owner) for u in uppers_of(volume) if u.owner is not None]


def disk_bytes(fd: int) -> int:
    """How much an open directory and what is below it takes on the disk, as far as it is seen."""
    total = os.fstat(fd).st_blocks * 512
    seen = set()
    with contextlib.suppress(OSError), os.scandir(fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                with _opened(fd, entry.name) as below:
                    total += disk_bytes(below) if below >= 0 else 0
                continue
            status = entry.stat(follow_symlinks=False)
            if status.st_nlink == 1 or status.st_ino not in seen:
                total += status.st_blocks * 512
            seen.add(status.st_ino)
    return total


def look(text: str, unions: Sequence[Mounted], *, sizes: bool = False) -> Store:
    """One store, by its locator; `sizes`: also how much what is kept takes."""
    from unionfs import locator

    where = locator.parse(text)
    path = find.find(where, search="images")
    store = _outside(path)
    holders = [union for union in unions if union.alone and union.lies_in(path)]
    if holders and kernel.may_mount():  # the image of an ordinary user
        _told(store, holders, where.directory)
        return store
    try:
        volume = open_volume(text, readonly=True, untouched=True, share=True, search="images")
    except UnionfsError as exc:
        if holders:
            _told(store, holders, where.directory)
        else:
            store.problem = exc.line()
        return store
    try:
        try:
            _inside(store, volume)
        except UnionfsError as exc:
            store.problem = exc.line()
            return store
        if sizes:
            for kept in (kept for upper in store.uppers for kept in upper.kept):
                with _opened(volume.root, kept.directory.removeprefix("/")) as fd:
                    kept.size = disk_bytes(fd) if fd >= 0 else None
    finally:
        volume.close()
    for union in holders:
        if where.directory in (None, union.directory):
            _add_told(store, union)
    for upper in store.uppers:
        number = upper.record.uuid if upper.record is not None else None
        for union in unions:
            if union.has(path, upper.directory, number):
                upper.mounted, upper.over = union.point, union.facts.get("lowers", [""])[-1]
    return store


def _add_told(store: Store, union: Mounted) -> None:
    """What a union tells of its upper, if that is not found: by its place, or encrypted."""
    told = _told_upper(union)
    for upper in store.uppers:
        if upper.directory == told.directory:
            upper.record = upper.record or told.record
            return
    store.uppers.append(told)


def _told(store: Store, unions: Sequence[Mounted], inside: str | None) -> None:
    """What unions tell of their store, which we cannot look into meanwhile; `inside`: only of one
    directory."""
    first = unions[0]
    store.fstype, store.label, store.uuid = (
        str(first.store.get(name) or "") for name in ("fstype", "label", "uuid")
    )
    store.size, store.free = (integer(first.facts, name) for name in ("size", "free"))
    store.uppers = [_told_upper(u) for u in unions if inside in (None, u.directory)]


def _told_upper(union: Mounted) -> Upper:
    record = identity.parse_told(union.store)
    how = str(union.store.get("encrypted") or "")
    over = union.facts.get("lowers", [""])[-1]
    return Upper(union.directory or "/", record, None, union.point, how, over)


def _outside(path: str) -> Store:
    try:
        status = os.stat(path)
    except OSError as exc:
        reason = os.strerror(exc.errno or 0)
        raise UnionfsError(f"cannot open {path}: {reason}", hint="correct the path") from exc
    if stat.S_ISDIR(status.st_mode):
        return Store("directory", path)
    if stat.S_ISBLK(status.st_mode):
        return Store("device", path)
    refuse_kind(path, status.st_mode)
    return Store("image", path, allocated=status.st_blocks * 512)


def _inside(store: Store, volume: Volume) -> None:
    if volume.contents is not None:
        store.fstype = volume.contents.fstype
        store.label = volume.contents.label
        store.uuid = volume.contents.uuid
    root = os.open(".", _DIRECTORY, dir_fd=volume.root)
    try:
        space = os.fstatvfs(root)
        store.size = space.f_blocks * space.f_frsize
        store.free = space.f_bavail * space.f_frsize
        inside = volume.locator.directory
        store.uppers = list(find_uppers(root)) if inside is None else _only(volume, inside)
    finally:
        os.close(root)
    if store.kind == "directory":
        _keep_in_sight(store, volume)


def _only(volume: Volume, inside: str) -> list[Upper]:
    """The upper in one directory, which must be there."""
    try:
        fd = walk(volume, inside)
    except FileNotFoundError:
        raise UnionfsError(f"{volume.locator.source} has no {inside}") from None
    try:
        found = [upper for upper in uppers_of(volume) if upper.directory == inside]
        upper = None if found else upper_at(fd, inside)  # not where they are looked for
        return found if upper is None else [upper]
    finally:
        os.close(fd)


def _keep_in_sight(store: Store, volume: Volume) -> None:
    """What is kept of a directory that is an upper itself lies beside it."""
    path = os.path.realpath(volume.mountpoint)
    for upper in store.uppers:
        if upper.directory != "/" or path == "/":
            continue
        with _opened(None, os.path.dirname(path)) as fd:
            found = [] if fd < 0 else directories(fd)
            name = os.path.basename(path)
            kept = list(kept_beside(fd, found, f"../{name}", plain=False))
        upper.kept = sorted([*kept, *upper.kept], key=lambda k: k.date)


def _images_in(place: str) -> list[str]:
    with os.scandir(place) as entries:
        return sorted(e.path for e in entries if e.name.endswith(".img") and e.is_file())


def _everywhere(unions: Iterable[Mounted], named: Iterable[str]) -> Iterator[str]:
    """What is `named`, what unions have as their store, and images and devices that can be one.

    A loop device on an image is that image.
    """
    places = [*named, *(union.place for union in unions)]
    yield from (place for place in places if os.path.isdir(place))
    nodes = [*(place for place in places if not os.path.isdir(place)), *find.block_devices()]
    devices = (find.image_of(node) or node for node in nodes)
    found = find.examine(_each([*devices, *find.image_files(read_mounts())]))
    yield from (one.path for one in find.once_each(found) if one.fstype in _MOUNTABLE)


def _each(paths: Iterable[str]) -> Iterator[str]:
    """Every path, but none twice, by whatever link."""
    seen = set()
    for path in paths:
        real = os.path.realpath(path)
        if real not in seen:
            seen.add(real)
            yield path


def find_stores(places: Sequence[str], named: Iterable[str] = ()) -> Iterator[Store]:
    """Those at the places, or in the images in them; without places all that have an upper.

    `named`: paths to look at besides then.  What was told with one directory is no other.
    """
    unions = mounted_unions()
    if places:
        named = (p for place in places for p in _with_images(place))
        for path in _each(named):
            store = look(path, unions)
            store.asked = path in places
            if store.uppers or store.kind != "directory":
                yield store
        return
    told = set()
    for path in _each(_everywhere(unions, named)):
        if os.path.realpath(path) in told:
            continue
        with contextlib.suppress(UnionfsError):  # gone, or it cannot be reached from here
            store = look(path, unions)
            if store.kind == "directory":
                told |= {os.path.realpath(f"{path}/{u.directory}") for u in store.uppers}
            if store.uppers:
                yield store


def _with_images(place: str) -> Iterator[str]:
    yield place
    if os.path.isdir(place):
        yield from _images_in(place)
