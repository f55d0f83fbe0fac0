# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs boot` over a directory: each mode, what becomes of a broken store, where it is told."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images, secret
from tests.rig.mounted import PATIENCE, program
from tests.test_stores import label, need
from unionfs.boot.words import WORDS
from unionfs.mounts import FSTYPE, read_mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a system is booted by root")

INSIDE = f"persistent_root/{os.uname().machine}"
RUN = Path("/run/unionfs")


@pytest.fixture
def root(place: Path) -> Iterator[Path]:
    """The root of a system that an initramfs has mounted, and a /run/unionfs of our own."""
    tree = place / "root"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/name").write_text("lower\n")
    (tree / "gone").write_text("lower\n")
    RUN.mkdir(exist_ok=True)
    ground.run("mount", "-t", "tmpfs", "tmpfs", str(RUN))
    try:
        yield tree
    finally:
        end(tree)
        ground.run("umount", "-R", str(RUN))  # with what profiles have mounted there


def boot(root: Path, line: str, *words: str, code: int = 0, path: str = "") -> str:
    done = subprocess.run(
        [*program(), "boot", "--root", str(root), "--cmdline", f"quiet {line}", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "PATH": path or os.environ["PATH"]},
    )
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    return done.stderr + done.stdout


def status(root: Path) -> dict[str, object]:
    done = subprocess.run(
        [*program(), "status", "--json", str(root)], capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)[0]
    assert isinstance(facts, dict)
    return facts


def end(root: Path) -> None:
    """Unmount it as the end of a system does, and wait for its daemons."""
    for entry in reversed([e for e in read_mounts() if Path(e.point).is_relative_to(root)]):
        pid = status(Path(entry.point))["pid"] if entry.fstype == FSTYPE else None
        ground.run("umount", entry.point)
        if isinstance(pid, int):
            _await_end(pid)


