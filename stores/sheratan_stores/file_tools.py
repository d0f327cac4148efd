"""The file store's tools: see `Tools` in `sheratan_hub.storage_tools`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol

from sheratan_hub.clock import Clock
from sheratan_hub.storage import StoreRefused
from sheratan_hub.storage_tools import Filling, Reading, Salvage, Sizes, all_batches, all_rows
from sheratan_stores import file_filling, file_folder, file_reading, file_salvage
from sheratan_stores.file_disk import in_thread

NAME = "hub"
"""What a copy is called in its folder."""


class _Opened(Protocol):
    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def rewrite(self) -> None: ...


class FileTools:
    """What `FileStore` can beside its work."""

    folder: Path
    _clock: Clock

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Reading]:
        """See `Tools.reading`."""
        async with file_reading.reading(self.folder, self._clock) as found:
            yield found

    @asynccontextmanager
    async def filling(self) -> AsyncIterator[Filling]:
        """See `Tools.filling`."""
        with file_filling.filling(self.folder) as made:
            yield made

    @asynccontextmanager
    async def salvaging(self, scratch: Path) -> AsyncIterator[Salvage]:
        """See `Tools.salvaging`. Everything is put together in memory, `scratch` is not used."""
        with ExitStack() as stack:
            yield await in_thread(stack.enter_context, file_salvage.salvaging(self.folder))

    async def copy_to(self, folder: Path) -> str:
        """See `Tools.copy_to`: a snapshot of what log and snapshot say together."""
        with file_filling.filling(folder / NAME) as made:
            async with self.reading() as found:
                for kind in await found.kinds():
                    async for rows in all_rows(found, kind):
                        await made.rows(rows)
                async for batches in all_batches(found):
                    await made.batches(batches)
                await made.finish(found.seq, await found.counts())
        return f"file://{folder / NAME}"

    async def compact(self: _Compactable) -> None:
        """See `Tools.compact`: a snapshot is taken, and the log begun anew."""
        if not file_folder.look(self.folder):
            raise StoreRefused(f"there is no store in {self.folder}")
        await self.open()
        try:
            await self.rewrite()
        finally:
            await self.close()

    async def sizes(self) -> Sizes:
        """See `Tools.sizes`."""
        return await asyncio.to_thread(self._sizes)

    def _sizes(self) -> Sizes:
        total = log = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    size = entry.stat(follow_symlinks=False).st_size
                    total += size
                    log += size if entry.name.startswith("log-") else 0
        disk = os.statvfs(self.folder)
        return Sizes(total, log, disk.f_bavail * disk.f_frsize)


class _Compactable(_Opened, Protocol):
    folder: Path
