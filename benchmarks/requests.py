# SPDX-License-Identifier: GPL-2.0-or-later
"""How many requests a union has had, from its own status: by who answered and by kind.

The attribute's own request is counted, too, and taken away again here.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

STATUS = "user.unionfs.status"
Requests = dict[str, dict[str, int]]  # by who answered (engine, python): by kind
# Sent by the kernel when it likes, and waited for by nobody.
UNASKED = ("forget", "batch_forget", "interrupt")
_SAMPLES = 50


def status(root: str) -> dict[str, Any]:
    """What a union of ours tells of itself; nothing where none is."""
    try:
        return dict(json.loads(os.getxattr(root, STATUS)))
    except OSError:
        return {}


def _sample(root: str) -> Requests:
    told = json.loads(os.getxattr(root, STATUS))["requests"]
    return {
        who: {kind: count for kind, count in kinds.items() if kind not in UNASKED}
        for who, kinds in told.items()
    }


def total(requests: Requests) -> int:
    return sum(sum(kinds.values()) for kinds in requests.values())


class Counting:
    """Counts from its making to `stop`. Raises OSError or KeyError where nothing is counted."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._before, _ = self._settled()

    def _settled(self) -> tuple[Requests, int]:
        """The count once our own questions alone add to it, each the same (a RELEASE comes later
        than its close), and how many requests of ours are in it."""
        samples = [_sample(self._root) for _ in range(2)]
        added = 0
        while len(samples) < _SAMPLES:
            samples.append(_sample(self._root))
            earlier, added = added, total(samples[-1]) - total(samples[-2])
            if added == earlier:
                break
        return samples[-1], added * len(samples)

    def stop(self) -> Requests:
        after, ours = self._settled()
        found: Requests = {}
        # Ours are answered by Python.
        for who, kinds in sorted(after.items(), reverse=True):
            more = Counter(kinds)
            more.subtract(self._before.get(who, {}))
            mine = min(ours, more["getxattr"])
            more["getxattr"] -= mine
            ours -= mine
            found[who] = {kind: count for kind, count in sorted(more.items()) if count}
        return found
