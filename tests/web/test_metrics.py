"""Both planes' metrics: Prometheus text, OpenMetrics, and the fleet's JSON; right counts, nothing confidential."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import NodeSettings, QueueSettings
from tests.conftest import TOKEN, MakeSite, Site

PLANES = ["control", "data"]
CONTROL_KEYS = {
    *("nodes_online", "nodes_stale", "nodes_dead", "auth_fail_rate_1m", "port_mismatch_rate_1m"),
    *("auth_success_active_1m", "auth_failure", "attestation_ok", "attestation_missing", "attestation_drift"),
}
"""Those of the contract that exist by now; rotation and spoof signals come later."""
DATA_KEYS = {
    *("queue_depth", "inflight_jobs", "retry_rate_1m", "queue_drop_1m", "inflight_saturated_1m"),
    *("retry_scheduled_1m", "lease_reap_1m", "dlq_size", "idempotent_hits_1m", "idempotent_collisions_1m"),
    *("idempotency_store_size", "integrity"),
}
NESTED = ("auth_failure", "integrity")
CONFIDENTIAL = {"params": "canary-params", "key": "canary-key-0123456789", "result": "canary-result", "token": TOKEN}
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


async def told(site: Site, plane: str) -> Any:
    status, body, headers = await site.ask(plane, "GET", "/metrics?format=json")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    return body


async def samples(site: Site, plane: str = "data") -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample of the text format by its name and label values."""
    status, text, _ = await site.ask(plane, "GET", "/metrics")
    assert status == 200
    families = parse_text(text)
    return {(one.name, tuple(one.labels.values())): one.value for family in families for one in family.samples}


async def story(site: Site, clock: VirtualClock) -> None:
    """One of everything that is counted; the queue holds 3, 2 may be in flight."""
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "dead"})
    await clock.advance(15_000)
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "stale", "attestation": {"build_id": "b"}})
    await clock.advance(9_000)
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    job = {"kind": "work", "params": CONFIDENTIAL["params"], "idempotency_key": CONFIDENTIAL["key"]}
    for body in (job, job, {**job, "params": "other"}):
        await site.data("POST", "/api/jobs", body)
    done = await site.lease()
    bad = {"mode": "sha256", "sha256": "0" * 64}
    await site.finish(done, result=CONFIDENTIAL["result"], integrity=bad)
    await site.finish(done, result=CONFIDENTIAL["result"])
    await site.submit("failing", max_retries=0)
    await site.finish(await site.lease(), ok=False, error=CONFIDENTIAL["result"])
    await site.submit("retried")
    await site.finish(await site.lease(), ok=False, retry_after_seconds=3000)
    await site.submit("lost", timeout_seconds=1000)
    await site.lease()
    await clock.advance(12_000)
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    for _ in range(3):
        await site.data("POST", "/api/jobs/pull", {"node_id": "n1"})
        await site.submit("held")
    await site.data("POST", "/api/jobs", {"kind": "more"})
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
        await site.control("GET", "/api/hosts", headers=headers)
    await site.control("GET", "/api/jobs")


@pytest.fixture
async def clock_and_site(make_site: MakeSite) -> tuple[VirtualClock, Site]:
    clock = VirtualClock()
    nodes = NodeSettings(ttl_seconds=20, dead_seconds=30)
    queue = QueueSettings(max_depth=3, max_inflight=2, lease_seconds=10)
    site = await make_site(clock=clock, nodes=nodes, queue=queue)
    await story(site, clock)
    return clock, site


async def test_the_data_planes_json_tells_the_story(clock_and_site: tuple[VirtualClock, Site]) -> None:
    clock, site = clock_and_site
    body = await told(site, "data")
    assert set(body) >= DATA_KEYS
    now = {"queue_depth": 3, "inflight_jobs": 2, "dlq_size": 1, "idempotency_store_size": 1}
    minute = {"retry_scheduled_1m": 1, "retry_rate_1m": 2, "lease_reap_1m": 1, "inflight_saturated_1m": 1}
    minute |= {"queue_drop_1m": 1, "idempotent_hits_1m": 1, "idempotent_collisions_1m": 1}
    expected = {**now, **minute, "integrity": {"ok_1m": 0, "fail_1m": 1}}
    assert {name: body[name] for name in expected} == expected
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    await clock.advance(61_000)
    later = await told(site, "data")
    assert [later[name] for name in minute if name not in ("retry_rate_1m", "lease_reap_1m")] == [0] * 5
    assert later["integrity"] == {"ok_1m": 0, "fail_1m": 0}


async def test_the_control_planes_json_tells_the_story(clock_and_site: tuple[VirtualClock, Site]) -> None:
    clock, site = clock_and_site
    body = await told(site, "control")
    assert set(body) >= CONTROL_KEYS
    expected = {"nodes_online": 1, "nodes_stale": 1, "nodes_dead": 1, "auth_fail_rate_1m": 2}
    expected |= {"port_mismatch_rate_1m": 1, "attestation_ok": 1, "attestation_missing": 2, "attestation_drift": 0}
    assert {name: body[name] for name in expected} == expected
    assert body["auth_failure"]["invalid_1m"] == 1
    assert body["auth_success_active_1m"] > 10
    await clock.advance(61_000)
    later = await told(site, "control")
    assert [later[name] for name in ("auth_fail_rate_1m", "port_mismatch_rate_1m", "auth_success_active_1m")] == [0] * 3
    assert (later["nodes_online"], later["nodes_dead"]) == (0, 3)


