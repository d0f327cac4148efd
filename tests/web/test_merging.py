"""Calls that are made at the same time: how many requests they are, and that each has an outcome of its own.

Longer than 300 lines because one scripted hub serves all of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiohttp import web

from sheratan_hub.answers import Accepted, Pulled, Refusal, Report, Submitted
from sheratan_hub.canonical import Raw
from sheratan_hub.client import HubClient, HubRefused, HubUnreachable
from sheratan_hub.clock import settle
from sheratan_hub.config import QueueSettings
from sheratan_hub.merging import BATCH_BYTES, IN_FLIGHT
from tests.conftest import TOKEN, MakeSite
from tests.web.faking import Fake, HastyClock, Responder, hangs_up, refuses, says

Verdict = Callable[[Any], dict[str, Any]]


def accepts(entry: Any) -> dict[str, Any]:
    return {"ok": True, "job_id": entry.get("idempotency_key") or entry.get("job_id", "?"), "status": "accepted"}


def no(status: int, code: str) -> dict[str, Any]:
    return {"ok": False, "code": code, "status": status, "detail": f"because of {code}"}


def judges(verdict: Verdict = accepts) -> Responder:
    """Answers entries as told by `verdict`, whether they come alone or in a batch."""

    async def respond(_: web.Request, body: Any) -> web.StreamResponse:
        of = "jobs" if "jobs" in body else "results"
        if of in body:
            return web.json_response({"ok": True, of: [verdict(entry) for entry in body[of]]})
        told = verdict(body)
        return web.json_response(told, status=told.get("status", 200) if not told["ok"] else 200)

    return respond


class Held:
    """A hub that answers nothing before `gate` is open."""

    def __init__(self, respond: Responder) -> None:
        self.gate = asyncio.Event()
        self._respond = respond

    async def __call__(self, request: web.Request, body: Any) -> web.StreamResponse:
        await self.gate.wait()
        return await self._respond(request, body)


def sizes(fake: Fake) -> list[int]:
    """How many entries each request had; 0 for one that was no batch."""
    return [len(body.get("jobs", body.get("results", ()))) for body in fake.bodies]


def submits(hub: HubClient, *keys: str) -> list[asyncio.Task[Submitted]]:
    return [asyncio.create_task(hub.submit("k", idempotency_key=key)) for key in keys]


async def outcomes(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    async with asyncio.timeout(10):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def asked(fake: Fake, requests: int) -> None:
    """Wait until the hub has so many requests, and let those that would follow come."""
    async with asyncio.timeout(10):
        while len(fake.bodies) < requests:
            await asyncio.sleep(0)
    await settle(200)
    assert len(fake.bodies) == requests


async def test_64_submits_at_once_are_one_request_and_each_gets_its_own_job(fake: Fake, client: HubClient) -> None:
    fake.script = [judges()]
    keys = [f"key{n}" for n in range(64)]
    done = await outcomes(submits(client, *keys))
    assert [one.job_id for one in done] == keys
    assert sizes(fake) == [64]
    assert [job["idempotency_key"] for job in fake.bodies[0]["jobs"]] == keys, "first come, first in the batch"


async def test_64_callers_that_go_on_and_on_stay_together(fake: Fake, client: HubClient) -> None:
    fake.script = [judges()]

    async def caller() -> None:
        for _ in range(10):
            await client.submit("k")

    await asyncio.gather(*(caller() for _ in range(64)))
    assert sum(sizes(fake)) == 640
    assert len(fake.bodies) <= 20
    keys = {job["idempotency_key"] for body in fake.bodies for job in body["jobs"]}
    assert len(keys) == 640, "each call draws its own"


async def test_a_lone_submit_is_a_request_of_its_own(fake: Fake, client: HubClient) -> None:
    fake.script = [judges()]
    for n in range(3):
        await client.submit("k", {"n": n})
    assert [body.get("params") for body in fake.bodies] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert {request.path for request in fake.requests} == {"/api/jobs"}


async def test_the_first_leaves_at_once_and_what_comes_while_requests_are_out_is_the_next_batch(
    fake: Fake, client: HubClient
) -> None:
    held = Held(judges())
    fake.script = [held]
    tasks: list[asyncio.Task[Submitted]] = []
    for n in range(IN_FLIGHT):
        tasks += submits(client, f"early{n}")
        await asked(fake, n + 1)
    for n in range(10):
        tasks += submits(client, f"late{n}")
        await settle(5)
    await asked(fake, IN_FLIGHT)
    held.gate.set()
    await outcomes(tasks)
    assert sizes(fake) == [0] * IN_FLIGHT + [10]
    assert [job["idempotency_key"] for job in fake.bodies[-1]["jobs"]] == [f"late{n}" for n in range(10)]


async def test_each_call_of_a_batch_has_the_outcome_that_it_would_have_alone(
    fake: Fake, client: HubClient, hasty: HastyClock
) -> None:
    told = {"bad": no(422, "invalid_field"), "known": no(409, "idempotency_key_collision")}
    fake.script = [judges(lambda job: told.get(job["idempotency_key"]) or accepts(job))]
    first, bad, known, last = await outcomes(submits(client, "first", "bad", "known", "last"))
    assert (first.job_id, last.job_id) == ("first", "last")
    for refused, status, code in ((bad, 422, "invalid_field"), (known, 409, "idempotency_key_collision")):
        assert isinstance(refused, HubRefused)
        assert (refused.status, refused.code, refused.body["code"]) == (status, code, code)
        assert str(refused) == f"because of {code} ({status} {code})"
    assert (sizes(fake), hasty.slept) == ([4], [])


async def test_entries_without_room_are_tried_again_with_their_keys_and_their_neighbours_do_not_wait(
    fake: Fake, client: HubClient, hasty: HastyClock
) -> None:
    seen: list[str] = []

    def verdict(job: Any) -> dict[str, Any]:
        seen.append(job["idempotency_key"])
        full = job["idempotency_key"].startswith("full") and seen.count(job["idempotency_key"]) < 3
        return no(429, "queue_full") if full else accepts(job)

    fake.script = [judges(verdict)]
    done = await outcomes(submits(client, "a", "full1", "b", "full2"))
    assert [one.job_id for one in done] == ["a", "full1", "b", "full2"]
    assert sorted(seen) == ["a", "b", *["full1"] * 3, *["full2"] * 3]
    assert len(hasty.slept) == 4


async def test_an_entry_that_never_finds_room_is_refused_when_its_patience_has_run_out(
    fake: Fake, client: HubClient, hasty: HastyClock
) -> None:
    full = no(429, "queue_full")
    fake.script = [judges(lambda job: full if job["idempotency_key"] == "full" else accepts(job))]
    refused, fine = await outcomes(submits(client, "full", "fine"))
    assert (refused.status, refused.code, fine.job_id) == (429, "queue_full", "fine")
    assert 20_000 < sum(hasty.slept) <= 30_000


@pytest.mark.parametrize(("status", "code"), [(400, "bad_json"), (413, "body_too_large"), (500, "internal")])
async def test_an_entry_for_which_a_whole_batch_is_refused_is_found_and_its_neighbours_go_through(
    fake: Fake, client: HubClient, status: int, code: str
) -> None:
    async def dislikes_seven(request: web.Request, body: Any) -> web.StreamResponse:
        keys = [job["idempotency_key"] for job in body.get("jobs", [body])]
        return await (refuses(status, code) if "7" in keys else judges())(request, body)

    fake.script = [dislikes_seven]
    done = await outcomes(submits(client, *map(str, range(16))))
    assert [getattr(one, "job_id", None) for one in done] == [str(n) if n != 7 else None for n in range(16)]
    assert (done[7].status, done[7].code) == (status, code)
    assert len(fake.bodies) <= 9


async def test_what_concerns_all_of_a_batch_is_raised_by_each_call_as_its_own(fake: Fake, client: HubClient) -> None:
    fake.script = [refuses(403, "invalid_token")]
    done = await outcomes(submits(client, "a", "b", "c"))
    assert [(one.status, one.code) for one in done] == [(403, "invalid_token")] * 3
    assert len({id(one) for one in done}) == 3
    assert sizes(fake) == [3]


async def test_a_batch_without_an_answer_is_repeated_with_the_same_keys(fake: Fake, client: HubClient) -> None:
    nonsense = says({"ok": True, "jobs": []})
    fake.script = [hangs_up, nonsense, refuses(503, "busy", **{"Retry-After": "1"}), judges()]
    tasks = [asyncio.create_task(client.submit("k")) for _ in range(8)]
    done = await outcomes(tasks)
    assert len({one.job_id for one in done}) == 8
    first, *_ = fake.bodies
    assert {one.job_id for one in done} == {job["idempotency_key"] for job in first["jobs"]}


async def test_a_hub_that_stays_away_is_said_to_each_call(fake: Fake, client: HubClient) -> None:
    fake.script = [hangs_up]
    done = await outcomes(submits(client, "a", "b", "c"))
    assert [type(one) for one in done] == [HubUnreachable] * 3
    assert len({id(one) for one in done}) == 3


@pytest.mark.parametrize("body", [{"ok": True, "jobs": [1, 2]}, {"ok": True, "jobs": [{"ok": True}] * 2}])
async def test_an_answer_that_no_hub_gives_is_no_answer(fake: Fake, client: HubClient, body: Any) -> None:
    fake.script = [says(body)]
    assert [type(one) for one in await outcomes(submits(client, "a", "b"))] == [HubUnreachable] * 2


async def test_a_call_that_is_cancelled_before_it_was_sent_is_not_sent(fake: Fake, client: HubClient) -> None:
    held = Held(judges())
    fake.script = [held]
    out = submits(client, "out0", "out1")
    await asked(fake, 1)
    other = submits(client, "other")
    await asked(fake, 2)
    waiting = submits(client, "a", "b", "c")
    await settle(5)
    waiting[1].cancel()
    out[0].cancel()
    await settle(5)
    held.gate.set()
    done = await outcomes([*out, *other, *waiting])
    assert [getattr(one, "job_id", None) for one in done] == [None, "out1", "other", "a", None, "c"]
    assert [type(done[n]) for n in (0, 4)] == [asyncio.CancelledError] * 2
    assert [job["idempotency_key"] for job in fake.bodies[-1]["jobs"]] == ["a", "c"]


async def test_when_all_that_waited_have_left_nothing_is_sent_and_the_next_call_is(
    fake: Fake, client: HubClient
) -> None:
    fake.script = [judges()]
    left = submits(client, "a", "b")
    await asyncio.sleep(0)
    for task in left:
        task.cancel()
    await asked(fake, 0)
    (done,) = await outcomes(submits(client, "next"))
    assert done.job_id == "next"


@pytest.mark.parametrize("verb", ["submit", "complete"])
async def test_closing_the_client_leaves_nobody_waiting(fake: Fake, hasty: HastyClock, verb: str) -> None:
    url = str(fake.server.make_url("/"))
    held = Held(judges())
    fake.script = [held]
    client = HubClient(url, url, TOKEN, clock=hasty)

    def call(n: int) -> Coroutine[Any, Any, Any]:
        return client.submit("k") if verb == "submit" else client.complete(f"j{n}", f"l{n}", "n1")

    async with client:
        tasks = []
        for n in range(IN_FLIGHT):
            tasks.append(asyncio.create_task(call(n)))
            await asked(fake, n + 1)
        tasks += [asyncio.create_task(call(n)) for n in range(IN_FLIGHT, 9)]
        await settle(5)
    assert [type(one) for one in await outcomes(tasks)] == [HubUnreachable] * 9
    held.gate.set()
    async with client:
        assert await call(0)


async def test_closing_the_client_ends_the_patience_of_a_call_that_pauses(fake: Fake) -> None:
    url = str(fake.server.make_url("/"))
    fake.script = [refuses(503, "busy")]
    paused, go_on = asyncio.Event(), asyncio.Event()

    class Pausing(HastyClock):
        async def sleep(self, ms: float) -> None:
            paused.set()
            await go_on.wait()

    async with HubClient(url, url, TOKEN, clock=Pausing()) as client:
        (task,) = submits(client, "a")
        await paused.wait()
    go_on.set()
    (error,) = await outcomes([task])
    assert (type(error), error.code) == (HubRefused, "busy")


async def test_a_client_that_was_not_opened_says_so(hasty: HastyClock) -> None:
    with pytest.raises(RuntimeError, match="outside of `async with`"):
        await HubClient(clock=hasty).submit("k")


async def test_what_json_cannot_hold_fails_at_its_own_call(fake: Fake, client: HubClient) -> None:
    fake.script = [judges()]
    bad = asyncio.create_task(client.submit("k", {"x": float("nan")}))
    done = await outcomes([*submits(client, "a"), bad, *submits(client, "b")])
    assert (done[0].job_id, type(done[1]), done[2].job_id) == ("a", ValueError, "b")


async def test_a_merged_batch_has_500_entries_and_16_mebibytes_at_most(fake: Fake, client: HubClient) -> None:
    fake.script = [judges()]
    await outcomes(submits(client, *map(str, range(1201))))
    assert sizes(fake) == [500, 500, 201]
    fake.bodies.clear()
    large = {"text": "x" * 1_000_000}
    await outcomes([asyncio.create_task(client.submit("k", large)) for _ in range(20)])
    assert sorted(sizes(fake)) == [4, 16]
    assert all((request.content_length or 0) <= 16 * 1024 * 1024 for request in fake.requests)


# results


async def test_results_made_at_once_are_one_request_and_a_lone_one_is_its_own(fake: Fake, client: HubClient) -> None:
    fake.script = [judges(lambda one: no(409, "lease_superseded") if one["lease_id"] == "l1" else accepts(one))]
    tasks = [asyncio.create_task(client.complete(f"j{n}", f"l{n}", "n1", {"n": n})) for n in range(3)]
    tasks.append(asyncio.create_task(client.fail("j3", "l3", "n1", {"type": "E"}, retry=False)))
    done = await outcomes(tasks)
    assert [getattr(one, "job_id", one) for one in (done[0], done[2], done[3])] == ["j0", "j2", "j3"]
    assert (done[1].status, done[1].code) == (409, "lease_superseded")
    sent = fake.bodies[0]["results"]
    assert [(one["job_id"], one["ok"], one.get("retry")) for one in sent[2:]] == [
        ("j2", True, None),
        ("j3", False, False),
    ]
    assert {one["integrity"]["mode"] for one in sent} == {"sha256"}
    await client.complete("j/4", "l4", "n1")
    assert fake.requests[-1].raw_path == "/api/jobs/j%2F4/result"
    assert {"job_id", "results"}.isdisjoint(fake.bodies[-1])


def report(job_id: str, lease_id: str = "l", **fields: Any) -> Report:
    return Report(job_id=job_id, lease_id=lease_id, node_id="n1", ok=True, **fields)


async def test_results_and_a_pull_are_one_request_that_keeps_its_pull_id_through_repeats(
    fake: Fake, client: HubClient
) -> None:
    lease = {"job_id": "j2", "kind": "k", "lease_id": "l2", "lease_seconds": 30.0, "params": {"n": 1}}
    told = {"ok": True, "results": [accepts({"job_id": "j0"}), no(409, "result_conflict")], "jobs": [lease]}
    fake.script = [hangs_up, says(told)]
    done, pulled = await client.results_and_pull([report("j0"), report("j1")], "n1", max=3, kinds=["k"])
    assert done == [
        Accepted(job_id="j0", status="accepted"),
        Refusal(code="result_conflict", status=409, detail="because of result_conflict"),
    ]
    assert [(one.job_id, one.params) for one in pulled.jobs] == [("j2", {"n": 1})]
    first, second = (body["pull"] for body in fake.bodies)
    assert (
        first == second == {"node_id": "n1", "max": 3, "wait_seconds": 0, "pull_id": first["pull_id"], "kinds": ["k"]}
    )
    assert len(first["pull_id"]) == 32


async def test_of_more_results_than_fit_one_request_the_last_one_pulls(fake: Fake, client: HubClient) -> None:
    fake.script = [judges()]
    large = Raw(b'"%b"' % (b"x" * 1_000_000))
    kinds = [str(n).ljust(100, "k") for n in range(100)]
    done, _ = await client.results_and_pull([report(f"j{n}", result=large) for n in range(20)], "n1", kinds=kinds)
    assert [getattr(one, "job_id", one) for one in done] == [f"j{n}" for n in range(20)]
    assert [(len(body["results"]), "pull" in body) for body in fake.bodies] == [(16, False), (4, True)]
    fake.bodies.clear()
    fitting = Raw(b'"%b"' % (b"x" * (BATCH_BYTES // 16 - 300)))
    await client.results_and_pull([report(f"j{n}", result=fitting) for n in range(16)], "n1", kinds=kinds)
    assert sizes(fake) == [16]
    assert all((request.content_length or 0) <= 16 * 1024 * 1024 for request in fake.requests)


@pytest.mark.parametrize("reports", [2, 501])
async def test_a_pull_that_the_hub_does_not_take_costs_no_result(fake: Fake, client: HubClient, reports: int) -> None:
    async def knows_no_pull(request: web.Request, body: Any) -> web.StreamResponse:
        return await (refuses(422, "invalid_field") if "pull" in body else judges())(request, body)

    fake.script = [knows_no_pull]
    names = [f"j{n}" for n in range(reports)]
    done, pulled = await client.results_and_pull([*map(report, names)], "n1")
    assert ([getattr(one, "job_id", one) for one in done], pulled) == (names, Pulled())


# against a real hub


def client_of(site: Any) -> HubClient:
    return HubClient(site.url("control", ""), site.url("data", ""), TOKEN, patience_seconds=0)


async def test_a_hub_sees_few_requests_of_many_submits_and_takes_what_fits(make_site: MakeSite) -> None:
    site = await make_site("sqlite", queue=QueueSettings(max_depth=40))
    async with client_of(site) as hub:
        calls = [hub.submit("k", {"n": n}) if n != 5 else hub.submit("") for n in range(64)]
        done = await outcomes([asyncio.create_task(call) for call in calls])
        assert [getattr(one, "code", "") for one in done] == [""] * 5 + ["invalid_field"] + [""] * 35 + [
            "queue_full"
        ] * 23
        listed = [job.params["n"] async for job in hub.jobs()]
    assert listed == [n for n in range(41) if n != 5], "in the order of the calls"
    _, text, _ = await site.ask("data", "GET", "/metrics")
    told = [line for line in text.splitlines() if "http_requests_total{" in line and 'route="/api/jobs"' in line]
    assert sum(float(line.rpartition(" ")[2]) for line in told) <= 2, told


async def test_results_bring_the_next_leases(make_site: MakeSite) -> None:
    site = await make_site(queue=QueueSettings(max_inflight=2))
    async with client_of(site) as hub:
        await hub.submit_many([{"kind": "k", "params": {"n": n}} for n in range(4)])
        held = (await hub.pull("n1", max=2)).jobs
        reports = [report(one.job_id, one.lease_id, result=Raw(b"1")) for one in held]
        done, pulled = await hub.results_and_pull([*reports, report("none")], "n1", max=5, pull_id="p")
        again = await hub.results_and_pull(reports, "n1", max=5, pull_id="p")
        done_too, nothing = await hub.results_and_pull([], "n2", wait_seconds=0)
    assert [one.status for one in done] == ["completed", "completed", 404]
    assert [one.params["n"] for one in pulled.jobs] == [2, 3]
    assert [one.lease_id for one in again[1].jobs] == [one.lease_id for one in pulled.jobs]
    assert (done_too, nothing.jobs, nothing.reason) == ([], [], "inflight_limit")
