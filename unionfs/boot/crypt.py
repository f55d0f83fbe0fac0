# SPDX-License-Identifier: GPL-2.0-or-later
"""Unlocking a store on a LUKS device, by cryptsetup(8).

Owns who is asked for the passphrase: systemd's agents where there are any, else the console.
Called by root.py.  What the initramfs itself has unlocked is named by its own device instead.
"""

import dataclasses
import os
import subprocess
from typing import Final

from unionfs import locator
from unionfs.boot.request import Request
from unionfs.errors import UnionfsError
from unionfs.stores import find, tools
from unionfs.stores.probe import probe

_NAME: Final = "unionfs-store"
_DEVICE: Final = f"/dev/mapper/{_NAME}"
_SECONDS: Final = 90  # for the answer: a boot nobody watches goes on


def unlocked(request: Request) -> Request:
    """The same with the device on which the store then is."""
    assert request.crypt is not None
    if not os.path.exists(_DEVICE):
        path = find.find(locator.parse(request.crypt), timeout=request.seconds)
        if probe(path).usage != "crypto":
            hint = "leave the word out that says so, or look whether it is the right device"
            raise UnionfsError(f"{request.crypt} ({path}) is not encrypted", hint=hint)
        _open(path)
    return dataclasses.replace(request, store=_DEVICE, crypt=None)


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
