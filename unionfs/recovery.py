# SPDX-License-Identifier: GPL-2.0-or-later
"""The check of an upper whose daemon was killed, while the union is used already.

Owns how it is done and what is told of it.  What a killed daemon leaves is harmless, and is
removed before the mount (work.py); this walk looks for what should not be there: marks that are
damaged or lead to nothing.  It only reads, at the lowest priority, in a thread of its own.  Called
by opened.py, where it is needed, and by daemon.py; the rules are in stores/uppers.py.

AREA/unchecked says that it was not finished: it then begins anew at the next mount.
"""

import contextlib
import logging
import os
import threading
from dataclasses import replace
from typing import Final

from unionfs.errors import counted
from unionfs.format import Record
from unionfs.layer import FULL, Layer
from unionfs.options import MountOptions
from unionfs.stores.checking import Problem, Report
from unionfs.stores.references import Lowers
from unionfs.stores.uppers import UpperCheck
from unionfs.union import Union
from unionfs.work import UNCHECKED, Work

log = logging.getLogger("unionfs")

_LOWEST: Final = 19  # setpriority(2); the scheduler of the disk goes by it too
_PAUSE: Final = 0.001  # seconds: requests that Python answers wait for no more than a step
_TOLD: Final = 20


class Recovery:
    """The check of one upper.  `facts` is where the status looks; it gets `check`."""

    def __init__(
        self, options: MountOptions, lowers: list[Layer], upper: Layer, work: Work
    ) -> None:
        userxattr = None if work.xattrs is None else work.xattrs == "user"
        self._options = replace(
            options, upper=None, work=None, readonly=True, ephemeral=False, userxattr=userxattr
        )
        self._lowers = lowers
        self._upper = upper
        self._work = work
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.facts: dict[str, object] = {"check": {"state": "running"}}
        try:
            work.write(UNCHECKED, "")
        except OSError as exc:
            if exc.errno not in FULL:
                raise

    def start(self, facts: dict[str, object]) -> None:
        """Begin."""
        self.facts = facts
        self._thread = threading.Thread(target=self._run, name="check", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it, finished or not; the layers may be closed then."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
        try:
            self._check()
        except Exception as exc:
            log.warning("%s could not be checked: %s", self._upper.path, exc)
            self.facts["check"] = {"state": "failed", "reason": str(exc)}

    def _check(self) -> None:
        union = Union(self._options, self._lowers, None, None)
        try:
            problems, directories = self._walk(Lowers(union))
            if problems and not self._stopping.is_set():
                # What was only so while a change was being made is not so any more.
                again = set(self._walk(Lowers(union))[0])
                problems = [problem for problem in problems if problem in again]
        finally:
            union.close()
        if self._stopping.is_set():
            return
        with contextlib.suppress(OSError):
            os.unlink(UNCHECKED, dir_fd=self._work.area)
        self._tell(problems, directories)

    def _walk(self, lowers: Lowers) -> tuple[list[Problem], int]:
        report = Report()
        check = UpperCheck(self._upper.fd, "", report)
        check.lowers = lowers
        check.tell_hidden = False
        check.step = lambda: self._stopping.wait(_PAUSE)
        check.index(self._work.area, Record(self._work.whiteout, self._work.xattrs))
        check.marks()
        return report.problems, check.directories

    def _tell(self, problems: list[Problem], directories: int) -> None:
        self.facts["check"] = {
            "state": "done",
            "directories": directories,
            "problems": len(problems),
            "told": [f"{path}: {what}" for path, what, _ in problems[:_TOLD]],
        }
        if not problems:
            log.info("%s was checked: nothing is wrong", self._upper.path)
            return
        for path, what, _ in problems[:_TOLD]:
            log.warning("%s: %s: %s", self._upper.path, path, what)
        log.warning(
            "%s has %s: unmount it, and see unionfs store check --lower",
            self._upper.path,
            counted(len(problems), "problem"),
        )
