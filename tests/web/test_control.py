"""The control plane over HTTP: heartbeats, the registry, the list of nodes, forgetting, and what silence does."""

from __future__ import annotations

from typing import Any

import pytest
from yarl import URL

from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import NodeSettings, QueueSettings
from tests.conftest import MakeSite, Site

BEATS = ["/api/hosts/heartbeat", "/mesh/heartbeat"]
REGISTRIES = ["/api/registry", "/registry"]
NODE_FIELDS = {
    *("node_id", "status", "health", "last_seen", "first_seen", "zone", "capabilities", "current_jobs"),
    *("max_concurrent", "boot_id", "endpoint", "labels", "attestation"),
}


async def beat(site: Site, body: Any, path: str = BEATS[0]) -> Any:
    status, answer = await site.control("POST", path, body)
    assert status == 200, answer
    return answer


async def node(site: Site, node_id: str = "n1") -> Any:
    status, body = await site.control("GET", f"/api/hosts/{node_id}")
    assert status == 200, body
    return body


def refused(answer: tuple[int, Any], status: int, code: str) -> Any:
    assert (answer[0], answer[1].get("code"), answer[1]["ok"]) == (status, code, False), answer
    return answer[1]


async def counted(site: Site) -> dict[str, int]:
    """The kept numbers of nodes by state."""
    return await site.app.store.counts("node:")


def nodes_said(site: Site) -> list[tuple[str, str]]:
    lines = [line for line in site.audit() if line["event"].startswith("NODE_")]
    return [(line["event"], line["node_id"]) for line in lines]


# heartbeats


@pytest.mark.parametrize("path", BEATS)
@pytest.mark.parametrize("name", ["node_id", "host_id", "host", "name"])
async def test_a_node_may_name_itself_in_four_ways(site: Site, path: str, name: str) -> None:
    answer = await beat(site, {name: "n1"}, path)
    assert (answer["ok"], answer["node_id"]) == (True, "n1")
    assert (await node(site))["status"] == "ONLINE"


async def test_of_several_names_the_first_counts(site: Site) -> None:
    names = {"name": "d", "host": "c", "host_id": "b", "node_id": "a"}
    for expected in "abcd":
        assert (await beat(site, names))["node_id"] == expected
        names.popitem()
    refused(await site.control("POST", BEATS[0], {"health": "GREEN"}), 422, "invalid_field")
    refused(await site.control("POST", BEATS[0], {"node_id": ""}), 422, "invalid_field")
    assert await counted(site) == {"node:ONLINE": 4}


async def test_a_heartbeat_is_answered_as_the_contract_lists(site: Site) -> None:
    answer = await beat(site, {"node_id": "n1"})
    after = answer.pop("heartbeat_after_seconds")
    assert 8 < after < 12, "well before the node would be STALE or a cancel's grace be over"
    told = {"ok": True, "node_id": "n1", "attestation_status": "MISSING", "cancel": [], "drain": False}
    assert answer == {**told, "policy_version": 0, "token": {"retiring": False, "until": None}}


async def test_what_a_node_says_of_itself_is_shown(site: Site) -> None:
    said = {"health": "YELLOW", "zone": "z", "current_jobs": 2, "max_concurrent": 8, "boot_id": "b", "endpoint": "e"}
    await beat(site, {"node_id": "n1", **said, "capabilities": ["b", "a", "b"], "status": "busy", "ts_utc": "x"})
    found = await node(site)
    assert set(found) >= {"ok", *NODE_FIELDS}
    assert {name: found[name] for name in said} == said
    assert (found["capabilities"], found["status"]) == (["a", "b"], "ONLINE")
    assert found["first_seen"] <= found["last_seen"]
    assert found["last_seen"].endswith("Z")


async def test_a_field_that_is_called_a_secret_is_not_kept(site: Site) -> None:
    await beat(site, {"node_id": "n1", "rack": 1, "token": "t", "db_password": "p", "apiKey": "k", "api_key": "k"})
    assert (await node(site))["labels"] == {"rack": 1}


async def test_other_fields_are_labels_when_they_are_scalar(site: Site) -> None:
    scalars = {"os": "linux", "cores": 8, "load": 0.5, "spot": True, "é": "ü"}
    others = {"disks": [1], "nested": {"a": 1}, "nothing": None}
    await beat(site, {"node_id": "n1", "health": "GREEN", "timestamp": 1, **scalars, **others})
    assert (await node(site))["labels"] == scalars


async def test_a_field_left_out_keeps_its_last_value(site: Site) -> None:
    await beat(site, {"node_id": "n1", "zone": "z", "capabilities": ["a"], "max_concurrent": 3})
    await beat(site, {"node_id": "n1", "capabilities": []})
    found = await node(site)
    assert (found["zone"], found["capabilities"], found["max_concurrent"]) == ("z", [], 3)


