# SPDX-License-Identifier: GPL-2.0-or-later
"""What tells a write from a chown after a capability was taken away (docs/adr/0009)."""

from unionfs.union import CapabilitiesKilled

MOMENT = 10**9


def test_each_process_by_itself() -> None:
    killed = CapabilitiesKilled()
    killed.note(1, 100, 0)
    killed.note(2, 200, 1)
    assert killed.take(1, 100, 2)
    assert killed.take(2, 200, 3)


def test_of_that_inode_and_once() -> None:
    killed = CapabilitiesKilled()
    killed.note(1, 100, 0)
    assert not killed.take(1, 101, 1)
    killed.note(1, 100, 2)
    assert killed.take(1, 100, 3)
    assert not killed.take(1, 100, 4)


def test_for_a_moment() -> None:
    killed = CapabilitiesKilled()
    killed.note(1, 100, 0)
    assert not killed.take(1, 100, MOMENT + 1)


def test_those_that_never_ask_are_forgotten() -> None:
    killed = CapabilitiesKilled()
    for pid in range(1, 1000):
        killed.note(pid, 100, pid * MOMENT)
    assert len(killed._killed) <= 65
