"""The store that forgets: the readable form of the contract, with no disk in the way.

Useful for tests, simulations and a first look (`memory://`). Nothing survives `close`. Rows, their indexes and the
counters stand in `state.py`.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import chain, islice, takewhile
from typing import ClassVar, NamedTuple

from sheratan_hub.clock import Clock
from sheratan_hub.storage import API, Changes, Key, LedgerLine, Page, Row
from sheratan_stores.state import State, StateTx, pack


class MemoryStore:
    """Keeps everything in this process. Transactions are serial; `durable` means nothing."""

    api: ClassVar[int] = API
    shared: ClassVar[bool] = False

    def __init__(self, url: str, clock: Clock) -> None:
        self._url = url
        self._clock = clock
        self._lock = asyncio.Lock()
        self._state, self._ledger = State(), Ledger()

    async def open(self) -> None:
        """See `Store.open`: starts empty."""
        self._state, self._ledger = State(), Ledger()

    async def close(self) -> None:
        """See `Store.close`: forgets everything."""
        async with self._lock:
            self._state, self._ledger = State(), Ledger()

    async def now(self) -> int:
        """See `Store.now`."""
        return self._clock.now()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[MemoryTx]:
        """See `Store.begin`. Nothing is changed before `save`, so there is nothing to roll back."""
        async with self._lock:
            tx = MemoryTx(self._state, self._ledger, self._clock.now())
            try:
                yield tx
            finally:
                tx.end()

    async def fetch(self, keys: Sequence[Key]) -> list[Row]:
        """See `Store.fetch`."""
        return self._state.fetch(keys)

    async def page(
        self,
        kind: str,
        labels: Sequence[str | None] = (),
        after: str | None = None,
        limit: int = 100,
        examine: int = 2000,
        newest: bool = False,
    ) -> Page:
        """See `Store.page`."""
        return self._state.page(kind, labels, after, limit, examine, newest)

    async def counts(self, prefix: str = "") -> dict[str, int]:
        """See `Store.counts`."""
        return self._state.counts_from(prefix)

    async def heads(self, prefix: str = "") -> dict[str, int]:
        """See `Store.heads`."""
        return self._state.heads(prefix)

    async def events(self, after: int = 0, limit: int = 1000) -> list[LedgerLine]:
        """See `Store.events`."""
        return self._ledger.read(after, limit)

    async def prune_events(self, before: int) -> int:
        """See `Store.prune_events`."""
        async with self._lock:
            return self._ledger.prune(before)

    async def hint(self, timeout_ms: int) -> None:
        """See `Store.hint`: nobody else can change anything."""
        await self._clock.sleep(timeout_ms)


class MemoryTx(StateTx):
    """One transaction of a `MemoryStore`: reads the state, checks the changes, then applies them at once."""

    def __init__(self, state: State, ledger: Ledger, now: int) -> None:
        super().__init__(state)
        self._ledger, self._now = ledger, now

    async def save(self, changes: Changes, *, durable: bool = True) -> int:
        """See `Tx.save`."""
        self.check(changes)
        self.apply(changes, map(pack, (*changes.new, *changes.put)))
        return self._ledger.write(changes.ledger, self._now)


class Batch(NamedTuple):
    """The ledger lines of one save: the number of the first, when they were saved (ms), and their bytes."""

    first: int
    at: int
    lines: list[bytes]

    def first_seq(self) -> int:
        """The number of the first line."""
        return self.first

    def numbered(self) -> Iterable[LedgerLine]:
        """The lines with their numbers."""
        return map(LedgerLine, range(self.first, self.first + len(self.lines)), self.lines)


class Ledger:
    """The events in order, batch by batch."""

    def __init__(self) -> None:
        self._batches: list[Batch] = []
        self._seq = 1

    def write(self, lines: list[bytes], now: int) -> int:
        """Keep the lines; the number of the first, 0 without lines."""
        if not lines:
            return 0
        first = self._seq
        self._batches.append(Batch(first, now, list(lines)))
        self._seq += len(lines)
        return first

    def read(self, after: int, limit: int) -> list[LedgerLine]:
        """See `Store.events`."""
        start = max(0, bisect_right(self._batches, after + 1, key=Batch.first_seq) - 1)
        lines = chain.from_iterable(map(Batch.numbered, self._batches[start : start + limit + 1]))
        return list(islice((line for line in lines if line.seq > after), limit))

    def prune(self, before: int) -> int:
        """See `Store.prune_events`."""
        gone = list(takewhile(lambda batch: batch.at < before, self._batches))
        del self._batches[: len(gone)]
        return sum(len(batch.lines) for batch in gone)
