# SPDX-License-Identifier: GPL-2.0-or-later
"""How the values of the kernel command line's words are read.

A reader gets what follows `=` (None without one) and says what it has understood to a Collector.
It raises Malformed for what cannot be read; the word is then ignored, and that is said.  Called by
the table in words.py.
"""

import re
from collections.abc import Callable
from typing import Final, Protocol, get_args

from unionfs import locator
from unionfs.boot.request import Fallback, Mode, OnMismatch
from unionfs.errors import UnionfsError
from unionfs.option_words import SIZE, read_name, read_seconds, read_size
from unionfs.options import read_strings

# Places that are no stores.
MEMORY: Final = "tmpfs:"
NOWHERE: Final = ""

# As systemd reads them; others take fewer.
_YES: Final = ("1", "yes", "true", "on", "y", "t")
_NO: Final = ("0", "no", "false", "off", "n", "f")
# A device below /dev, and a directory in it: /dev/sda1/changes, LABEL:x/changes.
_DEVICE_PATH: Final = re.compile(r"(/dev/(?:disk/by-[a-z]+/|mapper/)?[^/]+)(/.*)?")
_COLON_TAG: Final = re.compile(r"(LABEL|UUID|PARTUUID|PARTLABEL):([^/]+)(/.*)?", re.IGNORECASE)
_MEGABYTES: Final = re.compile(r"([1-9][0-9]*)(?:([KMGTkmgt])B?)?")
# Of -o: what says where the layers are, or is said by a word of its own.
_NOT_HERE: Final = (
    *("upper", "work", "ephemeral_size", "readonly", "foreground", "debug", "remount", "name"),
    *("fallback", "on_mismatch", "device_timeout"),
)


class Malformed(Exception):
    """Why a value cannot be read."""


class Collector(Protocol):
    """Who is told what a word says; later wins."""

    def say(self, field: str, value: object) -> None:
        """A field of the request, or `place`, where the changes are to be kept."""

    def ask(self) -> None:
        """A union is wanted, wherever its changes are to be kept."""

    def note(self, text: str) -> None:
        """Something that the user should know of this word."""


Reader = Callable[[Collector, str | None], None]


# Values


def truth(value: str | None) -> bool:
    """A switch, which alone is on."""
    if value is None or value.lower() in _YES:
        return True
    if value.lower() in _NO:
        return False
    raise Malformed("it is neither yes nor no")


def text_of(value: str | None) -> str:
    """A value that must be there."""
    if not value:
        raise Malformed("it has no value")
    return value


def choice(value: str | None, *known: str) -> str:
    """One of a few."""
    if value not in known:
        raise Malformed(f"it is one of {', '.join(known)}")
    return value


def tagged(tag: str, value: str) -> str:
    """TAG=VALUE as a locator."""
    if ":/" in value and '"' not in value:
        value = f'"{value}"'
    return f"{tag.upper()}={value}"


def source_of(value: str | None) -> tuple[str, str | None]:
    """A locator, cut into the store and the directory inside."""
    text = text_of(value)
    if text.startswith("ID="):
        text = "/dev/disk/by-id/" + text.removeprefix("ID=")
    if not (locator.is_tag(text) or text.startswith("/")):
        raise Malformed("it is neither a path nor LABEL=, UUID=, PARTLABEL=, PARTUUID= or ID=")
    source, inside = locator.cut(text)
    if source.endswith("=") or source == "/" or "\0" in text:
        raise Malformed("it names nothing")
    return source, inside


def size(value: str | None, *, unit: str = "") -> str:
    """A size as tmpfs takes it; a number alone is in `unit`."""
    text = text_of(value)
    if text.isascii() and text.isdigit():
        text += unit
    if not SIZE.fullmatch(text):
        raise Malformed("it is no size: write 512M, 2G or 50%")
    return read_size("size", text)


def parameters(collector: Collector, text: str, known: str) -> dict[str, str]:
    """KEY=VALUE,KEY=VALUE; those that are not known are told of."""
    found = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key in known.split():
            found[key] = value
        else:
            collector.note(f"{key}= has no effect here")
    return found


# Readers


def _place(collector: Collector, source: str, inside: str | None) -> None:
    collector.say("place", source)
    if inside is not None:
        collector.say("directory", inside)


def _memory(collector: Collector, text: str, known: str = "size") -> None:
    """tmpfs, or tmpfs:size=SIZE."""
    found = parameters(collector, text.partition(":")[2], known)
    wanted = size(found["size"]) if "size" in found else None
    collector.say("place", MEMORY)
    if wanted is not None:
        collector.say("size", wanted)


