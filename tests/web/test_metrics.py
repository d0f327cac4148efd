"""Both planes' metrics: Prometheus text, OpenMetrics, and the fleet's JSON; right counts, nothing confidential."""

from __future__ import annotations

import asyncio
import re
from typing import Any, NoReturn

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import MetricsSettings, NodeSettings, QueueSettings
from sheratan_hub.metrics.table import FAMILIES
from sheratan_hub.storage import StoreDown
from tests.conftest import TOKEN, MakeSite, Site
from tests.prometheus import promtool

PLANES = ["control", "data"]
CONTROL_KEYS = {
    *("nodes_online", "nodes_stale", "nodes_dead", "auth_fail_rate_1m", "port_mismatch_rate_1m"),
    *("auth_success_active_1m", "auth_success_next_1m", "auth_failure", "attestation_ok", "attestation_missing"),
    *("attestation_drift", "attestation_spoof_suspect", "attestation_drift_1m", "attestation_spoof_1m"),
}
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


async def test_the_json_has_the_fleets_keys(site: Site) -> None:
    control, data = await told(site, "control"), await told(site, "data")
    assert set(control) == {"ok", *CONTROL_KEYS}
    assert set(data) == {"ok", "pending_processing", *DATA_KEYS}
    assert set(control["auth_failure"]) == {"old_token_1m", "invalid_1m"}
    assert set(data["integrity"]) == {"ok_1m", "fail_1m"}


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


# What a scrape costs and changes


def steady(text: str) -> list[str]:
    """What of the text does not move by itself."""
    moving = ("process_", "python_", "sheratan_event_loop_lag", "sheratan_connections")
    return [line for line in text.splitlines() if not line.startswith(moving)]


async def test_reading_metrics_changes_nothing(clock_and_site: tuple[VirtualClock, Site]) -> None:
    _, site = clock_and_site
    stored = await site.stored()
    first = {plane: [(await site.ask(plane, "GET", f"/metrics{query}"))[1] for query in FORMS] for plane in PLANES}
    again = {plane: [(await site.ask(plane, "GET", f"/metrics{query}"))[1] for query in FORMS] for plane in PLANES}
    for plane in PLANES:
        assert steady(first[plane][0]) == steady(again[plane][0])
        assert first[plane][1] == again[plane][1]
    assert await site.stored() == stored


FORMS = ("", "?format=json")


