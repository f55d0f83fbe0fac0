# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 of the daemon before every single step of every kind of change.

Each case runs once to its end, which tells its steps and the tree that it makes; then once for each
step, killed there. After `umount` and a new mount the tree must be the old one or the new one in
everything a program can compare, nothing may be left in the work directory, and the same change
must then go through. The modification times of directories are not compared where they are fresh:
a copy-up puts them back after its commit, as kernel overlayfs does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.rig import ground, snapshot, syscalls
from tests.rig.crashing import Stepping
from tests.rig.mounted import Unionfs
from tests.rig.traced import Traced, why_not

LARGE = 100_000  # more than union.METACOPY_BYTES: metadata-only copies
TRIES = 5
PAST = 1_600_000_000_000_000_000


def _nothing(_mnt: Path) -> None:
    pass


def _all(*actions: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(mnt: Path) -> None:
        for action in actions:
            action(mnt)

    return change


@dataclass(frozen=True)
class Case:
    """`prepare` and `change` act on the mount; `change` is what gets killed."""

    change: Callable[[Path], object]
    prepare: Callable[[Path], object] = _nothing
    options: list[str] = field(default_factory=list)
    written: tuple[bytes, ...] = ()  # modification times that need not be old: being written


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"appended")


def _rename(flags: int, old: str, new: str) -> Callable[[Path], None]:
    def change(mnt: Path) -> None:
        syscalls.renameat2(os.fsencode(mnt / old), os.fsencode(mnt / new), flags)

    return change


def _emptied_directory(mnt: Path) -> None:
    """A merged directory that shows nothing: it is full of whiteouts."""
    for path in (mnt / "full").iterdir():
        path.unlink()


def _create(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640))


def _as_user(action: Callable[[Path], object]) -> Callable[[Path], None]:
    """By another user: what is made cannot be made in place, but in the work directory."""

    def change(mnt: Path) -> None:
        with syscalls.identity(1000, 1000):
            action(mnt)

    return change


