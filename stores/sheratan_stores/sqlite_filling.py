"""A SQLite store that is made out of given rows and events: under a draft's name, indexes last, synced, then linked."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from sheratan_hub.storage import Row, StoreDown, StoreFull, StoreRefused
from sheratan_hub.storage_tools import Batch
from sheratan_stores import sqlite_format
from sheratan_stores.file_disk import sync_folder
from sheratan_stores.sqlite_connection import FULL
from sheratan_stores.sqlite_reading import connect, log_of, reading
from sheratan_stores.sqlite_rows import FIELDS, Record, values_of

T = TypeVar("T")

INSERT = f"INSERT INTO rows ({FIELDS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
FAST = ("journal_mode = OFF", "synchronous = OFF", "cache_size = -65536", "temp_store = MEMORY")


@contextmanager
def filling(path: Path) -> Iterator[SqliteFilling]:
    """A store that becomes the file at `path`, where nothing may lie that SQLite would take for its log or journal."""
    for there in (path, log_of(path), path.with_name(f"{path.name}-journal")):
        if there.exists() or there.is_symlink():
            raise StoreRefused(f"{there} is there already, and nothing is overwritten")
    made = SqliteFilling(path)
    try:
        with writing(path):
            made.begin()
        yield made
    finally:
        made.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What errors mean for who makes a file."""
    try:
        yield
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", 0) & 0xFF in FULL
        text = f"{path} cannot be written: {error}"
        raise StoreFull(text) if full else StoreDown(text) from error
    except OSError as error:
        raise StoreDown(f"{path} cannot be written: {error.strerror}") from error


class SqliteFilling:
    """See `Filling`."""

    _db: Any = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self._draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._indexes: list[tuple[str, str]] = []

    def begin(self) -> None:
        """Make the draft, without its indexes. Raises OSError, sqlite3.Error."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            self._draft.unlink()
        self._db = new_file(self._draft)
        found = self._db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
        self._indexes = found.fetchall()
        for name, _ in self._indexes:
            self._db.execute(f"DROP INDEX {name}")
        self._db.execute("BEGIN")

    async def rows(self, rows: Sequence[Row]) -> None:
        """See `Filling.rows`."""
        await self._many(INSERT, map(values_of, rows))

    async def batches(self, batches: Sequence[Batch]) -> None:
        """See `Filling.batches`."""
        records = ((first, len(lines), at, b"\n".join(lines)) for first, at, lines in batches)
        await self._many("INSERT INTO ledger VALUES (?, ?, ?, ?)", records)

    async def finish(self, seq: int, counts: dict[str, int]) -> None:
        """See `Filling.finish`."""
        await self._run(lambda: self._finish(seq, counts))

    def _finish(self, seq: int, counts: dict[str, int]) -> None:
        db = self._db
        db.executemany("INSERT INTO counts VALUES (?, ?)", [(facet, n) for facet, n in counts.items() if n])
        db.execute("UPDATE meta SET value = ? WHERE key = 'seq'", (seq,))
        for _, sql in self._indexes:
            db.execute(sql)
        db.execute("COMMIT")
        db.close()
        synced(self._draft)
        try:
            os.link(self._draft, self._path)
        except FileExistsError:
            raise StoreRefused(f"{self._path} is there already, and nothing is overwritten") from None
        self._draft.unlink()
        sync_folder(self._path.parent)

    def close(self) -> None:
        """Remove the draft, if it is still one."""
        if self._db is not None:
            self._db.close()
        with suppress(OSError):
            self._draft.unlink()

    async def _many(self, statement: str, records: Iterable[Record]) -> None:
        def run() -> None:  # no cursor leaves its thread: it would be closed in another, while this one goes on
            self._db.executemany(statement, records)

        await self._run(run)

    async def _run(self, function: Callable[[], T]) -> T:
        def run() -> T:
            with writing(self._path):
                return function()

        return await asyncio.to_thread(run)


def new_file(path: Path) -> sqlite3.Connection:
    """An empty store of the present format, for quick writing without any safety. Raises OSError, sqlite3.Error."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    db = connect(path, "mode=rw")
    try:
        for pragma in FAST:
            db.execute(f"PRAGMA {pragma}")
        sqlite_format.upgrade(db, 0)
    except sqlite3.Error:
        db.close()
        raise
    return db


def synced(path: Path) -> None:
    """Wait until a file is on disk. Raises OSError."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def copy(path: Path, to: Path) -> None:
    """Copy the file page by page, as of one moment, beside who writes. Raises `StoreRefused`, `StoreDown`."""
    with reading(path, is_open=False) as source, writing(to):
        os.close(os.open(to, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with closing(connect(to, "mode=rw")) as target:
            target.execute("PRAGMA synchronous = OFF")
            source.copy_into(target)
            target.execute("PRAGMA journal_mode = DELETE")
        synced(to)
        sync_folder(to.parent)


def compact(path: Path) -> None:
    """Write the file anew without what was deleted, and fold the log in. Only for who holds the lock."""
    with writing(path), closing(connect(path, "mode=rw")) as db:
        db.execute("PRAGMA synchronous = FULL")
        db.execute("VACUUM")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
