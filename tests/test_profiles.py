# SPDX-License-Identifier: GPL-2.0-or-later
"""Profiles: what their files say, which file wins, and what would be mounted for them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.cli import main as cli
from unionfs.errors import UnionfsError
from unionfs.mounts import read_mounts
from unionfs.profiles import files, persistence, plan, profile, running, supervise
from unionfs.profiles.plan import Ground, Step
from unionfs.profiles.profile import Profile, Rule

Capture = pytest.CaptureFixture[str]


def read(**document: object) -> Profile:
    return profile.read("p", [("p.toml", document)])


def wrong(**document: object) -> str:
    with pytest.raises(UnionfsError) as caught:
        read(**document)
    line = caught.value.line()
    assert "p.toml" in line or "profile p" in line
    return line


# What a file says


def test_rules_are_in_the_order_of_their_paths() -> None:
    made = read(
        store="LABEL=s",
        paths={"/var-x": "tmpfs", "/var/log": "tmpfs", "/": "persist", "/var/": "persist"},
    )
    assert [rule.path for rule in made.rules] == ["/", "/var", "/var/log", "/var-x"]
    assert made.rules[2] == Rule(path="/var/log", kind="tmpfs", said_by="p.toml")


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("/", "/"),
        ("/etc/fstab", "/"),
        ("/var", "/var"),
        ("/variable", "/"),
        ("/var/log/a/b", "/var/log"),
        ("var//log/", "/var/log"),
        ("/var/log/../lib", "/var"),
        ("//var/log", "/var/log"),
    ],
)
def test_the_nearest_rule_above_says_it(path: str, rule: str) -> None:
    made = read(store="s", paths={"/": "persist", "/var": "tmpfs", "/var/log": "persist"})
    found = made.rule_for(path)
    assert found is not None
    assert found.path == rule


def test_no_rule() -> None:
    made = read(store="s", paths={"/var": "persist"})
    assert made.rule_for("/etc") is None
    assert made.above(made.rules[0]) is None


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"stor": "x"}, "did you mean store?"),
        ({"store": 3}, "it has to be a locator"),
        ({"store": "tmpfs:size=1G"}, "it has to be a locator"),
        ({"paths": {"/etc": {"kind": "persist", "upper": "tmpfs:"}}}, "is of the kind tmpfs"),
        ({"paths": {"/etc": {"kind": "persist", "upper": ""}}}, "upper = ''"),
        ({"target": "mnt"}, "it has to be an absolute path"),
        ({"paths": {"/etc": "tmpfs", "/etc/": "tmpfs"}}, "'/etc' and '/etc/' are one path"),
        ({"boot": "yes"}, "true or false"),
        ({"options": [1]}, "a text or a list"),
        ({"paths": "x"}, "paths is no table"),
        ({"paths": {"etc": "persist"}}, "is no absolute path"),
        ({"paths": {"/a/../b": "persist"}}, "is no absolute path"),
        ({"paths": {"/etc": "persists"}}, "use one of persist, tmpfs"),
        ({"paths": {"/etc": True}}, "True is no kind"),
        ({"paths": {"/etc": {"kin": "x"}}}, "did you mean kind?"),
        ({"paths": {"/etc": {"kind": "tmpfs", "source": "/x"}}}, "source is not for tmpfs"),
        ({"paths": {"/etc": {"kind": "tmpfs", "size": "much"}}}, "write 100M"),
        ({"paths": {"/etc": {"kind": "tmpfs", "union": "no"}}}, "true or false"),
        ({"store": "s", "paths": {"/etc": {"kind": "bind", "source": "x"}}}, 'write "/home"'),
        ({"paths": {"/etc": "persist"}}, "needs a store"),
        ({"base": "LABEL=x", "paths": {"/etc": "tmpfs"}}, "has no target"),
        ({"base": "a::b"}, "names an empty layer"),
        ({"base": []}, "a locator or a list"),
    ],
)
def test_what_is_wrong_is_told_with_its_file(document: dict[str, Any], told: str) -> None:
    assert told in wrong(**document)


def test_later_files_win_and_may_take_rules_away() -> None:
    first = {"store": "a", "options": "fallback=ro", "paths": {"/a": "persist", "/b": "tmpfs"}}
    second = {"store": "b", "paths": {"/b": False, "/c": {"kind": "tmpfs", "size": "1M"}}}
    made = profile.read("p", [("1", first), ("2", second)])
    assert (made.store, made.options, made.files) == ("b", ("fallback=ro",), ("1", "2"))
    assert [(rule.path, rule.said_by) for rule in made.rules] == [("/a", "1"), ("/c", "2")]


# Which file


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made = [tmp_path / name for name in ("etc", "run", "lib")]
    for place in made:
        place.mkdir()
    monkeypatch.setattr(files, "directories", lambda _root="/": [str(place) for place in made])
    return made


def test_etc_wins_and_drop_ins_are_added(places: list[Path]) -> None:
    etc, run, lib = places
    (lib / "p.toml").write_text('store = "lib"\n[paths]\n"/a" = "persist"\n')
    assert files.load("p").store == "lib"
    (etc / "p.toml").write_text('store = "etc"\n[paths]\n"/a" = "persist"\n')
    for place, name, text in (
        (lib, "10-x", '"/x" = "tmpfs"'),
        (run, "10-x", '"/y" = "tmpfs"'),
        (lib, "05-z", '"/y" = "persist"'),
    ):
        (place / "p.toml.d").mkdir(exist_ok=True)
        (place / "p.toml.d" / f"{name}.toml").write_text(f"[paths]\n{text}\n")
    made = files.load("p")
    assert made.store == "etc"
    assert [(rule.path, rule.kind) for rule in made.rules] == [("/a", "persist"), ("/y", "tmpfs")]
    assert files.names() == ["p"]


def test_templates(places: list[Path]) -> None:
    text = 'store = "/data:/%i"\ntarget = "/srv/%i"\n[paths]\n"/%%i" = "persist"\n'
    (places[2] / "app@.toml").write_text(text)
    made = files.load("app@one")
    assert (made.name, made.store, made.target) == ("app@one", "/data:/one", "/srv/one")
    assert made.rules[0].path == "/%i"
    (places[0] / "app@two.toml").write_text(text.replace("/data", "/other"))
    assert files.load("app@two").store == "/other:/two"
    with pytest.raises(UnionfsError, match="is a template"):
        files.load("app@")
    for instance in (".", ".."):  # /srv/.. is no application's
        with pytest.raises(UnionfsError, match="is no name"):
            files.load(f"app@{instance}")
    assert files.load("app@...").target == "/srv/..."


def test_a_profile_is_not_called_as_the_root_s_union(places: list[Path]) -> None:
    """Its directory in /run would be that one's, with what a boot has told there."""
    (places[0] / "root.toml").write_text('[paths]\n"/a" = "tmpfs"\n')
    for name in ("root", str(places[0] / "root.toml")):
        with pytest.raises(UnionfsError, match="cannot have the name root"):
            files.load(name)


