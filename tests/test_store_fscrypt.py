# SPDX-License-Identifier: GPL-2.0-or-later
"""Stores that the kernel encrypts (fscrypt): made, converted, killed, remounted, looked after."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images, secret, snapshot, traced
from tests.rig.mounted import PATIENCE, is_mounted, program
from tests.rig.pair import Pair
from tests.test_store_commands import done, facts, fails, listing
from tests.test_store_encrypt import (
    check_encrypted,
    encrypted,
    filled_lower,
    hidden,
    key,
    mixed,
    same,
    store_code,
    up,
)
from tests.test_stores import base, change, check, union
from unionfs.format import KEY_ATTRIBUTE
from unionfs.stores import fscrypt

__all__ = ["base", "key", "up"]

ARCH = os.uname().machine
INSIDE = f"/persistent_tree/{ARCH}"
FEATURE = Path("/sys/fs/ext4/features/encryption")


def why_not() -> str:
    if os.geteuid() != 0:
        return "only root unlocks what fscrypt encrypts"
    return "" if FEATURE.exists() else f"the kernel's ext4 cannot encrypt: there is no {FEATURE}"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


def able(image: Path) -> Path:
    ground.run("tune2fs", "-O", "encrypt", image)
    return image


def encrypt(store: Path | str, key: Path, *words: object) -> str:
    return done("encrypt", store, "--kind", "fscrypt", "--key-file", key, *words)


@pytest.fixture
def disk(base: Path) -> Iterator[Path]:
    """An ext4 with the feature, mounted: for uppers that are directories."""
    image = able(images.make(base / "disk.img", megabytes=64))
    point = base / "disk"
    point.mkdir()
    ground.run("mount", "-o", "loop", image, point)
    yield point
    ground.run("umount", point)


@pytest.fixture
def upper(disk: Path, up: Path) -> Path:
    """A plain store with changes in it."""
    ground.run("cp", "-a", up, disk / "up")
    return disk / "up"


@pytest.fixture
def image(base: Path, key: Path) -> Path:
    """An encrypted store in an image, with changes."""
    path = able(images.make(base / "store.img", megabytes=32))
    encrypt(path, key, "--base", base / "tree")
    with encrypted(base, path, key):
        change(base / "mnt")
        (base / "mnt/made/conspicuous").write_text("plain-to-see\n")
    return path


def locked(directory: Path) -> bool:
    """Nothing in it can be read, and its names are not those that were given."""
    names = listing(directory)
    if {".unionfs", "made", "file"} & set(names):
        return False
    below = [Path(folder, name) for folder, _, files in os.walk(directory) for name in files]
    assert {_outcome(path) for path in below if path.is_file()} <= {errno.ENOKEY}
    return True


def _outcome(path: Path) -> int | None:
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno
    return None


def killed(base: Path, upper: Path, key: Path, *, unmounted: bool = True) -> None:
    """Leave a store as a daemon that was killed does."""
    made = encrypted(base, upper, key)
    made.mount()
    (base / "mnt/kept").write_text("kept")
    made.die()
    if unmounted:
        made.clear()
    assert not locked(upper)


def leftovers() -> list[Path]:
    return list(Path("/run/unionfs").glob(".fscrypt-*"))


def test_a_directory_with_changes(base: Path, upper: Path, key: Path) -> None:
    before = snapshot.take(upper)
    words = ["--kind", "fscrypt", "-n", "--key-file", key]
    assert "would be encrypted" in done("encrypt", upper, *words)
    told = encrypt(upper, key)
    (kept,) = upper.parent.glob("up.before-*")
    assert str(kept) in told
    assert set(snapshot.take(kept)) == set(before)
    assert locked(upper)
    assert "is encrypted already" in fails("encrypt", upper, "--key-file", key)
    for _ in range(2):
        with encrypted(base, upper, key) as made:
            check(base / "mnt")
            assert (base / "mnt/made/conspicuous").read_text() == "plain-to-see\n"
            store = made.status()["store"]
            assert isinstance(store, dict)
            assert store["encrypted"] == "fscrypt"
            assert KEY_ATTRIBUTE not in os.listxattr(base / "mnt")
            assert "in use" in fails("encrypt", upper, "--key-file", key)
            assert secret.seen_in_processes(secret.PASSPHRASE) == []
        assert locked(upper)
    assert hidden(upper.parent) == []
    assert leftovers() == []


def test_a_wrong_passphrase(base: Path, upper: Path, key: Path) -> None:
    encrypt(upper, key, "--discard")
    assert list(upper.parent.glob("up.before-*")) == []
    wrong = secret.key_file(base, "something else", "wrong")
    found = secret.run("mount", base / "tree", upper, base / "mnt", "-o", f"key-file={wrong}")
    assert found.returncode == 32
    assert found.stderr == f"unionfs: the passphrase of {upper} is wrong\n"
    assert not is_mounted(base / "mnt")
    assert locked(upper)
    with union(base, base / "tree", upper, f"key-file={wrong}", "fallback=ro") as made:
        made.expected = ["runs without its store"]
        assert (base / "mnt/file").read_text() == "lower\n"
    data = bytearray(os.getxattr(upper, KEY_ATTRIBUTE))
    struct.pack_into("=4B", data, 0, 1, 31, 255, 255)
    os.setxattr(upper, KEY_ATTRIBUTE, data)
    found = secret.run("mount", base / "tree", upper, base / "mnt", "-o", f"key-file={key}")
    assert "is damaged" in found.stderr


def test_open_still_when_it_is_unmounted(base: Path, upper: Path, key: Path) -> None:
    """What a program has open can be read as before; the rest is locked as soon as it is closed."""
    encrypt(upper, key, "--discard")
    made = encrypted(base, upper, key)
    made.mount()
    assert made.process is not None
    fd = os.open(base / "mnt/open", os.O_RDWR | os.O_CREAT)
    try:
        made.process.terminate()
        assert made.process.wait(timeout=PATIENCE) == 0
        assert "is not locked: what is open there stays so" in made.words()
        assert len(leftovers()) == 1
    finally:
        with pytest.raises(OSError, match="not connected"):
            os.close(fd)  # of a union that is no more
    assert not is_mounted(base / "mnt")
    assert store_code("check", upper) == 8
    assert locked(upper)
    assert leftovers() == []


@pytest.mark.slow
def test_typed(base: Path, upper: Path, key: Path) -> None:
    words = ["store", "encrypt", upper, "--kind", "fscrypt"]
    code, shown = secret.typed(words, [secret.PASSPHRASE] * 2)
    assert code == 0, shown
    assert secret.PASSPHRASE not in shown
    words = ["mount", base / "tree", upper, base / "mnt"]
    code, shown = secret.typed(words, [secret.PASSPHRASE])
    assert code == 0, shown
    check(base / "mnt")
    assert secret.run("umount", base / "mnt").returncode == 0
    check_encrypted(base, upper, key)


def test_a_killed_daemon(base: Path, upper: Path, key: Path) -> None:
    """The key stays in the file system, until somebody of us comes by."""
    encrypt(upper, key, "--discard")
    wrong = secret.key_file(base, "something else", "wrong")
    killed(base, upper, key)
    words = ["mount", base / "tree", upper, base / "mnt", "-o"]
    assert "is wrong" in secret.run(*words, f"key-file={wrong}").stderr
    assert locked(upper)
    killed(base, upper, key)
    with encrypted(base, upper, key):
        assert (base / "mnt/kept").read_text() == "kept"
        assert store_code("check", upper) == 8, "it is in use"
    assert locked(upper)
    killed(base, upper, key)
    assert store_code("check", upper) == 8
    assert locked(upper)
    assert store_code("check", upper, "--repair", "--key-file", key) == 1, "it was not unmounted"
    assert locked(upper)
    assert leftovers() == []


def test_a_bind_mount(base: Path, upper: Path, key: Path) -> None:
    """It holds its directory open: locked it is by who comes by when it is away."""
    encrypt(upper, key, "--discard")
    (base / "bound").mkdir()
    ground.run("mount", "--bind", upper, base / "bound")
    with encrypted(base, base / "bound", key) as made:
        made.expected = ["is not locked"]
        check(base / "mnt")
    ground.run("umount", base / "bound")
    assert len(leftovers()) == 1
    assert store_code("check", upper) == 8
    assert locked(upper)
    assert leftovers() == []


def test_unmounted_after_a_kill(base: Path, upper: Path, key: Path) -> None:
    encrypt(upper, key, "--discard")
    killed(base, upper, key, unmounted=False)
    assert not locked(upper)
    assert secret.run("umount", base / "mnt").returncode == 0
    assert locked(upper)
    assert leftovers() == []


def test_in_an_image(base: Path, image: Path, key: Path) -> None:
    (inside,) = facts("info", image)["uppers"]
    assert inside["directory"] == INSIDE
    assert inside["encrypted"] == "fscrypt"
    assert inside["base"] is None
    data = image.read_bytes()
    assert b"conspicuous" not in data
    assert b"plain-to-see" not in data
    with encrypted(base, image, key) as made:
        check(base / "mnt")
        assert (base / "mnt").stat().st_mode & 0o7777 == 0o751
        assert str(made.status()["upper"]).endswith(f"store.img:{INSIDE}")
        (inside,) = facts("info", image)["uppers"]
        assert inside["encrypted"] == "fscrypt"
        assert inside["mounted"] == str(base / "mnt")
        assert "a copy would be in plain text" in fails("backup", image, base / "backup")
    assert images.loops_of(image) == []
    assert not (base / "backup").exists()
    assert "a copy would be in plain text" in fails("clone", image, f"{image}:/other")
    assert store_code("check", image) == 8
    assert store_code("check", image, "--key-file", key) == 0
    (base / "look").mkdir()
    ground.run("mount", "-o", "loop,ro", image, base / "look")
    assert locked(Path(f"{base}/look{INSIDE}"))
    ground.run("umount", base / "look")
    done("grow", image, "--size", "48M")
    shutil.copy(image, base / "copy.img")
    check_encrypted(base, base / "copy.img", key)
    (base / "second").mkdir()
    lowers = f"{image}\\:{INSIDE}:{base / 'tree'}"
    told = secret.run("mount", lowers, base / "second", base / "mnt").stderr
    assert "can only be an upper" in told


def test_reset_and_restore(base: Path, image: Path, up: Path, key: Path) -> None:
    done("reset", image, "/file", "--key-file", key)
    with encrypted(base, image, key):
        assert (base / "mnt/file").read_text() == "lower\n"
        assert (base / "mnt/moved").exists()
    wrong = secret.key_file(base, "something else", "wrong")
    assert "is wrong" in fails("reset", image, "--key-file", wrong)
    done("backup", up, base / "plain.backup")
    assert "is encrypted, but" in fails("restore", base / "plain.backup", image)
    told = done("reset", image, "--key-file", key)
    kept = re.findall(r"kept in \S+:(\S+)", told)[0]
    with encrypted(base, image, key):
        assert (base / "mnt/gone").exists()
        (base / "mnt/conspicuous").write_text("plain-to-see\n")
    assert b"conspicuous" not in image.read_bytes()
    with encrypted(base, f"{image}:{kept}", key):
        assert (base / "mnt/moved").exists()


def test_new_and_empty(base: Path, disk: Path, key: Path) -> None:
    encrypt(disk / "new", key)
    with encrypted(base, disk / "new", key):
        change(base / "mnt")
    assert locked(disk / "new")
    with encrypted(base, disk / "new", key):
        check(base / "mnt")
    # A clone would put a plain one in its place.
    encrypt(disk / "empty", key)
    (base / "other").mkdir()
    assert "not overwritten" in fails("clone", base / "other", disk / "empty")


def test_its_key_is_frozen() -> None:
    """What was encrypted once is unlocked by every later version."""
    made_of = fscrypt.MadeOf(16, 8, 1, bytes(range(32)))
    assert made_of.text() == bytes([1, 16, 8, 1, *range(32)])
    raw = made_of.key(bytearray(secret.PASSPHRASE.encode()))
    assert fscrypt.identifier_of_key(raw).hex() == "71f903468e5387b64a8cb2e7981a9ec5"


@pytest.mark.parametrize("words", [[], ["userxattr"]])
def test_its_attribute_is_nobodys(
    base: Path, upper: Path, disk: Path, key: Path, words: list[str]
) -> None:
    """A copy of attributes onto the root of the union would lose the store."""
    store = disk / "new" if words else upper
    encrypt(store, key)
    before = os.getxattr(store, KEY_ATTRIBUTE)
    with union(base, base / "tree", store, f"key-file={key}", *words):
        with contextlib.suppress(PermissionError):
            os.setxattr(base / "mnt", KEY_ATTRIBUTE, b"another")
        with contextlib.suppress(OSError):
            os.removexattr(base / "mnt", KEY_ATTRIBUTE)
        assert KEY_ATTRIBUTE not in os.listxattr(base / "mnt")
    assert os.getxattr(store, KEY_ATTRIBUTE) == before


def test_where_it_cannot_be(base: Path, disk: Path, up: Path, key: Path) -> None:
    words = ["--kind", "fscrypt", "--key-file", base / "nowhere"]
    plain = images.make(base / "plain.img")
    assert "tune2fs -O encrypt" in fails("encrypt", f"{plain}:/dir", *words)
    with ground.Ground("unionfs-fscrypt-") as place:
        memory = place.filesystem("memory", "tmpfs")
        assert "has no encryption" in fails("encrypt", memory / "up", *words)
        assert not (memory / "up").exists()
    encrypt(disk / "one", key)
    with encrypted(base, disk / "one", key):
        (base / "mnt/inner").mkdir()
        assert "lies in" in fails("encrypt", disk / "one/inner", *words), "it is in use"
    killed(base, disk / "one", key)  # so that it is not locked
    assert "encrypts already" in fails("encrypt", disk / "one/inner", *words)
    assert store_code("check", disk / "one") == 8
    assert leftovers() == []


def test_a_union_as_any_other(base: Path, disk: Path) -> None:
    """Devices, marks, hard links, renames, attributes: on an upper of the kernel's own."""
    (disk / "pair").mkdir()
    pair = Pair(disk / "pair")
    key = secret.key_file(base)
    encrypt(pair.upper, key)
    pair.union.options.append(f"key-file={key}")
    pair.fill(filled_lower)
    with pair.mounted():
        mixed(pair.mnt)
        mixed(pair.plain)
        same(pair)
        numbers = {e.name: e.inode() for e in os.scandir(pair.mnt)}
    assert locked(pair.upper)
    with pair.mounted():
        same(pair)
        assert {e.name: e.inode() for e in os.scandir(pair.mnt)} == numbers


