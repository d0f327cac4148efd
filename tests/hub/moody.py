"""A store for tests that holds up its saves, or lets them fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sheratan_hub.clock import VirtualClock
from sheratan_hub.storage import Changes, Loaded, Tx, Wants
from sheratan_stores.memory import MemoryStore


class Moody(MemoryStore):
    """A store whose saves can be held up, or fail as told."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__("memory://", clock)
        self.errors: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.saves = 0

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Tx]:
        async with super().begin() as tx:
            yield MoodyTx(self, tx)


class MoodyTx:
    def __init__(self, store: Moody, tx: Tx) -> None:
        self._store, self._tx = store, tx

    async def load(self, wants: Wants) -> Loaded:
        return await self._tx.load(wants)

    async def save(self, changes: Changes, *, durable: bool = True) -> int:
        await self._store.gate.wait()
        self._store.saves += 1
        if self._store.errors:
            raise self._store.errors.pop(0)
        return await self._tx.save(changes, durable=durable)
