# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes that several processes make to the same few names at once, and what must be true of the
tree afterwards, whoever won. Called by test_storm.py and stress.py.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import stat
from collections import Counter
from pathlib import Path

Tree = dict[str, tuple[object, ...]]

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


def tree(top: Path) -> Tree:
    found: Tree = {}
    for path in sorted(top.rglob("*")):
        st = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(st.st_mode) else ""
        links = 0 if stat.S_ISDIR(st.st_mode) else st.st_nlink
        found[str(path.relative_to(top))] = (st.st_ino, st.st_mode, links, content)
    return found


def check_links(found: Tree) -> None:
    """Each file is said to have as many names as it has."""
    names = Counter(entry[0] for entry in found.values())
    for path, entry in found.items():
        assert entry[2] in (0, names[entry[0]]), f"links of {path}"


def try_change(rng: random.Random) -> str | None:
    """One change below the current directory; an error that nothing excuses, if there was one."""
    try:
        change(rng)
    except OSError as exc:
        if exc.errno in WRONG:
            return repr(exc)
    return None
