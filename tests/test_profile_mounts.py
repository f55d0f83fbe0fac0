# SPDX-License-Identifier: GPL-2.0-or-later
"""Profiles brought up and taken down by the real commands, on real stores."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images, secret, snapshot, traced
from tests.rig.mounted import PATIENCE, program, user_mount_possible
from tests.rig.waiting import wait_until
from tests.test_store_sharing import serving
from tests.test_stores import need

ROOT = os.geteuid() == 0


class System:
    """A small system in a directory, and one profile for it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.top = place / "sys"
        self.data = place / "data"
        self.name = f"t{uuid.uuid4().hex[:8]}"
        self.file = place / f"{self.name}.toml"
        for path in ("etc", "var/cache/apt", "var/lib", "var/log", "home/u", "root"):
            (self.top / path).mkdir(parents=True)
            (self.top / path / "file").write_text(f"base {path}\n")
        (self.top / "var/file").write_text("base\n")
        self.data.mkdir()
        self.before = snapshot.take(self.top)
        self.environment = dict(os.environ)
        if not ROOT:
            (place / "run").mkdir(mode=0o700)
            self.environment["XDG_RUNTIME_DIR"] = str(place / "run")

    @property
    def run_directory(self) -> Path:
        return Path("/run" if ROOT else self.place / "run") / "unionfs" / self.name

    def write(self, text: str, paths: str) -> None:
        self.file.write_text(f'base = "{self.top}"\n{text}\n[paths]\n{paths}\n')

    def call(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program(), *words],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env=self.environment,
        )

    def up(self, *words: str) -> str:
        done = self.call("up", str(self.file), *words)
        assert done.returncode == 0, done
        return done.stdout + done.stderr

    def down(self, *words: str) -> None:
        done = self.call("down", self.name, *words)
        assert done.returncode == 0, done
        assert not self.run_directory.exists()

    def refused(self, *words: str) -> str:
        done = self.call("up", str(self.file), *words)
        assert done.returncode == 32, done
        assert "Traceback" not in done.stderr
        return done.stderr

    def clean(self) -> None:
        """After a test that failed, too."""
        self.call("down", "--lazy", self.name)
        below = [*ground.mounts_below(self.run_directory), *ground.mounts_below(self.place)]
        for point in reversed(below):
            with contextlib.suppress(RuntimeError):
                ground.run("umount", "-l", point)

    def points(self) -> list[str]:
        below = ground.mounts_below(self.top)
        return sorted(os.path.relpath(point, self.top) for point in below)

    def unchanged(self) -> None:
        snapshot.assert_same(self.before, snapshot.take(self.top), "the base")


@pytest.fixture
def system(place: Path) -> Iterator[System]:
    if why := user_mount_possible():
        pytest.skip(why)
    made = System(place)
    yield made
    made.clean()


KINDS = """
"/etc" = "persist"
"/home" = "bind"
"/var" = "persist"
"/var/cache" = "tmpfs"
"/var/lib" = "exclude"
"/var/log" = { kind = "tmpfs", union = false, size = "1M" }
"/var/made/deep" = "persist"
"/var/file" = "exclude"
"""


@pytest.mark.root
def test_every_kind(system: System) -> None:
    system.write(f'store = "{system.data}"', KINDS)
    top = system.top
    assert "mounts" in system.up()
    assert system.points() == [
        "etc",
        "home",
        "var",
        "var/cache",
        "var/file",
        "var/lib",
        "var/log",
        "var/made/deep",
    ]
    assert os.listdir(top / "var/log") == []
    assert (top / "var/cache/apt/file").read_text() == "base var/cache/apt\n"
    for path in ("etc", "home/u", "var", "var/cache", "var/log", "var/made/deep"):
        (top / path / "new").write_text("new\n")
    for path in ("var/lib/new", "var/file"):
        with pytest.raises(OSError, match="Read-only"):
            (top / path).write_text("no")
    assert (top / "var/file").read_text() == "base\n"
    assert "up already" in system.up()
    system.down()
    assert system.points() == []
    system.unchanged()
    system.up()
    kept = [str(path.parent.relative_to(top)) for path in top.rglob("new") if path.is_file()]
    assert sorted(kept) == ["etc", "home/u", "var", "var/made/deep"]
    assert (top / "home/u/file").read_text() == "base home/u\n", "filled from the base"
    system.down()
    assert {p.name for p in system.data.iterdir()} == {"etc", "home", "var", "var-made-deep"}


