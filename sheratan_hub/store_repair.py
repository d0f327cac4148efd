"""Repairs a damaged store into another: reads what can be read, puts it right by `rules/mending.py`, counts anew."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from sheratan_hub.rules.consistency import Consistency
from sheratan_hub.rules.mending import Found, lost_lines, right_line
from sheratan_hub.storage import Key, Row, Store, StoreDown
from sheratan_hub.storage_tools import Batch, Filling, Reading, all_batches, all_rows, tools_of
from sheratan_hub.store_check import Report, check

Tell = Callable[[int], None]

LOST_BATCH = 10_000
"""So many lines stand in one batch for lost events."""


class Repaired(msgspec.Struct):
    """What came of it: what could not be read, what was changed or left out, and the check of the copy."""

    lost: list[str]
    mended: list[str]
    lost_events: int
    report: Report


async def repair(source: Store, target: Store, scratch: Path, now: int, tell: Tell = lambda _: None) -> Repaired:
    """Make `target` out of what can be read of `source`, which is not changed. Raises `StoreRefused`, `StoreDown`.

    `scratch` is a folder where a copy of everything may lie for a while.
    """
    into = tools_of(target, "filling", "reading")
    salvaging = tools_of(source, "salvaging").salvaging
    done = Repaired([], [], 0, Report())
    try:
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".salvage-") as folder:
            async with into.filling() as filling, salvaging(Path(folder)) as (reading, lost):
                done.lost = lost
                rules = await _rows(reading, filling, done, tell)
                seq = await _events(reading, filling, done, now)
                await filling.finish(seq, rules.recounted(await reading.counts()))
    except OSError as error:
        raise StoreDown(f"{scratch} cannot be written: {error.strerror}") from error
    async with into.reading() as made:
        done.report = await check(made, tell=tell)
    return done


async def _found(reading: Reading, kinds: list[str]) -> Found:
    found = Found()
    if "job" in kinds:
        async for rows in all_rows(reading, "job"):
            found.see_jobs(rows, await _beside(reading, found.beside_job(rows)))
    if "edge" in kinds:
        async for rows in all_rows(reading, "edge"):
            found.see_edges(rows, await _beside(reading, found.beside_edge(rows)))
    if "link" in kinds:
        async for rows in all_rows(reading, "link"):
            found.see_links(rows)
    return found


async def _rows(reading: Reading, filling: Filling, done: Repaired, tell: Tell) -> Consistency:
    kinds = await reading.kinds()
    found, rules = await _found(reading, kinds), Consistency()
    for kind in kinds:
        async for rows in all_rows(reading, kind):
            beside = await _beside(reading, found.beside(rows))
            kept: list[Row] = []
            for row in rows:
                mended = found.mended(row, beside)
                kept += mended.rows
                if mended.text:
                    done.mended.append(mended.text)
            await filling.rows(kept)
            for _ in rules.see(kept, {}):
                pass  # only what it counts is asked for here; the copy is checked when it is there
            tell(len(rows))
    return rules


async def _beside(reading: Reading, keys: set[Key]) -> dict[Key, Row]:
    return {row.key: row for row in await reading.fetch(keys)} if keys else {}


async def _events(reading: Reading, filling: Filling, done: Repaired, now: int) -> int:
    """All events that are there, and a line for each that is not; the number of the next."""
    following = 0
    async for batches in all_batches(reading):
        for batch in batches:
            if following and batch.first > following:
                await _lost(filling, done, following, batch.first, batch.at)
            lines = [right_line(line, batch.at) for line in batch.lines]
            done.lost_events += sum(a is not b for a, b in zip(lines, batch.lines, strict=True))
            await filling.batches([Batch(batch.first, batch.at, lines)])
            following = batch.first + len(batch.lines)
    if following and following < reading.seq:
        await _lost(filling, done, following, reading.seq, now)
    return max(following, reading.seq)


async def _lost(filling: Filling, done: Repaired, first: int, after: int, at: int) -> None:
    done.lost_events += after - first
    for start in range(first, after, LOST_BATCH):
        end = min(start + LOST_BATCH, after)
        await filling.batches([Batch(start, at, list(lost_lines(start, end, at)))])
