"""The file store: state in memory, a log with one record and one sync a batch, snapshots, a ledger; one folder.

A batch is packed, written and synced on a thread of its own, and only then made true in memory. What else there
is to do (the next segment, snapshots, ledger files, `nodes_registry.json`) happens beside it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import ClassVar

from sheratan_hub.clock import Clock
from sheratan_hub.storage import API, Changes, Key, LedgerLine, Page, Row, StoreDown, StoreRefused
from sheratan_stores import file_folder
from sheratan_stores.file_compact import compact, remove_before, remove_drafts
from sheratan_stores.file_disk import SyncFailed, in_thread, make_folder, whole
from sheratan_stores.file_events import Events
from sheratan_stores.file_log import Log
from sheratan_stores.file_registry import Registry
from sheratan_stores.file_segments import FORMAT, Batch, Segment
from sheratan_stores.file_snapshot import Totals
from sheratan_stores.file_tools import FileTools
from sheratan_stores.lock import FileLock
from sheratan_stores.state import State, StateTx, pack

log = logging.getLogger("sheratan.store")

FIRST_BYTES, SEGMENT_BYTES = 1 << 20, 32 << 20
"""How large the first segment is made, and how large the largest; each is twice the one before."""

COMPACT_BYTES = 128 << 20
"""So much log, and as much as the last snapshot has, is there before a new snapshot is taken."""


class FileStore(FileTools):
    """Keeps everything in the folder named by the URL: the text after `file://`, as it stands."""

    api: ClassVar[int] = API
    shared: ClassVar[bool] = False

    def __init__(
        self,
        url: str,
        clock: Clock,
        *,
        first_bytes: int = FIRST_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
        compact_bytes: int = COMPACT_BYTES,
    ) -> None:
        self.folder = Path(url.partition("://")[2]).absolute()
        self._clock = clock
        self._first_bytes, self._segment_bytes, self._compact_bytes = first_bytes, segment_bytes, compact_bytes
        self._transaction, self._pruning = asyncio.Lock(), asyncio.Lock()
        self._lock = FileLock(self.folder / "lock", clock)
        self._is_open = False
        self._tasks: list[asyncio.Task[None]] = []
        self._compacting: asyncio.Task[None] | None = None

    # Opening and closing

    async def open(self) -> None:
        """See `Store.open`."""
        async with self._transaction:
            if self._is_open:
                raise ValueError(f"{self.folder} is open already")
            try:
                await in_thread(self._open)
            except asyncio.CancelledError:
                await self._close()
                raise
            self._tasks = [asyncio.create_task(self._registry.follow()), asyncio.create_task(self._events.follow())]

    def _open(self) -> None:
        with ExitStack() as undo:
            self._take(undo)
            found = file_folder.read(self.folder)
            try:
                segment = Segment(found.tail)
                undo.callback(segment.close)
                undo.callback(found.ledger.close)
                segment.renew()
                found.ledger.open()
                remove_before(self.folder, found.first)
                remove_drafts(self.folder)
                file_folder.say_open(self.folder)
            except (OSError, SyncFailed) as error:
                raise StoreRefused(f"{self.folder} cannot be written: {error}") from error
            self._start_with(found, segment)
            undo.pop_all()

    def _take(self, undo: ExitStack) -> None:
        """Take the lock of the folder, which is a store then. It may be made one; what is no store is not touched."""
        try:
            file_folder.look(self.folder)
            make_folder(self.folder)
            self._lock.take()
            undo.callback(self._lock.release)
            if not file_folder.look(self.folder):  # only now does nobody else make it one
                file_folder.make(self.folder, self._first_bytes)
        except OSError as error:
            raise StoreRefused(f"{self.folder} cannot be made a store: {error.strerror}") from error

    def _start_with(self, found: file_folder.Found, segment: Segment) -> None:
        self._state, self._seq, self._snapshot_bytes = found.state, found.seq, found.snapshot_bytes
        self._log = Log(self.folder, segment, self._segment_bytes, found.tail.logged)
        self._number = self._log.number
        self._events = Events(self.folder, found.ledger, found.lines, self._log.fail)
        self._registry = Registry(self.folder / "nodes_registry.json", self._state, self._clock)
        self._registry.changed.set()
        self._compacting = None
        self._is_open = True

    async def close(self) -> None:
        """See `Store.close`."""
        async with self._transaction:
            await self._close()

    async def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            await whole(self._let_go())

    async def _let_go(self) -> None:
        """Finish what waits, as far as the disk takes it, and let go of everything."""
        tasks, self._tasks = [*self._tasks, *([self._compacting] if self._compacting else [])], []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._finish()
        finally:
            await self._log.close()
            await self._events.close()
            self._lock.release()

    async def _finish(self) -> None:
        with suppress(StoreDown):
            await self._log.sync()
            await self._registry.write()
            with suppress(OSError):
                await self._events.flush()
            with suppress(OSError):
                await in_thread(file_folder.say_closed, self.folder, self._log.number, self._log.end)

    def _check(self) -> State:
        """The state, if it may be shown."""
        if not self._is_open:
            raise StoreDown(f"{self.folder} is not open")
        if self._log.down:
            raise StoreDown(self._log.down)
        return self._state

    # Reading

    async def now(self) -> int:
        """See `Store.now`."""
        return self._clock.now()

    async def fetch(self, keys: Sequence[Key]) -> list[Row]:
        """See `Store.fetch`."""
        return self._check().fetch(keys)

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
        return self._check().page(kind, labels, after, limit, examine, newest)

    async def counts(self, prefix: str = "") -> dict[str, int]:
        """See `Store.counts`."""
        return self._check().counts_from(prefix)

    async def heads(self, prefix: str = "") -> dict[str, int]:
        """See `Store.heads`."""
        return self._check().heads(prefix)

    async def events(self, after: int = 0, limit: int = 1000) -> list[LedgerLine]:
        """See `Store.events`."""
        self._check()
        return await self._events.read(after, limit)

    async def hint(self, timeout_ms: int) -> None:
        """See `Store.hint`: nobody else may write."""
        await self._clock.sleep(timeout_ms)

    # Writing

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[FileTx]:
        """See `Store.begin`. Nothing is changed before `save`, so there is nothing to roll back."""
        async with self._transaction:
            tx = FileTx(self, self._check())
            try:
                yield tx
            finally:
                tx.end()

    async def commit(self, tx: FileTx, changes: Changes, *, durable: bool) -> int:
        """Write a transaction's checked changes, then make them true. For `FileTx` only."""
        packed = list(map(pack, (*changes.new, *changes.put)))
        first = self._seq if changes.ledger else 0
        batch = Batch(packed, changes.gone, changes.counts, first, self._clock.now(), changes.ledger)
        await self._append(batch, durable=durable)
        tx.apply(changes, packed)
        if changes.ledger:
            self._seq += len(changes.ledger)
            self._events.keep(batch)
        if any(thing.kind == "node" for things in (changes.new, changes.put, changes.gone) for thing in things):
            self._registry.changed.set()
        return first

    async def _append(self, batch: Batch, *, durable: bool) -> None:
        """Write a batch that is not true in memory yet. If it began a segment, that may be time for a snapshot."""
        await self._log.append(batch, durable=durable)
        if self._log.number == self._number:
            return
        self._number = self._log.number
        if self._log.logged < max(self._compact_bytes, self._snapshot_bytes):
            return
        if self._compacting is None or self._compacting.done():
            counts = dict(self._state.counts)
            totals = Totals(FORMAT, self._number, self._seq, self._events.pruned, counts)
            self._compacting = asyncio.create_task(self._compact(totals))

    async def rewrite(self) -> None:
        """Begin a new segment and take a snapshot for all before it, now. Raises OSError, `StoreDown`."""
        async with self._transaction:
            self._check()
            await self._log.turn()
            self._number = self._log.number
            totals = Totals(FORMAT, self._number, self._seq, self._events.pruned, dict(self._state.counts))
            self._snapshot_bytes = await compact(self.folder, self._state, totals, self._sync)
            self._log.logged = 0

    async def _compact(self, totals: Totals) -> None:
        logged = self._log.logged
        try:
            self._snapshot_bytes = await compact(self.folder, self._state, totals, self._sync)
        except (OSError, StoreDown) as error:
            log.warning("%s: the log could not be compacted, which will be tried again: %s", self.folder, error)
        else:
            self._log.logged -= logged

    async def _sync(self) -> None:
        await self._events.sync()
        await self._log.sync()

    async def prune_events(self, before: int) -> int:
        """See `Store.prune_events`."""
        async with self._pruning:
            self._check()
            upto, lines = await self._events.prunable(before)
            if lines:
                async with self._transaction:
                    self._check()
                    await whole(self._forget(upto))
            return lines

    async def _forget(self, upto: int) -> None:
        await self._append(Batch(pruned=upto), durable=True)
        self._events.forget(upto)
        await self._events.remove_forgotten()


class FileTx(StateTx):
    """One transaction of a `FileStore`."""

    def __init__(self, store: FileStore, state: State) -> None:
        super().__init__(state)
        self._store = store

    async def save(self, changes: Changes, *, durable: bool = True) -> int:
        """See `Tx.save`."""
        self.check(changes)
        return await whole(self._store.commit(self, changes, durable=durable))