def read_store(collector: Collector, value: str | None) -> None:
    """A locator of ours."""
    text = text_of(value)
    if text == "tmpfs" or text.startswith(MEMORY):
        _memory(collector, text)
    elif text.startswith("luks:"):
        source, inside = source_of(text.removeprefix("luks:"))
        _place(collector, source, inside)
        collector.say("crypt", source)
    else:
        _place(collector, *source_of(text))


def read_lower(collector: Collector, value: str | None) -> None:
    """The base, a locator too."""
    source, inside = source_of(value)
    collector.say("lower", source if inside is None else f"{source}:{inside}")


def read_device(collector: Collector, value: str | None) -> None:
    """A locator of a device, nothing else."""
    _place(collector, *source_of(value))


def read_label(collector: Collector, value: str | None) -> None:
    """A label alone, as in cow_label=."""
    _place(collector, tagged("LABEL", text_of(value)), None)


def read_overlay(collector: Collector, value: str | None) -> None:
    """dracut's rd.overlay: a switch, none, tmpfs:..., or DEVSPEC[:PATH|:auto]."""
    if value is None or value.lower() in _YES:
        collector.say("place", MEMORY)
    elif value == "none" or value.lower() in _NO:
        collector.say("place", NOWHERE)
    else:
        read_store(collector, value.removesuffix(":auto"))


def read_overlayroot(collector: Collector, value: str | None) -> None:
    """overlayroot's: disabled, tmpfs[:...], DEVICE, device:dev=...,... or crypt:dev=...,..."""
    text = value or ""
    if text in ("", "disabled"):
        collector.say("place", NOWHERE)
        return
    kind, _, rest = text.partition(":")
    if kind == "tmpfs":
        _memory(collector, text)
    elif kind in ("device", "crypt"):
        _read_device(collector, rest, crypt=kind == "crypt")
    else:
        _place(collector, *source_of(text if "=" in text or "/" in text else f"/dev/{text}"))


def read_crypt(collector: Collector, value: str | None) -> None:
    """dracut's rd.overlay.crypt: as overlayroot's; also the device alone."""
    text = text_of(value)
    first = text.partition("=")[0]
    if first in ("dev", "mapname", "pass", "fstype", "mkfs", "timeout"):
        _read_device(collector, text, crypt=True)
    else:
        _read_crypt_device(collector, text)


def _read_device(collector: Collector, text: str, *, crypt: bool) -> None:
    known = parameters(collector, text, "dev timeout dir")
    device = known.get("dev", "")
    if device and not (locator.is_tag(device) or device.startswith("/")):
        device = f"/dev/{device}"
    seconds = _seconds(known["timeout"]) if "timeout" in known else None
    if crypt:
        _read_crypt_device(collector, device)
    else:
        _place(collector, *source_of(device))
    if "dir" in known:
        collector.say("directory", _inside(known["dir"]))
    if seconds is not None:
        collector.say("timeout", seconds)


def _read_crypt_device(collector: Collector, value: str | None) -> None:
    source, inside = source_of(value)
    _place(collector, source, inside)
    collector.say("crypt", source)


def read_session(collector: Collector, value: str | None) -> None:
    """Slax's perchdir= and Porteus's changes=: only what names a device is known here."""
    text = text_of(value)
    if text.startswith("EXIT:"):
        collector.note("changes are written as they are made, not at the end")
        text = text.removeprefix("EXIT:")
    if (device := _DEVICE_PATH.fullmatch(text)) is not None:
        _place(collector, device[1], _inside(device[2]) if device[2] else None)
    elif (tag := _COLON_TAG.fullmatch(text)) is not None:
        _place(collector, tagged(tag[1], tag[2]), _inside(tag[3]) if tag[3] else None)
    elif locator.is_tag(text):
        _place(collector, *source_of(text))
    else:
        collector.note("it names no device: say where the changes are by unionfs.store=")
        collector.say("persistent", True)


def _inside(path: str) -> str:
    """A directory in a store, always from its top."""
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def read_directory(collector: Collector, value: str | None) -> None:
    """The directory in the store."""
    text = text_of(value)
    if ".." in text.split("/") or "\0" in text:
        raise Malformed("it leads out of the store")
    collector.say("directory", _inside(text))


def read_flags(collector: Collector, value: str | None) -> None:
    """Options for mounting the store's file system."""
    collector.say("flags", text_of(value))


def read_size_in(unit: str) -> Reader:
    """A size whose bare number is in some unit."""

    def read(collector: Collector, value: str | None) -> None:
        collector.say("size", size(value, unit=unit))

    return read


