# SPDX-License-Identifier: GPL-2.0-or-later
"""Unit files, the generator, what systemd is told, and what is installed; without a systemd."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig import ground
from tests.rig.sanitized import plain_environment
from unionfs import logs, notify, survive
from unionfs.boot import generator, units
from unionfs.boot.units import Needs
from unionfs.cli import unit
from unionfs.errors import UnionfsError
from unionfs.stores.tools import find

INSTALL = Path(__file__).resolve().parents[1] / "tools/install"


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert unit.run(argv) == 0
    return capsys.readouterr().out


# Words


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("LABEL=data", "/dev/disk/by-label/data"),
        ("LABEL=my stick:/dir", r"/dev/disk/by-label/my\x20stick"),
        (r"LABEL=my\x20stick", r"/dev/disk/by-label/my\x20stick"),
        ("PARTLABEL=a/b%é", r"/dev/disk/by-partlabel/a\x2fb\x25é"),
        ("UUID=12-34", "/dev/disk/by-uuid/12-34"),
        ("/dev/vda1:/dir", "/dev/vda1"),
        ("/srv/image", None),
    ],
)
def test_nodes_of_devices(text: str, node: str | None) -> None:
    assert units.device_node(text) == node


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/a/b", "/a/b"),
        ("/a b%", '"/a b%%"'),
        ("/it's", '"/it\'s"'),
        ('/a"b c', '"/a"\'"\'"b c"'),
        ("/a\\x20", "/a\\x20"),
        ("/a\\", "/a\\/"),
    ],
)
def test_paths_in_lists(path: str, word: str) -> None:
    assert units.quoted_path(path) == word


def test_words_of_commands() -> None:
    assert units.quoted('a "b" \\ %i $x') == r'"a \"b\" \\ %%i $$x"'


def test_names_as_systemd_escapes_them() -> None:
    if find("systemd-escape") is None:
        pytest.skip("there is no systemd-escape")
    for path in ("/", "/a b", "/.x/-é/%", "/a:b,c=d@e", "//a//b/"):
        expected = ground.run("systemd-escape", "--path", "--suffix=mount", path).strip()
        assert units.unit_name(path, "mount") == expected


def test_too_long_and_unwritable_names() -> None:
    with pytest.raises(UnionfsError, match="too long"):
        units.unit_name("/" + "a" * 250, "mount")
    with pytest.raises(UnionfsError, match="cannot be written"):
        units.plain("a\nb")
    with pytest.raises(UnionfsError, match="cannot be written"):
        units.plain(os.fsdecode(b"\xff"))


def test_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    needs = Needs.of([f"{tmp_path}/link", "/", "tmpfs:", "LABEL=x", "LABEL=x:/a"])
    assert needs.paths == [f"{tmp_path}/link", f"{tmp_path}/real"]
    assert needs.devices == ["/dev/disk/by-label/x"]
    device = r"dev-disk-by\x2dlabel-x.device"
    assert needs.lines(required=True)[1:] == [f"Requires={device}", f"After={device}"]
    wants = Needs(paths=["/a/b"], devices=["/dev/x"]).lines(required=False)
    assert wants == ["Wants=dev-x.device a.mount a-b.mount", "After=dev-x.device a.mount a-b.mount"]


# unionfs unit


def test_mount_unit(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "/srv/a:/srv/b", "/x/up", "/nowhere/m", "-o", "nodev,fsname=n")
    assert text.startswith("# nowhere-m.mount\n[Unit]\n")
    for line in (
        "RequiresMountsFor=/srv/a /srv/b /nowhere",
        "RequiresMountsFor=/x/up",
        "What=n",
        "Where=/nowhere/m",
        "Type=fuse.unionfs",
        "Options=lowerdir=/srv/a:/srv/b,upperdir=/x/up,nodev,rw",
        "RequiredBy=local-fs.target",
    ):
        assert f"\n{line}\n" in text


def test_nofail_and_fallback(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "/a", "LABEL=x", "/m", "-o", "nofail,fallback=ro")
    assert "\nWantedBy=local-fs.target" in text
    assert "\nWants=dev-disk-by\\x2dlabel-x.device" in text
    assert "Requires=" not in text
    service = printed(capsys, "/a", "/b", "/m", "-o", "nofail", "--service")
    assert "\nBefore=umount.target\n" in service
    ephemeral = printed(capsys, "/a", "/m", "--ephemeral=1G", "-o", "noexec")
    assert "Options=lowerdir=/a,ephemeral=1G,noexec,rw" in ephemeral


def test_a_backslash_at_the_end_joins_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("--automount", "--service"):
        text = printed(capsys, "/a", "/u", "/m\\", kind)
        assert not any(line.endswith("\\") for line in text.splitlines())
        assert "\nDescription=Union on /m\\/" in text
    assert "\nWhere=/m\\/\n" in printed(capsys, "/a", "/u", "/m\\")


def test_automount_units(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "/a", "/b", "/m", "--automount")
    mount, _, auto = text.partition("# m.automount\n")
    assert "[Install]" not in mount
    assert "[Automount]\nWhere=/m\n" in auto


@pytest.mark.parametrize(
    ("upper", "point"), [('/a"b', "/m"), ("/a\\b", "/m"), ("/u", "/${x}"), ("/u", "/a ")]
)
def test_what_a_mount_unit_cannot_say(upper: str, point: str) -> None:
    with pytest.raises(UnionfsError) as caught:
        unit.run(["/lower", upper, point])
    assert caught.value.hint == "use --service"
    assert unit.run(["/lower", upper, point, "--service"]) == 0


def test_units_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("/a", "/b", "/m", "--output", str(tmp_path))
    assert printed(capsys, *argv) == f"{tmp_path}/m.mount\n"
    with pytest.raises(UnionfsError, match="exists"):
        unit.run(argv)


def test_how_long_systemd_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As for a line of fstab: in a drop-in of the device's unit."""
    argv = ("LABEL=base", "/dev/vdb:/dir", "/srv/m", "-o", "device-timeout=2.5")
    drop_ins = [
        f"{node}.device.d/50-unionfs-srv-m.conf"
        for node in ("dev-disk-by\\x2dlabel-base", "dev-vdb")
    ]
    for words in ((), ("--service",)):
        units_of = printed(capsys, *argv, *words).split("# ")
        assert units_of[2:] == [
            f"{name}\n[Unit]\nJobRunningTimeoutSec=2.5s\n" + ("\n" if name == drop_ins[0] else "")
            for name in drop_ins
        ]
    printed(capsys, *argv, "--output", str(tmp_path))
    assert all((tmp_path / name).is_file() for name in drop_ins)
    assert ".device.d" not in printed(capsys, "/a", "/b", "/m", "-o", "device-timeout=5")