def test_files_that_cannot_be_read(places: list[Path]) -> None:
    with pytest.raises(UnionfsError, match="there is no profile p"):
        files.load("p")
    for text, told in (
        (b"store = ", "is not understood"),
        (b"\xff", "is not understood"),
        (b"a=" + b"[" * 100_000, "is not understood"),
        (b".".join([b"a"] * 2000) + b"=1", "is not understood"),
        (b'[paths]\n"/x\\u0000" = "tmpfs"', "has a null character"),
        (b'options = ["ro", "x\\u0000"]', "has a null character"),
        (b" " * (1 << 20) + b"\n", "is larger than 1 MiB"),
    ):
        (places[0] / "p.toml").write_bytes(text)
        with pytest.raises(UnionfsError, match=told):
            files.load("p")
    for name in ("../p", "", "a b", "-x", "p/"):
        with pytest.raises(UnionfsError):
            files.load(name)


def test_what_is_no_plain_file_does_not_hold_up_anything(places: list[Path]) -> None:
    """A FIFO that nobody writes to would, and so would a device that never ends."""
    os.mkfifo(places[1] / "p.toml")
    (places[2] / "p.toml").write_text('[paths]\n"/a" = "tmpfs"\n')
    (places[0] / "d.toml").mkdir()
    assert files.names() == ["d", "p"]
    told = {"p": "is no plain file", "d": "Is a directory", str(places[1] / "p.toml"): "no plain"}
    for name, words in (told | {"/dev/zero": "is no plain file"}).items():
        with pytest.raises(UnionfsError, match=words):
            files.load(name)
    (places[0] / "p.toml").write_text('[paths]\n"/a" = "tmpfs"\n')
    assert [rule.path for rule in files.load("p").rules] == ["/a"]
    (places[2] / "p.toml.d").mkdir()
    os.mkfifo(places[2] / "p.toml.d/x.toml")
    with pytest.raises(UnionfsError, match=r"x.toml: it is no plain file"):
        files.load("p")
    os.mkfifo(places[0] / persistence.FILE)
    (places[0] / "live.toml").write_text(f'store = "{places[0]}"\n')
    with pytest.raises(UnionfsError, match=r"persistence.conf at its root: it is no plain file"):
        files.load("live")


