# SPDX-License-Identifier: GPL-2.0-or-later
"""From options to everything that a union stands on: stores, layers, work area; all of it checked.

Owns the order of opening, which is that of closing turned round, so that an error at any point
leaves nothing behind.  Called by daemon.py.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unionfs import checks, layer, locator
from unionfs.layer import Layer
from unionfs.mounts import MountEntry, read_mounts
from unionfs.options import MountOptions
from unionfs.session import is_readonly
from unionfs.work import Work, lock_shared

if TYPE_CHECKING:
    from unionfs.stores.opening import Stores
    from unionfs.stores.userspace import Helper


@dataclass(slots=True)
class Opened:
    """What was opened; closed by the stack that open_layers() was given."""

    options: MountOptions
    point: str  # the mount point, free of symlinks
    lowers: list[Layer]
    upper: Layer | None
    work: Work | None
    facts: dict[str, object] = field(default_factory=dict)
    helpers: "list[Helper]" = field(default_factory=list)


def open_layers(
    options: MountOptions, stack: contextlib.ExitStack, *, was_live: Callable[[], bool]
) -> Opened:
    """Check and open everything.  `was_live`: whether the union has been used, asked at the end."""
    asked = {"lowers": list(options.lowers), "upper": options.upper}
    readonly = is_readonly(options)
    mounts = read_mounts()
    stores = _open_stores(options, stack, mounts, readonly=readonly)
    if stores is not None:
        options = stores.options
    known = {} if stores is None else stores.opened()
    checks.check_layers(options, mounts, known)
    point = checks.check_mountpoint(options, mounts, known)
    lowers = []
    for path in options.lowers:
        lower = known.get((checks.LOWER, path)) or layer.open_lower(path, mounts)
        stack.callback(lower.close)
        lowers.append(lower)
    upper = known.get((checks.UPPER, options.upper)) if options.upper is not None else None
    upper = upper or _open_upper(options, mounts, readonly=readonly)
    if upper is not None:
        stack.callback(upper.close)
    checks.mark_careful([*lowers, *([upper] if upper is not None else [])], point, mounts)
    work = None
    if upper is not None and readonly:
        stack.callback(os.close, lock_shared(upper, options))
    elif upper is not None:
        work = made = Work.open(upper, options)
        # Not mounted after all: take away what was made.
        stack.callback(lambda: made.close() if was_live() else made.abandon())
    opened = Opened(options, point, lowers, upper, work, {"asked": asked})
    if stores is not None:
        opened.facts["store"] = stores.facts()
        opened.helpers = stores.helpers
    return opened


def _open_stores(
    options: MountOptions,
    stack: contextlib.ExitStack,
    mounts: Sequence[MountEntry],
    *,
    readonly: bool,
) -> "Stores | None":
    """The layers that are images or devices; None if there are none, which costs nothing."""
    named = [*options.lowers, *([options.upper] if options.upper is not None else [])]
    if all(map(locator.is_directory, named)):
        return None
    from unionfs.stores.opening import Stores

    stores = Stores(options)
    stack.callback(stores.close)
    stores.open(list(mounts), readonly=readonly)
    return stores


def _open_upper(
    options: MountOptions, mounts: Sequence[MountEntry], *, readonly: bool
) -> Layer | None:
    if options.ephemeral and not readonly:
        return layer.open_ephemeral(options.ephemeral_size)
    if options.upper is None:
        return None
    return layer.open_upper(options.upper, list(mounts), work=options.work, readonly=readonly)
