# SPDX-License-Identifier: GPL-2.0-or-later
"""What a new file inherits of its directory's default ACL (acl(5), "Object creation").

The kernel does it for what is made in the directory itself; this is for what is prepared in the
work directory. Values are those of the system.posix_acl_* attributes: a version, then entries of
tag, permissions, id (linux/posix_acl_xattr.h).
"""

import contextlib
import errno
import functools
import os
import stat
import struct

from unionfs import _native
from unionfs.marks import fd_path
from unionfs.syscalls import is_in_fuse

ACCESS = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"
ENTRY = struct.Struct("<HHI")
VERSION = struct.pack("<I", 2)
_MINIMAL = len(VERSION) + 3 * ENTRY.size
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20


def default_acl(dirfd: int) -> bytes | None:
    """The default ACL of a directory (any descriptor), or None."""
    try:
        return os.getxattr(fd_path(dirfd), DEFAULT)
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


def mode_if_lost(src: int, fd: int, mode: int) -> int:
    """The mode of a copy whose ACL could not be given to it, because its file system has none, or
    because it names ids that the user namespace of this daemon does not know: the group gets no
    more than the ACL gave it."""
    if stat.S_ISLNK(os.stat(src).st_mode):
        return mode
    try:
        was = os.getxattr(fd_path(src), ACCESS)
    except OSError:
        return mode
    with contextlib.suppress(OSError):
        os.getxattr(fd_path(fd), ACCESS)
        return mode
    entries = [tuple(e) for e in ENTRY.iter_unpack(was[len(VERSION) :])]
    group = next((perm for tag, perm, _ in entries if tag == GROUP_OBJ), 0)
    return mode & ~0o070 | (mode & group << 3)


def settle(fd: int) -> None:
    """Have the mode say what an access ACL says that was just set; one that says no more goes.

    File systems of the kernel have done so; fuse2fs does not.
    """
    path = fd_path(fd)
    try:
        value = os.getxattr(path, ACCESS)
    except OSError:
        return
    entries = {tag: perm for tag, perm, _ in ENTRY.iter_unpack(value[len(VERSION) :])}
    group = entries.get(MASK, entries.get(GROUP_OBJ, 0))
    mode = _native.mode_of(fd)
    wanted = entries.get(USER_OBJ, 0) << 6 | group << 3 | entries.get(OTHER, 0)
    if mode & 0o777 != wanted or MASK not in entries:
        _native.set_mode(fd, stat.S_IMODE(mode) & ~0o777 | wanted)


def drop_empty(directory: str) -> None:
    """In a tree in FUSE take access ACLs away that say no more than the mode: tar has set them, and
    the kernel has kept none of them elsewhere."""
    if not is_in_fuse(directory):
        return
    top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _, folders, files, fd in os.fwalk(".", dir_fd=top):
            for name in (".", *folders, *files):
                path = f"{fd_path(fd)}/{name}"
                with contextlib.suppress(OSError):
                    if len(os.getxattr(path, ACCESS, follow_symlinks=False)) <= _MINIMAL:
                        os.removexattr(path, ACCESS, follow_symlinks=False)
    finally:
        os.close(top)


@functools.cache
def reads_all_ids() -> bool:
    """Whether there are no ids outside our user namespace."""
    with contextlib.suppress(OSError), open("/proc/self/uid_map") as file:
        return file.read().split() == ["0", "0", "4294967295"]
    return True


def inherit(default: bytes, mode: int) -> tuple[bytes | None, int]:
    """The access ACL and the mode of a new file asked for with `mode` (the umask is not used).

    The ACL is None when the mode says it all (posix_acl_create_masq of the kernel).
    """
    entries = [list(e) for e in ENTRY.iter_unpack(default[len(VERSION) :])]
    masked = {tag for tag, _, _ in entries}
    group_class = MASK if MASK in masked else GROUP_OBJ
    bits = {USER_OBJ: mode >> 6 & 7, group_class: mode >> 3 & 7, OTHER: mode & 7}
    result = stat.S_IMODE(mode) & ~0o777
    for entry in entries:
        tag = entry[0]
        if tag in bits:
            entry[1] &= bits[tag]
            result |= entry[1] << {USER_OBJ: 6, OTHER: 0}.get(tag, 3)
    if masked <= {USER_OBJ, GROUP_OBJ, OTHER}:
        return None, result
    return VERSION + b"".join(ENTRY.pack(*e) for e in entries), result


def apply(fd: int, default: bytes, mode: int, *, directory: bool) -> int:
    """Give a temporary what it inherits; the mode it then must have."""
    access, mode = inherit(default, mode)
    path = fd_path(fd)
    if access is not None:
        os.setxattr(path, ACCESS, access)
    if directory:
        os.setxattr(path, DEFAULT, default)
    return mode
