# SPDX-License-Identifier: GPL-2.0-or-later
"""Encrypted stores: made, converted, mounted, looked after; the passphrase is seen nowhere."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images, secret, snapshot, syscalls, traced
from tests.rig.mounted import PATIENCE, Unionfs, is_mounted, program
from tests.rig.pair import Pair
from tests.rig.waiting import wait_until
from tests.test_store_commands import done, facts, fails, listing
from tests.test_stores import _children, _command, base, change, check, need, union
from unionfs import passphrase
from unionfs.errors import UnionfsError

__all__ = ["base"]

pytestmark = pytest.mark.skipif(bool(secret.why_not()), reason=secret.why_not() or "-")
ARCH = os.uname().machine
ASKING = "systemd-ask-password"
# What an ordinary user does in just the same way is tried in each run once.
as_root = pytest.mark.slow if os.geteuid() else pytest.mark.root
_made: list[bytes] = []  # the store with changes, made once


@pytest.fixture
def key(base: Path) -> Path:
    return secret.key_file(base)


@pytest.fixture
def up(base: Path) -> Path:
    """A plain store with changes, of which one is easy to find."""
    path = base / "up"
    path.mkdir()
    keep = ["tar", "--xattrs", "--xattrs-include=*", "-C", str(path)]
    if _made:
        subprocess.run([*keep, "-xpf", "-"], input=_made[0], check=True)
        return path
    with union(base, base / "tree", path):
        change(base / "mnt")
        (base / "mnt/made/conspicuous").write_text("plain-to-see\n")
    packed = subprocess.run([*keep, "-cf", "-", "."], capture_output=True, check=True)
    _made.append(packed.stdout)
    return path


def hidden(place: Path) -> list[str]:
    return [name for name in listing(place) if name.startswith(".")]


def encrypted(base: Path, store: Path | str, key: Path, *words: str) -> Unionfs:
    return union(base, base / "tree", store, f"key-file={key}", *words)


def check_encrypted(base: Path, store: Path | str, key: Path) -> None:
    with encrypted(base, store, key):
        check(base / "mnt")
        assert (base / "mnt/made/conspicuous").read_text() == "plain-to-see\n"


# Made


def test_a_store_with_changes(base: Path, up: Path, key: Path) -> None:
    before = snapshot.take(up)
    up.chmod(0o751)
    assert "would be encrypted" in done("encrypt", up, "-n", "--key-file", key)
    assert "conspicuous" in listing(up / "made")
    told = done("encrypt", up, "--key-file", key)
    (kept,) = base.glob("up.before-*")
    assert str(kept) in told
    assert b"conspicuous" not in secret.visible(up)
    assert b"plain-to-see" not in secret.visible(up)
    assert up.stat().st_mode & 0o7777 == 0o751
    kept.chmod(before[b"."].mode & 0o7777 if b"." in before else 0o755)
    assert set(snapshot.take(kept)) == set(before)
    check_encrypted(base, up, key)
    with encrypted(base, up, key) as made:
        assert b"later" not in secret.visible(up)
        (base / "mnt/later").write_text("one more")
        store = made.status()["store"]
        assert isinstance(store, dict)
        assert store["encrypted"] == "gocryptfs"
        below = [p for p in ground.mounts_below(base) if p != str(base / "mnt")]
        assert below == [], "what it shows is mounted where nobody sees it"
        assert "in use" in fails("encrypt", up, "--key-file", key)
    assert b"later" not in secret.visible(up)
    assert b"one more" not in secret.visible(up)
    with encrypted(base, up, key):
        assert (base / "mnt/later").read_text() == "one more"
    assert "is encrypted already" in fails("encrypt", up, "--key-file", key)
    assert hidden(base) == []


@pytest.mark.slow
def test_in_use(base: Path, up: Path, key: Path) -> None:
    done("encrypt", up, "--key-file", key)
    (base / "mnt2").mkdir()
    with encrypted(base, up, key):
        words = ["mount", base / "tree", up, base / "mnt2", "-o", f"key-file={key}"]
        found = secret.run(*words)
        assert found.returncode == 32
        assert "in use" in found.stderr


@pytest.mark.slow
def test_new_and_empty(base: Path, key: Path) -> None:
    (base / "empty").mkdir()
    for name in ("new", "empty"):
        assert done("encrypt", base / name, "--key-file", key) == ""
        with encrypted(base, base / name, key):
            change(base / "mnt")
        with encrypted(base, base / name, key):
            check(base / "mnt")
    assert list(base.glob("*.before-*")) == []
    fails("encrypt", base / "other", "--key-file", base / "nowhere")
    assert not (base / "other").exists()


@pytest.mark.slow
def test_discard(base: Path, up: Path, key: Path) -> None:
    assert done("encrypt", up, "--key-file", key, "--discard") == ""
    assert list(base.glob("up.before-*")) == []
    check_encrypted(base, up, key)


def test_a_key_for_what_is_not_encrypted(base: Path, up: Path, key: Path) -> None:
    """Whoever has a key means to hide what he writes."""
    uppers: list[list[object]] = [[up], ["--ephemeral"]]
    if images.why_not("ext4") is None:
        uppers.append([images.make(base / "store.img")])
    lowers = [base / "tree"]
    if images.why_not("squashfs") is None:
        lowers.append(base / "rootfs.squashfs")
    for lower in lowers:
        for upper in uppers:
            found = secret.run("mount", lower, *upper, base / "mnt", "-o", f"key-file={key}")
            assert found.returncode == 32
            assert "is not encrypted" in found.stderr
            assert not is_mounted(base / "mnt")


def test_a_file_of_that_name_in_a_plain_store(base: Path, up: Path) -> None:
    with union(base, base / "tree", up):
        (base / "mnt/gocryptfs.conf").write_text('{"EncryptedKey": ""}')
    with union(base, base / "tree", up):
        check_names = sorted(p.name for p in (base / "mnt").iterdir())
        assert "gocryptfs.conf" in check_names


@pytest.mark.skipif(os.geteuid() == 0, reason="the kernel mounts root's images")
def test_fuse2fs_does_not_write_where_the_kernel_encrypts(base: Path, key: Path) -> None:
    """It would make plain names in encrypted directories, which it does not know as such."""
    image = images.make(base / "store.img")
    assert "is encrypted" not in done("check", image)
    ground.run("tune2fs", "-O", "encrypt", image)
    found = secret.run("mount", base / "tree", f"{image}:/dir", base / "mnt")
    assert found.returncode == 32
    assert "has the feature encrypt" in found.stderr
    assert "has the feature encrypt" in fails("backup", f"{image}:/dir", base / "backup")
    assert store_code("check", image) == 8


def test_other_kinds_are_refused(base: Path, up: Path) -> None:
    assert "does not set up" in fails("encrypt", up, "--kind", "luks", code=1)
    if os.geteuid() != 0:
        assert "only root can" in fails("encrypt", up, "--kind", "fscrypt", code=1)


# The passphrase


def test_a_wrong_one(base: Path, up: Path, key: Path) -> None:
    done("encrypt", up, "--key-file", key)
    wrong = secret.key_file(base, "something else", "wrong")
    before = snapshot.take(up)
    words = ["mount", base / "tree", up, base / "mnt", "-o"]
    found = secret.run(*words, f"key-file={wrong}")
    assert found.returncode == 32
    assert found.stderr == f"unionfs: the passphrase of {up} is wrong\n"
    assert not is_mounted(base / "mnt")
    snapshot.assert_same(snapshot.take(up), before, "the store changed")
    with union(base, base / "tree", up, f"key-file={wrong}", "fallback=ro") as made:
        made.expected = ["runs without its store"]
        assert (base / "mnt/file").read_text() == "lower\n"
        assert "passphrase" in str(made.status()["degraded"])
    check_encrypted(base, up, key)


@as_root
def test_ways_to_give_it(base: Path, up: Path, key: Path) -> None:
    given = f"{secret.PASSPHRASE}\n"
    found = secret.run("store", "encrypt", up, "--key-file", "-", given=given)
    assert found.returncode == 0, found
    place = [base / "tree", up, base / "mnt"]
    environment = {"CREDENTIALS_DIRECTORY": str(base)}
    for words, text, more in (
        (["key-file=-"], given, {}),
        (["credential=key"], "", environment),
    ):
        found = secret.run("mount", *place, "-o", *words, given=text, environment=more)
        assert found.returncode == 0, found
        check(base / "mnt")
        assert secret.run("umount", base / "mnt").returncode == 0
    wrong = {
        "credential=none": "no credential none",
        f"key-file={base}/none": "cannot read the key file",
        f"key-file={base}": f"cannot read the key file {base}: Is a directory",
        f"key-file={key},credential=key": "exclude each other",
    }
    for option, text in wrong.items():
        for words in ([], ["-f"]):
            found = secret.run("mount", *place, "-o", option, *words)
            assert text in found.stderr
            assert found.returncode in (1, 32)
    for content, text in ((b"", "is empty"), (b"a\nb\n", "several lines"), (b"a" * 3000, "longer")):
        (base / "bad").write_bytes(content)
        assert text in secret.run("mount", *place, "-o", f"key-file={base}/bad").stderr
    assert not is_mounted(base / "mnt")


@pytest.mark.parametrize("path", ["-", "{}", "{}/none"])
def test_a_key_file_that_cannot_be_read(tmp_path: Path, path: str) -> None:
    named = path.format(tmp_path)
    stdin = os.dup(0)
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, 0)
    try:
        with pytest.raises(UnionfsError, match=f"^cannot read the key file {named}: ") as caught:
            passphrase.obtain(passphrase.Source(key_file=named), "store")
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(folder)
    assert caught.value.code == 32


@as_root
def test_typed(base: Path, up: Path, key: Path) -> None:
    words = ["store", "encrypt", up]
    code, shown = secret.typed(words, [secret.PASSPHRASE, "another"])
    assert code == 32
    assert "differ" in shown
    assert "conspicuous" in listing(up / "made")
    code, shown = secret.typed(words, [secret.PASSPHRASE] * 2)
    assert code == 0, shown
    assert secret.PASSPHRASE not in shown
    words = ["mount", base / "tree", up, base / "mnt"]
    code, shown = secret.typed(words, ["wrong"])
    assert code == 32
    assert "is wrong" in shown
    code, shown = secret.typed(words, [secret.PASSPHRASE])
    assert code == 0, shown
    assert secret.PASSPHRASE not in shown
    check(base / "mnt")
    assert secret.run("umount", base / "mnt").returncode == 0
    check_encrypted(base, up, key)


@as_root
def test_nobody_types_it(base: Path, up: Path, key: Path) -> None:
    """What has a fallback does not wait for ever."""
    assert secret.run("store", "encrypt", up, "--key-file", key).returncode == 0
    words = ["mount", base / "tree", up, base / "mnt", "-o", "fallback=tmpfs"]
    code, shown = secret.typed(words, [], seconds=0.5)
    assert code == 0, shown
    assert f"nobody gave the passphrase of {up} in 0.5 s" in shown
    assert "runs without its store" in shown
    assert secret.run("umount", base / "mnt").returncode == 0
    code, shown = secret.typed(words, [secret.PASSPHRASE], seconds=20)
    assert code == 0, shown
    assert "without its store" not in shown
    assert secret.run("umount", base / "mnt").returncode == 0


def test_the_console_of_an_initramfs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There it is the terminal, unless systemd's agents are there."""
    shown, console = os.openpty()
    monkeypatch.setattr(passphrase, "_TERMINAL", str(tmp_path / "none"))
    monkeypatch.setattr(passphrase, "_CONSOLE", os.ttyname(console))
    monkeypatch.setattr(passphrase, "_AGENTS", str(tmp_path / "agents"))
    source = passphrase.Source(seconds=PATIENCE, console=True)

    def type_it() -> None:
        assert os.read(shown, 100) == b"Passphrase of the store: "
        os.write(shown, b"typed\n")

    typing = threading.Thread(target=type_it)
    typing.start()
    assert passphrase.obtain(source, "the store") == b"typed"
    typing.join()
    with pytest.raises(UnionfsError, match=r"the passphrase of the store in 0\.1 s"):
        passphrase.obtain(source._replace(seconds=0.1), "the store")
    (tmp_path / "agents").mkdir()
    assert passphrase._terminals(source) == [str(tmp_path / "none")]
    os.close(shown)
    os.close(console)


