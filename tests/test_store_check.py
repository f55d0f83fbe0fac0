# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store check`: what marks lead to, and the index; nothing is repaired that could lose."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.rig import ground, images, snapshot
from tests.test_store_commands import fails, store
from tests.test_stores import base, need, union
from unionfs.stores import rescue
from unionfs.stores.tools import find

__all__ = ["base"]

PREFIX = "trusted.overlay." if os.geteuid() == 0 else "user.overlay."


@pytest.fixture
def filled(base: Path) -> Path:
    """base/up over base/tree: renamed directories, metadata-only copies, names of hard links."""
    tree = base / "tree"
    (tree / "dir/inner").mkdir()
    (tree / "dir/inner/deep").write_text("deep\n")
    (tree / "large").write_bytes(os.urandom(100_000))
    (tree / "dir/large").write_bytes(os.urandom(70_000))
    for number in (1, 2, 3):
        (tree / f"linked{number}").write_text(f"{number}\n")
        os.link(tree / f"linked{number}", tree / f"dir/other{number}")
    (base / "up").mkdir()
    with union(base, tree, base / "up"):
        mnt = base / "mnt"
        (mnt / "dir/inner").rename(mnt / "dir/renamed")
        (mnt / "dir").rename(mnt / "moved")
        (mnt / "large").chmod(0o600)
        (mnt / "moved/large").chmod(0o600)
        (mnt / "linked1").write_text("changed 1\n")
        (mnt / "linked2").write_text("changed 2\n")
        (mnt / "linked2").unlink()
        (mnt / "linked3").write_text("changed 3\n")
    return base


def told(*words: object, code: int) -> dict[str, str]:
    """What is wrong with which path."""
    found = store("check", *words, "--json")
    assert found.returncode == code, found
    said = json.loads(found.stdout)
    return {p["path"]: p["what"] for p in said["problems"]}


def entries(place: Path) -> list[str]:
    return sorted(p.name for p in (place / "up/.unionfs/index").iterdir())


def test_all_is_well(filled: Path) -> None:
    up = filled / "up"
    before = snapshot.take(up)
    assert told(up, "--lower", filled / "tree", code=0) == {}
    found = store("check", up)
    assert found.returncode == 0
    assert "2 redirects and 2 metadata-only copies were not followed: no --lower" in found.stdout
    assert snapshot.take(up) == before
    done = store("check", up, "--lower", filled / "tree", "--repair")
    assert done.returncode == 0, done
    assert snapshot.take(up) == before
    assert len(entries(filled)) == 3


def test_lowers_are_named_as_for_a_mount(filled: Path) -> None:
    need("squashfs")
    (filled / "more").mkdir()
    image = images.squash(filled / "base.squashfs", filled / "tree")
    # The image's files are others than those that the index was made of.
    found = told(filled / "up", "--lower", f"{filled}/more:{image}", code=4)
    assert "its origin is not in these lowers" in "".join(found.values())
    assert len(found) == 1
    words = ("--lower", filled / "more", "--lower", image, "--repair")
    assert told(filled / "up", *words, code=4) == found, "over the tree it is needed"
    (filled / "tree/large").unlink()
    assert told(filled / "up", "--lower", filled / "tree", code=4).keys() == {"/large"}
    told(filled / "up", "--lower", f"{filled}/more:{filled}/tree", code=4)
    assert str(filled / "no") in fails("check", filled / "up", "--lower", filled / "no", code=8)
    assert "empty layer" in fails("check", filled / "up", "--lower", "", code=16)


def test_what_marks_lead_to_is_gone(filled: Path) -> None:
    tree, up = filled / "tree", filled / "up"
    shutil.rmtree(tree / "dir/inner")
    (tree / "large").unlink()
    (tree / "dir/large").write_bytes(b"shorter")
    before = snapshot.take(up)
    expected = {
        "/moved/renamed": "redirect: it leads to no directory in the lowers (/dir/inner)",
        "/large": "its data are missing: the lowers have no file /large",
        "/moved/large": "its data have 7 bytes in the lowers (/dir/large), not 70000",
    }
    assert told(up, "--lower", tree, code=4) == expected
    assert told(up, "--lower", tree, "--repair", code=4) == expected, "there is nothing sound to do"
    assert snapshot.take(up) == before
    assert told(up, code=0) == {}
    # A directory in the way is no file, and the other way round.
    (tree / "large").mkdir()
    (tree / "dir/inner").touch()
    found = told(up, "--lower", tree, code=4)
    assert set(found) == set(expected)


