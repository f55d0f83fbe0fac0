# SPDX-License-Identifier: GPL-2.0-or-later
"""Uppers that cannot be renamed, replaced by what is moved in them: killed at every step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import ground, images
from tests.test_store_commands import done, facts, fails, listing, store
from tests.test_stores import base, change, check, need, refused, union
from unionfs.errors import UnionfsError
from unionfs.stores import exchange

__all__ = ["base"]

_STEPS = ("rename", "mkdir", "rmdir", "unlink")
_KILLED = 9


def fill(upper: Path, word: str) -> None:
    """An upper with an area."""
    (upper / ".unionfs/work").mkdir(parents=True)
    for path in (".unionfs/note", "file", word):
        (upper / path).write_text(word)
    (upper / "sub").mkdir()
    (upper / "sub" / word).write_text(word)


def content(upper: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted(upper.rglob("*")):
        relative = str(path.relative_to(upper))
        if ".unionfs/before-" not in relative:
            found.append((relative, path.read_text() if path.is_file() else "directory"))
    return found


def replaced(upper: Path, *, keep: bool) -> str | None:
    fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY)
    try:
        into = exchange.begin(fd)
        fill(Path(f"/proc/self/fd/{into}"), "new")
        os.chmod(into, 0o751)
        os.close(into)
        return exchange.complete(fd, keep=keep, stay={"lost+found"})
    finally:
        os.close(fd)


def settled(upper: Path) -> None:
    fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY)
    try:
        exchange.settle(fd)
        assert not exchange.is_cut(fd)
    finally:
        os.close(fd)


def killed_after(number: int, upper: Path, *, keep: bool) -> bool:
    """Replace it in a child, which is gone before so many steps are done; whether it was."""
    child = os.fork()
    if child == 0:
        left = number

        def step(call: Any) -> Any:  # noqa: ANN401
            def run(*words: Any, **named: Any) -> Any:  # noqa: ANN401
                nonlocal left
                if left == 0:
                    os._exit(_KILLED)
                left -= 1
                return call(*words, **named)

            return run

        for name in _STEPS:
            setattr(os, name, step(getattr(os, name)))
        try:
            replaced(upper, keep=keep)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _KILLED)
    return code == _KILLED


@pytest.mark.parametrize("keep", [True, False])
def test_killed_at_every_step(tmp_path: Path, keep: bool) -> None:
    """What is there then, once it is used again, is the old one or the new one, whole."""
    for name in ("old", "new"):
        fill(tmp_path / name, name)
    old, new = content(tmp_path / "old"), content(tmp_path / "new")
    seen = []
    for number in range(1000):
        upper = tmp_path / str(number)
        fill(upper, "old")
        again = killed_after(number, upper, keep=keep)
        settled(upper)
        found = content(upper)
        seen.append(found == new)
        assert found in (old, new), number
        kept = list(upper.glob(".unionfs/before-*"))
        assert len(kept) == (1 if keep and found == new else 0), number
        assert all(content(one) == old for one in kept), number
        if not again:
            break
    assert seen == sorted(seen)
    assert set(seen) == {False, True}


def test_killed_again_and_again(tmp_path: Path) -> None:
    """Also while it is brought to its end."""
    fill(tmp_path / "new", "new")
    fill(tmp_path / "up", "old")
    for number in (14, 9, 12, 21, 17, 25):
        killed_after(number, tmp_path / "up", keep=False)
    replaced(tmp_path / "up", keep=False)
    assert content(tmp_path / "up") == content(tmp_path / "new")
    assert (tmp_path / "up").stat().st_mode & 0o777 == 0o751


def test_what_cannot_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then everything is moved back."""
    fill(tmp_path / "up", "old")
    before = content(tmp_path / "up")
    rename = os.rename

    def refusing(source: str, target: str, **words: Any) -> None:  # noqa: ANN401
        if source == "sub":
            raise PermissionError(1, "no", source)
        rename(source, target, **words)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(UnionfsError, match="cannot move sub"):
        replaced(tmp_path / "up", keep=True)
    assert content(tmp_path / "up") == before


def test_a_root_that_may_not_be_written(tmp_path: Path) -> None:
    """Then nothing is begun: it would come to no end."""
    if os.geteuid() == 0:
        pytest.skip("root may")
    fill(tmp_path / "up", "old")
    before = content(tmp_path / "up")
    fd = os.open(tmp_path / "up", os.O_RDONLY | os.O_DIRECTORY)
    into = exchange.begin(fd)
    fill(Path(f"/proc/self/fd/{into}"), "new")
    os.chmod(into, 0o555)
    with pytest.raises(UnionfsError, match="may not write to"):
        exchange.complete(fd, keep=True, stay=())
    os.close(into)
    os.close(fd)
    assert content(tmp_path / "up") == before


def test_links_of_a_stranger(tmp_path: Path) -> None:
    """A mount removes leftovers in an upper that may be somebody else's."""
    (tmp_path / "up/.unionfs").mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    for name in ("exchange.new", "exchange.old", "exchange.keep"):
        (tmp_path / "up/.unionfs" / name).symlink_to(tmp_path / "precious")
    settled(tmp_path / "up")
    assert (tmp_path / "precious/file").exists()


