# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line without a mount: verbs, flags, exit codes, one line an error."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from unionfs import mounts, unions, unmounting
from unionfs.cli import helper, mount, status
from unionfs.cli import main as cli
from unionfs.errors import ExitCode, UnionfsError, counted, printable
from unionfs.mounts import MountEntry, parse_mounts
from unionfs.options import MountOptions

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> list[MountOptions]:
    """What daemon.run() was asked for, instead of a daemon."""
    asked: list[MountOptions] = []

    def run(options: MountOptions) -> int:
        asked.append(options)
        return ExitCode.OK

    daemon = types.ModuleType("unionfs.daemon")
    monkeypatch.setattr(daemon, "run", run, raising=False)
    monkeypatch.setitem(sys.modules, "unionfs.daemon", daemon)
    monkeypatch.setattr("unionfs.daemon", daemon, raising=False)
    return asked


def line(capture: Capture) -> str:
    """The one line on stderr."""
    captured = capture.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.rstrip("\n")


# main: dispatch and the edge


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help(argv: list[str], capsys: Capture) -> None:
    assert cli.main(argv) == ExitCode.OK
    told = capsys.readouterr().out
    assert all(verb in told for verb in cli.VERBS)


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_help(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert f"usage: unionfs {verb}" in told
    assert all(len(row) <= 88 for row in told.splitlines())


def test_version(capsys: Capture) -> None:
    assert cli.main(["--version"]) == ExitCode.OK
    assert capsys.readouterr().out.startswith("unionfs ")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "unionfs: nothing to do; see unionfs --help"),
        (["moutn"], "unionfs: moutn is no verb of unionfs; did you mean mount?"),
        (["unmount", "/x"], "unionfs: unmount is no verb of unionfs; did you mean umount?"),
        (["xyz"], f"unionfs: xyz is no verb of unionfs; the verbs are {', '.join(cli.VERBS)}"),
        (["mount", "-x"], "unionfs: unrecognized arguments: -x; see unionfs mount --help"),
        (["mount", "-o"], "unionfs: argument -o: expected one argument; see unionfs mount --help"),
    ],
)
def test_usage_errors(argv: list[str], told: str, capsys: Capture) -> None:
    assert cli.main(argv) == ExitCode.USAGE
    assert line(capsys) == told


def _raise(error: BaseException) -> int:
    raise error


def test_the_edge(capsys: Capture) -> None:
    failed = UnionfsError("/a\nb is bad", hint="mend it", code=ExitCode.SYSTEM)
    assert cli.guarded("unionfs", lambda: _raise(failed)) == ExitCode.SYSTEM
    assert line(capsys) == r"unionfs: /a\nb is bad; mend it"
    group = BaseExceptionGroup("nursery", [failed])
    assert cli.guarded("unionfs", lambda: _raise(group)) == ExitCode.SYSTEM
    capsys.readouterr()
    assert cli.guarded("unionfs", lambda: _raise(KeyboardInterrupt())) == ExitCode.INTERRUPT
    assert line(capsys) == "unionfs: interrupted"
    assert cli.guarded("unionfs", lambda: _raise(ZeroDivisionError("x"))) == ExitCode.INTERNAL
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "this is a bug in unionfs" in told


def test_what_is_counted_is_one_or_many() -> None:
    assert counted(1, "directory", "directories") == "1 directory"
    assert counted(0, "mount") == "0 mounts"


def test_printable_keeps_foreign_bytes() -> None:
    assert printable("/ä\udcff\x1b") == "/ä\udcff\\x1b"


