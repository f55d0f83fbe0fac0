# SPDX-License-Identifier: GPL-2.0-or-later
"""`unionfs store encrypt`."""

import os
from collections.abc import Sequence

from unionfs import locator
from unionfs.cli import key, show
from unionfs.cli.parser import Parser
from unionfs.errors import ExitCode, printable, usage_error

USAGE = """\
unionfs store encrypt STORE [--kind KIND] [--key-file FILE | --credential NAME]
       [--discard] [-n] [-q]
       unionfs store encrypt IMAGE --base LOWER ..."""

DESCRIPTION = """\
Makes STORE an encrypted store, which must not be in use: an empty one, or one with
changes, which are copied to an encrypted directory that takes their place by one call.
KIND is gocryptfs, which works anywhere and for everybody, or fscrypt: faster, by the
kernel, for root on an ext4 that has the feature encrypt (tune2fs -O encrypt).
The plain changes are kept beside it, and their place is told, unless --discard is given.
A directory that is not there is made. The passphrase is asked for, unless it is in a file
or in a credential of systemd."""

EPILOG = """
exit codes: 0 done, 1 wrong usage, 2 a program is missing, 8 interrupted, 32 failed: the
changes are as they were

example:
  unionfs store encrypt changes
  unionfs store encrypt changes.img --base rootfs.squashfs --key-file /root/key
  unionfs store encrypt changes.img --base rootfs.squashfs --kind fscrypt
  unionfs mount rootfs.squashfs changes.img /mnt -o key-file=/root/key
"""

KINDS = ("gocryptfs", "fscrypt")
OTHER_KINDS = {
    "luks": "set it up by cryptsetup(8), open it, and name the device that it makes",
}


def run(argv: Sequence[str]) -> int:
    """Encrypt it."""
    parser = Parser(
        prog="unionfs store encrypt", usage=USAGE, description=DESCRIPTION, epilog=EPILOG
    )
    add = parser.add_argument
    add("store", metavar="STORE", help="DIR, IMAGE, /dev/NAME, LABEL=..., with :/dir")
    add("--base", metavar="LOWER", help="what the changes will be over, in a store without any")
    add("--kind", choices=[*KINDS, *OTHER_KINDS], default=KINDS[0], help="gocryptfs, if not given")
    key.add_arguments(parser)
    add("-n", "--dry-run", action="store_true", help="only tell what would be done")
    add("--discard", action="store_true", help="do not keep the plain changes")
    add("-q", "--quiet", action="store_true", help="no progress bar, no report")
    given = parser.read(argv)
    source = key.source(given)
    if given.kind in OTHER_KINDS:
        raise usage_error(f"unionfs does not set up {given.kind}", OTHER_KINDS[given.kind])
    from unionfs import passphrase
    from unionfs.stores import backing, encrypting, foreign, fscrypt, replacing
    from unionfs.stores.tools import tool

    if given.kind == "gocryptfs":
        tool("gocryptfs", "gocryptfs")  # said before a passphrase is asked for
    else:
        fscrypt.refuse_user()
    new = _is_new(given.store)
    if new:
        backing.refuse_misread(given.store)
    if given.dry_run and new:
        print(printable(f"{given.store} would be made, encrypted"))
        return ExitCode.OK
    text, like = encrypting.place_of(given.store, given.base)
    write = not given.dry_run
    if new:
        os.mkdir(given.store)
    try:
        with backing.chosen(text, write=write, make=write) as upper:
            encrypting.refuse_encrypted(upper)
            replacing.refuse_encrypted(upper)
            foreign.refuse(upper, keep=not given.discard, hint=foreign.BY_NO_DISCARD)
            if given.kind == fscrypt.KIND:
                fscrypt.refuse_impossible(upper.fd, upper.name)
            total = backing.tree_bytes(upper.fd)
            if given.dry_run:
                size = show.size_text(total)
                print(printable(f"{upper.name} would be encrypted: about {size} are copied"))
                return ExitCode.OK
            with (
                passphrase.wiped(passphrase.obtain(source, upper.name, new=True)) as secret,
                show.progress(upper.name, total, quiet=given.quiet) as advance,
            ):
                keep = not given.discard
                kept = encrypting.encrypt(upper, secret, like, advance, kind=given.kind, keep=keep)
            place = None if kept is None else upper.beside(kept)
    except BaseException:
        if new:
            os.rmdir(given.store)
        raise
    if place is not None and not given.quiet:
        print(printable(f"the plain changes are kept in {place}, until you remove them"))
    return ExitCode.OK


def _is_new(store: str) -> bool:
    return locator.is_directory(store) and not os.path.lexists(store)
