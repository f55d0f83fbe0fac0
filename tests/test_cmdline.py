# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's command line: each word and alias, how they are cut, and which of two wins."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.boot.cmdline import cut, parse_cmdline
from unionfs.boot.request import Request
from unionfs.boot.words import WORDS


def asked(**fields: Any) -> Request:  # noqa: ANN401 - the fields of a Request
    """What is expected: asked for, and persistent if there is a store, in memory otherwise."""
    mode = "persist" if fields.get("store") else "ram"
    return Request(**{"asked": True, "mode": mode, **fields})


def plain(request: Request) -> Request:
    """Without what was said about it."""
    return dataclasses.replace(request, notices=(), sources={})


# How it is cut


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" a\tb=c\n", [("a", None), ("b", "c")]),
        ("a=", [("a", "")]),
        ('a="b c" d', [("a", "b c"), ("d", None)]),
        ('"a=b c" d', [("a", "b c"), ("d", None)]),
        ('a=LABEL="b c"', [("a", 'LABEL="b c"')]),
        ('a="b c', [("a", "b c")]),
        ('"a b"', [("a b", None)]),
        ("=a", [("=a", None)]),
        ("a=b=c", [("a", "b=c")]),
        ("a -- b", [("a", None)]),
        ("a --b --- c=--", [("a", None), ("--b", None), ("---", None), ("c", "--")]),
    ],
)
def test_cut_as_the_kernel_does(text: str, words: list[tuple[str, str | None]]) -> None:
    assert cut(text) == words


# Each word.  TABLE has every word that does something; NO_EFFECT the others.

