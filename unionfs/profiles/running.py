# SPDX-License-Identifier: GPL-2.0-or-later
"""Bringing a profile up and taking it down.

Owns the order, what is undone after an error, and the record of what was mounted:
/run/unionfs/NAME/mounts, written after each mount, under a lock; beside it `directories`, what was
made to mount on.  Each union has a daemon of its
own, which outlives us.  Called by the verbs up and down, by boot and by the supervisor.

A union whose daemon has died is mounted anew by the next `up`, with what is mounted below it.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from unionfs import daemon, notify, runtime, syscalls
from unionfs.errors import ExitCode, UnionfsError, printable
from unionfs.mounts import FSTYPE, MountEntry, covering, read_mounts, topmost
from unionfs.profiles import binding, plan, waiting
from unionfs.profiles.binding import Shown
from unionfs.profiles.plan import Ground, Step, Wish
from unionfs.profiles.profile import Profile
from unionfs.stores import kernel
from unionfs.syscalls import UnmountFlag
from unionfs.unions import ask
from unionfs.unmounting import Busy, busy, unmount

log = logging.getLogger("unionfs")

_RECORD: Final = "mounts"
_DIRECTORIES: Final = "directories"
_LOCK: Final = "lock"


class Covered(UnionfsError):
    """What somebody else has mounted lies over a mount of ours."""


@dataclass(frozen=True, slots=True)
class Made:
    """A mount of ours, as it is found again in the mount table.

    One that is only begun has no device; `before` is then the number of the mount that was seen
    there, so that one that we were killed after is known as ours.
    """

    point: str
    device: str = ""
    fstype: str = ""
    before: int = -1

    def entry(self, mounts: list[MountEntry]) -> MountEntry | None:
        """It, if it is still there, also beneath what somebody else has mounted over it."""
        found = [e for e in mounts if e.point == self.point and e.device == self.device]
        return found[-1] if found else None

    def finished(self) -> "Made | None":
        """With what is seen there now, if that is something new."""
        found = topmost(self.point, read_mounts())
        if found is None or found.number == self.before:
            return None
        return Made(self.point, found.device, found.fstype)


def _begin(point: str) -> Made:
    found = topmost(point, read_mounts())
    return Made(point, before=-1 if found is None else found.number)


@dataclass(slots=True)
class Outcome:
    """What became of a profile."""

    made: list[Made]  # all its mounts, in their order
    warnings: list[str]
    fresh: int = 0  # how many of them were not there before


def directory_of(name: str) -> str:
    """The profile's directory in /run; raises UnionfsError where there is no such place."""
    place = runtime.directory(name)
    if place is None:
        said = os.environ.get("XDG_RUNTIME_DIR")
        what = f"XDG_RUNTIME_DIR={said} is no directory" if said else "XDG_RUNTIME_DIR is not set"
        hint = "log in by a session, or set it to a directory of yours in memory"
        raise UnionfsError(what, hint=hint, code=ExitCode.SYSTEM)
    return place


def up(
    profile: Profile, root: str = "/", wish: Wish | None = None, *, shown: Shown | None = None
) -> Outcome:
    """Mount all that is not mounted yet.  After an error all is as it was before.

    `shown`: how far what takes long is, to somebody who waits for it.
    """
    directory = directory_of(profile.name)
    with _locked(directory):
        os.makedirs(f"{directory}/{plan.EMPTY}", 0o755, exist_ok=True)
        record = _Record(directory)
        _heal(record)
        _refuse_covered(record)
        had, had_directories = list(record.made), list(record.directories)
        outcome = Outcome([], [])
        try:
            _mount_all(profile, root, wish or Wish(), record, outcome, shown)
        except BaseException:
            _undo(record, had)
            record.remove_directories(had_directories)
            if not record.made:
                _sweep(directory)
            raise
        outcome.made = list(record.made)
        outcome.fresh = len(record.made) - len(had)
        _tell(profile, outcome)
        return outcome