def _await_end(pid: int) -> None:
    """It is not our child; but its end can be polled for."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], PATIENCE)[0], "the daemon has not ended"
    finally:
        os.close(fd)


def change(root: Path) -> None:
    (root / "etc/name").write_text("changed\n")
    (root / "gone").unlink()


def is_changed(root: Path) -> bool:
    changed = (root / "etc/name").read_text() == "changed\n"
    assert changed != (root / "gone").exists()
    return changed


@pytest.fixture
def image(place: Path) -> Path:
    need("ext4")
    return images.make(place / "store.img", label=label(), megabytes=32)


def test_nothing_asked(root: Path) -> None:
    assert "asks for no union" in boot(root, "root=/dev/sda1 ro")
    assert "asks for no union" in boot(root, "cow_label=x unionfs.mode=off")
    assert not ground.mounts_below(root)


def test_changes_persist(root: Path, image: Path) -> None:
    with images.attached(image):
        name = ground.run("blkid", "-p", "-s", "LABEL", "-o", "value", str(image)).strip()
        line = f"cow_label={name}"
        for turn in range(2):
            boot(root, line)
            assert is_changed(root) == bool(turn)
            if not turn:
                change(root)
            assert "degraded" not in status(root)
            told = (RUN / "root/boot").read_text()
            assert f"is a union, with changes in LABEL={name}:/{INSIDE}" in told
            end(root)
            assert not is_changed(root)


@pytest.mark.skipif(bool(secret.why_not()), reason=secret.why_not() or "-")
def test_a_store_that_store_encrypt_has_made(root: Path, image: Path, place: Path) -> None:
    """By gocryptfs, which therefore belongs into an initramfs."""
    line = f"unionfs.store={image}"
    boot(root, line)
    change(root)
    end(root)
    key = secret.key_file(place)
    done = secret.run("store", "encrypt", f"{image}:/{INSIDE}", "--key-file", key, "--discard")
    assert done.returncode == 0, done
    told = boot(root, f"{line} unionfs.options=key-file={place}/none", code=64)
    assert "cannot read the key file" in told
    assert not is_changed(root)
    end(root)
    boot(root, f"{line} unionfs.options=key-file={key}")
    assert is_changed(root)
    end(root)


def test_in_memory(root: Path) -> None:
    boot(root, "overlayroot=tmpfs overlay-size=16m")
    change(root)
    assert os.statvfs(root).f_blocks * os.statvfs(root).f_frsize == 16 << 20
    end(root)
    assert not is_changed(root)
    boot(root, "systemd.volatile=overlay")
    assert not is_changed(root)


def test_daemon_is_not_ended_by_signals(root: Path) -> None:
    boot(root, "overlayroot=tmpfs")
    pid = status(root)["pid"]
    assert isinstance(pid, int)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(pid, number)
        change(root)
        assert is_changed(root)
        (root / "gone").touch()
    assert status(root)["state"] == "ok"


def test_store_is_only_read(root: Path, image: Path) -> None:
    line = f"unionfs.store={image}"
    boot(root, line)
    change(root)
    end(root)
    before = image.read_bytes()
    boot(root, f"{line} rd.overlay.readonly")
    assert is_changed(root)
    (root / "etc/name").write_text("again\n")
    (root / "more").write_text("more\n")
    assert sorted(os.listdir(root)) == ["etc", "more"]
    end(root)
    assert image.read_bytes() == before


def test_store_by_directory(root: Path, place: Path) -> None:
    (place / "changes").mkdir()
    boot(root, f"unionfs.store={place}/changes")
    change(root)
    end(root)
    assert (place / "changes/etc/name").read_text() == "changed\n"


def test_directory_and_flags(root: Path, image: Path) -> None:
    boot(root, f"unionfs.store={image} cow_directory=own/place cow_flags=noatime,data=journal")
    change(root)
    end(root)
    for flags, told in (
        ("data=nonsense", "with the flag data: "),
        ("noatime,nofial", "with the flag nofial: Unknown parameter 'nofial'; correct the flags"),
    ):
        refused = boot(root, f"unionfs.store={image} cow_flags={flags}", code=64)
        assert "cannot mount the ext4" in refused
        assert told in refused
        assert "damaged" not in refused
        end(root)
    boot(root, f"unionfs.store={image}:/own/place")
    assert is_changed(root)


def test_flags_of_fstab_that_are_not_the_file_systems(root: Path, image: Path) -> None:
    """mount(8) takes these itself, and so who copies them from fstab means no harm."""
    flags = "defaults,nofail,_netdev,auto,user,x-systemd.device-timeout=9,exec,atime,noatime"
    boot(root, f"unionfs.store={image} unionfs.flags={flags},data=journal")
    change(root)
    assert is_changed(root)


def test_root_by_a_relative_path(root: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a profile is looked for there, and not below /."""
    (root / "etc/unionfs").mkdir()
    (root / "etc/unionfs/near.toml").write_text('[paths]\n"/etc" = "tmpfs"\n')
    monkeypatch.chdir(place)
    boot(Path("root"), "unionfs.profile=near")
    assert ground.mounts_below(root) == [f"{root}/etc"]


@pytest.mark.parametrize("reason", ["no device has LABEL", "no file system that is known"])
@pytest.mark.parametrize("fallback", ["", "unionfs.fallback=ro", "unionfs.fallback=fail"])
def test_store_that_cannot_be_used(root: Path, place: Path, reason: str, fallback: str) -> None:
    store = f"LABEL={label()}"
    if "LABEL" not in reason:
        store = str(place / "broken.img")
        Path(store).write_bytes(b"x" * 65536)
    line = f"unionfs.store={store} unionfs.timeout=0 {fallback}"
    if "fail" in fallback:
        told = boot(root, line, code=32)
        assert reason in told
        assert len(told.splitlines()) == 1
        assert not ground.mounts_below(root)
        assert reason in (RUN / "root/boot").read_text()
        return
    told = boot(root, line, code=64)
    assert reason in told
    for place_of_word in ("degraded", "boot"):
        assert reason in (RUN / "root" / place_of_word).read_text()
    degraded = status(root)["degraded"]
    assert isinstance(degraded, dict)
    assert reason in degraded["reason"]
    assert degraded["fallback"] == ("ro" if fallback else "tmpfs")
    if fallback:
        with pytest.raises(OSError, match="Read-only"):
            change(root)
    else:
        change(root)
        assert is_changed(root)


