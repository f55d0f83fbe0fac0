# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounting a device or an image by the kernel, where nobody else sees it.

Owns the choice of flags and the words for what the kernel refuses.  The mount is attached nowhere:
it goes, with its loop device, when its last descriptor is closed, however the process ends.
"""

import contextlib
import errno
import logging
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from unionfs import syscalls
from unionfs.errors import ExitCode, InUse, UnionfsError, usage_error
from unionfs.option_words import ignored_by_prefix
from unionfs.stores import find, loop, users
from unionfs.stores.probe import Contents
from unionfs.syscalls import MountAttr

log = logging.getLogger("unionfs")
T = TypeVar("T")

_LOWER: Final = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV | MountAttr.NOATIME
_UPPER: Final = MountAttr.NOSUID | MountAttr.NODEV
# Of fstab, what a mount takes and no file system; and what is so anyway, or makes no difference to
# a mount that nobody sees.
_ATTRIBUTES: Final = {
    "noatime": MountAttr.NOATIME,
    "noexec": MountAttr.NOEXEC,
    "nodiratime": MountAttr.NODIRATIME,
    "strictatime": MountAttr.STRICTATIME,
    **dict.fromkeys(("rw", "nosuid", "nodev", "relatime", "norelatime"), MountAttr(0)),
    **dict.fromkeys(("suid", "dev", "exec", "atime", "diratime", "silent", "loud"), MountAttr(0)),
}
# What mount(8) keeps to itself, and what it leaves to others who read fstab (x-*, comment=).
_OF_MOUNT: Final = (
    *("defaults", "auto", "noauto", "nofail", "_netdev", "comment", "helper", "uhelper"),
    *("user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup"),
)
# What the kernel says of a flag that the file system does not take.
_WRONG_FLAG: Final = re.compile(r"(?:.*: )?(?:Unknown parameter|Bad value for) '([^']*)'")
# Of a file system that was not unmounted, mounted without writing to it.
_NO_REPLAY: Final = {
    "ext3": "noload",
    "ext4": "noload",
    "xfs": "norecovery",
    "btrfs": "norecovery",
}
_PATIENCE: Final = 3  # seconds
_FSCK: Final = "repair it: fsck"
_READ_ONLY: Final = ("squashfs", "erofs", "iso9660")
# What file systems answer when they do not understand what is on the device.
_DAMAGED: Final = (errno.EINVAL, errno.EUCLEAN, errno.EIO, errno.EBADMSG, errno.EFBIG, errno.ENOENT)


def may_mount() -> bool:
    """Whether the kernel mounts devices for us: root, and not only of a user namespace."""
    if os.geteuid() != 0:
        return False
    try:
        with open("/proc/self/uid_map") as file:
            return file.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return True


@dataclass(frozen=True, slots=True)
class Flags:
    """Options of fstab, sorted by who takes them: the file system, or the mount."""

    values: dict[str, str]
    words: tuple[str, ...]
    attributes: MountAttr


def read_flags(text: str) -> Flags:
    """Of A,B=C; raises UnionfsError for what would take the writing away."""
    values, words, attributes = {}, [], MountAttr(0)
    for item in filter(None, text.split(",")):
        word, equals, value = item.partition("=")
        if word in _OF_MOUNT or ignored_by_prefix(word):
            continue
        if word == "ro":
            raise usage_error(f"the flag ro of a store ({text})", "mount the union with --ro")
        if equals:
            values[word] = value
        elif word in _ATTRIBUTES:
            attributes |= _ATTRIBUTES[word]
        else:
            words.append(word)
    return Flags(values, tuple(words), attributes)


def mount(
    contents: Contents,
    *,
    readonly: bool,
    untouched: bool = False,
    replay: bool = False,
    flags: str | None = None,
) -> tuple[int, str]:
    """The root of a private mount, and its device.

    `flags`: as in fstab, of one that is writable.

    With readonly: `untouched`, a journal is never replayed; `replay`, it is if that can be done.
    Else it is not replayed into an image, since that is opened for reading only.
    """
    path = contents.path
    if not readonly and contents.fstype in _READ_ONLY:
        what = f"{path}: {contents.fstype} cannot be written to"
        raise UnionfsError(what, hint="use ext4 for the upper")
    writable = not readonly or (replay and os.access(path, os.W_OK))

    def attempt() -> tuple[int, str]:
        if stat.S_ISBLK(os.stat(path).st_mode):
            return _mount(contents, path, readonly=readonly, untouched=untouched, text=flags), path
        held = loop.attach(path, readonly=not writable)
        try:
            root = _mount(contents, held.path, readonly=readonly, untouched=untouched, text=flags)
            return root, held.path
        finally:
            os.close(held.fd)  # from here on the mount holds it

    return _patiently(contents, attempt) if writable else attempt()


def attach(contents: Contents) -> loop.Loop:
    """A writable loop device for an image."""
    return _patiently(contents, lambda: loop.attach(contents.path, readonly=False))


def _patiently(contents: Contents, attempt: Callable[[], T]) -> T:
    """What somebody only looks at, as `unionfs store list` does, is free again in a moment."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return attempt()
        except InUse as exc:
            if time.monotonic() >= end:
                raise _told(contents, exc) from exc
        time.sleep(0.02)


