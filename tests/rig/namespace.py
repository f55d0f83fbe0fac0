# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a test's body as root of a user namespace, whose ids are others outside of it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.rig import syscalls

COUNT = 65_536


def as_root_of(first: int, body: Callable[[], object]) -> None:
    """In a process of its own, as id 0 of a namespace that has COUNT ids from `first` on."""
    inside, outside = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os._exit(_become_and_run(inside[1], outside[0], body))
    try:
        assert os.read(inside[0], 1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text(f"0 {first} {COUNT}")
    finally:
        os.write(outside[1], b".")
        for end in (*inside, *outside):
            os.close(end)
        status = os.waitpid(pid, 0)[1]
    assert status == 0


def _become_and_run(ready: int, mapped: int, body: Callable[[], object]) -> int:
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        os.write(ready, b".")
        os.read(mapped, 1)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        body()
    except BaseException:
        traceback.print_exc()
        os.write(ready, b".")
        return 1
    return 0