def test_what_anybody_may_have(system: System) -> None:
    """Unions that do not lie in one another; an ordinary user's too."""
    system.write(f'store = "{system.data}:/kept"', '"/etc" = "persist"\n"/var/cache" = "tmpfs"\n')
    system.up()
    assert system.points() == ["etc", "var/cache"]
    (system.top / "etc/file").write_text("changed\n")
    (system.top / "var/cache/apt/file").write_text("changed\n")
    system.down()
    system.unchanged()
    system.up()
    assert (system.top / "etc/file").read_text() == "changed\n"
    assert (system.top / "var/cache/apt/file").read_text() == "base var/cache/apt\n"
    status = json.loads(system.call("status", "--json", str(system.top / "etc")).stdout)
    assert status[0]["source"] == f"{system.name}:etc"
    assert status[0]["upper"] == f"{system.data}/kept/etc"
    system.down()


@pytest.mark.parametrize("target", [False, True])
def test_what_is_excluded_from_nothing_cannot_be_changed_either(
    system: System, target: bool
) -> None:
    """No rule above it: it is the base's all the same, as `unionfs policy` says."""
    top = system.place / "view" if target else system.top
    paths = '"/etc" = "exclude"\n"/home" = "tmpfs"\n'
    system.write(f'target = "{top}"' if target else "", paths + ROOT * '"/var/file" = "exclude"\n')
    system.up()
    assert (top / "etc/file").read_text() == "base etc\n"
    for path in ("etc/new", "etc/file", *(["var/file"] if ROOT else [])):
        with pytest.raises(OSError, match="Read-only file system"):
            (top / path).write_text("x")
    (top / "home/new").touch()
    assert "up already" in system.up()
    system.down()
    system.unchanged()


def test_what_was_made_to_mount_on_is_removed(system: System) -> None:
    """But nothing that somebody else has made, or made use of."""
    target = system.place / "view"
    (target / "there").mkdir(parents=True)
    head = f'store = "{system.data}"\ntarget = "{target}"'
    paths = '"/etc" = "persist"\n"/var/cache" = "tmpfs"\n"/there" = "tmpfs"\n'
    system.write(head, paths)
    for _round in range(2):
        system.up()
        assert (target / "var/cache/apt/file").exists()
        system.down()
        assert os.listdir(target) == ["there"]
    system.up()
    (target / "var/mine").touch()
    system.up()
    system.down()
    assert sorted(path.name for path in target.rglob("*")) == ["mine", "there", "var"]
    (target / "var/mine").unlink()
    (target / "var").rmdir()
    system.write(head, paths + '"/home" = { kind = "tmpfs", options = "no such option" }\n')
    system.refused()
    system.write(head, paths + f'"/home" = {{ kind = "persist", upper = "{system.file}" }}\n')
    system.refused()
    assert os.listdir(target) == ["there"]


@pytest.mark.root
def test_who_waits_sees_how_far_it_is(system: System) -> None:
    """On a terminal: a base may have much to fill a directory with."""
    (system.top / "home/u/large").write_bytes(bytes(20 << 20))
    system.write(f'store = "{system.data}"', '"/home" = "bind"\n')
    code, shown = secret.typed(["up", system.file], [])
    assert code == 0, shown
    assert re.search(r"filling home .*\d/20\.\d MiB", shown), shown
    system.down()
    assert "filling" not in secret.typed(["up", "-q", system.file], [])[1], "it is filled"
    system.down()


@pytest.mark.root
@pytest.mark.parametrize("kind", images.WRITABLE)
def test_one_image_for_all(system: System, kind: str) -> None:
    need(kind)
    image = images.make(system.place / "data.img", kind)
    system.write(f'store = "{image}"', '"/etc" = "persist"\n"/var" = "persist"\n"/home" = "bind"\n')
    for round_ in range(2):
        system.up()
        assert (system.top / "etc/kept").exists() == bool(round_)
        (system.top / "etc/kept").touch()
        (system.top / "var/kept").touch()
        (system.top / "home/kept").touch()
        system.down()
        system.unchanged()