def test_an_opaque_directory_leads_nowhere(filled: Path) -> None:
    up = filled / "up"
    (up / "made").mkdir()
    os.setxattr(up / "made", f"{PREFIX}opaque", b"y")
    (up / "made/copy").write_bytes(bytes(100_000))
    os.setxattr(up / "made/copy", f"{PREFIX}metacopy", b"")
    found = told(up, "--lower", filled / "tree", code=4)
    assert found == {"/made/copy": "its data are missing: the lowers have no file anywhere"}
    os.setxattr(up / "made/copy", f"{PREFIX}redirect", b"/large")
    assert told(up, "--lower", filled / "tree", code=0) == {}


def test_a_relative_redirect_of_the_kernel(filled: Path) -> None:
    up = filled / "up"
    (filled / "tree/old").mkdir()
    (up / "new").mkdir()
    os.setxattr(up / "new", f"{PREFIX}redirect", b"old")
    assert told(up, "--lower", filled / "tree", code=0) == {}
    os.setxattr(up / "new", f"{PREFIX}redirect", b"older")
    assert set(told(up, "--lower", filled / "tree", code=4)) == {"/new"}


def test_redirects_within_the_lowers_count(filled: Path) -> None:
    """A former upper is a lower: what it has renamed is found by its new name."""
    (filled / "top").mkdir()
    lowers = f"{filled}/up:{filled}/tree"
    (filled / "mnt2").mkdir()
    with union(filled, filled / "tree", filled / "up"):
        pass
    made = union(filled, filled / "up", filled / "top")
    made.lowers = [filled / "up", filled / "tree"]
    with made:
        (filled / "mnt/moved/renamed").rename(filled / "mnt/again")
        assert (filled / "mnt/again/deep").read_text() == "deep\n"
    assert told(filled / "top", "--lower", lowers, code=0) == {}
    assert "/again" in told(filled / "top", "--lower", filled / "tree", code=4)


def test_entries_of_the_index(filled: Path) -> None:
    up = filled / "up"
    index = up / ".unionfs/index"
    names = entries(filled)
    assert len(names) == 3
    (index / "strange").write_text("x")
    (index / "00fb").write_text("x")
    other = index / (names[0][:-2] + ("00" if names[0][-2:] != "00" else "11"))
    os.link(index / names[0], other)
    os.setxattr(index / names[1], f"{PREFIX}origin", b"\x00\x00")
    before = snapshot.take(up)
    found = told(up, code=4)
    area = "/.unionfs/index"
    assert found[f"{area}/strange"] == "it is no name of an index"
    assert found[f"{area}/00fb"] == "it has no origin"
    assert found[f"{area}/{other.name}"] == "its origin is another file"
    assert found[f"{area}/{names[1]}"] == "its origin is not understood"
    assert f"{area}/{names[2]}" not in found
    told(up, "--repair", code=4)
    assert snapshot.take(up) == before


def test_an_entry_that_no_name_refers_to(filled: Path) -> None:
    """As a cut between the name and its entry leaves it.  It is moved aside, not removed."""
    up = filled / "up"
    with union(filled, filled / "tree", up):
        kept = up / "linked3"
        name = next(n for n in entries(filled) if os.path.samefile(kept, up / ".unionfs/index" / n))
        ground.run("cp", "-a", kept, filled / "spare")
        (filled / "mnt/linked3").unlink()
        (filled / "mnt/moved/other3").unlink()
        assert name not in entries(filled)
    os.rename(filled / "spare", up / ".unionfs/index" / name)
    assert told(up, code=0) == {}, "only the lowers tell"
    found = told(up, "--lower", filled / "tree", code=4)
    assert found == {f"/.unionfs/index/{name}": "no name refers to it"}
    found = told(up, "--lower", filled / "tree", "--repair", code=1)
    assert found == {f"/.unionfs/index/{name}": "no name refers to it; moved to .unionfs/lost"}
    assert (up / ".unionfs/lost" / name).read_text() == "changed 3\n"
    assert told(up, "--lower", filled / "tree", code=0) == {}
    with union(filled, filled / "tree", up):
        # The other names of the others, which are in the lower alone, still show their copies.
        assert (filled / "mnt/moved/other1").read_text() == "changed 1\n"
        assert (filled / "mnt/moved/other2").read_text() == "changed 2\n"


def test_another_base_is_not_followed(filled: Path) -> None:
    need("squashfs")
    image = images.squash(filled / "base.squashfs", filled / "tree")
    (filled / "up2").mkdir()
    with union(filled, image, filled / "up2"):
        (filled / "mnt/dir").rename(filled / "mnt/moved")
    (filled / "tree/file").write_text("version 2\n")
    shutil.rmtree(filled / "tree/dir")
    second = images.squash(filled / "second.squashfs", filled / "tree")
    found = store("check", filled / "up2", "--lower", second, "--repair")
    assert found.returncode == 0
    assert "nothing was followed into it" in found.stdout
    told(filled / "up2", "--lower", image, code=0)


