"""Copies a whole store into another that is made for it, and proves that both hold the same, row by row.

What is compared is a SHA-256 over all rows, counters and events in one order, and the number of the next event.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec

from sheratan_hub.storage import Row, Store, StoreRefused
from sheratan_hub.storage_tools import Batch, Filling, Reading, all_batches, all_rows, tools_of

Tell = Callable[[int], None]
"""Told how many more rows or events are done."""


class Content(msgspec.Struct, frozen=True):
    """What a store holds: rows by kind, events, counters, the number of the next event, and the hash of all of it."""

    rows: dict[str, int]
    events: int
    counters: int
    next_event: int
    sha256: str


class Digest:
    """Takes rows, events and counters in their order, and tells what they come to."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._rows: dict[str, int] = {}
        self._events = self._counters = 0

    def rows(self, rows: list[Row]) -> None:
        """Some rows of one kind."""
        for row in rows:
            self._add(row)
        self._rows[rows[0].kind] = self._rows.get(rows[0].kind, 0) + len(rows)

    def batches(self, batches: list[Batch]) -> None:
        """Some batches of events."""
        for batch in batches:
            self._add((batch.first, batch.at, list(batch.lines)))
            self._events += len(batch.lines)

    def end(self, seq: int, counts: dict[str, int]) -> Content:
        """The rest, and what all comes to."""
        self._add((seq, sorted(counts.items())))
        return Content(self._rows, self._events, len(counts), seq, self._hash.hexdigest())

    def _add(self, thing: Any) -> None:
        text = _encode(thing)
        self._hash.update(len(text).to_bytes(8))
        self._hash.update(text)


async def content(reading: Reading, tell: Tell = lambda _: None) -> Content:
    """What a store holds."""
    digest = Digest()
    for kind in await reading.kinds():
        async for rows in all_rows(reading, kind):
            digest.rows(rows)
            tell(len(rows))
    async for batches in all_batches(reading):
        digest.batches(batches)
        tell(len(batches))
    return digest.end(reading.seq, await reading.counts())


async def transfer(reading: Reading, filling: Filling, expected: str = "", tell: Tell = lambda _: None) -> Content:
    """Give everything that a store holds to one that is being made; what that was.

    `expected` is the hash that it must have: else `StoreRefused`, before anything has got its name.
    """
    digest, following = Digest(), 0
    for kind in await reading.kinds():
        async for rows in all_rows(reading, kind):
            digest.rows(rows)
            await filling.rows(rows)
            tell(len(rows))
    async for batches in all_batches(reading):
        following = _refuse_gap(reading, batches, following)
        digest.batches(batches)
        await filling.batches(batches)
        tell(len(batches))
    counts = await reading.counts()
    given = digest.end(reading.seq, counts)
    if expected and given.sha256 != expected:
        text = (
            f"{reading.about.place} does not hold what was written into it: its hash is {given.sha256}, not {expected}"
        )
        raise StoreRefused(text)
    await filling.finish(reading.seq, counts)
    return given


def _refuse_gap(reading: Reading, batches: list[Batch], following: int) -> int:
    """The number that must come next; `StoreRefused` if one is missing that must come before."""
    for batch in batches:
        if following and batch.first != following:
            raise StoreRefused(
                f"{reading.about.place} is damaged: events {following} to {batch.first - 1} are missing; "
                "sheratan-hub store repair makes a store of what is left"
            )
        following = batch.first + len(batch.lines)
    return following


async def copy(source: Store, target: Store, expected: str = "", tell: Tell = lambda _: None) -> Content:
    """Make `target` out of all that `source` holds, and prove it. Raises `StoreRefused`, `StoreDown`.

    Of a source in use it is what was committed when it began.
    """
    into = tools_of(target, "filling", "reading")
    async with tools_of(source, "reading").reading() as reading, into.filling() as filling:
        given = await transfer(reading, filling, expected, tell)
    async with into.reading() as copied:
        got = await content(copied, tell)
        place = copied.about.place
    if got != given:
        raise StoreRefused(
            f"{place} does not hold what was copied into it ({got.sha256}, not {given.sha256}); remove it"
        )
    return got


_encode = msgspec.msgpack.Encoder().encode
