# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the passphrase of an encrypted store comes from, and how it gets to the daemon.

Owns the ways: a key file, a credential of systemd, a question on the terminal, or one by
systemd-ask-password(1) where there is no terminal; in an initramfs without that, on the console.
A passphrase is a bytearray, wiped when it has been used; it is in no argument list, no environment
and no log.  Called by the daemon and the verbs of stores; used by stores/gocryptfs.py.

The daemon has neither terminal nor standard input.  It asks the process that started it, through
the socket that it also says over that it is ready (daemon.py).
"""

import contextlib
import errno
import hmac
import json
import os
import select
import socket
import subprocess
import termios
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from unionfs.errors import ExitCode, UnionfsError, printable

LIMIT: Final = 2048  # bytes; gocryptfs(1) reads no more
SECONDS: Final = 90  # for an answer, where something goes on without one: as systemd's agents wait
_TERMINAL: Final = "/dev/tty"
_CONSOLE: Final = "/dev/console"
_OTHER_WAYS: Final = (
    "name a file (key-file=, --key-file), or a credential of systemd (credential=, --credential)"
)
_AGENTS: Final = "/run/systemd/ask-password"  # is there if somebody could answer
_ANSWER_BYTES: Final = 1 << 16
_GIVEN: Final = b"+"
_NOT_GIVEN: Final = b"-"

# Asked with the name of a store.
Ask = Callable[[str], bytearray]


class Source(NamedTuple):
    """What its user said of it; with neither a file nor a credential, somebody is asked."""

    key_file: str | None = None  # `-`: standard input
    credential: str | None = None
    seconds: float | None = None  # for the answer; None: whoever has typed the command will come
    console: bool = False  # there is a console, and may be nothing else: an initramfs


@contextlib.contextmanager
def wiped(secret: bytearray) -> Iterator[bytearray]:
    """For as long as it is needed."""
    try:
        yield secret
    finally:
        secret[:] = bytes(len(secret))


def obtain(source: Source, store: str, *, new: bool = False) -> bytearray:
    """The passphrase of a store; `new`: it is being chosen, so whoever types it does so twice."""
    if source.key_file is not None:
        return _checked(_read_file(source.key_file), f"the key file {source.key_file}")
    if source.credential is not None:
        where = _credential(source.credential)
        return _checked(_read_file(where), f"the credential {source.credential}")
    words = "New passphrase for" if new else "Passphrase of"
    first = _checked(_ask(f"{words} {store}:", store, source), "the passphrase")
    if not new:
        return first
    again = _ask(f"Once more, for {store}:", store, source)
    with wiped(_checked(again, "the passphrase")) as second:
        if not hmac.compare_digest(first, second):
            first[:] = bytes(len(first))
            raise UnionfsError("the two passphrases differ", hint="nothing was changed")
    return first


def _checked(secret: bytearray, what: str) -> bytearray:
    """Without the newline at its end.  What is left is one line, as it could be typed."""
    if secret.endswith(b"\n"):
        del secret[-1]
    wrong = ""
    if not secret:
        wrong = "is empty"
    elif b"\n" in secret:
        wrong = "has several lines"
    elif len(secret) > LIMIT:
        wrong = f"is longer than {LIMIT} bytes"
    if wrong:
        secret[:] = bytes(len(secret))
        hint = "it is one line of text, such as `openssl rand -base64 32` makes"
        raise UnionfsError(f"{what} {wrong}", hint=hint)
    return secret


def _read(fd: int) -> bytearray:
    """To the end, or one line of a terminal; never into an object that cannot be wiped."""
    secret = bytearray(LIMIT + 2)
    have = 0
    with memoryview(secret) as view:
        while have < len(view):
            got = os.readv(fd, [view[have:]])
            have += got
            if got == 0 or (os.isatty(fd) and secret[have - 1] == ord("\n")):
                break
    del secret[have:]
    return secret


def _read_file(path: str) -> bytearray:
    try:
        if path == "-":
            return _read(0)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read(fd)
        finally:
            os.close(fd)
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"cannot read the key file {path}: {reason}") from exc


def _credential(name: str) -> str:
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    hint = f"a service gets it by LoadCredential={name}:PATH, see systemd.exec(5)"
    if not folder:
        raise UnionfsError(f"no credential {name}: CREDENTIALS_DIRECTORY is not set", hint=hint)
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        raise UnionfsError(f"there is no credential {name} in {folder}", hint=hint)
    return path


def _ask(question: str, store: str, source: Source) -> bytearray:
    for path in _terminals(source):
        try:
            terminal = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if os.isatty(terminal):
                secret = _ask_terminal(terminal, question, source.seconds)
                if secret is None:
                    raise _nobody(f"{store} in {source.seconds:g} s")
                return secret
        finally:
            os.close(terminal)
    return _ask_system(question, store, source.seconds)


def _terminals(source: Source) -> list[str]:
    """Where to ask; on the console if systemd's agents, who know it better, are not there."""
    use_console = source.console and not os.path.isdir(_AGENTS)
    return [_TERMINAL, *([_CONSOLE] if use_console else [])]


def _nobody(what: str) -> UnionfsError:
    return UnionfsError(f"nobody gave the passphrase of {what}", hint=_OTHER_WAYS)


def _ask_terminal(terminal: int, question: str, seconds: float | None) -> bytearray | None:
    """What is typed, which is not shown; None if no whole line is there in time."""
    before = termios.tcgetattr(terminal)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    try:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, silent)
        os.write(terminal, os.fsencode(f"{printable(question)} "))
        ready, _, _ = select.select([terminal], [], [], seconds)
        return _read(terminal) if ready else None
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
        os.write(terminal, b"\n")


def _ask_system(question: str, store: str, seconds: float | None) -> bytearray:
    """Whoever answers for the machine: Plymouth, the console, a desktop."""
    from unionfs.stores.tools import find

    program = find("systemd-ask-password")
    if program is None:
        message = f"there is no terminal to ask for the passphrase of {store}"
        raise UnionfsError(message, hint=_OTHER_WAYS)
    words = ["--no-tty", "--icon=drive-harddisk", f"--id=unionfs:{store}"]
    if seconds is not None:
        words.append(f"--timeout={seconds:g}")
    command = [program, *words, question]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        secret = _read(process.stdout.fileno())
    if process.returncode:
        secret[:] = bytes(len(secret))
        raise _nobody(store)
    return secret


# From the daemon to the process that started it, and back


def ask_starter(link: socket.socket, store: str) -> bytearray:
    """In the daemon: have it asked where there is a terminal."""
    secret = bytearray(_ANSWER_BYTES)
    try:
        link.send(json.dumps({"ask": store}).encode())
        got = link.recv_into(secret)
    except OSError:
        got = 0
    del secret[got:]
    if secret[:1] == _GIVEN:
        del secret[:1]
        return secret
    told = json.loads(secret[1:] or b"{}")
    raise UnionfsError(
        told.get("message", f"nobody is there to give the passphrase of {store}"),
        hint=told.get("hint"),
        code=ExitCode(told.get("code", ExitCode.FAIL)),
    )


def answer(link: socket.socket, source: Source, store: str) -> None:
    """In the process that started it."""
    try:
        with wiped(obtain(source, store)) as secret:
            link.sendmsg([_GIVEN, secret])
    except UnionfsError as exc:
        told = {"message": exc.message, "hint": exc.hint, "code": int(exc.code)}
        link.send(_NOT_GIVEN + json.dumps(told).encode())