def test_only_read_and_missing(root: Path) -> None:
    told = boot(root, f"rd.overlay=LABEL={label()} rd.overlay.readonly unionfs.timeout=0", code=64)
    assert "no device has LABEL" in told
    change(root)


def test_no_union_at_all(root: Path, place: Path) -> None:
    words = ("--lower", str(place / "nothing.squashfs"))
    told = boot(root, "overlayroot=tmpfs", *words, code=64)
    assert "goes on without its union" in told
    assert "nothing.squashfs" in (RUN / "root/degraded").read_text()
    assert not ground.mounts_below(root)


def test_reset_keeps_what_was(root: Path, image: Path) -> None:
    line = f"unionfs.store={image} rd.live.overlay.reset"
    assert "reset" not in boot(root, line), "there is nothing yet"
    change(root)
    end(root)
    told = boot(root, line)
    assert "its changes are kept in" in told
    kept = told.partition("are kept in ")[2].splitlines()[0]
    assert not is_changed(root)
    end(root)
    boot(root, f"unionfs.store={kept}")
    assert is_changed(root)


def test_reset_of_another_bases_store(root: Path, image: Path, place: Path) -> None:
    need("squashfs")
    lower = images.squash(place / "one.squashfs", root)
    (root / "other").touch()
    another = images.squash(place / "two.squashfs", root)
    point = place / "point"
    point.mkdir()
    line = f"unionfs.store={image}:/same"
    boot(point, line, "--lower", str(lower))
    change(point)
    end(point)
    told = boot(point, f"{line} unionfs.reset", "--lower", str(another), code=64)
    assert "the store is not reset" in told
    assert "was made over" in told
    end(point)
    boot(point, line, "--lower", str(lower))
    assert is_changed(point)
    end(point)


def test_base_in_memory(root: Path, image: Path, place: Path) -> None:
    need("squashfs")
    lower = images.squash(place / "base.squashfs", root)
    point = place / "point"
    point.mkdir()
    line = f"cow_device={image} copytoram=y"
    assert "is copied to memory" in boot(point, line, "--lower", str(lower))
    lower.write_bytes(b"")
    assert not is_changed(point)
    change(point)
    assert not (RUN / "toram").exists()
    end(point)
    told = boot(root, f"cow_device={image} toram")
    assert "toram has no effect" in told


def test_base_named_on_the_command_line(root: Path, image: Path, place: Path) -> None:
    """It is shown in place of what is mounted, and copied as that is asked for."""
    need("squashfs")
    lower = images.squash(place / "base.squashfs", root)
    point = place / "point"
    point.mkdir()
    line = f"unionfs.store={image} unionfs.lower={lower}"
    boot(point, line)
    change(point)
    end(point)
    assert f"unionfs.lower={lower}" in boot(point, line, "-n")
    assert f"{lower} is copied to memory" in boot(point, f"{line} unionfs.toram")
    lower.write_bytes(b"")
    assert is_changed(point)
    assert sorted(os.listdir(point)) == ["etc"]
    end(point)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("squashfs", "toram"),
        ("squashfs", "copytoram=y"),
        ("ext4", "rd.live.ram=1"),
        ("squashfs on a partition", "copy2ram"),
    ],
)
def test_root_in_memory(root: Path, image: Path, place: Path, kind: str, word: str) -> None:
    """What the root is mounted from is copied; the medium may be taken out then."""
    need("squashfs")
    base = place / "base.img"
    unread = os.urandom(1 << 20)
    (root / "unread").write_bytes(unread)
    if kind == "ext4":
        images.make(base)
        (place / "fill").mkdir()
        ground.run("mount", "-o", "loop", base, place / "fill")
        ground.run("cp", "-a", f"{root}/.", place / "fill")
        ground.run("umount", place / "fill")
    else:
        images.squash(base, root)
    if "partition" in kind:
        with open(base, "r+b") as file:
            file.truncate(64 << 30)  # more than there is memory
    ground.run("mount", "-o", "loop,ro", base, root)
    line = f"unionfs.store={image}"
    boot(root, line)
    (root / "etc/name").write_text("changed\n")
    (root / "gone").unlink()
    end(root)
    ground.run("mount", "-o", "loop,ro", base, root)
    assert "is copied to memory" in boot(root, f"{line} {word}"), "and is the same base"
    assert not (RUN / "toram").exists()
    (below,) = [entry for entry in read_mounts() if entry.point == str(root)][:1]
    os.truncate(base, 0)
    assert below.fstype in ("squashfs", "ext4")
    assert is_changed(root)
    assert (root / "unread").read_bytes() == unread
    (root / "etc/name").unlink()
    assert not (root / "etc/name").exists()
    end(root)


