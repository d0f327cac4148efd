"""What the file store does when disk, kernel or a cancelled task is in its way. Long: all share a stage."""

# ruff: noqa: PT012  (it is some step of many that fails)

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.storage import Changes, Key, Row, StoreDown, StoreFull, StoreRefused, Wants
from sheratan_stores import file_events
from sheratan_stores.file import FileStore
from tests.conftest import lacking
from tests.stores.disk import Disk, nothing, some
from tests.stores.faults import Gate, add, failing, whole, whole_again
from tests.stores.history import file_store, opened, quiet, save, seen

pytestmark = pytest.mark.usefixtures("unsynced")

CHILD = Path(__file__).with_name("child.py")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FileStore]:
    store = FileStore(f"file://{tmp_path / 'hub'}", VirtualClock(), first_bytes=1 << 16)
    await store.open()
    yield store
    await store.close()


# Syncs that fail


async def test_a_sync_that_failed_ends_the_store(store: FileStore) -> None:
    await add(store, "a")
    with failing("fdatasync", "log-", left=1), pytest.raises(StoreDown, match=r"log-0+1: Input/output error"):
        await add(store, "b")
    for _ in range(2):  # though a second sync would work
        with pytest.raises(StoreDown, match="until it is opened again"):
            await add(store, "c")
        for read in (store.fetch([Key("job", "a")]), store.counts(), store.page("job"), store.heads(), store.events()):
            with pytest.raises(StoreDown, match="until it is opened again"):
                await read
        with pytest.raises(StoreDown, match="until it is opened again"):
            await store.prune_events(0)
    await store.close()
    await store.open()
    assert len(await store.fetch([Key("job", "a")])) == 1
    await add(store, "c")
    await store.close()


async def test_what_a_failed_sync_has_not_written_is_written_when_it_is_opened(tmp_path: Path) -> None:
    """The system shows bytes that the disk has not, and a second sync would leave them there."""
    store = FileStore(f"file://{tmp_path / 'hub'}", VirtualClock(), first_bytes=1 << 14)
    await store.open()
    await add(store, "a")
    log = tmp_path / "hub" / "log-000000000001"
    on_disk = log.read_bytes()
    with failing("fdatasync", "log-", left=1), pytest.raises(StoreDown):
        await add(store, "b", 3000)
    await store.close()
    disk = Disk(tmp_path)
    disk.contents[disk.names[log]] = on_disk
    with disk.recorded():
        await store.open()
        await whole(store, "a", "b")
        await add(store, "c", 3000)
        shown = await seen(store)
    left = tmp_path / "left"
    left.mkdir()
    disk.after_power_cut(len(disk.changes), nothing).put(left)
    assert await opened(left / "hub") == shown
    await store.close()


async def test_a_ledger_that_cannot_be_synced_ends_the_store_and_loses_nothing(tmp_path: Path) -> None:
    store = file_store(tmp_path / "hub")
    await store.open()
    ids = [f"{n:03}" for n in range(60)]
    done = []
    with failing("fdatasync", "events-", left=1), pytest.raises(StoreDown, match="events-0"):
        for id in ids:
            await add(store, id, 100)
            await quiet(store)
            done.append(id)
    assert len(done) > 10
    await store.close()
    await store.open()
    await whole(store, *done)
    on_disk = sorted(path.name for path in store.folder.glob("log-*"))
    assert on_disk[0] == "log-000000000001", "what the ledger may not have is still in the log"
    await add(store, "next")
    await whole_again(store, *done, "next")
    await store.close()


