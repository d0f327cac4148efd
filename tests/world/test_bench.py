"""The benchmark and the load tool: their arithmetic, that they notice refusals, and that they end in time."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from tools import load
from tools.bench import rows, tooling
from tools.bench.chains import CHAINS, KIND, Dry, Tally, Wrong
from tools.bench.client import Client, Order
from tools.bench.figures import TARGETS, Failed, Line, Target, Window, alternate, line
from tools.bench.requests import KEY, KEY_DIGITS, PARAMS, RESULT, Wire, keyed
from tools.bench.servers import Hub, hub
from tools.bench.windows import Load

ROOT = Path(__file__).resolve().parents[2]
HERE = os.sched_getaffinity(0)


def window(rate: float, p99_ms: float = 1.0) -> Window:
    return Window(rate, 0.5, p99_ms)


# Arithmetic


def test_each_window_is_compared_with_the_two_beside_it_and_the_median_counts():
    base = iter([window(100), window(300), window(100), window(100)])
    mine = iter([window(100), window(200), window(90)])
    found = alternate(lambda: next(base), {"a": lambda: next(mine)}, 3)["a"]
    assert [one.ratio() for one in found] == [0.5, 1.0, 0.9]
    told = line("sqlite", "submit", "a", "", found, {"ratio": "rate", "p99 ratio": "p99_ms"})
    assert told.figures == {"ratio": 0.9, "p99 ratio": 1.0}
    assert told.window == Window(100, 0.5, 1.0)


def test_two_sides_take_turns_between_windows_of_the_base():
    order: list[str] = []

    def measure(name: str) -> Callable[[], Window]:
        return lambda: order.append(name) or window(1.0)  # type: ignore[func-returns-value]

    alternate(measure("-"), {"a": measure("a"), "b": measure("b")}, 2)
    assert "".join(order) == "-a-b-a-b-"


def test_a_missed_target_is_told_but_a_goal_binds_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(TARGETS, ("submit", "ratio"), Target("least", 0.5))
    monkeypatch.setitem(TARGETS, ("keys", "ratio"), Target("least", 0.5, goal=True))
    assert [Line("sqlite", "submit", figures={"ratio": ratio}).missed() for ratio in (0.49, 0.5)] == [True, False]
    assert not Line("sqlite", "keys", figures={"ratio": 0.1}).missed()
    assert Target("most", 3).met(3.0)
    assert not Target("most", 3).met(3.1)


def test_payloads_have_the_size_that_is_told():
    assert (len(orjson.dumps(PARAMS)), len(orjson.dumps(RESULT))) == (200, 100)
    (request,) = keyed(Wire(1, "t"), "w")
    head, _, body = request.replace(KEY.encode(), b"1" * KEY_DIGITS).partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(body) in head


# Chains of our own client


class Pretended:
    """Answers as a hub does, from a queue of so many jobs."""

    def __init__(self, queued: int) -> None:
        self.queued, self.done = queued, 0

    def answer(self, request: bytes) -> bytes:
        head, _, text = request.partition(b"\r\n\r\n")
        body = orjson.loads(text)
        answer: dict[str, Any] = {"ok": True}
        if b"/result" in head:
            entries = body.get("results", [body])
            self.done += len(entries)
            answer["results"] = [{"status": "completed"} for _ in entries]
        elif "jobs" in body:
            self.queued += len(body["jobs"])
            return b'"accepted"' * len(body["jobs"])
        pull = body.get("pull", body)
        n = min(pull.get("max", 0), self.queued)
        self.queued -= n
        answer["jobs"] = [{"job_id": "j", "lease_id": "l", "kind": KIND}] * n
        return orjson.dumps(answer)

    def run(self, name: str, jobs: int) -> Tally:
        tally = Tally(Wire(1, "t"), jobs)
        chain = CHAINS[name](tally, 0)
        try:
            request = next(chain)
            while True:
                request = chain.send(self.answer(request))
        except StopIteration:
            return tally


@pytest.mark.parametrize("name", ["pull+result", "result-pull", "batches", "drain", "steady"])
def test_a_chain_ends_every_lease_it_took_and_counts_each_job_once(name: str):
    pretended = Pretended(5000)
    tally = pretended.run(name, 1000)
    assert (tally.done, pretended.done) == (1000, 1000)
    assert pretended.queued == (5000 if name == "steady" else 4000)


def test_a_drain_takes_no_more_than_it_was_told():
    pretended = Pretended(500)
    assert pretended.run("drain", 250).done == 250
    assert pretended.queued == 250


def test_a_fill_submits_what_it_was_told_and_an_empty_queue_is_noticed():
    pretended = Pretended(0)
    assert pretended.run("fill", 1500).done == pretended.queued == 1500
    with pytest.raises(Dry):
        Pretended(10).run("pull+result", 11)


def test_results_of_a_batch_that_were_not_taken_are_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Pretended, "answer", lambda self, request: FEWER.pop(0))
    lease = {"job_id": "j", "lease_id": "l", "kind": KIND}
    FEWER = [orjson.dumps({"jobs": [lease]}), orjson.dumps({"results": [{"ok": False}]})]
    with pytest.raises(Wrong, match="0 of 1 results"):
        Pretended(1).run("drain", 1)


# Real processes


@pytest.fixture(scope="module")
def tools_there() -> None:
    for name in ("wrk", "gcc"):
        assert shutil.which(name), f"{name} is not there: apt-get install {name}"


@pytest.fixture
def full(tmp_path: Path, tools_there: None) -> Iterator[Hub]:
    """A hub whose queue holds five jobs at most."""
    with hub(ROOT, "memory", tmp_path, HERE, SHERATAN_MAX_QUEUE_DEPTH="5") as one:
        yield one


def test_a_run_of_one_row_writes_its_figures_and_leaves_nothing_behind(tmp_path: Path, tools_there: None):
    told, made = tmp_path / "told.json", tmp_path / "made"
    made.mkdir()
    command = [sys.executable, "-m", "tools.bench", "--stores", "sqlite", "--only", "submit", "--seconds", "0.3"]
    command += ["--windows", "1", "--dir", str(made), "--json", str(told)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = {one["row"]: one for one in json.loads(told.read_text())["lines"]}
    assert lines.keys() == {"submit", "empty"}
    for one in lines.values():
        assert one["rate"] > 0
        assert 0 < one["p50_ms"] <= one["p99_ms"]
    assert lines["submit"]["cpu_s"] > 0
    assert lines["submit"]["figures"]["ratio"]["target"] == str(TARGETS["submit", "ratio"])
    assert "submit" in done.stdout
    assert list(made.iterdir()) == []


def test_our_own_client_measures_single_jobs_of_a_hub_that_takes_five(full: Hub, tmp_path: Path):
    found = bench(tmp_path).idles(full, 0.2)
    assert found.rate > 0
    assert 0 < found.p50_ms <= found.p99_ms
    report = Client(Order(full.port, full.token, "idle", 1, 0.1)).run()
    assert not report.error
    assert 0 <= report.requests - 2 * report.jobs <= 2  # a job that was done too late is not counted
    assert full.depth() == 0


def test_a_row_whose_hub_cannot_start_fails_the_run_and_the_others_go_on(tmp_path: Path, tools_there: None):
    (tmp_path / "sheratan_hub.py").write_text("raise SystemExit('no such store')")
    with pytest.raises(Failed, match="no such store"), hub(tmp_path, "memory", tmp_path, HERE):
        pass
    assert not list(tmp_path.glob("hub-*"))
    lines = list(rows.against_empty(bench(tmp_path, sides={"": tmp_path}), "memory", "submit"))
    assert [(one.row, "no such store" in one.error) for one in lines] == [("submit", True)]
    assert lines[0].document()["error"]


def bench(folder: Path, **fields: Any) -> rows.Bench:
    given = {"folder": folder, "load": Load(HERE, folder), "core": HERE, "empty": None, "seconds": 0.3, "windows": 1}
    return rows.Bench(**{**given, "sides": {"": ROOT}, "queued": 1, "shim": None, **fields})


def test_refusals_fail_a_window_of_wrk(full: Hub, tmp_path: Path):
    with pytest.raises(Failed, match="bad_status"):
        rows.submit(Load(HERE, tmp_path), full, 0.3, 1)


def test_refusals_fail_a_window_of_our_own_client(full: Hub, tmp_path: Path):
    with pytest.raises(Failed, match=r"429.*queue_full"):
        Load(HERE, tmp_path).own(full, "empty", 0.3, 1)


def test_jobs_that_were_acknowledged_but_are_not_queued_fail_a_window(tmp_path: Path):
    deep: Any = SimpleNamespace(depth=iter([10, 14]).__next__)
    with pytest.raises(Failed, match="5 jobs were acknowledged, but the queue has only 4 more"):
        bench(tmp_path).submits(lambda *_: (5, window(1.0)), deep, 0.3)


def test_a_compiled_shim_slows_both_flushes_and_hides_no_error(tmp_path: Path, tools_there: None):
    code = """if True:
        import os, time
        for flush in (os.fsync, os.fdatasync):
            began = time.monotonic()
            flush(os.open("flushed", os.O_CREAT | os.O_WRONLY))
            assert time.monotonic() - began >= 0.02
            try:
                flush(99)
            except OSError:
                continue
            raise SystemExit("an error was hidden")
    """
    environ = {**os.environ, "LD_PRELOAD": str(tooling.build_shim(tmp_path)), "SLOW_FLUSH_MS": "20"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


# The load tool


def test_the_load_tool_counts_refusals_ends_its_leases_and_stops_in_time(full: Hub):
    command = [
        sys.executable,
        "tools/load.py",
        "--data-url",
        f"http://127.0.0.1:{full.port}",
        "--json",
        "--rate",
        "200",
    ]
    command += ["--seconds", "0.5", "--mix", "submit=4,bulk=1,work=1", "--bulk-jobs", "10"]
    began = time.monotonic()
    environ = {**os.environ, "SHERATAN_HUB_TOKEN": full.token}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 1 + load.GRACE_SECONDS
    told = json.loads(done.stdout)
    verbs = told["verbs"]
    assert verbs["submit"]["refused"]["429 queue_full"] > 0
    assert verbs["bulk"]["refused"].keys() <= {"429 queue_full", "429 queue_full (jobs of a bulk)"}
    assert not any(verb["connection_errors"] for verb in verbs.values())
    assert sum(verb["sent"] for verb in verbs.values()) <= 200 * (time.monotonic() - began) + 1
    assert told["jobs_completed"] > 0
    assert told["leases_left"] == 0
    assert told["jobs_left_queued"] == full.depth() <= 5
    assert full.ask("/metrics?format=json")["inflight_jobs"] == 0


def test_the_load_tool_says_when_nobody_answers_and_when_its_token_is_wrong(
    full: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("SHERATAN_HUB_TOKEN", "wrong")
    options = ["--rate", "20", "--seconds", "0.2"]
    assert load.main(["--data-url", "http://127.0.0.1:1", *options]) == load.EXIT_UNREACHABLE
    assert load.main(["--data-url", f"http://127.0.0.1:{full.port}", *options]) == load.EXIT_REFUSED
    assert "403 invalid_token" in capsys.readouterr().out


async def test_a_latency_counts_from_the_moment_a_request_was_due(monkeypatch: pytest.MonkeyPatch):
    one = load.Load(None, load.parse(["--rate", "10"]))  # type: ignore[arg-type]

    async def post(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        return 201, {}

    monkeypatch.setattr(one, "post", post)
    await one.send("submit", time.monotonic() - 5, None)
    assert one.verbs["submit"].latencies.max_ms >= 5000


async def test_a_lease_that_comes_when_time_is_up_is_ended_and_its_result_sent_until_it_is_taken(
    monkeypatch: pytest.MonkeyPatch,
):
    one = load.Load(None, load.parse(["--rate", "0", "--seconds", "30", "--mix", "work=1"]))  # type: ignore[arg-type]
    answers: list[Any] = [TimeoutError(), (503, {"code": "busy"}), (200, {"status": "completed"})]
    pulled = [{"job_id": "j", "lease_id": "l"}]

    async def post(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        await asyncio.sleep(0)
        if path.endswith("/pull"):
            one.stop()
            return 200, {"jobs": [pulled.pop()] if pulled else []}
        answer = answers.pop(0)
        if isinstance(answer, TimeoutError):
            raise answer
        return answer  # type: ignore[no-any-return]

    monkeypatch.setattr(one, "post", post)
    monkeypatch.setattr(load, "LOST_PAUSE_SECONDS", 0)
    await one.run()
    assert (answers, one.completed, one.document()["leases_left"]) == ([], 1, 0)
    assert one.verbs["result"].document(1)["refused"] == {"503 busy": 1}


def test_quantiles_are_right_within_one_percent():
    found = load.Latencies()
    for ms in range(1, 1001):
        found.add(float(ms))
    assert [found.quantile(share) for share in (0.5, 0.99)] == [
        pytest.approx(500, rel=0.01),
        pytest.approx(990, rel=0.01),
    ]
    assert found.max_ms == 1000.0
    assert load.Latencies().quantile(0.5) is None


@pytest.mark.parametrize("mix", ["nonsense=1", "submit=-1", "submit=0", "submit=x"])
def test_a_mix_that_means_nothing_is_refused(mix: str):
    with pytest.raises(SystemExit):
        load.parse(["--mix", mix])
