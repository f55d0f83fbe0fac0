# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store backup` and `restore`: all comes back, and nothing is ever lost."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images, snapshot
from tests.rig.mounted import program
from tests.rig.waiting import wait_until
from tests.test_store_commands import done, facts, fails, killed_at, listing, shim
from tests.test_stores import ARCH, base, change, check, need, union
from unionfs.errors import UnionfsError
from unionfs.stores import archive, backing, sockets

__all__ = ["base", "shim"]


def tree_of(mnt: Path) -> list[object]:
    """All that a backup has to bring back."""
    found: list[object] = []
    for folder, names, files in os.walk(mnt):
        for name in sorted([*names, *files]):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            data = b""
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    data = file.read()
            marks = [(x, os.getxattr(path, x)) for x in os.listxattr(path) if x.startswith("user.")]
            # fuse2fs shows whole seconds.
            mtime = status.st_mtime_ns if os.geteuid() == 0 else int(status.st_mtime)
            kept = (status.st_mode, status.st_nlink, status.st_uid, mtime)
            found.append((os.path.relpath(path, mnt), *kept, marks, data))
    return sorted(found, key=str)


def fill(mnt: Path) -> None:
    change(mnt)
    os.link(mnt / "file", mnt / "moved/link")
    os.setxattr(mnt / "made", "user.note", b"\x00\xff")
    (mnt / "with space\n").write_bytes(os.urandom(50_000))
    os.mkfifo(mnt / "pipe")
    # The lower has a file of this name, which is not to be seen again.
    os.mknod(mnt / "gone", stat.S_IFSOCK | 0o640)
    (mnt / "moved/so far").mkdir()
    os.mknod(os.fsencode(mnt) + b"/moved/so far/odd\xff\n", stat.S_IFSOCK | 0o777)
    os.chmod(mnt / "moved/so far", 0o500)
    with open(mnt / "sparse", "wb") as file:
        file.truncate(1 << 30)
        file.truncate(1 << 20)
    os.chmod(mnt / "made", 0o1700)


@pytest.mark.parametrize("where", ["image", "directory"])
def test_backup_and_restore(base: Path, where: str) -> None:
    if where == "image":
        need("ext4")
        upper = images.make(base / "s.img")
    else:
        upper = base / "up"
        upper.mkdir()
    saved = base / "saved.tar.zst"
    with union(base, base / "tree", upper):
        fill(base / "mnt")
        before = tree_of(base / "mnt")
        said = done("backup", upper, base / "mounted.tar.zst")
        assert "sha256" in said
    done("backup", upper, saved)
    assert "is not overwritten" in fails("backup", upper, saved)
    assert "is whole" in done("restore", "--verify", saved)
    plain = ground.run("tar", "--zstd", "-tf", saved)
    assert "./made/" in plain, "any tar can unpack it"
    with union(base, base / "tree", upper):
        (base / "mnt/file").write_text("newer\n")
        (base / "mnt/made").rmdir()
        assert "in use" in fails("restore", saved, upper)
    done("restore", saved, upper)
    with union(base, base / "tree", upper):
        assert tree_of(base / "mnt") == before
        (base / "mnt/file").write_text("newer\n")
    kept = done("restore", "--keep", base / "mounted.tar.zst", upper)
    assert ".before-" in kept
    with union(
        base, base / "tree", f"{upper}:/persistent_tree/{ARCH}" if where == "image" else upper
    ):
        assert tree_of(base / "mnt") == before
    other = base / "other"
    other.mkdir()
    done("restore", saved, other)
    with union(base, base / "tree", other):
        assert tree_of(base / "mnt") == before
    assert [n for n in listing(base) if n.startswith(".")] == []


