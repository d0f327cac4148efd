"""The file store's events: the lines that wait in memory to be written, in front of the ledger's files."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sheratan_hub.storage import LedgerLine, StoreDown
from sheratan_stores.file_disk import SyncFailed, whole
from sheratan_stores.file_ledger import Ledger
from sheratan_stores.file_segments import Batch

log = logging.getLogger("sheratan.store")

T = TypeVar("T")

WAITING_BYTES = 256 << 10
"""So much of the ledger waits before it is written to its files."""


class Events:
    """Lines by number. `fail` is told of a sync that failed, and gives the exception that says so to others."""

    def __init__(self, folder: Path, ledger: Ledger, waiting: list[Batch], fail: Callable[[SyncFailed], StoreDown]):
        self._folder, self._ledger, self._fail = folder, ledger, fail
        self._lock, self._many = asyncio.Lock(), asyncio.Event()
        self._waiting: list[Batch] = []
        self._bytes = 0
        self._failing = False
        for batch in waiting:
            self.keep(batch)

    @property
    def pruned(self) -> int:
        """The events up to this number are forgotten."""
        return self._ledger.pruned

    def keep(self, batch: Batch) -> None:
        """Take over the lines of a batch that the log holds."""
        self._waiting.append(Batch(first=batch.first, at=batch.at, lines=batch.lines))
        self._bytes += sum(map(len, batch.lines))
        if self._bytes > WAITING_BYTES:
            self._many.set()

    async def follow(self) -> None:
        """Write lines when many wait, until cancelled."""
        while True:
            await self._many.wait()
            self._many.clear()
            try:
                await self.flush()
            except OSError as error:
                if not self._failing:
                    log.warning("%s: events wait in memory and in the log: %s", self._folder, error.strerror)
                self._failing = True
            else:
                self._failing = False

    async def flush(self) -> None:
        """Write the lines that wait. Raises OSError, then they wait on; or `StoreDown`."""
        async with self._lock:
            waiting, size = list(self._waiting), self._bytes
            await self._run(self._ledger.write, waiting)
            del self._waiting[: len(waiting)]
            self._bytes -= size

    async def sync(self) -> None:
        """Bring all lines to disk. Raises OSError, `StoreDown`."""
        await self.flush()
        async with self._lock:
            await self._run(self._ledger.sync)

    async def read(self, after: int, limit: int) -> list[LedgerLine]:
        """See `Store.events`."""
        with suppress(OSError):
            await self.flush()
        async with self._lock:
            lines = await self._reading(self._ledger.read, after, limit)
            after = max(after, self._ledger.last)
            waiting = [
                line for batch in self._waiting for line in enumerate(batch.lines, batch.first) if line[0] > after
            ]
            return lines + [LedgerLine(*line) for line in waiting[: limit - len(lines)]]

    async def prunable(self, before: int) -> tuple[int, int]:
        """How far whole batches were saved before this time (ms), and how many lines these are."""
        with suppress(OSError):
            await self.flush()
        async with self._lock:
            return await self._reading(self._ledger.prunable, before)

    def forget(self, upto: int) -> None:
        """Show the events up to this number no more. The log says so already."""
        self._ledger.pruned = upto

    async def remove_forgotten(self) -> None:
        """Remove what holds nothing else; what cannot be removed goes another time."""
        async with self._lock:
            with suppress(OSError):
                await self._run(self._ledger.remove_pruned)

    async def close(self) -> None:
        """Close the files; what waits is in the log."""
        async with self._lock:
            self._waiting = []
            self._ledger.close()

    async def _reading(self, function: Callable[..., T], *args: object) -> T:
        try:
            return await self._run(function, *args)
        except OSError as error:
            raise StoreDown(f"{error.filename or self._folder} cannot be read: {error.strerror}") from error

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        """Run what touches the files on a thread; when the caller is cancelled, only after its outcome is known."""
        return await whole(self._told(function, *args))

    async def _told(self, function: Callable[..., T], *args: object) -> T:
        try:
            return await asyncio.to_thread(function, *args)
        except SyncFailed as failed:
            raise self._fail(failed) from failed
