"""Heartbeats of a large fleet share transactions; those of a small one go at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from sheratan_hub import beats
from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB, Committed
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.finish import Cancel
from sheratan_hub.rules.nodes import Beat, Beaten
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.submit import Submit
from sheratan_hub.storage import StoreFull
from tests.hub.moody import Moody

MakeHub = Callable[..., Awaitable[Hub]]


async def sent(hub: Hub, n: int) -> int:
    """Send so many one after the other, as fast as the loop turns; how many transactions they took."""
    batches: list[Committed] = []
    hub.observe(batches.append)
    tasks = []
    for k in range(n):
        tasks.append(asyncio.create_task(hub.beats.take(Beat(f"n{k}"), HUB)))
        for _ in range(20):
            await asyncio.sleep(0)
    answers = await asyncio.gather(*tasks)
    assert [answer.node.id for answer in answers] == [f"n{k}" for k in range(n)]
    return len(batches)


async def test_few_heartbeats_go_at_once_and_many_go_together(make_hub: MakeHub) -> None:
    hub = await make_hub()
    assert await sent(hub, beats.MANY - 1) == beats.MANY - 1
    assert await sent(hub, 200) <= 100


async def test_after_a_second_with_few_they_go_at_once_again(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub()
    await sent(hub, beats.MANY)
    await clock.advance(1000)
    assert await sent(hub, 5) < 5, "the second before had many"
    await clock.advance(1000)
    assert await sent(hub, 5) == 5


async def test_heartbeats_that_wait_for_others_are_refused_when_the_hub_closes(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beats, "MANY", 0)
    hub = await make_hub()
    waiting = asyncio.create_task(hub.beats.take(Beat("n1"), HUB))
    await asyncio.sleep(0)
    hub.committer.close()
    with pytest.raises(Refused) as no:
        await waiting
    assert no.value.code is Code.DRAINING


async def without_room(hub: Hub, store: Moody, beat: Beat) -> Beaten:
    """What a heartbeat is answered while nothing can be written."""
    store.errors = [StoreFull("full")]
    answer: Beaten = await hub.beats.take(beat, HUB)
    assert not store.errors
    return answer


async def test_a_heartbeat_that_was_not_written_gives_way_to_a_later_one_that_was(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    store = Moody(clock)
    await store.open()
    hub = await make_hub(None, store)
    await hub.beats.take(Beat("n1", boot_id="first"), HUB)
    await without_room(hub, store, Beat("n1", boot_id="first", capabilities=("old",)))
    await clock.advance(100)
    await hub.beats.take(Beat("n1", boot_id="second", capabilities=("new",)), HUB)
    await hub.sweep()
    node = await hub.node("n1")
    assert node is not None
    assert (node.boot_id, node.capabilities) == ("second", ("new",))


async def test_a_heartbeat_that_was_refused_late_gives_way_to_a_later_one_that_was_written(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    store = Moody(clock)
    await store.open()
    hub = await make_hub(None, store)
    await hub.beats.take(Beat("n1"), HUB)
    store.gate.clear()
    store.errors = [StoreFull("full")]
    first = asyncio.create_task(hub.beats.take(Beat("n1", capabilities=("old",)), HUB))
    await settle()
    second = asyncio.create_task(hub.beats.take(Beat("n1", capabilities=("new",)), HUB))
    await settle()
    store.gate.set()
    await asyncio.gather(first, second)
    await hub.sweep()
    node = await hub.node("n1")
    assert node is not None
    assert node.capabilities == ("new",)


@pytest.mark.parametrize("room", [True, False])
async def test_a_node_first_heard_of_is_told_of_what_was_cancelled_before(
    make_hub: MakeHub, clock: VirtualClock, room: bool
) -> None:
    store = Moody(clock)
    await store.open()
    hub = await make_hub(None, store)
    await hub.execute_many([Submit("stop", "k"), Submit("go", "k")])
    await hub.pull(Pull("n1", "s", 2, capabilities=frozenset()), 0)
    await hub.execute(Cancel("stop"))
    first = await hub.beats.take(Beat("n1"), HUB) if room else await without_room(hub, store, Beat("n1"))
    assert first.cancel == (("stop",) if room else ())
    await hub.sweep()
    await clock.advance(1000)
    assert (await hub.beats.take(Beat("n1"), HUB)).cancel == ("stop",)
