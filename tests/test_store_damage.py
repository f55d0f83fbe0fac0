# SPDX-License-Identifier: GPL-2.0-or-later
"""Damaged and foreign images as upper and as lower: a clear line or the fallback, never more.

Of each: it is refused in one line that names it, with a documented exit code; nothing is left of
the attempt; and its bytes are what they were.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import damage, ground, images
from tests.rig.mounted import is_mounted, program, user_mount_possible
from tests.test_stores import change, need, union
from unionfs.cli.main import main

Capture = pytest.CaptureFixture[str]
_ROOT = os.geteuid() == 0
# So far the kernel mounts it, and then notes the error in it or writes its own log; for a user
# e2fsck begins to repair it.
_NOTED = [
    "ext4 no root",
    "ext4 a hole in its inodes",
    *(
        ["xfs a hole in its headers", "xfs no root"]
        if _ROOT
        else ["ext4 no group descriptors", "ext4 noise in its group descriptors"]
    ),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole images by kind, made as they are asked for."""
    place = tmp_path_factory.mktemp("whole")

    class Images(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            self[kind] = damage.whole(kind, place)
            return self[kind]

    return Images()


@pytest.fixture
def spot(place: Path) -> Iterator[Path]:
    if why := user_mount_possible():
        pytest.skip(why)
    (place / "tree/dir").mkdir(parents=True)
    for name in ("file", "gone"):
        (place / "tree" / name).write_text("lower\n")
    (place / "mnt").mkdir()
    yield place
    for path in place.iterdir():
        if stat.S_ISREG(path.lstat().st_mode):
            path.chmod(0o600)


def made(whole: dict[str, Path], spot: Path, kind: str, what: str) -> Path:
    path = spot / "bad.img"
    ground.run("cp", "--sparse=always", whole[kind], path)
    damage.EDITS[kind][what](path)
    return path


def state(path: Path) -> object:
    """What must not change."""
    status = path.lstat()
    regular = stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK)
    return status.st_mode, status.st_size, images.digest(path) if regular else ""


