# SPDX-License-Identifier: GPL-2.0-or-later
"""From what the command line asks for to a union over the root.

Owns the order of a boot, and that it goes on: what is wrong with a store is told, and the fallback
is taken.  Mounting is daemon.py's, which also knows the fallbacks of one union.  Called by the
verb.
"""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from unionfs import locator, runtime, syscalls
from unionfs.boot.request import Request
from unionfs.boot.telling import NAME, Teller, degraded
from unionfs.errors import ExitCode, UnionfsError, printable, usage_error
from unionfs.locator import Locator
from unionfs.mounts import FSTYPE, MountEntry, mounted_beneath, read_mounts, topmost
from unionfs.options import MountOptions, read_strings
from unionfs.syscalls import UnmountFlag

if TYPE_CHECKING:
    from unionfs.profiles.profile import Profile

_OTHERS: Final = ("overlay", "aufs", "fuse.fuse-overlayfs")


def boot(request: Request, root: str, *, lower: str | None = None, dry: bool = False) -> int:
    """Do what is asked; the exit code."""
    teller = Teller()
    for notice in request.notices:
        teller.warn(notice)
    if not request.asked:
        teller.say("the kernel's command line asks for no union")
        return ExitCode.OK
    if request.profile is not None:
        from unionfs.boot import parts  # slow to load, and seldom needed

        request, idle = parts.beside_profile(request, root)
        if idle is not None:
            teller.warn(idle)
    for line in idle_words(request):
        teller.warn(line)
    lower = lower or request.lower
    mounts = read_mounts()
    point = os.path.realpath(root)
    if point == "/" and not dry:
        hint = "name the directory where an initramfs has mounted the root: --root DIR"
        raise usage_error("/ cannot be covered while it is in use", hint)
    entry = topmost(point, mounts)
    if entry is not None and _is_done(entry, request):
        teller.say(f"{root} is a union already ({entry.fstype}): it is left as it is")
        return ExitCode.OK
    if point != "/" and mounted_beneath(point, mounts):
        teller.warn(f"what is mounted beneath {root} will not be seen in the union")
    if dry:
        if (problem := _profile_problem(request, root)) is not None:
            teller.warn(problem)
        for line in described(request, root, lower):
            print(printable(line))
        return ExitCode.OK
    # Whatever it is loaded from may be beneath what is mounted.
    from unionfs import daemon  # noqa: F401

    try:
        with teller.hearing():
            return _Boot(request, root, lower, teller).run()
    finally:
        teller.keep()


def _is_done(entry: MountEntry, request: Request) -> bool:
    """Whether somebody has been here: ourselves, or those whose words are on the command line."""
    return entry.fstype == FSTYPE or (entry.fstype in _OTHERS and not request.native)


def _profile_problem(request: Request, root: str) -> str | None:
    """What is wrong with the profile, as far as its files tell."""
    from unionfs.profiles import files

    try:
        if request.profile is not None:
            files.said(request.profile, root)
    except UnionfsError as exc:
        return exc.line()
    return None


def idle_words(request: Request) -> list[str]:
    """What is said of writing to a store, where that is not done: a line each."""
    if request.mode in ("persist", "off"):
        return []
    words = [request.sources[name] for name in ("reset", "flags") if getattr(request, name)]
    return [f"{word}: without effect, as nothing is written to a store" for word in words]


def described(request: Request, root: str, lower: str | None) -> list[str]:
    """What would be done, for people."""
    lines = []
    if request.mode != "off":
        options = mount_options(request, root, lower)
        layers = ":".join(options.lowers)
        changes = "memory" if request.persistence else options.upper or "memory"
        lines.append(f"mode {request.mode}: {layers} with changes in {changes} on {root}")
        if request.persistence:
            what = "persists" if request.mode == "persist" else "is seen"
            lines.append(f"what persistence.conf in {_conf_place(request)} names {what}")
    if request.profile is not None:
        lines.append(f"profile {request.profile} below {root}")
    for name, word in request.sources.items():
        if name == "asked":
            continue
        value = getattr(request, name)
        lines.append(f"{name} = {value} ({word})")
    return lines


def _conf_place(request: Request) -> str:
    return f"{request.store}:{request.directory}" if request.directory else str(request.store)


