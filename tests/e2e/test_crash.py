"""The crash test: a hub keeps its promises however often it is killed, and one that does not is found out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.e2e.processes import ended, left_in
from tools import crash, crash_hub

FORGETFUL = """
from itertools import count
from sheratan_stores import sqlite

numbers = count(1)
sqlite.commit = lambda db: db.execute("COMMIT" if next(numbers) % 15 else "ROLLBACK")
"""
"""A SQLite store that says of every 15th transaction that it was saved, and forgets it."""


def start(tmp_path: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, crash.__file__, "--json", str(tmp_path / "figures.json"), *arguments],
        env={**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "200", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(tmp_path: Path, *arguments: str, **environ: str) -> tuple[int, str, dict[str, Any]]:
    """(exit status, what it says, its figures)"""
    with start(tmp_path, *arguments, **environ) as process:
        said = process.communicate(timeout=150)[0]
    return process.returncode, said, json.loads((tmp_path / "figures.json").read_text())


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_a_hub_that_is_killed_ten_times_keeps_every_promise(tmp_path: Path, store: str) -> None:
    status, said, figures = run(tmp_path, "--store", store)
    assert status == 0, said
    assert figures["kills"] == 10
    assert figures["violations"] == []
    assert min(figures[name] for name in ("submits acknowledged", "results acknowledged", "deliveries")) > 50
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert all(ended(pid) for pid in left_in(tmp_path))


def test_a_store_that_forgets_is_found_out_with_the_story_of_a_job(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FORGETFUL)
    status, said, figures = run(tmp_path, "--kills", "3", PYTHONPATH=str(tmp_path))
    assert status == 1
    assert "promises were broken" in said
    assert any(violation.get("story") for violation in figures["violations"])


def test_a_hub_that_does_not_start_again_is_reported_with_its_words(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "hub.db").write_text("no database, but long enough to look at" * 100)
    status, said, figures = run(tmp_path, "--dir", str(place))
    assert status == 1
    assert "ended by itself with 78" in said
    assert "the hub has gone" in [violation["what"] for violation in figures["violations"]]


def test_an_interrupted_run_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    with start(tmp_path) as process:
        while not left_in(tmp_path):
            assert process.poll() is None
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 128 + 15
    assert list(tmp_path.iterdir()) == []
    assert all(ended(pid) for pid in left_in(tmp_path))


@pytest.mark.parametrize("kills", [1, 2, 8, 98])
def test_a_seed_means_the_same_kills_every_time(kills: int) -> None:
    plan = list(crash_hub.plan(Random(5), kills))
    assert plan == list(crash_hub.plan(Random(5), kills))
    assert len(plan) == kills
    assert kills < 98 or {(kill.ready, kill.trap) for kill in plan} == {(False, False), (True, False), (True, True)}
