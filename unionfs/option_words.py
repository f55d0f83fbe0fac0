# SPDX-License-Identifier: GPL-2.0-or-later
"""The vocabulary of -o: every word, whether it takes a value, and what it sets.

Owns the table WORDS and how one value is read.  Does not know how words are separated, which of
them may stand together, nor what a mount is made of: that is options.py, its only caller.

Four families meet here: the words of kernel overlayfs, of fuse-overlayfs, of FUSE and of mount(8).
A word that cannot change anything here is accepted only where ignoring it does no harm (setting
IGNORED); a word whose promise cannot be kept is refused, with the reason (REFUSED).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from unionfs.errors import usage_error

IGNORED = ""
FOR_EVER = 1e9  # seconds, 31 years; in nanoseconds it still is a 64-bit number
ID_LIMIT = 2**32 - 1  # (uid_t)-1 is no identity
SIZE = re.compile(r"[1-9][0-9]*[KMGTkmgt]?|(?:100|[1-9][0-9]?)%")

# Mount flags that only restrict.  Their opposites are the default and only undo them.
KERNEL_FLAGS = (
    "nodev",
    "nosuid",
    "noexec",
    "noatime",
    "nodiratime",
    "sync",
    "dirsync",
    "nosymfollow",
)
# The daemon keeps the times, so these show in /proc/mounts only; newer fusermount3 refuse them.
TIME_WORDS = frozenset({"noatime", "nodiratime"})


@dataclass(frozen=True, kw_only=True, slots=True)
class IdRange:
    """Identities inside..inside+length-1 of the layers are outside.. in the union.

    The columns are those of /proc/PID/uid_map, and of uidmapping=INSIDE:OUTSIDE:LENGTH.
    """

    inside: int
    outside: int
    length: int


@dataclass(frozen=True, slots=True)
class Word:
    """One word of -o.

    setting: what it sets, IGNORED for nothing; flag: its value when it stands without `=`, None if
    it cannot; read: how what follows `=` becomes the value, None if nothing may follow.
    """

    setting: str
    flag: object = None
    read: Callable[[str, str], object] | None = None


def read_text(word: str, text: str) -> str:
    """Any text but none."""
    if not text:
        raise usage_error(f"option {word}= is empty", f"write {word}=VALUE or leave it out")
    return text


def read_name(word: str, text: str) -> str:
    """A name that is one directory's."""
    if not text or "/" in text or text in (".", ".."):
        raise usage_error(f"option {word}={text} is no name", "give a word without slashes")
    return text


def read_unchecked(_word: str, text: str) -> str:
    """Whatever it is: for words that are ignored."""
    return text


def one_of(**values: object) -> Callable[[str, str], object]:
    """A reader for a few fixed values; a leading _ makes a number writable as a name."""
    by_text = {name.lstrip("_"): value for name, value in values.items()}

    def read(word: str, text: str) -> object:
        if text not in by_text:
            hint = f"use one of {', '.join(by_text)}"
            raise usage_error(f"option {word}={text} is not understood", hint)
        return by_text[text]

    return read


def read_number(word: str, text: str) -> int:
    """A whole number, 0 or more."""
    if not (text.isascii() and text.isdigit()):
        raise usage_error(f"option {word}={text} is not a number", "give a whole number")
    return int(text)


def read_uid(word: str, text: str) -> int:
    """A uid, or the name of a user."""
    return _read_id(word, text, lambda name: read_user(word, name)[0])


def read_gid(word: str, text: str) -> int:
    """A gid, or the name of a group."""
    import grp

    try:
        return _read_id(word, text, lambda name: grp.getgrnam(name).gr_gid)
    except KeyError:
        hint = "getent group lists the groups"
        raise usage_error(f"option {word}={text}: there is no such group", hint) from None


