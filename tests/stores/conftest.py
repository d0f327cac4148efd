"""An open SQLite store; and pytest explains the shipped suite's assertions as it does those of a test module."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_stores.sqlite import SqliteStore

pytest.register_assert_rewrite("sheratan_stores.conformance", "sheratan_stores.story")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(f"sqlite://{tmp_path / 'hub.db'}", VirtualClock())
    await store.open()
    yield store
    await store.close()
