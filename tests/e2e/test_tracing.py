"""Real processes send their spans to a real OTLP receiver: one job is one trace across producer, hub and worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.otlp import Receiver, receiver
from tests.e2e.serving import Served

CLIENT, SERVER, PRODUCER, CONSUMER, INTERNAL = 3, 2, 4, 5, 1
HANDLERS = """
from sheratan_hub.worker import handler
@handler("sync.kind")
def sync(params, job):
    return job.traceparent
@handler("async.kind")
async def sleepless(params, job):
    from opentelemetry import trace
    context = trace.get_current_span().get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
@handler("bad.kind")
def bad(params):
    raise KeyError("secret text")
"""


@pytest.fixture(scope="module")
def told() -> Iterator[Receiver]:
    with receiver() as one:
        yield one


def environ_of(hub: Served) -> dict[str, str]:
    return {
        **hub.environ,
        "HUB_CONTROL_URL": f"http://127.0.0.1:{hub.control_port}",
        "HUB_DATA_URL": f"http://127.0.0.1:{hub.data_port}",
    }


@pytest.fixture(scope="module")
def hub(told: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("traced")
    (folder / "handlers.py").write_text(HANDLERS)
    hub = Served(
        folder,
        OTEL_EXPORTER_OTLP_ENDPOINT=told.url,
        OTEL_BSP_SCHEDULE_DELAY="50",
        SHERATAN_RETRY_BACKOFF_BASE_MS="60000",
    )
    hub.start()
    command = [sys.executable, "-m", "sheratan_hub", "worker", "handlers.py", "--node-id", "n1", "--concurrency", "2"]
    worker = subprocess.Popen(command, cwd=folder, env=environ_of(hub), stderr=subprocess.DEVNULL)
    yield hub
    worker.send_signal(signal.SIGTERM)
    worker.wait(20)
    assert hub.end(signal.SIGTERM) == 0


def submit(hub: Served, kind: str, *more: str) -> str:
    command = [sys.executable, "-m", "sheratan_hub", "submit", kind, "--wait", "20", "-o", "json", *more]
    done = subprocess.run(command, env=environ_of(hub), capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["sync.kind", "async.kind"])
def test_submit_lease_run_and_result_are_one_trace_over_three_processes(hub: Served, told: Receiver, kind: str) -> None:
    said = submit(hub, kind)
    names = [f"{operation} {kind}" for operation in ("submit", "accept", "wait", "lease", "process", "settle")]
    spans = told.until(*names)
    submitted, accepted, waited, leased, ran, settled = (spans[name] for name in names)
    assert {spans[name].trace_id for name in names} == {submitted.trace_id}
    assert submitted.parent_id == ""
    assert {one.parent_id for one in (accepted, waited, leased, ran)} == {submitted.span_id}
    assert settled.parent_id == ran.span_id
    assert [spans[name].kind for name in names] == [PRODUCER, SERVER, INTERNAL, INTERNAL, CONSUMER, CLIENT]
    assert [spans[name].service for name in names] == [
        "sheratan-client",
        *["sheratan-hub"] * 3,
        *["sheratan-worker"] * 2,
    ]
    assert not any(spans[name].error for name in names)
    for one in (spans[name] for name in names):
        assert one.start_ns <= one.end_ns
        assert one.attributes["messaging.system"] == "sheratan_hub"
        assert one.attributes["messaging.destination.name"] == kind
        assert one.attributes["messaging.operation.name"] == one.name.split()[0]
        assert one.attributes["messaging.message.id"] == submitted.attributes["messaging.message.id"]
    types = [
        spans[f"{operation} {kind}"].attributes["messaging.operation.type"]
        for operation in ("submit", "process", "settle")
    ]
    assert types == ["send", "process", "settle"]
    assert (leased.attributes["sheratan.job.outcome"], leased.attributes["sheratan.job.attempt"]) == ("completed", 1)
    assert (ran.attributes["messaging.client.id"], ran.attributes["sheratan.job.attempt"]) == ("n1", 1)
    assert f"00-{ran.trace_id}-{ran.span_id}-01" in said, "its handler is told the span that it runs in"
    assert told.paths == {"/v1/traces"}


def test_a_failure_is_an_error_of_its_spans_and_its_text_stays_at_home(hub: Served, told: Receiver) -> None:
    body = {"kind": "bad.kind", "max_retries": 0}
    trace = f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"
    job_id = hub.ask("POST", "/api/jobs", {**body, "traceparent": trace})["job_id"]
    spans = told.until("lease bad.kind", "process bad.kind", "settle bad.kind", "accept bad.kind")
    mine = [one for one in told.spans if one.attributes.get("messaging.message.id") == job_id]
    assert {one.trace_id for one in mine} == {trace.split("-")[1]}
    assert spans["accept bad.kind"].parent_id == trace.split("-")[2]
    lease, run = spans["lease bad.kind"], spans["process bad.kind"]
    assert (lease.error, lease.attributes["error.type"]) == (True, "RETRIES_EXHAUSTED")
    assert (run.error, run.attributes["error.type"]) == (True, "KeyError")
    assert "secret text" not in str(told.spans)


def test_a_producer_that_does_not_sample_has_no_spans(hub: Served, told: Receiver) -> None:
    silent = f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-00"
    sampled = f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"
    for trace in (silent, sampled):
        job = hub.ask("POST", "/api/jobs", {"kind": "sync.kind", "traceparent": trace})["job_id"]
        assert hub.ask("GET", f"/api/jobs/{job}?wait_seconds=20")["status"] == "completed"
    with told.came:
        ids = lambda: {one.trace_id for one in told.spans if one.name == "settle sync.kind"}  # noqa: E731
        assert told.came.wait_for(lambda: sampled.split("-")[1] in ids(), 20)
    assert silent.split("-")[1] not in {one.trace_id for one in told.spans}


@pytest.mark.parametrize("listens", [False, True], ids=["absent", "silent"])
def test_a_collector_that_takes_nothing_holds_nobody_up(tmp_path: Path, listens: bool) -> None:
    with socket.socket() as collector:
        collector.bind(("127.0.0.1", 0))
        if listens:
            collector.listen()  # the kernel takes what comes, and nobody answers
        url = f"http://127.0.0.1:{collector.getsockname()[1]}"
        settings = {"SHERATAN_MAX_QUEUE_DEPTH": "10000", "SHERATAN_STORE_URL": "memory://"}
        otel = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_TIMEOUT": "300000"}
        hub = Served(tmp_path, **settings, **otel)
        hub.start()
        try:
            trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            jobs = [{"kind": "x", "traceparent": trace}] * 1000
            for _ in range(4):  # more spans than may wait
                assert all(one["ok"] for one in hub.ask("POST", "/api/jobs", {"jobs": jobs})["jobs"])
            submit(hub, "x", "--wait", "0")
        finally:
            assert hub.end(signal.SIGTERM) == 0  # within 20 s, although the exporter would try for 5 minutes
        logs = (tmp_path / "var/logs/hub_data.jsonl").read_text().splitlines()
        assert 1 <= sum("opentelemetry" in line for line in logs) < 50, "it is said, and not for each span"
