# SPDX-License-Identifier: GPL-2.0-or-later
"""The image that a program has mounted for a user's unions, read meanwhile: backed up, told of.

Who reads is one more whom the program serves; what becomes of a backup if the union ends, and of
the union and the program if the backup does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rig import as_user, ground, images, secret
from tests.rig.mounted import PATIENCE, Unionfs, program
from tests.rig.waiting import wait_until
from tests.test_store_backup import fill, tree_of
from tests.test_store_commands import done, facts, fails, listing, store
from tests.test_store_sharing import one, registers, serving
from tests.test_stores import ARCH, base, change, check, need, union
from unionfs.errors import UnionfsError
from unionfs.stores import holding, mounted
from unionfs.stores.tools import find
from unionfs.stores.volume import Volume, open_volume

__all__ = ["base"]

# Always stores a number at both ends, and has it written.
MAPPER = """
import mmap, struct, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
    number = 0
    while True:
        number += 1
        for at in (0, len(data) - 8):
            data[at : at + 8] = struct.pack("Q", number)
        if number % 1000 == 1:
            data.flush()
        if number == 1:
            print(flush=True)
"""
as_a_user = pytest.mark.skipif(os.geteuid() == 0, reason="root's stores are the kernel's")
UPPER = f"/persistent_tree/{ARCH}"


@pytest.fixture
def image(base: Path) -> Iterator[Path]:
    """One that at last nobody has, and that is whole."""
    need("ext4")
    made = images.make(base / "s.img", megabytes=64)
    yield made
    if os.geteuid() != 0:
        wait_until(lambda: not serving(made))
        assert not registers()
        assert not [p for p in ground.mounts_below("/") if "unionfs-stage" in p]
    ground.run("e2fsck", "-fn", made)


@contextlib.contextmanager
def writing(mnt: Path) -> Iterator[Callable[[], int]]:
    """Somebody who always writes a number to one file after the other; yields how far he is."""
    stop = threading.Event()
    number = 0

    def work() -> None:
        nonlocal number
        while not stop.wait(0.002):
            for name in ("a-first", "z-last"):
                fresh = mnt / f".{name}"
                fresh.write_text(str(number + 1))
                fresh.rename(mnt / name)
            number += 1

    worker = threading.Thread(target=work)
    worker.start()
    try:
        wait_until((mnt / "z-last").exists)
        yield lambda: number
    finally:
        stop.set()
        worker.join()


def _goes_on(count: Callable[[], int]) -> int:
    """Wait until more has been written; how far he was."""
    before = count()
    wait_until(lambda: count() > before + 3)
    return before


@pytest.fixture
def slow(base: Path) -> Iterator[Callable[..., dict[str, str]]]:
    """An environment in which a program is the real one, but waits first, after its first calls.

    These change a file, if one is given: so the reading is in vain.
    """
    folder = base / "slow"
    folder.mkdir()

    def make(name: str, calls: int = 0, changed: Path | str = "/dev/null") -> dict[str, str]:
        real = find(name)
        script = folder / name
        script.write_text(
            f"#!/bin/sh\necho >>{folder}/calls\n"
            f"if [ $(wc -l <{folder}/calls) -gt {calls} ]; then\n"
            f"    touch {folder}/reached\n"
            f"    for i in $(seq 600); do [ -e {folder}/go ] && break; sleep 0.1; done\n"
            f"else\n    echo changed >{changed}\n"
            f'fi\nexec {real} "$@"\n'
        )
        script.chmod(0o755)
        return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}

    yield make
    (folder / "go").touch()
    wait_until(lambda: not any(_is_at(process, base) for process in Path("/proc").glob("[0-9]*")))


def _is_at(process: Path, base: Path) -> bool:
    """Whether another process has a word or an open file of ours: it waits, or is about to end."""
    if int(process.name) == os.getpid():
        return False
    try:
        if os.fsencode(base) in (process / "cmdline").read_bytes():
            return True
        return any(os.readlink(fd).startswith(f"{base}/") for fd in (process / "fd").iterdir())
    except OSError:
        return False


def begin(environment: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    """A verb, which is to wait; begun once it does."""
    process = subprocess.Popen(
        [*program(), "store", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    reached = Path(environment["PATH"].split(":")[0], "reached")
    wait_until(lambda: reached.exists() or process.poll() is not None)
    assert reached.exists(), process.communicate()
    return process


def begun(
    base: Path, image: Path, environment: dict[str, str]
) -> tuple[Unionfs, subprocess.Popen[str]]:
    """A union that is mounted, with changes, and a backup of it, which waits."""
    made = union(base, base / "tree", image)
    made.mount()
    change(base / "mnt")
    return made, begin(environment, "backup", image, base / "saved.tar.zst")


def one_line(process: subprocess.Popen[str]) -> str:
    """The error that a verb ends with."""
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 32, said
    assert "Traceback" not in said
    (line,) = said.strip().splitlines()
    return line


def is_held_up(mnt: Path) -> bool:
    """Whether somebody else has those held up who write there."""
    hold = holding._Hold(str(mnt), "it")
    try:
        hold.ask(60, begins=True)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            return True
        raise
    hold.ask(0)
    return False


@pytest.mark.parametrize("kind", ["image", "directory"])
def test_a_backup_while_somebody_writes(base: Path, image: Path, kind: str) -> None:
    """It is the tree of one moment, whole; who writes is held up at most, and goes on."""
    saved = base / "saved.tar.zst"
    (base / "up").mkdir()
    store_ = image if kind == "image" else base / "up"
    # What passes through is the kernel's to write, and not held up.
    words = [] if kind == "image" else ["passthrough=off"]
    with union(base, base / "tree", store_, *words):
        fill(base / "mnt")
        quiet = tree_of(base / "mnt/made")
        with writing(base / "mnt") as count:
            done("backup", store_, saved)
            after = _goes_on(count)
    assert "is whole" in done("restore", "--verify", saved)
    (base / "other").mkdir()
    done("restore", saved, base / "other")
    with union(base, base / "tree", base / "other"):
        first, last = (int((base / "mnt" / n).read_text()) for n in ("a-first", "z-last"))
        assert 0 <= first - last <= 1, "as one after the other was written"
        assert tree_of(base / "mnt/made") == quiet
        assert (base / "mnt/with space\n").stat().st_size == 50_000
    assert store("check", base / "other").returncode == 0
    with union(base, base / "tree", store_):
        assert int((base / "mnt/z-last").read_text()) > after


@contextlib.contextmanager
def joined(image: Path) -> Iterator[Volume]:
    volume = open_volume(str(image), readonly=True, untouched=True, share=True)
    try:
        assert volume.shared
        yield volume
    finally:
        volume.close()


def _ends_well(process: subprocess.Popen[str]) -> None:
    said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert said[1] == ""


def _is_whole(saved: Path) -> None:
    """A backup of what change() makes."""
    assert "is whole" in done("restore", "--verify", saved)
    base = saved.parent
    (base / "restored").mkdir()
    done("restore", saved, base / "restored")
    with union(base, base / "tree", base / "restored"):
        check(base / "mnt")
    assert store("check", base / "restored").returncode == 0


def _are_whole(base: Path, made: Unionfs) -> None:
    """The backup, and the store."""
    _is_whole(base / "saved.tar.zst")
    with made:
        check(base / "mnt")


@as_a_user
def test_what_another_name_of_a_file_has_cached(base: Path, image: Path) -> None:
    """Each name is a file of its own to the kernel: a copy has what was written last."""
    with union(base, base / "tree", image) as made, one(image, "other"):
        (base / "mnt/a").write_text("before")
        os.link(base / "mnt/a", base / "mnt/b")
        with joined(image) as volume:
            cached = [Path(f"/proc/self/fd/{volume.root}{UPPER}/{name}") for name in "ab"]
            assert [path.read_text() for path in cached] == ["before"] * 2
            (base / "mnt/a").write_text("after!")
            done("backup", f"{image}:{UPPER}", base / "saved.tar.zst")
            assert [path.read_text() for path in cached] == ["after!"] * 2
            (base / "mnt/a").write_text("again!")
            made.umount()
            done("clone", f"{image}:{UPPER}", base / "clone")
        made.mount()
    (base / "out").mkdir()
    ground.run("tar", "--zstd", "-xf", base / "saved.tar.zst", "-C", base / "out")
    for place, text in ((base / "out", "after!"), (base / "clone", "again!")):
        assert [(place / name).read_text() for name in "ab"] == [text] * 2
        assert os.path.samefile(place / "a", place / "b")


@as_a_user
def test_the_daemon_is_killed_meanwhile(
    base: Path, image: Path, slow: Callable[..., dict[str, str]]
) -> None:
    """The backup goes on: what it reads is as the daemon has left it, and whole."""
    made, backup = begun(base, image, slow("zstd"))
    made.die()
    (program_,) = serving(image)
    made.clear()
    made.mount()
    assert serving(image) == [program_], "the backup has it still"
    check(base / "mnt")
    made.kill()
    (base / "slow/go").touch()
    _ends_well(backup)
    assert not serving(image), "its end was waited for"
    _are_whole(base, made)


@as_a_user
def test_an_unmount_does_not_wait_for_a_backup(
    base: Path, image: Path, slow: Callable[..., dict[str, str]]
) -> None:
    """Nor the backup for that: it is the last whom fuse2fs serves, and has it end."""
    made, backup = begun(base, image, slow("zstd"))
    (program_,) = serving(image)
    made.umount()
    assert serving(image) == [program_]
    with made:
        assert serving(image) == [program_]
        check(base / "mnt")
    assert "in use" in fails("shrink", image, "--size", "32M")
    (base / "slow/go").touch()
    _ends_well(backup)
    assert not serving(image), "its end was waited for"
    _are_whole(base, made)


@as_a_user
@pytest.mark.parametrize("end", ["killed", "unmounted"])
def test_the_union_ends_while_it_is_held_up(
    base: Path, image: Path, slow: Callable[..., dict[str, str]], end: str
) -> None:
    """It is read anew."""
    made, backup = begun(base, image, slow("tar", calls=3, changed=base / "mnt/file"))
    assert is_held_up(base / "mnt")
    if end == "killed":
        made.die()
        made.clear()
        made.mount()
        (base / "slow/go").touch()
        _ends_well(backup)
        made.umount()
    else:
        made.umount()
        (base / "slow/go").touch()
        _ends_well(backup)
    wait_until(lambda: not serving(image))
    _are_whole(base, made)


@as_a_user
def test_it_is_not_mounted_any_more_when_it_is_to_be_held_up(
    base: Path, image: Path, slow: Callable[..., dict[str, str]]
) -> None:
    """So nobody is stopped, and nobody mounts it while it is read."""
    made, backup = begun(base, image, slow("tar", calls=2, changed=base / "mnt/file"))
    (base / "mnt/file").write_text("changed\n")
    made.umount()
    (base / "slow/go").touch()
    _ends_well(backup)
    _are_whole(base, made)


@as_a_user
def test_a_backup_that_is_the_last_is_killed(
    base: Path, image: Path, slow: Callable[..., dict[str, str]]
) -> None:
    """fuse2fs ends by itself, and has written everything."""
    made, backup = begun(base, image, slow("zstd"))
    made.umount()
    assert serving(image)
    backup.kill()
    wait_until(lambda: not serving(image))
    ground.run("e2fsck", "-fn", image)
    (base / "slow/go").touch()
    backup.communicate(timeout=PATIENCE)
    assert not (base / "saved.tar.zst").exists()
    with made:  # finds the register of the dead
        check(base / "mnt")


@as_a_user
def test_fuse2fs_is_killed_meanwhile(
    base: Path, image: Path, slow: Callable[..., dict[str, str]]
) -> None:
    made = union(base, base / "tree", image)
    made.expected = ["fuse2fs of .* has ended", "fuse2fs of .* ended", "umount"]
    made.mount()
    change(base / "mnt")
    backup = begin(slow("tar"), "backup", image, base / "saved.tar.zst")
    (program_,) = serving(image)
    os.kill(program_, signal.SIGKILL)
    (base / "slow/go").touch()
    assert " failed: " in one_line(backup)
    assert [name for name in listing(base) if "saved" in name] == []
    made.umount()
    with made:  # checks it
        (base / "mnt/new").touch()


@as_a_user
def test_only_who_writes_to_the_upper_is_held_up(
    base: Path, image: Path, slow: Callable[..., dict[str, str]]
) -> None:
    with one(image, "a") as first, one(image, "b") as second:
        change(first.mnt)
        environment = slow("tar", calls=3, changed=first.mnt / "file")
        backup = begin(environment, "backup", f"{image}:/a", base / "saved.tar.zst")
        assert is_held_up(first.mnt)
        check(first.mnt)  # reading goes on
        change(second.mnt)
        second.umount()
        second.mount()
        check(second.mnt)
        (base / "slow/go").touch()
        _ends_well(backup)
        assert not is_held_up(first.mnt)
        (first.mnt / "after").touch()
    _is_whole(base / "saved.tar.zst")


@pytest.fixture(params=["directory", "image"])
def upper(request: pytest.FixtureRequest, base: Path) -> Path:
    """Of a kind that cannot be frozen."""
    if request.param == "directory":
        (base / "up").mkdir()
        return base / "up"
    if os.geteuid() == 0:
        pytest.skip("root's images are the kernel's")
    need("ext4")
    return images.make(base / "s.img", megabytes=64)


def test_a_backup_killed_while_it_holds_up_who_writes(
    base: Path, upper: Path, slow: Callable[..., dict[str, str]]
) -> None:
    """They go on; so they do after a backup that was interrupted."""
    with union(base, base / "tree", upper), writing(base / "mnt") as count:
        for number in (signal.SIGKILL, signal.SIGTERM):
            (base / "slow/reached").unlink(missing_ok=True)
            (base / "slow/calls").unlink(missing_ok=True)
            backup = begin(slow("tar", calls=3), "backup", upper, base / "saved.tar.zst")
            assert is_held_up(base / "mnt")
            backup.send_signal(number)
            backup.communicate(timeout=PATIENCE)
            assert backup.returncode == (8 if number == signal.SIGTERM else -number)
            wait_until(lambda: not is_held_up(base / "mnt"))
            _goes_on(count)
            assert not (base / "saved.tar.zst").exists()
    (base / "slow/go").touch()


def test_nobody_is_held_up_for_ever(
    base: Path, upper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by who does not get on, as he needs what is held up himself."""
    monkeypatch.setattr(holding, "_SILENCE", 1)
    with union(base, base / "tree", upper):
        change(base / "mnt")

        def hold() -> None:
            with holding.held(str(base / "mnt"), "it") as beat:
                beat()
                check(base / "mnt")  # is only read
                (base / "mnt/file").write_text("changed\n")  # waits for us, and we for it
                beat()

        with pytest.raises(UnionfsError, match="too long for them"):
            hold()
        assert (base / "mnt/file").read_text() == "changed\n"


