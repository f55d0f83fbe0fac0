# SPDX-License-Identifier: GPL-2.0-or-later
"""Verbs of `unionfs store`, interrupted or killed at each step: nothing is lost or left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rig import ground, images, snapshot, traced
from tests.rig.mounted import program
from tests.rig.waiting import wait_until
from tests.test_store_changes import hidden
from tests.test_store_commands import done, facts, shim, store
from tests.test_stores import ARCH, base, change, check, need, union
from unionfs.stores.tools import delayed, interruptible, uninterrupted

__all__ = ["base", "shim"]

_SLOW = pytest.mark.slow


@pytest.fixture
def changed(base: Path) -> Path:
    """base/up and base/s.img have changes, base/saved is a backup of the first."""
    need("ext4")
    (base / "up").mkdir()
    images.make(base / "s.img", megabytes=32)
    for upper in ("up", "s.img"):
        with union(base, base / "tree", base / upper):
            change(base / "mnt")
    done("backup", base / "up", base / "saved")
    return base


def interrupted(folder: Path, number: signal.Signals, *words: object) -> None:
    """Run a verb and send it a signal when the program in `folder` has been reached."""
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [*program(), "store", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Of a shell's background job SIGINT is ignored, under nohup SIGHUP, and then by us too.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    wait_until((folder / "reached").exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (8, "", "unionfs: interrupted\n")
    helper = int((folder / "reached").read_text())
    wait_until(lambda: not Path(f"/proc/{helper}").exists())


@pytest.mark.parametrize(
    ("number", "at", "words"),
    [
        (signal.SIGTERM, "mkfs.ext4", "create new.img --size 16M"),
        (signal.SIGHUP, "zstd", "backup up new"),
        (signal.SIGTERM, "tar", "restore saved s.img"),
        (signal.SIGINT, "tar", "clone up new:/work --size 16M"),
        pytest.param(signal.SIGINT, "mkfs.ext4", "create new.img --size 16M", marks=_SLOW),
        pytest.param(signal.SIGTERM, "tar", "backup s.img new", marks=_SLOW),
        pytest.param(signal.SIGINT, "zstd", "restore saved up", marks=_SLOW),
        pytest.param(signal.SIGTERM, "tar", "clone s.img other", marks=_SLOW),
        (signal.SIGTERM, "resize2fs", "grow s.img --size 64M"),
        (signal.SIGINT, "resize2fs", "shrink s.img --size 16M"),
        (signal.SIGTERM, "e2fsck", "check --repair s.img"),
        pytest.param(
            signal.SIGINT,
            "e2fsck",
            "compact s.img",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="as root the kernel does it"),
        ),
        (signal.SIGINT, "xfs_repair", "check --repair x.img"),
    ],
)
def test_interrupted(
    changed: Path, shim: Callable[[str], Path], number: signal.Signals, at: str, words: str
) -> None:
    (changed / "other").mkdir()
    names = {"new", "new.img", "other", "s.img", "saved", "up", "x.img"}
    if "x.img" in words:
        images.make(changed / "x.img", "xfs")
    arguments = [
        f"{changed}/{word}" if word.partition(":")[0] in names else word for word in words.split()
    ]
    before = snapshot.take(changed / "up"), images.digest(changed / "s.img")
    interrupted(shim(at), number, *arguments)
    assert not (changed / "new").exists()
    assert not (changed / "new.img").exists()
    assert list((changed / "other").iterdir()) == []
    assert hidden(changed) == []
    assert images.loops_of(changed / "s.img") == []
    assert snapshot.take(changed / "up") == before[0]
    if "restore" not in words:  # it was mounted for that
        assert images.digest(changed / "s.img") == before[1]
    with union(changed, changed / "tree", changed / "s.img"):
        check(changed / "mnt")


def test_it_is_too_late_to_interrupt() -> None:
    """While something takes effect, signals come to nothing."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with uninterrupted():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize("words", [["list"], ["info"], ["check", "--no"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_too_late_once_the_exit_code_is_decided(
    tmp_path: Path, words: list[str], number: signal.Signals
) -> None:
    """The signal comes while the interpreter ends."""
    code = store(*words, tmp_path).returncode
    late = f"import atexit, os, sys; atexit.register(os.kill, os.getpid(), {int(number)})"
    run = "from unionfs.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", f"{late}; {run}", "store", *words, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == code


