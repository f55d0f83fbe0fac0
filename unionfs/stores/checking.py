# SPDX-License-Identifier: GPL-2.0-or-later
"""Checking a store: its file system by its own fsck, then the union's marks in each upper.

Owns the calls of fsck programs and what they mean, as exit codes of fsck(8).  A file system that
is in use is not checked.  Called by `unionfs store check`.
"""

import contextlib
import enum
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from unionfs.errors import UnionfsError
from unionfs.format import AREA_NAME, parse_record
from unionfs.identity import FILE, parse_store
from unionfs.stores import loop
from unionfs.stores.probe import Contents
from unionfs.stores.tools import lines_of, run, tool

_PREFIXES: Final = ("trusted.overlay.", "user.overlay.")
_OPAQUE: Final = (b"y", b"x")
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_TEMPORARY: Final = re.compile(r"#[0-9a-f]+")
_DEPTH: Final = 400


class Code(enum.IntFlag):
    """Exit codes of fsck(8)."""

    OK = 0
    CORRECTED = 1
    UNCORRECTED = 4
    TROUBLE = 8
    USAGE = 16


class Problem(NamedTuple):
    """Something that is not as it should be."""

    path: str
    what: str
    repaired: bool = False


@dataclass(slots=True)
class Report:
    """What was found in a store."""

    filesystem: str = ""  # what fsck said, one line
    code: Code = Code.OK
    problems: list[Problem] = field(default_factory=list)

    def add(self, path: str, what: str, *, repaired: bool = False) -> None:
        """One more problem."""
        self.problems.append(Problem(path, what, repaired))
        self.code |= Code.CORRECTED if repaired else Code.UNCORRECTED


def check_filesystem(contents: Contents, report: Report, *, repair: bool) -> None:
    """Run the fsck of an image or device that nobody uses."""
    path, fstype = contents.path, contents.fstype
    command = _fsck(path, fstype, repair=repair)
    if command is None:
        report.filesystem = f"{fstype} has no fsck"
        return
    done = run(command)
    lines = lines_of(done.stdout + done.stderr)
    code = _meaning(fstype, done.returncode, repair=repair)
    report.code |= code
    said = {Code.OK: "clean", Code.CORRECTED: "repaired", Code.UNCORRECTED: "damaged"}
    report.filesystem = f"{fstype}: {said.get(code, 'could not be checked')}"
    if code & (Code.UNCORRECTED | Code.TROUBLE) and lines:
        report.filesystem += f" ({lines[-1]})"


def _fsck(path: str, fstype: str, *, repair: bool) -> list[str] | None:
    if fstype in ("ext2", "ext3", "ext4"):
        return [tool("e2fsck", "e2fsprogs"), "-f", "-y" if repair else "-n", path]
    # xfs_repair of a dirty log would lose what is in it: mounting replays it.
    if fstype == "xfs":
        return [tool("xfs_repair", "xfsprogs"), *([] if repair else ["-n"]), "-f", path]
    # btrfs has no repair that its makers advise.
    if fstype == "btrfs":
        return [tool("btrfs", "btrfs-progs"), "check", "--readonly", path]
    return None


def _meaning(fstype: str, code: int, *, repair: bool) -> Code:
    if code == 0:
        return Code.OK
    if fstype.startswith("ext"):
        # 2: corrected, and the machine should be started anew: that is for mounted ones.
        corrected = code & 3 and repair
        return Code(code & (4 | 8)) or (Code.CORRECTED if corrected else Code.UNCORRECTED)
    return Code.UNCORRECTED if code in (1, 2) else Code.TROUBLE


def refuse_used(contents: Contents) -> None:
    """Raise an error if the file system is mounted, here or by a union's daemon."""
    path = contents.path
    hint = "unmount it first"
    if stat.S_ISBLK(os.stat(path).st_mode):
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise
            raise UnionfsError(f"{path} is in use", hint=hint) from exc
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        devices = [device for device, _ in loop.devices_of(fd)] if os.geteuid() == 0 else []
    finally:
        os.close(fd)
    if devices:
        raise UnionfsError(f"{path} is in use, by {', '.join(devices)}", hint=hint)


# The union's own marks


def check_upper(upper: int, where: str, report: Report, *, repair: bool) -> None:
    """The records of an upper, what a cut may have left, and every mark in it."""
    try:
        area = os.open(AREA_NAME, _OPEN, dir_fd=upper)
    except FileNotFoundError:
        return
    try:
        _check_records(area, where, report)
        _check_work(area, where, report, repair=repair)
    finally:
        os.close(area)
    for fd, path in _walk(upper):
        _check_directory(fd, f"{where}{path}", report)


