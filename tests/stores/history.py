"""A history of transactions for stores that are killed: what a store may show after each, and whether it does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from sheratan_hub.clock import VirtualClock
from sheratan_hub.storage import Changes, Due, Key, Ready, Row, Store, Wants
from sheratan_stores.file import FileStore
from sheratan_stores.memory import MemoryStore
from sheratan_stores.story import listed

LANES, AGENDAS = ("a", "b"), ("g", "h")
TINY = {"first_bytes": 1024, "segment_bytes": 4096, "compact_bytes": 6000}
"""Sizes with which some dozen transactions rotate and compact several times."""


def file_store(folder: Path, clock: VirtualClock | None = None, **sizes: int) -> FileStore:
    return FileStore(f"file://{folder}", clock or VirtualClock(), **(sizes or TINY))


async def seen(store: Store) -> Any:
    """Everything that a store shows: rows, lists by label, lanes, agendas, counters, ledger."""
    async with store.begin() as tx:
        chosen = await tx.load(
            Wants(ready={Ready(lane): 999 for lane in LANES}, due={Due(g, 999): 999 for g in AGENDAS})
        )
    lists = {
        (kind, slot, label): [row.id for row in await listed(store, kind, (*[None] * slot, label))]
        for kind, slot, label in product(("job", "node"), (0, 4), ("x", "y"))
    }
    rows = [await listed(store, kind) for kind in ("job", "node")]
    return rows, lists, chosen.ready, chosen.due, await store.counts(), await store.heads(), await store.events()


class History:
    """The same transactions, one after the other, for a store and for one in memory that tells what is right."""

    def __init__(self, seed: int = 1, *, durable: float = 0.8, prunes: bool = True, nodes: bool = True) -> None:
        self.dice = random.Random(seed)
        self.clock = VirtualClock()
        self.right = MemoryStore("memory://", self.clock)
        self.pictures: list[Any] = []
        self._durable, self._prunes, self._nodes = durable, prunes, nodes
        self._born = 0

    async def tell(self, store: Store, steps: int, mark: Callable[[str, int], None] = lambda *_: None) -> None:
        """Do so many things. `mark` is told the number of each: "begun", "saved" and, if it is durable, "synced"."""
        if not self.pictures:
            self.pictures.append(await seen(self.right))
        for _ in range(steps):
            number = len(self.pictures)
            prune = self._prunes and self.dice.random() < 0.06
            durable = self.dice.random() < self._durable
            changes = self._changes()
            mark("begun", number)
            for each in (self.right, store):
                if prune:  # which says that it has something to do for the disk by the number of lines
                    durable = await each.prune_events(self.clock.now() - 300) > 0
                else:
                    await save(each, changes, durable=durable)
                if each is self.right:
                    self.pictures.append(await seen(self.right))
            mark("saved", number)
            if durable:
                mark("synced", number)
            await self.clock.advance(10)

    def _changes(self) -> Changes:
        rows = {row.key: row for kind in self.pictures[-1][0] for row in kind}
        chosen = self.dice.sample(sorted(rows), min(len(rows), self.dice.randrange(4)))
        half = len(chosen) // 2
        put = [replace(self._dressed(key), doc=self._doc()) for key in chosen[half:]]
        new = [self._dressed(self._new_key()) for _ in range(self.dice.randrange(4))]
        deltas = {"rows": len(new) - half, f"bytes:{self.dice.randrange(3)}": self.dice.randrange(-2, 3)}
        lines = [b"line %d" % self.dice.randrange(10**9) for _ in range(self.dice.randrange(3))]
        return Changes(new, put, chosen[:half], deltas, lines)

    def _new_key(self) -> Key:
        self._born += 1
        kind = self.dice.choice(["job", "job", "node"]) if self._nodes else "job"
        return Key(kind, f"{self.dice.randrange(10):x}-{self._born}")

    def _dressed(self, key: Key) -> Row:
        pick = self.dice.choice
        labels: Any = (pick(["x", "y", None]), None, None, None, pick(["x", None]))
        return Row(*key, self._doc(), labels, pick([*LANES, None]), self.dice.randrange(9), pick([*AGENDAS, None]), 7)

    def _doc(self) -> bytes:
        """JSON; sometimes zeros, what looks like records, or a lot."""
        dice = self.dice
        text = b'{"n": %d}' % dice.randrange(10**6)
        odd = [bytes(dice.randrange(900)), b"\x01\x00" * 40, b"p00000001:00000400:00000000:00000000:x\n" * 3, text * 90]
        return dice.choice(odd) if dice.random() < 0.1 else text * dice.randrange(1, 9)


async def save(store: Store, changes: Changes, *, durable: bool = True) -> int:
    async with store.begin() as tx:
        await tx.load(Wants(keys={row.key for row in changes.put}))
        return await tx.save(changes, durable=durable)


async def quiet(store: FileStore) -> None:
    """Wait for what the store does beside: the next segment, a snapshot."""
    while tasks := [task for task in (store._compacting, store._log._spare) if task is not None and not task.done()]:
        await asyncio.wait(tasks)


async def opened(folder: Path) -> Any:
    """What a store in this folder shows."""
    store = file_store(folder)
    await store.open()
    try:
        return await seen(store)
    finally:
        await store.close()
