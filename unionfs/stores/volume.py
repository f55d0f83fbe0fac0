# SPDX-License-Identifier: GPL-2.0-or-later
"""A mounted file system in which a layer lies, and the directories inside it.

Owns what is done before one is mounted (its owner, errors it has noted), and that no link leads out
of it.  Used by all that opens a store: opening.py for a mount, the verbs, and profiles.
"""

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from unionfs import holder, locator
from unionfs.errors import UnionfsError, usage_error
from unionfs.holder import Owner
from unionfs.locator import Locator
from unionfs.mounts import filesystem_at, read_mounts
from unionfs.stores import ext, find, kept, kernel, loop, userspace
from unionfs.stores.fscrypt_keys import Key
from unionfs.stores.probe import Contents, probe, refuse_kind, require_filesystem

log = logging.getLogger("unionfs")

_LOST_AND_FOUND: Final = "lost+found"
_KEEPS_LOST: Final = (*ext.TYPES, "xfs")
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(slots=True)
class Volume:
    """A mounted file system in which a layer lies, or a directory as if it were one."""

    locator: Locator
    contents: Contents | None  # None: a directory
    device: str
    root: int  # O_PATH; -1 once closed
    readonly: bool
    helper: userspace.Helper | None = None
    mountpoint: str = ""  # of a directory: where it is seen
    keys: list[Key] = field(default_factory=list)  # of what was unlocked in it

    @property
    def shared(self) -> bool:
        """Whether a program has mounted it that serves others too."""
        return self.helper is not None and self.helper.share is not None

    @property
    def path(self) -> str:
        """The image, device or directory that was found."""
        return self.contents.path if self.contents is not None else self.device

    def path_of(self, inside: str) -> str:
        """A directory in a volume that is seen somewhere."""
        return (
            os.path.join(self.mountpoint, inside.lstrip("/")) if inside != "/" else self.mountpoint
        )

    def close(self) -> None:
        """Let it go; the layers on it are closed by now.  A second call does nothing."""
        if self.root >= 0:
            os.close(self.root)
            self.root = -1
        if self.helper is not None:
            self.helper.close()
        while self.keys:  # after all that is open in there
            self.keys.pop().close()

    def facts(self) -> dict[str, object]:
        """For the status."""
        told: dict[str, object] = {"locator": self.locator.text, "device": self.device}
        if self.contents is not None:
            told |= {
                "source": self.contents.path,
                "fstype": self.contents.fstype,
                "label": self.contents.label,
                "uuid": self.contents.uuid,
                "mounted_by": "kernel" if self.helper is None else self.helper.name,
            }
        return told


def open_volume(
    text: str,
    *,
    readonly: bool,
    search: find.Search = "devices",
    timeout: float = 0,
    untouched: bool = False,
    replay: bool = False,
    flags: str | None = None,
    guard: bool = False,
    share: bool = False,
) -> Volume:
    """Find, examine and mount what a locator names; `flags`: as in fstab, if it is writable.

    With readonly: `untouched`, to look: no journal is replayed, nobody is waited for; `replay`, to
    read what was written last: a journal is replayed.  `guard`: not if another machine has it.
    `share`: together with the other unions of an ordinary user, as root does anyway.
    """
    where = locator.parse(text)
    path = find.find(where, search=search, timeout=timeout)
    try:
        mode = os.stat(path).st_mode
    except OSError as exc:
        raise _missing(where, path, exc) from exc
    if stat.S_ISDIR(mode):
        return _seen(where, path, path, readonly=readonly)
    refuse_kind(path, mode)
    if not kernel.may_mount() and (entry := find.mounted_at(path, read_mounts())) is not None:
        return _seen(where, path, entry.point, readonly=readonly)
    contents = probe(path)
    require_filesystem(contents)
    if (
        not readonly
        and kernel.may_mount()
        and contents.fstype in ext.TYPES
        and ext.has_errors(path)
    ):
        with guarded(where, contents, when=guard, write=True):
            pass
        _mend(path)
    with guarded(where, contents, when=guard, write=replay or not readonly):
        return _mount(
            where,
            contents,
            readonly=readonly,
            untouched=untouched,
            replay=replay,
            flags=flags,
            share=share,
        )


def _mount(
    where: Locator,
    contents: Contents,
    *,
    readonly: bool,
    untouched: bool,
    replay: bool,
    flags: str | None = None,
    share: bool = False,
) -> Volume:
    if kernel.may_mount():
        root, device = kernel.mount(
            contents, readonly=readonly, untouched=untouched, replay=replay, flags=flags
        )
        return Volume(where, contents, device, root, readonly)
    if flags is not None:
        what = f"only root mounts {contents.path} with flags ({flags})"
        raise usage_error(what, "leave store-flags out")
    if (replay or not readonly) and contents.fstype in ext.TYPES:
        ext.refuse_encrypted(contents.path)
    patience = 0.0 if untouched else userspace.LOCK_SECONDS
    replay = replay and not untouched
    helper = userspace.start(
        contents, readonly=readonly, patience=patience, replay=replay, share=share
    )
    return Volume(where, contents, contents.path, helper.root, readonly, helper)


