# SPDX-License-Identifier: GPL-2.0-or-later
"""Unlocking a store on a LUKS device, by cryptsetup(8).

Owns who is asked for the passphrase: systemd's agents where there are any, else the console; and,
where it is only known what a store is called, which devices are tried.  Called by root.py.  What
the initramfs itself has unlocked is named by its own device instead.

live-boot says no more than that the store is encrypted, and its label is that of the file system
inside: luksFormat gives none.  So each LUKS device is unlocked until one has it, those first that
are called so outside, and what is something else is locked again.
"""

import contextlib
import dataclasses
import os
import subprocess
import time
from typing import Final

from unionfs import locator
from unionfs.boot.request import Request
from unionfs.errors import UnionfsError
from unionfs.locator import Locator
from unionfs.stores import find, tools
from unionfs.stores.probe import Contents, probe

_NAME: Final = "unionfs-store"
_DEVICE: Final = f"/dev/mapper/{_NAME}"
_SECONDS: Final = 90  # for the answer: a boot nobody watches goes on
_LUKS: Final = "crypto_LUKS"


def unlocked(request: Request) -> Request:
    """The same with the device on which the store then is."""
    assert request.crypt is not None
    where = locator.parse(request.crypt)
    if request.crypt_by_name and where.tag is not None:
        device = _Search(where).run(request.seconds)
    else:
        device = _DEVICE
        if not os.path.exists(_DEVICE):
            _open_only(request.crypt, find.find(where, timeout=request.seconds))
    return dataclasses.replace(request, store=device, crypt=None)


def _open_only(called: str, path: str) -> None:
    if probe(path).usage != "crypto":
        hint = "leave the word out that says so, or look whether it is the right device"
        raise UnionfsError(f"{called} ({path}) is not encrypted", hint=hint)
    _open(path)


class _Search:
    """For a store that is encrypted and has some label, and lies nobody knows where."""

    def __init__(self, where: Locator) -> None:
        self._where = where
        self._tried: set[str] = set()
        self._locked: list[UnionfsError] = []  # why some could not be looked into

    def run(self, seconds: float) -> str:
        """The device of what is inside.  The answers' time counts, so that a boot goes on."""
        end = time.monotonic() + seconds
        found = self._look()
        if found is None:
            found = find.wait(self._look, end - time.monotonic())
        if found is not None:
            return found
        if self._locked:
            raise self._locked[0]
        hint = "plug it in, or say which one it is: unionfs.crypt=/dev/NAME"
        tried = f" ({', '.join(sorted(self._tried))})" if self._tried else ""
        raise UnionfsError(f"no encrypted device{tried} has {self._where.source} in it", hint=hint)

    def _look(self) -> str | None:
        """Among what is there now and was not tried yet."""
        if os.path.exists(_DEVICE):  # ours: what is something else was locked again
            return _DEVICE
        found = list(find.examine(find.block_devices()))
        for one in found:
            if _is_unlocked(one.path) and self._named(one):
                return one.path
        locked = [one for one in found if one.fstype == _LUKS and one.path not in self._tried]
        for one in sorted(locked, key=lambda one: not self._named(one)):
            self._tried.add(one.path)
            try:
                _open(one.path)
            except UnionfsError as exc:
                self._locked.append(exc)
                continue
            if self._named(one) or self._is_it(_DEVICE):
                return _DEVICE
            _close()
        return None

    def _is_it(self, device: str) -> bool:
        with contextlib.suppress(UnionfsError):
            return self._named(probe(device))
        return False

    def _named(self, contents: Contents) -> bool:
        assert self._where.tag is not None
        return find.same(
            self._where.tag, find.value_of(contents, self._where.tag), self._where.value
        )


def _is_unlocked(device: str) -> bool:
    """Whether it is what an encrypted device shows, to whomever unlocked it."""
    name = os.path.basename(os.path.realpath(device))
    with contextlib.suppress(OSError), open(f"/sys/class/block/{name}/dm/uuid") as file:
        return file.read().startswith("CRYPT-")
    return False


def _open(path: str) -> None:
    command = [
        tools.tool("cryptsetup", "cryptsetup"),
        "open",
        "--type",
        "luks",
        f"--timeout={_SECONDS}",
    ]
    phrase = None
    ask = tools.find("systemd-ask-password")
    if ask is not None and os.path.isdir("/run/systemd/ask-password"):
        words = ["-n", f"--timeout={_SECONDS}", f"Passphrase of the store on {path}:"]
        asked = tools.run([ask, *words])
        if asked.returncode:
            raise UnionfsError(f"{path} stays locked: no passphrase was given")
        phrase = asked.stdout
        command.append("--key-file=-")
    # Without a phrase it asks on the console, which is its standard input and output.
    done = subprocess.run([*command, path, _NAME], input=phrase, check=False)
    if done.returncode:
        code = done.returncode
        raise UnionfsError(f"{path} stays locked: cryptsetup ended with exit code {code}")


def _close() -> None:
    done = tools.run([tools.tool("cryptsetup", "cryptsetup"), "close", _NAME])
    if done.returncode:
        code = done.returncode
        raise UnionfsError(f"{_DEVICE} stays unlocked: cryptsetup ended with exit code {code}")
