"""Missions, dependencies, dead letters, pauses and limits by the client; and batches whose jobs name each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from sheratan_hub.answers import Job
from sheratan_hub.answers_admin import Redriven, RefusedJob
from sheratan_hub.client import HubClient, HubRefused, Refusal, Submitted
from sheratan_hub.config import QueueSettings
from sheratan_hub.merging import groups_of, packs
from tests.conftest import TOKEN
from tests.web.faking import Fake, HastyClock, hangs_up, refuses, says, takes_all


@pytest.fixture
async def hub(make_site: Any) -> AsyncIterator[HubClient]:
    site = await make_site(queue=QueueSettings(max_depth=10))
    async with HubClient(site.url("control", ""), site.url("data", ""), TOKEN, patience_seconds=0) as client:
        yield client


async def fail(hub: HubClient, kind: str) -> str:
    """A dead letter; its id."""
    made = await hub.submit(kind)
    lease = (await hub.pull("n1", kinds=[kind])).jobs[0]
    await hub.fail(lease.job_id, lease.lease_id, "n1", {"type": "E", "message": "no"}, retry=False)
    return made.job_id


async def finish(hub: HubClient) -> str:
    lease = (await hub.pull("n1", wait_seconds=5)).jobs[0]
    await hub.complete(lease.job_id, lease.lease_id, "n1")
    return lease.job_id


# jobs that name each other


def jobs(*names: str) -> list[dict[str, object]]:
    """`a<b` is a job with the ref a that depends on b."""
    split = (name.partition("<") for name in names)
    return [{"ref": ref or None, "depends_on": after.split() if after else None} for ref, _, after in split]


@pytest.mark.parametrize(
    ("given", "groups"),
    [
        (jobs("", "", "<x", "<x"), [[0], [1], [2], [3]]),
        (jobs("a", "", "<a", "b", "<b", "<a"), [[0, 2, 5], [1], [3, 4]]),
        (jobs("a", "b", "", "<b a"), [[0, 1, 3], [2]]),
        (jobs("<a", "<b", "b<a", "a"), [[0, 1, 2, 3]]),
        (jobs("a", "a"), [[0, 1]]),
        (jobs("a", "<x", "<x"), [[0], [1], [2]]),
    ],
)
def test_jobs_that_name_each_other_are_a_group_and_a_common_id_makes_none(
    given: list[dict[str, object]], groups: list[list[int]]
) -> None:
    assert sorted(groups_of(given)) == groups


def test_a_group_is_never_torn_apart_even_if_it_is_larger_than_a_request() -> None:
    bodies = [b"x"] * 1600
    groups = [list(range(300)), list(range(300, 600)), [600], list(range(601, 1600))]
    assert list(packs(groups, bodies)) == [[groups[0]], [groups[1], groups[2]], [groups[3]]]


async def test_jobs_that_name_each_other_stay_together_when_the_others_are_torn_apart(
    fake: Fake, client: HubClient
) -> None:
    async def dislikes_seven(request: web.Request, body: Any) -> web.StreamResponse:
        if any(job["idempotency_key"] == "7" for job in body["jobs"]):
            return await refuses(422, "dependency_cycle")(request, body)
        return await takes_all(request, body)

    fake.script = [dislikes_seven]
    many = [{"kind": "k", "idempotency_key": str(n)} for n in range(10)]
    many[6] |= {"ref": "a", "depends_on": ["b"]}  # type: ignore[dict-item]
    many[7] |= {"ref": "b", "depends_on": ["a"]}  # type: ignore[dict-item]
    outcomes = await client.submit_many(many)
    assert [n for n, one in enumerate(outcomes) if isinstance(one, Refusal)] == [6, 7]
    together = [[job["idempotency_key"] for job in body["jobs"]] for body in fake.bodies]
    assert all(("6" in names) == ("7" in names) for names in together)


async def test_what_found_no_room_is_offered_again_with_what_it_names_and_the_first_outcome_counts(
    fake: Fake, client: HubClient
) -> None:
    first = {"ok": True, "job_id": "1", "status": "accepted"}
    full = {"ok": False, "code": "queue_full", "status": 429, "detail": "full"}
    known = {**first, "dedup": True, "status": "in_progress"}
    fake.script = [
        says({"ok": True, "jobs": [first, full, first]}),
        says({"ok": True, "jobs": [known, {**first, "job_id": "2"}]}),
    ]
    outcomes = await client.submit_many([{"kind": "k", "ref": "a"}, {"kind": "k", "depends_on": ["a"]}, {"kind": "k"}])
    assert [len(body["jobs"]) for body in fake.bodies] == [3, 2]
    assert outcomes[:2] == [Submitted(job_id="1", status="accepted"), Submitted(job_id="2", status="accepted")]


async def test_an_atomic_batch_is_one_request_and_its_refusal_is_raised(fake: Fake, client: HubClient) -> None:
    fake.script = [hangs_up, refuses(422, "unknown_dependency")]
    with pytest.raises(HubRefused, match="unknown_dependency"):
        await client.submit_many(({"kind": "k"} for _ in range(600)), atomic=True)
    assert fake.bodies[0] == fake.bodies[1]
    assert [(len(body["jobs"]), body["atomic"]) for body in fake.bodies] == [(600, True)] * 2


async def test_an_atomic_batch_is_made_whole_or_not_at_all(hub: HubClient) -> None:
    chain = [{"kind": "k", "ref": "a"}, {"kind": "k", "depends_on": ["a"]}]
    made = await hub.submit_many(chain, atomic=True)
    assert all(isinstance(one, Submitted) for one in made)
    with pytest.raises(HubRefused, match="queue_full"):
        await hub.submit_many([{"kind": "k"}] * 9, atomic=True)
    assert (await hub.queue()).counts["pending"] == 2


async def test_single_submits_that_depend_on_a_job_may_travel_together(fake: Fake, client: HubClient) -> None:
    fake.script = [says({"ok": True, "job_id": "j", "status": "accepted"}, 201)]
    await client.submit("k", depends_on=["p1", "p2"], on_dependency_failure="hold")
    sent = fake.bodies[0]
    assert (sent["depends_on"], sent["on_dependency_failure"]) == (["p1", "p2"], "hold")


# against a real hub


async def test_a_failure_tells_its_root_cause_and_a_redrive_brings_dependents_back(hub: HubClient) -> None:
    first = await hub.submit("k", max_retries=0)
    second = await hub.submit("k", depends_on=[first.job_id])
    assert (await hub.job(second.job_id)).depends_on_left == 1
    lease = (await hub.pull("n1")).jobs[0]
    await hub.fail(lease.job_id, lease.lease_id, "n1", {"type": "E"})
    job = await hub.job(second.job_id, wait_seconds=5)
    assert (job.status, job.reason, job.root_cause) == ("cancelled", "DEPENDENCY_FAILED", first.job_id)
    done = await hub.redrive(first.job_id, dependents=True)
    assert done == Redriven(job_id=first.job_id, status="pending", redriven=True, redrives=1)
    assert not (await hub.redrive(first.job_id)).redriven
    assert [await finish(hub), await finish(hub)] == [first.job_id, second.job_id]
    assert (await hub.job(first.job_id)).redrives == 1


async def test_a_mission_is_handed_in_shown_listed_cancelled_and_redriven(hub: HubClient) -> None:
    graph = [{"kind": "k", "ref": "a"}, {"kind": "k", "depends_on": ["a"]}]
    made = await hub.submit_mission("nightly", graph, metadata={"n": 1}, idempotency_key="once")
    again = await hub.submit_mission("nightly", graph, metadata={"n": 1}, idempotency_key="once")
    assert (again.mission_id, again.dedup, len(made.jobs)) == (made.mission_id, True, 2)
    other = await hub.submit_mission("other")
    assert [one.mission_id async for one in hub.missions(page=1)] == [other.mission_id, made.mission_id]
    await finish(hub)
    mission = await hub.mission(made.mission_id)
    assert (mission.title, mission.metadata, mission.jobs, mission.progress) == ("nightly", {"n": 1}, 2, 0.5)
    assert (await hub.cancel_mission(made.mission_id)).cancelled == 1
    assert (await hub.redrive_mission(made.mission_id)).redriven == 1
    assert (await hub.mission(made.mission_id)).counts["pending"] == 1


async def test_a_repeated_submit_of_a_mission_carries_the_same_drawn_key(fake: Fake, client: HubClient) -> None:
    fake.script = [hangs_up, says({"ok": True, "mission_id": "m", "jobs": []}, 201)]
    await client.submit_mission("t")
    assert fake.bodies[0] == fake.bodies[1]
    assert len(fake.bodies[0]["idempotency_key"]) == 32


async def test_dead_letters_are_listed_newest_first_and_redriven_by_id_or_filter(hub: HubClient) -> None:
    ids = [await fail(hub, kind) for kind in ("a", "b", "a")]
    found = [one async for one in hub.dead_letters(page=1)]
    assert [one.job_id for one in found] == ids[::-1]
    assert found[0].attempts[0]["error"] == {"type": "E", "message": "no"}
    assert [one.job_id async for one in hub.dead_letters(kind="a", order="oldest")] == [ids[0], ids[2]]
    done = await hub.redrive_many([ids[1], "nobody"])
    assert isinstance(done.jobs[0], Redriven)
    assert isinstance(done.jobs[1], RefusedJob)
    assert (done.redriven, done.jobs[1].job_id, done.jobs[1].code) == (1, "nobody", "job_not_found")
    rest = await hub.redrive_many(filter={"kind": "a"}, limit=1, rate_per_second=1)
    assert (rest.redriven, [one.job_id for one in rest.jobs]) == (1, ids[:1])


async def test_the_queue_is_paused_shown_purged_and_resumed(hub: HubClient) -> None:
    await hub.submit("k", source="s")
    (pause,) = await hub.pause("k", seconds=60, reason="why")
    assert (pause.kind, pause.reason) == ("k", "why")
    assert (await hub.pull("n1")).reason == "paused"
    queue = await hub.queue()
    assert (queue.depth, queue.lanes[0]["source"], queue.pauses) == ({"jobs": 1, "limit": 10}, "s", [pause])
    assert (await hub.purge({"kind": "k"}, dry_run=True)).matched == 1
    assert (await hub.purge({"kind": "k"})).purged == 1
    await hub.submit("k", source="s")
    assert (await hub.cancel_many(filter={"source": "s"})).cancelled == 1
    assert await hub.resume("k") == []


async def test_a_sources_limit_is_set_shown_and_dropped(hub: HubClient) -> None:
    with pytest.raises(HubRefused, match="rate_limit_not_found"):
        await hub.rate_limit("a/b")
    assert (await hub.set_rate_limit("a/b", per_minute=1)).concurrent == 5
    await hub.submit("k", source="a/b")
    with pytest.raises(HubRefused, match="rate_limited"):
        await hub.submit("k", source="a/b")
    assert (await hub.rate_limit("a/b")).origin == "stored"
    assert (await hub.drop_rate_limit("a/b")).per_minute is None


async def test_the_ledger_is_followed_from_any_event(hub: HubClient) -> None:
    await hub.submit("k")
    job_id = await finish(hub)
    events = [one async for one in hub.ledger(page=1)]
    assert [one.event for one in events if one.job_id == job_id] == ["job.submitted", "job.leased", "job.completed"]
    assert [one async for one in hub.ledger(after=events[1].seq)] == events[2:]
    assert len([one async for one in hub.ledger(job_id=job_id)]) == 3


async def test_fields_of_a_newer_hub_are_ignored(fake: Fake, client: HubClient, hasty: HastyClock) -> None:
    fake.script = [says({"ok": True, "job_id": "j", "status": "paroled", "kind": "k", "brand_new": {"x": 1}})]
    assert await client.job("j") == Job(job_id="j", status="paroled", kind="k")
