"""Rows, their indexes and the counters in memory: what the memory and the file store decide and read from.

A row is kept packed, as one `bytes`: a million of them cost half as much as objects, and the garbage collector
has nothing to walk through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from itertools import islice, takewhile
from typing import Any, TypeVar

import msgspec
from sortedcontainers import SortedDict, SortedList

from sheratan_hub.storage import Changes, Conflict, Due, Key, Loaded, Page, Ready, Row, Wants

pack = msgspec.msgpack.Encoder().encode
"""A row as `bytes`."""

unpack = msgspec.msgpack.Decoder(Row).decode
"""The row that `pack` made them of."""


class _Name(msgspec.Struct, array_like=True, gc=False):
    kind: str
    id: str


_name = msgspec.msgpack.Decoder(_Name).decode


def key_of(packed: bytes) -> tuple[str, str]:
    """Kind and id of a packed row."""
    name = _name(packed)
    return name.kind, name.id


Spot = tuple[int, str, str]
"""Where a row stands in a lane or an agenda: (order or due_at, id, kind)."""


class State:
    """Rows, indexes and counters. An index entry that would be empty is removed."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, bytes]] = {}
        self.counts: SortedDict[str, int] = SortedDict()
        self._lanes: SortedDict[str, SortedList[Spot]] = SortedDict()
        self._agendas: dict[str, SortedList[Spot]] = {}
        self._kinds: dict[str, SortedList[str]] = {}
        self._labels: dict[tuple[str, int, str], SortedList[str]] = {}

    # Reading

    def find(self, key: Key) -> Row | None:
        """The row of this key, if there is one."""
        packed = self.rows.get(key.kind, NONE).get(key.id)
        return unpack(packed) if packed is not None else None

    def fetch(self, keys: Iterable[Key]) -> list[Row]:
        """See `Store.fetch`."""
        return [row for row in map(self.find, dict.fromkeys(keys)) if row is not None]

    def has(self, key: Key) -> bool:
        """Whether there is a row of this key."""
        return key.id in self.rows.get(key.kind, NONE)

    def ready(self, ready: Ready, limit: int) -> list[Row]:
        """The first rows of a lane."""
        return [self._at(spot) for spot in islice(self._lanes.get(ready.lane, ()), limit)]

    def due(self, due: Due, limit: int) -> list[Row]:
        """The first rows of an agenda that are due."""
        first = takewhile(lambda spot: spot[0] <= due.before, self._agendas.get(due.agenda, ()))
        return [self._at(spot) for spot in islice(first, limit)]

    def _at(self, spot: Spot) -> Row:
        return unpack(self.rows[spot[2]][spot[1]])

    def page(
        self, kind: str, labels: Sequence[str | None], after: str | None, limit: int, examine: int, newest: bool
    ) -> Page:
        """See `Store.page`."""
        asked = [(slot, label) for slot, label in enumerate(labels) if label is not None]
        ids = self._ids_after(kind, asked, after, newest)
        rows: list[Row] = []
        last = None
        for last in islice(ids, examine):
            row = unpack(self.rows[kind][last])
            if all(row.labels[slot] == label for slot, label in asked):
                rows.append(row)
            if len(rows) == limit:
                break
        return Page(rows, last if next(ids, None) is not None else None)

    def _ids_after(self, kind: str, asked: list[tuple[int, str]], after: str | None, newest: bool) -> Iterator[str]:
        """An iterator over the ids beyond `after` in the shortest list that holds all that is asked for."""
        lists = [self._labels.get((kind, slot, label)) for slot, label in asked] or [self._kinds.get(kind)]
        found = [ids for ids in lists if ids is not None]
        if len(found) < len(lists):
            return iter(())
        ids = min(found, key=len)
        if newest:
            return ids.irange(maximum=after, inclusive=(True, False), reverse=True)
        return ids.irange(minimum=after, inclusive=(False, True))

    def packed_after(
        self, kind: str, after: str | None, limit: int, limit_bytes: int
    ) -> tuple[list[bytes], str | None]:
        """Some packed rows of one kind beyond the id `after`, and the last one's id. They end at either limit."""
        rows, taken, size = self.rows.get(kind, NONE), [], 0
        ids = self._kinds.get(kind, SortedList()).irange(minimum=after, inclusive=(False, True))
        for after in islice(ids, limit):
            taken.append(rows[after])
            size += len(rows[after])
            if size >= limit_bytes:
                break
        return taken, after

    def counts_from(self, prefix: str) -> dict[str, int]:
        """See `Store.counts`."""
        return {facet: self.counts[facet] for facet in starting_with(self.counts, prefix)}

    def heads(self, prefix: str) -> dict[str, int]:
        """See `Store.heads`."""
        return {lane: self._lanes[lane][0][0] for lane in starting_with(self._lanes, prefix)}

    # Writing

    def put(self, row: Row, packed: bytes, before: Row | None) -> None:
        """Keep a row in the place of `before`, which is what was kept of it; in the indexes only what differs moves."""
        self.rows.setdefault(row.kind, {})[row.id] = packed
        if before is None:
            self._enter(add, row)
            return
        for slot, (old, new) in enumerate(zip(before.labels, row.labels, strict=True)):
            if old != new:
                self._enter_label(take, before, slot)
                self._enter_label(add, row, slot)
        if (before.lane, before.order) != (row.lane, row.order):
            self._enter_lane(take, before)
            self._enter_lane(add, row)
        if (before.agenda, before.due_at) != (row.agenda, row.due_at):
            self._enter_agenda(take, before)
            self._enter_agenda(add, row)

    def remove(self, key: Key) -> None:
        """Forget the row of this key, if there is one."""
        row = self.find(key)
        if row is not None:
            del self.rows[row.kind][row.id]
            self._enter(take, row)

    def count(self, deltas: dict[str, int]) -> None:
        """Add to the counters; those that come to 0 go."""
        for facet, delta in deltas.items():
            total = self.counts.get(facet, 0) + delta
            if total:
                self.counts[facet] = total
            else:
                self.counts.pop(facet, None)

    def _enter(self, how: Enter, row: Row) -> None:
        how(self._kinds, row.kind, row.id)
        for slot, label in enumerate(row.labels):
            if label is not None:
                how(self._labels, (row.kind, slot, label), row.id)
        self._enter_lane(how, row)
        self._enter_agenda(how, row)

    def _enter_label(self, how: Enter, row: Row, slot: int) -> None:
        label = row.labels[slot]
        if label is not None:
            how(self._labels, (row.kind, slot, label), row.id)

    def _enter_lane(self, how: Enter, row: Row) -> None:
        if row.lane is not None:
            how(self._lanes, row.lane, (row.order, row.id, row.kind))

    def _enter_agenda(self, how: Enter, row: Row) -> None:
        if row.agenda is not None:
            how(self._agendas, row.agenda, (row.due_at, row.id, row.kind))

    def index(self) -> None:
        """Make the indexes of all `rows` at once: five times faster than row by row."""
        drafts: tuple[Draft, Draft, Draft, Draft] = (self._kinds, self._labels, self._lanes, self._agendas)
        for draft in drafts:
            draft.clear()
        for kind, rows in self.rows.items():
            for id, packed in rows.items():
                row = unpack(packed)
                row = Row(kind, id, b"", row.labels, row.lane, row.order, row.agenda, row.due_at)
                self._enter(append, row)
        for draft in drafts:
            for name, entries in draft.items():
                draft[name] = SortedList(entries)


