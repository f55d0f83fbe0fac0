# SPDX-License-Identifier: GPL-2.0-or-later
"""What a profile says: a store, and a list of paths with what becomes of each.

Owns the keys, their defaults and their errors.  Does not find files (files.py), mount anything
(running.py), nor know where in the store a path's changes lie (plan.py).

    store = "LABEL=data"
    [paths]
    "/etc" = "persist"
    "/var/cache" = { kind = "tmpfs", size = "100M" }

A path's kind is one of

    persist   a union: the base's content, its changes in the store
    tmpfs     the same with its changes in memory; with union = false an empty tmpfs
    bind      a directory of the store in its place; filled from the base when it is made
    exclude   the base's own, which nobody changes, out of what lies above it if anything does
    link      as live-boot's: files of the store by symbolic links, in what lies above or in memory
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

from unionfs.errors import UnionfsError, usage_error
from unionfs.option_words import SIZE
from unionfs.options import split_layers

Kind = Literal["persist", "tmpfs", "bind", "exclude", "link"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
# An instance fills in paths, where a dot or two would be another directory.
NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(?:@(?!\.\.?\Z)[A-Za-z0-9_.\-]*)?")
_MEMORY: Final = "tmpfs:"
_RULE_KEYS: Final = ("kind", "union", "size", "source", "upper", "options")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What becomes of one path and all below it."""

    path: str  # absolute and normal, as the profile's system sees it
    kind: Kind
    union: bool = True  # of tmpfs: over the base; else empty
    size: str | None = None  # of tmpfs: 100M, 10%
    source: str | None = None  # of bind and link: the directory in the store
    upper: str | None = None  # of persist: a locator of its own
    options: tuple[str, ...] = ()  # of its union, besides the profile's
    said_by: str = ""  # the file

    def covers(self, path: str) -> bool:
        """Whether `path` is this one or lies below it."""
        return self.path in ("/", path) or path.startswith(self.path + "/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The whole; rules are in the order of their paths, so that what lies above comes first."""

    name: str
    description: str = ""
    store: str | None = None
    base: tuple[str, ...] = ("/",)  # locators, top-most first
    target: str | None = None  # None: where the base is
    options: tuple[str, ...] = ()
    boot: bool = False  # start it at boot
    nofail: bool = False  # one path that cannot be had does not keep the others away
    rules: tuple[Rule, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The directory that paths are below of; a profile without one is refused."""
        if self.target is not None:
            return self.target
        if len(self.base) == 1 and self.base[0].startswith("/"):
            return self.base[0]
        hint = 'say where it is to be seen: target = "/mnt"'
        raise UnionfsError(f"profile {self.name} has no target, and its base is no path", hint=hint)

    @property
    def in_place(self) -> bool:
        """Whether directories of the base are covered by what is made of them."""
        return len(self.base) == 1 and self.where == self.base[0]

    @property
    def covers_root(self) -> bool:
        """Whether it can be brought up before the system runs only, over the root that is to be."""
        return self.in_place and self.where == "/" and any(r.path == "/" for r in self.rules)

    def rule_for(self, path: str) -> Rule | None:
        """The rule that says what becomes of a path: the one nearest above."""
        normal = below("/", path)
        return next((rule for rule in reversed(self.rules) if rule.covers(normal)), None)

    def find(self, path: str, top: str | None = None) -> Rule | None:
        """The rule for a path as it is seen once the profile is up, at `top`."""
        normal = below("/", path)
        top = (self.where if top is None else top).rstrip("/")
        if not f"{normal}/".startswith(f"{top}/"):
            return None
        return self.rule_for(normal[len(top) :] or "/")

    def above(self, rule: Rule) -> Rule | None:
        """The rule nearest above another one."""
        if rule.path == "/":
            return None
        return self.rule_for(os.path.dirname(rule.path))

    def links_into_base(self, rule: Rule) -> bool:
        """Whether it is for links and nothing above takes them: they need a union of their own."""
        above = self.above(rule)
        return rule.kind == "link" and (above is None or above.kind == "exclude")

    def mounts(self, rule: Rule) -> bool:
        """Whether something is mounted at its path."""
        return rule.kind != "link" or self.links_into_base(rule)

    def points(self) -> list[str]:
        """Where it mounts, what lies above first."""
        return [below(self.where, rule.path) for rule in self.rules if self.mounts(rule)]

    def needs(self) -> list[str]:
        """What it stands on: locators, and where it mounts."""
        named = [*self.base, *([self.store] if self.store else [])]
        named += [rule.upper for rule in self.rules if rule.upper is not None]
        return list(dict.fromkeys([*named, self.where]))


def below(top: str, path: str) -> str:
    """A path of a system whose root is the directory `top`."""
    # Two slashes at the start are a root of their own for POSIX.
    return os.path.normpath("/" + f"{top}/{path}".lstrip("/"))


def lies_in(path: str, place: str) -> bool:
    """Whether a normal path is that of a place or of something in it, as far as its text tells."""
    return f"{path.rstrip('/')}/".startswith(f"{place.rstrip('/')}/")


def read(name: str, documents: Iterable[tuple[str, Mapping[str, Any]]]) -> Profile:
    """The profile that some files make, each given with its name; later ones win.

    Raises UnionfsError that names the file.
    """
    fields: dict[str, Any] = {}
    rules: dict[str, Rule] = {}
    files = []
    for path, document in documents:
        files.append(path)
        for key, value in document.items():
            if key == "paths":
                _read_paths(path, value, rules)
            else:
                fields |= _read_field(path, key, value)
    ordered = tuple(sorted(rules.values(), key=lambda rule: rule.path.split("/")))
    profile = Profile(name=name, rules=ordered, files=tuple(files), **fields)
    _check(profile)
    return profile


def _read_field(path: str, key: str, value: object) -> dict[str, object]:
    match key, value:
        case "description", str():
            return {key: value}
        case "store", str() if value and not value.startswith(_MEMORY):
            return {key: value}
        case "base", str() if value:
            return {key: tuple(split_layers(value, f"{path}: base"))}
        case "base", list() if value and all(isinstance(v, str) and v for v in value):
            return {key: tuple(value)}
        case "target", str() if value.startswith("/"):
            return {key: os.path.normpath(value)}
        case "options", str() | list():
            return {key: _options(path, value)}
        case (("boot" | "nofail"), bool()):
            return {key: value}
    known = {
        "description": "a text",
        "store": "a locator, such as LABEL=data",
        "base": "a locator or a list of them",
        "target": "an absolute path",
        "options": "mount options, such as fallback=tmpfs",
        "boot": "true or false",
        "nofail": "true or false",
        "paths": "a table",
    }
    if key in known:
        raise UnionfsError(f"{path}: {key} = {value!r}", hint=f"it has to be {known[key]}")
    raise _stranger(f"{path}: {key}", key, known)


def _stranger(what: str, word: str, known: Iterable[str]) -> UnionfsError:
    import difflib  # slow to load, and needed on errors only

    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    return UnionfsError(f"{what} is unknown", hint=hint)


def _options(path: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,) if value else ()
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(item for item in value if item)
    raise UnionfsError(f"{path}: options = {value!r}", hint="give a text or a list of them")


def _read_paths(path: str, table: object, rules: dict[str, Rule]) -> None:
    """Take over the rules of a file; `false` takes one of an earlier file away."""
    if not isinstance(table, dict):
        raise UnionfsError(f"{path}: paths is no table", hint='write "/etc" = "persist" below it')
    spelled: dict[str, str] = {}
    for text, said in table.items():
        if not text.startswith("/") or ".." in text.split("/"):
            raise UnionfsError(f"{path}: {text!r} is no absolute path", hint='write "/etc"')
        normal = below("/", text)
        if (other := spelled.setdefault(normal, text)) != text:
            hint = "which of them holds, nobody could tell: keep one"
            raise UnionfsError(f"{path}: {other!r} and {text!r} are one path", hint=hint)
        if said is False:
            rules.pop(normal, None)
        else:
            rules[normal] = _read_rule(
                path, normal, {"kind": said} if isinstance(said, str) else said
            )


def _read_rule(file: str, path: str, said: object) -> Rule:
    what = f"{file}: {path}"
    if not isinstance(said, dict):
        raise UnionfsError(f"{what}: {said!r} is no kind", hint=f"use one of {', '.join(KINDS)}")
    for key in said:
        if key not in _RULE_KEYS:
            raise _stranger(f"{what}: {key}", key, _RULE_KEYS)
    if (kind := said.get("kind")) not in KINDS:
        raise UnionfsError(
            f"{what}: the kind {kind!r} is unknown", hint=f"use one of {', '.join(KINDS)}"
        )
    allowed = {"persist": ("upper",), "tmpfs": ("union", "size"), "bind": ("source",)}
    allowed["link"] = allowed["bind"]
    own = {"kind", "options", *allowed.get(kind, ())}
    if foreign := [key for key in said if key not in own]:
        raise UnionfsError(f"{what}: {foreign[0]} is not for {kind}", hint="leave it out")
    rule = Rule(
        path=path,
        kind=cast(Kind, kind),
        union=_typed(what, said, "union", bool, True),
        size=_typed(what, said, "size", str, None),
        source=_typed(what, said, "source", str, None),
        upper=_typed(what, said, "upper", str, None),
        options=_options(what, said.get("options", "")),
        said_by=file,
    )
    if rule.size is not None and not SIZE.fullmatch(rule.size):
        raise UnionfsError(f"{what}: size = {rule.size!r}", hint="write 100M, 2G or 50%")
    if rule.upper is not None and (not rule.upper or rule.upper.startswith(_MEMORY)):
        hint = "name a directory, an image or a device; what need not be kept is of the kind tmpfs"
        raise UnionfsError(f"{what}: upper = {rule.upper!r}", hint=hint)
    if rule.source is None:
        return rule
    if not rule.source.startswith("/") or ".." in rule.source.split("/"):
        raise UnionfsError(f"{what}: source = {rule.source!r}", hint='write "/home"')
    return dataclasses.replace(rule, source=below("/", rule.source))


def _typed(what: str, said: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:  # noqa: ANN401
    value = said.get(key, default)
    if value is not default and not isinstance(value, kind):
        wanted = {bool: "true or false", str: "a text"}[kind]
        raise UnionfsError(f"{what}: {key} = {value!r}", hint=f"it has to be {wanted}")
    return value


def _check(profile: Profile) -> None:
    for rule in profile.rules:
        stored = rule.kind in ("bind", "link") or (rule.kind == "persist" and rule.upper is None)
        if stored and profile.store is None:
            hint = 'add a line such as store = "LABEL=data"'
            raise UnionfsError(
                f"{rule.said_by}: {rule.path} needs a store, and none is named", hint=hint
            )
    profile.where  # noqa: B018  raises what is wrong


def check_name(name: str) -> None:
    """Raises UnionfsError if a profile cannot have this name."""
    if not NAME.fullmatch(name):
        raise usage_error(f"{name!r} is no name of a profile", "use letters, digits, - _ . and @")
