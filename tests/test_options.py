# SPDX-License-Identifier: GPL-2.0-or-later
"""Mount options: what is understood, what is refused, and in which words."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.errors import ExitCode, UnionfsError
from unionfs.option_words import KERNEL_FLAGS, WORDS
from unionfs.options import (
    IdRange,
    MountOptions,
    OptionReader,
    read_strings,
    split_layers,
    split_options,
)


def build(*strings: str, places: tuple[str, ...] = ("/mnt",), source: bool = False) -> MountOptions:
    reader = read_strings(strings)
    reader.place(places, source_first=source)
    return reader.build()


def refused(*strings: str, places: tuple[str, ...] = ("/low", "/up", "/mnt")) -> str:
    with pytest.raises(UnionfsError) as caught:
        build(*strings, places=places)
    assert caught.value.code == ExitCode.USAGE
    assert caught.value.hint
    assert "\n" not in caught.value.line()
    return caught.value.line()


def positional(*strings: str) -> MountOptions:
    return build(*strings, places=("/low", "/up", "/mnt"))


# How words are cut out


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a,b=c", ["a", "b=c"]),
        (",a,,b,", ["a", "b"]),
        (r"a=x\,y,b", [r"a=x\,y", "b"]),
        (r"a=x\\,b", [r"a=x\\", "b"]),
        ('context="s0:c1,c2",ro', ["context=s0:c1,c2", "ro"]),
        ('upperdir=/a"b,c"', ['upperdir=/a"b', 'c"']),
        ("uidmapping=0:1:2,3:4:5,ro", ["uidmapping=0:1:2,3:4:5", "ro"]),
        ("a\\", ["a\\"]),
    ],
)
def test_options_are_cut_at_commas(text: str, items: list[str]) -> None:
    assert split_options(text) == items


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("/a:/b", ["/a", "/b"]),
        (r"/a\:b:/c", ["/a:b", "/c"]),
        (r"/a\\:/c", ["/a\\", "/c"]),
        (r"/a\,b", ["/a,b"]),
        ("/a\nb:/c", ["/a\nb", "/c"]),
    ],
)
def test_layers_are_cut_at_colons(text: str, layers: list[str]) -> None:
    assert split_layers(text) == layers


@pytest.mark.parametrize("text", ["", ":", "/a:", ":/a", "/a::/b"])
def test_an_empty_layer_is_refused(text: str) -> None:
    with pytest.raises(UnionfsError, match="empty layer"):
        split_layers(text)


NAMES = st.text(st.characters(exclude_characters="\0"), min_size=1)


@given(st.lists(NAMES, min_size=1), NAMES)
def test_any_name_survives_its_escapes(lowers: list[str], upper: str) -> None:
    def escape(name: str, characters: str) -> str:
        return "".join(f"\\{c}" if c in characters else c for c in name)

    lowers = [f"/{name}" for name in lowers]
    lowerdir = ":".join(escape(name, "\\:,") for name in lowers)
    options = build(f"lowerdir={lowerdir},upperdir=/{escape(upper, chr(92) + ',')}")
    assert options.lowers == tuple(lowers)
    assert options.upper == f"/{upper}"


@given(st.text())
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        build(text, places=("/low", "/up", "/mnt"))
    except UnionfsError as caught:
        error = caught
    else:
        return
    assert error.code == ExitCode.USAGE
    assert "\n" not in error.line()


# The spellings of a mount


def test_positional() -> None:
    options = build(places=("/a:/b", "/up", "/mnt"))
    assert options.lowers == ("/a", "/b")
    assert (options.upper, options.work, options.mountpoint) == ("/up", None, "/mnt")
    assert not options.readonly


def test_kernel_spelling() -> None:
    options = build(r"lowerdir=/a:/b\:c,upperdir=/u,workdir=/w")
    assert options.lowers == ("/a", "/b:c")
    assert (options.upper, options.work) == ("/u", "/w")


def test_lowers_one_by_one_hold_plain_colons() -> None:
    assert build(r"lowerdir+=/a:b,lowerdir+=/c\,d", "lowerdir+=/e").lowers == (
        "/a:b",
        "/c,d",
        "/e",
    )


def test_without_upper_it_is_readonly() -> None:
    assert build(places=("/low", "/mnt")).readonly
    assert build("lowerdir=/low,workdir=/w").work is None
    assert build("rw", places=("/low", "/mnt")).readonly


def test_ephemeral() -> None:
    options = build("ephemeral", places=("/low", "/mnt"))
    assert options.ephemeral
    assert not options.readonly
    assert options.ephemeral_size is None
    assert build("ephemeral=50%", places=("/low", "/mnt")).ephemeral_size == "50%"


def test_paths_become_absolute_but_stay_themselves() -> None:
    options = build(places=("a/../b", "up", "mnt"))
    here = os.getcwd()
    assert options.lowers == (f"{here}/a/../b",)
    assert (options.upper, options.mountpoint) == (f"{here}/up", f"{here}/mnt")


def test_source_is_a_name_where_mount_8_gives_one() -> None:
    options = build("lowerdir=/low", places=("data", "/mnt"), source=True)
    assert options.fsname == "data"
    assert build("lowerdir=/l,fsname=x", places=("d", "/mnt"), source=True).fsname == "x"
    assert build(places=("/a:/b", "/mnt"), source=True).lowers == ("/a", "/b")


@pytest.mark.parametrize(
    ("strings", "places", "told"),
    [
        ([], (), "no mount point"),
        ([], ("/mnt",), "no lower layer"),
        ([], ("/a", "/b", "/c", "/mnt"), "one argument too many: /c"),
        (["lowerdir=/a"], ("/b", "/mnt"), "named twice"),
        (["upperdir=/u"], ("/a", "/b", "/mnt"), "named twice"),
        (["lowrdir=/a"], ("/mnt",), "did you mean lowerdir?"),
        ([], ("/a", "", "/mnt"), "a path is empty"),
    ],
)
def test_misplaced_arguments(strings: list[str], places: tuple[str, ...], told: str) -> None:
    assert told in refused(*strings, places=places)


# Words and their values


def test_words_of_fuse_overlayfs() -> None:
    options = positional(
        "uidmapping=0:1000:1:1:110000:65536,gidmapping=0:1000:1,squash_to_root,squash_to_gid=7,"
        "static_nlink,noacl,noxattrs=1,xattr_permissions=2,timeout=1.5,fsync=0,threaded=0,"
        'fast_ino=1,writeback=1,plugins=,context="system_u:object_r:container_file_t:s0:c1,c2",'
        "redirect_dir=off,xino=auto,ino32_t"
    )
    assert options.uidmapping == (
        IdRange(inside=0, outside=1000, length=1),
        IdRange(inside=1, outside=110000, length=65536),
    )
    assert options.gidmapping == (IdRange(inside=0, outside=1000, length=1),)
    assert (options.squash_to_uid, options.squash_to_gid) == (0, 7)
    assert (options.static_nlink, options.noacl, options.noxattrs) == (True, True, True)
    assert (options.xattr_permissions, options.timeout) == (2, 1.5)
    assert (options.fsync, options.redirect_dir) == ("volatile", False)


def test_a_mapping_may_go_on_after_a_comma() -> None:
    assert len(positional("uidmapping=0:1:1,1:100:5").uidmapping) == 2


def test_words_of_the_kernel() -> None:
    options = positional(
        "metacopy=off,index=off,redirect_dir=follow,volatile,userxattr,uuid=null,nfs_export=off"
    )
    assert (options.metacopy, options.index, options.redirect_dir) == (False, False, False)
    assert (options.fsync, options.userxattr) == ("volatile", True)
    assert positional().userxattr is None


def test_words_of_fstab_and_mount_8_do_nothing() -> None:
    plain = positional()
    strings = [
        "rw,suid,dev,exec,async,atime,diratime,relatime,defaults,auto,noauto,user,users,nofail",
        "_netdev,x-systemd.requires-mounts-for=/data,X-mount.mkdir,comment=any thing,user=joe",
        "x-initrd.mount,default_permissions,max_write=131072,splice_read",
    ]
    assert positional(*strings) == plain


def test_flags_that_restrict_go_to_the_kernel() -> None:
    options = positional("nodev,nosuid,noexec,noatime,sync")
    assert options.kernel_flags == {"nodev", "nosuid", "noexec", "noatime", "sync"}
    assert set(KERNEL_FLAGS) >= options.kernel_flags


def test_words_of_fuse() -> None:
    options = positional("allow_other,nonempty,auto_unmount,max_read=65536,fsname=a\\,b,debug")
    assert (options.allow_other, options.nonempty, options.auto_unmount) == (True, True, True)
    assert (options.max_read, options.fsname, options.debug) == (65536, "a,b", True)
    assert positional("subtype=unionfs").subtype == "unionfs"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lowerdi=/a", "'lowerdi' is unknown; did you mean lowerdir?"),
        ("zzz", "'zzz' is unknown; see unionfs mount --help"),
        ("x\ny", r"'x\ny' is unknown"),
        ("=1", "'' is unknown"),
        ("upperdir", "upperdir needs a value"),
        ("workdir=", "workdir= is empty"),
        ("ro=1", "takes no value"),
        ("ro,rw", "contradict each other (ro and rw)"),
        ("nodev,dev", "contradict"),
        ("volatile,fsync=strict", "contradict each other (volatile and fsync=strict)"),
        ("workdir=/a,workdir=/b", "workdir is given twice (workdir=/a and workdir=/b)"),
        ("workdir=/a,workdir=/a", "workdir is given twice"),
        ("allow_other,allow_root", "exclude each other"),
        ("only=root,allow_other", "exclude each other"),
        ("only=no-such-user", "there is no such user"),
        ("ephemeral", "ephemeral and an upper layer exclude each other"),
        ("fsync=2", "use one of auto, strict, volatile, 0, 1"),
        ("timeout=nan", "is not a time"),
        ("timeout=-1", "is not a time"),
        ("squash_to_uid=-1", "there is no such user"),
        ("squash_to_uid=4294967295", "is no uid or gid"),
        ("uidmapping=0:1", "malformed"),
        ("uidmapping=0:1:x", "malformed"),
        ("uidmapping=0:1:0", "0:1:0 is no range"),
        ("gidmapping=0:4294967295:1", "is no range"),
        ("plugins=/a.so", "plugins"),
        ("datadir+=/a", "data-only"),
        ("verity=on", "use one of off"),
        ("redirect_dir=nofollow", "not understood"),
        ("subtype=other", "fuse.unionfs"),
        ("fd=3", "fd is not supported"),
        ("remount", "cannot change"),
        ("cow", "an option of unionfs-fuse"),
        ("driver=fast", "use one of engine, pyfuse3"),
    ],
)
def test_bad_words_are_named(text: str, told: str) -> None:
    assert told in refused(text)


@pytest.mark.parametrize("size", ["", "0", "x", "-1", "5X", "200%", "0%"])
def test_bad_sizes(size: str) -> None:
    assert "is not a size" in refused(f"ephemeral={size}", places=("/low", "/mnt"))


def test_repeated_flags_are_harmless() -> None:
    assert positional("nodev,nodev,volatile,fsync=0") == positional("nodev,volatile")


def test_sloppy_lets_unknown_words_pass_but_no_bad_ones() -> None:
    assert positional("zzz=1,umask=022,sloppy").sloppy
    assert "is not a time" in refused("sloppy,timeout=x")
    assert "data-only" in refused("sloppy,datadir+=/a")


@pytest.mark.parametrize("text", [None, "1", "on", "/x", "1:2:3"])
@pytest.mark.parametrize("name", list(WORDS))
def test_every_word_is_taken_or_named(name: str, text: str | None) -> None:
    """No word can be said in no way at all, nor breaks on a value."""
    assert WORDS[name].flag is not None or WORDS[name].read is not None
    told = name
    try:
        OptionReader().set_word(name, text)
    except UnionfsError as error:
        told = error.message
    assert name in told


def test_the_manual_knows_every_word() -> None:
    text = Path(__file__).parents[1].joinpath("docs/man/unionfs.8.md").read_text()
    told = set(re.findall(r"\*\*(?:-o )?([\w+-]+)", text))
    assert sorted(set(WORDS) - told) == []


def test_a_time_is_not_longer_than_the_kernel_can_be_told() -> None:
    assert positional("timeout=1e300").timeout == 1e9
