# SPDX-License-Identifier: GPL-2.0-or-later
"""The lower of all systems, and the store: what workloads unpack, clone and install.

Each workload has a tree of its own here. The trees are Python's standard library, small files only.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL

from benchmarks.programs import MIXING, MODULES
from benchmarks.system import add_program, make_system
from benchmarks.workload import MIB, Sizes

SMALL = MIB
LARGE = 3  # files
HEADERS = "stdio stdlib string unistd errno fcntl math pthread signal time sys/stat sys/socket"
_LIBRARY = Path(sysconfig.get_path("stdlib"))
_CONTROL = """\
Package: unionfs-benchmark
Version: 1
Architecture: all
Maintainer: nobody <nobody@localhost>
Description: files to unpack
"""
_METADATA = "Metadata-Version: 2.1\nName: benchmark-files\nVersion: 1\n"
_WHEEL = "Wheel-Version: 1.0\nGenerator: benchmark\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def sources(most: int) -> list[str]:
    """Names in the standard library, directory by directory, without what is large."""
    found: list[str] = []
    for folder, folders, names in os.walk(_LIBRARY):
        folders[:] = sorted(set(folders) - {"__pycache__", "site-packages", "dist-packages"})
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink() and path.stat().st_size <= SMALL:
                found.append(str(path.relative_to(_LIBRARY)))
    return found[:most]


def _copy(names: Sequence[str], target: Path) -> None:
    target.mkdir(parents=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_LIBRARY / name, target / name)


def fill(path: Path, size: int) -> None:
    """Written to the end, so that nothing of it is a hole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    piece = os.urandom(MIB)
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(piece)


def make_lower(lower: Path, sizes: Sizes) -> None:
    """Fill an empty directory."""
    make_trees(lower, sizes)
    _python(lower / "python")
    _system(lower / "system")
    _gcc(lower / "gcc")


def make_trees(lower: Path, sizes: Sizes) -> None:
    """What the workloads of names and of data need."""
    names = sources(sizes.files)
    for tree in ("walk", "read1", "read4", "read16", "remove"):
        _copy(names, lower / tree)
    for tree in ("append", "chmod", "chown", "unlink"):
        _copy(names[: sizes.changed], lower / tree)
    for number in range(MIXING):
        _copy([name for name in names if "/" not in name][:100], lower / "mixed" / str(number))
    (lower / "missing").mkdir()
    (lower / "missing" / "one").touch()
    for name in ("chmod", "chown"):
        for number in range(LARGE):
            fill(lower / "large" / name / str(number), sizes.large)
    fill(lower / "large" / "first-write", sizes.first_write)
    if sizes.huge:
        fill(lower / "large" / "huge", sizes.huge)
    for name in ("read", "random", "fio"):
        fill(lower / "data" / name, sizes.data)


