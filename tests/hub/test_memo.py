"""What the committer knows without asking is what the store would say."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB
from sheratan_hub.rules.command import Limits, Refused
from sheratan_hub.rules.finish import Cancel, Finish
from sheratan_hub.rules.nodes import Beat, Forget
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.submit import Submit
from sheratan_hub.storage import Conflict, Key, Loaded, Row, StoreDown, Wants
from tests.hub.moody import Moody, MoodyTx

MakeHub = Callable[..., Awaitable[Hub]]


class Asked(Moody):
    """A store that notes what it was asked for."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock)
        self.wants: list[Wants] = []


@pytest.fixture
async def store(clock: VirtualClock, monkeypatch: pytest.MonkeyPatch) -> Asked:
    store = Asked(clock)
    await store.open()
    load = MoodyTx.load

    async def noted(tx: MoodyTx, wants: Wants) -> Loaded:
        store.wants.append(wants)
        return await load(tx, wants)

    monkeypatch.setattr(MoodyTx, "load", noted)
    return store


async def test_a_plain_submit_asks_the_store_for_nothing_once_the_depth_is_known(
    make_hub: MakeHub, store: Asked
) -> None:
    hub = await make_hub(Limits(max_depth=3), store=store)
    await hub.execute(Submit("j0", "k"))
    asked = len(store.wants)
    assert asked == 1
    await hub.execute(Submit("j1", "k"))
    await hub.execute(Submit("j2", "k"))
    with pytest.raises(Refused, match="holds 3 waiting jobs"):
        await hub.execute(Submit("j3", "k"))
    assert len(store.wants) == asked


async def test_a_pull_sees_what_a_heartbeat_has_changed(make_hub: MakeHub, store: Asked, clock: VirtualClock) -> None:
    hub = await make_hub(Limits(node_ttl_ms=1000, restart_grace_ms=0), store=store)
    ask = Pull("n", "s")
    assert (await hub.pull(ask, 0)).reason == "no_job"  # never heard of: that too is remembered
    await hub.execute(Beat("n", capabilities=("gpu",)))
    await hub.execute(Submit("j", "k", needs=("gpu",)))
    assert [job.id for job in (await hub.pull(ask, 0)).jobs] == ["j"]
    await clock.advance(1001)
    assert (await hub.pull(ask, 0)).reason == "node_stale"
    await hub.execute(Beat("n", capabilities=()))
    await hub.execute(Submit("j2", "k", needs=("gpu",)))
    assert (await hub.pull(ask, 0)).reason == "no_job"