def _mount_all(
    profile: Profile,
    root: str,
    wish: Wish,
    record: "_Record",
    outcome: Outcome,
    shown: Shown | None,
) -> None:
    ground = Ground(
        root=os.path.realpath(root),
        directory=directory_of(profile.name),
        may_mount=kernel.may_mount(),
        standing=frozenset(made.point for made in record.made),
        wish=wish,
    )
    waiting.wait(profile, plan.missing(profile, ground), wish)
    wanted = plan.steps(profile, ground, lambda error: _go_on(profile, outcome, error))
    if sum(step.action == "union" for step in wanted) > 1:
        daemon.preload()
    for step in wanted:
        _do(profile, step, record, outcome, shown)


def _undo(record: "_Record", had: Sequence[Made]) -> None:
    """Take down what was not there before."""
    record.finish()
    for made in reversed([made for made in record.made if made not in had]):
        with contextlib.suppress(UnionfsError, OSError):
            _take_down(made, lazy=True)
        record.remove(made)


def down(name: str, *, lazy: bool = False) -> int:
    """Unmount all that `up` mounted, the last first; how many there were.

    Raises UnionfsError at the first that is busy; those above it stay.
    """
    place = directory_of(name)
    if not os.path.isdir(place):
        return 0
    refuse_root(name)
    with _locked(place):
        record = _Record(place)
        record.finish()
        count = 0
        for made in reversed(list(record.made)):
            try:
                count += _take_down(made, lazy=lazy)
            except Busy as exc:
                hint = f"end what uses it, or use unionfs down --lazy {name}"
                raise UnionfsError(exc.message, hint=hint) from None
            record.remove(made)
        record.remove_directories()
        _sweep(place)
        return count


def refuse_root(name: str) -> None:
    """Raises UnionfsError for a profile that the system runs from."""
    if any(made.point == "/" for made in standing(name)):
        hint = "it ends with the system"
        raise UnionfsError(f"profile {name} is what the system runs from", hint=hint)


def hand_over(name: str, root: str) -> None:
    """The system below `root` is being started: what is mounted there will be found below /."""
    top = os.path.realpath(root).rstrip("/")
    place = directory_of(name)
    with _locked(place):
        record = _Record(place)
        for made in list(record.made):
            point = _seen_from(top, made.point)
            if point != made.point:
                record.remove(made)
                record.add(dataclasses.replace(made, point=point))
        record.keep_directories([_seen_from(top, path) for path in record.directories])


def _seen_from(top: str, path: str) -> str:
    """A path as it is once `top` is the root, if it lies there."""
    return path.removeprefix(top) or "/" if f"{path}/".startswith(f"{top}/") else path


def standing(name: str) -> list[Made]:
    """What `up` has mounted and is still there."""
    mounts = read_mounts()
    found = [made if made.device else made.finished() for made in _Record(directory_of(name)).made]
    return [made for made in found if made is not None and made.entry(mounts) is not None]


def _do(
    profile: Profile, step: Step, record: "_Record", outcome: Outcome, shown: Shown | None
) -> None:
    if record.at(step.point) is not None and step.action != "links":
        return
    begun = _begin(step.point)
    try:
        _refuse_links(step)
        _look_beneath(step, record)
        _make_point(step, record)
        if step.action != "links":
            record.add(begun)
        _mount(step, profile, outcome, shown)
    except (UnionfsError, OSError) as exc:
        record.remove(begun)
        _go_on(profile, outcome, _error(step, exc))
        return
    if step.action != "links":
        made = begun.finished()
        if made is None:
            raise UnionfsError(f"{step.point} was mounted, and is not in the mount table")
        record.replace(begun, made)


def _go_on(profile: Profile, outcome: Outcome, error: UnionfsError) -> None:
    """Without what this error is about, if the profile allows that."""
    if not profile.nofail or error.code == ExitCode.INTERRUPT:
        raise error
    outcome.warnings.append(error.line())


def _error(step: Step, exc: UnionfsError | OSError) -> UnionfsError:
    if isinstance(exc, UnionfsError):
        return UnionfsError(f"{step.path}: {exc.message}", hint=exc.hint, code=exc.code)
    reason = os.strerror(exc.errno or errno.EIO)
    what = f"{exc.filename}: " if isinstance(exc.filename, str) else ""
    return UnionfsError(f"{step.path}: {what}{reason}")


