"""What SQLite does when disk, kernel, a foreign process or a cancelled task is in its way. Long: all share a stage."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.storage import Changes, Key, Row, StoreDown, StoreFull, Wants
from sheratan_stores import sqlite, sqlite_connection, sqlite_rows
from sheratan_stores.sqlite import SqliteStore
from tests.conftest import lacking

CHILD = Path(__file__).with_name("child.py")


async def add(store: SqliteStore, id: str, size: int = 10) -> int:
    async with store.begin() as tx:
        await tx.load(Wants(keys={Key("job", id)}))
        return await tx.save(Changes(new=[Row("job", id, bytes(size))], counts={"rows": 1}, ledger=[b"line"]))


async def whole(store: SqliteStore, rows: int) -> None:
    """Rows, counter and ledger agree, however much there is."""
    page = await store.page("job", limit=100_000, examine=100_000)
    events = await store.events(limit=100_000)
    assert (len(page.rows), len(events)) == (rows, rows)
    assert await store.counts() == ({"rows": rows} if rows else {})


# No room


async def test_a_full_database_refuses_and_works_again_with_room(store: SqliteStore) -> None:
    await add(store, "first")

    def room(pages: int) -> Any:
        return lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone()

    (used,) = await store.write(lambda db: db.execute("PRAGMA page_count").fetchone())
    await store.write(room(used + 2))
    for _ in range(2):
        with pytest.raises(StoreFull, match=str(store.path)):
            await add(store, "big", 100_000)
        await whole(store, 1)
    await store.write(room(used + 2000))
    assert await add(store, "big", 100_000) == 2
    await whole(store, 2)


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
    store = SqliteStore(f"sqlite://{small_disk / 'hub.db'}", VirtualClock())
    await store.open()
    done = await add_until_full(store)
    assert done > 10
    await whole(store, done)
    with pytest.raises(StoreFull):
        await add(store, "again", 100_000)
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert await add(store, "now", 100_000) == done + 1
    await whole(store, done + 1)
    await store.close()
    await store.open()
    await whole(store, done + 1)
    await store.close()


async def add_until_full(store: SqliteStore) -> int:
    for done in range(1000):
        try:
            await add(store, f"{done:04}", 20_000)
        except StoreFull:
            return done
    raise AssertionError("the disk is never full")


async def test_a_database_that_may_not_be_written_is_full(store: SqliteStore) -> None:
    await store.write(lambda db: db.execute("PRAGMA query_only = 1"))
    with pytest.raises(StoreFull):
        await add(store, "a")
    await store.write(lambda db: db.execute("PRAGMA query_only = 0"))
    assert await add(store, "a") == 1


# Syncs that fail


def failing(name: str) -> Any:
    def fail(*_: object) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode, error.sqlite_errorname = getattr(sqlite3, name), name
        raise error

    return fail


@pytest.mark.parametrize("name", ["SQLITE_IOERR_FSYNC", "SQLITE_IOERR_WRITE", "SQLITE_CORRUPT_INDEX", "SQLITE_ERROR"])
async def test_a_commit_that_failed_ends_the_store(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    await add(store, "a")
    with monkeypatch.context() as broken:
        broken.setattr(sqlite, "commit", failing(name))
        with pytest.raises(StoreDown, match=name):
            await add(store, "b")
    for _ in range(2):
        with pytest.raises(StoreDown, match="until it is opened again"):
            await add(store, "c")
        with pytest.raises(StoreDown, match=name):
            await store.fetch([Key("job", "a")])
    await store.close()
    await store.open()
    await whole(store, 1)
    assert await add(store, "c") == 2


async def test_a_failed_rollback_ends_the_store(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(sqlite_rows, "insert", lambda db, rows: db.set_authorizer(deny_rollback))
        broken.setattr(sqlite, "commit", failing("SQLITE_FULL"))
        with pytest.raises(StoreFull):
            await add(store, "a")
    with pytest.raises(StoreDown, match="until it is opened again"):
        await add(store, "b")


def deny_rollback(action: int, what: str | None, *_: object) -> int:
    return sqlite3.SQLITE_DENY if what == "ROLLBACK" else sqlite3.SQLITE_OK


@pytest.mark.parametrize("when", [11, 12, 13])
async def test_no_commit_is_reported_after_a_real_sync_failed(tmp_path: Path, when: int) -> None:
    assert shutil.which("strace"), "strace is not there: apt-get install strace"
    faults = ["-e", "trace=fsync,fdatasync", "-e", f"inject=fsync,fdatasync:error=EIO:when={when}"]
    command = [sys.executable, str(CHILD), "commit", str(tmp_path / "hub.db")]
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
    failed = next(n for n, line in enumerate(lines) if "SQLITE_IOERR_FSYNC" in line)
    assert all("opened again" in line for line in lines[failed:])
    await acknowledged_is_there(tmp_path / "hub.db", int(lines[failed - 1]))


# Processes and tasks that end


@pytest.mark.parametrize("commits", [1, 20, 120])
async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, commits: int) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(CHILD), "commit", str(tmp_path / "hub.db")),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    for _ in range(1 + commits):
        await asyncio.wait_for(process.stdout.readline(), 30)
    process.kill()
    said = (await asyncio.wait_for(process.stdout.read(), 30)).split()
    await process.wait()
    await acknowledged_is_there(tmp_path / "hub.db", max(3 * commits, *map(int, said[-1:] or [0]), 0))


async def acknowledged_is_there(path: Path, seq: int) -> None:
    """Everything up to `seq` is in the store, at most one save beyond it, and no half of one."""
    store = SqliteStore(f"sqlite://{path}", VirtualClock())
    await store.open()
    rows = len((await store.page("job", limit=1_000_000, examine=1_000_000)).rows)
    assert rows in (seq, seq + 3)
    await whole(store, rows)
    assert await store.heads() == {"l": 0}
    await store.close()


class Gate:
    """Stops the writer's thread inside `save` until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        function = getattr(sqlite_rows, name)

        def wait(*given: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(30)
            return function(*given)

        monkeypatch.setattr(sqlite_rows, name, wait)


@pytest.mark.parametrize(("name", "done"), [("counts_of", 0), ("insert", 1)])
async def test_a_cancelled_task_keeps_the_lock_until_its_outcome_is_known(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, name: str, done: int
) -> None:
    gate = Gate(monkeypatch, name)
    cancelled = asyncio.create_task(add(store, "a"))
    await asyncio.to_thread(gate.reached.wait, 30)
    following = asyncio.create_task(add(store, "b"))
    for _ in range(3):
        cancelled.cancel()
        await settle()
    assert not cancelled.done()
    assert not following.done()
    gate.opened.set()
    await asyncio.wait({cancelled, following}, timeout=30)
    assert cancelled.cancelled()
    assert following.result() == 1 + done
    await whole(store, 1 + done)


async def test_a_cancelled_read_lets_the_store_close(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "counts_from")
    read = asyncio.create_task(store.counts())
    await asyncio.to_thread(gate.reached.wait, 30)
    closing = asyncio.create_task(store.close())
    await settle()
    read.cancel()
    await settle()
    gate.opened.set()
    await asyncio.wait({read, closing}, timeout=30)
    assert read.cancelled()
    assert closing.done()


async def test_close_waits_for_the_transaction_under_way(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "insert")
    saving = asyncio.create_task(add(store, "a"))
    await asyncio.to_thread(gate.reached.wait, 30)
    closing = asyncio.create_task(store.close())
    await settle()
    assert not closing.done()
    gate.opened.set()
    await asyncio.wait({saving, closing}, timeout=30)
    assert saving.result() == 1
    await store.open()
    await whole(store, 1)


# Others


async def test_a_foreign_writer_is_waited_for_so_long_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_connection, "BUSY_SECONDS", 0.05)
    store = SqliteStore(f"sqlite://{tmp_path / 'hub.db'}", VirtualClock())
    await store.open()
    assert await store.write(lambda db: db.execute("PRAGMA busy_timeout").fetchone()) == (50,)
    with closing(sqlite3.connect(store.path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreDown, match="SQLITE_BUSY"):
            await add(store, "a")
        assert await store.counts() == {}
        shell.execute("ROLLBACK")
    assert await add(store, "a") == 1
    await store.close()


async def test_a_value_no_database_takes_is_a_bug_that_leaves_no_trace(store: SqliteStore) -> None:
    async with store.begin() as tx:
        with pytest.raises(OverflowError):
            await tx.save(Changes(new=[Row("job", "a", b"", order=2**63)], counts={"c": 1}))
    for use in (tx.load(Wants()), tx.save(Changes())):
        with pytest.raises(ValueError, match=r"over|once"):
            await use
    await whole(store, 0)


async def test_a_row_put_twice_is_a_bug(store: SqliteStore) -> None:
    await add(store, "a")
    put = [Row("job", "a", doc) for doc in (b"1", b"2")]
    async with store.begin() as tx:
        await tx.load(Wants(keys={put[0].key}))
        with pytest.raises(ValueError, match="twice"):
            await tx.save(Changes(put=put))
    assert await store.fetch([put[0].key]) == [Row("job", "a", bytes(10))]


async def test_pruning_goes_in_steps(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "PRUNE_BATCHES", 4)
    for n in range(10):
        await add(store, f"{n}")
    pruning = asyncio.create_task(store.prune_events(await store.now() + 1))
    await settle(1)
    assert await add(store, "between") == 11
    assert await pruning == 11, "what was saved between two steps is old enough for the last"
    assert await store.events() == []
    assert await add(store, "after") == 12
