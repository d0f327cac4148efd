"""Through the engine: a refusal that writes, and delays after the machine's clock was set back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB, Committed
from sheratan_hub.rules.command import Code, Command, Limits, Refused, Together
from sheratan_hub.rules.evidence import evidence_of
from sheratan_hub.rules.finish import Finish
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.submit import Submit
from sheratan_hub.storage import Key, Store, open_store

MakeHub = Callable[..., Awaitable[Hub]]
LIMITS = Limits(lease_ms=1000, loss_delay_ms=0, restart_grace_ms=0, backoff_base_ms=1000)


async def lease(hub: Hub, node: str, limit: int = 1) -> list[Any]:
    return list((await hub.execute(Pull(node, hub.clock.secret(), limit, capabilities=frozenset()))).jobs)


async def superseded(hub: Hub, clock: VirtualClock, *jobs: str) -> list[Finish]:
    """Results of leases that were lost, for jobs that another node has now."""
    await hub.execute_many([Submit(job, "k") for job in jobs])
    first = await lease(hub, "a", len(jobs))
    await clock.advance(1000)
    await hub.sweep()
    assert len(await lease(hub, "b", len(jobs))) == len(jobs)
    return [Finish(job.id, True, job.lease_id) for job in first]


async def late_results(hub: Hub, *jobs: str) -> list[int]:
    return [(await hub.job(job)).late_results for job in jobs]


async def test_a_late_result_is_refused_and_what_it_leaves_is_committed(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(LIMITS)
    seen: list[Committed] = []
    (late,) = await superseded(hub, clock, "j")
    hub.observe(seen.append)
    with pytest.raises(Refused) as no:
        await hub.execute(late)
    assert no.value.code is Code.LEASE_SUPERSEDED
    assert await late_results(hub, "j") == [1]
    (row,) = await hub.fetch([Key("late", "j")])
    assert len(evidence_of(row).late) == 1
    assert [event.event for happened in seen[0].happened for event in happened.events] == ["job.superseded"]
    assert b"job.superseded" in (await hub.store.events())[-1].line


async def test_among_others_it_is_one_refusal_and_costs_its_neighbours_nothing(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    hub = await make_hub(LIMITS)
    one, two = await superseded(hub, clock, "j1", "j2")
    made, no, again, other = await hub.execute_many([Submit("new", "k"), one, one, two])
    assert made.job.id == "new"
    assert [refused.code for refused in (no, again, other)] == [Code.LEASE_SUPERSEDED] * 3
    assert await late_results(hub, "j1", "j2") == [1, 1]


@pytest.mark.parametrize("order", ["in_turn", "while_fine"])
async def test_before_a_pull_it_counts_as_refused(make_hub: MakeHub, clock: VirtualClock, order: Any) -> None:
    hub = await make_hub(LIMITS)
    (late,) = await superseded(hub, clock, "j")
    await hub.execute(Submit("next", "k"))
    pull = Pull("n", "s", 1, capabilities=frozenset())
    if order == "while_fine":
        with pytest.raises(Refused):
            await hub.pull_after([late], pull, 0, HUB, order)
    else:
        (no,), pulled = await hub.pull_after([late], pull, 0, HUB, order)
        assert (no.code, pulled.jobs[0].id) == (Code.LEASE_SUPERSEDED, "next")
    await settle()
    assert (await hub.job("next")).status == ("pending" if order == "while_fine" else "running")
    assert await late_results(hub, "j") == [1]


async def test_all_or_none_is_none(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(LIMITS)
    (late,) = await superseded(hub, clock, "j")
    with pytest.raises(Refused):
        await hub.execute(Together((Submit("new", "k"), late)))
    with pytest.raises(Refused):
        await hub.job("new")
    assert await late_results(hub, "j") == [0]


async def restarted(store: Store, clock: VirtualClock, make_hub: MakeHub, ms: int, *commands: Command) -> Hub:
    """A hub on a machine whose clock was set back by `ms` while it was down."""
    await store.open()
    before = await make_hub(LIMITS, store)
    for command in commands:
        await before.execute(command)
    for job in await lease(before, "n", 9):
        await before.execute(Finish(job.id, False, job.lease_id))
    clock._now -= ms
    return await make_hub(LIMITS, store)


async def test_delays_are_clamped_when_the_clock_was_set_back_over_a_restart(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    """Not those that a producer gave as a moment."""
    store, moment = open_store("memory://", clock), clock.now() + 10_000
    jobs = (Submit("retried", "k"), Submit("delayed", "k", delay_ms=1000), Submit("planned", "k", not_before=moment))
    hub = await restarted(store, clock, make_hub, 3_600_000, *jobs)
    await hub.sweep()
    await clock.advance(1000)
    await hub.sweep()
    assert sorted(job.id for job in await lease(hub, "n", 9)) == ["delayed", "retried"]
    assert (await hub.job("planned")).not_before == moment


async def test_delays_are_looked_through_once_after_a_start_page_by_page(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    hub = await make_hub(Limits(max_depth=9999))
    await hub.execute_many([Submit(f"j{n:04}", "k") for n in range(1500)])
    pages: list[Any] = []
    inner = hub.page

    async def page(*given: Any, **named: Any) -> Any:
        pages.append(given[2])
        return await inner(*given, **named)

    hub.page = page  # type: ignore[method-assign]
    for _ in range(5):
        await hub.sweep()
    assert pages == [None, "j0999"]


async def test_hundreds_of_leases_that_are_lost_again_are_swept_in_one_transaction(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    hub = await make_hub(msgspec.structs.replace(LIMITS, max_inflight=999))
    await hub.execute_many([Submit(f"j{n:03}", "k") for n in range(300)])
    seen: list[int] = []
    for _ in range(2):
        assert len(await lease(hub, "a", 300)) == 300
        await clock.advance(1000)
        hub.observe(lambda committed: seen.append(len(committed.changes.put)))
        await hub.sweep()
    assert max(seen) == 600, "each job and its record"
    assert (await hub.job("j299")).tried == 2
