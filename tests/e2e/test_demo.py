"""The demo: it runs, it would notice a wrong result, and it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.answers_admin import Mission
from sheratan_hub.client import Job
from tests.e2e.processes import ended, left_in
from tools import demo

DEMO = Path(demo.__file__)


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(DEMO), *arguments],
        env={**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_the_demo_finds_every_result_right_although_the_hub_was_killed(tmp_path: Path, store: str) -> None:
    with start(tmp_path, "--files", "40", "--store", store) as process:
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "80 jobs" in said
    assert re.search(r"mission of 7 jobs in 3 stages: [4-7] done before the kill, 7 now", said)
    assert "its stages ran in order" in said
    assert "the hub was killed (SIGKILL) and is back" in said
    assert "every result is right" in said
    assert list(tmp_path.iterdir()) == []
    assert all(ended(pid) for pid in left_in(tmp_path))


@pytest.mark.parametrize(("store", "other"), [("sqlite", "file"), ("file", "sqlite")])
def test_the_demo_goes_on_on_the_other_store_that_it_was_moved_to_and_stays_to_be_looked_at(
    tmp_path: Path, store: str, other: str
) -> None:
    with start(tmp_path, "--files", "40", "--store", store, "--move", "--stay") as process:
        assert process.stdout is not None
        said = ""
        while " nodes list" not in said:
            said += (line := process.stdout.readline())
            assert line, said
        look = next(line for line in said.splitlines() if line.endswith("nodes list")).split()[1:]
        told = subprocess.run([sys.executable, "-m", "sheratan_hub", *look], capture_output=True, text=True, check=True)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert f"the hub was moved from {store} to {other} and is back" in said
    assert "every result is right" in said
    assert "its stages ran in order" in said
    assert "worker-2" in told.stdout
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process_and_no_file(tmp_path: Path, number: signal.Signals) -> None:
    with start(tmp_path) as process:
        assert process.stdout is not None
        while "done" not in process.stdout.readline():
            assert process.poll() is None
        assert left_in(tmp_path)
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []
    assert all(ended(pid) for pid in left_in(tmp_path))


def job(one: dict[str, Any], **fields: Any) -> Job:
    given = {"result": demo.expect(one), "status": "completed", **fields}
    return Job(job_id="j", kind=one["kind"], params=one["params"], attempt=1, **given)


@pytest.mark.parametrize(
    ("fields", "copies", "doubled", "status"),
    [
        ({}, 1, 0, 0),
        ({"result": {"lines": 1}}, 1, 0, 1),
        ({"status": "failed", "result": None}, 1, 0, 1),
        ({}, 0, 0, 1),
        ({}, 2, 0, 1),
        ({}, 1, 1, 1),
    ],
)
def test_the_verdict_is_good_only_if_each_result_is_there_once_and_right(
    fields: dict[str, Any], copies: int, doubled: int, status: int
) -> None:
    bodies = [demo.body("text.stats", __file__), demo.body("text.words", __file__)]
    jobs = [job(bodies[1]), *[job(bodies[0], **fields)] * copies]
    assert demo.verdict(bodies, demo.Seen(jobs, 1.0, 0.1, doubled)) == status


def graph(**changes: Any) -> demo.Graph:
    """The graph at its end, with these fields of its last job."""
    asked = demo.graph_of([__file__])
    jobs = [job(one, started_at=f"0{stage}:00", finished_at=f"0{stage}:59") for one in asked for stage in one["ref"][0]]
    jobs[-1] = job(asked[-1], **{"started_at": "02:00", "finished_at": "02:59", **changes})
    mission = Mission(mission_id="m", status="completed", jobs=7, progress=1.0)
    return demo.Graph(mission, mission, jobs, known=True)


@pytest.mark.parametrize(
    ("ended", "good"),
    [
        (graph(), True),
        (graph(started_at="01:30"), False),
        (graph(status="failed"), False),
        (graph(result={"lines": 1}), False),
        (graph()._replace(known=False), False),
        (graph()._replace(mission=Mission(mission_id="m", status="running", jobs=7)), False),
    ],
)
def test_the_graph_is_right_only_if_it_ran_in_order_once_and_to_its_end(ended: demo.Graph, good: bool) -> None:
    assert demo.graph_is_right(ended) is good
