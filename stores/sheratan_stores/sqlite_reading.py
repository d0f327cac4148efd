"""The SQLite store read as a whole beside who writes: one read-only connection in one read transaction.

Nothing is locked and no file is changed. While it is open the log (the WAL) cannot be begun anew and grows. A file that
nobody has open and whose log is folded in is read as one that does not change, and at the end it must not have.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

from sheratan_hub.storage import Key, Page, Row, StoreRefused
from sheratan_hub.storage_tools import PIECE, PIECE_BYTES, About, Batch, Finding
from sheratan_stores import sqlite_format, sqlite_rows
from sheratan_stores.lock import held_by
from sheratan_stores.sqlite_connection import BUSY_SECONDS
from sheratan_stores.sqlite_rows import FIELDS, row_of

T = TypeVar("T")

STILL = "mode=ro&immutable=1"
"""How a file is opened that nobody has open and whose log is folded in."""

FOUND_MAX = 100
"""So much damage is named at most."""

SELECT_ROWS = f"SELECT n, {FIELDS} FROM rows INDEXED BY rows_key WHERE kind = ? AND id > ? ORDER BY id LIMIT ?"  # noqa: S608
SELECT_FIRST = f"SELECT n, {FIELDS} FROM rows INDEXED BY rows_key WHERE kind = ? ORDER BY id LIMIT ?"  # noqa: S608
SELECT_BATCHES = (
    "SELECT first, n, at, lines FROM ledger WHERE first >= "
    "coalesce((SELECT max(first) FROM ledger WHERE first <= ?), 0) ORDER BY first"
)


def log_of(path: Path) -> Path:
    """SQLite's log beside the file."""
    return path.with_name(f"{path.name}-wal")


def lock_of(path: Path) -> Path:
    """The file that a store's lock is on."""
    return path.with_name(f"{path.name}.lock")


def has_log(path: Path) -> bool:
    """Whether there is something in the log that the file does not have."""
    try:
        return log_of(path).stat().st_size > 0
    except OSError:
        return False


