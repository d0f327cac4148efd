"""Limits, turns and pauses in the engine: who waits, who is woken, what survives a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB
from sheratan_hub.rules.command import Limits, Rate
from sheratan_hub.rules.finish import Finish
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.limits import DropRate, SetRate
from sheratan_hub.rules.nodes import Beat
from sheratan_hub.rules.pauses import PauseKind, ResumeKind
from sheratan_hub.rules.pull import Pull, Pulled
from sheratan_hub.rules.submit import Submit
from sheratan_hub.storage import open_store

MakeHub = Callable[..., Awaitable[Hub]]
ANYTHING = frozenset[str]()


def pull(hub: Hub, node: str, limit: int = 1, wait_ms: int = 30_000, **fields: Any) -> asyncio.Task[Pulled]:
    fields = {"capabilities": ANYTHING, **fields}
    return asyncio.create_task(hub.pull(Pull(node, hub.clock.secret(), limit, **fields), wait_ms))


async def submit(hub: Hub, *jobs: str, **fields: Any) -> None:
    await hub.execute_many([Submit(job, fields.pop("kind", "k"), **fields) for job in jobs])


async def leased(hub: Hub, node: str = "n", limit: int = 1) -> list[Job]:
    return list((await pull(hub, node, limit, 0)).jobs)


async def finish(hub: Hub, job: Job) -> None:
    await hub.execute(Finish(job.id, True, job.lease_id))
    await settle()


def ids(waiting: asyncio.Task[Pulled]) -> list[str]:
    return [job.id for job in waiting.result().jobs]


# Turns


async def test_a_source_is_served_in_its_order_whatever_the_kinds(make_hub: MakeHub) -> None:
    hub = await make_hub()
    for job, kind in (("1", "a"), ("2", "b"), ("3", "a")):
        await submit(hub, job, kind=kind)
    assert [(await leased(hub))[0].id for _ in range(3)] == ["1", "2", "3"]


async def test_a_source_is_served_in_its_order_where_a_kind_was_used_up_before(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await submit(hub, "0", kind="a")
    await leased(hub)
    for job, kind in (("1", "b"), ("2", "a")):
        await submit(hub, job, kind=kind)
    assert [(await leased(hub))[0].id for _ in range(2)] == ["1", "2"]


async def test_a_single_job_waits_for_one_pull_behind_a_hundred_thousand_of_another_source(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(max_depth=1_000_000, max_inflight=1_000_000))
    for part in range(100):
        await hub.execute_many([Submit(f"big{part}-{n}", "k", source="big") for n in range(1000)])
    await leased(hub)
    await submit(hub, "single", source="small", kind="other")
    pulls = [(await leased(hub))[0].id for _ in range(3)]
    assert pulls.index("single") <= 1


async def test_pulls_of_one_batch_take_turns_too(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(max_inflight=1000))
    for source in "abc":
        await submit(hub, *(f"{source}{n}" for n in range(50)), source=source)
    tasks = [pull(hub, f"n{n}", wait_ms=0) for n in range(60)]
    await settle()
    sources = [task.result().jobs[0].source for task in tasks]
    assert [sources.count(source) for source in "abc"] == [20, 20, 20]


async def test_ten_thousand_sources_with_a_job_each_are_served_in_order(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(max_depth=20_000, max_inflight=20_000))
    for part in range(10):
        await hub.execute_many([Submit(f"j{part}{n:03}", "k", source=f"s{part}{n}") for n in range(1000)])
    tasks = [pull(hub, f"n{n}", 10, 0) for n in range(400)]
    await settle()
    got = [job.id for task in tasks for job in task.result().jobs]
    assert sorted(got) == [f"j{part}{n:03}" for part in range(4) for n in range(1000)]


# Throttled sources


async def test_a_throttled_source_comes_back_when_one_of_its_leases_ends(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(rates={"s": Rate(0, 1)}))
    await submit(hub, "j0", "j1", source="s")
    (held,) = await leased(hub)
    assert set(hub.throttled) == {"s"}
    waiting = pull(hub, "n1")
    await settle()
    assert not waiting.done()
    await finish(hub, held)
    assert ids(waiting) == ["j1"]
    assert set(hub.throttled) == {"s"}


async def test_jobs_of_a_throttled_source_wake_nobody_and_keep_nobody_from_work(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(rates={"s": Rate(0, 1)}))
    await submit(hub, "j0", source="s")
    await leased(hub)
    waiting = pull(hub, "n1")
    await settle()
    await submit(hub, *(f"j{n}" for n in range(1, 9)), source="s")
    await settle()
    assert not waiting.done()
    await submit(hub, "other", priority=3)
    await settle()
    assert ids(waiting) == ["other"]


async def test_a_lease_that_ends_while_others_of_its_source_look_is_not_missed(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(rates={"s": Rate(0, 1)}))
    await submit(hub, "j0", "j1", source="s")
    (held,) = await leased(hub)
    waiting = pull(hub, "n1")
    ended = asyncio.create_task(hub.execute(Finish(held.id, True, held.lease_id)))
    await settle()  # in one batch: the pull found the source throttled, then the lease ended
    await ended
    assert ids(waiting) == ["j1"]


async def test_a_result_makes_room_for_its_own_pull_under_the_limit_of_its_source(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(rates={"s": Rate(0, 1)}))
    await submit(hub, "j0", "j1", source="s")
    (held,) = await leased(hub)
    done = Finish(held.id, True, held.lease_id)
    _, pulled = await hub.pull_after([done], Pull("n", "x", capabilities=ANYTHING), 0, HUB, "while_fine")
    assert [job.id for job in pulled.jobs] == ["j1"]
    assert set(hub.throttled) == {"s"}


@pytest.mark.parametrize("change", [SetRate("s", Rate(0, 5)), DropRate("s")])
async def test_a_limit_that_is_raised_or_dropped_wakes_who_waits(make_hub: MakeHub, change: Any) -> None:
    hub = await make_hub()
    await hub.execute(SetRate("s", Rate(0, 1)))
    await submit(hub, "j0", "j1", "j2", source="s")
    await leased(hub)
    tasks = [pull(hub, "n1"), pull(hub, "n2")]
    await settle()
    await hub.execute(change)
    await settle()
    assert sorted(ids(tasks[0]) + ids(tasks[1])) == ["j1", "j2"]


async def test_a_limit_that_is_lowered_leaves_running_jobs_alone_and_leases_no_more(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await submit(hub, *(f"j{n}" for n in range(4)), source="s")
    first, second = await leased(hub, limit=2)
    await hub.execute(SetRate("s", Rate(0, 1)))
    assert set(hub.throttled) == {"s"}
    await finish(hub, first)
    assert await leased(hub) == []
    await finish(hub, second)
    assert len(await leased(hub)) == 1


@pytest.mark.parametrize("scheme", ["sqlite", "file"])
async def test_limits_leases_and_pauses_survive_a_restart(
    make_hub: MakeHub, clock: VirtualClock, tmp_path: Path, scheme: str
) -> None:
    place = tmp_path / "state"
    store = open_store(f"{scheme}://{place}", clock)
    await store.open()
    hub = await make_hub(store=store)
    await hub.execute_many([SetRate("s", Rate(0, 1)), PauseKind("p", for_ms=10_000)])
    await submit(hub, "j0", "j1", source="s")
    await submit(hub, "paused", kind="p")
    (held,) = await leased(hub)
    await store.close()
    again = open_store(f"{scheme}://{place}", clock)
    await again.open()
    hub = await make_hub(store=again, loops=True)
    assert (set(hub.throttled), [pause.kind for pause in hub.pauses()]) == ({"s"}, ["p"])
    assert await leased(hub, limit=9) == []
    await finish(hub, held)
    assert [job.id for job in await leased(hub)] == ["j1"]
    await clock.advance(10_000)
    assert [job.id for job in await leased(hub)] == ["paused"]


# Pauses


async def test_a_poll_whose_kinds_are_paused_waits_and_gets_the_job_at_the_resume(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await hub.execute(PauseKind(None))
    tasks = [pull(hub, f"n{n}") for n in range(3)]
    await settle()
    await submit(hub, "j0", "j1", "j2", "j3")
    await settle()
    assert not any(task.done() for task in tasks)
    assert await hub.counts() == {"job:pending": 4}
    await hub.execute(ResumeKind(None))
    await settle()
    assert sorted(job for task in tasks for job in ids(task)) == ["j0", "j1", "j2"]


async def test_a_poll_does_not_spin_while_what_it_could_take_is_paused(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await hub.execute(PauseKind("k"))
    tasks = [pull(hub, f"n{n}") for n in range(3)]
    await settle()
    commands: list[int] = []
    hub.observe(lambda committed: commands.append(committed.commands))
    for n in range(5):
        await submit(hub, f"j{n}")
        await settle()
    assert (sum(commands), any(task.done() for task in tasks)) == (5, False)


async def test_a_pause_ends_on_time_by_the_sweep(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(loops=True)
    await hub.execute(PauseKind("k", for_ms=7300))
    waiting = pull(hub, "n")
    await submit(hub, "j")
    await clock.advance(7299)
    assert not waiting.done()
    await clock.advance(1)
    assert ids(waiting) == ["j"]
    assert hub.pauses() == ()


# Bids, and room


async def test_a_job_goes_to_the_waiting_node_with_the_most_free_capacity(make_hub: MakeHub) -> None:
    hub = await make_hub()
    for node, most in (("small", 1), ("large", 9), ("middle", 4)):
        await hub.execute(Beat(node, max_concurrent=most))
    tasks = {}
    for node in ("small", "large", "middle"):
        tasks[node] = pull(hub, node)
        await settle()
    for node, job in (("large", "j0"), ("middle", "j1"), ("small", "j2")):
        assert not tasks[node].done()
        await submit(hub, job)
        await settle()
        assert ids(tasks[node]) == [job]


async def test_live_leases_lower_a_bid_and_equal_bids_go_first_come_first_served(make_hub: MakeHub) -> None:
    hub = await make_hub()
    for node in ("a", "b", "c"):
        await hub.execute(Beat(node, max_concurrent=2))
    await submit(hub, "held")
    await leased(hub, "a")
    tasks = {}
    for node in ("a", "b", "c"):
        tasks[node] = pull(hub, node)
        await settle()
    order = []
    for n in range(3):
        await submit(hub, f"j{n}")
        await settle()
        order += [node for node, task in tasks.items() if task.done() and node not in order]
    assert order == ["b", "c", "a"]


async def test_jobs_of_one_batch_are_dealt_one_by_one(make_hub: MakeHub) -> None:
    hub = await make_hub()
    for node in ("a", "b"):
        await hub.execute(Beat(node, max_concurrent=4))
    tasks = [pull(hub, "a", 4), pull(hub, "b", 4)]
    await settle()
    await submit(hub, *(f"j{n}" for n in range(4)))
    await settle()
    assert [len(ids(task)) for task in tasks] == [2, 2]


async def test_a_full_node_waits_and_gets_the_next_job_when_one_of_its_own_ends(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await hub.execute(Beat("n", max_concurrent=1))
    await submit(hub, "j0", "j1", "j2")
    (held,) = await leased(hub, "n")
    (other,) = await leased(hub, "other")
    waiting = pull(hub, "n")
    await settle()
    await finish(hub, other)
    assert not waiting.done()
    await finish(hub, held)
    assert ids(waiting) == ["j2"]


async def test_a_heartbeat_that_names_more_room_wakes_a_full_node(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await hub.execute(Beat("n", max_concurrent=0))
    await submit(hub, "j")
    waiting = pull(hub, "n")
    await settle()
    assert not waiting.done()
    await hub.execute(Beat("n", max_concurrent=1))
    await settle()
    assert ids(waiting) == ["j"]


async def test_a_result_with_a_pull_leaves_its_room_to_those_who_wait_for_it(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(max_inflight=1))
    await submit(hub, *(f"j{n}" for n in range(4)))
    (held,) = await leased(hub, "greedy")
    waiting = pull(hub, "patient")
    await settle()
    done = Finish(held.id, True, held.lease_id)
    greedy = asyncio.create_task(
        hub.pull_after([done], Pull("greedy", "x", capabilities=ANYTHING), 30_000, HUB, "while_fine")
    )
    await settle()
    assert ids(waiting) == ["j1"]
    await finish(hub, waiting.result().jobs[0])
    (finished,), pulled = await greedy
    assert (finished.status, [job.id for job in pulled.jobs]) == ("completed", ["j2"])


async def test_leases_are_counted_by_node_and_by_source(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await submit(hub, "a0", "a1", source="a")
    first, _ = await leased(hub, "n1", 2)
    await submit(hub, "of nobody")
    await leased(hub, "n2")
    assert {**await hub.counts("leases:"), **await hub.counts("running:")} == {
        "leases:n1": 2,
        "leases:n2": 1,
        "running:a": 2,
    }
    await finish(hub, first)
    assert (await hub.counts("leases:n1"), await hub.counts("running:")) == ({"leases:n1": 1}, {"running:a": 1})
    assert await hub.counts() == {"job:running": 2, "job:completed": 1}
