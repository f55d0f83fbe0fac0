# SPDX-License-Identifier: GPL-2.0-or-later
"""How a layer is named: a directory, an image, a device, or a tag of one; and `:/dir` inside it.

Owns the grammar.  Does not find or open anything (stores/).  Called by options.py, the daemon and
the verbs of stores.

    DIR                          a directory
    IMAGE, /dev/NAME             a file system in a file or on a device
    LABEL=X  UUID=X              the device whose file system has it
    PARTLABEL=X  PARTUUID=X      the device whose entry in the partition table has it
    any of these:/dir            a directory inside
    tmpfs:size=1G                memory; an upper only (options.py reads it)

In a tag's value `\\xHH` is a byte, as in the names below /dev/disk, and double quotes around it are
dropped, as mount(8) does.  A path that exists as it is written is never taken apart.
"""

import os
import re
import stat
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args

from unionfs.errors import UnionfsError, usage_error

Tag = Literal["LABEL", "UUID", "PARTLABEL", "PARTUUID"]
TAGS: Final[tuple[Tag, ...]] = get_args(Tag)
_TAG: Final = re.compile(rf"({'|'.join(TAGS)})=(.*)", re.DOTALL)
_VALUE: Final = re.compile(r'("[^"]*"|(?:(?!:/).)*)(?::(/.*))?', re.DOTALL)
_ESCAPE: Final = re.compile(r"\\x([0-9a-fA-F]{2})")
_DEVICES: Final = "/dev/"


@dataclass(frozen=True, slots=True)
class Locator:
    """Where a layer is to be found.  `value` is the tag's value, or a path."""

    text: str  # as its user is told it
    value: str
    tag: Tag | None = None
    directory: str | None = None  # inside, absolute; None: not said

    @property
    def source(self) -> str:
        """The same without the directory inside."""
        return f"{self.tag}={self.value}" if self.tag else self.value


def unescape_tag(text: str) -> str:
    r"""The value of a tag: \xHH are bytes, and what is not UTF-8 stays as Python keeps it."""
    if "\\x" not in text:
        return text
    raw = _ESCAPE.sub(lambda match: chr(0xDC00 + int(match[1], 16)), text)
    # Bytes of one character may be escaped one by one.
    data = b"".join(
        bytes([ord(c) - 0xDC00]) if 0xDC00 <= ord(c) <= 0xDCFF else os.fsencode(c) for c in raw
    )
    return os.fsdecode(data)


def is_tag(text: str) -> bool:
    """Whether it is no path."""
    return _TAG.fullmatch(text) is not None


def parse(text: str) -> Locator:
    """Read a locator.  Looks whether paths exist, since `:/` may be part of a name.

    Raises UnionfsError for an empty one, as a variable is that is not set: the empty path of a
    directory would be the current one.
    """
    match = _TAG.fullmatch(text)
    if match is not None:
        parts = _VALUE.fullmatch(match[2])
        value, inside = (parts[1], parts[2]) if parts is not None else (match[2], None)
        if len(value) >= 2 and value[0] == value[-1] == '"':
            value = value[1:-1]
        if not value:
            raise _empty(text)
        return Locator(text, unescape_tag(value), cast(Tag, match[1]), _normal(inside))
    path, inside = _split_path(text)
    return Locator(text, path, None, _normal(inside))


def _empty(text: str) -> UnionfsError:
    what = f"{text} names no store" if text else "the name of a store or a layer is empty"
    return usage_error(what, "name a directory, an image, a device or LABEL=...")


def _normal(inside: str | None) -> str | None:
    return None if inside is None else os.path.normpath("/" + inside.lstrip("/"))


def _split_path(text: str) -> tuple[str, str | None]:
    """PATH:/dir; the longest PATH that exists, else the shortest.  Raises UnionfsError."""
    if not text or (text.startswith(":/") and not os.path.lexists(text)):
        raise _empty(text)
    if ":/" not in text or os.path.lexists(text):
        return text, None
    cuts = [match.start() for match in re.finditer(":/", text)]
    for cut in reversed(cuts):
        if os.path.lexists(text[:cut]):
            return text[:cut], text[cut + 1 :]
    return text[: cuts[0]], text[cuts[0] + 1 :]


def cut(text: str) -> tuple[str, str | None]:
    """What a locator names, and the directory inside; by the text alone, nothing is looked at."""
    tag = _TAG.fullmatch(text)
    parts = _VALUE.fullmatch(tag[2] if tag is not None else text)
    if parts is None or not parts[2]:
        return text, None
    return (f"{tag[1]}=" if tag is not None else "") + parts[1], _normal(parts[2])


def is_directory(text: str) -> bool:
    """Whether the locator is an ordinary directory, or a path of which nothing is known."""
    if is_tag(text):
        return False
    path, inside = _split_path(text)
    if inside is not None:
        return False
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return not path.startswith(_DEVICES)
    return not (stat.S_ISREG(mode) or stat.S_ISBLK(mode))