def _refuse_links(step: Step) -> None:
    """mount(2) would follow one, out of the system that is mounted, or to where nobody looks."""
    seen = os.path.realpath(step.point)
    if seen != step.point:
        hint = "name what it points to, or remove the link"
        raise UnionfsError(f"{step.point} leads to {seen} by a symbolic link", hint=hint)


def _look_beneath(step: Step, record: "_Record") -> None:
    """What is mounted beneath a mount point is not seen any more."""
    beneath = [e for e in read_mounts() if e.point.startswith(f"{step.point.rstrip('/')}/")]
    if not beneath or step.action == "links":
        return
    if own := next((e for e in beneath if record.at(e.point) is not None), None):
        what = f"{step.point} is new above {own.point}, which is mounted"
        raise UnionfsError(what, hint="take the profile down first")
    log.warning(
        "%s: what is mounted on %s is not seen any more", step.path, printable(beneath[0].point)
    )


def _make_point(step: Step, record: "_Record") -> None:
    """What is not there is made, in the union above; what cannot be changed has to have it.

    What lies in none of our mounts is noted before, to be removed by `down`.
    """
    if os.path.lexists(step.point):
        return
    if not any(f"{step.point}/".startswith(f"{made.point}/") for made in record.made):
        record.keep_directories([*record.directories, *_missing(step.point)])
    try:
        if os.path.isfile(step.source):
            os.makedirs(os.path.dirname(step.point), 0o755, exist_ok=True)
            os.close(os.open(step.point, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        else:
            os.makedirs(step.point, 0o755)
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO)
        hint = "make it in the base" if exc.errno == errno.EROFS else None
        raise UnionfsError(f"{step.point} cannot be made: {reason}", hint=hint) from exc


def _missing(path: str) -> list[str]:
    """The directories that are not there on the way to a path, the upper-most first."""
    found: list[str] = []
    while not os.path.lexists(path):
        found.insert(0, path)
        path = os.path.dirname(path)
    return found


def _mount(step: Step, profile: Profile, outcome: Outcome, shown: Shown | None) -> None:
    match step.action:
        case "union":
            assert step.options is not None
            options = dataclasses.replace(step.options, waited=True)
            daemon.run(options, warn=lambda text: outcome.warnings.append(printable(text)))
        case "memory":
            name = f"{profile.name}:{runtime.name_of(step.path)}"
            binding.memory(step.point, name, step.size, step.like)
        case "bind" | "view":
            binding.bind(
                step.source,
                step.point,
                readonly=step.readonly,
                like=step.like,
                flags=step.flags,
                shown=shown,
            )
        case "links":
            binding.links(step.source, step.point)


def _take_down(made: Made, *, lazy: bool) -> bool:
    """Whether it was there."""
    mounts = read_mounts()
    entry = made.entry(mounts)
    if entry is None:
        return False
    _refuse_if_covered(entry, mounts)
    if made.fstype == FSTYPE:
        unmount(made.point, lazy=lazy, force=False)
        return True
    flags = UnmountFlag.NOFOLLOW | (UnmountFlag.DETACH if lazy else UnmountFlag(0))
    try:
        syscalls.umount(made.point, flags)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise busy(made.point) from None
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"{made.point} cannot be unmounted: {reason}") from exc
    return True


def _refuse_covered(record: "_Record") -> None:
    mounts = read_mounts()
    for made in record.made:
        if (entry := made.entry(mounts)) is not None:
            _refuse_if_covered(entry, mounts)


def _refuse_if_covered(entry: MountEntry, mounts: list[MountEntry]) -> None:
    """By its path somebody else's mount would be unmounted."""
    if (other := covering(entry, mounts)) is not None:
        what = f"{entry.point} is covered by a mount of {other.fstype} on {other.point}"
        raise Covered(f"{what} ({other.source})", hint="unmount that first")


def _heal(record: "_Record") -> None:
    """Forget what is gone, and take dead unions away, with what is mounted below them."""
    mounts = read_mounts()
    record.finish()
    for made in list(record.made):
        if made.entry(mounts) is None:
            record.remove(made)
    dead = [made for made in record.made if _is_dead(made, mounts)]
    for made in reversed(list(record.made)):
        if any(f"{made.point}/".startswith(f"{other.point}/") for other in dead):
            _take_down(made, lazy=True)
            record.remove(made)


