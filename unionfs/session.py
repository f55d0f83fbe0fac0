# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounting and unmounting: three ways to a mounted descriptor of /dev/fuse.

Owns the choice among them, their mount options and their errors.  Does not own what is said on
the descriptor (handshake.py).  Called by daemon.py; `unmount` by the daemon only, for the mount
it made itself.

- mount(2) as root;
- mount(2) as the root of a user namespace that has its own mounts;
- fusermount3, setuid root, for everybody else.

auto_unmount is a small process of ours that outlives a killed daemon and takes its mount away.
That of fusermount3 up to 3.14 leaves a user's mount in place unless allow_other is set.
"""

import array
import contextlib
import errno
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from typing import Final

from unionfs import syscalls
from unionfs.errors import ExitCode, UnionfsError
from unionfs.mounts import FSTYPE, read_mounts, topmost
from unionfs.option_words import TIME_WORDS
from unionfs.options import MountOptions
from unionfs.syscalls import MountFlag, UnmountFlag
from unionfs.unions import ask

DEVICE: Final = "/dev/fuse"
FUSE_CONF: Final = "/etc/fuse.conf"
DEFAULT_SOURCE: Final = "unionfs"
_CAP_SYS_ADMIN: Final = 21
_READ_AHEAD_KIB: Final = 1016  # what can be answered by splice(2): cext/chute.c
_FLAGS: Final = {
    "nodev": MountFlag.NODEV,
    "nosuid": MountFlag.NOSUID,
    "noexec": MountFlag.NOEXEC,
    "noatime": MountFlag.NOATIME,
    "nodiratime": MountFlag.NODIRATIME,
    "sync": MountFlag.SYNCHRONOUS,
    "dirsync": MountFlag.DIRSYNC,
    "nosymfollow": MountFlag.NOSYMFOLLOW,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How the mount will be made; `helper` is fusermount3's path, None for mount(2)."""

    helper: str | None
    allow_other: bool


@dataclass(slots=True)
class Mount:
    """A file system that we mounted."""

    point: str
    device: int  # the descriptor of /dev/fuse; taken over by the loop
    number: str  # "major:minor" as in mountinfo
    helper: str | None
    keeper: "subprocess.Popen[bytes] | None" = None  # of auto_unmount
    only: tuple[int, int] | None = None  # who alone may look into it


def has_admin() -> bool:
    """Whether we have CAP_SYS_ADMIN, in whatever user namespace."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return os.geteuid() == 0


def users_may_allow_other(path: str = FUSE_CONF) -> bool:
    """Whether fusermount3 will take allow_other from an ordinary user."""
    try:
        with open(path, errors="replace") as file:
            return any(line.split("#")[0].strip() == "user_allow_other" for line in file)
    except OSError:
        return False


def plan_mount(options: MountOptions) -> Plan:
    """Decide how to mount and check that it can be done, changing nothing."""
    _check_device()
    admin = has_admin()
    if options.only is not None and os.geteuid() != 0:
        hint = "leave it out: what a user mounts is the user's alone"
        raise UnionfsError("option only is root's", hint=hint, code=ExitCode.USAGE)
    shared = admin and options.only is None
    allow_other = shared if options.allow_other is None else options.allow_other
    allow_other = allow_other or options.allow_root
    if admin:
        return Plan(None, allow_other)
    helper = shutil.which("fusermount3") or shutil.which("fusermount3", path="/usr/bin:/bin")
    if helper is None:
        raise UnionfsError(
            "fusermount3 is not installed, and without it an ordinary user cannot mount",
            hint="install the package fuse3, or mount as root or in a user namespace",
            code=ExitCode.SYSTEM,
        )
    if allow_other and os.getuid() != 0 and not users_may_allow_other():
        word = "allow_root" if options.allow_root else "allow_other"
        raise UnionfsError(
            f"option {word} is not permitted to ordinary users",
            hint=f"add the line user_allow_other to {FUSE_CONF} (as root), or leave {word} out",
            code=ExitCode.USAGE,
        )
    return Plan(helper, allow_other)


def _check_device() -> None:
    os.close(_open_device())


def _open_device() -> int:
    hints = {
        errno.ENOENT: "load the kernel's module (modprobe fuse), or pass the device into the "
        "container (--device /dev/fuse)",
        errno.EACCES: "have the device opened to users (chmod 666 /dev/fuse), or mount as root",
        errno.EPERM: "allow the device in the container (--device /dev/fuse)",
    }
    hints[errno.ENODEV] = hints[errno.ENXIO] = hints[errno.ENOENT]
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise UnionfsError(
            f"cannot open {DEVICE}: {os.strerror(exc.errno or errno.EIO)}",
            hint=hints.get(exc.errno or 0),
            code=ExitCode.SYSTEM,
        ) from exc


def make_mount(plan: Plan, options: MountOptions, point: str) -> Mount:
    """Mount on `point` (free of symlinks).  The kernel's INIT then waits in the descriptor."""
    if plan.helper is None:
        mount = _mount_directly(plan, options, point)
    else:
        mount = _mount_by_helper(plan.helper, plan, options, point)
    entry = topmost(point, read_mounts())
    # None where there is no /proc: then umount(2) itself has to find out.
    mount.number = "" if entry is None else entry.device
    if options.auto_unmount:
        mount.keeper = _start_keeper(mount)
    return mount