def test_copying_the_base_is_told(root: Path, place: Path) -> None:
    """It may take minutes: where it is going on, and on a terminal how far it is."""
    need("squashfs")
    (root / "unread").write_bytes(os.urandom(3 << 20))
    lower = images.squash(place / "base.squashfs", root)
    point = place / "point"
    point.mkdir()
    line = f"overlayroot=tmpfs toram unionfs.lower={lower}"
    told = boot(point, line)
    assert f"copying {lower} to memory: 4 MiB" in told
    assert "%" not in told
    end(point)
    ours, theirs = os.openpty()
    command = [*program(), "boot", "--root", str(point), "--cmdline", line]
    subprocess.run(command, stderr=theirs, check=True, timeout=PATIENCE)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert re.search(rf"\runionfs: {lower}: 1 of 3 MiB, \d+ %\r +\r", shown)
    end(point)


def test_root_that_is_in_memory_already(root: Path, place: Path) -> None:
    need("squashfs")
    (place / "memory").mkdir()
    ground.run("mount", "-t", "tmpfs", "tmpfs", place / "memory")
    base = images.squash(place / "memory/base.squashfs", root)
    ground.run("mount", "-o", "loop,ro", base, root)
    assert "is in memory already" in boot(root, "overlayroot=tmpfs toram")
    change(root)
    end(root)
    ground.run("umount", place / "memory")


def test_root_that_may_change_is_not_copied(root: Path, place: Path) -> None:
    need("ext4")
    ground.run("mount", "-o", "loop", images.make(place / "base.img"), root)
    assert "is mounted writable" in boot(root, "overlayroot=tmpfs toram")
    end(root)


def test_manual_knows_every_word() -> None:
    text = (Path(__file__).parents[1] / "docs/man/unionfs-boot.8.md").read_text()
    told = set(re.findall(r"\*\*([\w.-]+)", text))
    assert sorted(set(WORDS) - told) == []


def luks(image: Path) -> Path:
    """What blkid takes for a LUKS device."""
    header = b"LUKS\xba\xbe\x00\x01" + b"aes".ljust(32, b"\0") + b"\0" * 128
    uuid = b"0" * 8 + b"-0000-0000-0000-" + b"0" * 12
    image.write_bytes((header + uuid).ljust(1 << 20, b"\0"))
    return image