# The generator


def profiles(root: Path, **texts: str) -> None:
    (root / "etc/unionfs").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (root / f"etc/unionfs/{name}.toml").write_text(text)


def generated(root: Path, cmdline: str = "") -> tuple[dict[str, str], list[str]]:
    place = root / "units"
    place.mkdir()
    problems = generator.generate(str(place), cmdline=cmdline, root=str(root))
    files = [path for path in place.rglob("*") if path.is_symlink() or path.is_file()]
    texts = {
        str(path.relative_to(place)): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in files
    }
    return texts, problems


PROFILE = 'store = "LABEL=x"\nboot = true\nbase = "/srv/s"\n[paths]\n"/etc" = "persist"\n'


@pytest.mark.root
def test_generator(tmp_path: Path) -> None:
    quiet = PROFILE.replace("true", "false")
    profiles(
        tmp_path,
        one=PROFILE,
        must='options = "fallback=fail"\n' + PROFILE,
        two="nofail = true\n" + PROFILE,
        off=quiet,
        asked=quiet,
        wrong="[",
        soon='options = "device-timeout=soon"\n' + quiet,
        whole=PROFILE.replace("/srv/s", "/") + '"/" = "persist"\n',
        memory='options = "device-timeout=5"\n' + quiet,
    )
    made, problems = generated(tmp_path, "quiet unionfs.profile=asked")
    assert {name for name in made if "local-fs" in name} == {
        "local-fs.target.wants/unionfs@one.service",
        "local-fs.target.requires/unionfs@must.service",
        "local-fs.target.wants/unionfs@two.service",
        "local-fs.target.wants/unionfs@asked.service",
    }
    assert not any("unionfs@whole" in name for name in made), "the initramfs brings it up"
    one = made["unionfs@one.service.d/50-profile.conf"]
    assert "\nWants=dev-disk-by\\x2dlabel-x.device\n" in one, (
        "it waits, starts, and says what it misses"
    )
    must = made["unionfs@must.service.d/50-profile.conf"]
    assert "\nRequires=dev-disk-by\\x2dlabel-x.device\n" in must
    assert "\nAfter=srv-s-etc.mount\n" in one
    assert "\nBefore=local-fs.target\n" in one
    two = made["unionfs@two.service.d/50-profile.conf"]
    assert "\nWants=dev-disk-by\\x2dlabel-x.device\n" in two
    assert "Before=" not in two
    timeout = made["dev-disk-by\\x2dlabel-x.device.d/50-unionfs.conf"]
    assert timeout == "[Unit]\nJobRunningTimeoutSec=5s\n"
    assert "unionfs@soon.service.d/50-profile.conf" in made, "it says what is wrong itself"
    assert len(problems) == 1
    assert "profile wrong" in problems[0]


