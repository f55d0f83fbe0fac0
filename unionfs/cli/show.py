# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables and progress bars for people, by rich, which is imported when there is something to show.

Owns the choice of when: a table always, a bar on a terminal only.  Called by the verbs of store.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from unionfs.errors import printable, usage_error

Advance = Callable[[int], None]
_NAME: Final = 24  # characters
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)(?:I?B)?", re.IGNORECASE)


def size_text(count: int | None) -> str:
    """A size for people."""
    if count is None:
        return "-"
    amount, unit = float(count), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{amount:.1f} {_UNITS[unit]}"


def read_size(text: str, what: str = "--size") -> int:
    """A size from a person: K, M, G and T are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise usage_error(f"{what} {text} is not a size", "write 512M or 8G")
    power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * 1024**power)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; whole, if the output is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    width = None if sys.stdout.isatty() else 10_000
    console = Console(width=width, highlight=False)
    if width is not None:
        made.box = None
    console.print(made)


def fields(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one a line."""
    width = max((len(name) for name, _ in pairs), default=0) + 2
    for name, value in pairs:
        print(f"{name:<{width}}{printable(value)}")


@contextlib.contextmanager
def progress(what: str, total: int | None, *, quiet: bool = False) -> Iterator[Advance]:
    """A bar on a terminal's stderr; what is yielded takes how many bytes more are done."""
    if quiet or not sys.stderr.isatty():
        yield lambda _count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        name = printable(what)
        # A long path would leave no room for the bar.
        short = name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
        task = bar.add_task(short, total=total)
        yield lambda count: bar.advance(task, count)