def stand_ins(place: Path, cryptsetup: str, typed: str) -> str:
    """A PATH with a cryptsetup, and somebody who types a passphrase."""
    programs = place / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in (("cryptsetup", cryptsetup), ("systemd-ask-password", f"printf '{typed}'")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return f"{programs}:{os.environ['PATH']}"


@pytest.fixture
def agents() -> Iterator[None]:
    """Where systemd's agents are asked, and where an unlocked device appears: for us alone."""
    made = [path for path in ("/dev/mapper", "/run/systemd") if not os.path.isdir(path)]
    for path in made:
        os.mkdir(path)
    mounted = []
    try:
        for path in ("/dev/mapper", "/run/systemd"):
            ground.run("mount", "-t", "tmpfs", "tmpfs", path)
            mounted.append(path)
        os.mkdir("/run/systemd/ask-password")
        yield
    finally:
        for path in mounted:
            ground.run("umount", path)
        for path in made:
            os.rmdir(path)


# Unlocks what a loop device stands for: `open ... --key-file=- DEVICE NAME`.
UNLOCKING = """\
echo "$@" >>{place}/asked
for word; do device=$name name=$word; done
[ "$1 $device" = "open {locked}" ] || exit 1
[ "$(cat)" = "correct horse" ] || {{ echo "No key available with this passphrase." >&2; exit 2; }}
ln -s {unlocked} /dev/mapper/"$name"
"""


@pytest.mark.usefixtures("agents")
@pytest.mark.parametrize(
    "words",
    [
        "unionfs.store=luks:{locked}:/here",
        "overlayroot=crypt:dev={locked},dir=/here",
        "unionfs.store={locked}:/here unionfs.crypt={locked}",
    ],
)
def test_encrypted_store_is_unlocked(root: Path, place: Path, image: Path, words: str) -> None:
    """A wrong passphrase costs the changes of this boot; the right one is asked for once."""
    locked = luks(place / "locked.img")
    line = words.format(locked=locked)
    with images.attached(image) as unlocked:
        text = UNLOCKING.format(place=place, locked=locked, unlocked=unlocked)
        told = boot(root, line, code=64, path=stand_ins(place, text, "wrong"))
        assert f"{locked} stays locked: cryptsetup ended with exit code 2" in told
        assert not os.path.lexists("/dev/mapper/unionfs-store")
        change(root)
        end(root)

        path = stand_ins(place, text, "correct horse")
        for changed in (False, True):
            told = boot(root, line, path=path)
            assert "is a union, with changes in /dev/mapper/unionfs-store:/here" in told
            assert not (RUN / "root/degraded").exists()
            assert is_changed(root) == changed
            if not changed:
                change(root)
            end(root)
    asked = (place / "asked").read_text().splitlines()
    assert len(asked) == 2, "it is unlocked already at the third boot"
    assert all("--key-file=-" in words and "horse" not in words for words in asked)


# Unlocks each of some devices, whose contents are what other loop devices stand for.
UNLOCKING_MORE = """\
echo "$@" >>{place}/asked
[ "$1" != close ] || exec rm /dev/mapper/"$2"
for word; do device=$name name=$word; done
case $(cat) in *horse) ;; *) exit 2 ;; esac
case $device in {cases} *) exit 1 ;; esac
ln -s "$found" /dev/mapper/"$name"
"""


@pytest.mark.usefixtures("agents")
@pytest.mark.parametrize("word", ["persistence-label={name}", "unionfs.store=LABEL={name}"])
def test_encrypted_store_is_known_by_the_label_inside(
    root: Path, place: Path, image: Path, word: str
) -> None:
    """As live-boot: no LUKS device has a label, so each is looked into, and locked again."""
    write_in(image, place, "persistence.conf", "/ union\n")
    stranger = images.make(place / "stranger.img", label=label())
    name = ground.run("blkid", "-p", "-s", "LABEL", "-o", "value", str(image)).strip()
    line = f"persistence persistence-encryption=luks {word.format(name=name)} unionfs.timeout=1"
    with contextlib.ExitStack() as stack:
        locked, unlocked = [], []
        for number, content in enumerate((stranger, image)):
            outside = luks(place / f"locked{number}.img")
            locked.append(stack.enter_context(images.attached(outside)))
            unlocked.append(stack.enter_context(images.attached(content)))
        pairs = list(zip(locked, unlocked, strict=True))
        cases = " ".join(f"{outside}) found={inside} ;;" for outside, inside in pairs)
        text = UNLOCKING_MORE.format(place=place, cases=cases)

        told = boot(root, line, code=64, path=stand_ins(place, text, "wrong"))
        assert "stays locked: cryptsetup ended with exit code" in told
        end(root)
        (place / "asked").unlink()
        path = stand_ins(place, text, "correct horse")
        for changed in (False, True):
            boot(root, line, path=path)
            assert not (RUN / "root/degraded").exists()
            assert is_changed(root) == changed
            assert os.path.realpath("/dev/mapper/unionfs-store") == unlocked[1]
            if not changed:
                change(root)
            end(root)
        asked = [row.split() for row in (place / "asked").read_text().splitlines()]
        tried = [words[-2] for words in asked if words[0] == "open" and words[-2] in locked]
        assert sorted(tried) == sorted(set(tried)), "each once, and not again at the third boot"
        closed = [words for words in asked if words == ["close", "unionfs-store"]]
        assert len(closed) == len(tried) - 1

        os.unlink("/dev/mapper/unionfs-store")
        told = boot(root, line.replace(name, "none-such"), code=64, path=path)
        assert "no encrypted device (" in told
        assert "has LABEL=none-such in it; plug it in" in told
        assert not os.path.lexists("/dev/mapper/unionfs-store")


def test_encrypted_store(root: Path, place: Path, image: Path) -> None:
    """device-mapper is not everywhere: what is asked of cryptsetup, and what if it cannot."""
    locked = luks(place / "locked.img")
    assert "is not encrypted" in boot(root, f"unionfs.crypt={image}", code=64)
    end(root)
    path = stand_ins(place, f'echo "$@" >{place}/asked; cat >{place}/phrase; exit 5', "secret")
    told = boot(root, f"rd.overlay.crypt=dev={locked},timeout=0", code=64, path=path)
    assert f"{locked} stays locked: cryptsetup ended with exit code 5" in told
    words = (place / "asked").read_text().split()
    assert words[0] == "open"
    assert words[-2:] == [str(locked), "unionfs-store"]
    agents = os.path.isdir("/run/systemd/ask-password")
    assert ("--key-file=-" in words) == agents
    assert (place / "phrase").read_text() == ("secret" if agents else "")
    change(root)


def test_union_of_others_is_left_alone(root: Path, place: Path) -> None:
    for name in ("up", "work"):
        (place / name).mkdir()
    words = f"lowerdir={root},upperdir={place}/up,workdir={place}/work"
    ground.run("mount", "-t", "overlay", "overlay", "-o", words, str(root))
    assert "is a union already (overlay)" in boot(root, "overlayroot=tmpfs")
    assert len(ground.mounts_below(root)) == 1
    for _ in range(2):
        boot(root, "unionfs.mode=ram")
        assert len(ground.mounts_below(root)) == 2
    change(root)
    end(root)


def test_what_would_be_done(root: Path) -> None:
    told = boot(root, "cow_label=x unionfs.reset cow_chunksize=8", "-n")
    assert f"with changes in LABEL=x:/{INSIDE} on {root}" in told
    assert "reset = True (unionfs.reset)" in told
    assert "cow_chunksize=8: it has no effect here" in told
    assert "there is no profile none-such" in boot(root, "unionfs.profile=none-such", "-n")
    assert not ground.mounts_below(root)
    assert not (RUN / "root").exists()


def test_root_in_use_is_not_covered() -> None:
    assert "/ cannot be covered" in boot(Path("/"), "unionfs.mode=ram", code=1)
    assert "mode ram: / with changes in memory on /" in boot(Path("/"), "unionfs.mode=ram", "-n")


def test_mounts_beneath_are_told_of(root: Path) -> None:
    ground.run("mount", "-t", "tmpfs", "tmpfs", str(root / "etc"))
    assert "will not be seen in the union" in boot(root, "overlayroot=tmpfs")
    assert (root / "etc/name").read_text() == "lower\n"


def write_in(image: Path, place: Path, name: str, text: str) -> None:
    """Put a file at the root of a store."""
    point = place / "inside"
    point.mkdir(exist_ok=True)
    with images.attached(image) as device:
        ground.run("mount", device, str(point))
        (point / name).write_text(text)
        ground.run("umount", str(point))


@pytest.mark.parametrize("whole", [False, True])
def test_persistence_conf(root: Path, image: Path, place: Path, whole: bool) -> None:
    text = "/ union\n" if whole else "/etc union,source=settings\n/home bind\n"
    write_in(image, place, "persistence.conf", text)
    (root / "home/me").mkdir(parents=True)
    (root / "home/me/kept").write_text("lower\n")
    with images.attached(image):
        name = ground.run("blkid", "-p", "-s", "LABEL", "-o", "value", str(image)).strip()
        line = f"boot=live persistence persistence-label={name}"
        for turn in range(2):
            assert f"persists where LABEL={name} says" in boot(root, line)
            assert ((root / "etc/name").read_text() == "changed\n") == bool(turn)
            assert (root / "home/me/mine").exists() == bool(turn)
            assert (root / "gone").exists() != (whole and bool(turn)), "only what is said persists"
            (root / "etc/name").write_text("changed\n")
            (root / "gone").unlink(missing_ok=True)
            (root / "home/me/mine").write_text("mine\n")
            assert (root / "home/me/kept").read_text() == "lower\n"
            end(root)
    assert (root / "etc/name").read_text() == "lower\n"
    assert not (root / "home/me/mine").exists()


def test_persistence_without_its_file(root: Path, image: Path) -> None:
    with images.attached(image):
        name = ground.run("blkid", "-p", "-s", "LABEL", "-o", "value", str(image)).strip()
        told = boot(root, f"persistence persistence-label={name} unionfs.timeout=0", code=64)
    assert "has no persistence.conf at its root" in told
    assert "persistence.conf" in str(status(root)["degraded"])
    change(root)
    end(root)
    assert not is_changed(root)


def test_profile(root: Path, place: Path) -> None:
    profiles = root / "etc/unionfs"
    profiles.mkdir()
    (place / "changes").mkdir()
    profile = f'store = "{place}/changes"\n[paths]\n"/home" = "persist"\n"/var" = "tmpfs"\n'
    (profiles / "kiosk.toml").write_text(profile)
    for name in ("home", "var"):
        (root / name).mkdir()
    boot(root, "unionfs.profile=kiosk")
    assert sorted(ground.mounts_below(root)) == [f"{root}/home", f"{root}/var"]
    recorded = json.loads((RUN / "kiosk/mounts").read_text())
    assert [made["point"] for made in recorded] == ["/home", "/var"], "as the system will see them"
    (root / "home/mine").write_text("mine\n")
    end(root)
    assert not (root / "home/mine").exists()
    boot(root, "unionfs.profile=kiosk overlayroot=tmpfs")
    assert (root / "home/mine").read_text() == "mine\n"
    change(root)
    end(root)
    assert not is_changed(root)
    told = boot(root, "unionfs.profile=none", code=64)
    assert "no profile none" in told
    boot(root, "unionfs.profile=none unionfs.fallback=fail", code=32)


def test_the_rescue_system_of_the_examples(root: Path, image: Path) -> None:
    """With its stick it has what was done there; without, it runs all the same."""
    entry = (Path(__file__).parents[1] / "examples/rescue.conf").read_text()
    line = next(row for row in entry.splitlines() if row.startswith("options")).partition(" ")[2]
    line = line.replace("timeout=5", "timeout=0")
    told = boot(root, line.replace("=rescue", "=none-such"), code=64)
    assert "none-such" in told
    (root / "scratch").touch()
    end(root)
    assert not (root / "scratch").exists()
    with images.attached(image) as device:
        found = ground.run("blkid", "-p", "-o", "value", "-s", "LABEL", device).strip()
        for again in (False, True):
            boot(root, line.replace("=rescue", f"={found}"))
            assert is_changed(root) == again
            if not again:
                change(root)
            end(root)
        kept = ground.run("debugfs", "-R", "stat /tools/etc/name", device)
        assert "Type: regular" in kept
