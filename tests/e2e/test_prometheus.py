"""A real Prometheus scrapes both planes of a real hub that has done real work; its queries return the right numbers."""

from __future__ import annotations

import hashlib
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Served
from tests.prometheus import Prometheus, alerts, promtool, recorded
from tests.world.test_alert_rules import panel_queries

QUIET = {"Alerts", "Starts"}
"""What the dashboard draws only when something has happened."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    one = Served(tmp_path_factory.mktemp("hub"), SHERATAN_MAX_QUEUE_DEPTH="4", SHERATAN_MAX_INFLIGHT="2")
    try:
        one.start()
        story(one)
        yield one
    finally:
        one.kill()


@pytest.fixture(scope="module")
def prometheus(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has seen the hub after the story, and had the time for a few scrapes more."""
    ports = {"control": served.control_port, "data": served.data_port}
    with Prometheus(tmp_path_factory.mktemp("prometheus"), ports) as one:
        one.scraped_since(time.time())
        served.ask("POST", "/api/jobs", {"kind": "copy"})
        one.scraped_since(time.time())
        yield one


def story(served: Served) -> None:
    """Three jobs done, one failed for good, one waits and two run; and of what can be refused, some of each."""
    for node_id in ("n1", "n2"):
        beat = {
            "node_id": node_id,
            "attestation": {"build_id": "b"},
            "health": "YELLOW" if node_id == "n2" else "GREEN",
        }
        assert served.ask("POST", "/api/hosts/heartbeat", beat, served.control_port)["ok"]
    key = {"kind": "copy", "params": 1, "idempotency_key": "k1"}
    assert [served.ask("POST", "/api/jobs", one)["ok"] for one in (key, key, {**key, "params": 2})] == [
        True,
        True,
        False,
    ]
    for n in range(3):
        if n:
            served.ask("POST", "/api/jobs", {"kind": "copy", "params": n})
        lease = pull(served)
        proof = {"mode": "sha256", "sha256": proved(lease["job_id"], n)}
        if not n:
            bad = {**proof, "sha256": "0" * 64}
            assert finish(served, lease, ok=True, result=n, integrity=bad)["code"] == "result_integrity_fail"
        assert finish(served, lease, ok=True, result=n, integrity=proof)["status"] == "completed"
    served.ask("POST", "/api/jobs", {"kind": "render"})
    assert finish(served, pull(served), ok=False, error="no", retry=False)["status"] == "failed"
    for _ in range(4):
        assert served.ask("POST", "/api/jobs", {"kind": "render", "priority": "HIGH"})["ok"]
    assert served.ask("POST", "/api/jobs", {"kind": "render"})["code"] == "queue_full"
    assert [pull(served)["attempt"] for _ in range(2)] == [1, 1]
    assert served.ask("POST", "/api/jobs/pull", {"node_id": "n1"})["reason"] == "inflight_limit"
    for path, port, token in (("/api/hosts", served.control_port, "wrong"), ("/api/jobs", served.data_port, "wrong")):
        assert refused(path, port, token) == 403
    assert [refused("/api/jobs", served.control_port, "") for _ in range(3)] == [410] * 3


def proved(job_id: str, result: int) -> str:
    text = f'{{"error":null,"job_id":"{job_id}","ok":true,"result":{result}}}'
    return hashlib.sha256(text.encode()).hexdigest()


def pull(served: Served) -> Any:
    (lease,) = served.ask("POST", "/api/jobs/pull", {"node_id": "n1"})["jobs"]
    return lease


def finish(served: Served, lease: Any, **fields: Any) -> Any:
    return served.ask("POST", f"/api/jobs/{lease['job_id']}/result", {"lease_id": lease["lease_id"], **fields})


