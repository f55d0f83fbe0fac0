# SPDX-License-Identifier: GPL-2.0-or-later
"""Things done beside one another, some of which must not wait for the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from tests.rig.mounted import PATIENCE

T = TypeVar("T")


def begin(action: Callable[[], T]) -> Future[T]:
    """Run it in a thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def soon(action: Callable[[], T]) -> T:
    """The result of what must not wait for the slow."""
    return begin(action).result(PATIENCE)
