"""A seeded random story of transactions, told to any store; two stores that keep the contract give one trace."""

# ruff: noqa: S101  (what a test calls may assert)

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec

from sheratan_hub.clock import VirtualClock
from sheratan_hub.storage import Changes, Conflict, Due, Key, Ready, Row, Store, Wants

KINDS = ("job", "node")
LANES = ("a|render", "a|scan", "ab|render", "b|scan")
AGENDAS = ("lease", "prune")
LABELS = (("new", "run", "end"), ("render", "scan"), ("s1", "s2", "é"), ("m1", "m2"), ("n1",))
HOUR = 3_600_000


async def story(store: Store, seed: int, steps: int = 150) -> list[Any]:
    """Tell an open, empty store the story of `seed`; return what was seen at every step."""
    teller = Teller(store, seed)
    return [await teller.step() for _ in range(steps)] + [await teller.look_at_everything()]


async def same_story(make_a: Callable[[], Awaitable[Store]], make_b: Callable[[], Awaitable[Store]], seed: int) -> None:
    """Tell one story to two stores (made but not opened) and assert that they show the same."""
    traces = []
    for make in (make_a, make_b):
        store = await make()
        await store.open()
        try:
            traces.append(await story(store, seed))
        finally:
            await store.close()
    for step, (a, b) in enumerate(zip(*traces, strict=True)):
        assert a == b, f"seed {seed}, step {step}: {a} is not {b}"


