# SPDX-License-Identifier: GPL-2.0-or-later
"""The files that `unionfs boot` needs in an initramfs.

Owns the answer to what a boot loads: whatever is imported by the verb, the daemon and all that they
import anywhere, also within functions.  Shared libraries are found by the tool that makes the
initramfs, as for any program.  Called by the verb, and that by the hooks in system/.
"""

import dis
import importlib
import os
import site
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Final

from unionfs.stores import tools

_FIRST: Final = (
    *("unionfs.cli.main", "unionfs.cli.boot", "unionfs.daemon"),
    *("encodings.utf_8", "encodings.ascii"),  # an initramfs has no locales
)
_PACKAGE: Final = "unionfs"
# What is imported for other verbs only, or for other users than root.
_NOT_AT_BOOT: Final = ("unionfs.cli.", "unionfs.notify")
# As far as they are installed; gocryptfs for what `unionfs store encrypt` makes.
_PROGRAMS: Final = ("blkid", "e2fsck", "cryptsetup", "gocryptfs", "systemd-ask-password")


def needed() -> list[str]:
    """Absolute paths, sorted; each file with the links that lead to it."""
    load_all()
    found: set[str] = set()
    for path in (*_interpreter(), *_modules(), *_programs()):
        found.update(_with_links(path))
    return sorted(found)


def load_all() -> None:
    """Import what a boot may import, as far as it is installed."""
    waiting = list(_FIRST)
    seen = set(waiting)
    while waiting:
        module = _import(waiting.pop())
        if module is None or module.__name__.partition(".")[0] != _PACKAGE:
            continue
        for name in _imported(module):
            if name not in seen and not name.startswith(_NOT_AT_BOOT):
                seen.add(name)
                waiting.append(name)


def _import(name: str) -> ModuleType | None:
    """A module; `from A import b` names A.b also where b is no module."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _imported(module: ModuleType) -> Iterator[str]:
    """What the code of a module imports, wherever it does."""
    loader = module.__spec__.loader if module.__spec__ is not None else None
    find = getattr(loader, "get_code", None)
    code = find(module.__name__) if find is not None else None
    waiting = [code] if isinstance(code, CodeType) else []
    while waiting:
        code = waiting.pop()
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        base = ""
        for step in dis.get_instructions(code):
            if step.opname == "IMPORT_NAME":
                base = step.argval
                yield base
            elif step.opname == "IMPORT_FROM":
                yield f"{base}.{step.argval}"


def _interpreter() -> Iterator[str]:
    """Python itself, its virtual environment, and how its packages are found."""
    yield sys.executable
    if sys.prefix != sys.base_prefix:
        yield f"{sys.prefix}/pyvenv.cfg"
        yield os.path.realpath(sys.executable)
    for place in (*site.getsitepackages(), site.getusersitepackages()):
        yield from map(str, Path(place).glob("*.pth"))
    script = Path(sys.executable).parent / _PACKAGE
    yield str(script) if script.exists() else sys.argv[0]


def _modules() -> Iterator[str]:
    for module in list(sys.modules.values()):
        for path in (getattr(module, "__file__", None), getattr(module, "__cached__", None)):
            if isinstance(path, str) and os.path.isfile(path):
                yield os.path.abspath(path)


def _programs() -> Iterator[str]:
    for name in _PROGRAMS:
        if (path := tools.find(name)) is not None:
            yield path


def _with_links(path: str) -> Iterator[str]:
    """The path, and what it points to, step by step."""
    while os.path.islink(path):
        yield path
        path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
    yield path
