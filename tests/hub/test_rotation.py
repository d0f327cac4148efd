"""A rotation at 1 000 random moments of switching and of dying, on the virtual clock: nobody valid is ever refused, the
old token is never accepted after its end, and the end is told once."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.keyring import Keyring
from sheratan_hub.rules.command import Refused
from sheratan_hub.rules.tokens import Rotate
from sheratan_hub.storage import Store, open_store
from sheratan_hub.web.auth import Tokens

OLD, NEW = "old-token-0123456789", "new-token-0123456789"
WINDOW_MS = 10_000


class Jumping(VirtualClock):
    """Nobody sleeps here, so time may jump."""

    def jump(self, ms: int) -> None:
        self._now += ms


class World:
    """A hub that dies and starts again on one store, with settings that may rotate."""

    def __init__(self, clock: Jumping, store: Store, until: int) -> None:
        self.clock, self.store, self.until = clock, store, until
        self.settings = (OLD, NEW, until)
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.hub = Hub(self.store, self.clock)
        self.keyring = Keyring(self.clock)
        self.hub.observe(self.keyring.committed)
        await self.hub.start()
        self._running = asyncio.create_task(self.hub.committer.run())
        await self.keyring.open(self.hub, *self.settings)
        self.tokens = Tokens(self.keyring, self.clock)

    async def die(self) -> None:
        assert self._running is not None
        self._running.cancel()
        with suppress(asyncio.CancelledError):
            await self._running

    async def turn(self, *, dying: bool) -> None:
        """The rotation clock's step; `dying`: the hub is killed in the middle of it, after some turns of the loop."""
        step = asyncio.create_task(self.keyring.turn(self.hub))
        if dying:
            await settle(random.Random(self.clock.now()).randrange(8))
            await self.die()
            step.cancel()
            with suppress(asyncio.CancelledError):
                await step
            await self.start()
        else:
            await step

    def accepts(self, token: str) -> str:
        """`ok`, or the code of the refusal."""
        try:
            self.tokens.check({"X-Sheratan-Token": token})
        except Refused as no:
            return str(no.code)
        return "ok"

    async def ends(self) -> int:
        return sum(b"rotation_finalized" in line.line for line in await self.store.events())


async def rotation(seed: int, begun_by: str) -> None:
    rng = random.Random(seed)
    clock = Jumping(seed=seed)
    store = open_store("memory://", clock)
    await store.open()
    until = clock.now() + WINDOW_MS
    world = World(clock, store, until)
    if begun_by == "api":
        world.settings = (OLD, "", 0)
    await world.start()
    if begun_by == "api":
        await world.hub.execute(Rotate(world.keyring.digest(NEW).hex(), until))
    switches_at = clock.now() + rng.randrange(WINDOW_MS)
    end = until + rng.randrange(1, WINDOW_MS // 2)
    while clock.now() < end:
        clock.jump(min(rng.choice((1, 40, 700, 2500)), max(1, abs(until - clock.now()) or 1)))
        action = rng.random()
        if action < 0.3:
            await world.die()
            if rng.random() < 0.3:
                clock.jump(rng.randrange(4000))
            await world.start()
        elif action < 0.7:
            await world.turn(dying=action < 0.45)
        mine = OLD if clock.now() < switches_at else NEW
        assert world.accepts(mine) == "ok", (seed, clock.now() - until)
        assert world.accepts(OLD) == ("ok" if clock.now() < until else "old_token"), (seed, clock.now() - until)
    await world.turn(dying=False)
    assert await world.ends() == 1, seed
    assert (world.accepts(OLD), world.accepts(NEW)) == ("old_token", "ok")
    await world.die()


@pytest.mark.parametrize("begun_by", ["settings", "api"])
async def test_a_rotation_at_500_random_moments(begun_by: str) -> None:
    for seed in range(500):
        await rotation(seed, begun_by)
