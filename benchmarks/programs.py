# SPDX-License-Identifier: GPL-2.0-or-later
"""Workloads of real programs: archives, repositories, packages, compilers, several at once."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import system
from benchmarks.system import inside
from benchmarks.workload import Place, Skipped, Timed, folder, in_processes, workload

MODULES = "argparse,asyncio,email.mime.text,http.client,json,sqlite3,unittest,xml.dom.minidom"
MIXING = 4


def _call(command: Sequence[str], **more: str) -> None:
    """Run a program; its last words are in the exception if it fails."""
    done = subprocess.run(
        command, capture_output=True, stdin=subprocess.DEVNULL, env=os.environ | more, check=False
    )
    if done.returncode:
        words = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"{command[0]}: exit {done.returncode}: {' '.join(words[-4:])}")


def _there(path: str, what: str) -> str:
    if not os.path.exists(path):
        raise Skipped(f"{what} is not installed")
    return path


@workload("unpack of a tar", "name", "tar -x of Python's standard library")
def unpack(place: Place) -> Timed:
    archive = f"{place.store}/tree.tar"
    with tarfile.open(archive) as members:
        count = len(members.getnames())
    command = ["tar", "-xf", archive, "-C", folder(place, "unpacked")]
    return Timed(count, lambda: _call(command))


@workload("git clone and status", "clone", "a repository of Python's standard library")
def git(place: Place) -> Timed:
    repository = _there(f"{place.store}/repository", "git")
    target = f"{place.root}/clone"
    settings = {"GIT_CONFIG_GLOBAL": f"{place.store}/gitconfig", "GIT_CONFIG_NOSYSTEM": "1"}

    def run() -> None:
        _call(["git", "clone", "-q", f"file://{repository}", target], **settings)
        _call(["git", "-C", target, "status", "--short"], **settings)

    return Timed(1, run)


@workload("dpkg -i", "package", "a package of as many files, in a chroot of dpkg and what it needs")
def dpkg(place: Place) -> Timed:
    top = f"{place.root}/system"
    shutil.copy(_there(f"{place.store}/package.deb", "dpkg-deb"), f"{top}/package.deb")
    command = ["dpkg", "--force-bad-path", "--log=/dev/null", "-i", "/package.deb"]
    return Timed(1, lambda: _call(inside(top, command), PATH=system.PATH))


@workload("pip install", "package", "a wheel of as many files, in a chroot of Python")
def pip(place: Place) -> Timed:
    top, wheel = f"{place.root}/system", "benchmark_files-1-py3-none-any.whl"
    _there(f"{place.lower}/system/python/site/pip", "pip")
    shutil.copy(f"{place.store}/{wheel}", f"{top}/{wheel}")
    command = [
        *("python3", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
        *("--no-compile", "--disable-pip-version-check", "--no-cache-dir", "--ignore-installed"),
        *("--no-warn-script-location", "--root-user-action=ignore", "--prefix=/pip", f"/{wheel}"),
    ]
    homes = {"PYTHONHOME": "/python", "PYTHONPATH": "/python/site", "PYTHONDONTWRITEBYTECODE": "1"}
    return Timed(1, lambda: _call(inside(top, command), PATH=system.PATH, **homes))


def _starts(command: Sequence[str], count: int, **more: str) -> Timed:
    def run() -> None:
        for _ in range(count):
            _call(command, **more)

    return Timed(count, run)


@workload("start of python3", "start", "python3 from the union imports eight packages from it")
def start_python(place: Place) -> Timed:
    home = f"{place.root}/python"
    command = [f"{home}/bin/python3", "-S", "-c", f"import {MODULES}"]
    return _starts(command, place.sizes.starts, PYTHONHOME=home, PYTHONDONTWRITEBYTECODE="1")


@workload("gcc", "file", "gcc from the union compiles a file with headers from it")
def gcc(place: Place) -> Timed:
    top = f"{place.root}/gcc"
    words = Path(f"{place.lower}/gcc/arguments")
    if not words.exists():
        raise Skipped("gcc is not installed")
    arguments = words.read_text().replace("@", top).split()
    command = [*arguments, "-c", f"{top}/main.c", "-o", f"{place.root}/main.o"]
    return _starts(command, max(1, place.sizes.starts // 2))


def _mix(place: Place, number: int) -> Callable[[], None]:
    """One process: what programs do most, in a random order that is always the same."""
    chance = random.Random(number)
    source = f"{place.root}/mixed/{number}"
    lowers = [f"{source}/{name}" for name in sorted(os.listdir(f"{place.lower}/mixed/{number}"))]
    mine: list[str] = []
    todo: list[tuple[str, str, str]] = []
    for turn in range(place.sizes.mixed):
        kind = chance.choice(("stat", "stat", "read", "read", "read", "new", "new", "list"))
        if chance.random() < 0.2 and (mine or lowers):
            kind = chance.choice(("append", "rename", "unlink"))
        if kind == "new":
            mine.append(f"{source}/new{turn}")
            todo.append((kind, mine[-1], ""))
            continue
        path = chance.choice(mine + lowers)
        todo.append((kind, path, f"{source}/moved{turn}"))
        if kind in ("rename", "unlink"):
            (mine if path in mine else lowers).remove(path)
        if kind == "rename":
            mine.append(f"{source}/moved{turn}")
    return lambda: _do(todo, source)


def _do(todo: Sequence[tuple[str, str, str]], source: str) -> None:
    buffers = [bytearray(1 << 20)]
    for kind, path, other in todo:
        if kind == "stat":
            os.lstat(path)
        elif kind == "list":
            os.listdir(source)
        elif kind == "rename":
            os.rename(path, other)
        elif kind == "unlink":
            os.unlink(path)
        else:
            flags = {"read": os.O_RDONLY, "append": os.O_WRONLY | os.O_APPEND}
            fd = os.open(path, flags.get(kind, os.O_CREAT | os.O_WRONLY), 0o644)
            if kind == "read":
                os.readv(fd, buffers)
            else:
                os.write(fd, b"x" * 1000)
            os.close(fd)


@workload("mixed", "operation", "4 processes, each in a directory of the lower: all of the above")
def mixed(place: Place) -> Timed:
    works = [_mix(place, number) for number in range(MIXING)]
    return Timed(MIXING * place.sizes.mixed, in_processes(works))
