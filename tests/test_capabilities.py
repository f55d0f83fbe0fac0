# SPDX-License-Identifier: GPL-2.0-or-later
"""CAP_SYS_RESOURCE, with which quotas would count for nobody, is not in effect (docs/adr/0029)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rig.ground import Ground
from tests.rig.mounted import Unionfs
from unionfs import capabilities

pytestmark = pytest.mark.root

WAKE_ALARM = 35  # of no use to anybody here


def has(word: str, capability: int, status: str = "/proc/thread-self/status") -> bool:
    """Whether a thread has it in that set."""
    lines = Path(status).read_text().splitlines()
    mask = next(line for line in lines if line.startswith(f"{word}:")).split()[1]
    return bool(int(mask, 16) >> capability & 1)


def in_thread(check: Callable[[], None]) -> None:
    """Run it in a thread, which alone changes; its failure is ours."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            check()
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def test_lowered_for_a_thread_and_those_it_starts() -> None:
    if not has("CapEff", WAKE_ALARM):
        pytest.skip("this root has no CAP_WAKE_ALARM")

    def inner() -> None:
        assert not has("CapEff", WAKE_ALARM)
        with capabilities.in_effect(WAKE_ALARM):
            assert has("CapEff", WAKE_ALARM)
            with capabilities.in_effect(WAKE_ALARM):
                pass
            assert has("CapEff", WAKE_ALARM)
        assert not has("CapEff", WAKE_ALARM)

    def outer() -> None:
        capabilities.obey_quotas(WAKE_ALARM)
        assert has("CapPrm", WAKE_ALARM)
        in_thread(inner)

    in_thread(outer)
    assert has("CapEff", WAKE_ALARM)


def test_not_permitted() -> None:
    def check() -> None:
        with capabilities.in_effect(63):
            assert not has("CapEff", 63)

    in_thread(check)


@pytest.mark.parametrize("driver", ["engine", "pyfuse3"])
def test_no_thread_of_a_union_has_it_in_effect(driver: str) -> None:
    if not has("CapPrm", capabilities.CAP_SYS_RESOURCE):
        pytest.skip("this root has no CAP_SYS_RESOURCE: nothing to lower")
    with Ground("unionfs-capabilities-") as base:
        lower, upper = base.directory("lower"), base.directory("upper")
        options = [f"driver={driver}"]
        with Unionfs([lower], upper, base.directory("mnt"), options=options) as union:
            (union.mnt / "file").write_bytes(b"x")
            threads = list(Path(f"/proc/{union.pid}/task").iterdir())
            assert len(threads) > 1 or driver == "pyfuse3"
            for thread in threads:
                status = str(thread / "status")
                assert not has("CapEff", capabilities.CAP_SYS_RESOURCE, status)
                assert has("CapPrm", capabilities.CAP_SYS_RESOURCE, status)
