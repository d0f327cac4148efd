"""The SQLite store: one file, nothing to install, one writing connection on a thread of its own.

A transaction costs two trips to that thread: `load` (BEGIN IMMEDIATE and every select) and `save` (every
write and COMMIT). Reads run beside it on a second, read-only connection and see what is committed.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

from sheratan_hub.clock import Clock
from sheratan_hub.storage import (
    API,
    Changes,
    Key,
    LedgerLine,
    Loaded,
    Page,
    Row,
    StoreDown,
    StoreFull,
    StoreRefused,
    Wants,
)
from sheratan_stores import sqlite_format, sqlite_rows
from sheratan_stores.lock import FileLock
from sheratan_stores.sqlite_connection import (
    FULL,
    HARMLESS,
    READER,
    WRITER,
    Connection,
    begin,
    commit,
    set_pragmas,
    snapshot,
)
from sheratan_stores.sqlite_rows import Record, row_of
from sheratan_stores.sqlite_tools import SqliteTools

T = TypeVar("T")

PRUNE_BATCHES = 500
"""How many ledger batches one transaction prunes, so that the first prune after a change of retention blocks nobody."""


class SqliteStore(SqliteTools):
    """Keeps everything in the file named by the URL: the text after `sqlite://`, as it stands."""

    api: ClassVar[int] = API
    shared: ClassVar[bool] = False

    def __init__(self, url: str, clock: Clock) -> None:
        self.path = Path(url.partition("://")[2]).absolute()
        self.clock = clock
        self.seq = 0
        self._transaction = asyncio.Lock()
        self._file_lock = FileLock(self.path.with_name(self.path.name + ".lock"), clock)
        self._writer: Connection | None = None
        self._reader: Connection | None = None
        self._down = ""

    async def open(self) -> None:
        """See `Store.open`."""
        if self._writer is not None:
            raise ValueError(f"{self.path} is open already")
        opened = False
        try:
            version = self._prepare()
            self._writer = await self._connect()
            await self.write(partial(self._set_up, version))
            self._reader = await self._connect()
            await self._run(self._reader, partial(set_pragmas, READER))
            opened = True
        finally:
            if not opened:
                await self._let_go()

    async def close(self) -> None:
        """See `Store.close`."""
        async with self._transaction:
            await self._let_go()

    async def now(self) -> int:
        """See `Store.now`."""
        return self.clock.now()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[SqliteTx]:
        """See `Store.begin`."""
        async with self._transaction:
            tx = SqliteTx(self)
            try:
                yield tx
            finally:
                if tx.began and not tx.committed and self._writer is not None:
                    await self._writer.run(self._roll_back)

    async def fetch(self, keys: Sequence[Key]) -> list[Row]:
        """See `Store.fetch`."""
        return await self._read(lambda db: list(map(row_of, sqlite_rows.by_keys(db, set(keys)))))

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
        return await self._read(lambda db: sqlite_rows.page(db, kind, labels, after, limit, examine, newest))

    async def counts(self, prefix: str = "") -> dict[str, int]:
        """See `Store.counts`."""
        return await self._read(lambda db: sqlite_rows.counts_from(db, prefix))

    async def heads(self, prefix: str = "") -> dict[str, int]:
        """See `Store.heads`."""
        return await self._read(lambda db: sqlite_rows.heads_from(db, prefix))

    async def events(self, after: int = 0, limit: int = 1000) -> list[LedgerLine]:
        """See `Store.events`."""
        return await self._read(lambda db: sqlite_rows.events_after(db, after, limit))

    async def prune_events(self, before: int) -> int:
        """See `Store.prune_events`. Goes in steps, so that transactions get in between."""
        total, batches = 0, PRUNE_BATCHES
        while batches == PRUNE_BATCHES:
            async with self.begin() as tx:
                batches, lines = await tx.prune(before)
            total += lines
        return total

    async def hint(self, timeout_ms: int) -> None:
        """See `Store.hint`: nobody else may write."""
        await self.clock.sleep(timeout_ms)

    # What follows runs statements: `write` and `_read` on their thread, everything else before and after.

    async def write(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run `function` on the writing connection's thread. For `SqliteTx` only."""
        return await self._run(self._writer, function)

    async def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        return await self._run(self._reader, partial(snapshot, function))

    async def _run(self, connection: Connection | None, function: Callable[[sqlite3.Connection], T]) -> T:
        if connection is None:
            raise StoreDown(f"{self.path} is not open")
        return await connection.run(partial(self._guarded, function))

    def _guarded(self, function: Callable[[sqlite3.Connection], T], db: sqlite3.Connection) -> T:
        if self._down:
            raise StoreDown(self._down)
        try:
            return function(db)
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> StoreDown:
        """What an error of SQLite means; after one whose outcome nobody knows the store is down for good.

        A database that stays busy is no `Conflict`: this process holds the lock, so it is a foreign one, and to
        decide again at once would only wait again while requests queue up. Nothing was written; it may go on.
        """
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE)
        if code & 0xFF in FULL and code != sqlite3.SQLITE_READONLY_DBMOVED:
            return StoreFull(f"{self.path} has no room or is read-only: {error}")
        text = f"{self.path}: {error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})"
        if code & 0xFF not in HARMLESS:
            self._down = f"{text}; nothing is served until it is opened again"
        return StoreDown(self._down or text)

    def _roll_back(self, db: sqlite3.Connection) -> None:
        try:
            if db.in_transaction:
                db.execute("ROLLBACK")
        except sqlite3.Error as error:
            self._down = str(self._translated(error))

    def _prepare(self) -> int:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file_lock.take()
            version = sqlite_format.look(self.path)
            if version == 0:
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StoreRefused(f"{self.path} cannot be made: {error.strerror}") from error
        return version

    async def _connect(self) -> Connection:
        try:
            connection = Connection(self.path)
            await connection
        except sqlite3.Error as error:
            raise StoreRefused(f"{self.path} cannot be opened: {error}") from error
        return connection

    def _set_up(self, version: int, db: sqlite3.Connection) -> None:
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreRefused(f"{self.path} lies on a file system without the shared memory that SQLite's WAL needs")
        set_pragmas(WRITER, db)
        sqlite_format.upgrade(db, version)
        self.seq = sqlite_rows.next_seq(db)

    async def _let_go(self) -> None:
        reader, writer = self._reader, self._writer
        self._reader = self._writer = None
        async with AsyncExitStack() as last_to_first:
            last_to_first.callback(self._file_lock.release)
            # The last connection to close folds the log into the file; only the writer may.
            for connection in filter(None, (writer, reader)):
                last_to_first.push_async_callback(connection.close)
        self._down = ""


