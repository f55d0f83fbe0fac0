# SPDX-License-Identifier: GPL-2.0-or-later
"""From options to a running union and back: start, ready, signals, stop order.

Owns the order of things and the life of the process.  Does not own layers (layer.py, work.py),
mounting (session.py), the wire (handshake.py) nor what is answered (operations.py).  Called by
the verbs of cli/.

    starting process                    daemon (the same process with foreground)
    fork ------------------------------> check, open layers, lock and open the work area,
    waits at a socket                    build the union, mount, answer INIT
    asks for a passphrase <- "ask" ----- (an encrypted store: passphrase.py)
    stat(MNT) <------- "ready" --------- serve
    exit 0                               ... until unmounted, SIGTERM or SIGINT
                                         close: device, union, work (unlocks), layers

Signals.  SIGTERM and SIGINT unmount.  If files of the union are in use it is unmounted lazily
after the kernel has written what it holds: whoever has files open then gets ENOTCONN, the tree
is whole.  A second signal does not wait for that.  If the loop ends by an error, the mount is
taken away rather than left to hang.

A daemon of the running system's root is ended by nobody.  At SIGPWR, when all is over, it leaves
its store as if it had ended (boot/aside.py).

Locks are taken and threads are started after the fork: neither survives it.
"""

import contextlib
import datetime
import functools
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

from unionfs import capabilities, inherited, logs, notify
from unionfs.errors import ExitCode, UnionfsError, printable
from unionfs.options import MountOptions

if TYPE_CHECKING:
    import pyfuse3
    import trio

    from unionfs.engine import EngineLoop
    from unionfs.handshake import Loop
    from unionfs.layer import Layer
    from unionfs.opened import Opened
    from unionfs.passphrase import Ask, Source
    from unionfs.recovery import Recovery
    from unionfs.session import Mount, Plan
    from unionfs.space import Watch
    from unionfs.stores.userspace import Helper
    from unionfs.work import Work

log = logging.getLogger("unionfs")

_FLUSH_SECONDS: Final = 10
_DETACH_SECONDS: Final = 2


class Served(Protocol):
    """What is mounted: the union and its operations."""

    @property
    def operations(self) -> "pyfuse3.Operations":
        """What the driver calls."""

    def set_facts(self, facts: dict[str, object]) -> None:
        """Take what only the daemon knows, for the status."""

    def close(self) -> None:
        """Let go of everything but the layers."""


Build = Callable[[MountOptions, "list[Layer]", "Layer | None", "Work | None"], Served]


class _UnionServed:
    """The real thing."""

    def __init__(
        self,
        options: MountOptions,
        lowers: "list[Layer]",
        upper: "Layer | None",
        work: "Work | None",
    ) -> None:
        # Nothing is imported once we are mounted: the mount may hide where it would come from.
        import unionfs.status  # noqa: F401
        from unionfs.operations import UnionOperations
        from unionfs.union import Union

        self._union = Union(options, lowers, upper, work)
        self.operations = UnionOperations(self._union)

    def set_facts(self, facts: dict[str, object]) -> None:
        self._union.facts = facts

    def close(self) -> None:
        self._union.close()


def preload() -> None:
    """Import what a daemon needs before several of them are forked."""
    import unionfs.engine
    import unionfs.opened
    import unionfs.operations
    import unionfs.session
    import unionfs.status
    import unionfs.union  # noqa: F401


def _warn(text: str) -> None:
    sys.stderr.write(f"unionfs: warning: {text}\n")


def run(
    options: MountOptions, *, build: Build = _UnionServed, warn: Callable[[str], None] = _warn
) -> int:
    """Mount; return 0 once the union can be used (foreground: once it has ended).

    `warn`: is told, in the starting process, if it is not what was asked for.
    Raises UnionfsError if it could not be mounted; then nothing is left behind.
    """
    if options.foreground:
        logs.to_stderr(debug=options.debug)
        from unionfs import passphrase

        ask = functools.partial(passphrase.obtain, _key_source(options))
        return _Daemon(options, build, functools.partial(_tell_manager, options), ask).run()
    inherited.hear_signals()  # of the daemon's end, should it fail
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            os._exit(_run_in_background(options, build, theirs))
        finally:
            os._exit(int(ExitCode.INTERNAL))
    theirs.close()
    with ours:
        return _await_ready(ours, child, options, warn)