def _read_id(word: str, text: str, by_name: Callable[[str], int]) -> int:
    if not (text.isascii() and text.isdigit()):
        return by_name(text)
    number = int(text)
    if number >= ID_LIMIT:
        raise usage_error(f"option {word}={text} is no uid or gid", f"stay below {ID_LIMIT}")
    return number


def read_user(word: str, text: str) -> tuple[int, int]:
    """A user by name or number: uid and gid."""
    import pwd

    try:
        entry = pwd.getpwuid(int(text)) if text.isascii() and text.isdigit() else pwd.getpwnam(text)
    except (KeyError, OverflowError):
        hint = "getent passwd lists the users"
        raise usage_error(f"option {word}={text}: there is no such user", hint) from None
    return entry.pw_uid, entry.pw_gid


def read_seconds(word: str, text: str) -> float:
    """A time in seconds, with or without a fraction."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise usage_error(f"option {word}={text} is not a time", "give seconds, such as 1 or 0.5")
    return min(seconds, FOR_EVER)


def read_size(word: str, text: str) -> str:
    """A size of a tmpfs, handed to the kernel as it is."""
    if not SIZE.fullmatch(text):
        raise usage_error(f"option {word}={text} is not a size", "write 512M, 2G or 50%")
    return text


def read_growth(word: str, text: str) -> str:
    """A size up to which an image grows."""
    if text.endswith("%"):
        raise usage_error(f"option {word}={text} is not a size", "write 8G")
    return read_size(word, text)


def size_in_bytes(text: str) -> int:
    """What read_size() has passed, without a percentage."""
    power = "KMGT".find(text[-1].upper()) + 1
    return int(text[:-1]) * 1024**power if power else int(text)


def read_mapping(word: str, text: str) -> tuple[IdRange, ...]:
    """INSIDE:OUTSIDE:LENGTH, repeated; separated by colons, or by commas as -o allows them."""
    parts = text.replace(",", ":").split(":")
    hint = f"write {word}=INSIDE:OUTSIDE:LENGTH[:INSIDE:OUTSIDE:LENGTH...]"
    if len(parts) % 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise usage_error(f"option {word}={text} is malformed", hint)
    numbers = [int(part) for part in parts]
    ranges = [
        IdRange(inside=numbers[i], outside=numbers[i + 1], length=numbers[i + 2])
        for i in range(0, len(numbers), 3)
    ]
    for r in ranges:
        if r.length == 0 or max(r.inside, r.outside) + r.length > ID_LIMIT:
            shown = f"{r.inside}:{r.outside}:{r.length}"
            raise usage_error(f"option {word}: {shown} is no range of uids or gids", hint)
    return tuple(ranges)


def read_subtype(word: str, text: str) -> str:
    """Only our own: status and umount find unions by it."""
    if text not in ("unionfs", "fuse.unionfs"):
        hint = "leave it out; fsname= may be chosen freely"
        raise usage_error(f"option {word}={text} cannot be kept: the type is fuse.unionfs", hint)
    return "unionfs"


def read_plugins(word: str, text: str) -> str:
    """fuse-overlayfs's shared objects: its callers pass an empty list."""
    if text:
        hint = "mount the lower first and name its directory"
        raise usage_error(f"option {word}={text}: plugins of fuse-overlayfs cannot run here", hint)
    return text


ON_OFF = one_of(on=True, off=False)
HARMLESS_NUMBER = Word(IGNORED, read=read_number)
NOTHING = Word(IGNORED, flag=True)

# Layers are lists or paths and have rules of their own in options.py, which reads them.
LAYER_WORDS = {
    "lowerdir": Word("lowers", read=read_text),
    "lowerdir+": Word("lowers", read=read_text),
    "upperdir": Word("upper", read=read_text),
    "workdir": Word("work", read=read_text),
}

