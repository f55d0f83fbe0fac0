# SPDX-License-Identifier: GPL-2.0-or-later
"""What is on a device or in an image, as blkid(8) tells it.

Owns the call of blkid and the words for what is no usable file system.  Does not choose among
devices (find.py) nor mount them.
"""

import errno
import os
import re
import stat
from typing import Final, NamedTuple

from unionfs.errors import ExitCode, UnionfsError
from unionfs.stores.tools import lines_of, run, tool

_NOTHING: Final = 2
_AMBIVALENT: Final = 8
_ENCODED: Final = re.compile(rb"\\x([0-9a-f]{2})")


class Contents(NamedTuple):
    """One device or image.  Empty strings where there is none."""

    path: str
    fstype: str = ""
    label: str = ""
    uuid: str = ""
    usage: str = ""  # filesystem, crypto, raid, other
    partlabel: str = ""
    partuuid: str = ""
    table: str = ""  # the kind of partition table
    member: str = ""  # of a file system with several devices: this one's own UUID


def _decode(value: bytes) -> str:
    return os.fsdecode(_ENCODED.sub(lambda match: bytes([int(match[1], 16)]), value))


def _fields(output: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in output.splitlines():
        name, _, value = line.partition(b"=")
        found[name.decode()] = _decode(value)
    return found


_KINDS: Final = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFDIR: "a directory",
}


def refuse_kind(path: str, mode: int) -> None:
    """Raise an error for what can hold no file system."""
    if kind := _KINDS.get(stat.S_IFMT(mode)):
        hint = "name a directory, an image or a block device"
        if stat.S_ISDIR(mode):
            hint = "name an image or a block device"
        raise UnionfsError(f"{path} is {kind}, which holds no file system", hint=hint)


def check_readable(path: str) -> None:
    """Raise an error that says why nothing can be read from `path`, or what it is instead."""
    try:
        refuse_kind(path, os.stat(path).st_mode)
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as exc:
        hints = {
            errno.ENOENT: "correct the path",
            errno.EACCES: "it must be readable by the user who mounts",
            errno.EPERM: "the device is not allowed in this container",
            errno.ENXIO: "there is no medium in it",
            errno.ENOMEDIUM: "insert a medium",
        }
        reason = os.strerror(exc.errno or errno.EIO)
        hint = hints.get(exc.errno or 0)
        raise UnionfsError(f"cannot read {path}: {reason}", hint=hint) from exc


def probe(path: str) -> Contents:
    """What is in it; raises UnionfsError if it cannot be read or could be two things at once."""
    check_readable(path)
    done = run([tool("blkid", "util-linux"), "-p", "-o", "udev", "--", path])
    fields = _fields(done.stdout)
    if done.returncode == _AMBIVALENT or "ID_FS_AMBIVALENT" in fields:
        what = ", ".join(fields.get("ID_FS_AMBIVALENT", "").split()) or "several file systems"
        hint = "remove the signatures that are wrong: wipefs(8) shows them"
        raise UnionfsError(f"{path} could be several things at once ({what})", hint=hint)
    if done.returncode not in (0, _NOTHING):
        said = lines_of(done.stderr)
        reason = said[-1] if said else f"exit code {done.returncode}"
        raise UnionfsError(f"blkid cannot examine {path}: {reason}", code=ExitCode.SYSTEM)
    return Contents(
        path=path,
        fstype=fields.get("ID_FS_TYPE", ""),
        label=fields.get("ID_FS_LABEL_ENC", ""),
        uuid=fields.get("ID_FS_UUID_ENC", ""),
        usage=fields.get("ID_FS_USAGE", ""),
        partlabel=fields.get("ID_PART_ENTRY_NAME", ""),
        partuuid=fields.get("ID_PART_ENTRY_UUID", ""),
        table=fields.get("ID_PART_TABLE_TYPE", ""),
        member=fields.get("ID_FS_UUID_SUB_ENC", ""),
    )


def require_filesystem(contents: Contents) -> None:
    """Raise an error that says what it is instead."""
    path = contents.path
    if contents.usage == "filesystem" and contents.fstype:
        return
    if contents.usage == "crypto":
        hint = "unlock it first, and name the unlocked device"
        raise UnionfsError(f"{path} is encrypted ({contents.fstype})", hint=hint)
    if contents.fstype:
        raise UnionfsError(
            f"{path} holds {contents.fstype}, which is no file system",
            hint="name a device or an image with a file system on it",
        )
    if contents.table:
        raise UnionfsError(
            f"{path} holds a partition table ({contents.table}), not a file system",
            hint="name one of its partitions, by /dev/..., LABEL= or PARTLABEL=",
        )
    status = os.stat(path)
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise UnionfsError(f"{path} is empty", hint="make a store: unionfs store create")
    hint = "it may be damaged or truncated: restore a backup, or make a new store"
    if (found := spare_super_block(path)) is not None:
        block, size = found
        hint = f"the first super block of an ext4 is lost, there is another: copy {path}, then "
        hint += f"e2fsck -b {block} -B {size} {path}"
    raise UnionfsError(f"{path} holds no file system that is known here", hint=hint)


def spare_super_block(path: str) -> tuple[int, int] | None:
    """Where an ext2, 3 or 4 has its second super block, and its size of blocks; None: nowhere."""
    with open(path, "rb") as file:
        for size in (4096, 1024, 2048):
            first = 8 * size + (size == 1024)  # as many blocks as one block has bits
            file.seek(first * size)
            block = file.read(1024)
            # s_magic, s_log_block_size and s_block_group_nr
            known = block[56:58] == b"\x53\xef" and block[90:92] == b"\x01\x00"
            if known and 1024 << min(block[24], 6) == size:
                return first, size
    return None