def said(capsys: Capture, *words: object) -> tuple[int, str, str]:
    """The command line, in this process; the daemon of a mount is forked from it."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as exc:
        code = int(exc.code or 0)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert "bug in unionfs" not in err
    return code, out, err


def line(err: str) -> str:
    lines = err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def refused(capsys: Capture, path: Path, *words: object) -> str:
    """A mount that is not made; the one line."""
    code, _, err = said(capsys, "mount", *words)
    assert code in (2, 32), err
    assert not is_mounted(str(words[-1]))
    assert str(path) in err
    assert "; " in line(err), "what to do"
    assert images.loops_of(path) == [] if path.is_file() else True
    return line(err)


def looked_at(capsys: Capture, path: Path) -> None:
    """The verbs that only look."""
    code, _, err = said(capsys, "store", "list", path)
    assert code in (0, 32)
    code, _, err = said(capsys, "store", "info", path)
    assert code in (0, 2, 32)
    if code:
        assert str(path) in line(err)
    code, out, err = said(capsys, "store", "check", path)
    assert code in (0, 4, 8, 12)
    assert out or str(path) in line(err)


def cases(*kinds: str) -> list[tuple[str, str]]:
    return [(kind, what) for kind in kinds for what in damage.EDITS[kind]]


@pytest.mark.parametrize(("kind", "what"), cases("ext4", "xfs", "btrfs"))
def test_upper(whole: dict[str, Path], spot: Path, kind: str, what: str, capsys: Capture) -> None:
    path = made(whole, spot, kind, what)
    before = state(path)
    refused(capsys, path, spot / "tree", path, spot / "mnt")
    looked_at(capsys, path)
    assert state(path) == before or f"{kind} {what}" in _NOTED


@pytest.mark.parametrize("what", [*damage.THINGS, *(() if _ROOT else damage.LOCKED)])
def test_thing_as_upper_and_lower(spot: Path, what: str, capsys: Capture) -> None:
    path = spot / "bad.img"
    (damage.THINGS | damage.LOCKED)[what](path)
    before = state(path)
    refused(capsys, path, spot / "tree", path, spot / "mnt")
    if what != "read-only":
        refused(capsys, path, "--ro", path, spot / "mnt")
        looked_at(capsys, path)
    assert state(path) == before


@pytest.mark.parametrize("kind", damage.FOREIGN)
def test_foreign(spot: Path, kind: str, capsys: Capture) -> None:
    """A whole file system, of which nothing is known here."""
    if _ROOT and kind in Path("/proc/filesystems").read_text().split():
        pytest.skip(f"the kernel has {kind}")
    path = spot / "bad.img"
    damage.FOREIGN[kind](path)
    before = state(path)
    told = f"this kernel has no {kind}" if _ROOT else f"an ordinary user cannot mount {kind}"
    assert told in refused(capsys, path, spot / "tree", path, spot / "mnt")
    assert told in refused(capsys, path, "--ro", path, spot / "mnt")
    looked_at(capsys, path)
    assert state(path) == before


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
def test_for_reading_only(whole: dict[str, Path], spot: Path, kind: str, capsys: Capture) -> None:
    """Whole, and no place for changes."""
    path = spot / "bad.img"
    shutil.copy(whole[kind], path)
    before = state(path)
    told = refused(capsys, path, spot / "tree", path, spot / "mnt")
    if _ROOT or kind == "squashfs":
        assert "cannot be written to; use ext4" in told
    assert state(path) == before


def test_a_wrong_label(whole: dict[str, Path], spot: Path, capsys: Capture) -> None:
    """What has another one is not taken for it."""
    need("ext4")
    path = spot / "s.img"
    ground.run("cp", "--sparse=always", whole["ext4"], path)
    ground.run("tune2fs", "-L", "another", path)
    before = state(path)
    with images.attached(path) if _ROOT else contextlib.nullcontext():
        words = ("-o", "search=images", spot / "tree", "LABEL=persist-", spot / "mnt")
        code, _, err = said(capsys, "mount", *words)
        assert code == 32
        assert "no device or image has LABEL=persist-; plug it in, wait for it with" in line(err)
        words = ("-o", "search=images,fallback=tmpfs", *words[2:])
        code, _, err = said(capsys, "mount", *words)
        assert (code, "LABEL=persist-" in line(err)) == (0, True)
        change(spot / "mnt")
        assert said(capsys, "umount", spot / "mnt")[0] == 0
    assert state(path) == before


def test_there_are_enough_of_them() -> None:
    """For root and for a user, not counting what a user could not mount if it were whole."""
    things = [*damage.THINGS, *damage.FOREIGN]
    if _ROOT:
        assert len(cases(*damage.EDITS)) + len(things) >= 60
    else:
        assert len(cases("ext4", "squashfs")) + len([*things, *damage.LOCKED]) >= 45


@pytest.mark.parametrize(("kind", "what"), cases("squashfs", "erofs", "ext4"))
def test_lower(whole: dict[str, Path], spot: Path, kind: str, what: str, capsys: Capture) -> None:
    path = made(whole, spot, kind, what)
    before = state(path)
    (spot / "up").mkdir()
    refused(capsys, path, path, spot / "up", spot / "mnt")
    assert list((spot / "up").iterdir()) == []
    if kind != "ext4":
        looked_at(capsys, path)
    assert state(path) == before


def test_two_signatures(whole: dict[str, Path], spot: Path, capsys: Capture) -> None:
    """Nobody can say which of the two it is."""
    path = spot / "bad.img"
    ground.run("cp", "--sparse=always", whole["ext4"], path)
    with open(whole["xfs"], "rb") as other:
        damage.write(path, 0, other.read(512))
    before = state(path)
    told = refused(capsys, path, spot / "tree", path, spot / "mnt")
    assert "could be several things at once" in told
    looked_at(capsys, path)
    assert state(path) == before


def test_no_label_is_too_strange(whole: dict[str, Path], spot: Path) -> None:
    """Not even one of bytes that are no text, with a line break in it."""
    need("ext4")
    path = spot / "s.img"
    ground.run("cp", "--sparse=always", whole["ext4"], path)
    label = b"\xf0\xf1\xf2\xf3\xf4\xf5\xf6\n\x1b[31m\xff\x01\x02"
    ground.run("tune2fs", "-L", os.fsdecode(label), path)
    with union(spot, spot / "tree", path):
        change(spot / "mnt")
    name = str(path)
    for words in (["list", name], ["info", name], ["info", name, "--json"], ["check", name]):
        done = subprocess.run([*program(), "store", *words], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\x1b" not in done.stdout
    if not _ROOT:
        return
    with images.attached(path):
        escaped = "".join(f"\\\\x{byte:02x}" for byte in label)
        with union(spot, spot / "tree", None, f"upperdir=LABEL={escaped}"):
            assert not (spot / "mnt/gone").exists()


@pytest.mark.parametrize("fallback", ["ro", "tmpfs"])
@pytest.mark.parametrize(
    "what", ["empty", "noise", "a FIFO", "LUKS", "ext4 no root", "ext4 cut by half", "xfs no root"]
)
def test_fallback(
    whole: dict[str, Path], spot: Path, what: str, fallback: str, capsys: Capture
) -> None:
    path = spot / "bad.img"
    kind, _, how = what.partition(" ")
    if kind in damage.EDITS:
        made(whole, spot, kind, how)
    else:
        damage.THINGS[what](path)
    before = state(path)
    words = ("-o", f"fallback={fallback}", spot / "tree", path, spot / "mnt")
    code, _, err = said(capsys, "mount", *words)
    try:
        assert code == 0
        assert line(err).startswith("unionfs: warning: ")
        assert str(path) in err
        if fallback == "tmpfs":
            change(spot / "mnt")
        else:
            with pytest.raises(OSError, match="Read-only"):
                (spot / "mnt/x").touch()
        assert (spot / "tree/file").read_text() == "lower\n"
    finally:
        assert said(capsys, "umount", spot / "mnt")[0] == 0
    assert state(path) == before or what in _NOTED
    assert images.loops_of(path) == [] if path.is_file() else True


def test_cut_while_it_is_mounted(whole: dict[str, Path], spot: Path) -> None:
    """Somebody truncates the image under a union: what is not there any more is an error, and it
    can be unmounted."""
    need("squashfs")
    path = spot / "lower.img"
    shutil.copy(whole["squashfs"], path)
    with union(spot, path, None, "ro"):
        os.truncate(path, 4096)
        if _ROOT:
            ground.run("sh", "-c", "echo 3 >/proc/sys/vm/drop_caches")
        try:
            data = (spot / "mnt/big").read_bytes()
        except OSError as exc:
            # squashfuse says that it is not there.
            assert exc.errno in (errno.EIO, errno.ENODATA, errno.ENOENT)  # noqa: PT017
        else:
            assert len(data) == 300_000, "or it was in memory"
    assert images.loops_of(path) == []
