"""`sheratan-hub worker` in real processes, against a real hub: what survives which death."""

from __future__ import annotations

import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.processes import ended
from tests.e2e.serving import Served
from tools import canaries

MODULE = Path(__file__).with_name("handlers_for_tests.py")


SECONDS = 20
"""How long a test waits for what must happen."""


class Spoken:
    """A worker's process; what it says is read as it comes."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        command = [sys.executable, "-m", "sheratan_hub", "worker", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr:
            for line in self.process.stderr:
                self.lines.put(line)

    def said(self, word: str) -> str:
        """The next line that has `word` in it."""
        while word not in (line := self.lines.get(timeout=SECONDS)):
            pass
        return line

    def rest(self) -> str:
        """What it says until its end."""
        self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        return "".join(self.lines.queue)


class Held(NamedTuple):
    """A job that runs until the file `until` is there."""

    job_id: str
    fifo: int
    until: Path

    def pid(self) -> int:
        """The process that runs it, once it does."""
        assert select.select([self.fifo], [], [], SECONDS)[0]
        with open(self.fifo) as tells:
            return int(tells.readline())


class Crew:
    """A hub and the workers started for it."""

    def __init__(self, directory: Path, **environ: str) -> None:
        self.directory = directory
        quick = {"SHERATAN_RETRY_BACKOFF_BASE_MS": "10", "SHERATAN_RESTART_GRACE_SEC": "1"}
        self.served = Served(directory, **{**quick, **environ})
        self.scratch = tempfile.TemporaryDirectory(prefix="crew-")  # where a killed worker leaves its sockets
        self.environ = {
            **self.served.environ,
            "TMPDIR": self.scratch.name,
            "HUB_CONTROL_URL": f"http://127.0.0.1:{self.served.control_port}",
            "HUB_DATA_URL": f"http://127.0.0.1:{self.served.data_port}",
        }
        self.workers: list[Spoken] = []

    def worker(self, *arguments: str, **environ: str) -> Spoken:
        self.workers.append(Spoken(str(MODULE), *arguments, cwd=self.directory, env={**self.environ, **environ}))
        return self.workers[-1]

    def submit(self, kind: str, params: Any = None, **fields: Any) -> str:
        answer = self.served.ask("POST", "/api/jobs", {"kind": kind, "params": params or {}, **fields})
        job_id: str = answer["job_id"]
        return job_id

    def finished(self, job_id: str) -> Any:
        """The job at its end."""
        job = self.served.ask("GET", f"/api/jobs/{job_id}?wait_seconds={SECONDS}")
        assert job["status"] in ("completed", "failed", "cancelled"), job
        return job

    def hold(self, kind: str = "hold", **fields: Any) -> Held:
        n = len(list(self.directory.glob("*.fifo")))
        fifo, until = self.directory / f"{n}.fifo", self.directory / f"{n}.until"
        os.mkfifo(fifo)
        opened = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        return Held(self.submit(kind, {"tell": str(fifo), "until": str(until)}, **fields), opened, until)

    def end(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.rest()
        self.served.kill()
        self.scratch.cleanup()


@pytest.fixture
def make_crew(tmp_path: Path) -> Iterator[Callable[..., Crew]]:
    crews: list[Crew] = []

    def make(**environ: str) -> Crew:
        crews.append(Crew(tmp_path, **environ))
        crews[-1].served.start()
        return crews[-1]

    yield make
    for crew in crews:
        crew.end()


def test_each_way_a_handler_can_end_reaches_the_hub(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(
        SHERATAN_RESULT_INTEGRITY="hmac",
        SHERATAN_RESULT_INTEGRITY_REQUIRED="1",
        SHERATAN_RESULT_HMAC_KEY=canaries.HMAC,
    )
    worker = crew.worker("--node-id", "w", "--concurrency", "2")
    jobs = {
        kind: crew.submit(kind, {"a": 1, "b": 2}, max_retries=1) for kind in ("add", "where", "pid", "raise", "exit")
    }
    died = crew.submit("die", max_retries=0)
    found = {kind: crew.finished(job_id) for kind, job_id in jobs.items()}
    assert found["add"]["result"] == 3
    assert found["add"]["node_id"] == "w"
    assert found["where"]["result"] == {"pid": worker.process.pid, "attempt": 1}
    assert found["pid"]["result"] not in (None, worker.process.pid)
    assert (found["raise"]["reason"], found["raise"]["attempt"]) == ("NOT_RETRYABLE", 1)
    assert (found["exit"]["error"]["type"], found["exit"]["attempt"]) == ("SystemExit", 2)
    assert crew.finished(died)["error"]["type"] == "ProcessDied"
    assert crew.finished(crew.submit("add", {"a": 2, "b": 2}))["result"] == 4


def test_a_handler_that_takes_too_long_is_killed_even_if_it_ignores_signals(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew()
    crew.worker("--concurrency", "1")
    held = crew.hold("stubborn", timeout_seconds=0.5, max_retries=0)
    pid = held.pid()
    assert crew.finished(held.job_id)["error"]["type"] == "Timeout"
    assert ended(pid)
    assert crew.finished(crew.submit("add", {"a": 1, "b": 1}))["result"] == 2


def test_a_cancelled_job_ends_its_process(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(SHERATAN_LEASE_TIMEOUT="2")
    crew.worker("--concurrency", "1")
    held = crew.hold()
    pid = held.pid()
    crew.served.ask("POST", f"/api/jobs/{held.job_id}/cancel", {})
    job = crew.finished(held.job_id)
    assert (job["status"], job["error"]["type"]) == ("cancelled", "Cancelled")
    assert ended(pid)


def test_sigterm_finishes_what_can_be_finished_releases_the_rest_and_exits_0(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew()
    worker = crew.worker("--concurrency", "2", "--grace", "1")
    quick, slow = crew.hold(), crew.hold()
    pids = quick.pid(), slow.pid()
    worker.process.send_signal(signal.SIGTERM)
    assert "2 jobs running" in worker.said("stopping")
    quick.until.touch()
    assert crew.finished(quick.job_id)["result"] == "held"
    worker.rest()
    assert worker.process.returncode == 0
    released = crew.served.ask("GET", f"/api/jobs/{slow.job_id}")
    assert (released["status"], released["attempt"], released["losses"], released["failures"]) == ("pending", 1, 0, 0)
    assert all(ended(pid) for pid in pids)


def test_handlers_ended_by_a_signal_to_the_whole_group_are_no_failure_of_their_jobs(
    make_crew: Callable[..., Crew],
) -> None:
    crew = make_crew()
    worker = crew.worker("--concurrency", "1")
    held = crew.hold()
    held.pid()
    os.killpg(worker.process.pid, signal.SIGTERM)
    worker.rest()
    assert worker.process.returncode == 0
    job = crew.served.ask("GET", f"/api/jobs/{held.job_id}")
    assert (job["status"], job["failures"], job["losses"]) == ("pending", 0, 0)


def test_a_second_signal_ends_worker_and_handlers_at_once(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew()
    worker = crew.worker("--concurrency", "1", "--grace", "60")
    pid = crew.hold().pid()
    worker.process.send_signal(signal.SIGINT)
    worker.said("stopping")
    timer = threading.Timer(0.5, worker.process.send_signal, [signal.SIGINT])  # sooner, it counts as the same one
    timer.start()
    worker.rest()
    assert worker.process.returncode == 128 + signal.SIGINT
    timer.join()
    assert ended(pid)


def test_the_job_of_a_worker_that_was_killed_goes_to_another(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew(SHERATAN_LEASE_TIMEOUT="2")
    first = crew.worker("--node-id", "first", "--concurrency", "1")
    held = crew.hold()
    pid = held.pid()
    first.process.kill()
    crew.worker("--node-id", "second", "--concurrency", "1")
    job = crew.finished(held.job_id)
    assert (job["result"], job["node_id"], job["losses"]) == ("attempt 2", "second", 1)
    assert ended(pid)


def test_a_hub_that_was_killed_and_came_back_gets_the_results_of_meanwhile(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew()
    worker = crew.worker("--concurrency", "1", "--wait", "1")
    held = crew.hold()
    held.pid()
    crew.served.kill()
    held.until.touch()
    worker.said("HUB_UNREACHABLE")
    crew.served.start()
    job = crew.finished(held.job_id)
    assert (job["result"], job["attempt"]) == ("held", 1)
    worker.said("HUB_UNREACHABLE is over")
    assert crew.finished(crew.submit("add", {"a": 1, "b": 1}))["result"] == 2


def test_a_worker_with_a_wrong_token_says_so_and_shows_no_token(make_crew: Callable[..., Crew]) -> None:
    crew = make_crew()
    worker = crew.worker("--wait", "1", SHERATAN_HUB_TOKEN="canary-wrong-token")
    line = worker.said("AUTH_FAIL")
    worker.process.send_signal(signal.SIGTERM)
    rest = worker.rest()
    assert worker.process.returncode == 0
    assert "AUTH_FAIL" not in rest
    assert "canary" not in line + rest


@pytest.mark.parametrize(("module", "word"), [("nowhere.py", "nowhere.py"), ("json", "registers no handler")])
def test_a_module_that_is_no_use_is_wrong_usage(tmp_path: Path, module: str, word: str) -> None:
    worker = Spoken(module, cwd=tmp_path)
    said = worker.rest()
    assert (worker.process.returncode, word in said) == (2, True)
    assert "Traceback" not in said