@contextlib.contextmanager
def agent(answer: str) -> Iterator[None]:
    """Whoever answers systemd-ask-password(1): a socket is named in a file below /run."""
    folder = Path("/run/systemd/ask-password")
    with ground.Ground("unionfs-run-") as place:
        run = place.filesystem("run", "tmpfs")
        syscalls.mount(str(run), "/run", None, syscalls.MS_BIND)
        stop = threading.Event()

        def serve() -> None:
            while not stop.wait(0.02):
                for file in folder.glob("ask.*") if folder.exists() else ():
                    match = re.search(r"^Socket=(.*)$", file.read_text(), re.MULTILINE)
                    if match is None:
                        continue
                    link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                    with link, contextlib.suppress(OSError):
                        link.sendto(b"+" + answer.encode(), match[1])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            syscalls.umount("/run", syscalls.MNT_DETACH)


@pytest.mark.root
def test_asked_by_systemd(base: Path, up: Path, key: Path) -> None:
    if shutil.which(ASKING) is None:
        pytest.skip(f"there is no {ASKING}")
    with agent(secret.PASSPHRASE):
        found = secret.run("store", "encrypt", up)
        assert found.returncode == 0, found
        found = secret.run("mount", base / "tree", up, base / "mnt")
        assert found.returncode == 0, found
        check(base / "mnt")
        assert secret.run("umount", base / "mnt").returncode == 0
    check_encrypted(base, up, key)


