"""The SQLite store's statements: each function runs on a connection's thread, inside a transaction it did not begin."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, compress, count, islice, takewhile
from operator import ne
from typing import Any

import msgspec

from sheratan_hub.storage import Conflict, Due, Key, LedgerLine, Page, Ready, Row
from sheratan_stores.sqlite_format import noted

COLUMNS = ("kind", "id", "doc", "l0", "l1", "l2", "l3", "l4", "lane", "ord", "agenda", "due_at")
FIELDS = ", ".join(COLUMNS)

Record = tuple[Any, ...]
"""A row as SQLite gives it: its number `n`, then `COLUMNS`."""


def row_of(record: Record) -> Row:
    """The row that a record holds."""
    return Row(record[1], record[2], record[3], record[4:9], *record[9:])


def values_of(row: Row) -> Record:
    """A row's values in the order of `COLUMNS`."""
    return (row.kind, row.id, row.doc, *row.labels, row.lane, row.order, row.agenda, row.due_at)


# Reading

SELECT = f"SELECT n, {FIELDS} FROM rows"  # noqa: S608
WANTED = "(SELECT value FROM json_each(?)) AS wanted"
SELECT_KEYS = f"SELECT n, {FIELDS} FROM {WANTED} CROSS JOIN rows ON kind = ? AND id = wanted.value"  # noqa: S608
SELECT_KEY = f"{SELECT} WHERE id = ? AND kind = ?"
SELECT_READY = f"{SELECT} WHERE lane = ? ORDER BY ord, id LIMIT ?"
SELECT_DUE = f"{SELECT} WHERE agenda = ? AND due_at <= ? ORDER BY due_at, id LIMIT ?"
SELECT_COUNTS = f"SELECT facet, n FROM {WANTED} CROSS JOIN counts ON facet = wanted.value"  # noqa: S608
SELECT_COUNT = "SELECT facet, n FROM counts WHERE facet = ?"