class Reads:
    """A store that notes what is read of it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.read: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._store, name)
        if name not in ("begin", "counts", "events", "fetch", "heads", "page"):
            return inner

        async def noted(*args: Any, **options: Any) -> Any:
            found = await inner(*args, **options)
            self.read.append((name, len(found.rows if name == "page" else found)))
            return found

        return noted


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("form", FORMS)
async def test_a_scrape_of_a_large_fleet_reads_a_few_counters_and_no_list(
    make_site: MakeSite, plane: str, form: str
) -> None:
    site = await make_site(clock=VirtualClock(), queue=QueueSettings(max_depth=5000, max_inflight=500))
    beats = [{"node_id": f"n{n}"} for n in range(120)]
    await asyncio.gather(*(site.control("POST", "/api/hosts/heartbeat", beat) for beat in beats))
    jobs = [{"kind": f"k{n % 40}", "source": f"s{n % 90}", "params": n} for n in range(900)]
    await site.data("POST", "/api/jobs", {"jobs": jobs})
    for n in range(3):
        await site.data("POST", "/api/jobs/pull", {"node_id": f"n{n}", "max": 100})
    site.app.hub.store = reads = Reads(site.app.hub.store)  # type: ignore[assignment]
    status, _, _ = await site.ask(plane, "GET", f"/metrics{form}")
    assert status == 200
    assert {name for name, _ in reads.read} <= {"counts", "fetch"}
    assert sum(n for name, n in reads.read if name == "counts") < 30
    assert sum(n for name, n in reads.read if name == "fetch") <= 1


async def test_histograms_of_many_kinds_are_bounded(make_site: MakeSite) -> None:
    site = await make_site(metrics=MetricsSettings(max_kinds=2), queue=QueueSettings(max_inflight=100))
    await site.data("POST", "/api/jobs", {"jobs": [{"kind": f"k{n}"} for n in range(30)]})
    await site.data("POST", "/api/jobs/pull", {"node_id": "n1", "max": 100})
    found = await samples(site)
    kinds = {labels[0] for name, labels in found if name == "sheratan_job_wait_seconds_count"}
    assert len(kinds) == 3
    assert "other" in kinds
    assert found["sheratan_job_wait_seconds_count", ("other",)] == 28


async def test_nodes_have_series_of_their_own_while_there_are_few(make_site: MakeSite) -> None:
    clock = VirtualClock()
    nodes = NodeSettings(ttl_seconds=20, dead_seconds=60)
    site = await make_site(clock=clock, nodes=nodes, metrics=MetricsSettings(max_node_series=2))
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "a"})
    heard = clock.now() / 1000
    await clock.advance(25_000)
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": 'b"\n'})
    found = await samples(site, "control")
    assert {labels: n for (name, labels), n in found.items() if name == "sheratan_node_up"} == {("a",): 0, ('b"\n',): 1}
    assert found["sheratan_node_last_heartbeat_timestamp_seconds", ("a",)] == heard
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "c"})
    found = await samples(site, "control")
    assert not [name for name, _ in found if name.startswith("sheratan_node_up")]


async def test_while_the_store_is_down_metrics_say_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await site.submit()
    await site.lease()

    async def down(prefix: str = "") -> dict[str, int]:
        raise StoreDown("for the test")

    assert (await samples(site, "control"))["sheratan_store_up", ()] == 1
    monkeypatch.setattr(site.app.store, "counts", down)
    control, data = await samples(site, "control"), await samples(site)
    assert control["sheratan_store_up", ()] == 0
    assert ("sheratan_nodes", ("ONLINE",)) not in control
    assert ("sheratan_jobs", ("pending",)) not in data
    assert data["sheratan_leases_granted_total", ()] == 1
    status, body, _ = await site.ask("data", "GET", "/metrics?format=json")
    assert (status, body["code"]) == (503, "unavailable")


async def test_a_store_that_cannot_write_is_not_up(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:
        raise StoreDown("for the test")

    site = await make_site(clock=VirtualClock())
    monkeypatch.setattr(site.app.store, "begin", full)
    assert (await site.data("POST", "/api/jobs", {"kind": "k"}))[0] == 503
    assert (await samples(site, "control"))["sheratan_store_up", ()] == 0


async def test_a_scrape_is_no_request_of_the_statistics_but_a_refused_one_is(make_site: MakeSite) -> None:
    site = await make_site(metrics=MetricsSettings(require_token=True))
    for headers in ({}, {"Authorization": ""}):
        await site.ask("data", "GET", "/metrics", headers=headers)
    found = await samples(site)
    routes = {labels: n for (name, labels), n in found.items() if name == "sheratan_http_requests_total"}
    assert routes == {("data", "unmatched", "403"): 1}


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=x",
        "application/openmetrics-text; version=",
        "application/openmetrics-text; version=1.1.<script>",
        "text/plain; version=1.0.0; escaping=nonsense",
        "application/openmetrics-text; version=1.0.0; escaping=nonsense",
        ";;;,,,=",
        "*/*;q=" + "9" * 500,
    ],
)
async def test_a_header_that_makes_no_sense_gets_metrics_all_the_same(make_site: MakeSite, accept: str) -> None:
    site = await make_site()
    status, text, _ = await site.ask("data", "GET", "/metrics", headers={"Accept": accept})
    assert status == 200
    assert "sheratan_jobs{" in text


@pytest.mark.parametrize("plane", PLANES)
async def test_promtool_finds_nothing_wrong(clock_and_site: tuple[VirtualClock, Site], plane: str) -> None:
    _, site = clock_and_site
    _, text, _ = await site.ask(plane, "GET", "/metrics")
    assert await asyncio.to_thread(promtool, "check", "metrics", told=text) == ""


@pytest.mark.parametrize("plane", PLANES)
async def test_every_metric_of_the_table_is_served_and_no_other(make_site: MakeSite, plane: str) -> None:
    site = await make_site()
    _, text, _ = await site.ask(plane, "GET", "/metrics")
    told = {family.name + ("_total" if family.type == "counter" else "") for family in parse_text(text)}
    mine = {family.name for family in FAMILIES if family.plane in (plane, "both")}
    assert {name for name in told if name.startswith("sheratan_")} == mine
    assert {name for name in told if not name.startswith(("sheratan_", "process_", "python_"))} == set()


WITHOUT_A_SERIES = {
    "sheratan_token_rotation_remaining_seconds",
    *("sheratan_node_up", "sheratan_node_last_heartbeat_timestamp_seconds"),
    *("sheratan_store_size_bytes", "sheratan_store_wal_bytes", "sheratan_store_disk_free_bytes"),
    "sheratan_store_disk_size_bytes",
}
"""Without a rotation, without series of nodes, with a store in memory."""


async def test_every_metric_has_a_series_once_there_is_something_to_tell(
    clock_and_site: tuple[VirtualClock, Site],
) -> None:
    _, site = clock_and_site
    found = {name for plane in PLANES for name, _ in await samples(site, plane)}
    told = {family.name for family in FAMILIES if {family.name, f"{family.name}_count"} & found}
    assert {family.name for family in FAMILIES} - told == WITHOUT_A_SERIES


async def test_every_loop_of_the_hub_is_told_of(site: Site) -> None:
    told = {labels[0] for name, labels in await samples(site, "control") if name == "sheratan_loop_errors_total"}
    assert told == {task.get_name() for task in site.app._tasks}
    assert told == {loop.name for loop in site.app.services.inside.loops}


async def test_gauges_survive_a_restart_and_counters_begin_anew(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site("sqlite", clock=clock)
    await site.submit(idempotency_key="k")
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "a", "health": "RED"})
    lines = (await samples(site, "control"))["sheratan_audit_lines_total", ()]
    await site.app.stop()
    again = await make_site("sqlite", clock=clock)
    found = {**await samples(again, "control"), **await samples(again)}
    gauges = [("jobs", "pending"), ("ready_jobs", "NORMAL"), ("idempotency_keys",), ("node_health", "RED")]
    assert [found[f"sheratan_{name}", tuple(labels)] for name, *labels in gauges] == [1, 1, 1, 1]
    assert ("sheratan_events_total", ("job.submitted",)) not in found
    assert not [name for name, _ in found if name == "sheratan_http_requests_total"]
    assert found["sheratan_audit_lines_total", ()] > lines
