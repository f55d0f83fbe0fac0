# SPDX-License-Identifier: GPL-2.0-or-later
"""The image that a program has mounted for a user's union, read meanwhile: backed up, told of.

It is the union's daemon that lends it; what becomes of who reads if that ends, and of the daemon if
the reader does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rig import as_user, ground, images, secret
from tests.rig.mounted import PATIENCE, is_mounted, program
from tests.test_store_backup import fill, tree_of
from tests.test_store_commands import done, facts, fails, listing, store
from tests.test_stores import ARCH, _await, base, change, check, need, union
from unionfs.errors import UnionfsError
from unionfs.stores import holding, lent
from unionfs.stores.mounted import mounted_unions
from unionfs.stores.tools import find

__all__ = ["base"]

as_a_user = pytest.mark.skipif(os.geteuid() == 0, reason="root's stores are the kernel's")
UPPER = f"/persistent_tree/{ARCH}"


@pytest.fixture
def image(base: Path) -> Path:
    need("ext4")
    return images.make(base / "s.img", megabytes=64)


@contextlib.contextmanager
def writing(mnt: Path) -> Iterator[Callable[[], int]]:
    """Somebody who always writes a number to one file after the other; yields how far he is."""
    stop = threading.Event()
    number = 0

    def work() -> None:
        nonlocal number
        while not stop.wait(0.002):
            number += 1
            for name in ("a-first", "z-last"):
                fresh = mnt / f".{name}"
                fresh.write_text(str(number))
                fresh.rename(mnt / name)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        _await((mnt / "z-last").exists)
        yield lambda: number
    finally:
        stop.set()
        worker.join()


def _goes_on(count: Callable[[], int]) -> int:
    """Wait until more has been written; how far he was."""
    before = count()
    _await(lambda: count() > before + 3)
    return before


@pytest.fixture
def slow(base: Path) -> Iterator[Callable[..., dict[str, str]]]:
    """An environment in which a program is the real one after its first calls, but waits first."""
    folder = base / "slow"
    folder.mkdir()

    def make(name: str, calls: int = 0) -> dict[str, str]:
        real = find(name)
        script = folder / name
        script.write_text(
            f"#!/bin/sh\necho >>{folder}/calls\n"
            f"if [ $(wc -l <{folder}/calls) -gt {calls} ]; then\n"
            f"    touch {folder}/reached\n"
            f"    for i in $(seq 600); do [ -e {folder}/go ] && break; sleep 0.1; done\n"
            f'fi\nexec {real} "$@"\n'
        )
        script.chmod(0o755)
        return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}

    yield make
    (folder / "go").touch()


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
    _await(lambda: reached.exists() or process.poll() is not None)
    assert reached.exists(), process.communicate()
    return process


def one_line(process: subprocess.Popen[str]) -> str:
    """The error that a verb ends with."""
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 32, said
    assert "Traceback" not in said
    (line,) = said.strip().splitlines()
    return line


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_backup_while_somebody_writes(base: Path, image: Path) -> None:
    """It is the tree of one moment, whole; who writes is held up at most, and goes on."""
    saved = base / "saved.tar.zst"
    with union(base, base / "tree", image):
        fill(base / "mnt")
        quiet = tree_of(base / "mnt/made")
        with writing(base / "mnt") as count:
            done("backup", image, saved)
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
    with union(base, base / "tree", image):
        assert int((base / "mnt/z-last").read_text()) > after


@as_a_user
def test_what_another_name_of_a_file_has_cached(base: Path, image: Path) -> None:
    """fuse2fs has the kernel keep pages by name: a backup has what was written last."""
    with union(base, base / "tree", image):
        (base / "mnt/a").write_text("before")
        os.link(base / "mnt/a", base / "mnt/b")
        os.sync()
        (made,) = mounted_unions()
        root, lender = lent.borrow(made, "it")
        try:
            cached = [Path(f"/proc/self/fd/{root}{UPPER}/{name}") for name in "ab"]
            assert [path.read_text() for path in cached] == ["before"] * 2
            (base / "mnt/a").write_text("after!")
            done("backup", image, base / "saved.tar.zst")
        finally:
            os.close(root)
            lender.close()
    (base / "out").mkdir()
    ground.run("tar", "--zstd", "-xf", base / "saved.tar.zst", "-C", base / "out")
    assert [(base / "out" / name).read_text() for name in "ab"] == ["after!"] * 2
    assert os.path.samefile(base / "out/a", base / "out/b")


@as_a_user
def test_the_daemon_is_killed_meanwhile(
    base: Path, image: Path, slow: Callable[..., dict[str, str]]
) -> None:
    made = union(base, base / "tree", image)
    made.mount()
    change(base / "mnt")
    backup = begin(slow("zstd"), "backup", image, base / "saved.tar.zst")
    made.die()
    (base / "slow/go").touch()
    said = one_line(backup)
    assert f"the union at {base / 'mnt'} ended while {image} was read; begin again" in said
    assert [name for name in listing(base) if "saved" in name] == []
    made.clear()
    done("backup", image, base / "saved.tar.zst")
    with made:
        check(base / "mnt")


@as_a_user
def test_an_unmount_does_not_wait_for_a_backup(
    base: Path, image: Path, slow: Callable[..., dict[str, str]]
) -> None:
    made = union(base, base / "tree", image)
    made.mount()
    change(base / "mnt")
    (found,) = mounted_unions()
    root, lender = lent.borrow(found, "it")
    os.close(root)
    backup = begin(slow("zstd"), "backup", image, base / "saved.tar.zst")
    ending = subprocess.Popen([*program(), "umount", str(base / "mnt")])
    _await(lambda: not is_mounted(base / "mnt"))
    _await(lender.has_ended)
    lender.close()
    (base / "slow/go").touch()
    assert "ended while" in one_line(backup)
    assert ending.wait(PATIENCE) == 0
    assert made.process is not None
    assert made.process.wait(PATIENCE) == 0
    made._check_log()
    assert [name for name in listing(base) if "saved" in name] == []
    with union(base, base / "tree", image):
        check(base / "mnt")


@as_a_user
def test_a_backup_killed_while_it_holds_up_who_writes(
    base: Path, image: Path, slow: Callable[..., dict[str, str]]
) -> None:
    """The daemon goes on; so does it after a backup that was interrupted."""
    with union(base, base / "tree", image) as made, writing(base / "mnt") as count:
        for number in (signal.SIGKILL, signal.SIGTERM):
            (base / "slow/reached").unlink(missing_ok=True)
            (base / "slow/calls").unlink(missing_ok=True)
            backup = begin(slow("tar", calls=3), "backup", image, base / "saved.tar.zst")
            assert state_of(made.pid) == "T"
            backup.send_signal(number)
            backup.communicate(timeout=PATIENCE)
            assert backup.returncode == (8 if number == signal.SIGTERM else -number)
            _await(lambda: state_of(made.pid) != "T")
            _goes_on(count)
            assert not (base / "saved.tar.zst").exists()
    (base / "slow/go").touch()


@as_a_user
def test_nobody_is_held_up_for_ever(
    base: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by who does not get on, as he needs what lies in the union itself."""
    monkeypatch.setattr(holding, "_SILENCE", 0.5)
    with union(base, base / "tree", image) as made:
        change(base / "mnt")
        pid = made.pid
        (found,) = mounted_unions()
        root, lender = lent.borrow(found, "it")
        try:

            def hold() -> None:
                with holding.stopped(lender, "it") as beat:
                    beat()
                    assert state_of(pid) == "T"
                    check(base / "mnt")  # waits for the daemon, and the daemon for us
                    beat()

            with pytest.raises(UnionfsError, match="takes too long to read"):
                hold()
        finally:
            os.close(root)
            lender.close()


