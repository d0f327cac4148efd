"""The rows of one transaction as the decisions so far have left them: what every rule decides on.

Longer than 300 lines because it is one class, through which everything that a rule reads and writes goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import count, islice

import msgspec

from sheratan_hub.rules.command import Decision, Event, Need, Scene
from sheratan_hub.rules.facets import of_node, of_ready
from sheratan_hub.storage import Changes, Key, Loaded, Ready, Row, Wants


class View:
    """The rows of one transaction as the decisions so far have left them.

    Asking for something that was not loaded raises `Need`; so does a lane whose loaded part is used up.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.now = scene.now
        self._rows: dict[Key, Row | None] = {}
        self._ready: dict[str, list[Row]] = {}
        self._depth: dict[str, int] = {}
        self._at: dict[str, int] = {}
        self._due: dict[str, list[Row]] = {}
        self._counts: dict[str, int] = {}
        self._fresh: set[Key] = set()
        self._orders = count(max(scene.order_at(scene.now), scene.first_order))
        self._locked: set[Key] = set()
        self.used_up: set[str] = set()
        self.left: set[str] = set()
        self._written: dict[Key, Row | None] = {}
        self._deltas: dict[str, int] = {}
        self.asked: dict[str, None] = {}
        """Lanes of which more has been asked since the last load, those first that were asked longest ago."""
        self.loads = 0
        """How often rows of lanes have been loaded."""
        self._events: list[Event] = []
        self._joined: dict[str, list[Row]] = {}
        self._joined_from: dict[str, int] = {}
        """The lowest order among those."""

    def add(self, wants: Wants, loaded: Loaded) -> None:
        """Take in what the store found for `wants`. Rows already here keep what was decided on them."""
        for key in wants.look:
            self._rows.setdefault(key, loaded.rows.get(key))
        for key in wants.keys:
            self._lock(key, loaded.rows.get(key))
        self.asked.clear()
        self.loads += bool(loaded.ready)
        for ready, rows in loaded.ready.items():
            if wants.ready[ready] > self._depth.get(ready.lane, 0):
                self._ready[ready.lane] = rows
                self._at[ready.lane] = 0
                self._depth[ready.lane] = wants.ready[ready]
            self._keep(rows)
        for due, rows in loaded.due.items():
            self._due[due.agenda] = rows
            self._keep(rows)
        for facet, n in loaded.counts.items():
            self._counts.setdefault(facet, n)

    def _keep(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._lock(row.key, row)

    def _lock(self, key: Key, row: Row | None) -> None:
        """What was loaded to be changed is newer than what was only looked at, older than what was decided."""
        self._locked.add(key)
        if key not in self._written:
            self._rows[key] = row

    def row(self, kind: str, id: str) -> Row | None:
        """The row, locked, or None if there is none."""
        key = Key(kind, id)
        if key not in self._locked:
            raise Need(Wants(keys={key}))
        return self._rows[key]

    def look(self, kind: str, id: str) -> Row | None:
        """The row, only read, or None if there is none."""
        key = Key(kind, id)
        if key not in self._rows:
            raise Need(Wants(look={key}))
        return self._rows[key]

    def written(self, key: Key) -> Row | None:
        """The row as this batch writes it, None if it does not."""
        return self._written.get(key)

    def next_order(self) -> int:
        """The next place in line: first come, first served, also within one millisecond."""
        return next(self._orders)

    def has(self, kind: str, id: str, *, locked: bool = False) -> bool:
        """Whether it is known if there is such a row; `locked`: so that it may be changed."""
        return Key(kind, id) in (self._locked if locked else self._rows)

    def lacks(self, lane: str, n: int) -> bool:
        """Whether more of the lane has to be loaded before it is known which are its first `n` rows that are left."""
        if lane not in self._ready:
            return True
        if self.exhausted(lane):
            return False
        rows = islice(self._ready[lane], self._first_left(lane), None)
        return sum(1 for _ in islice(filter(self._untouched, rows), n)) < n

    def deeper(self, lane: str, n: int) -> int:
        """How deep to load the lane for `n` rows more: at least twice as deep as it is, so that this ends soon."""
        depth = self._depth.get(lane, 0)
        return depth + max(n, depth)

    def exhausted(self, lane: str) -> bool:
        """Whether all that the store holds in the lane was loaded."""
        return lane in self._ready and len(self._ready[lane]) < self._depth[lane]

    def count(self, facet: str) -> int:
        """How many there are of `facet`, this batch's decisions included."""
        if facet not in self._counts:
            raise Need(Wants(counts={facet}))
        return self._counts[facet] + self._deltas.get(facet, 0)

    def counted(self) -> Iterable[str]:
        """The facets whose counts are known."""
        return self._counts

    def looked(self) -> Iterable[tuple[Key, Row | None]]:
        """The rows that were only looked at, as they are now."""
        return ((key, row) for key, row in self._rows.items() if key not in self._locked)

    def ready(self, lane: str, limit: int) -> list[Row]:
        """Up to `limit` rows of `lane` that nobody in this batch has taken; fewer only if there are no more.

        Those that this batch has made, or brought back, take their place among them.
        """
        if lane not in self._ready:
            raise Need(Wants(ready={Ready(lane): limit}))
        rows, start = self._ready[lane], self._first_left(lane)
        if limit == 1:  # the plain pull, and the quick way: the first that is left was just found
            found = rows[start : start + 1]
        else:
            found = list(islice((row for row in islice(rows, start, None) if self._untouched(row)), limit))
        if len(found) < limit and len(rows) >= self._depth[lane]:
            raise Need(Wants(ready={Ready(lane): self.deeper(lane, limit)}))
        if lane in self._joined and (len(found) < limit or found[-1].order >= self._joined_from[lane]):
            left = self._joined[lane] = [row for row in self._joined[lane] if self._rows[row.key] is row]
            found = sorted(found + left, key=_place)[:limit]
        return found

    def joined(self) -> dict[str, list[int]]:
        """The orders of the rows that this batch makes, or brings back, and that may be claimed, by lane."""
        left = (
            (lane, [row.order for row in rows if self._rows[row.key] is row]) for lane, rows in self._joined.items()
        )
        return {lane: orders for lane, orders in left if orders}

    def add_empty(self, lane: str) -> None:
        """The store is known to hold nothing in this lane."""
        self._ready.setdefault(lane, [])
        self._depth.setdefault(lane, 1)

    def _first_left(self, lane: str) -> int:
        rows, at, written = self._ready[lane], self._at.get(lane, 0), self._written
        while at < len(rows) and rows[at].key in written:
            at += 1
        self._at[lane] = at
        return at

    def _untouched(self, row: Row) -> bool:
        return row.key not in self._written

    def due(self, agenda: str) -> list[Row]:
        """The due rows loaded for `agenda`, as they are now; those changed by this batch are left out."""
        return [row for row in self._due.get(agenda, ()) if self._untouched(row)]

    def all_due(self, agenda: str) -> list[Row] | None:
        """The due rows of `agenda` as they were loaded, whatever became of them; None: they were not loaded."""
        return self._due.get(agenda)

    def changed(self, kind: str, id: str) -> bool:
        """Whether this batch has written the row."""
        return Key(kind, id) in self._written

    def apply(self, decision: Decision) -> None:
        """Make a decision part of what later commands of the batch see."""
        for row in decision.new:
            self._fresh.add(row.key)
            self._write(row.key, row)
        for row in decision.put:
            self._write(row.key, row)
        for key in decision.gone:
            self._write(key, None)
        for facet in decision.forgotten:
            self._deltas[facet] = self._deltas.get(facet, 0) - self.count(facet)
        self._events.extend(decision.events)
        if decision.served is not None:
            self.scene.lanes.serve(decision.served.offer, decision.served.lanes)

    def _write(self, key: Key, row: Row | None) -> None:
        before = self._rows.get(key)
        self._locked.add(key)
        if before is not None:
            if before.lane is not None and before.lane not in self._ready:
                self.left.add(before.lane)
            for facet in facets(before) if row is not None else _of_gone(before):
                self._deltas[facet] = self._deltas.get(facet, 0) - 1
            if row is None and before.kind == "job" and before.labels[3] is not None:
                gone = pruned_of(before.labels[3])
                self._deltas[gone] = self._deltas.get(gone, 0) + 1
            if before.labels[2] in self.scene.lanes.benched and before.labels[0] == "running":
                self.scene.lanes.unbench(before.labels[2] or "")  # a pull in this batch may have what it leaves free
        if row is not None:
            for facet in facets(row):
                self._deltas[facet] = self._deltas.get(facet, 0) + 1
            if row.lane is not None:
                self._joined.setdefault(row.lane, []).append(row)
                self._joined_from[row.lane] = min(row.order, self._joined_from.get(row.lane, row.order))
                self.used_up.discard(row.lane)
        self._rows[key] = self._written[key] = row

    def changes(self) -> Changes:
        """All decisions so far as one set of changes."""
        out = Changes(counts={facet: n for facet, n in self._deltas.items() if n})
        for key, row in self._written.items():
            if row is None:
                if key not in self._fresh:
                    out.gone.append(key)
            elif key in self._fresh:
                out.new.append(row)
            else:
                out.put.append(row)
        out.ledger = [_encode(event) for event in self._events]
        return out

    def heads(self) -> dict[str, int | None]:
        """For each lane that was loaded: the order of its first row left, or None if nothing is left."""
        return {lane: self._head(lane, rows) for lane, rows in self._ready.items()}

    def sure(self, lane: str) -> bool:
        """Whether the head of a lane that was loaded is known, not only that it is no earlier one."""
        return self._at[lane] < len(self._ready[lane]) or len(self._ready[lane]) < self._depth[lane]

    def _head(self, lane: str, rows: list[Row]) -> int | None:
        at = self._first_left(lane)
        if at < len(rows):
            return rows[at].order
        return rows[-1].order if rows and len(rows) >= self._depth[lane] else None

    def trial(self) -> View:
        """A copy to decide on; this view stays as it is."""
        copy = View(self.scene)
        copy._rows, copy._ready, copy._depth = dict(self._rows), self._ready, self._depth
        copy._due, copy._counts = self._due, self._counts
        copy._written, copy._deltas, copy._fresh = dict(self._written), dict(self._deltas), set(self._fresh)
        copy._locked, copy._orders = set(self._locked), self._orders
        copy._joined = {lane: list(rows) for lane, rows in self._joined.items()}
        copy._joined_from = dict(self._joined_from)
        copy.loads = self.loads
        return copy


def _place(row: Row) -> tuple[int, str]:
    return row.order, row.id


@lru_cache(32)
def _of_status(status: str | None) -> tuple[str]:
    return (f"job:{status}",)


@lru_cache(4096)
def _of_lease(source: str | None, node: str | None) -> tuple[str, ...]:
    """Live leases, in all, by node, and by source where there is one (design rules 9 and 10)."""
    return ("job:running", leases_on(node or ""), *((running_of(source),) if source else ()))


@lru_cache(4096)
def in_mission(status: str | None, mission: str) -> str:
    """The facet of a mission's jobs in this state."""
    return f"m:{mission}:{status}"


def pruned_of(mission: str) -> str:
    """The facet of a mission's jobs that are gone."""
    return in_mission("pruned", mission)


LEASES = "leases:"


def leases_on(node_id: str) -> str:
    """The facet of a node's live leases."""
    return LEASES + node_id


def leases_by_node(counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Of counts by facet those of live leases, each with its node."""
    return ((facet[len(LEASES) :], n) for facet, n in counts.items() if facet.startswith(LEASES))


def running_of(source: str) -> str:
    """The facet of a source's live leases."""
    return f"running:{source}"


def _of_gone(row: Row) -> tuple[str, ...]:
    """What a row that goes no longer counts for: a mission keeps the counts of jobs that were pruned (rule 15)."""
    return facets(row) if row.kind != "job" else _of_job(row)


def _of_job(row: Row) -> tuple[str, ...]:
    if row.lane is not None:
        return of_ready(row.lane)
    status, _, source, _, node = row.labels
    return _of_lease(source, node) if status == "running" else _of_status(status)


def facets(row: Row | None) -> tuple[str, ...]:
    """What a row counts for: jobs by status and in their mission, those that may be claimed by level, leases by node
    and source, nodes by state, attestation and health, keys and marks of what was read in all.
    """
    if row is None:
        return ()
    if row.kind == "job":
        mission = row.labels[3]
        return _of_job(row) if mission is None else (*_of_job(row), in_mission(row.labels[0], mission))
    if row.kind == "node":
        return of_node(*row.labels[:4])
    return (row.kind,) if row.kind in ("key", "read") else ()


_encode = msgspec.json.Encoder().encode
