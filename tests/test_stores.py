# SPDX-License-Identifier: GPL-2.0-or-later
"""Layers in images and on devices, mounted by the real command: found, used, released."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import threading
import uuid
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.rig.mounted import PATIENCE, Unionfs, is_mounted, program, user_mount_possible
from tests.rig.waiting import wait_until
from unionfs import locator
from unionfs.cli import helper as mount_helper
from unionfs.cli.mount import parse
from unionfs.stores.find import find as find_device
from unionfs.stores.tools import find

ARCH = os.uname().machine
_made: list[bytes] = []  # the image of the tree, made once


@pytest.fixture
def base(place: Path) -> Path:
    """A tree, and place/rootfs.squashfs made of it."""
    why = user_mount_possible()
    if why:
        pytest.skip(why)
    tree = place / "tree"
    (tree / "dir").mkdir(parents=True)
    (tree / "file").write_text("lower\n")
    (tree / "gone").write_text("lower\n")
    tree.chmod(0o751)
    (place / "mnt").mkdir()
    if not _made:
        _made.append(images.squash(place / "rootfs.squashfs", tree).read_bytes())
    (place / "rootfs.squashfs").write_bytes(_made[0])
    return place


def need(kind: str) -> None:
    why = images.why_not(kind)
    if why:
        pytest.skip(why)


def label() -> str:
    """Other workers' devices are visible too."""
    return "t" + uuid.uuid4().hex[:11]


def union(place: Path, lower: Path | str, upper: Path | str | None, *words: str) -> Unionfs:
    lowers = [Path(lower)]
    made = Unionfs(lowers, None, place / "mnt", options=words)
    made.upper = upper if upper is None else Path(upper)
    return made


