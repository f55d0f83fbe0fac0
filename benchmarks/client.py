# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that does the workloads, as whoever mounted the union.

`python -m benchmarks.client PLACE` (JSON) tells the union's status, `{}` where there is none of
ours, then reads names of workloads, one a line, and answers each with one JSON line: a `Result`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TypedDict

from benchmarks import requests
from benchmarks.requests import Counting, Requests
from benchmarks.workload import Place, Sizes, Skipped
from benchmarks.workloads import WORKLOADS

# Between preparing and timing: what the kernel tells a daemon later (closed files) has arrived.
SETTLING = 0.01


class Result(TypedDict, total=False):
    """`skipped` or `failed`: why there are no microseconds."""

    microseconds: float
    count: int
    requests: Requests
    skipped: str
    failed: str


def measure(place: Place, name: str, *, counted: bool) -> Result:
    try:
        timed = WORKLOADS[name].prepare(place)
        time.sleep(SETTLING)
        counting = Counting(place.root) if counted else None
        seconds = timed.seconds()
        result: Result = {
            "microseconds": seconds / timed.operations * 1e6,
            "count": timed.operations,
        }
        if counting is not None:
            result["requests"] = counting.stop()
    except Skipped as why:
        return {"skipped": str(why)}
    except Exception as error:
        words = f"{type(error).__name__}: {error}".replace(place.root, "UNION")
        return {"failed": words.replace(place.store, "STORE").replace(place.lower, "LOWER")}
    return result


def main() -> None:
    given = json.loads(sys.argv[1])
    place = Place(**{**given, "sizes": Sizes(*given["sizes"])})
    status = requests.status(place.root)
    print(json.dumps(status), flush=True)
    for line in sys.stdin:
        result = measure(place, line.strip(), counted="requests" in status)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
