"""The client: what it repeats and what not, what it never shows; and every verb against a real hub."""

from __future__ import annotations

import json
import socket
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sheratan_hub.answers import json_text
from sheratan_hub.canonical import Raw, result_sig
from sheratan_hub.client import (
    Accepted,
    HubClient,
    HubRefused,
    HubUnreachable,
    Refusal,
    Report,
    Submitted,
)
from sheratan_hub.config import IntegritySettings, QueueSettings
from tests.conftest import TOKEN
from tests.web.faking import ACCEPTED, Fake, HastyClock, hangs_up, is_cut, refuses, says, takes_all


async def test_a_submit_carries_one_drawn_key_through_refusals_cut_answers_and_lost_connections(
    fake: Fake, client: HubClient, hasty: HastyClock
) -> None:
    fake.script = [refuses(503, "busy", **{"Retry-After": "2"}), is_cut, hangs_up, says("nonsense"), ACCEPTED]
    done = await client.submit("text.stats", {"path": "a"})
    assert done == Submitted(job_id="j1", status="accepted")
    assert len(fake.bodies) == 5
    assert len({body["idempotency_key"] for body in fake.bodies}) == 1
    assert len(fake.bodies[0]["idempotency_key"]) == 32
    assert hasty.slept[0] >= 2000
    assert all(slept < 2000 for slept in hasty.slept[1:])


async def test_two_submits_draw_different_keys_and_a_given_key_is_kept(fake: Fake, client: HubClient) -> None:
    fake.script = [ACCEPTED]
    await client.submit("k")
    await client.submit("k")
    await client.submit("k", idempotency_key="mine", priority="HIGH", delay_seconds=5)
    first, second, third = fake.bodies
    assert first["idempotency_key"] != second["idempotency_key"]
    assert third == {"kind": "k", "idempotency_key": "mine", "priority": "HIGH", "delay_seconds": 5}


async def test_a_refusal_that_stays_is_raised_when_patience_has_run_out(
    fake: Fake, client: HubClient, hasty: HastyClock
) -> None:
    fake.script = [refuses(429, "queue_full", **{"Retry-After": "1"})]
    with pytest.raises(HubRefused) as no:
        await client.submit("k")
    assert (no.value.status, no.value.code, no.value.retry_after_seconds) == (429, "queue_full", 1.0)
    assert 25_000 < sum(hasty.slept) <= 30_000


async def test_a_hub_that_asks_for_more_time_than_there_is_patience_is_not_waited_for(
    fake: Fake, client: HubClient, hasty: HastyClock
) -> None:
    fake.script = [refuses(503, "draining", **{"Retry-After": "31"})]
    with pytest.raises(HubRefused):
        await client.job("j1")
    assert hasty.slept == []


@pytest.mark.parametrize("status", [400, 403, 404, 409, 410, 422, 500])
async def test_a_no_that_another_try_would_not_change_is_raised_at_once(
    fake: Fake, client: HubClient, status: int
) -> None:
    fake.script = [refuses(status, "some_code")]
    with pytest.raises(HubRefused, match=f"because of some_code \\({status} some_code\\)") as no:
        await client.cancel("j1")
    assert no.value.code == "some_code"
    assert len(fake.bodies) == 1


async def test_backoff_doubles_under_full_jitter_up_to_its_cap(
    fake: Fake, client: HubClient, hasty: HastyClock
) -> None:
    fake.script = [hangs_up]
    with pytest.raises(HubUnreachable):
        await client.health()
    bounds = [min(5000, 100 * 2**n) for n in range(len(hasty.slept))]
    assert all(0 <= slept <= bound for slept, bound in zip(hasty.slept, bounds, strict=True))
    assert len({round(slept / bound, 3) for slept, bound in zip(hasty.slept, bounds, strict=True)}) > 5