@contextlib.contextmanager
def missing(*names: str) -> Iterator[None]:
    """Programs that are not there, in the tests' own mount namespace."""
    found = [os.path.realpath(path) for name in names if (path := shutil.which(name))]
    for program_path in found:
        syscalls.mount("/dev/null", program_path, None, syscalls.MS_BIND)
    try:
        yield
    finally:
        for program_path in found:
            syscalls.umount(program_path, syscalls.MNT_DETACH)


@pytest.mark.root
def test_programs_that_are_missing(base: Path, up: Path, key: Path) -> None:
    with missing("gocryptfs"):
        assert "install the package gocryptfs" in fails("encrypt", up, "--key-file", key, code=2)
    done("encrypt", up, "--key-file", key)
    words = ["mount", base / "tree", up, base / "mnt"]
    with missing("gocryptfs"):
        found = secret.run(*words, "-o", f"key-file={key}")
        assert found.returncode == 2
        assert "install the package gocryptfs" in found.stderr
    with missing(ASKING):
        found = secret.run(*words)
        assert found.returncode == 32
        assert "no terminal" in found.stderr
    check_encrypted(base, up, key)


@pytest.mark.root  # who is traced is given no set-user-ID fusermount3
def test_it_is_seen_nowhere(base: Path, up: Path, key: Path) -> None:
    why = traced.why_not()
    if why:
        pytest.skip(why)
    log = base / "trace"
    words = ["strace", "-f", "-qq", "-v", "-s", "10000", "-e", "trace=execve", "-o", str(log)]
    words += [*program(), "store", "encrypt", str(up), "--key-file", str(key)]
    subprocess.run(words, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)
    assert "gocryptfs" in log.read_text()
    assert secret.PASSPHRASE not in log.read_text()
    with encrypted(base, up, key) as made:
        assert any("gocryptfs" in _command(pid) for pid in _children(made.pid))
        assert secret.seen_in_processes(secret.PASSPHRASE) == []
        assert secret.PASSPHRASE not in made.words()
        assert secret.PASSPHRASE not in json.dumps(made.status())