async def test_a_heartbeat_moves_last_seen_and_not_first_seen(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    await beat(site, {"node_id": "n1"})
    before = await node(site)
    await clock.advance(1_000)
    await beat(site, {"node_id": "n1"})
    after = await node(site)
    assert before["first_seen"] == after["first_seen"] == before["last_seen"] < after["last_seen"]


@pytest.mark.parametrize(("ttl", "grace", "after"), [(4, 30, 1), (120, 30, 10), (120, 600, 30), (120, 1, 1)])
async def test_the_next_heartbeat_is_asked_for_in_time(make_site: MakeSite, ttl: int, grace: int, after: int) -> None:
    nodes, queue = NodeSettings(ttl_seconds=ttl, dead_seconds=1000), QueueSettings(cancel_grace_seconds=grace)
    site = await make_site(nodes=nodes, queue=queue)
    assert 0.9 * after <= (await beat(site, {"node_id": "n1"}))["heartbeat_after_seconds"] <= 1.1 * after


# attestation


CLAIM = {"schema": 1, "build_id": "b1", "capability_hash": "h1", "runtime": "py3.11"}


async def attestation(site: Site, node_id: str = "n1") -> Any:
    return (await node(site, node_id))["attestation"]


async def test_attestation_has_the_registrys_shape(site: Site) -> None:
    assert (await beat(site, {"node_id": "n1", "attestation": CLAIM}))["attestation_status"] == "OK"
    found = await attestation(site)
    assert (found["status"], found["drift_count"], found["spoof_count"]) == ("OK", 0, 0)
    for name in ("first_seen", "last_seen"):
        assert found[name].pop("ts").endswith("Z")
        assert found[name] == {"build_id": "b1", "capability_hash": "h1", "runtime": "py3.11"}


async def test_a_node_that_claims_nothing_is_missing(site: Site) -> None:
    assert (await beat(site, {"node_id": "n1"}))["attestation_status"] == "MISSING"
    found = await attestation(site)
    assert found == {"status": "MISSING", "first_seen": None, "last_seen": None, "drift_count": 0, "spoof_count": 0}


@pytest.mark.parametrize("change", [{"build_id": "b2"}, {"capability_hash": "h2"}])
async def test_another_claim_is_drift_and_the_baseline_stays(site: Site, change: Any) -> None:
    await beat(site, {"node_id": "n1", "attestation": CLAIM})
    for _ in range(2):
        answer = await beat(site, {"node_id": "n1", "attestation": {**CLAIM, **change}})
        assert answer["attestation_status"] == "DRIFT"
    found = await attestation(site)
    assert found["drift_count"] == 1
    assert found["first_seen"]["build_id"] == "b1"
    assert {name: found["last_seen"][name] for name in change} == change
    assert (await beat(site, {"node_id": "n1", "attestation": CLAIM}))["attestation_status"] == "OK"


# registry and lists


@pytest.mark.parametrize("path", REGISTRIES)
async def test_the_registry_holds_every_node_by_id_and_the_policy(site: Site, path: str) -> None:
    assert await site.control("GET", path) == (200, {"ok": True, "nodes": {}, "policy": {"version": 0, "sha256": None}})
    for node_id in ("n1", "n2"):
        await beat(site, {"node_id": node_id, "health": "RED"})
    _, body = await site.control("GET", path)
    assert set(body["nodes"]) == {"n1", "n2"}
    for node_id, one in body["nodes"].items():
        assert set(one) >= NODE_FIELDS
        assert (one["node_id"], one["status"], one["health"]) == (node_id, "ONLINE", "RED")
        assert set(one["attestation"]) == {"status", "first_seen", "last_seen", "drift_count", "spoof_count"}


async def test_nodes_are_listed_by_cursor(site: Site) -> None:
    names = [f"node-{n}" for n in range(5)]
    for name in reversed(names):
        await beat(site, {"node_id": name})
    seen: list[str] = []
    cursor = ""
    for _ in range(6):
        status, body = await site.control("GET", f"/api/hosts?limit=2&cursor={cursor}")
        assert (status, body["ok"]) == (200, True)
        assert len(body["nodes"]) <= 2
        seen += [one["node_id"] for one in body["nodes"]]
        cursor = body["next_cursor"]
        if cursor is None:
            break
    assert (seen, cursor) == (names, None)
    assert [one["node_id"] for one in (await site.control("GET", "/api/hosts"))[1]["nodes"]] == names


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_an_unknown_node_is_404(site: Site, method: str) -> None:
    no = refused(await site.control(method, "/api/hosts/nobody"), 404, "node_not_found")
    assert "nobody" in no["detail"]


@pytest.mark.parametrize("node_id", ["rack 1", "é😀", "a+b", "a%20b", "a?b#c", "rack/1"])
async def test_a_node_of_any_name_is_found_by_its_escaped_name(site: Site, node_id: str) -> None:
    from urllib.parse import quote

    await beat(site, {"node_id": node_id})
    url = URL(site.url("control", "/api/hosts/" + quote(node_id, safe="")), encoded=True)
    async with site.session.get(url) as answer:
        assert (answer.status, (await answer.json(content_type=None)).get("node_id")) == (200, node_id)


# silence


async def silent(make_site: MakeSite, **tables: Any) -> tuple[Site, VirtualClock]:
    """A hub whose nodes are STALE after 5 s and DEAD after 20, with node n1 just heard of."""
    clock = VirtualClock()
    site = await make_site(clock=clock, nodes=NodeSettings(ttl_seconds=5, dead_seconds=20), **tables)
    await beat(site, {"node_id": "n1"})
    return site, clock


async def states(site: Site) -> set[str]:
    """What every place that shows the state of n1 says."""
    registries = [(await site.control("GET", path))[1]["nodes"]["n1"]["status"] for path in REGISTRIES]
    [listed] = (await site.control("GET", "/api/hosts"))[1]["nodes"]
    return {*registries, listed["status"], (await node(site))["status"]}


async def test_a_silent_node_is_stale_then_dead(make_site: MakeSite) -> None:
    site, clock = await silent(make_site)
    for ms, state in ((4_900, "ONLINE"), (1_100, "STALE"), (13_900, "STALE"), (2_100, "DEAD"), (900_000, "DEAD")):
        await clock.advance(ms)
        assert await states(site) == {state}
        assert await counted(site) == {f"node:{state}": 1}
    assert nodes_said(site) == [("NODE_ONLINE", "n1"), ("NODE_STALE", "n1"), ("NODE_DEAD", "n1")]


async def test_heartbeats_keep_a_node_online(make_site: MakeSite) -> None:
    site, clock = await silent(make_site)
    for _ in range(10):
        await clock.advance(4_000)
        await beat(site, {"node_id": "n1"})
    assert await states(site) == {"ONLINE"}
    assert nodes_said(site) == [("NODE_ONLINE", "n1")]


@pytest.mark.parametrize("ms", [10_000, 30_000])
async def test_a_heartbeat_brings_a_node_back(make_site: MakeSite, ms: int) -> None:
    site, clock = await silent(make_site)
    await clock.advance(ms)
    assert await states(site) == {"STALE" if ms < 20_000 else "DEAD"}
    await beat(site, {"node_id": "n1"})
    assert await states(site) == {"ONLINE"}
    assert nodes_said(site)[-1] == ("NODE_ONLINE", "n1")
    await clock.advance(6_000)
    assert await states(site) == {"STALE"}, "and its silence counts again"


async def test_only_a_dead_node_can_be_forgotten(make_site: MakeSite) -> None:
    site, clock = await silent(make_site)
    for ms, state in ((0, "ONLINE"), (6_000, "STALE")):
        await clock.advance(ms)
        no = refused(await site.control("DELETE", "/api/hosts/n1"), 409, "node_alive")
        assert state in no["detail"]
        assert await states(site) == {state}
    await clock.advance(20_000)
    assert await site.control("DELETE", "/api/hosts/n1") == (200, {"ok": True, "node_id": "n1"})
    refused(await site.control("GET", "/api/hosts/n1"), 404, "node_not_found")
    refused(await site.control("DELETE", "/api/hosts/n1"), 404, "node_not_found")
    assert (await site.control("GET", "/api/registry"))[1]["nodes"] == {}
    assert await counted(site) == {}
    assert nodes_said(site)[-1] == ("NODE_FORGOTTEN", "n1")
    await beat(site, {"node_id": "n1"})
    assert await states(site) == {"ONLINE"}


async def test_a_dead_nodes_jobs_go_to_others(make_site: MakeSite) -> None:
    site, clock = await silent(make_site, queue=QueueSettings(lease_seconds=300))
    job_id = await site.submit(timeout_seconds=1000)
    await site.lease("n1")
    await clock.advance(25_000)
    job = await site.job(job_id)
    assert (job["status"], job["losses"]) == ("pending", 1)
    assert (await site.lease("n2"))["job_id"] == job_id
    [line] = [line for line in site.audit() if line["event"] == "LEASE_REAP"]
    assert (line["node_id"], line["reason"], line["detail"]["job_id"]) == ("n1", "node_dead", job_id)
