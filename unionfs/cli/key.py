# SPDX-License-Identifier: GPL-2.0-or-later
"""--key-file and --credential, for the verbs that need a passphrase.

Called by the verbs of store; where passphrases come from is passphrase.py's.
"""

import argparse

from unionfs.cli.parser import Parser
from unionfs.errors import usage_error
from unionfs.passphrase import Source


def add_arguments(parser: Parser) -> None:
    """Both; without them somebody is asked."""
    add = parser.add_argument
    add("--key-file", metavar="FILE", help="with the passphrase; -: standard input")
    add("--credential", metavar="NAME", help="of systemd, with the passphrase")


def source(given: argparse.Namespace) -> Source:
    """What was said."""
    if given.key_file is not None and given.credential is not None:
        raise usage_error("--key-file and --credential exclude each other", "give one of them")
    if given.credential is not None and ("/" in given.credential or not given.credential):
        raise usage_error(f"--credential {given.credential} is no name")
    return Source(given.key_file, given.credential)
