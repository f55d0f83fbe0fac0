# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for what sends no event: a mount that goes away elsewhere, a count that falls."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tests.rig.mounted import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again until it holds; fail where it does not within PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)
