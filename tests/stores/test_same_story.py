"""The same seeded story leaves the same trace on every store."""

from __future__ import annotations

from pathlib import Path

import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.storage import Store
from sheratan_stores.conformance import same_story
from sheratan_stores.file import FileStore
from sheratan_stores.memory import MemoryStore
from sheratan_stores.sqlite import SqliteStore


@pytest.mark.parametrize("seed", range(8))
async def test_every_store_tells_the_same_story(tmp_path: Path, seed: int) -> None:
    async def memory() -> Store:
        return MemoryStore("memory://", VirtualClock())

    async def sqlite() -> Store:
        return SqliteStore(f"sqlite://{tmp_path / 'hub.db'}", VirtualClock())

    async def file() -> Store:
        return FileStore(f"file://{tmp_path / 'hub'}", VirtualClock())

    await same_story(memory, sqlite, seed)
    await same_story(memory, file, seed)
