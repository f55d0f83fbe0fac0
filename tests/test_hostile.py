# SPDX-License-Identifier: GPL-2.0-or-later
"""What a hostile user tries: forged marks, names that are ours, races by symbolic links, depth."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rig.mounted import Unionfs

pytestmark = pytest.mark.root


def union(place: Path) -> Unionfs:
    for name in ("lower", "upper", "mnt"):
        (place / name).mkdir(exist_ok=True)
    return Unionfs([place / "lower"], place / "upper", place / "mnt")


def error_of(call: Callable[..., object], *args: object) -> int:
    try:
        call(*args)
    except OSError as exc:
        return exc.errno or 0
    return 0


def as_user(code: str) -> str:
    """Lines of Python by an ordinary user; what they print."""
    prefix = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--"]
    done = subprocess.run(
        [*prefix, sys.executable, "-c", f"import os, stat\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REDIRECTS = {
    "parent": "../secret",
    "root-parent": "../..",
    "absolute-dots": "/../secret",
    "inner-dots": "/d/../../secret",
    "symlink": "/symlink",
    "relative-symlink": "symlink",
    "through-symlink": "/symlink/inner",
    "area": "/.unionfs",
    "root": "/",
    "dot": "/.",
    "double-slash": "//d",
    "trailing-slash": "/d/",
    "empty": "",
    "nothing": "/nothing",
    "itself": "/itself",
    "too-long": "/" + "a/" * 1500,
}


def test_redirects_out_of_the_layers(place: Path) -> None:
    """Refused with EIO or leading to nothing; never followed, and the rest of the tree is there."""
    u = union(place)
    (place / "secret" / "inner").mkdir(parents=True)
    (place / "secret" / "file").write_text("secret")
    (u.lowers[0] / "d").mkdir()
    (u.lowers[0] / "d" / "x").write_text("x")
    (u.lowers[0] / "symlink").symlink_to(place / "secret")
    for name, value in REDIRECTS.items():
        (place / "upper" / name).mkdir()
        os.setxattr(place / "upper" / name, "trusted.overlay.redirect", value.encode())
        copy = place / "upper" / f"copy-{name}"
        copy.write_bytes(b"\0" * 6)
        os.setxattr(copy, "trusted.overlay.metacopy", b"")
        os.setxattr(copy, "trusted.overlay.redirect", f"{value}/file".encode())
    u.expected = ["refused the redirect", "data are in no lower layer", "readdir"]
    with u:
        for name in REDIRECTS:
            found: list[str] = []
            code = error_of(lambda path, found: found.extend(os.listdir(path)), u.mnt / name, found)
            assert code in (0, errno.EIO), name
            assert found == [], name
            assert error_of((u.mnt / f"copy-{name}").read_bytes) == errno.EIO, name
        # Damaged entries hide none of the others.
        assert {"d", "symlink", "area", "nothing"} <= set(os.listdir(u.mnt))
        assert (u.mnt / "d" / "x").read_text() == "x"


def test_one_directory_shown_twice(place: Path) -> None:
    u = union(place)
    (u.lowers[0] / "d" / "sub").mkdir(parents=True)
    (u.lowers[0] / "d" / "x").write_text("x")
    for name in ("a", "b", "b/loop"):
        (place / "upper" / name).mkdir()
        os.setxattr(place / "upper" / name, "trusted.overlay.redirect", b"/d")
    with u:
        paths = [u.mnt / name for name in ("a", "b", "d", "b/loop")]
        assert len({path.stat().st_ino for path in paths}) == 4
        (u.mnt / "a" / "x").write_text("a")
        os.rename(u.mnt / "a" / "sub", u.mnt / "a" / "moved")
        assert (u.mnt / "b" / "sub").is_dir()
        os.rename(u.mnt / "a", u.mnt / "b" / "loop" / "a")
        u.remount()
        assert sorted(os.listdir(u.mnt / "b" / "loop" / "a")) == ["moved", "x"]
        assert (u.mnt / "b" / "loop" / "a" / "x").read_text() == "a"


def test_names_and_attributes_of_ours(place: Path) -> None:
    """By a user inside root's union: nothing he sets or makes is read as a mark."""
    u = union(place)
    low = u.lowers[0]
    (low / "his").mkdir()
    (low / "his" / "below").write_text("below")
    os.chown(low / "his", 1000, 1000)
    (low / "file").write_text("1")
    os.setxattr(low / "file", "trusted.secret", b"1")
    with u:
        u.mnt.chmod(0o777)
        out = as_user(f"""
os.chdir({str(u.mnt)!r})
def refused(call, *args):
    try:
        call(*args)
    except OSError:
        return
    print('not refused', call, args)
for call in (os.mkdir, os.listdir, os.unlink, os.rmdir, os.mkfifo):
    refused(call, '.unionfs')
refused(os.symlink, 'x', '.unionfs')
os.mkdir('made')
refused(os.rename, 'made', '.unionfs')
refused(os.mknod, 'his/below', stat.S_IFCHR, 0)
refused(os.mknod, 'his/new', stat.S_IFCHR, 0)
for name in ('opaque', 'redirect', 'metacopy', 'origin', 'nlink', 'unionfs.ino'):
    refused(os.setxattr, 'his', 'trusted.overlay.' + name, b'y')
    os.setxattr('his', 'user.overlay.' + name, b'y')
refused(os.setxattr, 'his', 'user.fuseoverlayfs.opaque', b'y')
for name in ('.wh.below', '.wh..wh..opq', '.unionfs'):
    open('his/' + name, 'w').close()
if os.listxattr('file'): print('listed', os.listxattr('file'))
refused(os.getxattr, 'file', 'trusted.overlay.origin')
""")
        assert out == ""
        u.remount()
        assert (u.mnt / "his" / "below").read_text() == "below"
        assert set(os.listdir(u.mnt / "his")) == {"below", ".wh.below", ".wh..wh..opq", ".unionfs"}