def test_masked(places: list[Path]) -> None:
    """As systemd masks what the vendor has shipped."""
    etc, _run, lib = places
    (lib / "p.toml.d").mkdir()
    for name, path in (("p.toml", "/a"), ("p.toml.d/x.toml", "/b"), ("q.toml", "/q")):
        (lib / name).write_text(f'[paths]\n"{path}" = "tmpfs"\n')
    (etc / "p.toml.d").mkdir()
    (etc / "p.toml.d/x.toml").symlink_to("/dev/null")
    assert [rule.path for rule in files.load("p").rules] == ["/a"]
    (etc / "p.toml").symlink_to("/dev/null")
    assert files.names() == ["q"]
    with pytest.raises(UnionfsError, match=r"p is masked: .*/etc/p.toml leads to /dev/null"):
        files.load("p")


# persistence.conf


def test_persistence_conf(caplog: pytest.LogCaptureFixture) -> None:
    text = """
# comment
/home/u link,source=config/u
/home
/usr union
/ union,source=.hidden
/var/x bind,union,source=vx
relative
/a/../b
/lib/x
/y loud
/run/live/z
/again source=../up
/etc source=/abs
/ bind
/ source=.
"""
    made = {rule.path: rule for rule in persistence.read(text, "LABEL=p:/ignored")}
    assert list(made) == ["/", "/home", "/home/u", "/usr", "/var/x"]
    assert made["/home"].kind == "bind"
    assert made["/home"].source == "/home"
    assert made["/home/u"].kind == "link"
    assert made["/home/u"].source == "/config/u"
    assert made["/usr"].upper == "LABEL=p:/usr/rw"
    assert made["/"].upper == "LABEL=p:/.hidden/rw"
    assert made["/var/x"].upper == "LABEL=p:/vx/rw"
    assert len(caplog.records) == 9


def test_persistence_conf_with_places_in_one_another(caplog: pytest.LogCaptureFixture) -> None:
    made = persistence.read("/home\n/home/u\n/ union,source=.\n/a\0\n/b source=\0\n", "s")
    assert [rule.path for rule in made] == ["/home"]
    assert "lies in or around" in caplog.text


@given(st.text())
def test_no_persistence_conf_raises(text: str) -> None:
    for rule in persistence.read(text, "LABEL=p"):
        assert rule.path.startswith("/")


# What is mounted