def is_readonly(options: MountOptions) -> bool:
    """Whether the union takes no changes."""
    return options.readonly or (options.upper is None and not options.ephemeral)


def mount_data(plan: Plan, options: MountOptions, device: int) -> str:
    """The file system's own options of mount(2)."""
    uid, gid = options.only or (os.geteuid(), os.getegid())
    words = [f"fd={device}", "rootmode=40000", f"user_id={uid}", f"group_id={gid}"]
    words.append("default_permissions")
    if plan.allow_other:
        words.append("allow_other")
    if options.max_read is not None:
        words.append(f"max_read={options.max_read}")
    return ",".join(words)


def helper_options(plan: Plan, options: MountOptions) -> str:
    """The -o of fusermount3, which adds nosuid and nodev itself."""
    fsname = (options.fsname or DEFAULT_SOURCE).replace("\\", "\\\\").replace(",", "\\,")
    words = [f"fsname={fsname}", f"subtype={options.subtype}", "default_permissions"]
    if plan.allow_other:
        words.append("allow_other")
    if options.max_read is not None:
        words.append(f"max_read={options.max_read}")
    words += sorted(options.kernel_flags - TIME_WORDS - {"nosymfollow"})
    if is_readonly(options):
        words.append("ro")
    return ",".join(words)


def _mount_directly(plan: Plan, options: MountOptions, point: str) -> Mount:
    flags = MountFlag.RDONLY if is_readonly(options) else MountFlag(0)
    for word in options.kernel_flags:
        flags |= _FLAGS[word]
    device = _open_device()
    source = options.fsname or DEFAULT_SOURCE
    fstype = f"fuse.{options.subtype}"
    try:
        syscalls.mount(source, point, fstype, flags, mount_data(plan, options, device))
    except OSError as exc:
        os.close(device)
        hint = {
            errno.EPERM: "in a user namespace it must have its own mounts too (unshare -Urm)",
            errno.ENODEV: "this kernel has no FUSE",
        }.get(exc.errno or 0)
        reason = os.strerror(exc.errno or errno.EIO)
        raise UnionfsError(f"cannot mount on {point}: {reason}", hint=hint) from exc
    return Mount(point, device, "", None, only=options.only)