def test_symlinks_put_in_the_way(place: Path) -> None:
    """Directories of the upper change places with symbolic links while the daemon works in them:
    what lies at the links' ends stays as it is."""
    u = union(place)
    outside = place / "outside"
    outside.mkdir()
    for name in ("f", "g"):
        (outside / name).write_text("outside")
    for name in ("d", "d/e"):
        (u.lowers[0] / name).mkdir()
    for name in ("d/f", "d/g", "d/e/f"):
        (u.lowers[0] / name).write_text("lower")
    u.expected = [""]
    stop = threading.Event()

    def swap() -> None:
        upper = place / "upper"
        while not stop.is_set():
            for name in ("d/e", "d"):
                if (upper / name).is_dir() and not (upper / name).is_symlink():
                    os.rename(upper / name, upper / "away")
                    os.symlink(outside, upper / name)
                    time.sleep(0.001)
                    os.unlink(upper / name)
                    os.rename(upper / "away", upper / name)

    with u:
        (u.mnt / "d" / "e" / "f").write_text("1")
        thread = threading.Thread(target=swap)
        thread.start()
        before = {path: path.stat() for path in [outside, *outside.iterdir()]}
        end = time.monotonic() + 3
        count = 0
        while time.monotonic() < end:
            count += 1
            for call in (
                lambda: (u.mnt / "d" / "f").write_text("mine"),
                lambda: (u.mnt / "d" / "e" / "g").write_text("mine"),
                lambda new=f"new{count}": (u.mnt / "d" / new).mkdir(),
                lambda: (u.mnt / "d" / "g").chmod(0o600),
                lambda: os.rename(u.mnt / "d" / "e" / "g", u.mnt / "d" / "e" / "f"),
                lambda: os.setxattr(u.mnt / "d", "user.x", b"1"),
                lambda: (u.mnt / "d" / "e" / "f").unlink(),
                lambda: os.listdir(u.mnt / "d" / "e"),
            ):
                error_of(call)
        stop.set()
        thread.join()
        assert sorted(os.listdir(outside)) == ["f", "g"]
        for path, was in before.items():
            now = path.stat()
            assert (now.st_mode, now.st_mtime_ns, now.st_ctime_ns) == (
                was.st_mode,
                was.st_mtime_ns,
                was.st_ctime_ns,
            ), path
        assert u.process is not None
        assert u.process.poll() is None


def test_deep_trees(place: Path) -> None:
    """No limit of depth, neither of the lower's nor of what is made, by relative steps."""
    u = union(place)

    def down(top: Path, depth: int, *, make: bool) -> int:
        fd = os.open(top, os.O_RDONLY)
        for _ in range(depth):
            if make:
                os.mkdir("deep-name", dir_fd=fd)
            below = os.open("deep-name", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        return fd

    fd = down(u.lowers[0], 2000, make=True)
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd))
    os.mkdir("dir", dir_fd=fd)
    os.close(fd)
    with u:
        fd = down(u.mnt, 2000, make=False)
        leaf = os.open("leaf", os.O_WRONLY | os.O_APPEND, dir_fd=fd)
        os.write(leaf, b"written")
        os.close(leaf)
        # Its place below is too far for a redirect: mv(1) then copies.
        code = error_of(lambda: os.rename("dir", "moved", src_dir_fd=fd, dst_dir_fd=fd))
        assert code == errno.EXDEV
        for _ in range(8000):
            os.mkdir("x", dir_fd=fd)
            below = os.open("x", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        # The daemon lets go of the descriptors on the way, then needs them all.
        for count in range(300):
            (u.mnt / f"d{count}").mkdir()
        os.mkdir("last", dir_fd=fd)
        assert os.listdir(fd) == ["last"]
        os.close(fd)
        # An upper that comes without its area is examined first.
        u.umount()
        subprocess.run(["rm", "-rf", "--", place / "upper" / ".unionfs"], check=True)
        u.mount()
        fd = down(u.mnt, 2000, make=False)
        assert sorted(os.listdir(fd)) == ["dir", "leaf", "x"]
        assert os.stat("leaf", dir_fd=fd).st_size == 7
        os.close(fd)
    for top in (u.lowers[0], place / "upper"):
        # rm(1) of these depths works by relative steps; shutil.rmtree does not.
        subprocess.run(["rm", "-rf", "--", top], check=True)
