"""A file store made out of given rows and events: a snapshot, the ledger and one empty segment, then renamed."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from sheratan_hub.storage import Row, StoreDown, StoreFull, StoreRefused
from sheratan_hub.storage_tools import Batch as Lines
from sheratan_stores import file_folder, file_segments, file_snapshot
from sheratan_stores.file_disk import SyncFailed, make_folder, sync_folder, write
from sheratan_stores.file_ledger import Ledger
from sheratan_stores.file_log import FULL, HEADER_ROOM
from sheratan_stores.file_records import FRAME_BYTES, frame
from sheratan_stores.file_segments import FORMAT, SEAL_BYTES, Batch, Segment
from sheratan_stores.file_snapshot import Totals
from sheratan_stores.state import pack

T = TypeVar("T")

BEGINS = 2
"""The number of the segment that the log begins with, behind the snapshot."""

SEGMENT_BYTES = 1 << 20

TOTALS_BYTES = 256
"""The snapshot's first record is written last, in the room that was left for it."""


@contextmanager
def filling(folder: Path) -> Iterator[FileFilling]:
    """A store that becomes the folder, which is not there, or empty."""
    try:
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise StoreRefused(f"{folder} is there already, and nothing is overwritten")
    except OSError as error:
        raise StoreRefused(f"{folder} cannot be read: {error.strerror}") from error
    made = FileFilling(folder)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What errors mean for who makes a store."""
    try:
        yield
    except (OSError, SyncFailed) as error:
        text = f"{folder} cannot be written: {error.strerror if isinstance(error, OSError) else error}"
        full = isinstance(error, OSError) and error.errno in FULL
        raise StoreFull(text) if full else StoreDown(text) from error


class FileFilling:
    """See `Filling`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._draft = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        self._snapshot = _Snapshot(self._draft)
        self._ledger = Ledger(self._draft)
        self._pruned: int | None = None
        with writing(folder):
            make_folder(folder.parent)
            if self._draft.exists():
                shutil.rmtree(self._draft)
            self._draft.mkdir(mode=0o700)
            self._snapshot.begin()

    async def rows(self, rows: Sequence[Row]) -> None:
        """See `Filling.rows`."""
        await self._run(lambda: self._snapshot.add(list(map(pack, rows))))

    async def batches(self, batches: Sequence[Lines]) -> None:
        """See `Filling.batches`."""
        if self._pruned is None and batches:
            self._pruned = batches[0].first - 1
        written = [Batch(first=first, at=at, lines=list(lines)) for first, at, lines in batches]
        await self._run(lambda: self._ledger.write(written))

    async def finish(self, seq: int, counts: dict[str, int]) -> None:
        """See `Filling.finish`."""
        await self._run(lambda: self._finish(seq, counts))

    def _finish(self, seq: int, counts: dict[str, int]) -> None:
        pruned = seq - 1 if self._pruned is None else self._pruned
        self._ledger.sync()
        self._snapshot.finish_with(Totals(FORMAT, BEGINS, seq, pruned, {}))
        counted = file_segments.encode(Batch(counts={facet: n for facet, n in counts.items() if n}))
        size = max(SEGMENT_BYTES, HEADER_ROOM + len(counted) + FRAME_BYTES + SEAL_BYTES)
        segment = Segment(file_segments.make(self._draft, BEGINS, size))
        try:
            if counts:
                segment.append(segment.framed(counted), durable=True)
            file_folder.mark(self._draft)
            file_folder.say_closed(self._draft, BEGINS, segment.at)
        finally:
            segment.close()
        try:
            self._draft.rename(self._folder)
        except OSError as error:
            raise StoreRefused(f"{self._folder} is there already, or cannot be made: {error.strerror}") from error
        sync_folder(self._folder.parent)

    def close(self) -> None:
        """Remove the draft, if it is still one."""
        with suppress(OSError):
            self._ledger.close()
        with suppress(OSError):
            self._snapshot.close()
        shutil.rmtree(self._draft, ignore_errors=True)

    async def _run(self, function: Callable[[], T]) -> T:
        def run() -> T:
            with writing(self._folder):
                return function()

        return await asyncio.to_thread(run)


class _Snapshot(file_snapshot.Writer):
    """A snapshot whose first record is not known before the last."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Totals(FORMAT, BEGINS, 0, 0, {}))

    def begin(self) -> None:
        """Make the draft, with room for the first record."""
        self._file = os.open(self._draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._at = FRAME_BYTES + TOTALS_BYTES

    def finish_with(self, totals: Totals) -> None:
        """Write the first record, and the last."""
        payload = msgspec.json.encode(totals).ljust(TOTALS_BYTES)
        write(self._file, frame(payload, self.path.name, 0, 0), 0)
        self.finish()
