# SPDX-License-Identifier: GPL-2.0-or-later
"""Which directories may be united, and on which mount point: all checks that only look.

Owns the rules below.  Does not own opening layers (layer.py) nor what concerns /dev/fuse and
fusermount3 (session.py).  Called by daemon.py before anything is made or changed.

Nesting.  An upper (or work directory) must not be visible in a lower, nor a lower in the upper:
the union would change the layer it reads.  What counts is the place in the file system, not the
path: `unionfs mount / UPPER MNT` is fine with UPPER on a tmpfs or a disk of its own, since a lower
is seen without what is mounted beneath it; and it is refused with UPPER on the root file system,
also through a bind mount, as kernel overlayfs refuses it.

The mount point may lie in a lower (it is not seen there either) or be one, as with kernel
overlayfs: the directory is then changed in place, and the lower is what was there before.  It may
not lie in the upper nor be it.
"""

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from unionfs import syscalls
from unionfs.errors import UnionfsError
from unionfs.format import AREA_NAME, CIPHER_CONFIG
from unionfs.layer import Layer, layer_error
from unionfs.mounts import FSTYPE, MountEntry, Position, locate, topmost
from unionfs.options import MountOptions
from unionfs.unions import ask

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY

LOWER: Final = "lower directory"
UPPER: Final = "upper directory"
# Layers on file systems that only the daemon sees, by kind and name.
Opened = Mapping[tuple[str, str], Layer]
NONE_OPENED: Final[Opened] = {}


@dataclass(frozen=True, slots=True)
class Place:
    """A directory to compare with others: its identity, and where it lies if that is known."""

    name: str  # as its user is told: "upper /data/up"
    identity: tuple[int, int]
    position: Position | None
    ancestors: frozenset[tuple[int, int]]

    def same(self, other: "Place") -> bool:
        return self.identity == other.identity

    def inside(self, other: "Place") -> bool:
        """Whether this lies below `other`, or is it."""
        if self.position is not None and other.position is not None:
            return self.position.inside(other.position)
        return other.identity in self.ancestors


def place_of(name: str, fd: int, mounts: Sequence[MountEntry]) -> Place:
    """Describe the open directory `fd`."""
    position = locate(fd, mounts)
    status = os.fstat(fd)
    # In a chroot that is no mount point of its own the position is not known: walk up instead.
    ancestors = _ancestors(fd) if position is None else frozenset()
    return Place(name, (status.st_dev, status.st_ino), position, ancestors)


