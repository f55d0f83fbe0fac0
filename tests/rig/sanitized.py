# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the tests run under the sanitizers (tools/test --sanitize), and what cannot."""

from __future__ import annotations

import os

import pytest

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


def not_sanitized(reason: str) -> pytest.MarkDecorator:
    """Skips what would start our programs without the sanitizers' libraries."""
    return pytest.mark.skipif(SANITIZED, reason=reason)


def plain_environment() -> dict[str, str]:
    """For others' programs, whose own faults are not to be told."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
