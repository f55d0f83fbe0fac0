# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables and progress bars for people, by rich, which is imported when there is something to show.

Owns the choice of when: a table always, a bar on a terminal only.  Called by the verbs of store.
"""

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from unionfs.errors import printable, usage_error
from unionfs.stores.tools import Progress

if TYPE_CHECKING:
    import rich.progress

_NAME: Final = 24  # characters
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_LARGEST: Final = 1 << 62
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
    size = float(match[1]) * 1024**power
    if size > _LARGEST:
        raise usage_error(f"{what} {text} is too large", "write 512M or 8G")
    return int(size)


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


class _Bar(Progress):
    """On a terminal: a bar for bytes, or what is done with how much of it and since when."""

    def __init__(self, what: str) -> None:
        name = printable(what)
        # A long path would leave no room for the bar.
        self._name = name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
        self._shown: rich.progress.Progress | None = None
        self._things = ""

    def start(self, total: int | None) -> None:
        """With a bar."""
        from rich import progress as p

        self._show(
            p.BarColumn(),
            p.DownloadColumn(binary_units=True),
            p.TransferSpeedColumn(),
            p.TimeRemainingColumn(),
        ).add_task(self._name, total=total)

    def phase(self, what: str, things: str = "") -> None:
        from rich import progress as p

        self._things = things
        self._show(
            p.TextColumn("{task.fields[count]}", markup=False),
            p.TimeElapsedColumn(),
            p.SpinnerColumn(),
        ).add_task(f"{self._name}: {what}", total=None, count="")

    def __call__(self, count: int) -> None:
        if self._shown is None:
            return
        (task,) = self._shown.tasks
        self._shown.advance(task.id, count)
        if self._things:
            self._shown.update(task.id, count=f"{task.completed:.0f} {self._things}")

    def stop(self) -> None:
        if self._shown is not None:
            self._shown.stop()
            self._shown = None

    def _show(self, *columns: "rich.progress.ProgressColumn") -> "rich.progress.Progress":
        from rich import progress as p
        from rich.console import Console

        self.stop()
        name = p.TextColumn("{task.description}", markup=False)
        self._shown = p.Progress(name, *columns, console=Console(stderr=True), transient=True)
        self._shown.start()
        return self._shown


@contextlib.contextmanager
def progress(what: str, total: int | None, *, quiet: bool = False) -> Iterator[Progress]:
    """A bar on a terminal's stderr; what is yielded takes how many bytes more are done."""
    with working(what, quiet=quiet) as bar:
        if isinstance(bar, _Bar):
            bar.start(total)
        yield bar


@contextlib.contextmanager
def working(what: str, *, quiet: bool = False) -> Iterator[Progress]:
    """The same for what has phases; nothing is shown before the first."""
    if quiet or not sys.stderr.isatty():
        yield Progress()
        return
    bar = _Bar(what)
    try:
        yield bar
    finally:
        bar.stop()