def test_closed_descriptors_are_filled() -> None:
    code = (
        "import os; os.closerange(0, 3)\n"
        "from unionfs.cli.main import _fill_standard_descriptors as fill\n"
        "fill(); fd = os.open('/', os.O_RDONLY); os._exit(fd)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 3


def test_nothing_heavy_is_imported_to_read_a_command_line() -> None:
    code = (
        "import sys; from unionfs.cli.main import main; from unionfs.cli.mount import parse\n"
        "parse(['/l', '/u', '/m', '-o', 'ro'])\n"
        "heavy = {'trio', 'pyfuse3', 'ctypes', 'subprocess', 'difflib', 'importlib.metadata',\n"
        "         'traceback', 'json', 'unionfs._native'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# mount


@pytest.mark.parametrize(
    "argv",
    [
        ["mount", "/l:/l2", "/u", "/m", "-o", "nodev", "-o", "workdir=/w"],
        ["mount", "-o", "nodev,workdir=/w", "/l:/l2", "/u", "/m"],
        ["mount", "/l:/l2", "-onodev,workdir=/w", "/u", "/m"],
        ["mount", "-o", "lowerdir=/l:/l2,upperdir=/u,workdir=/w,nodev", "/m"],
        ["-o", "lowerdir=/l:/l2,upperdir=/u,workdir=/w,nodev", "/m"],
        ["-olowerdir=/l:/l2,upperdir=/u,workdir=/w", "-o", "nodev", "/m"],
    ],
)
def test_the_spellings_of_one_mount(argv: list[str], mounted: list[MountOptions]) -> None:
    assert cli.main(argv) == ExitCode.OK
    assert mounted == [
        MountOptions(
            lowers=("/l", "/l2"),
            upper="/u",
            work="/w",
            mountpoint="/m",
            kernel_flags=frozenset({"nodev"}),
        )
    ]


def test_flags() -> None:
    plain = mount.parse(["/l", "/u", "/m"])
    assert (plain.foreground, plain.debug, plain.sloppy) == (False, False, False)
    assert mount.parse(["-f", "/l", "/u", "/m"]).foreground
    debugging = mount.parse(["-d", "/l", "/u", "/m"])
    assert debugging.debug
    assert debugging.foreground
    assert mount.parse(["/l", "/u", "/m", "-o", "debug"]).foreground
    assert mount.parse(["--ro", "/l", "/u", "/m"]).readonly
    assert mount.parse(["-s", "/l", "/u", "/m", "-o", "zzz"]).sloppy
    assert mount.parse(["--", "-l", "-u", "/m"]).upper == f"{os.getcwd()}/-u"


def test_ephemeral_never_takes_the_next_argument() -> None:
    options = mount.parse(["--ephemeral", "/l", "/m"])
    assert (options.lowers, options.ephemeral, options.ephemeral_size) == (("/l",), True, None)
    options = mount.parse(["/l", "/m", "--ephemeral=2G"])
    assert (options.ephemeral, options.ephemeral_size) == (True, "2G")
    with pytest.raises(UnionfsError, match="contradict"):
        mount.parse(["--ephemeral=1G", "-o", "ephemeral=2G", "/l", "/m"])
    with pytest.raises(UnionfsError, match="contradict"):
        mount.parse(["--ro", "-o", "rw", "/l", "/m"])


def test_mount_fuse3_gives_a_source(mounted: list[MountOptions]) -> None:
    assert cli.main(["name", "/m", "-o", "rw,lowerdir=/l,dev,suid"]) == ExitCode.OK
    assert mounted[0].fsname == "name"


# The helper of mount(8)


def test_helper_mounts(mounted: list[MountOptions], capsys: Capture) -> None:
    argv = ["/l:/l2", "/m", "-v", "-n", "-o", "rw,upperdir=/u", "-t", "fuse.unionfs"]
    assert helper.main(argv) == ExitCode.OK
    assert capsys.readouterr().out == "mount.unionfs: /l:/l2 mounted on /m\n"
    assert helper.main(["name", "/m", "-o", "lowerdir=/l,debug"]) == ExitCode.OK
    assert (mounted[0].lowers, mounted[0].upper) == (("/l", "/l2"), "/u")
    assert mounted[0].fsname == "/l:/l2"
    assert (mounted[1].fsname, mounted[1].foreground) == ("name", False)


def test_helper_fake_checks_and_mounts_nothing(
    mounted: list[MountOptions], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "l").mkdir()
    assert helper.main(["-f", f"{tmp_path}/l", str(tmp_path)]) == ExitCode.OK
    assert helper.main(["-f", f"{tmp_path}/none", str(tmp_path)]) == ExitCode.FAIL
    assert f"{tmp_path}/none does not exist" in line(capsys)
    assert mounted == []


def test_helper_sloppy_is_s(mounted: list[MountOptions], capsys: Capture) -> None:
    assert helper.main(["/l", "/m", "-o", "zzz"]) == ExitCode.USAGE
    assert line(capsys).startswith("mount.unionfs: option 'zzz' is unknown")
    assert helper.main(["/l", "/m", "-sno", "zzz"]) == ExitCode.OK
    assert len(mounted) == 1


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (["/l"], ExitCode.USAGE, "the following arguments are required: DIR"),
        (["/l", "/m", "-t", "ext4"], ExitCode.USAGE, "type ext4 is not ours"),
        (["/l", "/proc", "-o", "remount,ro"], ExitCode.FAIL, "/proc is no union"),
        (["-N", "/nope", "/l", "/m"], ExitCode.USAGE, "namespace /nope cannot be opened"),
    ],
)
def test_helper_errors(
    argv: list[str], code: int, told: str, mounted: list[MountOptions], capsys: Capture
) -> None:
    assert helper.main(argv) == code
    assert told in line(capsys)
    assert mounted == []


