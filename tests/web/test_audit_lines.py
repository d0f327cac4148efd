"""The audit log as it is written by a running hub: fields, chain, numbers, folding, and no secret in it."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import NodeSettings, QueueSettings
from tests.conftest import TOKEN, MakeSite, Site

FIELDS = ["seq", "ts", "event", "plane", "remote_addr", "node_id", "path", "reason", "detail", "prev_hash", "hash"]
KEY = "canary-key-0123456789"
CANARIES = ["canary-params", "canary-result", "canary-wrong-token", TOKEN, KEY, KEY[:9]]


def events(site: Site, name: str) -> list[dict[str, Any]]:
    return [line for line in site.audit() if line["event"] == name]


def check_chain(text: str) -> list[dict[str, Any]]:
    """Each line's hash is that of its text without the hash, and names the line before."""
    lines, before = [], "0" * 64
    for number, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r'(\{.*),"hash":"([0-9a-f]{64})"\}', line)
        assert match, line
        assert hashlib.sha256((match[1] + "}").encode()).hexdigest() == match[2]
        record = json.loads(line)
        assert (record["seq"], record["prev_hash"], record["hash"]) == (number, before, match[2])
        before = match[2]
        lines.append(record)
    return lines


async def story(site: Site, clock: VirtualClock) -> None:
    """Makes every audit event that there is by now."""
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    job = {"kind": "work", "params": "canary-params", "idempotency_key": KEY}
    for body in (job, job, {**job, "params": "canary-params-2"}):
        await site.data("POST", "/api/jobs", body)
    await site.data("POST", "/api/jobs", {**job, "kind": "x"}, headers={"Idempotency-Key": KEY})
    await site.data("POST", "/api/jobs", {"kind": "too-many", "params": "canary-params"})
    lease = await site.lease()
    await site.data("POST", "/api/jobs/pull", {"node_id": "n2"})
    bad = {"mode": "sha256", "sha256": "0" * 64, "sig": "canary-result"}
    await site.finish(lease, result="canary-result", node_id="n1", integrity=bad)
    await clock.advance(12_000)
    await site.control("GET", "/api/hosts", headers={"Authorization": "Bearer canary-wrong-token"})
    await site.control("GET", "/api/hosts", headers={"Authorization": ""})
    await site.control("POST", "/api/jobs", job)
    await clock.advance(60_000)
    await site.control("DELETE", "/api/hosts/n1")


EXPECTED = {
    *("HUB_START", "NODE_ONLINE", "NODE_STALE", "NODE_DEAD", "NODE_FORGOTTEN", "IDEMPOTENCY_HIT"),
    *("IDEMPOTENCY_KEY_COLLISION", "BACKPRESSURE_DROP", "INFLIGHT_SATURATED", "RESULT_INTEGRITY_FAIL", "LEASE_REAP"),
    *("AUTH_FAILURE", "PORT_MISMATCH"),
}


@pytest.fixture
async def told(make_site: MakeSite) -> Site:
    clock = VirtualClock()
    queue = QueueSettings(max_depth=1, max_inflight=1, lease_seconds=10)
    site = await make_site(clock=clock, queue=queue, nodes=NodeSettings(ttl_seconds=20, dead_seconds=40))
    await story(site, clock)
    return site


async def test_every_line_has_all_fields_and_the_chain_holds(told: Site) -> None:
    lines = check_chain(told.app.audit.path.read_text())
    assert {line["event"] for line in lines} == EXPECTED
    for line in lines:
        assert [name for name in line if name != "count"] == FIELDS
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["ts"])
        assert isinstance(line["reason"], str)
        assert isinstance(line["detail"], dict)
        assert line["plane"] in ("control", "data", "hub")
        assert (line["remote_addr"] is None) == (line["path"] is None) == (line["plane"] == "hub")
    assert [line["ts"] for line in lines] == sorted(line["ts"] for line in lines)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ("HUB_START", {"plane": "hub", "node_id": None}),
        ("NODE_ONLINE", {"plane": "control", "path": "/api/hosts/heartbeat", "node_id": "n1"}),
        ("NODE_STALE", {"plane": "hub", "node_id": "n1"}),
        ("NODE_DEAD", {"plane": "hub", "node_id": "n1"}),
        ("NODE_FORGOTTEN", {"plane": "control", "path": "/api/hosts/n1", "node_id": "n1"}),
        ("IDEMPOTENCY_HIT", {"plane": "data", "path": "/api/jobs", "remote_addr": "127.0.0.1"}),
        ("IDEMPOTENCY_KEY_COLLISION", {"plane": "data", "path": "/api/jobs", "remote_addr": "127.0.0.1"}),
        ("BACKPRESSURE_DROP", {"plane": "data", "path": "/api/jobs", "remote_addr": "127.0.0.1"}),
        ("INFLIGHT_SATURATED", {"plane": "data", "path": "/api/jobs/pull", "node_id": "n2"}),
        ("RESULT_INTEGRITY_FAIL", {"plane": "data", "node_id": "n1", "reason": "sha_mismatch"}),
        ("LEASE_REAP", {"plane": "hub", "node_id": "n1", "reason": "lease_expired"}),
        ("AUTH_FAILURE", {"plane": "control", "path": "/api/hosts", "reason": "invalid_token"}),
        ("PORT_MISMATCH", {"plane": "control", "path": "/api/jobs", "reason": "data_path_on_control_port"}),
    ],
)
async def test_a_line_tells_who_and_where_and_why(told: Site, event: str, expected: dict[str, Any]) -> None:
    line = events(told, event)[0]
    assert {name: line[name] for name in expected} == expected


