"""A job for which a pull is waiting is leased in the transaction that makes it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.rules.command import Limits, Refused, Scene
from sheratan_hub.rules.finish import Cancel, Finish, Release
from sheratan_hub.rules.lanes import Offer
from sheratan_hub.rules.nodes import Beat
from sheratan_hub.rules.pull import Pull, Pulled
from sheratan_hub.rules.submit import Submit
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Conflict, Loaded, Ready, Row, StoreDown, Wants
from tests.hub.moody import Moody

MakeHub = Callable[..., Awaitable[Hub]]


def pull(hub: Hub, node: str, limit: int = 1, wait_ms: int = 30_000, **fields: Any) -> asyncio.Task[Pulled]:
    fields = {"capabilities": frozenset(), **fields}
    return asyncio.create_task(hub.pull(Pull(node, hub.clock.secret(), limit, **fields), wait_ms))


def ids(waiting: asyncio.Task[Pulled]) -> list[str]:
    return [job.id for job in waiting.result().jobs]


async def submit(hub: Hub, *jobs: str, **fields: Any) -> None:
    await hub.execute_many([Submit(job, "k", **fields) for job in jobs])


@pytest.fixture
async def moody(clock: VirtualClock) -> Moody:
    store = Moody(clock)
    await store.open()
    return store


async def test_submit_and_lease_are_one_transaction(make_hub: MakeHub, moody: Moody) -> None:
    hub = await make_hub(store=moody)
    waiting = pull(hub, "n")
    await settle()
    await submit(hub, "j")
    await settle()
    assert (ids(waiting), moody.saves) == (["j"], 1)
    assert [event["event"] for event in await ledger(hub)] == ["job.submitted", "job.leased"]
    assert await hub.counts() == {"job:running": 1}
    assert (await moody.heads(), len(hub.committer.lanes)) == ({}, 0)


async def test_jobs_go_to_as_many_as_wait_and_the_rest_stays_in_line(make_hub: MakeHub, moody: Moody) -> None:
    hub = await make_hub(store=moody)
    tasks = []
    for node, limit in (("a", 2), ("b", 1)):
        tasks.append(pull(hub, node, limit))
        await settle()
    await submit(hub, *(f"j{n}" for n in range(5)))
    await settle()
    assert [ids(task) for task in tasks] == [["j0", "j1"], ["j2"]]
    assert await hub.counts() == {"job:running": 3, "job:pending": 2}
    late = pull(hub, "c", 10)
    await settle()
    assert ids(late) == ["j3", "j4"]


async def test_only_who_can_do_it_is_served(make_hub: MakeHub, moody: Moody) -> None:
    hub = await make_hub(store=moody)
    plain, able = pull(hub, "plain"), pull(hub, "able", capabilities=frozenset({"gpu"}))
    await settle()
    await submit(hub, "j", needs=("gpu",))
    await settle()
    assert (plain.done(), ids(able), moody.saves) == (False, ["j"], 1)


async def test_no_more_are_served_than_the_inflight_limit_allows(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(max_inflight=1))
    tasks = [pull(hub, "a"), pull(hub, "b")]
    await settle()
    await submit(hub, "j0", "j1")
    await settle()
    assert await hub.counts() == {"job:running": 1, "job:pending": 1}
    (first,) = [task for task in tasks if task.done()]
    (job,) = first.result().jobs
    await hub.execute(Finish(job.id, True, job.lease_id))
    await settle()
    assert sorted(ids(tasks[0]) + ids(tasks[1])) == ["j0", "j1"]


async def test_a_node_that_was_declared_dead_is_not_served(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(Limits(node_ttl_ms=1000, node_dead_ms=5000, restart_grace_ms=0))
    await hub.execute(Beat("n"))
    waiting = pull(hub, "n")
    await settle()
    await clock.advance(1001)
    await submit(hub, "j")
    await settle()
    assert (waiting.result().jobs, waiting.result().reason) == ((), "node_stale")
    assert await hub.counts("job:") == {"job:pending": 1}


@pytest.mark.parametrize("error", [StoreDown("broken"), Conflict("raced"), RuntimeError("bug")])
async def test_a_pull_that_was_served_by_a_batch_that_failed_waits_on(
    make_hub: MakeHub, moody: Moody, error: Exception
) -> None:
    hub = await make_hub(store=moody)
    waiting = pull(hub, "n")
    await settle()
    moody.errors = [error]
    job = asyncio.create_task(submit(hub, "lost"))
    await settle()
    if not isinstance(error, StoreDown):
        await job
        assert ids(waiting) == ["lost"]  # the second try was fine: a bug is tried once more without who waits
        return
    assert not waiting.done()
    with pytest.raises(Refused):
        await job
    await submit(hub, "j")
    await settle()
    assert ids(waiting) == ["j"]


async def test_who_leaves_while_being_served_gives_the_job_back_at_no_cost(make_hub: MakeHub, moody: Moody) -> None:
    hub = await make_hub(store=moody)
    waiting = pull(hub, "gone")
    await settle()
    moody.gate.clear()
    job = asyncio.create_task(submit(hub, "j"))
    await settle()
    waiting.cancel()
    await settle()
    moody.gate.set()
    await job
    await settle()
    assert len(hub.waiting) == 0
    again = await pull(hub, "here")
    assert [(job.id, job.losses, job.failures) for job in again.jobs] == [("j", 0, 0)]


async def test_whose_time_is_over_while_being_served_gets_the_job(
    make_hub: MakeHub, moody: Moody, clock: VirtualClock
) -> None:
    hub = await make_hub(store=moody)
    waiting = pull(hub, "n", wait_ms=1000)
    await settle()
    moody.gate.clear()
    job = asyncio.create_task(submit(hub, "j"))
    await settle()
    await clock.advance(2000)
    assert not waiting.done()
    moody.gate.set()
    await job
    await settle()
    assert ids(waiting) == ["j"]


async def test_a_job_that_is_cancelled_in_its_batch_is_given_to_nobody(make_hub: MakeHub) -> None:
    hub = await make_hub()
    waiting = pull(hub, "n")
    await settle()
    await hub.execute_many([Submit("j", "k"), Cancel("j")])
    await settle()
    assert not waiting.done()
    assert await hub.counts() == {"job:cancelled": 1}


async def test_older_jobs_of_the_lane_go_first(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(max_inflight=1))
    await submit(hub, "running")
    (held,) = (await pull(hub, "a")).jobs
    await submit(hub, "old")
    waiting = pull(hub, "b")
    await settle()
    await hub.execute_many([Submit("new", "k"), Finish(held.id, True, held.lease_id)])
    await settle()
    assert ids(waiting) == ["old"]


async def test_jobs_submitted_in_one_batch_with_a_pull_come_after_those_before(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await submit(hub, "old")
    done, pulled = await asyncio.gather(
        hub.execute(Submit("new", "k")), hub.pull(Pull("n", "s", 5, capabilities=frozenset()), 0)
    )
    assert (done.job.status, [job.id for job in pulled.jobs]) == ("pending", ["old", "new"])
    assert await hub.counts() == {"job:running": 2}


async def test_a_finished_job_is_told_as_it_was_committed(make_hub: MakeHub, moody: Moody) -> None:
    hub = await make_hub(store=moody)
    await submit(hub, "j")
    (held,) = (await pull(hub, "n")).jobs
    waiting = asyncio.create_task(hub.job("j", 30_000))
    await settle()
    await hub.execute(Finish("j", True, held.lease_id, result=b"7"))
    await settle()
    assert (waiting.result().status, bytes(waiting.result().result)) == ("completed", b"7")


async def test_a_released_job_goes_before_a_new_one_of_its_batch(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await submit(hub, "old")
    (held,) = (await pull(hub, "a")).jobs
    waiting = pull(hub, "b")
    await settle()
    await hub.execute_many([Submit("new", "k"), Release("old", held.lease_id or "")])
    await settle()
    assert ids(waiting) == ["old"]


def test_a_lane_that_is_loaded_again_but_less_deep_keeps_what_was_found() -> None:
    view = View(Scene(0))
    rows = [Row("job", f"j{n}", b"", lane="l", order=n) for n in range(3)]
    for limit in (5, 1):
        view.add(Wants(ready={Ready("l"): limit}), Loaded(ready={Ready("l"): rows[:limit]}))
    assert view.ready("l", 4) == rows


async def test_a_pull_that_came_again_gets_the_job_and_its_older_self_goes_home(make_hub: MakeHub) -> None:
    hub = await make_hub()
    older = pull(hub, "n", pull_id="p")
    await settle()
    again = pull(hub, "n", pull_id="p")
    await settle()
    assert (older.result().jobs, again.done(), len(hub.waiting)) == ((), False, 1)
    await submit(hub, "j")
    await settle()
    assert ids(again) == ["j"]


async def test_leases_go_back_although_the_store_failed_at_first(make_hub: MakeHub, moody: Moody) -> None:
    hub = await make_hub(store=moody)
    await submit(hub, "j")
    pulled = await hub.pull(Pull("gone", "s", capabilities=frozenset()), 0)
    moody.errors = [StoreDown("for a moment")]
    hub.give_back(pulled)
    await settle()
    assert await hub.counts() == {"job:running": 1}
    await hub.sweep()
    await settle()
    assert [(job.id, job.losses) for job in (await pull(hub, "here")).jobs] == [("j", 0)]


async def ledger(hub: Hub) -> list[dict[str, Any]]:
    return [json.loads(line.line) for line in await hub.store.events()]


async def test_the_older_of_two_copies_may_leave_after_the_newer(make_hub: MakeHub) -> None:
    hub = await make_hub()
    offer = Offer(frozenset(), frozenset())
    with hub.waiting.pull(offer, 1, "n", ("n", "p")) as older, hub.waiting.pull(offer, 1, "n", ("n", "p")) as newer:
        pass
    assert (older.dismissed, newer.dismissed, len(hub.waiting)) == (True, False, 0)


async def test_a_pull_replaced_on_its_way_to_another_look_goes_home(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = await make_hub()
    older = pull(hub, "n", pull_id="p")
    await settle()
    on_its_way, go_on, offer = asyncio.Event(), asyncio.Event(), hub._offer

    async def slow(command: Pull) -> Offer:
        on_its_way.set()
        await go_on.wait()
        return await offer(command)

    monkeypatch.setattr(hub, "_offer", slow)
    hub.waiting.wake_all()
    await on_its_way.wait()
    monkeypatch.setattr(hub, "_offer", offer)
    again = pull(hub, "n", pull_id="p")
    await settle()
    go_on.set()
    await settle()
    assert (older.done(), again.done()) == (True, False)
    again.cancel()
