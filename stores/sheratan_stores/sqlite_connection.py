"""The SQLite store's connections: aiosqlite, but a whole function runs on the connection's thread in one trip."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import aiosqlite

T = TypeVar("T")

BUSY_SECONDS = 2.0
"""How long a statement waits for a foreign process (a `sqlite3` shell, say) that holds the database."""

WRITER = ("synchronous = FULL", "cache_size = -32768", "wal_autocheckpoint = 4000", "journal_size_limit = 67108864")
READER = ("query_only = 1", "wal_autocheckpoint = 0", "cache_size = -8192")


class Connection(aiosqlite.Connection):
    """A connection with a thread of its own, which takes one function after the other."""

    def __init__(self, path: Path) -> None:
        connector = partial(sqlite3.connect, path, isolation_level=None, timeout=BUSY_SECONDS, cached_statements=256)
        super().__init__(connector, iter_chunk_size=64)
        # A hub that fails before it could close its store must end, not wait for this thread for ever.
        self._thread.daemon = True

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """What `function` returns or raises. If the caller is cancelled it ends only after the function has."""
        try:
            return await self._execute(lambda: function(self._conn))  # type: ignore[no-any-return,no-untyped-call]
        except asyncio.CancelledError:
            await self._drain()
            raise

    async def _drain(self) -> None:
        # When the thread has come to do nothing, it has done everything asked of it before.
        turn = asyncio.ensure_future(self._execute(bool))  # type: ignore[no-untyped-call]
        while not turn.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({turn})
        with suppress(ValueError):  # closed meanwhile, which also comes last
            turn.result()


def set_pragmas(pragmas: Sequence[str], db: sqlite3.Connection) -> None:
    """Configure a connection."""
    for pragma in pragmas:
        db.execute(f"PRAGMA {pragma}")


def snapshot(function: Callable[[sqlite3.Connection], T], db: sqlite3.Connection) -> T:
    """Run a function that only reads; all of its statements see the same state."""
    db.execute("BEGIN")
    try:
        return function(db)
    finally:
        db.execute("ROLLBACK")


def begin(db: sqlite3.Connection) -> None:
    """Begin a writing transaction, unless one is under way."""
    if not db.in_transaction:
        db.execute("BEGIN IMMEDIATE")


def commit(db: sqlite3.Connection) -> None:
    """Make the transaction true and synced."""
    db.execute("COMMIT")


FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY}
"""Errors of a write that was cut back before anything was synced."""

HARMLESS = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_MISUSE,
}
"""Errors that end one transaction and say nothing about the file."""
