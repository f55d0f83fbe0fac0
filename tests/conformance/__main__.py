# SPDX-License-Identifier: GPL-2.0-or-later
"""`tools/conformance`: run the foreign suites that were given, one verdict a line."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from tests.conformance import suites
from tests.conformance.suites import Verdict
from tests.rig import ground
from tests.rig.ground import Ground, Kind
from tests.rig.mounted import Backend

SUITES = ("pjdfstest", "fsx", "unionmount")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/conformance",
        description="Run pjdfstest, fsx and unionmount-testsuite on a union (as root). Each suite "
        "is built by you, elsewhere; without its path it is skipped.",
    )
    add = parser.add_argument
    env = os.environ.get
    add("--pjdfstest", type=Path, default=env("PJDFSTEST"), help="built checkout ($PJDFSTEST)")
    add("--fsx", type=Path, default=env("FSX"), help="the program ($FSX)")
    add("--unionmount", type=Path, default=env("UNIONMOUNT"), help="checkout ($UNIONMOUNT)")
    add("--backend", choices=("plain", "overlay", "unionfs"), default="unionfs")
    add("--filesystem", choices=ground.KINDS, default="ext4", help="what the layers lie on")
    add("--only", choices=SUITES, action="append", help="one suite; may be repeated")
    add("--setting", action="append", help="one setting of a suite, as its verdict line names it")
    add("--ops", type=int, default=100_000, help="operations of each fsx run")
    add("--jobs", type=int, default=4, help="pjdfstest files at a time (they mostly sleep)")
    add("--logs", type=Path, help="where the suites' own words go")
    return parser.parse_args()


def runs(options: argparse.Namespace, logs: Path) -> Iterator[Callable[[Ground], Verdict]]:
    backend, kind = cast(Backend, options.backend), cast(Kind, options.filesystem)
    wanted = options.only or SUITES
    for suite in wanted:
        if getattr(options, suite) is None:
            print(f"skip   {suite:12} no path given (--{suite}, ${suite.upper()})", flush=True)
    if options.pjdfstest and "pjdfstest" in wanted:
        for setting in suites.PJDFSTEST_SETTINGS:
            if not options.setting or setting in options.setting:
                log = logs / f"pjdfstest-{backend}-{setting}.log"
                path = options.pjdfstest.resolve()
                yield lambda base, s=setting, log=log, path=path: suites.pjdfstest(  # type: ignore[misc]
                    base, path, backend, kind, s, options.jobs, log
                )
    if options.fsx and "fsx" in wanted:
        log = logs / f"fsx-{backend}.log"
        program = options.fsx.resolve()
        yield lambda base: suites.fsx(base, program, backend, kind, options.ops, log)
    if options.unionmount and "unionmount" in wanted and backend != "plain":
        for setting in suites.UNIONMOUNT_SETTINGS:
            if not options.setting or (setting or "plain") in options.setting:
                log = logs / f"unionmount-{backend}{setting}.log"
                path = options.unionmount.resolve()
                yield lambda base, s=setting, log=log, path=path: suites.unionmount(  # type: ignore[misc]
                    base, path, backend, s, log
                )


def main() -> int:
    options = parse()
    if os.geteuid() != 0:
        print("conformance: these suites need root", file=sys.stderr)
        return 1
    ground.isolate()
    logs = options.logs or Path(tempfile.mkdtemp(prefix="unionfs-conformance-"))
    logs.mkdir(exist_ok=True)
    bad = 0
    for run in runs(options, logs):
        with Ground("unionfs-conformance-") as base:
            verdict = run(base)
        bad += not verdict.passed
        print(verdict, flush=True)
    ground.reap(ground.children())
    print(f"logs: {logs}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