def test_an_interruption_waits_until_a_program_has_been_started() -> None:
    """Before that nobody would end it."""
    reached = []
    with pytest.raises(KeyboardInterrupt), interruptible():  # noqa: PT012
        with delayed():
            os.kill(os.getpid(), signal.SIGTERM)  # not SIGHUP, which nohup(1) has ignored
            reached.append("started")
        reached.append("gone on")
    assert reached == ["started"]


def test_a_restore_that_moved_the_old_one_aside(changed: Path) -> None:
    """As a kill leaves it where two directories cannot be exchanged: the old one is put back."""
    directory = f"persistent_tree/{ARCH}"
    image = changed / "s.img"
    aside = f"persistent_tree/.{ARCH}.0123abcd.restore.old"

    def move() -> None:
        debugfs = ["debugfs", "-w", "-R"]
        # As a rename: debugfs has none.
        ground.run(*debugfs, f"ln {directory} {aside}", image)
        ground.run(*debugfs, f"unlink {directory}", image)

    move()
    with union(changed, changed / "tree", image):
        check(changed / "mnt")
    move()
    done("restore", changed / "saved", f"{image}:/{directory}")
    with union(changed, changed / "tree", image):
        check(changed / "mnt")
    move()
    done("reset", f"{image}:/{directory}")
    with union(changed, changed / "tree", image):
        assert (changed / "mnt/gone").exists()


# Killed at each step

_STEPS = (
    "rename,renameat,renameat2,link,linkat,mkdir,mkdirat,unlink,unlinkat,rmdir,"
    "fsync,syncfs,ftruncate"
)
_NAME = re.compile(r"^(?:[0-9]+ +)?(\w+)\(", re.MULTILINE)


