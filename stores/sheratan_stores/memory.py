"""The store that forgets: everything in dictionaries and sorted lists; the readable form of the contract.

Useful for tests, simulations and a first look (`memory://`). Nothing survives `close`.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable, Iterator, MutableMapping, Sequence
from contextlib import asynccontextmanager
from itertools import chain, islice, takewhile
from typing import ClassVar, NamedTuple, TypeVar

from sortedcontainers import SortedDict, SortedList

from sheratan_hub.clock import Clock
from sheratan_hub.storage import API, Changes, Conflict, Due, Key, LedgerLine, Loaded, Page, Ready, Row, Wants


class MemoryStore:
    """Keeps everything in this process. Transactions are serial; `durable` means nothing."""

    api: ClassVar[int] = API
    shared: ClassVar[bool] = False

    def __init__(self, url: str, clock: Clock) -> None:
        self._url = url
        self._clock = clock
        self._lock = asyncio.Lock()
        self.state = State()

    async def open(self) -> None:
        """See `Store.open`: starts empty."""
        self.state = State()

    async def close(self) -> None:
        """See `Store.close`: forgets everything."""
        async with self._lock:
            self.state = State()

    async def now(self) -> int:
        """See `Store.now`."""
        return self._clock.now()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[MemoryTx]:
        """See `Store.begin`. Nothing is changed before `save`, so there is nothing to roll back."""
        async with self._lock:
            yield MemoryTx(self.state, self._clock.now())

    async def fetch(self, keys: Sequence[Key]) -> list[Row]:
        """See `Store.fetch`."""
        return [self.state.rows[key] for key in keys if key in self.state.rows]

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
        asked = [(slot, label) for slot, label in enumerate(labels) if label is not None]
        ids = self.state.ids_after(kind, asked, after, newest)
        rows: list[Row] = []
        last = None
        for last in islice(ids, examine):
            row = self.state.rows[Key(kind, last)]
            if all(row.labels[slot] == label for slot, label in asked):
                rows.append(row)
            if len(rows) == limit:
                break
        return Page(rows, last if next(ids, None) is not None else None)

    async def counts(self, prefix: str = "") -> dict[str, int]:
        """See `Store.counts`."""
        return {facet: self.state.counts[facet] for facet in starting_with(self.state.counts, prefix)}

    async def heads(self, prefix: str = "") -> dict[str, int]:
        """See `Store.heads`."""
        return {lane: self.state.lanes[lane][0][0] for lane in starting_with(self.state.lanes, prefix)}

    async def events(self, after: int = 0, limit: int = 1000) -> list[LedgerLine]:
        """See `Store.events`."""
        start = max(0, bisect_right(self.state.ledger, after + 1, key=Batch.first_seq) - 1)
        lines = chain.from_iterable(map(Batch.numbered, self.state.ledger[start : start + limit + 1]))
        return list(islice((line for line in lines if line.seq > after), limit))

    async def prune_events(self, before: int) -> int:
        """See `Store.prune_events`."""
        async with self._lock:
            gone = list(takewhile(lambda batch: batch.at < before, self.state.ledger))
            del self.state.ledger[: len(gone)]
            return sum(len(batch.lines) for batch in gone)

    async def hint(self, timeout_ms: int) -> None:
        """See `Store.hint`: nobody else can change anything."""
        await self._clock.sleep(timeout_ms)


class MemoryTx:
    """One transaction of a `MemoryStore`: reads the state, checks the changes, then applies them at once."""

    def __init__(self, state: State, now: int) -> None:
        self._state = state
        self._now = now
        self._loaded: set[Key] = set()
        self._over = False

    async def load(self, wants: Wants) -> Loaded:
        """See `Tx.load`."""
        if self._over:
            raise ValueError("load after save: the transaction is over")
        state = self._state
        loaded = Loaded(
            rows={key: state.rows[key] for key in wants.keys | wants.look if key in state.rows},
            ready={ready: state.ready(ready, limit) for ready, limit in wants.ready.items()},
            due={due: state.due(due, limit) for due, limit in wants.due.items()},
            counts={facet: state.counts.get(facet, 0) for facet in wants.counts},
        )
        self._loaded.update(key for key in loaded.rows if key in wants.keys)
        self._loaded.update(row.key for rows in (*loaded.ready.values(), *loaded.due.values()) for row in rows)
        return loaded

    async def save(self, changes: Changes, *, durable: bool = True) -> int:
        """See `Tx.save`."""
        if self._over:
            raise ValueError("a transaction is saved once")
        self._over = True
        self._check(changes)
        return self._state.apply(changes, self._now)

    def _check(self, changes: Changes) -> None:
        for row in changes.put:
            if row.key not in self._loaded:
                raise ValueError(f"{row.key} is put but was not loaded in this transaction, or is put twice")
            self._loaded.discard(row.key)
        for line in changes.ledger:
            if b"\n" in line:
                raise ValueError("a ledger line holds a newline")
        fresh = [row.key for row in changes.new]
        known = next((key for key in fresh if key in self._state.rows), None)
        if known is not None or len(set(fresh)) < len(fresh):
            raise Conflict(f"{known or 'a row of the same batch'} exists already")


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


class State:
    """Rows, their indexes, counters and the ledger. An index entry that would be empty is removed."""

    def __init__(self) -> None:
        self.rows: dict[Key, Row] = {}
        self.counts: SortedDict[str, int] = SortedDict()
        self.ledger: list[Batch] = []
        self.lanes: SortedDict[str, SortedList[tuple[int, str, str]]] = SortedDict()
        self._agendas: dict[str, SortedList[tuple[int, str, str]]] = {}
        self._kinds: dict[str, SortedList[str]] = {}
        self._labels: dict[tuple[str, int, str], SortedList[str]] = {}
        self._seq = 1

    def ready(self, ready: Ready, limit: int) -> list[Row]:
        """The first rows of a lane."""
        first = islice(self.lanes.get(ready.lane, ()), limit)
        return [self.rows[Key(kind, id)] for _, id, kind in first]

    def due(self, due: Due, limit: int) -> list[Row]:
        """The first rows of an agenda that are due."""
        first = takewhile(lambda entry: entry[0] <= due.before, self._agendas.get(due.agenda, ()))
        return [self.rows[Key(kind, id)] for _, id, kind in islice(first, limit)]

    def ids_after(self, kind: str, asked: list[tuple[int, str]], after: str | None, newest: bool) -> Iterator[str]:
        """An iterator over the ids beyond `after` in the shortest list that holds all that is asked for."""
        lists = [self._labels.get((kind, slot, label)) for slot, label in asked] or [self._kinds.get(kind)]
        found = [ids for ids in lists if ids is not None]
        if len(found) < len(lists):
            return iter(())
        ids = min(found, key=len)
        if newest:
            return ids.irange(maximum=after, inclusive=(True, False), reverse=True)
        return ids.irange(minimum=after, inclusive=(False, True))

    def apply(self, changes: Changes, now: int) -> int:
        """Make checked changes true; return the number of the first ledger line."""
        for row in changes.new:
            self._insert(row)
        for row in changes.put:
            self._remove(row.key)
            self._insert(row)
        for key in changes.gone:
            self._remove(key)
        for facet, delta in changes.counts.items():
            self._count(facet, delta)
        return self._write(changes.ledger, now)

    def _insert(self, row: Row) -> None:
        self.rows[row.key] = row
        self._kinds.setdefault(row.kind, SortedList()).add(row.id)
        for slot, label in enumerate(row.labels):
            if label is not None:
                self._labels.setdefault((row.kind, slot, label), SortedList()).add(row.id)
        if row.lane is not None:
            self.lanes.setdefault(row.lane, SortedList()).add((row.order, row.id, row.kind))
        if row.agenda is not None:
            self._agendas.setdefault(row.agenda, SortedList()).add((row.due_at, row.id, row.kind))

    def _remove(self, key: Key) -> None:
        row = self.rows.pop(key, None)
        if row is None:
            return
        take(self._kinds, row.kind, row.id)
        for slot, label in enumerate(row.labels):
            if label is not None:
                take(self._labels, (row.kind, slot, label), row.id)
        if row.lane is not None:
            take(self.lanes, row.lane, (row.order, row.id, row.kind))
        if row.agenda is not None:
            take(self._agendas, row.agenda, (row.due_at, row.id, row.kind))

    def _count(self, facet: str, delta: int) -> None:
        total = self.counts.pop(facet, 0) + delta
        if total:
            self.counts[facet] = total

    def _write(self, lines: list[bytes], now: int) -> int:
        if not lines:
            return 0
        first = self._seq
        self.ledger.append(Batch(first, now, list(lines)))
        self._seq += len(lines)
        return first


Name = TypeVar("Name")
Entry = TypeVar("Entry")


def take(index: MutableMapping[Name, SortedList[Entry]], name: Name, entry: Entry) -> None:
    """Remove an entry from the list of that name, and the list when it was the last."""
    index[name].remove(entry)
    if not index[name]:
        del index[name]


def starting_with(index: SortedDict[str, Entry], prefix: str) -> Iterable[str]:
    """The names in `index` that start with `prefix`, without looking at the others."""
    return takewhile(lambda name: name.startswith(prefix), index.irange(minimum=prefix))
