"""Long polls on a virtual clock: woken by work, by the end of a job, by the clock, by the end of the hub."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB
from sheratan_hub.rules.command import Limits, Refused
from sheratan_hub.rules.drain import Drain
from sheratan_hub.rules.finish import Cancel, Finish, Release
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.lanes import Offer, lane_name
from sheratan_hub.rules.nodes import Beat, Forget
from sheratan_hub.rules.pull import Pull, Pulled
from sheratan_hub.rules.submit import Submit
from sheratan_hub.waiting import Waiting

MakeHub = Callable[..., Awaitable[Hub]]


def pull(hub: Hub, node: str, wait_ms: int = 30_000, **fields: Any) -> asyncio.Task[Pulled]:
    fields = {"capabilities": frozenset(), **fields}
    return asyncio.create_task(hub.pull(Pull(node, hub.clock.secret(), **fields), wait_ms))


async def submit(hub: Hub, job_id: str, **fields: Any) -> Job:
    job: Job = (await hub.execute(Submit(job_id, fields.pop("kind", "k"), **fields))).job
    return job


async def test_a_waiting_pull_gets_the_job_as_soon_as_it_is_there(make_hub: MakeHub) -> None:
    hub = await make_hub()
    waiting = pull(hub, "n1")
    await settle()
    assert not waiting.done()
    await submit(hub, "j")
    await settle()
    assert [job.id for job in waiting.result().jobs] == ["j"]


async def test_one_waiter_is_woken_for_one_job_first_come_first_served(make_hub: MakeHub) -> None:
    hub = await make_hub()
    commands: list[int] = []
    hub.observe(lambda committed: commands.append(committed.commands))
    tasks = []
    for n in range(5):
        tasks.append(pull(hub, f"n{n}"))
        await settle()
    for n in range(3):
        await submit(hub, f"j{n}")
        await settle()
    assert [task.done() for task in tasks] == [True, True, True, False, False]
    assert sum(commands) == 5 + 3 + 3, "each of five looked once, three submits woke three"
    await hub.execute_many([Submit(f"k{n}", "k") for n in range(2)])
    await settle()
    assert all(task.done() for task in tasks)
    assert await hub.counts() == {"job:running": 5}


async def test_only_a_pull_that_can_take_the_job_is_woken(make_hub: MakeHub) -> None:
    hub = await make_hub()
    plain, able = pull(hub, "plain"), pull(hub, "able", capabilities=frozenset({"gpu"}))
    picky = pull(hub, "picky", kinds=frozenset({"other"}))
    await settle()
    await submit(hub, "j", needs=("gpu",))
    await settle()
    assert (plain.done(), able.done(), picky.done()) == (False, True, False)


async def test_a_wait_ends_with_nothing_when_its_time_is_over(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub()
    waiting = pull(hub, "n1", wait_ms=5000)
    await clock.advance(4999)
    assert not waiting.done()
    await clock.advance(1)
    assert waiting.result().reason == "no_job"
    assert len(hub.waiting) == 0


async def test_a_wake_that_its_waiter_could_not_use_goes_to_the_next(make_hub: MakeHub) -> None:
    hub = await make_hub()
    leaving = pull(hub, "leaving")
    await settle()
    staying = pull(hub, "staying")
    await settle()
    hub.observe(lambda committed: leaving.cancel() and None)
    await submit(hub, "j")
    await settle()
    assert leaving.cancelled()
    assert staying.done()
    assert staying.result().jobs[0].node_id == "staying"


async def test_a_pull_whose_caller_left_before_its_batch_began_leases_nothing(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await submit(hub, "j")
    async with hub.store.begin():
        blocker = asyncio.create_task(submit(hub, "other", needs=("never",)))
        await settle()
        leaving = pull(hub, "leaving", wait_ms=0)
        await settle()
        leaving.cancel()
        await settle()
    await blocker
    await settle()
    assert [line.line for line in await hub.store.events() if b"leased" in line.line] == []


async def test_a_caller_that_leaves_while_its_lease_is_written_gives_it_back_at_no_cost(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await submit(hub, "j")
    for turns in range(12):
        task = pull(hub, "gone", wait_ms=0)
        await settle(turns)
        task.cancel()
        await settle()
        if not task.cancelled():
            hub.give_back(task.result())
            await settle()
        job = await hub.job("j")
        assert (job.status, job.losses, job.failures) == ("pending", 0, 0)
    assert [job.id for job in (await pull(hub, "next", wait_ms=0)).jobs] == ["j"]


async def test_a_saturated_pull_is_woken_when_a_lease_ends(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(max_inflight=1))
    await submit(hub, "a")
    await submit(hub, "b")
    first = (await pull(hub, "n1")).jobs[0]
    waiting = pull(hub, "n2")
    await settle()
    assert not waiting.done()
    await hub.execute(Finish(first.id, True, first.lease_id))
    await settle()
    assert [job.id for job in waiting.result().jobs] == ["b"]


async def test_a_delayed_job_wakes_a_waiting_pull_at_its_time(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(loops=True)
    waiting = pull(hub, "n1", wait_ms=30_000)
    await submit(hub, "j", delay_ms=7300)
    await clock.advance(7299)
    assert not waiting.done()
    await clock.advance(1)
    assert [job.id for job in waiting.result().jobs] == ["j"]


async def test_waiting_for_a_job_ends_with_the_job(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub()
    await submit(hub, "j")
    waiting = asyncio.create_task(hub.job("j", 10_000))
    leased = (await pull(hub, "n1")).jobs[0]
    await settle()
    assert not waiting.done()
    await hub.execute(Finish("j", True, leased.lease_id, result=b"5"))
    await settle()
    assert waiting.result().status == "completed"
    await submit(hub, "slow")
    waiting = asyncio.create_task(hub.job("slow", 10_000))
    await clock.advance(10_000)
    assert waiting.result().status == "pending"


async def test_when_the_hub_stops_every_waiter_is_answered_at_once(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await submit(hub, "j", needs=("never",))
    tasks = [pull(hub, f"n{n}") for n in range(20)]
    job = asyncio.create_task(hub.job("j", 30_000))
    await settle()
    hub.stop()
    await settle()
    assert all(task.done() for task in (*tasks, job))
    late = pull(hub, "late")
    await settle()
    assert late.done()


async def test_no_more_than_the_configured_number_may_wait(make_hub: MakeHub) -> None:
    hub = await make_hub(max_polls=2)
    tasks = [pull(hub, f"n{n}") for n in range(3)]
    await settle()
    assert [task.done() for task in tasks] == [False, False, True]


async def test_a_saturated_pull_does_not_spin_on_work_that_it_may_not_take(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(max_inflight=1))
    await submit(hub, "a")
    first = (await pull(hub, "n1")).jobs[0]
    waiting = pull(hub, "n2")
    await settle()
    commands: list[int] = []
    hub.observe(lambda committed: commands.append(committed.commands))
    for n in range(3):
        await submit(hub, f"b{n}")
        await settle()
    assert sum(commands) <= 3 + 3
    await hub.execute(Finish(first.id, True, first.lease_id))
    await settle()
    assert [job.id for job in waiting.result().jobs] == ["b0"]


@pytest.mark.parametrize("how", ["other kinds", "gone"])
async def test_a_free_lease_that_one_cannot_use_goes_to_the_next(make_hub: MakeHub, how: str) -> None:
    hub = await make_hub(Limits(max_inflight=1))
    await submit(hub, "a")
    await submit(hub, "b")
    held = (await pull(hub, "n1")).jobs[0]
    first = pull(hub, "n2", kinds=frozenset({"other"}) if how == "other kinds" else frozenset())
    await settle()
    second = pull(hub, "n3")
    await settle()
    if how == "gone":
        hub.observe(lambda committed: first.cancel() and None)
    await hub.execute(Finish(held.id, True, held.lease_id))
    await settle()
    assert [job.id for job in second.result().jobs] == ["b"]
    first.cancel()


async def test_a_wake_that_a_stale_node_cannot_use_goes_to_the_next(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(Limits(node_ttl_ms=1000))
    await hub.execute(Beat("n1"))
    stale = pull(hub, "n1")
    await settle()
    able = pull(hub, "n2")
    await clock.advance(2000)
    await submit(hub, "j")
    await settle()
    assert stale.result().reason == "node_stale"
    assert [job.id for job in able.result().jobs] == ["j"]


async def test_a_wait_that_runs_out_answers_with_the_job_as_it_is_then(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub()
    await submit(hub, "j")
    waiting = asyncio.create_task(hub.job("j", 5000))
    await settle()
    await pull(hub, "n1", wait_ms=0)
    await clock.advance(5000)
    assert waiting.result().status == "running"


async def test_jobs_of_one_moment_are_served_in_the_order_of_their_submission(make_hub: MakeHub) -> None:
    hub = await make_hub()
    for batch in ("zyx", "wv", "u"):
        await hub.execute_many([Submit(f"job-{kind}", kind) for kind in batch])
    order = [(await pull(hub, "n1", wait_ms=0)).jobs[0].kind for _ in range(6)]
    assert "".join(order) == "zyxwvu"


async def test_a_result_is_committed_first_and_once_and_then_its_pull_waits(make_hub: MakeHub) -> None:
    hub = await make_hub()
    commands: list[int] = []
    hub.observe(lambda committed: commands.append(committed.commands))
    await submit(hub, "j0")
    (held,) = (await pull(hub, "n1")).jobs
    finish = Finish("j0", True, held.lease_id)
    waiting = asyncio.create_task(
        hub.pull_after([finish], Pull("n1", "s", capabilities=frozenset()), 30_000, HUB, "while_fine")
    )
    await settle()
    assert (await hub.job("j0")).status == "completed"
    assert (waiting.done(), len(hub.waiting)) == (False, 1)
    await submit(hub, "j1")
    await settle()
    (finished,), pulled = waiting.result()
    assert (finished.status, [job.id for job in pulled.jobs], len(hub.waiting)) == ("completed", ["j1"], 0)
    assert commands == [1, 1, 2, 2], "a submit and a look, the result and a look, a submit that is leased at once"


async def test_a_refused_result_does_not_wait(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await submit(hub, "j")
    command = Pull("n1", "s", capabilities=frozenset())
    with pytest.raises(Refused):
        await hub.pull_after([Finish("j", True, "wrong")], command, 30_000, HUB, "while_fine")
    assert (len(hub.waiting), await hub.counts()) == (0, {"job:pending": 1})


async def test_a_lease_that_ends_while_a_pull_looks_is_not_missed(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(max_inflight=1))
    await submit(hub, "a")
    await submit(hub, "b")
    (held,) = (await pull(hub, "n1")).jobs
    waiting = pull(hub, "n2")
    ended = asyncio.create_task(hub.execute(Finish(held.id, True, held.lease_id)))
    await settle()  # both in one batch: the pull found the limit reached, then the lease ended
    await ended
    assert [job.id for job in waiting.result().jobs] == ["b"]


async def test_a_wake_that_a_node_cannot_use_any_more_is_passed_on(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await hub.execute(Beat("n1", capabilities=("gpu",)))
    first = pull(hub, "n1", capabilities=None)
    await settle()
    second = pull(hub, "n2", capabilities=frozenset({"gpu"}))
    await settle()
    await hub.execute(Beat("n1", capabilities=()))
    await submit(hub, "j", needs=("gpu",))
    await settle()
    assert (first.done(), [job.id for job in second.result().jobs]) == (False, ["j"])


@pytest.mark.parametrize("known", [False, True])
async def test_a_heartbeat_that_brings_a_capability_lets_the_waiting_pull_of_its_node_look_again(
    make_hub: MakeHub, known: bool
) -> None:
    hub = await make_hub()
    await submit(hub, "j", needs=("gpu",))
    if known:
        await hub.execute(Beat("n1", capabilities=("cpu",)))
    waiting, named = pull(hub, "n1", capabilities=None), pull(hub, "n1")
    await settle()
    looks: list[int] = []
    hub.observe(lambda committed: looks.append(committed.commands))
    await hub.execute(Beat("n1"))
    await settle(50)
    assert (waiting.done(), looks) == (False, [1])
    await hub.execute(Beat("n1", capabilities=("cpu", "gpu")))
    await settle(50)
    assert [job.id for job in waiting.result().jobs] == ["j"]
    assert not named.done()
    named.cancel()


@pytest.mark.parametrize("begun", [True, False])
async def test_of_an_answer_that_broke_while_it_was_written_work_that_may_run_once_only_stays_leased(
    make_hub: MakeHub, begun: bool
) -> None:
    hub = await make_hub()
    await submit(hub, "once", at_most_once=True)
    await submit(hub, "often")
    hub.give_back(await pull(hub, "n1", limit=2), begun=begun)
    await settle(50)
    assert [(await hub.job(id)).status for id in ("once", "often")] == ["running" if begun else "pending", "pending"]


def test_a_wake_that_met_a_pull_of_a_full_node_goes_to_one_with_room() -> None:
    waiting, offer, lane = Waiting(), Offer(frozenset(), frozenset()), lane_name(2, "k", "", ())
    with waiting.pull(offer, 10, "full") as full, waiting.pull(offer, 1, "idle") as idle:
        mark = waiting.mark(full)
        assert waiting.wake(lane)
        assert (full.woken, idle.woken) == ([lane], []), "its bid is not known before it has looked"
        assert waiting.looked(full, 0, "node_full", 0, 0, mark) == [lane]
        assert waiting.wake(lane)
        assert (full.woken, idle.woken) == ([], [lane])
        assert not waiting.wake(lane), "a full node's pull looks by itself once it has room"


def test_a_job_that_comes_while_a_pull_looks_whose_node_has_room_again_is_not_missed() -> None:
    waiting, offer, lane = Waiting(), Offer(frozenset(), frozenset()), lane_name(2, "k", "", ())
    with waiting.pull(offer, 1, "n1") as one:
        assert waiting.looked(one, 0, "node_full", 0, 0, waiting.mark(one)) == []
        assert not waiting.wake(lane)
        one.rouse()
        assert waiting.wake(lane), "its look may be over before this job was there"
        assert waiting.looked(one, 0, "no_job", 1, 0, waiting.mark(one)) == []
        assert one.event.is_set()


async def test_a_pull_of_a_full_node_looks_again_when_its_limit_is_forgotten_with_the_node(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await hub.execute(Beat("n1", max_concurrent=0))
    await submit(hub, "j")
    waiting = pull(hub, "n1")
    await settle()
    assert not waiting.done()
    await hub.execute_many([Drain("n1"), Forget("n1")])
    await settle()
    assert [job.id for job in waiting.result().jobs] == ["j"]


async def test_who_waits_is_not_given_a_job_of_a_line_whose_head_has_just_gone(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    """What comes back as the head of its line goes is later than what waits in another one."""
    hub = await make_hub(Limits(max_leases_per_node=1, loss_delay_ms=0, lease_ms=5000))
    await submit(hub, "back", kind="a")
    assert (await pull(hub, "n1", wait_ms=0)).jobs
    await submit(hub, "head", kind="a", expires_in_ms=4000)
    await clock.advance(2000)
    await submit(hub, "older", kind="b")
    waiting = pull(hub, "n1")
    await settle()
    clock._now += 4000
    await hub.sweep()
    await settle()
    assert [job.id for job in waiting.result().jobs] == ["older"]


async def test_a_pull_of_a_full_node_looks_again_when_its_lease_has_become_another_nodes_at_once(
    make_hub: MakeHub,
) -> None:
    hub = await make_hub(Limits(max_leases_per_node=1))
    await submit(hub, "j")
    [job] = (await pull(hub, "n1", wait_ms=0)).jobs
    waiting = pull(hub, "n1", kinds=frozenset({"other"}))
    await settle()
    taking = pull(hub, "n2")
    await settle()
    await hub.execute(Release("j", job.lease_id or ""))
    await settle()
    assert [one.id for one in taking.result().jobs] == ["j"]
    await submit(hub, "nobodys", kind="third")
    await hub.execute_many([Cancel("nobodys"), Submit("k", "other")])
    await settle()
    assert [one.id for one in waiting.result().jobs] == ["k"]