OVERLAY_WORDS = {
    "redirect_dir": Word("redirect_dir", read=one_of(on=True, off=False, follow=False)),
    "metacopy": Word("metacopy", read=ON_OFF),
    "index": Word("index", read=ON_OFF),
    "userxattr": Word("userxattr", flag=True),
    "volatile": Word("fsync", flag="volatile"),
    "fsync": Word(
        "fsync",
        read=one_of(auto="auto", strict="strict", volatile="volatile", _0="volatile", _1="auto"),
    ),
    # Inode numbers are stable here whatever these say.
    "xino": Word(IGNORED, read=one_of(on=True, off=True, auto=True)),
    "uuid": Word(IGNORED, read=one_of(on=True, off=True, null=True, auto=True)),
    "nfs_export": Word(IGNORED, read=one_of(off=True)),
    "verity": Word(IGNORED, read=one_of(off=True)),
}

OWN_WORDS = {
    "ephemeral": Word("ephemeral_size", flag="", read=read_size),
    "whiteout": Word("whiteout", read=one_of(auto="auto", char="char", wh="wh")),
    "lower": Word("lower_live", read=one_of(live=True, sealed=False)),
    "device-timeout": Word("device_timeout", read=read_seconds),
    "search": Word("search", read=one_of(devices="devices", images="images")),
    "low-water": Word("low_water", read=read_size),
    "autogrow": Word("autogrow", read=read_growth),
    "fallback": Word("fallback", read=one_of(fail="fail", ro="ro", tmpfs="tmpfs")),
    "on-mismatch": Word("on_mismatch", read=one_of(refuse="refuse", ro="ro", ignore="ignore")),
    "other-machine": Word("other_machine", read=one_of(refuse="refuse", take="take")),
    "name": Word("name", read=read_name),
    "only": Word("only", read=read_user),
    "store-flags": Word("store_flags", read=read_text),
    "holds-root": Word("holds_root", flag=True),
    "key-file": Word("key_file", read=read_text),
    "credential": Word("credential", read=read_name),
    "driver": Word("driver", read=one_of(engine="engine", pyfuse3="pyfuse3")),
    "passthrough": Word("passthrough", read=one_of(auto="auto", all="all", off="off")),
    "io_uring": Word("io_uring", read=one_of(auto=True, off=False)),
    "sloppy": Word("sloppy", flag=True),
}

FUSE_OVERLAYFS_WORDS = {
    "uidmapping": Word("uidmapping", read=read_mapping),
    "gidmapping": Word("gidmapping", read=read_mapping),
    "squash_to_root": Word("squash_to_root", flag=True),
    "squash_to_uid": Word("squash_to_uid", read=read_uid),
    "squash_to_gid": Word("squash_to_gid", read=read_gid),
    "xattr_permissions": Word("xattr_permissions", read=one_of(_0=0, _1=1, _2=2)),
    "static_nlink": Word("static_nlink", flag=True),
    "noacl": Word("noacl", flag=True),
    "noxattrs": Word("noxattrs", flag=True, read=one_of(_0=False, _1=True)),
    "timeout": Word("timeout", read=read_seconds),
    # How the other program does its work; ours is not steered by them.
    "threaded": HARMLESS_NUMBER,
    "fast_ino": HARMLESS_NUMBER,
    "fast_ino_check": HARMLESS_NUMBER,
    "writeback": HARMLESS_NUMBER,
    "ino32_t": NOTHING,
    "plugins": Word(IGNORED, read=read_plugins),
    # SELinux labels of the whole mount: read by nobody, as there.
    "context": Word(IGNORED, read=read_unchecked),
    "fscontext": Word(IGNORED, read=read_unchecked),
    "defcontext": Word(IGNORED, read=read_unchecked),
    "rootcontext": Word(IGNORED, read=read_unchecked),
}