def _key_source(options: MountOptions) -> "Source":
    """Where a passphrase comes from.  What goes on without one does not wait for ever."""
    from unionfs.boot import aside
    from unionfs.passphrase import SECONDS, Source

    console = aside.in_initramfs()
    goes_on = options.fallback != "fail" or options.holds_root or console
    return Source(options.key_file, options.credential, SECONDS if goes_on else None, console)


def _tell_manager(options: MountOptions, _number: str, warning: str) -> None:
    """In the foreground a service manager may wait for the word."""
    status = warning or f"mounted on {options.mountpoint}"
    notify.send("READY=1", f"STATUS={printable(status)}")


# The starting process


def _await_ready(
    link: socket.socket, child: int, options: MountOptions, warn: Callable[[str], None]
) -> int:
    """Wait for the daemon's word: ready, or what was wrong."""
    try:
        message = _converse(link, options)
        if "ready" in message:
            if message.get("warning"):
                warn(message["warning"])
            # The daemon's answer to this proves that the tree can be used.
            if options.only is None:  # else it is not for us to look
                os.stat(options.mountpoint)
            return int(ExitCode.OK)
    except OSError as exc:
        _end_child(child)
        reason = f"{options.mountpoint} was mounted but does not answer: {exc.strerror}"
        raise UnionfsError(reason, hint="the system log says more") from exc
    except KeyboardInterrupt:
        _end_child(child)
        raise
    os.waitpid(child, 0)
    if "traceback" in message:
        sys.stderr.write(message["traceback"])
    raise UnionfsError(
        message.get("message", "the daemon ended before it was ready"),
        hint=message.get("hint", "the system log may say more" if not message else None),
        code=ExitCode(message.get("code", ExitCode.INTERNAL)),
    )


def _converse(link: socket.socket, options: MountOptions) -> dict[str, Any]:
    """Answer what the daemon asks, until it has no more to ask; empty if it just ended."""
    while text := link.recv(1 << 20):
        message: dict[str, Any] = json.loads(text)
        if "ask" not in message:
            return message
        from unionfs import passphrase

        passphrase.answer(link, _key_source(options), message["ask"])
    return {}


def _end_child(child: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)


# The daemon


def _run_in_background(options: MountOptions, build: Build, link: socket.socket) -> int:
    """The life of the daemon's process.  What goes wrong before it is ready goes to the starter."""
    said = False

    def say(message: dict[str, object]) -> None:
        nonlocal said
        if not said:
            said = True
            with contextlib.suppress(OSError):  # the starting process may have been killed
                link.send(json.dumps(message).encode())
            link.close()

    def ask(store: str) -> bytearray:
        from unionfs import passphrase

        return passphrase.ask_starter(link, store)

    def ready(number: str, warning: str) -> None:
        # Not earlier: at a mount point of an automount only systemd's own process group may go on.
        os.setsid()
        say({"ready": number, "warning": warning})

    try:
        _leave_terminal(link.fileno())
        logs.to_syslog(debug=options.debug)
        return _Daemon(options, build, ready, ask).run()
    except UnionfsError as exc:
        if said:
            log.error("%s", exc.line())
        say({"message": exc.message, "hint": exc.hint, "code": int(exc.code)})
        return int(exc.code)
    except BaseException as exc:
        log.exception("the daemon ended by an error")
        text = traceback.format_exc()
        say({"message": f"internal error: {exc!r}", "code": 4, "hint": None, "traceback": text})
        return int(ExitCode.INTERNAL)


