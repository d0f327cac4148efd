"""What can still be read of a damaged SQLite store, row by row, and what is known of the rest.

The rows are read by their numbers. Where that fails, the next number from which it works is looked for, and what lies
between is lost; the index of keys, where it can be read, tells the names of what was there.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sheratan_hub.storage import StoreRefused
from sheratan_hub.storage_tools import Salvage
from sheratan_stores import sqlite_format
from sheratan_stores.lock import held_by
from sheratan_stores.sqlite_filling import INSERT, new_file, writing
from sheratan_stores.sqlite_reading import connect, lock_of, mode_for, reading, translated
from sheratan_stores.sqlite_rows import COLUMNS, FIELDS, Record

FAR = 1 << 62
NAMED_MAX = 1000
"""So many lost rows are named."""

PIECE = 1000

ROWS = f"SELECT n, {FIELDS} FROM rows NOT INDEXED WHERE n >= ? ORDER BY n"  # noqa: S608
LEDGER = "SELECT first, n, at, lines FROM ledger WHERE first >= ? ORDER BY first"
KEYS = "SELECT kind, id FROM rows INDEXED BY rows_key ORDER BY kind, id"

Read = Callable[[int, int], list[Record]]
"""Records from a number on, at most so many. Raises sqlite3.Error."""


@contextmanager
def salvaging(path: Path, scratch: Path) -> Iterator[Salvage]:
    """The readable part of the file at `path`, copied into a file in `scratch`. Nobody may have it open."""
    holder = held_by(lock_of(path))
    if holder:
        raise StoreRefused(f"{path} is held by {holder}; a store is repaired while nobody has it open")
    draft = scratch / "salvaged.db"
    with translated(path), closing(connect(path, mode_for(path, ""))) as source:
        source.text_factory = bytes
        source.execute("PRAGMA writable_schema = ON")  # else a file that was cut off is not read at all
        _ours(source, path)
        with writing(draft), closing(new_file(draft)) as target:  # reading has its errors translated by itself
            target.execute("BEGIN")
            lost = [*_rows(source, target, path), *_counters(source, target, path), *_rest(source, target, path)]
            target.execute("COMMIT")
    with reading(draft, is_open=False) as found:
        yield Salvage(found, lost)


def _ours(source: sqlite3.Connection, path: Path) -> None:
    """Refuse what is no store, a newer one, and what is damaged where everything begins."""
    (mark,) = source.execute("PRAGMA application_id").fetchone()
    if mark != sqlite_format.APPLICATION_ID:
        raise StoreRefused(f"{path} is a SQLite database of another program")
    try:
        version = sqlite_format.noted(source, "format")
    except sqlite3.DatabaseError:
        version = len(sqlite_format.STEPS)  # that page is lost; rows tell for themselves
    if version != len(sqlite_format.STEPS):
        raise StoreRefused(f"{path} has format {version}, and this version repairs format {len(sqlite_format.STEPS)}")


def _rows(source: sqlite3.Connection, target: sqlite3.Connection, path: Path) -> Iterator[str]:
    gaps: list[str] = []
    insert = INSERT.replace("INSERT", "INSERT OR REPLACE", 1)
    for record in _readable(lambda at, most: source.execute(f"{ROWS} LIMIT ?", (at, most)).fetchall(), "rows", gaps):
        values = _texts(record)
        if values is None:
            gaps.append(f"row number {record[0]} of the file holds what is no row")
        else:
            target.execute(insert, values)
    yield from (f"{path}: {gap}" for gap in gaps)
    if gaps:
        yield from _missing(source, target)


def _texts(record: Record) -> list[object] | None:
    """The values of a row, whose texts were read as bytes; None if it cannot be one."""
    values: list[object] = []
    for name, value in zip(COLUMNS, record[1:], strict=True):
        if name in ("ord", "due_at"):
            good = isinstance(value, int)
        elif name in ("kind", "id", "doc"):
            good = isinstance(value, bytes)
        else:
            good = value is None or isinstance(value, bytes)
        if not good:
            return None
        try:
            values.append(value.decode() if isinstance(value, bytes) and name != "doc" else value)
        except UnicodeDecodeError:
            return None
    return values


def _missing(source: sqlite3.Connection, target: sqlite3.Connection) -> Iterator[str]:
    """The names of rows that the index of keys knows, as far as it can be read, and that could not be read."""
    named = 0
    try:
        for kind, id in source.execute(KEYS):
            if not (isinstance(kind, bytes) and isinstance(id, bytes)):
                continue
            name = kind.decode(errors="replace"), id.decode(errors="replace")
            if target.execute("SELECT 1 FROM rows WHERE kind = ? AND id = ?", name).fetchone() is None:
                named += 1
                if named <= NAMED_MAX:
                    yield f"{name[0]} {name[1]} could not be read"
    except sqlite3.DatabaseError:
        yield "the index of keys is damaged, too, so that not all that is lost can be named"
    if named > NAMED_MAX:
        yield f"and {named - NAMED_MAX} more"


def _counters(source: sqlite3.Connection, target: sqlite3.Connection, path: Path) -> Iterator[str]:
    """The counters up to the first that cannot be read: what they tell of rows that are gone cannot be counted anew."""
    try:
        for facet, n in source.execute("SELECT facet, n FROM counts ORDER BY facet"):
            if isinstance(facet, bytes) and isinstance(n, int):
                values = facet.decode(errors="replace"), n
                target.execute("INSERT OR REPLACE INTO counts VALUES (?, ?)", values)
    except sqlite3.DatabaseError:
        yield f"{path}: not all counters can be read; those of jobs that were pruned, which missions keep, are lost"


def _rest(source: sqlite3.Connection, target: sqlite3.Connection, path: Path) -> Iterator[str]:
    """The events, and the number of the next one."""
    gaps: list[str] = []
    following = 1
    for record in _readable(
        lambda at, most: source.execute(f"{LEDGER} LIMIT ?", (at, most)).fetchall(), "events", gaps
    ):
        first, n, at, lines = record
        whole = all(isinstance(one, int) for one in (first, n, at)) and isinstance(lines, bytes)
        if whole and lines.count(b"\n") == n - 1 and first >= following:
            target.execute("INSERT INTO ledger VALUES (?, ?, ?, ?)", record)
            following = first + n
            continue
        gaps.append(f"the events from number {first} on cannot be read")
    try:
        noted = sqlite_format.noted(source, "seq")
    except sqlite3.DatabaseError:
        noted = 1
    target.execute("UPDATE meta SET value = ? WHERE key = 'seq'", (max(noted, following),))
    yield from (f"{path}: {gap}" for gap in gaps)


def _readable(read: Read, what: str, gaps: list[str]) -> Iterator[Record]:
    """All records that can be read, by number; of each part that cannot, a few words."""
    at = 0
    while True:
        try:
            records = read(at, PIECE)
        except sqlite3.DatabaseError:
            records = []
            for record in _one_by_one(read, at):
                records.append(record)
            at = records[-1][0] + 1 if records else at
            yield from records
            beyond = _next_readable(read, at)
            gaps.append(f"{what} numbered {at} to {beyond - 1 if beyond < FAR else 'the last'} cannot be read")
            if beyond >= FAR:
                return
            at = beyond
            continue
        yield from records
        if len(records) < PIECE:
            return
        at = records[-1][0] + 1


def _one_by_one(read: Read, at: int) -> Iterator[Record]:
    """The records up to the first that cannot be read."""
    while True:
        try:
            records = read(at, 1)
        except sqlite3.DatabaseError:
            return
        if not records:
            return
        yield records[0]
        at = records[0][0] + 1


def _next_readable(read: Read, at: int) -> int:
    """The smallest number behind `at`, which cannot be read, from which it can; `FAR` if there is none."""
    step = 1
    while step < FAR and not _works(read, at + step):
        step *= 2
    if step >= FAR:
        return FAR
    bad, good = at + step // 2, at + step
    while good - bad > 1:
        middle = (good + bad) // 2
        if _works(read, middle):
            good = middle
        else:
            bad = middle
    found = read(good, 1)
    return int(found[0][0]) if found else FAR


def _works(read: Read, at: int) -> bool:
    try:
        read(at, 1)
    except sqlite3.DatabaseError:
        return False
    return True
