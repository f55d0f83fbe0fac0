# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon has inherited from who started it, and must not pass on to whom it serves.

The limits of a shell are meant for its own programs.  The kernel has already held each writer to
his own size of files before a write reaches us; ours would hold all of them to that of the shell
that mounted.  Nice value, processors and the limit of core dumps stay: an administrator sets them
for this very daemon (Nice=, CPUAffinity=, LimitCORE= of systemd).  Called by daemon.py, before
there are threads.
"""

import contextlib
import fcntl
import logging
import os
import resource
import signal
from typing import Final

log = logging.getLogger("unionfs")

_OOM_SCORE: Final = "-500"
_DESCRIPTORS: Final = 4000
# The kernel's own default of fs.nr_open.  systemd makes that 2**30, over which a program that
# closes whatever it may have inherited goes for minutes; we start some.
_MOST_DESCRIPTORS: Final = 1 << 20
_NR_OPEN: Final = "/proc/sys/fs/nr_open"
_OPEN_DIRECTORIES: Final = 256
# Size of files, processor time, memory, threads: nothing that a user of the union would expect.
_NOT_OURS: Final = (
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_CPU,
    resource.RLIMIT_AS,
    resource.RLIMIT_DATA,
    resource.RLIMIT_NPROC,
)


def settle() -> None:
    """Be in nobody's way, and keep nobody's mode bits from the files we make."""
    os.chdir("/")
    os.umask(0)
    hear_signals()
    for limit in _NOT_OURS:
        _raise(limit, resource.RLIM_INFINITY)
    _raise(resource.RLIMIT_NOFILE, _allowed_descriptors())
    _grow_table()
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size != resource.RLIM_INFINITY:
        log.warning("no file of the union will be larger than %d bytes: see ulimit -f", size)
    # Killed for want of memory, a union takes all its users with it.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_OOM_SCORE)


def hear_signals() -> None:
    """None is blocked, and how a child has ended is told."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def open_directories() -> int:
    """How many directories of layers may be kept open: where few files may be, few."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return _OPEN_DIRECTORIES
    return max(1, min(_OPEN_DIRECTORIES, soft // 4))


def _raise(limit: int, wanted: int) -> None:
    """Root to what is wanted, others as far as they may."""
    soft, hard = resource.getrlimit(limit)
    most = hard if _is_within(wanted, hard) else wanted
    with contextlib.suppress(OSError, ValueError):  # no CAP_SYS_RESOURCE
        resource.setrlimit(limit, (most, most))
        return
    if soft != hard:
        resource.setrlimit(limit, (hard, hard))


def _is_within(wanted: int, hard: int) -> bool:
    if hard == resource.RLIM_INFINITY:
        return True
    return wanted != resource.RLIM_INFINITY and wanted <= hard


def _allowed_descriptors() -> int:
    """To how many an administrator may raise the limit of a process."""
    try:
        with open(_NR_OPEN) as file:
            return min(int(file.read()), _MOST_DESCRIPTORS)
    except (OSError, ValueError):
        return 0  # what is allowed now must do


def _grow_table() -> None:
    """The table of descriptors grows now: with threads each time waits for a grace period of RCU,
    which is 5-20 ms for whoever has asked (expand_files of fs/file.c)."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = _DESCRIPTORS if soft == resource.RLIM_INFINITY else min(_DESCRIPTORS, soft - 1)
    with contextlib.suppress(OSError):
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, most))
