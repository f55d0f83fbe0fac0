# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of others that know file systems: where they are, what they said; and interruptions.

Called by everything in stores/.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from unionfs.errors import ExitCode, UnionfsError

_SBIN: Final = "/usr/sbin:/sbin:/usr/bin:/bin"
_INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ENDING_SECONDS: Final = 30


class Progress:
    """How far long work is, for whoever looks on; here for nobody."""

    def __call__(self, count: int) -> None:
        """So many bytes more are done, or things of the phase."""

    def phase(self, what: str, things: str = "") -> None:
        """From now on something else is done, whose end is not known; of what it counts."""


def find(name: str) -> str | None:
    """The path of a program that may lie where users do not look."""
    return shutil.which(name) or shutil.which(name, path=_SBIN)


def tool(name: str, package: str) -> str:
    """The same; raises UnionfsError that names the package if it is not installed."""
    found = find(name)
    if found is None:
        hint = f"install the package {package}"
        raise UnionfsError(f"{name} is not installed", hint=hint, code=ExitCode.SYSTEM)
    return found


def environment() -> dict[str, str]:
    """In which a program says what we can show or read, whatever the user's language."""
    return {**os.environ, "LC_ALL": "C"}


def run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Run it to its end, with nothing to read; what it ends with is for the caller to judge.

    If we are interrupted it is asked to end: a fsck then leaves what it has repaired so far whole.
    """
    with contextlib.ExitStack() as stack:
        with delayed():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment(),
            )
            stack.enter_context(process)
            stack.callback(_ask_to_end, process)
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _ask_to_end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


@contextlib.contextmanager
def delayed() -> Iterator[None]:
    """For the start of programs: what interrupts it comes at the end, when they can be ended."""
    came: list[int] = []
    with _handlers(lambda number, _frame: came.append(number)):
        yield
    if came:
        signal.raise_signal(came[0])


@contextlib.contextmanager
def interruptible(*, last: bool = False) -> Iterator[None]:
    """SIGTERM and SIGHUP end us as SIGINT does, by KeyboardInterrupt: what was begun is tidied up.

    Once: the tidying up is not interrupted again.  `last`: nothing follows but the end of the
    process; its exit code is decided, and what comes then comes too late.
    """

    def interrupt(_number: int, _frame: object) -> None:
        for number in _INTERRUPTS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handlers(interrupt, after=signal.SIG_IGN if last else None):
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """For the moment in which something takes effect: what would interrupt it comes too late."""
    with _handlers(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handlers(
    handler: "Callable[[int, object], None] | signal.Handlers",
    *,
    after: signal.Handlers | None = None,
) -> Iterator[None]:
    """Python runs handlers in the main thread only, which is where the verbs run.  `after`: None,
    what there was before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What is ignored stays so (nohup).
    kept = {n: h for n in _INTERRUPTS if (h := signal.getsignal(n)) != signal.SIG_IGN}
    for number in kept:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in kept.items():
            signal.signal(number, before if after is None else after)


def lines_of(output: bytes) -> list[str]:
    """What a program said."""
    return [line.strip() for line in os.fsdecode(output).strip().splitlines()]