def test_two_backups_at_once(base: Path, upper: Path, slow: Callable[..., dict[str, str]]) -> None:
    """The one does not let go on whom the other holds up."""
    with union(base, base / "tree", upper), writing(base / "mnt"):
        first = begin(slow("tar", calls=3), "backup", upper, base / "1.tar.zst")
        second = begin(slow("zstd"), "backup", upper, base / "2.tar.zst")
        assert is_held_up(base / "mnt")
        (base / "slow/go").touch()
        _ends_well(first)
        _ends_well(second)
    for name in ("1.tar.zst", "2.tar.zst"):
        assert "is whole" in done("restore", "--verify", base / name)


def test_a_daemon_that_hangs(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "up").mkdir()
    monkeypatch.setattr(holding, "DEADLINE", 0.5)
    monkeypatch.setattr(holding, "_SILENCE", 3)
    with union(base, base / "tree", base / "up") as made:
        os.kill(made.pid, signal.SIGSTOP)
        try:
            with (
                pytest.raises(UnionfsError, match="does not answer"),
                holding.held(str(base / "mnt"), "it"),
            ):
                pass
        finally:
            os.kill(made.pid, signal.SIGCONT)
        wait_until(lambda: not is_held_up(base / "mnt"))
        change(base / "mnt")


def test_a_wish_that_means_nothing(base: Path) -> None:
    (base / "up").mkdir()
    with union(base, base / "tree", base / "up"):
        change(base / "mnt")
        hold = holding._Hold(str(base / "mnt"), "it")
        for seconds in (0, 1):
            with pytest.raises(OSError, match="Stale"):
                hold.ask(seconds)
        for below in ("made", "file"):
            with pytest.raises(OSError, match=r"Inappropriate ioctl|Not a directory"):
                holding._Hold(str(base / "mnt" / below), "it").ask(1, begins=True)
        check(base / "mnt")


