"""2 000 nodes on the virtual clock: the hub restarts, stands still, loses a third, and nobody is wrongly DEAD."""

from __future__ import annotations

import heapq
from collections.abc import Awaitable, Callable

import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.hub import Hub
from sheratan_hub.rules.command import Limits
from sheratan_hub.rules.nodes import Beat, Beaten
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.submit import Submit
from sheratan_hub.storage import open_store

MakeHub = Callable[..., Awaitable[Hub]]
NODES = 2000
LIMITS = Limits(node_ttl_ms=120_000, node_dead_ms=300_000, max_heartbeats=60, lease_ms=10_000_000, max_inflight=NODES)
ANY: frozenset[str] = frozenset()


class Fleet:
    """Nodes that come when they were told to; without an answer they try again after a while."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.next = [(clock.now() + n * 5, n) for n in range(NODES)]
        self.cut_off: set[int] = set()
        self.busiest = 0

    async def live(self, hub: Hub | None, ms: int, step: int = 1000) -> None:
        """Let `ms` pass; None: there is no hub."""
        for _ in range(ms // step):
            await self.clock.advance(step)
            await self._beat(hub)

    async def _beat(self, hub: Hub | None) -> None:
        now = self.clock.now()
        due: list[int] = []
        while self.next[0][0] <= now:
            due.append(heapq.heappop(self.next)[1])
        heard = [n for n in due if hub is not None and n not in self.cut_off]
        for n in set(due).difference(heard):
            heapq.heappush(self.next, (now + 5000 + int(self.clock.jitter() * 5000), n))
        self.busiest = max(self.busiest, len(heard))
        if hub is None or not heard:
            return
        beats = [Beat(f"n{n:04}", boot_id=f"b{n}", jitter=self.clock.jitter()) for n in heard]
        answers: list[Beaten] = await hub.execute_many(beats)
        for n, answer in zip(heard, answers, strict=True):
            heapq.heappush(self.next, (now + int(answer.next_in_ms), n))


async def states(hub: Hub) -> tuple[int, ...]:
    counts = await hub.counts("node:")
    return tuple(counts.get(f"node:{state}", 0) for state in ("ONLINE", "STALE", "DEAD"))


async def died(hub: Hub) -> set[str]:
    found, after = set(), 0
    while lines := await hub.store.events(after, 5000):
        found |= {line.line.split(b'"node_id":"')[1][:5].decode() for line in lines if b'"node.dead"' in line.line}
        after = lines[-1].seq
    return found


async def end(hub: Hub) -> None:
    """The hub does nothing more."""

    async def nothing() -> None:
        return None

    hub.stop()
    for loop in hub.loops:
        loop._step = nothing


async def test_nobody_is_wrongly_dead_and_only_who_is_cut_off_is_dead_at_all(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    store = open_store("memory://", clock)
    await store.open()
    hub, fleet = await make_hub(LIMITS, store, loops=True), Fleet(clock)
    await fleet.live(hub, 60_000)
    assert await states(hub) == (NODES, 0, 0)
    fleet.busiest = 0
    await fleet.live(hub, 60_000)
    assert fleet.busiest < 120, "60 a second are wanted, 200 would come every ten seconds"

    await end(hub)  # gone for longer than a node may be silent
    await fleet.live(None, 310_000, 5000)
    hub = await make_hub(LIMITS, store, loops=True)
    await fleet.live(hub, 60_000)
    assert await states(hub) == (NODES, 0, 0)

    fleet.cut_off = set(range(NODES // 3))
    await fleet.live(hub, 250_000)
    assert await states(hub) == (NODES - NODES // 3, NODES // 3, 0)
    assert await died(hub) == set()
    await fleet.live(hub, 100_000)
    assert (await states(hub))[2] == NODES // 3
    assert await died(hub) == {f"n{n:04}" for n in range(NODES // 3)}
    fleet.cut_off = set()
    await fleet.live(hub, 60_000)
    assert await states(hub) == (NODES, 0, 0)


@pytest.mark.parametrize("paused_ms", [60_000, 400_000])
async def test_a_hub_that_stood_still_gives_everybody_the_time_to_be_heard(
    make_hub: MakeHub, clock: VirtualClock, paused_ms: int
) -> None:
    limits = Limits(node_ttl_ms=20_000, node_dead_ms=40_000, lease_ms=50_000, restart_grace_ms=15_000)
    hub = await make_hub(limits, loops=True)
    for n in range(4):
        await hub.execute(Beat(f"n{n}"))
    await hub.execute(Submit("j", "k"))
    assert (await hub.pull(Pull("n0", hub.clock.secret(), capabilities=ANY), 0)).jobs
    await clock.advance(500)
    clock._now += paused_ms  # nothing runs meanwhile, as when the process is suspended
    await clock.advance(14_000)
    assert (await states(hub))[2] == 0
    assert (await hub.job("j")).status == "running"
    for n in range(3):
        await hub.execute(Beat(f"n{n}"))
    await clock.advance(3000)
    assert await states(hub) == (3, 0, 1)