class SqliteTx:
    """One transaction of a `SqliteStore`."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._loaded: dict[Key, Record] = {}
        self._over = False
        self.began = False
        self.committed = False

    async def load(self, wants: Wants) -> Loaded:
        """See `Tx.load`."""
        if self._over:
            raise ValueError("load after save: the transaction is over")
        self.began = True
        return await self._store.write(partial(self._load, wants))

    async def save(self, changes: Changes, *, durable: bool = True) -> int:
        """See `Tx.save`. Always durable: SQLite cannot change its mind about syncing inside a transaction."""
        if self._over:
            raise ValueError("a transaction is saved once")
        self.began = self._over = True
        return await self._store.write(partial(self._save, changes, self._store.clock.now()))

    async def prune(self, before: int) -> tuple[int, int]:
        """Prune some ledger batches and commit; return how many batches and lines went."""
        self.began = self._over = True
        return await self._store.write(partial(self._prune, before))

    def _load(self, wants: Wants, db: sqlite3.Connection) -> Loaded:
        begin(db)
        locked = sqlite_rows.by_keys(db, wants.keys)
        rows = locked + sqlite_rows.by_keys(db, wants.look)
        ready = {ready: sqlite_rows.ready(db, ready, limit) for ready, limit in wants.ready.items()}
        due = {due: sqlite_rows.due(db, due, limit) for due, limit in wants.due.items()}
        for records in (locked, *ready.values(), *due.values()):
            self._loaded.update({Key(record[1], record[2]): record for record in records})
        return Loaded(
            rows={Key(record[1], record[2]): row_of(record) for record in rows},
            ready={ready: list(map(row_of, records)) for ready, records in ready.items()},
            due={due: list(map(row_of, records)) for due, records in due.items()},
            counts=sqlite_rows.counts_of(db, wants.counts),
        )

    def _save(self, changes: Changes, now: int, db: sqlite3.Connection) -> int:
        begin(db)
        sqlite_rows.insert(db, changes.new)
        sqlite_rows.update(db, changes.put, self._loaded)
        sqlite_rows.delete(db, changes.gone)
        sqlite_rows.add_counts(db, changes.counts)
        first = self._store.seq
        if changes.ledger:
            sqlite_rows.add_lines(db, first, now, changes.ledger)
        commit(db)
        self.committed = True
        self._store.seq += len(changes.ledger)
        return first if changes.ledger else 0

    def _prune(self, before: int, db: sqlite3.Connection) -> tuple[int, int]:
        begin(db)
        gone = sqlite_rows.prune(db, before, self._store.seq, PRUNE_BATCHES)
        commit(db)
        self.committed = True
        return gone