def test_uppers_in_an_image(base: Path) -> None:
    need("ext4")
    image = images.make(base / "s.img")
    with union(base, base / "tree", image):
        (base / "mnt/dir").rename(base / "mnt/moved")
    found = store("check", image)
    assert found.returncode == 0
    assert "1 redirects and 0 metadata-only copies were not followed" in found.stdout
    shutil.rmtree(base / "tree/dir")
    (path,) = told(image, "--lower", base / "tree", code=4)
    assert path.endswith("/moved")


def test_names_of_a_link_in_a_read_only_union(base: Path) -> None:
    """The index is read there too: a name that only the lower has shows the copy."""
    os.link(base / "tree/file", base / "tree/link")
    (base / "up").mkdir()
    with union(base, base / "tree", base / "up"):
        (base / "mnt/file").write_text("changed\n")
        number = os.stat(base / "mnt/link").st_ino
    with union(base, base / "tree", base / "up", "ro") as made:
        assert (base / "mnt/link").read_text() == "changed\n"
        assert os.stat(base / "mnt/link").st_ino == os.stat(base / "mnt/file").st_ino == number
        marks = made.status()["marks"]
        assert isinstance(marks, dict)
        assert marks["index"]
    with union(base, base / "tree", base / "up", "ro", "index=off"):
        assert (base / "mnt/link").read_text() == "lower\n"


# A damaged file system


def _damaged(base: Path, *requests: str) -> Path:
    """An ext4 with an upper, on which debugfs did this."""
    need("ext4")
    debugfs = find("debugfs")
    if debugfs is None:
        pytest.skip("there is no debugfs")
    image = images.make(base / "s.img", megabytes=32)
    with union(base, base / "tree", image):
        (base / "mnt/made").mkdir()
        (base / "mnt/made/file").write_text("made\n")
    for request in requests:
        ground.run(debugfs, "-w", "-R", request, image)
    return image


def test_what_can_be_repaired_without_a_loss_is(base: Path) -> None:
    image = _damaged(base, "set_super_value free_blocks_count 5", "clri <11>")
    found = store("check", "--repair", image)
    assert found.returncode == 1, found
    assert "ext4: repaired\n" in found.stdout
    assert store("check", image).returncode == 0


@pytest.mark.parametrize("lost", ["", "/x86"])
def test_an_upper_that_a_repair_takes_away_is_told(base: Path, lost: str) -> None:
    where = "/persistent_tree" + (f"/{os.uname().machine}" if lost else "")
    image = _damaged(base, f"clri {where}")
    found = store("check", "--repair", image, "--json")
    assert found.returncode == 5, found
    said = json.loads(found.stdout)
    assert "by e2fsck -y" in said["filesystem"]
    problems = {p["path"]: p["what"] for p in said["problems"]}
    assert problems[where] == "was there before the repair, and is not any more"
    assert any(path.startswith("/lost+found/#") for path in problems)
    assert any("CLEARED" in note for note in said["notes"])
    found = store("check", "--repair", image)
    assert (found.returncode, found.stdout) == (0, "ext4: clean\nno problem is found\n")


def test_a_root_that_is_lost_is_told(base: Path) -> None:
    image = _damaged(base, "clri <2>")
    found = store("check", "--repair", image)
    assert found.returncode == 5, found
    assert "\n/: could not be read: what was there is in lost+found, or gone\n" in found.stdout


def test_what_xfs_repair_takes_away_is_told(base: Path) -> None:
    need("xfs")
    xfs_db = find("xfs_db")
    if xfs_db is None:
        pytest.skip("there is no xfs_db")
    image = images.make(base / "s.img", "xfs")
    with union(base, base / "tree", f"{image}:/up"):
        pass
    ground.run(xfs_db, "-x", "-c", "path /up", "-c", "write -d core.magic 0", image)
    assert store("check", image).returncode == 4
    found = store("check", "--repair", image)
    assert found.returncode == 1, found
    assert found.stdout.startswith("xfs: repaired\n")
    assert "xfs_repair: cleared inode" in found.stdout
    assert store("check", image).stdout.startswith("xfs: clean\n")


def test_the_first_of_many_are_told() -> None:
    told = rescue.shortened([str(number) for number in range(9)])
    assert told == ["0", "1", "2", "3", "4", "and 4 more like these"]
    assert rescue.shortened(["0"]) == ["0"]
