# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a mounted union, or kernel overlayfs, uses a place that is about to be replaced.

Owns which nesting counts.  A layer that is the place or lies in it would go with it, and an upper
or a work directory that the place lies in would be changed behind the back of who has it.  A lower
may have the place in it: that of a union over `/` has all.  A lock tells of the very upper only.
Called by foreign.py.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from unionfs import locator
from unionfs.errors import UnionfsError
from unionfs.mounts import MountEntry, Position, locate, read_mounts
from unionfs.stores.mounted import answers, is_same
from unionfs.unions import ask_in_child, texts

if TYPE_CHECKING:
    from unionfs.stores.backing import Chosen

_DEADLINE: Final = 2.0  # seconds
_COLON: Final = re.compile(r"(?<!\\):")
_KERNEL: Final = {"upperdir": "upper", "workdir": "work", "lowerdir": "lower", "lowerdir+": "lower"}
_CHANGED: Final = ("upper", "work")
_TITLES: Final = {"upper": "the upper", "work": "the work directory", "lower": "a lower"}


class _Layer(NamedTuple):
    """What somebody has mounted.  `directory`: where in the image that is at `path`."""

    who: str  # and where it is mounted
    point: str
    kind: str
    path: str
    directory: str | None = None


class _Seen(NamedTuple):
    """Where a path leads to."""

    identity: tuple[int, int]
    position: Position | None


def refuse(upper: "Chosen") -> None:
    """Raise an error if somebody uses what would go, or change, with an upper."""
    mounts = read_mounts()
    own = _own(upper, mounts)
    for layers in (*_of_unions(), *_of_kernel(mounts)):
        seen = _look([layer.path for layer in layers])
        for layer, its in zip(layers, seen, strict=False):
            if how := _meets(upper, own, layer, its):
                what = f"{upper.name} {how} {_TITLES[layer.kind]} of {layer.who} at {layer.point}"
                verb = "unionfs umount" if layer.who == "the union" else "umount"
                raise UnionfsError(what, hint=f"unmount it first: {verb} {layer.point}")


def _meets(upper: "Chosen", own: _Seen, layer: _Layer, its: _Seen | None) -> str:
    """How a layer is related to what is replaced; empty if it is not."""
    there, place = None if its is None else its.position, own.position
    if layer.directory is not None:
        if upper.volume.contents is not None and is_same(layer.path, upper.volume.path):
            there, place = Position("", layer.directory), Position("", upper.directory)
        elif there is not None and place is not None and there.inside(place):
            return f"has {layer.path} in it,"
        else:
            return ""
    elif its is not None and its.identity == own.identity:
        return "is"
    if there is None or place is None:
        return ""
    if there.inside(place):
        return "is" if there == place else f"has {layer.path} in it,"
    return f"lies in {layer.path}," if layer.kind in _CHANGED and place.inside(there) else ""


def _own(upper: "Chosen", mounts: list[MountEntry]) -> _Seen:
    status = os.fstat(upper.fd)
    position = locate(upper.fd, mounts)
    if upper.volume.contents is not None:
        number = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
        known = (entry.device for entry in mounts if entry.source == upper.volume.device)
        position = Position(next(known, number), upper.directory)
    return _Seen((status.st_dev, status.st_ino), position)


def _of_unions() -> Iterator[list[_Layer]]:
    """The layers of each union that answers; a stranger's can only be in the way."""
    for entry, facts in answers(_DEADLINE, None):
        layers = [_lower(entry.point, text) for text in texts(facts.get("lowers"))]
        layers += [_Layer("the union", entry.point, "work", t) for t in texts(facts.get("work"))]
        layers += _uppers(entry.point, facts)
        if found := [layer for layer in layers if layer is not None and layer.path[:1] == "/"]:
            yield found


def _lower(point: str, text: str) -> _Layer | None:
    if not text or locator.is_tag(text):
        return None  # mounted for reading only: nobody can write to its file system meanwhile
    if locator.is_directory(text):
        return _Layer("the union", point, "lower", text)
    where = locator.parse(text)
    return _Layer("the union", point, "lower", where.value, where.directory or "/")


def _uppers(point: str, facts: dict[str, Any]) -> Iterator[_Layer]:
    store = facts.get("store")
    told = store if isinstance(store, dict) else {}
    source, directory = told.get("source"), told.get("directory")
    if isinstance(source, str) and isinstance(directory, str):
        yield _Layer("the union", point, "upper", source, directory)
        return
    for text in texts(facts.get("upper")):
        yield _Layer("the union", point, "upper", text)


def _of_kernel(mounts: list[MountEntry]) -> Iterator[list[_Layer]]:
    """The layers of each kernel overlay, as far as their paths are ours."""
    for entry in mounts:
        if entry.fstype != "overlay":
            continue
        found = []
        for word in entry.options.split(","):
            key, _, value = word.partition("=")
            if key in _KERNEL:
                paths = _COLON.split(value) if key == "lowerdir" else [value]
                plain = (re.sub(r"\\(.)", r"\1", path) for path in paths)
                found += [
                    _Layer("kernel overlayfs", entry.point, _KERNEL[key], path)
                    for path in plain
                    if path.startswith("/")
                ]
        if found:
            yield found


def _look(paths: list[str]) -> list[_Seen | None]:
    """Where they lie.  A child looks: one may be on a file system that hangs."""

    def question() -> bytes:
        mounts = read_mounts()
        return json.dumps([_see(path, mounts) for path in paths]).encode()

    reply = ask_in_child(question, _DEADLINE)
    if not isinstance(reply, bytes):
        return []
    return [
        item and _Seen((item[0][0], item[0][1]), item[1] and Position(*item[1]))
        for item in json.loads(reply)
    ]


def _see(path: str, mounts: list[MountEntry]) -> _Seen | None:
    try:
        fd = os.open(path, os.O_PATH)
    except OSError:
        return None
    status = os.fstat(fd)
    position = locate(fd, mounts)
    os.close(fd)
    return _Seen((status.st_dev, status.st_ino), position)
