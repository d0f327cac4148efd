"""A result that asks for the next leases: both in one transaction, the result first."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.config import NodeSettings, QueueSettings
from tests.conftest import MakeSite, Site
from tests.web.test_data import LEASE_FIELDS, beat, refused, until

PATHS = pytest.mark.parametrize("path", ["/api/jobs/{id}/result", "/mesh/submit_result", "/api/results"])
WORK = {"node_id": "n1"}


async def report(site: Site, path: str, lease: dict[str, Any], pull: Any, **fields: Any) -> tuple[int, Any]:
    """Sends a result with a pull; a batch's answer is that of its one result, or of its one refused entry."""
    body = {"lease_id": lease["lease_id"], "ok": True, **fields}
    if path != "/api/jobs/{id}/result":
        body["job_id"] = lease["job_id"]
    if path != "/api/results":
        return await site.data("POST", path.format(id=lease["job_id"]), {**body, "pull": pull})
    status, answer = await site.data("POST", path, {"results": [body], "pull": pull})
    if status != 200:
        return status, answer
    (one,) = answer.pop("results")
    return (200, {**one, **answer}) if one["ok"] else (one["status"], {**answer, **one})


def untimed(answer: Any) -> Any:
    return {**answer, "jobs": [{**lease, "lease_seconds": 0} for lease in answer["jobs"]]}


@PATHS
async def test_the_next_jobs_come_with_the_answer_to_a_result(site: Site, path: str) -> None:
    first, second, third, fourth = [await site.submit(params={"n": n}) for n in range(4)]
    status, body = await report(site, path, await site.lease(), {**WORK, "max": 2}, result={"n": 7})
    assert status == 200
    assert body == {"ok": True, "job_id": first, "status": "completed", "jobs": body["jobs"]}
    assert [(one["job_id"], one["params"]) for one in body["jobs"]] == [(second, {"n": 1}), (third, {"n": 2})]
    assert set(body["jobs"][0]) == LEASE_FIELDS
    assert [(await site.job(id))["status"] for id in (first, second, fourth)] == ["completed", "running", "pending"]
    assert (await site.finish(body["jobs"][0]))[1]["status"] == "completed"


@PATHS
async def test_without_a_job_the_answer_says_why_and_when_to_ask_again(site: Site, path: str) -> None:
    job_id = await site.submit()
    _, body = await report(site, path, await site.lease(), WORK, ok=False, error="e", retry_after_seconds=60)
    assert 750 <= body.pop("defer_ms") <= 1250
    told = {"ok": True, "job_id": job_id, "status": "pending", "retry_in_seconds": 60.0}
    assert body == {**told, "jobs": [], "reason": "no_job"}


@PATHS
async def test_a_lease_that_ends_makes_room_for_the_next_in_the_same_request(make_site: MakeSite, path: str) -> None:
    for scheme in ("memory", "sqlite"):
        site = await make_site(scheme, queue=QueueSettings(max_inflight=1))
        await site.submit()
        job_id = await site.submit()
        lease = await site.lease()
        _, full = await site.data("POST", "/api/jobs/pull", {"node_id": "n2"})
        assert full["reason"] == "inflight_limit"
        _, body = await report(site, path, lease, {**WORK, "max": 5})
        assert [one["job_id"] for one in body["jobs"]] == [job_id]


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"lease_id": "wrong"}, 409, "lease_superseded"),
    ({"job_id": "none"}, 404, "job_not_found"),
    ({"integrity": {"mode": "sha256", "sha256": "wrong"}}, 422, "result_integrity_fail"),
    ({"retry": "maybe"}, 422, "invalid_field"),
    ({"pull": {"node_id": "n1", "max": 0}}, 422, "invalid_field"),
    ({"pull": {"max": 1}}, 422, "invalid_field"),
    ({"pull": [1]}, 422, "invalid_field"),
]


@pytest.mark.parametrize(("wrong", "status", "code"), REFUSED)
@pytest.mark.parametrize("path", ["/api/jobs/{id}/result", "/mesh/submit_result"])
async def test_a_refused_result_leases_nothing(
    site: Site, path: str, wrong: dict[str, Any], status: int, code: str
) -> None:
    await site.submit()
    lease = await site.lease()
    waiting = await site.submit()
    given = {"lease_id": lease["lease_id"], "ok": True, "pull": {**WORK, "wait_seconds": 20}, **wrong}
    given = {"job_id": lease["job_id"], **given}
    job_id = given["job_id"] if path.startswith("/mesh") else given.pop("job_id")
    refused(await site.data("POST", path.format(id=job_id), given), status, code)
    assert (await site.job(lease["job_id"]))["status"] == "running"
    assert (await site.job(waiting))["attempt"] == 0
    assert len(site.app.hub.waiting) == 0


async def test_unknown_fields_of_a_pull_are_refused_but_on_the_fleets_route(site: Site) -> None:
    await site.submit()
    lease = await site.lease()
    pull = {**WORK, "color": "red"}
    refused(await report(site, "/api/jobs/{id}/result", lease, pull), 422, "invalid_field")
    refused(await report(site, "/api/results", lease, pull), 422, "invalid_field")
    assert (await report(site, "/mesh/submit_result", lease, pull))[1]["reason"] == "no_job"


async def test_the_fleets_result_does_not_wait_for_work(site: Site) -> None:
    await site.submit()
    pull = {**WORK, "wait_seconds": 30}
    async with asyncio.timeout(15):
        assert (await report(site, "/mesh/submit_result", await site.lease(), pull))[1]["reason"] == "no_job"