def test_unions_of_one_image(system: System) -> None:
    """As anybody may have them: an ordinary user's are served by one program."""
    need("ext4")
    image = images.make(system.place / "data.img")
    paths = ("etc", "var", "root")
    rules = "".join(f'"/{path}" = "persist"\n' for path in paths)
    system.write(f'store = "{image}"', rules)
    for round_ in range(3):
        system.up()
        assert system.points() == sorted(paths)
        if not ROOT:
            assert len(serving(image)) == 1
        for path in paths:
            kept = system.top / path / "kept"
            assert kept.exists() == bool(round_)
            kept.write_text(f"{round_}\n")
            (system.top / path / "file").unlink(missing_ok=True)
            assert not (system.top / path / "file").exists()
        assert "up already" in system.up()
        system.down()
        assert not serving(image)
        system.unchanged()
    ground.run("e2fsck", "-fn", image)


def test_unions_of_one_image_whose_daemon_is_killed(system: System) -> None:
    need("ext4")
    image = images.make(system.place / "data.img")
    system.write(f'store = "{image}"', '"/etc" = "persist"\n"/var" = "persist"\n')
    system.up()
    before = serving(image)
    status = json.loads(system.call("status", "--json", str(system.top / "etc")).stdout)
    os.kill(status[0]["pid"], signal.SIGKILL)
    ground.reap([status[0]["pid"]])
    (system.top / "var/new").touch()
    assert "mounts" in system.up(), "what was killed is mounted anew"
    assert serving(image) == before
    (system.top / "etc/new").touch()
    (system.top / "var/more").touch()
    system.down()
    assert not serving(image)
    system.unchanged()


def test_unions_of_one_image_whose_program_is_killed(system: System) -> None:
    need("ext4")
    if ROOT:
        pytest.skip("the kernel mounts root's images")
    image = images.make(system.place / "data.img")
    system.write(f'store = "{image}"', '"/etc" = "persist"\n"/var" = "persist"\n')
    system.up()
    (program_,) = serving(image)
    os.kill(program_, signal.SIGKILL)
    words = ("status", str(system.top / "etc"), str(system.top / "var"))
    wait_until(lambda: system.call(*words).stdout.count("has ended") == 2)
    system.down("--lazy")
    system.up()
    (system.top / "etc/new").touch()
    system.down()
    assert not serving(image)


@pytest.mark.root
def test_base_in_an_image(system: System) -> None:
    need("squashfs")
    base = images.squash(system.place / "base.squashfs", system.top)
    (system.place / "mnt").mkdir()
    text = f'target = "{system.place}/mnt"\nstore = "{system.data}"'
    paths = '"/" = "persist"\n"/var/log" = "tmpfs"\n"/home" = "bind"\n"/etc" = "exclude"\n'
    system.write(text, paths)
    system.file.write_text(system.file.read_text().replace(f'"{system.top}"', f'"{base}"'))
    system.up()
    mnt = system.place / "mnt"
    assert (mnt / "home/u/file").read_text() == "base home/u\n"
    for path in ("root", "var/log", "home/u"):
        (mnt / path / "new").touch()
    with pytest.raises(OSError, match="Read-only"):
        (mnt / "etc/new").touch()
    system.down()
    system.up()
    assert (mnt / "root/new").exists()
    assert (mnt / "home/u/new").exists()
    assert not (mnt / "var/log/new").exists()
    assert (mnt / "var/log/file").exists()
    system.down()


@pytest.mark.root
def test_another_root(system: System) -> None:
    """As a boot brings it up: the paths are those of a system that lies elsewhere."""
    system.file.write_text(
        f'store = "{system.data}"\n[paths]\n"/" = "persist"\n"/var/log" = "tmpfs"\n'
    )
    assert "while it is in use" in system.refused()
    system.up("--root", str(system.top))
    assert system.points() == [".", "var/log"]
    (system.top / "new").touch()
    (system.top / "var/log/new").touch()
    system.down()
    system.unchanged()
    assert (system.data / "-" / "new").exists()


