"""The file store's log as it is written: the open segment, the next one made in advance, the thread that writes."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sheratan_hub.storage import StoreDown, StoreFull
from sheratan_stores import file_segments
from sheratan_stores.file_disk import SyncFailed, in_thread, whole
from sheratan_stores.file_segments import SEAL_BYTES, Batch, Segment, Tail, encode

T = TypeVar("T")

HEADER_ROOM = 4096
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


class Log:
    """Where batches are appended, one after the other. `logged` counts the bytes in sealed segments.

    `down` says why nothing more may be done, after a sync that failed.
    """

    def __init__(self, folder: Path, segment: Segment, segment_bytes: int, logged: int) -> None:
        self._folder, self._segment, self._segment_bytes = folder, segment, segment_bytes
        self.logged = logged
        self.down = ""
        self._spare: asyncio.Task[Tail] | None = None
        self._disk = ThreadPoolExecutor(1, "file-store")

    @property
    def number(self) -> int:
        """The number of the segment that was appended to last."""
        return self._segment.number

    @property
    def end(self) -> int:
        """Where that segment ends."""
        return self._segment.at

    async def append(self, batch: Batch, *, durable: bool) -> None:
        """Write a batch, in the next segment if this one has no room. Raises `StoreFull`, `StoreDown`."""
        lacking = await self._on_disk(self._append, batch, durable)
        if lacking:
            await self._switch(lacking)
            await self._on_disk(self._append, batch, durable)
        if self._spare is None and self._segment.at * 2 > self._segment.size:
            self._spare = asyncio.create_task(self._make(0))

    async def turn(self) -> None:
        """Go on in the next segment, whatever room there is in this. Raises `StoreFull`, `StoreDown`."""
        await self._switch(0)

    async def sync(self) -> None:
        """Bring to disk what was appended without. Raises `StoreDown`."""
        await whole(self._on_disk(lambda: self._segment.sync()))

    async def close(self) -> None:
        """Wait for what is under way, and close the file."""
        if self._spare is not None:
            await asyncio.gather(self._spare, return_exceptions=True)
        self._disk.shutdown()
        self._segment.close()

    def fail(self, failed: SyncFailed) -> StoreDown:
        """Nothing more is done after a sync that failed; what to say of it."""
        self.down = self.down or f"{failed}; nothing is served until it is opened again"
        return StoreDown(self.down)

    def _append(self, batch: Batch, durable: bool) -> int:
        """Write a batch at the end; 0, or how many bytes it needs when there is no room for it."""
        record = self._segment.framed(encode(batch))
        if not self._segment.has_room(record):
            return len(record) + SEAL_BYTES
        self._segment.append(record, durable=durable)
        return 0

    async def _switch(self, lacking: int) -> None:
        """Go on in the next segment, which has room for so many bytes."""
        try:
            following = Segment(await self._next(lacking))
        except OSError as error:
            raise self._translated(error) from error
        try:
            await self._on_disk(self._go_on, following)
        except StoreDown:
            following.close()
            raise

    def _go_on(self, following: Segment) -> None:
        """On the writer's thread, so that nothing is written or synced in between."""
        full = self._segment
        full.seal()
        self._segment = following
        self.logged += full.at
        with suppress(OSError):
            full.close()

    async def _next(self, lacking: int) -> Tail:
        """The segment made in advance, or one that is made now."""
        spare, self._spare = self._spare, None
        if spare is not None:
            with suppress(OSError):  # there may be room by now
                tail = await spare
                if tail.size >= lacking + HEADER_ROOM:
                    return tail
        return await self._make(lacking)

    async def _make(self, lacking: int) -> Tail:
        size = max(min(self._segment.size * 2, self._segment_bytes), lacking + HEADER_ROOM)
        return await in_thread(file_segments.make, self._folder, self._segment.number + 1, size)

    async def _on_disk(self, function: Callable[..., T], *args: object) -> T:
        """Run what writes the log, on its thread, and say what its failure means."""
        if self.down:
            raise StoreDown(self.down)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._disk, function, *args)
        except OSError as error:
            raise self._translated(error) from error
        except SyncFailed as failed:
            raise self.fail(failed) from failed

    def _translated(self, error: OSError) -> StoreDown:
        if error.errno in FULL:
            return StoreFull(f"{self._folder} has no room or is read-only: {error.strerror}")
        return StoreDown(f"{self._folder}: {error.strerror}")