def _ancestors(fd: int) -> frozenset[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    current = os.dup(fd)
    try:
        while True:
            status = os.fstat(current)
            identity = (status.st_dev, status.st_ino)
            if identity in found:
                return frozenset(found)
            found.add(identity)
            parent = os.open("..", _DIRECTORY, dir_fd=current)
            os.close(current)
            current = parent
    finally:
        os.close(current)


def _place_of_path(kind: str, path: str, mounts: Sequence[MountEntry], opened: Opened) -> Place:
    if (layer := opened.get((kind, path))) is not None:
        return Place(f"{kind} {path}", (layer.dev, layer.ino), layer.position, frozenset())
    try:
        fd = os.open(path, _DIRECTORY)
    except OSError as exc:
        raise layer_error(kind, path, exc) from exc
    try:
        return place_of(f"{kind} {path}", fd, mounts)
    finally:
        os.close(fd)


def check_layers(
    options: MountOptions, mounts: Sequence[MountEntry], opened: Opened = NONE_OPENED
) -> None:
    """Refuse layers that are doubled, nested or in use by kernel overlayfs."""
    lowers = [_place_of_path(LOWER, path, mounts, opened) for path in options.lowers]
    for number, lower in enumerate(lowers):
        for earlier in lowers[:number]:
            if lower.same(earlier):
                raise UnionfsError(
                    f"the {lower.name} is named twice", hint="leave one of the two out"
                )
    if options.upper is None:
        return
    upper = _place_of_path(UPPER, options.upper, mounts, opened)
    changed = [upper]
    if options.work is not None and not options.readonly:
        changed.append(_place_of_path("work directory", options.work, mounts, opened))
    for lower in lowers:
        if lower.same(upper):
            raise UnionfsError(
                f"the {upper.name} is also a lower", hint="a layer can be only one of the two"
            )
        for place in changed:
            _refuse_nesting(lower, place)
    if not options.readonly:
        _check_kernel_overlay(upper, mounts)


def check_new_upper(
    options: MountOptions,
    above: int,
    below: str,
    mounts: Sequence[MountEntry],
    opened: Opened,
    position: Position | None = None,
) -> None:
    """Refuse an upper that is to be made at a path below an open directory, in a lower.

    `position`: that of the directory, if it is on a file system that only we see.
    """
    found = place_of(f"{UPPER} {options.upper}", above, mounts)
    position = position or found.position
    if position is not None:
        position = Position(position.device, os.path.normpath(os.path.join(position.path, below)))
    ancestors = _ancestors(above) if position is None else frozenset()
    upper = Place(found.name, (-1, -1), position, ancestors)
    for path in options.lowers:
        _refuse_nesting(_place_of_path(LOWER, path, mounts, opened), upper)


def refuse_key(options: MountOptions) -> None:
    """Called for an upper that is not encrypted: who has a key for it would write in plain text
    what he means to hide."""
    if options.key_file is not None or options.credential is not None:
        word = "key-file=" if options.key_file is not None else "credential="
        hint = f"encrypt it (unionfs store encrypt), name one that is by :/dir, or leave {word} out"
        raise UnionfsError(f"{options.upper or 'the upper'} is not encrypted", hint=hint)


def refuse_cipher_directory(path: str) -> None:
    """Of an upper that is to be read only, in a directory."""
    if not os.path.lexists(f"{path}/{AREA_NAME}") and may_be_encrypted(path):
        raise only_upper(path)


def may_be_encrypted(path: str) -> bool:
    """Whether an upper in a directory is worth a closer look, by stores/."""
    if os.path.lexists(f"{path}/{CIPHER_CONFIG}"):
        return True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False  # whoever opens it for good says why not
    try:
        if not syscalls.is_encrypted(fd):
            return False
        from unionfs.stores import fscrypt

        return fscrypt.is_encrypted(fd) or fscrypt.is_locked(fd)
    finally:
        os.close(fd)


def only_upper(name: str) -> UnionfsError:
    """Of an encrypted directory: as a lower it would show what nobody can read."""
    return UnionfsError(f"{name} is encrypted, and can only be an upper", hint="mount it as one")


def _refuse_nesting(lower: Place, changed: Place) -> None:
    if changed.inside(lower):
        raise UnionfsError(
            f"the {changed.name} lies inside the {lower.name}",
            hint="put it beside the lower, or on another file system (a tmpfs, an image, a disk)",
        )
    if lower.inside(changed):
        raise UnionfsError(
            f"the {lower.name} lies inside the {changed.name}",
            hint="choose an upper that does not contain a lower",
        )


def _check_kernel_overlay(upper: Place, mounts: Sequence[MountEntry]) -> None:
    """The kernel takes no lock that others can see: look at its mounts."""
    for entry in mounts:
        if entry.fstype != "overlay":
            continue
        for word in entry.options.split(","):
            key, _, path = word.partition("=")
            if key != "upperdir":
                continue
            try:
                status = os.stat(path)
            except OSError:
                continue  # a path of another root directory or namespace
            if (status.st_dev, status.st_ino) == upper.identity:
                raise UnionfsError(
                    f"the {upper.name} is in use by kernel overlayfs mounted on {entry.point}",
                    hint="unmount that first, or choose another upper",
                )


def check_mountpoint(
    options: MountOptions, mounts: Sequence[MountEntry], opened: Opened = NONE_OPENED
) -> str:
    """The mount point's path, free of symlinks; an error if nothing may be mounted there."""
    path = options.mountpoint
    real = os.path.realpath(path)
    entry = topmost(real, mounts)
    if entry is not None and entry.fstype == FSTYPE and ask(entry, mounts).state != "dead":
        raise UnionfsError(
            f"{path} is already the mount point of a union",
            hint=f"unionfs umount {path} ends it",
        )
    # systemd mounts where its own automount waits: to open that would wait for ourselves.
    automount = entry is not None and entry.fstype == "autofs"
    try:
        fd = os.open(path, os.O_PATH if automount else os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise _mountpoint_error(path, exc) from exc
    try:
        place = place_of(f"mount point {path}", fd, mounts)
        over_itself = _check_mountpoint_place(options, place, mounts, opened)
        if not (over_itself or options.nonempty or automount) and os.listdir(fd):
            raise UnionfsError(
                f"the mount point {path} is not empty",
                hint="choose an empty directory, or hide what is there with -o nonempty",
            )
    finally:
        os.close(fd)
    return real


def _mountpoint_error(path: str, exc: OSError) -> UnionfsError:
    hints = {
        errno.ENOENT: f"create it: mkdir -p {path}",
        errno.ENOTDIR: "a union is mounted on a directory",
        errno.ENOTCONN: f"a FUSE file system died there: unmount it first (fusermount3 -u {path})",
        errno.EACCES: "the mount point must be readable by the user who mounts",
    }
    code = exc.errno or errno.EIO
    return UnionfsError(f"cannot mount on {path}: {os.strerror(code)}", hint=hints.get(code))


def _check_mountpoint_place(
    options: MountOptions, point: Place, mounts: Sequence[MountEntry], opened: Opened
) -> bool:
    """Refuse a place in or at the upper; whether it is that of a lower."""
    hint = "choose another mount point"
    if options.upper is not None:
        upper = _place_of_path(UPPER, options.upper, mounts, opened)
        if point.same(upper):
            raise UnionfsError(f"the {point.name} is also the {upper.name}", hint=hint)
        if point.inside(upper):
            raise UnionfsError(f"the {point.name} lies inside the {upper.name}", hint=hint)
    return any(point.same(_place_of_path(LOWER, p, mounts, opened)) for p in options.lowers)


def mark_careful(layers: Sequence[Layer], point: str, mounts: Sequence[MountEntry]) -> None:
    """A lower that could not be detached must not be walked into the union mounted in it."""
    fd = os.open(point, os.O_PATH)
    try:
        place = locate(fd, mounts)
    finally:
        os.close(fd)
    for layer in layers:
        if layer.detached:
            continue
        if place is None or layer.position is None or place.inside(layer.position):
            layer.careful = True