def ground(top: Path, *, may_mount: bool = True) -> Ground:
    return Ground(root=str(top), directory="/run/unionfs/p", may_mount=may_mount)


def short(steps: list[Step]) -> list[tuple[str, str]]:
    return [(step.action, step.path) for step in steps]


@pytest.fixture
def system(tmp_path: Path) -> Path:
    for path in ("etc", "var/log", "var/lib", "home"):
        (tmp_path / path).mkdir(parents=True)
    return tmp_path


def test_steps_in_place(system: Path) -> None:
    made = read(
        store="LABEL=data",
        options="fallback=tmpfs",
        paths={
            "/etc": "persist",
            "/home": "bind",
            "/var": "persist",
            "/var/log": "tmpfs",
            "/var/lib": "exclude",
            "/var/none": {"kind": "tmpfs", "union": False, "size": "1M"},
            "/opt": "exclude",
        },
    )
    (system / "opt").mkdir()
    steps = plan.steps(made, ground(system))
    assert short(steps) == [
        ("view", "/var/lib"),
        ("view", "/var/log"),
        ("union", "/etc"),
        ("bind", "/home"),
        ("bind", "/opt"),
        ("union", "/var"),
        ("bind", "/var/lib"),
        ("union", "/var/log"),
        ("memory", "/var/none"),
    ]
    etc, log = steps[2].options, steps[7].options
    assert etc is not None
    assert log is not None
    assert etc.lowers == (f"{system}/etc",)
    assert etc.mountpoint == f"{system}/etc"
    assert etc.upper == "LABEL=data:/persistent_p/etc"
    assert (etc.fallback, etc.name, etc.fsname) == ("tmpfs", "p:etc", "p:etc")
    assert log.lowers == ("/run/unionfs/p/base/var-log",)
    assert log.ephemeral
    assert steps[3].source == "LABEL=data:/persistent_p/home"
    assert steps[4].readonly
    assert steps[4].source == f"{system}/opt", "nothing above it has covered that"
    assert steps[6].readonly
    assert steps[8].size == "1M"


def test_steps_elsewhere(system: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    made = read(
        base=[f"{system}/var", f"{system}"],
        target="/mnt",
        options="allow_other",
        store=f"{tmp_path}/data",
        paths={"/": "persist", "/log": "tmpfs", "/x": {"kind": "persist", "upper": "LABEL=o:/x"}},
    )
    steps = plan.steps(made, Ground(root="/", directory="/run/p", may_mount=False))
    assert short(steps) == [("union", "/"), ("union", "/log"), ("union", "/x")]
    options = [step.options for step in steps]
    assert [o.lowers for o in options if o] == [
        (f"{system}/var", str(system)),
        (f"{system}/var/log",),
        ("/run/p/empty",),
    ]
    assert [o.mountpoint for o in options if o] == ["/mnt", "/mnt/log", "/mnt/x"]
    assert [o.upper for o in options if o] == [f"{tmp_path}/data:/-", None, "LABEL=o:/x"]


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        ({"/home": "bind"}, "bind needs root"),
        ({"/home": "link"}, "link needs root"),
        ({"/home": {"kind": "tmpfs", "union": False}}, "an empty tmpfs needs root"),
        ({"/var": "persist", "/var/log": "tmpfs"}, "below another path in place needs root"),
        ({"/file": "exclude"}, "/file is no directory"),
    ],
)
def test_what_needs_root(system: Path, paths: dict[str, Any], told: str) -> None:
    (system / "file").touch()
    made = read(store="s", paths=paths)
    with pytest.raises(UnionfsError, match=told):
        plan.steps(made, ground(system, may_mount=False))


