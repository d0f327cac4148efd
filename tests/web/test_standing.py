"""Over HTTP: rate limits with their headers, throttled jobs, pauses, and what the audit log tells of them."""

from __future__ import annotations

from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import QueueSettings, RateLimitSettings
from tests.conftest import MakeSite, Site

SLOW = {"slow": RateLimitSettings(2, 1)}


async def pull(site: Site, node_id: str = "n1", **fields: Any) -> Any:
    status, body = await site.data("POST", "/api/jobs/pull", {"node_id": node_id, **fields})
    assert status == 200
    return body


def actions(site: Site) -> list[dict[str, Any]]:
    return [line["detail"] for line in site.audit() if line["event"] == "ADMIN_ACTION"]


@pytest.mark.parametrize("path", ["/api/jobs", "/mesh/submit_request"])
async def test_beyond_its_minute_a_source_is_told_when_to_come_again(make_site: MakeSite, path: str) -> None:
    site = await make_site(clock=VirtualClock(), rate_limits=SLOW)
    job = {"kind": "k", "source": "slow"}
    left = [(await site.ask("data", "POST", path, json=job))[2]["RateLimit"] for _ in range(2)]
    assert left == ['"source";r=1', '"source";r=0;t=30']
    before = await site.stored()
    status, body, headers = await site.ask("data", "POST", path, json=job)
    assert (status, body["code"], headers["Retry-After"]) == (429, "rate_limited", "30")
    assert (headers["RateLimit-Policy"], headers["RateLimit"]) == ('"source";q=2;w=60', '"source";r=0;t=30')
    assert await site.stored() == before
    (line,) = [line for line in site.audit() if line["event"] == "RATE_LIMITED"]
    assert (line["reason"], line["detail"]) == ("submits_per_minute", {"source": "slow"})
    status, _, headers = await site.ask("data", "POST", path, json={"kind": "k", "source": "quick"})
    assert status < 300
    assert "RateLimit" not in headers


async def test_in_a_batch_each_entry_has_its_own_outcome(make_site: MakeSite) -> None:
    site = await make_site(rate_limits=SLOW)
    jobs = [{"kind": "k", "source": source} for source in ("slow", "quick", "slow", "slow", "quick")]
    status, body = await site.data("POST", "/api/jobs", {"jobs": jobs})
    assert (status, [one.get("code", one.get("status")) for one in body["jobs"]]) == (
        200,
        ["accepted", "accepted", "accepted", "rate_limited", "accepted"],
    )
    status, body = await site.data("POST", "/api/jobs", {"jobs": jobs, "atomic": True})
    assert (status, body["code"]) == (429, "rate_limited")


@pytest.mark.parametrize("more", [{}, {"depends_on": []}, {"depends_on": ["first"]}, {"atomic": True}])
async def test_a_batch_and_a_mission_tell_what_their_limited_source_may_still_submit(
    make_site: MakeSite, more: dict[str, Any]
) -> None:
    limits = {"slow": RateLimitSettings(4, 0), "slower": RateLimitSettings(3, 0)}
    site = await make_site(clock=VirtualClock(), rate_limits=limits)
    tied = {"depends_on": more["depends_on"]} if "depends_on" in more else {}
    jobs = [{"kind": "k", "source": "slow", "ref": "first"}, {"kind": "k", "source": "slow", **tied}, {"kind": "k"}]
    batch = {"jobs": jobs, **({"atomic": True} if "atomic" in more else {})}
    _, _, headers = await site.ask("data", "POST", "/api/jobs", json=batch)
    assert (headers["RateLimit-Policy"], headers["RateLimit"]) == ('"source";q=4;w=60', '"source";r=2')
    both = {"jobs": [*jobs, {"kind": "k", "source": "slower"}], "title": "t"}
    status, _, headers = await site.ask("data", "POST", "/api/missions", json=both)
    assert (status, headers["RateLimit"]) == (201, '"source";r=0;t=15')
    status, _, headers = await site.ask("data", "POST", "/api/missions", json=both)
    assert (status, headers["RateLimit"], headers["Retry-After"]) == (429, '"source";r=0;t=15', "15")
    _, _, headers = await site.ask("data", "POST", "/api/jobs", json={"jobs": [{"kind": "k"}]})
    assert "RateLimit" not in headers


async def test_a_limit_is_set_shown_and_dropped_at_run_time(site: Site) -> None:
    path = "/admin/rate-limits/a%2Fb%20c"
    assert (await site.data("GET", path))[1]["code"] == "rate_limit_not_found"
    status, body = await site.data("PUT", path, {})
    shown = {"source": "a/b c", "per_minute": 10, "concurrent": 5, "origin": "stored", "running": 0, "throttled": False}
    assert (status, body) == (200, {"ok": True, **shown})
    assert (await site.data("PUT", path, {"concurrent": 1, "per_minute": 0}))[0] == 200
    await site.submit(source="a/b c")
    await site.lease()
    body = (await site.data("GET", path))[1]
    assert (body["concurrent"], body["running"], body["throttled"]) == (1, 1, True)
    assert (await site.data("DELETE", path))[1]["concurrent"] is None
    assert (await site.data("DELETE", path))[0] == 404
    assert [detail["route"].split()[0] for detail in actions(site)] == ["GET", "PUT", "PUT", "GET", "DELETE", "DELETE"]
    assert actions(site)[-1]["refused"] == "rate_limit_not_found"


