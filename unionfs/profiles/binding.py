# SPDX-License-Identifier: GPL-2.0-or-later
"""What of a profile is no union: directories bound in place, empty tmpfs, links.

Owns how each is made.  The file system of a store that is bound stays mounted as long as it is
seen; it is never seen as a whole.
"""

import contextlib
import errno
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import Final

from unionfs import locator, syscalls
from unionfs.errors import UnionfsError
from unionfs.stores import archive, backing
from unionfs.stores.volume import Volume, make_directory, open_volume, walk
from unionfs.syscalls import MountAttr, MountFlag, RenameFlag

log = logging.getLogger("unionfs")

_PATH: Final = os.O_PATH | os.O_NOFOLLOW
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_FILLING: Final = ".filling"


# Of a copy: what is copied, and how many bytes that are.
Shown = Callable[[str, int | None], contextlib.AbstractContextManager[archive.Advance]]


def bind(
    source: str,
    point: str,
    *,
    readonly: bool,
    like: str | None,
    flags: str | None = None,
    shown: Shown | None = None,
) -> None:
    """Have a directory or file that a locator names seen at `point`.

    A directory that is to be written and is not there is made, with the content of `like`;
    `shown`: to somebody who waits for that.
    """
    volume, inside = _reach(source, readonly=readonly, flags=flags)
    try:
        if not readonly:
            _provide(volume, inside, like, shown)
        fd = _open(volume, inside)
        try:
            tree = syscalls.clone_mount(fd)
        finally:
            os.close(fd)
        try:
            if readonly:
                syscalls.set_mount_attributes(tree, MountAttr.RDONLY, MountAttr(0))
            syscalls.attach_mount(tree, point)
        finally:
            os.close(tree)
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"cannot bind {source} on {point}: {reason}") from exc
    finally:
        volume.close()


def _reach(text: str, *, readonly: bool, flags: str | None) -> tuple[Volume, str]:
    """The volume that a locator names, and the place in it; a plain file is no image here."""
    if locator.is_tag(text) or locator.is_directory(text) or not os.path.isfile(text):
        volume = open_volume(text, readonly=readonly, flags=flags)
        return volume, volume.locator.directory or "/"
    folder, name = os.path.split(text)
    return open_volume(folder or "/", readonly=readonly), f"/{name}"


def open_seen(text: str) -> int:
    """Open what a locator names, also a file or a link, to look at it (O_PATH)."""
    if not locator.is_tag(text) and locator.parse(text).directory is None:
        return os.open(text, _PATH)
    volume = open_volume(text, readonly=True)
    try:
        return _open(volume, volume.locator.directory or "/")
    finally:
        volume.close()


def _open(volume: Volume, inside: str) -> int:
    """A directory or a file in a volume; no link is followed."""
    parent, name = os.path.split(inside)
    if not name:
        return walk(volume, "/")
    above = walk(volume, parent)
    try:
        return os.open(name, _PATH, dir_fd=above)
    finally:
        os.close(above)


def _provide(volume: Volume, inside: str, like: str | None, shown: Shown | None) -> None:
    """Make a directory of the store if it is not there, whole or not at all."""
    parent, name = os.path.split(inside)
    if not name:
        return
    above = make_directory(volume, parent, None)
    try:
        os.stat(name, dir_fd=above, follow_symlinks=False)
    except FileNotFoundError:
        _fill(above, name, like, shown)
    finally:
        os.close(above)


def _fill(above: int, name: str, like: str | None, shown: Shown | None) -> None:
    from unionfs.removal import remove_tree

    parent = os.open(".", _DIRECTORY, dir_fd=above)
    try:
        for left in os.listdir(parent):  # of one that was killed
            if left.startswith(f".{name}.") and left.endswith(_FILLING):
                remove_tree(parent, left)
        temporary = f".{name}.{secrets.token_hex(4)}{_FILLING}"
        os.mkdir(temporary, 0o755, dir_fd=parent)
        made = os.open(temporary, _DIRECTORY, dir_fd=parent)
        try:
            if like is not None:
                log.info("filling %s from %s", name, like)
                with _seen(like) as content:
                    _copy(content, f"/proc/{os.getpid()}/fd/{made}", f"filling {name}", shown)
            syscalls.syncfs(made)
        finally:
            os.close(made)
        syscalls.renameat2(parent, temporary, parent, name, RenameFlag.NOREPLACE)
        os.fsync(parent)
    finally:
        os.close(parent)


def _copy(source: str, target: str, what: str, shown: Shown | None) -> None:
    if shown is None:
        archive.copy(source, target, lambda _count: None)
        return
    fd = os.open(source, _DIRECTORY & ~os.O_NOFOLLOW)
    try:
        total = backing.tree_bytes(fd)
    finally:
        os.close(fd)
    with shown(what, total) as advance:
        archive.copy(source, target, advance)


@contextlib.contextmanager
def _seen(text: str) -> Iterator[str]:
    """A path of a directory that a locator names."""
    volume = open_volume(text, readonly=True)
    try:
        fd = walk(volume, volume.locator.directory or "/")
        try:
            yield f"/proc/{os.getpid()}/fd/{fd}"
        finally:
            os.close(fd)
    finally:
        volume.close()


def memory(point: str, name: str, size: str | None, like: str | None) -> None:
    """An empty tmpfs with the owner and mode of a directory of the base."""
    words = [] if size is None else [f"size={size}"]
    if like is not None:
        with _seen(like) as directory:
            status = os.stat(directory)
        words += [f"mode={stat.S_IMODE(status.st_mode):o}", f"uid={status.st_uid}"]
        words.append(f"gid={status.st_gid}")
    else:
        words.append("mode=755")
    syscalls.mount(name, point, "tmpfs", MountFlag.NOSUID | MountFlag.NODEV, ",".join(words))


def links(source: str, point: str) -> None:
    """For each file below `source` a symbolic link at its place below `point`."""
    for folder, _folders, files in os.walk(source):
        place = os.path.normpath(os.path.join(point, os.path.relpath(folder, source)))
        os.makedirs(place, exist_ok=True)
        for file in files:
            target = os.path.join(place, file)
            temporary = f"{target}.{secrets.token_hex(4)}"
            os.symlink(os.path.join(folder, file), temporary)
            os.replace(temporary, target)
