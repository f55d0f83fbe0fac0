# SPDX-License-Identifier: GPL-2.0-or-later
"""Eight processes change the same few names at once; then a remount must show the same tree,
with right link counts, and the daemon must not have complained."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import stat
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.rig.mounted import Unionfs

pytestmark = pytest.mark.root
SECONDS = 3.0
PROCESSES = 8
# What no race between programs explains.
WRONG = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EFAULT, errno.EBADF, errno.EXDEV}


def fill(lower: Path) -> None:
    for d in range(4):
        (lower / f"d{d}" / "s").mkdir(parents=True)
        for f, size in enumerate((0, 10, 5000, 100_000, 1_000_000)):
            (lower / f"d{d}" / f"f{f}").write_bytes(os.urandom(size))
            (lower / f"d{d}" / "s" / f"f{f}").write_bytes(b"s")
        os.link(lower / f"d{d}" / "f1", lower / f"d{d}" / "l")


def pick(rng: random.Random) -> str:
    top = f"d{rng.randrange(4)}"
    if rng.random() < 0.1:
        return f"{top}/s"
    inner = "s/" if rng.random() < 0.4 else ""
    return f"{top}/{inner}{rng.choice(['f0', 'f1', 'f2', 'f3', 'f4', 'l', 'n0', 'n1'])}"


def change(rng: random.Random) -> None:
    kind, a, b = rng.randrange(11), pick(rng), pick(rng)
    if kind == 0:
        with open(a, "ab") as file:
            file.write(b"x" * rng.randrange(5000))
    elif kind == 1:
        os.unlink(a)
    elif kind == 2:
        os.rename(a, b)
    elif kind == 3:
        os.mkdir(f"d{rng.randrange(4)}/s")
    elif kind == 4:
        os.rmdir(a)
    elif kind == 5:
        os.link(a, b)
    elif kind == 6:
        os.chmod(a, rng.choice([0o600, 0o755]))
    elif kind == 7:
        Path(a).read_bytes()
    elif kind == 8:
        for entry in os.scandir(a):
            entry.stat(follow_symlinks=False)
    elif kind == 9:
        os.truncate(a, rng.randrange(3000))
    else:
        with open(a, "w") as file:
            file.write("new")
            os.rename(a, b)


def storm(seed: int, mnt: Path, wrong: multiprocessing.Queue[str]) -> None:
    rng = random.Random(seed)
    os.chdir(mnt)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            change(rng)
        except OSError as exc:
            if exc.errno in WRONG:
                wrong.put(repr(exc))


def tree(top: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        st = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(st.st_mode) else ""
        links = 0 if stat.S_ISDIR(st.st_mode) else st.st_nlink
        found[str(path.relative_to(top))] = (st.st_ino, st.st_mode, links, content)
    return found


@pytest.mark.parametrize("options", ["", "whiteout=wh", "metacopy=off,index=off"])
def test_storm(place: Path, options: str) -> None:
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir()
    fill(place / "lower")
    words = options.split(",") if options else []
    context = multiprocessing.get_context("fork")
    wrong: multiprocessing.Queue[str] = context.Queue()
    with Unionfs([place / "lower"], place / "upper", place / "mnt", options=words) as u:
        arguments = [(seed, u.mnt, wrong) for seed in range(PROCESSES)]
        processes = [context.Process(target=storm, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert wrong.empty(), wrong.get()
        before = tree(u.mnt)
        assert os.listdir(place / "upper" / ".unionfs" / "work") in ([], ["incompat"])
        u.remount()
        assert tree(u.mnt) == before
        if "index=off" not in words:
            names = Counter(entry[0] for entry in before.values())
            for path, entry in before.items():
                assert entry[2] in (0, names[entry[0]]), f"links of {path}"