async def test_the_text_tells_the_same_story(clock_and_site: tuple[VirtualClock, Site]) -> None:
    _, site = clock_and_site
    found = {**await samples(site, "control"), **await samples(site)}
    jobs = {status: found["sheratan_jobs", (status,)] for status in ("pending", "running", "completed", "failed")}
    assert jobs == {"pending": 3, "running": 2, "completed": 1, "failed": 1}
    assert {state: found["sheratan_nodes", (state,)] for state in ("ONLINE", "STALE", "DEAD")} == {
        **{"ONLINE": 1, "STALE": 1, "DEAD": 1}
    }
    assert found["sheratan_idempotency_keys", ()] == 1
    refusals = {("control", "invalid_token"): 1, ("control", "missing_token"): 1, ("control", "port_mismatch"): 1}
    refusals |= {("data", "queue_full"): 1, ("data", "idempotency_key_collision"): 1}
    refusals |= {("data", "result_integrity_fail"): 1, ("data", "port_mismatch"): 0, ("control", "queue_full"): 0}
    told = {labels: found["sheratan_refusals_total", tuple(sorted(labels, reverse=True))] for labels in refusals}
    assert told == refusals
    events = {"job.completed": 1, "job.retry": 1, "job.lost": 1, "job.failed": 1, "key.hit": 1, "pull.saturated": 1}
    assert {name: found["sheratan_events_total", (name,)] for name in events} == events
    assert found["sheratan_http_requests_total", ("data", "/api/jobs", "429")] == 1
    assert found["sheratan_http_requests_total", ("data", "/api/jobs/{id}/result", "422")] == 1
    assert found["sheratan_http_requests_total", ("control", "unmatched", "410")] == 1


async def test_what_is_checked_and_right_counts_as_integrity_ok(site: Site) -> None:
    from sheratan_hub.canonical import result_sha256

    await site.submit()
    lease = await site.lease()
    sha256 = result_sha256(lease["job_id"], True, b"7", b"null")
    await site.finish(lease, result=7, integrity={"mode": "sha256", "sha256": sha256})
    assert (await told(site, "data"))["integrity"] == {"ok_1m": 1, "fail_1m": 0}


@pytest.mark.parametrize("plane", PLANES)
async def test_prometheus_gets_text_and_openmetrics_when_it_asks(site: Site, plane: str) -> None:
    await site.submit()
    _, text, headers = await site.ask(plane, "GET", "/metrics")
    assert headers["Content-Type"].startswith("text/plain")
    names = {family.name for family in parse_text(text)}
    own = "sheratan_jobs" if plane == "data" else "sheratan_nodes"
    assert {own, "sheratan_events", "sheratan_http_requests", "sheratan_build_info"} <= names
    assert "process_cpu_seconds" in names
    _, text, headers = await site.ask(plane, "GET", "/metrics", headers={"Accept": OPENMETRICS})
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")
    assert {family.name for family in parse_openmetrics(text)} == names
    assert "_created" not in text


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(
    ("query", "headers"),
    [("?format=json", {}), ("", {"Accept": "application/json"}), ("", {"Accept": "application/json, */*"})],
)
async def test_json_is_given_when_it_is_asked_for(site: Site, plane: str, query: str, headers: dict[str, str]) -> None:
    status, body, got = await site.ask(plane, "GET", f"/metrics{query}", headers=headers)
    assert (status, got["Content-Type"]) == (200, "application/json")
    assert set(body) >= (CONTROL_KEYS if plane == "control" else DATA_KEYS)


@pytest.mark.parametrize("plane", PLANES)
async def test_a_new_hub_counts_nothing(site: Site, plane: str) -> None:
    body = await told(site, plane)
    names = CONTROL_KEYS if plane == "control" else DATA_KEYS
    values = [value for name in names for value in (body[name].values() if name in NESTED else [body[name]])]
    assert values == [0] * len(values)


@pytest.mark.parametrize("plane", PLANES)
async def test_no_metric_tells_a_secret_or_a_payload(clock_and_site: tuple[VirtualClock, Site], plane: str) -> None:
    _, site = clock_and_site
    await site.ask(plane, "GET", f"/{CONFIDENTIAL['params']}", headers={"X-Sheratan-Token": "canary-wrong-token"})
    for accept in ("text/plain", OPENMETRICS, "application/json"):
        async with site.session.get(site.url(plane, "/metrics"), headers={"Accept": accept}) as answer:
            text = await answer.text()
        assert "canary" not in text
        assert not re.search(r"127\.0\.0\.1|n1", text), "no address and no node"
