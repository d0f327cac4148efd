"""What operators do with nodes over HTTP, what a new boot does, mass silence; with audit lines and metrics."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock, rfc3339
from sheratan_hub.config import AttestationSettings, NodeSettings, QueueSettings
from tests.conftest import MakeSite, Site

BEAT = "/api/hosts/heartbeat"
CLAIM = {"schema": 1, "build_id": "b1", "capability_hash": "h1", "runtime": "py3.11"}


async def beat(site: Site, node_id: str = "n1", **fields: Any) -> Any:
    status, answer = await site.control("POST", BEAT, {"node_id": node_id, **fields})
    assert status == 200, answer
    return answer


async def node(site: Site, node_id: str = "n1") -> Any:
    status, body = await site.control("GET", f"/api/hosts/{node_id}")
    assert status == 200, body
    return body


async def order(site: Site, verb: str, body: Any = None, node_id: str = "n1") -> Any:
    status, answer = await site.control("POST", f"/api/hosts/{node_id}/{verb}", body)
    assert status == 200, answer
    return answer


async def held(site: Site, node_id: str = "n1") -> str:
    job_id = await site.submit(timeout_seconds=100_000)
    assert (await site.lease(node_id))["job_id"] == job_id
    return job_id


def lines(site: Site, *events: str) -> list[dict[str, Any]]:
    return [line for line in site.audit() if line["event"] in events]


async def test_a_node_is_told_by_its_first_heartbeat_of_what_was_cancelled_before(site: Site) -> None:
    jobs = [await held(site) for _ in range(3)]
    other = await held(site, "n2")
    for job_id in (jobs[0], jobs[2], other):
        await site.data("POST", f"/api/jobs/{job_id}/cancel", {})
    assert (await beat(site))["cancel"] == [jobs[0], jobs[2]]
    assert (await beat(site))["cancel"] == [jobs[0], jobs[2]]
    assert (await beat(site, "n3"))["cancel"] == []


# drain


async def test_a_drained_node_is_told_so_and_gets_no_jobs_until_it_is_resumed(site: Site) -> None:
    await beat(site)
    await site.submit()
    answer = await order(site, "drain")
    assert (answer["ok"], answer["node_id"], answer["draining"], answer["drain_until"]) == (True, "n1", True, None)
    assert (await beat(site))["drain"] is True
    _, pulled = await site.data("POST", "/api/jobs/pull", {"node_id": "n1", "wait_seconds": 30})
    assert (pulled["jobs"], pulled["reason"]) == ([], "node_draining")
    assert pulled["defer_ms"] > 0
    assert (await order(site, "resume"))["draining"] is False
    assert (await beat(site))["drain"] is False
    await site.lease("n1")
    told = [(line["event"], line["node_id"]) for line in lines(site, "NODE_DRAIN", "NODE_RESUME")]
    assert told == [("NODE_DRAIN", "n1"), ("NODE_RESUME", "n1")]


@pytest.mark.parametrize("how", ["seconds", "until"])
async def test_at_its_deadline_a_drained_nodes_jobs_go_to_others_at_no_cost(make_site: MakeSite, how: str) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    await beat(site)
    job_id = await held(site)
    until = rfc3339(clock.now() + 30_000)
    answer = await order(site, "drain", {"seconds": 30} if how == "seconds" else {"until": until})
    assert answer["drain_until"] == until
    await clock.advance(29_900)
    assert (await site.job(job_id))["status"] == "running"
    await clock.advance(200)
    job = await site.job(job_id)
    assert (job["status"], job["losses"], job["failures"]) == ("pending", 0, 0)
    assert ((await node(site))["draining"], (await node(site))["drain_until"]) == (True, None)
    assert (await site.lease("n2"))["job_id"] == job_id
    [line] = lines(site, "LEASE_REAP")
    assert (line["node_id"], line["reason"], line["detail"]["job_id"]) == ("n1", "drain_deadline", job_id)
    assert lines(site, "NODE_DRAIN")[0]["detail"] == {"seconds": 30.0}


async def test_what_a_drained_node_holds_may_be_extended_and_finished(site: Site) -> None:
    await beat(site)
    await site.submit()
    lease = await site.lease("n1")
    await order(site, "drain", {"seconds": 100})
    body = {"lease_id": lease["lease_id"]}
    assert (await site.data("POST", f"/api/jobs/{lease['job_id']}/extend", body))[0] == 200
    assert (await site.finish(lease))[0] == 200


@pytest.mark.parametrize("body", [{"seconds": -1}, {"until": "soon"}, {"seconds": 1, "until": "2099-01-01T00:00:00Z"}])
async def test_a_drain_that_makes_no_sense_is_422(site: Site, body: Any) -> None:
    await beat(site)
    for wrong in (body, {"forever": True}):
        status, no = await site.control("POST", "/api/hosts/n1/drain", wrong)
        assert (status, no["code"]) == (422, "invalid_field")
    assert (await node(site))["draining"] is False


@pytest.mark.parametrize("verb", ["drain", "resume", "attest"])
async def test_an_unknown_node_cannot_be_ordered_about(site: Site, verb: str) -> None:
    status, no = await site.control("POST", f"/api/hosts/nobody/{verb}")
    assert (status, no["code"]) == (404, "node_not_found")


async def test_a_drain_survives_a_restart_of_the_hub(make_site: MakeSite) -> None:
    first = await make_site("sqlite")
    await beat(first)
    await order(first, "drain", {"seconds": 3600})
    before = await node(first)
    await first.app.stop()
    second = await make_site("sqlite")
    after = await node(second)
    assert after["draining"] is True
    assert after["drain_until"] == before["drain_until"]
    assert (await beat(second))["drain"] is True


# a new boot


async def test_a_new_boot_ends_the_old_ones_leases_now_and_not_its_own(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    await beat(site, boot_id="b1")
    old = await held(site)
    await clock.advance(1000)
    await beat(site, boot_id="b2")
    new = await held(site)
    await clock.advance(100)
    assert ((await site.job(old))["status"], (await site.job(old))["losses"]) == ("pending", 1)
    assert (await site.job(new))["status"] == "running"
    [line] = lines(site, "LEASE_REAP")
    assert (line["node_id"], line["reason"]) == ("n1", "node_restarted")
    known = await site.app.hub.node("n1")
    assert known is not None
    assert known.owed == (), "it is done"
    await clock.advance(5000)
    await beat(site, boot_id="b2")
    await clock.advance(5000)
    assert (await site.job(new))["status"] == "running"


async def test_leases_owed_an_end_are_ended_after_a_restart_of_the_hub(make_site: MakeSite) -> None:
    from sheratan_hub.rules.nodes import Beat

    first = await make_site("sqlite")
    await beat(first, boot_id="b1")
    job_id = await held(first)
    first.app._tasks[0].cancel()  # the sweep: the hub goes down before it ends them
    await first.app.hub.execute(Beat("n1", boot_id="b2"))
    assert (await first.job(job_id))["status"] == "running"
    await first.app.stop()
    second = await make_site("sqlite")
    assert (await second.job(job_id))["losses"] == 1


# what a node tells of its clock


@pytest.mark.parametrize(
    ("said", "skew"),
    [
        ("2023-11-14T22:13:30Z", 10.0),
        ("2023-11-14T23:13:10.500+01:00", -9.5),
        (1_700_000_000, 0.0),
        (1_700_000_000_250, 0.25),
        (1_699_999_999.5, -0.5),
    ],
)
async def test_the_skew_of_a_nodes_clock_is_shown(make_site: MakeSite, said: Any, skew: float) -> None:
    site = await make_site(clock=VirtualClock())
    for name in ("ts_utc", "timestamp"):
        await beat(site, **{name: said})
        assert (await node(site))["clock_skew_seconds"] == skew
        assert (await node(site))["last_seen"] == "2023-11-14T22:13:20.000Z"


@pytest.mark.parametrize("said", ["yesterday", "2023-11-14T22:13:30", True, [1], -5, 1e300, {"a": 1}])
async def test_a_time_that_is_none_is_no_skew(site: Site, said: Any) -> None:
    await beat(site, ts_utc=said)
    assert (await node(site))["clock_skew_seconds"] is None


# attestation


async def attests(site: Site, **changes: Any) -> str:
    status: str = (await beat(site, attestation={**CLAIM, **changes}))["attestation_status"]
    return status


async def test_attestation_is_audited_at_each_change_and_counted(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    said = []
    for caps in ("h1", "h2", "h2", "h1", "h2", "h2"):
        await clock.advance(2000)
        said.append(await attests(site, capability_hash=caps))
    assert said == ["OK", "DRIFT", "DRIFT", "OK", "SPOOF_SUSPECT", "SPOOF_SUSPECT"]
    told = [(line["event"].removeprefix("ATTESTATION_"), line["node_id"]) for line in site.audit()]
    names = ("FIRST_SEEN", "DRIFT", "DRIFT", "SPOOF_SUSPECT")
    assert [one for one in told if one[0] in names] == [(name, "n1") for name in names]
    _, metrics, _ = await site.ask("control", "GET", "/metrics?format=json")
    assert (metrics["attestation_spoof_suspect"], metrics["attestation_ok"], metrics["attestation_drift"]) == (1, 0, 0)
    assert (metrics["attestation_drift_1m"], metrics["attestation_spoof_1m"]) == (2, 1)
    _, text, _ = await site.ask("control", "GET", "/metrics")
    assert 'sheratan_node_attestations{status="SPOOF_SUSPECT"} 1.0' in text
    found = await node(site)
    assert (found["attestation"]["drift_count"], found["attestation"]["spoof_count"]) == (2, 1)
    assert [one["capability_hash"] for one in found["attestation_history"]] == ["h1", "h2", "h1", "h2"]
    await clock.advance(61_000)
    _, metrics, _ = await site.ask("control", "GET", "/metrics?format=json")
    assert (metrics["attestation_drift_1m"], metrics["attestation_spoof_1m"]) == (0, 0)


async def test_threshold_and_window_are_configured(make_site: MakeSite) -> None:
    site = await make_site(attestation=AttestationSettings(spoof_threshold=1))
    assert [await attests(site, capability_hash=caps) for caps in ("h1", "h2")] == ["OK", "SPOOF_SUSPECT"]


async def test_drift_shows_as_yellow_and_blocks_nothing(site: Site) -> None:
    await attests(site)
    await attests(site, build_id="b2")
    found = await node(site)
    assert (found["attestation"]["status"], found["health"], found["reported_health"]) == ("DRIFT", "YELLOW", "GREEN")
    await site.submit()
    await site.lease("n1")


async def test_an_operator_accepts_a_new_baseline(site: Site) -> None:
    await attests(site)
    await attests(site, build_id="b2")
    answer = await order(site, "attest")
    assert (answer["attestation"]["status"], answer["attestation"]["first_seen"]["build_id"]) == ("OK", "b2")
    assert await attests(site, build_id="b2") == "OK"
    assert await attests(site) == "DRIFT"
    [line] = lines(site, "ATTESTATION_ACCEPTED")
    assert (line["node_id"], line["detail"]) == ("n1", {"build_id": "b2", "capability_hash": "h1"})
    await beat(site)
    status, no = await site.control("POST", "/api/hosts/n1/attest")
    assert (status, no["code"]) == (409, "not_attested")


# mass silence


async def test_mass_silence_keeps_leases_until_an_operator_ends_it(make_site: MakeSite) -> None:
    clock = VirtualClock()
    queue = QueueSettings(lease_seconds=100_000)
    site = await make_site(clock=clock, nodes=NodeSettings(ttl_seconds=5, dead_seconds=20), queue=queue)
    for n in range(5):
        await beat(site, f"n{n}")
    jobs = [await held(site, f"n{n}") for n in range(5)]
    assert (await site.control("GET", "/api/fleet"))[1] == {
        "ok": True,
        "nodes": {"ONLINE": 5, "STALE": 0, "DEAD": 0},
        "silence": None,
    }
    await clock.advance(22_000)
    _, body = await site.control("GET", "/api/fleet")
    assert body["nodes"] == {"ONLINE": 0, "STALE": 0, "DEAD": 5}
    assert (body["silence"]["silent"], body["silence"]["known"]) == (5, 5)
    assert datetime.fromisoformat(body["silence"]["until"]) > datetime.fromtimestamp(clock.now() / 1000, UTC)
    assert {(await site.job(job_id))["status"] for job_id in jobs} == {"running"}
    [line] = lines(site, "FLEET_SILENT")
    assert line["detail"] == {"silent": 5, "known": 5, "seconds": 20.0}
    assert await site.control("POST", "/api/fleet/reap") == (200, {"ok": True, "ended": True})
    await clock.advance(100)
    assert {(await site.job(job_id))["losses"] for job_id in jobs} == {1}
    assert await site.control("POST", "/api/fleet/reap") == (200, {"ok": True, "ended": False})
    assert len(lines(site, "FLEET_SILENT")) == 1


async def test_states_are_written_at_the_moment_they_change(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, nodes=NodeSettings(ttl_seconds=5, dead_seconds=20))
    await clock.advance(300)
    await beat(site)
    heard = clock.now()
    await clock.advance(21_000)
    told = {line["event"]: datetime.fromisoformat(line["ts"]).timestamp() * 1000 - heard for line in site.audit()}
    assert (told["NODE_STALE"], told["NODE_DEAD"]) == (5001, 20_001)
