# SPDX-License-Identifier: GPL-2.0-or-later
"""What a mount was asked for: read once, checked once, then one frozen MountOptions.

Owns how -o strings are cut into words, which words may stand together, and what the positional
arguments of a mount mean.  The words themselves are in option_words.py.  Looks at no file: whether
a layer exists is for layer.py.  Called by the verbs of cli/; MountOptions goes down to the union.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast

from unionfs.errors import UnionfsError, usage_error
from unionfs.locator import is_tag
from unionfs.option_words import (
    IGNORED,
    KERNEL_FLAGS,
    REFUSED,
    TIME_WORDS,
    WORDS,
    IdRange,
    ignored_by_prefix,
    read_size,
)

__all__ = ["TIME_WORDS", "IdRange", "MountOptions", "OptionReader", "split_layers", "split_options"]

MAPPING_TAIL = re.compile(r"[0-9]+(:[0-9]+)*")
# Sloppiness is for words that do not matter; a layer always does.
NEVER_SLOPPY = frozenset({"datadir+"})


@dataclass(frozen=True, kw_only=True, slots=True)
class MountOptions:
    """One mount, as asked for.  Paths are absolute, not resolved, in surrogateescape.

    A layer is a locator (locator.py): a path, or LABEL=... and the like.
    """

    lowers: tuple[str, ...]  # top-most first
    mountpoint: str
    upper: str | None = None
    work: str | None = None  # None with an upper: UPPER/.unionfs
    readonly: bool = False
    ephemeral: bool = False
    ephemeral_size: str | None = None  # as tmpfs takes it: 512M, 50%
    foreground: bool = False
    debug: bool = False
    sloppy: bool = False

    fsname: str | None = None
    subtype: str = "unionfs"
    allow_other: bool | None = None  # None: as root yes, as a user no
    allow_root: bool = False
    only: tuple[int, int] | None = None  # uid, gid: nobody else may use it, not even root
    nonempty: bool = False  # the mount point may hold files
    auto_unmount: bool = False
    max_read: int | None = None
    kernel_flags: frozenset[str] = frozenset()  # a subset of option_words.KERNEL_FLAGS

    redirect_dir: bool = True
    metacopy: bool = True
    index: bool = True
    fsync: Literal["auto", "strict", "volatile"] = "auto"
    userxattr: bool | None = None  # None: user.* unless trusted.* can be written
    whiteout: Literal["auto", "char", "wh"] = "auto"

    timeout: float | None = None  # seconds the kernel may remember names; None: for ever
    lower_live: bool = False  # others change the lower layers under the mount

    uidmapping: tuple[IdRange, ...] = ()
    gidmapping: tuple[IdRange, ...] = ()
    squash_to_uid: int | None = None
    squash_to_gid: int | None = None
    xattr_permissions: int = 0
    noacl: bool = False
    noxattrs: bool = False
    static_nlink: bool = False
    driver: Literal["engine", "pyfuse3"] = "engine"
    passthrough: Literal["auto", "all", "off"] = "auto"  # what the kernel reads by itself
    io_uring: bool = True  # where the kernel allows it

    device_timeout: float | None = None  # seconds to wait for a device to appear; None: not at all
    search: Literal["devices", "images"] = "devices"  # where the tag of a locator is looked for
    fallback: Literal["fail", "ro", "tmpfs"] = "fail"  # if the upper cannot be used
    on_mismatch: Literal["refuse", "ro", "ignore"] = "refuse"  # if it was made over another base
    other_machine: Literal["refuse", "take"] = "refuse"  # an upper that another one has, or had
    low_water: str | None = None  # of the upper's file system: 512M, 5%; None: 5% of a store's own
    autogrow: str | None = None  # up to this size an image grows by itself
    name: str | None = None  # in /run/unionfs; None: after the mount point
    store_flags: str | None = None  # for mounting the upper's file system, as in fstab
    waited: bool = False  # who mounts has waited for the devices: see profiles/waiting.py
    holds_root: bool = False  # the running system's root is to be this union: see boot/aside.py
    degraded: str | None = (
        None  # why it is mounted, in memory, without the store that was asked for
    )
    key_file: str | None = None  # with the passphrase of an encrypted upper; `-`: standard input
    credential: str | None = None  # of systemd, with the same; None of both: somebody is asked


class _Fields(TypedDict, total=False):
    """The fields of MountOptions that a word sets just so."""

    upper: str
    work: str
    ephemeral_size: str
    foreground: bool
    debug: bool
    sloppy: bool
    fsname: str
    subtype: str
    allow_other: bool
    allow_root: bool
    only: tuple[int, int]
    nonempty: bool
    auto_unmount: bool
    max_read: int
    redirect_dir: bool
    metacopy: bool
    index: bool
    fsync: Literal["auto", "strict", "volatile"]
    userxattr: bool
    whiteout: Literal["auto", "char", "wh"]
    timeout: float
    lower_live: bool
    uidmapping: tuple[IdRange, ...]
    gidmapping: tuple[IdRange, ...]
    squash_to_uid: int
    squash_to_gid: int
    xattr_permissions: int
    noacl: bool
    noxattrs: bool
    static_nlink: bool
    driver: Literal["engine", "pyfuse3"]
    passthrough: Literal["auto", "all", "off"]
    io_uring: bool
    device_timeout: float
    search: Literal["devices", "images"]
    fallback: Literal["fail", "ro", "tmpfs"]
    on_mismatch: Literal["refuse", "ro", "ignore"]
    other_machine: Literal["refuse", "take"]
    low_water: str
    autogrow: str
    name: str
    store_flags: str
    holds_root: bool
    key_file: str
    credential: str


FIELDS = frozenset(_Fields.__annotations__)


# One item up to the separator.  A value wholly in quotes may hold commas: context="a:s0,c1".
ITEM = re.compile(r'[^=,\\]+="[^"]*"(?=,|\Z)|(?:[^,\\]|\\.|\\\Z)*', re.DOTALL)
LAYER = re.compile(r"(?:[^:\\]|\\.|\\\Z)*", re.DOTALL)
QUOTED = re.compile(r'([^=,\\]+)="([^"]*)"', re.DOTALL)


def _cut(text: str, item: re.Pattern[str]) -> list[str]:
    """The items of text; what ends one is a character that the pattern does not take."""
    items: list[str] = []
    position = 0
    while (match := item.match(text, position)) is not None:
        items.append(match[0])
        position = match.end() + 1
        if match.end() == len(text):
            break
    return items


def unescape(text: str) -> str:
    r"""A backslash makes the next character an ordinary one: \, \: \\."""
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def escape(text: str) -> str:
    r"""A text as the value of one option: unescape() turned round."""
    return re.sub(r"([\\,])", r"\\\1", text)


def split_options(text: str) -> list[str]:
    r"""The items of A,B=C,...: \, does not separate; escapes stay, quotes are taken off.

    A list of numbers after uidmapping= or gidmapping= belongs to it, though a comma comes first.
    """
    items: list[str] = []
    for item in _cut(text, ITEM):
        if quoted := QUOTED.fullmatch(item):
            items.append(f"{quoted[1]}={quoted[2]}")
        elif items and MAPPING_TAIL.fullmatch(item) and "idmapping=" in items[-1]:
            items[-1] += f",{item}"
        elif item:
            items.append(item)
    return items


def split_layers(text: str, origin: str = "LOWER") -> list[str]:
    r"""The paths of A:B:C, top-most first, with \: for a colon in a name."""
    layers = [unescape(layer) for layer in _cut(text, LAYER)]
    if not all(layers):
        hint = r"write A:B, and \: for a colon in a name; data-only layers (A::B) are not supported"
        raise usage_error(f"{origin} {text!r} names an empty layer", hint)
    return layers


def _absolute(path: str) -> str:
    if is_tag(path):
        return path
    # Not normalised: A/../B is not B where A is a symbolic link.
    try:
        return path if path.startswith("/") else os.path.join(os.getcwd(), path)
    except FileNotFoundError:
        hint = "give an absolute path"
        raise UnionfsError(f"{path}: the working directory was removed", hint=hint) from None


class OptionReader:
    """Collects what a command line says, from any number of places, and builds MountOptions.

    take() for -o strings, set() for what flags and positional arguments say, place() for the
    positional arguments of a mount, then build().  Every contradiction is an error at once; words
    nobody knows are one in build(), unless something said sloppy.
    """

    def __init__(self) -> None:
        self.lowers: list[str] = []
        self.mountpoint: str | None = None
        self._values: dict[str, object] = {}
        self._spelled: dict[str, str] = {}  # setting: how it was written
        self._unknown: list[str] = []

    def take(self, text: str) -> None:
        """One -o string."""
        for item in split_options(text):
            word, equals, value = item.partition("=")
            self.set_word(word, value if equals else None)

    def has(self, setting: str) -> bool:
        """Something was said about it, and it was not no."""
        return self._values.get(setting, False) is not False

    def asked(self, setting: str) -> object:
        """What was said about it; None if nothing was."""
        return self._values.get(setting)

    def said(self) -> frozenset[str]:
        """The settings that something was said about."""
        return frozenset(self._values)

    def spelled(self, setting: str) -> str:
        """How that was written."""
        return self._spelled[setting]

    def forget(self, settings: Iterable[str]) -> None:
        """Whatever was said about these."""
        for setting in settings:
            self._values.pop(setting, None)
            self._spelled.pop(setting, None)

    def set_word(self, word: str, text: str | None, spelled: str | None = None) -> None:
        """Say one word of -o, with what follows its `=`, in escapes; spelled: where not by -o."""
        known = WORDS.get(word)
        if known is None:
            if word in NEVER_SLOPPY:
                raise _stranger(word)
            if not ignored_by_prefix(word):
                self._unknown.append(word)
            return
        value = known.flag
        if text is not None:
            if known.read is None:
                raise usage_error(f"option {word}={text}: it takes no value", f"write {word}")
            value = known.read(word, unescape(text))
        elif value is None:
            raise usage_error(f"option {word} needs a value", f"write {word}=VALUE")
        if known.setting == "lowers" and text is not None:
            self._lower(word, text)
        elif known.setting != IGNORED:
            shown = word if text is None else f"{word}={text}"
            self.set(known.setting, value, spelled or shown)

    def set(self, setting: str, value: object, spelled: str) -> None:
        """Say something once: a repetition is fine for flags only, a contradiction never."""
        prior = self._spelled.get(setting)
        if prior is None:
            self._values[setting] = value
            self._spelled[setting] = spelled
            return
        both = f"({prior} and {spelled})"
        if "=" in spelled and prior.partition("=")[0] == spelled.partition("=")[0]:
            word = spelled.partition("=")[0]
            raise usage_error(f"option {word} is given twice {both}", "give it once")
        if self._values[setting] != value:
            raise usage_error(f"options contradict each other {both}", "give one of them")

    def place(self, places: Sequence[str], *, source_first: bool) -> None:
        """The positional arguments.

        LOWER[:LOWER...] [UPPER] MNT; or, when -o has named the lower layers, MNT.  source_first:
        then also SOURCE MNT, as mount(8) and mount.fuse3 call, where SOURCE is but a name; and in
        both cases what stands before MNT is what /proc/mounts shows.
        """
        self.check_unknown()  # a misspelt lowerdir is why no layer is there
        if not places:
            raise usage_error("no mount point is given", "see unionfs mount --help")
        *before, self.mountpoint = places
        if source_first and len(before) == 1 and not self.has("fsname"):
            # Shown as it is written: mount -a finds its fstab line mounted by that.
            self.set("fsname", before[0], f"SOURCE={before[0]}")
        if not self.lowers:
            self._place_layers(before)
        elif before and not (source_first and len(before) == 1):
            message = f"the layers are named twice, by lowerdir= and by {before[0]}"
            raise usage_error(message, "name them before the mount point, or with -o")

    def _place_layers(self, before: list[str]) -> None:
        if not before:
            hint = "name one: unionfs mount LOWER UPPER MNT, or -o lowerdir=LOWER"
            raise usage_error("no lower layer is given", hint)
        if len(before) > 2:
            hint = "separate lower layers by colons: unionfs mount LOWER:LOWER UPPER MNT"
            raise usage_error(f"one argument too many: {before[2]}", hint)
        self.lowers += split_layers(before[0])
        if len(before) == 2:
            if self.has("upper"):
                both = f"({self._spelled['upper']} and {before[1]})"
                raise usage_error(f"the upper layer is named twice {both}", "name it once")
            self.set("upper", before[1], f"UPPER {before[1]}")

    def build(self) -> MountOptions:
        """The whole, checked."""
        self.check_unknown()
        if not self.lowers or self.mountpoint is None:
            raise usage_error("no lower layer is given", "name one with lowerdir=")
        paths = (self._values.get(name, "/") for name in ("upper", "work", "key_file"))
        if not all([self.mountpoint, *self.lowers, *paths]):
            raise usage_error("a path is empty", "name a directory")
        self._read_memory()
        ephemeral = "ephemeral_size" in self._values
        self._check_together(ephemeral)
        fields = cast(_Fields, {k: v for k, v in self._values.items() if k in FIELDS})
        for path in ("upper", "work", "key_file"):
            if path in self._values and self._values[path] != "-":
                fields[path] = _absolute(cast(str, self._values[path]))
        if not fields.get("ephemeral_size"):
            fields.pop("ephemeral_size", None)
        if "upper" not in fields:
            # As kernel overlayfs: a work directory without an upper is of no use, and no error.
            fields.pop("work", None)
        if self.has("squash_to_root"):
            fields["squash_to_uid"] = fields.get("squash_to_uid", 0)
            fields["squash_to_gid"] = fields.get("squash_to_gid", 0)
        return MountOptions(
            lowers=tuple(_absolute(lower) for lower in self.lowers),
            mountpoint=_absolute(self.mountpoint),
            readonly=self.has("readonly") or not ("upper" in fields or ephemeral),
            ephemeral=ephemeral,
            kernel_flags=frozenset(flag for flag in KERNEL_FLAGS if self.has(flag)),
            **fields,
        )

    def _read_memory(self) -> None:
        """UPPER as tmpfs:[size=SIZE] is the same as ephemeral."""
        upper = self._values.get("upper")
        if not isinstance(upper, str) or not upper.startswith("tmpfs:"):
            return
        asked = upper.removeprefix("tmpfs:")
        size = asked.removeprefix("size=")
        if asked and size == asked:
            raise usage_error(f"the upper {upper} is not understood", "write tmpfs:size=1G")
        spelled = self._spelled.pop("upper")
        del self._values["upper"]
        self.set("ephemeral_size", read_size("size", size) if asked else "", spelled)

    def check_unknown(self) -> None:
        if self._unknown and not self.has("sloppy"):
            raise _stranger(self._unknown[0])

    def _check_together(self, ephemeral: bool) -> None:
        if self.has("remount"):
            hint = "unmount and mount anew; mount -o remount checks only"
            raise usage_error("option remount: a union cannot change its options", hint)
        conflicts = [
            (ephemeral and self.has("upper"), "ephemeral and an upper layer", "leave out one"),
            (ephemeral and self.has("work"), "ephemeral and workdir", "leave out workdir"),
            (ephemeral and self.has("readonly"), "ephemeral and ro", "leave out one"),
            (
                self.has("allow_other") and self.has("allow_root"),
                "allow_other and allow_root",
                "give one of them",
            ),
            (
                self.has("only") and (self.has("allow_other") or self.has("allow_root")),
                "only and allow_other or allow_root",
                "leave out one",
            ),
            (
                self.has("key_file") and self.has("credential"),
                "key-file and credential",
                "give one of them",
            ),
        ]
        for wrong, pair, hint in conflicts:
            if wrong:
                raise usage_error(f"{pair} exclude each other", hint)

    def _lower(self, word: str, text: str) -> None:
        if word == "lowerdir":
            self.set("lowerdir", text, f"lowerdir={text}")
            self.lowers += split_layers(text, "option lowerdir=")
        elif text:
            self.lowers.append(unescape(text))
        else:
            raise usage_error("option lowerdir+= is empty", "write lowerdir+=DIR")


def _stranger(word: str) -> UnionfsError:
    """What to say about a word that is not in WORDS."""
    if word in REFUSED:
        return usage_error(f"option {word} is not supported", REFUSED[word])
    import difflib  # slow to load, and needed on errors only

    near = difflib.get_close_matches(word, WORDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "see unionfs mount --help"
    return usage_error(f"option {word!r} is unknown", f"{hint} (-s lets unknown options pass)")


def read_strings(strings: Iterable[str]) -> OptionReader:
    """An OptionReader that has taken all these -o strings."""
    reader = OptionReader()
    for text in strings:
        reader.take(text)
    return reader
