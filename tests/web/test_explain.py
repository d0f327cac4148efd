"""Explain over HTTP: each reason on every store, with evidence and end; what it costs and does not change."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sheratan_hub.client import HubClient
from sheratan_hub.clock import VirtualClock, rfc3339
from sheratan_hub.config import QueueSettings
from tests.conftest import TOKEN, MakeSite, Site

STORES = ("memory", "sqlite", "file")


@pytest.fixture(params=STORES)
async def still(request: pytest.FixtureRequest, make_site: MakeSite) -> Site:
    """A hub on each store whose clock is moved by hand."""
    return await make_site(request.param, VirtualClock())


async def explain(site: Site, job_id: str) -> dict[str, Any]:
    status, body = await site.data("GET", f"/api/jobs/{job_id}/explain")
    assert (status, body["ok"], body["job_id"]) == (200, True, job_id)
    assert bool(body["runnable"]) == ([one["reason"] for one in body["reasons"]] == ["waits_its_turn"])
    found: dict[str, Any] = body
    return found


async def why(site: Site, job_id: str) -> dict[str, Any]:
    """The only reason."""
    (reason,) = (await explain(site, job_id))["reasons"]
    assert reason["detail"].endswith(".")
    found: dict[str, Any] = reason
    return found


async def once(site: Site, job_id: str, reason: str) -> dict[str, Any]:
    """The only reason, as soon as it is this one: sweeps come after the time that they act on."""
    while (found := await why(site, job_id))["reason"] != reason:
        await moved(site).advance(10)
    return found


async def beat(site: Site, node_id: str = "n1", **fields: Any) -> None:
    status, _ = await site.control("POST", "/api/hosts/heartbeat", {"node_id": node_id, **fields})
    assert status == 200


def at(site: Site, ms: int = 0) -> str:
    return rfc3339(site.app.clock.now() + ms)


def moved(site: Site) -> VirtualClock:
    clock = site.app.clock
    assert isinstance(clock, VirtualClock)
    return clock


async def test_a_job_that_nothing_stops_waits_its_turn(still: Site) -> None:
    await beat(still)
    job_id = await still.submit(priority=1)
    before = await still.stored()
    found = await explain(still, job_id)
    assert found == {
        "ok": True,
        "job_id": job_id,
        "status": "pending",
        "runnable": True,
        "reasons": [
            {
                "reason": "waits_its_turn",
                "detail": "Nothing stops it: it waits for a pull of one of 1 free nodes, and for its turn.",
                "evidence": {"free_nodes": 1, "priority": 1, "level": 1, "lane_waits_since_at": at(still)},
                "until": None,
            }
        ],
        "expires_at": None,
        "rate_limit": None,
        "nodes": {
            "known": 1,
            "live": 1,
            "capable": 1,
            "free": 1,
            "cut": False,
            "shown": [
                {
                    "node_id": "n1",
                    "status": "ONLINE",
                    "capable": True,
                    "leases": 0,
                    "waiting_pulls": 0,
                    "reasons": [],
                }
            ],
        },
    }
    assert await still.stored() == before
    assert (await still.lease())["job_id"] == job_id


async def test_not_pending_a_running_job(still: Site) -> None:
    job_id = await still.submit(timeout_seconds=60, expires_in_seconds=900)
    await still.lease()
    found = await explain(still, job_id)
    assert (found["nodes"], found["expires_at"], found["reasons"][0]["reason"]) == (None, None, "not_pending")
    assert found["reasons"][0]["until"] == at(still, 60_000)
    assert found["reasons"][0]["evidence"] == {
        "status": "running",
        "node_id": "n1",
        "attempt": 1,
        "started_at": at(still),
        "lease_until": at(still, 300_000),
        "times_out_at": at(still, 60_000),
        "cancel_requested": False,
    }


async def test_not_pending_a_finished_job(still: Site) -> None:
    job_id = await still.submit()
    await still.finish(await still.lease())
    assert await why(still, job_id) == {
        "reason": "not_pending",
        "detail": "It is completed.",
        "evidence": {"status": "completed", "reason": None, "finished_at": at(still), "root_cause": None},
        "until": None,
    }


async def test_not_before(still: Site) -> None:
    await beat(still)
    job_id = await still.submit(delay_seconds=90, expires_in_seconds=900)
    assert (await explain(still, job_id))["expires_at"] == at(still, 900_000)
    reason = await why(still, job_id)
    assert (reason["reason"], reason["until"]) == ("not_before", at(still, 90_000))
    await moved(still).advance(90_000)
    assert (await once(still, job_id, "waits_its_turn"))["until"] is None


async def test_backoff(still: Site) -> None:
    await beat(still)
    job_id = await still.submit()
    await still.finish(await still.lease(), ok=False, retry_after_seconds=30)
    reason = await why(still, job_id)
    assert (reason["reason"], reason["until"], reason["evidence"]) == (
        "backoff",
        at(still, 30_000),
        {"failures": 1, "losses": 0},
    )


async def test_dependency_and_quarantined(still: Site) -> None:
    await beat(still)
    first, second = await still.submit("a"), await still.submit("b")
    job_id = await still.submit("c", depends_on=[first, second], on_dependency_failure="hold")
    reason = await why(still, job_id)
    parents = [{"job_id": id, "status": "pending", "failed": False} for id in (first, second)]
    assert (reason["reason"], reason["evidence"]) == (
        "dependency",
        {"parents_left": 2, "parents_failed": 0, "parents": parents, "linking": False},
    )
    await still.finish(await still.lease(kinds=["a"]))
    while (reason := await why(still, job_id))["evidence"]["parents_left"] == 2:
        await moved(still).advance(10)
    assert reason["evidence"]["parents"] == parents[1:]
    await still.finish(await still.lease(kinds=["b"]), ok=False, retry=False)
    assert await once(still, job_id, "quarantined") == {
        "reason": "quarantined",
        "detail": f"It is on hold until what it depends on is redriven: job {second} has failed.",
        "evidence": {
            "reason": "DEPENDENCY_FAILED",
            "root_cause": second,
            "parents": [{"job_id": second, "status": "failed", "failed": True}],
            "linking": False,
        },
        "until": None,
    }


async def test_paused(still: Site) -> None:
    await beat(still)
    job_id = await still.submit("k")
    await still.data("POST", "/admin/pause", {"kind": "k", "seconds": 60, "reason": "repairs"})
    reason = await why(still, job_id)
    assert (reason["reason"], reason["until"], reason["detail"]) == (
        "paused",
        at(still, 60_000),
        "Kind k is paused: repairs.",
    )
    await still.data("POST", "/admin/resume")
    await still.data("POST", "/admin/pause")
    reason = await why(still, job_id)
    assert (reason["until"], reason["evidence"]["kind"]) == (None, None)


async def test_throttled(still: Site) -> None:
    await beat(still)
    await still.data("PUT", "/admin/rate-limits/s", {"concurrent": 1, "per_minute": 0})
    await still.submit(source="s")
    job_id = await still.submit(source="s")
    await still.lease()
    found = await explain(still, job_id)
    assert (found["status"], found["rate_limit"]) == (
        "throttled",
        {"source": "s", "per_minute": 0, "concurrent": 1, "running": 1},
    )
    reason = await why(still, job_id)
    assert (reason["reason"], reason["evidence"]) == ("throttled", {"source": "s", "running": 1, "concurrent": 1})


async def test_several_reasons_are_all_told(still: Site) -> None:
    await beat(still)
    await still.data("POST", "/admin/pause")
    job_id = await still.submit(delay_seconds=5, required_capabilities=["gpu"])
    reasons = [one["reason"] for one in (await explain(still, job_id))["reasons"]]
    assert reasons == ["not_before", "paused", "no_capable_node"]


@pytest.mark.parametrize("scheme", STORES)
async def test_inflight_limit(make_site: MakeSite, scheme: str) -> None:
    site = await make_site(scheme, VirtualClock(), queue=QueueSettings(max_inflight=1))
    await beat(site)
    await site.submit()
    await site.lease()
    reason = await why(site, await site.submit())
    assert (reason["reason"], reason["evidence"]) == ("inflight_limit", {"inflight": 1, "max_inflight": 1})


async def test_no_capable_node_and_not_capable(still: Site) -> None:
    await beat(still, capabilities=["eu"])
    job_id = await still.submit("k", required_capabilities=["gpu", "eu"])
    reason = await why(still, job_id)
    assert (reason["reason"], reason["evidence"]) == (
        "no_capable_node",
        {
            "kind": "k",
            "required_capabilities": ["eu", "gpu"],
            "nodes": 1,
            "lacking": ["gpu"],
            "ask_for_other_kinds": 0,
        },
    )
    (node,) = (await explain(still, job_id))["nodes"]["shown"]
    assert [(one["reason"], one["evidence"]) for one in node["reasons"]] == [("not_capable", {"lacking": ["gpu"]})]


@pytest.mark.parametrize(
    ("fields", "silent_ms", "reason", "evidence"),
    [
        ({}, 121_000, "node_stale", {"last_seen_at": -121_000}),
        ({}, 601_000, "node_dead", {"last_seen_at": -601_000}),
        ({"status": "busy"}, 0, "node_busy", {"last_seen_at": 0}),
        ({"max_concurrent": 0}, 0, "node_full", {"leases": 0, "max_concurrent": 0}),
    ],
)
async def test_the_states_of_nodes(
    still: Site, fields: dict[str, Any], silent_ms: int, reason: str, evidence: dict[str, Any]
) -> None:
    await beat(still, **fields)
    await moved(still).advance(silent_ms)
    job_id = await still.submit()
    found = await explain(still, job_id)
    assert [(one["reason"], one["evidence"]) for one in found["reasons"]] == [
        (reason, {"nodes": 1, "node_ids": ["n1"]})
    ]
    (node,) = found["nodes"]["shown"]
    told = {name: at(still, value) if name == "last_seen_at" else value for name, value in evidence.items()}
    assert [(one["reason"], one["evidence"]) for one in node["reasons"]] == [(reason, told)]
    _, body = await still.data("POST", "/api/jobs/pull", {"node_id": "n1"})
    assert (body["jobs"], body["reason"]) == ([], reason)


async def test_a_node_that_holds_all_it_may_is_full(still: Site) -> None:
    await beat(still, max_concurrent=1)
    await still.submit()
    await still.lease()
    (node,) = (await explain(still, await still.submit()))["nodes"]["shown"]
    assert (node["leases"], node["reasons"][0]["detail"]) == (1, "The node is full (1 of 1 leases).")
    assert node["reasons"][0]["evidence"] == {"leases": 1, "max_concurrent": 1}


async def test_kind_not_asked(site: Site) -> None:
    await beat(site)
    poll = {"node_id": "n1", "kinds": ["other"], "wait_seconds": 30}
    waiting = asyncio.create_task(site.data("POST", "/api/jobs/pull", poll))
    job_id = await site.submit("k")
    while not (found := await explain(site, job_id))["nodes"]["shown"][0]["waiting_pulls"]:
        pass
    assert found["reasons"][0]["detail"] == "None of 1 nodes asks for jobs of kind k."
    (reason,) = found["nodes"]["shown"][0]["reasons"]
    assert (reason["reason"], reason["evidence"]) == ("kind_not_asked", {"kind": "k", "asked": ["other"]})
    other = await site.submit("other")
    assert [lease["job_id"] for lease in (await waiting)[1]["jobs"]] == [other]


async def test_a_job_that_does_not_exist_is_404(site: Site) -> None:
    status, body = await site.data("GET", "/api/jobs/nonsense/explain")
    assert (status, body["code"]) == (404, "job_not_found")


async def test_the_client_explains(make_site: MakeSite) -> None:
    site = await make_site()
    await beat(site)
    job_id = await site.submit(required_capabilities=["gpu"])
    async with HubClient(site.url("control", ""), site.url("data", ""), TOKEN) as hub:
        found = await hub.explain(job_id)
    assert (found.runnable, [one.reason for one in found.reasons]) == (False, ["no_capable_node"])
    assert found.nodes is not None
    assert (found.nodes.known, found.nodes.shown[0].reasons[0].evidence) == (1, {"lacking": ["gpu"]})