# What a program sees


def mixed(root: Path) -> None:
    """Some of everything, so that each kind of mark is written."""
    (root / "lower").unlink()
    (root / "dir").rename(root / "renamed")
    (root / "renamed/inner").write_text("changed")
    os.link(root / "two", root / "three")
    with open(root / "one", "a") as file:
        file.write("appended")
    (root / ("n" * 230)).write_text("a long name")
    (root / ("n" * 230)).rename(root / ("m" * 230))
    (root / "link").rename(root / "moved-link")
    os.symlink("t" * 1000, root / "far")
    os.setxattr(root / "two", "user.note", b"x" * 500)
    os.chmod(root / "one", 0o640)
    (root / "full").mkdir(mode=0o500)
    shutil.rmtree(root / "gone")
    (root / "gone").mkdir()
    os.mkfifo(root / "fifo")
    with open(root / "mapped", "r+b") as file:
        with mmap.mmap(file.fileno(), 0) as view:
            view[5000:5004] = b"here"
        os.ftruncate(file.fileno(), 70_000)
    os.utime(root / "two", ns=(10**18, 10**18 + 1))


def filled_lower(root: Path) -> None:
    for name in ("one", "lower"):
        (root / name).write_text(name)
    (root / "two").write_text("two")
    os.link(root / "two", root / "twin")
    for name in ("dir", "gone"):
        (root / name).mkdir()
        (root / name / "inner").write_text("inner")
    os.symlink("one", root / "link")
    (root / "mapped").write_bytes(bytes(100_000))