TABLE: list[tuple[str, Request]] = [
    # Our own.
    ("unionfs.store=LABEL=x", asked(store="LABEL=x")),
    ("unionfs.store=UUID=12-34:/a/b", asked(store="UUID=12-34", directory="/a/b")),
    ('unionfs.store="LABEL=my stick:/a"', asked(store="LABEL=my stick", directory="/a")),
    ('unionfs.store=LABEL="my stick"', asked(store='LABEL="my stick"')),
    ("unionfs.store=/dev/sda1", asked(store="/dev/sda1")),
    ("unionfs.store=ID=usb-x-part1:/", asked(store="/dev/disk/by-id/usb-x-part1", directory="/")),
    ("unionfs.store=tmpfs", asked()),
    ("unionfs.store=tmpfs:size=2G", asked(size="2G")),
    ("unionfs.store=luks:LABEL=x:/d", asked(store="LABEL=x", crypt="LABEL=x", directory="/d")),
    ("unionfs.mode=persist", asked(store="LABEL=persistence")),
    ("unionfs.mode=ram", asked()),
    ("unionfs.mode=ro", asked(mode="ro", store="LABEL=persistence")),
    ("unionfs.mode=off", Request()),
    ("unionfs.size=50%", asked(size="50%")),
    ("unionfs.crypt=PARTLABEL=x", asked(store="PARTLABEL=x", crypt="PARTLABEL=x")),
    ("unionfs.profile=kiosk", Request(asked=True, profile="kiosk")),
    # archiso
    ("cow_label=x", asked(store="LABEL=x")),
    (r"cow_label=my\x20stick", asked(store=r"LABEL=my\x20stick")),
    ("cow_label=a:/b", asked(store='LABEL="a:/b"')),
    ("cow_device=/dev/sdb2", asked(store="/dev/sdb2")),
    ("cow_device=PARTUUID=1-2", asked(store="PARTUUID=1-2")),
    ("cow_spacesize=1G", asked(size="1G")),
    # dracut
    ("rd.overlay", asked()),
    ("rd.overlay=1", asked()),
    ("rd.overlay=0", Request()),
    ("rd.overlay=none", Request()),
    ("rd.overlay=LABEL=x", asked(store="LABEL=x")),
    ("rd.overlay=/dev/sdb1:/over", asked(store="/dev/sdb1", directory="/over")),
    ("rd.overlay=UUID=1:auto", asked(store="UUID=1")),
    ("rd.overlay=tmpfs:size=32M,nr_inodes=100", asked(size="32M")),
    ("rd.overlay.crypt=dev=LABEL=x,mapname=m", asked(store="LABEL=x", crypt="LABEL=x")),
    ("rd.overlay.crypt=LABEL=x", asked(store="LABEL=x", crypt="LABEL=x")),
    (
        "rd.overlay.crypt=dev=/dev/vdb,timeout=9",
        asked(store="/dev/vdb", crypt="/dev/vdb", timeout=9.0),
    ),
    ("rd.live.overlay=PARTUUID=x:/o", asked(store="PARTUUID=x", directory="/o")),
    ("rd.live.overlay=none", Request()),
    # live-boot
    ("persistence", asked(store="LABEL=persistence", persistence=True)),
    ("persistence=0", Request()),
    # casper
    ("persistent", asked(store="LABEL=writable")),
    # overlayroot
    ("overlayroot=tmpfs", asked()),
    ("overlayroot=tmpfs:swap=1,recurse=0", asked()),
    ("overlayroot=disabled", Request()),
    ("overlayroot=", Request()),
    ("overlayroot=/dev/xvdb", asked(store="/dev/xvdb")),
    ("overlayroot=xvdb", asked(store="/dev/xvdb")),
    ("overlayroot=LABEL=x", asked(store="LABEL=x")),
    (
        "overlayroot=device:dev=LABEL=x,timeout=180,dir=a/b",
        asked(store="LABEL=x", timeout=180.0, directory="/a/b"),
    ),
    (
        "overlayroot=crypt:mapname=m,pass=p,fstype=ext4,mkfs=0,dev=vdb",
        asked(store="/dev/vdb", crypt="/dev/vdb"),
    ),
    # Yocto
    ("overlayrootrwdev=/dev/mmcblk0p3", asked(store="/dev/mmcblk0p3")),
    ("rootrw=/dev/mmcblk0p3", asked(store="/dev/mmcblk0p3")),
    # Slax, MiniOS
    ("perchdir=/dev/sda1/changes", asked(store="/dev/sda1", directory="/changes")),
    (
        "perchdir=/dev/disk/by-label/My/changes/2",
        asked(store="/dev/disk/by-label/My", directory="/changes/2"),
    ),
    ("perchdir=label:My/changes", asked(store="LABEL=My", directory="/changes")),
    ("perchdir=resume", asked(store="LABEL=persistence")),
    # Porteus
    ("changes=/dev/sda5", asked(store="/dev/sda5")),
    ("changes=EXIT:UUID:12-ab/porteus", asked(store="UUID=12-ab", directory="/porteus")),
    ("changes=EXIT:/porteus", asked(store="LABEL=persistence")),
    # systemd
    ("systemd.volatile=overlay", asked()),
    ("systemd.volatile=yes", Request()),
    ("systemd.volatile=state", Request()),
    ("systemd.volatile=no", Request()),
    ("systemd.volatile=off", Request()),
    # What says how, beside a store.
    ("unionfs.dir=a/b", asked(directory="/a/b")),
    ("cow_directory=persistent_X/x86_64", asked(directory="/persistent_X/x86_64")),
    ("persistence-path=/live/", asked(directory="/live")),
    ("persistent-path=x", asked(directory="/x")),
    ("unionfs.flags=compress=zstd,noatime", asked(flags="compress=zstd,noatime")),
    ("cow_flags=subvol=@cow", asked(flags="subvol=@cow")),
    ("overlayrootfsflags=noatime", asked(flags="noatime")),
    ("unionfs.reset", asked(reset=True)),
    ("unionfs.reset=no", asked()),
    ("rd.overlay.reset=1", asked(reset=True)),
    ("rd.live.overlay.reset", asked(reset=True)),
    ("unionfs.timeout=2.5", asked(timeout=2.5)),
    ("unionfs.fallback=fail", asked(fallback="fail")),
    ("unionfs.fallback=ro", asked(fallback="ro")),
    ("unionfs.on-mismatch=ignore", asked(on_mismatch="ignore")),
    ("unionfs.on_mismatch=ro", asked(on_mismatch="ro")),
    ("unionfs.options=fsync=strict,low-water=10%", asked(options="fsync=strict,low-water=10%")),
    ("rd.overlay.readonly", asked(mode="ro")),
    ("rd.live.overlay.readonly=1", asked(mode="ro")),
    ("persistence-read-only", asked(mode="ro")),
    ("persistence-encryption=luks", asked(crypt="LABEL=s", crypt_by_name=True)),
    ("persistence-encryption=none", asked()),
    ("persistence-encryption=luks,none", asked()),
    ("cow_persistent=P", asked()),
    ("cow_persistent=N", asked(mode="ram")),
    ("nopersistence", asked(mode="ram")),
    ("nopersistent", asked(mode="ram")),
    ("unionfs.toram", asked(toram=True)),
    ("unionfs.lower=LABEL=live:/dir", asked(lower="LABEL=live:/dir")),
    ("unionfs.lower=/run/live/base.squashfs", asked(lower="/run/live/base.squashfs")),
    ("unionfs.lower=base", asked()),
    ("copytoram=y", asked(toram=True)),
    ("copytoram=auto", asked(toram=True)),
    ("copytoram=n", asked()),
    ("toram", asked(toram=True)),
    ("toram=filesystem.squashfs", asked(toram=True)),
    ("rd.live.ram=1", asked(toram=True)),
    ("copy2ram", asked(toram=True)),
    ("overlay-size=512m", asked(size="512m")),
    ("overlay-size=40%", asked(size="40%")),
    ("rd.live.overlay.size=512", asked(size="512M")),
    ("perchsize=4000", asked(size="4000M")),
    ("perchsize=16GB", asked(size="16G")),
]
HOW = TABLE.index(("unionfs.dir=a/b", asked(directory="/a/b")))
PERSISTENCE_LABEL = "persistence persistence-label=mine,other"