def by_keys(db: sqlite3.Connection, keys: Iterable[Key]) -> list[Record]:
    """The records of these keys that exist: one statement a kind."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for kind, id in keys:
        kinds[kind].append(id)
    return [record for kind, ids in kinds.items() for record in each(db, SELECT_KEYS, SELECT_KEY, ids, kind)]


def ready(db: sqlite3.Connection, selection: Ready, limit: int) -> list[Record]:
    """The first records of a lane."""
    return db.execute(SELECT_READY, (selection.lane, limit)).fetchall()


def due(db: sqlite3.Connection, selection: Due, limit: int) -> list[Record]:
    """The first records of an agenda that are due."""
    return db.execute(SELECT_DUE, (*selection, limit)).fetchall()


def counts_of(db: sqlite3.Connection, facets: Iterable[str]) -> dict[str, int]:
    """The counters of these facets, 0 where there is none."""
    found = dict.fromkeys(facets, 0)
    found.update(each(db, SELECT_COUNTS, SELECT_COUNT, list(found)) if found else ())
    return found


def each(db: sqlite3.Connection, together: str, alone: str, texts: list[str], *more: str) -> Iterable[Record]:
    """The records for all `texts` by one statement over a JSON array.

    SQLite's JSON ends a text at a NUL, so that where one has it they are asked for one by one.
    """
    array = msgspec.json.encode(texts)
    if b"\\u0000" in array:
        return [record for text in texts for record in db.execute(alone, (text, *more))]
    return db.execute(together, (array.decode(), *more)).fetchall()


def counts_from(db: sqlite3.Connection, prefix: str) -> dict[str, int]:
    """The counters that start with `prefix` and are not 0."""
    return dict(starting_with(prefix, db.execute("SELECT facet, n FROM counts WHERE facet >= ? AND n <> 0", (prefix,))))


# From lane to lane, one search each: what lies in a lane behind its head is never touched.
HEADS = """
WITH RECURSIVE head (lane, ord) AS (
    SELECT * FROM (SELECT lane, ord FROM rows WHERE lane >= ? ORDER BY lane, ord LIMIT 1)
    UNION ALL
    SELECT next.lane, next.ord FROM head CROSS JOIN rows AS next
    ON next.n = (SELECT n FROM rows WHERE lane > head.lane ORDER BY lane, ord LIMIT 1)
) SELECT lane, ord FROM head
"""


def heads_from(db: sqlite3.Connection, prefix: str) -> dict[str, int]:
    """The lanes that start with `prefix` and the order of their first row."""
    return dict(starting_with(prefix, db.execute(HEADS, (prefix,))))


def starting_with(prefix: str, records: Iterable[Record]) -> Iterator[Record]:
    """The records, sorted by their first value, up to the first that does not start with `prefix`."""
    for record in records:
        if not record[0].startswith(prefix):
            return
        yield record


MOST_TELLING = (3, 4, 2, 1, 0)
"""Label slots, the one that usually leaves the fewest rows first: mission, node, source, kind, status."""


def page(
    db: sqlite3.Connection,
    kind: str,
    labels: Sequence[str | None],
    after: str | None,
    limit: int,
    examine: int,
    newest: bool,
) -> Page:
    """See `Store.page`. One index gives the rows to examine, in order; the other labels are compared."""
    slots = [slot for slot in MOST_TELLING if slot < len(labels) and labels[slot] is not None]
    walk, given = index_walk(kind, labels, slots, after, newest)
    rest = " AND ".join(f"l{slot} = ?" for slot in slots[1:]) or "TRUE"
    records = db.execute(
        f"SELECT n, {FIELDS} FROM (SELECT * {walk} LIMIT ?) WHERE {rest} LIMIT ?",  # noqa: S608
        (*given, examine, *(labels[slot] for slot in slots[1:]), limit),
    )
    rows = list(map(row_of, records))
    if len(rows) < limit:
        end = db.execute(f"SELECT id {walk} LIMIT 2 OFFSET ?", (*given, examine - 1)).fetchall()
        return Page(rows, end[0][0] if len(end) == 2 else None)
    walk, given = index_walk(kind, labels, slots, rows[-1].id, newest)
    beyond = db.execute(f"SELECT id {walk} LIMIT 1", given).fetchone()
    return Page(rows, rows[-1].id if beyond else None)


def index_walk(
    kind: str, labels: Sequence[str | None], slots: list[int], after: str | None, newest: bool
) -> tuple[str, list[Any]]:
    """The end of a SELECT that follows one index in id order, with its values."""
    index = f"rows_l{slots[0]}" if slots else "rows_key"
    terms = [f"l{slot} = ?" for slot in slots[:1]] + ["kind = ?"]
    given: list[Any] = [labels[slot] for slot in slots[:1]] + [kind]
    if after is not None:
        terms.append("id < ?" if newest else "id > ?")
        given.append(after)
    order = "id DESC" if newest else "id"
    return f"FROM rows INDEXED BY {index} WHERE {' AND '.join(terms)} ORDER BY {order}", given


def events_after(db: sqlite3.Connection, after: int, limit: int) -> list[LedgerLine]:
    """See `Store.events`. The batch that holds the next line may begin before it."""
    batches = db.execute(
        "SELECT first, lines FROM ledger WHERE first >= "
        "coalesce((SELECT max(first) FROM ledger WHERE first <= ?), 0) ORDER BY first",
        (after + 1,),
    )
    lines = chain.from_iterable(map(LedgerLine, count(first), blob.split(b"\n")) for first, blob in batches)
    return list(islice((line for line in lines if line.seq > after), limit))


# Writing

ONE = f"({', '.join('?' * len(COLUMNS))})"
INSERTS = [(size, f"INSERT INTO rows ({FIELDS}) VALUES {', '.join([ONE] * size)}") for size in (64, 8, 1)]  # noqa: S608
"""By how many rows a statement inserts. Each statement lets go of the GIL once, and has to wait for it once."""


def insert(db: sqlite3.Connection, rows: list[Row]) -> None:
    """Insert rows that must not exist. Raises `Conflict`."""
    values = list(map(values_of, rows))
    try:
        for size, statement in INSERTS:
            while len(values) >= size:
                db.execute(statement, list(chain.from_iterable(values[:size])))
                del values[:size]
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_UNIQUE:
            raise
        raise Conflict("the key of a new row exists already") from error


def update(db: sqlite3.Connection, rows: list[Row], loaded: dict[Key, Record]) -> None:
    """Update rows, given the records they were loaded as, grouped by the columns that differ.

    Only these are named: a named column costs a write to each of its indexes, even if its value is the same.
    """
    groups: dict[tuple[bool, ...], list[Record]] = defaultdict(list)
    for row in rows:
        record = loaded.pop(row.key, None)
        if record is None:
            raise ValueError(f"{row.key} is put but was not loaded in this transaction, or is put twice")
        values = values_of(row)
        differs = tuple(map(ne, values, record[1:]))
        groups[differs].append((*compress(values, differs), record[0]))
    for differs, records in groups.items():
        columns = ", ".join(f"{column} = ?" for column in compress(COLUMNS, differs))
        if columns:
            db.executemany(f"UPDATE rows SET {columns} WHERE n = ?", records)  # noqa: S608


def delete(db: sqlite3.Connection, keys: list[Key]) -> None:
    """Delete the rows of these keys, where they exist."""
    db.executemany("DELETE FROM rows WHERE kind = ? AND id = ?", keys)


ADD = "INSERT INTO counts VALUES (?, ?) ON CONFLICT (facet) DO UPDATE SET n = n + excluded.n"


def add_counts(db: sqlite3.Connection, deltas: dict[str, int]) -> None:
    """Add to the counters. Those that fall to 0 go, or finished missions would stay for ever."""
    db.executemany(ADD, [(facet, delta) for facet, delta in deltas.items() if delta])
    fallen = [(facet,) for facet, delta in deltas.items() if delta < 0]
    db.executemany("DELETE FROM counts WHERE facet = ? AND n = 0", fallen)


def add_lines(db: sqlite3.Connection, first: int, at: int, lines: list[bytes]) -> None:
    """Write one ledger batch."""
    blob = b"\n".join(lines)
    if blob.count(b"\n") != len(lines) - 1:
        raise ValueError("a ledger line holds a newline")
    db.execute("INSERT INTO ledger VALUES (?, ?, ?, ?)", (first, len(lines), at, blob))


def next_seq(db: sqlite3.Connection) -> int:
    """The number the next ledger line gets: after the last there is, or the last that was pruned."""
    last = db.execute("SELECT first + n FROM ledger ORDER BY first DESC LIMIT 1").fetchone()
    return max(noted(db, "seq"), *(last or (1,)))


def prune(db: sqlite3.Connection, before: int, seq: int, most: int) -> tuple[int, int]:
    """Delete the first ledger batches while they are older than `before`, at most so many.

    Returns how many batches and how many lines went. `seq`, the next number, is noted first, as the batch
    that would tell it may be among them.
    """
    batches = db.execute("SELECT first, n, at FROM ledger ORDER BY first LIMIT ?", (most,))
    old = list(takewhile(lambda batch: batch[2] < before, batches))
    if old:
        db.execute("UPDATE meta SET value = ? WHERE key = 'seq'", (seq,))
        db.execute("DELETE FROM ledger WHERE first <= ?", (old[-1][0],))
    return len(old), sum(n for _, n, _ in old)
