# SPDX-License-Identifier: GPL-2.0-or-later
"""A profile in the foreground, as the main process of a service (Type=notify).

Owns its life: ready when all is mounted, a sign of life only while every union answers, an end with
an error if one of its daemons ends, so that the service manager starts all anew; at SIGTERM all is
taken down, the last first, what is in use after it was written.
"""

import logging
import os
import select
import signal
import time
from collections.abc import Sequence
from typing import Final, NoReturn

from unionfs import notify, runtime
from unionfs.errors import ExitCode, UnionfsError, counted
from unionfs.mounts import FSTYPE, read_mounts
from unionfs.profiles import running
from unionfs.profiles.profile import Profile
from unionfs.profiles.running import Made, Outcome
from unionfs.stores import kernel, sharing
from unionfs.unions import ask
from unionfs.unmounting import hold_daemon

log = logging.getLogger("unionfs")

_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LAST_SECONDS: Final = 60.0  # for a daemon to write and end


def run(profile: Profile, root: str) -> int:
    """Bring it up and stay until a signal or a union's end; the exit code."""
    watchdog = notify.watchdog_seconds()
    woken, waking = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    previous = {number: signal.signal(number, _interrupted) for number in _ENDING}
    try:
        outcome = _up(profile, root)
        for number in _ENDING:
            signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(waking)
        daemons = _daemons(outcome.made)
        status = f"STATUS={profile.name}: {counted(len(outcome.made), 'mount')}"
        if outcome.warnings:
            status += f"; degraded: {'; '.join(outcome.warnings)}"
        notify.send("READY=1", status)
        for warning in outcome.warnings:
            log.warning("%s", warning)
        ended = _watch(daemons, woken, watchdog)
        notify.send("STOPPING=1")
        stop(profile.name)
        if not kernel.may_mount():
            sharing.entrust_all()
        if ended is None:
            return ExitCode.OK
        raise UnionfsError(f"the daemon of {ended} has ended", hint="the log says why")
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _up(profile: Profile, root: str) -> Outcome:
    """What it lacks is told where a service manager has started it, also if that is all of it."""
    try:
        return running.up(profile, root)
    except UnionfsError as exc:
        if exc.code != ExitCode.INTERRUPT and notify.is_service():
            runtime.tell_degraded(profile.name, f"{profile.name} is not up: {exc.line()}")
            notify.has_store(profile.name, degraded=True)
        raise


def _interrupted(_number: int, _frame: object) -> NoReturn:
    raise UnionfsError("interrupted before all was mounted", code=ExitCode.INTERRUPT)


def _daemons(made: Sequence[Made]) -> dict[int, str]:
    """A pidfd of each union's daemon, with the mount point."""
    mounts = read_mounts()
    found = {}
    for one in made:
        entry = one.entry(mounts)
        if one.fstype != FSTYPE or entry is None:
            continue
        fd = hold_daemon(entry, mounts, force=False)
        if fd is None:
            raise UnionfsError(f"the daemon of {one.point} has ended", hint="the log says why")
        found[fd] = one.point
    return found


def _watch(daemons: dict[int, str], woken: int, watchdog: float | None) -> str | None:
    """Until a signal (None), or the end of a daemon: its mount point."""
    poll = select.poll()
    for fd in (*daemons, woken):
        poll.register(fd, select.POLLIN)
    pause = None if watchdog is None else watchdog * 1000 / 3
    while True:
        ready = [fd for fd, _events in poll.poll(pause)]
        if woken in ready:
            return None
        if ready:
            return daemons[ready[0]]
        if watchdog is not None and _all_answer(list(daemons.values()), watchdog / 3):
            notify.send("WATCHDOG=1")


def _all_answer(points: Sequence[str], seconds: float) -> bool:
    mounts = read_mounts()
    entries = [entry for entry in mounts if entry.point in points and entry.fstype == FSTYPE]
    end = time.monotonic() + seconds
    for entry in entries:
        answer = ask(entry, mounts, max(0.1, end - time.monotonic()))
        if answer.state in ("dead", "silent"):
            log.error("%s: %s", entry.point, answer.reason)
            return False
    return True


def stop(name: str) -> None:
    """Take a profile down though it may be in use: its daemons write what is held back first."""
    running.refuse_root(name)
    try:
        running.down(name)
        return
    except running.Covered:
        raise  # its daemon cannot even be asked for
    except UnionfsError as exc:
        log.warning("%s; it is taken down all the same", exc.message)
    mounts = read_mounts()
    for made in reversed(running.standing(name)):
        entry = made.entry(mounts)
        daemon = hold_daemon(entry, mounts, force=True) if entry and made.fstype == FSTYPE else None
        if daemon is None:
            continue
        # Its own way to end: unmount plainly, else write and unmount lazily.
        signal.pidfd_send_signal(daemon, signal.SIGTERM)
        poll = select.poll()
        poll.register(daemon, select.POLLIN)
        poll.poll(_LAST_SECONDS * 1000)
        os.close(daemon)
    running.down(name, lazy=True)