def mount(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a user types it."""
    return subprocess.run(
        [*program(), "mount", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def refused(*arguments: object) -> str:
    """The one line of an error; nothing is mounted then."""
    done = mount(*arguments)
    assert done.returncode in (1, 2, 32), done
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert not is_mounted(str(arguments[-1]))
    return lines[0]


def change(mnt: Path) -> None:
    assert (mnt / "file").read_text() == "lower\n"
    (mnt / "file").write_text("changed\n")
    (mnt / "gone").unlink()
    (mnt / "dir").rename(mnt / "moved")
    (mnt / "made").mkdir()


def check(mnt: Path) -> None:
    assert sorted(p.name for p in mnt.iterdir()) == ["file", "made", "moved"]
    assert (mnt / "file").read_text() == "changed\n"


@pytest.mark.parametrize("kind", images.WRITABLE)
def test_upper_in_an_image(base: Path, kind: str) -> None:
    need(kind)
    need("squashfs")
    image = images.make(base / "store.img", kind)
    made = union(base, base / "rootfs.squashfs", image)
    with made:
        change(base / "mnt")
        status = made.status()
        assert status["upper"] == f"{image}:/persistent_rootfs/{ARCH}"
        store = status["store"]
        assert isinstance(store, dict)
        assert store["fstype"] == kind
        assert store["mounted_by"] == ("kernel" if os.geteuid() == 0 else "fuse2fs")
        assert stat.S_IMODE((base / "mnt").stat().st_mode) == 0o751, "as the base's root"
        below = [p for p in ground.mounts_below(base) if p != str(base / "mnt")]
        assert below == [], "the store is mounted where nobody sees it"
    assert images.loops_of(image) == []
    with made:
        check(base / "mnt")


def test_label_device_uuid_and_directory_inside(base: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("devices are root's")
    name = label()
    image = images.make(base / "store.img", "ext4", name)
    with images.attached(image) as device:
        number = ground.run("blkid", "-p", "-s", "UUID", "-o", "value", image).strip()
        with union(base, base / "rootfs.squashfs", f"LABEL={name}"):
            change(base / "mnt")
        for upper in (device, f"UUID={number.upper()}", f"{device}:/persistent_rootfs/{ARCH}"):
            with union(base, base / "rootfs.squashfs", upper):
                check(base / "mnt")
        with union(base, base / "tree", f"LABEL={name}:/a/b"):
            change(base / "mnt")
        point = base / "look"
        point.mkdir()
        ground.run("mount", "-o", "ro", device, point)
        try:
            assert stat.S_IMODE((point / "persistent_rootfs").stat().st_mode) == 0o700
            assert stat.S_IMODE((point / "a").stat().st_mode) == 0o700
            assert (point / "a/b/file").read_text() == "changed\n"
            assert (point / f"persistent_rootfs/{ARCH}/file").read_text() == "changed\n"
        finally:
            ground.run("umount", point)


LABELS = [
    "my stick",
    " spaces",
    "q\"uo'te",
    '"quoted"',
    "back\\slash",
    r"\x41 is no A",
    "sechzehn Zeichen",
    "größer ü",
    "日本語ラベ",
    "a:/b,c=d",
    "-n",
    "%s$HOME`id`",
    "../..",
]


def _written(text: str) -> str:
    """A label with all that could mean something spelled as below /dev/disk/by-label."""
    kept = "".join(c for c in text if c.isalnum() or c in "-_. ")
    return "".join(c if c in kept else "".join(f"\\x{b:02x}" for b in c.encode()) for c in text)


def _named(text: str) -> dict[str, list[str]]:
    """The ways to write a label, as arguments of `unionfs mount`, but for the mount point."""
    doubled = _written(text).replace("\\", "\\\\")
    ways = {
        "argument": ["/lower", f"LABEL={_written(text)}"],
        "-o": ["/lower", "-o", f"upperdir=LABEL={doubled}"],
        "-o with quotes": ["/lower", "-o", f'upperdir=LABEL="{doubled}"'],
        "fstab": ["/lower", "-o", "upperdir=LABEL=" + doubled.replace(" ", r"\\x20")],
    }
    if not set(text) & set('\\":,'):
        ways["as it is"] = ["/lower", f"LABEL={text}"]
        ways["with quotes"] = ["/lower", f'LABEL="{text}"']
    return ways


@pytest.mark.parametrize("text", LABELS)
def test_labels_of_all_kinds(base: Path, text: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("devices are root's")
    image = images.make(base / "store.img", "ext4", text)
    with images.attached(image) as device:
        for way, words in _named(text).items():
            upper = parse([*words, "/mnt"]).upper
            assert upper is not None
            assert find_device(locator.parse(upper)) == device, way
        _, _, option = _named(text)["fstab"]
        with union(base, base / "tree", None, option):
            change(base / "mnt")


@pytest.mark.parametrize("text", ["my stick", "../..", "größer ü"])
def test_the_directory_is_called_after_the_base_s_label(base: Path, text: str) -> None:
    need("ext4")
    lower = images.make(base / "lower.img", "ext4", text)
    store = images.make(base / "store.img")
    with union(base, lower, store) as made:
        name = text.replace("/", "_")
        assert made.status()["upper"] == f"{store}:/persistent_{name}/{ARCH}"
        (base / "mnt/made").touch()
    with union(base, lower, f"{store}:/persistent_{name}/{ARCH}"):
        assert (base / "mnt/made").exists()


def test_two_with_one_label(base: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("devices are root's")
    name = label()
    one = images.make(base / "1.img", "ext4", name)
    two = images.make(base / "2.img", "ext4", name)
    with images.attached(one) as first, images.attached(two) as second:
        said = refused(base / "tree", f"LABEL={name}", base / "mnt")
        assert f"LABEL={name} is ambiguous: " in said
        assert f"{first} " in said
        assert f"{second} " in said


def test_partitions(base: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("devices are root's")
    name = label()
    disk = base / "disk.img"
    with open(disk, "wb") as file:
        file.truncate(32 << 20)
    table = f'label: gpt\nsize=20MiB, name="{name} x"\n'
    sfdisk = find("sfdisk")
    if sfdisk is None:
        pytest.skip("there is no sfdisk (package fdisk)")
    subprocess.run([sfdisk, "-q", disk], input=table, text=True, check=True)
    said = refused(base / "tree", disk, base / "mnt")
    assert "partition table (gpt)" in said
    with images.attached(disk, partitions=True) as device:
        part = f"{device}p1"
        with images.node_of(part) as known:
            if not known:
                pytest.skip("this kernel has no partitions on loop devices")
            _use_partition(base, part, name)
            assert "PARTLABEL" in refused(base / "tree", f"PARTLABEL={name}", base / "mnt")


def _use_partition(base: Path, part: str, name: str) -> None:
    ground.run("mkfs.ext4", "-q", "-b", "4096", part)
    with union(base, base / "tree", f'PARTLABEL="{name} x"'):
        change(base / "mnt")
    number = ground.run("blkid", "-p", "-s", "PART_ENTRY_UUID", "-o", "value", part).strip()
    for upper in (f"PARTUUID={number}", f"PARTUUID={number.upper()}", part):
        with union(base, base / "tree", upper) as made:
            check(base / "mnt")
            store = made.status()["store"]
            assert isinstance(store, dict)
            assert store["source"] == part
    # As mount(8) is given it, and as a lower.
    escaped = f"{name}\\\\x20x"
    with union(base, base / "tree", None, f"upperdir=PARTLABEL={escaped}"):
        check(base / "mnt")
    lower = f"PARTUUID={number}\\:/persistent_tree/{ARCH}"
    done = mount(lower, base / "mnt", "--ro")
    assert done.returncode == 0, done.stderr
    assert (base / "mnt/file").read_text() == "changed\n"
    ground.run(*program(), "umount", base / "mnt")


def test_a_timeout_of_another_kind(base: Path) -> None:
    """timeout= is fuse-overlayfs's; who wants to wait for a device is told how."""
    place = ("tree", "LABEL=nobody-has-it", "mnt")
    tree, store, mnt = base / place[0], place[1], base / place[2]
    waits = "; device-timeout=SECONDS waits for it; timeout= is for cached names"
    assert waits in refused("-o", "timeout=2", tree, store, mnt)
    assert waits in refused("-o", "timeout=2", "LABEL=nobody-has-it", mnt)
    assert waits not in refused(tree, store, mnt)
    said = refused("-o", "timeout=2,device-timeout=0.1", tree, store, mnt)
    assert "has LABEL=nobody-has-it after 0.1 s" in said
    assert waits not in said


def test_lower_on_an_iso(base: Path) -> None:
    """By the kernel, where it has iso9660; names and modes are those of Rock Ridge."""
    if (genisoimage := find("genisoimage")) is None:
        pytest.skip("there is no genisoimage")
    image, name = base / "lower.iso", f"T{uuid.uuid4().hex[:8]}".upper()
    ground.run(genisoimage, "-quiet", "-R", "-V", name, "-o", image, base / "tree")
    if os.geteuid() != 0:
        said = refused(image, base / "mnt")
        assert "an ordinary user cannot mount iso9660; mount as root, or" in said
        return
    if "iso9660" not in Path("/proc/filesystems").read_text():
        said = refused(image, base / "mnt")
        assert "this kernel has no iso9660" in said
        assert images.loops_of(image) == []
        pytest.skip("the kernel has no iso9660")
    (base / "up").mkdir()
    with union(base, image, base / "up"):
        change(base / "mnt")
    with union(base, image, base / "up"):
        check(base / "mnt")
    with images.attached(image), union(base, f"LABEL={name}", base / "up"):
        check(base / "mnt")


def test_a_slow_device_is_waited_for(base: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("devices are root's")
    name = label()
    image = images.make(base / "store.img", "ext4", name)
    said = refused("-o", "device-timeout=0.2", base / "tree", f"LABEL={name}", base / "mnt")
    assert f"no device has LABEL={name} after 0.2 s" in said
    made = union(base, base / "tree", f"LABEL={name}", "device-timeout=20")
    appear = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            made.mount()
        except BaseException as error:
            failures.append(error)
        appear.set()

    thread = threading.Thread(target=work)
    thread.start()
    with images.attached(image):
        thread.join(PATIENCE)
        assert not failures
        made.umount()


def test_an_image_found_by_its_label(base: Path) -> None:
    need("ext4")
    name = label()
    with ground.Ground("unionfs-stick-") as stick:
        if os.geteuid() != 0:
            pytest.skip("only what is mounted is looked through")
        point = stick.filesystem("stick", "tmpfs")
        image = images.make(point / "backing.img", "ext4", name)
        assert "no device has" in refused(base / "tree", f"LABEL={name}", base / "mnt")
        with union(base, base / "tree", f"LABEL={name}", "search=images") as made:
            store = made.status()["store"]
            assert isinstance(store, dict)
            assert store["source"] == str(image)
            change(base / "mnt")
        for verb in (["info"], ["check"], ["grow"], ["reset", "-n"]):
            size = ["--size", "64M"] if verb == ["grow"] else []
            ground.run(*program(), "store", *verb, f"LABEL={name}", *size)
        assert image.stat().st_size == 64 << 20
        ground.run(*program(), "store", "backup", f"LABEL={name}", base / "saved")


@pytest.mark.parametrize("kind", ["squashfs", "erofs", "ext4"])
def test_lower_in_an_image(base: Path, kind: str) -> None:
    need(kind)
    image = base / f"lower.{kind}"
    if kind == "squashfs":
        images.squash(image, base / "tree")
    elif kind == "erofs":
        ground.run("mkfs.erofs", "--quiet", image, base / "tree")
    else:
        with open(image, "wb") as file:
            file.truncate(16 << 20)
        mkfs = find("mkfs.ext4")
        assert mkfs
        ground.run(mkfs, "-q", "-F", "-b", "4096", "-d", base / "tree", image)
    before = image.read_bytes()
    (base / "up").mkdir()
    with union(base, image, base / "up"):
        assert (base / "mnt/file").read_text() == "lower\n"
        (base / "mnt/file").write_text("changed\n")
        assert len(list((base / "mnt").iterdir())) >= 3
    assert image.read_bytes() == before
    assert (base / "up/file").read_text() == "changed\n"
    assert images.loops_of(image) == []
    inside = str(image).replace(":", "\\:") + "\\:/dir"
    done = mount(inside, base / "mnt", "--ro")
    assert done.returncode == 0, done.stderr
    assert list((base / "mnt").iterdir()) == []
    ground.run(*program(), "umount", base / "mnt")


def test_lower_and_upper_in_one_image(base: Path) -> None:
    need("ext4")
    image = images.make(base / "both.img")
    with union(base, base / "tree", f"{image}:/base"):
        change(base / "mnt")
    lower = f"{image}:/base"
    with union(base, lower, f"{image}:/up"):
        check(base / "mnt")
        (base / "mnt/more").touch()
    said = refused("-o", f"lowerdir+={lower}", "-o", f"upperdir={image}:/base/made", base / "mnt")
    assert "lies inside" in said
    assert images.loops_of(image) == []


def test_kill_leaves_nothing(base: Path) -> None:
    """The store of a killed daemon is released by the kernel, and can be mounted again."""
    need("ext4")
    need("squashfs")
    image = images.make(base / "store.img")
    made = union(base, base / "rootfs.squashfs", image)
    made.mount()
    change(base / "mnt")
    ground.run("sync", "-f", base / "mnt")
    made.kill()
    with made:
        check(base / "mnt")
    assert images.loops_of(image) == []
    assert not [p for p in ground.mounts_below("/") if "unionfs-stage" in p]


def test_a_helper_that_dies_is_told_of(base: Path) -> None:
    need("ext4")
    if os.geteuid() == 0:
        pytest.skip("root's stores need no helper")
    image = images.make(base / "store.img")
    made = union(base, base / "tree", image)
    made.expected = ["fuse2fs of .* has ended", "fuse2fs of .* ended with", "umount"]
    made.mount()
    helper = next(pid for pid in _children(made.pid) if "fuse2fs" in _command(pid))
    os.kill(helper, 9)
    with open(made.log) as log:
        wait_until(lambda: "cannot be reached any more" in log.read())
    assert "has ended" in str(made.status()["broken"])
    made.umount()
    with made:
        change(base / "mnt")


def _children(parent: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_twice(base: Path) -> None:
    need("ext4")
    image = images.make(base / "store.img")
    (base / "mnt2").mkdir()
    with union(base, base / "tree", image) as made:
        said = refused(base / "tree", image, base / "mnt2")
        assert f"process {made.pid}" in said
        assert f"mounted on {base}/mnt" in said
        loops = images.loops_of(image)
        assert len(loops) == (os.geteuid() == 0)
        done = mount(base / "tree", f"{image}:/other", base / "mnt2")
        assert done.returncode == 0, done.stderr
        assert images.loops_of(image) == loops, "two devices would destroy the file system"
        ground.run(*program(), "umount", base / "mnt2")
        change(base / "mnt")
    assert images.loops_of(image) == []


def test_a_copy_of_an_xfs_in_use(base: Path) -> None:
    need("xfs")
    image = images.make(base / "one.img", "xfs")
    ground.run("cp", "--sparse=always", image, base / "two.img")
    with union(base, base / "tree", image):
        (base / "mnt2").mkdir()
        said = refused(base / "tree", base / "two.img", base / "mnt2")
        assert "has the same UUID and is in use" in said
    with union(base, base / "tree", base / "two.img"):
        change(base / "mnt")


def test_links_in_a_store_are_not_followed(base: Path) -> None:
    need("ext4")
    image = base / "store.img"
    (base / "fill").mkdir()
    (base / "fill/link").symlink_to("/")
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    mkfs = find("mkfs.ext4")
    assert mkfs
    ground.run(mkfs, "-q", "-F", "-b", "4096", "-d", base / "fill", image)
    said = refused(base / "tree", f"{image}:/link/etc", base / "mnt")
    assert "cannot open /link/etc" in said


def test_readonly(base: Path) -> None:
    need("ext4")
    image = images.make(base / "store.img")
    before = image.read_bytes()
    assert "has no directory" in refused("--ro", base / "tree", image, base / "mnt")
    assert image.read_bytes() == before
    with union(base, base / "tree", image):
        change(base / "mnt")
    with union(base, base / "tree", image, "ro"):
        check(base / "mnt")
        with pytest.raises(OSError, match="Read-only"):
            (base / "mnt/x").touch()


def test_memory_as_an_upper(base: Path) -> None:
    upper = "tmpfs:size=1M" if os.geteuid() == 0 else "tmpfs:"
    done = mount(base / "tree", upper, base / "mnt")
    assert done.returncode == 0, done.stderr
    change(base / "mnt")
    ground.run(*program(), "umount", base / "mnt")
    assert (base / "tree/file").read_text() == "lower\n"


def test_workdir_and_a_store(base: Path) -> None:
    need("ext4")
    image = images.make(base / "store.img")
    (base / "w").mkdir()
    said = refused("-o", f"workdir={base}/w", base / "tree", image, base / "mnt")
    assert "workdir= and a store" in said


def test_by_mount_helper(base: Path) -> None:
    """What mount(8) starts for `mount -t unionfs -o upperdir=LABEL=... rootfs.squashfs MNT`."""
    need("ext4")
    need("squashfs")
    image = images.make(base / "store.img")
    helper = Path(program()[0]).with_name("mount.unionfs")
    if not helper.exists():
        pytest.skip("mount.unionfs is not installed beside unionfs")
    words = [str(helper), str(base / "rootfs.squashfs"), str(base / "mnt")]
    ground.run(*words, "-f", "-o", f"upperdir={image}")
    ground.run(*words, "-o", f"upperdir={image}")
    try:
        change(base / "mnt")
        ground.run(*words, "-o", f"remount,rw,upperdir={image}")
        told = json.loads(ground.run(*program(), "status", "--json", base / "mnt"))
        assert told[0]["asked"]["upper"] == str(image)
    finally:
        ground.run(*program(), "umount", base / "mnt")


@pytest.mark.root
def test_a_label_that_mount_has_resolved(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two devices mount(8) gives the helper either, as its SPEC."""
    need("ext4")
    name = label()
    one, two = (images.make(base / f"{n}.img", "ext4", label=name) for n in ("one", "two"))
    with images.attached(one) as device:
        mount_helper.warn_of_namesakes(device)
        assert capsys.readouterr().err == ""
        with images.attached(two) as other:
            assert mount_helper.run([device, str(base / "mnt")]) == 0
            ground.run(*program(), "umount", base / "mnt")
            told = capsys.readouterr().err
            assert told.count("\n") == 1
            assert f"LABEL={name} is ambiguous" in told
            assert device in told
            assert other in told


def test_foreign_things(base: Path) -> None:
    """What cannot be an upper, or is not there."""
    need("ext4")
    said = refused(base / "tree", base / "rootfs.squashfs", base / "mnt")
    assert "squashfs" in said
    missing = refused(base / "tree", "/dev/not-there", base / "mnt")
    assert "no device /dev/not-there" in missing
    assert "Not a directory" in refused(base / "tree", "/dev/null", base / "mnt")


def test_a_refused_upper_is_not_made_in_the_lower(base: Path) -> None:
    tree, mnt = base / "tree", base / "mnt"
    before = sorted(tree.rglob("*"))
    assert "lies inside the lower" in refused(tree, f"{tree}:/sub/up", mnt)
    assert "lies inside the lower" in refused(tree / "dir", f"{tree}:/dir/up", mnt)
    assert sorted(tree.rglob("*")) == before
    with union(base, tree / "dir", f"{tree}:/beside"):
        (mnt / "x").touch()
    assert (tree / "beside/x").exists()
