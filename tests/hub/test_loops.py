"""The sweeper on a virtual clock, across restarts of the hub; and loops that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.hub import Hub
from sheratan_hub.loops import Loop
from sheratan_hub.rules.command import Limits
from sheratan_hub.rules.nodes import Beat
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.submit import Submit
from sheratan_hub.storage import open_store

MakeHub = Callable[..., Awaitable[Hub]]
ANY: frozenset[str] = frozenset()


async def running(hub: Hub, job_id: str, node: str = "n1") -> None:
    await hub.execute(Submit(job_id, "k"))
    assert (await hub.pull(Pull(node, hub.clock.secret(), capabilities=ANY), 0)).jobs


async def test_a_lease_is_reaped_at_its_end_not_before(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(Limits(lease_ms=5432, restart_grace_ms=0, loss_delay_ms=700), loops=True)
    await clock.advance(100)
    await running(hub, "j")
    await clock.advance(5431)
    assert (await hub.job("j")).status == "running"
    await clock.advance(1)
    assert (await hub.job("j")).losses == 1
    await clock.advance(700)
    assert (await hub.pull(Pull("n2", "s", capabilities=ANY), 0)).jobs[0].attempt == 2


async def test_leases_outlive_a_restart_and_get_the_grace(make_hub: MakeHub, clock: VirtualClock) -> None:
    store = open_store("memory://", clock)
    await store.open()
    limits = Limits(lease_ms=60_000, restart_grace_ms=15_000)
    first = await make_hub(limits, store)
    await running(first, "j")
    await clock.advance(3_600_000)
    second = await make_hub(limits, store, loops=True)
    await clock.advance(14_999)
    assert (await second.job("j")).status == "running"
    await clock.advance(2)
    assert (await second.job("j")).losses == 1


async def test_a_wall_clock_that_went_back_over_a_restart_prolongs_no_lease(make_hub: MakeHub) -> None:
    ahead, behind = VirtualClock(2_000_000_000_000), VirtualClock(1_000_000_000_000)
    store = open_store("memory://", ahead)
    await store.open()
    await running(await make_hub(Limits(lease_ms=60_000), store), "j")
    store._clock = behind  # type: ignore[attr-defined]
    hub = Hub(store, behind, Limits(lease_ms=60_000))
    await hub.start()
    assert hub.committer.waiting == 1
    hub.committer.close()
    await hub.committer.run()
    assert (await hub.job("j")).lease_until == behind.now() + 60_000


async def test_a_dead_nodes_leases_return_before_their_own_end(make_hub: MakeHub, clock: VirtualClock) -> None:
    limits = Limits(lease_ms=10**8, node_ttl_ms=1000, node_dead_ms=5000, restart_grace_ms=0)
    hub = await make_hub(limits, loops=True)
    await hub.execute(Beat("n1"))
    for n in range(150):
        await running(hub, f"j{n}") if n < 90 else await hub.execute(Submit(f"j{n}", "k"))
    await clock.advance(8000)
    counts = await hub.counts("job:")
    assert counts == {"job:pending": 150}
    assert (await hub.job("j0")).losses == 1


async def test_a_failed_step_is_counted_and_tried_again(clock: VirtualClock, caplog: pytest.LogCaptureFixture) -> None:
    runs: list[int] = []

    async def step() -> int | None:
        runs.append(clock.now())
        if len(runs) == 1:
            raise ValueError("first")
        return None

    loop = Loop("test", step, clock, at_least_ms=1000)
    task = asyncio.create_task(loop.run())
    await clock.advance(2500)
    assert (len(runs), loop.errors) == (3, 1)
    loop.nudge(clock.now() + 100)
    await clock.advance(100)
    assert len(runs) == 4
    task.cancel()


async def test_a_restarted_hub_knows_its_lanes(make_hub: MakeHub, clock: VirtualClock) -> None:
    store = open_store("memory://", clock)
    await store.open()
    first = await make_hub(None, store)
    for level in (3, 1, 2):
        await first.execute(Submit(f"j{level}", "k", priority=level))
    second = await make_hub(None, store)
    jobs = (await second.pull(Pull("n", "s", 9, capabilities=ANY), 0)).jobs
    assert [job.id for job in jobs] == ["j1", "j2", "j3"]


async def test_a_node_heard_of_by_a_clock_that_was_ahead_does_not_stay_online_for_ever() -> None:
    ahead, behind = VirtualClock(2_000_000_000_000), VirtualClock(1_000_000_000_000)
    store = open_store("memory://", ahead)
    await store.open()
    for clock in (ahead, behind):
        store._clock = clock  # type: ignore[attr-defined]
        hub = Hub(store, clock, Limits(node_ttl_ms=1000, node_dead_ms=5000, restart_grace_ms=0))
        await hub.start()
        committing = asyncio.create_task(hub.committer.run())
        if clock is ahead:
            await hub.execute(Beat("n1"))
        else:
            await clock.advance(7000)
            await hub.sweep()
            await hub.sweep()
            assert await hub.counts("node:") == {"node:DEAD": 1}
        hub.committer.close()
        await committing


async def test_a_loop_tells_when_it_runs_far_too_late_and_only_then(clock: VirtualClock) -> None:
    told: list[int] = []

    async def step() -> None:
        return None

    loop = Loop("test", step, clock, late=told.append)
    task = asyncio.create_task(loop.run())
    await clock.advance(600_000)
    assert told == []
    clock._now += 7000
    await clock.advance(1)
    assert told == [6000]
    task.cancel()


async def test_a_nudge_that_comes_while_the_step_runs_is_not_lost(clock: VirtualClock) -> None:
    runs: list[int] = []
    began = clock.now()

    async def step() -> int | None:
        runs.append(clock.now() - began)
        if len(runs) == 1:
            loop.nudge(began + 5000)
        return began + 600_000

    loop = Loop("test", step, clock, rests=True)
    task = asyncio.create_task(loop.run())
    await clock.advance(6000)
    assert runs == [0, 5000]
    task.cancel()
