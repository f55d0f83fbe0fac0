# SPDX-License-Identifier: GPL-2.0-or-later
"""Roots of which only parts persist: by a store's persistence.conf, or by a profile.

Owns what such a profile gets besides its rules.  Called by root.py.
"""

import dataclasses

from unionfs import locator
from unionfs.boot.request import Request
from unionfs.boot.telling import NAME
from unionfs.errors import UnionfsError
from unionfs.profiles import files, persistence, running
from unionfs.profiles.profile import Profile, Rule
from unionfs.stores import find

_HOLDS_ROOT = "holds-root"


def up_persistence(request: Request, root: str) -> list[str]:
    """The root in memory, as live-boot has it, with what the store says; what is to be told."""
    assert request.store is not None
    if request.mode != "persist":
        hint = "leave it out, or use a store without persistence.conf"
        raise UnionfsError("persistence.conf and a store that is only read", hint=hint)
    find.find(locator.parse(request.store), timeout=request.seconds)
    profile = persistence.complete(Profile(name=NAME, store=request.store))
    rules = profile.rules
    if profile.find("/") is None:
        rules = (Rule(path="/", kind="tmpfs", size=request.size, said_by="persistence"), *rules)
    words = [_HOLDS_ROOT, f"fallback={request.fallback}", f"on-mismatch={request.on_mismatch}"]
    if request.options:
        words.append(request.options)
    return _up(dataclasses.replace(profile, rules=rules, options=tuple(words)), root)


def up_profile(request: Request, root: str) -> list[str]:
    """A profile of the system that is booted; what is to be told."""
    assert request.profile is not None
    profile = files.load(request.profile, root)
    return _up(dataclasses.replace(profile, options=(*profile.options, _HOLDS_ROOT)), root)


def _up(profile: Profile, root: str) -> list[str]:
    warnings = running.up(profile, root).warnings
    running.hand_over(profile.name, root)
    return warnings
