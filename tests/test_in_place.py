# SPDX-License-Identifier: GPL-2.0-or-later
"""A union over its own lower: the directory is changed in place, and is as it was afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.rig import snapshot
from tests.rig.mounted import Unionfs


@pytest.mark.parametrize("sub", ["", "sub"])
def test_over_its_own_lower(place: Path, sub: str) -> None:
    low = place / "lower"
    (low / "sub" / "deep").mkdir(parents=True)
    (low / "sub" / "file").write_text("lower\n")
    (low / "file").write_text("lower\n")
    (place / "upper").mkdir()
    before = snapshot.take(low)
    point = low / sub
    with Unionfs([point], place / "upper", point, log=place / "log") as union:
        assert os.path.ismount(point)
        for number in range(2):
            (point / "file").write_text(f"changed {number}\n")
            (point / "made").mkdir()
            (point / "made" / "file").write_text("new\n")
            assert "made" in os.listdir(point)
            assert (point / "file").read_text() == f"changed {number}\n"
            (point / "made" / "file").rename(point / f"kept{number}")
            (point / "made").rmdir()
            union.remount()
        assert {"file", "kept0", "kept1"} < set(os.listdir(point))
    assert snapshot.take(low) == before
    assert {"file", "kept0", "kept1"} < set(os.listdir(place / "upper"))
