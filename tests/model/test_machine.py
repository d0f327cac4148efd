"""The engine beside a plain model of the rules, driven by Hypothesis: whatever happens, in any order, they agree."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.machine import Machine

TIMES = int(os.environ.get("MODEL_TORTURE", "1"))
SHRINK = bool(os.environ.get("MODEL_SHRINK"))
FAST = Path("/dev/shm")
"""Memory that looks like a disk: nothing here is about power cuts."""

SETTINGS = settings(
    stateful_step_count=50,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink] if SHRINK else [Phase.generate],
    print_blob=False,
)


def drive(machine: type[Machine], examples: int, number: int) -> None:
    """That many examples of 50 steps, the same ones every time. MODEL_SHRINK=1 looks for a shorter failure."""
    run_state_machine_as_test(seed(number)(machine), settings=settings(SETTINGS, max_examples=examples * TIMES))


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FAST if FAST.is_dir() else None) as name:
        yield Path(name)


@pytest.mark.parametrize("number", range(8))
def test_the_engine_on_memory_does_what_the_model_says(number: int) -> None:
    class OnMemory(Machine):
        pass

    drive(OnMemory, 250, number)


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("scheme", ["sqlite", "file"])
def test_the_engine_on_disk_does_what_the_model_says(scheme: str, number: int, folder: Path) -> None:
    names = count()

    class OnDisk(Machine):
        def place(self) -> str:
            return f"{scheme}://{folder}/{next(names)}"

    drive(OnDisk, 100, 100 + number)
