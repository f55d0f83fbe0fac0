# SPDX-License-Identifier: GPL-2.0-or-later
"""ext4 before fuse2fs, which mounts what the kernel would not: what is not clean.

Owns the look at the super block and the call of e2fsck.
"""

import re
import struct
import subprocess
from typing import Final

from unionfs.errors import UnionfsError
from unionfs.stores.tools import lines_of, run, tool

_SUPER: Final = 1024
_CLEAN: Final = 1  # EXT4_VALID_FS
_ERRORS: Final = 2  # EXT4_ERROR_FS
_RECOVER: Final = 4  # EXT4_FEATURE_INCOMPAT_RECOVER
_ENCRYPT: Final = 0x10000  # EXT4_FEATURE_INCOMPAT_ENCRYPT
_CORRECTED: Final = 1  # fsck(8)
# What e2fsck says besides of faults: how to go on.
_ADVICE: Final = re.compile(
    r"$|e2fsck [0-9]|UNEXPECTED|\(i\.e\., without|.*MANUALLY|.*\*{5} |The superblock could not be"
    r"|filesystem(\.  If the| \(and not)|is corrupt, and you|e2fsck -b|or$|.*[0-9]% non-contig"
)
TYPES: Final = ("ext2", "ext3", "ext4")


def _super_block(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(_SUPER)
        return file.read(1024)


def has_errors(path: str) -> bool:
    """Whether the kernel, or who wrote it last, has noted that something is wrong with it."""
    block = _super_block(path)
    return len(block) == 1024 and bool(struct.unpack_from("<H", block, 0x3A)[0] & _ERRORS)


def was_unmounted(path: str) -> bool:
    """Whether nobody has it mounted writable, here or elsewhere, nor has left it so."""
    block = _super_block(path)
    return (
        len(block) == 1024
        and bool(struct.unpack_from("<H", block, 0x3A)[0] & _CLEAN)
        and not struct.unpack_from("<I", block, 0x60)[0] & _RECOVER
    )


def has_journal_to_replay(path: str) -> bool:
    """Whether the last changes are in the journal only."""
    block = _super_block(path)
    return len(block) == 1024 and bool(struct.unpack_from("<I", block, 0x60)[0] & _RECOVER)


def may_be_encrypted(path: str) -> bool:
    """Whether there may be directories that the kernel encrypts: fuse2fs writes plain text there,
    and does not say which they are."""
    block = _super_block(path)
    return len(block) == 1024 and bool(struct.unpack_from("<I", block, 0x60)[0] & _ENCRYPT)


def refuse_encrypted(path: str) -> None:
    """Raise an error where fuse2fs would do damage."""
    if may_be_encrypted(path):
        what = "has the feature encrypt: fuse2fs would write plain text into what is encrypted"
        raise UnionfsError(f"{path} {what}", hint="only root can mount it")


def preen(path: str) -> bool:
    """Repair what can be repaired safely, and replay the journal; True if there was anything."""
    done = run([tool("e2fsck", "e2fsprogs"), "-p", path])
    if done.returncode <= _CORRECTED:
        return done.returncode == _CORRECTED
    raise UnionfsError(
        f"{path} is damaged: {complaint(done)}",
        hint=f"repair it: unionfs store check --repair {path}",
    )


def complaint(done: "subprocess.CompletedProcess[bytes]") -> str:
    """The line of e2fsck that says what it has not corrected: with -p the last one, before the
    advice to run it by hand; each has the name of the image before it."""
    image = str(done.args[-1])
    every = lines_of(done.stdout + done.stderr)
    lines = [line.removeprefix(f"{image}:").strip() for line in every]
    said = [line for line in lines if not _ADVICE.match(line)]
    return said[-1] if said else f"e2fsck ended with {done.returncode}"
