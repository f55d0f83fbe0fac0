# SPDX-License-Identifier: GPL-2.0-or-later
"""Finding profiles: /etc/unionfs/NAME.toml, those of the vendor and of this boot, and drop-ins.

Owns the places and their order, which are systemd's (systemd.unit(5)): a file in /etc takes the
place of one with the same name in /run, and that of one in /usr/lib; drop-ins in NAME.toml.d/ of
any of these places are added in the order of their names.  A user's profiles are below
$XDG_CONFIG_HOME/unionfs and $XDG_RUNTIME_DIR/unionfs.

A link to /dev/null masks what has its name in the places after it: a profile, or a drop-in.

`app@one` is read from app@.toml, where %i stands for `one` (%% is a percent sign).
"""

import os
import re
import tomllib
from typing import Any, Final

from unionfs import runtime
from unionfs.errors import UnionfsError
from unionfs.profiles import persistence, profile
from unionfs.profiles.profile import Profile
from unionfs.profiles.reading import read_whole

_SUFFIX: Final = ".toml"
_SYSTEM: Final = ("/etc/unionfs", "/run/unionfs", "/usr/lib/unionfs")


def directories(root: str = "/") -> list[str]:
    """Where profiles lie, the place that wins first."""
    if os.geteuid() == 0:
        return [profile.below(root, path) for path in _SYSTEM]
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    found = [f"{home}/unionfs"]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        found.append(f"{runtime}/unionfs")
    return found


def names(root: str = "/") -> list[str]:
    """The profiles there are, but for those that are masked; templates end in @."""
    found = set()
    for place in directories(root):
        for entry in _entries(place):
            if entry.endswith(_SUFFIX) and profile.NAME.fullmatch(entry.removesuffix(_SUFFIX)):
                found.add(entry.removesuffix(_SUFFIX))
    mains = {name: _main(name, root) for name in found}
    return sorted(name for name, main in mains.items() if main is not None and not _masks(main))


def own_name(name: str) -> str:
    """What a profile is called that is named so: by its name, or by a path."""
    own = os.path.basename(name).removesuffix(_SUFFIX) if "/" in name else name
    profile.check_name(own)
    return own


def said_in(name: str, root: str) -> str:
    """The system whose files say what a profile for the system at `root` is: that one itself.

    Only if it has none of this name, the one that we run in: an initramfs, a rescue system.
    """
    if "/" in name or _main(name, root) is not None or _main(name, "/") is None:
        return root
    return "/"


def load(name: str, root: str = "/") -> Profile:
    """Read a profile by its name, or from the one file that a path names.

    root: the system whose files are meant.  Raises UnionfsError.
    """
    return _complete(said(name, root))


def said(name: str, root: str = "/") -> Profile:
    """What the files themselves say: no store is opened to learn of paths."""
    if own_name(name) == runtime.ROOT:
        hint = "rename it: that is what the root's own union is called"
        raise UnionfsError(f"a profile cannot have the name {runtime.ROOT}", hint=hint)
    if "/" in name:
        return profile.read(own_name(name), [(name, _read(name))])
    places = directories(root)
    _template, at, instance = name.partition("@")
    if at and not instance:
        raise UnionfsError(f"{name} is a template", hint=f"name what it is for: {name}ONE")
    main = _main(name, root)
    if main is None:
        known = ", ".join(names(root))
        hint = f"the profiles are {known}" if known else f"write {places[0]}/{name}.toml"
        raise UnionfsError(f"there is no profile {name}", hint=hint)
    if _masks(main):
        hint = f"remove it to have {name} again"
        raise UnionfsError(f"profile {name} is masked: {main} leads to {os.devnull}", hint=hint)
    folders = [f"{called}{_SUFFIX}.d" for called in reversed(_candidates(name))]
    files = [main, *_drop_ins(places, folders)]
    documents = [(path, _read(path)) for path in files]
    if at:
        documents = [(path, _filled(document, instance)) for path, document in documents]
    return profile.read(name, documents)


def _complete(read: Profile) -> Profile:
    """Without paths of its own it has those that the store's persistence.conf names."""
    if read.rules:
        return read
    if read.store is None:
        what = read.files[0] if read.files else read.name
        raise UnionfsError(f"{what} names no paths", hint='add [paths] and "/etc" = "persist"')
    return persistence.complete(read)


def _entries(place: str) -> list[str]:
    try:
        return sorted(os.listdir(place))
    except OSError:
        return []


def _candidates(name: str) -> list[str]:
    """What a profile's files may be called: by its own name, or as its template."""
    template, at, instance = name.partition("@")
    return [name, f"{template}@"] if at and instance else [name]


def _main(name: str, root: str) -> str | None:
    """The file of a profile, without its drop-ins."""
    return _first(directories(root), [called + _SUFFIX for called in _candidates(name)])


def _first(places: list[str], wanted: list[str]) -> str | None:
    """The file of the first name that is found, in the place that wins; whatever it is."""
    paths = [f"{place}/{name}" for name in wanted for place in places]
    return next((path for path in paths if os.path.lexists(path)), None)


def _masks(path: str) -> bool:
    return os.path.realpath(path) == os.devnull


def _drop_ins(places: list[str], folders: list[str]) -> list[str]:
    """By name; of two with the same name the one in the place that wins."""
    found: dict[str, str] = {}
    for folder in folders:
        for place in reversed(places):
            for entry in _entries(f"{place}/{folder}"):
                if entry.endswith(_SUFFIX):
                    found[entry] = f"{place}/{folder}/{entry}"
    return [found[entry] for entry in sorted(found) if not _masks(found[entry])]


def _read(path: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(read_whole(path).decode())
        null = _has_null(document)
    except OSError as exc:
        raise UnionfsError(f"cannot read {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UnionfsError(f"{path} is not understood: {exc}", hint="it has to be TOML") from exc
    if null:
        hint = "no path and no option can have one"
        raise UnionfsError(f"{path} has a null character", hint=hint)
    return document


def _has_null(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_null, (*value, *value.values())))
    if isinstance(value, list):
        return any(map(_has_null, value))
    return isinstance(value, str) and "\0" in value


def _filled(value: Any, instance: str) -> Any:  # noqa: ANN401
    """A document with %i filled in."""
    if isinstance(value, str):
        return re.sub("%([%i])", lambda match: "%" if match[1] == "%" else instance, value)
    if isinstance(value, list):
        return [_filled(item, instance) for item in value]
    if isinstance(value, dict):
        return {_filled(key, instance): _filled(item, instance) for key, item in value.items()}
    return value