@pytest.mark.parametrize("when", [3, 4, 5])
async def test_no_commit_is_reported_after_a_real_sync_failed(tmp_path: Path, when: int) -> None:
    assert shutil.which("strace"), "strace is not there: apt-get install strace"
    faults = ["-e", "trace=fdatasync", "-e", f"inject=fdatasync:error=EIO:when={when}"]
    command = [sys.executable, str(CHILD), "commit", f"file://{tmp_path / 'hub'}"]
    run = subprocess.run(
        ["strace", "-f", "-qq", "-o", str(tmp_path / "trace"), *faults, *command],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    if "injection" in run.stderr or "ptrace" in run.stderr:
        lacking("strace may not trace here")
    lines = run.stdout.splitlines()
    failed = next(n for n, line in enumerate(lines) if "opened again" in line)
    assert all("opened again" in line for line in lines[failed:])
    await acknowledged_is_there(tmp_path / "hub", int(lines[failed - 1]) if failed > 1 else 0)


async def acknowledged_is_there(folder: Path, seq: int) -> None:
    """Everything up to `seq` is in the store that `child.py` has filled, at most one save beyond it, no half of one."""
    store = FileStore(f"file://{folder}", VirtualClock())
    await store.open()
    rows = len((await store.page("job", limit=1_000_000, examine=1_000_000)).rows)
    assert rows in (seq, seq + 3)
    assert len(await store.events(limit=1_000_000)) == rows
    assert await store.counts() == ({"rows": rows} if rows else {})
    await store.close()


@pytest.mark.parametrize("commits", [1, 20, 2000])
async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, commits: int) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(CHILD), "commit", f"file://{tmp_path / 'hub'}"),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    for _ in range(1 + commits):
        await asyncio.wait_for(process.stdout.readline(), 30)
    process.kill()
    said = (await asyncio.wait_for(process.stdout.read(), 30)).split()
    await process.wait()
    await acknowledged_is_there(tmp_path / "hub", max(3 * commits, *map(int, said[-1:] or [0]), 0))


# Writes that are refused


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, StoreFull), (errno.EIO, StoreDown)])
async def test_a_write_that_is_refused_is_cut_back(store: FileStore, number: int, error: type[StoreDown]) -> None:
    await add(store, "a")
    log = store.folder / "log-000000000001"
    before = log.read_bytes()
    with failing("pwrite", "log-", number, left=1) as fault, pytest.raises(error) as caught:
        await add(store, "b")
    assert type(caught.value) is error
    assert str(store.folder) in str(caught.value)
    assert fault.calls == 1, "what was not written need not be cut back"
    assert log.read_bytes() == before
    await whole(store, "a")
    assert await add(store, "c") == 2
    await whole_again(store, "a", "c")


def first_half(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None]) -> None:
    """The next record is written by half; `then` is given the number of each call and may raise."""
    real, calls = os.pwrite, iter(range(1_000_000))

    def pwrite(file: int, data: Any, at: int) -> int:
        if "log-" not in os.readlink(f"/proc/self/fd/{file}"):
            return real(file, data, at)
        call = next(calls)
        then(call)
        return real(file, data[: len(data) // 2] if call == 0 else data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)


async def test_a_write_that_is_refused_in_the_middle_is_cut_back(store: FileStore) -> None:
    await add(store, "a")
    log = store.folder / "log-000000000001"
    before = log.read_bytes()

    def full_at_second(call: int) -> None:
        if call == 1:
            assert log.read_bytes() != before
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoreFull):
        first_half(patch, full_at_second)
        await add(store, "b", 2000)
    assert log.read_bytes() == before
    await add(store, "c")
    await whole_again(store, "a", "c")


async def test_a_write_that_goes_by_halves_is_whole(store: FileStore) -> None:
    with pytest.MonkeyPatch.context() as patch:
        first_half(patch, lambda call: None)
        await add(store, "a", 2000)
    await whole_again(store, "a")


async def test_what_cannot_be_cut_back_ends_the_store(store: FileStore) -> None:
    await add(store, "a")

    def fail_after_first(call: int) -> None:
        if call:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoreDown, match="until it is opened again"):
        first_half(patch, fail_after_first)
        await add(store, "b", 2000)
    with pytest.raises(StoreDown):
        await store.counts()
    await store.close()


