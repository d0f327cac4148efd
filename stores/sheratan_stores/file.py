"""The file store: state in memory, a log with one record and one sync a batch, snapshots, a ledger; one folder.

A batch is packed, written and synced on a thread of its own, and only then made true in memory. What else there
is to do (the next segment, snapshots, ledger files, `nodes_registry.json`) happens beside it.
Longer than 300 lines because it is the whole of one contract.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import ClassVar, TypeVar

from sheratan_hub.clock import Clock
from sheratan_hub.storage import API, Changes, Key, LedgerLine, Page, Row, StoreDown, StoreFull, StoreRefused
from sheratan_stores import file_folder, file_log
from sheratan_stores.file_compact import compact, in_thread, remove_before, remove_drafts, whole
from sheratan_stores.file_ledger import Ledger
from sheratan_stores.file_log import SEAL_BYTES, Batch, Segment, SyncFailed, encode
from sheratan_stores.file_registry import Registry
from sheratan_stores.file_snapshot import Totals
from sheratan_stores.lock import FileLock
from sheratan_stores.state import State, StateTx, pack

log = logging.getLogger("sheratan.store")

T = TypeVar("T")

FIRST_BYTES, SEGMENT_BYTES = 1 << 20, 32 << 20
"""How large the first segment is made, and how large the largest; each is twice the one before."""

COMPACT_BYTES = 64 << 20
"""So much log, and as much as the last snapshot has, is there before a new snapshot is taken."""

LINES_BYTES = 256 << 10
"""So much of the ledger waits before it is written to its files."""

HEADER_ROOM = 4096
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


class FileStore:
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
        self._sizes = first_bytes, segment_bytes
        self._compact_bytes = compact_bytes
        self._transaction, self._ledger_lock, self._pruning = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._file_lock = FileLock(self.folder / "lock", clock)
        self._lines_wait = asyncio.Event()
        self._segment: Segment | None = None
        self._forget()

    def _forget(self) -> None:
        self._state = State()
        self._ledger = Ledger(self.folder)
        self._registry = Registry(self.folder / "nodes_registry.json", self._state, self._clock)
        self._disk = ThreadPoolExecutor(1, "file-store")
        self._tasks: list[asyncio.Task[None]] = []
        self._spare: asyncio.Task[tuple[Path, int, int]] | None = None
        self._compacting: asyncio.Task[None] | None = None
        self._lines: list[Batch] = []
        self._lines_bytes = self._logged = self._snapshot_bytes = 0
        self._seq = 1
        self._down = ""

    async def open(self) -> None:
        """See `Store.open`."""
        if self._segment is not None:
            raise ValueError(f"{self.folder} is open already")
        opened = False
        try:
            await in_thread(self._open)
            opened = True
        finally:
            if not opened:
                await self._let_go()
        self._tasks = [asyncio.create_task(self._registry.follow()), asyncio.create_task(self._follow_lines())]

    def _open(self) -> None:
        try:
            is_store = file_folder.look(self.folder)
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file_lock.take()
            if not is_store:
                file_folder.make(self.folder, self._sizes[0])
        except OSError as error:
            raise StoreRefused(f"{self.folder} cannot be made a store: {error.strerror}") from error
        found = file_folder.read(self.folder)
        try:
            self._segment = Segment(found.tail.path, found.tail.size, found.tail.at)
            self._segment.clear_rest()
            found.ledger.open()
            found.ledger.write(found.missing)
            remove_before(self.folder, found.snapshot)
            remove_drafts(self.folder)
        except (OSError, SyncFailed) as error:
            raise StoreRefused(f"{self.folder} cannot be written: {error}") from error
        self._state, self._ledger, self._seq = found.state, found.ledger, found.seq
        self._registry = Registry(self.folder / "nodes_registry.json", self._state, self._clock)
        self._registry.changed.set()
        self._logged, self._snapshot_bytes = found.logged, found.snapshot_bytes

    async def close(self) -> None:
        """See `Store.close`."""
        async with self._transaction:
            await self._let_go()

    async def _let_go(self) -> None:
        """Finish what waits, as far as the disk takes it, and let go of everything."""
        tasks = [task for task in (*self._tasks, self._compacting, self._spare) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        segment, self._segment = self._segment, None
        if segment is not None and not self._down:
            await self._registry.write()
            with suppress(OSError):
                await self._flush_lines()
            with suppress(SyncFailed):
                await in_thread(segment.sync)
        if segment is not None:
            segment.close()
        self._ledger.close()
        self._file_lock.release()
        self._disk.shutdown()
        self._forget()

    async def now(self) -> int:
        """See `Store.now`."""
        return self._clock.now()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[FileTx]:
        """See `Store.begin`. Nothing is changed before `save`, so there is nothing to roll back."""
        async with self._transaction:
            yield FileTx(self, self._readable())

    async def fetch(self, keys: Sequence[Key]) -> list[Row]:
        """See `Store.fetch`."""
        return self._readable().fetch(keys)

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
        return self._readable().page(kind, labels, after, limit, examine, newest)

    async def counts(self, prefix: str = "") -> dict[str, int]:
        """See `Store.counts`."""
        return self._readable().counts_from(prefix)

    async def heads(self, prefix: str = "") -> dict[str, int]:
        """See `Store.heads`."""
        return self._readable().heads(prefix)

    async def hint(self, timeout_ms: int) -> None:
        """See `Store.hint`: nobody else may write."""
        await self._clock.sleep(timeout_ms)

    def _readable(self) -> State:
        if self._segment is None:
            raise StoreDown(f"{self.folder} is not open")
        if self._down:
            raise StoreDown(self._down)
        return self._state

    # The log

    async def commit(self, tx: FileTx, changes: Changes, *, durable: bool) -> int:
        """Write a transaction's checked changes, then make them true. For `FileTx` only."""
        packed = list(map(pack, (*changes.new, *changes.put)))
        first = self._seq if changes.ledger else 0
        batch = Batch(packed, changes.gone, changes.counts, first, self._clock.now(), changes.ledger)
        await self._append(batch, durable=durable)
        tx.apply(changes, packed)
        if changes.ledger:
            self._seq += len(changes.ledger)
            self._keep_lines(Batch(first=first, at=batch.at, lines=batch.lines))
        if any(row.kind == "node" for row in (*changes.new, *changes.put)) or any(
            key.kind == "node" for key in changes.gone
        ):
            self._registry.changed.set()
        return first

    async def _append(self, batch: Batch, *, durable: bool) -> None:
        segment = self._writable()
        lacking = await self._on_disk(lambda: append(segment, batch, durable))
        if lacking:
            await self._switch(lacking)
            segment = self._writable()
            await self._on_disk(lambda: append(segment, batch, durable))
        if self._spare is None and segment.at * 2 > segment.size:
            self._spare = asyncio.create_task(self._next_segment(0))

    async def _switch(self, lacking: int) -> None:
        """Go on in the next segment, which has room for so many bytes; take a snapshot if the log has grown enough."""
        try:
            path, size, at = await self._spare if self._spare is not None else (None, 0, 0)
        except OSError:
            path, size, at = None, 0, 0  # there may be room by now
        self._spare = None
        if path is None or size < lacking + HEADER_ROOM:
            path, size, at = await self._made(lacking)
        full = self._writable()
        await self._on_disk(full.seal)
        self._segment = Segment(path, size, at)
        full.close()
        self._logged += full.at
        if self._logged >= max(self._compact_bytes, self._snapshot_bytes) and self._compacting is None:
            counts = dict(self._state.counts)
            totals = Totals(file_log.FORMAT, self._segment.number, self._seq, self._ledger.pruned, counts)
            self._compacting = asyncio.create_task(self._compact(totals))

    async def _made(self, lacking: int) -> tuple[Path, int, int]:
        try:
            return await self._next_segment(lacking)
        except OSError as error:
            raise self._translated(error) from error

    async def _next_segment(self, lacking: int) -> tuple[Path, int, int]:
        segment = self._writable()
        size = max(min(segment.size * 2, self._sizes[1]), lacking + HEADER_ROOM)
        return await in_thread(file_log.make, self.folder, segment.number + 1, size)

    def _writable(self) -> Segment:
        self._readable()
        assert self._segment is not None  # noqa: S101
        return self._segment

    async def _on_disk(self, function: Callable[[], T]) -> T:
        """Run what writes the log, on its thread, and say what its failure means."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._disk, function)
        except OSError as error:
            raise self._translated(error) from error
        except SyncFailed as failed:
            self._down = f"{failed}; nothing is served until it is opened again"
            raise StoreDown(self._down) from failed

    def _translated(self, error: OSError) -> StoreDown:
        if error.errno in FULL:
            return StoreFull(f"{self.folder} has no room or is read-only: {error.strerror}")
        return StoreDown(f"{self.folder}: {error.strerror}")

    async def _compact(self, totals: Totals) -> None:
        logged, self._logged = self._logged, 0
        try:
            self._snapshot_bytes = await compact(self.folder, self._state, totals, self._sync_lines)
        except OSError as error:
            self._logged += logged
            log.warning("%s: no snapshot could be taken: %s", self.folder, error.strerror)
        finally:
            self._compacting = None

    # The ledger

    async def events(self, after: int = 0, limit: int = 1000) -> list[LedgerLine]:
        """See `Store.events`."""
        self._readable()
        with suppress(OSError):
            await self._flush_lines()
        async with self._ledger_lock:
            lines = await in_thread(self._ledger.read, after, limit)
            after = max(after, self._ledger.last)
            waiting = [line for batch in self._lines for line in enumerate(batch.lines, batch.first) if line[0] > after]
            return lines + [LedgerLine(*line) for line in waiting[: limit - len(lines)]]

    async def prune_events(self, before: int) -> int:
        """See `Store.prune_events`."""
        async with self._pruning:
            self._readable()
            with suppress(OSError):
                await self._flush_lines()
            async with self._ledger_lock:
                upto, lines = await in_thread(self._ledger.prunable, before)
            if lines:
                async with self._transaction:
                    await whole(self._append(Batch(pruned=upto), durable=True))
                async with self._ledger_lock:
                    await in_thread(self._ledger.prune, upto)
            return lines

    def _keep_lines(self, batch: Batch) -> None:
        self._lines.append(batch)
        self._lines_bytes += sum(map(len, batch.lines))
        if self._lines_bytes > LINES_BYTES:
            self._lines_wait.set()

    async def _follow_lines(self) -> None:
        while True:
            await self._lines_wait.wait()
            self._lines_wait.clear()
            try:
                await self._flush_lines()
            except OSError as error:
                log.warning("%s: the ledger waits in memory and in the log: %s", self.folder, error.strerror)

    async def _flush_lines(self) -> None:
        """Write the lines that wait. Raises OSError; then they wait on."""
        async with self._ledger_lock:
            lines, length = self._lines, self._lines_bytes
            self._lines, self._lines_bytes = [], 0
            try:
                await in_thread(self._ledger.write, lines)
            except OSError:
                self._lines, self._lines_bytes = lines + self._lines, length + self._lines_bytes
                raise

    async def _sync_lines(self) -> None:
        await self._flush_lines()
        async with self._ledger_lock:
            await in_thread(self._ledger.sync)


def append(segment: Segment, batch: Batch, durable: bool) -> int:
    """Write a batch at the end of a segment; 0, or how many bytes it needs when there is no room for it."""
    record = segment.framed(encode(batch))
    if not segment.has_room(record):
        return len(record) + SEAL_BYTES
    segment.append(record, durable=durable)
    return 0


class FileTx(StateTx):
    """One transaction of a `FileStore`."""

    def __init__(self, store: FileStore, state: State) -> None:
        super().__init__(state)
        self._store = store

    async def save(self, changes: Changes, *, durable: bool = True) -> int:
        """See `Tx.save`."""
        self.check(changes)
        return await whole(self._store.commit(self, changes, durable=durable))
