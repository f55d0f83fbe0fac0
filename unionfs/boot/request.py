# SPDX-License-Identifier: GPL-2.0-or-later
"""What a command line asks of a boot.  Made by cmdline.py, carried out by root.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Mode = Literal["persist", "ram", "ro", "off"]
Fallback = Literal["fail", "ro", "tmpfs"]
OnMismatch = Literal["refuse", "ro", "ignore"]
SECONDS: Final = 30.0  # that a device is waited for, as archiso does


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A union of the root.  All of it is checked: nothing in it can be malformed."""

    asked: bool = False
    mode: Mode = "off"
    store: str | None = None  # a locator, without the directory inside
    directory: str | None = None  # in the store, absolute
    flags: str | None = None  # options for mounting the store's file system
    size: str | None = None  # of the memory, as tmpfs takes it
    reset: bool = False
    crypt: str | None = None  # the store is encrypted, and lies on this device
    crypt_by_name: bool = False  # it, or what is in it, has that name: which device is not known
    toram: bool = False
    lower: str | None = None  # the base, a locator; None: what is mounted as the root
    timeout: float | None = None  # seconds to wait for the store's device
    fallback: Fallback = "tmpfs"
    on_mismatch: OnMismatch = "refuse"
    profile: str | None = None
    persistence: bool = False  # persistence.conf in the store says which directories persist
    options: str = ""  # as after -o
    notices: tuple[str, ...] = ()  # a line each
    sources: Mapping[str, str] = field(default_factory=dict)  # of each field: the word

    @property
    def seconds(self) -> float:
        """How long the store's device is waited for."""
        return SECONDS if self.timeout is None else self.timeout

    @property
    def native(self) -> bool:
        """Whether a word of our own asks, and not only one that others understand too."""
        return any(word.startswith("unionfs.") for word in self.sources.values())