@pytest.mark.root
def test_a_profile_that_another_root_has_itself(system: System) -> None:
    """By its name, as examples/live.toml says; the root may be named from where one stands."""
    own = system.top / "etc/unionfs"
    own.mkdir()
    text = f'store = "{system.data}"\n[paths]\n"/var" = "persist"\n'
    (own / f"{system.name}.toml").write_text(text)
    done = system.call("up", system.name, "--root", "sys", cwd=system.place)
    assert (done.returncode, done.stderr) == (0, "")
    assert system.points() == ["var"]
    told = system.call("policy", "show", "--root", "sys", cwd=system.place)
    assert f"{own}/{system.name}.toml" in told.stdout
    system.down()
    nowhere = system.call("up", system.name, "--root", f"{system.place}/none-such")
    assert nowhere.returncode == 1
    assert "is no directory" in nowhere.stderr


@pytest.mark.root
def test_an_error_leaves_all_as_it_was(system: System) -> None:
    paths = '"/etc" = "persist"\n"/home" = { kind = "persist", upper = "LABEL=none-such" }\n'
    system.write(f'store = "{system.data}"', paths)
    told = system.refused()
    assert "/home: no device has" in told or "none-such" in told
    assert system.points() == []
    assert not system.run_directory.exists()
    system.unchanged()
    system.write(f'nofail = true\nstore = "{system.data}"', paths)
    assert "warning: /home" in system.up()
    assert system.points() == ["etc"]
    assert "none-such" in (system.run_directory / "degraded").read_text()
    system.down()


def test_a_path_that_is_not_there_keeps_no_other_away(system: System) -> None:
    rules = {"/etc": "persist", "/none": "persist", "/var/file": "tmpfs", f"/{'x' * 300}": "tmpfs"}
    paths = "".join(f'"{path}" = "{kind}"\n' for path, kind in rules.items())
    system.write(f'store = "{system.data}"', paths)
    assert "/none does not exist" in system.refused()
    assert system.points() == []
    system.write(f'nofail = true\nstore = "{system.data}"', paths)
    for _round in range(2):
        told = system.up()
        assert told.count("warning:") == 3
        assert "/none does not exist" in told
        assert "/var/file is no directory" in told
        assert system.points() == ["etc"]
    assert "/none does not exist" in (system.run_directory / "degraded").read_text()
    system.down()


@pytest.mark.root
def test_what_is_new_below_what_is_mounted(system: System) -> None:
    """The base cannot be seen there any more: an empty directory would be shown in its place."""
    head, rules = f'store = "{system.data}"', '"/var" = "persist"\n"/var/none" = "persist"\n'
    system.write(head, rules)
    system.up()
    system.write(head, rules + '"/var/cache" = "persist"\n')
    told = system.refused()
    assert "/var/cache is new below /var" in told
    assert f"unionfs down {system.name}" in told
    assert (system.top / "var/cache/apt/file").read_text() == "base var/cache/apt\n"
    assert system.points() == ["var", "var/none"]
    system.write(head, rules + '"/etc" = "persist"\n')
    status = json.loads(system.call("status", "--json", str(system.top / "var/none")).stdout)
    os.kill(status[0]["pid"], signal.SIGKILL)
    system.up()
    assert system.points() == ["etc", "var", "var/none"], "what had nothing below it is healed"
    (system.top / "var/none/new").touch()
    system.down()
    system.write(head, rules + '"/var/cache" = "persist"\n')
    system.up()
    assert (system.top / "var/cache/apt/file").read_text() == "base var/cache/apt\n"
    system.down()
    system.unchanged()


@pytest.mark.root
def test_a_store_that_is_not_there(system: System) -> None:
    system.write(
        'store = "LABEL=none-such"\noptions = "fallback=tmpfs,device-timeout=4"',
        '"/etc" = "persist"\n"/root" = { kind = "persist", options = "on-mismatch=ro" }\n',
    )
    before = time.monotonic()
    told = system.up()
    took = time.monotonic() - before
    assert 4 < took < 8, "the store is waited for once, not by each path"
    assert told.count("runs without its store") == 2, "each is told once"
    assert told.count("no device has LABEL=none-such after 4 s") == 2
    assert system.points() == ["etc", "root"]
    before = time.monotonic()
    assert system.up().count("runs without its store") == 2
    assert time.monotonic() - before < 4, "nothing is to be mounted any more"
    assert "none-such" in (system.run_directory / "degraded").read_text()
    (system.top / "etc/new").touch()
    system.down()
    system.unchanged()


