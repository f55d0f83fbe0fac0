# SPDX-License-Identifier: GPL-2.0-or-later
"""The short differential test: hypothesis chooses, and shrinks what it finds.

The long proof is `python -m tests.differential.run`, which uses the same operations.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from tests.differential import generate, run, world
from tests.differential.generate import Generator, Known
from tests.differential.harness import Harness
from tests.differential.operations import Op
from tests.rig import as_user, layers, mounted
from tests.rig.arena import backends
from tests.rig.ground import Ground
from tests.rig.mounted import Backend

T = TypeVar("T")
EXAMPLES = int(os.environ.get("UNIONFS_EXAMPLES", "6"))
WHOLE = ("check", "remount")
KINDS = (*generate.TABLE, *WHOLE * 2)
STEPS = int(os.environ.get("UNIONFS_STEPS", "60"))


class Drawn:
    """Choices made by hypothesis, which can make them smaller."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.number(0, len(choices) - 1)]

    def number(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))


def machine(base: Ground, backend: Backend) -> type[RuleBasedStateMachine]:
    """A state machine whose unions live in `base`."""
    runner = run.Runner(base)

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.harness: Harness | None = None
            self.union: mounted.Mounted | None = None

        @initialize(seed=st.integers(0, 11))
        def mount(self, seed: int) -> None:
            shape = world.Shape.of(seed, root=runner.root)
            shape = shape._replace(filesystem="ext4", squashed=False)
            place = runner.fresh(shape)
            lowers = world.build(place, shape, root=runner.root)
            control = place / "control"
            control.mkdir()
            layers.merge(lowers, control)
            options = run.OVERLAY.split(",") if backend == "overlay" else []
            self.union = mounted.make(
                backend, lowers, place, options=options, workdir=shape.workdir
            )
            if self.union.upper is not None:
                layers.copy_metadata(os.fsencode(control), os.fsencode(self.union.upper))
            self.union.mount()
            self.harness = Harness(self.union, control, runner.watchdog)
            self.generator = Generator(
                Known(),
                root=runner.root,
                overlay=backend == "overlay",
                links=not shape.rotate,
                engine=self.harness.engine,
            )

        @rule(data=st.data(), kind=st.sampled_from(KINDS))
        def step(self, data: st.DataObject, kind: str) -> None:
            assert self.harness is not None
            if kind in WHOLE:
                self.harness.step(Op(kind))
                return
            self.generator.known.refresh(self.harness.control.root)
            self.harness.step(self.generator.make(Drawn(data), kind))

        def teardown(self) -> None:
            if self.harness is None or self.union is None:
                return
            try:
                self.harness.remount()
                self.union.umount()
            finally:
                self.harness.subject.close()
                self.harness.control.close()
                self.union.abandon()

    return Machine


@pytest.fixture
def base() -> Iterator[Ground]:
    with Ground("unionfs-differential-") as ground:
        yield ground


# The operations themselves, where unionfs has no part in it.
ORACLES = [pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "overlay")]


@pytest.mark.parametrize("backend", [*ORACLES, "unionfs"])
def test_union_is_a_plain_directory(backend: Backend, base: Ground) -> None:
    if backend not in backends():
        pytest.skip(f"backend {backend} not asked for, or not for an ordinary user")
    with run.redirect_limit(backend):
        run_state_machine_as_test(
            machine(base, backend),
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


@pytest.mark.root
@pytest.mark.parametrize("backend", [ORACLES[0], "unionfs"])
def test_seeds_as_an_ordinary_user(backend: Backend, tmp_path: Path) -> None:
    if backend not in backends():
        pytest.skip(f"backend {backend} not asked for")
    why = as_user.why_impossible() or mounted.user_mount_possible()
    if why:
        pytest.skip(why)
    words = ["-m", "tests.differential.run", "--seeds", "2", "--ops", "200", "--backend", backend]
    done = as_user.python(*words, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
