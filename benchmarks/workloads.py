# SPDX-License-Identifier: GPL-2.0-or-later
"""All workloads, in the order of the table: importing them enters them."""

from benchmarks import data, names, programs, workload

_ORDER = [module.__name__ for module in (names, data, programs)]
WORKLOADS = dict(
    sorted(workload.WORKLOADS.items(), key=lambda entry: _ORDER.index(entry[1].prepare.__module__))
)
