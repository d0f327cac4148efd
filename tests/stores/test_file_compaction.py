"""The file store's snapshots: taken beside transactions, by halves never, again when they fail; then old files go."""

from __future__ import annotations

import asyncio
import errno
import logging
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.clock import settle
from sheratan_hub.storage import Changes, Key, Row, Wants
from sheratan_stores import file_compact
from sheratan_stores.file import FileStore
from tests.stores.disk import Disk, nothing
from tests.stores.faults import Gate, add, failing, whole_again
from tests.stores.history import file_store, opened, quiet, save, seen

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.mark.parametrize("function", ["open", "pwrite", "fsync", "replace"])
async def test_a_snapshot_that_fails_is_tried_again(
    tmp_path: Path, function: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = file_store(tmp_path / "hub")
    await store.open()
    ids = [f"{n:02}" for n in range(60)]
    with failing(function, "snapshot-", errno.ENOSPC), caplog.at_level(logging.WARNING):
        for id in ids[:40]:
            await add(store, id, 200)
            await quiet(store)
    assert not list(store.folder.glob("snapshot-*"))
    said = [record.getMessage() for record in caplog.records]
    assert said
    assert all("could not be compacted" in text and str(store.folder) in text for text in said)
    number, more = store._log.number, iter(ids[40:])
    while store._log.number == number:
        await add(store, next(more), 200)
    await quiet(store)
    (_,) = store.folder.glob("snapshot-*")
    assert len(list(store.folder.glob("log-*"))) < 4
    await whole_again(store, *sorted(set(ids) - set(more)))
    await store.close()


async def test_a_log_that_grows_over_many_short_lives_is_compacted(tmp_path: Path) -> None:
    ids = [f"{n:02}" for n in range(60)]
    for begin in range(0, 60, 4):
        store = file_store(tmp_path / "hub")
        await store.open()
        for id in ids[begin : begin + 4]:
            await add(store, id, 200)
        await quiet(store)
        await store.close()
    assert list(store.folder.glob("snapshot-*"))
    assert len((await opened(store.folder))[-1]) == 60


async def test_old_segments_that_cannot_be_removed_go_another_time(tmp_path: Path) -> None:
    store = file_store(tmp_path / "hub")
    await store.open()
    ids = [f"{n:02}" for n in range(60)]
    for id in ids:
        with failing("unlink", "log-", errno.EACCES, left=1 if id < "40" else 0):
            await add(store, id, 200)
            await quiet(store)
    assert not list(store.folder.glob("log-000000000001"))
    await whole_again(store, *ids)
    await store.close()


async def filled(folder: Path, rows: int, size: int = 100) -> FileStore:
    """A store in whose next big save a snapshot begins."""
    store = file_store(folder)
    await store.open()
    for begin in range(0, rows, 500):
        new = [Row("job", f"{n:06}", b"x" * size) for n in range(begin, min(begin + 500, rows))]
        await save(store, Changes(new=new, counts={"rows": len(new)}))
    await quiet(store)
    return store


async def test_others_commit_between_the_steps_of_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(file_compact, "ROWS", 100)
    store = await filled(tmp_path / "hub", 4000)
    real = store._state.packed_after

    def counted(*asked: Any) -> Any:
        taken = real(*asked)
        steps.append(len(taken[0]))
        return taken

    monkeypatch.setattr(store._state, "packed_after", counted)
    store._snapshot_bytes = 0
    while store._compacting is None or store._compacting.done():
        await add(store, f"a{len(steps)}-{store._seq}", 2000)
    between, n = 0, 0
    while not store._compacting.done():
        began, n = len(steps), n + 1
        await save(store, Changes(new=[Row("job", f"c{n}", b"")]))
        between += began < len(steps)
    assert between > 5, "commits that ended while the snapshot went on"
    assert max(steps) == 100
    assert sum(steps) >= 4000
    shown = await seen(store)
    await store.close()
    assert await opened(store.folder) == shown


async def test_a_step_of_a_snapshot_is_bounded_in_bytes(tmp_path: Path) -> None:
    store = await filled(tmp_path / "hub", 20, 400_000)
    first, last = store._state.packed_after("job", None, 1000, file_compact.ROWS_BYTES)
    assert (len(first), last) == (3, "000002")
    await store.close()


async def test_what_changes_while_a_snapshot_is_taken_is_in_it_or_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_compact, "ROWS", 2)
    store = await filled(tmp_path / "hub", 60)
    store._snapshot_bytes = 0
    while store._compacting is None or store._compacting.done():
        await add(store, f"a{store._seq}", 2000)
    n = 0
    while not store._compacting.done():
        key = Key("job", f"{n % 60:06}")
        gone = [Key("job", f"{(n + 30) % 60:06}")] if n % 3 == 0 else []
        async with store.begin() as tx:
            found = (await tx.load(Wants(keys={key}))).rows
            put = [Row(*key, b"changed")] if found and key not in gone else []
            new = [Row("job", f"{n:06}-", b"new"), Row(f"kind{n % 5}", f"{n}", b"")]
            await tx.save(Changes(put=put, gone=gone, new=new, counts={"n": 1}))
        n += 1
    assert n > 10
    shown = await seen(store)
    await store.close()
    assert await opened(store.folder) == shown


async def test_a_snapshot_is_no_newer_than_the_log_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that was not to be synced is in the snapshot's rows: it must not be lost from the log then."""
    disk = Disk(tmp_path)
    with disk.recorded():
        store = await filled(tmp_path / "hub", 10)
        store._snapshot_bytes = 0
        gate = Gate(monkeypatch, "pwrite", "snapshot-")
        while store._compacting is None or store._compacting.done():
            await add(store, f"a{store._seq}", 2000)
        await gate.until_reached()
        await add(store, "late", durable=False)
        gate.opened.set()
        await quiet(store)
        shown = await seen(store)
        left = tmp_path.with_name(f"{tmp_path.name}-left")
        left.mkdir()
        disk.after_power_cut(len(disk.changes), nothing).put(left)
        await store.close()
    assert await opened(left / "hub") == shown


@pytest.mark.parametrize("function", ["open", "pwrite", "fsync", "replace"])
async def test_closing_while_a_snapshot_is_taken_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    store = await filled(tmp_path / "hub", 50)
    store._snapshot_bytes = 0
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch, function, "snapshot-")
        while store._compacting is None or store._compacting.done():
            await add(store, f"a{store._seq}", 2000)
        await gate.until_reached()
        shown = await seen(store)
        closing = asyncio.create_task(store.close())
        await settle()
        assert not closing.done()
        closing.cancel()
        await settle()
        assert not closing.done(), "it lets go of everything, or of nothing"
        gate.opened.set()
        await asyncio.wait({closing}, timeout=30)
    assert not list(store.folder.glob("*.tmp"))
    await store.close()
    assert await opened(store.folder) == shown