@pytest.mark.parametrize(("text", "expected"), TABLE[:HOW])
def test_word(text: str, expected: Request) -> None:
    assert plain(parse_cmdline(f"quiet root=/dev/sda1 {text} splash")) == expected


@pytest.mark.parametrize("text", [text for text, _ in TABLE])
def test_what_has_said_it(text: str) -> None:
    """`unionfs boot -n` tells of each field which word it is from."""
    fields = {field.name for field in dataclasses.fields(Request)}
    assert set(parse_cmdline(text).sources) <= fields


@pytest.mark.parametrize(("text", "expected"), TABLE[HOW:])
def test_word_beside_a_store(text: str, expected: Request) -> None:
    mode = "persist" if expected.mode == "ram" and not _says_ram(text) else expected.mode
    wanted = dataclasses.replace(expected, store="LABEL=s", mode=mode)
    for line in (f"cow_label=s {text}", f"{text} cow_label=s"):
        assert plain(parse_cmdline(line)) == wanted, line
    alone = parse_cmdline(text)
    assert not alone.asked, "it says how, and asks for nothing"


def _says_ram(text: str) -> bool:
    return text in ("cow_persistent=N", "nopersistence", "nopersistent")


NO_EFFECT = [
    "cow_chunksize=8",
    "dm_snap_prefix=arch",
    "copytoram_size=75%",
    "rd.live.overlay.thin=1",
    "rd.live.overlay.overlayfs=1",
    "rd.live.overlay.cowfs=xfs",
    "rd.live.overlay.nouserconfirmprompt",
    "persistence-media=removable",
    "persistence-method=overlay",
    "persistence-storage=file",
    "overlayrootfstype=ext4",
]


@pytest.mark.parametrize("text", NO_EFFECT)
def test_word_without_effect_is_told(text: str) -> None:
    request = parse_cmdline(text)
    assert request.notices == (f"{text}: it has no effect here",)
    assert plain(request) == Request()


def test_each_word_is_tested() -> None:
    tested = {
        name.replace("on_mismatch", "on-mismatch")
        for text in [*(text for text, _ in TABLE), *NO_EFFECT, PERSISTENCE_LABEL]
        for name, _ in cut(text)
    }
    assert set(WORDS) == tested


# What is told


@pytest.mark.parametrize(
    ("text", "notice"),
    [
        ("unionfs.stor=LABEL=x", "unionfs.stor=LABEL=x: this word is not known"),
        ("unionfs.", "unionfs.: this word is not known"),
        ("unionfs.mode=maybe", "unionfs.mode=maybe: ignored: it is one of persist, ram, ro, off"),
        ("unionfs.store", "unionfs.store: ignored: it has no value"),
        ("unionfs.store=x", "it is neither a path nor LABEL="),
        ("unionfs.store=LABEL=", "it names nothing"),
        ("unionfs.size=0", "it is no size"),
        ("unionfs.timeout=-1", "it is no number of seconds"),
        ("unionfs.timeout=inf", "it is no number of seconds"),
        ("unionfs.fallback=shell", "it is one of fail, ro, tmpfs"),
        ("unionfs.reset=maybe", "it is neither yes nor no"),
        ("unionfs.dir=../x", "it leads out of the store"),
        ("unionfs.profile=a/b", "it is no name"),
        ("unionfs.options=lowerdir=/x", "said by other words"),
        ("unionfs.options=ro", "said by other words"),
        ("unionfs.options=fsnc=strict", "did you mean fsync?"),
        ("cow_label=", "it has no value"),
        ("rd.overlay=LABEL", "it is neither a path"),
        ("overlayroot=device:timeout=1", "it has no value"),
        ("overlayroot=tmpfs:swap=1", "swap= has no effect here"),
        ("persistence-encryption=xor", "it is none, luks or both"),
        ("perchsize=big", "it is no size"),
        ("perchdir=ask", "say where the changes are by unionfs.store="),
        ("changes=EXIT:/dev/sda1", "not at the end"),
        ("systemd.volatile=yes", "systemd does it"),
        ("systemd.volatile=1", "systemd does it"),
        ("systemd.volatile", "systemd does it"),
        ("systemd.volatile=maybe", "it is one of yes, state, no, overlay"),
        ("cow_flags=x", "cow_flags=x: without effect, as nothing asks for a union"),
        ("cow_label=a cow_label=b", "cow_label=b: it overrides cow_label=a"),
        (PERSISTENCE_LABEL, "only mine is looked for"),
        ('unionfs.x="a\nb"', r"unionfs.x=a\nb: this word is not known"),
    ],
)
def test_notice(text: str, notice: str) -> None:
    found = parse_cmdline(text).notices
    assert any(notice in line for line in found), found


