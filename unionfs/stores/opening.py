# SPDX-License-Identifier: GPL-2.0-or-later
"""From the locators of a mount to open layers.

Owns the order: the upper's file system is mounted before those of the lowers, since one that is
wanted writable cannot be had once it is mounted read-only; its directory is entered last, since
it is called after the base and begins with the mode of the base's root.  Called by daemon.py.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from unionfs import checks, locator
from unionfs.checks import LOWER, UPPER
from unionfs.errors import UnionfsError, usage_error
from unionfs.identity import Base
from unionfs.layer import Layer, layer_error, open_private
from unionfs.locator import Locator
from unionfs.mounts import MountEntry, Position, locate
from unionfs.options import MountOptions
from unionfs.passphrase import Ask
from unionfs.stores import (
    base,
    belonging,
    fscrypt,
    gocryptfs,
    mounted_base,
    squash,
    unlocking,
    userspace,
)
from unionfs.stores.find import NotFound
from unionfs.stores.probe import Contents
from unionfs.stores.volume import Volume, make_directory, open_volume, put_back, walk

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


class Stores:
    """The volumes of one mount, and the layers on them.

    `options` are those of the mount with plain directories put for what turned out to be one.
    """

    def __init__(self, options: MountOptions, ask: Ask) -> None:
        self.options = options
        self._ask = ask
        self.lowers: dict[str, Layer] = {}
        self.upper: Layer | None = None
        self._volumes: list[Volume] = []
        self._upper: Volume | None = None
        self._plain: Volume | None = None  # what gocryptfs shows of an encrypted upper
        self._encrypted = ""  # how the upper is
        self._inside = "/"  # where it is in its file system
        self._below = -1  # then, where autogrow is asked for: the file system that it lies in
        self.base: Base | None = None
        self._called: Locator | None = None  # what names the base

    def close(self) -> None:
        """Release everything.  A second call does nothing."""
        for layer in self.opened().values():
            layer.close()
        if self._below >= 0:
            os.close(self._below)
            self._below = -1
        for volume in reversed(self._volumes):
            volume.close()

    def opened(self) -> dict[tuple[str, str], Layer]:
        """The layers by kind and name, for the checks."""
        found = {(LOWER, text): layer for text, layer in self.lowers.items()}
        if self.upper is not None and self.options.upper is not None:
            found[UPPER, self.options.upper] = self.upper
        return found

    def facts(self) -> dict[str, object] | None:
        """What the status tells of the store."""
        if self._upper is None:
            return None
        how = {"encrypted": self._encrypted} if self._encrypted else {}
        if self._upper.contents is not None:
            how["directory"] = self._inside
        return self._upper.facts() | how

    @property
    def upper_in_volume(self) -> bool:
        """Whether the upper's file system is that of an image or a device."""
        return self._upper is not None and self._upper.contents is not None

    @property
    def image(self) -> str | None:
        """The file that the upper's file system lies in, if it is one."""
        if self._upper is None or self._upper.contents is None:
            return None
        path = self._upper.contents.path
        return path if os.path.isfile(path) else None

    @property
    def own_root(self) -> int:
        """The root of the file system that only the upper lies in, if the kernel mounts it; -1."""
        volume = self._upper
        own = volume is not None and volume.contents is not None and volume.helper is None
        return volume.root if volume is not None and own else -1

    @property
    def helpers(self) -> list[userspace.Helper]:
        """The programs that run for us."""
        return [volume.helper for volume in self._volumes if volume.helper is not None]

    def growth(self) -> tuple[Callable[[], int], Callable[[int], None], Callable[[], int]]:
        """How large the upper's image is, how it is made larger while it is mounted, and what is
        written to it but not taken from its free space yet."""
        volume = self._upper
        assert volume is not None
        assert self.upper is not None
        if volume.contents is None or not stat.S_ISREG(os.stat(volume.contents.path).st_mode):
            raise usage_error("autogrow= is for an upper in an image", "leave it out")
        path, fstype, fd = volume.contents.path, volume.contents.fstype, self.upper.fd
        if volume.helper is not None or fstype not in ("ext4", "xfs", "btrfs"):
            how = volume.helper.name if volume.helper is not None else fstype
            raise usage_error(f"autogrow=: {how} cannot grow while it is mounted", "leave it out")
        if self._plain is not None:  # what is resized lies below
            fd = self._below = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=volume.root)
        from unionfs.stores import resizing

        def enlarge(size: int) -> None:
            resizing.enlarge(path, volume.device, fd, fstype, size)

        uuid = volume.contents.uuid
        promised = resizing.promised_by_btrfs(uuid) if fstype == "btrfs" else lambda: 0
        return lambda: os.stat(path).st_size, enlarge, promised

    def open(self, mounts: list[MountEntry], *, readonly: bool) -> None:
        """Mount and open all layers that are no plain directories."""
        self._mount_upper(readonly=readonly)
        self._open_lowers(mounts)
        if self._upper is not None:
            self._enter_upper(self._upper, mounts)
        else:
            checks.refuse_key(self.options)

    def _mount_upper(self, *, readonly: bool) -> None:
        text = self.options.upper
        if text is None or (locator.is_directory(text) and not checks.may_be_encrypted(text)):
            return
        if self.options.work is not None:
            hint = "leave workdir out: it lies in the store"
            raise UnionfsError(f"workdir= and a store ({text}) exclude each other", hint=hint)
        guard = self.options.other_machine == "refuse"
        flags = self.options.store_flags
        self._upper = self._mount(text, readonly=readonly, flags=flags, guard=guard)

    def _open_lowers(self, mounts: list[MountEntry]) -> None:
        names = list(self.options.lowers)
        for number, text in enumerate(names):
            plain = locator.is_directory(text)
            volume = None if plain else self._mount(text, readonly=True)
            if number == len(names) - 1:
                self._called = volume.locator if volume is not None else locator.parse(text)
                if volume is not None and volume.contents is not None:
                    self.base = base.describe(volume.locator, volume.contents)
                else:
                    seen = text if volume is None else volume.mountpoint
                    self.base = mounted_base.describe(self._called, seen, mounts)
            if volume is None:
                continue
            inside = volume.locator.directory or "/"
            if volume.contents is None:
                names[number] = volume.path_of(inside)
            elif text not in self.lowers:
                try:
                    fd = walk(volume, inside)
                except FileNotFoundError as exc:
                    raise _no_directory(volume, inside, "correct it") from exc
                if unlocking.hides(fd):
                    raise checks.only_upper(text)
                self.lowers[text] = _layer(volume, inside, fd, mounts, upper=False)
        self.options = replace(self.options, lowers=tuple(names))

    def _enter_upper(self, volume: Volume, mounts: list[MountEntry]) -> None:
        """The upper's directory in its file system, made if it is not there."""
        inside = volume.locator.directory
        if inside is None:
            shared = volume.contents is not None or volume.device != volume.mountpoint
            assert self.base is not None
            assert self._called is not None
            inside = "/"
            if shared:
                inside = belonging.default_directory(volume, self.base, self._called)
        try:
            fd = walk(volume, inside)
        except FileNotFoundError:
            checks.refuse_key(self.options)
            if volume.readonly:
                raise _no_directory(volume, inside, "mount it writable once") from None
            if put_back(volume, inside):
                fd = walk(volume, inside)
            else:
                self._refuse_new(volume, inside, mounts)
                fd = make_directory(volume, inside, self._like())
        self._inside = inside
        self._encrypted = unlocking.kind_of(fd)
        if self._encrypted == gocryptfs.KIND:
            self._mount_cipher(volume, inside, fd, mounts)
            return
        try:
            self._unlock(volume, inside, fd)
        except BaseException:
            os.close(fd)
            raise
        if volume.contents is not None:
            self.upper = _layer(volume, inside, fd, mounts, upper=True)
            return
        os.close(fd)
        self.options = replace(self.options, upper=volume.path_of(inside))

    def _refuse_new(self, volume: Volume, inside: str, mounts: list[MountEntry]) -> None:
        """An upper that the checks would refuse is not made: it would be written to a lower."""
        above, below = inside, ""
        while True:
            above, name = os.path.split(above)
            below = os.path.join(name, below)
            with contextlib.suppress(FileNotFoundError):
                fd = walk(volume, above)
                break
        try:
            position = None
            if volume.contents is not None:
                position = Position(_number(volume, fd, mounts), above)
            checks.check_new_upper(self.options, fd, below, mounts, self.opened(), position)
        finally:
            os.close(fd)

    def _unlock(self, volume: Volume, inside: str, directory: int) -> None:
        """What is not a cipher directory: by the kernel, or not at all."""
        name = unlocking.name_of(volume, inside)
        if self._encrypted:
            fscrypt.unlock(directory, name, self._ask, volume.keys)
        else:
            fscrypt.refuse_locked(directory, name)
            checks.refuse_key(self.options)

    def _mount_cipher(
        self, volume: Volume, inside: str, cipher: int, mounts: list[MountEntry]
    ) -> None:
        """The upper lies where its cipher directory does: that is what the checks compare."""
        try:
            plain = unlocking.mount(volume, inside, cipher, self._ask, readonly=volume.readonly)
            self._volumes.append(plain)
            self._plain = plain
            fd = os.open(".", _DIRECTORY, dir_fd=plain.root)
            self.upper = _layer(plain, inside, fd, mounts, upper=True, at=cipher)
        finally:
            os.close(cipher)

    def _mount(
        self, text: str, *, readonly: bool, flags: str | None = None, guard: bool = False
    ) -> Volume:
        options = self.options
        wait = 0 if options.waited else options.device_timeout or 0
        try:
            volume = open_volume(
                text,
                readonly=readonly,
                search=options.search,
                timeout=wait,
                flags=flags,
                guard=guard,
                share=True,
            )
        except NotFound as exc:
            if options.waited and options.device_timeout:
                exc.message += f" after {options.device_timeout:g} s"
            if options.timeout is not None and options.device_timeout is None:
                exc.hint = "device-timeout=SECONDS waits for it; timeout= is for cached names"
            raise
        except OSError as exc:
            reason = os.strerror(exc.errno or errno.EIO)
            raise UnionfsError(f"cannot open {text}: {reason}") from exc
        self._volumes.append(volume)
        return volume

    def _like(self) -> os.stat_result:
        """The base's root, whose mode a new upper gets: it becomes the union's root."""
        top = self.options.lowers[0]
        try:
            return os.fstat(self.lowers[top].fd) if top in self.lowers else os.stat(top)
        except OSError as exc:
            raise layer_error(LOWER, top, exc) from exc