@as_a_user
def test_two_backups_at_once(base: Path, image: Path, slow: Callable[..., dict[str, str]]) -> None:
    """The one does not let go on whom the other has stopped."""
    with union(base, base / "tree", image) as made, writing(base / "mnt"):
        first = begin(slow("tar", calls=3), "backup", image, base / "1.tar.zst")
        second = os.open(f"/proc/{made.pid}/status", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(made.pid, signal.SIGCONT)  # by somebody else
        (base / "slow/go").touch()
        assert "did not stay stopped" in one_line(first)
        fcntl.flock(second, fcntl.LOCK_EX)
        os.close(second)
        done("backup", image, base / "2.tar.zst")


@as_a_user
def test_a_service_manager_gets_its_signs_of_life(base: Path, image: Path) -> None:
    """With a watchdog a daemon is held up for less than a third of its time."""
    made = union(base, base / "tree", image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WATCHDOG_USEC", "3000000")
        made.mount()
    try:
        (found,) = mounted_unions()
        root, lender = lent.borrow(found, "it")
        os.close(root)
        assert lender.patience() == 1

        def hold() -> None:
            with holding.stopped(lender, "it") as beat:
                while True:
                    beat()
                    threading.Event().wait(0.05)

        with pytest.raises(UnionfsError, match="takes too long to read"):
            hold()
        lender.close()
        change(base / "mnt")
    finally:
        made.umount()


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
            assert f"in use by the union of {lent._user(as_user.UID)} at {mnt}; do it" in said
            assert f"in use by the union at {mnt}" in fails("grow", image, "--size", "128M")
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
