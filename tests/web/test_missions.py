"""Missions over HTTP: a titled graph, counts that are kept, cancel and redrive of all of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.config import IdempotencySettings, RetentionSettings
from tests.conftest import MakeSite, Site

GRAPH = [
    {"kind": "report", "ref": "report", "depends_on": ["left", "right"]},
    {"kind": "part", "ref": "left"},
    {"kind": "part", "ref": "right"},
]


async def begin(site: Site, jobs: Any = GRAPH, **fields: Any) -> dict[str, Any]:
    status, body = await site.data("POST", "/api/missions", {"title": "Survey", "jobs": jobs, **fields})
    assert status == 201, body
    made: dict[str, Any] = body
    return made


async def shown(site: Site, mission_id: str) -> dict[str, Any]:
    status, body = await site.data("GET", f"/api/missions/{mission_id}")
    assert status == 200, body
    told: dict[str, Any] = body
    return told


async def until(site: Site, mission_id: str, **counts: int) -> dict[str, Any]:
    while True:
        told = await shown(site, mission_id)
        if {status: n for status, n in told["counts"].items() if n} == counts:
            return told


async def run_one(site: Site, *, ok: bool = True) -> None:
    lease = await site.lease(wait_seconds=10)
    assert (await site.finish(lease, ok=ok, retry=False))[0] == 200


async def test_a_mission_is_its_jobs_and_is_done_when_they_are(site: Site):
    made = await begin(site, metadata={"for": "Ada"})
    assert [(one["ok"], one["status"]) for one in made["jobs"]] == [(True, "accepted")] * 3
    told = await shown(site, made["mission_id"])
    assert (told["title"], told["metadata"], told["jobs"]) == ("Survey", {"for": "Ada"}, 3)
    assert (told["status"], told["progress"]) == ("pending", 0)
    assert {(await site.job(one["job_id"]))["mission_id"] for one in made["jobs"]} == {made["mission_id"]}
    await run_one(site)
    told = await shown(site, made["mission_id"])
    assert (told["status"], told["progress"]) == ("running", 0.3333)
    await run_one(site)
    await run_one(site)
    told = await until(site, made["mission_id"], completed=3)
    assert (told["status"], told["progress"]) == ("completed", 1)


async def test_a_mission_with_a_bad_job_is_not_made_at_all(make_site: MakeSite):
    site = await make_site()
    cases: list[tuple[Any, str]] = [
        ({"jobs": [*GRAPH, {"kind": ""}]}, "invalid_field"),
        ({"jobs": [{"kind": "a", "depends_on": ["nope"]}]}, "unknown_dependency"),
        ({"jobs": [{"kind": "a", "ref": "a", "depends_on": ["a"]}]}, "dependency_cycle"),
        ({"jobs": [{"kind": "a", "mission_id": "other"}]}, "invalid_field"),
        ({"jobs": [{"kind": "a"}] * 1001}, "batch_too_large"),
        ({"jobs": {}}, "invalid_field"),
        ({"title": ""}, "invalid_field"),
        ({"title": 7}, "invalid_field"),
        ({"metadata": []}, "invalid_field"),
        ({"surprise": 1}, "invalid_field"),
    ]
    for fields, code in cases:
        status, body = await site.data("POST", "/api/missions", {"title": "t", **fields})
        assert (status, body["code"]) == (422, code), fields
    assert await site.stored() == ({}, 0)


async def test_a_mission_that_does_not_fit_is_not_made(make_site: MakeSite):
    from sheratan_hub.config import QueueSettings

    site = await make_site(queue=QueueSettings(max_depth=2))
    status, body = await site.data("POST", "/api/missions", {"title": "t", "jobs": GRAPH})
    assert (status, body["code"]) == (429, "queue_full")
    assert (await site.stored())[0] == {}
    assert (await site.data("GET", "/api/missions"))[1]["missions"] == []


async def test_a_repeated_mission_is_the_same_one(site: Site):
    first = await begin(site, idempotency_key="k")
    status, again = await site.data("POST", "/api/missions", {"idempotency_key": "k", "jobs": GRAPH, "title": "Survey"})
    assert (status, again["dedup"], again["mission_id"]) == (200, True, first["mission_id"])
    assert [one["job_id"] for one in again["jobs"]] == [one["job_id"] for one in first["jobs"]]
    assert {one["status"] for one in again["jobs"]} == {"in_progress"}
    headers = {"Idempotency-Key": "k"}
    _, again = await site.data("POST", "/api/missions", {"title": "Survey", "jobs": GRAPH}, headers=headers)
    assert again["mission_id"] == first["mission_id"]
    status, no = await site.data("POST", "/api/missions", {"title": "Other", "jobs": GRAPH, "idempotency_key": "k"})
    assert (status, no["code"]) == (409, "idempotency_key_collision")
    assert (await site.stored())[0]["job:pending"] == 3


async def test_a_missions_key_lasts_for_its_time_after_the_last_jobs_end(make_site: MakeSite):
    clock = VirtualClock()
    site = await make_site(clock=clock, idempotency=IdempotencySettings(ttl_seconds=100))
    first = await begin(site, [{"kind": "a"}], idempotency_key="k")
    await clock.advance(200_000)
    body = {"title": "Survey", "jobs": [{"kind": "a"}], "idempotency_key": "k"}
    assert (await site.data("POST", "/api/missions", body))[1]["dedup"] is True, "it has not ended"
    await run_one(site)
    await clock.advance(99_000)
    assert (await site.data("POST", "/api/missions", body))[1]["mission_id"] == first["mission_id"]
    await clock.advance(2_000)
    status, again = await site.data("POST", "/api/missions", body)
    assert (status, again["dedup"], again["mission_id"] == first["mission_id"]) == (201, False, False)
    assert (await site.data("POST", "/api/missions", body))[1]["mission_id"] == again["mission_id"]


KEPT = RetentionSettings(completed_seconds=60, cancelled_seconds=30, failed_seconds=90, mission_seconds=200)


async def counted(site: Site) -> dict[str, int]:
    return {facet: n for facet, n in (await site.app.store.counts()).items() if facet.startswith("m")}


async def missions_listed(site: Site) -> list[str]:
    return [one["mission_id"] for one in (await site.data("GET", "/api/missions"))[1]["missions"]]


async def jobs_left(site: Site, mission_id: str) -> int:
    return len((await site.data("GET", f"/api/jobs?mission_id={mission_id}"))[1]["jobs"])


async def soon(look: Callable[[], Awaitable[Any]], expected: Any) -> None:
    """It comes to that: some stores have threads."""
    for _ in range(200):
        if await look() == expected:
            return
        await settle()
    assert await look() == expected


@pytest.mark.parametrize("scheme", ["memory", "sqlite", "file"])
async def test_a_mission_is_forgotten_with_all_its_counts_once_its_jobs_are_and_its_time_is_over(
    make_site: MakeSite, scheme: str
):
    clock = VirtualClock()
    site = await make_site(scheme, clock=clock, retention=KEPT, idempotency=IdempotencySettings(ttl_seconds=10))
    keyed = {"idempotency_key": "k"}
    mission_id = (await begin(site, [{"kind": "a"}, {"kind": "b", "max_retries": 0}], **keyed))["mission_id"]
    other = (await begin(site, [{"kind": "c"}]))["mission_id"]
    await site.finish(await site.lease(kinds=["a"]))
    await site.finish(await site.lease(kinds=["b"]), ok=False)
    await clock.advance(61_000)
    await soon(lambda: jobs_left(site, mission_id), 1)
    told = await shown(site, mission_id)
    assert (told["jobs"], told["counts"]["completed"], told["counts"]["failed"]) == (2, 1, 1)
    await clock.advance(138_000)
    assert (await shown(site, mission_id))["status"] == "failed"
    await clock.advance(2_000)
    await soon(lambda: missions_listed(site), [other])
    status, body = await site.data("GET", f"/api/missions/{mission_id}")
    assert (status, body["code"]) == (404, "mission_not_found")
    assert await counted(site) == {f"m:{other}:pending": 1}
    assert (await site.app.store.page("mission_key")).rows == []
    events = [line.line for line in await site.app.store.events(limit=1000)]
    assert sum(b"mission.pruned" in line for line in events) == 1


async def test_an_id_that_only_jobs_have_named_is_forgotten_with_the_last_of_them(make_site: MakeSite):
    clock = VirtualClock()
    site = await make_site(clock=clock, retention=KEPT)
    for kind in ("a", "b"):
        job_id = await site.submit(kind, mission_id="fleet")
        if kind == "a":
            await site.data("POST", f"/api/jobs/{job_id}/cancel")
    await clock.advance(31_000)
    assert (await shown(site, "fleet"))["counts"]["cancelled"] == 1
    await site.finish(await site.lease())
    await clock.advance(61_000)
    assert await counted(site) == {}
    assert (await site.data("GET", "/api/missions/fleet"))[0] == 404


async def test_a_mission_without_jobs_goes_by_its_age_and_one_that_a_job_has_joined_waits_for_it(make_site: MakeSite):
    clock = VirtualClock()
    site = await make_site(clock=clock, retention=KEPT, idempotency=IdempotencySettings(ttl_seconds=300))
    empty, joined = [(await begin(site, [], idempotency_key=key))["mission_id"] for key in ("1", "2")]
    await site.submit("late", mission_id=joined)
    await clock.advance(299_000)
    assert set(await missions_listed(site)) == {empty, joined}, "their keys are remembered"
    await clock.advance(3_000)
    assert await missions_listed(site) == [joined]
    await site.finish(await site.lease())
    await clock.advance(298_000)
    assert await missions_listed(site) == [joined]
    await clock.advance(3_000)
    assert await missions_listed(site) == []
    assert await counted(site) == {}


async def test_a_missions_key_outlives_its_jobs(make_site: MakeSite):
    clock = VirtualClock()
    site = await make_site(clock=clock, retention=KEPT, idempotency=IdempotencySettings(ttl_seconds=1000))
    body = {"title": "Survey", "jobs": [{"kind": "a"}], "idempotency_key": "k"}
    first = (await site.data("POST", "/api/missions", body))[1]["mission_id"]
    await site.finish(await site.lease())
    await clock.advance(900_000)
    status, again = await site.data("POST", "/api/missions", body)
    assert (status, again["mission_id"], again["jobs"][0]["code"]) == (200, first, "job_not_found")
    await clock.advance(101_000)
    assert await missions_listed(site) == []
    assert (await site.data("POST", "/api/missions", body))[0] == 201


async def test_missions_are_listed_newest_first_by_cursor(site: Site):
    ids = [(await begin(site, [], title=f"m{n}"))["mission_id"] for n in range(5)]
    _, first = await site.data("GET", "/api/missions?limit=3")
    _, rest = await site.data("GET", f"/api/missions?limit=3&cursor={first['next_cursor']}")
    assert [one["mission_id"] for one in (*first["missions"], *rest["missions"])] == ids[::-1]
    assert rest["next_cursor"] is None


async def test_an_id_that_only_jobs_have_named_has_counts_and_no_title(site: Site):
    await site.submit("a", mission_id="fleet")
    await site.submit("a", mission_id="fleet:pending")
    told = await shown(site, "fleet")
    assert (told["title"], told["created_at"], told["metadata"], told["jobs"]) == (None, None, {}, 1)
    assert (await site.data("GET", "/api/missions"))[1]["missions"] == []
    for method, path in (("GET", ""), ("POST", "/cancel"), ("POST", "/redrive")):
        status, body = await site.data(method, f"/api/missions/nobody{path}")
        assert (status, body["code"]) == (404, "mission_not_found")


async def test_cancelling_a_mission_ends_all_that_is_not_finished(site: Site):
    made = await begin(site, [{"kind": "a"}] * 250)
    await run_one(site)
    await site.lease()
    _, told = await site.data("POST", f"/api/missions/{made['mission_id']}/cancel")
    assert (told["cancelled"], told["cancel_requested"]) == (248, 1)
    assert (await until(site, made["mission_id"], completed=1, cancelled=248, running=1))["status"] == "running"
    _, again = await site.data("POST", f"/api/missions/{made['mission_id']}/cancel")
    assert (again["cancelled"], again["cancel_requested"]) == (0, 1)


async def test_redriving_a_mission_brings_back_what_failed_and_what_that_took_along(site: Site):
    made = await begin(site)
    mission_id = made["mission_id"]
    await run_one(site, ok=False)
    await until(site, mission_id, failed=1, cancelled=1, pending=1)
    await run_one(site)
    told = await until(site, mission_id, failed=1, cancelled=1, completed=1)
    assert told["status"] == "failed"
    _, told = await site.data("POST", f"/api/missions/{mission_id}/redrive")
    assert (told["redriven"], told["refused"]) == (2, 0)
    for _ in range(2):
        await run_one(site)
    assert (await until(site, mission_id, completed=3))["status"] == "completed"


async def test_what_a_mission_waits_for_when_all_that_is_left_is_on_hold(make_site: MakeSite):
    site = await make_site()
    made = await begin(
        site, [{"kind": "a", "ref": "a"}, {"kind": "b", "depends_on": ["a"], "on_dependency_failure": "hold"}]
    )
    await run_one(site, ok=False)
    assert (await until(site, made["mission_id"], failed=1, quarantined=1))["status"] == "held"
    await site.data("POST", f"/api/missions/{made['mission_id']}/redrive")
    await until(site, made["mission_id"], pending=2)


@pytest.mark.parametrize("path", ["/api/missions", "/api/missions/x", "/api/missions/x/cancel"])
async def test_missions_live_on_the_data_plane(make_site: MakeSite, path: str):
    site = await make_site()
    assert (await site.control("GET", path))[0] == 410


async def test_a_mission_in_the_metrics_and_the_ledger_is_counted_once(make_site: MakeSite):
    site = await make_site()
    made = await begin(site)
    lines = [line.line.decode() for line in await site.app.store.events()]
    assert sum('"mission.submitted"' in line for line in lines) == 1
    assert sum(made["mission_id"] in line for line in lines) == 4