CASES: dict[str, Case] = {
    "full copy-up": Case(lambda m: os.close(os.open(m / "large", os.O_WRONLY))),
    "full copy-up in a lower directory": Case(
        lambda m: os.close(os.open(m / "deep/er/file", os.O_WRONLY))
    ),
    "metadata-only copy-up, chmod": Case(lambda m: os.chmod(m / "large", 0o4711)),
    "chown": Case(lambda m: os.chown(m / "large", 1, 2)),
    "utimes": Case(lambda m: os.utime(m / "small", ns=(PAST + 5, PAST + 7))),
    "setxattr": Case(lambda m: os.setxattr(m / "large", "user.new", b"value")),
    "removexattr": Case(lambda m: os.removexattr(m / "small", "user.old")),
    "chmod of a directory": Case(lambda m: os.chmod(m / "deep/er", 0o1770)),
    "chown of a symlink": Case(lambda m: os.lchown(m / "link", 3, 4)),
    "completion of the data": Case(
        lambda m: os.close(os.open(m / "large", os.O_WRONLY)),
        lambda m: os.chmod(m / "large", 0o600),
    ),
    "completion of the data of a hard link": Case(
        lambda m: os.close(os.open(m / "linked1", os.O_WRONLY)),
        lambda m: os.chmod(m / "linked1", 0o600),
        written=(b"linked1", b"linked2"),
    ),
    "truncation of a lower file": Case(lambda m: os.truncate(m / "large", 70_000)),
    "truncation of a lower file to nothing": Case(lambda m: os.truncate(m / "large", 0)),
    "enlargement of a lower file": Case(lambda m: os.truncate(m / "large", 2 * LARGE)),
    "truncation of a metadata-only copy": Case(
        lambda m: os.truncate(m / "large", 70_000), lambda m: os.chmod(m / "large", 0o600)
    ),
    "enlargement of a metadata-only copy": Case(
        lambda m: os.truncate(m / "large", 2 * LARGE),
        lambda m: os.chmod(m / "large", 0o600),
    ),
    "hard link copied up": Case(lambda m: os.chmod(m / "linked1", 0o600)),
    "second name of a hard link copied up": Case(
        lambda m: os.rename(m / "linked2", m / "elsewhere"),
        lambda m: os.chmod(m / "linked1", 0o600),
    ),
    "link to a lower file": Case(lambda m: os.link(m / "large", m / "deep/another")),
    "link over a whiteout": Case(
        lambda m: os.link(m / "large", m / "small"), lambda m: os.unlink(m / "small")
    ),
    "link to an indexed file": Case(
        lambda m: os.link(m / "linked1", m / "linked3"), lambda m: os.chmod(m / "linked1", 0o600)
    ),
    "create": Case(lambda m: _create(m / "deep/new")),
    "create over a whiteout": Case(
        lambda m: _create(m / "small"), lambda m: os.unlink(m / "small")
    ),
    "create by a user over a whiteout": Case(
        _as_user(lambda m: _create(m / "open/file")), lambda m: os.unlink(m / "open/file")
    ),
    "mkdir by a user": Case(_as_user(lambda m: os.mkdir(m / "open/new"))),
    "mkdir over a whiteout": Case(
        lambda m: os.mkdir(m / "full"),
        _all(_emptied_directory, lambda m: os.rmdir(m / "full")),
    ),
    "symlink over a whiteout": Case(
        lambda m: os.symlink("target", m / "small"), lambda m: os.unlink(m / "small")
    ),
    "mkfifo over a whiteout": Case(
        lambda m: os.mkfifo(m / "small", 0o611), lambda m: os.unlink(m / "small")
    ),
    "unlink of a lower file": Case(lambda m: os.unlink(m / "deep/er/file")),
    "unlink of a copied-up file": Case(
        lambda m: os.unlink(m / "large"), lambda m: _append(m / "large")
    ),
    "unlink of a new file": Case(lambda m: os.unlink(m / "new"), lambda m: _create(m / "new")),
    "unlink of a lower hard link": Case(lambda m: os.unlink(m / "linked2")),
    "unlink of a copied-up hard link": Case(
        lambda m: os.unlink(m / "linked2"), lambda m: os.chmod(m / "linked1", 0o600)
    ),
    "unlink of the last hard link": Case(
        lambda m: os.unlink(m / "linked1"), lambda m: os.unlink(m / "linked2")
    ),
    "rmdir of a lower directory": Case(lambda m: os.rmdir(m / "empty")),
    "rmdir of a directory of whiteouts": Case(lambda m: os.rmdir(m / "full"), _emptied_directory),
    "rmdir of a new directory of whiteouts": Case(
        lambda m: os.rmdir(m / "moved"),
        _all(_emptied_directory, _rename(0, "full", "moved")),
    ),
    "rename of a lower file": Case(_rename(0, "large", "moved")),
    "rename over a lower file": Case(_rename(0, "large", "small")),
    "rename over a hard link": Case(_rename(0, "large", "linked2")),
    "rename over a whiteout": Case(_rename(0, "large", "small"), lambda m: os.unlink(m / "small")),
    "rename of a new file": Case(_rename(0, "new", "moved"), lambda m: _create(m / "new")),
    "rename of a metadata-only copy": Case(
        _rename(0, "large", "deep/moved"), lambda m: os.chmod(m / "large", 0o600)
    ),
    "rename of a lower directory": Case(_rename(0, "deep", "moved")),
    "rename of a renamed directory": Case(
        _rename(0, "once/er", "twice"), _rename(0, "deep", "once")
    ),
    "rename of a directory over a whiteout": Case(
        _rename(0, "deep", "small"), lambda m: os.unlink(m / "small")
    ),
    "rename of a new directory over a whiteout": Case(
        _rename(0, "new", "small"),
        _all(lambda m: os.mkdir(m / "new"), lambda m: os.unlink(m / "small")),
    ),
    "rename over an empty lower directory": Case(_rename(0, "deep", "empty")),
    "rename over a directory of whiteouts": Case(_rename(0, "deep", "full"), _emptied_directory),
    "exchange of files": Case(_rename(syscalls.RENAME_EXCHANGE, "large", "deep/er/file")),
    "exchange of directories": Case(_rename(syscalls.RENAME_EXCHANGE, "deep/er", "full")),
    "exchange of a file and a directory": Case(_rename(syscalls.RENAME_EXCHANGE, "large", "full")),
}
WH = [
    "create over a whiteout",
    "mkdir over a whiteout",
    "link over a whiteout",
    "unlink of a lower file",
    "unlink of a copied-up file",
    "rmdir of a lower directory",
    "rmdir of a directory of whiteouts",
    "rename of a lower file",
    "rename over a lower file",
    "rename over a whiteout",
    "rename over a directory of whiteouts",
]