async def test_a_waiting_pull_asks_the_store_once_for_its_node_and_offers_what_that_says_by_now(
    make_hub: MakeHub, store: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[Key] = []
    fetch = Asked.fetch

    async def noted(self: Asked, keys: Sequence[Key]) -> list[Row]:
        fetched.extend(key for key in keys if key.kind == "node")
        return await fetch(self, keys)

    monkeypatch.setattr(Asked, "fetch", noted)
    hub = await make_hub(store=store)
    for n in range(3):
        await hub.execute(Submit(f"j{n}", "k"))
        assert [job.id for job in (await hub.pull(Pull("n", f"s{n}"), 1000)).jobs] == [f"j{n}"]
    assert fetched == [Key("node", "n")]
    await hub.execute(Beat("n", capabilities=("gpu",)))
    waiting = asyncio.create_task(hub.pull(Pull("n", "s3"), 1000))
    await settle()
    await hub.execute(Submit("j3", "k", needs=("gpu",)))
    assert [job.id for job in (await waiting).jobs] == ["j3"]
    assert fetched == [Key("node", "n")]


async def test_a_result_and_the_next_job_of_a_node_that_is_known_take_one_look_into_the_store(
    make_hub: MakeHub, store: Asked
) -> None:
    hub = await make_hub(store=store)
    await hub.execute(Beat("n", capabilities=("gpu",)))
    await hub.execute_many([Submit(f"j{n}", "k", needs=("gpu",)) for n in range(3)])
    (first,) = (await hub.pull(Pull("n", "s0"), 0)).jobs
    asked = len(store.wants)
    _, pulled = await hub.pull_after([Finish(first.id, True, first.lease_id)], Pull("n", "s1"), 0, HUB)
    assert ([job.id for job in pulled.jobs], len(store.wants) - asked) == (["j1"], 1)
    changed = hub.execute(Beat("n", capabilities=()))
    asleep = hub.pull_after([Finish("j1", True, pulled.jobs[0].lease_id)], Pull("n", "s2"), 0, HUB)
    _, (_, pulled) = await asyncio.gather(changed, asleep)
    assert pulled.reason == "no_job", "what is guessed does not decide"


@pytest.mark.parametrize("capabilities", [None, frozenset[str]()])
async def test_a_job_for_a_pull_that_waits_is_made_and_leased_without_a_look_into_the_store(
    make_hub: MakeHub, store: Asked, capabilities: frozenset[str] | None
) -> None:
    hub = await make_hub(store=store)
    for n in range(2):
        waiting = asyncio.create_task(hub.pull(Pull("n", f"s{n}", capabilities=capabilities), 1000))
        await settle()
        asked = len(store.wants)
        await hub.execute(Submit(f"j{n}", "k"))
        (job,) = (await waiting).jobs
        looks = len(store.wants) - asked
        await hub.execute(Finish(job.id, True, job.lease_id))
    assert looks == 0


@pytest.mark.parametrize("error", [StoreDown("broken"), Conflict("raced")])
async def test_after_a_failed_batch_the_store_is_asked_again(make_hub: MakeHub, store: Asked, error: Exception) -> None:
    hub = await make_hub(store=store)
    await hub.execute(Submit("j0", "k"))
    store.errors = [error]
    asked = len(store.wants)
    await asyncio.gather(hub.execute(Submit("j1", "k")), return_exceptions=True)
    await hub.execute(Submit("j2", "k"))
    assert len(store.wants) > asked
    assert (await hub.counts())["job:pending"] == hub.committer.memo._counts["job:pending"]


async def test_nothing_is_remembered_of_a_store_that_others_write(
    make_hub: MakeHub, store: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Asked, "shared", True)
    hub = await make_hub(store=store)
    for n in range(3):
        await hub.execute(Submit(f"j{n}", "k"))
    assert len(store.wants) == 3


@pytest.mark.parametrize("seed", range(20))
async def test_what_is_remembered_is_what_is_stored(
    make_hub: MakeHub, store: Asked, clock: VirtualClock, seed: int
) -> None:
    chance = random.Random(seed)
    hub = await make_hub(Limits(max_inflight=4, max_depth=8, node_ttl_ms=2000, restart_grace_ms=0), store=store)
    held = Finish("none", True, "none")
    for n in range(60):
        store.errors = [StoreDown("now and then")] if chance.random() < 0.1 else []
        node = f"n{chance.randrange(3)}"
        steps: list[Awaitable[Any]] = [
            hub.execute(Submit(f"j{n}", "k")),
            hub.execute(Submit(f"j{n}", "k", key=f"key{n % 5}", payload_sha256="x")),
            hub.execute(Beat(node)),
            hub.pull(Pull(node, f"s{n}", 2), 0),
            hub.execute(held),
            hub.execute(Cancel(f"j{n - 1}")),
            hub.execute(Forget(node)),
            clock.advance(chance.randrange(3000)),
        ]
        chosen = steps.pop(chance.randrange(len(steps)))
        for step in steps:
            step.close()  # type: ignore[attr-defined]
        (found,) = await asyncio.gather(chosen, return_exceptions=True)
        for job in getattr(found, "jobs", ()):
            held = Finish(job.id, True, job.lease_id)
        memo, stored = hub.committer.memo, await store.counts()
        assert memo._counts == {facet: stored.get(facet, 0) for facet in memo._counts}
        rows = {key: row for key, row in memo.rows.items() if row is not None}
        assert rows == {row.key: row for row in await store.fetch([*memo.rows])}
