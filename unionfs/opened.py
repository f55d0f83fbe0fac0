# SPDX-License-Identifier: GPL-2.0-or-later
"""From options to everything that a union stands on: stores, layers, work area; all of it checked.

Owns the order of opening, which is that of closing turned round, so that an error at any point
leaves nothing behind; and what is done instead if the upper cannot be used.  Called by daemon.py.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unionfs import checks, holder, identity, layer, locator
from unionfs.errors import ExitCode, UnionfsError, usage_error
from unionfs.holder import Owner
from unionfs.identity import Base, StoreRecord, parse_store
from unionfs.layer import FULL, Layer
from unionfs.marks import fd_path
from unionfs.mounts import MountEntry, filesystem_at, read_mounts
from unionfs.option_words import size_in_bytes
from unionfs.options import MountOptions
from unionfs.session import is_readonly
from unionfs.space import Mark, Watch
from unionfs.stores import squash
from unionfs.work import AREA_NAME, UNCHECKED, Work, lock_shared

if TYPE_CHECKING:
    from unionfs.passphrase import Ask
    from unionfs.recovery import Recovery
    from unionfs.stores.opening import Stores
    from unionfs.stores.userspace import Helper

log = logging.getLogger("unionfs")

_LOW_WATER = "5%"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What only the daemon can answer."""

    was_live: Callable[[], bool]  # at the end: whether the union has been used
    passphrase: "Ask"


@dataclass(slots=True)
class Opened:
    """What was opened; closed by the stack that open_layers() was given."""

    options: MountOptions
    point: str  # the mount point, free of symlinks
    lowers: list[Layer]
    upper: Layer | None
    work: Work | None
    facts: dict[str, object] = field(default_factory=dict)
    helpers: "list[Helper]" = field(default_factory=list)
    store_root: int = -1  # of the upper's own file system
    watch: Watch | None = None
    recovery: "Recovery | None" = None
    warning: str = ""  # for whoever mounts


def open_layers(options: MountOptions, stack: contextlib.ExitStack, asked: Asked) -> Opened:
    """Check and open everything.

    What is wrong with the upper does not stop a union that has another fallback than to fail.
    """
    named = {"lowers": list(options.lowers), "upper": options.upper}
    try:
        opened = _attempt(options, stack, asked)
    except UnionfsError as exc:
        if options.fallback == "fail" or options.upper is None or exc.code == ExitCode.INTERRUPT:
            raise
        opened = _degraded(options, stack, asked, exc)
    if options.degraded is not None:
        _tell_fallback(opened, "tmpfs", UnionfsError(options.degraded))
    opened.facts["asked"] = named
    return opened


def _attempt(options: MountOptions, stack: contextlib.ExitStack, asked: Asked) -> Opened:
    """Everything as the options say, or nothing."""
    with contextlib.ExitStack() as mine:
        try:
            opened = _open_all(options, mine, asked)
        except Mismatch as exc:
            if options.on_mismatch != "ro" or is_readonly(options):
                raise
            mine.close()
            opened = _open_all(dataclasses.replace(options, readonly=True), mine, asked)
            opened.facts["degraded"] = {"on-mismatch": "ro", "reason": exc.line()}
            what = "shows what its store has, but read-only"
            opened.warning = f"{opened.point} {what}: {exc.line()}"
        stack.enter_context(mine.pop_all())
        return opened


def _degraded(
    options: MountOptions,
    stack: contextlib.ExitStack,
    asked: Asked,
    error: UnionfsError,
) -> Opened:
    """Without the upper.  If it was not the upper that was wrong, the first error stands."""
    in_memory = options.fallback == "tmpfs" and not options.readonly
    other = dataclasses.replace(
        options,
        upper=None,
        work=None,
        readonly=not in_memory,
        ephemeral=in_memory,
        autogrow=None,
        store_flags=None,
        key_file=None,
        credential=None,
    )
    try:
        opened = _attempt(other, stack, asked)
    except UnionfsError:
        raise error from None
    _tell_fallback(opened, options.fallback, error)
    return opened


def _tell_fallback(opened: Opened, mode: str, error: UnionfsError) -> None:
    opened.facts["degraded"] = {"fallback": mode, "reason": error.line()}
    what = {"ro": "read-only", "tmpfs": "its changes are in memory and will be lost"}[mode]
    opened.warning = f"{opened.point} runs without its store, {what}: {error.line()}"