def settings(text: str, name: str) -> list[str]:
    """All words of one setting of a unit."""
    lines = [line.partition("=") for line in text.splitlines()]
    return [word for key, _, value in lines if key == name for word in value.split()]


@pytest.mark.root
def test_which_profile_comes_first(tmp_path: Path) -> None:
    """What one covers is what another is about: it were seen or not, as it happens."""
    stored = 'store = "/data"\n'
    profiles(
        tmp_path,
        a=f'{stored}[paths]\n"/var/cache" = "persist"\n',
        b=f'{stored}target = "/mnt"\n[paths]\n"/var/lib" = "tmpfs"\n',
        c='store = "/var/lib/x.img:/c"\n[paths]\n"/etc" = "persist"\n',
        d=f'{stored}[paths]\n"/etc" = "persist"\n',
        e=f'{stored}[paths]\n"/variable" = "persist"\n',
        v=f'{stored}[paths]\n"/var" = "persist"\n"/var/run" = "tmpfs"\n',
        # Of a circle, the first by name is the first.
        x='store = "/y/store"\n[paths]\n"/x" = "persist"\n',
        y='store = "/x/store"\n[paths]\n"/y" = "persist"\n',
    )
    made, problems = generated(tmp_path)
    assert problems == []
    after = {
        name: [
            word
            for word in settings(made[f"unionfs@{name}.service.d/50-profile.conf"], "After")
            if word.startswith("unionfs@")
        ]
        for name in "abcdevxy"
    }
    v = ["unionfs@v.service"]
    both = {"c": v, "d": ["unionfs@c.service"]}
    assert after == {"a": v, "b": v, "e": [], "v": [], "x": [], "y": ["unionfs@x.service"], **both}


@pytest.mark.root
def test_lines_of_fstab_beside_a_profile(tmp_path: Path) -> None:
    """What a path lies on comes before its profile, and what lies on the path after it."""
    rules = '"/var" = "persist"\n"/var/lib/a" = "tmpfs"\n"/opt/x/y" = "tmpfs"\n'
    profiles(
        tmp_path,
        one=f'store = "/var/store/s.img"\n[paths]\n{rules}',
        two=f'nofail = true\nstore = "/s"\n[paths]\n{rules}',
    )
    (tmp_path / "etc/fstab").write_text(
        "# /dev/sda9 /var/comment ext4\n"
        "/dev/sda1 / ext4 defaults 0 1\n/dev/sda2 /var ext4\n/dev/sda3 /var/log/ ext4\n"
        "/dev/sda4 /var/lib ext4\n/dev/sda5 /var/store ext4\n/dev/sda6 none swap\n"
        "/dev/sda7 /opt/x ext4\n/dev/sda8 /var/a\\040b ext4\n/dev/sda9 /variable ext4\nwrong\n"
    )
    made, problems = generated(tmp_path)
    assert problems == []
    one, two = (made[f"unionfs@{name}.service.d/50-profile.conf"] for name in ("one", "two"))
    beneath = ["var-log.mount", "var-log.automount", "var-a\\x20b.mount", "var-a\\x20b.automount"]
    assert settings(one, "Before") == ["local-fs.target", *beneath]
    assert settings(two, "Before") == [
        *beneath[:2],
        "var-store.mount",
        "var-store.automount",
        *beneath[2:],
    ]
    assert "/opt/x" in settings(one, "RequiresMountsFor")
    assert "/var/lib" in settings(one, "RequiresMountsFor")
    assert "opt-x.mount" in settings(two, "Wants")
    assert "opt-x.mount" in settings(two, "After")


@pytest.mark.root
def test_generator_of_a_profile_that_is_not_there(tmp_path: Path) -> None:
    made, problems = generated(tmp_path, "unionfs.profile=nosuch")
    assert not made
    assert len(problems) == 1


