# SPDX-License-Identifier: GPL-2.0-or-later
"""A backup: one file, a tar archive in zstd that any tar unpacks, between two frames of our own.

Owns the format.  Does not choose what is read or replaced (backing.py).

    skippable frame      JSON: what this is, of which store, over which base
    zstd frames          tar, with checksums of their own
    skippable frame      JSON: bytes and SHA-256 of the tar stream

zstd(1) and tar(1) pass over skippable frames.  A backup without its last frame was cut.
"""

import contextlib
import hashlib
import json
import os
import select
import struct
import subprocess
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import IO, Any, Final

from unionfs import acl
from unionfs.errors import UnionfsError
from unionfs.stores import sockets
from unionfs.stores.tools import delayed, environment, tool

VERSION: Final = 1
_MAGIC: Final = 0x184D2A5E  # one of the sixteen of skippable frames (RFC 8878)
_FRAME: Final = struct.Struct("<II")
_TRAILER: Final = 256
_CHUNK: Final = 1 << 20
_TAR_CHANGED: Final = 1  # tar's exit code: a file was changed or removed while it was read
_WHOLE: Final = "unionfs-backup"

Advance = Callable[[int], None]


class Changed(UnionfsError):
    """Something was changed while it was read."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a backup tells of itself."""

    created: str
    store: str  # as it was named
    bytes: int  # of the files, as an estimate for progress
    id: str | None = None
    base: dict[str, str] | None = None
    encrypted: str = ""  # how: what is archived is a cipher directory as it is


@dataclass(frozen=True, slots=True)
class Trailer:
    """What the tar stream must be."""

    bytes: int
    sha256: str


def tar_words() -> list[str]:
    """What keeps everything that an upper has (docs/on-disk-format.md, Copying an upper)."""
    pattern = "*" if os.geteuid() == 0 else "user.*"
    return ["--xattrs", f"--xattrs-include={pattern}", "--acls", "--numeric-owner", "--sparse"]


def tar_creating(directory: str, without: Collection[str] = (), beside: str = "") -> list[str]:
    """The command that writes an upper to its standard output, and the list of sockets in `beside`.

    Without what belongs to this place: who holds it, temporaries, inode numbers and what is kept of
    all of it (stores/exchange.py); and `without` these names at its top.
    """
    return [
        tool("tar", "tar"),
        *("-C", directory, "-cf", "-", "--format=posix", *tar_words()),
        *("--exclude=./.unionfs/owner", "--exclude=./.unionfs/work/#*"),
        *("--exclude=./.unionfs/before-*", "--exclude=./.unionfs/exchange.*"),
        *(f"--exclude=./{name}" for name in without),
        *("--exclude=./.unionfs/numbers/*", "--no-wildcards-match-slash", "."),
        *(("-C", beside, f"./{sockets.FILE}") if beside else ()),
    ]


def tar_extracting(directory: str) -> list[str]:
    """The command that unpacks it from its standard input."""
    owner = ["--same-owner"] if os.geteuid() == 0 else []
    words = [*tar_words(), "-p", "--delay-directory-restore", *owner]
    return [tool("tar", "tar"), "-C", directory, "-xf", "-", *words]


def write(
    target: IO[bytes],
    header: Header,
    directory: str,
    advance: Advance,
    without: Collection[str] = (),
) -> Trailer:
    """Archive a directory, but for some names at its top.

    The caller makes the file durable and gives it its name.
    """
    head = {"kind": _WHOLE, "version": VERSION, **_asdict(header)}
    target.write(_frame(json.dumps(head).encode()))
    target.flush()
    digest, count = hashlib.sha256(), 0
    errors = os.memfd_create("tar")
    with open(errors, "w+b") as said, contextlib.ExitStack() as started:
        beside = _list_beside(started, sockets.listed(directory, without))
        with delayed():
            tar = subprocess.Popen(
                tar_creating(directory, without, beside),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                env=environment(),
                pipesize=_CHUNK,
            )
            pack = subprocess.Popen(
                [tool("zstd", "zstd"), "-q", "-c", "-3", "-T0", "--check"],
                stdin=subprocess.PIPE,
                stdout=target,
                stderr=said,
            )
            started.callback(_end, tar, pack)
        failed = f"the backup of {header.store} failed"
        assert tar.stdout is not None
        assert pack.stdin is not None
        try:
            while data := _read_next(tar, advance):
                digest.update(data)
                pack.stdin.write(data)
                count += len(data)
                advance(len(data))
            pack.stdin.close()
            if tar.wait() == _TAR_CHANGED:
                raise Changed(f"{failed}: {_last(said, 'a file changed')}")
            if tar.returncode or pack.wait():
                raise UnionfsError(f"{failed}: {_last(said, 'tar or zstd ended early')}")
        except BrokenPipeError:
            pack.wait()
            why = _last(said, "zstd ended early; is the disk full?")
            raise UnionfsError(f"{failed}: {why}") from None
    trailer = Trailer(count, digest.hexdigest())
    tail = json.dumps({"kind": _WHOLE, **_asdict(trailer)}).encode().ljust(_TRAILER)
    target.write(_frame(tail))
    return trailer


def _list_beside(stack: contextlib.ExitStack, lines: bytes) -> str:
    """A directory with the list of sockets where tar will find it, or "" if there are none."""
    if not lines:
        return ""
    beside = stack.enter_context(tempfile.TemporaryDirectory(prefix="unionfs-"))
    path = f"{beside}/{sockets.FILE}"
    os.mkdir(os.path.dirname(path))
    with open(path, "wb") as file:
        file.write(lines)
    return beside


