# SPDX-License-Identifier: GPL-2.0-or-later
r"""Unit files for systemd: what a union stands on, how names are written, the units of one mount.

Owns systemd's rules of quoting and naming, which differ from setting to setting.  Writes no file.
Called by `unionfs unit` and by the generator.

    Where=                 % doubled; the rest as it is, to the end of the line
    Options=               $ doubled too
    RequiresMountsFor=     words in quotes; a backslash is a backslash
    ExecStart=             words in double quotes; \\ and \" and bytes as \xHH; % and $ doubled
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from unionfs import locator
from unionfs.errors import UnionfsError, usage_error
from unionfs.option_words import WORDS
from unionfs.options import MountOptions, split_options
from unionfs.runtime import name_of

_LONGEST: Final = 255  # bytes of a unit's name
# What udev keeps in a name below /dev/disk; all else of ASCII becomes \xHH.
_PLAIN_IN_NODES: Final = re.compile(rb"[0-9A-Za-z#+.:=@_\x80-\xff-]")
# Written anew from what they mean, or without a meaning in a unit.
_NOT_KEPT: Final = {"lowers", "upper", "work", "readonly", "ephemeral_size", "fsname", "debug"}
WATCHDOG: Final = "60s"


@dataclass(frozen=True, slots=True)
class Unit:
    """One file."""

    name: str
    text: str


@dataclass(slots=True)
class Needs:
    """What has to be there first: mounts on the way to paths, and devices."""

    paths: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)  # nodes, as udev names them

    @classmethod
    def of(cls, named: Iterable[str]) -> "Needs":
        """Of locators and of paths."""
        needs = cls()
        for text in named:
            if text.startswith("tmpfs:"):
                continue
            if (node := device_node(text)) is not None:
                needs.devices.append(node)
            else:
                needs.paths += _ways(locator.parse(text).value)
        needs.paths = [path for path in dict.fromkeys(needs.paths) if path != "/"]
        needs.devices = list(dict.fromkeys(needs.devices))
        return needs

    def lines(self, *, required: bool) -> list[str]:
        """For [Unit].  Not required: what stands on it waits for it, and starts without it too."""
        units = [unit_name(node, "device") for node in self.devices]
        lines = []
        if self.paths and required:
            lines.append(f"RequiresMountsFor={' '.join(map(quoted_path, self.paths))}")
        elif self.paths:
            # WantsMountsFor= by hand, which systemd has since 256 only.
            units += dict.fromkeys(unit for path in self.paths for unit in _mounts_for(path))
        if units:
            lines.append(f"{'Requires' if required else 'Wants'}={' '.join(units)}")
            lines.append(f"After={' '.join(units)}")
        return lines


def _mounts_for(path: str) -> list[str]:
    """The mounts that could be on the way to a path."""
    parts = path.strip("/").split("/")
    ways = ["/" + "/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return [f"{name_of(way)}.mount" for way in ways]


def device_node(text: str) -> str | None:
    """The node below /dev that a locator names; None if it is a path of something else."""
    where = locator.parse(text)
    if where.tag is not None:
        return f"/dev/disk/by-{where.tag.lower()}/{_encoded(where.value)}"
    return where.value if where.value.startswith("/dev/") else None


def _encoded(value: str) -> str:
    """A label as udev writes it in the name of a link."""
    parts = (bytes([byte]) for byte in os.fsencode(value))
    kept = (part if _PLAIN_IN_NODES.match(part) else b"\\x%02x" % part[0] for part in parts)
    return os.fsdecode(b"".join(kept))


def _ways(path: str) -> list[str]:
    """A path as it is written and as it is without links: mounts may lie on both."""
    found = [] if ".." in path.split("/") else [os.path.normpath(path)]
    return [*found, os.path.realpath(path)]


def unit_name(path: str, kind: str) -> str:
    """As systemd-escape(1) --path --suffix makes it."""
    name = f"{name_of(path)}.{kind}"
    if len(name) > _LONGEST:
        hint = "choose a shorter one, or mount by /etc/fstab"
        raise UnionfsError(f"{path} is too long for the name of a unit", hint=hint)
    return name


def plain(text: str) -> str:
    """For a setting that takes the rest of its line.

    A backslash at the end would join the next line: a path gets a slash, which changes nothing;
    from other text it is taken away.
    """
    if text.endswith("\\"):
        text = f"{text}/" if text.startswith("/") else text.rstrip("\\")
    return _writable(text).replace("%", "%%")


def quoted_path(text: str) -> str:
    """One word of a list in which a backslash means itself."""
    safe = plain(text)
    if not re.search(r"[\s\"']", safe):
        return safe
    parts = re.split('(")', safe)
    return "".join("'\"'" if part == '"' else f'"{part}"' for part in parts if part)


def quoted(text: str) -> str:
    """One word of a command line."""
    safe = _writable(text).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + safe.replace("%", "%%").replace("$", "$$") + '"'


def _writable(text: str) -> str:
    if any(not char.isprintable() and char != " " for char in text):
        hint = "rename it; unit files are lines of UTF-8"
        raise UnionfsError(f"{text!r} cannot be written into a unit", hint=hint)
    return text


@dataclass(frozen=True, slots=True)
class Request:
    """The mount whose units are asked for."""

    options: MountOptions
    words: tuple[str, ...]  # of -o, in escapes

    @property
    def point(self) -> str:
        """Free of links, as systemd wants it."""
        return os.path.realpath(self.options.mountpoint)

    @property
    def nofail(self) -> bool:
        """Whether the boot goes on without it."""
        return "nofail" in self.words

    def head(self) -> list[str]:
        """What the units have in common."""
        options = self.options
        lines = ["[Unit]", f"Description=Union on {plain(self.point)}"]
        lines.append("Documentation=man:unionfs(8)")
        lines += Needs.of([*options.lowers, os.path.dirname(self.point)]).lines(required=True)
        store = Needs.of(place for place in (options.upper, options.work) if place is not None)
        return lines + store.lines(required=options.fallback == "fail")

    def strings(self) -> str:
        """All of it as after -o, without the mount point."""
        options = self.options
        lowers = [_escaped(_written(lower), ",:") for lower in options.lowers]
        words = [f"lowerdir={':'.join(lowers)}"]
        if options.upper is not None:
            words.append(f"upperdir={_escaped(_written(options.upper), ',')}")
        if options.work is not None:
            words.append(f"workdir={_escaped(options.work, ',')}")
        if options.ephemeral:
            size = options.ephemeral_size
            words.append(f"ephemeral={size}" if size else "ephemeral")
        # Last a word without blanks: systemd takes those at the end of a line away.
        return ",".join([*words, *self.words, "ro" if options.readonly else "rw"])


def _written(text: str) -> str:
    r"""A locator; its label without \xHH, as backslashes do not get through everywhere."""
    where = locator.parse(text)
    if where.tag is None or "\\" in where.value:
        return text
    return where.source if where.directory is None else f"{where.source}:{where.directory}"


def _escaped(text: str, special: str) -> str:
    return re.sub(rf"([\\{special}])", r"\\\1", text)


def request(options: MountOptions, strings: Iterable[str]) -> Request:
    """From what a command line says; -o in strings."""
    kept = []
    for item in (item for text in strings for item in split_options(text)):
        word, equals, value = item.partition("=")
        known = WORDS.get(word)
        if known is not None and known.setting in _NOT_KEPT:
            continue
        in_quotes = "," in value.replace("\\,", "") and not word.endswith("idmapping")
        kept.append(f'{word}{equals}"{value}"' if in_quotes else item)
    return Request(options, tuple(kept))


def mount_units(asked: Request, *, automount: bool) -> list[Unit]:
    """A .mount unit, and the one that mounts it when it is used."""
    strings, point = asked.strings(), asked.point
    source = asked.options.fsname or "unionfs"
    _refuse_for_mount(strings, point)
    if source.endswith("\\"):
        raise usage_error("fsname ends in a backslash, which would join lines", "use --service")
    lines = [*asked.head(), "", "[Mount]"]
    lines.append(f"What={plain(source)}")
    lines += [f"Where={plain(point)}", "Type=fuse.unionfs"]
    lines.append(f"Options={plain(strings).replace('$', '$$')}")
    name = unit_name(point, "mount")
    if not automount:
        return [Unit(name, _text(lines, asked.nofail))]
    head = ["[Unit]", f"Description=Union on {plain(point)}, when it is used"]
    auto = [*head, "", "[Automount]", f"Where={plain(point)}"]
    return [
        Unit(name, "\n".join([*lines, ""])),
        Unit(unit_name(point, "automount"), _text(auto, nofail=True)),
    ]


def _refuse_for_mount(strings: str, point: str) -> None:
    """What mount(8) and systemd on the way to our helper would change."""
    reason = None
    if '"' in strings.replace('="', "").replace('",', ""):
        reason = 'has a ", which mount(8) cannot pass on'
    elif "\\\\" in strings:
        reason = "has a backslash, which systemd does not pass on"
    elif re.search(r"\$[${]", point):
        reason = "has a $, which systemd would take for the start of a variable"
    elif point != point.strip():
        reason = "ends in a blank, which systemd takes away"
    if reason is not None:
        raise usage_error(f"a name for {point} {reason}", "use --service")


def service_unit(asked: Request, program: str) -> Unit:
    """The daemon as the main process of a service."""
    point = asked.point
    command = [program, "mount", "-f", "-o", asked.strings(), point]
    if asked.options.fsname is not None:
        command[4] += f",fsname={_escaped(asked.options.fsname, ',')}"
    before = "umount.target" if asked.nofail else "local-fs.target umount.target"
    lines = [
        *asked.head(),
        "DefaultDependencies=no",
        "Wants=modprobe@fuse.service",
        f"After=local-fs-pre.target modprobe@fuse.service {unit_name(point, 'mount')}",
        f"Before={before}",
        "Conflicts=umount.target",
        "IgnoreOnIsolate=yes",
        "",
        "[Service]",
        "Type=notify",
        f"ExecStart={' '.join(map(quoted, command))}",
        "Restart=on-failure",
        f"WatchdogSec={WATCHDOG}",
        "KillMode=mixed",
    ]
    return Unit(f"unionfs-{unit_name(point, 'service')}", _text(lines, asked.nofail))


def _text(lines: Sequence[str], nofail: bool) -> str:
    word = "WantedBy" if nofail else "RequiredBy"
    return "\n".join([*lines, "", "[Install]", f"{word}=local-fs.target", ""])
