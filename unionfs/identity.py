# SPDX-License-Identifier: GPL-2.0-or-later
"""What a store remembers of itself and of the base it was made over: AREA/store.

Owns the record and the rule by which a base is another one.  Does not read or write the file
(work.py), nor find out what a base is (stores/base.py).  Called by opened.py and `unionfs store`.

    {"version": 1, "uuid": ..., "created": ..., "used": ..., "base": {...} or null}

A base is told from another by the UUID of its file system; without one (squashfs) by a digest of
its super block and tables, else by its label.  A directory that is the root of a mounted file
system is that file system.  Any other has nothing that would tell it from another: it is recorded,
and never another one.
"""

import dataclasses
import datetime
import json
import uuid
from dataclasses import dataclass
from typing import Final

from unionfs.errors import UnionfsError

FILE: Final = "store"
VERSION: Final = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The lowest lower of a union."""

    name: str
    kind: str  # a type of file system, or "directory"
    path: str
    label: str = ""
    uuid: str = ""
    content: str = ""

    @property
    def recognizable(self) -> bool:
        """Whether another one can be told from it."""
        return bool(self.uuid or self.content or self.label)

    def same(self, other: "Base") -> bool:
        """Whether nothing says that they are two."""
        for mine, its in (
            (self.uuid, other.uuid),
            (self.content, other.content),
            (self.label, other.label),
        ):
            if mine and its:
                return mine == its
        return True

    def proves(self, other: "Base") -> bool:
        """Whether something says that they are one.  A label does not: others may have it."""
        return any(
            mine and mine == its
            for mine, its in ((self.uuid, other.uuid), (self.content, other.content))
        )

    def __str__(self) -> str:
        known = {"label": self.label, "UUID": self.uuid, "content": self.content[:12]}
        told = ", ".join(f"{name} {value}" for name, value in known.items() if value)
        return f"{self.name} ({self.kind}{', ' if told else ''}{told})"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreRecord:
    """Made at the first mount of an upper, and the same from then on, also after a reset.

    Of a store that was only created there is none: in its file system there is no upper yet, which
    is called after its base, and what identifies the file system is the UUID of its own.
    """

    uuid: str
    created: str  # ISO 8601, UTC
    used: str
    base: Base | None

    def text(self) -> str:
        """As it stands in AREA/store."""
        return json.dumps({"version": VERSION} | dataclasses.asdict(self), indent=1) + "\n"

    def used_now(self, base: Base | None) -> "StoreRecord":
        """The same, used; the base is remembered if none was that can be recognized."""
        keeps = base is None or (self.base is not None and self.base.recognizable)
        return dataclasses.replace(self, used=_now(), base=self.base if keeps else base)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def new_record(base: Base | None) -> StoreRecord:
    """For a store that has none."""
    now = _now()
    return StoreRecord(uuid=str(uuid.uuid4()), created=now, used=now, base=base)


def parse_store(text: str, path: str) -> StoreRecord:
    """Read AREA/store; an error names the newer version or what is damaged."""
    hint = "remove the file: a new one is made, and any base is taken for the right one"
    try:
        found = json.loads(text)
        version = found["version"]
        if isinstance(version, int) and version > VERSION:
            raise UnionfsError(
                f"{path} says version {version}, newer than this program's {VERSION}",
                hint="use a newer unionfs",
            )
        base = None if found["base"] is None else _base(found["base"])
        words = {name: found[name] for name in ("uuid", "created", "used")}
        if not all(isinstance(word, str) for word in words.values()):
            raise TypeError
        return StoreRecord(base=base, **words)
    except (ValueError, KeyError, TypeError) as exc:
        raise UnionfsError(f"{path} is damaged: it is not understood", hint=hint) from exc


def told(record: StoreRecord) -> dict[str, object]:
    """What a union tells of it in its status."""
    base = None if record.base is None else dataclasses.asdict(record.base)
    return {
        "id": record.uuid,
        "created": record.created,
        "used": record.used,
        "base": None if record.base is None else str(record.base),
        "over": base,
    }


def parse_told(facts: dict[str, object]) -> StoreRecord | None:
    """The same from a status; None if that does not say enough."""
    words = [facts.get(name) for name in ("id", "created", "used")]
    over = facts.get("over")
    try:
        base = None if over is None else _base(over) if isinstance(over, dict) else None
    except (KeyError, TypeError):
        base = None
    number, created, used = (word if isinstance(word, str) else "" for word in words)
    return StoreRecord(uuid=number, created=created, used=used, base=base) if number else None


def _base(found: dict[str, object]) -> Base:
    words = {field.name: found[field.name] for field in dataclasses.fields(Base)}
    if not all(isinstance(word, str) for word in words.values()):
        raise TypeError
    return Base(**{name: str(word) for name, word in words.items()})


def mismatch(record: StoreRecord | None, base: Base | None, store: str) -> UnionfsError | None:
    """The error to raise if a store was made over another base."""
    if record is None or record.base is None or base is None or record.base.same(base):
        return None
    return UnionfsError(
        f"the store {store} was made over {record.base}, not over {base}",
        hint="mount the right base, choose another directory by :/dir, "
        "or say on-mismatch=ro or on-mismatch=ignore",
    )
