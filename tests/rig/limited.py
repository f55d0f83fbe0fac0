# SPDX-License-Identifier: GPL-2.0-or-later
"""A union that was mounted from a shell with limits, which its daemon cannot raise above the hard
ones, also where it is root's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tests.rig.mounted import Unionfs


class Limited(Unionfs):
    """`limits` are words of prlimit(1): `--nofile=SOFT:HARD`."""

    def __init__(self, place: Path, *limits: str, options: Sequence[str] = ()) -> None:
        parts = [place / name for name in ("lower", "upper", "mnt")]
        for part in parts:
            part.mkdir(exist_ok=True)
        super().__init__([parts[0]], parts[1], parts[2], options=options)
        self.limits = limits

    def command(self) -> list[str]:
        without = ["setpriv", "--bounding-set", "-sys_resource"] if os.geteuid() == 0 else []
        return [*without, "prlimit", *self.limits, *super().command()]