async def test_no_token_payload_or_whole_key_is_in_the_log(told: Site) -> None:
    text = told.app.audit.path.read_text()
    assert [canary for canary in CANARIES if canary in text] == []
    assert KEY[:8] in text, "so that the operator can tell which key it was"


@pytest.mark.parametrize("key", ["short", "12345678"])
async def test_not_even_a_short_key_is_written_whole(make_site: MakeSite, key: str) -> None:
    site = await make_site()
    for kind in ("work", "work", "other"):
        await site.data("POST", "/api/jobs", {"kind": kind, "idempotency_key": key})
    assert {line["event"] for line in site.audit()} >= {"IDEMPOTENCY_HIT", "IDEMPOTENCY_KEY_COLLISION"}
    assert key not in site.app.audit.path.read_text()


async def test_the_first_line_is_there_before_its_request_is_answered(site: Site) -> None:
    await site.data("GET", "/api/jobs", headers={"Authorization": "Bearer wrong"})
    assert [line["reason"] for line in events(site, "AUTH_FAILURE")] == ["invalid_token"]


async def test_a_flood_becomes_one_line_and_then_one_with_its_count(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    for _ in range(50):
        await site.control("GET", "/api/hosts", headers={"Authorization": "Bearer wrong"})
    assert len(events(site, "AUTH_FAILURE")) == 1
    await clock.advance(2_000)
    first, folded = events(site, "AUTH_FAILURE")
    assert ("count" in first, folded["count"]) == (False, 49)
    same = ("event", "plane", "remote_addr", "node_id", "path", "reason")
    assert [first[name] for name in same] == [folded[name] for name in same]
    await clock.advance(10_000)
    assert len(events(site, "AUTH_FAILURE")) == 2, "and nothing more once it is over"
    check_chain(site.app.audit.path.read_text())


async def test_a_flood_of_seconds_is_a_line_a_second(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    for _ in range(5):
        for _ in range(10):
            await site.control("GET", "/api/hosts", headers={"Authorization": "Bearer wrong"})
        await clock.advance(1_000)
    await clock.advance(2_000)
    lines = events(site, "AUTH_FAILURE")
    assert sum(line.get("count", 1) for line in lines) == 50
    assert 5 <= len(lines) <= 10


async def test_only_equal_events_of_one_origin_are_folded(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, queue=QueueSettings(max_inflight=1))
    await site.submit()
    await site.lease()
    for _ in range(3):
        for node_id in ("n1", "n2"):
            await site.data("POST", "/api/jobs/pull", {"node_id": node_id})
        for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
            await site.control("GET", "/api/hosts", headers=headers)
            await site.data("GET", "/api/jobs", headers=headers)
    assert [line["node_id"] for line in events(site, "INFLIGHT_SATURATED")] == ["n1", "n2"]
    assert len(events(site, "AUTH_FAILURE")) == 4
    await clock.advance(2_000)
    folded = [line for line in site.audit() if "count" in line]
    assert [line["count"] for line in folded] == [2] * 6
    assert {line["node_id"] for line in folded if line["event"] == "INFLIGHT_SATURATED"} == {"n1", "n2"}


async def test_what_is_still_folded_is_written_at_the_stop(make_site: MakeSite) -> None:
    site = await make_site()
    for _ in range(3):
        await site.control("GET", "/api/hosts", headers={"Authorization": "Bearer wrong"})
    await site.session.close()
    await site.app.stop()
    lines = check_chain(site.app.audit.path.read_text())
    failures = [line.get("count", 1) for line in lines if line["event"] == "AUTH_FAILURE"]
    assert sum(failures) == 3
    assert lines[0]["event"] == "HUB_START"
    assert "HUB_STOP" in {line["event"] for line in lines}


async def test_the_chain_goes_on_after_a_restart(make_site: MakeSite) -> None:
    for _ in range(3):
        site = await make_site("sqlite")
        await site.control("GET", "/api/jobs")
        await site.session.close()
        await site.app.stop()
    lines = check_chain(site.app.audit.path.read_text())
    assert [line["event"] for line in lines] == ["HUB_START", "PORT_MISMATCH", "HUB_STOP"] * 3


async def test_the_log_is_for_its_owner_only(make_site: MakeSite) -> None:
    path = (await make_site()).app.audit.path
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


async def test_a_refused_result_of_a_batch_names_its_node(make_site: MakeSite) -> None:
    site = await make_site()
    await site.submit()
    lease = await site.lease("n1")
    report = {"job_id": lease["job_id"], "lease_id": lease["lease_id"], "node_id": "n1", "ok": True}
    report["integrity"] = {"mode": "sha256", "sha256": "0" * 64}
    await site.data("POST", "/api/results", {"results": [report]})
    [line] = events(site, "RESULT_INTEGRITY_FAIL")
    assert (line["node_id"], line["reason"]) == ("n1", "sha_mismatch")
