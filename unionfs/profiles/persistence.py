# SPDX-License-Identifier: GPL-2.0-or-later
"""persistence.conf, by which live-boot is told what persists: persistence.conf(5).

Owns its grammar, and how its words become rules.  A line is `DIR [OPTION,...]`, with the options
bind (the default), union, link and source=PATH; what live-boot skips with a warning is skipped
here.  live-boot keeps the changes of a union in `rw` below the source, as is done here.
"""

import contextlib
import dataclasses
import logging
import os
from typing import Final

from unionfs import locator
from unionfs.errors import UnionfsError, printable
from unionfs.options import OptionReader, read_strings
from unionfs.profiles.profile import Kind, Profile, Rule, below
from unionfs.profiles.reading import read_whole

log = logging.getLogger("unionfs")

FILE: Final = "persistence.conf"
_KINDS: Final[dict[str, Kind]] = {"bind": "bind", "union": "persist", "link": "link"}
# Where live-boot refuses to mount.
_UNSAFE: Final = ("/lib", "/live", "/run/live")


def complete(profile: Profile, top: str = "/") -> Profile:
    """A profile with the paths that the file at its store's root names.

    top: the directory that is taken for the root.
    """
    assert profile.store is not None
    text = _text(profile.store, top, read_strings(profile.options))
    rules = tuple(read(text, profile.store, top))
    if not rules:
        hint = "write a line such as /home union"
        raise UnionfsError(f"{FILE} of {profile.store} names nothing that persists", hint=hint)
    return dataclasses.replace(profile, rules=rules)


def _text(store: str, top: str, said: OptionReader) -> str:
    """The file at the root of a store, which is waited for and looked for as the options say."""
    from unionfs.profiles import waiting
    from unionfs.stores.volume import open_volume, walk

    search, seconds = waiting.search_of(said), waiting.seconds_of(said)
    volume = open_volume(store, readonly=True, search=search, timeout=seconds)
    try:
        folder = walk(volume, top)
        try:
            return os.fsdecode(read_whole(FILE, folder=folder, flags=os.O_NOFOLLOW))
        finally:
            os.close(folder)
    except OSError as exc:
        hint = "name the paths in the profile, or write that file"
        where = "at its root" if top == "/" else f"in {top}"
        what = f"{store} has no {FILE} {where}: {exc.strerror}"
        raise UnionfsError(what, hint=hint) from exc
    finally:
        volume.close()


def there(profile: Profile) -> list[Rule]:
    """The rules whose directories in the store there are, for one that is only read."""
    from unionfs.stores.volume import open_volume, walk

    assert profile.store is not None
    found = []
    volume = open_volume(profile.store, readonly=True)
    try:
        for rule in profile.rules:
            upper = None if rule.upper is None else locator.parse(rule.upper).directory
            with contextlib.suppress(FileNotFoundError):
                os.close(walk(volume, rule.source or upper or "/"))
                found.append(rule)
    finally:
        volume.close()
    return found


def read(text: str, store: str, top: str = "/") -> list[Rule]:
    """The rules of a file's text; lines that cannot be used are logged and skipped."""
    device = locator.parse(store).source
    rules: dict[str, Rule] = {}
    sources: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            rule, source = _rule(words, device, top)
            others = [place for path, place in sources.items() if path != rule.path]
            if near := next((p for p in others if _nested(p, source)), None):
                raise ValueError(f"{source} in the store lies in or around {near}")
        except ValueError as exc:
            log.warning("%s:%d: %s: skipped", FILE, number, printable(str(exc)))
            continue
        rules[rule.path], sources[rule.path] = rule, source
    return sorted(rules.values(), key=lambda rule: rule.path.split("/"))


def _nested(one: str, other: str) -> bool:
    one, other = one.rstrip("/") + "/", other.rstrip("/") + "/"
    return one.startswith(other) or other.startswith(one)


def _rule(words: list[str], store: str, top: str) -> tuple[Rule, str]:
    """The rule of a line, and its place in the store."""
    path = words[0]
    if "\0" in "".join(words):
        raise ValueError("it has a null character")
    if not path.startswith("/") or {".", ".."} & set(path.split("/")):
        raise ValueError(f"{path} is no absolute path")
    path = os.path.normpath("/" + path.lstrip("/"))
    if any(path == place or path.startswith(place + "/") for place in _UNSAFE):
        raise ValueError(f"{path} cannot persist")
    kind: Kind = "bind"
    source = path
    for option in ",".join(words[1:]).split(","):
        word, equals, value = option.partition("=")
        if equals and word == "source":
            source = _source(value)
        elif option in _KINDS:
            kind = _KINDS[option]
        elif option:
            raise ValueError(f"the option {option} is unknown")
    if kind == "bind" and path == source == "/":
        raise ValueError("in place of / the store alone would be seen: write / union")
    source = below(top, source)
    if kind == "persist":
        upper = f"{store}:{os.path.join(source, 'rw')}"
        return Rule(path=path, kind=kind, upper=upper, said_by=FILE), source
    return Rule(path=path, kind=kind, source=source, said_by=FILE), source


def _source(value: str) -> str:
    if value == ".":
        return "/"
    if not value or value.startswith("/") or {".", ".."} & set(value.split("/")):
        raise ValueError(f"source={value} is no path below the store's root")
    return os.path.normpath(f"/{value}")
