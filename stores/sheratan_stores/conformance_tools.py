"""The suite for a store's tools: what `sheratan_hub.storage_tools` lets a store offer beside its work.

    class TestMyTools(ToolsConformance):
        async def at(self, name, clock): return MyStore(f"mine://somewhere/{name}", clock)

Needs what `sheratan_stores.conformance` needs.
"""

# ruff: noqa: S101, D102, PT012  (tests assert, a test's name is its sentence, what is not finished is two statements)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.clock import Clock, VirtualClock
from sheratan_hub.storage import Changes, Key, Row, Store, StoreRefused, open_store
from sheratan_hub.storage_tools import Batch, Reading, all_batches, all_rows, tools_of
from sheratan_stores.story import story

__all__ = ["ToolsConformance"]


async def everything(reading: Reading) -> Any:
    """All that a store holds, as it is read."""
    rows = [row for kind in await reading.kinds() async for piece in all_rows(reading, kind) for row in piece]
    batches = [(batch.first, batch.at, list(batch.lines)) async for piece in all_batches(reading) for batch in piece]
    return rows, batches, await reading.counts(), reading.seq


class ToolsConformance:
    """Subclass it, say how a store is made, and run pytest."""

    async def at(self, name: str, clock: Clock) -> Store:
        """The store of this name, not opened; the same one each time, and none is there before."""
        raise NotImplementedError

    @pytest.fixture
    def clock(self) -> VirtualClock:
        """The clock the stores are made with."""
        return VirtualClock()

    async def told(self, clock: VirtualClock, *, close: bool = True) -> Store:
        """A store that has seen something."""
        store = await self.at("told", clock)
        await store.open()
        await story(store, 5, steps=80)
        async with store.begin() as tx:
            await tx.save(
                Changes(new=[Row("big", "b", b"\0" * 300_000), Row("big", "\u00fc", b"")], ledger=[b"1", b"2"])
            )
        if close:
            await store.close()
        return store

    async def read(self, store: Store) -> Any:
        async with tools_of(store, "reading").reading() as reading:
            return await everything(reading)

    async def fill(self, store: Store, content: Any) -> None:
        rows, batches, counts, seq = content
        async with tools_of(store, "filling").filling() as filling:
            for row in rows:
                await filling.rows([row])
            await filling.batches([Batch(*batch) for batch in batches])
            await filling.finish(seq, counts)

    async def test_what_is_read_is_what_is_there(self, clock: VirtualClock) -> None:
        store = await self.told(clock, close=False)
        rows, batches, counts, seq = await self.read(await self.at("told", clock))
        assert sorted(rows, key=lambda row: row.key) == rows
        assert sorted(await store.fetch([row.key for row in rows]), key=lambda row: row.key) == rows
        lines = [line for first, _, told in batches for line in enumerate(told, first)]
        assert lines == [tuple(line) for line in await store.events(0, 10_000)]
        assert counts == await store.counts()
        assert seq == lines[-1][0] + 1
        await store.close()

    async def test_what_is_read_is_of_one_moment(self, clock: VirtualClock) -> None:
        store = await self.told(clock, close=False)
        async with tools_of(await self.at("told", clock), "reading").reading() as reading:
            before = await everything(reading)
            async with store.begin() as tx:
                await tx.save(Changes(new=[Row("big", "c", b"")], gone=[Key("big", "b")], ledger=[b"3"]))
            assert await everything(reading) == before
            assert [row.id for row in await reading.fetch([Key("big", "b"), Key("big", "c")])] == ["b"]
        await store.close()

    async def test_pieces_are_no_larger_than_asked_for(self, clock: VirtualClock) -> None:
        async with tools_of(await self.told(clock), "reading").reading() as reading:
            rows, _, _, _ = await everything(reading)
            for kind in await reading.kinds():
                found, after = [], None
                while piece := await reading.rows(kind, after, 3):
                    assert len(piece) <= 3
                    found += piece
                    after = piece[-1].id
                assert found == [row for row in rows if row.kind == kind]
            assert len(await reading.batches(0, 2)) == 2
            assert await reading.batches(reading.seq - 1) == []

    async def test_what_is_filled_in_is_there_and_goes_on(self, clock: VirtualClock) -> None:
        content = await self.read(await self.told(clock))
        store = await self.at("made", clock)
        await self.fill(store, content)
        assert await self.read(store) == content
        await store.open()
        async with store.begin() as tx:
            assert await tx.save(Changes(new=[Row("big", "c", b"")], ledger=[b"3"])) == content[3]
        await store.close()
        with pytest.raises(StoreRefused):
            await self.fill(store, content)

    async def test_many_pieces_make_one_store(self, clock: VirtualClock) -> None:
        store = await self.at("made", clock)
        async with tools_of(store, "filling").filling() as filling:
            for piece in range(200):
                await filling.rows([Row("job", f"{piece:03}-{n:02}", b"{}") for n in range(50)])
                await filling.batches([Batch(piece * 50 + n + 1, piece, [b"line"]) for n in range(50)])
            await filling.finish(10_001, {"job": 10_000})
        rows, batches, counts, seq = await self.read(store)
        assert (len(rows), len(batches), counts, seq) == (10_000, 10_000, {"job": 10_000}, 10_001)

    async def test_what_is_not_finished_is_not_there(self, clock: VirtualClock) -> None:
        store = await self.at("made", clock)
        with pytest.raises(LookupError):
            async with tools_of(store, "filling").filling() as filling:
                await filling.rows([Row("big", "b", b"")])
                raise LookupError
        with pytest.raises(StoreRefused):
            await self.read(store)
        await self.fill(store, ([Row("big", "c", b"")], [], {"c": 1}, 7))
        assert await self.read(store) == ([Row("big", "c", b"")], [], {"c": 1}, 7)

    async def test_a_copy_beside_who_writes_holds_the_same(self, clock: VirtualClock, tmp_path: Path) -> None:
        store = await self.told(clock, close=False)
        (folder := tmp_path / "copied").mkdir()
        url = await tools_of(await self.at("told", clock), "copy_to").copy_to(folder)
        assert await self.read(open_store(url, clock)) == await self.read(await self.at("told", clock))
        await store.close()

    async def test_a_whole_store_is_salvaged_whole(self, clock: VirtualClock, tmp_path: Path) -> None:
        content = await self.read(store := await self.told(clock))
        async with tools_of(store, "salvaging").salvaging(tmp_path) as (reading, lost):
            rows, batches, _, seq = await everything(reading)
        assert (rows, batches, seq, lost) == (content[0], content[1], content[3], [])

    async def test_compaction_changes_nothing_that_is_seen(self, clock: VirtualClock) -> None:
        store = await self.told(clock, close=False)
        with pytest.raises(StoreRefused):
            await tools_of(await self.at("told", clock), "compact").compact()
        await store.close()
        content = await self.read(store)
        await tools_of(store, "compact").compact()
        assert await self.read(store) == content

    async def test_sizes_are_told_open_or_not(self, clock: VirtualClock) -> None:
        store = await self.told(clock, close=False)
        sizes = await tools_of(store, "sizes").sizes()
        assert sizes.store_bytes >= 300_000
        assert sizes.free_bytes > 0
        await store.close()
        later = await tools_of(store, "sizes").sizes()
        assert later.log_bytes <= later.store_bytes
