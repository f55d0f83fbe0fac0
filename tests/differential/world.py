# SPDX-License-Identifier: GPL-2.0-or-later
"""The lowers of one run, from its seed alone, so that a replay finds the same tree.

One to three layers with files of several sizes, hard links, symlinks, special files, xattrs, ACLs,
odd names and modes, whiteouts and opaque directories in the layers above the lowest; every time is
in the past.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
from pathlib import Path
from typing import NamedTuple

from tests.differential import generate
from tests.differential.operations import pattern
from tests.rig import layers
from tests.rig.ground import KINDS, Kind

_SIZES = (0, 1, 100, 4096, 5000, 70_000)
_OWNERS = (0, 0, 0, 1000, 1001)


class Shape(NamedTuple):
    """What differs between seeds beside the tree."""

    seed: int
    filesystem: Kind
    layers: int
    squashed: bool
    workdir: bool
    rotate: bool

    @staticmethod
    def of(seed: int, *, root: bool) -> Shape:
        rotate = seed % 4 == 3
        squashed = root and seed % 5 == 4
        kind = KINDS[seed % len(KINDS)]
        # xfs shows its ACLs a second time, as trusted xattrs that mean nothing in an image.
        kind = "ext4" if squashed and kind == "xfs" else kind
        return Shape(
            seed=seed,
            filesystem=kind,
            layers=1 + seed % 3,
            squashed=squashed,
            # A work directory inside the upper cannot become part of a lower's look.
            workdir=seed % 2 == 1,
            rotate=rotate,
        )


class _Builder:
    def __init__(self, shape: Shape, *, root: bool) -> None:
        self.random = random.Random(f"world {shape.seed}")
        self.root = root
        # Only in the topmost: where a layer above hides one name of two, a union still counts two.
        # After a rotation the index that joins a lower file's names is gone, by design.
        self.links = not shape.rotate
        # Where an ordinary user's files lie is not known to be anything but xfs.
        self.longest = 4095 if root and shape.filesystem != "xfs" else 1023
        self.now = 1_500_000_000_000_000_000

    def layer(self, path: Path, index: int, *, top: bool) -> None:
        files: list[Path] = []
        below = path.with_name(f"lower{index - 1}") if index else None
        self._fill(path, 0, below, files)
        if self.links and top:
            for _ in range(4):
                self._link(path, files)
        self._large(path / "large", index)
        self._stamp(path)

    def _fill(self, folder: Path, depth: int, below: Path | None, files: list[Path]) -> None:
        """`below`: the directory of the next lower that this one is merged with, if any."""
        for name in generate.NAMES:
            roll = self.random.random()
            target = folder / name
            if roll < 0.30:
                self._file(target)
                files.append(target)
            elif roll < 0.50 and depth < 4:
                target.mkdir()
                merged = below / name if below and _is_directory(below / name) else None
                if merged and self.random.random() < 0.3:
                    layers.make_opaque(target)
                    merged = None
                self._fill(target, depth + 1, merged, files)
                self._dress(target, generate.DIRECTORY_MODES[:-2])
            elif roll < 0.57:
                target.symlink_to(
                    self.random.choice((*"abcd", "a/b", "nowhere", "t" * self.longest))
                )
            elif roll < 0.65 and below and os.path.lexists(below / name):
                # Only there: kernel overlayfs lists a whiteout that hides nothing.
                layers.whiteout(target)
            elif roll < 0.69:
                self._special(target)
        if depth == 1 and below is None:
            deep = folder / "deep"
            deep.joinpath(*"abcdefghijklmnopqrst").mkdir(parents=True)

    def _file(self, path: Path) -> None:
        path.write_bytes(bytes(pattern([self.random.randrange(250), self.random.choice(_SIZES)])))
        self._dress(path, generate.MODES)

    def _special(self, path: Path) -> None:
        kinds = [stat.S_IFIFO, stat.S_IFSOCK]
        if self.root:
            kinds.append(stat.S_IFCHR)
        kind = self.random.choice(kinds)
        os.mknod(path, kind | 0o644, os.makedev(1, 3) if kind == stat.S_IFCHR else 0)

    def _dress(self, path: Path, modes: tuple[int, ...]) -> None:
        if self.root:
            os.chown(path, self.random.choice(_OWNERS), self.random.choice(_OWNERS))
        if self.random.random() < 0.2:
            os.setxattr(path, "user.one", b"from the lower")
        if self.root and self.random.random() < 0.1:
            os.setxattr(path, "trusted.one", b"from the lower")
        # An ordinary user must be able to read what the control is copied from.
        least = 0 if self.root else 0o700 if path.is_dir() else 0o600
        path.chmod(self.random.choice(modes) | least)
        roll = self.random.random()
        # tmpfs as a lower has ACLs as well; a file system without them just has fewer tests.
        with contextlib.suppress(OSError):
            if roll < 0.1:
                raw = bytes.fromhex(generate.ACLS[1])
                os.setxattr(path, "system.posix_acl_access", raw)
            if roll < 0.15 and path.is_dir():
                raw = bytes.fromhex(generate.ACLS[2])
                os.setxattr(path, "system.posix_acl_default", raw)
            if self.root and 0.15 < roll < 0.2 and path.is_file():
                raw = bytes.fromhex(generate.CAPABILITY)
                os.setxattr(path, "security.capability", raw)

    def _link(self, top: Path, files: list[Path]) -> None:
        if files:
            folder = self.random.choice([top, *(file.parent for file in files)])
            name = folder / f"link{self.random.randrange(6)}"
            if not os.path.lexists(name):
                os.link(self.random.choice(files), name)

    def _large(self, path: Path, index: int) -> None:
        if index == 0:
            with open(path, "wb") as file:
                file.write(bytes(pattern([3, 3_000_000])))
                file.truncate(5_000_000)

    def _stamp(self, path: Path) -> None:
        for folder, folders, names in os.walk(path, topdown=False):
            for name in sorted(folders) + sorted(names):
                self.now += 86_400_000_000_123
                os.utime(Path(folder, name), ns=(self.now, self.now + 1), follow_symlinks=False)
        os.utime(path, ns=(self.now, self.now))


def _is_directory(path: Path) -> bool:
    """Itself, not what a symlink leads to."""
    return os.path.lexists(path) and stat.S_ISDIR(os.lstat(path).st_mode)


def build(place: Path, shape: Shape, *, root: bool) -> list[Path]:
    """Make the lowers below `place`, top-most first."""
    builder = _Builder(shape, root=root)
    lowers: list[Path] = []
    old = os.umask(0o022)
    try:
        for index in range(shape.layers):
            path = place / f"lower{index}"
            path.mkdir()
            builder.layer(path, index, top=index == shape.layers - 1)
            lowers.insert(0, path)
    finally:
        os.umask(old)
    return lowers
