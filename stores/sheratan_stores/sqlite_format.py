"""The SQLite store's file: its tables, its format version with the way up to it, and the look before it is opened."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from sheratan_hub.storage import StoreRefused

APPLICATION_ID = 0x53484855
"""Marks a SQLite file as ours ("SHHU"), in the place SQLite's header has for that."""

CHECK_BYTES = 32 * 1024 * 1024
"""Up to this size a file is checked whole when opened (30 MiB took 0.04 s); damage in a larger one shows in use."""

DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
"""Errors that speak of what is in the file: a plain error means that a table we made is not there."""

# doc stands last, or reading a label behind a doc of 1 MiB would walk through all of its pages. A label's index
# holds the kind as well, because a page asks for both, and an id alone does not say where to go on.
FORMAT_1 = """
CREATE TABLE rows (
    n INTEGER PRIMARY KEY, kind TEXT NOT NULL, id TEXT NOT NULL,
    l0 TEXT, l1 TEXT, l2 TEXT, l3 TEXT, l4 TEXT,
    lane TEXT, ord INTEGER NOT NULL, agenda TEXT, due_at INTEGER NOT NULL, doc BLOB NOT NULL
);
CREATE UNIQUE INDEX rows_key ON rows (kind, id);
CREATE INDEX rows_lane ON rows (lane, ord, id) WHERE lane IS NOT NULL;
CREATE INDEX rows_agenda ON rows (agenda, due_at, id) WHERE agenda IS NOT NULL;
CREATE INDEX rows_l0 ON rows (l0, kind, id) WHERE l0 IS NOT NULL;
CREATE INDEX rows_l1 ON rows (l1, kind, id) WHERE l1 IS NOT NULL;
CREATE INDEX rows_l2 ON rows (l2, kind, id) WHERE l2 IS NOT NULL;
CREATE INDEX rows_l3 ON rows (l3, kind, id) WHERE l3 IS NOT NULL;
CREATE INDEX rows_l4 ON rows (l4, kind, id) WHERE l4 IS NOT NULL;
CREATE TABLE counts (facet TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE ledger (first INTEGER PRIMARY KEY, n INTEGER NOT NULL, at INTEGER NOT NULL, lines BLOB NOT NULL);
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('format', 0), ('seq', 1)
"""

STEPS: list[str] = [FORMAT_1]
"""Step i leads from format i to format i + 1. A step that has been released is never changed."""


def look(path: Path, *, whole: bool = True, mode: str = "") -> int:
    """The format of the file at `path`, 0 if there is none yet. Changes nothing; raises `StoreRefused`.

    `whole`: what is in it is looked at, too, if it is not large. `mode`: how SQLite is to open it.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StoreRefused(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        return 0
    if start != b"SQLite format 3\0":
        raise StoreRefused(f"{path} is not a SQLite database")
    return _look_inside(path, mode or _mode(path), whole=whole)


def _mode(path: Path) -> str:
    # A log that was not folded in must be read too, but read-only: the last connection that may write would fold it.
    log = path.with_name(f"{path.name}-wal")
    return "mode=ro" if log.exists() and log.stat().st_size else "immutable=1"


def _look_inside(path: Path, mode: str, *, whole: bool) -> int:
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True)) as db:
            version = _format(db, path)
            found = _first_damage(db, path) if whole else None
    except sqlite3.Error as error:
        what = "is damaged" if error.sqlite_errorcode & 0xFF in DAMAGE else "cannot be opened"
        raise StoreRefused(f"{path} {what}: {error}") from error
    if found:
        raise StoreRefused(f"{path} is damaged: {found}")
    return version


def _format(db: sqlite3.Connection, path: Path) -> int:
    (mark,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if mark == 0 and tables == 0:
        return 0
    if mark != APPLICATION_ID:
        raise StoreRefused(f"{path} is a SQLite database of another program")
    version = noted(db, "format")
    if version > len(STEPS):
        raise StoreRefused(
            f"{path} has format {version}, this version knows formats up to {len(STEPS)}; "
            "start the version of Sheratan Hub that wrote it, or a newer one"
        )
    return version


def noted(db: sqlite3.Connection, key: str) -> int:
    """A number that the file keeps: its format, or that of its next event. Raises sqlite3.Error."""
    record = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    if record is None or not isinstance(record[0], int):
        damage = sqlite3.DatabaseError(f"it does not say its {key}")
        damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damage
    return record[0]


def _first_damage(db: sqlite3.Connection, path: Path) -> str | None:
    if path.stat().st_size > CHECK_BYTES:
        return None
    (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    return None if found == "ok" else " ".join(found.split())


def upgrade(db: sqlite3.Connection, version: int) -> None:
    """Take the steps from format `version` to the present one, all in one transaction."""
    if version == len(STEPS):
        return
    db.execute("BEGIN IMMEDIATE")
    for step in STEPS[version:]:
        for statement in step.split(";"):
            db.execute(statement)
    db.execute("UPDATE meta SET value = ? WHERE key = 'format'", (len(STEPS),))
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute("COMMIT")
