"""Dependencies over HTTP: alone, as a graph in a batch, refused in every way; what a job tells of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import MakeSite, Site

WAIT = {"wait_seconds": 10}


async def end(site: Site, kind: str, *, ok: bool = True, retry: bool = False) -> dict[str, Any]:
    lease = await site.lease(kinds=[kind], **WAIT)
    status, body = await site.finish(lease, ok=ok, retry=retry)
    assert status == 200, body
    return lease


async def ended(site: Site, job_id: str) -> dict[str, Any]:
    _, job = await site.data("GET", f"/api/jobs/{job_id}?wait_seconds=10")
    found: dict[str, Any] = job
    return found


def entry(kind: str, *parents: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "ref": kind, "depends_on": list(parents), **fields}


async def batch(site: Site, *entries: dict[str, Any], **fields: Any) -> tuple[int, Any]:
    return await site.data("POST", "/api/jobs", {"jobs": list(entries), **fields})


async def test_a_waiting_pull_gets_a_job_as_soon_as_what_it_depends_on_is_done(site: Site):
    first = await site.submit("a")
    second = await site.submit("b", depends_on=[first])
    assert (await site.job(second))["depends_on_left"] == 1
    await end(site, "a")
    lease = await site.lease(kinds=["b"], **WAIT)
    assert lease["job_id"] == second
    assert (await site.job(second))["depends_on_left"] == 0


async def test_a_graph_in_any_order_runs_in_its_own(site: Site):
    status, body = await batch(site, entry("c", "a", "b"), entry("b", "a"), entry("a"), atomic=True)
    assert (status, [one["status"] for one in body["jobs"]]) == (200, ["accepted"] * 3)
    for kind in "abc":
        lease = await end(site, kind)
        assert lease["job_id"] == body["jobs"]["cba".index(kind)]["job_id"]
    assert (await site.stored())[0] == {"job:completed": 3}


async def test_a_failure_cancels_with_the_root_cause_and_is_told(site: Site):
    _, body = await batch(site, entry("a"), entry("b", "a"), entry("c", "b"))
    a, b, c = (one["job_id"] for one in body["jobs"])
    await end(site, "a", ok=False)
    for one in (b, c):
        job = await ended(site, one)
        assert (job["status"], job["reason"], job["root_cause"]) == ("cancelled", "DEPENDENCY_FAILED", a)


async def test_a_held_job_is_quarantined_and_a_repeat_says_so(site: Site):
    first = await site.submit("a", max_retries=0)
    fields = {"kind": "b", "depends_on": [first], "on_dependency_failure": "hold", "idempotency_key": "k"}
    _, made = await site.data("POST", "/api/jobs", fields)
    assert (await site.data("POST", "/api/jobs", fields))[1]["status"] == "in_progress"
    await end(site, "a", ok=False)
    while (job := await site.job(made["job_id"]))["status"] == "pending":
        pass
    assert (job["status"], job["reason"], job["root_cause"]) == ("quarantined", "DEPENDENCY_FAILED", first)
    assert (await site.data("POST", "/api/jobs", fields))[1]["status"] == "quarantined"
    _, listed = await site.data("GET", "/api/jobs?status=quarantined")
    assert [one["job_id"] for one in listed["jobs"]] == [made["job_id"]]
    assert (await site.data("POST", f"/api/jobs/{made['job_id']}/cancel"))[1]["status"] == "cancelled"


async def test_waiting_for_a_jobs_end_is_not_over_when_it_is_held(make_site: MakeSite):
    site = await make_site()
    first = await site.submit("a")
    held = await site.submit("b", depends_on=[first], on_dependency_failure="hold")
    with site.app.hub.waiting.job(held) as waiter:
        await end(site, "a", ok=False)
        while (await site.job(held))["status"] == "pending":
            pass
        assert not waiter.event.is_set()


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize(
    "entries",
    [
        [entry("a", "a")],
        [entry("a", "b"), entry("b", "a"), entry("c")],
        [entry("a", "c"), entry("b", "a"), entry("c", "b")],
    ],
)
async def test_a_cycle_is_422_and_nothing_is_stored(make_site: MakeSite, entries: Any, atomic: bool):
    site = await make_site()
    status, body = await batch(site, *entries, atomic=atomic)
    assert (status, body["code"]) == (422, "dependency_cycle")
    assert await site.stored() == ({}, 0)


@pytest.mark.parametrize("parents", [["nope"], ["nope", *(f"n{n}" for n in range(300))]])
async def test_an_unknown_parent_is_422_and_nothing_is_stored(make_site: MakeSite, parents: list[str]):
    site = await make_site()
    job = {"kind": "b", "depends_on": parents, "idempotency_key": "k"}
    status, body = await site.data("POST", "/api/jobs", job)
    assert (status, body["code"]) == (422, "unknown_dependency")
    assert "nope" in body["detail"]
    for path, fields in (("/api/jobs", {"jobs": [job], "atomic": True}), ("/mesh/submit_request", job)):
        status, body = await site.data("POST", path, fields)
        assert (status, body["code"]) == (422, "unknown_dependency")
    status, body = await batch(site, {**job, "ref": "x"}, entry("c", "x"))
    assert [one["code"] for one in body["jobs"]] == ["unknown_dependency"] * 2
    assert await site.stored() == ({}, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"depends_on": "a"},
        {"depends_on": [1]},
        {"depends_on": [""]},
        {"depends_on": ["x"] * 10_001},
        {"on_dependency_failure": "explode"},
        {"ref": "a"},
    ],
)
async def test_bad_dependencies_of_a_single_job_are_422(make_site: MakeSite, fields: dict[str, Any]):
    site = await make_site()
    status, body = await site.data("POST", "/api/jobs", {"kind": "a", **fields})
    assert (status, body["code"]) == (422, "invalid_field")
    assert await site.stored() == ({}, 0)


async def test_a_ref_given_twice_refuses_the_batch(make_site: MakeSite):
    site = await make_site()
    for more in ([], [entry("b", "a")]):
        status, body = await batch(site, {"kind": "x", "ref": "a"}, {"kind": "y", "ref": "a"}, *more)
        assert (status, body["code"]) == (422, "invalid_field")
    assert await site.stored() == ({}, 0)


async def test_too_many_dependencies_in_one_batch_are_refused(make_site: MakeSite):
    site = await make_site()
    refs = [{"kind": "k", "ref": f"r{n}"} for n in range(900)]
    more = [{"kind": "k", "depends_on": [one["ref"] for one in refs]} for _ in range(30)]
    status, body = await batch(site, *refs, *more)
    assert (status, body["code"]) == (422, "invalid_field")
    assert await site.stored() == ({}, 0)


async def test_an_entry_that_depends_on_a_refused_one_is_refused_and_the_others_are_not(make_site: MakeSite):
    site = await make_site()
    bad = {"kind": "a", "ref": "a", "priority": 9}
    status, body = await batch(site, bad, entry("b", "a"), entry("c"))
    assert status == 200
    assert [(one["ok"], one.get("code")) for one in body["jobs"]] == [
        (False, "invalid_field"),
        (False, "invalid_field"),
        (True, None),
    ]
    status, body = await batch(site, bad, entry("b", "a"), entry("c"), atomic=True)
    assert (status, body["code"]) == (422, "invalid_field")
    assert (await site.stored())[0] == {"job:pending": 1}


async def test_a_repeated_graph_is_the_same_jobs(site: Site):
    entries = [entry("b", "a", idempotency_key="kb"), entry("a", idempotency_key="ka")]
    _, first = await batch(site, *entries, atomic=True)
    _, again = await batch(site, *entries, atomic=True)
    assert [one["job_id"] for one in first["jobs"]] == [one["job_id"] for one in again["jobs"]]
    assert [(one["dedup"], one["status"]) for one in again["jobs"]] == [(True, "in_progress")] * 2
    await end(site, "a")
    await end(site, "b")
    assert (await batch(site, *entries))[1]["jobs"][0]["status"] == "completed"


async def test_the_fleets_route_takes_dependencies_too(make_site: MakeSite):
    site = await make_site()
    first = await site.submit("a")
    body = {"kind": "b", "depends_on": [first], "ref": "ignored"}
    status, made = await site.data("POST", "/mesh/submit_request", body)
    assert status == 200
    assert (await site.job(made["job_id"]))["depends_on_left"] == 1


async def test_a_dependent_of_what_has_failed_is_accepted_and_cancelled(make_site: MakeSite):
    site = await make_site()
    first = await site.submit("a")
    await site.data("POST", f"/api/jobs/{first}/cancel")
    status, made = await site.data("POST", "/api/jobs", {"kind": "b", "depends_on": [first]})
    assert (status, made["status"]) == (201, "accepted")
    assert (await site.job(made["job_id"]))["root_cause"] == first


async def test_a_hub_that_is_killed_between_two_steps_goes_on_after_the_start(make_site: MakeSite, monkeypatch: Any):
    from sheratan_hub import upkeep

    site = await make_site("sqlite")
    _, body = await batch(site, entry("a"), entry("b", "a"), entry("c", "b"))
    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "cascades", list)
        await end(site, "a", ok=False)
        await site.app.hub.sweep()
        assert (await site.stored())[0] == {"job:failed": 1, "job:pending": 2}
        await site.app.stop()
    site = await make_site("sqlite")
    for one in body["jobs"][1:]:
        assert (await ended(site, one["job_id"]))["status"] == "cancelled"


async def test_many_parents_are_linked_after_the_answer(site: Site):
    parts = [{"kind": "part", "ref": f"r{n}"} for n in range(150)]
    _, body = await batch(site, {"kind": "sum", "depends_on": [one["ref"] for one in parts]}, *parts)
    ids = [one["job_id"] for one in body["jobs"]]
    alone = await site.submit("alone", depends_on=ids[1:])
    for _ in range(2):
        _, pulled = await site.data("POST", "/api/jobs/pull", {"node_id": "n", "max": 100, "kinds": ["part"]})
        results = [{"job_id": one["job_id"], "lease_id": one["lease_id"], "ok": True} for one in pulled["jobs"]]
        assert (await site.data("POST", "/api/results", {"results": results}))[0] == 200
    found = {(await site.lease(kinds=[kind], **WAIT))["job_id"] for kind in ("sum", "alone")}
    assert found == {ids[0], alone}


async def test_a_repeat_is_known_even_when_what_it_depended_on_is_gone(make_site: MakeSite):
    site = await make_site()
    ids = [await site.submit("part") for _ in range(101)]
    job = {"kind": "sum", "depends_on": ids, "idempotency_key": "k"}
    _, made = await site.data("POST", "/api/jobs", job)
    status, again = await site.data("POST", "/api/jobs", {**job, "depends_on": [*ids, "pruned"]})
    assert (status, again["job_id"], again["dedup"]) == (200, made["job_id"], True)