def _open_all(options: MountOptions, stack: contextlib.ExitStack, asked: Asked) -> Opened:
    covered = options.upper is not None and options.ephemeral  # only read, beneath the memory
    if options.upper is not None and covered:
        checks.refuse_cipher_directory(options.upper)
        beneath = (options.upper, *options.lowers)
        options = dataclasses.replace(options, lowers=beneath, upper=None)
    readonly = is_readonly(options)
    mounts = read_mounts()
    stores = _open_stores(options, stack, mounts, asked.passphrase, readonly=readonly)
    _refuse_flags(options, stores)
    if stores is not None:
        options = stores.options
    known = {} if stores is None else stores.opened()
    checks.check_layers(options, mounts, known)
    point = checks.check_mountpoint(options, mounts, known)
    lowers = open_lowers(options.lowers, known, mounts, stack)
    upper = known.get((checks.UPPER, options.upper)) if options.upper is not None else None
    upper = upper or _open_upper(options, mounts, readonly=readonly)
    if upper is not None:
        stack.callback(upper.close)
    checks.mark_careful([*lowers, *([upper] if upper is not None else [])], point, mounts)
    opened = Opened(options, point, lowers, upper, None)
    if stores is not None:
        opened.facts["store"] = stores.facts()
        opened.helpers = stores.helpers
        opened.store_root = stores.own_root
    base = None if stores is None else stores.base
    if base is None and (upper is not None or covered):
        base = _base_seen(options.lowers[-1], mounts)
    if covered:
        _recognize(opened, lowers[0].path, identity_of(lowers[0], options), base)
    if upper is not None and readonly:
        stack.callback(os.close, lock_shared(upper, options))
        _recognize(opened, upper.path, identity_of(upper, options), base)
    elif upper is not None:
        if stores is not None and stores.image is not None:
            upper.image = os.open(stores.image, os.O_PATH | os.O_CLOEXEC)
        work = opened.work = Work.open(upper, options)
        # Not mounted after all: take away what was made.
        stack.callback(lambda: work.close() if asked.was_live() else work.abandon())
        if work.before is not None:
            opened.facts["recovered"] = _recovered(work.before)
            log.info("%s: %s", upper.path, opened.facts["recovered"])
        if not options.ephemeral:
            _remember(opened, work, base)
        opened.watch = _watch(opened, stores)
        opened.recovery = _recovery(opened, work)
    return opened


def _refuse_flags(options: MountOptions, stores: "Stores | None") -> None:
    """Only a file system that we mount can have flags."""
    if options.store_flags is not None and (stores is None or not stores.upper_in_volume):
        hint = "leave store-flags= out, or mount what the upper lies in with them"
        raise usage_error("store-flags= is for an upper in an image or on a device", hint)


def _base_seen(directory: str, mounts: list[MountEntry]) -> Base:
    """The base that is a directory; recognizable if it is the root of a mounted device."""
    where = locator.parse(os.path.abspath(directory))
    if filesystem_at(directory, mounts) is None:
        from unionfs.stores.base import describe

        return describe(where, None)
    from unionfs.stores import mounted_base

    return mounted_base.describe(where, directory, mounts)


def open_lowers(
    paths: Sequence[str],
    known: Mapping[tuple[str, str], Layer],
    mounts: list[MountEntry],
    stack: contextlib.ExitStack,
) -> list[Layer]:
    """The lowers, those in stores (`known`) and plain directories."""
    lowers = []
    for path in paths:
        lower = known.get((checks.LOWER, path)) or layer.open_lower(path, mounts)
        stack.callback(lower.close)
        lower.fs_id = lower.fs_id or squash.fs_id_of(lower.fd)
        lowers.append(lower)
    return lowers


def _recovery(opened: Opened, work: Work) -> "Recovery | None":
    """The check after an unclean end, or of one that was not finished."""
    unclean = work.before is not None or work.read(UNCHECKED) is not None
    if opened.options.ephemeral or opened.upper is None or not unclean:
        return None
    from unionfs.recovery import Recovery

    recovery = Recovery(opened.options, opened.lowers, opened.upper, work)
    opened.facts |= recovery.facts
    return recovery