def read_own_size(collector: Collector, value: str | None) -> None:
    """The size of the memory; naming it is asking for it."""
    collector.say("size", size(value))
    collector.ask()


def read_session_size(collector: Collector, value: str | None) -> None:
    """Slax's: megabytes, or with MB, GB, TB."""
    match = _MEGABYTES.fullmatch(text_of(value))
    if match is None:
        raise Malformed("it is no size: write 4000, 4000MB or 4GB")
    collector.say("size", match[1] + (match[2] or "M").upper())


def read_mode(collector: Collector, value: str | None) -> None:
    """Our own."""
    collector.say("mode", choice(value, *get_args(Mode)))
    collector.ask()


def mode_switch(on: Mode) -> Reader:
    """A word that means one mode, where a union is asked for."""

    def read(collector: Collector, value: str | None) -> None:
        if truth(value):
            collector.say("mode", on)

    return read


def read_cow_persistent(collector: Collector, value: str | None) -> None:
    """archiso's P or N."""
    collector.say("mode", "persist" if choice(value, "P", "N") == "P" else "ram")


def read_volatile(collector: Collector, value: str | None) -> None:
    """systemd's, a switch or a way; of these only `overlay` is a union."""
    if value == "overlay":
        collector.say("place", MEMORY)
        return
    try:
        away = value == "state" or truth(value)
    except Malformed as exc:
        raise Malformed("it is one of yes, state, no, overlay") from exc
    if away:
        collector.note("this is no union: systemd does it")


def switch(field: str) -> Reader:
    """A field that is on or off."""

    def read(collector: Collector, value: str | None) -> None:
        collector.say(field, truth(value))

    return read


def read_toram(collector: Collector, value: str | None) -> None:
    """Whoever names modules to be copied gets all of them."""
    if value not in (None, "auto"):
        try:
            collector.say("toram", truth(value))
            return
        except Malformed:
            collector.note("the whole base is copied")
    collector.say("toram", True)


def read_encryption(collector: Collector, value: str | None) -> None:
    """live-boot's list of what a store may be: none, luks."""
    kinds = text_of(value).split(",")
    if set(kinds) - {"none", "luks"}:
        raise Malformed("it is none, luks or both")
    if kinds == ["luks"]:
        collector.say("encrypted", True)
    elif "luks" in kinds:
        collector.note("an encrypted store is not looked for: write persistence-encryption=luks")


def read_persistence(collector: Collector, value: str | None) -> None:
    """live-boot's: the store is called `persistence`, unless persistence-label= says otherwise."""
    collector.say("persistence", truth(value))


def read_persistence_label(collector: Collector, value: str | None) -> None:
    """Several may be given there; the first is taken."""
    first, *others = text_of(value).split(",")
    if others:
        collector.note(f"only {first} is looked for")
    collector.say("label", tagged("LABEL", text_of(first)))


def read_persistent(collector: Collector, value: str | None) -> None:
    """casper's: the store is called `writable`."""
    if truth(value):
        collector.say("label", "LABEL=writable")
        collector.say("persistent", True)


def read_profile(collector: Collector, value: str | None) -> None:
    """The name of a profile."""
    try:
        collector.say("profile", read_name("profile", value or ""))
    except UnionfsError as exc:
        raise Malformed("it is no name") from exc


def read_options(collector: Collector, value: str | None) -> None:
    """What -o takes, but what other words say."""
    text = text_of(value)
    try:
        reader = read_strings([text])
        reader.check_unknown()
    except UnionfsError as exc:
        raise Malformed(exc.line()) from exc
    if reader.lowers or any(reader.asked(word) is not None for word in _NOT_HERE):
        raise Malformed("the layers and how they are used are said by other words")
    collector.say("options", text)


def _seconds(value: str | None) -> float:
    try:
        return read_seconds("timeout", value or "")
    except UnionfsError as exc:
        raise Malformed("it is no number of seconds") from exc


def read_timeout(collector: Collector, value: str | None) -> None:
    """Seconds to wait for the store's device."""
    collector.say("timeout", _seconds(value))


def read_fallback(collector: Collector, value: str | None) -> None:
    """What is done without the store."""
    collector.say("fallback", choice(value, *get_args(Fallback)))


def read_mismatch(collector: Collector, value: str | None) -> None:
    """What is done with the store of another base."""
    collector.say("on_mismatch", choice(value, *get_args(OnMismatch)))


def no_effect(collector: Collector, value: str | None) -> None:
    """A word about something that unions of ours do not have."""
    collector.note("it has no effect here")
