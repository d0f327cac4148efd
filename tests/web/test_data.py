"""A job's life over HTTP: submitted, pulled, extended, finished, cancelled, looked at; on both stores."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.config import IdempotencySettings, IntegritySettings, NodeSettings, QueueSettings
from sheratan_hub.rules.integrity import Demand
from sheratan_hub.storage import Key
from tests.conftest import MakeSite, Site

SUBMITS = ["/api/jobs", "/mesh/submit_request"]
STORES = pytest.mark.parametrize("scheme", ["memory", "sqlite", "file"])

JOB_FIELDS = {
    *("job_id", "status", "kind", "params", "priority", "source", "mission_id", "task_id", "attempt", "failures"),
    *("losses", "node_id", "result", "error", "reason", "late_results", "created_at", "started_at", "finished_at"),
    "not_before",
}
LEASE_FIELDS = {
    *("job_id", "kind", "params", "lease_id", "lease_seconds", "attempt", "failures", "losses", "timeout_seconds"),
    *("priority", "mission_id", "task_id", "traceparent"),
}


def refused(answer: tuple[int, Any], status: int, code: str) -> Any:
    assert (answer[0], answer[1].get("code")) == (status, code), answer
    assert (answer[1]["ok"], answer[1]["status"]) == (False, status)
    return answer[1]


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until it is so."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def pull(site: Site, node_id: str = "n1", **fields: Any) -> Any:
    status, body = await site.data("POST", "/api/jobs/pull", {"node_id": node_id, **fields})
    assert status == 200, body
    return body


async def ids(site: Site, node_id: str = "n1", **fields: Any) -> list[str]:
    return [job["job_id"] for job in (await pull(site, node_id, **fields))["jobs"]]


async def beat(site: Site, node_id: str = "n1", **fields: Any) -> Any:
    status, body = await site.control("POST", "/api/hosts/heartbeat", {"node_id": node_id, **fields})
    assert status == 200, body
    return body


def events(site: Site, name: str) -> list[dict[str, Any]]:
    return [line for line in site.audit() if line["event"] == name]


# submitting


async def test_a_submit_is_201_and_says_what_it_made(site: Site) -> None:
    status, body = await site.data("POST", "/api/jobs", {"kind": "work"})
    assert (status, body["ok"], body["dedup"], body["status"]) == (201, True, False, "accepted")
    assert body["request_id"]
    assert not {"result", "error", "result_truncated"} & set(body)
    assert (await site.stored())[0] == {"job:pending": 1}
    assert (await site.job(body["job_id"]))["status"] == "pending"


async def test_a_fleet_submit_is_always_200(site: Site) -> None:
    job = {"kind": "work", "idempotency_key": "k"}
    first = await site.data("POST", "/mesh/submit_request", job)
    again = await site.data("POST", "/mesh/submit_request", job)
    assert [status for status, _ in (first, again)] == [200, 200]
    assert [body["status"] for _, body in (first, again)] == ["accepted", "in_progress"]
    assert first[1]["job_id"] == again[1]["job_id"]


async def test_a_job_is_one_flat_object_with_what_it_was_given(site: Site) -> None:
    given = {"kind": "w", "source": "s", "mission_id": "m", "task_id": "t", "priority": "HIGH", "params": {"a": [1]}}
    job = await site.job(await site.submit(**given))
    assert set(job) >= {"ok", *JOB_FIELDS}
    assert {name: job[name] for name in given} == {**given, "priority": 1}
    empty = (job["attempt"], job["failures"], job["losses"], job["late_results"])
    assert empty == (0, 0, 0, 0)
    later = ("node_id", "result", "error", "reason", "started_at", "finished_at", "not_before")
    assert [job[name] for name in later] == [None] * 7
    assert job["created_at"].endswith("Z")


@pytest.mark.parametrize(
    ("given", "level"),
    [("CRITICAL", 0), ("HIGH", 1), ("NORMAL", 2), ("LOW", 3), (0, 0), (3, 3)],
)
async def test_a_priority_is_a_word_or_its_number(make_site: MakeSite, given: Any, level: int) -> None:
    site = await make_site()
    assert (await site.job(await site.submit(priority=given)))["priority"] == level


async def test_an_unknown_job_is_404(site: Site) -> None:
    refused(await site.data("GET", "/api/jobs/none"), 404, "job_not_found")


async def test_a_traceparent_in_the_body_wins_and_each_entry_may_have_its_own(site: Site) -> None:
    header, own, other = (f"00-{n * 32}-{n * 16}-01" for n in "123")
    headers = {"traceparent": header}
    await site.data("POST", "/api/jobs", {"kind": "w", "traceparent": own}, headers=headers)
    entries = [{"kind": "w", "traceparent": other}, {"kind": "w"}, {"kind": "w", "traceparent": "nonsense"}]
    await site.data("POST", "/api/jobs", {"jobs": entries}, headers=headers)
    await site.data("POST", "/mesh/submit_request", {"kind": "w"}, headers=headers)
    told = [job["traceparent"] for job in (await pull(site, max=5))["jobs"]]
    assert told == [own, other, header, header, header]


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", f"00-{'0' * 32}-{'1' * 16}-01")],
        [("traceparent", f"ff-{'1' * 32}-{'1' * 16}-01")],
        [("traceparent", f"00-{'1' * 32}-{'1' * 16}-01"), ("traceparent", f"00-{'2' * 32}-{'2' * 16}-01")],
    ],
)
async def test_an_invalid_traceparent_is_as_good_as_none(site: Site, headers: list[tuple[str, str]]) -> None:
    status, _ = await site.data("POST", "/api/jobs", {"kind": "w"}, headers=headers)
    assert status == 201
    assert (await pull(site))["jobs"][0]["traceparent"] is None


async def test_a_repeated_submit_may_be_of_another_trace(site: Site) -> None:
    first, again = (f"00-{n * 32}-{n * 16}-01" for n in "12")
    body = {"kind": "w", "idempotency_key": "k"}
    await site.data("POST", "/api/jobs", {**body, "traceparent": first})
    _, told = await site.data("POST", "/api/jobs", {**body, "traceparent": again})
    assert told["dedup"]
    assert (await pull(site))["jobs"][0]["traceparent"] == first
    mission = {"title": "m", "idempotency_key": "k"}
    made = [
        await site.data("POST", "/api/missions", {**mission, "jobs": [{"kind": "w", "traceparent": trace}]})
        for trace in (first, again)
    ]
    assert [status for status, _ in made] == [201, 200]


async def test_a_traceparent_goes_to_the_worker(site: Site) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    await site.data("POST", "/api/jobs", {"kind": "w"}, headers={"traceparent": trace})
    await site.data("POST", "/api/jobs", {"kind": "w"}, headers={"traceparent": "nonsense"})
    assert [job["traceparent"] for job in (await pull(site, max=2))["jobs"]] == [trace, None]


# idempotency


async def brought_to(site: Site, status: str, key: str = "k-1") -> str:
    """A job with this key that has come so far."""
    job_id = await site.submit(idempotency_key=key, max_retries=0)
    if status == "cancelled":
        await site.data("POST", f"/api/jobs/{job_id}/cancel")
    elif status != "waiting":
        lease = await site.lease()
        if status == "completed":
            await site.finish(lease, result={"n": 1})
        elif status == "failed":
            await site.finish(lease, ok=False, error={"type": "Broken"})
    return job_id


@pytest.mark.parametrize("path", SUBMITS)
@pytest.mark.parametrize(
    ("came_to", "told"),
    [
        ("waiting", {"status": "in_progress"}),
        ("running", {"status": "in_progress"}),
        ("completed", {"status": "completed", "result": {"n": 1}}),
        ("failed", {"status": "failed", "error": {"type": "Broken"}}),
        ("cancelled", {"status": "cancelled", "error": None}),
    ],
)
async def test_a_known_key_is_told_where_its_job_stands(site: Site, path: str, came_to: str, told: Any) -> None:
    job_id = await brought_to(site, came_to)
    before = await site.stored()
    status, body = await site.data("POST", path, {"kind": "work", "idempotency_key": "k-1"})
    assert status == 200
    assert body.pop("request_id") != job_id
    assert body == {"ok": True, "job_id": job_id, "dedup": True, **told}
    assert await site.stored() == before


@STORES
@pytest.mark.parametrize("ok", [True, False])
async def test_a_large_cached_result_is_left_out_and_said_to_be(make_site: MakeSite, scheme: str, ok: bool) -> None:
    site = await make_site(scheme, idempotency=IdempotencySettings(max_cached_bytes=100))
    for size, whole in ((98, True), (99, False)):
        key, text = f"key-{size}", "a" * size
        await site.submit(idempotency_key=key, max_retries=0)
        await site.finish(await site.lease(), ok=ok, **{"result" if ok else "error": text})
        _, body = await site.data("POST", "/api/jobs", {"kind": "work", "idempotency_key": key, "max_retries": 0})
        assert body["status"] == ("completed" if ok else "failed")
        assert body.get("result_truncated", False) is not whole
        assert body.get("result", body.get("error")) == (text if whole else None)


@pytest.mark.parametrize("path", SUBMITS)
@pytest.mark.parametrize("other", [{"kind": "other"}, {"params": {"a": 2}}, {"params": {"a": 1.0}}, {"params": None}])
async def test_a_known_key_with_another_payload_is_409(site: Site, path: str, other: Any) -> None:
    job_id = await site.submit(params={"a": 1}, idempotency_key="secret-key-123")
    before = await site.stored()
    body = {"kind": "work", "params": {"a": 1}, "idempotency_key": "secret-key-123", **other}
    no = refused(await site.data("POST", path, body), 409, "idempotency_key_collision")
    assert job_id in no["detail"]
    assert await site.stored() == before


@pytest.mark.parametrize(
    "text",
    [
        '{"b":[1,2],"a":{"y":"é","x":1}}',
        ' { "a" : {"x":1, "y":"\\u00e9"},\n"b":[1,\t2] } ',
        '{"a":0,"b":[1,2],"a":{"y":"é","x":1}}',
    ],
)
async def test_how_params_are_written_does_not_matter_to_the_key(site: Site, text: str) -> None:
    job_id = await site.submit(params={"a": {"x": 1, "y": "é"}, "b": [1, 2]}, idempotency_key="k")
    body = b'{"kind":"work","idempotency_key":"k","params":%b}' % text.encode()
    status, answer, _ = await site.ask("data", "POST", "/api/jobs", data=body)
    assert (status, answer["job_id"]) == (200, job_id)


async def test_what_is_not_payload_does_not_matter_to_the_key(site: Site) -> None:
    job_id = await site.submit(idempotency_key="k")
    body = {"kind": "work", "idempotency_key": "k", "priority": 0, "source": "other", "max_retries": 9}
    status, answer = await site.data("POST", "/api/jobs", body)
    assert (status, answer["job_id"]) == (200, job_id)


@pytest.mark.parametrize("path", SUBMITS)
@pytest.mark.parametrize("header", ["the-key", '"the-key"'])
async def test_the_key_may_stand_in_the_header(site: Site, path: str, header: str) -> None:
    job_id = await site.submit(idempotency_key="the-key")
    _, body = await site.data("POST", path, {"kind": "work"}, headers={"Idempotency-Key": header})
    assert (body["job_id"], body["dedup"]) == (job_id, True)


@pytest.mark.parametrize("key", ['""', "k" * 513])
async def test_a_header_key_has_1_to_512_characters(make_site: MakeSite, key: str) -> None:
    site = await make_site()
    answer = await site.data("POST", "/api/jobs", {"kind": "work"}, headers={"Idempotency-Key": key})
    refused(answer, 422, "invalid_field")
    assert await site.stored() == ({}, 0)


async def test_without_a_key_equal_jobs_are_two(site: Site) -> None:
    assert await site.submit() != await site.submit()


@STORES
async def test_a_refused_submit_burns_no_key(make_site: MakeSite, scheme: str) -> None:
    site = await make_site(scheme, queue=QueueSettings(max_depth=1))
    await site.submit()
    body = {"kind": "work", "idempotency_key": "k"}
    refused(await site.data("POST", "/api/jobs", body), 429, "queue_full")
    refused(await site.data("POST", "/api/jobs", {**body, "priority": 9}), 422, "invalid_field")
    await site.lease()
    status, made = await site.data("POST", "/api/jobs", {**body, "params": "another payload"})
    assert (status, made["dedup"]) == (201, False)


@STORES
async def test_a_full_queue_still_knows_its_keys(make_site: MakeSite, scheme: str) -> None:
    site = await make_site(scheme, queue=QueueSettings(max_depth=1))
    job_id = await site.submit(idempotency_key="k")
    assert await site.submit(idempotency_key="k") == job_id


async def test_64_first_submits_with_one_key_at_once_make_one_job(site: Site) -> None:
    body = {"kind": "work", "idempotency_key": "k"}
    answers = await asyncio.gather(*(site.data("POST", "/api/jobs", body) for _ in range(64)))
    assert sorted(status for status, _ in answers) == [200] * 63 + [201]
    assert len({body["job_id"] for _, body in answers}) == 1
    assert (await site.stored())[0] == {"job:pending": 1, "key": 1}


async def test_a_key_is_free_again_when_its_time_has_passed_since_the_jobs_end(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, idempotency=IdempotencySettings(ttl_seconds=10))
    first = await site.submit(idempotency_key="k")
    await clock.advance(20_000)
    assert await site.submit(idempotency_key="k") == first
    await site.finish(await site.lease())
    await clock.advance(9_000)
    assert await site.submit(idempotency_key="k") == first
    await clock.advance(1_000)
    status, made = await site.data("POST", "/api/jobs", {"kind": "other", "idempotency_key": "k"})
    assert (status, made["dedup"]) == (201, False)
    assert await site.submit(kind="other", idempotency_key="k") == made["job_id"]


# batches


async def test_a_batch_has_one_outcome_each_in_order(site: Site) -> None:
    known = await site.submit(kind="b", idempotency_key="known")
    jobs: list[Any] = [
        {"kind": "a", "params": 1},
        {"kind": "b", "idempotency_key": "known"},
        {"kind": ""},
        {"kind": "c", "idempotency_key": "known"},
        {"kind": "d", "idempotency_key": "new", "params": {"x": "y" * 3000}},
        {"kind": "d", "idempotency_key": "new", "params": {"x": "y" * 3000}},
    ]
    status, body = await site.data("POST", "/api/jobs", {"jobs": jobs})
    assert (status, body["ok"]) == (200, True)
    outcomes = [one.get("code") or (one["status"], one["dedup"]) for one in body["jobs"]]
    new, old = ("accepted", False), ("in_progress", True)
    assert outcomes == [new, old, "invalid_field", "idempotency_key_collision", new, old]
    assert body["jobs"][1]["job_id"] == known
    assert body["jobs"][4]["job_id"] == body["jobs"][5]["job_id"]
    assert (await site.job(body["jobs"][0]["job_id"]))["params"] == 1
    assert (await site.job(body["jobs"][4]["job_id"]))["params"] == {"x": "y" * 3000}
    assert (await site.stored())[0]["job:pending"] == 3


async def test_an_empty_batch_makes_nothing(make_site: MakeSite) -> None:
    site = await make_site()
    assert await site.data("POST", "/api/jobs", {"jobs": []}) == (200, {"ok": True, "jobs": []})
    assert await site.stored() == ({}, 0)


@STORES
@pytest.mark.parametrize("mode", [429, 503])
async def test_at_the_depth_limit_the_entries_that_fit_are_taken(make_site: MakeSite, scheme: str, mode: Any) -> None:
    site = await make_site(scheme, queue=QueueSettings(max_depth=2, backpressure_mode=mode))
    jobs = [{"kind": "a"}, {"kind": ""}, {"kind": "b"}, {"kind": "c"}]
    status, body = await site.data("POST", "/api/jobs", {"jobs": jobs})
    assert status == 200
    assert [one["status"] for one in body["jobs"]] == ["accepted", 422, "accepted", mode]
    assert body["jobs"][3]["code"] == "queue_full"
    assert (await site.stored())[0] == {"job:pending": 2}


@STORES
@pytest.mark.parametrize("atomic", [False, True])
async def test_a_batch_of_which_nothing_fits_is_429(make_site: MakeSite, scheme: str, atomic: bool) -> None:
    site = await make_site(scheme, queue=QueueSettings(max_depth=1))
    await site.submit()
    before = await site.stored()
    body = {"jobs": [{"kind": "a"}, {"kind": "b"}], "atomic": atomic}
    status, no, headers = await site.ask("data", "POST", "/api/jobs", json=body)
    refused((status, no), 429, "queue_full")
    assert int(headers["Retry-After"]) >= 1
    assert await site.stored() == before


@STORES
@pytest.mark.parametrize(
    ("last", "status", "code"),
    [
        ({"kind": ""}, 422, "invalid_field"),
        ({"kind": "c", "idempotency_key": "known"}, 409, "idempotency_key_collision"),
        ({"kind": "c"}, 429, "queue_full"),
    ],
)
async def test_an_atomic_batch_is_all_or_none(
    make_site: MakeSite, scheme: str, last: Any, status: int, code: str
) -> None:
    site = await make_site(scheme, queue=QueueSettings(max_depth=3))
    await site.submit(idempotency_key="known")
    before = await site.stored()
    jobs = [{"kind": "a"}, {"kind": "b", "idempotency_key": "fresh"}, last]
    no = refused(await site.data("POST", "/api/jobs", {"jobs": jobs, "atomic": True}), status, code)
    assert "entry 2" in no["detail"]
    assert await site.stored() == before
    good = {"jobs": [{"kind": "a"}, {"kind": "x", "idempotency_key": "fresh"}], "atomic": True}
    made, body = await site.data("POST", "/api/jobs", good)
    assert (made, [one["status"] for one in body["jobs"]]) == (200, ["accepted", "accepted"])


@pytest.mark.parametrize(("path", "name"), [("/api/jobs", "jobs"), ("/api/results", "results")])
async def test_a_batch_has_at_most_1000_entries(make_site: MakeSite, path: str, name: str) -> None:
    site = await make_site(queue=QueueSettings(max_depth=2000))
    refused(await site.data("POST", path, {name: [{"kind": "a"}] * 1001}), 422, "batch_too_large")
    assert await site.stored() == ({}, 0)
    assert len((await site.data("POST", path, {name: [{"kind": "a"}] * 1000}))[1][name]) == 1000


# the limits


@STORES
@pytest.mark.parametrize("path", SUBMITS)
@pytest.mark.parametrize("mode", [429, 503])
async def test_a_full_queue_refuses_with_a_time_to_wait(make_site: MakeSite, scheme: str, path: str, mode: Any) -> None:
    site = await make_site(scheme, queue=QueueSettings(max_depth=2, backpressure_mode=mode))
    await site.submit()
    await site.submit(delay_seconds=60)
    before = await site.stored()
    status, body, headers = await site.ask("data", "POST", path, json={"kind": "work"})
    refused((status, body), mode, "queue_full")
    assert int(headers["Retry-After"]) >= 1
    assert await site.stored() == before
    assert [line["path"] for line in events(site, "BACKPRESSURE_DROP")] == [path]
    await site.lease()
    assert await site.submit(), "a job that somebody holds does not count"


@STORES
async def test_beyond_the_inflight_limit_a_pull_is_put_off(make_site: MakeSite, scheme: str) -> None:
    site = await make_site(scheme, queue=QueueSettings(max_inflight=2))
    for _ in range(3):
        await site.submit()
    assert len(await ids(site, max=5)) == 2
    body = await pull(site, "n2")
    assert (body["ok"], body["jobs"], body["reason"]) == (True, [], "inflight_limit")
    assert body["defer_ms"] > 0
    assert [line["node_id"] for line in events(site, "INFLIGHT_SATURATED")] == ["n2"]
    assert (await site.stored())[0] == {"job:pending": 1, "job:running": 2}


@STORES
async def test_a_poll_put_off_by_the_inflight_limit_is_answered_when_a_lease_ends(
    make_site: MakeSite, scheme: str
) -> None:
    site = await make_site(scheme, queue=QueueSettings(max_inflight=1))
    await site.submit()
    second = await site.submit()
    lease = await site.lease("n1")
    poll = asyncio.create_task(pull(site, "n2", wait_seconds=20))
    await until(lambda: bool(events(site, "INFLIGHT_SATURATED")))
    await site.finish(lease)
    answer = await asyncio.wait_for(poll, 5)
    assert [job["job_id"] for job in answer["jobs"]] == [second]


# pulling


async def test_a_pull_gives_leases_as_the_contract_lists_them(site: Site) -> None:
    job_id = await site.submit(kind="w", params=[1], mission_id="m", task_id="t", priority=1, timeout_seconds=9)
    body = await pull(site)
    assert (body["ok"], len(body["jobs"])) == (True, 1)
    lease = body["jobs"][0]
    assert set(lease) >= LEASE_FIELDS
    fine = {"job_id": job_id, "kind": "w", "params": [1], "mission_id": "m", "task_id": "t", "priority": 1}
    fine |= {"attempt": 1, "failures": 0, "losses": 0, "timeout_seconds": 9, "lease_seconds": 300}
    assert {name: lease[name] for name in fine} == fine
    job = await site.job(job_id)
    assert (job["status"], job["node_id"], job["attempt"]) == ("running", "n1", 1)
    assert job["started_at"].endswith("Z")


async def test_nothing_now_is_no_error(site: Site) -> None:
    body = await pull(site)
    assert (body["ok"], body["jobs"], body["reason"]) == (True, [], "no_job")
    assert 500 < body["defer_ms"] < 2000


async def test_every_lease_is_given_once(site: Site) -> None:
    made = [await site.submit() for _ in range(6)]
    pulls = await asyncio.gather(*(pull(site, f"n{n}", max=2) for n in range(5)))
    leases = [job for body in pulls for job in body["jobs"]]
    assert sorted(job["job_id"] for job in leases) == sorted(made)
    assert len({job["lease_id"] for job in leases}) == 6


async def test_jobs_come_by_priority_then_by_age(site: Site) -> None:
    given = ["LOW", "NORMAL", "HIGH", "CRITICAL", "NORMAL", "CRITICAL"]
    made = [await site.submit(priority=level) for level in given]
    assert await ids(site, max=6) == [made[place] for place in (3, 5, 2, 1, 4, 0)]


async def test_a_pull_gives_at_most_what_it_asks_for(site: Site) -> None:
    made = [await site.submit() for _ in range(4)]
    assert await ids(site) == made[:1]
    assert await ids(site, max=2) == made[1:3]


async def test_a_job_goes_only_to_a_node_with_its_capabilities(site: Site) -> None:
    job_id = await site.submit(required_capabilities=["gpu", "linux"])
    assert await ids(site, "unheard-of") == []
    await beat(site, "weak", capabilities=["linux"])
    assert await ids(site, "weak") == []
    await beat(site, "strong", capabilities=["linux", "gpu", "ssd"])
    assert await ids(site, "strong", capabilities=["linux"]) == [], "the pull's own word counts"
    assert await ids(site, "strong") == [job_id]


async def test_a_pulls_own_capabilities_are_enough(site: Site) -> None:
    job_id = await site.submit(required_capabilities=["gpu"])
    await beat(site, "n1", capabilities=["linux"])
    assert await ids(site, "n1", capabilities=["gpu"]) == [job_id]


async def test_a_job_nobody_can_do_does_not_block_the_next(site: Site) -> None:
    await site.submit(priority="CRITICAL", required_capabilities=["gpu"])
    easy = await site.submit(priority="LOW")
    assert await ids(site, max=2) == [easy]


async def test_a_pull_may_name_kinds(site: Site) -> None:
    made = {kind: await site.submit(kind=kind) for kind in ("a", "b", "c")}
    assert await ids(site, max=5, kinds=["c", "a", "z"]) == [made["a"], made["c"]]
    assert await ids(site, max=5) == [made["b"]]


FLEET_PULLS: list[tuple[str, str, Any]] = [
    ("GET", "/mesh/pull_requests?node_id=n1&max=2", None),
    ("GET", "/mesh/pull_requests?host_id=n1&max=2", None),
    ("POST", "/mesh/pull_requests", {"node_id": "n1", "max": 2}),
    ("GET", "/mesh/pull_requests/n1?max=2", None),
    ("POST", "/mesh/pull_requests/n1", {"max": 2}),
    ("POST", "/mesh/pull_requests/n1?max=2", None),
]


@pytest.mark.parametrize(("method", "path", "body"), FLEET_PULLS)
async def test_the_fleets_pulls_lease_the_same_way(site: Site, method: str, path: str, body: Any) -> None:
    made = [await site.submit() for _ in range(3)]
    status, answer = await site.data(method, path, body)
    assert (status, answer["ok"]) == (200, True)
    assert [job["job_id"] for job in answer["jobs"]] == made[:2]
    assert all(set(job) >= LEASE_FIELDS for job in answer["jobs"])
    assert (await site.job(made[0]))["node_id"] == "n1"


@pytest.mark.parametrize(("method", "path", "body"), FLEET_PULLS)
async def test_the_fleets_pulls_never_wait(make_site: MakeSite, method: str, path: str, body: Any) -> None:
    site = await make_site(clock=VirtualClock())
    if body is not None:
        body = {**body, "wait_seconds": 30}
    status, answer = await asyncio.wait_for(site.data(method, path, body), 5)
    assert (status, answer["jobs"], answer["reason"]) == (200, [], "no_job")
    assert answer["defer_ms"] > 0


@pytest.mark.parametrize("path", ["/api/jobs/pull", "/mesh/pull_requests", "/mesh/pull_requests/n1"])
async def test_the_same_pull_id_gets_the_same_leases_again(site: Site, path: str) -> None:
    made = [await site.submit() for _ in range(3)]
    body: dict[str, Any] = {"max": 2, "pull_id": "p-1"}
    if not path.endswith("n1"):
        body["node_id"] = "n1"
    first, again = [(await site.data("POST", path, body))[1]["jobs"] for _ in range(2)]
    assert [job["job_id"] for job in first] == made[:2]
    assert [job["lease_id"] for job in again] == [job["lease_id"] for job in first]
    assert [job["attempt"] for job in again] == [1, 1]
    await site.finish(first[0])
    left = (await site.data("POST", path, body))[1]["jobs"]
    assert [job["lease_id"] for job in left] == [first[1]["lease_id"]]
    await site.finish(first[1])
    spent = (await site.data("POST", path, body))[1]
    assert (spent["jobs"], spent["reason"]) == ([], "pull_spent")
    other = (await site.data("POST", path, {**body, "pull_id": "p-2"}))[1]["jobs"]
    assert [job["job_id"] for job in other] == made[2:]


async def test_a_pull_id_is_the_nodes_own(site: Site) -> None:
    made = [await site.submit() for _ in range(2)]
    assert [await ids(site, node_id, pull_id="p") for node_id in ("n1", "n2")] == [made[:1], made[1:]]


async def test_a_pull_id_that_got_nothing_looks_again(site: Site) -> None:
    assert await ids(site, pull_id="p") == []
    job_id = await site.submit()
    assert await ids(site, pull_id="p") == [job_id]


async def test_a_long_poll_is_answered_when_a_job_arrives(site: Site) -> None:
    poll = asyncio.create_task(pull(site, wait_seconds=20))
    await until(lambda: len(site.app.hub.waiting) == 1)
    job_id = await site.submit()
    answer = await asyncio.wait_for(poll, 5)
    assert [job["job_id"] for job in answer["jobs"]] == [job_id]
    assert len(site.app.hub.waiting) == 0


async def test_a_long_poll_is_answered_when_a_released_job_comes_back(site: Site) -> None:
    job_id = await site.submit()
    lease = await site.lease("n1")
    poll = asyncio.create_task(pull(site, "n2", wait_seconds=20))
    await until(lambda: len(site.app.hub.waiting) == 1)
    await site.data("POST", f"/api/jobs/{job_id}/release", {"lease_id": lease["lease_id"]})
    assert [job["job_id"] for job in (await asyncio.wait_for(poll, 5))["jobs"]] == [job_id]


async def test_a_short_poll_ends_without_a_job(site: Site) -> None:
    body = await asyncio.wait_for(pull(site, wait_seconds=0.02), 5)
    assert (body["jobs"], body["reason"]) == ([], "no_job")


def commands(site: Site) -> float:
    return site.app.metrics.counts["sheratan_commands_total"][()]


async def polling(site: Site, nodes: int, **fields: Any) -> list[asyncio.Task[Any]]:
    """So many long polls that have all looked once and wait."""
    await settle()
    looked = commands(site) + nodes
    polls = [asyncio.create_task(pull(site, f"n{n}", **fields)) for n in range(nodes)]
    await until(lambda: len(site.app.hub.waiting) == nodes and commands(site) == looked)
    return polls


async def test_a_long_poll_lasts_as_long_as_it_asked(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    [poll] = await polling(site, 1, wait_seconds=3)
    await clock.advance(2_999)
    assert len(site.app.hub.waiting) == 1
    await clock.advance(1)
    assert (await asyncio.wait_for(poll, 5))["reason"] == "no_job"


async def test_one_job_wakes_one_waiter(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    polls = await polling(site, 3, wait_seconds=30)
    before = commands(site)
    job_id = await site.submit()
    done, waiting = await asyncio.wait(polls, timeout=5, return_when=asyncio.FIRST_COMPLETED)
    await settle()
    assert [job["job_id"] for one in done for job in one.result()["jobs"]] == [job_id]
    assert (len(waiting), len(site.app.hub.waiting)) == (2, 2)
    assert commands(site) == before + 2, "the submit and one look"
    await clock.advance(30_000)
    assert [(await asyncio.wait_for(one, 5))["jobs"] for one in waiting] == [[], []]


async def test_a_job_wakes_only_a_waiter_that_can_take_it(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    await polling(site, 2, wait_seconds=30, kinds=["other"])
    poll = asyncio.create_task(pull(site, "fit", wait_seconds=30, kinds=["work"]))
    await until(lambda: len(site.app.hub.waiting) == 3)
    job_id = await site.submit(kind="work")
    assert [job["job_id"] for job in (await asyncio.wait_for(poll, 5))["jobs"]] == [job_id]
    assert len(site.app.hub.waiting) == 2
    await clock.advance(30_000)


async def test_a_poller_that_hangs_up_is_leased_nothing(site: Site) -> None:
    poll = asyncio.create_task(pull(site, "gone", wait_seconds=20))
    await until(lambda: len(site.app.hub.waiting) == 1)
    poll.cancel()
    await until(lambda: len(site.app.hub.waiting) == 0)
    job_id = await site.submit()
    lease = await site.lease("n2")
    assert (lease["job_id"], lease["attempt"], lease["losses"]) == (job_id, 1, 0)


async def test_a_stopping_hub_answers_its_long_polls_at_once(site: Site) -> None:
    job_id = await site.submit(delay_seconds=60)
    poll = asyncio.create_task(pull(site, wait_seconds=20))
    look = asyncio.create_task(site.data("GET", f"/api/jobs/{job_id}?wait_seconds=20"))
    await until(lambda: len(site.app.hub.waiting) == 2)
    site.app.hub.stop()
    body = await asyncio.wait_for(poll, 5)
    assert (body["jobs"], body["reason"]) == ([], "draining")
    assert (await asyncio.wait_for(look, 5))[1]["status"] == "pending"


async def test_a_silent_node_is_leased_nothing(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, nodes=NodeSettings(ttl_seconds=2, dead_seconds=20))
    await beat(site)
    job_id = await site.submit()
    for ms, reason in ((3_000, "node_stale"), (20_000, "node_dead")):
        await clock.advance(ms)
        assert (await pull(site))["reason"] == reason
    await beat(site)
    assert await ids(site) == [job_id]


# results


async def test_a_result_completes_the_job(site: Site) -> None:
    job_id = await site.submit()
    status, body = await site.finish(await site.lease(), result={"n": [1]}, node_id="n1")
    assert (status, body) == (200, {"ok": True, "job_id": job_id, "status": "completed"})
    job = await site.job(job_id)
    assert (job["status"], job["result"], job["error"], job["reason"]) == ("completed", {"n": [1]}, None, None)
    assert (job["node_id"], job["attempt"], job["failures"]) == ("n1", 1, 0)
    assert job["finished_at"] >= job["started_at"] >= job["created_at"]
    assert await ids(site) == []


async def test_a_failure_is_tried_again_and_says_when(site: Site) -> None:
    job_id = await site.submit()
    status, body = await site.finish(await site.lease(), ok=False, error={"type": "Oops"})
    assert (status, body["status"]) == (200, "pending")
    assert 0.5 <= body["retry_in_seconds"] <= 1
    job = await site.job(job_id)
    assert (job["failures"], job["error"], job["finished_at"]) == (1, {"type": "Oops"}, None)
    assert job["not_before"] > job["started_at"]
    assert await ids(site) == []


async def test_a_retry_at_once_is_a_new_delivery(site: Site) -> None:
    job_id = await site.submit()
    await site.finish(await site.lease("n1"), ok=False, error="no", retry_after_seconds=0)
    lease = await site.lease("n2")
    assert (lease["job_id"], lease["attempt"], lease["failures"], lease["losses"]) == (job_id, 2, 1, 0)


async def test_retry_after_seconds_is_kept_to(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    job_id = await site.submit()
    _, body = await site.finish(await site.lease(), ok=False, retry_after_seconds=30)
    assert body["retry_in_seconds"] == 30
    await clock.advance(29_000)
    assert await ids(site) == []
    await clock.advance(2_000)
    assert await ids(site) == [job_id]


@pytest.mark.parametrize(
    ("job", "result", "reason"),
    [
        ({}, {"retry": False}, "NOT_RETRYABLE"),
        ({"max_retries": 0}, {}, "RETRIES_EXHAUSTED"),
        ({"delivery": "at_most_once"}, {}, "NOT_RETRYABLE"),
    ],
)
async def test_a_failure_that_is_not_tried_again_is_final(site: Site, job: Any, result: Any, reason: str) -> None:
    job_id = await site.submit(**job)
    _, body = await site.finish(await site.lease(), ok=False, error={"m": 1}, **result)
    assert body == {"ok": True, "job_id": job_id, "status": "failed"}
    found = await site.job(job_id)
    assert (found["status"], found["reason"], found["error"]) == ("failed", reason, {"m": 1})


async def test_a_job_has_one_attempt_more_than_retries(site: Site) -> None:
    await site.submit(max_retries=2)
    outcomes = []
    for _ in range(3):
        _, body = await site.finish(await site.lease(), ok=False, retry_after_seconds=0)
        outcomes.append(body["status"])
    assert outcomes == ["pending", "pending", "failed"]


@pytest.mark.parametrize("outcome", [{"ok": True, "result": 1}, {"ok": False, "error": 1}])
async def test_a_repeated_result_gets_the_same_answer(site: Site, outcome: Any) -> None:
    await site.submit()
    lease = await site.lease()
    first = await site.finish(lease, **outcome)
    before = await site.stored()
    assert await site.finish(lease, **outcome) == first
    assert await site.stored() == before


async def test_a_repeated_failure_gets_the_same_answer_while_another_works(site: Site) -> None:
    await site.submit()
    lease = await site.lease("n1")
    first = await site.finish(lease, ok=False, error=1, retry_after_seconds=0)
    second = await site.lease("n2")
    assert await site.finish(lease, ok=False, error=1, retry_after_seconds=0) == first
    assert (await site.finish(second))[1]["status"] == "completed"


@pytest.mark.parametrize("other", [{"result": 2}, {"ok": False, "error": 1}, {}])
async def test_another_result_for_an_ended_lease_is_409_and_the_first_stands(site: Site, other: Any) -> None:
    job_id = await site.submit()
    lease = await site.lease()
    await site.finish(lease, result=1)
    before = await site.stored()
    refused(await site.finish(lease, **other), 409, "result_conflict")
    assert (await site.job(job_id))["result"] == 1
    assert await site.stored() == before


LEASE_ROUTES = ["result", "extend", "release"]


def said(verb: str, lease_id: str) -> dict[str, Any]:
    return {"lease_id": lease_id, **({"ok": True} if verb == "result" else {})}


@pytest.mark.parametrize("verb", LEASE_ROUTES)
async def test_a_lease_that_never_was_is_409(site: Site, verb: str) -> None:
    job_id = await site.submit()
    await site.lease()
    before = await site.stored()
    answer = await site.data("POST", f"/api/jobs/{job_id}/{verb}", said(verb, "f" * 34))
    refused(answer, 409, "lease_superseded")
    assert await site.stored() == before


@pytest.mark.parametrize("verb", [*LEASE_ROUTES, "cancel"])
async def test_a_verb_for_an_unknown_job_is_404(site: Site, verb: str) -> None:
    answer = await site.data("POST", f"/api/jobs/none/{verb}", {} if verb == "cancel" else said(verb, "x"))
    assert "none" in refused(answer, 404, "job_not_found")["detail"]


@pytest.mark.parametrize("verb", LEASE_ROUTES)
async def test_a_lost_lease_can_do_nothing_once_another_has_the_job(make_site: MakeSite, verb: str) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, queue=QueueSettings(lease_seconds=10))
    job_id = await site.submit()
    lost = await site.lease("n1")
    await clock.advance(12_000)
    second = await site.lease("n2")
    assert (second["job_id"], second["attempt"], second["losses"], second["failures"]) == (job_id, 2, 1, 0)
    refused(
        await site.data("POST", f"/api/jobs/{job_id}/{verb}", said(verb, lost["lease_id"])), 409, "lease_superseded"
    )
    assert (await site.job(job_id))["node_id"] == "n2"
    assert (await site.finish(second, result=2))[1]["status"] == "completed"
    refused(await site.finish(lost, result=1), 409, "lease_superseded")
    assert (await site.job(job_id))["result"] == 2


async def test_a_late_result_is_taken_while_nobody_else_has_had_the_job(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, queue=QueueSettings(lease_seconds=10))
    job_id = await site.submit()
    lease = await site.lease()
    await clock.advance(12_000)
    assert (await site.job(job_id))["status"] == "pending"
    extended = await site.data("POST", f"/api/jobs/{job_id}/extend", {"lease_id": lease["lease_id"]})
    refused(extended, 409, "lease_expired")
    status, body = await site.finish(lease, result=1)
    assert (status, body["status"], body["late"]) == (200, "completed", True)
    assert await ids(site, "n2") == []


async def test_the_fleet_may_leave_the_lease_out(site: Site) -> None:
    job_id = await site.submit()
    await site.lease("n1")
    body = {"job_id": job_id, "ok": True, "result": {"n": 1}, "node_id": "n1", "worker_version": "7"}
    status, answer = await site.data("POST", "/mesh/submit_result", body)
    assert (status, answer["status"]) == (200, "completed")
    assert (await site.job(job_id))["result"] == {"n": 1}
    assert await site.data("POST", "/mesh/submit_result", body) == (200, answer)
    refused(await site.data("POST", "/mesh/submit_result", {**body, "result": 2}), 409, "result_conflict")


async def test_without_lease_or_node_the_current_lease_counts(site: Site) -> None:
    job_id = await site.submit()
    await site.finish(await site.lease("n1"), ok=False, retry_after_seconds=0)
    await site.lease("n2")
    _, answer = await site.data("POST", "/mesh/submit_result", {"job_id": job_id, "ok": True, "result": 1})
    assert answer["status"] == "completed"
    assert (await site.job(job_id))["node_id"] == "n2"


async def test_only_the_holder_may_leave_the_lease_out(site: Site) -> None:
    job_id = await site.submit()
    lease = await site.lease("n1")
    before = await site.stored()
    body = {"job_id": job_id, "ok": True, "node_id": "n2"}
    refused(await site.data("POST", "/mesh/submit_result", body), 409, "not_holder")
    assert await site.stored() == before
    named = {**body, "node_id": "n1", "lease_id": lease["lease_id"]}
    assert (await site.data("POST", "/mesh/submit_result", named))[1]["status"] == "completed"


async def test_a_fleet_result_with_a_wrong_lease_is_409(site: Site) -> None:
    job_id = await site.submit()
    await site.lease("n1")
    body = {"job_id": job_id, "ok": True, "node_id": "n1", "lease_id": "0" * 34}
    refused(await site.data("POST", "/mesh/submit_result", body), 409, "lease_superseded")


async def test_a_fleet_result_for_a_job_nobody_holds_is_409(site: Site) -> None:
    job_id = await site.submit()
    refused(await site.data("POST", "/mesh/submit_result", {"job_id": job_id, "ok": True}), 409, "not_leased")
    assert (await site.job(job_id))["status"] == "pending"


async def test_a_fleet_result_for_an_unknown_job_is_404(site: Site) -> None:
    refused(await site.data("POST", "/mesh/submit_result", {"job_id": "none", "ok": True}), 404, "job_not_found")


async def test_a_batch_of_results_has_one_outcome_each_in_order(site: Site) -> None:
    for _ in range(3):
        await site.submit()
    leases = (await pull(site, max=3))["jobs"]
    reports = [
        {"job_id": lease["job_id"], "lease_id": lease["lease_id"], "ok": True, "result": n}
        for n, lease in enumerate(leases)
    ]
    reports[1] |= {"ok": False, "error": "no", "retry": False}
    given = [reports[0], {**reports[0], "lease_id": "0"}, {**reports[0], "job_id": "none"}, *reports[1:], reports[0]]
    status, body = await site.data("POST", "/api/results", {"results": [*given, {**reports[0], "result": "other"}]})
    assert (status, body["ok"]) == (200, True)
    told = [one.get("code") or one["status"] for one in body["results"]]
    fine = ["completed", "lease_superseded", "job_not_found", "failed", "completed", "completed", "result_conflict"]
    assert told == fine
    assert [one["status"] for one in body["results"] if "code" in one] == [409, 404, 409]
    assert [(await site.job(lease["job_id"]))["result"] for lease in leases] == [0, None, 2]


# integrity


def checked_text(job_id: str, ok: bool, result: Any, error: Any) -> bytes:
    """The canonical text, as the contract words it."""
    whole = {"job_id": job_id, "ok": ok, "result": result, "error": error}
    return json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def sig(text: bytes, key: str = "hmac-key") -> str:
    return hmac.new(key.encode(), text, hashlib.sha256).hexdigest()


def demanding(site: Site, mode: Any, required: bool = False) -> None:
    object.__setattr__(site.app.services, "demand", Demand(mode, required, "hmac-key" if mode == "hmac" else ""))


RESULTS: list[Any] = [None, {"b": [1.0, -0.0, 1e100, 2**63], "a": "é😀\u2028\x7f\n"}, "text", [1e5, 1e-7, 1e16, -0]]


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("ok", [True, False])
async def test_a_right_digest_is_taken(site: Site, ok: bool, result: Any) -> None:
    await site.submit()
    lease = await site.lease()
    value = {"result" if ok else "error": result}
    text = checked_text(lease["job_id"], ok, result if ok else None, None if ok else result)
    answer = await site.finish(lease, ok=ok, **value, integrity={"mode": "sha256", "sha256": sha(text)})
    assert answer[0] == 200, answer
    _, told = await site.data("GET", "/metrics?format=json")
    assert told["integrity"] == {"ok_1m": 1, "fail_1m": 0}


WRONG = sha(b"something else")
PROOFS = {
    "wrong digest": ("sha256", False, {"mode": "sha256", "sha256": WRONG}, "sha_mismatch"),
    "no digest": ("sha256", False, {"mode": "sha256"}, "missing_integrity"),
    "empty proof": ("sha256", False, {}, "missing_integrity"),
    "signature in place of the digest": ("sha256", False, {"mode": "sha256", "sig": "{sha}"}, "missing_integrity"),
    "nothing offered for sha256": ("sha256", False, {"mode": "none"}, "mode_downgrade"),
    "nothing at all where it is required": ("sha256", True, None, "missing_integrity"),
    "wrong digest where none is asked for": ("none", False, {"mode": "sha256", "sha256": WRONG}, "sha_mismatch"),
    "digest for hmac": ("hmac", False, {"mode": "sha256", "sha256": "{sha}"}, "mode_downgrade"),
    "wrong signature": ("hmac", False, {"mode": "hmac", "sig": WRONG}, "sig_mismatch"),
    "no signature": ("hmac", False, {"mode": "hmac", "sha256": "{sha}"}, "sig_mismatch"),
    "digest in place of the signature": ("hmac", False, {"mode": "hmac", "sig": "{sha}"}, "sig_mismatch"),
    "no signature where it is required": ("hmac", True, None, "missing_integrity"),
}


@pytest.mark.parametrize("name", PROOFS)
@pytest.mark.parametrize("path", ["/api/jobs/{id}/result", "/mesh/submit_result", "/api/results"])
async def test_a_result_that_does_not_prove_itself_is_refused_and_the_lease_stays(
    site: Site, name: str, path: str
) -> None:
    mode, required, proof, reason = PROOFS[name]
    demanding(site, mode, required)
    job_id = await site.submit()
    lease = await site.lease()
    before = await site.stored()
    text = checked_text(job_id, True, {"n": 1}, None)
    report = {"lease_id": lease["lease_id"], "node_id": "n1", "ok": True, "result": {"n": 1}}
    if "{id}" not in path:
        report["job_id"] = job_id
    if proof is not None:
        report["integrity"] = {name: one.format(sha=sha(text)) for name, one in proof.items()}

    async def send(body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/api/results":
            return await site.data("POST", path.format(id=job_id), body)
        status, answer = await site.data("POST", path, {"results": [body]})
        one = answer["results"][0]
        return (one["status"], one) if "code" in one else (status, one)

    refused(await send(report), 422, "result_integrity_fail")
    assert await site.stored() == before
    [line] = events(site, "RESULT_INTEGRITY_FAIL")
    assert (line["reason"], line["plane"]) == (reason, "data")
    right = {"mode": "hmac", "sig": sig(text)} if mode == "hmac" else {"mode": "sha256", "sha256": sha(text)}
    status, body = await send({**report, "integrity": right})
    assert (status, body["status"]) == (200, "completed")


async def test_a_digest_of_other_content_does_not_pass(site: Site) -> None:
    await site.submit()
    lease = await site.lease()
    for other in (("x", True, 1, None), (lease["job_id"], False, 1, None), (lease["job_id"], True, 1, 1)):
        proof = {"mode": "sha256", "sha256": sha(checked_text(*other))}
        refused(await site.finish(lease, result=1, integrity=proof), 422, "result_integrity_fail")


@STORES
async def test_the_settings_say_what_a_result_must_prove(make_site: MakeSite, scheme: str) -> None:
    site = await make_site(scheme, integrity=IntegritySettings(mode="sha256", required=True))
    await site.submit()
    lease = await site.lease()
    refused(await site.finish(lease), 422, "result_integrity_fail")
    proof = {"mode": "sha256", "sha256": sha(checked_text(lease["job_id"], True, None, None))}
    assert (await site.finish(lease, integrity=proof))[0] == 200


@pytest.mark.parametrize(("mode", "proof"), [("none", {"mode": "none"}), ("none", None), ("sha256", None)])
async def test_a_proof_that_nobody_asks_for_may_be_left_out(site: Site, mode: str, proof: Any) -> None:
    demanding(site, mode)
    await site.submit()
    assert (await site.finish(await site.lease(), integrity=proof))[0] == 200


# extend, release, cancel


async def test_an_extension_counts_from_now(site: Site) -> None:
    job_id = await site.submit(timeout_seconds=10_000)
    lease = await site.lease()
    for given, told in (({"seconds": 20}, 20), ({}, 300), ({"seconds": 1000.5}, 1000.5)):
        body = {"lease_id": lease["lease_id"], "node_id": "n1", **given}
        answer = await site.data("POST", f"/api/jobs/{job_id}/extend", body)
        assert answer == (200, {"ok": True, "job_id": job_id, "lease_seconds": told, "cancel_requested": False})


async def test_an_extension_does_not_move_the_timeout(site: Site) -> None:
    job_id = await site.submit(timeout_seconds=50)
    lease = await site.lease()
    _, body = await site.data("POST", f"/api/jobs/{job_id}/extend", {"lease_id": lease["lease_id"], "seconds": 900})
    assert 40 < body["lease_seconds"] <= 50


async def test_an_extended_lease_lasts_and_an_unextended_one_does_not(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, queue=QueueSettings(lease_seconds=10))
    kept, lost = await site.submit(), await site.submit()
    leases = {lease["job_id"]: lease["lease_id"] for lease in (await pull(site, max=2))["jobs"]}
    for _ in range(3):
        await clock.advance(8_000)
        assert (await site.data("POST", f"/api/jobs/{kept}/extend", {"lease_id": leases[kept]}))[0] == 200
    assert [(await site.job(one))["status"] for one in (kept, lost)] == ["running", "pending"]
    assert (await site.job(lost))["losses"] == 1


async def test_a_released_job_is_pulled_again_at_no_cost(site: Site) -> None:
    first, second = await site.submit(), await site.submit()
    lease = await site.lease()
    path, body = f"/api/jobs/{first}/release", {"lease_id": lease["lease_id"], "node_id": "n1"}
    assert await site.data("POST", path, body) == (200, {"ok": True, "job_id": first, "status": "pending"})
    before = await site.stored()
    assert (await site.data("POST", path, body))[0] == 200
    assert await site.stored() == before
    jobs = (await pull(site, "n2", max=2))["jobs"]
    assert [job["job_id"] for job in jobs] == [first, second], "at its old place"
    assert (jobs[0]["failures"], jobs[0]["losses"]) == (0, 0)
    assert (await site.finish(lease))[0] == 409


async def test_a_job_with_a_result_cannot_be_released(site: Site) -> None:
    job_id = await site.submit()
    lease = await site.lease()
    await site.finish(lease)
    answer = await site.data("POST", f"/api/jobs/{job_id}/release", {"lease_id": lease["lease_id"]})
    refused(answer, 409, "result_conflict")
    assert (await site.job(job_id))["status"] == "completed"


async def test_a_waiting_job_is_cancelled_at_once(site: Site) -> None:
    job_id = await site.submit()
    told = (200, {"ok": True, "job_id": job_id, "status": "cancelled", "cancel_requested": False})
    for body in (None, {}):
        assert await site.data("POST", f"/api/jobs/{job_id}/cancel", body) == told
    job = await site.job(job_id)
    assert (job["status"], job["reason"], job["attempt"]) == ("cancelled", "CANCELLED", 0)
    assert await ids(site) == []


async def test_a_running_job_is_asked_to_stop_by_extend_and_heartbeat(site: Site) -> None:
    await beat(site)
    job_id = await site.submit()
    lease = await site.lease()
    assert (await beat(site))["cancel"] == []
    told = (200, {"ok": True, "job_id": job_id, "status": "running", "cancel_requested": True})
    for _ in range(2):
        assert await site.data("POST", f"/api/jobs/{job_id}/cancel") == told
    _, extended = await site.data("POST", f"/api/jobs/{job_id}/extend", {"lease_id": lease["lease_id"]})
    assert extended["cancel_requested"] is True
    assert [(await beat(site))["cancel"] for _ in range(2)] == [[job_id], [job_id]]
    assert (await beat(site, "n2"))["cancel"] == []
    body = {"lease_id": lease["lease_id"]}
    assert (await site.data("POST", f"/api/jobs/{job_id}/release", body))[1]["status"] == "cancelled"
    assert (await beat(site))["cancel"] == []


async def test_a_cancelled_job_that_fails_is_not_tried_again(site: Site) -> None:
    job_id = await site.submit()
    lease = await site.lease()
    await site.data("POST", f"/api/jobs/{job_id}/cancel")
    assert (await site.finish(lease, ok=False, retry_after_seconds=0))[1]["status"] == "cancelled"


async def test_a_job_whose_worker_does_not_stop_is_cancelled_after_the_grace(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, queue=QueueSettings(cancel_grace_seconds=30))
    job_id = await site.submit()
    lease = await site.lease()
    await site.data("POST", f"/api/jobs/{job_id}/cancel")
    await clock.advance(29_000)
    assert (await site.job(job_id))["status"] == "running"
    await clock.advance(2_000)
    assert (await site.job(job_id))["status"] == "cancelled"
    refused(await site.finish(lease), 409, "lease_superseded")


@pytest.mark.parametrize("came_to", ["completed", "failed"])
async def test_a_finished_job_cannot_be_cancelled(site: Site, came_to: str) -> None:
    job_id = await brought_to(site, came_to)
    refused(await site.data("POST", f"/api/jobs/{job_id}/cancel"), 409, "already_finished")
    assert (await site.job(job_id))["status"] == came_to


# looking


@pytest.mark.parametrize("ends_by", ["result", "cancel"])
async def test_a_look_that_waits_is_answered_when_the_job_is_finished(site: Site, ends_by: str) -> None:
    job_id = await site.submit()
    lease = await site.lease() if ends_by == "result" else {}
    look = asyncio.create_task(site.data("GET", f"/api/jobs/{job_id}?wait_seconds=20"))
    await until(lambda: len(site.app.hub.waiting) == 1)
    if lease:
        await site.finish(lease, result=7)
    else:
        await site.data("POST", f"/api/jobs/{job_id}/cancel")
    status, body = await asyncio.wait_for(look, 5)
    assert (status, body["status"]) == (200, "completed" if lease else "cancelled")
    assert body["result"] == (7 if lease else None)


async def test_a_look_that_waits_is_not_answered_by_a_retry(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    job_id = await site.submit()
    look = asyncio.create_task(site.data("GET", f"/api/jobs/{job_id}?wait_seconds=5"))
    await until(lambda: len(site.app.hub.waiting) == 1)
    await site.finish(await site.lease(), ok=False, retry_after_seconds=0)
    await clock.advance(4_999)
    assert len(site.app.hub.waiting) == 1
    await clock.advance(1)
    assert (await asyncio.wait_for(look, 5))[1]["status"] == "pending"


async def test_a_look_at_a_finished_job_does_not_wait(make_site: MakeSite) -> None:
    site = await make_site(clock=VirtualClock())
    job_id = await brought_to(site, "completed")
    _, body = await asyncio.wait_for(site.data("GET", f"/api/jobs/{job_id}?wait_seconds=30"), 5)
    assert body["status"] == "completed"


async def test_a_list_is_filtered_by_each_label_and_by_all(site: Site) -> None:
    labels = {"kind": "k2", "source": "s2", "mission_id": "m2"}
    plain = await site.submit("k1", source="s1", mission_id="m1")
    marked = {name: await site.submit(**{"kind": "k1", "source": "s1", name: value}) for name, value in labels.items()}
    both = await site.submit(**labels)
    held = (await site.lease("worker", kinds=["k2"]))["job_id"]
    assert held == marked["kind"]

    async def found(query: str) -> list[str]:
        status, body = await site.data("GET", f"/api/jobs?{query}")
        assert (status, body["ok"]) == (200, True)
        assert all(set(job) >= JOB_FIELDS for job in body["jobs"])
        return [job["job_id"] for job in body["jobs"]]

    for name, value in labels.items():
        assert await found(f"{name}={value}") == [marked[name], both]
    assert await found("status=running") == [held] == await found("node_id=worker")
    assert await found("kind=k2&source=s2&mission_id=m2&status=pending") == [both]
    assert await found("kind=k2&source=s1") == [held]
    assert await found("kind=none") == [] == await found("kind=k1&node_id=worker")
    assert await found("") == [plain, *marked.values(), both]


@pytest.mark.parametrize("query", ["", "kind=a&", "status=pending&source=s&"])
async def test_pages_hold_every_job_once(site: Site, query: str) -> None:
    made = [await site.submit("a" if n % 2 else "b", source="s" if n % 3 else "t") for n in range(11)]
    whole = [job["job_id"] for job in (await site.data("GET", f"/api/jobs?{query}"))[1]["jobs"]]
    assert set(whole) <= set(made)
    assert len(whole) >= 5
    seen: list[str] = []
    cursor = ""
    for _ in range(12):
        _, body = await site.data("GET", f"/api/jobs?{query}limit=2&cursor={cursor}")
        assert len(body["jobs"]) <= 2
        seen += [job["job_id"] for job in body["jobs"]]
        cursor = body["next_cursor"]
        if cursor is None:
            break
    assert (seen, cursor) == (whole, None)


LARGE = {"text": "x" * 5000, "list": list(range(300)), "é": None}


async def test_large_params_come_back_whole_everywhere(site: Site) -> None:
    small, large = {"text": "y"}, LARGE
    made = {await site.submit(params=one): one for one in (large, small, large)}
    leases = (await pull(site, max=2, pull_id="p"))["jobs"]
    again = (await pull(site, max=2, pull_id="p"))["jobs"]
    fleet = (await site.data("GET", "/mesh/pull_requests/n2"))[1]["jobs"]
    listed = (await site.data("GET", "/api/jobs"))[1]["jobs"]
    alone = [await site.job(job_id) for job_id in made]
    assert [len(one) for one in (leases, again, fleet, listed, alone)] == [2, 2, 1, 3, 3]
    for job in (*leases, *again, *fleet, *listed, *alone):
        assert job["params"] == made[job["job_id"]]


@pytest.mark.parametrize("size", [2044, 2045, 2046, 2047, 2048])
async def test_params_around_two_kibibytes_come_back_whole(site: Site, size: int) -> None:
    job_id = await site.submit(params="x" * size)
    assert (await site.job(job_id))["params"] == "x" * size == (await site.lease())["params"]
    apart = await site.app.store.fetch([Key("params", job_id)])
    assert len(apart) == (size + 2 > 2048), "the quotes count; above 2 KiB they have a row of their own"


# time


@pytest.mark.parametrize("by", ["delay_seconds", "not_before"])
async def test_a_job_is_held_back_until_its_time(make_site: MakeSite, by: str) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    now = (await site.job(await site.submit("other")))["created_at"]
    moment = now[:17] + f"{float(now[17:-1]) + 5:06.3f}Z"
    job_id = await site.submit(**{by: 5 if by == "delay_seconds" else moment})
    assert (await site.job(job_id))["not_before"] == moment
    await clock.advance(4_900)
    assert await ids(site, kinds=["work"]) == []
    await clock.advance(200)
    assert await ids(site, kinds=["work"]) == [job_id]


async def test_a_delayed_job_wakes_a_long_poll_when_its_time_has_come(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    [poll] = await polling(site, 1, wait_seconds=30)
    job_id = await site.submit(delay_seconds=5)
    await clock.advance(4_900)
    assert not poll.done()
    await clock.advance(200)
    assert [job["job_id"] for job in (await asyncio.wait_for(poll, 5))["jobs"]] == [job_id]


@pytest.mark.parametrize("moment", ["2001-01-01T00:00:00Z", "2001-01-01T02:00:00.5+02:00"])
async def test_a_time_that_has_passed_holds_nothing_back(site: Site, moment: str) -> None:
    job_id = await site.submit(not_before=moment)
    assert await ids(site) == [job_id]


@pytest.mark.parametrize("by", ["job", "setting"])
async def test_a_job_nobody_took_in_time_has_failed(make_site: MakeSite, by: str) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, queue=QueueSettings(item_ttl_seconds=5 if by == "setting" else 0))
    job_id = await site.submit(**({"expires_in_seconds": 5} if by == "job" else {}))
    await clock.advance(4_900)
    assert (await site.job(job_id))["status"] == "pending"
    await clock.advance(200)
    job = await site.job(job_id)
    assert (job["status"], job["reason"], job["attempt"]) == ("failed", "EXPIRED", 0)
    assert await ids(site) == []


async def test_a_job_that_was_taken_in_time_does_not_expire(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    await site.submit(expires_in_seconds=5)
    lease = await site.lease()
    await clock.advance(10_000)
    assert (await site.finish(lease))[1]["status"] == "completed"


async def test_an_attempt_past_its_timeout_is_a_failure_and_not_a_loss(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock)
    job_id = await site.submit(timeout_seconds=20, max_retries=0)
    await site.lease()
    await clock.advance(19_000)
    assert (await site.job(job_id))["status"] == "running"
    await clock.advance(2_000)
    job = await site.job(job_id)
    assert (job["status"], job["failures"], job["losses"]) == ("failed", 1, 0)


async def test_the_third_loss_parks_the_job(make_site: MakeSite) -> None:
    clock = VirtualClock()
    site = await make_site(clock=clock, queue=QueueSettings(lease_seconds=10))
    job_id = await site.submit()
    for n in range(3):
        await site.lease(f"n{n}")
        await clock.advance(12_000)
    job = await site.job(job_id)
    assert (job["status"], job["reason"], job["losses"], job["attempt"]) == ("failed", "POISON", 3, 3)
    assert await ids(site) == []


async def test_entries_of_a_batch_are_decided_in_order_whatever_their_keys_were_used_for(make_site: MakeSite) -> None:
    clock = VirtualClock()
    settings = {"queue": QueueSettings(max_depth=1), "idempotency": IdempotencySettings(ttl_seconds=10)}
    site = await make_site(clock=clock, **settings)
    job_id = await site.submit(idempotency_key="used")
    lease = await site.lease("n")
    await site.data("POST", f"/api/jobs/{job_id}/result", {"lease_id": lease["lease_id"], "ok": True})
    await clock.advance(10_000)
    jobs = [{"kind": "k", "idempotency_key": "used"}, {"kind": "other"}]
    _, body = await site.data("POST", "/api/jobs", {"jobs": jobs})
    assert [one.get("code", one.get("status")) for one in body["jobs"]] == ["accepted", "queue_full"]


async def test_results_of_a_batch_are_decided_in_order(site: Site) -> None:
    job_id = await site.submit(max_retries=5)
    lease = await site.lease("n")
    failed = {"lease_id": lease["lease_id"], "ok": False, "error": "once", "retry_after_seconds": 0}
    await site.data("POST", f"/api/jobs/{job_id}/result", failed)
    lease = await site.lease("n")
    said = {"job_id": job_id, "lease_id": lease["lease_id"]}
    results = [{**said, "ok": False, "error": "first"}, {**said, "ok": True}]
    _, body = await site.data("POST", "/api/results", {"results": results})
    assert [one.get("code", one.get("status")) for one in body["results"]] == ["pending", "result_conflict"]
