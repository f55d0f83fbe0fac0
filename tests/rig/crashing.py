# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon that stops at a chosen step: killed as by `kill -9`, or refused by its file system.

A step is one call of the change's own that alters a layer. The daemon is forked from the test, so
that its modules' functions can be replaced by ones that count; nothing of this is in the product,
and a mount costs tens of milliseconds. The steps count only while the file `armed` exists, so a
test can prepare through the same mount. Used by tests/test_crash.py and tests/test_full.py.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import xattr

# All that the daemon imports, so that the forked ones need not.
import unionfs.cli.mount
import unionfs.handshake
import unionfs.operations
import unionfs.session
import unionfs.status  # noqa: F401
from tests.rig import ground, syscalls
from tests.rig.mounted import PATIENCE, Unionfs
from unionfs import _native, union
from unionfs.cli.main import main

_OS = (
    "mkdir",
    "mknod",
    "symlink",
    "link",
    "rename",
    "unlink",
    "rmdir",
    "chmod",
    "chown",
    "utime",
    "truncate",
    "ftruncate",
    "fsync",
    "setxattr",
    "removexattr",
)
_CHANGES = ("copy_up", "create", "remove", "rename", "attributes", "marks", "acl")


class Child(subprocess.Popen[bytes]):
    """A forked child with as much of Popen's face as the rig needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.args = "forked daemon"
        self.stdin = self.stdout = self.stderr = None

    def __del__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        fd = os.pidfd_open(self.pid) if self.poll() is None else -1
        if fd >= 0:
            try:
                if not _readable(fd, timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
            finally:
                os.close(fd)
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _readable(fd: int, timeout: float | None) -> bool:
    return bool(select.select([fd], [], [], timeout)[0])


class Steps:
    """Counts steps in the daemon; at the chosen one the daemon ends, or the step fails."""

    def __init__(self, armed: Path, trace: Path, stop_at: int, error: int) -> None:
        self.armed = armed
        self.trace = trace
        self.stop_at = stop_at
        self.error = error
        self.count = 0
        self._lock = threading.Lock()

    def __call__(self, name: str) -> None:
        if not self.armed.exists():
            return
        with self._lock:
            self.count += 1
            with open(self.trace, "a") as file:
                file.write(f"{name}\n")
            if self.count != self.stop_at:
                return
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        os.kill(os.getpid(), signal.SIGKILL)

    def before(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def stepping(*args: object, **kwargs: object) -> object:
            self(name)
            return function(*args, **kwargs)

        return stepping


class _SteppingTree:
    """The node table, of whose calls three change a layer."""

    def __init__(self, tree: Any, steps: Steps) -> None:  # noqa: ANN401
        self._tree = tree
        for name in ("make_impure", "make_whiteout", "write", "fsync"):
            setattr(self, name, steps.before(f"tree.{name}", getattr(tree, name)))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._tree, name)


def _instrument(steps: Steps) -> None:
    real_open = os.open

    def stepping_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:  # noqa: ANN401
        if flags & (os.O_CREAT | os.O_TRUNC):
            steps("open")
        return real_open(path, flags, *args, **kwargs)

    copy_data = _native.copy_data
    real_ftruncate = os.ftruncate

    def stepping_copy(src: int, dst: int, size: int) -> bool:
        steps("copy_data")
        real_ftruncate(dst, size)
        os.pwrite(dst, os.pread(src, size // 2, 0), 0)
        steps("copy_data, half way")
        return copy_data(src, dst, size)

    real_renameat2 = _native.renameat2
    replaced: Any = union
    real_tree = replaced.Tree
    os.open = stepping_open
    for name in _OS:
        setattr(os, name, steps.before(name, getattr(os, name)))
    for name in ("setxattr", "removexattr"):
        setattr(xattr, name, steps.before(f"xattr.{name}", getattr(xattr, name)))
    _native.copy_data = stepping_copy
    _native.set_mode = steps.before("set_mode", _native.set_mode)
    _native.copy_xattrs = steps.before("copy_xattrs", _native.copy_xattrs)
    _native.renameat2 = renameat2 = steps.before("renameat2", real_renameat2)
    for name in _CHANGES:
        module: Any = importlib.import_module(f"unionfs.{name}")
        if hasattr(module, "renameat2"):
            module.renameat2 = renameat2
    # What is made in C cannot be stopped from here: see tests/rig/traced.py.
    replaced.Tree = lambda *args, **kwargs: _SteppingTree(
        real_tree(*args, **kwargs | {"plain": False}), steps
    )
    # The engine's threads use the table itself.
    driver: Any = importlib.import_module("unionfs.engine")
    real_engine = driver.Engine
    driver.Engine = lambda tree, **kwargs: real_engine(tree._tree, **kwargs)


class Stepping(Unionfs):
    """`unionfs mount -f` in a forked child whose steps are counted.

    `stop_at`: the step before which it is killed; with `error` that step fails with it instead.
    0: it runs through. `trace` has a line for each step since `arm()`.
    """

    stop_at = 0
    error = 0

    @property
    def armed(self) -> Path:
        return self.mnt.with_name(self.mnt.name + ".armed")

    @property
    def trace(self) -> Path:
        return self.mnt.with_name(self.mnt.name + ".trace")

    def arm(self) -> None:
        self.trace.write_text("")
        self.armed.touch()

    def disarm(self) -> list[str]:
        """The steps since arm()."""
        self.armed.unlink(missing_ok=True)
        return self.trace.read_text().split("\n")[:-1]

    def instrument(self) -> None:
        """In the child, before it begins."""
        _instrument(Steps(self.armed, self.trace, self.stop_at, self.error))

    def mount(self) -> None:
        self.armed.unlink(missing_ok=True)
        self._read = self.log.stat().st_size if self.log.exists() else 0
        words = self.command()
        argv = words[words.index("mount") :]
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._be_daemon(argv)
        self.process = Child(pid)
        self._wait_for_mount(self.process)

    def _be_daemon(self, argv: list[str]) -> NoReturn:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
            null = os.open("/dev/null", os.O_RDONLY)
            log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            for fd, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(fd, target)
            os.closerange(3, 1024)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            logging.getLogger().handlers.clear()
            self.instrument()
            code = main(argv)
            sys.stderr.flush()
            os._exit(code)
        finally:
            traceback.print_exc()
            os._exit(99)

    def umount(self) -> None:
        """Without a process more, if we may: these tests unmount thousands of times."""
        process = self.process
        if os.geteuid() != 0 or process is None or process.poll() is not None:
            super().umount()
            return
        try:
            syscalls.umount(self.mnt)
        except OSError:
            self.abandon()
            raise
        self.process = None
        code = process.wait(PATIENCE)
        assert code == 0, f"the daemon ended with exit code {code}: {self.words()}"
        self._check_log()

    def bury(self) -> None:
        """Wait for the killed daemon and unmount what is left of it."""
        process, self.process = self.process, None
        assert process is not None
        assert process.wait(PATIENCE) == -signal.SIGKILL, self.words()
        ground.run(*(["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]), self.mnt)


def until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Wait for what has no event of its own (a state seen in /proc)."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {patience} s still not: {what}")
        time.sleep(0.01)


GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
