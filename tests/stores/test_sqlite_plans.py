"""Every question the SQLite store asks is answered from an index."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
from msgspec.structs import replace

from sheratan_hub.storage import Changes, Due, Key, Ready, Row, Wants
from sheratan_stores.sqlite import SqliteStore

ROWS = 30_000


class Asked:
    """The statements both connections of a store run, with their values filled in."""

    def __init__(self) -> None:
        self.statements: list[str] = []

    async def listen(self, store: SqliteStore) -> None:
        await store.write(lambda db: db.set_trace_callback(self.statements.append))
        await store._read(lambda db: db.set_trace_callback(self.statements.append))

    async def plans(self, store: SqliteStore) -> dict[str, list[str]]:
        asked = {text for text in self.statements if text.lstrip().startswith(("SELECT", "WITH", "UPDATE", "DELETE"))}

        def explain(db: Any) -> dict[str, list[str]]:
            db.set_trace_callback(None)
            return {text: [step[3] for step in db.execute(f"EXPLAIN QUERY PLAN {text}")] for text in asked}

        return await store.write(explain)


async def ask_everything(store: SqliteStore) -> None:
    row = Row("job", "a", b"", ("s", "k", "q", "m", "n"), "l", 1, "g", 1)
    async with store.begin() as tx:
        await tx.save(Changes(new=[row], counts={"c": 1}, ledger=[b"x"]))
    async with store.begin() as tx:
        await tx.load(Wants({row.key}, {Key("node", "n")}, {Ready("l"): 5}, {Due("g", 5): 5}, {"c"}))
        put = Row("job", "a", b"1", (None,) * 5, None, 2, None, 2)
        await tx.save(Changes(put=[put], gone=[Key("job", "b")], counts={"c": -1}))
    for given, after, newest in product(product("x ", repeat=5), (None, "a"), (False, True)):
        await store.page("job", [label if label == "x" else None for label in given], after, newest=newest)
    await store.counts("c")
    await store.heads("l")
    await store.fetch([row.key])
    await store.events(3)
    await store.prune_events(2**60)


async def test_no_statement_scans_or_sorts(store: SqliteStore) -> None:
    asked = Asked()
    await asked.listen(store)
    await ask_everything(store)
    plans = await asked.plans(store)
    assert len(plans) > 130
    for text, steps in plans.items():
        for step in steps:
            assert "TEMP B-TREE" not in step, (text, steps)
            assert not OURS.match(step) or text in ALLOWED, (text, steps)


OURS = re.compile(r"SCAN (rows|next|counts|ledger|meta)\b")
ALLOWED = ("SELECT first, n, at FROM ledger ORDER BY first LIMIT 500",)
"""In order of the key from its start, so many at most."""


async def test_an_update_names_only_what_changes(store: SqliteStore) -> None:
    rows = [Row("job", f"{n}", b"", ("s", None, None, "m", None), "l", 1) for n in range(3)]
    async with store.begin() as tx:
        await tx.save(Changes(new=rows))
    asked = Asked()
    await asked.listen(store)
    async with store.begin() as tx:
        await tx.load(Wants({row.key for row in rows}))
        put = [replace(rows[0], doc=b"1"), replace(rows[1], lane=None, order=2), replace(rows[2], lane=None, order=3)]
        await tx.save(Changes(put=put))
    assert [text for text in asked.statements if text.startswith("UPDATE")] == [
        "UPDATE rows SET doc = x'31' WHERE n = 1",
        "UPDATE rows SET lane = NULL, ord = 2 WHERE n = 2",
        "UPDATE rows SET lane = NULL, ord = 3 WHERE n = 3",
    ]


async def test_a_counter_at_zero_takes_no_room(store: SqliteStore) -> None:
    for delta in (2, -2):
        async with store.begin() as tx:
            await tx.save(Changes(counts={"m:1": delta, "c": 1}))
    assert await store.write(lambda db: db.execute("SELECT * FROM counts").fetchall()) == [("c", 2)]


@pytest.mark.parametrize(
    ("ask", "most"),
    [
        ("page all", 60),
        ("page rare", 10),
        ("page nothing in common", 800),
        ("heads", 10),
        ("ready", 10),
        ("due", 10),
        ("counts", 10),
        ("events", 10),
    ],
)
async def test_the_work_does_not_grow_with_the_rows(store: SqliteStore, ask: str, most: int) -> None:
    """Counts SQLite's own steps (in hundreds of virtual machine instructions) over a table of 30,000 rows."""
    await store.write(build)
    questions: dict[str, Any] = {
        "page all": lambda: store.page("job"),
        "page rare": lambda: store.page("job", ("a", None, None, "rare")),
        "page nothing in common": lambda: store.page("job", ("a", None, None, None, "odd"), examine=2000),
        "heads": store.heads,
        "ready": lambda: in_transaction(store, Wants(ready={Ready("lane"): 10})),
        "due": lambda: in_transaction(store, Wants(due={Due("lease", 10): 10})),
        "counts": lambda: store.counts("m"),
        "events": lambda: store.events(29_990),
    }
    steps = [0]

    def tick() -> int:
        steps[0] += 1
        return 0

    await store.write(lambda db: db.set_progress_handler(tick, 100))
    await store._read(lambda db: db.set_progress_handler(tick, 100))
    await questions[ask]()
    assert steps[0] < most


async def in_transaction(store: SqliteStore, wants: Wants) -> None:
    async with store.begin() as tx:
        await tx.load(wants)


def build(db: Any) -> None:
    db.execute("BEGIN")
    db.execute(f"WITH RECURSIVE n (n) AS (VALUES (0) UNION ALL SELECT n + 1 FROM n WHERE n < {ROWS - 1}) " + FILL)
    db.execute("INSERT INTO ledger SELECT n + 1, 1, n, x'78' FROM rows")
    db.execute("COMMIT")


FILL = """
INSERT INTO rows SELECT n, 'job', printf('%08d', n),
    iif(n % 2, 'b', 'a'), 'kind', 'source', iif(n % 10000 = 0, 'rare', 'common'), iif(n % 2, 'odd', 'even'),
    iif(n % 3, 'lane', NULL), n, iif(n % 7, 'prune', 'lease'), n, x'00'
FROM n
"""
