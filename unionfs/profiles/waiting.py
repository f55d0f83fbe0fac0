# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for the devices that a profile names: once for all its paths, and for all at once.

Owns which ones, and how long: `device-timeout=` of the profile or of a rule, the longest.  What has
not come by then is missing to every union in turn, without another wait.  Called by running.py.
"""

import contextlib
import time
from collections.abc import Iterable
from typing import Final, cast

from unionfs import locator
from unionfs.errors import UnionfsError
from unionfs.options import OptionReader, read_strings
from unionfs.profiles.plan import Wish
from unionfs.profiles.profile import Profile, Rule
from unionfs.stores import find

_OF_STORE: Final = ("persist", "bind", "link")


def wait(profile: Profile, rules: Iterable[Rule], wish: Wish) -> None:
    """Until all that these rules stand on is there, or the time is over.

    What is wrong with it is said by who mounts it.
    """
    began = time.monotonic()
    for (source, search), seconds in _wanted(profile, rules, wish).items():
        left = max(0, seconds - (time.monotonic() - began))
        with contextlib.suppress(UnionfsError):
            find.find(locator.parse(source), search=search, timeout=left)


def _wanted(
    profile: Profile, rules: Iterable[Rule], wish: Wish
) -> dict[tuple[str, find.Search], float]:
    """Each locator with where it is looked for, and for how long."""
    wanted: dict[tuple[str, find.Search], float] = {}
    for rule in rules:
        named = [*profile.base, rule.upper or profile.store if rule.kind in _OF_STORE else None]
        with contextlib.suppress(UnionfsError):  # the plan says what is wrong with the options
            words = (*wish.defaults, *profile.options, *rule.options, *wish.options)
            said = read_strings(words)
            for text in named:
                if text is not None:
                    key = locator.parse(text).source, search_of(said)
                    wanted[key] = max(wanted.get(key, 0), seconds_of(said))
    return wanted


def seconds_of(said: OptionReader) -> float:
    """How long options wait for a device."""
    return cast(float, said.asked("device_timeout") or 0)


def search_of(said: OptionReader) -> find.Search:
    """Where options look for a tag."""
    return cast(find.Search, said.asked("search") or "devices")