def _check_records(area: int, where: str, report: Report) -> None:
    for name, parse in (("format", parse_record), (FILE, parse_store)):
        path = f"{where}/{AREA_NAME}/{name}"
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=area)
        except OSError:
            continue
        with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
            try:
                parse(file.read(65536), path)
            except UnionfsError as exc:
                report.add(path, exc.message.removeprefix(f"{path} "))


def _check_work(area: int, where: str, report: Report, *, repair: bool) -> None:
    """Temporaries of a daemon that was killed; the next mount would remove them too."""
    with contextlib.suppress(FileNotFoundError):
        work = os.open("work", _OPEN, dir_fd=area)
        try:
            for name in sorted(os.listdir(work)):
                if not _TEMPORARY.fullmatch(name):
                    continue
                if repair:
                    _remove(work, name)
                report.add(
                    f"{where}/{AREA_NAME}/work/{name}", "left by a killed daemon", repaired=repair
                )
        finally:
            os.close(work)
    with contextlib.suppress(FileNotFoundError):
        os.stat("owner", dir_fd=area, follow_symlinks=False)
        if repair:
            os.unlink("owner", dir_fd=area)
        report.add(f"{where}/{AREA_NAME}/owner", "the daemon was killed", repaired=repair)


def _remove(parent: int, name: str) -> None:
    from unionfs.work import empty_directory

    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=parent)
        return
    fd = os.open(name, _OPEN, dir_fd=parent)
    try:
        empty_directory(fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


def _walk(upper: int) -> Iterator[tuple[int, str]]:
    """Each directory but the area, as an open descriptor and its path."""
    stack = [(os.open(".", _OPEN, dir_fd=upper), "", 0)]
    try:
        while stack:
            fd, path, depth = stack.pop()
            try:
                yield fd, path
                if depth >= _DEPTH:
                    continue
                with os.scandir(fd) as entries:
                    names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
                for name in names:
                    if path or name != AREA_NAME:
                        with contextlib.suppress(OSError):
                            stack.append(
                                (os.open(name, _OPEN, dir_fd=fd), f"{path}/{name}", depth + 1)
                            )
            finally:
                os.close(fd)
    finally:
        for fd, _, _ in stack:
            os.close(fd)


def _check_directory(fd: int, path: str, report: Report) -> None:
    _check_marks(f"/proc/self/fd/{fd}", path or "/", report, directory=True)
    with os.scandir(fd) as entries:
        names = sorted(e.name for e in entries)
    for name in names:
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        shown = f"{path}/{name}"
        if name.startswith(".wh.") and name not in (".wh..wh..opq", ".wh..opq"):
            hidden = name.removeprefix(".wh.")
            with contextlib.suppress(FileNotFoundError):
                os.stat(hidden, dir_fd=fd, follow_symlinks=False)
                report.add(shown, f"hides {hidden}, which is beside it")
        if stat.S_ISREG(status.st_mode):
            _check_marks(f"/proc/self/fd/{fd}/{name}", shown, report, directory=False)


def _check_marks(real: str, path: str, report: Report, *, directory: bool) -> None:
    try:
        names = os.listxattr(real)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EACCES):
            report.add(path, f"its attributes cannot be read: {os.strerror(exc.errno or 0)}")
        return
    for name in names:
        if not name.startswith(_PREFIXES):
            continue
        mark = name.split(".", 2)[2]
        with contextlib.suppress(OSError):
            value = os.getxattr(real, name)
            if wrong := wrong_mark(mark, value, directory=directory):
                report.add(path, f"{name}: {wrong}")


def wrong_mark(mark: str, value: bytes, *, directory: bool) -> str:
    """What is wrong with a mark; empty if nothing is."""
    if mark == "opaque":
        if not directory:
            return "only a directory can be opaque"
        return "" if value in _OPAQUE else f"{value!r} is neither y nor x"
    if mark == "redirect":
        parts = value.split(b"/")
        if not value or b"\0" in value:
            return "it is empty or has a NUL"
        absolute = value.startswith(b"/")
        if not absolute and len(parts) > 1:
            return "it is neither a name nor an absolute path"
        inner = parts[1:] if absolute else parts
        if any(part in (b"", b".", b"..") for part in inner):
            return "it leaves the layer, or names nothing"
    if mark == "metacopy" and directory:
        return "a directory has no data"
    return ""