def refused(path: str, port: int, token: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {token}"})
    with pytest.raises(urllib.error.HTTPError) as told:
        urllib.request.urlopen(request, timeout=10)
    with told.value as answer:
        return answer.code


NUMBERS = {
    'up{job="sheratan-control"} + on (hub) up{job="sheratan-data"}': 2,
    'sum(sheratan_jobs{status="completed"})': 3,
    'sum(sheratan_jobs{status="failed"})': 1,
    'sum(sheratan_jobs{status="running"})': 2,
    'sum(sheratan_jobs{status="pending"})': 3,
    'sum(sheratan_events_total{event="job.submitted"})': 9,
    "sum(sheratan_leases_granted_total)": 6,
    "sum(sheratan_leases)": 2,
    'sum(sheratan_attempts_total{outcome="completed"})': 3,
    'sum(sheratan_attempts_total{outcome="failed"})': 1,
    'sum(sheratan_dead_letters_total{reason="NOT_RETRYABLE"})': 1,
    "sum(sheratan_dead_letters_total)": 1,
    "sum(sheratan_idempotency_hits_total)": 1,
    "sum(sheratan_idempotency_collisions_total)": 1,
    'sum(sheratan_result_integrity_total{result="ok"})': 3,
    'sum(sheratan_result_integrity_total{result="sha_mismatch"})': 1,
    'sum(sheratan_submits_limited_total{reason="queue_full"})': 1,
    "sum(sheratan_pulls_saturated_total)": 1,
    'sum(sheratan_nodes{state="ONLINE"})': 2,
    'sum(sheratan_node_health{health="YELLOW"})': 1,
    'sum(sheratan_node_attestations{status="OK"})': 2,
    "sum(sheratan_auth_failures_total)": 2,
    'sum(sheratan_port_mismatches_total{plane="control"})': 3,
    'sum(sheratan_http_requests_total{plane="data",route="/api/jobs",status="429"})': 1,
    'sum(sheratan_http_requests_total{plane="control",route="unmatched",status="410"})': 3,
    'sum(sheratan_ready_jobs{priority="HIGH"})': 2,
    'sum(sheratan_job_wait_seconds_count{kind="render"})': 3,
    'sum(sheratan_job_run_seconds_count{kind="copy"})': 3,
    'sum(sheratan_job_end_to_end_seconds_bucket{le="60.0"})': 3,
    "hub:sheratan_queue_fill:ratio": 0.75,
    "hub:sheratan_lease_fill:ratio": 1,
    'increase(sheratan_events_total{event="job.submitted"}[1m]) > bool 0': 1,
    "sum(sheratan_store_up) + sum(sheratan_audit_writable)": 2,
}


def test_queries_return_the_right_numbers(prometheus: Prometheus) -> None:
    assert {expr: prometheus.value(expr) for expr in NUMBERS} == NUMBERS


def test_it_reads_every_rule_and_finds_all_of_them_well(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {alert.name for alert in alerts()} | recorded()
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []


def test_nothing_fires_on_a_hub_that_is_well(prometheus: Prometheus) -> None:
    """Its story was over before the first scrape, so no rate saw any of it."""
    assert prometheus.query('ALERTS{alertstate="firing"}') == {}


def test_every_query_of_the_dashboard_brings_something(prometheus: Prometheus) -> None:
    asked = [
        (panel, query.replace("$hub", "main").replace("$__rate_interval", "1m")) for panel, query in panel_queries()
    ]
    assert not any("$" in expr for _, expr in asked)
    found = {(panel, expr): prometheus.query(expr) for panel, expr in asked}
    assert [one for one, told in found.items() if not told and one[0] not in QUIET] == []


def test_the_dashboard_finds_the_hub_by_its_variable(prometheus: Prometheus) -> None:
    board = json.loads((Path(__file__).parents[2] / "tools/deploy/grafana/sheratan-hub.json").read_text())
    (asked,) = (one["query"]["query"] for one in board["templating"]["list"] if one["name"] == "hub")
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", asked)
    assert found
    told = prometheus.ask(f"label/{found[2]}/values", **{"match[]": found[1]})
    assert told == ["main"]


@pytest.mark.parametrize("plane", ["control", "data"])
def test_promtool_finds_nothing_to_say_about_the_metrics(served: Served, plane: str) -> None:
    port = served.control_port if plane == "control" else served.data_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert promtool("check", "metrics", told=text) == ""