def _traced(words: list[object], options: list[str]) -> bool:
    """Run a verb under strace; whether it came to its end."""
    done = subprocess.run(
        ["strace", "-qq", *options, *program(), "store", *map(str, words)],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return False
    assert done.returncode == 0, done
    return True


def killed_at_each_step(
    place: Path, words: list[object], look: Callable[[bool], None], *, most: int = 1000
) -> dict[str, int]:
    """Run a verb again and again, killed before each of its steps; how many of which it has.

    `most`: so many of one call, from the first to the last; what is removed is many files.
    `look` is told whether it came to its end, and puts back what was before.
    """
    if why := traced.why_not():
        pytest.skip(why)
    trace = place / "trace"
    assert _traced(words, ["-e", f"trace={_STEPS}", "-o", str(trace)])
    look(True)
    counts = Counter(_NAME.findall(trace.read_text()))
    trace.unlink()
    for name, count in counts.items():
        chosen = min(count, most)
        for number in sorted({1 + n * (count - 1) // max(1, chosen - 1) for n in range(chosen)}):
            inject = f"inject={name}:error=EIO:signal=KILL:when={number}"
            look(_traced(words, ["-e", f"trace={name}", "-e", inject, "-o", "/dev/null"]))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("discard", [False, True])
def test_reset_killed_at_each_step(changed: Path, discard: bool) -> None:
    up = changed / "up"

    def look(ended: bool) -> None:
        if not ended and not (up / "file").exists():  # it had taken effect
            assert not (up / "made").exists()
            ended = True
        if ended:
            with union(changed, changed / "tree", up):
                assert (changed / "mnt/file").read_text() == "lower\n"
            done("restore", changed / "saved", up)
        with union(changed, changed / "tree", up):
            check(changed / "mnt")

    words: list[object] = ["reset", up, *(["--discard"] if discard else [])]
    steps = killed_at_each_step(changed, words, look)
    assert steps["renameat2"] == 1, "the moment"
    assert hidden(changed) == [] or store("restore", changed / "saved", up).returncode == 0
    assert hidden(changed) == []


@pytest.mark.slow
def test_reset_of_paths_killed_at_each_step(changed: Path) -> None:
    """Each path is as it was, or taken away and kept."""
    up = changed / "up"

    def look(ended: bool) -> None:
        kept = [p.name for p in up.glob(".unionfs/reset-*/*")]
        taken = {name.partition("-")[2] for name in kept}
        with union(changed, changed / "tree", up):
            mnt = changed / "mnt"
            assert (mnt / "gone").exists() == ("gone" in taken)
            assert ((mnt / "file").read_text() == "lower\n") == ("file" in taken)
            assert (mnt / "made").exists() == ("made" not in taken)
        assert not ended or taken == {"gone", "file", "made"}
        done("restore", changed / "saved", up)

    words: list[object] = ["reset", up, "/gone", "/file", "/made"]
    assert sum(killed_at_each_step(changed, words, look).values()) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("where", ["up", "s.img"])
def test_restore_killed_at_each_step(changed: Path, where: str, keep: bool) -> None:
    """The old or the new is there, the store is found, and with --keep the old one is too."""
    upper = changed / where
    with union(changed, changed / "tree", upper):
        (changed / "mnt/file").write_text("newer\n")
    done("backup", upper, changed / "newer")

    def look(ended: bool) -> None:
        with union(changed, changed / "tree", upper):
            text = (changed / "mnt/file").read_text()
        assert text == "changed\n" or (text == "newer\n" and not ended)
        # Leftovers are in nobody's way, and gone after the next verb, which gives what it finds
        # under no name yet (fuse2fs) that of what is kept.
        done("restore", changed / "newer", upper)
        assert hidden_of(upper) == []
        kept = kept_of(upper)
        assert len(kept) == 1 or not (keep and text == "changed\n")
        for place in kept:
            with union(changed, changed / "tree", place):
                # Killed just before the moment, what is kept is the new one.
                other = "newer\n" if text == "changed\n" else "changed\n"
                assert (changed / "mnt/file").read_text() == other
        if kept:
            done("reset", upper, "--forget")

    words: list[object] = ["restore", changed / "saved", upper, *(["--keep"] if keep else [])]
    steps = killed_at_each_step(changed, words, look, most=3)
    assert steps["renameat2"] == 1, "the moment"
    assert steps["mkdirat"] == 1
    assert steps["renameat"] >= keep
    assert hidden(changed) == []


def kept_of(upper: Path) -> list[str]:
    """The locators of what is kept of a store's one upper."""
    (found,) = facts("info", upper)["uppers"]
    names = [item["directory"] for item in found["kept"]]
    return [str(upper.parent / n[3:]) if upper.is_dir() else f"{upper}:{n}" for n in names]


def hidden_of(upper: Path) -> list[str]:
    """What is beside an upper and not for people to see."""
    if upper.is_dir():
        return hidden(upper.parent)
    shown = ground.run("debugfs", "-R", "ls -p /persistent_tree", upper)
    names = [line.split("/")[5] for line in shown.splitlines() if line.startswith("/")]
    return [name for name in names if name.startswith(".") and name.strip(".")]


@pytest.mark.slow
def test_create_killed_at_each_step(base: Path) -> None:
    image = base / "s.img"

    def look(ended: bool) -> None:
        assert image.exists() or not ended
        if image.exists():
            assert store("check", image).returncode == 0
            assert ended or store("info", image).returncode == 0
            image.unlink()

    steps = killed_at_each_step(base, ["create", image, "--size", "16M"], look)
    assert steps["renameat2"] == 1
    done("create", image, "--size", "16M")
    assert hidden(base) == []


@pytest.mark.slow
def test_backup_killed_at_each_step(changed: Path) -> None:
    new = changed / "new"

    def look(ended: bool) -> None:
        assert new.exists() or not ended
        if new.exists():
            done("restore", "--verify", new)
            new.unlink()

    steps = killed_at_each_step(changed, ["backup", changed / "up", new], look)
    assert steps["renameat2"] == 1
    done("backup", changed / "up", new)
    assert hidden(changed) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_grow_of_a_mounted_store_killed_at_each_step(base: Path, kind: str) -> None:
    need(kind)
    image = images.make(base / "s.img", kind, megabytes=320)
    size = image.stat().st_size
    goal = size

    for number in range(1, 4):
        with union(base, base / "tree", image):
            (base / "mnt/file").write_text(f"{number}\n")
            goal += 64 << 20
            command = [
                "strace",
                "-qq",
                "-f",
                "-o",
                "/dev/null",
                "-e",
                "trace=ftruncate,fsync,ioctl",
            ]
            what = ("ftruncate", "fsync", "ioctl")[number - 1]
            # The last ioctl is the one that tells the file system.
            when = "1" if what != "ioctl" else "6+"
            command += ["-e", f"inject={what}:error=EIO:signal=KILL:when={when}"]
            subprocess.run(
                [*command, *program(), "store", "grow", image, "--size", str(goal)], check=False
            )
            assert (base / "mnt/file").read_text() == f"{number}\n"
            done("grow", image, "--size", goal)
            assert image.stat().st_size == goal
        assert store("check", image).returncode == 0


def on_terminal(*words: object) -> str:
    """What a verb shows there; it must succeed."""
    ours, theirs = os.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            [*program(), "store", *map(str, words)],
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(theirs)
        shown = b""
        try:
            while data := terminal.read(4096):
                shown += data
        except OSError:  # EIO: the other end is closed
            pass
        assert process.wait() == 0, shown
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("create {}/new.img --size 256M --full", ["new.img", "/256.0 MiB"]),
        ("backup {}/up {}/new", ["/new", " KiB"]),
        ("restore {}/saved {}/up", ["/saved", " KiB"]),
        ("restore --verify {}/saved", ["/saved", " KiB"]),
        ("clone {}/up {}/new:/work --size 16M", ["/new:/work", " KiB"]),
        ("grow {}/s.img --size 64M", ["s.img", "/32.0 MiB", "checking the copy", ": resizing"]),
        ("shrink {}/s.img --size 16M", ["s.img", "/32.0 MiB", ": resizing"]),
        ("check {}/s.img", ["s.img: checking the ext4", ": looking at the changes", "directories"]),
        ("check {}/up --repair", ["/up: looking at the changes", "directories"]),
        ("compact {}/s.img", ["s.img: giving space back"]),
        ("reset {}/up --discard", ["/up: removing"]),
        ("reset {}/up /made --discard", ["/up: removing"]),
    ],
)
def test_progress_is_shown_on_a_terminal(changed: Path, words: str, told: list[str]) -> None:
    given = words.replace("{}", str(changed)).split()
    shown = on_terminal(*given)
    for word in told:
        assert word in shown


def test_progress_of_btrfs(base: Path) -> None:
    need("btrfs")
    image = images.make(base / "s.img", "btrfs", megabytes=640)
    assert "moving what lies further back" in on_terminal("shrink", image, "--size", "512M")


def test_no_progress(changed: Path) -> None:
    """Neither if it is not wanted, nor where nobody looks."""
    assert on_terminal("check", changed / "s.img", "-q") == ""
    assert store("check", changed / "s.img").stderr == ""


def interrupted_at(call: str, number: int, *words: object, code: int = 8) -> None:
    """SIGINT comes with a system call of the verb's, as ^C might."""
    if why := traced.why_not():
        pytest.skip(why)
    options = ["-qq", "-o", "/dev/null", "-e", f"trace={call}"]
    inject = f"inject={call}:signal=INT:when={number}"
    done = subprocess.run(
        ["strace", *options, "-e", inject, *program(), "store", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    said = "unionfs: interrupted\n" if code else ""
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_interrupted_among_the_marks(changed: Path) -> None:
    """Nothing is changed, and it is let go."""
    up = changed / "up"
    before = snapshot.take(up)
    for number in (1, 4):
        interrupted_at("flistxattr,listxattr,llistxattr", number, "check", up)
        assert snapshot.take(up) == before
    assert store("check", up).returncode == 0


def test_interrupted_while_it_is_discarded(changed: Path) -> None:
    """That is too late: it has taken effect, and is brought to its end."""
    up = changed / "up"
    interrupted_at("unlinkat,unlink,rmdir", 2, "reset", up, "--discard", code=0)
    assert hidden(changed) == []
    with union(changed, changed / "tree", up):
        assert (changed / "mnt/file").read_text() == "lower\n"
        assert not (changed / "mnt/made").exists()


def test_interrupted_while_paths_are_discarded(changed: Path) -> None:
    """They are taken away by then; what is left of them is kept where it would be without."""
    up = changed / "up"
    interrupted_at("unlinkat,unlink,rmdir", 1, "reset", up, "/file", "/made", "--discard")
    with union(changed, changed / "tree", up):
        assert (changed / "mnt/file").read_text() == "lower\n"
        assert not (changed / "mnt/made").exists()
        assert not (changed / "mnt/gone").exists()
    assert len(list(up.glob(".unionfs/reset-*"))) == 1
    assert store("check", up).returncode == 0


def test_interrupted_while_space_is_given_back(base: Path) -> None:
    """Between two pieces, of which a large image has many."""
    need("ext4")
    if os.geteuid() != 0:
        pytest.skip("for a user e2fsck does it")
    image = images.make(base / "s.img", megabytes=6144)
    with union(base, base / "tree", image):
        change(base / "mnt")
    trace = base / "trace"
    assert _traced(["compact", image], ["-e", "trace=ioctl", "-o", str(trace)])
    pieces = [n for n, line in enumerate(trace.read_text().splitlines(), 1) if "FITRIM" in line]
    assert len(pieces) > 4
    interrupted_at("ioctl", pieces[2], "compact", image)
    assert images.loops_of(image) == []
    done("compact", image)
    assert store("check", image).returncode == 0
    with union(base, base / "tree", image):
        check(base / "mnt")