@PATHS
async def test_a_repeated_result_and_pull_get_the_same_answer_and_the_same_leases(site: Site, path: str) -> None:
    await site.submit()
    lease = await site.lease()
    for n in range(3):
        await site.submit(params={"n": n})
    pull = {**WORK, "pull_id": "p", "max": 2}
    _, first = await report(site, path, lease, pull, result=1)
    _, again = await report(site, path, lease, pull, result=1)
    assert untimed(again) == untimed(first)
    assert [one["attempt"] for one in first["jobs"]] == [1, 1]
    if path != "/api/results":
        refused(await report(site, path, lease, {**WORK, "pull_id": "q"}, result=2), 409, "result_conflict")
    assert await site.app.hub.counts() == {"job:completed": 1, "job:running": 2, "job:pending": 1}


@PATHS
async def test_jobs_that_must_be_looked_up_come_with_the_answer_too(site: Site, path: str) -> None:
    """Large params lie apart, capabilities stand in the heartbeat, and the lanes are many."""
    await beat(site, capabilities=["gpu"])
    await site.submit(required_capabilities=["gpu"])
    lease = await site.lease()
    large = [await site.submit(f"k{n}", params={"text": "x" * 5000}, priority=n % 4) for n in range(6)]
    _, body = await report(site, path, lease, {**WORK, "max": 6})
    assert sorted(one["job_id"] for one in body["jobs"]) == sorted(large)
    assert [one["priority"] for one in body["jobs"]] == [0, 0, 1, 1, 2, 3]
    assert {len(one["params"]["text"]) for one in body["jobs"]} == {5000}


async def test_the_pull_counts_for_its_own_node_and_kinds(site: Site) -> None:
    await site.submit("a")
    await site.submit("b")
    other = await site.submit("c")
    lease = await site.lease("n1", kinds=["a"])
    _, body = await report(site, "/api/jobs/{id}/result", lease, {"node_id": "n2", "kinds": ["c"]}, node_id="n1")
    assert [one["job_id"] for one in body["jobs"]] == [other]
    assert (await site.job(other))["node_id"] == "n2"


@PATHS
async def test_a_silent_nodes_result_is_taken_but_it_gets_no_job(make_site: MakeSite, path: str) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, nodes=NodeSettings(ttl_seconds=2, dead_seconds=20))
    await beat(site)
    await site.submit()
    await site.submit()
    lease = await site.lease()
    await clock.advance(3_000)
    _, body = await report(site, path, lease, {**WORK, "wait_seconds": 20})
    assert (body["status"], body["jobs"], body["reason"]) == ("completed", [], "node_stale")


# batches


async def test_in_a_batch_the_pull_happens_whatever_becomes_of_the_entries(site: Site) -> None:
    await site.submit()
    await site.submit()
    lease, following = await site.lease(), await site.submit()
    fine = {"job_id": lease["job_id"], "lease_id": lease["lease_id"], "ok": True}
    entries = [fine, {**fine, "lease_id": "wrong"}, {**fine, "pull": WORK}, {**fine, "job_id": "none"}]
    status, body = await site.data("POST", "/api/results", {"results": entries, "pull": WORK})
    assert status == 200
    assert [one.get("code") for one in body["results"]] == [None, "lease_superseded", "invalid_field", "job_not_found"]
    (second,) = body["jobs"]
    _, body = await site.data("POST", "/api/results", {"results": entries[1:], "pull": {**WORK, "max": 3}})
    assert [one["ok"] for one in body["results"]] == [False] * 3
    assert [one["job_id"] for one in body["jobs"]] == [following]
    assert second["job_id"] != following


async def test_a_batch_may_hold_a_pull_and_no_result(site: Site) -> None:
    job_id = await site.submit()
    _, body = await site.data("POST", "/api/results", {"results": [], "pull": WORK})
    assert (body["results"], [one["job_id"] for one in body["jobs"]]) == ([], [job_id])


# waiting


@pytest.mark.parametrize("path", ["/api/jobs/{id}/result", "/api/results"])
async def test_the_result_is_taken_at_once_and_the_answer_waits_for_work(site: Site, path: str) -> None:
    first = await site.submit()
    lease = await site.lease()
    sending = asyncio.create_task(report(site, path, lease, {**WORK, "wait_seconds": 20}))
    await until(lambda: len(site.app.hub.waiting) == 1)
    _, job = await site.data("GET", f"/api/jobs/{first}?wait_seconds=10")
    assert (job["status"], sending.done()) == ("completed", False)
    second = await site.submit()
    _, body = await asyncio.wait_for(sending, 10)
    assert (body["status"], [one["job_id"] for one in body["jobs"]]) == ("completed", [second])


async def test_a_wait_after_a_result_lasts_as_long_as_it_asked(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    await site.submit()
    lease = await site.lease()
    sending = asyncio.create_task(report(site, "/api/jobs/{id}/result", lease, {**WORK, "wait_seconds": 3}))
    await until(lambda: bool(site.app.hub.waiting))
    await site.data("GET", f"/api/jobs/{lease['job_id']}?wait_seconds=10")
    await clock.advance(2_999)
    assert len(site.app.hub.waiting) == 1
    await clock.advance(1)
    assert (await asyncio.wait_for(sending, 5))[1]["reason"] == "no_job"


async def test_a_stopping_hub_answers_a_result_that_waits_for_work(site: Site) -> None:
    await site.submit()
    lease = await site.lease()
    sending = asyncio.create_task(report(site, "/api/results", lease, {**WORK, "wait_seconds": 20}))
    await until(lambda: len(site.app.hub.waiting) == 1)
    await site.data("GET", f"/api/jobs/{lease['job_id']}?wait_seconds=10")
    site.app.hub.stop()
    _, body = await asyncio.wait_for(sending, 5)
    assert (body["status"], body["jobs"], body["reason"]) == ("completed", [], "draining")