FUSE_WORDS = {
    "allow_other": Word("allow_other", flag=True),
    "allow_root": Word("allow_root", flag=True),
    "debug": Word("debug", flag=True),
    "auto_unmount": Word("auto_unmount", flag=True),
    "nonempty": Word("nonempty", flag=True),
    "fsname": Word("fsname", read=read_text),
    "subtype": Word("subtype", read=read_subtype),
    "max_read": Word("max_read", read=read_number),
    # Always so (default_permissions), or the choice of libfuse or the kernel.
    "default_permissions": NOTHING,
    "kernel_cache": NOTHING,
    "auto_cache": NOTHING,
    "noauto_cache": NOTHING,
    "big_writes": NOTHING,
    "async_read": NOTHING,
    "sync_read": NOTHING,
    "atomic_o_trunc": NOTHING,
    "clone_fd": NOTHING,
    "use_ino": NOTHING,
    "readdir_ino": NOTHING,
    "hard_remove": NOTHING,
    "noforget": NOTHING,
    "splice_read": NOTHING,
    "splice_write": NOTHING,
    "splice_move": NOTHING,
    "no_splice_read": NOTHING,
    "no_splice_write": NOTHING,
    "no_splice_move": NOTHING,
    "max_write": HARMLESS_NUMBER,
    "max_readahead": HARMLESS_NUMBER,
    "max_background": HARMLESS_NUMBER,
    "congestion_threshold": HARMLESS_NUMBER,
    "max_threads": HARMLESS_NUMBER,
    "max_idle_threads": HARMLESS_NUMBER,
}

# What mount(8), fstab and systemd keep for themselves, and times that FUSE leaves to the daemon.
NO_EFFECT = [
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "noowner",
    "group",
    "nogroup",
    "nofail",
    "_netdev",
    "silent",
    "loud",
    "iversion",
    "noiversion",
    "mand",
    "nomand",
    "acl",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
]
MOUNT_WORDS = {
    "ro": Word("readonly", flag=True),
    "rw": Word("readonly", flag=False),
    "remount": Word("remount", flag=True),
    **{flag: Word(flag, flag=True) for flag in KERNEL_FLAGS},
    **{flag[2:]: Word(flag, flag=False) for flag in KERNEL_FLAGS if flag.startswith("no")},
    "async": Word("sync", flag=False),
    **{word: NOTHING for word in NO_EFFECT},
    "user": Word(IGNORED, flag=True, read=read_unchecked),
    "comment": Word(IGNORED, read=read_unchecked),
    "helper": Word(IGNORED, read=read_unchecked),
    "uhelper": Word(IGNORED, read=read_unchecked),
}

WORDS = LAYER_WORDS | OVERLAY_WORDS | OWN_WORDS | FUSE_OVERLAYFS_WORDS | FUSE_WORDS | MOUNT_WORDS

_SET_HERE = "unionfs sets it by itself"
_TIMEOUT = "use timeout=SECONDS or lower=live"
_UNIONFS_FUSE = "an option of unionfs-fuse; write unionfs mount LOWER UPPER MNT"
# Known, refused whatever follows, with the reason.
REFUSED = {
    "datadir+": "data-only layers are not supported; name the layer with lowerdir",
    "fd": _SET_HERE,
    "rootmode": _SET_HERE,
    "user_id": _SET_HERE,
    "group_id": _SET_HERE,
    "entry_timeout": _TIMEOUT,
    "attr_timeout": _TIMEOUT,
    "negative_timeout": _TIMEOUT,
    "uid": "use squash_to_uid=UID or uidmapping=",
    "gid": "use squash_to_gid=GID or gidmapping=",
    "umask": "modes are those of the layers; there is no mask",
    "direct_io": "the kernel's cache is always right here; leave it out",
    "cow": _UNIONFS_FUSE,
    "dirs": _UNIONFS_FUSE,
    "chroot": _UNIONFS_FUSE,
    "hide_meta_files": _UNIONFS_FUSE,
    "relaxed_permissions": _UNIONFS_FUSE,
    "loop": "leave it out: an image is named as a layer",
    "bind": "a union cannot be bound in the same step; mount it, then mount --bind",
}


def ignored_by_prefix(word: str) -> bool:
    """x-systemd.* and the like: for those who read fstab, not for file systems."""
    return word.startswith(("x-", "X-"))
