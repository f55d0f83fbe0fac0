# SPDX-License-Identifier: GPL-2.0-or-later
"""The layers of the samples, and the changes made through the union that is being frozen.

Each step leaves one kind of mark on disk. A step that its author (an ordinary user, kernel
overlayfs without redirects, fuse-overlayfs) refuses is left out and named in the sample.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.rig import syscalls
from tests.rig.syscalls import RENAME_EXCHANGE

LARGE = 100_000  # more than unionfs's threshold for metadata-only copies
OLD = 1_000_000_000_123_456_789
# ENOENT: what an earlier step, refused, would have made.
REFUSALS = (
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.ENOTSUP,
    errno.EINVAL,
    errno.EIO,
    errno.ENOENT,
)
# cap_net_raw+ep, version 2
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)


def is_root() -> bool:
    """Of the machine, not of a user namespace."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split()[2] == "4294967295"


def large(word: str) -> bytes:
    return (word.encode() + b"\n") * (LARGE // (len(word) + 1))


def build(place: Path) -> list[Path]:
    """Two lowers, the top-most first, which hide things of each other."""
    prefix = "trusted.overlay." if is_root() else "user.overlay."
    base, top = place / "lower-base", place / "lower-top"
    for path in ("dir/sub/deep", "gone-dir", "again", "swap-a", "swap-b", "hidden", "moved/inner"):
        (base / path).mkdir(parents=True)
    for path in ("dir/a", "dir/b", "dir/sub/c", "dir/sub/deep/d", "gone", "gone-dir/e", "again/f"):
        (base / path).write_text(f"{path} of the base\n")
    for path in ("swap-a/x", "swap-b/y", "hidden/never", "moved/inner/g", "moved/h", "covered"):
        (base / path).write_text(f"{path} of the base\n")
    for name in ("large", "large-moved", "large-linked", "large-written"):
        (base / name).write_bytes(large(name))
    (base / "link-1").write_text("three names\n")
    os.link(base / "link-1", base / "link-2")
    os.link(base / "link-1", base / "dir/link-3")
    (base / "symlink").symlink_to("dir/a")
    os.mkfifo(base / "fifo")
    os.setxattr(base / "dir/a", "user.lower", b"kept")
    top.mkdir()
    (top / "dir").mkdir()
    (top / "dir/b").write_text("dir/b of the top\n")
    (top / "hidden").mkdir()
    os.setxattr(top / "hidden", prefix + "opaque", b"y")
    (top / "hidden/instead").write_text("opaque below\n")
    os.mknod(top / "covered", 0o020600, os.makedev(0, 0))
    if is_root():
        os.chown(base / "dir/a", 5, 6)
        os.setxattr(base / "dir/b", "security.capability", CAPABILITY)
        os.setxattr(top / "dir/b", "security.capability", CAPABILITY)
    for layer in (base, top):
        for folder, names, files in os.walk(layer, topdown=False):
            for name in (*names, *files):
                os.utime(Path(folder, name), ns=(OLD, OLD), follow_symlinks=False)
        os.utime(layer, ns=(OLD, OLD))
    return [top, base]


def rename(source: Path, target: Path, flags: int = 0) -> None:
    syscalls.renameat2(os.fsencode(source), os.fsencode(target), flags)


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def new_files(m: Path) -> None:
    (m / "new").mkdir(mode=0o2750)
    (m / "new/file").write_text("new\n")
    (m / "new/symlink").symlink_to("file")
    os.mkfifo(m / "new/fifo", 0o640)
    (m / os.fsdecode(b"new/\xff bytes\n")).write_text("odd name\n")


def new_xattr(m: Path) -> None:
    os.setxattr(m / "new/file", "user.x", b"\x00\x01value")


def new_device(m: Path) -> None:
    os.mknod(m / "new/null", 0o020666, os.makedev(1, 3))


def owner(m: Path) -> None:
    os.chown(m / "new/file", 7, 8)
    os.chmod(m / "new/file", 0o4755)


def nested_marks(m: Path) -> None:
    space = "trusted" if is_root() else "user"
    os.setxattr(m / "new", f"{space}.overlay.opaque", b"y")


def appended(m: Path) -> None:
    append(m / "dir/a", "and more\n")
    append(m / "dir/b", "and more\n")


def copied_up_symlink(m: Path) -> None:
    os.utime(m / "symlink", ns=(OLD + 1, OLD + 1), follow_symlinks=False)


def copied_up_fifo(m: Path) -> None:
    os.chmod(m / "fifo", 0o600)


def whiteouts(m: Path) -> None:
    (m / "gone").unlink()
    (m / "gone-dir/e").unlink()
    (m / "gone-dir").rmdir()


def opaque_again(m: Path) -> None:
    (m / "again/f").unlink()
    (m / "again").rmdir()
    (m / "again").mkdir()
    (m / "again/fresh").write_text("made anew\n")


def metacopy(m: Path) -> None:
    os.chmod(m / "large", 0o600)


def metacopy_renamed(m: Path) -> None:
    os.chmod(m / "large-moved", 0o640)
    rename(m / "large-moved", m / "dir/sub/large-there")


def metacopy_linked(m: Path) -> None:
    os.chmod(m / "large-linked", 0o640)
    os.link(m / "large-linked", m / "dir/large-too")


def metacopy_written(m: Path) -> None:
    os.chmod(m / "large-written", 0o640)
    append(m / "large-written", "a last line\n")


def directory_renamed(m: Path) -> None:
    rename(m / "moved", m / "there")
    (m / "moved").mkdir()
    (m / "moved/not-the-old").write_text("new directory at an old name\n")


def directory_renamed_within(m: Path) -> None:
    rename(m / "there/inner", m / "there/inner-2")


def directory_renamed_into(m: Path) -> None:
    rename(m / "dir/sub", m / "there/sub")
    rename(m / "there/sub/deep", m / "deep")


def exchanged(m: Path) -> None:
    rename(m / "swap-a", m / "swap-b", RENAME_EXCHANGE)


def hard_link_written(m: Path) -> None:
    append(m / "link-1", "written through the first\n")


def hard_link_added(m: Path) -> None:
    os.link(m / "link-1", m / "link-4")


STEPS: tuple[Callable[[Path], None], ...] = (
    new_files,
    new_xattr,
    new_device,
    owner,
    nested_marks,
    appended,
    copied_up_symlink,
    copied_up_fifo,
    whiteouts,
    opaque_again,
    metacopy,
    metacopy_renamed,
    metacopy_linked,
    metacopy_written,
    directory_renamed,
    directory_renamed_within,
    directory_renamed_into,
    exchanged,
    hard_link_written,
    hard_link_added,
)


def play(mnt: Path, leave_out: Sequence[str] = ()) -> list[str]:
    """Make all the changes; the steps that were refused, with the error."""
    refused = [f"{name}: left out" for name in leave_out]
    for step in STEPS:
        if step.__name__ in leave_out:
            continue
        try:
            step(mnt)
        except OSError as exc:
            if exc.errno not in REFUSALS:
                raise
            refused.append(f"{step.__name__}: {errno.errorcode[exc.errno]}")
    return refused
