# SPDX-License-Identifier: GPL-2.0-or-later
"""What an ordinary user does in unions of his own; test_rootless.py runs each check of it.

Every `check_*` gets the directory that test_rootless.py has prepared and is run as
`python -m tests.rootless NAME PLACE` by the user himself, as the root of a user namespace of his
(unshare -Urm), or as one with subordinate ids. It starts and ends the unions that it needs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rig.mounted import Unionfs

MANY = 120
CAPABILITY = bytes.fromhex("0100000202000000000000000000000000000000")


@contextlib.contextmanager
def union(place: Path, *options: str, name: str = "") -> Iterator[Unionfs]:
    parts = [place / f"{name}{part}" for part in ("mnt", "upper")]
    for part in parts:
        part.mkdir(exist_ok=True)
    with Unionfs([place / "lower"], parts[1], parts[0], options=options) as mounted:
        yield mounted


def error(code: int, call: Callable[..., object], *args: object) -> None:
    """The call fails with this errno."""
    found = 0
    try:
        call(*args)
    except OSError as exc:
        found = exc.errno or 0
    assert found == code, f"errno {found}, expected {errno.errorcode[code]}"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def check_marks(place: Path) -> None:
    """Whiteouts, opaque directories and redirects, and that all is so after a remount."""
    with union(place) as u:
        (u.mnt / "mine").unlink()
        os.rename(u.mnt / "tree", u.mnt / "moved")
        (u.mnt / "tree").mkdir()
        (u.mnt / "tree" / "new").write_text("n")
        assert u.upper is not None
        hole = (u.upper / "mine").lstat()
        assert stat.S_ISCHR(hole.st_mode)
        assert hole.st_rdev == 0
        assert os.getxattr(u.upper / "moved", "user.overlay.redirect") == b"/tree"
        assert os.getxattr(u.upper / "tree", "user.overlay.opaque") == b"y"
        for _ in range(2):
            assert not (u.mnt / "mine").exists()
            assert os.listdir(u.mnt / "tree") == ["new"]
            assert sorted(os.listdir(u.mnt / "moved")) == ["sub", "x"]
            assert (u.mnt / "moved" / "sub" / "y").read_text() == "tree/sub/y"
            u.remount()


def check_metadata_only(place: Path) -> None:
    with union(place) as u:
        assert u.upper is not None
        os.chmod(u.mnt / "big", 0o444)
        assert (u.upper / "big").stat().st_blocks * 512 < 100_000
        want = (place / "lower" / "big").read_bytes()
        os.rename(u.mnt / "big", u.mnt / "tree" / "big")
        for _ in range(2):
            assert (u.mnt / "tree" / "big").read_bytes() == want
            assert mode(u.mnt / "tree" / "big") == 0o444
            u.remount()
        os.chmod(u.mnt / "tree" / "big", 0o644)
        with open(u.mnt / "tree" / "big", "r+b") as file:
            file.write(b"changed")
        u.remount()
        assert (u.mnt / "tree" / "big").read_bytes() == b"changed" + want[7:]


def check_links(place: Path) -> None:
    with union(place) as u:
        inode = (u.mnt / "link1").stat().st_ino
        (u.mnt / "link1").write_text("changed")
        assert (u.mnt / "link2").read_text() == "changed"
        os.link(u.mnt / "link1", u.mnt / "link3")
        (u.mnt / "link2").unlink()
        for _ in range(2):
            assert (u.mnt / "link3").stat().st_ino == inode
            assert (u.mnt / "link1").stat().st_nlink == 2
            u.remount()
        # Of a file that its owner may only read.
        os.link(u.mnt / "linkro1", u.mnt / "linkro3")
        (u.mnt / "linkro1").unlink()
        assert (u.mnt / "linkro2").stat().st_nlink == 2


def check_locked_directory_by_many(place: Path) -> None:
    """The bits that the daemon lends itself there: several at once need them, nobody sees them, and
    they outlive nothing."""
    with union(place) as u:
        here = u.mnt / "dir555"
        failed: list[BaseException] = []
        ended = threading.Event()

        def change(names: range) -> None:
            try:
                for number in names:
                    os.chmod(here / f"many{number}", 0o600)
                    os.setxattr(here / f"many{number}", "user.x", b"y")
            except BaseException as exc:
                failed.append(exc)

        def look() -> None:
            while not ended.is_set():
                found = mode(here)
                if found not in (0o555, 0o511):
                    failed.append(AssertionError(f"mode {found:o}"))
                    return

        shares = [threading.Thread(target=change, args=(range(n, MANY, 8),)) for n in range(8)]
        looking = threading.Thread(target=look)
        for thread in (looking, *shares):
            thread.start()
        os.chmod(here, 0o511)
        for thread in shares:
            thread.join()
        ended.set()
        looking.join()
        assert not failed, failed
        for _ in range(2):
            assert mode(here) == 0o511
            assert {mode(here / f"many{number}") for number in range(MANY)} == {0o600}
            u.remount()


def check_closed_directory(place: Path) -> None:
    """A directory that its owner has closed to himself: what he has open in it, and the other names
    of its files, go on."""
    with union(place) as u:
        (u.mnt / "shut").mkdir()
        os.rename(u.mnt / "big", u.mnt / "shut" / "big")
        os.link(u.mnt / "shut" / "big", u.mnt / "open")
        with open(u.mnt / "shut" / "big", "r+b") as file:
            os.chmod(u.mnt / "shut", 0)
            file.write(b"written")
            file.flush()
            os.fsync(file.fileno())
            os.ftruncate(file.fileno(), 1000)
            os.fchmod(file.fileno(), 0o640)
            os.utime(file.fileno(), ns=(5, 7))
            status = os.fstat(file.fileno())
            assert (status.st_size, status.st_mode & 0o777, status.st_mtime_ns) == (1000, 0o640, 7)
        os.chmod(u.mnt / "shut", 0o755)
        assert os.listdir(u.mnt / "shut") == ["big"]
        (u.mnt / "shut" / "inner").mkdir()
        inner = os.open(u.mnt / "shut" / "inner", os.O_RDONLY)
        os.chmod(u.mnt / "shut", 0)
        os.fsync(inner)
        assert os.listdir(inner) == []
        with pytest.raises(FileNotFoundError):
            os.unlink("none", dir_fd=inner)
        os.close(os.open("made", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=inner))
        os.mkdir("made too", dir_fd=inner)
        assert os.stat("made", dir_fd=inner).st_size == 0
        os.unlink("made", dir_fd=inner)
        os.rmdir("made too", dir_fd=inner)
        os.close(inner)
        assert mode(u.mnt / "shut") == 0
        os.chmod(u.mnt / "shut", 0o755)
        (u.mnt / "shut" / "inner").rmdir()
        os.chmod(u.mnt / "shut", 0o600)
        assert os.listdir(u.mnt / "shut") == ["big"]
        for _ in range(2):
            assert (u.mnt / "open").read_bytes()[:7] == b"written"
            os.setxattr(u.mnt / "open", "user.x", b"y")
            assert os.getxattr(u.mnt / "open", "user.x") == b"y"
            u.remount()


def check_listed_and_not_searched(place: Path) -> None:
    """What was listed without being looked at has its right numbers once it can be."""
    with union(place) as u:
        (u.mnt / "shut").mkdir()
        for number in range(3):
            (u.mnt / "shut" / f"f{number}").touch()
        os.chmod(u.mnt / "shut", 0o444)
        u.remount()
        for _ in range(2):
            assert sorted(os.listdir(u.mnt / "shut")) == ["f0", "f1", "f2"]
        os.chmod(u.mnt / "shut", 0o755)
        for _ in range(2):
            with os.scandir(u.mnt / "shut") as entries:
                for entry in entries:
                    assert entry.inode() == os.stat(entry.path).st_ino


def check_write_only(place: Path) -> None:
    """A metadata-only copy that its owner cannot read gets its data, and keeps what it had."""
    with union(place) as u:
        want = (place / "lower" / "big").read_bytes()
        os.setxattr(u.mnt / "big", "user.x", b"kept")
        os.chmod(u.mnt / "big", 0o200)
        with open(u.mnt / "big", "wb", buffering=0, opener=_without_truncation) as file:
            os.pwrite(file.fileno(), b"changed", 0)
        for _ in range(2):
            assert mode(u.mnt / "big") == 0o200
            u.remount()
        os.chmod(u.mnt / "big", 0o600)
        assert (u.mnt / "big").read_bytes() == b"changed" + want[7:]
        assert os.getxattr(u.mnt / "big", "user.x") == b"kept"


def _without_truncation(path: str, flags: int) -> int:
    return os.open(path, flags & ~(os.O_TRUNC | os.O_CREAT))


def check_locked_directories(place: Path) -> None:
    """Directories that their owner may not write or not read: what the kernel lets him do there."""
    with union(place) as u:
        os.chmod(u.mnt / "dir555" / "f", 0o600)
        os.chmod(u.mnt / "dir555" / "big", 0o600)
        (u.mnt / "dir555" / "f").write_text("written")
        os.rename(u.mnt / "dir555", u.mnt / "renamed555")
        (u.mnt / "hidden").rmdir()
        (u.mnt / "hidden").mkdir(0o555)
        (u.mnt / "hidden2").rmdir()
        (u.mnt / "new300").mkdir(0o300)
        os.rename(u.mnt / "new300", u.mnt / "hidden2")
        fd = os.open(u.mnt / "hidden2" / "f", os.O_CREAT | os.O_WRONLY, 0o600)
        os.write(fd, b"1")
        os.fsync(fd)
        os.close(fd)
        # A directory in which only whiteouts are left, locked, replaced and removed.
        (u.mnt / "full" / "x").unlink()
        os.chmod(u.mnt / "full", 0o555)
        (u.mnt / "plain").mkdir(0o700)
        os.rename(u.mnt / "plain", u.mnt / "full")
        (u.mnt / "full2" / "x").unlink()
        os.chmod(u.mnt / "full2", 0o500)
        (u.mnt / "full2").rmdir()
        for _ in range(2):
            assert (u.mnt / "renamed555" / "f").read_text() == "written"
            assert {"big", "f"} <= set(os.listdir(u.mnt / "renamed555"))
            assert mode(u.mnt / "renamed555") == 0o555
            assert mode(u.mnt / "hidden") == 0o555
            assert mode(u.mnt / "hidden2") == 0o300
            assert mode(u.mnt / "full") == 0o700
            assert os.listdir(u.mnt / "full") == []
            assert not (u.mnt / "full2").exists()
            assert not (u.mnt / "dir555").exists()
            u.remount()


def check_locked_upper(place: Path) -> None:
    """An upper below a directory that its owner may not write, and one with such a root."""
    outer = place / "outer"
    outer.mkdir()
    (outer / "upper").mkdir()
    mnt = place / "mnt"
    mnt.mkdir()
    outer.chmod(0o555)
    with Unionfs([place / "lower"], outer / "upper", mnt) as u:
        (mnt / "mine").write_text("1")
        os.rename(mnt / "tree", mnt / "moved")
        os.chmod(mnt, 0o555)
        os.chmod(mnt / "ro444", 0o400)
        u.remount()
        assert (mnt / "mine").read_text() == "1"
        assert mode(mnt / "ro444") == 0o400
        os.chmod(mnt, 0o755)
    outer.chmod(0o755)


def check_unreadable(place: Path) -> None:
    """Files of the lower that the daemon may not read: renamed, given other modes all the same."""
    with union(place) as u:
        os.rename(u.mnt / "mine000", u.mnt / "renamed000")
        os.chmod(u.mnt / "renamed000", 0o600)
        (u.mnt / "mine200").write_text("replaced")
        u.remount()
        os.chmod(u.mnt / "mine200", 0o600)
        assert (u.mnt / "mine200").read_text() == "replaced"
        if os.geteuid() != 0:
            # What is not there cannot be shown: the error is honest.
            error(errno.EACCES, open, u.mnt / "renamed000")
        else:
            assert (u.mnt / "renamed000").read_text() == "mine000"


def check_of_others(place: Path) -> None:
    """Files of somebody else in a directory of the user's."""
    if not (place / "lower" / "others").exists():
        return
    with union(place) as u:
        if os.geteuid() != 0:
            assert (u.mnt / "others").stat().st_uid == 0
            os.rename(u.mnt / "others", u.mnt / "renamed")
            assert (u.mnt / "renamed").read_text() == "others"
            os.rename(u.mnt / "secret", u.mnt / "renamed2")
            error(errno.EPERM, os.chmod, u.mnt / "suid", 0o777)
            os.rename(u.mnt / "suid", u.mnt / "tree" / "suid")
            # It is the user's own now, so it must not be set-user-ID for him.
            assert mode(u.mnt / "tree" / "suid") == 0o755
            (u.mnt / "group").write_text("written by the group")
            assert (u.mnt / "group").stat().st_gid == 2000
            error(errno.EACCES, os.listdir, u.mnt / "closed")
            os.rename(u.mnt / "closed", u.mnt / "closed2")
            error(errno.EACCES, os.listdir, u.mnt / "closed2")
        else:
            # An id that the namespace does not know is shown as 65534. If it does not know that
            # either, the kernel refuses changes of such inodes.
            name = "others"
            if len(Path("/proc/self/uid_map").read_text().splitlines()) == 1:
                error(errno.EOVERFLOW, os.rename, u.mnt / "others", u.mnt / "renamed")
            else:
                os.rename(u.mnt / "others", u.mnt / "renamed")
                name = "renamed"
            assert (u.mnt / name).stat().st_uid in (0, 65534)
            assert (u.mnt / name).read_text() == "others"


