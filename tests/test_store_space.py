# SPDX-License-Identifier: GPL-2.0-or-later
"""A store that gets full, or was not let go of: told before it hurts, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.rig.waiting import wait_until
from tests.test_store_commands import done, store
from tests.test_stores import base, change, check, mount, need, refused, union
from unionfs.errors import UnionfsError
from unionfs.options import OptionReader
from unionfs.reserve import Reserve
from unionfs.space import GROW_SECONDS, LOOK_SECONDS, Mark, Watch
from unionfs.stores.tools import find

__all__ = ["base"]

MIB = 1 << 20


# The rules


class Fake(Watch):
    """On a file system that is made up."""

    size, free = 1000 * MIB, 500 * MIB

    def _measure(self) -> tuple[int, int]:
        return self.size, self.free


def test_low_water_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    watch = Fake(-1, "LABEL=s", Mark(5, percent=True))
    for free, low in ((500, False), (49, True), (40, True), (51, False), (10, True)):
        watch.free = free * MIB
        watch.look()
        assert watch.low == low
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "LABEL=s has only 49 MiB left of 1000",
        "LABEL=s has 51 MiB again",
        "LABEL=s has only 10 MiB left of 1000",
    ]
    assert watch.seconds == LOOK_SECONDS


def test_what_dies_between_two_calls(tmp_path: Path) -> None:
    """A program that has the store mounted may end at any moment: the look is in vain."""
    area = os.open(tmp_path, os.O_PATH)
    reserve = Reserve(area)
    os.close(area)
    watch = Fake(-1, "LABEL=s", Mark(5, percent=True), reserve=reserve)
    watch.look()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reserve, "fill", lambda *_: os.fstat(-1))
        watch.look()
    reserve.close()


def growing(watch: Fake) -> list[int]:
    """What it grows is what it says; the sizes in MiB, as they come."""
    steps: list[int] = []

    def enlarge(size: int) -> None:
        steps.append(size // MIB)
        watch.free += size - watch.size
        watch.size = size

    watch.image_size, watch.enlarge = lambda: watch.size, enlarge
    return steps


def test_growing_ends_at_the_largest(caplog: pytest.LogCaptureFixture) -> None:
    watch = Fake(-1, "s", Mark(1 * MIB, percent=False), largest=1500 * MIB)
    steps = growing(watch)
    assert watch.seconds == GROW_SECONDS
    watch.free = 20 * MIB
    watch.look()
    assert steps == [1250, 1500], "until there is enough, or no more to be had"
    watch.free = 20 * MIB
    watch.look()
    assert steps == [1250, 1500]


def test_growing_keeps_ahead_of_who_writes() -> None:
    watch = Fake(-1, "s", Mark(1, percent=False), largest=1 << 40)
    steps = growing(watch)
    watch.free = 600 * MIB
    watch.look()
    assert steps == []
    watch.free = 400 * MIB
    watch.look()
    assert watch.free >= 4 * 200 * MIB


def test_a_refusal_to_grow_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Fake(-1, "s", Mark(1, percent=False), largest=1 << 40)

    def enlarge(size: int) -> None:
        raise OSError(errno.EPERM, "not permitted")

    watch.image_size, watch.enlarge = lambda: watch.size, enlarge
    watch.free = 0
    watch.look()
    watch.look()
    assert "does not grow" in watch.problem
    assert [r.getMessage() for r in caplog.records if "grow" in r.getMessage()] == [watch.problem]
    assert watch.seconds == LOOK_SECONDS


@pytest.mark.parametrize("words", ["low-water=x", "low-water=0", "autogrow=50%", "autogrow="])
def test_misspelt(words: str) -> None:
    reader = OptionReader()
    with pytest.raises(UnionfsError, match="not a size"):
        reader.take(words)


# On mounts


def test_no_copy_is_begun_that_will_not_fit(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    (base / "tree/large").write_bytes(os.urandom(20 * MIB))
    with union(base, base / "tree", image):
        change(base / "mnt")
        before = os.statvfs(base / "mnt").f_bfree
        with pytest.raises(OSError, match="No space left"):
            open(base / "mnt/large", "ab").close()
        assert os.statvfs(base / "mnt").f_bfree == before
        # To the brim, and things can still be removed.
        with pytest.raises(OSError, match="No space left"):
            _fill_up(base / "mnt/fill")
        (base / "mnt/large").unlink()
        (base / "mnt/fill").unlink()
        assert not (base / "mnt/large").exists()
    with union(base, base / "tree", image):
        check(base / "mnt")


@pytest.mark.parametrize("kind", ["ext4", "xfs", pytest.param("btrfs", marks=pytest.mark.slow)])
def test_what_is_full_can_be_emptied(base: Path, kind: str) -> None:
    """Also where the whiteouts need directories, which take space."""
    need(kind)
    image = images.make(base / "s.img", kind)
    for number in range(20):
        (base / f"tree/a{number}/b").mkdir(parents=True)
        (base / f"tree/a{number}/b/c").write_text("lower")
    made = union(base, base / "tree", image)
    made.expected = ["has only"]
    for _ in range(2):  # the reserve was filled again, and is still there after a remount
        with made:
            wait_until(lambda: made.status().get("space") is not None)
            _brim(base / "mnt/fill")
        with made:
            for path in list((base / "mnt").glob("a*"))[:10]:
                (path / "b/c").unlink()
                (path / "b").rmdir()
                path.rmdir()
            (base / "mnt/fill").unlink()
    with made:
        assert not list((base / "mnt").glob("a*"))


def _brim(path: Path) -> None:
    """Until there is no block left."""
    size = MIB
    with open(path, "ab", buffering=0) as file:
        while size >= 512:
            try:
                file.write(os.urandom(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2
        os.fsync(file.fileno())


def _fill_up(path: Path) -> None:
    with open(path, "wb") as file:
        while True:
            file.write(os.urandom(MIB))


def test_low_water(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    made = union(base, base / "tree", image, "low-water=99%")
    made.expected = ["has only [0-9]+ MiB left"]
    with made:
        low = {"low": True, "disk": False, "problem": None}
        wait_until(lambda: made.status().get("space") == low)
        shown = ground.run("env", *_status(base))
        assert "the store gets full" in shown
        assert "has only" in made.words()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
@pytest.mark.parametrize("sparse", [True, False])
def test_the_disk_of_an_image_is_full(base: Path, sparse: bool) -> None:
    """What a sparse one has yet to get is free in its file system, and lost where it is written."""
    need("ext4")
    disk = base / "disk"
    disk.mkdir()
    ground.run("mount", "-t", "tmpfs", "-o", "size=26M", "tmpfs", str(disk))
    try:
        image = disk / "s.img"
        done("create", image, "--size", "24M", *([] if sparse else ["--full"]))
        if sparse:
            (disk / "other").write_bytes(b"x" * 22 * MIB)
        with open(base / "tree/large", "wb") as file:
            file.write(os.urandom(9 * MIB))
        made = union(base, base / "tree", image, "low-water=50%")
        made.expected = ["has only [0-9]+ MiB left of .* as the disk that"] if sparse else []
        with made:
            wait_until(lambda: "space" in made.status())
            low = {"low": sparse, "disk": sparse, "problem": None}
            assert made.status()["space"] == low
            space = os.statvfs(base / "mnt")
            assert (space.f_bavail * space.f_frsize < 8 * MIB) == sparse
            with pytest.raises(OSError, match="No space") if sparse else contextlib.nullcontext():
                os.chmod(base / "mnt/large", 0o600)
                with open(base / "mnt/large", "ab") as file:
                    file.write(b"x")
            assert os.path.getsize(base / "mnt/large") == 9 * MIB + (not sparse)
            shown = ground.run("env", *_status(base))
            assert ("the disk that the store's image lies on gets full" in shown) == sparse
    finally:
        ground.run("umount", str(disk))


def _status(base: Path) -> list[str]:
    from tests.rig.mounted import program

    return [*program(), "status", str(base / "mnt")]


@pytest.mark.parametrize("kind", ["xfs", pytest.param("btrfs", marks=pytest.mark.slow)])
def test_autogrow_under_four_writers(base: Path, kind: str) -> None:
    need(kind)
    image = images.make(base / "s.img", kind, megabytes=320)
    sums: dict[str, str] = {}
    failures: list[BaseException] = []

    def write(name: str) -> None:
        digest = hashlib.sha256()
        try:
            with open(base / "mnt" / name, "wb", buffering=0) as file:
                for _ in range(100):
                    data = os.urandom(MIB)
                    digest.update(data)
                    assert file.write(data) == MIB
            sums[name] = digest.hexdigest()
        except BaseException as error:
            failures.append(error)

    made = union(base, base / "tree", image, "autogrow=1G")
    with made:
        before = made.words().count("has grown to")
        writers = [threading.Thread(target=write, args=(f"w{i}",)) for i in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert not failures
        assert made.words().count("has grown to") > before, "while they wrote"
    assert 320 * MIB < image.stat().st_size <= 1 << 30
    with union(base, base / "tree", image, "low-water=1K"):
        for name, expected in sums.items():
            found = hashlib.sha256((base / "mnt" / name).read_bytes()).hexdigest()
            assert found == expected
    assert len(sums) == 4


@pytest.mark.parametrize("kind", ["xfs", pytest.param("btrfs", marks=pytest.mark.slow)])
def test_filled_to_the_brim_by_four_writers(base: Path, kind: str) -> None:
    """It grows while they write, as far as it may; then it is full.

    Whatever a write has accepted is there afterwards, synced or not, and nothing else is.
    """
    need(kind)
    # Large enough for nothing to grow before they write.
    image = images.make(base / "s.img", kind, megabytes=640)
    accepted = {f"w{i}": 0 for i in range(4)}
    digests = {name: hashlib.sha256() for name in accepted}
    synced = dict.fromkeys(accepted, 0)
    full: list[str] = []
    failures: list[BaseException] = []

    def write(name: str) -> None:
        try:
            with open(base / "mnt" / name, "wb", buffering=0) as file:
                while True:
                    data = os.urandom(4096) * 512
                    position = 0
                    while position < len(data):
                        count = file.write(data[position:])
                        accepted[name] += count
                        digests[name].update(data[position : position + count])
                        position += count
                    os.fsync(file.fileno())
                    synced[name] += len(data)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                full.append(name)
            else:
                failures.append(error)
        except BaseException as error:
            failures.append(error)

    made = union(base, base / "tree", image, "autogrow=768M", "low-water=1K")
    made.expected = ["has only"]
    with made:
        change(base / "mnt")
        assert "has grown to" not in made.words()
        writers = [threading.Thread(target=write, args=(name,)) for name in accepted]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert not failures
        assert sorted(full) == sorted(accepted)
        assert "has grown to 768 MiB" in made.words()
        (base / "mnt/moved").rmdir()  # there is room for a whiteout
    assert image.stat().st_size == 768 * MIB
    assert store("check", image).returncode == 0
    made = union(base, base / "tree", image, "low-water=1K")
    made.expected = ["has only"]
    with made:
        for name, size in accepted.items():
            content = (base / "mnt" / name).read_bytes()
            assert len(content) == size >= synced[name] > 0
            assert hashlib.sha256(content).digest() == digests[name].digest()
        assert (base / "mnt/file").read_text() == "changed\n"
        assert not (base / "mnt/moved").exists()
    assert sum(synced.values()) > 448 * MIB


def test_what_is_said_of_an_image_is_for_images(base: Path) -> None:
    (base / "up").mkdir()
    assert "autogrow=" in refused("-o", "autogrow=1G", base / "tree", base / "up", base / "mnt")
    if os.geteuid() != 0:
        need("ext4")
        image = images.make(base / "s.img")
        said = refused("-o", "autogrow=1G", base / "tree", image, base / "mnt")
        assert "fuse2fs cannot grow" in said
    flags = ("-o", "store-flags=bogus")
    assert "store-flags= is for an" in refused(*flags, base / "tree", base / "up", base / "mnt")
    assert "store-flags= is for an" in refused(*flags, base / "tree", "--ro", base / "mnt")
    options = "autogrow=1G,store-flags=noatime,fallback=tmpfs"
    done = mount("-o", options, base / "tree", "LABEL=none", base / "mnt")
    assert done.returncode == 0, done.stderr
    ground.run(
        "umount" if os.geteuid() == 0 else "fusermount3",
        *([] if os.geteuid() == 0 else ["-u"]),
        base / "mnt",
    )


def test_a_killed_daemon_is_told_of(base: Path) -> None:
    (base / "up").mkdir()
    made = union(base, base / "tree", base / "up")
    made.mount()
    change(base / "mnt")
    assert "recovered" not in made.status()
    made.kill()
    with made:
        assert "the daemon before was killed" in str(made.status()["recovered"])
        check(base / "mnt")
    with made:
        assert "recovered" not in made.status()


def test_noted_errors_are_corrected_before_it_is_mounted(base: Path) -> None:
    need("ext4")
    debugfs = find("debugfs")
    if debugfs is None:
        pytest.skip("there is no debugfs")
    image = images.make(base / "s.img")
    with union(base, base / "tree", image):
        change(base / "mnt")
    ground.run(debugfs, "-w", "-R", "set_super_value state 2", image)
    made = union(base, base / "tree", image)
    with made:
        check(base / "mnt")
    dumpe2fs = find("dumpe2fs")
    assert dumpe2fs
    assert "clean with errors" not in ground.run(dumpe2fs, "-h", image)
