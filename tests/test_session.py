# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounting, the INIT exchange and the daemon's life, with tests/standin.py in the union's place."""

import contextlib
import errno
import json
import os
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rig import as_user, ground
from tests.rig.mounted import program
from tests.rig.waiting import wait_until
from unionfs import session
from unionfs.errors import UnionfsError
from unionfs.handshake import InitFlag, Wishes, patch_init
from unionfs.mounts import MountEntry, read_mounts, topmost
from unionfs.options import MountOptions
from unionfs.session import Plan

OPTIONS = MountOptions(lowers=("/l",), upper="/u", mountpoint="/m")
PATIENCE = 20.0
# For what as_user.run() does not do: a process that stays, and one without a /dev/fuse.
SETPRIV = ["setpriv", f"--reuid={as_user.UID}", f"--regid={as_user.GID}", "--clear-groups"]


class TestInit:
    """patch_init() on messages made by hand."""

    @staticmethod
    def request(flags: int, flags2: int = 0, opcode: int = 26) -> bytes:
        body = struct.pack("=IIIII44x", 7, 41, 1 << 20, flags, flags2)
        return struct.pack("=IIQQIIIHH", 40 + len(body), opcode, 2, 0, 0, 0, 0, 0, 0) + body

    @staticmethod
    def reply(flags: int, error: int = 0) -> bytes:
        body = struct.pack("=IIIIHHIIHHI28x", 7, 38, 1 << 20, flags, 0, 0, 1 << 20, 1, 0, 0, 0)
        return struct.pack("=IiQ", 16 + len(body), error, 2) + body

    def test_sets_and_clears(self) -> None:
        request = self.request(0xFFFFFFFF, 0xFFFF)
        theirs = InitFlag.HANDLE_KILLPRIV | InitFlag.AUTO_INVAL_DATA | InitFlag.DO_READDIRPLUS
        patched, flags = patch_init(request, self.reply(int(theirs)), Wishes.of(OPTIONS))
        assert flags & (InitFlag.DONT_MASK | InitFlag.POSIX_ACL | InitFlag.DO_READDIRPLUS)
        assert InitFlag.CACHE_SYMLINKS in flags
        assert not flags & (InitFlag.HANDLE_KILLPRIV | InitFlag.AUTO_INVAL_DATA)
        assert len(patched) == len(self.reply(0))
        assert struct.unpack_from("=I", patched, 16 + 12)[0] == int(flags)
        assert struct.unpack_from("=H", patched, 16 + 28)[0] == 256

    def test_only_what_the_kernel_offers(self) -> None:
        request = self.request(int(InitFlag.DONT_MASK), 0xFFFF)  # flags2 without INIT_EXT
        _, flags = patch_init(request, self.reply(int(InitFlag.ASYNC_DIO)), Wishes.of(OPTIONS))
        assert flags == InitFlag.DONT_MASK

    def test_follows_the_options(self) -> None:
        wishes = Wishes.of(replace(OPTIONS, noacl=True, lower_live=True))
        request = self.request(0xFFFFFFFF)
        _, flags = patch_init(request, self.reply(int(InitFlag.POSIX_ACL)), wishes)
        assert InitFlag.POSIX_ACL not in flags
        assert InitFlag.AUTO_INVAL_DATA in flags

    def test_errors(self) -> None:
        wishes = Wishes.of(OPTIONS)
        with pytest.raises(UnionfsError, match="Protocol error"):
            patch_init(self.request(0), self.reply(0, -errno.EPROTO), wishes)
        with pytest.raises(UnionfsError, match="not INIT"):
            patch_init(self.request(0, opcode=1), self.reply(0), wishes)
        with pytest.raises(UnionfsError, match="too old"):
            patch_init(self.request(0), struct.pack("=IiQ", 16, 0, 2), wishes)