async def test_what_was_cut_back_is_on_disk_before_another_is_written_there(tmp_path: Path) -> None:
    store = FileStore(f"file://{tmp_path / 'hub'}", VirtualClock(), first_bytes=1 << 14)
    disk = Disk(tmp_path)

    def full_at_second(call: int) -> None:
        if call == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    with disk.recorded():
        await store.open()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StoreFull):
            first_half(patch, full_at_second)
            await add(store, "a", 4000)
        await add(store, "b", 4000, durable=False)
    for seed in range(200):
        left = tmp_path / "left" / f"{seed}"
        left.mkdir(parents=True)
        disk.after_power_cut(len(disk.changes), some(seed)).put(left)
        shown = await opened(left / "hub")
        assert len(shown[0][0]) in (0, 1)
    await store.close()


# The next segment


async def test_a_segment_that_finds_no_room_is_made_when_there_is_some(tmp_path: Path) -> None:
    store = file_store(tmp_path / "hub")
    await store.open()
    done = []
    with failing("pwrite", ".tmp", errno.ENOSPC), pytest.raises(StoreFull, match="No space left"):
        for n in range(100):
            await add(store, f"{n:02}", 50)
            done.append(f"{n:02}")
    assert done
    assert not list(store.folder.glob("log-*.tmp"))
    with failing("pwrite", ".tmp", errno.ENOSPC), pytest.raises(StoreFull):
        await add(store, "again", 600)
    await whole(store, *done)
    for n in range(30):
        await add(store, f"more{n:02}", 300)
        done.append(f"more{n:02}")
    await whole_again(store, *done)
    await store.close()


@pytest.mark.parametrize("function", ["open", "fsync", "replace", "ftruncate"])
async def test_a_segment_that_cannot_be_made_is_made_another_time(tmp_path: Path, function: str) -> None:
    store = file_store(tmp_path / "hub")
    await store.open()
    done, refused = [], 0
    for n in range(60):
        with failing(function, "log-", errno.EMFILE if function == "open" else errno.EIO, left=2 if n % 3 == 0 else 0):
            try:
                await add(store, f"{n:02}", 150)
                done.append(f"{n:02}")
            except StoreDown:
                refused += 1
            await quiet(store)
    assert refused or function == "ftruncate"
    await whole_again(store, *done)
    await store.close()


async def test_nothing_is_written_behind_a_seal(tmp_path: Path) -> None:
    """The next segment is there, but cannot be opened: the log does not go on, neither here nor there."""
    store = file_store(tmp_path / "hub")
    await store.open()
    done = []
    refused = 0
    for n in range(40):
        for size in (900, 10):
            await quiet(store)
            with failing("open", "log-", errno.EMFILE, left=1, but=".tmp"):
                try:
                    await add(store, f"{n:02}-{size}", size)
                    done.append(f"{n:02}-{size}")
                except StoreDown:
                    refused += 1
    assert refused > 5
    await whole_again(store, *done)
    await store.close()


# The ledger


async def test_a_ledger_that_cannot_be_written_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_events, "WAITING_BYTES", 50)
    store = file_store(tmp_path / "hub")
    await store.open()
    ids = [f"{n:02}" for n in range(40)]
    with failing("pwrite", "events-", errno.ENOSPC), caplog.at_level(logging.WARNING):
        for id in ids[:20]:
            await add(store, id, 200)
            await quiet(store)
        await whole(store, *ids[:20])
        assert [line.seq for line in await store.events(7, 5)] == [8, 9, 10, 11, 12]
        assert await store.prune_events(store._clock.now() + 1) == 0
        assert not list(store.folder.glob("snapshot-*")), "the log goes only when the ledger has its lines"
    said = [record.getMessage() for record in caplog.records if "events wait" in record.getMessage()]
    assert len(said) == 1
    for id in ids[20:]:
        await add(store, id, 200)
        await quiet(store)
    assert list(store.folder.glob("snapshot-*"))
    await whole_again(store, *ids)
    await store.close()