def fill(lower: Path) -> None:
    """The lower of all cases."""
    for name in ("deep/er", "empty", "full", "open"):
        (lower / name).mkdir(parents=True)
    (lower / "open").chmod(0o777)
    (lower / "large").write_bytes(bytes(range(250)) * (LARGE // 250))
    (lower / "small").write_bytes(b"small")
    (lower / "deep/er/file").write_bytes(b"deep" * 1000)
    (lower / "open/file").write_bytes(b"open")
    for i in range(3):
        (lower / f"full/{i}").write_bytes(b"%d" % i)
    (lower / "linked1").write_bytes(b"linked" * 20_000)
    os.link(lower / "linked1", lower / "linked2")
    os.symlink("small", lower / "link")
    os.setxattr(lower / "full", "user.kept", b"of the directory")
    os.setxattr(lower / "small", "user.old", b"value")
    os.chmod(lower / "full", 0o751)
    for path in sorted(lower.rglob("*"), reverse=True):
        os.utime(path, ns=(PAST, PAST), follow_symlinks=False)


class Rig:
    """Layers for the many runs of one case: the lower is one, each run has an upper of its own."""

    def __init__(self, place: Path, case: Case, kind: type[Stepping] = Stepping) -> None:
        self.kind = kind
        self.place = place
        self.case = case
        self.lower = place / "lower"
        self.lower.mkdir()
        fill(self.lower)
        self.runs = 0

    def prepared(self, stop_at: int, error: int = 0, kind: str = "") -> Stepping:
        """A mounted union, prepared and remounted, so that nothing is known from before."""
        self.runs += 1
        here = self.place / f"{kind}{self.runs}"
        (here / "mnt").mkdir(parents=True)
        (here / "upper").mkdir()
        union = self.kind([self.lower], here / "upper", here / "mnt", options=self.case.options)
        if self.case.prepare is _nothing:
            union.stop_at, union.error = stop_at, error
            union.mount()
            return union
        union.mount()
        try:
            self.case.prepare(union.mnt)
            _settle_times(union.mnt)
        except BaseException:
            union.abandon()
            raise
        union.stop_at, union.error = stop_at, error
        union.remount()
        return union


def _settle_times(mnt: Path) -> None:
    """What the preparation made gets old times, so that each run's tree is the same."""
    start = time.time_ns() - 3600 * 10**9
    for path in [*sorted(mnt.rglob("*"), reverse=True), mnt]:
        if os.lstat(path).st_mtime_ns > start:
            os.utime(path, ns=(PAST, PAST), follow_symlinks=False)


def compare(
    got: snapshot.Tree, want: snapshot.Tree, fresh: int, written: Sequence[bytes] = ()
) -> list[str]:
    """Differences; fresh modification times of directories and of `written` do not count."""
    kept = {}
    for name, entry in got.items():
        free = stat.S_ISDIR(entry.kind) or name in written
        if free and entry.mtime >= fresh and name in want:
            entry = entry._replace(mtime=want[name].mtime)
        kept[name] = entry
    return snapshot.differences(kept, want, fresh=fresh, slack=3600 * 10**9)


def left_overs(upper: Path) -> list[str]:
    return [name for name in os.listdir(upper / ".unionfs/work") if name != "incompat"]


def steps_of(rig: Rig, fresh: int) -> tuple[snapshot.Tree, snapshot.Tree, list[str]]:
    """The tree before, the tree after, and the steps in between."""
    union = rig.prepared(0, kind="whole")
    before = snapshot.take(union.mnt)
    union.remount()  # as in the other runs: it knows of nothing yet
    union.arm()
    try:
        rig.case.change(union.mnt)
        steps = union.disarm()
    except BaseException:
        union.abandon()
        raise
    union.remount()
    after = snapshot.take(union.mnt)
    union.umount()
    assert steps, "the change has no steps: the rig does not see it"
    return before, after, steps


def stopped(rig: Rig, at: int, steps: list[str]) -> Stepping:
    """A union that was killed before that step of the change."""
    for _ in range(TRIES):
        union = rig.prepared(at)
        if isinstance(union, Traced):
            union.steps = tuple(steps)
        union.arm()
        with contextlib.suppress(OSError):
            rig.case.change(union.mnt)
        done = union.disarm()
        if done == steps[:at]:
            return union
        union.abandon()
        if not (isinstance(union, Traced) and union.spread):
            break
    raise AssertionError(f"the same change went another way: {done}, not {steps[:at]}")


def run_case(place: Path, case: Case, kind: type[Stepping] = Stepping) -> None:
    fresh = time.time_ns() - 10**7
    rig = Rig(place, case, kind)
    lower = snapshot.take(rig.lower)
    before, after, steps = steps_of(rig, fresh)
    wrong: list[str] = []
    for at in range(1, len(steps) + 1):
        union = stopped(rig, at, steps)
        union.bury()
        union.stop_at = 0
        union.mount()
        where = f"killed before step {at} of {len(steps)} ({steps[at - 1]})"
        wrong += [f"{where}: {line}" for line in _judge(union, case, before, after, fresh)]
        union.umount()
        ground.run("rm", "-rf", union.mnt.parent)
    snapshot.assert_same(snapshot.take(rig.lower), lower, "the lower")
    assert not wrong, "\n".join(["; ".join(steps), *wrong])


def _judge(
    union: Unionfs, case: Case, before: snapshot.Tree, after: snapshot.Tree, fresh: int
) -> list[str]:
    """What is wrong with a union mounted after the kill."""
    assert union.upper is not None
    got = snapshot.take(union.mnt)
    old, new = (compare(got, want, fresh, case.written) for want in (before, after))
    wrong = [f"left over: {name}" for name in left_overs(union.upper)]
    if old and new:
        return [*wrong, "neither old", *old[:6], "nor new", *new[:6]]
    if not old:
        try:
            case.change(union.mnt)
        except OSError as error:
            return [*wrong, f"the change does not go through afterwards: {error}"]
        union.remount()
        late = compare(snapshot.take(union.mnt), after, fresh, case.written)
        wrong += [f"done afterwards: {line}" for line in late[:6]]
    return wrong


@pytest.mark.root
@pytest.mark.parametrize("name", CASES)
def test_killed_at_each_step(place: Path, name: str) -> None:
    run_case(place, CASES[name])


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("name", WH)
def test_killed_at_each_step_with_wh_marks(place: Path, name: str) -> None:
    case = CASES[name]
    run_case(place, replace(case, options=["whiteout=wh"]))


# What C makes alone (cext/plain.h).
PLAIN = [
    "full copy-up in a lower directory",
    "metadata-only copy-up, chmod",
    "create",
    "unlink of a lower file",
    "unlink of a copied-up file",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "utimes",
            "rename of a lower file",
            "rename over a lower file",
            "rename over a whiteout",
        )
    ),
]


