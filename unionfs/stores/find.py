# SPDX-License-Identifier: GPL-2.0-or-later
"""From a tag to the one device or image that has it, waiting for slow ones.

Owns the search and its errors.  Does not open what is found.

Devices are asked one by one, with nothing remembered: neither blkid's cache nor the links below
/dev/disk show two devices with one label.  A user who may not read devices is told what udev says
of them (/dev/disk/by-*), and where the device is mounted already.
"""

import contextlib
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, TypeVar

from unionfs.errors import UnionfsError
from unionfs.locator import Locator, Tag
from unionfs.mounts import MountEntry, read_mounts
from unionfs.stores import loop
from unionfs.stores.probe import Contents, probe

Search = Literal["devices", "images"]
T = TypeVar("T")

_SYSTEM: Final = "/sys/class/block"
_LINKS: Final = "/dev/disk"
_NETLINK_KERNEL_EVENTS: Final = 15  # NETLINK_KOBJECT_UEVENT
_LOOK_AGAIN: Final = 1.0  # seconds: not every way to appear makes an event
_UNREADABLE: Final = ("proc", "sysfs", "cgroup2", "devpts", "mqueue", "autofs")


def block_devices() -> Iterator[str]:
    """The nodes of all devices that hold something and belong to no larger one."""
    try:
        names = sorted(os.listdir(_SYSTEM))
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):
            with open(f"{_SYSTEM}/{name}/size") as file:
                if file.read().strip() == "0":
                    continue
            # A path of a multipath device, a member of a RAID: the whole has the same label.
            if os.listdir(f"{_SYSTEM}/{name}/holders"):
                continue
            node = "/dev/" + name.replace("!", "/")
            if os.path.exists(node):
                yield node


def image_of(device: str) -> str | None:
    """The image that a loop device shows from its beginning, if it can be reached."""
    name = os.path.basename(device)
    if not name.startswith("loop"):
        return None
    try:
        with open(f"{_SYSTEM}/{name}/loop/backing_file", "rb") as file:
            path = os.fsdecode(file.read().removesuffix(b"\n"))
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = loop.bound(fd)
        finally:
            os.close(fd)
        inode = os.stat(path).st_ino  # another mount namespace may have another file there
    except OSError:
        return None
    return path if found is not None and (found.inode, found.offset) == (inode, 0) else None


def image_files(mounts: Iterable[MountEntry]) -> Iterator[str]:
    """*.img in the top directories of mounted file systems."""
    seen: set[str] = set()
    for entry in mounts:
        if entry.fstype in _UNREADABLE or entry.device in seen:
            continue
        seen.add(entry.device)
        try:
            with os.scandir(entry.point) as found:
                names = sorted(e.path for e in found if e.name.endswith(".img") and e.is_file())
        except OSError:
            continue
        yield from names


def value_of(contents: Contents, tag: Tag) -> str:
    """What a device says for this tag."""
    return {
        "LABEL": contents.label,
        "UUID": contents.uuid,
        "PARTLABEL": contents.partlabel,
        "PARTUUID": contents.partuuid,
    }[tag]


def same(tag: Tag, one: str, other: str) -> bool:
    """Whether two values of a tag mean the same."""
    return one.lower() == other.lower() if tag in ("UUID", "PARTUUID") else one == other


def examine(paths: Iterable[str]) -> Iterator[Contents]:
    """Those that can be read and are one thing; the others are nobody's store."""
    for path in paths:
        with contextlib.suppress(UnionfsError):
            yield probe(path)


def _matches(paths: Iterable[str], tag: Tag, value: str) -> list[Contents]:
    found = [c for c in examine(paths) if same(tag, value_of(c, tag), value)]
    return list(once_each(found))


def once_each(contents: Iterable[Contents]) -> Iterator[Contents]:
    """Without all but one of the members of a btrfs of several devices.

    They have one label and one UUID: any member stands for all.
    """
    members: dict[str, set[str]] = {}
    for one in contents:
        if one.fstype == "btrfs" and one.member:
            known = members.setdefault(one.uuid, set())
            if known and one.member not in known:
                continue
            known.add(one.member)
        yield one


def _linked(tag: Tag, value: str) -> str | None:
    """The device that udev shows for a tag."""
    folder = f"{_LINKS}/by-{tag.lower()}"
    name = "".join(
        c if c.isalnum() or c in "#+-.:=@_" or ord(c) > 127 else f"\\x{ord(c):02x}" for c in value
    )
    path = f"{folder}/{name}"
    return os.path.realpath(path) if os.path.lexists(path) else None


def mounted_at(device: str, mounts: Iterable[MountEntry]) -> MountEntry | None:
    """Where the whole of a device's file system is mounted already."""
    try:
        status = os.stat(device)
    except OSError:
        return None
    if not stat.S_ISBLK(status.st_mode):
        return None
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    for entry in mounts:
        same = entry.device == number or os.path.realpath(entry.source) == os.path.realpath(device)
        if same and entry.root == "/":
            return entry
    return None


def look(tag: Tag, value: str, search: Search) -> str | None:
    """The one path that has the tag; None if nothing has; an error if two have."""
    found = [contents.path for contents in _matches(block_devices(), tag, value)]
    if not found and (link := _linked(tag, value)) is not None:
        found = [link]
    if not found and search == "images":
        found = [contents.path for contents in _matches(image_files(read_mounts()), tag, value)]
    if len(found) > 1:
        raise UnionfsError(
            f"{tag}={value} is ambiguous: {' and '.join(found)} have it",
            hint="name one of them by its path or UUID, or give one another label",
        )
    return found[0] if found else None


class NotFound(UnionfsError):
    """Nothing has the tag."""


def find(locator: Locator, *, search: Search = "devices", timeout: float = 0) -> str:
    """The path of what a locator names, waiting up to `timeout` seconds for it."""
    tag = locator.tag
    if tag is None:
        path = os.path.abspath(locator.value)
        if path.startswith("/dev/"):
            wait(lambda: True if os.path.exists(path) else None, timeout)
        return path
    if not locator.value:
        raise UnionfsError(f"{tag}= is empty", hint=f"write {tag}=NAME")
    path = wait(lambda: look(tag, locator.value, search), timeout) or ""
    if not path:
        waited = f" after {timeout:g} s" if timeout else ""
        where = "device or image" if search == "images" else "device"
        hint = "plug it in, wait for it with device-timeout=SECONDS, or see what blkid lists"
        raise NotFound(f"no {where} has {tag}={locator.value}{waited}", hint=hint)
    return path


def wait(attempt: Callable[[], T | None], timeout: float) -> T | None:
    """What `attempt` finds, tried again at each event of a device until the time is over."""
    if (found := attempt()) is not None or timeout <= 0:
        return found
    end = time.monotonic() + timeout
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_KERNEL_EVENTS) as events:
        with contextlib.suppress(OSError):  # refused in some containers: then by the clock
            events.bind((0, 1))
        events.setblocking(False)
        while (left := end - time.monotonic()) > 0:
            if (found := attempt()) is not None:
                return found
            select.select([events], [], [], min(left, _LOOK_AGAIN))
            with contextlib.suppress(OSError):
                while events.recv(65536):
                    pass
    return attempt()
