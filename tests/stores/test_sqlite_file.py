"""What only the SQLite store has: its lock, its format version, and what it refuses to open."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.storage import Changes, Key, Row, StoreDown, StoreRefused, Wants
from sheratan_stores import sqlite_format
from sheratan_stores.sqlite import SqliteStore

CHILD = Path(__file__).with_name("child.py")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hub.db"


def make(path: Path) -> SqliteStore:
    return SqliteStore(f"sqlite://{path}", VirtualClock())


async def fill(path: Path, rows: int = 3) -> None:
    store = make(path)
    await store.open()
    async with store.begin() as tx:
        new = [Row("job", f"{n:05}", b"doc" * 100, lane="l") for n in range(rows)]
        await tx.save(Changes(new=new, ledger=[b"line"]))
    await store.close()


async def refusal(path: Path) -> str:
    """The refusal's text; one sentence that names the place, and nothing in the folder has changed."""
    before = files(path)
    with pytest.raises(StoreRefused) as caught:
        await make(path).open()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(path) == before
    return str(caught.value)


def files(path: Path) -> dict[str, bytes]:
    """Every file beside `path`, but for the lock and SQLite's map of the log, which it makes anew."""
    ours = path.parent.glob(f"{path.name}*")
    return {each.name: each.read_bytes() for each in ours if each.is_file() and each.suffix not in (".lock", ".db-shm")}