def test_malformed_word_changes_nothing() -> None:
    line = "unionfs.store=LABEL=x unionfs.fallback=ro"
    wanted = plain(parse_cmdline(line))
    assert plain(parse_cmdline(f"{line} unionfs.fallback=x unionfs.store=y cow_label=")) == wanted


def test_nothing_asked_nothing_said() -> None:
    assert parse_cmdline("BOOT_IMAGE=/vmlinuz root=UUID=1 ro quiet splash") == Request()


# Which of two wins


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cow_label=a unionfs.store=LABEL=b", asked(store="LABEL=b")),
        ("unionfs.store=LABEL=b cow_label=a", asked(store="LABEL=a")),
        ("rd.overlay=LABEL=a:/x unionfs.store=LABEL=b", asked(store="LABEL=b")),
        ("unionfs.dir=/x cow_label=a cow_label=b", asked(store="LABEL=b", directory="/x")),
        ("overlayroot=tmpfs cow_label=a", asked(store="LABEL=a")),
        ("cow_label=a overlayroot=tmpfs", asked()),
        ("overlayroot=disabled cow_label=a", asked(store="LABEL=a")),
        ("unionfs.crypt=LABEL=a cow_label=b", asked(store="LABEL=b")),
        ("persistence nopersistence", asked(mode="ram", store="LABEL=persistence")),
        ("nopersistent persistent", asked(mode="ram", store="LABEL=writable")),
        (PERSISTENCE_LABEL, asked(store="LABEL=mine")),
        ("persistence cow_label=a", asked(store="LABEL=a")),
        ("unionfs.mode=ro cow_label=a", asked(store="LABEL=a", mode="ro")),
        ("rd.overlay rd.overlay.readonly", asked()),
        ("unionfs.mode=off cow_label=a", Request(store="LABEL=a")),
        ("unionfs.profile=p unionfs.mode=off", Request(asked=True, profile="p")),
        ("cow_label=a -- cow_label=b", asked(store="LABEL=a")),
    ],
)
def test_later_wins(text: str, expected: Request) -> None:
    found = dataclasses.replace(plain(parse_cmdline(text)), persistence=False)
    assert found == expected


def test_sources() -> None:
    request = parse_cmdline("cow_label=a unionfs.timeout=3 rd.overlay=LABEL=b:/x")
    assert request.sources == {
        "store": "rd.overlay=LABEL=b:/x",
        "directory": "rd.overlay=LABEL=b:/x",
        "timeout": "unionfs.timeout=3",
    }
    assert request.native
    assert not parse_cmdline("cow_label=a").native
    assert parse_cmdline("overlayroot=tmpfs").sources == {"mode": "overlayroot=tmpfs"}
    assert parse_cmdline("persistent").sources == {"store": "persistent"}
    assert parse_cmdline("perchdir=resume").sources == {"store": "perchdir=resume"}
    encrypted = parse_cmdline("persistence persistence-encryption=luks")
    assert encrypted.sources["crypt"] == "persistence-encryption=luks"


@pytest.mark.parametrize(
    "text",
    [
        "overlayroot=crypt:dev=vdb,pass=secret,timeout=9",
        "rd.overlay.crypt=pass=secret,dev=/dev/vdb overlayroot=vdc",
    ],
)
def test_a_passphrase_is_not_told(text: str) -> None:
    request = parse_cmdline(text)
    assert "secret" not in str(request)
    assert "pass=..." in str(request)


VALUES = st.one_of(
    st.text(), st.sampled_from([text.partition("=")[2] for text, _ in TABLE]), st.just('"')
)
LINES = st.lists(
    st.tuples(
        st.sampled_from([*WORDS, "unionfs.x", "--", ""]), st.sampled_from(["=", "", " "]), VALUES
    )
)


@given(st.one_of(st.text(), LINES.map(lambda line: " ".join("".join(word) for word in line))))
def test_nothing_raises(text: str) -> None:
    request = parse_cmdline(text)
    assert all("\n" not in notice and notice for notice in request.notices)
    if request.mode == "off":
        assert request.asked == (request.profile is not None)
