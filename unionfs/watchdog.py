# SPDX-License-Identifier: GPL-2.0-or-later
"""Signs of life for a service manager, sent as long as the mount answers.

Owns the question.  A process must not ask its own mount: a request that hangs cannot be left, and
would hold the device open after the process was killed.  So a process is started for each question
that shares nothing with us.  Called by daemon.py in the foreground.
"""

import sys
from subprocess import DEVNULL
from typing import Final

import trio

from unionfs import notify

# Answered by the daemon, each time: the kernel keeps no such answers.  Any end of it is an answer.
_QUESTION: Final = "import os, sys; os.statvfs(sys.argv[1])"


async def keep_telling(point: str, seconds: float) -> None:
    """Send WATCHDOG=1 at least once in `seconds`, and not when the mount does not answer."""
    while True:
        if await _answers(point, seconds / 2):
            notify.send("WATCHDOG=1")
        await trio.sleep(seconds / 3)


async def _answers(point: str, patience: float) -> bool:
    command = [sys.executable, "-I", "-S", "-c", _QUESTION, point]
    try:
        asker = await trio.lowlevel.open_process(command, env={}, stdin=DEVNULL, stderr=DEVNULL)
    except OSError:  # hidden by the mount; at least we are alive
        return True
    try:
        with trio.move_on_after(patience):
            await asker.wait()
            return True
        return False
    finally:
        asker.kill()
