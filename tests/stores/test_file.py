"""The file store keeps the contract: as it is made, and with segments so small that every test rotates and compacts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sheratan_hub.clock import Clock
from sheratan_hub.storage import Store
from sheratan_stores.conformance import StoreConformance
from sheratan_stores.file import FileStore


class TestFile(StoreConformance):
    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path) -> None:
        self.url = f"file://{tmp_path / 'hub'}"

    async def make(self, clock: Clock) -> Store:
        return FileStore(self.url, clock)


class TestFileWithTinySegments(TestFile):
    async def make(self, clock: Clock) -> Store:
        return FileStore(self.url, clock, first_bytes=1024, segment_bytes=2048, compact_bytes=4096)
