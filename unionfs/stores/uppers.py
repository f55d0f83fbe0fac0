# SPDX-License-Identifier: GPL-2.0-or-later
"""Checking an upper: its records, what a killed daemon left, its index, every mark in it.

Owns the walk and the rules for a mark by itself; what marks lead to is for references.py.  Called
by examination.py for `unionfs store check`, and by the daemon after an unclean end.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from unionfs import holder
from unionfs.errors import UnionfsError
from unionfs.format import AREA_NAME, Record, parse_record
from unionfs.identity import FILE, parse_store
from unionfs.stores import references
from unionfs.stores.checking import Report
from unionfs.stores.references import Lowers

_PREFIXES: Final = ("trusted.overlay.", "user.overlay.")
_OPAQUE: Final = (b"y", b"x")
_OPAQUE_FILES: Final = (".wh..wh..opq", ".wh..opq")
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_TEMPORARY: Final = re.compile(r"#[0-9a-f]+")
_DEPTH: Final = 400
_LIMIT: Final = 65536
_NAME_MAX: Final = 255
_STEP: Final = 64  # files


@dataclass(slots=True)
class _Directory:
    """One of an upper.  `below`: where it leads to in the lowers; None: nowhere."""

    fd: int
    path: str
    below: bytes | None
    marks: dict[str, bytes]
    depth: int


class UpperCheck:
    """The check of one upper; what is wrong goes to `report`.

    `where` comes before each path in it.  What leads into `lowers` is followed once they are set.
    """

    def __init__(self, upper: int, where: str, report: Report) -> None:
        self._upper = upper
        self._where = where
        self._report = report
        self.lowers: Lowers | None = None
        self._unfollowed = {"redirect": 0, "metacopy": 0}
        self._prefixes: tuple[str, ...] = _PREFIXES  # of the marks that count
        self.directories = 0
        # A cut leaves the hidden name beside its whiteout: removed for all who look at the union.
        self.tell_hidden = True
        # Asked now and then; True: that was enough.
        self.step: Callable[[], bool] = lambda: False

    def area(self, *, repair: bool) -> Record | None:
        """The records, what a cut may have left, and the index; how the upper is written."""
        try:
            area = os.open(AREA_NAME, _OPEN, dir_fd=self._upper)
        except FileNotFoundError:
            return None
        except OSError as exc:
            self._report.add(f"{self._where}/{AREA_NAME}", f"{_wrong(exc)}: no union can have it")
            return None
        try:
            record = self._check_records(area)
            self._check_work(area, repair=repair)
            self._check_owner(area, repair=repair)
            self.index(area, record)
        finally:
            os.close(area)
        return record

    def index(self, area: int, record: Record | None) -> None:
        """The entries of the index, by themselves."""
        if record is not None and record.xattrs is not None:
            self._prefixes = (f"{record.xattrs}.overlay.",)
            for name, what in references.check_index(area, self._prefixes[0]):
                self._report.add(f"{self._where}/{AREA_NAME}/index/{name}", what)

    def marks(self) -> None:
        """Every mark, and where it leads to."""
        for directory in self._walk():
            if self.step():
                return
            self.directories += 1
            self._check_directory(directory)
        redirects, copies = self._unfollowed.values()
        if redirects or copies:
            what = f"{redirects} redirects and {copies} metadata-only copies"
            where = f"{self._where or '/'}: " if self._where else ""
            self._report.notes.append(f"{where}{what} were not followed: no --lower is given")

    # The area

    def _check_records(self, area: int) -> Record | None:
        found: Record | None = None
        for name, parse in (("format", parse_record), (FILE, parse_store)):
            path = f"{self._where}/{AREA_NAME}/{name}"
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=area)
            except FileNotFoundError:
                continue
            except OSError as exc:
                self._report.add(path, f"cannot be read: {os.strerror(exc.errno or errno.EIO)}")
                continue
            with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
                try:
                    record = parse(file.read(_LIMIT), path)
                except UnionfsError as exc:
                    self._report.add(path, exc.message.removeprefix(f"{path} "))
                except OSError as exc:
                    what = f"cannot be read: {os.strerror(exc.errno or errno.EIO)}"
                    self._report.add(path, what)
                else:
                    found = record if isinstance(record, Record) else found
        return found

    def _check_work(self, area: int, *, repair: bool) -> None:
        """Temporaries of a daemon that was killed; the next mount would remove them too."""
        path = f"{self._where}/{AREA_NAME}/work"
        try:
            work = os.open("work", _OPEN, dir_fd=area)
        except FileNotFoundError:
            return
        except OSError as exc:
            self._report.add(path, _wrong(exc))
            return
        try:
            for name in filter(_TEMPORARY.fullmatch, sorted(os.listdir(work))):
                self._check_left(work, name, f"{path}/{name}", repair=repair)
        finally:
            os.close(work)

    def _check_left(self, work: int, name: str, path: str, *, repair: bool) -> None:
        what = "left by a killed daemon"
        try:
            if repair:
                _remove(work, name)
        except OSError as exc:  # something is mounted there ...
            what += f"; cannot be removed: {os.strerror(exc.errno or errno.EIO)}"
            repair = False
        self._report.add(path, what, repaired=repair)

    def _check_owner(self, area: int, *, repair: bool) -> None:
        owner = holder.read_owner(f"/proc/self/fd/{area}")
        if owner is None:
            return
        path = f"{self._where}/{AREA_NAME}/{holder.FILE}"
        what = "the daemon was killed"
        if owner.elsewhere(holder.here()):
            what = f"in use by {owner.who()}, or not unmounted there"
        if repair:
            os.unlink(holder.FILE, dir_fd=area)
        self._report.add(path, what, repaired=repair)

    # The tree

    def _walk(self) -> Iterator[_Directory]:
        """Each directory but the area, open; its `fd` is closed when the next is asked for."""
        root = os.open(".", _OPEN, dir_fd=self._upper)
        stack = [_Directory(root, "", b"", self._marks_of(f"/proc/self/fd/{root}"), 0)]
        try:
            while stack:
                current = stack.pop()
                try:
                    yield current
                    if current.depth < _DEPTH:
                        stack += self._children(current)
                finally:
                    os.close(current.fd)
        finally:
            for left in stack:
                os.close(left.fd)

    def _children(self, parent: _Directory) -> Iterator[_Directory]:
        with os.scandir(parent.fd) as entries:
            names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
        for name in names:
            if not parent.path and name == AREA_NAME:
                continue
            with contextlib.suppress(OSError):
                fd = os.open(name, _OPEN, dir_fd=parent.fd)
                marks = self._marks_of(f"/proc/self/fd/{fd}")
                below = None
                if marks.get("opaque") != b"y" and not _has_opaque_file(fd):
                    below = references.target(
                        parent.below, os.fsencode(name), marks.get("redirect")
                    )
                yield _Directory(fd, f"{parent.path}/{name}", below, marks, parent.depth + 1)

    def _marks_of(self, real: str) -> dict[str, bytes]:
        """The marks that count."""
        found = {}
        for prefix in self._prefixes:
            for mark in ("opaque", "redirect", "metacopy"):
                with contextlib.suppress(OSError):
                    found[mark] = os.getxattr(real, prefix + mark)
        return found

    def _check_directory(self, directory: _Directory) -> None:
        fd, path = directory.fd, f"{self._where}{directory.path}"
        self._check_marks(f"/proc/self/fd/{fd}", path or "/", directory=True)
        self._follow_directory(directory, path)
        with os.scandir(fd) as entries:
            names = sorted(e.name for e in entries)
        for number, name in enumerate(names, 1):
            if number % _STEP == 0 and self.step():
                return
            with contextlib.suppress(FileNotFoundError):  # a union may be at work
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                shown = f"{path}/{name}"
                is_mark = name.startswith(".wh.") and name not in _OPAQUE_FILES
                if is_mark and self.tell_hidden:
                    hidden = name.removeprefix(".wh.")
                    with contextlib.suppress(FileNotFoundError):
                        os.stat(hidden, dir_fd=fd, follow_symlinks=False)
                        self._report.add(shown, f"hides {hidden}, which is beside it")
                if stat.S_ISREG(status.st_mode):
                    self._check_file(directory, name, status, shown)

    def _check_file(
        self, parent: _Directory, name: str, status: os.stat_result, shown: str
    ) -> None:
        real = f"/proc/self/fd/{parent.fd}/{name}"
        marks = self._check_marks(real, shown, directory=False)
        if "metacopy" not in marks:
            return
        if self.lowers is None:
            self._unfollowed["metacopy"] += 1
            return
        below = references.target(parent.below, os.fsencode(name), marks.get("redirect"))
        if wrong := references.wrong_copy(below, status.st_size, self.lowers):
            with contextlib.suppress(OSError):
                if "metacopy" in self._marks_of(real):  # not completed meanwhile
                    self._report.add(shown, wrong)

    def _follow_directory(self, directory: _Directory, path: str) -> None:
        redirect = directory.marks.get("redirect")
        if redirect is None or wrong_mark("redirect", redirect, directory=True):
            return
        if directory.marks.get("opaque") == b"y":
            return
        if self.lowers is None:
            self._unfollowed["redirect"] += 1
        elif wrong := references.wrong_directory(directory.below, self.lowers):
            self._report.add(path, f"redirect: {wrong}")

    def _check_marks(self, real: str, path: str, *, directory: bool) -> dict[str, bytes]:
        """What is wrong with marks by themselves; those that count."""
        found: dict[str, bytes] = {}
        try:
            names = os.listxattr(real)
        except FileNotFoundError:
            return found
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EACCES):
                reason = os.strerror(exc.errno or errno.EIO)
                self._report.add(path, f"its attributes cannot be read: {reason}")
            return found
        for name in names:
            if not name.startswith(_PREFIXES):
                continue
            mark = name.split(".", 2)[2]
            with contextlib.suppress(OSError):
                value = os.getxattr(real, name)
                if wrong := wrong_mark(mark, value, directory=directory):
                    self._report.add(path, f"{name}: {wrong}")
                if name.startswith(self._prefixes):
                    found[mark] = value
        return found


def _wrong(exc: OSError) -> str:
    """Why something is not opened as a directory."""
    kinds = {errno.ENOTDIR: "is no directory", errno.ELOOP: "is a symbolic link"}
    return kinds.get(exc.errno or 0) or f"cannot be opened: {os.strerror(exc.errno or errno.EIO)}"


def _has_opaque_file(fd: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        os.stat(_OPAQUE_FILES[0], dir_fd=fd, follow_symlinks=False)
        return True
    return False


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
        if any(len(part) > _NAME_MAX for part in inner):
            return "a name in it is too long"
    if mark == "metacopy" and directory:
        return "a directory has no data"
    return ""