class TestPlan:
    @pytest.fixture(autouse=True)
    def _user(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # tmp_path comes first: it asks for the uid too.
        monkeypatch.setattr(session, "DEVICE", "/dev/null")
        monkeypatch.setattr(session, "has_admin", lambda: False)
        monkeypatch.setattr(os, "getuid", lambda: 1000)
        monkeypatch.setattr(shutil, "which", lambda *_args, **_words: "/usr/bin/fusermount3")

    def test_user(self) -> None:
        assert session.plan_mount(OPTIONS) == Plan("/usr/bin/fusermount3", allow_other=False)

    def test_root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(session, "has_admin", lambda: True)
        assert session.plan_mount(OPTIONS) == Plan(None, allow_other=True)
        assert not session.plan_mount(replace(OPTIONS, allow_other=False)).allow_other

    def test_no_fusermount3(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "which", lambda *_args, **_words: None)
        with pytest.raises(UnionfsError, match="fusermount3 is not installed") as caught:
            session.plan_mount(OPTIONS)
        assert "package fuse3" in caught.value.line()

    def test_no_device(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(session, "DEVICE", f"{tmp_path}/fuse")
        with pytest.raises(UnionfsError, match="No such file or directory") as caught:
            session.plan_mount(OPTIONS)
        assert "modprobe fuse" in caught.value.line()

    @pytest.mark.parametrize("word", ["allow_other", "allow_root"])
    def test_allow_other(self, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
        wanted = replace(OPTIONS, **{word: True})  # type: ignore[arg-type]
        monkeypatch.setattr(session, "users_may_allow_other", lambda: False)
        with pytest.raises(UnionfsError, match=f"option {word} is not permitted") as caught:
            session.plan_mount(wanted)
        assert "user_allow_other to /etc/fuse.conf" in caught.value.line()
        assert caught.value.code == 1
        monkeypatch.setattr(session, "users_may_allow_other", lambda: True)
        assert session.plan_mount(wanted).allow_other

    def test_fuse_conf(self, tmp_path: Path) -> None:
        conf = tmp_path / "fuse.conf"
        assert not session.users_may_allow_other(str(conf))
        conf.write_text("#user_allow_other\nuser_allow_others\n")
        assert not session.users_may_allow_other(str(conf))
        conf.write_text("mount_max = 3\n user_allow_other # yes\n")
        assert session.users_may_allow_other(str(conf))


def test_mount_options_of_both_ways() -> None:
    wanted = replace(
        OPTIONS,
        fsname="a,b\\c",
        max_read=4096,
        readonly=True,
        kernel_flags=frozenset({"nosuid", "noatime", "nosymfollow", "sync"}),
    )
    plan = Plan("/usr/bin/fusermount3", allow_other=True)
    assert session.helper_options(plan, wanted) == (
        "fsname=a\\,b\\\\c,subtype=unionfs,default_permissions,allow_other,max_read=4096,"
        "nosuid,sync,ro"
    )
    assert session.mount_data(Plan(None, allow_other=True), wanted, 7) == (
        f"fd=7,rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},"
        "default_permissions,allow_other,max_read=4096"
    )
    assert "ro" in session.helper_options(plan, replace(OPTIONS, upper=None)).split(",")


class Standing:
    """The stand-in on place/m, over place/l and place/u."""

    def __init__(self, place: Path, *, user: bool = False, **fields: object) -> None:
        self.place = place
        self.mnt = place / "m"
        self.user = user
        for name in ("l", "u", "m"):
            (place / name).mkdir(exist_ok=True)
            if user and os.geteuid() == 0:
                os.chown(place / name, as_user.UID, as_user.GID)
        default = {"lowers": [f"{place}/l"], "upper": f"{place}/u", "mountpoint": f"{place}/m"}
        default["driver"] = "pyfuse3"  # what the stand-in is written for
        self.fields = default | fields

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.standin", json.dumps(self.fields)]

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        if self.user:
            return as_user.run(command, timeout=PATIENCE)
        return subprocess.run(
            command,
            cwd=as_user.PROJECT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def start(self) -> "subprocess.CompletedProcess[str]":
        return self.run(*self.command)

    def refusal(self) -> str:
        """The one line of a mount that must fail, leaving nothing."""
        done = self.start()
        assert done.returncode in (1, 2, 32)
        assert done.stderr.count("\n") == 1
        assert self.entry is None
        assert os.listdir(self.place / "u") == []
        return done.stderr

    def read(self, name: str) -> str:
        return self.run("cat", str(self.mnt / name)).stdout

    @property
    def facts(self) -> dict[str, object]:
        facts: dict[str, object] = json.loads(self.read("facts"))
        return facts

    @property
    def entry(self) -> MountEntry | None:
        return topmost(str(self.mnt), read_mounts())

    @contextlib.contextmanager
    def mounted(self) -> Iterator["Daemon"]:
        """Mount; at the end the daemon must have gone, by whatever the body did."""
        done = self.start()
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        pid = self.facts["pid"]
        assert isinstance(pid, int)
        with Daemon(pid) as daemon:
            try:
                yield daemon
                daemon.wait()
            finally:
                daemon.end()
                if self.entry is not None:
                    ground.run("umount", "-l", self.mnt)


class Daemon:
    """A process that is no child of ours, held by a pidfd."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = os.pidfd_open(pid)

    def __enter__(self) -> "Daemon":
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self.fd)

    def signal(self, number: int) -> None:
        signal.pidfd_send_signal(self.fd, number)

    def wait(self) -> None:
        assert select.select([self.fd], [], [], PATIENCE)[0], "the daemon does not end"

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.wait()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)  # we are the reaper of what the tests start


@pytest.fixture(params=["root", "user"])
def standing(request: pytest.FixtureRequest) -> Standing:
    """The stand-in, not yet mounted, as root and as an ordinary user."""
    if request.param == "root":
        if os.geteuid():
            pytest.skip("needs root")
        return Standing(request.getfixturevalue("place"))
    return Standing(request.getfixturevalue("user_place"), user=True)


class TestMount:
    def test_ready_when_it_returns_and_gone_after_umount(self, standing: Standing) -> None:
        with standing.mounted() as daemon:
            entry = standing.entry
            assert entry is not None
            assert (entry.fstype, entry.source) == ("fuse.unionfs", "unionfs")
            words = entry.options.split(",")
            assert "default_permissions" in words
            assert ("allow_other" in words) is not standing.user
            facts = standing.facts
            assert facts["mountpoint"] == str(standing.mnt)
            assert facts["umask"] == 0
            assert facts["xattrs"] == ("user" if standing.user else "trusted")
            assert facts["detached"] == [not standing.user]
            assert os.readlink(f"/proc/{daemon.pid}/cwd") == "/"
            assert os.readlink(f"/proc/{daemon.pid}/fd/0") == "/dev/null"
            limits = Path(f"/proc/{daemon.pid}/limits").read_text()
            soft, hard = limits.split("Max open files")[1].split()[:2]
            assert soft == hard
            if standing.user:
                assert standing.run("fusermount3", "-u", str(standing.mnt)).returncode == 0
            else:
                ground.run("umount", standing.mnt)
        beside = {"format", "index", "store", "whiteout", "work"} | (
            {"numbers"} if standing.user else set()
        )
        assert set(os.listdir(standing.place / "u/.unionfs")) == beside

    def test_the_handlers_get_the_raw_mode_and_the_umask(self, standing: Standing) -> None:
        with standing.mounted() as daemon:
            script = 'umask 022; mkdir "$0/d"; umask 027; : > "$0/f"; umask 0; mkdir "$0/e"'
            assert standing.run("sh", "-c", script, str(standing.mnt)).returncode == 0
            assert standing.read("asked").splitlines() == [
                "d 40777 22",
                "f 100666 27",
                "e 40777 0",
            ]
            daemon.signal(signal.SIGTERM)

    def test_many_at_once(self, standing: Standing) -> None:
        """The loop goes on after the device took the socket's place; a slow request is alone."""
        script = (
            'for i in 1 2 3 4; do (for j in 1 2 3 4 5 6 7 8 9 10; do echo $i.$j > "$0/$i.$j"; '
            'done) & done; cat "$0/slow"; wait; cat "$0"/*.*'
        )
        with standing.mounted() as daemon:
            done = standing.run("sh", "-c", script, str(standing.mnt))
            assert done.stderr == ""
            expected = {f"{i}.{j}" for i in range(1, 5) for j in range(1, 11)}
            assert set(done.stdout.split()) == expected
            daemon.signal(signal.SIGTERM)

    def test_fsname_and_flags(self, standing: Standing) -> None:
        standing.fields |= {"fsname": "my, own", "kernel_flags": ["noexec", "nosuid"]}
        with standing.mounted() as daemon:
            entry = standing.entry
            assert entry is not None
            assert entry.source == "my, own"
            line = next(
                line
                for line in Path("/proc/self/mountinfo").read_text().splitlines()
                if f" {standing.mnt} " in line
            )
            words = line.split()[5].split(",")
            assert {"noexec", "nosuid"} <= set(words)
            assert ("nodev" in words) is standing.user
            daemon.signal(signal.SIGTERM)

    def test_readonly_writes_nothing(self, standing: Standing) -> None:
        standing.fields |= {"readonly": True}
        with standing.mounted() as daemon:
            done = standing.run("touch", str(standing.mnt / "new"))
            assert "Read-only file system" in done.stderr
            assert standing.facts["work"] is False
            assert os.listdir(standing.place / "u") == []
            daemon.signal(signal.SIGTERM)

    def test_ephemeral(self, standing: Standing) -> None:
        standing.fields |= {"ephemeral": True, "upper": None}
        with standing.mounted() as daemon:
            path = str(standing.facts["upper"])
            assert path == "(memory)" or os.path.isdir(path)
            daemon.signal(signal.SIGTERM)
        assert not os.path.exists(path)

    def test_allow_root(self, place: Path) -> None:
        if os.geteuid():
            pytest.skip("needs root")
        standing = Standing(place, allow_root=True)
        with standing.mounted() as daemon:
            entry = standing.entry
            assert entry is not None
            assert "allow_other" in entry.options
            done = as_user.run(["ls", str(standing.mnt)])
            assert "Permission denied" in done.stderr
            daemon.signal(signal.SIGTERM)


class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signal(self, standing: Standing, number: int) -> None:
        with standing.mounted() as daemon:
            daemon.signal(number)
            daemon.wait()
            assert standing.entry is None

    def test_signal_while_in_use(self, standing: Standing) -> None:
        with standing.mounted() as daemon:
            # Holds a file open until it is told to write; the mount is then gone.
            script = 'exec 5> "$0/held"; echo open; read -r _; (echo x >&5) 2>&- || echo lost'
            command = ["sh", "-c", script, str(standing.mnt)]
            if standing.user and os.geteuid() == 0:
                command = [*SETPRIV, *command]
            pipe = subprocess.PIPE
            with subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, text=True
            ) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == "open\n"
                daemon.signal(signal.SIGTERM)
                daemon.wait()
                assert standing.entry is None
                assert process.communicate("\n") == ("lost\n", "")

    def test_a_bug_that_ends_the_loop_unmounts(self, standing: Standing) -> None:
        with standing.mounted() as daemon:
            done = standing.run("cat", str(standing.mnt / "crash"))
            assert done.returncode == 1
            daemon.wait()
            assert standing.entry is None

    def test_killed_then_mounted_again(self, standing: Standing) -> None:
        with standing.mounted() as daemon:
            daemon.signal(signal.SIGKILL)
            daemon.wait()
        with standing.mounted() as daemon:
            daemon.signal(signal.SIGTERM)

    def test_auto_unmount(self, standing: Standing) -> None:
        standing.fields |= {"auto_unmount": True}
        with standing.mounted() as daemon:
            daemon.signal(signal.SIGKILL)
            daemon.wait()
            wait_until(lambda: standing.entry is None)
        with standing.mounted() as daemon:
            daemon.signal(signal.SIGTERM)
        assert b"unionfs-keeper" not in b"".join(
            Path(f"/proc/{pid}/cmdline").read_bytes() for pid in ground.children()
        )

    def test_foreground(self, standing: Standing) -> None:
        standing.fields |= {"foreground": True, "debug": True}
        with contextlib.ExitStack() as stack:
            command = standing.command
            if standing.user and os.geteuid() == 0:
                stack.enter_context(as_user.fuse_for_all())
                command = [*SETPRIV, *command]
            process = stack.enter_context(
                subprocess.Popen(command, cwd=as_user.PROJECT, stderr=subprocess.PIPE, text=True)
            )
            assert process.stderr is not None
            log = []
            for line in process.stderr:
                log.append(line)
                if "mounted on" in line:
                    break
            assert standing.facts["pid"] == process.pid
            drain = threading.Thread(target=process.stderr.read)
            drain.start()
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 0
            drain.join()
            agreed = next(line for line in log if "INIT agreed" in line)
            assert "DONT_MASK" in agreed
            assert "HANDLE_KILLPRIV" not in agreed
            assert standing.entry is None


class TestRefusal:
    def test_missing_lower(self, standing: Standing) -> None:
        standing.fields |= {"lowers": [f"{standing.place}/none"]}
        assert f"{standing.place}/none: No such file or directory" in standing.refusal()

    def test_not_empty(self, standing: Standing) -> None:
        (standing.mnt / "file").touch()
        assert "is not empty" in standing.refusal()
        standing.fields |= {"nonempty": True}
        with standing.mounted() as daemon:
            daemon.signal(signal.SIGTERM)

    def test_in_use_and_already_mounted(self, standing: Standing) -> None:
        with standing.mounted() as daemon:
            assert "already the mount point of a union" in standing.start().stderr
            other = standing.place / "other"
            other.mkdir()
            mnt = standing.fields["mountpoint"]
            standing.fields |= {"mountpoint": str(other)}
            text = standing.start().stderr
            assert f"is in use by process {daemon.pid} (" in text
            assert f"mounted on {mnt}" in text
            daemon.signal(signal.SIGTERM)

    def test_user_without_the_device(self, user_place: Path) -> None:
        if os.geteuid() or os.stat(session.DEVICE).st_mode & 0o006:
            pytest.skip("needs root, and a /dev/fuse that is closed to users")
        standing = Standing(user_place, user=True)
        command = [*SETPRIV, *standing.command]
        done = subprocess.run(
            command, cwd=as_user.PROJECT, capture_output=True, text=True, check=False
        )
        assert "cannot open /dev/fuse: Permission denied" in done.stderr
        assert done.returncode == 2
        assert os.listdir(user_place / "u") == []

    def test_mount_fails_after_the_work_area_was_made(self, user_place: Path) -> None:
        """fusermount3 refuses a mount point that is not the user's to write."""
        if os.geteuid():
            pytest.skip("needs root, to make the user's mount point another's")
        standing = Standing(user_place, user=True)
        os.chown(standing.mnt, 0, 0)
        text = standing.refusal()
        assert "fusermount3: user has no write access to mountpoint" in text

    @pytest.mark.root
    def test_user_namespace_without_mounts_of_its_own(self, place: Path) -> None:
        standing = Standing(place)
        done = standing.run("unshare", "-Ur", *standing.command)
        assert "it must have its own mounts too (unshare -Urm)" in done.stderr
        assert done.returncode == 32
        assert os.listdir(place / "u") == []


def test_inside_a_user_namespace(user_place: Path) -> None:
    """As its root, with its own mounts: no fusermount3, and the lower `/` is careful."""
    standing = Standing(user_place, user=True, lowers=["/usr"])
    # Unlike umount(8) ours waits until the daemon has ended, and with it what it does in the upper.
    leave = shlex.join([*program(), "umount", str(standing.mnt)])
    script = f'"$@" && cat "$0/facts" && {leave}'
    inner = ["unshare", "-Urm", "sh", "-c", script, str(standing.mnt), *standing.command]
    done = standing.run(*inner)
    assert done.stderr == ""
    facts = json.loads(done.stdout)
    assert facts["mounted_by"] == "mount"
    assert facts["xattrs"] == "user"