async def test_throttled_jobs_are_shown_and_listed_as_such_and_come_back(site: Site) -> None:
    await site.data("PUT", "/admin/rate-limits/s", {"concurrent": 1, "per_minute": 0})
    ids = [await site.submit(source="s") for _ in range(3)]
    delayed, free = await site.submit(source="s", delay_seconds=600), await site.submit(source="t")
    held = await site.lease()

    async def listed(status: str) -> list[str]:
        return [job["job_id"] for job in (await site.data("GET", f"/api/jobs?status={status}"))[1]["jobs"]]

    assert [(await site.job(id))["status"] for id in (*ids, delayed, free)] == [
        *("running", "throttled", "throttled", "pending", "pending")
    ]
    assert (await listed("throttled"), await listed("pending")) == (ids[1:], [delayed, free])
    every = (await site.data("GET", "/api/jobs?source=s"))[1]["jobs"]
    assert [job["status"] for job in every] == ["running", "throttled", "throttled", "pending"]
    assert [job["job_id"] for job in (await pull(site, max=9))["jobs"]] == [free]
    body = await pull(site)
    assert (body["jobs"], body["reason"]) == ([], "throttled")
    await site.finish(held)
    assert (await listed("throttled"), await listed("pending")) == ([], [*ids[1:], delayed])
    assert (await site.lease())["job_id"] == ids[1]


async def test_the_configured_cap_holds_for_nodes_that_name_none(make_site: MakeSite) -> None:
    site = await make_site(queue=QueueSettings(max_leases_per_node=2))
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "named", "max_concurrent": 1})
    for _ in range(9):
        await site.submit()
    for node, most in (("unheard", 2), ("named", 1)):
        assert len((await pull(site, node, max=9))["jobs"]) == most
        body = await pull(site, node)
        assert (body["reason"], body["defer_ms"] > 0) == ("node_full", True)


async def test_a_busy_node_is_told_so_until_it_is_not(site: Site) -> None:
    await site.submit()
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1", "status": "busy"})
    assert (await pull(site, wait_seconds=30))["reason"] == "node_busy"
    await site.control("POST", "/api/hosts/heartbeat", {"node_id": "n1"})
    assert (await pull(site))["jobs"]


async def test_empty_answers_do_not_all_ask_for_the_same_delay(make_site: MakeSite) -> None:
    site = await make_site(queue=QueueSettings(max_inflight=1))
    await site.submit()
    delays = {(await pull(site, f"n{n}"))["defer_ms"] for n in range(20)} if (await pull(site))["jobs"] else set()
    assert len(delays) > 5
    assert all(75 <= delay <= 1250 for delay in delays)


async def test_a_pause_is_set_shown_and_ended(site: Site) -> None:
    await site.submit("k")
    status, body = await site.data("POST", "/admin/pause", {"kind": "k", "reason": "repairs"})
    (pause,) = body["pauses"]
    assert (status, pause["kind"], pause["until"], pause["reason"]) == (200, "k", None, "repairs")
    assert (await pull(site))["reason"] == "paused"
    assert (await site.data("POST", "/api/jobs", {"kind": "k"}))[0] == 201
    (_, every) = (await site.data("POST", "/admin/pause", {"seconds": 60}))[1]["pauses"]
    assert every["kind"] is None
    assert every["until"] > every["since"]
    assert (await site.data("POST", "/admin/resume"))[1] == {"ok": True, "pauses": []}
    assert (await pull(site))["jobs"]
    assert [{name: said for name, said in one.items() if name != "route"} for one in actions(site)] == [
        {"paused": "k"},
        {"paused": "all"},
        {"resumed": "all"},
    ]


async def test_a_pause_until_a_time_or_for_a_time_but_not_both(site: Site) -> None:
    until = "2999-01-01T00:00:00Z"
    (pause,) = (await site.data("POST", "/admin/pause", {"until": until}))[1]["pauses"]
    assert pause["until"] == "2999-01-01T00:00:00.000Z"
    assert (await site.data("POST", "/admin/pause", {"until": until, "seconds": 5}))[0] == 422


async def test_who_has_no_token_changes_nothing(site: Site) -> None:
    for method, path in (("POST", "/admin/pause"), ("PUT", "/admin/rate-limits/s"), ("DELETE", "/admin/rate-limits/s")):
        status, body = await site.data(method, path, {}, headers={"Authorization": "Bearer wrong"})
        assert (status, body["code"]) == (403, "invalid_token")
    assert site.app.hub.pauses() == ()
    assert actions(site) == []


async def test_metrics_tell_of_promises_that_are_not_kept(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    for priority in ("HIGH", "NORMAL", "LOW"):
        await site.submit(priority=priority)
    await clock.advance(61_000)
    text = (await site.ask("data", "GET", "/metrics"))[1]
    assert 'sheratan_promises_missed{priority="HIGH"} 1.0' in text
    assert 'sheratan_promises_missed{priority="NORMAL"} 0.0' in text
    assert 'sheratan_oldest_wait_seconds{priority="LOW"} 61.0' in text
