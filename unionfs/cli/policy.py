# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs policy`: what profiles say, without mounting anything.  Called by main.py."""

import json
import sys
from collections.abc import Sequence

from unionfs.cli.parser import Parser, system_root
from unionfs.errors import ExitCode, UnionfsError, printable, usage_error
from unionfs.profiles import files, links
from unionfs.profiles.profile import Profile, Rule

USAGE = """\
unionfs policy test PATH... [--profile NAME] [--root DIR] [--json]
       unionfs policy show [NAME] [--root DIR] [--json]"""

DESCRIPTION = """\
test tells what becomes of each PATH: by which profile and rule, and where its changes
are kept. show lists the profiles, or the rules of one, with the files that say so."""

EPILOG = """
exit codes: 0 told, 1 wrong usage, 32 a profile is wrong; what the others say is told
"""

_MEANINGS = {
    "persist": "persists: changes are kept in {place}",
    "tmpfs": "is forgotten: changes are in memory, over the base",
    "bind": "persists: it lies in {place}",
    "exclude": "is the base's, and cannot be changed",
    "link": "is forgotten, but for files linked to {place}",
}
_EMPTY = "is forgotten: empty at first, in memory"
_LINKED = "persists: with {path}, and files linked to {place}"


def run(argv: Sequence[str]) -> int:
    """Tell."""
    parser = Parser(prog="unionfs policy", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("verb", metavar="test|show", help="what to tell")
    add("words", nargs="*", metavar="PATH|NAME", help="in the union; a profile")
    add("--profile", metavar="NAME", help="only what this one says")
    where = "those of the system that is mounted there"
    add("--root", type=system_root, default="/", metavar="DIR", help=where)
    add("--json", action="store_true", help="for programs")
    given = parser.read(argv)
    if given.verb == "test" and given.words:
        return _test(given.words, given.profile, given.root, as_json=given.json)
    if given.verb == "show" and len(given.words) < 2:
        return _show(given.words, given.root, as_json=given.json)
    raise usage_error("what to tell is not understood", "see unionfs policy --help")


def _test(paths: Sequence[str], only: str | None, root: str, *, as_json: bool) -> int:
    profiles, code = _all(root) if only is None else ([_load(only, root)], ExitCode.OK)
    told = []
    for path in paths:
        if not path.startswith("/"):
            raise usage_error(f"{path} is no absolute path", "write it as the system sees it")
        place = links.named(root, path)
        tops = [(p, links.followed(root, p.where)) for p in profiles]
        found = [(p, rule) for p, top in tops if (rule := p.find(place, top)) is not None]
        told += [_object(path, profile, rule) for profile, rule in found]
        if not found:
            told.append({"path": path, "profile": None, "kind": None})
        if not as_json:
            for profile, rule in found:
                print(printable(f"{path} {meaning(profile, rule)} ({profile.name}: {rule.path})"))
            if not found:
                print(printable(f"{path} is left as it is: no profile has a rule for it"))
    if as_json:
        print(json.dumps(told, indent=2))
    return code


def _all(root: str) -> tuple[list[Profile], ExitCode]:
    """Those that are right, without templates; of each other one a warning."""
    found, code = [], ExitCode.OK
    for name in files.names(root):
        if name.endswith("@"):
            continue
        try:
            found.append(_load(name, root))
        except UnionfsError as exc:
            warning = printable(f"unionfs: warning: profile {name}: {exc.line()}")
            print(warning, file=sys.stderr)
            code = ExitCode.FAIL
    return found, code


def _load(name: str, root: str) -> Profile:
    """The one that `unionfs up NAME --root ROOT` takes."""
    return files.load(name, files.said_in(name, root))


def meaning(profile: Profile, rule: Rule) -> str:
    """What becomes of what a rule covers, in words."""
    if rule.kind == "tmpfs" and not rule.union:
        return _EMPTY
    if rule.kind == "link" and not profile.links_into_base(rule):
        above = profile.above(rule)
        while above is not None and above.kind == "link" and not profile.links_into_base(above):
            above = profile.above(above)
        if above is not None and above.kind in ("persist", "bind"):
            return _LINKED.format(place=_place(profile, rule), path=above.path)
    return _MEANINGS[rule.kind].format(place=_place(profile, rule))


def _place(profile: Profile, rule: Rule) -> str | None:
    from unionfs.profiles.plan import place_in_store

    if rule.kind in ("tmpfs", "exclude"):
        return None
    return rule.upper or place_in_store(profile, rule)


def _object(path: str, profile: Profile, rule: Rule) -> dict[str, object]:
    return {
        "path": path,
        "profile": profile.name,
        "rule": rule.path,
        "kind": rule.kind,
        "union": rule.kind in ("persist", "tmpfs") and rule.union,
        "place": _place(profile, rule),
        "file": rule.said_by,
    }


def _show(words: Sequence[str], root: str, *, as_json: bool) -> int:
    from unionfs.cli import show

    if words:
        profile = _load(words[0], root)
        rules = [_object(rule.path, profile, rule) for rule in profile.rules]
        if as_json:
            print(json.dumps(rules, indent=2))
            return ExitCode.OK
        rows = [(r.path, meaning(profile, r), r.said_by) for r in profile.rules]
        show.table(("path", "what becomes of it", "said by"), rows)
        return ExitCode.OK
    told = [_profile(name, root) for name in files.names(root)]
    if as_json:
        print(json.dumps(told, indent=2))
    elif told:
        show.table(("profile", "", "file"), [(t["name"], t["about"], t["file"]) for t in told])
    else:
        print(f"no profile; write one: {files.directories(root)[0]}/NAME.toml")
    return ExitCode.OK


def _profile(name: str, root: str) -> dict[str, str]:
    if name.endswith("@"):
        return {"name": name, "about": "(a template)", "file": ""}
    try:
        profile = files.load(name, root)
    except UnionfsError as exc:
        return {"name": name, "about": f"wrong: {exc.line()}", "file": ""}
    return {"name": name, "about": profile.description, "file": profile.files[0]}