def _leave_terminal(keep: int) -> None:
    """No terminal, and none of the descriptors that were inherited."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, _interrupted)  # it reaches us too until we are mounted
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.closerange(3, keep)
    os.closerange(keep + 1, highest if highest != resource.RLIM_INFINITY else 1 << 20)


def _interrupted(_number: int, _frame: object) -> NoReturn:
    raise UnionfsError("interrupted before the union was mounted", code=ExitCode.INTERRUPT)


@dataclass
class _Daemon:
    """One union in this process: the fields are filled in the order of run()."""

    options: MountOptions
    build: Build
    ready: Callable[[str, str], None]  # the mount's number, and a warning for who mounts
    ask: "Ask"  # for the passphrase of a store
    _was_live: bool = field(default=False, init=False)
    _warning: str = field(default="", init=False)
    _facts: dict[str, object] = field(default_factory=dict, init=False)
    _watch: "Watch | None" = field(default=None, init=False)
    _helpers: "list[Helper]" = field(default_factory=list, init=False)
    _opened: "Opened | None" = field(default=None, init=False)
    _recovery: "Recovery | None" = field(default=None, init=False)

    def run(self) -> int:
        """Mount, serve, clean up; the exit code."""
        # Only here: the starting process does without them.
        import unionfs.watchdog  # noqa: F401
        from unionfs import session

        # Before we are mounted: the mount may hide where it would be imported from.
        make_loop = self._driver()
        plan = session.plan_mount(self.options)
        # Until the loop listens: unwind what was done.  SIGINT is Python's KeyboardInterrupt.
        signal.signal(signal.SIGTERM, _interrupted)
        with contextlib.ExitStack() as stack:
            inherited.settle()
            if session.make_way(plan, self.options.mountpoint):
                log.info("%s: the daemon before was killed", self.options.mountpoint)
            opened, served = self._open(stack)
            point = opened.point
            self.options = opened.options  # another than asked for, with a fallback
            self._opened = opened
            self._helpers = opened.helpers
            self._watch = opened.watch
            self._recovery = opened.recovery
            self._tell(opened, stack)
            self._facts = self._describe(point, plan) | opened.facts
            served.set_facts(self._facts)
            if self.options.holds_root:
                from unionfs.boot import aside
            mount = session.make_mount(plan, self.options, point)
            if self.options.holds_root:
                aside.step_aside()  # while there are no threads
            stack.callback(session.release_keeper, mount)
            # After the device is closed: nothing then waits for an answer.
            stack.callback(session.unmount, mount, lazily=True)
            loop = make_loop(mount.device)
            stack.callback(loop.close)
            return self._serve(loop, mount, served)

    def _driver(self) -> "Callable[[int], Loop | EngineLoop]":
        """What makes the loop that answers the requests of a device."""
        from unionfs.handshake import Loop, Wishes

        options = self.options
        wishes = Wishes.of(options)
        if options.driver == "engine":
            from unionfs.engine import EngineLoop

            return lambda device: EngineLoop(device, wishes, only_root_and_us=options.allow_root)
        words = {"debug"} if options.debug else set()
        if options.allow_root:
            words.add("allow_root")  # libfuse itself refuses the others
        return lambda device: Loop(device, wishes, words)

    def _open(self, stack: contextlib.ExitStack) -> "tuple[Opened, Served]":
        """Check everything, then open it, in the order that leaves nothing behind on an error."""
        from unionfs.opened import Asked, open_layers

        asked = Asked(was_live=lambda: self._was_live, passphrase=self.ask)
        opened = open_layers(self.options, stack, asked)
        served = self.build(opened.options, opened.lowers, opened.upper, opened.work)
        stack.callback(served.close)
        return opened, served

    def _tell(self, opened: "Opened", stack: contextlib.ExitStack) -> None:
        """Say aloud, and in /run/unionfs, that the union is not what was asked for."""
        from unionfs import runtime

        name = self.options.name or runtime.name_of(opened.point)
        # Of a profile's union its profile tells.
        told = ":" not in (self.options.name or "")
        if not opened.warning:
            runtime.clear(name)
            if told:
                notify.has_store(name, degraded=False)
            return
        log.warning("%s", opened.warning)
        self._warning = opened.warning
        runtime.tell_degraded(name, opened.warning)
        stack.callback(runtime.clear, name)
        if told:
            notify.has_store(name, degraded=True)

    def _describe(self, point: str, plan: "Plan") -> dict[str, object]:
        options = self.options
        now = datetime.datetime.now(datetime.UTC)
        try:
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:
            namespace = None
        return {
            "mountpoint": point,
            "fsname": options.fsname or "unionfs",
            "pid": os.getpid(),
            "pid_namespace": namespace,
            "uid": os.geteuid(),
            "since": now.isoformat(timespec="seconds"),
            "driver": options.driver,
            "mounted_by": "mount" if plan.helper is None else "fusermount3",
        }

    def _serve(self, loop: "Loop | EngineLoop", mount: "Mount", served: Served) -> int:
        import trio

        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        # A helper thread that has finished sends SIGURG to the loop's thread: should that be in a
        # read whose request was taken back (its process was killed), it gets EINTR and goes on.
        signal.signal(signal.SIGURG, lambda _number, _frame: None)
        capabilities.obey_quotas()  # the threads that answer too: none has been started yet
        try:
            trio.run(self._live, loop, mount, served)
        except BaseException as exc:
            error = _innermost(exc)
            if not self._was_live or not isinstance(error, Exception):
                raise error from exc
            log.error("the loop ended by an error; unmounting %s", mount.point, exc_info=exc)
            return int(ExitCode.INTERNAL)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # we are ending already
            if self._recovery is not None:
                self._recovery.stop()
        log.info("%s is unmounted", mount.point)
        return int(ExitCode.OK)

    async def _live(self, loop: "Loop | EngineLoop", mount: "Mount", served: Served) -> None:
        import trio

        from unionfs import session, watchdog

        def on_init() -> None:
            self._was_live = True
            if self.options.driver == "engine":  # /sys may lie below the mount point
                session.read_ahead(mount)
            self._facts["init"] = [flag.name for flag in loop.flags]
            log.info("mounted on %s", mount.point)
            if self._recovery is not None:
                self._recovery.start(self._facts)
            self.ready(mount.number, self._warning)

        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch_signals, loop, mount)
            for helper in self._helpers:
                nursery.start_soon(self._watch_helper, helper)
            if self._watch is not None:
                nursery.start_soon(self._watch_space, self._watch)
            seconds = notify.watchdog_seconds() if self.options.foreground else None
            if seconds is not None:
                nursery.start_soon(watchdog.keep_telling, mount.point, seconds)
            await loop.run(served.operations, on_init)
            nursery.cancel_scope.cancel()

    async def _watch_helper(self, helper: "Helper") -> None:
        """A program that mounts a layer for us must not end before we do."""
        import trio

        await trio.lowlevel.wait_readable(helper.watch)
        code = helper.ended()
        what = f"{helper.name} of {helper.path} has ended"
        what += "" if code is None else f" ({code})"
        self._facts["broken"] = f"{what}: unmount, check the store, mount again"
        log.error("%s: what lies there cannot be reached any more", what)

    async def _watch_space(self, watch: "Watch") -> None:
        """Warn of a store that gets full, or let it grow; in a thread, since that may take long."""
        import trio

        while True:
            await trio.to_thread.run_sync(watch.look)
            problem = watch.problem or None
            self._facts["space"] = {"low": watch.low, "disk": watch.disk, "problem": problem}
            await trio.sleep(watch.seconds)

    async def _watch_signals(
        self, loop: "Loop | EngineLoop", mount: "Mount", task_status: "trio.TaskStatus[None]"
    ) -> None:
        import trio

        ending = [signal.SIGTERM, signal.SIGINT]
        if self.options.holds_root:
            ending.append(signal.SIGPWR)
        if self.options.foreground:
            ending.append(signal.SIGHUP)  # its terminal is gone
        with trio.open_signal_receiver(*ending) as signals:
            task_status.started()
            async with trio.open_nursery() as nursery:
                stopping = False
                async for number in signals:
                    if number == signal.SIGPWR:
                        nursery.start_soon(self._rest)
                        continue
                    if self.options.holds_root:  # the system stands on what we would unmount
                        log.info("%s: ignored", signal.Signals(number).name)
                        continue
                    log.info("%s: ending", signal.Signals(number).name)
                    if stopping:
                        loop.stop()
                    else:
                        stopping = True
                        notify.send("STOPPING=1")
                        nursery.start_soon(self._stop, loop, mount)

    async def _rest(self) -> None:
        """The system is over, but for us."""
        import trio

        from unionfs.boot import aside

        if self._recovery is not None:  # it begins anew at the next mount
            await trio.to_thread.run_sync(self._recovery.stop)
        if self._opened is not None:
            await trio.to_thread.run_sync(aside.rest, self._opened)

    async def _stop(self, loop: "Loop | EngineLoop", mount: "Mount") -> None:
        """Unmount and let the loop end; see "Signals" above."""
        import trio

        from unionfs import session

        plainly = functools.partial(session.unmount, mount, lazily=False)
        if await trio.to_thread.run_sync(plainly):
            # The loop ends by itself, unless another mount namespace has a copy of the mount.
            await trio.sleep(_DETACH_SECONDS)
        else:
            log.warning("%s is in use: unmounting it lazily", mount.point)
            with trio.move_on_after(_FLUSH_SECONDS):
                await _in_thread_of_its_own(functools.partial(session.flush, mount))
            await trio.to_thread.run_sync(functools.partial(session.unmount, mount, lazily=True))
        loop.stop()


async def _in_thread_of_its_own(action: Callable[[], None]) -> None:
    """Run what may hang where it holds up neither us, when cancelled, nor the process's end."""
    import trio

    token = trio.lowlevel.current_trio_token()
    done = trio.Event()

    def work() -> None:
        try:
            action()
        except OSError as exc:
            log.warning("flushing: %s, ignoring", exc)
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(done.set)

    threading.Thread(target=work, daemon=True).start()
    await done.wait()


def _innermost(exc: BaseException) -> BaseException:
    """The one error inside the groups that nurseries make."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
