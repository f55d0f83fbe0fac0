# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon inherits from who mounts is not for whom it serves."""

from __future__ import annotations

import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rig.limited import Limited
from tests.rig.mounted import PATIENCE, program
from unionfs import inherited

INFINITE = resource.RLIM_INFINITY
BIG = bytes(range(256)) * 2560


# ---- sizes, time and memory ----


def test_the_mounters_size_of_files(place: Path) -> None:
    (place / "lower").mkdir()
    (place / "lower" / "big").write_bytes(BIG)
    with Limited(place, "--fsize=100000:", options=["passthrough=off"]) as union:
        (union.mnt / "new").write_bytes(BIG)
        assert (union.mnt / "new").read_bytes() == BIG
        with open(union.mnt / "big", "ab") as file:
            file.write(b"more")
        assert (union.mnt / "big").read_bytes() == BIG + b"more"


def test_a_size_that_cannot_be_raised_is_told_of(place: Path) -> None:
    with Limited(place, "--fsize=1000000:1000000") as union:
        union.expected.append("no file of the union will be larger than 1000000 bytes")
        assert union.expected[-1] in union.words()


@pytest.mark.parametrize(
    ("found", "wanted", "refused", "left"),
    [
        ((100, 100), INFINITE, False, (INFINITE, INFINITE)),
        ((100, 100), INFINITE, True, (100, 100)),
        ((50, 100), INFINITE, True, (100, 100)),
        ((50, 100), 1000, False, (1000, 1000)),
        ((50, 5000), 1000, False, (5000, 5000)),
        ((50, 100), 0, False, (100, 100)),
        ((50, INFINITE), INFINITE, False, (INFINITE, INFINITE)),
    ],
)
def test_as_far_as_one_may(
    monkeypatch: pytest.MonkeyPatch,
    found: tuple[int, int],
    wanted: int,
    refused: bool,
    left: tuple[int, int],
) -> None:
    now = found

    def setrlimit(_limit: int, values: tuple[int, int]) -> None:
        nonlocal now
        if refused and values[1] != found[1]:
            raise ValueError("not allowed to raise maximum limit")
        now = values

    monkeypatch.setattr(resource, "getrlimit", lambda _limit: now)
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    inherited._raise(resource.RLIMIT_FSIZE, wanted)
    assert now == left


# ---- signals ----


def in_child(prepare: Callable[[], object], command: list[str]) -> None:
    subprocess.run(
        command, preexec_fn=prepare, timeout=PATIENCE, check=True, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def background(place: Path) -> Iterator[Limited]:
    union = Limited(place)
    union.daemonised = True
    yield union
    union.abandon()


def test_blocked_and_ignored_signals(background: Limited) -> None:
    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    in_child(prepare, background.command())
    words = Path(f"/proc/{background.pid}/status").read_text().split()
    assert int(words[words.index("SigBlk:") + 1], 16) == 0
    assert not int(words[words.index("SigIgn:") + 1], 16) & 1 << signal.SIGCHLD - 1
    background.umount()


def test_a_failed_mount_is_told_of_though_children_are_ignored(place: Path) -> None:
    done = subprocess.run(
        [*program(), "mount", place / "not there", place],
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
        timeout=PATIENCE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "not there" in done.stderr
