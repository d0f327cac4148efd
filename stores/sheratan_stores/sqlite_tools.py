"""The SQLite store's tools: see `Tools` in `sheratan_hub.storage_tools`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from sheratan_hub.storage import StoreRefused
from sheratan_hub.storage_tools import Filling, Reading, Salvage, Sizes
from sheratan_stores import sqlite_filling, sqlite_format, sqlite_reading, sqlite_salvage
from sheratan_stores.file_disk import in_thread
from sheratan_stores.lock import FileLock

NAME = "hub.db"
"""What a copy is called in its folder."""


class SqliteTools:
    """What `SqliteStore` can beside its work."""

    path: Path
    _file_lock: FileLock
    _writer: Any

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Reading]:
        """See `Tools.reading`."""
        with ExitStack() as stack:
            opened = sqlite_reading.reading(self.path, is_open=self._writer is not None)
            yield await asyncio.to_thread(stack.enter_context, opened)

    @asynccontextmanager
    async def filling(self) -> AsyncIterator[Filling]:
        """See `Tools.filling`."""
        with sqlite_filling.filling(self.path) as made:
            yield made

    @asynccontextmanager
    async def salvaging(self, scratch: Path) -> AsyncIterator[Salvage]:
        """See `Tools.salvaging`."""
        with ExitStack() as stack:
            yield await in_thread(stack.enter_context, sqlite_salvage.salvaging(self.path, scratch))

    async def copy_to(self, folder: Path) -> str:
        """See `Tools.copy_to`."""
        await in_thread(sqlite_filling.copy, self.path, folder / NAME)
        return f"sqlite://{folder / NAME}"

    async def compact(self) -> None:
        """See `Tools.compact`."""
        if sqlite_format.look(self.path) == 0:
            raise StoreRefused(f"there is no store at {self.path}")
        self._file_lock.take()
        try:
            await in_thread(sqlite_filling.compact, self.path)
        finally:
            self._file_lock.release()

    async def sizes(self) -> Sizes:
        """See `Tools.sizes`."""
        return await asyncio.to_thread(self._sizes)

    def _sizes(self) -> Sizes:
        disk = os.statvfs(self.path.parent)
        log = bytes_of(sqlite_reading.log_of(self.path))
        return Sizes(bytes_of(self.path) + log, log, disk.f_bavail * disk.f_frsize)


def bytes_of(path: Path) -> int:
    """The size of a file, 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
