# SPDX-License-Identifier: GPL-2.0-or-later
"""From a profile to the mounts that make it, in their order.

Owns where in the store a path's changes lie, which mount each kind is, and what of the base is
below it.  Looks at the base, makes nothing.

In the store, a path's changes lie in a directory that is called as systemd-escape(1) writes the
path, `-` for the root: DIR/var-lib, where DIR is what the store's locator names
(`LABEL=x:/dir`), or the store itself if that is a directory, or else /persistent_NAME.

Where directories are covered in place, what is mounted below another path of the profile could not
see its base any more.  So a view of each such base comes first, in /run/unionfs/NAME/base.
"""

import dataclasses
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, cast

from unionfs import locator, runtime
from unionfs.errors import UnionfsError
from unionfs.locator import Locator
from unionfs.mounts import read_mounts
from unionfs.options import MountOptions, OptionReader, read_strings
from unionfs.profiles import links
from unionfs.profiles.binding import open_seen
from unionfs.profiles.profile import Profile, Rule, below, lies_in

Action = Literal["union", "memory", "bind", "view", "links"]
# Told of an error that one rule has.
Failed = Callable[[UnionfsError], None]
EMPTY: Final = "empty"
_STORED: Final = ("persist", "bind", "link")
# Settings that only say how a store is used: not for a path that has nothing in it.
_OF_STORE: Final = (
    *("work", "store_flags", "autogrow", "low_water", "key_file", "credential"),
    *("on_mismatch", "other_machine"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One mount.  `path`: that of its rule."""

    action: Action
    path: str
    point: str
    options: MountOptions | None = None  # of a union
    source: str = ""  # of a bind, view or links: a locator
    readonly: bool = False
    size: str | None = None  # of memory
    like: str | None = None  # a directory of the base: what is made gets its mode, or its content
    flags: str | None = None  # of a bind: for mounting the store's file system


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What whoever brings a profile up has to say besides its files."""

    options: tuple[str, ...] = ()  # which win over those of the files
    defaults: tuple[str, ...] = ()  # for what no file says
    base: str | None = None  # a locator, from here, in place of the profile's
    only_read: bool = False  # the store is: what changes is in memory, and gone at the end
    size: str | None = None  # of that memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Where a profile is brought up: the root of its system, our directory in /run, our rights.

    `standing`: where it is mounted already; what is seen there is not the base any more.
    """

    root: str
    directory: str
    may_mount: bool
    standing: frozenset[str] = frozenset()
    wish: Wish = Wish()


def steps(profile: Profile, ground: Ground, failed: Failed | None = None) -> list[Step]:
    """The mounts of a profile.

    A rule that cannot be had here goes to `failed`, which raises the error or goes on without it.
    """
    refuse_one_place(profile)
    planner = _Planner(profile, ground)
    made: list[Step] = []
    for rule in profile.rules:
        try:
            made += planner.steps(rule)
        except UnionfsError as exc:
            if failed is None:
                raise
            failed(exc)
    order = {"view": 0, "links": 2}
    return sorted(made, key=lambda step: order.get(step.action, 1))


def missing(profile: Profile, ground: Ground) -> list[Rule]:
    """The rules of which nothing is mounted yet."""
    planner = _Planner(profile, ground)
    return [rule for rule in profile.rules if planner.seen_at(rule) not in ground.standing]


def place_in_store(profile: Profile, rule: Rule) -> str:
    """The locator of a path's directory in the store."""
    assert profile.store is not None
    where = locator.parse(profile.store)
    if rule.source is not None:
        return f"{where.source}:{rule.source}"
    return f"{where.source}:{below(_top(profile, where), runtime.name_of(rule.path))}"


def refuse_one_place(profile: Profile) -> None:
    """Raises UnionfsError if an upper is another path's too: nobody else may change what is in one.

    By what is written: two names of one place are found out by who opens it.
    """
    seen: list[tuple[Rule, str]] = []
    for rule in (rule for rule in profile.rules if rule.kind in _STORED):
        where = locator.parse(rule.upper or place_in_store(profile, rule))
        place = below(where.source, where.directory or "/")
        for other, its in seen:
            near = lies_in(place, its) or lies_in(its, place)
            if near and "persist" in (rule.kind, other.kind):
                what = f"its place in the store lies in or around that of {other.path}"
                hint = "name another source or upper"
                raise UnionfsError(f"{rule.said_by}: {rule.path}: {what}", hint=hint)
        seen.append((rule, place))


def _top(profile: Profile, where: Locator) -> str:
    if where.directory is not None:
        return where.directory
    if where.tag is None and os.path.isdir(where.value):
        return "/"
    return f"/persistent_{profile.name}"


class _Planner:
    def __init__(self, profile: Profile, ground: Ground) -> None:
        self.profile = profile
        self.ground = ground
        self.wish = ground.wish
        # As the mount table has it; the layers keep the names that their users have given them.
        self.top = below(ground.root, links.followed(ground.root, profile.where))
        own = [self._rooted(layer) for layer in profile.base]
        self.base = own if self.wish.base is None else [self.wish.base]
        self.in_place = profile.in_place and self.wish.base is None

    def _rooted(self, text: str) -> str:
        """A plain path of the profile's system, from here."""
        root = self.ground.root
        if root == "/" or not text.startswith("/"):
            return text
        return below(root, links.followed(root, text))

    def seen_at(self, rule: Rule) -> str:
        """Where something is mounted for a rule."""
        return self._linked(rule) if rule.kind == "link" else below(self.top, rule.path)

    def steps(self, rule: Rule) -> list[Step]:
        point = below(self.top, rule.path)
        if self.in_place and not self.ground.standing:  # else what we have mounted is seen there
            links.refuse(rule.said_by, self.top, rule.path)
        if point == "/" and point not in self.ground.standing:
            hint = "bring it up over another root: unionfs up NAME --root DIR"
            raise UnionfsError(f"{rule.said_by}: / cannot be covered while it is in use", hint=hint)
        self._refuse_covered_store(rule)
        above = self.profile.above(rule)
        made: list[Step] = []
        if self.in_place and above is not None:
            base = f"{self.ground.directory}/base/{runtime.name_of(rule.path)}"
            lowers = [base] if self._has_base(rule, point, base) else []
            if lowers:
                self._need_rights(rule, "below another path in place")
                view = Step(action="view", path=rule.path, point=base, source=point)
                made.append(dataclasses.replace(view, readonly=True))
        else:
            self._need_a_way(rule)
            lowers = self._lowers(rule)
            if self.in_place and not lowers:
                hint = "make it in the base, or give the path above it a rule"
                raise UnionfsError(f"{rule.said_by}: {point} does not exist", hint=hint)
        if rule.kind == "exclude" and not lowers:
            # An empty directory in its place would be kept in the union above.
            hint = "make it there, or leave out its rule; what is up already, take down first"
            raise UnionfsError(f"{rule.said_by}: the base has no {rule.path}", hint=hint)
        if rule.kind == "link":
            linked = Step(action="bind", path=rule.path, point=self._linked(rule))
            made.append(self._stored(rule, linked))
        last = self._step(rule, point, lowers)
        if self.profile.links_into_base(rule):
            options = self._options(rule, point, lowers, _memory(self.wish.size))
            made.append(dataclasses.replace(last, action="union", options=options))
        return [*made, last]

    def _refuse_covered_store(self, rule: Rule) -> None:
        """Through the union that covers it, an image would be copied up: into a union, or itself.

        What covers its own store only has opened that before.
        """
        store = rule.upper or (self.profile.store if rule.kind in _STORED else None)
        if store is None or locator.is_tag(store):
            return
        place = os.path.realpath(locator.parse(store).value)
        for other in self.profile.rules:
            if other != rule and self.profile.mounts(other) and self._covers(other, place):
                what = f"its store {place} lies in {other.path}, which this profile covers"
                hint = "put it elsewhere, such as on a file system of its own"
                raise UnionfsError(f"{rule.said_by}: {rule.path}: {what}", hint=hint)

    def _covers(self, rule: Rule, place: str) -> bool:
        """Whether a path would be seen through what is mounted for a rule.

        Not what somebody has mounted on that since, as on the root of a system that runs.
        """
        point = below(self.top, rule.path)
        if not lies_in(place, point):
            return False
        if point not in self.ground.standing:
            return True
        others = (e.point for e in read_mounts() if e.point not in self.ground.standing)
        return not any(o != point and lies_in(o, point) and lies_in(place, o) for o in others)

    def _has_base(self, rule: Rule, point: str, view: str) -> bool:
        """Whether the base has a path that lies below another one of the profile, in place."""
        others = [
            other for other in self.profile.rules if other != rule and other.covers(rule.path)
        ]
        covered = next((o for o in others if below(self.top, o.path) in self.ground.standing), None)
        if covered is None:
            return self._has(rule, point)
        if not {view, self.seen_at(rule)} & self.ground.standing and not _is_empty(point):
            what = f"{rule.path} is new below {covered.path}, which is mounted and covers the base"
            hint = f"take it down first: unionfs down {self.profile.name}"
            raise UnionfsError(f"{rule.said_by}: {what}", hint=hint)
        return view in self.ground.standing

    def _has(self, rule: Rule, place: str) -> bool:
        """Whether there is something at a place of the base that a rule can be for."""
        found = _look(place)
        if found == "file" and not (rule.kind == "exclude" and self.ground.may_mount):
            hint = "give a rule to its directory"
            raise UnionfsError(f"{rule.said_by}: {rule.path} is no directory", hint=hint)
        return found is not None

    def _step(self, rule: Rule, point: str, lowers: list[str]) -> Step:
        like = lowers[0] if lowers else None
        step = Step(action="union", path=rule.path, point=point, like=like)
        match rule.kind:
            case "persist":
                upper = rule.upper or place_in_store(self.profile, rule)
                options = self._options(rule, point, lowers, upper)
                if self.wish.only_read:
                    options = self._covered(options)
                return dataclasses.replace(step, options=options)
            case "tmpfs" if rule.union:
                memory = _memory(rule.size)
                return dataclasses.replace(step, options=self._options(rule, point, lowers, memory))
            case "tmpfs":
                self._need_rights(rule, "an empty tmpfs")
                return dataclasses.replace(step, action="memory", size=rule.size)
            case "exclude" if self._can_bind(lowers):
                return dataclasses.replace(step, action="bind", source=lowers[0], readonly=True)
            case "exclude":
                return dataclasses.replace(step, options=self._options(rule, point, lowers, None))
        self._need_rights(rule, rule.kind)
        if rule.kind == "bind":
            return self._stored(rule, step)
        return dataclasses.replace(step, action="links", source=self._linked(rule))

    def _stored(self, rule: Rule, step: Step) -> Step:
        """A directory of the store as it is, at the place of the step; only read: below memory."""
        source = place_in_store(self.profile, rule)
        if self.wish.only_read:
            options = self._options(rule, step.point, [source], _memory(self.wish.size))
            return dataclasses.replace(step, action="union", options=options)
        flags = cast(str | None, self._said(rule).asked("store_flags"))
        return dataclasses.replace(step, action="bind", source=source, flags=flags)

    def _covered(self, options: MountOptions) -> MountOptions:
        """The store is only read, beneath memory (opened.py)."""
        return dataclasses.replace(
            options,
            ephemeral=True,
            ephemeral_size=self.wish.size,
            autogrow=None,
            low_water=None,
            store_flags=None,
        )

    def _linked(self, rule: Rule) -> str:
        """Where the files that are linked to are seen."""
        return f"{self.ground.directory}/links/{runtime.name_of(rule.path)}"

    def _can_bind(self, lowers: list[str]) -> bool:
        return self.ground.may_mount and len(lowers) == 1

    def _need_rights(self, rule: Rule, what: str) -> None:
        if not self.ground.may_mount:
            hint = "use persist or tmpfs, which an ordinary user may mount"
            raise UnionfsError(f"{rule.said_by}: {rule.path}: {what} needs root", hint=hint)

    def _need_a_way(self, rule: Rule) -> None:
        """fusermount3, which is root's, has to reach the mount point: through the unions above."""
        if self.ground.may_mount:
            return
        for other in self.profile.rules:
            covers = other != rule and other.covers(rule.path)
            if covers and not self._said(other).has("allow_other"):
                what = f"{rule.path}: an ordinary user's path below {other.path} needs allow_other"
                hint = 'add options = "allow_other", and user_allow_other to /etc/fuse.conf'
                raise UnionfsError(f"{rule.said_by}: {what}", hint=hint)

    def _lowers(self, rule: Rule) -> list[str]:
        """What the layers of the base have of a path."""
        for layer in filter(locator.is_directory, self.base):
            links.refuse(rule.said_by, layer, rule.path)
        places = [_inside(layer, rule.path) for layer in self.base]
        return [place for place in places if rule.path == "/" or self._has(rule, place)]

    def _said(self, rule: Rule, *, stored: bool = True) -> OptionReader:
        """What is said of a path, by the files and by who brings it up; stored: in a store."""
        reader = read_strings(self.profile.options)
        # Said once for all paths.  What the rule itself says stays, and is an error there.
        others = () if stored else _OF_STORE
        reader.forget(others)
        for text in rule.options:
            reader.take(text)
        for text in (*self.wish.options, *self.wish.defaults):
            said = read_strings([text]).said()
            if said.isdisjoint(others):
                if text in self.wish.options:
                    reader.forget(said)
                elif not said.isdisjoint(reader.said()):
                    continue
                reader.take(text)
        return reader

    def _options(
        self, rule: Rule, point: str, lowers: list[str], upper: str | None
    ) -> MountOptions:
        """Those of a union, as if they were given on a command line."""
        name = f"{self.profile.name}:{runtime.name_of(rule.path)}"
        reader = self._said(rule, stored=upper is not None and not upper.startswith("tmpfs:"))
        try:
            reader.lowers = list(lowers) or [f"{self.ground.directory}/{EMPTY}"]
            reader.mountpoint = point
            if upper is not None:
                reader.set("upper", upper, rule.path)
            for setting, value in (("name", name), ("fsname", name), ("nonempty", True)):
                if not reader.has(setting):
                    reader.set(setting, value, f"{setting}={value}")
            return reader.build()
        except UnionfsError as exc:
            raise UnionfsError(
                f"{rule.said_by}: {rule.path}: {exc.message}", hint=exc.hint
            ) from exc


def _memory(size: str | None) -> str:
    """The upper that is in memory."""
    return f"tmpfs:size={size}" if size else "tmpfs:"


def _inside(layer: str, path: str) -> str:
    """The locator of a path inside a layer."""
    where = locator.parse(layer)
    if path == "/":
        return layer
    if locator.is_directory(layer):
        return below(layer, path)
    return f"{where.source}:{below(where.directory or '/', path)}"


def _is_empty(place: str) -> bool:
    """Whether an empty directory could be shown there, and nobody would miss anything."""
    try:
        return not os.listdir(place)
    except OSError as exc:
        return exc.errno == errno.ENOENT


def _look(text: str) -> Literal["directory", "file"] | None:
    """What a layer has at a place; a symbolic link there is an error."""
    try:
        fd = open_seen(text)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"cannot look at {text} in the base: {reason}") from exc
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISLNK(mode):
            hint = f"name what it points to: {os.readlink('', dir_fd=fd)}"
            raise UnionfsError(f"{text} is a symbolic link in the base", hint=hint)
        return "directory" if stat.S_ISDIR(mode) else "file"
    finally:
        os.close(fd)
