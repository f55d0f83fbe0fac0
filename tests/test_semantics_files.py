# SPDX-License-Identifier: GPL-2.0-or-later
"""Regular files: descriptors over a copy-up, memory maps, truncation, locks, what is copied."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig import snapshot
from tests.rig.arena import Arena

BIG = 8 << 20
OLD = 1_000_000_000_123_456_789


def big_lower(arena: Arena, name: str = "big") -> bytes:
    content = os.urandom(1 << 20) * (BIG >> 20)
    (arena.lower / name).write_bytes(content)
    os.utime(arena.lower / name, ns=(OLD, OLD))
    return content


def test_descriptor_opened_before_copy_up_sees_later_writes(arena: Arena) -> None:
    (arena.lower / "f").write_bytes(b"lower content")
    with arena.mounted() as mnt:
        early = os.open(mnt / "f", os.O_RDONLY)
        assert os.pread(early, 5, 0) == b"lower"
        with open(mnt / "f", "r+b") as late:
            late.write(b"UPPER")
        assert os.pread(early, 100, 0) == b"UPPER content"
        assert os.fstat(early).st_ino == os.stat(mnt / "f").st_ino
        os.truncate(mnt / "f", 3)
        assert os.pread(early, 100, 0) == b"UPP"
        assert os.fstat(early).st_size == 3
        os.close(early)


@pytest.mark.without_overlay("kernel overlayfs: a map made before a copy-up shows the old file")
def test_shared_map_made_before_copy_up_is_coherent(arena: Arena) -> None:
    (arena.lower / "f").write_bytes(b"l" * 10_000)
    with arena.mounted() as mnt:
        reader = os.open(mnt / "f", os.O_RDONLY)
        seen = mmap.mmap(reader, 10_000, mmap.MAP_SHARED, mmap.PROT_READ)
        assert seen[5000:5001] == b"l"
        writer = os.open(mnt / "f", os.O_RDWR)
        os.pwrite(writer, b"written", 5000)
        assert seen[5000:5007] == b"written"
        mapped = mmap.mmap(writer, 10_000, mmap.MAP_SHARED)
        mapped[100:106] = b"mapped"
        assert seen[100:106] == b"mapped"
        assert os.pread(reader, 6, 100) == b"mapped"
        mapped.flush()
        mapped.close()
        seen.close()
        os.close(reader)
        os.close(writer)
        arena.remount()
        content = (mnt / "f").read_bytes()
        assert content[100:106] == b"mapped"
        assert content[5000:5007] == b"written"


def test_map_written_without_msync_is_there_after_close(arena: Arena) -> None:
    (arena.lower / "f").write_bytes(b"\0" * 8192)
    with arena.mounted() as mnt:
        fd = os.open(mnt / "f", os.O_RDWR)
        mapped = mmap.mmap(fd, 8192, mmap.MAP_SHARED)
        os.close(fd)
        mapped[4000:4200] = b"x" * 200
        mapped.close()
        assert (mnt / "f").read_bytes()[4000:4200] == b"x" * 200
        arena.remount()
        assert (mnt / "f").read_bytes()[4000:4200] == b"x" * 200


def test_private_map_changes_nothing(arena: Arena) -> None:
    (arena.lower / "f").write_bytes(b"a" * 4096)
    with arena.mounted() as mnt:
        fd = os.open(mnt / "f", os.O_RDONLY)
        mapped = mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        mapped[0:1] = b"b"
        mapped.close()
        os.close(fd)
        assert (mnt / "f").read_bytes()[:1] == b"a"
        assert arena.plain or not (arena.upper / "f").exists()


def test_append_writes_at_the_end_whoever_wrote_before(arena: Arena) -> None:
    (arena.lower / "log").write_bytes(b"one\n")
    with arena.mounted() as mnt:
        first = os.open(mnt / "log", os.O_WRONLY | os.O_APPEND)
        second = os.open(mnt / "log", os.O_WRONLY | os.O_APPEND)
        for number in range(20):
            os.write((first, second)[number % 2], b"%d\n" % number)
        os.close(first)
        os.close(second)
        want = b"one\n" + b"".join(b"%d\n" % number for number in range(20))
        assert (mnt / "log").read_bytes() == want


@pytest.mark.parametrize("change", ["chmod", "chown", "utime", "setxattr", "acl"])
def test_metadata_of_a_large_lower_file_copies_no_data(arena: Arena, change: str) -> None:
    content = big_lower(arena)
    with arena.mounted() as mnt:
        path = mnt / "big"
        if change == "chmod":
            path.chmod(0o600)
        elif change == "chown":
            os.chown(path, os.geteuid(), os.getegid())
        elif change == "utime":
            os.utime(path, ns=(OLD + 1, OLD + 1))
        elif change == "setxattr":
            os.setxattr(path, "user.one", b"1")
        else:
            os.setxattr(path, "system.posix_acl_access", _acl())
        st = path.stat()
        assert st.st_size == BIG
        assert st.st_mtime_ns == (OLD + 1 if change == "utime" else OLD)
        assert st.st_blocks * 512 >= BIG, "the size of what a reader gets, not of the copy"
        if not arena.plain:
            assert (arena.upper / "big").stat().st_size == BIG
            assert snapshot.blocks(arena.upper / "big") < 65536, "data were copied"
        arena.remount()
        assert path.read_bytes() == content
        if not arena.plain:
            assert snapshot.blocks(arena.upper / "big") < 65536, "reading copied data"
        with open(path, "r+b") as file:
            file.seek(BIG - 3)
            file.write(b"end")
        assert path.read_bytes() == content[:-3] + b"end"
        arena.remount()
        assert path.read_bytes() == content[:-3] + b"end"


def _acl() -> bytes:
    entries = ((1, 7, 0xFFFF_FFFF), (2, 4, 1001), (4, 5, 0xFFFF_FFFF), (16, 5, 0xFFFF_FFFF))
    raw = b"\x02\0\0\0"
    for tag, perm, who in (*entries, (32, 4, 0xFFFF_FFFF)):
        raw += tag.to_bytes(2, "little") + perm.to_bytes(2, "little") + who.to_bytes(4, "little")
    return raw


@pytest.mark.parametrize("how", ["open", "truncate", "partly"])
def test_truncation_copies_only_what_stays(arena: Arena, how: str) -> None:
    content = big_lower(arena)
    with arena.mounted() as mnt:
        before = _free(arena)
        if how == "open":
            os.close(os.open(mnt / "big", os.O_WRONLY | os.O_TRUNC))
        elif how == "truncate":
            os.truncate(mnt / "big", 0)
        else:
            os.truncate(mnt / "big", 5000)
        want = content[:5000] if how == "partly" else b""
        assert (mnt / "big").read_bytes() == want
        assert (mnt / "big").stat().st_mtime_ns > OLD
        if not arena.plain:
            assert snapshot.blocks(arena.upper / "big") < 65536
            assert before - _free(arena) < BIG // 2, "data were copied on the way"


def _free(arena: Arena) -> int:
    os.sync()
    info = os.statvfs(arena.place)
    return info.f_bfree * info.f_frsize


def test_truncating_an_empty_lower_file_moves_its_mtime(arena: Arena) -> None:
    """POSIX: a successful O_TRUNC marks the times, also where there is nothing to cut."""
    (arena.lower / "empty").touch()
    os.utime(arena.lower / "empty", ns=(OLD, OLD))
    if arena.backend == "overlay":
        pytest.skip("kernel overlayfs leaves the time of an empty lower file")
    with arena.mounted() as mnt:
        os.close(os.open(mnt / "empty", os.O_WRONLY | os.O_TRUNC))
        assert (mnt / "empty").stat().st_mtime_ns > OLD


def test_holes_stay_holes(arena: Arena) -> None:
    with open(arena.lower / "sparse", "wb") as file:
        file.seek(50 << 20)
        file.write(b"end")
    with arena.mounted() as mnt:
        with open(mnt / "sparse", "r+b") as file:
            file.write(b"start")
        assert (mnt / "sparse").stat().st_size == (50 << 20) + 3
        assert arena.plain or snapshot.blocks(arena.upper / "sparse") < 1 << 20
        with open(mnt / "sparse", "rb") as file:
            assert file.read(8) == b"start\0\0\0"
            file.seek(50 << 20)
            assert file.read() == b"end"


def test_unlinked_open_file_goes_on(arena: Arena) -> None:
    (arena.lower / "f").write_bytes(b"lower")
    (arena.lower / "g").write_bytes(b"other")
    with arena.mounted() as mnt:
        for name in ("f", "g", "new"):
            if name == "new":
                (mnt / name).write_bytes(b"fresh")
            fd = os.open(mnt / name, os.O_RDWR)
            if name == "g":
                os.pwrite(fd, b"O", 0)
            os.unlink(mnt / name)
            st = os.fstat(fd)
            assert st.st_nlink == 0, name
            assert not (mnt / name).exists()
            assert len(os.pread(fd, 100, 0)) == 5
            os.pwrite(fd, b"more content", 5)
            os.ftruncate(fd, 10)
            os.fchmod(fd, 0o600)
            assert os.fstat(fd).st_size == 10
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
            assert os.pread(fd, 100, 5) == b"more "
            os.fsync(fd)
            (mnt / name).write_bytes(b"another file")
            assert os.pread(fd, 100, 5) == b"more "
            assert os.fstat(fd).st_ino != (mnt / name).stat().st_ino
            os.close(fd)


@pytest.mark.without_overlay("kernel overlayfs: EEXIST")
def test_unlinked_file_opened_for_reading_can_be_written_through_proc(arena: Arena) -> None:
    (arena.lower / "f").write_bytes(b"lower")
    with arena.mounted() as mnt:
        fd = os.open(mnt / "f", os.O_RDONLY)
        os.unlink(mnt / "f")
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        os.pwrite(again, b"UPPER", 0)
        assert os.pread(fd, 10, 0) == b"UPPER"
        os.close(again)
        os.close(fd)


@pytest.mark.without_overlay("kernel overlayfs: EEXIST")
def test_unlinked_file_opened_for_reading_can_be_changed(arena: Arena) -> None:
    """One so large that its metadata alone are copied up: those need a name that leads to the data
    below."""
    content = b"lower" * 100_000
    (arena.lower / "f").write_bytes(content)
    with arena.mounted() as mnt:
        fd = os.open(mnt / "f", os.O_RDONLY)
        other = os.open(mnt / "f", os.O_RDONLY)
        os.unlink(mnt / "f")
        os.fchmod(fd, 0o604)
        os.utime(fd, (1, 2))
        os.setxattr(fd, "user.x", b"y")
        assert stat.S_IMODE(os.fstat(other).st_mode) == 0o604
        assert os.fstat(other).st_mtime == 2
        assert os.getxattr(other, "user.x") == b"y"
        assert os.pread(other, len(content) + 1, 0) == content
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        os.pwrite(again, b"UPPER", 5)
        assert os.pread(other, 15, 0) == b"lowerUPPERlower"
        for each in (fd, other, again):
            os.close(each)
        assert not (mnt / "f").exists()


def test_renamed_over_open_file_goes_on(arena: Arena) -> None:
    (arena.lower / "f").write_bytes(b"old file")
    (arena.lower / "g").write_bytes(b"new file")
    with arena.mounted() as mnt:
        fd = os.open(mnt / "f", os.O_RDWR)
        os.rename(mnt / "g", mnt / "f")
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 100, 0) == b"old file"
        os.pwrite(fd, b"OLD", 0)
        assert os.pread(fd, 100, 0) == b"OLD file"
        assert (mnt / "f").read_bytes() == b"new file"
        os.close(fd)


def test_open_file_follows_its_rename(arena: Arena) -> None:
    (arena.lower / "d").mkdir()
    (arena.lower / "d" / "f").write_bytes(b"content")
    with arena.mounted() as mnt:
        fd = os.open(mnt / "d" / "f", os.O_RDWR)
        os.rename(mnt / "d", mnt / "e")
        os.rename(mnt / "e" / "f", mnt / "g")
        os.pwrite(fd, b"CON", 0)
        os.close(fd)
        assert (mnt / "g").read_bytes() == b"CONtent"


def test_fsync_of_files_and_directories(arena: Arena) -> None:
    (arena.lower / "d").mkdir()
    (arena.lower / "d" / "f").write_bytes(b"content")
    with arena.mounted() as mnt:
        for path, flags in ((mnt / "d" / "f", os.O_RDWR), (mnt / "d", os.O_RDONLY)):
            fd = os.open(path, flags)
            os.fsync(fd)
            if path.is_file():
                os.pwrite(fd, b"x", 0)
                os.fdatasync(fd)
            os.fsync(fd)
            os.close(fd)
        os.sync()


def test_locks_between_processes(arena: Arena) -> None:
    (arena.lower / "f").write_bytes(b"content")
    probe = (
        "import fcntl, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "for lock in (fcntl.flock, fcntl.lockf):\n"
        "    try: lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB); print('free')\n"
        "    except BlockingIOError: print('held')\n"
    )

    def ask(path: Path) -> list[str]:
        words = [sys.executable, "-c", probe, str(path)]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()

    with arena.mounted() as mnt:
        fd = os.open(mnt / "f", os.O_RDWR)
        assert ask(mnt / "f") == ["free", "free"]
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert ask(mnt / "f") == ["held", "free"]
        fcntl.flock(fd, fcntl.LOCK_UN)
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)
        assert ask(mnt / "f") == ["free", "held"]
        os.close(fd)
        assert ask(mnt / "f") == ["free", "free"]


def test_flock_taken_before_a_copy_up_holds_after_it(arena: Arena) -> None:
    (arena.lower / "f").write_bytes(b"content")
    with arena.mounted() as mnt:
        reader = os.open(mnt / "f", os.O_RDONLY)
        fcntl.flock(reader, fcntl.LOCK_EX)
        writer = os.open(mnt / "f", os.O_RDWR)
        os.write(writer, b"x")
        with pytest.raises(BlockingIOError):
            fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(reader)
        fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(writer)


def test_opening_for_writing_and_not_writing_keeps_times(arena: Arena) -> None:
    (arena.lower / "f").write_bytes(b"content")
    os.utime(arena.lower / "f", ns=(OLD, OLD))
    os.utime(arena.lower, ns=(OLD, OLD))
    with arena.mounted() as mnt:
        os.close(os.open(mnt / "f", os.O_RDWR))
        assert (mnt / "f").stat().st_mtime_ns == OLD
        assert (mnt / "f").stat().st_atime_ns == OLD


def test_errors_of_open(arena: Arena) -> None:
    (arena.lower / "f").write_bytes(b"content")
    (arena.lower / "d").mkdir()
    (arena.lower / "s").symlink_to("f")
    cases = [
        ("f", os.O_RDWR | os.O_CREAT | os.O_EXCL, errno.EEXIST),
        ("s", os.O_RDWR | os.O_CREAT | os.O_EXCL, errno.EEXIST),
        ("s", os.O_RDWR | os.O_NOFOLLOW, errno.ELOOP),
        ("d", os.O_RDWR, errno.EISDIR),
        ("d", os.O_WRONLY | os.O_CREAT, errno.EISDIR),
        ("f", os.O_RDONLY | os.O_DIRECTORY, errno.ENOTDIR),
        ("f/x", os.O_RDONLY, errno.ENOTDIR),
        ("none", os.O_RDWR, errno.ENOENT),
        ("none/x", os.O_RDWR | os.O_CREAT, errno.ENOENT),
        ("x" * 256, os.O_RDWR | os.O_CREAT, errno.ENAMETOOLONG),
        ("x" * 256, os.O_RDONLY, errno.ENAMETOOLONG),
    ]
    with arena.mounted() as mnt:
        for name, flags, number in cases:
            number_got = 0
            try:
                os.close(os.open(mnt / name, flags))
            except OSError as error:
                number_got = error.errno or 0
            assert number_got == number, (name[:20], flags)
        assert arena.plain or sorted(os.listdir(arena.upper)) in ([], [".unionfs"])


def test_statfs_is_the_uppers(arena: Arena) -> None:
    with arena.mounted() as mnt:
        got, want = os.statvfs(mnt), os.statvfs(arena.place)
    assert (got.f_frsize, got.f_blocks, got.f_namemax) == (want.f_frsize, want.f_blocks, 255)
    assert abs(got.f_bavail - want.f_bavail) < 1000


def test_programs_run_from_lower_and_upper(arena: Arena) -> None:
    (arena.lower / "true").write_bytes(Path("/bin/true").read_bytes())
    (arena.lower / "true").chmod(0o755)
    with arena.mounted() as mnt:
        subprocess.run([mnt / "true"], check=True)
        (mnt / "copy").write_bytes((mnt / "true").read_bytes())
        (mnt / "copy").chmod(0o755)
        subprocess.run([mnt / "copy"], check=True)
        os.chmod(mnt / "true", 0o700)
        subprocess.run([mnt / "true"], check=True)
