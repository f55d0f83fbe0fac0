# SPDX-License-Identifier: GPL-2.0-or-later
"""Roots of which only parts persist: by a store's persistence.conf, or by a profile.

Owns what such a profile gets besides its rules, and which words mean nothing beside it.  Called by
root.py.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Final, cast

from unionfs import locator
from unionfs.boot.request import Request
from unionfs.boot.telling import NAME
from unionfs.errors import UnionfsError, printable
from unionfs.options import escape, read_strings
from unionfs.profiles import files, persistence, running
from unionfs.profiles.plan import Wish
from unionfs.profiles.profile import Profile, Rule
from unionfs.stores import find

_HOLDS_ROOT: Final = "holds-root"
# What the command line says of one union of the whole root.
_OF_ROOT: Final = (
    *("mode", "store", "directory", "flags", "size", "reset", "crypt", "toram", "lower"),
    "persistence",
)


def persistent(request: Request) -> Profile:
    """What the persistence.conf of a store says, as a profile, with the root itself in memory.

    live-boot's persistence-path= is where in the store it all is.
    """
    assert request.store is not None
    find.find(locator.parse(request.store), timeout=request.seconds)
    profile = Profile(name=NAME, store=request.store)
    profile = persistence.complete(profile, request.directory or "/")
    # What is only read is not made there.
    rules = persistence.there(profile) if request.mode == "ro" else list(profile.rules)
    if not any(rule.path == "/" for rule in rules):
        memory = Rule(path="/", kind="tmpfs", size=request.size, said_by="persistence")
        rules.insert(0, memory)
    return dataclasses.replace(profile, rules=tuple(rules))


def up_persistent(profile: Profile, request: Request, root: str, base: str | None) -> list[str]:
    """Bring it up, over what is on the root or another base; what is to be told."""
    words = [f"fallback={request.fallback}", f"on-mismatch={request.on_mismatch}"]
    if request.flags is not None:
        words.append(f"store-flags={escape(request.flags)}")
    if request.options:
        words.append(request.options)
    wish = Wish(
        options=(_HOLDS_ROOT, *words),
        # A stick that was pulled out of one machine is in this one now.
        defaults=("other-machine=take",),
        base=base,
        only_read=request.mode == "ro",
        size=request.size,
    )
    return _up(profile, root, wish)


def uppers(profile: Profile) -> tuple[list[str], list[str]]:
    """Where its changes lie, by themselves; and the paths where they do not."""
    own = [rule.upper for rule in profile.rules if rule.upper is not None]
    return own, [rule.path for rule in profile.rules if rule.kind in ("bind", "link")]


def beside_profile(request: Request, root: str) -> tuple[Request, str | None]:
    """The request without words that mean nothing beside its profile, and a line about them.

    That is all about a union of the root, unless there is one that the profile leaves room for.
    """
    if request.mode != "off" and not _covers_root(request, root):
        return request, None
    idle = {name: word for name, word in request.sources.items() if name in _OF_ROOT}
    kept = {name: word for name, word in request.sources.items() if name not in idle}
    request = dataclasses.replace(request, mode="off", sources=kept)
    if not idle:
        return request, None
    words = ", ".join(dict.fromkeys(idle.values()))
    return request, printable(f"{words}: without effect beside {request.sources['profile']}")


def _covers_root(request: Request, root: str) -> bool:
    assert request.profile is not None
    with contextlib.suppress(UnionfsError):  # told when it is brought up
        profile = files.said(request.profile, root)
        kinds = [rule.kind for rule in profile.rules if rule.path == "/"]
        return profile.where == "/" and kinds != [] and kinds != ["exclude"]
    return False


def up_profile(request: Request, root: str) -> list[str]:
    """A profile of the system that is booted; what is to be told.

    What the command line says wins over its files; the defaults of a boot are for what they do not
    say.
    """
    assert request.profile is not None
    _await(files.said(request.profile, root), request)
    profile = files.load(request.profile, root)
    words = [_HOLDS_ROOT, "device-timeout=0"]  # they have been waited for
    for name, word in (("fallback", "fallback"), ("on_mismatch", "on-mismatch")):
        if name in request.sources:
            words.append(f"{word}={getattr(request, name)}")
    if request.options:
        words.append(request.options)
    wish = Wish(options=tuple(words), defaults=(f"fallback={request.fallback}",))
    return _up(profile, root, wish)


def _await(profile: Profile, request: Request) -> None:
    """Wait once for all that a profile's changes lie on; its mounts tell of what does not come."""
    said = cast(float | None, read_strings(profile.options).asked("device_timeout"))
    seconds = request.seconds if request.timeout is not None or said is None else said
    end = time.monotonic() + seconds
    for store in dict.fromkeys(_stores(profile)):
        with contextlib.suppress(UnionfsError):
            find.find(locator.parse(store), timeout=max(0, end - time.monotonic()))


def _stores(profile: Profile) -> Iterator[str]:
    if profile.store is not None:
        yield profile.store
    yield from (rule.upper for rule in profile.rules if rule.upper is not None)


def _up(profile: Profile, root: str, wish: Wish) -> list[str]:
    warnings = running.up(profile, root, wish).warnings
    running.hand_over(profile.name, root)
    return warnings
