"""What went wrong where two rules meet: wakes and throttling, pulls over many kinds, redrives, prunes, restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB
from sheratan_hub.rules.command import Code, Limits, Rate, Refused
from sheratan_hub.rules.finish import Cancel, Finish
from sheratan_hub.rules.limits import Taken, pay
from sheratan_hub.rules.missions import RedriveMember
from sheratan_hub.rules.policies import POINTER, ActivatePolicy, CreatePolicy
from sheratan_hub.rules.policy import Policy
from sheratan_hub.rules.pull import Pull, Pulled
from sheratan_hub.rules.redrive import Redrive
from sheratan_hub.rules.submit import Submit
from sheratan_hub.storage import Key, Row, StoreDown, open_store
from sheratan_hub.upkeep import sweep

MakeHub = Callable[..., Awaitable[Hub]]


def pull(
    hub: Hub, node: str, limit: int = 1, wait_ms: int = 0, kinds: frozenset[str] = frozenset()
) -> asyncio.Task[Pulled]:
    command = Pull(node, hub.clock.secret(), limit, capabilities=frozenset(), kinds=kinds)
    return asyncio.create_task(hub.pull(command, wait_ms))


async def test_a_lease_that_ends_wakes_one_who_can_use_it_past_one_who_is_throttled(make_hub: MakeHub) -> None:
    a, b = frozenset({"a"}), frozenset({"b"})
    hub = await make_hub(Limits(max_inflight=2, rates={"s": Rate(0, 1)}))
    await hub.execute(Submit("s1", "a", source="s"))
    await hub.execute(Submit("x1", "x"))
    await pull(hub, "n1", kinds=a)
    (held,) = (await pull(hub, "n2", kinds=frozenset({"x"}))).jobs
    await hub.execute(Submit("s2", "a", source="s"))
    await hub.execute(Submit("b1", "b"))
    throttled = pull(hub, "na", wait_ms=30_000, kinds=a)
    await settle()
    able = pull(hub, "nb", wait_ms=30_000, kinds=b)
    await settle()
    await hub.execute(Finish(held.id, True, held.lease_id))
    await settle()
    assert [job.id for job in (await able).jobs] == ["b1"]
    throttled.cancel()


async def test_pulls_over_hundreds_of_kinds_share_their_looks(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(max_depth=10_000, max_inflight=10_000))
    await hub.execute_many([Submit(f"j{n:04d}", f"kind{n}") for n in range(500)])
    got = await asyncio.gather(*(pull(hub, f"n{n}", 100) for n in range(4)))
    assert [len(one.jobs) for one in got] == [100] * 4
    assert len({job.id for one in got for job in one.jobs}) == 400


async def test_pulls_over_hundreds_of_limited_sources_share_their_looks(make_hub: MakeHub) -> None:
    sources = {f"s{n}": Rate(0, 5) for n in range(400)}
    hub = await make_hub(Limits(max_depth=10_000, max_inflight=10_000, rates=sources))
    await hub.execute_many([Submit(f"j{n:04d}", "k", source=f"s{n}") for n in range(400)])
    got = await asyncio.gather(*(pull(hub, f"n{n}", 100) for n in range(4)))
    assert [len(one.jobs) for one in got] == [100] * 4


async def test_a_redrive_spread_over_time_stays_so_over_a_restart(make_hub: MakeHub, clock: VirtualClock) -> None:
    store = open_store("memory://", clock)
    await store.open()
    hub = await make_hub(Limits(backoff_base_ms=1000), store)
    await hub.execute(Submit("j", "k", max_retries=1))
    for _ in range(2):
        await clock.advance(5000)
        await sweep(hub)
        (job,) = (await pull(hub, "n")).jobs
        await hub.execute(Finish("j", False, job.lease_id))
    await hub.execute(Redrive("j", 3_600_000, "operator"))
    planned = (await hub.job("j")).not_before
    again = await make_hub(Limits(), store)
    await sweep(again)
    assert (await again.job("j")).not_before == planned


async def test_a_parent_outlives_a_child_that_may_be_redriven(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(Limits(cancelled_kept_ms=10_000, key_ttl_ms=20_000))
    await hub.execute(Submit("p", "k"))
    await hub.execute(Submit("c", "k", depends_on=("p",), key="x", payload_sha256="s"))
    await hub.execute(Cancel("p"))
    for _ in range(3):
        await sweep(hub)
    await clock.advance(11_000)
    for _ in range(4):
        await hub.keeping.prune()
    await hub.execute(Redrive("c"))
    await hub.execute(Redrive("p"))
    for _ in range(3):
        await sweep(hub)
    for _ in range(2):
        (job,) = (await pull(hub, "n")).jobs
        await hub.execute(Finish(job.id, True, job.lease_id))
        await sweep(hub)
    assert (await hub.job("c")).status == "completed"


async def test_a_policy_is_obeyed_although_it_could_not_be_read_when_it_was_activated(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = await make_hub(Limits())
    await hub.execute(CreatePolicy(Policy("deny")))
    fetch, failures = hub.store.fetch, [1]

    async def failing(keys: Sequence[Key]) -> list[Row]:
        if POINTER in keys and failures:
            failures.pop()
            raise StoreDown("gone for a moment")
        return await fetch(keys)

    monkeypatch.setattr(hub.store, "fetch", failing)
    await hub.execute(ActivatePolicy(1, 0))
    assert not failures
    with pytest.raises(Refused) as no:
        await hub.execute(Submit("j", "k"))
    assert no.value.code is Code.POLICY_DENIED


def test_a_clock_set_back_closes_a_limited_source_for_a_minute_at_most() -> None:
    now = 10_000_000
    taken, quota = pay(Taken((now + 3_600_000) * 1000), Rate(10, 5), now)
    assert taken is not None or quota.next_in_ms <= 60_000


async def test_whatever_is_redriven_stands_behind_what_was_submitted_in_the_same_moment(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await hub.execute_many([Submit(id, "k", mission_id="m") for id in ("parent", "member")])
    await hub.execute(Submit("child", "k", depends_on=("parent",)))
    await hub.execute_many([Cancel("parent"), Cancel("member")])
    await hub.sweep()
    await hub.execute(Submit("before", "k"))
    await hub.execute_many([RedriveMember("member"), Redrive("parent", dependents=True)])
    await hub.sweep()
    orders = [(await hub.job(id)).order for id in ("before", "member", "parent", "child")]
    assert orders == sorted(set(orders))


async def test_results_of_one_request_keep_their_order_also_while_others_wait_for_a_lease(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(max_inflight=1, backoff_base_ms=0))
    await hub.execute(Submit("j", "a", max_retries=5))
    (tried,) = (await pull(hub, "n")).jobs
    await hub.execute(Finish("j", False, tried.lease_id, retry_after_ms=0))
    (job,) = (await pull(hub, "n")).jobs
    thirsty = pull(hub, "other", wait_ms=30_000)
    await settle()
    assert hub.waiting.thirsty == 1
    said = [Finish("j", False, job.lease_id, error=b'"first"', retry=False), Finish("j", True, job.lease_id)]
    outcomes, _ = await hub.pull_after(said, Pull("n", "s", capabilities=frozenset()), 0, HUB)
    assert isinstance(outcomes[1], Refused)
    assert (await hub.job("j")).status == "failed"
    thirsty.cancel()