def _is_dead(made: Made, mounts: list[MountEntry]) -> bool:
    entry = made.entry(mounts)
    return entry is not None and made.fstype == FSTYPE and ask(entry, mounts).state == "dead"


def _tell(profile: Profile, outcome: Outcome) -> None:
    """In one place, which of its unions run without their store, and what is missing."""
    place = directory_of(profile.name)
    lines = list(outcome.warnings)
    for rule in profile.rules:
        union = runtime.directory(f"{profile.name}:{runtime.name_of(rule.path)}")
        with contextlib.suppress(OSError), open(f"{union}/degraded", encoding="utf-8") as file:
            lines += file.read().splitlines()
    outcome.warnings = lines = list(dict.fromkeys(lines))  # those of fresh unions stand in both
    if lines:
        runtime.tell_degraded(profile.name, "; ".join(lines))
    else:
        with contextlib.suppress(OSError):
            os.unlink(f"{place}/degraded")
    notify.has_store(profile.name, degraded=bool(lines))


def _sweep(place: str) -> None:
    """Take away the directory in /run, as far as nothing is mounted in it any more."""
    for folder, _folders, files in os.walk(place, topdown=False):
        if folder != place:
            with contextlib.suppress(OSError):
                for name in files:  # where a file was seen
                    os.unlink(f"{folder}/{name}")
                os.rmdir(folder)
    for name in (_RECORD, _DIRECTORIES, "degraded", _LOCK):
        with contextlib.suppress(OSError):
            os.unlink(f"{place}/{name}")
    with contextlib.suppress(OSError):
        os.rmdir(place)


@contextlib.contextmanager
def _locked(place: str) -> Iterator[None]:
    """One at a time: who comes second waits, and then finds what the first has done."""
    while True:
        os.makedirs(place, 0o755, exist_ok=True)
        fd = os.open(f"{place}/{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(fd), os.stat(f"{place}/{_LOCK}")):
                break
        os.close(fd)  # `down` has taken it away meanwhile
    try:
        yield
    finally:
        os.close(fd)


class _Record:
    """What is mounted, in its order, in a file that is replaced whole."""

    def __init__(self, directory: str) -> None:
        self._path = f"{directory}/{_RECORD}"
        self._path_of_directories = f"{directory}/{_DIRECTORIES}"
        self.made: list[Made] = []
        self.directories: list[str] = []
        with contextlib.suppress(OSError, ValueError, TypeError), open(self._path) as file:
            self.made = [Made(**item) for item in json.load(file)]
        with contextlib.suppress(OSError, ValueError), open(self._path_of_directories) as file:
            self.directories = json.load(file)

    def at(self, point: str) -> Made | None:
        return next((made for made in self.made if made.point == point), None)

    def add(self, made: Made) -> None:
        self.made.append(made)
        self._write()

    def remove(self, made: Made) -> None:
        if made in self.made:
            self.made.remove(made)
            self._write()

    def replace(self, begun: Made, made: Made) -> None:
        self.made[self.made.index(begun)] = made
        self._write()

    def finish(self) -> None:
        """What was being mounted by one who was killed."""
        for begun in [made for made in self.made if not made.device]:
            made = begun.finished()
            if made is None:
                self.remove(begun)
            else:
                self.replace(begun, made)

    def keep_directories(self, directories: list[str]) -> None:
        """Those that were made, or are going to be: what lies above others first."""
        if directories != self.directories:
            self.directories = directories
            _write_whole(self._path_of_directories, directories)

    def remove_directories(self, but: Sequence[str] = ()) -> None:
        """Those that were made, as far as they are empty."""
        for path in reversed([path for path in self.directories if path not in but]):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        self.keep_directories(list(but))

    def _write(self) -> None:
        _write_whole(self._path, [dataclasses.asdict(made) for made in self.made])


def _write_whole(path: str, what: object) -> None:
    with open(f"{path}.new", "w") as file:
        json.dump(what, file)
    os.rename(f"{path}.new", path)