class Teller:
    """Chooses what happens next. All chance comes from the seed, none from what a store does on its own."""

    def __init__(self, store: Store, seed: int) -> None:
        self._store = store
        self._dice = VirtualClock(seed=seed)
        self._born = 0
        self._ids: list[Key] = []

    async def step(self) -> Any:
        """Do one thing and return its name and what was seen."""
        act = self._pick(
            [self.submit] * 5
            + [self.claim] * 5
            + [self.change] * 4
            + [self.sweep] * 2
            + [self.remove, self.clash, self.abort, self.leave, self.read, self.list, self.prune]
        )
        return act.__name__, await act()

    async def submit(self) -> Any:
        """Several new rows, counted by their first label."""
        rows = [self._new_row() for _ in range(self._roll(8))]
        async with self._store.begin() as tx:
            seen = await tx.load(Wants(keys={row.key for row in rows}, counts={"new", "run"}))
            seq = await tx.save(Changes(new=rows, counts=recount((), rows), ledger=[row.id.encode() for row in rows]))
        return seen, seq

    async def claim(self) -> Any:
        """The first rows of two lanes leave them; a second load asks one lane deeper."""
        lanes = {Ready(self._pick(LANES)): 1 + self._roll(3) for _ in range(2)}
        async with self._store.begin() as tx:
            seen = await tx.load(Wants(ready=lanes))
            deeper = await tx.load(Wants(ready={lane: limit + 2 for lane, limit in lanes.items()}))
            found = [row for lane in lanes for row in deeper.ready[lane]]
            rows = [self._claimed(row) for row in found]
            seq = await tx.save(Changes(put=rows, counts=recount(found, rows), ledger=[b"claim"] * len(rows)))
        return seen, deeper, seq

    async def change(self) -> Any:
        """Rows that were loaded by key get other labels, lanes and agendas, some of them none at all."""
        async with self._store.begin() as tx:
            seen = await tx.load(Wants(keys=self._some_keys(5), look=self._some_keys(2)))
            loaded = await tx.load(Wants(keys=set(seen.rows)))
            rows = [self._dressed(key) for key in sorted(loaded.rows)]
            deltas = recount(loaded.rows.values(), rows)
            seq = await tx.save(Changes(put=rows, counts=deltas))
        return seen, seq

    async def sweep(self) -> Any:
        """Due rows are removed."""
        due = Due(self._pick(AGENDAS), self._roll(100))
        async with self._store.begin() as tx:
            seen = await tx.load(Wants(due={due: 3}))
            gone = seen.due[due]
            await tx.save(Changes(gone=[row.key for row in gone], counts=recount(gone, ()), ledger=[b"swept"]))
        return seen

    async def remove(self) -> Any:
        """Rows go by key."""
        async with self._store.begin() as tx:
            seen = await tx.load(Wants(keys=self._some_keys(3)))
            gone = list(seen.rows.values())
            await tx.save(Changes(gone=sorted(row.key for row in gone), counts=recount(gone, ())))
        return seen

    async def clash(self) -> Any:
        """A new row whose key exists, among others that do not."""
        rows = [self._dressed(key) for key in sorted(self._some_keys(1))] + [self._new_row()]
        try:
            async with self._store.begin() as tx:
                await tx.save(Changes(new=rows, counts={"new": 100}, ledger=[b"never"]))
        except Conflict:
            return "conflict"
        async with self._store.begin() as tx:
            await tx.save(Changes(gone=[row.key for row in rows], counts={"new": -100}))
        return "done and undone"

    async def abort(self) -> Any:
        """An exception between load and save."""
        try:
            async with self._store.begin() as tx:
                await tx.load(Wants(ready={Ready(self._pick(LANES)): 5}, counts={"new"}))
                raise LookupError("the rule says no")
        except LookupError:
            return await self.look_at_everything()

    async def leave(self) -> Any:
        """A transaction that ends without a save."""
        async with self._store.begin() as tx:
            return await tx.load(Wants(keys=self._some_keys(4), counts={"new", "run", "end", "none"}))

    async def read(self) -> Any:
        """Reads beside transactions."""
        rows = await self._store.fetch(sorted(self._some_keys(4)))
        return sorted(rows, key=lambda row: row.key), await self._store.events(self._roll(100), 7)

    async def list(self) -> Any:
        """A list by one or two labels, in small pages, to its end."""
        asked = [self._pick(values) if self._roll(3) == 0 else None for values in LABELS]
        return await listed(self._store, self._pick(KINDS), asked, limit=3, newest=self._roll(2) == 0)

    async def prune(self) -> Any:
        """Rarely, the ledger is emptied; numbers go on."""
        return await self._store.prune_events(await self._store.now() + HOUR) if self._roll(3) == 0 else None

    async def look_at_everything(self) -> Any:
        """All that can be seen from outside."""
        rows = {kind: await listed(self._store, kind) for kind in KINDS}
        return rows, await self._store.counts(), await self._store.heads(), await self._store.events()

    def _roll(self, sides: int) -> int:
        return int(self._dice.jitter() * sides)

    def _pick(self, things: Any) -> Any:
        return things[self._roll(len(things))]

    def _some_keys(self, most: int) -> set[Key]:
        return {self._pick(self._ids) for _ in range(1 + self._roll(most))} if self._ids else set()

    def _new_row(self) -> Row:
        self._born += 1
        kind = self._pick(KINDS)
        self._ids.append(Key(kind, f"{kind}-{self._roll(1000):03}-{self._born}"))
        return self._dressed(self._ids[-1])

    def _dressed(self, key: Key) -> Row:
        labels: Any = tuple(self._pick((*values, None)) for values in LABELS)
        lane, agenda = self._pick((*LANES, None)), self._pick((*AGENDAS, None))
        doc = bytes(self._roll(256) for _ in range(self._roll(20)))
        return Row(*key, doc, labels, lane, self._roll(20), agenda, self._roll(100))

    def _claimed(self, row: Row) -> Row:
        return msgspec.structs.replace(row, lane=None, labels=("run", *row.labels[1:]), agenda="lease", due_at=50)


def recount(before: Iterable[Row], after: Iterable[Row]) -> dict[str, int]:
    """By how much the numbers of rows with each first label change."""
    deltas = Counter(row.labels[0] or "bare" for row in after)
    deltas.subtract(row.labels[0] or "bare" for row in before)
    return dict(deltas)


async def listed(
    store: Store, kind: str, labels: Any = (), limit: int = 100, examine: int = 2000, newest: bool = False
) -> list[Row]:
    """A list followed page by page to its end."""
    rows: list[Row] = []
    after = None
    while True:
        page = await store.page(kind, labels, after, limit, examine, newest)
        rows += page.rows
        if page.next is None:
            return rows
        assert after is None or (page.next < after if newest else page.next > after), "a cursor must move on"
        after = page.next
