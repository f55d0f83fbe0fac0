# SPDX-License-Identifier: GPL-2.0-or-later
"""Who holds an upper: flock(2) between the programs of this machine, AREA/owner between machines.

Owns the record in AREA/owner and what it means, and the words for an upper that is in use.  Does
not write the file (work.py).  Called by work.py and stores/.

    {"pid": ..., "mountpoint": ..., "machines": [...], "boot": ..., "host": ..., "since": ...}

flock(2) ends with its holder, but another machine (a virtual one on the same image, a shared disk)
does not see it.  So who holds an upper says on which machine he runs.  Of this machine or this boot
the flock alone decides: a free one says that the holder is dead.  Another machine's record stays
until it is taken away (docs/adr/0018).
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import hmac
import json
import os
import re
import select
import time
from dataclasses import dataclass
from typing import Final

from unionfs.errors import UnionfsError
from unionfs.format import AREA_NAME
from unionfs.mounts import read_mounts

FILE: Final = "owner"
_BOOT: Final = "/proc/sys/kernel/random/boot_id"
# What tells a machine: as installed, and (root only) by its hardware, which a system that gets a
# machine-id at each boot keeps.
_MACHINE: Final = ("/etc/machine-id", "/sys/class/dmi/id/product_uuid")
# Of boards whose maker gave none.
_NO_UUID: Final = re.compile(r"0*|f*|03000200040005000006000700080009|uninitialized")
_KEY: Final = b"unionfs"
_LOOK_SECONDS: Final = 3
_WAIT: Final = "wait for the end of what has it"
_ENDING_SECONDS: Final = 10
_LIMIT: Final = 65536


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Who has, or had, an upper.  What is not known is empty."""

    pid: int = 0
    mountpoint: str = ""
    machines: tuple[str, ...] = ()
    boot: str = ""
    host: str = ""
    since: str = ""  # ISO 8601, UTC

    def text(self) -> str:
        """As it stands in AREA/owner."""
        return json.dumps(dataclasses.asdict(self))

    def elsewhere(self, here: "Owner") -> bool:
        """Whether it is surely of another machine than `here`."""
        if not (self.boot and here.boot and self.machines and here.machines):
            return False
        return self.boot != here.boot and not set(self.machines) & set(here.machines)

    def who(self) -> str:
        """For messages."""
        told = f"the machine {self.host or 'without a name'}"
        return told + (f" since {self.since}" if self.since else "")


def parse_owner(text: str) -> Owner:
    """Read AREA/owner; what is damaged says nothing."""
    try:
        found = json.loads(text)
    except ValueError:
        return Owner()
    if not isinstance(found, dict):
        return Owner()
    words = {
        name: found[name]
        for name in ("mountpoint", "boot", "host", "since")
        if isinstance(found.get(name), str)
    }
    pid, machines = found.get("pid"), found.get("machines")
    known = tuple(m for m in machines if isinstance(m, str)) if isinstance(machines, list) else ()
    return Owner(pid=pid if isinstance(pid, int) else 0, machines=known, **words)


def _line(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(200).strip()
    except OSError:
        return ""


def _machines() -> tuple[str, ...]:
    """What tells this machine, as digests: a machine-id is not for others (machine-id(5))."""
    known = (_line(path).replace("-", "").lower() for path in _MACHINE)
    return tuple(
        hmac.new(_KEY, text.encode(), hashlib.sha256).hexdigest()[:32]
        for text in known
        if not _NO_UUID.fullmatch(text)
    )


def here(mountpoint: str = "") -> Owner:
    """This process, on this machine."""
    now = datetime.datetime.now(datetime.UTC)
    return Owner(
        pid=os.getpid(),
        mountpoint=mountpoint,
        machines=_machines(),
        boot=_line(_BOOT),
        host=os.uname().nodename,
        since=now.isoformat(timespec="seconds"),
    )


def read_owner(area: str) -> Owner | None:
    """What the area at a path says; None if nobody holds it."""
    try:
        fd = os.open(f"{area}/{FILE}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
            return parse_owner(file.read(_LIMIT))
    except OSError:
        return None


def read_owner_at(upper: int) -> Owner | None:
    """The same of the open directory of an upper."""
    return read_owner(f"/proc/self/fd/{upper}/{AREA_NAME}")


def refuse_elsewhere(owner: Owner | None, path: str) -> None:
    """Raise an error if another machine holds an upper, or has not let it go."""
    if owner is not None and owner.elsewhere(here()):
        raise UnionfsError(
            f"{path} is in use by {owner.who()}, or was not unmounted there",
            hint="unmount it there; if that machine does not use it any more, "
            "mount with -o other-machine=take, "
            f"or free it: unionfs store check --repair --take {path}",
        )


# On this machine


def _holder_pid(fd: int, owner: Owner) -> int:
    """Who holds the flock on `fd`, as far as can be known; 0 if not."""
    status = os.fstat(fd)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    pid = 0
    with contextlib.suppress(OSError), open("/proc/locks") as locks:
        for words in map(str.split, locks):
            if len(words) > 5 and words[1] == "FLOCK" and words[5] == place:
                pid = int(words[4])  # 0 or -1 if it is outside our pid namespace
    if pid <= 0:
        pid = owner.pid  # btrfs: /proc/locks has another device number than stat
    return max(pid, 0)


def _describe(pid: int, owner: Owner) -> str:
    """The holder for a message: pid, command, mount point."""
    who = f"process {pid}" if pid > 0 else "a process that cannot be seen from here"
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as comm:
        who += f" ({comm.read().strip()})"
    if owner.pid == pid and owner.mountpoint:
        who += f", mounted on {owner.mountpoint}"
    return who


def _await_end(pid: int, owner: Owner) -> None:
    """Wait a little for a daemon whose union is gone: plain umount(8) returns before it ends."""
    if owner.pid != pid or any(e.point == owner.mountpoint for e in read_mounts()):
        return
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            select.select([fd], [], [], _ENDING_SECONDS)
        finally:
            os.close(fd)


def _await_look(fd: int, how: int) -> bool:
    """Wait a little for a verb, which is not at work for long if it only looks; whether it is
    locked now."""
    end = time.monotonic() + _LOOK_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, how | fcntl.LOCK_NB)
            return True
        time.sleep(0.02)
    return False


def lock(fd: int, how: int, path: str, area: str) -> None:
    """flock; `area` is where the one who has it says who he is, if that is a union."""
    for last in (False, True):
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            owner = read_owner(area) or Owner()
            if owner.elsewhere(here()):  # NFS: flock(2) is seen by the other machines there
                refuse_elsewhere(owner, path)
            pid = _holder_pid(fd, owner)
            verb = not owner.pid or owner.pid != pid
            if last:
                what = f"{path} is in use by {_describe(pid, owner)}"
                hint = _WAIT if verb else "unmount that union first"
                raise UnionfsError(what, hint=f"{hint}, or choose another upper") from None
            if not verb:
                _await_end(pid, owner)
            elif _await_look(fd, how):
                return
