# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's command line, read for what it asks of the root's union.

Owns how it is cut (as the kernel does: lib/cmdline.c), and which of several words wins.  The words
are in words.py.  Pure: looks at nothing but the text, and raises nothing whatever that is.  Called
by root.py.

Later wins, between all words alike, and a notice says so.  Where the changes are kept (a store,
memory, nowhere) and how (the mode) are two things: a store means persist and memory means ram
unless a word says something about the mode itself, wherever that stands.  What only says how does
not ask for a union.
"""

import re
from dataclasses import dataclass, field
from typing import Final, cast

from unionfs.boot.readers import MEMORY, NOWHERE, Malformed
from unionfs.boot.request import Fallback, Mode, OnMismatch, Request
from unionfs.boot.words import NATIVE, WORDS
from unionfs.errors import printable

_SPACE: Final = " \t\n\v\f\r"
_ASKING: Final = ("place", "persistence", "persistent")
_PERSISTENCE: Final = "LABEL=persistence"
# Who wrote one into the command line shall not find it in the log besides.
_PASSPHRASE: Final = re.compile(r"((?:^|[:,])pass=)[^,]+")


def cut(text: str) -> list[tuple[str, str | None]]:
    """Its words, each with what follows `=`.  What follows `--` is for init."""
    words = []
    position, end = 0, len(text)
    while position < end:
        if text[position] in _SPACE:
            position += 1
            continue
        start, quoted = position, False
        while position < end and (quoted or text[position] not in _SPACE):
            quoted ^= text[position] == '"'
            position += 1
        word = text[start:position]
        if word == "--":
            break
        words.append(_split(word))
    return words


def _split(word: str) -> tuple[str, str | None]:
    """NAME=VALUE; quotes around the value, or the whole, are dropped."""
    whole = word.startswith('"')
    if whole:
        word = word[1:].removesuffix('"')
    equals = word.find("=", 1)
    if equals < 0:
        return word, None
    name, value = word[:equals], word[equals + 1 :]
    if not whole and value.startswith('"'):
        value = value[1:].removesuffix('"')
    return name, value


def parse_cmdline(text: str) -> Request:
    """What it asks for."""
    reading = _Reading()
    for name, value in cut(text):
        reading.take(name, value)
    return reading.request()


@dataclass
class _Reading:
    """What the words so far have said."""

    values: dict[str, object] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    asked: bool = False
    word: str = ""  # the one that is being read, as it is written

    def take(self, name: str, value: str | None) -> None:
        """One word."""
        shown = _PASSPHRASE.sub(r"\1...", value or "")
        self.word = name if value is None else f"{name}={shown}"
        known = name
        if name.startswith(NATIVE):
            known = name.replace("_", "-")  # as the kernel, which takes either
        reader = WORDS.get(known)
        if reader is None:
            if name.startswith(NATIVE):
                self.note("this word is not known")
            return
        try:
            reader(self, value)
        except Malformed as exc:
            self.note(f"ignored: {exc}")

    def say(self, field: str, value: object) -> None:
        """Later wins."""
        if self.values.get(field, value) != value:
            self.note(f"it overrides {self.sources[field]}")
            if field == "place" and self.sources.get("directory") == self.sources["place"]:
                del self.values["directory"], self.sources["directory"]
        self.values[field] = value
        self.sources[field] = self.word

    def ask(self) -> None:
        """Whatever else is said."""
        self.asked = True
        self.sources["asked"] = self.word

    def note(self, text: str) -> None:
        """One line, with the word that it is about."""
        self.notices.append(printable(f"{self.word}: {text}"))

    def request(self) -> Request:
        """All of it together."""
        values = self.values
        store, mode = self._store(), self._mode()
        if store is None and mode in ("persist", "ro"):
            store = _PERSISTENCE
        asked = mode != "off" or "profile" in values
        if values and not asked and not {"place", "mode"} & values.keys():
            words = ", ".join(dict.fromkeys(self.sources.values()))
            self.notices.append(printable(f"{words}: without effect, as nothing asks for a union"))
        crypt = cast(str | None, values.get("crypt"))
        if crypt != store:  # another word named another store
            crypt = None
        by_name = bool(values.get("encrypted")) and store is not None and crypt is None
        if by_name:
            crypt = store
        return Request(
            asked=asked,
            mode=mode,
            store=store,
            directory=cast(str | None, values.get("directory")),
            flags=cast(str | None, values.get("flags")),
            size=cast(str | None, values.get("size")),
            reset=bool(values.get("reset", False)),
            crypt=crypt,
            crypt_by_name=by_name,
            toram=bool(values.get("toram", False)),
            lower=cast(str | None, values.get("lower")),
            timeout=cast(float | None, values.get("timeout")),
            fallback=cast(Fallback, values.get("fallback", "tmpfs")),
            on_mismatch=cast(OnMismatch, values.get("on_mismatch", "refuse")),
            profile=cast(str | None, values.get("profile")),
            # Without a store nothing says what persists.
            persistence=bool(values.get("persistence", False)) and mode in ("persist", "ro"),
            options=cast(str, values.get("options", "")),
            notices=tuple(self.notices),
            sources=self._sources(),
        )

    def _mode(self) -> Mode:
        """How the changes are kept; off if nothing asks for a union."""
        said = cast(Mode | None, self.values.get("mode"))
        asked = self.asked or any(self.values.get(name, False) is not False for name in _ASKING)
        if not asked or self.values.get("place") == NOWHERE:
            return "off"
        if said is not None and not (said == "ro" and self.values.get("place") == MEMORY):
            return said
        wanted = self._store() is not None or self.values.get("persistent", False)
        return "persist" if wanted else "ram"

    def _store(self) -> str | None:
        """A place that is said wins over the names that stores have by themselves."""
        place = cast(str | None, self.values.get("place"))
        if place is not None:
            return None if place in (MEMORY, NOWHERE) else place
        label = cast(str | None, self.values.get("label"))
        if self.values.get("persistence"):
            return label or _PERSISTENCE
        return label if self.values.get("persistent") else None

    def _sources(self) -> dict[str, str]:
        """Of the request's fields, and no others; the place is its store, or its mode."""
        sources = {name: printable(word) for name, word in self.sources.items()}
        place = sources.pop("place", None) or sources.pop("label", None)
        if place is not None:
            sources["store" if self.values.get("place") != MEMORY else "mode"] = place
        asked = sources.pop("persistent", None)
        if asked is not None and self.values["persistent"]:
            sources.setdefault("store", asked)
        encrypted = sources.pop("encrypted", None)
        if encrypted is not None:
            sources["crypt"] = encrypted
        return sources