def test_what_is_stored_through_a_mapping(base: Path) -> None:
    """Nobody is held up for that; but the backup sees it, and has no half of it."""
    (base / "up").mkdir()
    with union(base, base / "tree", base / "up", "passthrough=off"):
        (base / "mnt/mapped").write_bytes(bytes(8 << 20))
        words = [sys.executable, "-c", MAPPER, str(base / "mnt/mapped")]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as mapper:
            assert mapper.stdout is not None
            mapper.stdout.readline()
            assert "changes all the time" in fails("backup", base / "up", base / "saved.tar.zst")
            mapper.kill()
        done("backup", base / "up", base / "saved.tar.zst")
    assert "is whole" in done("restore", "--verify", base / "saved.tar.zst")


@as_a_user
def test_what_can_be_told_of_it(base: Path, image: Path) -> None:
    """All that is in the image, not the union's upper only; and any of it can be backed up."""
    for name in ("/one", "/two"):
        with union(base, base / "tree", f"{image}:{name}"):
            change(base / "mnt")
    done("reset", f"{image}:/two")
    with union(base, base / "tree", f"{image}:/one"):
        told = {one["directory"]: one for one in facts("info", image)["uppers"]}
        assert list(told) == ["/one", "/two"]
        assert told["/one"]["mounted"] == str(base / "mnt")
        assert told["/two"]["mounted"] is None
        assert [kept["size"] > 0 for kept in told["/two"]["kept"]] == [True]
        assert facts("list", image)[0]["uppers"][1]["directory"] == "/two"
        done("backup", f"{image}:/two", base / "two.tar.zst")
        done("backup", f"{image}:/one", base / "one.tar.zst")
        assert "has no /three" in fails("backup", f"{image}:/three", base / "x")
        assert f"{image}:/one, {image}:/two" in fails("backup", image, base / "x")
    with union(base, base / "tree", f"{image}:/far/down/there"):
        told = {one["directory"]: one for one in facts("info", image)["uppers"]}
        assert list(told) == ["/one", "/two", "/far/down/there"], "nobody would look there"
        assert told["/far/down/there"]["mounted"] == str(base / "mnt")


