"""The SQLite store keeps the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from sheratan_hub.clock import Clock
from sheratan_hub.storage import Store
from sheratan_stores.conformance import StoreConformance
from sheratan_stores.sqlite import SqliteStore


class TestSqlite(StoreConformance):
    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path) -> None:
        self.path = tmp_path / "hub.db"

    async def make(self, clock: Clock) -> Store:
        return SqliteStore(f"sqlite://{self.path}", clock)