def mode_for(path: Path, holder: str) -> str:
    """How to open a file so that nothing is changed: beside who writes, after a crash, or as it lies there."""
    if holder:
        return "mode=ro"
    if not has_log(path):
        return STILL
    index = path.with_name(f"{path.name}-shm")
    return "mode=ro&readonly_shm=1" if index.exists() else "mode=ro"


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection that several threads may use in turn. Raises sqlite3.Error."""
    return sqlite3.connect(
        f"{path.as_uri()}?{mode}", uri=True, isolation_level=None, timeout=BUSY_SECONDS, check_same_thread=False
    )


def stamp(path: Path) -> tuple[object, ...]:
    """What shows that a file was changed, or that a log has begun."""
    try:
        seen = os.stat(path)
    except OSError:
        return ()
    return seen.st_ino, seen.st_size, seen.st_mtime_ns, has_log(path)


@contextmanager
def reading(path: Path, *, is_open: bool) -> Iterator[SqliteReading]:
    """The store in the file at `path`. `is_open`: this process has it open, so that only SQLite may touch the file.

    (Closing a file lets go of all locks that a process has on it, SQLite's own among them.)
    """
    holder = held_by(lock_of(path))
    mode, before = mode_for(path, holder), stamp(path)
    if not is_open and sqlite_format.look(path, whole=False, mode=mode) == 0:
        raise StoreRefused(f"there is no store at {path}")
    try:
        with translated(path), closing(connect(path, mode)) as db:
            db.execute("PRAGMA query_only = 1")
            db.execute("BEGIN")
            yield SqliteReading(db, path, holder)
    except StoreRefused:
        _still(path, mode, before)
        raise
    _still(path, mode, before)


def _still(path: Path, mode: str, before: tuple[object, ...]) -> None:
    if mode == STILL and stamp(path) != before:
        raise StoreRefused(f"{path} was changed while it was read; try again") from None


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """What SQLite's errors mean for who only reads."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        what = "is damaged" if code in sqlite_format.DAMAGE else "cannot be read"
        raise StoreRefused(f"{path} {what}: {error}") from error
    except OSError as error:
        raise StoreRefused(f"{path} cannot be read: {error.strerror}") from error


class SqliteReading:
    """See `Reading`. Made inside a transaction, which its first statement begins."""

    def __init__(self, db: sqlite3.Connection, path: Path, holder: str) -> None:
        self._db, self._path = db, path
        with translated(path):
            version = sqlite_format.noted(db, "format")
            self.seq = sqlite_rows.next_seq(db)
        self.about = About(str(path), version, holder)
        if version < len(sqlite_format.STEPS):
            raise StoreRefused(f"{path} has the older format {version}; start a hub with it once, which upgrades it")

    async def kinds(self) -> list[str]:
        """See `Reading.kinds`."""
        return await self._run(self._kinds)

    def _kinds(self) -> list[str]:
        found: list[str] = []
        record = self._db.execute("SELECT kind FROM rows ORDER BY kind LIMIT 1").fetchone()
        while record is not None:
            found.append(record[0])
            record = self._db.execute("SELECT kind FROM rows WHERE kind > ? ORDER BY kind LIMIT 1", record).fetchone()
        return found

    async def rows(self, kind: str, after: str | None = None, limit: int = PIECE) -> list[Row]:
        """See `Reading.rows`."""
        return await self._run(lambda: self._rows(kind, after, limit))

    def _rows(self, kind: str, after: str | None, limit: int) -> list[Row]:
        if after is None:
            records = self._db.execute(SELECT_FIRST, (kind, limit))
        else:
            records = self._db.execute(SELECT_ROWS, (kind, after, limit))
        rows, size = [], 0
        for record in records:
            rows.append(row_of(record))
            size += len(record[3])
            if size >= PIECE_BYTES:
                break
        return rows

    async def fetch(self, keys: Iterable[Key]) -> list[Row]:
        """See `Reading.fetch`."""
        wanted = set(keys)
        return await self._run(lambda: list(map(row_of, sqlite_rows.by_keys(self._db, wanted))))

    async def counts(self) -> dict[str, int]:
        """See `Reading.counts`."""
        return await self._run(lambda: sqlite_rows.counts_from(self._db, ""))

    async def batches(self, after: int = 0, limit: int = PIECE) -> list[Batch]:
        """See `Reading.batches`."""
        return await self._run(lambda: self._batches(after, limit))

    def _batches(self, after: int, limit: int) -> list[Batch]:
        found, size = [], 0
        for first, n, at, blob in self._db.execute(SELECT_BATCHES, (after + 1,)):
            lines = blob.split(b"\n")
            if len(lines) != n:
                raise StoreRefused(f"{self._path} is damaged: the events from number {first} are {len(lines)}, not {n}")
            if first + n - 1 > after:
                found.append(Batch(first, at, lines))
                size += len(blob)
            if len(found) >= limit or size >= PIECE_BYTES:
                break
        return found

    async def findings(self) -> list[Finding]:
        """See `Reading.findings`: SQLite's own check of pages and indexes, and who may read the file."""
        found = await self._run(lambda: self._db.execute(f"PRAGMA integrity_check({FOUND_MAX})").fetchall())
        told = [Finding("damaged", str(self._path), " ".join(text.split())) for (text,) in found if text != "ok"]
        return told + list(readable_by_others(self._path))

    async def page(
        self,
        kind: str,
        labels: Sequence[str | None] = (),
        after: str | None = None,
        limit: int = 100,
        examine: int = 2000,
        newest: bool = False,
    ) -> Page:
        """See `Store.page`."""
        return await self._run(lambda: sqlite_rows.page(self._db, kind, labels, after, limit, examine, newest))

    async def heads(self, prefix: str = "") -> dict[str, int]:
        """See `Store.heads`."""
        return await self._run(lambda: sqlite_rows.heads_from(self._db, prefix))

    def copy_into(self, target: sqlite3.Connection) -> None:
        """Copy all pages as they are. Raises sqlite3.Error."""
        self._db.backup(target)

    async def _run(self, function: Callable[[], T]) -> T:
        def run() -> T:
            with translated(self._path):
                return function()

        return await asyncio.to_thread(run)


def readable_by_others(*paths: Path) -> Iterator[Finding]:
    """Files that others than the owner may read or write."""
    for path in paths:
        mode = path.stat().st_mode
        if mode & 0o077:
            text = f"others than its owner may use it (mode {mode & 0o777:04o}); chmod go= takes that from them"
            yield Finding("open_to_others", str(path), text, harmless=True)