@pytest.mark.root
def test_persistence_conf_of_a_live_system(system: System) -> None:
    """A stick as live-boot leaves it, with changes that its overlay has made."""
    (system.data / "persistence.conf").write_text(
        "/home\n/etc union\n/var/lib link,source=files\n/opt loud\n"
    )
    (system.data / "etc/rw").mkdir(parents=True)
    (system.data / "etc/rw/file").write_text("changed by live-boot\n")
    (system.data / "files/dpkg").mkdir(parents=True)
    (system.data / "files/dpkg/status").write_text("kept\n")
    (system.top / "opt").mkdir()
    system.write(f'store = "{system.data}"', "")
    told = system.up()
    assert "WARNING: persistence.conf:4: the option loud is unknown: skipped" in told
    assert system.points() == ["etc", "home", "var/lib"]
    assert (system.top / "etc/file").read_text() == "changed by live-boot\n"
    assert (system.top / "var/lib/dpkg/status").read_text() == "kept\n"
    assert (system.top / "var/lib/dpkg/status").is_symlink()
    (system.top / "var/lib/dpkg/status").write_text("changed\n")
    (system.top / "home/u/new").touch()
    assert (system.data / "files/dpkg/status").read_text() == "changed\n"
    system.down()
    assert not (system.top / "var/lib/dpkg").exists()
    assert (system.data / "home/u/new").exists()
    (system.data / "persistence.conf").write_text("# nothing\n/opt loud\n")
    assert "persistence.conf of " in (told := system.refused())
    assert "names nothing that persists" in told
    (system.data / "persistence.conf").unlink()
    assert "has no persistence.conf" in system.refused()


@pytest.mark.root
@pytest.mark.parametrize(
    "call", ["mount", "move_mount", pytest.param("rename", marks=pytest.mark.slow)]
)
def test_up_is_killed(system: System, call: str) -> None:
    """At each such call: the next `up` knows what is there, and `down` takes all of it away."""
    if why := traced.why_not():
        pytest.skip(why)
    system.write(f'store = "{system.data}"', KINDS)
    nth = 0
    while True:
        nth += 1
        words = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
        words += ["-e", f"inject={call}:signal=KILL:when={nth}"]
        command = [*words, *program(), "up", str(system.file)]
        done = subprocess.run(
            command, capture_output=True, timeout=PATIENCE, check=False, env=system.environment
        )
        if done.returncode == 0:
            break
        if nth % 2:
            system.up()
            (system.top / "etc/kept").write_text(str(nth))
            assert (system.top / "var/cache/apt/file").exists()
        system.call("down", system.name)
        assert system.points() == []
        system.unchanged()
    assert nth > 1
    assert (system.top / "etc/kept").exists()
    system.down()
    system.unchanged()


def daemons(system: System) -> dict[str, int]:
    told = json.loads(system.call("status", "--json").stdout)
    mine = [one for one in told if str(one["source"]).startswith(f"{system.name}:")]
    return {os.path.relpath(one["mountpoint"], system.top): one["pid"] for one in mine}


def kill(pid: int) -> None:
    fd = os.pidfd_open(pid)
    signal.pidfd_send_signal(fd, signal.SIGKILL)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(PATIENCE * 1000)
    os.close(fd)


@pytest.mark.root
def test_up_heals_a_killed_daemon(system: System) -> None:
    system.write(f'store = "{system.data}"', KINDS)
    system.up()
    (system.top / "var/kept").touch()
    (system.top / "var/cache/kept").touch()
    running_before = daemons(system)
    kill(running_before["var"])
    with pytest.raises(OSError, match=r"not connected|abort"):
        os.listdir(system.top / "var")
    system.up()
    assert (system.top / "var/kept").exists()
    after = daemons(system)
    assert after["etc"] == running_before["etc"], "what works stays"
    assert after["var/cache"] != running_before["var/cache"]
    system.down()
    system.unchanged()


def test_busy(system: System) -> None:
    system.write(f'store = "{system.data}"', '"/etc" = "persist"\n"/root" = "persist"\n')
    system.up()
    with open(system.top / "etc/file", "a") as file:
        done = system.call("down", system.name)
        assert done.returncode == 32
        assert "is busy" in done.stderr
        assert f"unionfs down --lazy {system.name}" in done.stderr
        assert system.points() == ["etc"], "what comes after it in the order is down"
        file.write("late\n")
        file.flush()
        done = system.call("down", system.name, "--lazy")
        assert done.returncode == 0
        assert "it is taken down all the same" in done.stderr
        assert "--lazy" not in done.stderr, "that was said already"
    assert "late" in (system.data / "etc/file").read_text()
    assert system.call("down", system.name).returncode == 32