Index = MutableMapping[Any, SortedList[Any]]
Draft = MutableMapping[Any, Any]
Enter = Callable[[Any, Any, Any], None]
"""What is done with an entry in the list of a name: `add`, `take` or, while the lists are made, `append`."""


def add(index: Index, name: Any, entry: Any) -> None:
    """Put an entry into the list of that name, which may be its first."""
    entries = index.get(name)
    if entries is None:
        index[name] = SortedList((entry,))
    else:
        entries.add(entry)


def take(index: Index, name: Any, entry: Any) -> None:
    """Remove an entry from the list of that name, and the list when it was the last."""
    entries = index[name]
    entries.remove(entry)
    if not entries:
        del index[name]


def append(draft: Draft, name: Any, entry: Any) -> None:
    """Add an entry to a plain list of that name, to be sorted once it is complete."""
    draft.setdefault(name, []).append(entry)


Entry = TypeVar("Entry")


def starting_with(index: SortedDict[str, Entry], prefix: str) -> Iterable[str]:
    """The names in `index` that start with `prefix`, without looking at the others."""
    return takewhile(lambda name: name.startswith(prefix), index.irange(minimum=prefix))


class StateTx:
    """The half of a transaction that two stores share: what it has loaded, and whether changes fit to that."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.loaded: dict[Key, Row] = {}
        self._over = False

    async def load(self, wants: Wants) -> Loaded:
        """See `Tx.load`."""
        if self._over:
            raise ValueError("load after save: the transaction is over")
        state = self.state
        locked = {key: row for key in wants.keys if (row := state.find(key)) is not None}
        looked = {key: row for key in wants.look - wants.keys if (row := state.find(key)) is not None}
        ready = {ready: state.ready(ready, limit) for ready, limit in wants.ready.items()}
        due = {due: state.due(due, limit) for due, limit in wants.due.items()}
        self.loaded.update(locked)
        self.loaded.update((row.key, row) for rows in (*ready.values(), *due.values()) for row in rows)
        counts = {facet: state.counts.get(facet, 0) for facet in wants.counts}
        return Loaded(rows=locked | looked, ready=ready, due=due, counts=counts)

    def check(self, changes: Changes) -> None:
        """Refuse what must not be saved: `Conflict`, or ValueError for what is a bug in a rule. Once a transaction."""
        if self._over:
            raise ValueError("a transaction is saved once")
        self._over = True
        put = {row.key for row in changes.put}
        if len(put) < len(changes.put) or not put <= self.loaded.keys():
            raise ValueError("a row is put that was not loaded in this transaction, or is put twice")
        if any(b"\n" in line for line in changes.ledger):
            raise ValueError("a ledger line holds a newline")
        fresh = {row.key for row in changes.new}
        if len(fresh) < len(changes.new) or any(map(self.state.has, fresh)):
            raise Conflict("the key of a new row exists already")

    def end(self) -> None:
        """The transaction is over: whoever has kept it must not save any more."""
        self._over = True

    def apply(self, changes: Changes, packed: Iterable[bytes]) -> None:
        """Make checked changes true; `packed` are the new rows, then the put ones."""
        more = iter(packed)
        for row in changes.new:
            self.state.put(row, next(more), None)
        for row in changes.put:
            self.state.put(row, next(more), self.loaded[row.key])
        for key in changes.gone:
            self.state.remove(key)
        self.state.count(changes.counts)


NONE: dict[str, bytes] = {}
"""The rows of a kind that there are none of."""