def _mount(
    contents: Contents, device: str, *, readonly: bool, untouched: bool, text: str | None
) -> int:
    source = {"source": device}
    if not readonly:
        asked = read_flags(text or "")
        values, attributes = source | asked.values, _UPPER | asked.attributes
        try:
            return syscalls.private_mount(contents.fstype, values, asked.words, attributes)
        except OSError as exc:
            raise _refused(contents, device, exc, readonly=readonly) from exc
    attempts: list[tuple[str, ...]] = [("ro",)]
    if contents.fstype in _NO_REPLAY:
        attempts.append(("ro", _NO_REPLAY[contents.fstype]))
        if untouched:
            del attempts[0]
    for flags in attempts:
        try:
            if len(flags) > 1 and not untouched:
                log.warning("%s was not unmounted; its journal is not replayed", contents.path)
            return syscalls.private_mount(contents.fstype, source, flags, _LOWER)
        except OSError as exc:
            if exc.errno == errno.EBUSY:  # it is mounted writable elsewhere: then so, and read-only
                return _mount_beside(contents, device)
            if exc.errno != errno.EROFS or flags == attempts[-1]:
                raise _refused(contents, device, exc, readonly=readonly) from exc
    raise AssertionError("the last attempt returns or raises")


def _mount_beside(contents: Contents, device: str) -> int:
    try:
        return syscalls.private_mount(contents.fstype, {"source": device}, (), _LOWER)
    except OSError as exc:
        raise _refused(contents, device, exc, readonly=True) from exc


def _twin(contents: Contents, device: str) -> str | None:
    """Another device with the same file system: xfs refuses two at once."""
    others = [path for path in find.block_devices() if path != device]
    return next((c.path for c in find.examine(others) if c.uuid == contents.uuid), None)


def _told(contents: Contents, exc: InUse) -> InUse:
    """The error, with who has the file system mounted read-only, if that is seen."""
    path = contents.path
    with contextlib.suppress(OSError):
        for device in _devices_of(path):
            words = [_NO_REPLAY[contents.fstype]] if contents.fstype in _NO_REPLAY else []
            # The same mount once more, if there is one.
            source = {"source": device}
            root = syscalls.private_mount(contents.fstype, source, ("ro", *words), _LOWER)
            try:
                by = users.who(os.fstat(root).st_dev)
            finally:
                os.close(root)
            if by:
                hint = "unmount it there, or wait until it is not looked at any more"
                return InUse(path, path, f"read-only {by}", hint=hint)
    return exc


def _devices_of(path: str) -> list[str]:
    """The device itself, or the loop devices of an image."""
    if stat.S_ISBLK(os.stat(path).st_mode):
        return [path]
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [device for device, _ in loop.devices_of(fd)]
    finally:
        os.close(fd)


def _refused(contents: Contents, device: str, exc: OSError, *, readonly: bool) -> UnionfsError:
    path = contents.path
    code = exc.errno or errno.EIO
    said = exc.strerror or os.strerror(code)
    what = f"cannot mount the {contents.fstype} of {contents.path}"
    if code == errno.ENODEV:
        hint = f"load its module (modprobe {contents.fstype}), or use another file system"
        return UnionfsError(
            f"{what}: this kernel has no {contents.fstype}", hint=hint, code=ExitCode.SYSTEM
        )
    if code == errno.ENOSYS:
        hint = "Linux 5.2 or later is needed; mount it first and name the directory"
        return UnionfsError(f"{what}: this kernel is too old", hint=hint, code=ExitCode.SYSTEM)
    if code == errno.EBUSY:
        hint = "unmount it there first"
        return InUse(path, path, "" if readonly else "read-only", hint=hint)
    if code in (errno.EROFS, errno.EACCES):
        hint = "it must be writable; a mount can do without, by --ro"
        return UnionfsError(f"{what}: {os.strerror(code)}", hint=hint if not readonly else _FSCK)
    if contents.fstype == "xfs" and code == errno.EINVAL and (twin := _twin(contents, device)):
        hint = f"unmount that one, or give the copy a UUID of its own: xfs_admin -U generate {path}"
        return UnionfsError(f"{what}: {twin} has the same UUID and is in use", hint=hint)
    if (wrong := _WRONG_FLAG.match(said)) is not None:
        hint = f"correct the flags of the store: {contents.fstype}(5) and mount(8) have them"
        return usage_error(f"{what} with the flag {wrong[1]}: {said.rpartition(': ')[2]}", hint)
    if code in _DAMAGED:
        if said.startswith(("fsconfig", "fsmount")):
            said = os.strerror(code)
        hint = f"check it: unionfs store check {contents.path}"
        return UnionfsError(f"{what}: it is damaged ({said})", hint=hint)
    return UnionfsError(f"{what}: {said}")
