# SPDX-License-Identifier: GPL-2.0-or-later
"""A real systemd, booted in a container in a second.

Its root is this system by kernel overlayfs, with all that is changed on a tmpfs, so that the
unionfs under test is in it at the same path.  systemd-nspawn boots it; a service runs the scripts
that a test has given, one after the other, and then ends the container, as a shutdown ends a
machine.  What they said stays in `out`, and the root can be looked at until the test is over.

systemd-nspawn makes cgroups and does not remove them: they are below one of our own, which we do.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.rig import ground, syscalls

_PATIENCE = 900
_TOP = Path(__file__).resolve().parents[2]
_CGROUPS = Path("/sys/fs/cgroup")
_RUN = """\
#!/bin/bash
# Each script by itself: the next one runs whatever became of this one.
for script in /out/*.sh; do
    name=${script%.sh}
    timeout -s KILL 180 bash -eu "$script" >"$name.log" 2>&1
    status=$?
    if [ "$status" = 137 ]; then # in what it hung
        systemctl list-jobs
        ps axfo pid,stat,wchan:20,etime,args
    fi >>"$name.log" 2>&1
    echo "$status" >"$name.status"
done
"""
_SERVICE = """\
[Unit]
After=local-fs.target remote-fs.target basic.target
[Service]
Type=oneshot
ExecStart=/bin/bash /out/run
TimeoutStartSec=infinity
ExecStopPost=/bin/systemctl --no-block exit 7
"""
_TARGET = """\
[Unit]
Requires=basic.target test-scripts.service
After=basic.target
AllowIsolate=yes
"""
# Nobody sits at the console.
_EMERGENCY = """\
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
ExecStart=/bin/systemctl --force exit 9
"""
_ENDED = 7


class Said(NamedTuple):
    """What became of a script."""

    status: int
    text: str


def why_not() -> str | None:
    """Why no container can be booted here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("systemd-nspawn") is None:
        return "there is no systemd-nspawn"
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlayfs"
    if not _hierarchies():
        return "there are no cgroups for a systemd"
    return None


def _hierarchies() -> list[Path]:
    """Where systemd keeps its processes: cgroup v2, or v1 and v2 side by side."""
    if (_CGROUPS / "cgroup.controllers").exists():
        found = [_CGROUPS]
    else:
        found = [_CGROUPS / "systemd", _CGROUPS / "unified"]
    return [path for path in found if os.access(path / "cgroup.procs", os.W_OK)]


class Machine:
    """One root, which may be booted several times."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.name = f"unionfs-test-{secrets.token_hex(4)}"
        self.root, self.out = base / "root", base / "out"
        self.changes = base / "changes"
        for path in (self.root, self.out, self.changes, base / "work"):
            path.mkdir()
        words = f"lowerdir=/,upperdir={self.changes},workdir={base / 'work'}"
        ground.run("mount", "-t", "overlay", "overlay", "-o", words, self.root)
        self._count = 0
        self.write("/etc/systemd/system/test-scripts.service", _SERVICE)
        self.write("/etc/systemd/system/test.target", _TARGET)
        self.write("/etc/systemd/system/emergency.service", _EMERGENCY)
        self.write("/etc/fstab", "")
        # What is tested may lie in /tmp, which would be emptied at boot.
        self.write("/etc/tmpfiles.d/tmp.conf", "")
        (self.out / "run").write_text(_RUN)
        # The way to what is tested is open to all in there.
        for path in (_TOP, Path(sys.prefix)):
            for parent in path.parents[:-1]:
                with contextlib.suppress(FileNotFoundError):
                    self.below(parent).chmod(0o755)

    def below(self, path: str | Path) -> Path:
        """A path of the container, seen from outside."""
        return self.root / str(path).lstrip("/")

    def write(self, path: str, text: str) -> None:
        file = self.below(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def script(self, name: str, text: str) -> None:
        """To be run in there; each line must succeed.  In the order of their making."""
        self._count += 1
        (self.out / f"{self._count:02}-{name}.sh").write_text(text)

    def said(self, name: str) -> Said:
        """What a script has said."""
        found = next(iter(self.out.glob(f"[0-9][0-9]-{name}.status")), None)
        assert found is not None, f"{name} was not run to its end: {self.console()}"
        return Said(int(found.read_text()), found.with_suffix(".log").read_text(errors="replace"))

    def console(self) -> str:
        return (self.out / "console").read_text(errors="replace")

    def journal(self, *words: str) -> str:
        """The container's journal, of all its boots."""
        place = self.below("/var/log/journal")
        return ground.run("journalctl", "-q", "-D", place, "-o", "short-monotonic", *words)

    def boot(
        self,
        *words: str,
        binds: Sequence[str] = (),
        devices: bool = False,
        settings: Sequence[str] = (),
        ends: int = _ENDED,
    ) -> None:
        """Boot, run the scripts, shut down.  `words` are for the kernel's command line.

        devices: with udev, which needs a /sys that can be written.  settings: the environment of
        the container's systemd.
        """
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_NSPAWN_TMPFS_TMP": "0"}
        command = ["systemd-nspawn", "-q", "-b", "-D", str(self.root), "--register=no"]
        command += ["--keep-unit", "--console=pipe", "--link-journal=no", "--resolv-conf=off"]
        command += [f"--machine={self.name}", f"--bind={self.out}:/out"]
        if devices:
            environment["SYSTEMD_NSPAWN_API_VFS_WRITABLE"] = "yes"
            command.append("--private-network")
            # Those would change the machine itself.
            masked = ("systemd-udev-trigger.service", "systemd-sysctl.service")
            words = (*words, *(f"systemd.mask={unit}" for unit in masked))
        loops = [str(node) for node in Path("/dev").glob("loop[0-9]*")]
        nodes = ["/dev/fuse", "/dev/autofs", "/dev/loop-control", *loops, *binds]
        command += [f"--bind={node}" for node in nodes if os.path.exists(node.partition(":")[0])]
        command += [f"--setenv={setting}" for setting in settings]
        command += [f"--bind-ro={place}" for place in self._hidden()]
        command += ["--", "systemd.unit=test.target", *words]
        with _cgroups(self.name) as enter, open(self.out / "console", "ab") as console:
            try:
                code: int | None = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    env=environment,
                    timeout=_PATIENCE,
                    check=False,
                    preexec_fn=enter,
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        last = max(self.out.glob("*.log"), default=None)
        said = f"{last}: {last.read_text(errors='replace')}" if last is not None else ""
        if code != ends:
            lines = "\n".join(self.journal().splitlines()[-100:])
            raise AssertionError(f"the container ended with {code}: {said}\n{lines}")

    def why_not(self) -> str | None:
        """Why no container can be started here, by trying."""
        command = ["systemd-nspawn", "-q", "-D", str(self.root), "--register=no", "--keep-unit"]
        command += ["--pipe", "--link-journal=no", "--resolv-conf=off", f"--machine={self.name}"]
        with _cgroups(self.name) as enter:
            done = subprocess.run(
                [*command, "/bin/true"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
                check=False,
                preexec_fn=enter,
            )
        return f"systemd-nspawn: {done.stderr.strip()}" if done.returncode else None

    def _hidden(self) -> list[Path]:
        """What is tested and lies on a file system of its own, so that it is not seen in there."""
        places = dict.fromkeys((_TOP, Path(sys.prefix)))
        return [place for place in places if not self.below(place).exists()]


@contextlib.contextmanager
def _cgroups(name: str) -> Iterator[Callable[[], None]]:
    """cgroups of our own to start the container in."""
    mine = [path / name for path in _hierarchies()]
    for path in mine:
        path.mkdir()

    def enter() -> None:
        for path in mine:
            (path / "cgroup.procs").write_text("0")

    try:
        yield enter
    finally:
        for path in mine:
            _remove(path)


def _remove(top: Path) -> None:
    """A tree of cgroups, whose last processes may just be ending."""
    end = time.monotonic() + 20
    while top.exists() and time.monotonic() < end:
        for folder, _folders, _files in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


@contextlib.contextmanager
def machine(base: Path) -> Iterator[Machine]:
    """A machine whose root is on a tmpfs mounted at `base`; all of it is gone at the end."""
    ground.run("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", base)
    made = Machine(base)
    try:
        if why := made.why_not():
            pytest.skip(why)
        yield made
    finally:
        for point in reversed(ground.mounts_below(base)):
            syscalls.umount(point, syscalls.MNT_DETACH)
        for place in ("propagate", "unix-export"):
            with contextlib.suppress(OSError):
                os.rmdir(f"/run/systemd/nspawn/{place}/{made.name}")
