# SPDX-License-Identifier: GPL-2.0-or-later
"""Make samples anew: `python -m tests.formats.make [--into DIR] NAME...` as root.

Frozen samples are never made again; a new version of the format, or of another author, gets a
sample of a new name. `--into` writes elsewhere, to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.formats import archive, scenario
from tests.rig import as_user, ground, snapshot
from tests.rig.mounted import program

# fuse-overlayfs writes .wh. names where it cannot make a device 0:0, which it can here.
SHIM = """
#include <errno.h>
#include <sys/stat.h>
int mknodat(int dirfd, const char *path, mode_t mode, dev_t dev)
{
    (void)dirfd; (void)path; (void)mode; (void)dev;
    errno = EPERM;
    return -1;
}
"""
KERNEL = "redirect_dir=on,metacopy=on,index=on,xino=off"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    author: Literal["unionfs", "kernel", "fuse-overlayfs"]
    user: bool = False
    options: str = ""
    work: bool = True  # workdir=; else unionfs's own in the upper
    filesystem: Literal["ext4", "ramfs"] = "ext4"  # of the upper
    refuse_devices: bool = False  # as if the upper's file system took no device nodes
    mount_options: str = ""  # what unionfs needs to mount the sample
    kernel_options: str = ""  # what kernel overlayfs needs, "" if it cannot


READ = "redirect_dir=on,metacopy=on,index=off"
RECIPES = {
    "unionfs-root": Recipe(author="unionfs", work=False, kernel_options=READ),
    "unionfs-root-workdir": Recipe(author="unionfs", kernel_options=READ),
    "unionfs-root-wh": Recipe(author="unionfs", work=False, options="whiteout=wh"),
    "unionfs-root-noxattrs": Recipe(author="unionfs", work=False, filesystem="ramfs"),
    "unionfs-user": Recipe(author="unionfs", user=True, work=False),
    "unionfs-user-workdir": Recipe(author="unionfs", user=True),
    "unionfs-user-permissions": Recipe(
        author="unionfs",
        user=True,
        work=False,
        options="xattr_permissions=2",
        mount_options="xattr_permissions=2",
    ),
    "kernel-root": Recipe(author="kernel", options=KERNEL, kernel_options=READ),
    "kernel-user": Recipe(
        author="kernel", user=True, options="userxattr", kernel_options="userxattr"
    ),
    "fuse-overlayfs-root": Recipe(author="fuse-overlayfs"),
    "fuse-overlayfs-root-wh": Recipe(author="fuse-overlayfs", refuse_devices=True),
    "fuse-overlayfs-user": Recipe(author="fuse-overlayfs", user=True),
    "fuse-overlayfs-user-wh": Recipe(author="fuse-overlayfs", user=True, refuse_devices=True),
    "fuse-overlayfs-user-permissions": Recipe(
        author="fuse-overlayfs",
        user=True,
        options="xattr_permissions=2",
        mount_options="xattr_permissions=2",
    ),
}


def upper_home(recipe: Recipe, place: Path) -> Path:
    """Where upper and work lie: beside the lowers, or on a file system of their own."""
    return place / "ram" if recipe.filesystem == "ramfs" else place


def command(recipe: Recipe, place: Path, lowers: list[Path]) -> list[str]:
    stack = ":".join(map(str, lowers))
    home = upper_home(recipe, place)
    options = f"lowerdir={stack},upperdir={home / 'upper'}"
    if recipe.work:
        options += f",workdir={home / 'work'}"
    options += f",{recipe.options}" if recipe.options else ""
    mnt = str(place / "mnt")
    if recipe.author == "unionfs":
        return [*program(), "mount", "-o", options, mnt]
    if recipe.author == "kernel":
        return ["mount", "-t", "overlay", "overlay", "-o", options, mnt]
    shim = ["env", f"LD_PRELOAD={place / 'shim.so'}"] if recipe.refuse_devices else []
    return [*shim, "fuse-overlayfs", "-o", options, mnt]


@contextlib.contextmanager
def mounted(recipe: Recipe, place: Path, lowers: list[Path]) -> Iterator[Path]:
    words, mnt = command(recipe, place, lowers), place / "mnt"
    if recipe.author != "fuse-overlayfs":
        ground.run(*words)
        yield mnt
        unmount(recipe, mnt)
        return
    # In the foreground: its plain umount returns before it has ended.
    with subprocess.Popen([*words, "-f"]) as process:
        while not ground.mounts_below(mnt):
            if process.poll() is not None:
                raise RuntimeError(f"fuse-overlayfs: exit {process.returncode}")
            time.sleep(0.02)
        yield mnt
        unmount(recipe, mnt)


def unmount(recipe: Recipe, mnt: Path) -> None:
    if recipe.author == "unionfs":
        ground.run(*program(), "umount", mnt)
    elif recipe.author == "kernel" or os.geteuid() == 0:
        ground.run("umount", mnt)
    else:
        ground.run("fusermount3", "-u", mnt)


def inside(name: str, place: Path) -> None:
    """What is done by the author's user, in the author's namespaces."""
    recipe = RECIPES[name]
    os.umask(0o022)
    mnt = place / "mnt"
    lowers = scenario.build(place)
    home = upper_home(recipe, place)
    for part in (home / "upper", mnt, *([home / "work"] if recipe.work else [])):
        part.mkdir()
    with mounted(recipe, place, lowers):
        # Its copy of a FIFO becomes a regular file that cannot be opened.
        leave_out = ("copied_up_fifo",) if recipe.author == "fuse-overlayfs" else ()
        refused = scenario.play(mnt, leave_out)
    # Seen by a mount of its own, so that nothing comes from a cache.
    with mounted(recipe, place, lowers):
        tree = snapshot.take(mnt)
    told = {
        "lowers": [lower.name for lower in lowers],
        "refused": refused,
        "expected": archive.tree_to_records(tree),
    }
    (place / "told.json").write_text(json.dumps(told))


def make(name: str, into: Path) -> None:
    recipe = RECIPES[name]
    with ground.Ground("unionfs-formats-") as base:
        place = base.filesystem("store", "ext4") / "sample"
        place.mkdir()
        if recipe.filesystem == "ramfs":
            (place / "ram").mkdir()
            ground.run("mount", "-t", "ramfs", "-o", "mode=0755", "ramfs", place / "ram")
        run_author(name, recipe, place)
        sample = collect(name, recipe, place)
    archive.write(into / f"{name}.json", sample)
    print(f"{name}: {len(sample['entries'])} entries, refused: {sample['refused']}")


def run_author(name: str, recipe: Recipe, place: Path) -> None:
    if recipe.refuse_devices:
        (place / "shim.c").write_text(SHIM)
        ground.run("cc", "-shared", "-fPIC", "-o", place / "shim.so", place / "shim.c")
    words = [sys.executable, "-m", "tests.formats.make", "--inside", str(place), name]
    if recipe.user:
        os.chown(place, as_user.UID, as_user.GID)
        done = as_user.run(
            ["unshare", "-Urm", *words] if recipe.author == "kernel" else words, timeout=120
        )
    else:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout}{done.stderr}")


def collect(name: str, recipe: Recipe, place: Path) -> dict[str, Any]:
    told = json.loads((place / "told.json").read_text())
    entries = archive.pack(place, told["lowers"])
    parts = ["upper", "work"] if recipe.work else ["upper"]
    entries += archive.pack(upper_home(recipe, place), parts)
    if recipe.user and recipe.author == "kernel":
        # Seen inside the user namespace, where the user is root.
        for record in told["expected"]:
            record["owner"] = f"{as_user.UID}:{as_user.GID}"
    return {
        "name": name,
        "author": author_version(recipe),
        "kernel": platform.release().split("-")[0],
        "user": recipe.user,
        "options": recipe.options,
        "mount_options": recipe.mount_options,
        "kernel_options": recipe.kernel_options,
        "lowers": told["lowers"],
        "workdir": recipe.work,
        "refused": told["refused"],
        "entries": entries,
        "expected": told["expected"],
    }


def author_version(recipe: Recipe) -> str:
    if recipe.author == "kernel":
        return "Linux overlayfs"
    if recipe.author == "unionfs":
        return ground.run(*program(), "--version").strip()
    words = ground.run("fuse-overlayfs", "--version").splitlines()
    return next(line for line in words if line.startswith("fuse-overlayfs")).replace(":", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=archive.HERE)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    arguments = parser.parse_args()
    if arguments.inside is not None:
        inside(arguments.names[0], arguments.inside)
        return
    if os.geteuid() != 0:
        parser.error("must be run as root")
    ground.isolate()
    for name in arguments.names or RECIPES:
        if arguments.into == archive.HERE and (archive.HERE / f"{name}.json").exists():
            print(f"{name}: frozen already")
            continue
        make(name, arguments.into)


if __name__ == "__main__":
    main()