@as_a_user
def test_an_encrypted_one(base: Path, image: Path) -> None:
    """As it is: its cipher directory."""
    if why := secret.why_not():
        pytest.skip(why)
    key = secret.key_file(base)
    done("encrypt", image, "--base", base / "tree", "--key-file", key)
    with union(base, base / "tree", image, f"key-file={key}"):
        change(base / "mnt")
        (upper,) = facts("info", image)["uppers"]
        assert (upper["encrypted"], upper["mounted"]) == ("gocryptfs", str(base / "mnt"))
        assert upper["id"]
        assert "encrypted as the store is" in done("backup", image, base / "saved.tar.zst")
    (base / "other").mkdir()
    done("restore", base / "saved.tar.zst", base / "other")
    with union(base, base / "tree", base / "other", f"key-file={key}"):
        check(base / "mnt")


@as_a_user
def test_it_does_not_grow(base: Path, image: Path) -> None:
    with union(base, base / "tree", image):
        said = fails("grow", image, "--size", "128M")
    assert said == (
        f"unionfs: {image} is in use by the union at {base / 'mnt'}, and fuse2fs cannot resize "
        f"what it has mounted; unmount it first: unionfs umount {base / 'mnt'}"
    )
    done("grow", image, "--size", "128M")


@pytest.mark.root
def test_a_stranger_s_daemon(user_place: Path) -> None:
    """Nothing is read by what it says of itself: it is told whose it is."""
    need("squashfs")
    if find("fuse2fs") is None:
        pytest.skip("there is no fuse2fs")
    image, mnt, saved = (user_place / name for name in ("s.img", "mnt", "saved.tar.zst"))
    images.make(image)
    for name in ("tree", "mnt"):
        (user_place / name).mkdir()
        os.chown(user_place / name, as_user.UID, as_user.GID)
    os.chown(image, as_user.UID, as_user.GID)
    image.chmod(0o666)
    user_place.chmod(0o777)
    backup = [*program(), "store", "backup", str(image), str(saved)]
    with as_user.fuse_for_all():
        made = as_user.run([*program(), "mount", str(user_place / "tree"), str(image), str(mnt)])
        assert made.returncode == 0, made
        try:
            said = fails("backup", image, saved)
            assert f"in use by the union of {mounted._user(as_user.UID)} at {mnt}; do it" in said
            assert f"in use by the union at {mnt}" in fails("grow", image, "--size", "128M")
            (user_place / "own").mkdir()
            done("backup", user_place / "own", user_place / "own.tar.zst")
            (upper,) = facts("info", image)["uppers"]
            assert upper["mounted"] == str(mnt)
            words = ["setpriv", "--reuid=1001", "--regid=1001", "--clear-groups", *backup]
            other = subprocess.run(words, capture_output=True, text=True, check=False)
            assert other.returncode == 32
            (line,) = other.stderr.splitlines()
            assert f"{image} is in use by another program" in line
            assert not saved.exists()
            own = as_user.run(backup)
            assert own.returncode == 0, own
            saved.unlink()
        finally:
            done_ = as_user.run([*program(), "umount", str(mnt)])
            assert done_.returncode == 0, done_
