# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the log of a daemon goes: standard error, the journal, or the system log.

Owns the handlers and their formats.  Called by daemon.py and by `unionfs up`, once for a process.
"""

import logging
import os
import syslog
from typing import Final

_PRIORITIES: Final = {
    logging.CRITICAL: syslog.LOG_CRIT,
    logging.ERROR: syslog.LOG_ERR,
    logging.WARNING: syslog.LOG_WARNING,
    logging.INFO: syslog.LOG_INFO,
}


def to_stderr(*, debug: bool) -> None:
    """For who watches; where that is the journal, with the levels that it understands."""
    handler = logging.StreamHandler()
    if _is_journal(2):
        handler.setFormatter(_JournalFormatter())
    else:
        handler.setFormatter(logging.Formatter("unionfs: %(levelname)s: %(message)s"))
    _install(handler, debug)


def to_syslog(*, debug: bool) -> None:
    """For a process that has left its terminal; in place of what who forked it logs to."""
    logging.getLogger().handlers.clear()
    handler = _SyslogHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    _install(handler, debug)


def _install(handler: logging.Handler, debug: bool) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])


def _is_journal(fd: int) -> bool:
    """Whether systemd has connected the descriptor with the journal: $JOURNAL_STREAM names it."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(fd)
        return (int(device), int(inode)) == (found.st_dev, found.st_ino)
    except (OSError, ValueError):
        return False


class _JournalFormatter(logging.Formatter):
    """Each line with its level in front, as sd-daemon(3) says."""

    def format(self, record: logging.LogRecord) -> str:
        level = _PRIORITIES.get(record.levelno, syslog.LOG_DEBUG)
        lines = super().format(record).splitlines() or [""]
        return "\n".join(f"<{level}>{line}" for line in lines)


class _SyslogHandler(logging.Handler):
    """To the system log, as unionfs[PID]."""

    def __init__(self) -> None:
        super().__init__()
        syslog.openlog("unionfs", syslog.LOG_PID, syslog.LOG_DAEMON)

    def emit(self, record: logging.LogRecord) -> None:
        priority = _PRIORITIES.get(record.levelno, syslog.LOG_DEBUG)
        text = self.format(record).encode("utf-8", "replace").decode()
        for line in text.replace("\0", "\\0").splitlines():
            syslog.syslog(priority, line)
