# SPDX-License-Identifier: GPL-2.0-or-later
"""What systemd is told of profiles and of the kernel's command line, at each boot and reload.

Owns the links and drop-ins; the service itself is unionfs@.service, which is installed.  Opens no
store and looks at no device: a generator holds up the whole boot (systemd.generator(7)).  Called by
`unionfs generate`, which unionfs-generator starts.

    local-fs.target.wants/unionfs@NAME.service       (.requires/ with fallback=fail)
    local-fs.target.wants/unionfs-degraded@root.service    if the initramfs missed the store
    unionfs@NAME.service.d/50-profile.conf           what it stands on, and what comes first
    DEVICE.device.d/50-unionfs.conf                  how long the device is waited for
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from unionfs.boot import devices, order, units
from unionfs.boot.cmdline import parse_cmdline
from unionfs.boot.units import Needs, unit_name
from unionfs.errors import UnionfsError, printable
from unionfs.options import split_options
from unionfs.profiles import files
from unionfs.profiles.profile import Profile
from unionfs.profiles.reading import read_whole

TARGET: Final = "local-fs.target"
INITRD: Final = "/etc/initrd-release"
BOOT_SERVICE: Final = "unionfs-boot.service"
_DEGRADED: Final = "unionfs-degraded"
_UNIT_PLACES: Final = ("etc/systemd/system", "run/systemd/system", "usr/local/lib/systemd/system")
_LIBRARY: Final = ("usr/lib/systemd/system", "lib/systemd/system")


def generate(place: str, *, cmdline: str, root: str = "/") -> list[str]:
    """Write units into the directory `place`; one line for whatever could not be done."""
    if os.path.exists(os.path.join(root, INITRD.lstrip("/"))):
        return _in_initrd(place, cmdline)
    problems: list[str] = []
    asked = parse_cmdline(cmdline).profile
    names = [name for name in files.names(root) if not name.endswith("@")]
    if asked is not None and asked not in names:
        names.append(asked)
    profiles = _read(names, root, problems)
    fstab = _fstab(root)
    earlier = order.earlier(profiles)
    for profile in profiles:
        name = profile.name
        with _told(name, problems):
            lines = [*drop_in(profile), *_order(profile, earlier[name], fstab)]
            _write_profile(place, profile, lines, start=profile.boot or name == asked)
    for name in _degraded(root):
        _link(place, f"{TARGET}.wants", f"{_DEGRADED}@{name}.service")
    return problems


@contextlib.contextmanager
def _told(name: str, problems: list[str]) -> Iterator[None]:
    """One profile that is wrong keeps no other away."""
    try:
        yield
    except (UnionfsError, OSError) as exc:
        line = exc.line() if isinstance(exc, UnionfsError) else str(exc)
        problems.append(printable(f"profile {name}: {line}"))


def _read(names: Iterable[str], root: str, problems: list[str]) -> list[Profile]:
    found = []
    for name in names:
        with _told(name, problems):
            found.append(files.said(name, root))
    # The initramfs has brought up what covers the root; nobody can take it down.
    return [profile for profile in found if not profile.covers_root]


def _fstab(root: str) -> bytes:
    with contextlib.suppress(OSError):
        return read_whole(os.path.join(root, "etc/fstab"))
    return b""


def _order(profile: Profile, earlier: Sequence[str], fstab: bytes) -> list[str]:
    """Among other mounts, where one of them covers what the other is about."""
    after = [f"unionfs@{name}.service" for name in earlier]
    before = []
    for place in order.mounted_over(profile, fstab):
        with contextlib.suppress(UnionfsError):  # too long for a unit: systemd has none either
            before += [unit_name(place, "mount"), unit_name(place, "automount")]
    lines = [f"After={' '.join(after)}"] if after else []
    return [*lines, f"Before={' '.join(before)}"] if before else lines


def _degraded(root: str) -> list[str]:
    """What runs without its store already: the root, or the profile that covers it.

    At a later reload also what is mounted since.  Its unit is started then or not, as it was.
    """
    place = os.path.join(root, "run/unionfs")
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(place))
        return [n for n in names if ":" not in n and os.path.exists(f"{place}/{n}/degraded")]
    return []


def _in_initrd(place: str, cmdline: str) -> list[str]:
    """There it is the root that is mounted, as far as the command line asks for it."""
    if parse_cmdline(cmdline).asked:
        _link(place, "initrd-root-fs.target.requires", BOOT_SERVICE)
    return []


def _write_profile(place: str, profile: Profile, lines: Sequence[str], *, start: bool) -> None:
    service = f"unionfs@{profile.name}.service"
    if start:
        kind = "requires" if _must_come_up(profile) else "wants"
        _link(place, f"{TARGET}.{kind}", service)
    _write(place, f"{service}.d/50-profile.conf", lines)
    seconds = _seconds(_option(profile.options, "device-timeout"))
    for unit in devices.drop_ins(_store(profile), seconds, "50-unionfs.conf"):
        _write(place, unit.name, unit.text.splitlines())


def drop_in(profile: Profile) -> list[str]:
    """What the service of a profile stands on, and when it is started."""
    lines = [f"# of {units.plain(', '.join(profile.files))}", "[Unit]"]
    if profile.description:
        lines.append(f"Description={units.plain(profile.description)}")
    store = _store(profile)
    needed = [name for name in profile.needs() if name not in store]
    lines += Needs.of(needed).lines(required=True)
    lines += Needs.of(store).lines(required=_must_come_up(profile))
    # A path's own file system, such as a partition on /var; the path itself may be a mount point.
    ways = map(os.path.dirname, profile.points())
    lines += Needs.of(ways).lines(required=not profile.nofail)
    points = [unit_name(point, "mount") for point in profile.points() if point != "/"]
    if points:
        # So it is the service that unmounts them at the end, in its order.
        lines.append(f"After={' '.join(points)}")
    if not profile.nofail:
        lines.append(f"Before={TARGET}")
    return lines


def _must_come_up(profile: Profile) -> bool:
    """Whether a boot ends without it: only if that is written.  Else it fails, and is seen to."""
    return _option(profile.options, "fallback") == "fail" and not profile.nofail


def _store(profile: Profile) -> list[str]:
    """Where the changes are: what can be missing."""
    uppers = [rule.upper for rule in profile.rules if rule.upper is not None]
    return [*([profile.store] if profile.store is not None else []), *uppers]


def _option(options: Iterable[str], wanted: str) -> str | None:
    for item in (item for text in options for item in split_options(text)):
        word, _, value = item.partition("=")
        if word == wanted:
            return value
    return None


def _seconds(text: str | None) -> float | None:
    """None also if it is no number: the service says that."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _link(place: str, directory: str, service: str) -> None:
    target = _installed(f"{service.partition('@')[0]}@.service" if "@" in service else service)
    os.makedirs(f"{place}/{directory}", exist_ok=True)
    os.symlink(target, f"{place}/{directory}/{service}")


def _installed(unit: str) -> str:
    """Where a unit of ours was put."""
    paths = [f"/{place}/{unit}" for place in (*_UNIT_PLACES, *_LIBRARY)]
    return next((path for path in paths if os.path.exists(path)), f"/{_LIBRARY[0]}/{unit}")


def _write(place: str, name: str, lines: Sequence[str]) -> None:
    path = os.path.join(place, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join([*lines, ""]))