# What is said of the store, for all paths at once


@pytest.mark.skipif(bool(secret.why_not()), reason=secret.why_not() or "-")
def test_an_encrypted_store_beside_memory(system: System) -> None:
    key = secret.key_file(system.place)
    for path in ("etc", "root"):
        (system.data / path).mkdir()
        done = system.call("store", "encrypt", str(system.data / path), "--key-file", str(key))
        assert done.returncode == 0, done
    store = f'store = "{system.data}"\noptions = "key-file={key},fallback=tmpfs,low-water=1M"'
    rules = '"/etc" = "persist"\n"/root" = "persist"\n"/var/cache" = "tmpfs"\n'
    system.write(store, rules + '"/home" = "tmpfs"\n')
    for before in ("base", "mine"):
        assert "without its store" not in system.up()
        assert before in (system.top / "etc/file").read_text()
        (system.top / "etc/file").write_text("mine\n")
        for path in ("var/cache/new", "home/new", "root/new"):
            (system.top / path).write_text("new\n")
        system.down()
        system.unchanged()
    assert "new" not in os.listdir(system.data / "root"), "it is encrypted"


def test_what_a_rule_in_memory_says_itself_is_not_dropped(system: System) -> None:
    system.write(
        f'store = "{system.data}"', '"/var" = { kind = "tmpfs", options = "autogrow=1G" }\n'
    )
    done = system.call("up", str(system.file))
    assert done.returncode == 1, done
    assert "/var: autogrow= is for an upper in an image" in done.stderr


# In the foreground, as a service


class Manager:
    """What a service manager is to a service: an environment, and a socket to be told by."""

    def __init__(self, system: System, watchdog: float | None = None) -> None:
        self.path = system.place / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.socket.settimeout(PATIENCE)
        environment = system.environment | {"NOTIFY_SOCKET": str(self.path)}
        if watchdog is not None:
            environment["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
        self.process = subprocess.Popen(
            [*program(), "up", "-f", str(system.file)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def told(self, line: str) -> list[str]:
        """Wait for a message that has this line."""
        while True:
            lines = self.socket.recv(4096).decode().split("\n")
            if line in lines:
                return lines

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=PATIENCE)
        self.socket.close()
        return self.process.returncode, said


def test_service(system: System) -> None:
    system.write(f'store = "{system.data}"', '"/etc" = "persist"\n"/var" = "tmpfs"\n')
    manager = Manager(system, watchdog=0.3)
    lines = manager.told("READY=1")
    assert any(line.startswith("STATUS=") for line in lines)
    (system.top / "etc/new").touch()
    manager.told("WATCHDOG=1")
    with open(system.top / "etc/open", "w") as file:  # in use: ended all the same
        file.write("x")
        file.flush()
        manager.process.send_signal(signal.SIGTERM)
        manager.told("STOPPING=1")
        assert manager.end()[0] == 0
    assert system.points() == []
    assert (system.data / "etc/open").read_text() == "x"
    assert not system.run_directory.exists()
    system.unchanged()


def test_service_ends_with_a_daemon(system: System) -> None:
    system.write(f'store = "{system.data}"', '"/etc" = "persist"\n"/var" = "tmpfs"\n')
    manager = Manager(system)
    manager.told("READY=1")
    kill(daemons(system)["etc"])
    code, said = manager.end()
    assert code == 32
    assert f"the daemon of {system.top}/etc has ended" in said
    assert system.points() == []


def test_service_is_silent_when_a_daemon_hangs(system: System) -> None:
    system.write(f'store = "{system.data}"', '"/etc" = "persist"\n')
    manager = Manager(system, watchdog=0.3)
    manager.told("READY=1")
    pid = daemons(system)["etc"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert manager.process.stderr is not None
        assert "has not answered" in manager.process.stderr.readline()
        manager.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # what was told before it hung
            while True:
                manager.socket.recv(4096)
        manager.socket.setblocking(True)
        assert "has not answered" in manager.process.stderr.readline()
        manager.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.socket.recv(4096)
    finally:
        os.kill(pid, signal.SIGCONT)
    manager.process.send_signal(signal.SIGTERM)
    assert manager.end()[0] == 0