def _recovered(before: Owner) -> str:
    elsewhere = f" ({before.who()})" if before.elsewhere(holder.here()) else ""
    return f"the daemon before was killed{elsewhere}; what it left was removed"


def identity_of(upper: Layer, options: MountOptions) -> StoreRecord | None:
    """What an upper that is only read says of itself."""
    area = options.work or f"{fd_path(upper.fd)}/{AREA_NAME}"
    try:
        with open(f"{area}/{identity.FILE}", encoding="utf-8", errors="replace") as file:
            return parse_store(file.read(65536), f"{upper.path}/{AREA_NAME}/{identity.FILE}")
    except OSError:
        return None


def _remember(opened: Opened, work: Work, base: Base | None) -> None:
    """Check the upper's record against the base, and write that it is used."""
    text = work.read(identity.FILE)
    record = None if text is None else parse_store(text, f"{work.path}/{identity.FILE}")
    assert opened.upper is not None
    _recognize(opened, opened.upper.path, record, base)
    fresh = identity.new_record(base) if record is None else record.used_now(base)
    try:
        work.write(identity.FILE, fresh.text(), durable=record is None)
    except OSError as exc:
        if exc.errno not in FULL:  # what is full can be mounted, to remove things
            raise
    _show(opened, fresh)


def _recognize(opened: Opened, store: str, record: StoreRecord | None, base: Base | None) -> None:
    """Raise Mismatch for the changes to another base, unless they may be seen all the same."""
    error = identity.mismatch(record, base, store)
    if record is not None:
        _show(opened, record)
    if error is None:
        return
    only_read = is_readonly(opened.options) or opened.options.ephemeral
    if opened.options.on_mismatch == "refuse" or not (
        opened.options.on_mismatch == "ignore" or only_read
    ):
        raise Mismatch(error.message, hint=error.hint)
    opened.facts["mismatch"] = error.message
    log.info("%s, ignoring", error.message)


def _show(opened: Opened, record: StoreRecord) -> None:
    told = opened.facts.get("store")
    opened.facts["store"] = (told if isinstance(told, dict) else {}) | identity.told(record)


class Mismatch(UnionfsError):
    """A store was made over another base."""


def _watch(opened: Opened, stores: "Stores | None") -> Watch | None:
    """What looks after the upper's space: of a store with a file system of its own, or if asked."""
    options, upper = opened.options, opened.upper
    own = stores is not None and stores.upper is not None
    if upper is None or not (own or options.low_water is not None):
        if options.autogrow is not None:
            hint = "leave autogrow= out, or make the upper an image"
            raise usage_error("autogrow= is for an upper in an image", hint)
        return None
    text = options.low_water or _LOW_WATER
    percent = text.endswith("%")
    mark = Mark(float(text[:-1]) if percent else size_in_bytes(text), percent)
    watch = Watch(upper.fd, upper.path, mark)
    if stores is not None and stores.upper_in_volume and opened.work is not None:
        watch.reserve = opened.work.keep_reserve()
    watch.image = upper.image
    if options.autogrow is not None and stores is not None:
        watch.largest = size_in_bytes(options.autogrow)
        watch.image_size, watch.enlarge, watch.promised = stores.growth()
    return watch


def _open_stores(
    options: MountOptions,
    stack: contextlib.ExitStack,
    mounts: Sequence[MountEntry],
    ask: "Ask",
    *,
    readonly: bool,
) -> "Stores | None":
    """The layers that are images, devices or encrypted; None, which costs nothing, without any."""
    named = [*options.lowers, *([options.upper] if options.upper is not None else [])]
    plain = options.upper is None or not checks.may_be_encrypted(options.upper)
    if plain and all(map(locator.is_directory, named)):
        checks.refuse_key(options)
        return None
    from unionfs.stores.opening import Stores

    stores = Stores(options, ask)
    stack.callback(stores.close)
    stores.open(list(mounts), readonly=readonly)
    return stores


def _open_upper(
    options: MountOptions, mounts: Sequence[MountEntry], *, readonly: bool
) -> Layer | None:
    if options.ephemeral and not readonly:
        from unionfs import memory  # slow to load, and seldom needed

        return memory.open_memory(options.ephemeral_size)
    if options.upper is None:
        return None
    return layer.open_upper(options.upper, list(mounts), work=options.work, readonly=readonly)