def test_what_stays(tmp_path: Path) -> None:
    fill(tmp_path / "up", "old")
    (tmp_path / "up/lost+found").mkdir()
    (tmp_path / "up/.unionfs/before-20260101-000000").mkdir()
    (tmp_path / "up/.unionfs/reset-20260101-000000").mkdir()
    kept = replaced(tmp_path / "up", keep=True)
    assert kept is not None
    assert listing(tmp_path / "up") == [".unionfs", "file", "lost+found", "new", "sub"]
    assert (tmp_path / "up/.unionfs/before-20260101-000000").exists()
    assert (tmp_path / "up" / kept / ".unionfs/reset-20260101-000000").exists()


# The verbs


@contextlib.contextmanager
def place_of(base: Path, kind: str) -> Iterator[Path]:
    """A store that cannot be renamed."""
    need("ext4")
    image = images.make(base / "s.img")
    if kind == "image":
        yield base / "s.img:/.."  # a Path would lose the slash
        return
    if os.geteuid() != 0:
        pytest.skip("only root mounts")
    stick = base / "stick"
    stick.mkdir()
    if kind == "bound":
        (base / "elsewhere").mkdir()
        ground.run("mount", "--bind", base / "elsewhere", stick)
    else:
        ground.run("mount", "-o", "loop", image, stick)
    try:
        yield stick
    finally:
        ground.run("umount", stick)


KINDS = pytest.mark.parametrize("kind", ["image", "mounted", "bound"])


@KINDS
def test_reset_and_restore(base: Path, kind: str) -> None:
    with place_of(base, kind) as place:
        with union(base, base / "tree", place):
            change(base / "mnt")
            (base / "mnt/pipe").symlink_to("nowhere")
            (base / "mnt/pipe").unlink()
        done("backup", place, base / "x")
        told = done("reset", place)
        assert "/.unionfs/before-" in told
        with union(base, base / "tree", place):
            assert (base / "mnt/file").read_text() == "lower\n"
            assert (base / "mnt/gone").exists()
            (base / "mnt/later").write_text("x")
        (upper,) = facts("info", place)["uppers"]
        (kept,) = upper["kept"]
        assert kept["size"]
        with union(base, base / "tree", told.split(" in ")[-1].strip()):
            check_but_lost(base / "mnt")
        done("restore", base / "x", place)
        with union(base, base / "tree", place):
            check_but_lost(base / "mnt")
        assert "old changes: .unionfs/before-" in done("restore", "--keep", base / "x", place)
        assert facts("info", place)["uppers"][0]["id"] == upper["id"]
        done("backup", place, base / "y")
        assert (base / "y").stat().st_size < 2 * (base / "x").stat().st_size
        assert "before-" not in ground.run("tar", "--zstd", "-tf", base / "y")
        assert done("reset", place, "--forget").count("forgotten") == 2
        done("reset", place, "--discard")
        assert facts("info", place)["uppers"][0]["kept"] == []
        with union(base, base / "tree", place):
            assert (base / "mnt/file").read_text() == "lower\n"


def check_but_lost(mnt: Path) -> None:
    if (mnt / "lost+found").exists():
        (mnt / "lost+found").rmdir()
    check(mnt)


@KINDS
def test_encrypt_says_what_to_do(base: Path, kind: str) -> None:
    with place_of(base, kind) as place:
        (base / "key").write_text("secret\n")
        said = fails("encrypt", place, "--key-file", base / "key")
        assert "cannot be encrypted as such; " in said
        assert ("root of its file system" in said) == (kind == "image")


@KINDS
def test_other_stores_in_it(base: Path, kind: str) -> None:
    """They are in use, or not; they are no part of it."""
    with place_of(base, kind) as place:
        other = base / "s.img:/other" if kind == "image" else place / "other"
        for upper in (other, place):
            if kind != "image":
                upper.mkdir(exist_ok=True)
            with union(base, base / "tree", upper):
                (base / "mnt/file").write_text("changed\n")
        for words in (["reset", place], ["reset", place, "--discard"]):
            assert "has other stores in it: /other" in fails(*words)
        with union(base, base / "tree", other):
            assert (base / "mnt/file").read_text() == "changed\n"


def test_something_mounted_in_it(base: Path) -> None:
    with place_of(base, "mounted") as place:
        (place / "sub").mkdir()
        ground.run("mount", "-t", "tmpfs", "none", place / "sub")
        try:
            assert "is a mount point in" in fails("reset", place)
        finally:
            ground.run("umount", place / "sub")
        assert listing(place) == ["lost+found", "sub"]


@pytest.mark.parametrize("number", range(8, 24, 3))
def test_mounted_after_a_kill(base: Path, number: int) -> None:
    """A mount brings it to its end; who only reads is told so."""
    up = base / "up"
    up.mkdir()
    with union(base, base / "tree", up):
        change(base / "mnt")
    assert killed_after(number, up, keep=False)
    fd = os.open(up, os.O_RDONLY | os.O_DIRECTORY)
    cut = exchange.is_cut(fd)
    os.close(fd)
    if cut:
        assert "verb that was killed" in fails("backup", up, base / "x")
        assert "verb that was killed" in refused(base / "tree", up, base / "mnt", "-o", "ro")
    with union(base, base / "tree", up):
        if (base / "mnt/new").exists():
            assert (base / "mnt/file").read_text() == "new"
            assert (base / "mnt/gone").exists()
        else:
            check(base / "mnt")
    assert store("check", up).returncode == 0
