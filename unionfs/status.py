# SPDX-License-Identifier: GPL-2.0-or-later
"""What a union tells of itself: user.unionfs.status on its root, and so `unionfs status`."""

import contextlib
import os
from typing import TYPE_CHECKING, Any

from unionfs import _native

if TYPE_CHECKING:
    from unionfs.union import Union

FEATURES = (
    "xattrs",
    "whiteout",
    "rename_exchange",
    "rename_noreplace",
    "rename_whiteout",
    "tmpfile",
    "reflink",
    "device_nodes",
    "file_handles",
    "acl",
)


def describe(union: "Union") -> dict[str, Any]:
    """JSON-able. Sizes in bytes."""
    status: dict[str, Any] = dict(union.facts)
    status["lowers"] = [layer.path for layer in union.lowers]
    status["upper"] = union.upper.path if union.upper is not None else None
    status["work"] = union.work.path if union.work is not None else None
    status["readonly"] = union.readonly
    status["ephemeral"] = union.options.ephemeral
    why_not = union.without_io_uring()
    status["features"] = {"io_uring": not why_not}
    status["reasons"] = {"io_uring": why_not} if why_not else {}
    if union.upper is not None:
        # Not if a program that mounts it for us has died.
        with contextlib.suppress(OSError):
            space = os.fstatvfs(union.upper.fd)
            free = space.f_bavail * space.f_frsize
            status["free"] = free - _native.room_missing(union.image, free)
            status["size"] = space.f_blocks * space.f_frsize
        features = union.upper.features
        status["features"].update({name: getattr(features, name) for name in FEATURES})
        status["reasons"].update(features.reasons)
    status["marks"] = {
        "prefix": union.marks.prefix if union.marks.xattrs else None,
        "whiteout": "wh" if union.marks.wh else "char",
        "redirect_dir": union.options.redirect_dir and union.marks.xattrs,
        "metacopy": union.options.metacopy and union.marks.xattrs,
        "index": union.index >= 0,
    }
    told = union.passthrough()
    status["passthrough"] = {"mode": union.options.passthrough} | told
    status["features"]["passthrough"] = union.options.passthrough if told["active"] else False
    if told["reason"]:
        status["reasons"]["passthrough"] = told["reason"]
    status["table"] = union.tree.counts()
    if union.requests is not None:
        status["requests"] = union.requests()
    return status