def _no_directory(volume: Volume, inside: str, hint: str) -> UnionfsError:
    return UnionfsError(f"{volume.locator.source} has no directory {inside}", hint=hint)


def _layer(
    volume: Volume,
    inside: str,
    fd: int,
    mounts: list[MountEntry],
    *,
    upper: bool,
    at: int | None = None,
) -> Layer:
    """`at`: the directory whose place it has, if that is another than `fd`."""
    path = unlocking.name_of(volume, inside)
    at = fd if at is None else at
    seen = locate(at, mounts) if volume.contents is None else None
    position = seen or Position(_number(volume, at, mounts), inside)
    readonly = not upper or volume.readonly
    try:
        tree = os.dup(volume.root)
        layer = open_private(path, fd, tree, position, upper=upper, readonly=readonly)
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"cannot open {path}: {reason}") from exc
    if volume.helper is not None and volume.contents is not None:
        layer.lasting = volume.helper.name in userspace.LASTING
        layer.fs_id = _fs_id(volume.contents)
    return layer


def _fs_id(contents: Contents) -> bytes:
    """Of what a program shows, through which the kernel tells no UUID."""
    import uuid

    try:
        return uuid.UUID(contents.uuid).bytes
    except ValueError:
        return squash.fs_id(contents.path)


def _number(volume: Volume, fd: int, mounts: list[MountEntry]) -> str:
    """The file system's number as in mountinfo, which btrfs does not show by stat(2)."""
    for entry in mounts:
        if entry.source == volume.device:
            return entry.device
    number = os.fstat(fd).st_dev
    return f"{os.major(number)}:{os.minor(number)}"