def _python(top: Path) -> None:
    (top / "bin").mkdir(parents=True)
    shutil.copy2(os.path.realpath(sys.executable), top / "bin" / "python3")
    # With the times, which the compiled files are valid by.
    library = top / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    large = shutil.ignore_patterns("site-packages", "dist-packages", "test", "config-*", "*.a")
    shutil.copytree(_LIBRARY, library, symlinks=True, ignore=large)
    command = [str(top / "bin" / "python3"), "-S", "-c", f"import {MODULES}"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHOME": str(top)})


def _system(top: Path) -> None:
    make_system(top)
    python = os.path.realpath(sys.executable)
    add_program(top, python, "python3")
    _python(top / "python")
    pip = importlib.util.find_spec("pip")
    if pip is not None and pip.origin is not None:
        shutil.copytree(os.path.dirname(pip.origin), top / "python/site/pip")
        found = os.environ | {"PYTHONHOME": str(top / "python"), "PYTHONPATH": f"{top}/python/site"}
        _run(python, "-m", "compileall", "-q", str(top / "python/site"))
        subprocess.run([python, "-m", "pip", "--version"], check=True, env=found, stdout=DEVNULL)


def _gcc(top: Path) -> None:
    """The compiler, and just the headers it will ask for; how to call it is in `arguments`."""
    gcc = shutil.which("gcc")
    top.mkdir()
    if gcc is None:
        return
    main = top / "main.c"
    includes = "".join(f"#include <{name}.h>\n" for name in HEADERS.split())
    main.write_text(includes + 'int main(void) { puts("made"); return 0; }\n')

    def ask(*words: str) -> str:
        done = subprocess.run([gcc, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    compiler = ask("-print-prog-name=cc1")
    shutil.copy2(os.path.realpath(gcc), top / "gcc")
    shutil.copy2(compiler, top / "cc1")
    for header in ask("-M", str(main)).replace("\\\n", " ").split()[2:]:
        path = os.path.realpath(header)
        target = Path(f"{top}/root{path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    listed = subprocess.run(
        [gcc, "-E", "-v", "-x", "c", "/dev/null"], capture_output=True, text=True, check=True
    ).stderr.splitlines()
    start, end = (
        listed.index("#include <...> search starts here:"),
        listed.index("End of search list."),
    )
    places = [os.path.realpath(line.strip()) for line in listed[start + 1 : end]]
    words = ["@/gcc", "-B", "@", "-nostdinc", *(f"-isystem @/root{place}" for place in places)]
    (top / "arguments").write_text(" ".join(words))


def make_store(store: Path, sizes: Sizes) -> None:
    """Fill an empty directory with the archives and the repository."""
    names = sources(sizes.files)
    with tarfile.open(store / "tree.tar", "w") as archive:
        _copy(names, store / "tree")
        archive.add(store / "tree", "tree")
    _wheel(store / "benchmark_files-1-py3-none-any.whl", names)
    if shutil.which("dpkg-deb"):
        (store / "tree/DEBIAN").mkdir()
        (store / "tree/DEBIAN/control").write_text(_CONTROL)
        package = ["dpkg-deb", "--root-owner-group", "-Znone", "--build"]
        _run(*package, str(store / "tree"), str(store / "package.deb"))
        shutil.rmtree(store / "tree/DEBIAN")
    (store / "gitconfig").write_text("[safe]\n\tdirectory = *\n")
    if shutil.which("git"):
        git = ["git", "-C", str(store / "tree")]
        _run(*git, "init", "-q")
        _run(*git, "add", "-A", "-f")
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        _run(*git, *who, "commit", "-q", "-m", "The standard library")
        _run(*git, "repack", "-q", "-a", "-d")
        os.rename(store / "tree/.git", store / "repository")
    shutil.rmtree(store / "tree")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])}: {done.stderr.strip()}")


def _wheel(path: Path, names: Sequence[str]) -> None:
    record = []
    with zipfile.ZipFile(path, "w") as wheel:

        def add(name: str, data: bytes) -> None:
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(data)}\n")
            wheel.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)

        for name in names:
            add(f"benchmark_files/{name}", (_LIBRARY / name).read_bytes())
        add("benchmark_files-1.dist-info/METADATA", _METADATA.encode())
        add("benchmark_files-1.dist-info/WHEEL", _WHEEL.encode())
        record.append("benchmark_files-1.dist-info/RECORD,,\n")
        wheel.writestr("benchmark_files-1.dist-info/RECORD", "".join(record))


def give(path: Path, uid: int, gid: int) -> None:
    """The whole tree, if it is not his already."""
    if path.stat().st_uid == uid:
        return
    for folder, folders, names in os.walk(path):
        for name in folders + names:
            os.chown(os.path.join(folder, name), uid, gid, follow_symlinks=False)
    os.chown(path, uid, gid)


def warm(path: Path) -> None:
    """Read every file, to its end."""
    piece = bytearray(MIB)
    for folder, _, names in os.walk(path):
        for name in names:
            at = os.path.join(folder, name)
            if not os.path.islink(at):
                with open(at, "rb", buffering=0) as file:
                    while file.readinto(piece):
                        pass