@pytest.mark.root
@pytest.mark.parametrize("name", PLAIN)
def test_killed_at_each_system_call(place: Path, name: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    run_case(place, CASES[name], Traced)


# ---- at any moment, under load ----

WRITER = """
import os, random, sys
top, seed, acknowledged = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
directory = os.open(top, os.O_RDONLY)
for number in range(10**9):
    name = f"{seed}-{random.randrange(20)}"
    content = f"{seed} {number} ".encode() * random.choice([1, 100, 20_000])
    # The old content stays until the new one is synced: what editors and package managers do.
    fd = os.open(f"{top}/.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    os.write(fd, content)
    os.fsync(fd)
    os.close(fd)
    os.write(acknowledged, f"begin {name} {number} {len(content)}\\n".encode())
    os.rename(f"{top}/.{name}", f"{top}/{name}")
    os.fsync(directory)
    os.write(acknowledged, f"done {name} {number} {len(content)}\\n".encode())
"""


@pytest.mark.root
@pytest.mark.parametrize("seed", range(3))
def test_killed_under_load(place: Path, seed: int) -> None:
    """What had been acknowledged after fsync is there, whole, after the daemon was killed."""
    lower = place / "lower"
    (lower / "dir").mkdir(parents=True)
    for writer in range(3):
        for number in range(20):
            (lower / f"dir/{writer}-{number}").write_bytes(b"lower")
    mnt = place / "mnt"
    for name in ("mnt", "upper"):
        (place / name).mkdir()
    union = Stepping([lower], place / "upper", mnt)
    for round_ in range(3):
        union.mount()
        state = {
            path.name: path.read_bytes()
            for path in (mnt / "dir").iterdir()
            if not path.name.startswith(".")
        }
        reading, writing = os.pipe()
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(mnt / "dir"), str(number), str(writing)],
                pass_fds=[writing],
                stderr=subprocess.DEVNULL,
            )
            for number in range(3)
        ]
        os.close(writing)
        text = b""
        # The moment is chosen by what has been acknowledged, not by a clock.
        while text.count(b"done") < 20 + 13 * (seed + round_):
            text += os.read(reading, 65536)
        os.kill(union.pid, signal.SIGKILL)
        while more := os.read(reading, 65536):
            text += more
        os.close(reading)
        for process in writers:
            process.wait()
        union.bury()
        union.mount()
        _check_load(mnt / "dir", state, text.decode())
        assert union.upper is not None
        assert not left_overs(union.upper)
        union.umount()


def _check_load(top: Path, state: dict[str, bytes], text: str) -> None:
    begun: dict[str, bytes] = {}
    for line in text.splitlines():
        word, name, number, size = line.split(" ")
        piece = f"{name.split('-')[0]} {number} ".encode()
        content = piece * (int(size) // len(piece))
        if word == "done":
            state[name] = content
            begun.pop(name, None)
        else:
            begun[name] = content
    for name, content in state.items():
        got = (top / name).read_bytes()
        assert got in (content, begun.get(name, content)), f"{name} is neither old nor new"
    shown = {path.name for path in top.iterdir()}
    assert {name for name in shown if not name.startswith(".")} == set(state)


@pytest.mark.root
def test_rig_sees_every_change_of_the_upper(place: Path) -> None:
    """A control: what the kernel sees the daemon change, the counted steps contain."""
    rig = Rig(place, Case(lambda m: os.chmod(m / "large", 0o600)))
    union = rig.prepared(0)
    union.arm()
    rig.case.change(union.mnt)
    steps = union.disarm()
    union.umount()
    assert {"open", "renameat2", "xattr.setxattr", "tree.make_impure"} <= set(steps)