def check_acl(place: Path) -> None:
    """An ACL that names users whom a user namespace does not know is copied up as a mode that
    gives nobody more."""
    if not (place / "lower" / "acl").exists():
        return
    with union(place) as u:
        assert mode(u.mnt / "acl") == 0o674  # group: the mask
        (u.mnt / "acl").write_text("copied up")
        names = os.listxattr(u.mnt / "acl")
        if "system.posix_acl_access" in names:
            assert mode(u.mnt / "acl") == 0o674
        else:
            assert mode(u.mnt / "acl") == 0o644


def check_special_files(place: Path) -> None:
    with union(place) as u:
        os.rename(u.mnt / "fifo", u.mnt / "renamed")
        os.chmod(u.mnt / "renamed", 0o600)
        os.mkfifo(u.mnt / "new", 0o640)
        error(errno.EPERM, os.mknod, u.mnt / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        error(errno.EPERM, os.mknod, u.mnt / "zero", stat.S_IFCHR | 0o666, os.makedev(0, 0))
        os.rename(u.mnt / "symlink", u.mnt / "tree" / "symlink")
        for _ in range(2):
            assert stat.S_ISFIFO((u.mnt / "renamed").stat().st_mode)
            assert mode(u.mnt / "renamed") == 0o600
            assert os.readlink(u.mnt / "tree" / "symlink") == "mine"
            u.remount()


def check_owner_in_namespace(place: Path) -> None:
    """The root of a user namespace with subordinate ids gives files to them."""
    with union(place) as u:
        os.chown(u.mnt / "mine", 5, 6)
        (u.mnt / "new").write_text("1")
        os.chown(u.mnt / "new", 1000, 1000)
        os.setxattr(u.mnt / "new", "security.capability", CAPABILITY)
        for _ in range(2):
            found = (u.mnt / "mine").stat()
            assert (found.st_uid, found.st_gid) == (5, 6)
            assert (u.mnt / "new").stat().st_uid == 1000
            assert os.getxattr(u.mnt / "new", "security.capability")
            u.remount()
        (u.mnt / "new").write_text("2")
        error(errno.ENODATA, os.getxattr, u.mnt / "new", "security.capability")


def check_readonly(place: Path) -> None:
    """A read-only union of an upper reads the marks that were written there."""
    with union(place) as u:
        os.rename(u.mnt / "tree", u.mnt / "moved")
        os.chmod(u.mnt / "big", 0o600)
        (u.mnt / "mine").unlink()
        upper = u.upper
    assert upper is not None
    with Unionfs([place / "lower"], upper, place / "mnt", flags=["--ro"]):
        assert sorted(os.listdir(place / "mnt" / "moved")) == ["sub", "x"]
        assert (place / "mnt" / "big").read_bytes() == (place / "lower" / "big").read_bytes()
        assert not (place / "mnt" / "mine").exists()
        assert not (place / "mnt" / "tree").exists()
        error(errno.EROFS, (place / "mnt" / "x").mkdir)


def run_without_xattrs(place: Path) -> None:
    """Asked for by test_wh.py, which gives an upper without xattrs."""
    with union(place) as u:
        (u.mnt / "f").unlink()
        (u.mnt / "f").mkdir(0o500)
        (u.mnt / "d" / "x").chmod(0o400)
        (u.mnt / "d").chmod(0o555)
        (u.mnt / "d" / "y").chmod(0o400)
        (u.mnt / "full" / "a").unlink()
        (u.mnt / "full" / "b").unlink()
        (u.mnt / "full").chmod(0o500)
        (u.mnt / "full").rmdir()
        (u.mnt / "full").mkdir(0o555)
        error(errno.EXDEV, os.rename, u.mnt / "e", u.mnt / "moved")
        for _ in range(2):
            assert os.listdir(u.mnt / "f") == []
            assert os.listdir(u.mnt / "full") == []
            assert mode(u.mnt / "full") == 0o555
            assert mode(u.mnt / "d") == 0o555
            assert mode(u.mnt / "d" / "y") == 0o400
            u.remount()
        (u.mnt / "d").chmod(0o700)


def main() -> None:
    name, place = sys.argv[1:3]
    globals()[name](Path(place))


if __name__ == "__main__":
    main()