async def test_nobody_listening_is_said_in_a_few_words(hasty: HastyClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    async with HubClient(url, url, TOKEN, clock=hasty, patience_seconds=0) as hub:
        with pytest.raises(HubUnreachable, match=r"no answer from .*/health: Connection refused$"):
            await hub.health()
    assert hasty.slept == []


async def test_a_pull_keeps_its_id_through_repeats_and_the_next_pull_has_another(fake: Fake, client: HubClient) -> None:
    fake.script = [is_cut, hangs_up, says({"ok": True, "jobs": [], "defer_ms": 500, "reason": "no_job"})]
    pulled = await client.pull("n1", max=3, wait_seconds=1, kinds=["k"])
    await client.pull("n1")
    ids = [body["pull_id"] for body in fake.bodies]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert (pulled.jobs, pulled.defer_ms, pulled.reason) == ([], 500, "no_job")


async def test_the_token_is_sent_but_never_shown(fake: Fake, client: HubClient) -> None:
    fake.script = [is_cut]
    try:
        await client.health()
    except HubUnreachable as error:
        shown = "".join(traceback.format_exception(error)) + repr(error) + repr(client) + repr(vars(error))
    assert fake.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in shown
    assert "aiohttp.client_exceptions" not in shown


async def test_a_redirect_does_not_carry_the_token_away(fake: Fake, client: HubClient) -> None:
    fake.script = [says({}, 302, Location="http://127.0.0.1:1/elsewhere")]
    with pytest.raises(HubRefused) as no:
        await client.health()
    assert (no.value.status, no.value.code, len(fake.requests)) == (302, "http_302", 1)


def test_a_token_that_no_header_can_carry_is_refused_without_being_shown() -> None:
    with pytest.raises(ValueError, match="no HTTP header") as no:
        HubClient(token="canary\nX-Other: 1")
    assert "canary" not in str(no.value)


async def test_many_jobs_travel_in_chunks_of_500_and_each_has_its_outcome_in_order(
    fake: Fake, client: HubClient
) -> None:
    fake.script = [takes_all]
    outcomes = await client.submit_many({"kind": "k", "idempotency_key": str(n)} for n in range(1201))
    assert [len(body["jobs"]) for body in fake.bodies] == [500, 500, 201]
    assert [one.job_id for one in outcomes if isinstance(one, Submitted)] == [str(n) for n in range(1201)]


async def test_a_chunk_never_exceeds_16_mebibytes(fake: Fake, client: HubClient) -> None:
    fake.script = [takes_all]
    params = {"text": "x" * 1_000_000}
    await client.submit_many({"kind": "k", "params": params} for _ in range(20))
    assert [len(body["jobs"]) for body in fake.bodies] == [16, 4]
    assert all((request.content_length or 0) <= 16 * 1024 * 1024 for request in fake.requests)


async def test_entries_without_room_are_offered_again_and_a_refused_one_is_a_value(
    fake: Fake, client: HubClient, hasty: HastyClock
) -> None:
    full = {"ok": False, "code": "queue_full", "status": 429, "detail": "full"}
    bad = {"ok": False, "code": "invalid_field", "status": 422, "detail": "bad"}
    good = {"ok": True, "job_id": "a", "status": "accepted"}
    fake.script = [says({"ok": True, "jobs": [good, full, bad]}), says({"ok": True, "jobs": [{**good, "job_id": "b"}]})]
    outcomes = await client.submit_many([{"kind": name} for name in ("first", "second", "third")])
    assert [job["kind"] for job in fake.bodies[1]["jobs"]] == ["second"]
    assert fake.bodies[0]["jobs"][1]["idempotency_key"] == fake.bodies[1]["jobs"][0]["idempotency_key"]
    assert outcomes == [
        Submitted(job_id="a", status="accepted"),
        Submitted(job_id="b", status="accepted"),
        Refusal(code="invalid_field", status=422, detail="bad"),
    ]
    assert len(hasty.slept) == 1


async def test_an_entry_for_which_a_whole_batch_is_refused_is_found_and_the_others_go_through(
    fake: Fake, client: HubClient
) -> None:
    async def dislikes_seven(request: web.Request, body: Any) -> web.StreamResponse:
        if any(job["idempotency_key"] == "7" for job in body["jobs"]):
            return await refuses(400, "bad_json")(request, body)
        return await takes_all(request, body)

    fake.script = [dislikes_seven]
    outcomes = await client.submit_many({"kind": "k", "idempotency_key": str(n)} for n in range(10))
    refused = [n for n, one in enumerate(outcomes) if isinstance(one, Refusal)]
    assert refused == [7]
    assert outcomes[9] == Submitted(job_id="9", status="accepted")


async def test_a_batch_with_a_wrong_token_is_raised(fake: Fake, client: HubClient) -> None:
    fake.script = [refuses(403, "invalid_token")]
    with pytest.raises(HubRefused):
        await client.submit_many([{"kind": "k"}, {"kind": "k"}])


async def test_lists_are_followed_through_empty_pages(fake: Fake, client: HubClient) -> None:
    job = {"job_id": "j1", "status": "pending", "kind": "k"}
    fake.script = [
        says({"ok": True, "jobs": [], "next_cursor": "c1"}),
        says({"ok": True, "jobs": [job], "next_cursor": "c2"}),
        says({"ok": True, "jobs": [], "next_cursor": None}),
    ]
    found = [one.job_id async for one in client.jobs(kind="k", page=1)]
    assert found == ["j1"]
    assert [request.query.get("cursor") for request in fake.requests] == [None, "c1", "c2"]
    assert all(request.query["kind"] == "k" for request in fake.requests)


async def test_with_a_key_results_are_signed(fake: Fake, hasty: HastyClock) -> None:
    fake.script = [says({"ok": True, "job_id": "j1", "status": "completed"})]
    url = str(fake.server.make_url("/"))
    async with HubClient(url, url, TOKEN, clock=hasty, hmac_key="secret") as hub:
        await hub.complete("j1", "l1", "n1", {"b": 1.0, "a": "ü"})
    sealed = fake.bodies[0]["integrity"]
    assert sealed["mode"] == "hmac"
    assert sealed["sig"] == result_sig("secret", "j1", True, '{"a":"ü","b":1.0}'.encode(), b"null")
    assert "secret" not in json.dumps(fake.bodies)


async def test_the_client_seals_results_as_the_vectors_say(fake: Fake, hasty: HastyClock) -> None:
    vectors = json.loads((Path(__file__).parents[1] / "vectors" / "integrity.json").read_text())
    answers = [{"ok": True, "job_id": one["job_id"], "status": "completed"} for one in vectors["results"]]
    fake.script = [says({"ok": True, "results": answers})]
    url = str(fake.server.make_url("/"))
    reports = [
        Report(
            job_id=one["job_id"],
            lease_id=str(n),
            node_id="n",
            ok=one["ok"],
            result=Raw(one["result"].encode()),
            error=Raw(one["error"].encode()),
        )
        for n, one in enumerate(vectors["results"])
    ]
    async with HubClient(url, url, TOKEN, clock=hasty, hmac_key=vectors["key"]) as hub:
        await hub.results(reports)
    sealed = [one["integrity"] for one in fake.bodies[0]["results"]]
    assert [(one["mode"], one["sha256"], one["sig"]) for one in sealed] == [
        ("hmac", one["sha256"], one["sig"]) for one in vectors["results"]
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**64, -(2**63) - 1, "\ud800", {"a": [10**30]}, {1, 2}])
def test_what_a_hub_would_refuse_or_change_is_not_written(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        json_text({"value": value})


@pytest.mark.parametrize("value", [2**64 - 1, -(2**63), 1.5, "1" * 40, {"ü": None}, [True, (1, 2)]])
def test_what_a_hub_takes_is_written_as_it_is(value: object) -> None:
    assert json.loads(json_text(value)) == json.loads(json.dumps(value))


# against a real hub


@pytest.fixture
async def hub(make_site: Any) -> AsyncIterator[HubClient]:
    site = await make_site(integrity=IntegritySettings(required=True), queue=QueueSettings(max_depth=6))
    async with HubClient(site.url("control", ""), site.url("data", ""), TOKEN, patience_seconds=0) as client:
        yield client


async def test_a_job_goes_through_its_life(hub: HubClient) -> None:
    made = await hub.submit("k", {"n": 1.5}, idempotency_key="key", source="s", mission_id="m", max_retries=1)
    again = await hub.submit("k", {"n": 1.5}, idempotency_key="key")
    assert (made.status, again.status, again.dedup, again.job_id) == ("accepted", "in_progress", True, made.job_id)
    lease = (await hub.pull("n1", max=5, kinds=["k"])).jobs[0]
    assert (lease.job_id, lease.params, lease.attempt) == (made.job_id, {"n": 1.5}, 1)
    assert not (await hub.extend(lease.job_id, lease.lease_id, 60)).cancel_requested
    failed = await hub.fail(lease.job_id, lease.lease_id, "n1", {"type": "E"}, retry_after_seconds=0)
    assert failed.status == "pending"
    second = (await hub.pull("n1", wait_seconds=5)).jobs[0]
    done = await hub.complete(second.job_id, second.lease_id, "n1", {"lines": 3})
    assert done == Accepted(job_id=made.job_id, status="completed")
    job = await hub.job(made.job_id, wait_seconds=5)
    assert (job.status, job.result, job.attempt, job.failures, job.source) == ("completed", {"lines": 3}, 2, 1, "s")
    with pytest.raises(HubRefused) as no:
        await hub.complete(second.job_id, second.lease_id, "n1", "another result")
    assert no.value.status == 409


async def test_a_lease_is_released_and_a_running_job_cancelled(hub: HubClient) -> None:
    made = await hub.submit("k")
    lease = (await hub.pull("n1")).jobs[0]
    await hub.release(lease.job_id, lease.lease_id)
    lease = (await hub.pull("n1")).jobs[0]
    assert (await hub.cancel(made.job_id)).cancel_requested
    assert (await hub.extend(lease.job_id, lease.lease_id, 60)).cancel_requested


async def test_results_go_out_as_a_batch_with_an_outcome_each(hub: HubClient) -> None:
    await hub.submit_many([{"kind": "k"}, {"kind": "k"}])
    leases = (await hub.pull("n1", max=2)).jobs
    good, bad = (
        Report(job_id=one.job_id, lease_id=lease_id, node_id="n1", ok=True, result=Raw(b"[1.0]"))
        for one, lease_id in zip(leases, (leases[0].lease_id, "wrong"), strict=True)
    )
    outcomes = await hub.results([good, bad, good])
    assert [getattr(one, "status", None) for one in outcomes] == ["completed", 409, "completed"]
    assert (await hub.job(leases[0].job_id)).result == [1.0]


async def test_a_batch_above_the_depth_limit_tells_which_entries_had_no_room(hub: HubClient) -> None:
    outcomes = await hub.submit_many({"kind": "k"} for _ in range(8))
    assert [isinstance(one, Refusal) and one.code == "queue_full" for one in outcomes] == [False] * 6 + [True] * 2
    listed = [job.job_id async for job in hub.jobs(status="pending", page=4)]
    assert listed == [one.job_id for one in outcomes if isinstance(one, Submitted)]


async def test_a_node_checks_in_and_both_planes_tell_how_they_are(hub: HubClient) -> None:
    beat = await hub.heartbeat(
        "n1", boot_id="b", status="online", capabilities=["gpu"], max_concurrent=4, labels={"rack": 7}
    )
    assert beat.node_id == "n1"
    assert beat.heartbeat_after_seconds > 0
    assert (beat.cancel, beat.drain) == ([], False)
    node = (await hub.nodes())[0]
    assert (node.node_id, node.status, node.capabilities, node.max_concurrent) == ("n1", "ONLINE", ["gpu"], 4)
    assert "n1" in (await hub.registry())["nodes"]
    assert (await hub.metrics("control"))["nodes_online"] == 1
    assert (await hub.metrics("data"))["queue_depth"] == 0
    assert (await hub.health("data"))["ok"] is True
