"""The tools of both embedded stores keep their contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from sheratan_hub.clock import Clock
from sheratan_hub.storage import Store
from sheratan_stores.conformance_tools import ToolsConformance
from sheratan_stores.file import FileStore
from sheratan_stores.sqlite import SqliteStore


class TestSqliteTools(ToolsConformance):
    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    async def at(self, name: str, clock: Clock) -> Store:
        return SqliteStore(f"sqlite://{self.folder / name}", clock)


class TestFileTools(TestSqliteTools):
    async def at(self, name: str, clock: Clock) -> Store:
        return FileStore(f"file://{self.folder / name}", clock)


class TestFileToolsWithTinySegments(TestSqliteTools):
    async def at(self, name: str, clock: Clock) -> Store:
        return FileStore(
            f"file://{self.folder / name}", clock, first_bytes=1024, segment_bytes=2048, compact_bytes=4096
        )
