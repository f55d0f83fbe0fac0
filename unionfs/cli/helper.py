# SPDX-License-Identifier: GPL-2.0-or-later
"""The helper that mount(8) starts: mount.unionfs, mount.fuse.unionfs.

Owns mount(8)'s meaning of the flags, which is not that of FUSE programs: here -f is "fake" and -s
is "sloppy".  Reads the rest by options.py and mounts by daemon.py, as cli/mount.py does.
Called by mount(8), as the console scripts of these names.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from unionfs import locator
from unionfs.cli.main import guarded
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, UnionfsError, printable, usage_error
from unionfs.mounts import FSTYPE, read_mounts
from unionfs.options import MountOptions, OptionReader, read_strings
from unionfs.unions import ask, find, texts

USAGE = "mount.unionfs SPEC DIR [-sfnv] [-N NAMESPACE] [-o OPT,...] [-t TYPE]"

DESCRIPTION = """\
Mounts a union at DIR, called by mount(8) for `mount -t unionfs` and for fstab lines.
SPEC is LOWER[:LOWER...], or, if -o has lowerdir=, a name to show as the source."""

EPILOG = """
The options of -o are those of unionfs mount; see unionfs(8).
An fstab line, as one writes it for a union of two directories:
  /srv/base  /srv/tree  unionfs  upperdir=/srv/changes,nofail  0 0
"""

TYPES = ("unionfs", "fuse.unionfs", "fuse")
CLONE_NEWNS = 0x00020000
# What statvfs(3) shows of a mount, by its word of -o.
SHOWN_FLAGS = {
    "readonly": os.ST_RDONLY,
    "nosuid": os.ST_NOSUID,
    "nodev": os.ST_NODEV,
    "noexec": os.ST_NOEXEC,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Do what mount(8) asks; its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return guarded("mount.unionfs", lambda: run(arguments))


def run(argv: Sequence[str]) -> int:
    """Mount, or check only."""
    parser = Parser(prog="mount.unionfs", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("spec", metavar="SPEC", help="lower layers, or a name")
    add("directory", metavar="DIR", help="the mount point")
    add("-o", action="append", default=[], metavar="OPT,...", dest="strings", help="options")
    add("-s", action="store_true", dest="sloppy", help="let unknown options pass")
    add("-f", action="store_true", dest="fake", help="check everything, mount nothing")
    add("-n", action="store_true", help="ignored: there is no mtab to write")
    add("-v", action="store_true", dest="verbose", help="say what is done")
    add("-N", metavar="NAMESPACE", dest="namespace", help="mount in this mount namespace")
    add("-t", metavar="TYPE", dest="fstype", default=TYPES[0], help="one of our own types")
    given = parser.read(argv)
    if given.fstype not in TYPES:
        raise usage_error(f"type {given.fstype} is not ours", f"use -t {TYPES[0]}")
    reader = read_strings(given.strings)
    if given.sloppy:
        reader.set("sloppy", True, "-s")
    if reader.has("remount"):
        enter(given.namespace)
        remount(given.directory, reader)
        return ExitCode.OK
    reader.place([given.spec, given.directory], source_first=True)
    options = replace(reader.build(), foreground=False)
    # Loaded before another namespace hides the files it is loaded from.
    from unionfs import daemon

    enter(given.namespace)
    if given.fake:
        check(options)
        return ExitCode.OK
    if given.spec.startswith("/dev/") and given.spec in options.lowers:
        warn_of_namesakes(given.spec)
    code = daemon.run(options)
    if given.verbose and code == ExitCode.OK:
        print(f"mount.unionfs: {given.spec} mounted on {given.directory}")
    return code


def warn_of_namesakes(spec: str) -> None:
    """Of a device by a label that another has too: where we look for it ourselves, an error.

    mount(8) looks for the LABEL= of a first field before it starts us, and takes one of them.
    """
    from unionfs.stores import find
    from unionfs.stores.probe import probe

    try:
        label = probe(spec).label
    except UnionfsError:
        return  # who mounts it says what is wrong with it
    try:
        if label:
            find.look("LABEL", label, "devices")
    except UnionfsError as exc:
        what = f"{exc.message}, and this is {spec}; lowerdir=LABEL={label} would be refused"
        print(printable(f"mount.unionfs: warning: {what}"), file=sys.stderr)


def check(options: MountOptions) -> None:
    """What can be seen without mounting: that all directories and images are there."""
    for path in (*options.lowers, options.upper, options.work, options.mountpoint):
        if path is None or os.path.isdir(path) or _is_store(path):
            continue
        wrong = "is no directory" if os.path.lexists(path) else "does not exist"
        raise UnionfsError(f"{path} {wrong}", hint="nothing was mounted; this was a check (-f)")


def _is_store(path: str) -> bool:
    """Whether a layer's file system is to be found when it is mounted."""
    where = locator.parse(path)
    return where.tag is not None or (os.path.exists(where.value) and not locator.is_directory(path))


def remount(directory: str, reader: OptionReader) -> None:
    """Answer -o remount: a union's options cannot change, so only what changes nothing is done."""
    hint = "unmount it and mount it anew"
    mounts = read_mounts()
    entry = find(directory, mounts)
    if entry is None or entry.fstype != FSTYPE:
        raise UnionfsError(f"{directory} is no union, so it cannot be remounted")
    answer = ask(entry, mounts)
    if answer.state == "silent":
        raise UnionfsError(f"{directory}: {answer.reason}", hint=hint)
    try:
        flags = os.statvfs(entry.point).f_flag
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UnionfsError(f"{directory} does not answer: {reason}", hint=hint) from None
    for word, bit in SHOWN_FLAGS.items():
        wanted = reader.asked(word)
        if wanted is not None and wanted != bool(flags & bit):
            shown = reader.spelled(word)
            raise UnionfsError(f"{directory} cannot be remounted with {shown}", hint=hint)
    asked = {"lowers": reader.lowers, "upper": texts(reader.asked("upper"))}
    had = answer.facts.get("asked")
    facts = had if isinstance(had, dict) else answer.facts
    for name, layers in asked.items():
        if layers and name in facts and resolved(layers) != resolved(texts(facts[name])):
            raise UnionfsError(f"{directory} cannot be remounted with other layers", hint=hint)


def resolved(layers: Sequence[str]) -> list[str]:
    """The layers as they can be compared."""
    return [os.path.realpath(layer) for layer in layers]


def enter(namespace: str | None) -> None:
    """Go where mount(8) -N points: a process's number or a file of a mount namespace."""
    if namespace is None:
        return
    path = f"/proc/{namespace}/ns/mnt" if namespace.isdigit() else namespace
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise usage_error(f"namespace {namespace} cannot be opened: {reason}") from None
    try:
        # os.setns() is newer than the Python we ask for.
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(fd, CLONE_NEWNS) != 0:
            reason = os.strerror(ctypes.get_errno())
            raise usage_error(f"namespace {namespace} cannot be entered: {reason}")
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
