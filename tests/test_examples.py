# SPDX-License-Identifier: GPL-2.0-or-later
"""The profiles that are shipped in examples/, each used as it is meant."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ground, images
from tests.test_profile_mounts import System
from tests.test_stores import label, need
from unionfs.profiles import files

EXAMPLES = Path(__file__).parents[1] / "examples"
IN_MEMORY = ("var/cache", "var/lib/dpkg", "var/spool/cron")
pytestmark = pytest.mark.root


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_is_understood(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "directories", lambda _root="/": [str(tmp_path)])
    (tmp_path / path.name).write_bytes(path.read_bytes())
    name = path.stem + ("root" if path.stem.endswith("@") else "")
    made = files.load(name)
    assert made.description
    assert made.rules


class Example(System):
    """An example as it is shipped, but for names of this machine."""

    def take(self, name: str, changed: dict[str, str]) -> None:
        text = (EXAMPLES / name).read_text()
        for old, new in changed.items():
            assert old in text
            text = text.replace(old, new)
        self.file.write_text(text)

    def system(self, name: str, version: str) -> Path:
        """A read-only root file system, mounted."""
        need("squashfs")
        tree = self.place / f"{name}.tree"
        for path in ("etc", "root", "home/u", "tmp", "var/tmp", "var/log", "var/cache"):
            (tree / path).mkdir(parents=True)
        for path in ("var/lib/dpkg", "var/spool/cron"):
            (tree / path).mkdir(parents=True)
        (tree / "etc/version").write_text(version)
        (tree / "etc/settings").write_text("default")
        (tree / "var/cache/made").write_text(version)
        (tree / "var/lib/dpkg/status").write_text(version)
        (tree / "home/u/.profile").write_text("base")
        (tree / "etc/unionfs").mkdir()
        shutil.copy(self.file, tree / "etc/unionfs")
        image = images.squash(self.place / f"{name}.squashfs", tree)
        point = self.place / name
        point.mkdir()
        ground.run("mount", "-o", "loop,ro", image, point)
        return point


@pytest.fixture
def example(place: Path) -> Iterator[Example]:
    made = Example(place)
    yield made
    made.clean()


def test_appliance(example: Example) -> None:
    """Version A is exchanged for B under the same store, and the settings are still there."""
    need("ext4")
    name = label()
    image = images.make(example.place / "data.img", "ext4", label=name)
    with images.attached(image) as device:
        example.take("appliance.toml", {"LABEL=data": f"LABEL={name}"})
        a, b = example.system("a", "A"), example.system("b", "B")
        example.up("--root", str(a))
        (a / "etc/settings").write_text("mine")
        (a / "etc/added").write_text("mine")
        (a / "root/.bashrc").write_text("mine")
        for path in IN_MEMORY:
            (a / path / "new").write_text("in memory")
        assert (a / "var/lib/dpkg/status").read_text() == "A"
        example.down()
        assert (a / "etc/settings").read_text() == "default"

        example.up("--root", str(b))
        assert (b / "etc/version").read_text() == "B"
        assert (b / "etc/settings").read_text() == "mine"
        assert (b / "etc/added").read_text() == "mine"
        assert (b / "root/.bashrc").read_text() == "mine"
        assert (b / "var/lib/dpkg/status").read_text() == "B"
        for path in IN_MEMORY:
            assert not (b / path / "new").exists()
        example.down()
        kept = ground.run("debugfs", "-R", f"ls -p /persistent_{example.name}", device)
        names = {line.split("/")[5] for line in kept.split() if "/" in line}
        assert names == {".", "..", "etc", "root"}, "what is in memory is not in the store"


def test_appliance_without_its_data_partition(example: Example) -> None:
    shorter = {"device-timeout=10": "device-timeout=1"}
    example.take("appliance.toml", {"LABEL=data": "LABEL=not-there", **shorter})
    a = example.system("a", "A")
    told = example.up("--root", str(a))
    assert "runs without its store" in told
    (a / "etc/settings").write_text("for now")
    assert "not-there" in (example.run_directory / "degraded").read_text()
    example.down()


def test_live(example: Example) -> None:
    need("ext4")
    image = images.make(example.place / "persistence.img", "ext4")
    example.take("live.toml", {"/run/live/medium/persistence.img": str(image)})
    root = example.system("sysroot", "1")
    done = example.call("up", example.name, "--root", str(root))  # its own, as it is said there
    assert done.returncode == 0, done
    (root / "etc/settings").write_text("mine")
    (root / "home/u/letter").write_text("mine")
    (root / "opt").mkdir()
    for path in ("tmp", "var/tmp", "var/log", "var/cache"):
        (root / path / "scratch").write_text("in memory")
    assert (root / "var/cache/made").read_text() == "1"
    assert (root / "home/u/.profile").read_text() == "base"
    example.down()
    example.up("--root", str(root))
    assert (root / "etc/settings").read_text() == "mine"
    assert (root / "home/u/letter").read_text() == "mine"
    assert (root / "opt").is_dir()
    for path in ("tmp", "var/tmp", "var/log", "var/cache"):
        assert not (root / path / "scratch").exists()
    example.down()


def test_live_without_its_stick(example: Example) -> None:
    need("ext4")
    missing = str(example.place / "not-there.img")
    example.take("live.toml", {"/run/live/medium/persistence.img": missing})
    root = example.system("sysroot", "1")
    told = example.up("--root", str(root))
    assert "runs without its store" in told
    assert "/home: " in told
    (root / "etc/settings").write_text("for now")
    assert (root / "home/u/.profile").read_text() == "base"
    example.down()


def as_user(name: str, *command: str) -> int:
    done = subprocess.run(
        ["setpriv", f"--reuid={name}", f"--regid={name}", "--clear-groups", *command],
        capture_output=True,
        check=False,
    )
    return done.returncode


def test_applications_cannot_see_each_other(
    example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example.place / "srv").mkdir()
    template = f"app{uuid.uuid4().hex[:6]}@"
    text = (EXAMPLES / "app@.toml").read_text()
    text = text.replace("/opt/base", str(example.top)).replace("/srv/", f"{example.place}/srv/")
    Path("/run/unionfs").mkdir(exist_ok=True)
    shipped = Path("/run/unionfs") / f"{template}.toml"
    (example.place / "srv/app-data").mkdir()
    users = ("daemon", "games")
    shipped.write_text(text)
    try:
        for user in users:
            done = example.call("up", f"{template}{user}")
            assert done.returncode == 0, done
        for user, other in (users, users[::-1]):
            mine, theirs = (example.place / "srv/apps" / name for name in (user, other))
            assert as_user(user, "cat", f"{mine}/etc/file") == 0
            assert as_user(user, "sh", "-c", f"echo {user} >{mine}/etc/file") == 0
            assert as_user(user, "touch", f"{mine}/new") == 0
            assert as_user(user, "ls", str(theirs)) != 0
            assert as_user(user, "cat", f"{theirs}/etc/file") != 0
            assert as_user(user, "ls", str(example.place / "srv/app-data" / other)) != 0
        with pytest.raises(PermissionError):
            os.listdir(example.place / "srv/apps" / users[0])
        example.unchanged()
    finally:
        for user in users:
            done = example.call("down", f"{template}{user}")
        shipped.unlink()
    assert done.returncode == 0, done
    kept = [example.place / "srv/app-data" / user / "-/etc/file" for user in users]
    assert [path.read_text() for path in kept] == [f"{user}\n" for user in users]
