"""Heartbeats of a large fleet share transactions; those of a small one go at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from sheratan_hub import beats
from sheratan_hub.clock import VirtualClock
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB, Committed
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.nodes import Beat

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