async def test_a_read_that_is_cancelled_while_the_ledger_cannot_be_written_loses_nothing(store: FileStore) -> None:
    ids = [f"{n}" for n in range(5)]
    for id in ids:
        await add(store, id)
    reached, go_on = threading.Event(), threading.Event()

    def pwrite(file: int, *rest: Any) -> int:
        if "events-" in os.readlink(f"/proc/self/fd/{file}"):
            reached.set()
            assert go_on.wait(30)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, *rest)

    real = os.pwrite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        reading = asyncio.create_task(store.events())
        await asyncio.to_thread(reached.wait, 30)
        reading.cancel()
        await settle()
        go_on.set()
        await asyncio.wait({reading}, timeout=30)
    assert reading.cancelled()
    await add(store, "next")
    await whole_again(store, *ids, "next")


async def test_a_ledger_file_that_goes_while_it_runs_is_named(store: FileStore) -> None:
    await add(store, "a")
    await whole(store, "a")
    file = store.folder / f"events-{1:020}"
    file.unlink()
    for use in (store.events(), store.prune_events(store._clock.now() + 1)):
        with pytest.raises(StoreDown, match=f"{file} cannot be read"):
            await use
    assert await store.counts() == {"rows": 1}


@pytest.mark.parametrize("snapshot", [True, False])
async def test_what_is_pruned_stays_pruned_though_nobody_waits_for_it(tmp_path: Path, snapshot: bool) -> None:
    """The task that asked for it is cancelled; and a snapshot is taken at once."""
    store = file_store(tmp_path / "hub")
    await store.open()
    for n in range(20):
        await add(store, f"{n:02}", 100)
    await store.events()
    await store._clock.advance(10)
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch, "fdatasync", "log-")
        pruning = asyncio.create_task(store.prune_events(store._clock.now()))
        await gate.until_reached()
        pruning.cancel()
        await settle()
        gate.opened.set()
        await asyncio.wait({pruning}, timeout=30)
    if snapshot:
        store._compact_bytes = 1
        await add(store, "big", 5000)
        await quiet(store)
        assert list(store.folder.glob("snapshot-*"))
    shown = await seen(store)
    assert len(shown[-1]) == snapshot
    await store.close()
    assert await opened(store.folder) == shown


# Tasks that end


