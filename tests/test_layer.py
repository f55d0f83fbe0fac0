# SPDX-License-Identifier: GPL-2.0-or-later
"""Layers, probes, mountinfo, and which directories may be united: nothing is mounted by us."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Stores
from tests.rig import ground
from unionfs import checks, layer, mounts, syscalls
from unionfs.errors import UnionfsError
from unionfs.options import MountOptions


def options(place: Path, **changes: object) -> MountOptions:
    """Directories l, u and m of `place`, made if they are missing."""
    for name in ("l", "u", "m"):
        (place / name).mkdir(exist_ok=True)
    base = MountOptions(lowers=(f"{place}/l",), upper=f"{place}/u", mountpoint=f"{place}/m")
    return replace(base, **changes)  # type: ignore[arg-type]


def check(options: MountOptions) -> None:
    """What the daemon checks before it opens anything."""
    table = mounts.read_mounts()
    checks.check_layers(options, table)
    checks.check_mountpoint(options, table)


def refusal(options: MountOptions) -> str:
    """What the checks say."""
    with pytest.raises(UnionfsError) as caught:
        check(options)
    assert caught.value.code == 32
    return caught.value.line()


class TestMountinfo:
    def test_escapes_and_optional_fields(self) -> None:
        text = (
            b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:2 - ext3 /dev/ro\\134ot rw,x\n"
        )
        (entry,) = mounts.parse_mounts(text)
        assert entry == (36, "98:0", "/mnt1", "/mnt 2", "ext3", "/dev/ro\\ot", "rw,x")

    def test_topmost_is_the_last(self) -> None:
        line = b"%d 1 0:%d / /m rw - tmpfs t rw\n"
        found = mounts.topmost("/m", mounts.parse_mounts(line % (5, 5) + line % (6, 6)))
        assert found is not None
        assert found.number == 6

    @pytest.mark.parametrize(
        ("inner", "outer", "expected"),
        [
            ("/a/b", "/a", True),
            ("/a", "/a", True),
            ("/ab", "/a", False),
            ("/a", "/", True),
            ("/a", "/a/b", False),
        ],
    )
    def test_inside(self, inner: str, outer: str, expected: bool) -> None:
        assert mounts.Position("8:1", inner).inside(mounts.Position("8:1", outer)) is expected
        assert not mounts.Position("8:1", inner).inside(mounts.Position("8:2", outer))

    def test_locate_sees_through_a_bind_mount(self, place: Path) -> None:
        if os.geteuid():
            pytest.skip("needs root")
        (place / "a/b").mkdir(parents=True)
        (place / "bound").mkdir()
        ground.run("mount", "--bind", place / "a", place / "bound")
        try:
            table = mounts.read_mounts()
            places = []
            for path in ("a/b", "bound/b"):
                fd = os.open(place / path, os.O_PATH | os.O_DIRECTORY)
                places.append(mounts.locate(fd, table))
                os.close(fd)
            assert places[0] is not None
            assert places[0] == places[1]
        finally:
            ground.run("umount", place / "bound")


@pytest.mark.root
class TestLower:
    def test_is_readonly_quiet_and_without_submounts(self, place: Path) -> None:
        (place / "l/sub").mkdir(parents=True)
        (place / "l/sub/covered").touch()
        file = place / "l/file"
        file.write_text("x")
        os.utime(file, (1, 1))
        ground.run("mount", "-t", "tmpfs", "none", place / "l/sub")
        try:
            lower = layer.open_lower(f"{place}/l", mounts.read_mounts())
            assert lower.detached
            assert not lower.careful
            sub = os.open("sub", os.O_RDONLY, dir_fd=lower.fd)
            assert os.listdir(sub) == ["covered"]
            os.close(sub)
            with pytest.raises(OSError, match="Read-only") as caught:
                os.mkdir("new", dir_fd=lower.fd)
            assert caught.value.errno == errno.EROFS
            fd = os.open("file", os.O_RDONLY, dir_fd=lower.fd)
            assert os.read(fd, 1) == b"x"
            assert os.fstat(fd).st_atime == 1
            os.close(fd)
            lower.close()
            lower.close()
        finally:
            ground.run("umount", place / "l/sub")

    def test_mounts_made_later_do_not_reach_it(self, place: Path) -> None:
        (place / "l/sub").mkdir(parents=True)
        ground.run("mount", "--bind", place / "l", place / "l")
        ground.run("mount", "--make-shared", place / "l")
        try:
            lower = layer.open_lower(f"{place}/l", mounts.read_mounts())
            ground.run("mount", "-t", "tmpfs", "none", place / "l/sub")
            sub = os.stat("sub", dir_fd=lower.fd)
            assert sub.st_dev == lower.dev
            lower.close()
        finally:
            ground.run("umount", "-R", place / "l")

    @pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
    def test_falls_back_to_a_plain_open(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        def refuse(_fd: int) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(syscalls, "clone_mount", refuse)
        (place / "l/sub").mkdir(parents=True)
        plain = layer.open_lower(f"{place}/l", mounts.read_mounts())
        assert (plain.detached, plain.careful) == (False, False)
        ground.run("mount", "-t", "tmpfs", "none", place / "l/sub")
        try:
            careful = layer.open_lower(f"{place}/l", mounts.read_mounts())
            assert (careful.detached, careful.careful) == (False, True)
            careful.close()
        finally:
            ground.run("umount", place / "l/sub")
        checks.mark_careful([plain], f"{place}/l/sub", mounts.read_mounts())
        assert plain.careful
        plain.close()


class TestUpper:
    def test_missing(self, place: Path) -> None:
        with pytest.raises(UnionfsError, match="No such file or directory"):
            layer.open_upper(f"{place}/none", mounts.read_mounts())

    @pytest.mark.root
    def test_readonly_mount(self, place: Path) -> None:
        (place / "u").mkdir()
        ground.run("mount", "-t", "tmpfs", "-o", "ro", "none", place / "u")
        try:
            with pytest.raises(UnionfsError, match="read-only mount") as caught:
                layer.open_upper(f"{place}/u", mounts.read_mounts())
            assert "--ro" in caught.value.line()
        finally:
            ground.run("umount", place / "u")

    def test_readonly_union_cannot_write_it(self, place: Path) -> None:
        if os.geteuid():
            pytest.skip("needs root")
        (place / "u").mkdir()
        upper = layer.open_upper(f"{place}/u", mounts.read_mounts(), readonly=True)
        assert upper.upper
        assert upper.readonly
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir("x", dir_fd=upper.fd)
        upper.close()


@pytest.mark.root
class TestProbes:
    @pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
    def test_everything_a_real_file_system_has(self, stores: Stores, kind: ground.Kind) -> None:
        place = stores.place(kind)
        fd = os.open(place, os.O_RDONLY)
        features = layer.probe_features(fd)
        os.close(fd)
        assert features.xattrs == "trusted"
        assert features.whiteout
        assert features.device_nodes
        assert features.rename_exchange
        assert features.rename_noreplace
        assert features.rename_whiteout
        assert features.tmpfile
        assert features.acl
        assert features.file_handles
        assert features.reflink is (kind in ("xfs", "btrfs"))
        assert ("reflink" in features.reasons) is not features.reflink
        assert os.listdir(place) == []

    def test_userxattr_asks_for_user(self, place: Path) -> None:
        fd = os.open(place, os.O_RDONLY)
        assert layer.probe_features(fd, True).xattrs == "user"
        assert layer.probe_features(fd, False).xattrs == "trusted"
        os.close(fd)

    def test_no_xattrs_has_its_reason(self, place: Path) -> None:
        ground.run("mount", "-t", "ramfs", "none", place)
        try:
            fd = os.open(place, os.O_RDONLY)
            features = layer.probe_features(fd)
            os.close(fd)
        finally:
            ground.run("umount", place)
        assert features.xattrs is None
        assert "trusted.*: Operation not supported" in features.reasons["xattrs"]


class TestChecks:
    def test_good(self, place: Path) -> None:
        good = options(place)
        checks.check_layers(good, mounts.read_mounts())
        assert checks.check_mountpoint(good, mounts.read_mounts()) == good.mountpoint

    @pytest.mark.parametrize("which", ["lowers", "upper", "work", "mountpoint"])
    @pytest.mark.parametrize("what", ["missing", "a file"])
    def test_missing_or_no_directory(self, place: Path, which: str, what: str) -> None:
        if what == "a file":
            (place / "x").touch()
        value = (f"{place}/x",) if which == "lowers" else f"{place}/x"
        text = refusal(options(place, **{which: value}))
        assert f"{place}/x" in text
        assert ("No such file" if what == "missing" else "Not a directory") in text

    def test_doubled(self, place: Path) -> None:
        good = options(place)
        os.symlink("l", place / "again")
        assert "named twice" in refusal(replace(good, lowers=(f"{place}/l", f"{place}/again")))
        assert "also a lower" in refusal(replace(good, upper=f"{place}/l"))

    def test_nested(self, place: Path) -> None:
        (place / "l/in").mkdir(parents=True)
        (place / "u/in").mkdir(parents=True)
        assert "lies inside the lower" in refusal(options(place, upper=f"{place}/l/in"))
        assert "lies inside the lower" in refusal(options(place, work=f"{place}/l/in"))
        assert "lies inside the upper" in refusal(options(place, lowers=(f"{place}/u/in",)))
        assert "lies inside the upper" in refusal(options(place, mountpoint=f"{place}/u/in"))

    @pytest.mark.root
    def test_nested_through_a_bind_mount(self, place: Path) -> None:
        (place / "l/in").mkdir(parents=True)
        (place / "u").mkdir()
        ground.run("mount", "--bind", place / "l/in", place / "u")
        try:
            assert "lies inside the lower" in refusal(options(place))
        finally:
            ground.run("umount", place / "u")

    @pytest.mark.root
    def test_upper_on_a_file_system_of_its_own_below_the_lower(self, place: Path) -> None:
        (place / "l/disk").mkdir(parents=True)
        ground.run("mount", "-t", "tmpfs", "none", place / "l/disk")
        try:
            good = options(place, upper=f"{place}/l/disk")
            checks.check_layers(good, mounts.read_mounts())
        finally:
            ground.run("umount", place / "l/disk")

    def test_mountpoint(self, place: Path) -> None:
        good = options(place)
        (place / "l/file").touch()
        over_itself = replace(good, mountpoint=f"{place}/l")
        assert checks.check_mountpoint(over_itself, mounts.read_mounts()) == f"{place}/l"
        assert "is also the upper" in refusal(replace(good, mountpoint=f"{place}/u"))
        (place / "l/m").mkdir()
        inside = replace(good, mountpoint=f"{place}/l/m")
        assert checks.check_mountpoint(inside, mounts.read_mounts()) == f"{place}/l/m"
        (place / "m/x").touch()
        assert "not empty" in refusal(good)
        checks.check_mountpoint(replace(good, nonempty=True), mounts.read_mounts())

    @pytest.mark.root
    def test_upper_of_kernel_overlayfs(self, place: Path) -> None:
        good = options(place)
        (place / "w").mkdir()
        (place / "k").mkdir()
        layers = f"lowerdir={place}/l,upperdir={place}/u,workdir={place}/w"
        ground.run("mount", "-t", "overlay", "overlay", "-o", layers, place / "k")
        try:
            assert f"kernel overlayfs mounted on {place}/k" in refusal(good)
        finally:
            ground.run("umount", place / "k")
