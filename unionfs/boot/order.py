# SPDX-License-Identifier: GPL-2.0-or-later
"""What comes first at a boot, where one mount lies over what another one is about.

Owns the order of profiles among each other, and which lines of fstab come after a profile.  What
would be covered comes later, else it were seen or not by chance.  Pure.  Called by the generator.
"""

import os
from collections.abc import Sequence

from unionfs import locator
from unionfs.mounts import unescape
from unionfs.profiles.profile import Profile, Rule, below, lies_in


def earlier(profiles: Sequence[Profile]) -> dict[str, list[str]]:
    """For each profile, which others are to be up before it.

    Those that cover where it mounts, its base or its store.  Of two that cover each other, or the
    same path, the first by name.
    """
    left = sorted(profiles, key=lambda profile: profile.name)
    done: list[Profile] = []
    found = {}
    while left:
        free = (p for p in left if not any(_stands_on(p, q) for q in left if q is not p))
        chosen = next(free, left[0])
        found[chosen.name] = [other.name for other in done if _stands_on(chosen, other)]
        done.append(chosen)
        left.remove(chosen)
    return found


def mounted_over(profile: Profile, fstab: bytes) -> list[str]:
    """The mount points of fstab that are to be seen in what a profile covers.

    Not those that one of its own rules is about, or that it needs itself.
    """
    points, needed = profile.points(), _stands(profile)
    found = []
    for line in fstab.splitlines():
        fields = line.split()
        if len(fields) < 3 or fields[0].startswith(b"#") or not fields[1].startswith(b"/"):
            continue
        place = below("/", unescape(fields[1]))
        free = not any(lies_in(path, place) for path in needed)
        if free and any(lies_in(place, point) for point in points):
            found.append(place)
    return found


def _stands_on(one: Profile, other: Profile) -> bool:
    points = [point for point in other.points() if point != "/"]
    return any(lies_in(path, point) for path in _stands(one) for point in points)


def _stands(profile: Profile) -> list[str]:
    """All paths that it is about."""
    paths = list(profile.points())
    for rule in profile.rules:
        paths += [_inside(layer, rule) for layer in profile.base]
        paths += [locator.cut(rule.upper)[0]] if rule.upper is not None else []
    if profile.store is not None:
        paths.append(locator.cut(profile.store)[0])
    return [os.path.normpath(path) for path in paths if path.startswith("/")]


def _inside(layer: str, rule: Rule) -> str:
    """A plain path of the base, for all that its text tells: an image lies where that lies, too."""
    source, inside = locator.cut(layer)
    return below(source, rule.path) if inside is None and source.startswith("/") else source