def same(pair: Pair) -> None:
    got, want = snapshot.take(pair.mnt), snapshot.take(pair.plain)
    for name in (b"", b"."):  # the root's times are those of its making
        got.pop(name, None)
        want.pop(name, None)
    assert snapshot.differences(got, want, fresh=0) == []


def test_a_union_as_any_other(base: Path) -> None:
    (base / "pair").mkdir()
    pair = Pair(base / "pair")
    key = secret.key_file(base)
    done("encrypt", pair.upper, "--key-file", key)
    pair.union.options.append(f"key-file={key}")
    pair.fill(filled_lower)
    with pair.mounted():
        mixed(pair.mnt)
        mixed(pair.plain)
        same(pair)
        numbers = {e.name: e.inode() for e in os.scandir(pair.mnt)}
    with pair.mounted():
        same(pair)
        assert {e.name: e.inode() for e in os.scandir(pair.mnt)} == numbers


# Killed


@as_root
def test_the_program_killed(base: Path, up: Path, key: Path) -> None:
    done("encrypt", up, "--key-file", key)
    made = encrypted(base, up, key)
    made.expected = ["cannot be reached any more", "ended with exit code"]
    made.mount()
    (base / "mnt/kept").write_text("kept")
    (helper,) = (pid for pid in _children(made.pid) if "gocryptfs" in _command(pid))
    os.kill(helper, 9)
    wait_until(lambda: "cannot be reached any more" in made.words())
    assert "has ended" in str(made.status()["broken"])
    made.umount()
    with encrypted(base, up, key):
        assert (base / "mnt/kept").read_text() == "kept"


@pytest.mark.slow
def test_the_daemon_killed(base: Path, up: Path, key: Path) -> None:
    done("encrypt", up, "--key-file", key)
    made = encrypted(base, up, key)
    made.mount()
    (base / "mnt/kept").write_text("kept")
    (helper,) = (pid for pid in _children(made.pid) if "gocryptfs" in _command(pid))
    made.kill()
    wait_until(lambda: not Path(f"/proc/{helper}").exists() or "\nState:\tZ" in _state(helper))
    with encrypted(base, up, key):
        assert (base / "mnt/kept").read_text() == "kept"


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/status").read_text()
    return "\nState:\tZ"


_STEPS = "mkdir,mkdirat,rename,renameat,renameat2,rmdir,unlink,unlinkat,umount2,syncfs"


@as_root
@pytest.mark.parametrize("where", ["commit", pytest.param("all", marks=pytest.mark.slow)])
def test_killed_while_it_is_encrypted(base: Path, up: Path, key: Path, where: str) -> None:
    """In place of its own steps: the store is the plain one or the encrypted one, whole."""
    why = traced.why_not()
    if why:
        pytest.skip(why)
    spare = base / "spare"
    # What is kept has its name at once; to remove it there are steps after the moment.
    command = [*program(), "store", "encrypt", str(up), "--discard", "--key-file", str(key)]

    def again() -> None:
        for path in (up, *base.glob("up.before-*"), *base.glob(".up.*")):
            shutil.rmtree(path)
        ground.run("cp", "-a", spare, up)

    ground.run("cp", "-a", up, spare)
    found = set()

    def is_encrypted() -> bool:
        return (up / "gocryptfs.conf").exists()

    for _ in traced.kills(where, command, _STEPS, base / "trace", again, is_encrypted):
        state = "encrypted" if is_encrypted() else "plain"
        found.add(state)
        with encrypted(base, up, key) if state == "encrypted" else union(base, base / "tree", up):
            check(base / "mnt")
            assert (base / "mnt/made/conspicuous").exists()
    assert found == {"plain", "encrypted"}
    again()
    done("encrypt", up, "--key-file", key)
    assert hidden(base) == [], "what was left is taken away by the next one"


# In images; the other verbs