def _read_next(tar: "subprocess.Popen[bytes]", advance: Advance) -> bytes:
    """What tar has ready.  While it looks for holes it says nothing, but gets on."""
    assert tar.stdout is not None
    fd = tar.stdout.fileno()
    worked = b""
    while not select.select([fd], [], [], 1.0)[0]:
        with open(f"/proc/{tar.pid}/stat", "rb") as file:
            now = b" ".join(file.read().rpartition(b")")[2].split()[11:13])  # utime, stime
        if now != worked:
            advance(0)
        worked = now
    return os.read(fd, _CHUNK)


def _asdict(record: Header | Trailer) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__slots__}


def _frame(data: bytes) -> bytes:
    return _FRAME.pack(_MAGIC, len(data)) + data


def _end(*processes: "subprocess.Popen[bytes]") -> None:
    for process in processes:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if process.poll() is None:
            process.kill()
        process.wait()


def _last(said: IO[bytes], other: str) -> str:
    said.seek(0)
    lines = os.fsdecode(said.read(65536)).strip().splitlines()
    return lines[0] if lines else other


def read_header(source: IO[bytes], path: str) -> Header:
    """What a backup is of; the file is then at the archive."""
    found = _read_frame(source, path)
    if found.get("version") != VERSION:
        hint = "restore it with a newer unionfs"
        raise UnionfsError(f"{path} is a backup of version {found.get('version')}", hint=hint)
    found.setdefault("encrypted", "")
    base = found.get("base")
    texts = [found.get("created"), found.get("store"), found["encrypted"], found.get("id") or ""]
    texts += base.values() if isinstance(base, dict) else []
    known = all(isinstance(text, str) and "\0" not in text for text in texts)
    if not known or not isinstance(base, dict | None) or not isinstance(found.get("bytes"), int):
        raise _damaged(path, "its header is not understood")
    return Header(**{name: found[name] for name in Header.__slots__ if name in found})


def read_trailer(source: IO[bytes], path: str) -> Trailer:
    """What the archive must be; the file's position is kept."""
    position = source.tell()
    end = source.seek(0, os.SEEK_END)
    if end < position + _FRAME.size + _TRAILER:
        raise _damaged(path, "it was cut")
    source.seek(end - _FRAME.size - _TRAILER)
    try:
        found = _read_frame(source, path)
        return Trailer(int(found["bytes"]), str(found["sha256"]))
    except (UnionfsError, KeyError, TypeError, ValueError) as exc:
        raise _damaged(path, "it was cut, or its end is overwritten") from exc
    finally:
        source.seek(position)


def _read_frame(source: IO[bytes], path: str) -> dict[str, Any]:
    start = source.read(_FRAME.size)
    magic, length = _FRAME.unpack(start) if len(start) == _FRAME.size else (0, 0)
    if magic != _MAGIC or length > 1 << 20:
        raise UnionfsError(f"{path} is no backup of unionfs", hint="tar unpacks other archives")
    try:
        found = json.loads(source.read(length))
    except ValueError as exc:
        raise _damaged(path, "its header is not understood") from exc
    if not isinstance(found, dict) or found.get("kind") != _WHOLE:
        raise _damaged(path, "its header is not understood")
    return found


def _damaged(path: str, what: str) -> UnionfsError:
    return UnionfsError(f"the backup {path} is damaged: {what}", hint="use another backup")


def extract(
    source: IO[bytes], trailer: Trailer, path: str, directory: str | None, advance: Advance
) -> None:
    """Unpack into an empty directory, or (None) only read; an error if a byte is wrong."""
    digest, count = hashlib.sha256(), 0
    with open(os.memfd_create("tar"), "w+b") as said, contextlib.ExitStack() as started:
        with delayed():
            unpack = subprocess.Popen(
                [tool("zstd", "zstd"), "-q", "-d", "-c"],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=said,
            )
            tar = subprocess.Popen(
                [tool("tar", "tar"), "-tf", "-"]
                if directory is None
                else tar_extracting(directory),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=environment(),
            )
            started.callback(_end, unpack, tar)
        assert unpack.stdout is not None
        assert tar.stdin is not None
        try:
            while data := unpack.stdout.read(_CHUNK):
                digest.update(data)
                count += len(data)
                tar.stdin.write(data)
                advance(len(data))
            tar.stdin.close()
            good = unpack.wait() == 0
            if not good or Trailer(count, digest.hexdigest()) != trailer:
                raise _damaged(path, "its checksum is wrong")
            if tar.wait():
                raise UnionfsError(f"{path} cannot be restored: {_last(said, 'tar failed')}")
        except BrokenPipeError:
            tar.wait()
            reason = _last(said, "tar ended early")
            raise UnionfsError(f"{path} cannot be restored: {reason}") from None
    if directory is not None:
        acl.drop_empty(directory)
        sockets.make_unpacked(directory)


def copy(source: str, target: str, advance: Advance, without: Collection[str] = ()) -> None:
    """From one directory to another, all that an upper has but for some names at its top."""
    listed = sockets.listed(source, without)
    with open(os.memfd_create("tar"), "w+b") as said, contextlib.ExitStack() as started:
        with delayed():
            reader = subprocess.Popen(
                tar_creating(source, without),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                env=environment(),
            )
            writer = subprocess.Popen(
                tar_extracting(target),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=environment(),
            )
            started.callback(_end, reader, writer)
        assert reader.stdout is not None
        assert writer.stdin is not None
        try:
            while data := reader.stdout.read(_CHUNK):
                writer.stdin.write(data)
                advance(len(data))
            writer.stdin.close()
            if reader.wait() or writer.wait():
                raise UnionfsError(f"the copy failed: {_last(said, 'tar ended early')}")
        except BrokenPipeError:
            writer.wait()
            raise UnionfsError(f"the copy failed: {_last(said, 'tar ended early')}") from None
    acl.drop_empty(target)
    sockets.make(target, listed)