def test_generator_in_an_initrd(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/initrd-release").touch()
    made, _problems = generated(tmp_path, "root=/dev/vda1 unionfs.store=LABEL=x")
    assert list(made) == ["initrd-root-fs.target.requires/unionfs-boot.service"]
    (tmp_path / "units").rename(tmp_path / "before")
    assert generated(tmp_path, "root=/dev/vda1 quiet")[0] == {}


def test_generator_after_a_boot_without_the_store(tmp_path: Path) -> None:
    for name in ("root", "live:-", "live", "fine"):
        (tmp_path / f"run/unionfs/{name}").mkdir(parents=True)
        if name != "fine":
            (tmp_path / f"run/unionfs/{name}/degraded").write_text("no device\n")
    made, problems = generated(tmp_path)
    assert problems == []
    wanted = [f"local-fs.target.wants/unionfs-degraded@{name}.service" for name in ("live", "root")]
    assert sorted(made) == wanted
    assert {os.path.basename(target) for target in made.values()} == {"unionfs-degraded@.service"}


# What systemd is told


def test_mark_of_root_storage(tmp_path: Path) -> None:
    code = (
        "import sys; from unionfs.survive import mark_as_root_storage as mark;"
        "print(mark(initrd=sys.argv[1]), flush=True); sys.stdin.read()"
    )
    (tmp_path / "initrd").touch()
    for name, first in (("initrd", b"@"), ("no", b"/")):
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == str(first == b"@").encode()
            line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            assert line[:1] == first
            assert line.split(b"\0")[2:3] == [code.encode()], "nothing else has changed"
            process.communicate(b"")
    assert survive.mark_as_root_storage(initrd=str(tmp_path / "no")) is False


def test_levels_for_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.LogRecord("unionfs", logging.WARNING, "", 0, "a\nb", None, None)
    assert logs._JournalFormatter().format(record) == "<4>a\n<4>b"
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert logs._is_journal(2)
    for other in ("", "1:2", "nonsense"):
        monkeypatch.setenv("JOURNAL_STREAM", other)
        assert not logs._is_journal(2)


def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "socket"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "socket"))
        notify.send("READY=1", "STATUS=a\nb")
        assert sock.recv(100) == b"READY=1\nSTATUS=a b"
    notify.send("STOPPING=1")  # nobody listens any more
    monkeypatch.setenv("WATCHDOG_USEC", "1500000")
    assert notify.watchdog_seconds() == 1.5
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_seconds() is None


# tools/install


def install(*words: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    # The unionfs that is tested.
    environment = {**os.environ, "UNIONFS_VENV": sys.prefix}
    command = [INSTALL, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def files_below(top: Path) -> set[str]:
    return {str(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir()}


def test_install_and_remove(tmp_path: Path) -> None:
    (tmp_path / "usr/share/initramfs-tools").mkdir(parents=True)
    own = tmp_path / "usr/share/own"
    own.touch()
    for _ in range(2):
        done = install("--destdir", tmp_path)
        assert done.returncode == 0, done.stderr
    made = files_below(tmp_path)
    assert {
        "usr/bin/unionfs",
        "usr/sbin/mount.fuse.unionfs",
        "usr/sbin/umount.fuse.unionfs",
    } <= made
    service = (tmp_path / "usr/lib/systemd/system/unionfs@.service").read_text()
    assert "@UNIONFS@" not in service
    assert os.access(tmp_path / "usr/lib/systemd/system-generators/unionfs-generator", os.X_OK)
    assert install("--destdir", tmp_path, "--remove").returncode == 0
    assert files_below(tmp_path) == {"usr/share/own"}
    assert install("--destdir", tmp_path, "--remove").returncode == 1


def test_manual_pages(tmp_path: Path) -> None:
    """All that units and pages refer to are installed, and groff has nothing against them."""
    if missing := [name for name in ("lowdown", "groff") if shutil.which(name) is None]:
        pytest.skip(f"there is no {missing[0]}")
    done = install("--destdir", tmp_path)
    assert done.returncode == 0, done.stderr
    pages = tmp_path / "usr/share/man"
    names = {f"{page.stem}({page.suffix[1:]})": page for page in pages.rglob("man*/*")}
    assert {"unionfs(8)", "unionfs-profile(5)", "umount.fuse.unionfs(8)"} <= names.keys()
    for page in names.values():
        command = ["groff", "-ww", "-t", "-man", "-Tutf8", "-P-cbou", str(page)]
        found = subprocess.run(
            command, capture_output=True, text=True, check=False, env=plain_environment()
        )
        assert (found.returncode, found.stderr) == (0, "")
        assert "NAME" in found.stdout
        for word in re.findall(r"\b((?:[a-z]+\.)*unionfs[a-z-]*\([58]\))", page.read_text()):
            assert word in names
    system = INSTALL.parents[1] / "system"
    for service in system.rglob("*.service"):
        for word in re.findall(r"man:(\S+)", service.read_text()):
            assert word in names, service
    assert install("--destdir", tmp_path, "--remove").returncode == 0
    assert files_below(tmp_path) == set()


def test_install_overwrites_nothing_of_others(tmp_path: Path) -> None:
    foreign = tmp_path / "usr/sbin/mount.unionfs"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("another's")
    done = install("--destdir", tmp_path)
    assert done.returncode == 1
    assert str(foreign) in done.stderr
    assert files_below(tmp_path) == {"usr/sbin/mount.unionfs"}
    assert foreign.read_text() == "another's"


def test_an_empty_directory_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnionfsError, match="--output is empty"):
        unit.run(["/a", "/b", "/c", "--output", ""])
    assert list(tmp_path.iterdir()) == []