@contextlib.contextmanager
def guarded(where: Locator, contents: Contents, *, when: bool, write: bool) -> Iterator[None]:
    """Raise an error if another machine has an upper in this file system, before it is mounted.

    Mounted so that it could be written to, its journal would be replayed under that machine.
    `write`: whether that is what comes next; the loop device of an image is the same for both.
    """
    with contextlib.ExitStack() as stack:
        clean = contents.fstype in ext.TYPES and ext.was_unmounted(contents.path)
        if when and not clean:
            # A look at what is damaged, or in use here, fails: who mounts it then is told.
            found: list[tuple[str, Owner]] = []
            with contextlib.suppress(UnionfsError):
                write = write and os.access(contents.path, os.W_OK)
                if kernel.may_mount() and stat.S_ISREG(os.stat(contents.path).st_mode):
                    # To release it takes a while.
                    held = loop.attach(contents.path, readonly=not write)
                    stack.callback(os.close, held.fd)
                found = _owners(where, contents, write=write)
            for directory, owner in found:
                holder.refuse_elsewhere(owner, f"{where.source}:{directory}")
        yield


def _owners(where: Locator, contents: Contents, *, write: bool) -> list[tuple[str, Owner]]:
    """Who holds, or held, the uppers in a file system that is not to be changed."""
    from unionfs.stores.inspect import owners

    volume = _mount(where, contents, readonly=True, untouched=True, replay=write, share=True)
    try:
        return owners(volume)
    finally:
        volume.close()


def _mend(path: str) -> None:
    """A file system that has noted an error is checked before it is used again."""
    from unionfs.stores.checking import refuse_used

    refuse_used(probe(path), patience=userspace.LOCK_SECONDS)
    if ext.preen(path):
        log.info("%s had errors, which were corrected", path)


def _seen(where: Locator, device: str, point: str, *, readonly: bool) -> Volume:
    root = os.open(point, os.O_PATH | os.O_DIRECTORY)
    return Volume(where, None, device, root, readonly, mountpoint=point)


def _missing(where: Locator, path: str, exc: OSError) -> UnionfsError:
    reason = os.strerror(exc.errno or errno.EIO)
    if path.startswith("/dev/"):
        hint = "plug it in, or wait for it with device-timeout=SECONDS"
        return UnionfsError(f"no device {path}: {reason}", hint=hint)
    return UnionfsError(f"cannot open {where.text}: {reason}", hint="correct the path")


def walk(volume: Volume, inside: str) -> int:
    """Open a directory inside, following no link: it could lead out of the store."""
    fd = os.dup(volume.root)
    for name in inside.strip("/").split("/"):
        if not name:
            continue
        try:
            below = os.open(name, _DIRECTORY, dir_fd=fd)
        except FileNotFoundError:
            raise
        except OSError as exc:
            wrong = (
                "is a symbolic link" if exc.errno == errno.ELOOP else os.strerror(exc.errno or 0)
            )
            hint = "name a directory that is reached without links"
            raise UnionfsError(
                f"cannot open {inside} in {volume.locator.source}: {name} {wrong}", hint=hint
            ) from exc
        finally:
            os.close(fd)
        fd = below
    return fd


def lost_and_found(volume: Volume, inside: str, directory: int) -> set[str]:
    """What the file system has in its own root for fsck: no change of any union.

    Of the open `directory`; as a set of names that has it, or has nothing.
    """
    if inside != "/":
        return set()
    if volume.contents is not None:
        fstype = volume.contents.fstype
    else:
        entry = filesystem_at(volume.mountpoint, read_mounts())
        fstype = "" if entry is None else entry.fstype
    with contextlib.suppress(OSError):
        status = os.stat(_LOST_AND_FOUND, dir_fd=directory, follow_symlinks=False)
        if fstype in _KEEPS_LOST and stat.S_ISDIR(status.st_mode):
            return {_LOST_AND_FOUND}
    return set()


def moved_aside(volume: Volume, inside: str) -> str | None:
    """Where a directory is that is not there: moved aside by a verb that was killed.

    Where two directories cannot be exchanged (fuse2fs), the old one is moved away before the new
    one takes its place; killed in between, the old one is what there is.
    """
    parent, name = os.path.split(inside)
    try:
        opened = walk(volume, parent)
    except FileNotFoundError:
        return None
    top = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=opened)
    os.close(opened)
    try:
        aside = kept.moved_aside(os.listdir(top), name)
    finally:
        os.close(top)
    return None if aside is None else os.path.join(parent, aside)


def put_back(volume: Volume, inside: str) -> bool:
    """Whether a directory that is not there was moved aside; it is in its place again then."""
    aside = moved_aside(volume, inside)
    if aside is None:
        return False
    top = walk(volume, os.path.dirname(inside))
    try:
        names = os.path.basename(aside), os.path.basename(inside)
        os.rename(*names, src_dir_fd=top, dst_dir_fd=top)
    finally:
        os.close(top)
    log.info("%s:%s was put back: a restore had been killed", volume.locator.source, inside)
    return True


def make_directory(volume: Volume, inside: str, like: os.stat_result | None) -> int:
    """Make a directory inside, with those above it, 0700; itself as the base's root."""
    names = [name for name in inside.split("/") if name]
    fd = os.dup(volume.root)
    try:
        for number, name in enumerate(names):
            last = number == len(names) - 1
            made = False
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=fd)
                made = True
            below = os.open(name, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
            if made and last and like is not None:
                _become(fd, like)
        return fd
    except OSError as exc:
        os.close(fd)
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"cannot make {inside} in {volume.locator.source}: {reason}") from exc


def _become(fd: int, like: os.stat_result) -> None:
    path = f"/proc/self/fd/{fd}"
    if os.geteuid() == 0:
        os.chown(path, like.st_uid, like.st_gid)
    os.chmod(path, stat.S_IMODE(like.st_mode))