@pytest.fixture
def image(base: Path, key: Path) -> Path:
    """An encrypted store in an image, with changes."""
    need("ext4")
    path = images.make(base / "store.img", megabytes=32)
    done("encrypt", path, "--base", base / "tree", "--key-file", key)
    with encrypted(base, path, key):
        change(base / "mnt")
        (base / "mnt/made/conspicuous").write_text("plain-to-see\n")
    return path


@as_root
def test_the_program_left_by_who_was_killed_while_it_started(
    base: Path, image: Path, key: Path
) -> None:
    """It has what it shows to itself, and nobody uses it: the next one lets it end."""
    real = shutil.which("gocryptfs")
    script = base / "shim/gocryptfs"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nshift 2\nexec {real} "$@"\n')  # it never says that it serves
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{script.parent}:{os.environ['PATH']}"}
    mount = ["mount", base / "tree", image, base / "mnt", "-o", f"key-file={key}"]

    def staged() -> list[str]:
        return [p for p in ground.mounts_below("/") if "unionfs-stage" in p]

    for again in (lambda: done("grow", image, "--size", "64M"), lambda: None):
        process = subprocess.Popen(
            [*program(), *map(str, mount)], env=environment, start_new_session=True
        )
        wait_until(lambda: bool(staged()))
        os.killpg(process.pid, signal.SIGKILL)  # the command, and what is to be the daemon
        process.wait()
        again()
        with encrypted(base, image, key):
            check(base / "mnt")
        assert not staged()


def test_in_an_image(base: Path, image: Path, key: Path) -> None:
    (inside,) = facts("info", image)["uppers"]
    assert inside["directory"] == f"/persistent_tree/{ARCH}"
    assert inside["encrypted"] == "gocryptfs"
    assert inside["base"] is None
    assert b"conspicuous" not in image.read_bytes()
    with encrypted(base, image, key) as made:
        check(base / "mnt")
        assert (base / "mnt").stat().st_mode & 0o7777 == 0o751
        assert str(made.status()["upper"]).endswith(f"store.img:/persistent_tree/{ARCH}")
    assert images.loops_of(image) == []
    done("grow", image, "--size", "48M")
    check_encrypted(base, image, key)
    assert store_code("check", image) == 8
    assert store_code("check", image, "--key-file", key) == 0
    done("clone", image, f"{base}/copy.img:/other", "--size", "32M")
    check_encrypted(base, f"{base}/copy.img:/other", key)


def store_code(*arguments: object) -> int:
    return secret.run("store", *arguments).returncode


def test_a_backup_stays_encrypted(base: Path, up: Path, key: Path) -> None:
    plain = base / "plain.backup"
    done("backup", up, plain)
    done("encrypt", up, "--key-file", key, "--discard")
    file = base / "up.backup"
    assert "encrypted" in done("backup", up, file)
    (base / "out").mkdir()
    ground.run("tar", "--zstd", "-xf", file, "-C", base / "out")
    assert b"conspicuous" not in secret.visible(base / "out")
    (base / "back").mkdir()
    assert "encrypted" in done("restore", file, base / "back")
    check_encrypted(base, base / "back", key)
    assert "is encrypted, but" in fails("restore", plain, up)
    check_encrypted(base, up, key)


@pytest.mark.slow
def test_a_backup_while_it_is_mounted(base: Path, up: Path, key: Path) -> None:
    done("encrypt", up, "--key-file", key, "--discard")
    with encrypted(base, up, key):
        done("backup", up, base / "up.backup")
    (base / "back").mkdir()
    done("restore", base / "up.backup", base / "back")
    check_encrypted(base, base / "back", key)


@pytest.mark.slow
def test_reset(base: Path, up: Path, key: Path) -> None:
    done("encrypt", up, "--key-file", key, "--discard")
    done("reset", up, "/file", "--key-file", key)
    with encrypted(base, up, key):
        assert (base / "mnt/file").read_text() == "lower\n"
        assert (base / "mnt/moved").exists()
    done("reset", up)
    (kept,) = base.glob("up.before-*")
    with encrypted(base, up, key):
        assert (base / "mnt/gone").exists()
        (base / "mnt/conspicuous").write_text("plain-to-see\n")
    assert b"conspicuous" not in secret.visible(up)
    with encrypted(base, kept, key):
        assert (base / "mnt/moved").exists()