@contextmanager
def child(mode: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has opened the store; killed at the end."""
    command = [sys.executable, str(CHILD), mode, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert heard(process) == "open"
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


# Lock


async def test_a_second_store_is_refused_at_once_naming_the_holder(path: Path) -> None:
    store = make(path)
    await store.open()
    begun = time.monotonic()
    text = await refusal(path)
    assert time.monotonic() - begun < 1
    assert f"process {os.getpid()} on {os.uname().nodename} since 2023-11-14T" in text
    assert await store.counts() == {}
    await store.close()


async def test_the_lock_dies_with_its_process(path: Path) -> None:
    with child("hold", path) as process:
        assert f"process {process.pid} " in await refusal(path)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        await fill(path)


async def test_a_child_of_a_killed_hub_does_not_keep_the_lock(path: Path) -> None:
    with child("fork", path) as process:
        orphan = int(heard(process))
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        os.kill(orphan, 0)
        await fill(path)


async def test_a_refused_open_leaves_the_lock_free(path: Path) -> None:
    path.write_bytes(b"no database")
    await refusal(path)
    path.unlink()
    await fill(path)


async def test_a_lock_file_without_sense_still_locks(path: Path) -> None:
    store = make(path)
    await store.open()
    lock = path.with_name("hub.db.lock")
    assert json.loads(lock.read_text())["pid"] == os.getpid()
    lock.write_text("{")
    assert "another process" in await refusal(path)
    await store.close()


async def test_an_open_store_is_not_opened_again(path: Path) -> None:
    store = make(path)
    await store.open()
    with pytest.raises(ValueError, match="open already"):
        await store.open()
    assert await store.counts() == {}
    await store.close()


# Place


async def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "var" / "hub.db"
    store = make(path)
    await store.open()
    modes = {each.name: each.stat().st_mode & 0o777 for each in (path.parent, *path.parent.iterdir())}
    await store.close()
    assert modes == {"var": 0o700, **dict.fromkeys(["hub.db", "hub.db-wal", "hub.db-shm", "hub.db.lock"], 0o600)}


async def test_the_path_is_taken_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a b%20?mode=ro#x.db", ":memory:", "é.db"):
        await fill(Path(name))
        await fill_more(Path(name))
        assert (tmp_path / name).read_bytes().startswith(b"SQLite format 3\0")


async def fill_more(path: Path) -> None:
    store = make(path)
    await store.open()
    assert len(await store.fetch([Key("job", "00000")])) == 1
    await store.close()


async def test_a_place_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    await refusal(tmp_path)
    await refusal(tmp_path / "file" / "hub.db")


# Format


async def test_a_newer_format_is_refused_untouched(path: Path) -> None:
    await fill(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE meta SET value = 99 WHERE key = 'format'")
        db.commit()
    text = await refusal(path)
    assert "format 99" in text
    assert f"up to {len(sqlite_format.STEPS)}" in text


async def test_a_newer_format_whose_log_was_not_folded_is_refused_untouched(path: Path, tmp_path: Path) -> None:
    await fill(path)
    copy = tmp_path / "copy" / "hub.db"
    copy.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE meta SET value = 99 WHERE key = 'format'")
        db.commit()
        for name, content in files(path).items():
            (copy.parent / name).write_bytes(content)
    assert "format 99" in await refusal(copy)


async def test_an_older_format_goes_up_all_steps_in_one_transaction(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(path)
    good = "CREATE TABLE later (a)"
    monkeypatch.setattr(sqlite_format, "STEPS", [*sqlite_format.STEPS, good, "CREATE TABLE later (a)"])
    with pytest.raises(StoreDown, match="later"):
        await make(path).open()
    monkeypatch.setattr(sqlite_format, "STEPS", [sqlite_format.FORMAT_1, good, "INSERT INTO later VALUES (1)"])
    await fill_more(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT a FROM later").fetchall() == [(1,)]
        assert db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone() == (3,)
    monkeypatch.undo()
    assert "format 3" in await refusal(path)


async def test_a_store_that_was_killed_while_it_was_made_is_made_again(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
    await fill(path)


# Damage


@pytest.mark.parametrize("content", [b"x", b"{}" * 5000, b"SQLite format 3\0", b"SQLite format 3\0" + b"\xff" * 9000])
async def test_what_is_no_database_is_refused_untouched(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    await refusal(path)


async def test_a_database_of_another_program_is_refused_untouched(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE meta (key, value)")
    assert "another program" in await refusal(path)


async def test_a_store_without_its_tables_is_refused(path: Path) -> None:
    await fill(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP TABLE meta")
    assert "damaged" in await refusal(path)


@pytest.mark.parametrize("harm", ["DELETE FROM meta", "UPDATE meta SET value = 'none'"])
async def test_a_store_that_does_not_say_its_format_is_refused(path: Path, harm: str) -> None:
    await fill(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(harm)
    assert "is damaged: it does not say its format" in await refusal(path)


def zeroed(content: bytes) -> bytes:
    return content[:8192] + bytes(4096) + content[12288:]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2 // 4096 * 4096
    return content[:middle] + b"\xff" * 200 + content[middle + 200 :]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("harm", [zeroed, flipped, cut])
async def test_a_damaged_database_is_refused_untouched(path: Path, harm: Callable[[bytes], bytes]) -> None:
    await fill(path, rows=500)
    path.write_bytes(harm(path.read_bytes()))
    assert "damaged" in await refusal(path)


async def test_damage_met_while_running_ends_the_store(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(path, rows=500)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff" * (len(content) // 2))
    monkeypatch.setattr(sqlite_format, "CHECK_BYTES", 0)
    store = make(path)
    await store.open()
    with pytest.raises(StoreDown, match="CORRUPT"):
        await store.page("job", limit=500)
    with pytest.raises(StoreDown):
        await store.counts()
    await store.close()


async def test_a_closed_store_refuses_everything(path: Path) -> None:
    store = make(path)
    for _ in range(2):
        with pytest.raises(StoreDown, match="not open"):
            await store.counts()
        with pytest.raises(StoreDown, match="not open"):
            async with store.begin() as tx:
                await tx.load(Wants())
        await store.open()
        await store.close()


async def test_a_text_with_a_nul_is_found(path: Path) -> None:
    store = make(path)
    await store.open()
    row = Row("job", "a\0b", b"")
    async with store.begin() as tx:
        await tx.save(Changes(new=[row, Row("job", "a", b"")], counts={"c\0d": 1, "c": 2}))
    async with store.begin() as tx:
        seen = await tx.load(Wants(keys={row.key, Key("job", "a\0c")}, counts={"c\0d"}))
    assert seen.rows == {row.key: row}
    assert seen.counts == {"c\0d": 1}
    await store.close()