# umount and status, without a union


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (["umount"], ExitCode.USAGE, "MNT"),
        (["umount", "/nope"], ExitCode.FAIL, "/nope does not exist"),
        (["umount", "/usr"], ExitCode.FAIL, "/usr is not mounted"),
        (["umount", "/proc"], ExitCode.USAGE, "/proc is a mount of proc, not a union"),
        (["status", "/nope"], ExitCode.USAGE, "/nope does not exist"),
        (["status", "/usr"], ExitCode.USAGE, "/usr is not a mount point"),
        (["status", "/proc"], ExitCode.USAGE, "/proc is a mount of proc, not a union"),
    ],
)
def test_no_union_there(argv: list[str], code: int, told: str, capsys: Capture) -> None:
    assert cli.main(argv) == code
    assert told in line(capsys)


def test_each_failed_unmount_is_told(capsys: Capture) -> None:
    assert cli.main(["umount", "/nope", "/proc"]) == ExitCode.USAGE
    assert capsys.readouterr().err.count("\n") == 2


def test_status_of_none(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(status, "read_mounts", list)
    assert cli.main(["status"]) == ExitCode.OK
    assert capsys.readouterr().out == "no union is mounted\n"
    assert cli.main(["status", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == []


# What is made of a daemon's answer

MOUNTINFO = rb"""
25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
90 25 0:49 / /mnt/a\040b rw,nosuid,nodev - fuse.unionfs base rw,user_id=1000,group_id=100
91 25 0:50 / /mnt/c rw - fuse.unionfs x rw,user_id=0,group_id=0
92 25 0:51 / /mnt/c rw - tmpfs none rw
"""

FACTS: dict[str, object] = {
    "lowers": ["/low", "/low\n2"],
    "upper": "/up",
    "work": "/up/.unionfs",
    "readonly": False,
    "pid": 77,
    "uid": 0,
    "since": "1970-01-01T00:00:00+00:00",
    "driver": "pyfuse3",
    "version": "1.2",
    "free": 2**30,
    "size": 3 * 2**30,
    "features": {"xattrs": "trusted", "device_nodes": True, "reflink": False, "tmpfile": False},
    "reasons": {"reflink": "ext4 shares no extents"},
}


@pytest.fixture
def entries() -> list[MountEntry]:
    return parse_mounts(MOUNTINFO)


def test_finding(entries: list[MountEntry]) -> None:
    found = unions.find("/mnt/./a b/", entries)
    assert found is not None
    assert (found.number, unions.owner(found)) == (90, (1000, 100))
    assert unions.find("/mnt", entries) is None


def test_a_covered_union_is_not_asked(entries: list[MountEntry]) -> None:
    assert unions.ask(entries[2], entries).state == "covered"


def test_asking_where_no_union_answers(tmp_path: Path) -> None:
    entry = MountEntry(1, "0:1", "/", str(tmp_path), mounts.FSTYPE, "x", "rw")
    assert unions.ask(entry, [entry]).state == "covered"
    entry = entry._replace(point=f"{tmp_path}/none")
    assert unions.ask(entry, [entry]).reason == os.strerror(errno.ENOENT)


def test_who_asks_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """He may be left behind in his request: what else is open must be able to end."""
    entry = MountEntry(1, "0:1", "/", str(tmp_path), mounts.FSTYPE, "x", "rw")
    there = {os.open(tmp_path, os.O_PATH) for _ in range(5)}

    def has(*_: object) -> bytes:
        found = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(end) if is_open(fd)]
        return json.dumps({"open": found.count(str(tmp_path))}).encode()

    def is_open(fd: int) -> bool:
        return os.path.lexists(f"/proc/self/fd/{fd}")

    end = max(there) + 1
    monkeypatch.setattr(os, "getxattr", has)
    assert unions.ask(entry, [entry]).facts == {"open": 0}
    for fd in there:
        os.close(fd)


def test_an_answer_is_read(tmp_path: Path) -> None:
    try:
        os.setxattr(tmp_path, unions.STATUS_XATTR, json.dumps({"pid": 5}).encode())
    except OSError:
        pytest.skip("user xattrs are not supported here")
    entry = MountEntry(1, "0:1", "/", str(tmp_path), mounts.FSTYPE, "x", "rw")
    assert unions.ask(entry, [entry]) == unions.Answer("ok", {"pid": 5})
    os.setxattr(tmp_path, unions.STATUS_XATTR, b"nonsense")
    assert unions.ask(entry, [entry]).state == "no access"


def test_status_for_people(entries: list[MountEntry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 2 * 3600 + 5 * 60 + 1.0)
    monkeypatch.setattr(time, "localtime", time.gmtime)
    told = "\n".join(status._lines(entries[1], unions.Answer("ok", FACTS)))
    assert told == (
        "/mnt/a b: writable union of base\n"
        "  lower      /low\n"
        "             /low\\n2\n"
        "  upper      /up\n"
        "  work       /up/.unionfs\n"
        "  free       1.0 GiB of 3.0 GiB\n"
        "  since      1970-01-01 00:00:00 (2 h 5 min)\n"
        "  daemon     pid 77 of root, unionfs 1.2, driver pyfuse3\n"
        "  works      xattrs (trusted), device nodes\n"
        "  lacks      reflink: ext4 shares no extents\n"
        "             tmpfile"
    )


def test_status_of_a_dead_union(entries: list[MountEntry]) -> None:
    dead = unions.Answer("dead", {}, "the daemon is gone")
    assert list(status._lines(entries[1], dead)) == [
        "/mnt/a b: union of base, dead",
        "  state      the daemon is gone",
    ]
    assert status._object(entries[1], dead) == {
        "mountpoint": "/mnt/a b",
        "source": "base",
        "state": "dead",
        "reason": "the daemon is gone",
    }


@pytest.mark.parametrize(
    "facts",
    [{}, {"lowers": 3, "free": "x", "features": None, "since": "x"}, {"since": 7, "pid": "x"}],
)
def test_status_survives_any_answer(facts: dict[str, object], entries: list[MountEntry]) -> None:
    assert list(status._lines(entries[1], unions.Answer("ok", facts)))


def test_users_of_a_directory_are_named(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w"):
        assert (str(os.getpid()), Path("/proc/self/comm").read_text().strip()) in list(
            unmounting._users(str(tmp_path))
        )


@pytest.mark.parametrize(
    ("page", "verbs"),
    [
        ("unionfs.8", [["mount"], ["umount"], ["status"]]),
        ("unionfs-boot.8", [["boot"]]),
        ("mount.unionfs.8", [[]]),
    ],
)
def test_the_manual_knows_every_flag(page: str, verbs: list[list[str]], capsys: Capture) -> None:
    text = Path(__file__).parents[1].joinpath(f"docs/man/{page}.md").read_text()
    for verb in verbs:
        with pytest.raises(SystemExit):
            cli.main([*verb, "--help"]) if verb else helper.main(["--help"])
        flags = re.findall(
            r"^  (-\w|--[\w-]+)(?:, (--[\w-]+))?", capsys.readouterr().out, re.MULTILINE
        )
        for flag in {name for pair in flags for name in pair if name} - {"-h", "--help"}:
            assert f"**{flag}**" in text, flag
