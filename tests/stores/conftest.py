"""An open SQLite store; and pytest explains the shipped suite's assertions as it does those of a test module."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_stores.sqlite import SqliteStore

pytest.register_assert_rewrite(
    "sheratan_stores.conformance", "sheratan_stores.conformance_tools", "sheratan_stores.story"
)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(f"sqlite://{tmp_path / 'hub.db'}", VirtualClock())
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is really synced: for tests that open hundreds of stores and end no machine."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(os, "fdatasync", lambda file: None)


@pytest.fixture
def in_memory(unsynced: None) -> Iterator[Path]:
    """A folder in memory, if there is such a place: for tests that write thousands of files."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as place:
        yield Path(place)