def mount_options(request: Request, root: str, lower: str | None) -> MountOptions:
    """The union of the root."""
    reader = read_strings([request.options] if request.options else [])
    reader.lowers = [lower or root]
    reader.mountpoint = root
    memory = request.mode == "ram"
    keeps = request.mode == "persist"
    asked = reader.build()
    return dataclasses.replace(
        asked,
        upper=None if memory else store_of(request, root, lower),
        readonly=False,
        ephemeral=not keeps,
        ephemeral_size=request.size,
        nonempty=True,
        name=NAME,
        device_timeout=request.seconds,
        fallback=request.fallback,
        on_mismatch=request.on_mismatch,
        autogrow=asked.autogrow if keeps else None,
        low_water=asked.low_water if keeps else None,
        store_flags=request.flags if keeps else None,
        # A stick that was pulled out of one machine is in this one now.
        other_machine=asked.other_machine if reader.has("other_machine") else "take",
        holds_root=True,
    )


def store_of(request: Request, root: str, lower: str | None) -> str:
    """The locator of the upper; in a file system it always has a directory."""
    assert request.store is not None
    if request.directory is not None:
        return f"{request.store}:{request.directory}"
    if locator.is_directory(request.store):
        return request.store
    from unionfs.stores import base

    return f"{request.store}:{base.default_directory(_base_name(root, lower, request.seconds))}"


def _base_name(root: str, lower: str | None, seconds: float) -> str:
    """What the base is called: the label of its file system, or its image's name, or `root`."""
    from unionfs.stores import base, find, probe

    if lower is not None:
        where = locator.parse(lower)
        path = find.find(where, timeout=seconds)
        return base.base_name(where, None if os.path.isdir(path) else probe.probe(path))
    entry = topmost(os.path.realpath(root), read_mounts())
    named = Locator(NAME, NAME)
    if entry is None or not entry.source.startswith("/dev/"):
        return base.base_name(named, None)
    backing = f"/sys/class/block/{os.path.basename(entry.source)}/loop/backing_file"
    with contextlib.suppress(OSError), open(backing, errors="surrogateescape") as file:
        named = Locator(NAME, file.read().strip())
    with contextlib.suppress(UnionfsError):
        return base.base_name(named, probe.probe(entry.source))
    return base.base_name(named, None)