@pytest.mark.parametrize("function", ["pwrite", "fdatasync"])
async def test_a_cancelled_task_keeps_the_transaction_until_its_outcome_is_known(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    gate = Gate(monkeypatch, function, "log-")
    cancelled = asyncio.create_task(add(store, "a"))
    await gate.until_reached()
    following = asyncio.create_task(add(store, "b"))
    for _ in range(3):
        cancelled.cancel()
        await settle()
    assert not cancelled.done()
    assert not following.done()
    assert await store.counts() == {}, "nothing is true before it is on disk"
    gate.opened.set()
    await asyncio.wait({cancelled, following}, timeout=30)
    assert cancelled.cancelled()
    assert following.result() == 2
    await whole_again(store, "a", "b")


@pytest.mark.parametrize("turns", range(0, 60, 2))
async def test_a_cancelled_save_is_whole_or_absent_while_segments_change(tmp_path: Path, turns: int) -> None:
    store = file_store(tmp_path / "hub")
    await store.open()
    there = []
    for n in range(12):
        task = asyncio.create_task(add(store, f"{n:02}", 400))
        await settle(turns)
        task.cancel()
        await asyncio.wait({task})
        if await store.fetch([Key("job", f"{n:02}")]):
            there.append(f"{n:02}")
    await whole_again(store, *there)
    await store.close()


@pytest.mark.parametrize("turns", range(0, 40, 3))
async def test_opening_that_is_cancelled_leaves_the_folder_free(tmp_path: Path, turns: int) -> None:
    store = file_store(tmp_path / "hub")
    opening = asyncio.create_task(store.open())
    await settle(turns)
    opening.cancel()
    await asyncio.wait({opening})
    if not opening.cancelled():
        await store.close()
    assert (await opened(tmp_path / "hub"))[0] == [[], []]


async def test_closing_waits_for_the_transaction_under_way(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "fdatasync", "log-")
    saving = asyncio.create_task(add(store, "a"))
    await gate.until_reached()
    closing = asyncio.create_task(store.close())
    await settle()
    assert not closing.done()
    gate.opened.set()
    await asyncio.wait({saving, closing}, timeout=30)
    assert saving.result() == 1
    await store.open()
    await whole(store, "a")


async def test_a_store_that_is_not_open_refuses_everything(store: FileStore) -> None:
    async with store.begin() as kept:
        await kept.load(Wants())
    with pytest.raises(ValueError, match="once"):
        await kept.save(Changes(counts={"a": 1}))
    waiting = asyncio.create_task(add(store, "a"))
    async with store.begin():
        await settle()
        closing = asyncio.create_task(store.close())
    await asyncio.wait({waiting, closing})
    assert waiting.result() == 1
    for _ in range(2):
        for use in (store.counts(), store.events(), store.fetch([]), store.heads(), store.prune_events(0)):
            with pytest.raises(StoreDown, match="is not open"):
                await use
        with pytest.raises(StoreDown, match="is not open"):
            await add(store, "b")
        await store.close()
    await store.open()
    with pytest.raises(ValueError, match="open already"):
        await store.open()
    await whole(store, "a")


async def test_a_value_no_store_takes_is_a_bug_that_leaves_no_trace(store: FileStore) -> None:
    await add(store, "a")
    for changes in (
        Changes(new=[Row("job", "b", b"", order=2**64)], counts={"c": 1}),
        Changes(new=[Row("job", "\ud800", b"")], counts={"c": 1}),
        Changes(counts={"c": 2**64}),
    ):
        with pytest.raises((OverflowError, UnicodeEncodeError)):
            await save(store, changes)
    await add(store, "c")
    await whole_again(store, "a", "c")


# A disk without room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        lacking("only root can mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


async def test_a_full_disk_refuses_and_works_again_with_room(small_disk: Path) -> None:
    store = FileStore(f"file://{small_disk / 'hub'}", VirtualClock(), first_bytes=1 << 16)
    await store.open()
    done = []
    with pytest.raises(StoreFull, match=f"{store.folder} has no room"):
        for n in range(1000):
            await add(store, f"{n:03}", 10_000, kind="node" if n == 5 else "job")
            done.append(f"{n:03}")
    assert len(done) > 20
    ids = [id for id in done if id != "005"]
    rows = await store.page("job", limit=1000)
    assert [row.id for row in rows.rows] == ids
    await store.close()
    await store.open()
    rows = await store.page("job", limit=1000)
    assert [row.id for row in rows.rows] == ids, "a disk that is full since then does not keep the store from opening"
    assert len(await store.events()) == len(done)
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert await add(store, "now", 100_000) == len(done) + 1
    await store.close()
    await store.open()
    assert len(await store.events()) == len(done) + 1
    await store.close()


async def test_a_disk_too_small_for_a_store_is_left_as_it_was(small_disk: Path) -> None:
    folder = small_disk / "hub"
    with pytest.raises(StoreRefused, match=f"{folder} cannot be made a store: No space left on device"):
        await FileStore(f"file://{folder}", VirtualClock(), first_bytes=2 << 20).open()
    assert [path.name for path in folder.iterdir()] == ["lock"]
    store = FileStore(f"file://{folder}", VirtualClock(), first_bytes=1 << 16)
    await store.open()
    await add(store, "a")
    await store.close()