_STEPS = "mkdir,mkdirat,rename,renameat,renameat2,rmdir,unlink,unlinkat,setxattr,ioctl,syncfs"


@pytest.mark.parametrize("where", ["commit", pytest.param("all", marks=pytest.mark.slow)])
def test_killed_while_it_is_encrypted(base: Path, upper: Path, key: Path, where: str) -> None:
    """In place of its own steps: the store is the plain one or the encrypted one, whole."""
    why = traced.why_not()
    if why:
        pytest.skip(why)
    spare = base / "spare"
    command = [*program(), "store", "encrypt", str(upper), "--kind", "fscrypt"]
    # What is kept has its name at once; to remove it there are steps after the moment.
    command += ["--discard", "--key-file", str(key)]

    def again() -> None:
        for path in (upper, *upper.parent.glob("up.before-*"), *upper.parent.glob(".up.*")):
            shutil.rmtree(path)
        ground.run("cp", "-a", spare, upper)

    ground.run("cp", "-a", upper, spare)
    found = set()

    def is_encrypted() -> bool:
        return KEY_ATTRIBUTE in os.listxattr(upper)

    for _ in traced.kills(where, command, _STEPS, base / "trace", again, is_encrypted):
        state = "encrypted" if is_encrypted() else "plain"
        found.add(state)
        with (
            encrypted(base, upper, key)
            if state == "encrypted"
            else union(base, base / "tree", upper)
        ):
            check(base / "mnt")
            assert (base / "mnt/made/conspicuous").exists()
    assert found == {"plain", "encrypted"}
    again()
    encrypt(upper, key)
    assert hidden(upper.parent) == [], "what was left is taken away by the next one"
    assert leftovers() == []
