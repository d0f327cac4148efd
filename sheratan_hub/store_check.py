"""Checks a whole store by `rules/consistency.py`, a piece at a time; and tells in brief what a store is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from sheratan_hub.rules.consistency import NOTES, PROBLEMS, Consistency, Problem, Recount
from sheratan_hub.storage import Key, Row, Store, StoreRefused
from sheratan_hub.storage_tools import Reading, all_batches, all_rows, sizes_of, tools_of

KEPT_MAX = 1000
"""So many problems, and so many notes, are kept with their texts; all are counted."""

Tell = Callable[[int], None]
"""Told how many more rows or events are done."""


class Report(msgspec.Struct):
    """What was found: problems (something is wrong) and notes, at most `KEPT_MAX` of each, and how many by code.

    `complete` is false when not everything was looked at.
    """

    problems: list[Problem] = []
    notes: list[Problem] = []
    found: dict[str, int] = {}
    rows: dict[str, int] = {}
    events: int = 0
    complete: bool = True

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def add(self, problems: Iterable[Problem], *, harmless: bool = False) -> None:
        """Keep some more."""
        for problem in problems:
            note = harmless or problem.code not in PROBLEMS
            kept = self.notes if note else self.problems
            self.found[problem.code] = self.found.get(problem.code, 0) + 1
            if len(kept) < KEPT_MAX:
                kept.append(problem)


async def check(reading: Reading, most: int | None = None, tell: Tell = lambda _: None) -> Report:
    """Everything that is wrong with a store. `most`: only so many rows of each kind, and so many events.

    Then nothing is said of what only shows when all is seen: counters, and the edges of jobs. Damage that is met
    becomes a problem, and what stands behind it is not looked at.
    """
    report, rules = Report(), Consistency()
    try:
        kinds = await reading.kinds()
        for kind in kinds:
            await _kind(reading, rules, report, kind, most, tell)
        if report.complete:
            report.add(rules.counted(await reading.counts()))
            recount = rules.recount()
            if recount is not None:
                report.add(await _recounted(reading, recount, kinds))
        await _events(reading, rules, report, most, tell)
        if most is None:
            for found in await reading.findings():
                report.add([Problem(found.code, found.place, found.text)], harmless=found.harmless)
    except StoreRefused as no:
        report.complete = False
        report.add([Problem("damaged", reading.about.place, str(no))])
    if not report.complete:
        report.add([Problem("not_all", reading.about.place, NOTES["not_all"])])
    report.rows, report.events = dict(rules.rows), rules.events
    return report


async def _kind(reading: Reading, rules: Consistency, report: Report, kind: str, most: int | None, tell: Tell) -> None:
    async for rows in all_rows(reading, kind):
        if most is not None and rules.rows[kind] + len(rows) > most:
            rows, report.complete = rows[: most - rules.rows[kind]], False
        report.add(rules.see(rows, await _beside(reading, rules.beside(rows))))
        tell(len(rows))
        if most is not None and rules.rows[kind] >= most:
            break


async def _beside(reading: Reading, keys: set[Key]) -> dict[Key, Row]:
    return {row.key: row for row in await reading.fetch(keys)} if keys else {}


async def _recounted(reading: Reading, recount: Recount, kinds: Sequence[str]) -> Iterable[Problem]:
    for kind in recount.KINDS:
        if kind in kinds:
            async for rows in all_rows(reading, kind):
                recount.see(rows)
    return recount.problems()


async def _events(reading: Reading, rules: Consistency, report: Report, most: int | None, tell: Tell) -> None:
    async for batches in all_batches(reading):
        for first, _, lines in batches:
            report.add(rules.line(first, lines))
            tell(len(lines))
        if most is not None and rules.events >= most:
            report.complete = False
            return
    report.add(rules.ended(reading.seq))


async def describe(store: Store) -> dict[str, Any]:
    """What a store is, in brief: where, of which format, who has it open, how large, what it counts.

    Raises `StoreRefused` if it cannot be read.
    """
    async with tools_of(store, "reading").reading() as reading:
        about, counts = reading.about, await reading.counts()
        batches = await reading.batches(0, 1)
        first = batches[0].first if batches else reading.seq
        sizes = await sizes_of(store)
        kinds = await reading.kinds()
    jobs = {facet[4:]: n for facet, n in sorted(counts.items()) if facet.startswith("job:")}
    nodes = {facet[5:]: n for facet, n in sorted(counts.items()) if facet.startswith("node:")}
    return {
        "place": about.place,
        "store": type(store).__name__,
        "format": about.format,
        "held_by": about.held_by,
        **({} if sizes is None else msgspec.structs.asdict(sizes)),
        "jobs": jobs,
        "nodes": nodes,
        "keys": counts.get("key", 0),
        "missions": len({facet.rpartition(":")[0] for facet in counts if facet.startswith("m:")}),
        "kinds": kinds,
        "events": reading.seq - first,
        "first_event": first,
        "next_event": reading.seq,
    }