def _mount_by_helper(helper: str, plan: Plan, options: MountOptions, point: str) -> Mount:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, open(os.memfd_create("fusermount3"), "w+b") as messages:
        process = subprocess.Popen(
            [helper, "-o", helper_options(plan, options), "--", point],
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
        )
        theirs.close()
        device = _receive_descriptor(ours)
        process.wait()
        if device < 0:
            messages.seek(0)
            text = messages.read(4096).decode(errors="replace").strip().splitlines()
            said = text[-1].removeprefix("fusermount3: ") if text else "no reason given"
            raise UnionfsError(f"cannot mount on {point}: fusermount3: {said}")
    return Mount(point, device, "", helper)


def _receive_descriptor(sock: socket.socket) -> int:
    """The descriptor that fusermount3 sends along with one byte; -1 if it ends without."""
    fds = array.array("i")
    _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_LEN(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: fds.itemsize])
            return fds[0]
    return -1


def still_mounted(mount: Mount) -> bool:
    """Whether our own mount is what is seen at its mount point."""
    if not mount.number:
        return True
    entry = topmost(mount.point, read_mounts())
    return entry is not None and entry.device == mount.number


def unmount(mount: Mount, *, lazily: bool) -> bool:
    """Unmount what we mounted; False if it is busy.  Fine if it is gone already.

    Blocks until the loop has written what was changed by mmap: not to be called on its thread,
    unless it has ended.
    """
    if not still_mounted(mount):
        return True
    try:
        flags = UnmountFlag.NOFOLLOW | (UnmountFlag.DETACH if lazily else UnmountFlag(0))
        if mount.helper is None or has_admin():
            syscalls.umount(mount.point, flags)
            return True
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            return False
        if exc.errno == errno.EINVAL:  # gone between the look and the call
            return True
        if mount.helper is None:
            raise
    command = [mount.helper, "-u", *(["-z"] if lazily else []), "--", mount.point]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False, text=True
    )
    return result.returncode == 0 or not still_mounted(mount)


def make_way(plan: Plan, path: str) -> bool:
    """Take away the mount of a union of ours whose daemon was killed; whether there was one.

    Nothing at or below it can be reached any more.  What cannot be taken away is an error later on.
    """
    point = os.path.realpath(path)
    mounts = read_mounts()
    entry = topmost(point, mounts)
    if entry is None or entry.fstype != FSTYPE or ask(entry, mounts).state != "dead":
        return False
    with contextlib.suppress(OSError):
        return unmount(Mount(point, -1, entry.device, plan.helper), lazily=True)
    return False


def read_ahead(mount: Mount) -> None:
    """Have the kernel ask for as much at once as goes by one splice(2), where it reads ahead.

    INIT can only lower its 128 KiB; what stands in /sys/class/bdi is root's to change (see
    Documentation/ABI/testing/sysfs-class-bdi of the kernel). After INIT.
    """
    with (
        contextlib.suppress(OSError),
        open(f"/sys/class/bdi/{mount.number}/read_ahead_kb", "w") as f,
    ):
        f.write(str(_READ_AHEAD_KIB))


def flush(mount: Mount) -> None:
    """Have the kernel write what it holds for us.  Needs the loop; not on its thread."""
    if mount.only is not None:
        uid, gid = mount.only
        subprocess.run(
            ["sync", "-f", mount.point], user=uid, group=gid, extra_groups=(), check=False
        )
        return
    fd = os.open(mount.point, os.O_RDONLY | os.O_DIRECTORY)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


def _start_keeper(mount: Mount) -> "subprocess.Popen[bytes]":
    """A process that waits for our end, however that comes, and then unmounts."""
    if mount.helper is None:
        unmount_it = ["umount", "-l", "-i", "--", mount.point]
    else:
        unmount_it = [mount.helper, "-u", "-z", "-q", "--", mount.point]
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; exec "$@"', "unionfs-keeper", *unmount_it],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


def release_keeper(mount: Mount) -> None:
    """We unmount ourselves: auto_unmount's process is not needed any more."""
    keeper, mount.keeper = mount.keeper, None
    if keeper is not None:
        keeper.kill()
        keeper.wait()
        if keeper.stdin is not None:
            keeper.stdin.close()