def test_what_a_user_needs_below_another_path(system: Path) -> None:
    """fusermount3 runs as root, which other users' unions keep out."""
    paths: dict[str, Any] = {"/etc": "persist", "/var": "persist", "/var/log": "tmpfs"}
    made = read(store="s", base=str(system), target="/mnt", paths=paths)
    elsewhere = Ground(root="/", directory="/run/p", may_mount=False)
    with pytest.raises(UnionfsError, match=r"/var/log: .* below /var needs allow_other"):
        plan.steps(made, elsewhere)
    assert len(plan.steps(made, dataclasses.replace(elsewhere, may_mount=True))) == 3
    paths |= {"/var": {"kind": "persist", "options": "allow_other"}}
    made = read(store="s", base=str(system), target="/mnt", paths=paths)
    assert len(plan.steps(made, elsewhere)) == 3


def test_the_root_is_not_taken_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As after switch_root: what an initramfs has brought up is found below /."""
    top = next(entry for entry in read_mounts() if entry.point == "/")
    (tmp_path / "mounts").write_text(json.dumps([{"point": "/", "device": top.device}]))
    monkeypatch.setattr(running, "directory_of", lambda _name: str(tmp_path))
    for take_down in (running.down, supervise.stop):
        with pytest.raises(UnionfsError, match="is what the system runs from"):
            take_down("p")
    assert (tmp_path / "mounts").exists()


def test_what_cannot_be_mounted(system: Path) -> None:
    with pytest.raises(UnionfsError, match="/ cannot be covered while it is in use"):
        plan.steps(read(store="s", paths={"/": "persist"}), ground(Path("/")))
    booted = Ground(root="/", directory="/run/p", may_mount=True, standing=frozenset({"/"}))
    assert short(plan.steps(read(store="s", paths={"/": "persist"}), booted)) == [("union", "/")]
    booted = dataclasses.replace(booted, standing=frozenset({"/", "/etc"}))
    paths = {"/": "persist", "/etc": "persist"}
    made = read(store="/proc/self/store", paths=paths)  # on what is mounted on the root
    assert ("union", "/etc") in short(plan.steps(made, booted))
    with pytest.raises(UnionfsError, match="/etc: its store /none-such lies in /, which"):
        plan.steps(read(store="/none-such", paths=paths), booted)
    with pytest.raises(UnionfsError, match="/opt does not exist"):
        plan.steps(read(store="s", paths={"/opt": "persist"}), ground(system))
    (system / "file").touch()
    with pytest.raises(UnionfsError, match="/file is no directory"):
        plan.steps(read(store="s", paths={"/file": "persist"}), ground(system))
    (system / "link").symlink_to("var/log")
    with pytest.raises(UnionfsError, match="is a symbolic link in the base"):
        plan.steps(read(store="s", paths={"/link": "persist"}), ground(system))
    with pytest.raises(UnionfsError, match=r"p.toml: /etc: option 'falback=x'|falback"):
        plan.steps(read(store="s", options="falback=x", paths={"/etc": "persist"}), ground(system))


@pytest.mark.parametrize(
    "second",
    [
        {"kind": "bind", "source": "/etc"},
        {"kind": "bind", "source": "/etc/deeper"},
        {"kind": "link", "source": "/"},
        {"kind": "persist", "upper": "/data/etc"},
        {"kind": "persist", "upper": "/data:/etc/x"},
    ],
)
def test_two_paths_have_no_place_in_common(system: Path, second: dict[str, str]) -> None:
    """An upper that is changed beneath its union shows what nobody can foresee."""
    made = read(store="/data:/", paths={"/etc": "persist", "/home": second})
    with pytest.raises(UnionfsError, match=r"p.toml: /home: its place .* around that of /etc"):
        plan.steps(made, ground(system))
    second = {"kind": "bind", "source": "/etc-x"}
    paths: dict[str, Any] = {"/etc": "persist", "/home": second, "/var": second}
    assert len(plan.steps(read(store="/data:/", paths=paths), ground(system))) == 3


@pytest.mark.parametrize("path", ["/" + "x" * 256, "/file/below", "/file", "/none"])
def test_what_cannot_be_mounted_is_told_of_its_rule_only(system: Path, path: str) -> None:
    (system / "file").touch()
    made = read(store="s", paths={"/etc": "persist", path: "persist", "/var": "tmpfs"})
    told: list[UnionfsError] = []
    assert short(plan.steps(made, ground(system), told.append)) == [
        ("union", "/etc"),
        ("union", "/var"),
    ]
    assert [path in error.message for error in told] == [True]
    with pytest.raises(UnionfsError):
        plan.steps(made, ground(system))


@pytest.mark.parametrize("target", [None, "/mnt"])
def test_what_is_not_there_cannot_be_excluded(system: Path, target: str | None) -> None:
    """A directory would be made in its place, and kept: of /etc/machine-id, for one."""
    said = {"target": target} if target else {}
    paths = {"/etc": "persist", "/etc/machine-id": "exclude"}
    made = read(store="s", base=str(system), paths=paths, **said)
    here = Ground(root="/", directory="/run/p", may_mount=True)
    with pytest.raises(UnionfsError, match="the base has no /etc/machine-id"):
        plan.steps(made, here)
    (system / "etc/machine-id").touch()
    assert short(plan.steps(made, here))[-1] == ("bind", "/etc/machine-id")


def test_several_layers_in_one_place_are_not_in_place(system: Path) -> None:
    assert read(store="s", paths={"/var": "persist"}).in_place
    assert not read(store="s", target="/mnt", paths={"/var": "persist"}).in_place
    assert read(store="s", base=str(system), paths={}).where == str(system)


# The verb


def test_policy(places: list[Path], tmp_path: Path, capsys: Capture) -> None:
    text = 'store = "LABEL=d"\n[paths]\n"/etc" = "persist"\n"/etc/x" = "tmpfs"\n"/h" = "bind"\n'
    (places[0] / "one.toml").write_text(text)
    (places[0] / "app@.toml").write_text('store = "s"\n[paths]\n"/%i" = "persist"\n')
    assert cli.main(["policy", "test", "/etc/fstab", "/etc/x/y", "/home"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "/etc/fstab persists: changes are kept in LABEL=d:/persistent_one/etc (one: /etc)",
        "/etc/x/y is forgotten: changes are in memory, over the base (one: /etc/x)",
        "/home is left as it is: no profile has a rule for it",
    ]
    assert cli.main(["policy", "test", "--json", "/h/u"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["kind"] == "bind"
    assert found["place"] == "LABEL=d:/persistent_one/h"
    assert found["file"] == str(places[0] / "one.toml")
    assert cli.main(["policy", "test", "/one/z", "--profile", "app@one"]) == 0
    assert "(app@one: /one)" in capsys.readouterr().out
    assert cli.main(["policy", "show", "one"]) == 0
    assert "is forgotten" in capsys.readouterr().out
    links = '"/h/l" = "link"\n"/h/l/m" = "link"\n"/l" = "link"\n"/t" = "tmpfs"\n"/t/l" = "link"\n'
    (places[0] / "one.toml").write_text(text + links)
    assert cli.main(["policy", "test", "/h/l", "/h/l/m", "/l", "/t/l"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split(" ", 1)[1] for line in told] == [
        "persists",
        "persists",
        "is forgotten, but for files linked to LABEL=d",
        "is forgotten, but for files linked to LABEL=d",
    ]
    assert "persists: with /h, and files linked to LABEL=d:/persistent_one/h-l (one" in told[0]
    (places[0] / "bad.toml").write_text("x")
    assert cli.main(["policy", "show"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert any("bad" in line and "is not understood" in line for line in told)
    assert cli.main(["policy", "test", "/etc/fstab"]) == 32
    said, warned = capsys.readouterr()
    assert "/etc/fstab persists" in said, "one that is wrong does not hide what the others say"
    assert warned.count("\n") == 1
    assert "warning: profile bad: " in warned
    for words in (
        ["policy"],
        ["policy", "tell", "/x"],
        ["policy", "test"],
        ["policy", "test", "x"],
    ):
        assert cli.main(words) in (1, 32)


@pytest.mark.root
def test_policy_follows_links_as_the_system_does(tmp_path: Path, capsys: Capture) -> None:
    """What lies behind one is what is changed; a link itself lies where it is."""
    for folder in ("etc/unionfs", "usr/bin", "srv"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "bin").symlink_to("/usr/bin")
    (tmp_path / "usr/bin/tool").symlink_to("../../srv/tool")
    (tmp_path / "up").symlink_to("../../../srv")
    for name, head in (("p", ""), ("q", 'base = "/up"\n')):
        path = "/usr" if name == "p" else "/"
        text = f'{head}store = "s"\n[paths]\n"{path}" = "persist"\n'
        (tmp_path / f"etc/unionfs/{name}.toml").write_text(text)
    for path, rule in (
        ("/bin/sh", "(p: /usr)"),
        ("/bin", "left as it is"),
        ("/bin/", "(p: /usr)"),
        ("/bin/tool", "(p: /usr)"),
        ("/bin/tool/", "(q: /)"),
        ("/bin/../etc", "(p: /usr)"),
        ("/usr/../etc", "left as it is"),
        ("/bin/..", "(p: /usr)"),
        ("/up/x", "(q: /)"),
    ):
        assert cli.main(["policy", "test", path, "--root", str(tmp_path)]) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"{path} ")
        assert rule in told
    for name, target in (("one", "two"), ("two", "one")):
        (tmp_path / name).symlink_to(target)
    assert cli.main(["policy", "test", "/one/x", "--root", str(tmp_path)]) == 32
    assert "/one: Too many levels of symbolic links" in capsys.readouterr().err


@pytest.mark.root
def test_policy_of_a_system_that_is_mounted_elsewhere(tmp_path: Path, capsys: Capture) -> None:
    for name, folder in (("there", "etc"), ("shipped", "usr/lib")):
        (tmp_path / folder / "unionfs").mkdir(parents=True)
        text = f'store = "LABEL=d"\n[paths]\n"/{name}" = "persist"\n'
        (tmp_path / folder / f"unionfs/{name}.toml").write_text(text)
    root = ["--root", str(tmp_path)]
    assert cli.main(["policy", "test", "/there/x", "/shipped", *root]) == 0
    told = capsys.readouterr().out
    assert "/there/x persists: changes are kept in LABEL=d:/persistent_there/there" in told
    assert "(shipped: /shipped)" in told
    assert cli.main(["policy", "test", "/there", "--profile", "shipped", *root]) == 0
    assert "is left as it is" in capsys.readouterr().out
    assert cli.main(["policy", "show", *root]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} == {
        "there",
        "shipped",
    }
    assert cli.main(["policy", "show", "there", *root]) == 0
    assert f"{tmp_path}/etc/unionfs/there.toml" in capsys.readouterr().out


@pytest.mark.root
def test_a_system_s_own_profile_comes_before_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    of = {"/": [str(here)], "/there": [str(there)]}
    monkeypatch.setattr(files, "directories", lambda root="/": of[root])
    for place, names in ((here, ("both", "ours", "app@")), (there, ("both", "theirs"))):
        place.mkdir()
        for name in names:
            (place / f"{name}.toml").touch()
    told = {"both": "/there", "theirs": "/there", "ours": "/", "app@x": "/", "none": "/there"}
    told["./ours"] = "/there"  # a file, whose paths are those of that system
    assert {name: files.said_in(name, "/there") for name in told} == told


def test_an_ordinary_user_s_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert files.directories() == [f"{tmp_path}/unionfs"]
    for value, told in (("", "is not set"), (f"{tmp_path}/none", f"={tmp_path}/none is no dir")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        with pytest.raises(UnionfsError, match=f"XDG_RUNTIME_DIR ?{told}") as caught:
            running.directory_of("p")
        assert caught.value.code == 2
