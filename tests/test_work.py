# SPDX-License-Identifier: GPL-2.0-or-later
"""The area beside an upper: lock, format record, temporaries.  Nothing is mounted by us."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rig import as_user, ground
from unionfs import layer, mounts
from unionfs.errors import UnionfsError
from unionfs.format import Evidence, Record, examine, parse_record
from unionfs.options import MountOptions
from unionfs.work import INCOMPAT_USERXATTR, Work, lock_shared

# What there is in some areas only.
MAYBE = {"numbers", "whiteout"}

# Opens the upper argv[1] and says "held", then waits: a daemon that holds an upper.
HOLDER = """
    import sys
    from unionfs import layer, mounts
    from unionfs.options import MountOptions
    from unionfs.work import Work
    options = MountOptions(lowers=(), upper=sys.argv[1], mountpoint="/where/it/is")
    upper = layer.open_upper(sys.argv[1], mounts.read_mounts())
    work = Work.open(upper, options)
    (work.path + "/work") and open(work.path + "/work/left-over", "w").close()
    print("held", flush=True)
    sys.stdin.read()
"""


def options(place: Path, **changes: object) -> MountOptions:
    (place / "u").mkdir(exist_ok=True)
    base = MountOptions(lowers=(), upper=f"{place}/u", mountpoint=f"{place}/m")
    return replace(base, **changes)  # type: ignore[arg-type]


@contextlib.contextmanager
def opened(wanted: MountOptions) -> Iterator[tuple[layer.Layer, Work]]:
    assert wanted.upper is not None
    upper = layer.open_upper(wanted.upper, mounts.read_mounts(), work=wanted.work)
    try:
        work = Work.open(upper, wanted)
        try:
            yield upper, work
        finally:
            work.close()
    finally:
        upper.close()


def refusal(wanted: MountOptions) -> str:
    with pytest.raises(UnionfsError) as caught, opened(wanted):
        pass
    assert caught.value.code == 32
    return caught.value.line()


@contextlib.contextmanager
def holder(upper: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(upper)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


class TestArea:
    def test_what_is_made(self, place: Path) -> None:
        with opened(options(place)) as (_, work):
            area = place / "u/.unionfs"
            assert stat.S_IMODE(area.stat().st_mode) == 0o700
            assert set(os.listdir(area)) - MAYBE == {"format", "index", "owner", "work"}
            assert os.path.samestat(os.fstat(work.fd), (area / "work").stat())
            assert os.path.samestat(os.fstat(work.index), (area / "index").stat())
            owner = json.loads((area / "owner").read_text())
            assert (owner["pid"], owner["mountpoint"]) == (os.getpid(), f"{place}/m")
            os.mkdir("tmp", dir_fd=work.fd)
        assert set(os.listdir(area)) - MAYBE == {"format", "index", "work"}
        assert os.listdir(area / "work") == []

    def test_no_index(self, place: Path) -> None:
        with opened(options(place, index=False)) as (_, work):
            assert work.index == -1
            assert not (place / "u/.unionfs/index").exists()

    def test_left_overs_are_removed(self, place: Path) -> None:
        with opened(options(place)):
            pass
        work = place / "u/.unionfs/work"
        (work / "a/b/c").mkdir(parents=True)
        (work / "a/b/c/file").touch()
        (work / "link").symlink_to("/")
        if os.geteuid() == 0:
            os.mknod(work / "a/whiteout", stat.S_IFCHR, 0)
        (work / "a/b").chmod(0)
        (work / "a").chmod(0)
        with opened(options(place)):
            assert os.listdir(work) == []

    def test_abandoned_leaves_nothing(self, place: Path) -> None:
        wanted = options(place)
        os.utime(place / "u", ns=(1, 2))
        upper = layer.open_upper(f"{place}/u", mounts.read_mounts())
        work = Work.open(upper, wanted)
        assert (place / "u").stat().st_mtime_ns == 2
        os.mkdir("tmp", dir_fd=work.fd)
        work.abandon()
        upper.close()
        assert os.listdir(place / "u") == []
        assert (place / "u").stat().st_mtime_ns == 2

    def test_abandoned_keeps_what_was_there(self, place: Path) -> None:
        with opened(options(place, index=False)):
            pass
        upper = layer.open_upper(f"{place}/u", mounts.read_mounts())
        Work.open(upper, options(place)).abandon()
        upper.close()
        assert set(os.listdir(place / "u/.unionfs")) - MAYBE == {"format", "work"}

    def test_a_link_in_place_of_the_area_is_not_followed(self, place: Path) -> None:
        wanted = options(place)
        (place / "elsewhere").mkdir()
        (place / "u/.unionfs").symlink_to(place / "elsewhere")
        assert "cannot prepare" in refusal(wanted)
        assert os.listdir(place / "elsewhere") == []


class TestWorkdir:
    def test_of_its_own(self, place: Path) -> None:
        (place / "w").mkdir()
        with opened(options(place, work=f"{place}/w")):
            assert os.listdir(place / "u") == []
            assert "work" in os.listdir(place / "w")

    @pytest.mark.root
    def test_on_another_file_system(self, place: Path) -> None:
        (place / "w").mkdir()
        ground.run("mount", "-t", "tmpfs", "none", place / "w")
        try:
            assert "not on the mount of the upper" in refusal(options(place, work=f"{place}/w"))
            assert os.listdir(place / "w") == []
        finally:
            ground.run("umount", place / "w")
        (place / "x/bound").mkdir(parents=True)
        ground.run("mount", "--bind", place / "x", place / "w")
        try:
            assert "not on the mount of the upper" in refusal(options(place, work=f"{place}/w"))
        finally:
            ground.run("umount", place / "w")

    def test_nested(self, place: Path) -> None:
        (place / "u/w").mkdir(parents=True)
        assert "contain each other" in refusal(options(place, work=f"{place}/u/w"))
        assert "contain each other" in refusal(options(place, work=f"{place}"))
        assert "contain each other" in refusal(options(place, work=f"{place}/u"))

    @pytest.mark.root
    def test_incompat_makes_the_kernel_refuse(self, place: Path) -> None:
        for name in ("w", "l", "k"):
            (place / name).mkdir()
        with opened(options(place, work=f"{place}/w")) as (_, work):
            work.mark_incompat(INCOMPAT_USERXATTR)
            work.mark_incompat(INCOMPAT_USERXATTR)
        layers = f"lowerdir={place}/l,upperdir={place}/u,workdir={place}/w,userxattr"
        command = ["mount", "-t", "overlay", "overlay", "-o", layers, f"{place}/k"]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 32
        with opened(options(place, work=f"{place}/w")):
            pass
        assert os.listdir(place / "w/work/incompat") == [INCOMPAT_USERXATTR]

    def test_foreign_incompat(self, place: Path) -> None:
        (place / "w/work/incompat/volatile").mkdir(parents=True)
        text = refusal(options(place, work=f"{place}/w"))
        assert "'volatile'" in text
        assert f"remove {place}/w/work/incompat/volatile" in text


class TestLock:
    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("unionfs.holder._ENDING_SECONDS", 0.5)

    def test_names_the_holder_and_ends_with_it(self, place: Path) -> None:
        wanted = options(place)
        with holder(place / "u") as process:
            text = refusal(wanted)
            assert f"in use by process {process.pid} (" in text
            assert "mounted on /where/it/is" in text
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert os.listdir(place / "u/.unionfs/work") == ["left-over"]
            with opened(wanted):
                assert os.listdir(place / "u/.unionfs/work") == []

    def test_also_with_another_work_directory(self, place: Path) -> None:
        (place / "w").mkdir()
        with opened(options(place)):
            assert "is in use by process" in refusal(options(place, work=f"{place}/w"))
        assert os.listdir(place / "w") == []

    def test_also_for_one_work_directory_of_two_uppers(self, place: Path) -> None:
        (place / "w").mkdir()
        (place / "u2").mkdir()
        with opened(options(place, work=f"{place}/w")):
            other = options(place, upper=f"{place}/u2", work=f"{place}/w")
            assert f"{place}/w is in use by" in refusal(other)
            assert "owner" in os.listdir(place / "w")

    def test_readers_share_and_write_nothing(self, place: Path) -> None:
        wanted = options(place)
        upper = layer.open_upper(f"{place}/u", mounts.read_mounts(), readonly=True)
        first, second = lock_shared(upper, wanted), lock_shared(upper, wanted)
        assert os.listdir(place / "u") == []
        assert "is in use by" in refusal(wanted)
        os.close(first)
        os.close(second)
        with opened(wanted), pytest.raises(UnionfsError, match="in use"):
            lock_shared(upper, wanted)
        upper.close()


class TestRecord:
    def test_round_trip(self) -> None:
        for record in (Record("char", "trusted"), Record("wh", "user"), Record("wh", None)):
            assert parse_record(record.text(), "f") == record

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "does not start with"),
            ("unionfs one\n", "does not start with"),
            ("unionfs 1\n", "whiteout="),
            ("unionfs 1\nwhiteout=x\nxattrs=user\n", "whiteout=x"),
            ("unionfs 1\nwhiteout=wh\nxattrs=y\n", "xattrs=y"),
            ("unionfs 2\nsomething=else\n", "format version 2, newer than"),
        ],
    )
    def test_bad(self, place: Path, text: str, message: str) -> None:
        with pytest.raises(UnionfsError, match=message):
            parse_record(text, "f")
        (place / "u/.unionfs").mkdir(parents=True)
        (place / "u/.unionfs/format").write_text(text)
        assert message in refusal(options(place))
        assert os.listdir(place / "u/.unionfs") == ["format"]

    def test_kept_for_the_life_of_the_upper(self, place: Path) -> None:
        with opened(options(place, userxattr=True, whiteout="wh")):
            pass
        with opened(options(place)) as (upper, work):
            assert (work.whiteout, work.xattrs, upper.features.xattrs) == ("wh", "user", "user")
        assert "are user.* xattrs" in refusal(options(place, userxattr=False))

    @pytest.mark.root
    def test_without_xattrs(self, place: Path) -> None:
        (place / "u").mkdir()
        ground.run("mount", "-t", "ramfs", "none", place / "u")
        try:
            for _ in range(2):
                with opened(options(place)) as (upper, work):
                    assert (work.whiteout, work.xattrs) == ("wh", None)
                    assert upper.features.xattrs is None
                    assert upper.features.reasons["xattrs"]
                    assert upper.features.reasons["marks"]
        finally:
            ground.run("umount", place / "u")


@pytest.mark.root
class TestForeignUpper:
    def test_evidence(self, place: Path) -> None:
        def look() -> Evidence:
            fd = os.open(place, os.O_RDONLY)
            try:
                return examine(fd)
            finally:
                os.close(fd)

        assert look() == Evidence()
        (place / "a/b").mkdir(parents=True)
        (place / "a/file").touch()
        (place / ".unionfs").mkdir()
        (place / ".unionfs/.wh.ours").touch()
        assert look() == Evidence()
        os.mknod(place / "a/b/gone", stat.S_IFCHR, 0)
        os.mknod(place / "a/b/null", stat.S_IFCHR, os.makedev(1, 3))
        assert look() == Evidence("char")
        os.setxattr(place / "a", "user.overlay.opaque", b"y")
        assert look() == Evidence("char", "user")
        os.removexattr(place / "a", "user.overlay.opaque")
        os.setxattr(place / "a", "trusted.overlay.opaque", b"y")
        assert look() == Evidence("char", "trusted")
        os.unlink(place / "a/b/gone")
        (place / "a/b/.wh.gone").touch()
        assert look() == Evidence("wh", "trusted")

    def test_is_gone_on_with(self, place: Path) -> None:
        wanted = options(place)
        (place / "u/d").mkdir()
        (place / "u/.wh.gone").touch()
        os.setxattr(place / "u/d", "user.overlay.opaque", b"y")
        with opened(wanted) as (_, work):
            assert (work.whiteout, work.xattrs) == ("wh", "user")

    def test_of_root_is_refused_to_a_user(self, place: Path) -> None:
        why = as_user.why_impossible()
        if why:
            pytest.skip(why)
        with opened(options(place)):
            pass
        for path in (place / "u", *(place / "u").rglob("*")):
            os.chown(path, as_user.UID, as_user.GID)
        done = as_user.python("-c", textwrap.dedent(HOLDER), f"{place}/u")
        assert "trusted.* xattrs, which user 1000 cannot write" in done.stderr
