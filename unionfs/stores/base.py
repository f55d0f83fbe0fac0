# SPDX-License-Identifier: GPL-2.0-or-later
"""What a union's base is called, and how it is recognized.

Owns the default directory in a store, and the identity that a store remembers of its base.  The
base is the lowest of the lowers.
"""

import os
from typing import TYPE_CHECKING, Final

from unionfs.identity import Base
from unionfs.locator import Locator

if TYPE_CHECKING:
    from unionfs.stores.probe import Contents

_TAIL: Final = 64 * 1024
_SUFFIXES: Final = (".squashfs", ".sfs", ".erofs", ".img", ".iso", ".ext4", ".raw")


def content_id(path: str) -> str:
    """Of an image without a UUID: what its super block and its tables say.

    squashfs keeps sizes, counts and the time it was made in the first 96 bytes, and its tables,
    which list all files, at the end.
    """
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(4096))
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - _TAIL))
        digest.update(file.read(_TAIL))
    return digest.hexdigest()[:32]


def base_name(locator: Locator, contents: "Contents | None") -> str:
    """How the base is called in the default directory: its label, else its file's name.

    A device without a label is called by its UUID: its own name is another one on each machine.
    """
    name = contents.label if contents is not None else ""
    name = name or _unlabelled(locator, contents)
    name = "".join("_" if c == "/" or not c.isprintable() else c for c in name)
    return name if name.strip(".") else "root"


def _unlabelled(locator: Locator, contents: "Contents | None") -> str:
    from unionfs.stores.find import image_of

    is_device = locator.tag is not None or locator.value.startswith("/dev/")
    if contents is None or not is_device:
        return _file_name(locator.value)
    if (image := image_of(contents.path)) is not None:
        return _file_name(image)
    return contents.uuid or _file_name(locator.value)


def _file_name(path: str) -> str:
    name = os.path.basename(os.path.normpath(path)) or "root"
    suffix = next((s for s in _SUFFIXES if name.endswith(s) and name != s), "")
    return name.removesuffix(suffix)


def describe(locator: Locator, contents: "Contents | None") -> Base:
    """What a store remembers of its base."""
    name = base_name(locator, contents)
    if contents is None:
        return Base(name=name, kind="directory", path=locator.text)
    return Base(
        name=name,
        kind=contents.fstype,
        path=contents.path,
        label=contents.label,
        uuid=contents.uuid,
        content="" if contents.uuid else content_id(contents.path),
    )


def default_directory(name: str) -> str:
    """Where the changes to a base lie in a store, as in archiso: one directory for each base."""
    return f"/persistent_{name}/{os.uname().machine}"