def test_backup_of_a_store_that_was_not_unmounted(base: Path) -> None:
    """What only the journal has, as after a power cut, is in the backup."""
    if os.geteuid() != 0:
        pytest.skip("fuse2fs writes no journal")
    image = images.make(base / "s.img")
    cut = base / "cut.img"
    with union(base, base / "tree", image):
        change(base / "mnt")
        for name in ("file", "made"):
            fd = os.open(base / "mnt" / name, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        ground.run("sync", image)
        cut.write_bytes(image.read_bytes())
    assert b"needs_recovery" in ground.run("dumpe2fs", "-h", cut).encode()
    done("backup", cut, base / "saved.tar.zst")
    (base / "up").mkdir()
    done("restore", base / "saved.tar.zst", base / "up")
    with union(base, base / "tree", base / "up"):
        check(base / "mnt")


def test_backup_while_it_changes(base: Path) -> None:
    """Two files that are always changed one after the other: no backup has them two steps apart."""
    need("ext4")
    image = images.make(base / "s.img", megabytes=64)
    saved = base / "saved.tar.zst"
    with union(base, base / "tree", image):
        (base / "mnt/bulk").write_bytes(os.urandom(8 << 20))
        stop = threading.Event()

        def work() -> None:
            number = 0
            while not stop.wait(0.002):
                number += 1
                for name in ("a-first", "z-last"):
                    (base / "mnt" / name).write_text(str(number))

        worker = threading.Thread(target=work)
        worker.start()
        try:
            wait_until((base / "mnt/z-last").exists)
            done("backup", image, saved)
        finally:
            stop.set()
            worker.join()
        (base / "mnt/after").touch()
    (base / "out").mkdir()
    ground.run("tar", "--zstd", "-xf", saved, "-C", base / "out")
    first, last = ((base / "out" / name).read_text() for name in ("a-first", "z-last"))
    # One of them may be empty: between its truncation and its text.
    if first and last:
        assert 0 <= int(first) - int(last) <= 1


def test_a_backup_does_not_go_into_the_store(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    with union(base, base / "tree", image):
        change(base / "mnt")
        assert "itself" in fails("backup", image, base / "mnt/saved.tar.zst")
        check(base / "mnt")


@pytest.mark.parametrize("mounted", [False, True])
def test_a_backup_does_not_go_into_a_directory(base: Path, mounted: bool) -> None:
    """Nor anything else, for a moment: the union would show it."""
    up = base / "up"
    (up / "sub").mkdir(parents=True)
    with union(base, base / "tree", up):
        change(base / "mnt")
        for folder in (up, up / "sub", base / "mnt") if mounted else ():
            assert "itself" in fails("backup", up, folder / "x.tar.zst")
    for folder in (up, up / "sub"):
        before = folder.stat().st_mtime_ns
        assert f"the backup would lie in {up} itself" in fails("backup", up, folder / "x.tar.zst")
        assert folder.stat().st_mtime_ns == before
    (base / "link").symlink_to(up)
    assert "itself" in fails("backup", up, base / "link/x.tar.zst")
    assert "cannot open" in fails("backup", up, base / "nowhere/x.tar.zst")
    done("backup", up, base / "up.tar.zst")


def test_standard_output_and_input(base: Path) -> None:
    """`-`, as tar has it; nothing else gets there, and nothing that is not complete."""
    up = base / "up"
    up.mkdir()
    backup = [*program(), "store", "backup", str(up), "-"]
    with union(base, base / "tree", up):
        change(base / "mnt")
        found = subprocess.run(backup, capture_output=True, check=True, cwd=base)
        assert b"sha256" in found.stderr
    assert not (base / "-").exists()
    (base / "x").write_bytes(found.stdout)
    assert "is whole" in done("restore", "--verify", base / "x")
    for words in (["restore", "--verify", "-"], ["restore", "-", str(base / "new")]):
        with open(base / "x", "rb") as file:
            subprocess.run([*program(), "store", *words], stdin=file, check=True)
    with union(base, base / "tree", base / "new"):
        check(base / "mnt")
    broken = subprocess.run(
        [*program(), "store", "restore", "-", base / "vain"],
        input=found.stdout[:-300],
        capture_output=True,
        check=False,
    )
    assert broken.returncode == 32
    assert not (base / "vain").exists()
    leader, follower = os.openpty()
    said = subprocess.run(backup, stdout=follower, stderr=subprocess.PIPE, check=False)
    os.close(follower)
    os.close(leader)
    assert said.returncode == 1
    assert b"terminal" in said.stderr


def _damaged(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """A backup as it should not be."""
    middle = len(whole) // 2
    yield "cut", whole[:middle]
    yield "last byte", whole[:-1]
    yield "flipped", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    yield "head", whole[:20] + b"\xff" + whole[21:]
    yield "foreign", os.urandom(5000)
    yield "empty", b""


def test_a_damaged_backup_restores_nothing(base: Path) -> None:
    upper = base / "up"
    upper.mkdir()
    with union(base, base / "tree", upper):
        fill(base / "mnt")
    saved = base / "saved.tar.zst"
    done("backup", upper, saved)
    before = snapshot.take(upper)
    for how, data in _damaged(saved.read_bytes()):
        bad = base / how
        bad.write_bytes(data)
        said = fails("restore", bad, upper)
        assert "damaged" in said or "is no backup" in said, how
        if how in ("cut", "flipped"):
            assert str(bad) in fails("restore", "--verify", bad)
    assert snapshot.take(upper) == before
    assert [n for n in listing(base) if n.startswith(".")] == []


@pytest.mark.parametrize("at", ["zstd", "tar"])
def test_restore_and_backup_killed(base: Path, shim: Callable[[str], Path], at: str) -> None:
    upper = base / "up"
    upper.mkdir()
    with union(base, base / "tree", upper):
        change(base / "mnt")
    saved = base / "saved.tar.zst"
    done("backup", upper, saved)
    killed_at(shim(at), "backup", upper, base / "second.tar.zst")
    assert not (base / "second.tar.zst").exists()
    done("backup", upper, base / "second.tar.zst")
    killed_at(shim(at), "restore", saved, upper)
    with union(base, base / "tree", upper):
        check(base / "mnt")
    done("restore", saved, upper)
    with union(base, base / "tree", upper):
        check(base / "mnt")
    assert [n for n in listing(base) if n.startswith(".")] == [], "the next one tidies up"


def test_backup_names_what_there_is(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    assert "no changes of a union" in fails("backup", image, base / "x")
    for name in ("one", "two"):
        with union(base, base / "tree", f"{image}:/{name}"):
            change(base / "mnt")
    said = fails("backup", image, base / "x")
    assert f"{image}:/one, {image}:/two" in said
    done("backup", f"{image}:/two", base / "x")
    assert "has no /three" in fails("backup", f"{image}:/three", base / "y")
    done("restore", base / "x", f"{image}:/three")
    with union(base, base / "tree", f"{image}:/three"):
        check(base / "mnt")


def test_restore_to_what_is_new(base: Path) -> None:
    need("ext4")
    images.make(base / "old.img")
    with union(base, base / "tree", base / "old.img"):
        change(base / "mnt")
    done("backup", base / "old.img", base / "x")
    images.make(base / "new.img")
    done("restore", base / "x", base / "new.img")
    with union(base, base / "tree", base / "new.img"):
        check(base / "mnt")  # where it was: a mount finds it there
    done("restore", base / "x", base / "made")
    with union(base, base / "tree", base / "made"):
        check(base / "mnt")
    done("backup", base / "made", base / "y")  # of a directory: as a mount has it, by its base
    images.make(base / "other.img")
    done("restore", base / "y", base / "other.img")
    with union(base, base / "tree", base / "other.img"):
        check(base / "mnt")
    assert "old changes" not in done("restore", "--keep", base / "x", base / "fresh")
    assert [n for n in listing(base) if n.startswith("fresh")] == ["fresh"]
    for new in ("none.img", "none.img:/x", "none.xfs"):
        said = fails("restore", base / "x", base / new)
        assert f"unionfs store create {base / new.partition(':')[0]} --size" in said
    assert "there is no /dev/mapper/none" in fails("restore", base / "x", "/dev/mapper/none")
    (base / "bad").write_bytes((base / "x").read_bytes()[:-100])
    assert "damaged" in fails("restore", base / "bad", base / "vain")
    assert not (base / "vain").exists()


@pytest.mark.parametrize(
    "change_",
    [{"store": 7}, {"base": [1]}, {"base": {"name": "a\0b"}}, {"bytes": None}, {"created": None}],
)
def test_a_header_that_means_nothing(tmp_path: Path, change_: dict[str, object]) -> None:
    header = {"kind": "unionfs-backup", "version": 1, "created": "now", "store": "s", "id": None}
    (tmp_path / "x").write_bytes(
        archive._frame(json.dumps({**header, "base": None, "bytes": 1, **change_}).encode())
    )
    with open(tmp_path / "x", "rb") as file, pytest.raises(UnionfsError, match="not understood"):
        archive.read_header(file, "x")


@pytest.mark.parametrize(
    ("store", "name", "place"),
    [
        ("s.img:/a/dir", "base", "/a/dir"),
        ("LABEL=x:/a/../dir", None, "/dir"),
        ("/srv/up", "base", f"/persistent_base/{ARCH}"),
        ("/srv/up", "../base", None),
        ("/srv/up", "..", None),
        ("/srv/up", None, None),
    ],
)
def test_where_a_backup_lay(store: str, name: str | None, place: str | None) -> None:
    named = {"name": name} if name is not None else None
    header = archive.Header(created="", store=store, bytes=1, base=named)
    assert backing.place_of(header) == place


def test_what_a_header_says_is_printed_as_text(base: Path) -> None:
    up, file = base / "up", base / "x"
    up.mkdir()
    with union(base, base / "tree", up):
        change(base / "mnt")
    done("backup", up, file)
    with file.open("rb") as source:
        header = archive._asdict(archive.read_header(source, "x"))
        rest = source.read()
    for text in ("\x1b[31mred\n", "\ud800"):
        strange = {"kind": "unionfs-backup", "version": 1, **header, "created": text, "store": text}
        file.write_bytes(archive._frame(json.dumps(strange).encode()) + rest)
        for words in (["--verify", file], [file, up]):
            told = done("restore", *words)
            assert told.count("\n") == 1
            assert told.strip().isprintable()


@pytest.mark.parametrize("path", ["../out", "link/out", "", "a/../../out", ".", "a//b"])
def test_a_list_of_sockets_leads_nowhere_else(tmp_path: Path, path: str) -> None:
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/link").symlink_to("..")
    line = json.dumps({"path": path, "mode": 0o600, "owner": [0, 0], "mtime": 0}).encode()
    with pytest.raises((UnionfsError, OSError)):
        sockets.make(str(tmp_path / "in"), line)
    assert listing(tmp_path) == ["in"]
    assert listing(tmp_path / "in") == ["a", "link"]


def test_header_is_readable() -> None:
    frame = archive._frame(b"{}")
    assert frame[:4] == bytes([0x5E, 0x2A, 0x4D, 0x18]), "a skippable frame of RFC 8878"


def ids(*places: object) -> list[str]:
    return [facts("info", place)["uppers"][0]["id"] for place in places]


def test_the_id_of_what_is_restored(base: Path) -> None:
    """A store that is restored stays what it is; a copy of it elsewhere is another one."""
    need("ext4")
    image = images.make(base / "s.img")
    for name in ("one", "two"):
        with union(base, base / "tree", f"{image}:/{name}"):
            change(base / "mnt")
    before = {u["directory"]: u["id"] for u in facts("info", image)["uppers"]}
    wait_until(lambda: not images.loops_of(image))
    done("backup", f"{image}:/one", base / "x")
    done("restore", base / "x", f"{image}:/one")
    done("restore", base / "x", f"{image}:/two")
    done("restore", base / "x", f"{image}:/beside")
    after = {u["directory"]: u["id"] for u in facts("info", image)["uppers"]}
    assert {name: after[name] for name in before} == before
    assert len(set(after.values())) == 3
    done("restore", base / "x", base / "up")
    assert ids(base / "up")[0] not in after.values()
    image.unlink()
    images.make(image)
    done("restore", base / "x", f"{image}:/one")
    assert ids(image) == [before["/one"]], "it was lost, and is there again"
    with union(base, base / "tree", f"{image}:/one"):
        check(base / "mnt")
