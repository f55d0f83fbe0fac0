# SPDX-License-Identifier: GPL-2.0-or-later
"""What lies on the way to a profile's paths, over them and beneath: links, mounts of others."""

from __future__ import annotations

import os

import pytest

from tests.rig import ground, images, snapshot
from tests.test_profile_mounts import System, system
from tests.test_stores import need

__all__ = ["system"]


def test_where_a_link_leads(system: System) -> None:
    """The mount table has the path behind it, by which it is found again."""
    (system.place / "link").symlink_to("sys")
    (system.place / "view").mkdir()
    (system.place / "to-view").symlink_to("view")
    for base, target, seen in (("link", "link", "sys"), ("sys", "to-view/x", "view/x")):
        head = f'store = "{system.data}"\n'
        if target != base:
            head += f'target = "{system.place}/{target}"\n'
        rules = '[paths]\n"/etc" = "persist"\n'
        system.file.write_text(f'base = "{system.place}/{base}"\n{head}{rules}')
        for _round in range(2):
            system.up()
            assert "up already" in system.up()
            seen_at = system.place / seen / "etc"
            assert os.path.ismount(seen_at)
            (seen_at / base).touch()
            system.down()
            assert ground.mounts_below(system.place) == []
            assert (system.data / "etc" / base).exists()
    system.unchanged()


def test_a_link_on_the_way_is_refused(system: System) -> None:
    """With nothing left that `down` does not know."""
    (system.top / "lib").symlink_to("var/lib")
    (system.top / "var/lib/sub").mkdir()
    system.write(f'store = "{system.data}"', '"/etc" = "tmpfs"\n"/lib/sub" = "persist"\n')
    told = system.refused()
    assert f"{system.top}/lib is a symbolic link in the base" in told
    assert "var/lib" in told
    target = system.place / "view"
    (target / "var").mkdir(parents=True)
    (target / "etc").symlink_to("var")
    system.write(f'target = "{target}"', '"/etc" = "tmpfs"\n')
    assert "leads to" in system.refused()
    assert ground.mounts_below(system.place) == []


@pytest.mark.root
def test_a_link_does_not_lead_out_of_another_root(system: System) -> None:
    """An absolute one is that system's own, and its /srv is not ours."""
    outside = system.place / "outside"
    (outside / "sub").mkdir(parents=True)
    (system.top / "srv").symlink_to(outside)
    text = f'store = "{system.data}"\n[paths]\n"/srv/sub" = "persist"\n'
    system.file.write_text(text)
    assert "is a symbolic link" in system.refused("--root", str(system.top))
    assert ground.mounts_below(system.place) == []
    (system.top / "usr").mkdir()
    (system.top / "usr/etc").symlink_to("/etc")
    text = f'base = "/usr/etc"\nstore = "{system.data}"\n[paths]\n"/" = "persist"\n'
    system.file.write_text(text)
    system.up("--root", str(system.top))
    assert system.points() == ["etc"]
    assert (system.top / "etc/file").read_text() == "base etc\n"
    system.down()


@pytest.mark.root
def test_what_somebody_has_mounted_over_it(system: System) -> None:
    """It is not forgotten, and what lies over it is not unmounted in its place."""
    system.write(f'store = "{system.data}"', '"/var/cache" = "persist"\n')
    for over in ("var/cache", "var"):
        system.up()
        ground.run("mount", "-t", "tmpfs", "over", str(system.top / over))
        told = f"/var/cache is covered by a mount of tmpfs on {system.top / over} (over)"
        assert told in system.refused()
        for words in ([], ["--lazy"]):
            done = system.call("down", system.name, *words)
            assert (done.returncode, told in done.stderr) == (32, True), done
            assert "all the same" not in done.stderr
        ground.run("umount", str(system.top / over))
        assert "up already" in system.up()
        system.down()
    system.unchanged()


@pytest.mark.root
def test_what_is_mounted_beneath(system: System) -> None:
    """It is hidden: a warning, and an error if it is the profile's own."""
    head, rule = f'store = "{system.data}"', '"/var/cache" = "persist"\n'
    system.write(head, rule)
    assert "not seen" not in system.up()
    system.write(head, rule + '"/var" = "persist"\n')
    assert f"/var is new above {system.top}/var/cache, which is mounted" in system.refused()
    assert system.points() == ["var/cache"]
    system.down()
    ground.run("mount", "-t", "tmpfs", "beneath", str(system.top / "var/log"))
    assert f"what is mounted on {system.top}/var/log is not seen any more" in system.up()
    system.down()
    ground.run("umount", str(system.top / "var/log"))
    system.unchanged()


@pytest.mark.parametrize("kind", ["image", "directory"])
def test_a_store_that_another_path_would_cover(system: System, kind: str) -> None:
    """Who opens it later would get it through that union: an image as a copy of itself."""
    store = system.top / "var/store"
    if kind == "image":
        need("ext4")
        store = images.make(system.top / "var/lib/s.img")
    else:
        store.mkdir()
    before = snapshot.take(system.top)
    (system.place / "link").symlink_to(store)
    for name in (store, system.place / "link"):
        system.write(f'store = "{name}"', '"/etc" = "persist"\n"/var" = "tmpfs"\n')
        assert f"/etc: its store {store} lies in /var, which" in system.refused()
    upper = f'"/etc" = {{ kind = "persist", upper = "{store}:/etc" }}\n"/var" = "tmpfs"\n'
    system.write("", upper)
    assert "lies in /var" in system.refused()
    snapshot.assert_same(before, snapshot.take(system.top), "the base")


@pytest.mark.root
def test_links_are_not_made_in_the_base(system: System) -> None:
    """They would take the place of its files, and lead nowhere after `down`."""
    for path in ("home-u", "etc", "var-log"):
        (system.data / path).mkdir()
        (system.data / path / "file").write_text("stored\n")
    rules = '"/home/u" = "link"\n"/etc" = "link"\n"/var" = "exclude"\n"/var/log" = "link"\n'
    for target in (system.top, system.place / "view"):
        head = f'target = "{target}"\n' if target != system.top else ""
        system.write(f'{head}store = "{system.data}"', rules + '"/etc/new" = "tmpfs"\n')
        for _round in range(2):
            system.up()
            assert "up already" in system.up()
            for path in ("home/u", "etc", "var/log"):
                assert (target / path / "file").is_symlink()
                assert (target / path / "file").read_text() == "stored\n"
            (target / "home/u/forgotten").touch()
            system.down()
            system.unchanged()
    assert not (system.place / "view").exists()
