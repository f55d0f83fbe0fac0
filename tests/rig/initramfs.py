# SPDX-License-Identifier: GPL-2.0-or-later
"""A boot in small: an initramfs in memory with nothing but what it needs, and the system it starts.

`Tree` is a directory that programs are copied to, with the libraries that ldd(1) names, as the
tools do that make an initramfs. `start` makes one the root of namespaces of its own and runs its
/init, which hands over by switch_root(8): that removes the initramfs's files and runs the system's
init as the same first process. When it ends the kernel kills all others, as a power cut would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

_PLACES = ("bin", "sbin", "lib", "lib64")
# Of a system with switch_root(8) and mount(8); /dev is the machine's.
INIT = """\
#!/bin/sh
mount -t proc proc /proc && umount -l /old && rmdir /old || exit 90
mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /run && mount -t devtmpfs dev /dev || exit 91
{mount}
{boot}
exec switch_root /sysroot /sbin/init
"""
# Run by unshare(1): the directory becomes the root.
_ENTER = 'mount --bind "$1" "$1"; cd "$1" && mkdir old && pivot_root . old && exec /init'


class Tree:
    """A directory as a system's root."""

    def __init__(self, top: Path) -> None:
        self.top = top

    def make(self) -> None:
        """The directories that every system has."""
        for name in _PLACES:
            if os.path.islink(f"/{name}"):
                target = os.readlink(f"/{name}")
                (self.top / target).mkdir(parents=True, exist_ok=True)
                (self.top / name).symlink_to(target)
        for name in ("proc", "sys", "dev", "run", "tmp", "etc", "sysroot"):
            (self.top / name).mkdir(parents=True, exist_ok=True)

    def programs(self, *names: str) -> None:
        """Copy programs by their names."""
        for name in names:
            path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
            assert path is not None, f"{name} is not installed"
            self.files([path])

    def files(self, paths: Iterable[str]) -> None:
        """Copy files, links as links, with the libraries that they need."""
        for path in paths:
            if os.path.islink(path):
                self._put(path)
                target = os.path.join(os.path.dirname(path), os.readlink(path))
                self.files([os.path.normpath(target)])
            elif not self._put(path):
                continue
            elif _is_program(path):
                self.files(_libraries(path))

    def _put(self, path: str) -> bool:
        """Whether it was not there."""
        place = self.top / path.lstrip("/")
        if os.path.lexists(place):
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place, follow_symlinks=False)
        return True

    def script(self, path: str, text: str) -> None:
        """Write a program."""
        place = self.top / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(0o755)


def _is_program(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def _libraries(path: str) -> list[str]:
    done = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)
    words = [word for line in done.stdout.splitlines() for word in line.split()]
    return [word for word in words if word.startswith("/") and os.path.exists(word)]


def start(tree: Tree) -> subprocess.CompletedProcess[str]:
    """Run its /init as the first process, until that ends."""
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _ENTER, "sh"]
    return subprocess.run(
        [*command, str(tree.top)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=120,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