@dataclasses.dataclass
class _Boot:
    """One boot."""

    request: Request
    root: str
    lower: str | None
    teller: Teller

    def run(self) -> int:
        """All that is asked for; the exit code."""
        code: int = ExitCode.OK
        runtime.clear(NAME)
        if self.request.mode != "off":
            action = self._persistence if self.request.persistence else self._union
            code = self._go_on(action)
        if self.request.profile is not None:
            code = max(code, self._go_on(self._profile))
        return code

    def _go_on(self, action: Callable[[], list[str]]) -> int:
        """Do a part of it; what cannot be done stops the boot only if that is asked for.

        The action returns why its unions run without their stores, as far as they have not told.
        """
        try:
            warnings = action()
        except (UnionfsError, OSError) as exc:
            error = exc if isinstance(exc, UnionfsError) else UnionfsError(str(exc))
            self._unmount_dead()
            if self.request.fallback == "fail":
                self.teller.warn(error.line(), shown=True)
                raise UnionfsError(error.message, hint=error.hint, code=ExitCode.FAIL) from exc
            self.teller.warn(f"the system goes on without its union: {error.line()}")
            runtime.tell_degraded(NAME, error.line())
            return ExitCode.PARTIAL
        for warning in warnings:
            self.teller.warn(warning)
        if warnings:
            runtime.tell_degraded(NAME, "; ".join(warnings))
        elif (reason := degraded()) is not None:
            self.teller.warn(reason, shown=True)
        else:
            return ExitCode.OK
        return ExitCode.PARTIAL

    def _union(self) -> list[str]:
        """One union over the root."""
        from unionfs import daemon
        from unionfs.boot import crypt

        request = self.request
        if request.crypt is not None and request.mode != "ram":
            try:
                request = crypt.unlocked(request)
            except UnionfsError as exc:
                return self._in_memory(exc)
        options = self._found(request, mount_options(request, self.root, self.lower))
        if request.reset and request.mode == "persist":
            self._reset(options)
        with contextlib.ExitStack() as stack:
            daemon.run(self._over(self._base(stack), options))
        if degraded() is None:
            beneath = f" over {options.upper}" if options.upper else ""
            where = options.upper if request.mode == "persist" else f"memory{beneath}"
            self.teller.say(f"{self.root} is a union, with changes in {where}")
        return []

    def _found(self, request: Request, options: MountOptions) -> MountOptions:
        """With the upper that is there for this base already, if its name or place is another.

        The store's device is waited for here, for all that look at it later on.
        """
        if options.upper is None:
            return options
        from unionfs.boot import layouts
        from unionfs.stores import find

        seconds = options.device_timeout or 0
        with contextlib.suppress(UnionfsError):  # whoever mounts it says why
            find.find(locator.parse(options.upper), search=options.search, timeout=seconds)
        left = layouts.find_left(request, options.upper)
        if left is not None:
            self.teller.say(f"the changes that {left.program} has left are used: {left.upper}")
        known = None if left or request.directory else self._known(options)
        upper = left.upper if left else known or options.upper
        return dataclasses.replace(options, upper=upper, waited=True)

    def _known(self, options: MountOptions) -> str | None:
        """The upper that was made over this very base when that had another name."""
        assert options.upper is not None
        from unionfs.stores import belonging, mounted_base
        from unionfs.stores.volume import open_volume

        where = locator.parse(options.upper)
        if where.directory is None:  # the store is the upper
            return None
        with contextlib.suppress(UnionfsError, OSError):  # whoever mounts it says why
            name = _base_name(self.root, self.lower, 0)
            own = dataclasses.replace(mounted_base.named(self.lower or self.root), name=name)
            volume = open_volume(where.source, readonly=True, untouched=True, search=options.search)
            try:
                inside = belonging.default_directory(volume, own, Locator(name, name))
            finally:
                volume.close()
            return f"{where.source}:{inside}"
        return None

    def _base(self, stack: contextlib.ExitStack) -> str | None:
        """What is the base in place of what the root has; the copy in memory, if one is wanted."""
        if not self.request.toram:
            return self.lower
        from unionfs.boot import copying

        copy = copying.to_memory(self.lower, self.root, self.request.seconds, self.teller, stack)
        return copy or self.lower

    def _over(self, base: str | None, options: MountOptions) -> MountOptions:
        return options if base is None else dataclasses.replace(options, lowers=(base,))

    def _in_memory(self, error: UnionfsError) -> list[str]:
        """The fallback where it is not the mount that has failed."""
        from unionfs import daemon

        if self.request.fallback != "tmpfs":
            raise error
        self._unmount_dead()
        memory = dataclasses.replace(self.request, mode="ram")
        options = mount_options(memory, self.root, self.lower)
        options = dataclasses.replace(options, degraded=error.line())
        with contextlib.ExitStack() as stack:
            daemon.run(self._over(self._base(stack), options))
        return []

    def _reset(self, options: MountOptions) -> None:
        """Put the store's changes aside, if they are those of this base."""
        from unionfs.boot import resetting

        try:
            kept = resetting.reset(options)
        except UnionfsError as exc:
            self.teller.warn(f"the store is not reset: {exc.line()}")
            return
        if kept is not None:
            self.teller.say(f"the store is reset; its changes are kept in {kept}")

    def _persistence(self) -> list[str]:
        """As live-boot: the root in memory, and what the store's persistence.conf names."""
        from unionfs.boot import crypt, parts

        request = self.request
        try:
            if request.crypt is not None:
                request = crypt.unlocked(request)
            profile = parts.persistent(request)
            if request.reset and request.mode == "persist":
                self._reset_parts(profile)
            with contextlib.ExitStack() as stack:
                base = self._base(stack)
                warnings = parts.up_persistent(profile, request, self.root, base)
        except UnionfsError as exc:
            return self._in_memory(exc)
        how = "and persists where" if request.mode == "persist" else "over what persists where"
        self.teller.say(f"{self.root} is in memory, {how} {self.request.store} says")
        return warnings

    def _reset_parts(self, profile: "Profile") -> None:
        """Put aside what persists by itself; what is seen as it is in the store has no base."""
        from unionfs.boot import parts

        uppers, others = parts.uppers(profile)
        for upper in uppers:
            options = mount_options(self.request, self.root, self.lower)
            self._reset(dataclasses.replace(options, upper=upper))
        if others:
            word = self.request.sources["reset"]
            self.teller.warn(f"{word}: without effect on {', '.join(others)}, which are no unions")

    def _profile(self) -> list[str]:
        """A profile of the system that is booted."""
        from unionfs.boot import parts

        return parts.up_profile(self.request, self.root)

    def _unmount_dead(self) -> None:
        """A daemon that has ended before it was ready left its mount: it had stepped aside."""
        point = os.path.realpath(self.root)
        entry = topmost(point, read_mounts())
        if entry is None or entry.fstype != FSTYPE:
            return
        try:
            os.stat(point)
        except OSError as exc:
            if exc.errno == errno.ENOTCONN:
                syscalls.umount(point, UnmountFlag.NOFOLLOW | UnmountFlag.DETACH)
