"""The memory store keeps the contract, except that it forgets."""

from __future__ import annotations

from sheratan_hub.clock import Clock
from sheratan_hub.storage import Store
from sheratan_stores.conformance import StoreConformance
from sheratan_stores.memory import MemoryStore


class TestMemory(StoreConformance):
    keeps = False

    async def make(self, clock: Clock) -> Store:
        return MemoryStore("memory://", clock)
