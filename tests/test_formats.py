# SPDX-License-Identifier: GPL-2.0-or-later
"""The frozen samples of tests/formats: what was once written is read for ever.

Each sample is unpacked on a file system that its file handles know nothing of, mounted, and must
show the tree its author showed; then it is changed and mounted again. Kernel overlayfs mounts
those that are its own or ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.formats import archive
from tests.rig import as_user, mounted, snapshot
from tests.rig.arena import backends
from tests.rig.mounted import Unionfs
from tests.rig.snapshot import Tree

NAMES = archive.names()
USER_NAMES = [name for name in NAMES if archive.load(name)["user"]]
KERNEL_NAMES = [name for name in NAMES if archive.load(name)["kernel_options"]]
# What fuse-overlayfs shows and nobody else does: its own attributes are hidden only by itself.
FOREIGN = "user.fuseoverlayfs."


def _plain(tree: Tree) -> Tree:
    """Without what depends on the author's program or the user who looks."""
    root = os.geteuid() == 0
    found = {}
    for name, entry in tree.items():
        kept = [(key, value) for key, value in entry.xattrs if not key.startswith(FOREIGN)]
        entry = entry._replace(xattrs=tuple(kept))
        found[name] = entry if root else entry._replace(uid=0, gid=0)
    return found


def _without_index(sample: dict[str, Any], place: Path, tree: Tree) -> Tree:
    """What copying layers takes away, whoever reads them then.

    The index finds a lower file by its file handle, which no other file system has. So those names
    of a copied-up file that only the index knew show the lower file again; the copy keeps the count
    of its links.
    """
    upper = {os.fsencode(record["path"]) for record in sample["entries"]}
    groups: dict[bytes, list[bytes]] = {}
    for name, entry in tree.items():
        groups.setdefault(entry.group, []).append(name)
    found = dict(tree)
    for members in groups.values():
        real = [name for name in members if b"upper/" + name in upper]
        if not real or len(real) == len(members):
            continue
        for name in real:
            found[name] = found[name]._replace(group=real[0])
        lower = _plain(snapshot.take(place / sample["lowers"][-1]))
        lost = [name for name in members if name not in real]
        for name in lost:
            found[name] = lower[name]._replace(group=lost[0])
    return found


def union_of(sample: dict[str, Any], place: Path) -> Unionfs:
    archive.unpack(sample["entries"], place)
    (place / "mnt").mkdir()
    return Unionfs(
        [place / name for name in sample["lowers"]],
        place / "upper",
        place / "mnt",
        work=place / "work" if sample["workdir"] else None,
        options=[sample["mount_options"]] if sample["mount_options"] else [],
    )


def compare(sample: dict[str, Any], place: Path, got: Tree, *, index: bool = True) -> None:
    want = _plain(archive.records_to_tree(sample["expected"]))
    want = _without_index(sample, place, want)
    ignore = []
    if sample["author"].startswith("fuse-overlayfs"):
        ignore.append("links")  # it counts the names that it happens to have seen
    if not index:
        ignore.append("links")
    if sample["user"]:
        # What the user could not read, root can.
        for name, entry in want.items():
            if entry.content == "unreadable":
                want[name] = entry._replace(content=got[name].content)
    snapshot.assert_same(_plain(got), want, f"{sample['name']} shows", ignore=ignore)


def check(name: str, place: Path) -> None:
    """Also run by the ordinary user, in a process of his own."""
    sample = archive.load(name)
    union = union_of(sample, place)
    frozen = [snapshot.take(lower) for lower in union.lowers]
    with union:
        compare(sample, place, snapshot.take(union.mnt))
        change(union.mnt)
        want = snapshot.take(union.mnt)
    # Without attributes the count of an indexed file's links cannot be kept.
    ignore = ["links"] if name == "unionfs-root-noxattrs" else []
    with union:
        got = snapshot.take(union.mnt)
        snapshot.assert_same(got, want, "after changes and a remount", ignore=ignore)
    for lower, tree in zip(union.lowers, frozen, strict=True):
        snapshot.assert_same(snapshot.take(lower), tree, f"lower {lower.name} changed")


def change(mnt: Path) -> None:
    """Go on working in what somebody else has begun."""
    for name in sorted(os.listdir(mnt)):
        path = mnt / name
        kind = path.lstat().st_mode
        if stat.S_ISREG(kind):
            with contextlib.suppress(PermissionError), open(path, "ab") as file:
                file.write(b"changed\n")
            path.rename(mnt / f"{name}-2")
        elif stat.S_ISDIR(kind):
            (path / "made").write_text("here\n")
            try:
                path.rename(mnt / f"{name}-2")
            except OSError as exc:
                if exc.errno != errno.EXDEV:  # an upper that cannot keep redirects
                    raise
            else:
                path.mkdir()
        else:
            path.unlink()


@pytest.mark.root
@pytest.mark.parametrize("name", NAMES)
def test_sample(name: str, place: Path) -> None:
    check(name, place)


@pytest.mark.parametrize("name", USER_NAMES)
def test_sample_as_user(name: str, user_place: Path) -> None:
    if name.endswith("-permissions") and os.geteuid() != 0:
        pytest.skip("its owners and groups are others: only root can become a user in them")
    words = f"from pathlib import Path; from tests.test_formats import check; check({name!r}, "
    done = as_user.python("-c", f"{words}Path({str(user_place)!r}))")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.root
@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_sample_in_the_kernel(name: str, place: Path) -> None:
    """Without the index, which the kernel too refuses on a file system that it was not made on."""
    if "overlay" not in backends():
        pytest.skip("kernel overlayfs not asked for")
    sample = archive.load(name)
    union = union_of(sample, place)
    (place / "kernel-work").mkdir()
    view = mounted.Overlay(
        union.lowers,
        union.upper,
        union.mnt,
        work=place / "kernel-work",
        options=[sample["kernel_options"]],
    )
    with view:
        # Where our area lies in the upper the kernel shows it.
        got = snapshot.take(union.mnt, hide=[b".unionfs"])
    compare(sample, place, got, index=False)


@pytest.mark.root
def test_kernel_refuses_a_user_mark_it_would_misread(place: Path) -> None:
    if "overlay" not in backends():
        pytest.skip("kernel overlayfs not asked for")
    union = union_of(archive.load("unionfs-user-workdir"), place)
    view = mounted.Overlay(
        union.lowers, union.upper, union.mnt, work=place / "work", options=["userxattr"]
    )
    with pytest.raises(RuntimeError, match="mount"):
        view.mount()


@pytest.mark.root
def test_archive_gives_back_what_it_was_given(place: Path) -> None:
    for name in NAMES:
        records = archive.load(name)["entries"]
        (place / name).mkdir()
        archive.unpack(records, place / name)
        parts = [record["path"] for record in records if "/" not in record["path"]]
        assert archive.pack(place / name, parts) == records
