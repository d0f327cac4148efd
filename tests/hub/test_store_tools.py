"""Whole stores: read beside who writes, copied, backed up, checked, repaired; what is bad is refused, and untouched."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import random
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sheratan_hub.clock import VirtualClock
from sheratan_hub.rules.command import Event
from sheratan_hub.storage import Changes, Key, Row, Store, StoreDown, StoreRefused, open_store
from sheratan_hub.storage_tools import sizes_of, tools_of
from sheratan_hub.store_backup import back_up, restore
from sheratan_hub.store_check import Report, check, describe
from sheratan_hub.store_copy import Content, content, copy
from sheratan_hub.store_repair import Repaired, repair
from sheratan_stores.file import FileStore
from sheratan_stores.file_capture import Captured
from sheratan_stores.file_records import read_all
from sheratan_stores.file_segments import SEAL, is_empty
from sheratan_stores.story import story
from tests.rules.whole import KEYED, a_bit_of_everything
from tests.stores.faults import failing

SCHEMES = ("sqlite", "file")
OTHER = {"sqlite": "file", "file": "sqlite"}
LINE = msgspec.json.encode(Event(1, "job.submitted", "client"))
ROWS, COUNTS = a_bit_of_everything()


def at(scheme: str, path: Path) -> Store:
    return open_store(f"{scheme}://{path}", VirtualClock())


async def filled(scheme: str, path: Path, *, pieces: int = 3, close: bool = True) -> Store:
    """A store that a hub has written: some rows and events a transaction."""
    store = at(scheme, path)
    await store.open()
    rows = [ROWS[key] for key in sorted(ROWS)]
    for start in range(0, len(rows), pieces):
        counts = COUNTS if start == 0 else {}
        async with store.begin() as tx:
            await tx.save(Changes(new=rows[start : start + pieces], counts=counts, ledger=[LINE] * 5))
    if close:
        await store.close()
    return store


async def add(store: Store, number: int, size: int = 10) -> None:
    async with store.begin() as tx:
        await tx.save(Changes(new=[Row("read", f"more-{number}", b"x" * size)], ledger=[LINE]))


async def held(store: Store) -> Content:
    async with tools_of(store).reading() as reading:
        return await content(reading)


async def checked(store: Store) -> Report:
    async with tools_of(store).reading() as reading:
        return await check(reading)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    text: str = request.param
    return text


# Copies


@pytest.mark.parametrize("to", SCHEMES)
@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_a_store_holds_is_the_same_in_its_copy(scheme: str, to: str, seed: int, tmp_path: Path) -> None:
    source = at(scheme, tmp_path / "a")
    await source.open()
    await story(source, seed, steps=120)
    seen = [await source.counts(), await source.heads(), await source.events(0, 10_000)]
    await source.close()
    target = at(to, tmp_path / "b")
    got = await copy(source, target)
    assert got == await held(source) == await held(target)
    await target.open()
    assert [await target.counts(), await target.heads(), await target.events(0, 10_000)] == seen
    async with target.begin() as tx:
        assert await tx.save(Changes(ledger=[b"next"])) == got.next_event
    await target.close()


@pytest.mark.parametrize("to", SCHEMES)
async def test_numbers_go_on_in_a_copy_of_which_all_events_were_pruned(scheme: str, to: str, tmp_path: Path) -> None:
    source = await filled(scheme, tmp_path / "a", close=False)
    last = (await source.events(0, 1000))[-1].seq
    await source.prune_events(await source.now() + 1)
    await source.close()
    target = at(to, tmp_path / "b")
    assert (await copy(source, target)).events == 0
    await target.open()
    async with target.begin() as tx:
        assert await tx.save(Changes(ledger=[LINE])) == last + 1
    await target.close()
    assert (await checked(target)).clean


async def test_nothing_is_overwritten(scheme: str, tmp_path: Path) -> None:
    source = await filled(OTHER[scheme], tmp_path / "source")
    target = await filled(scheme, tmp_path / "target")
    before = hashes(tmp_path)
    with pytest.raises(StoreRefused, match="is there already, and nothing is overwritten"):
        await copy(source, target)
    assert hashes(tmp_path) == before


async def test_a_copy_that_fails_leaves_nothing(scheme: str, tmp_path: Path) -> None:
    source = await filled(OTHER[scheme], tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    with failing("fsync", "target", errno.ENOSPC), pytest.raises(StoreDown, match="No space left"):
        await copy(source, at(scheme, tmp_path / "target"))
    assert sorted(tmp_path.rglob("*")) == before


async def test_a_draft_that_cannot_be_begun_leaves_nothing(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await filled(OTHER[scheme], tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    if scheme == "sqlite":
        monkeypatch.setattr("sheratan_stores.sqlite_filling.FAST", ("cache_size = 1; no more",))
    else:
        monkeypatch.setattr("sheratan_stores.file_filling._Snapshot.begin", no_room)
    with pytest.raises(StoreDown, match="cannot be written"):
        await copy(source, at(scheme, tmp_path / "target"))
    assert sorted(tmp_path.rglob("*")) == before


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


async def test_a_target_that_cannot_be_written_is_one_sentence(scheme: str, tmp_path: Path) -> None:
    source = await filled(OTHER[scheme], tmp_path / "source")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises((StoreRefused, StoreDown), match=r"^/.*/file/target cannot be (written|read): "):
        await copy(source, at(scheme, tmp_path / "file" / "target"))


async def test_files_are_for_their_owner_alone(scheme: str, tmp_path: Path) -> None:
    source = await filled(OTHER[scheme], tmp_path / "source")
    await back_up(source, tmp_path / "backup", VirtualClock())
    await restore(tmp_path / "backup", at(scheme, tmp_path / "new" / "target"), VirtualClock())
    for path in (
        tmp_path / "backup",
        *(tmp_path / "backup").rglob("*"),
        tmp_path / "new",
        *(tmp_path / "new").rglob("*"),
    ):
        assert path.stat().st_mode & 0o077 == 0, path


async def test_a_store_without_tools_is_told_so() -> None:
    class Bare:
        pass

    with pytest.raises(StoreRefused, match=r"^Bare does not offer this: it lacks reading, filling"):
        tools_of(Bare())  # type: ignore[arg-type]
    with pytest.raises(StoreRefused, match="MemoryStore does not offer this"):
        tools_of(open_store("memory://", VirtualClock()))
    assert await sizes_of(open_store("memory://", VirtualClock())) is None


# Reading beside who writes


async def test_what_is_read_is_one_moment(scheme: str, tmp_path: Path) -> None:
    store = await filled(scheme, tmp_path / "a", close=False)
    async with tools_of(at(scheme, tmp_path / "a")).reading() as reading:
        before = await content(reading)
        for number in range(20):
            await add(store, number, 100_000)
        assert await content(reading) == before
        assert "process" in reading.about.held_by
    assert (await held(at(scheme, tmp_path / "a"))).rows["read"] == before.rows["read"] + 20
    async with tools_of(store).reading() as reading:
        assert (await content(reading)).events == before.events + 20
    await add(store, 99)
    await store.close()


async def test_a_backup_is_made_while_the_log_is_compacted(tmp_path: Path) -> None:
    from sheratan_stores.file import FileStore

    store = FileStore(f"file://{tmp_path}/a", VirtualClock(), first_bytes=1024, segment_bytes=4096, compact_bytes=6000)
    await store.open()
    for number in range(60):
        await add(store, number, 500)
        if number % 10 == 9:
            found = await held(at("file", tmp_path / "a"))
            assert (found.rows["read"], found.events) == (number + 1, number + 1)
    await back_up(at("file", tmp_path / "a"), tmp_path / "backup", VirtualClock())
    await store.close()


@pytest.mark.parametrize(("olds", "rows"), [((0, -2), 3), ((-2, 0), 3), ((-3, -2), 1), ((-2,) * 50, 0)])
async def test_a_log_that_is_written_while_it_is_read_is_whole(
    olds: tuple[int, ...], rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is not read in an instant: a part of it, here one record, may be older than what is behind it."""
    clock = VirtualClock()
    store = open_store(f"file://{tmp_path / 'a'}", clock)
    await store.open()
    for number in range(3):
        await add(store, number)
    read, left = Captured.read, list(olds)

    def mixed(files: Captured, name: str) -> bytes:
        data = read(files, name)
        if name.startswith("log-") and left and (old := left.pop(0)):
            record = list(read_all(data, name))[old]
            return data[: record.at] + bytes(record.end - record.at) + data[record.end :]
        return data

    monkeypatch.setattr(Captured, "read", mixed)
    looking = asyncio.ensure_future(held(store))
    while not looking.done():
        await clock.advance(25)
    if rows:
        assert (await looking).rows["read"] == rows
    else:
        with pytest.raises(StoreRefused, match="is damaged"):
            await looking
    await store.close()


def goes_on_in_advance(folder: Path) -> bool:
    """Whether the next file of the log was made already, while there is room in the one before."""
    *_, before, last = [None, *sorted(folder.glob("log-????????????"))]
    return before is not None and is_empty(last) and SEAL not in before.read_bytes()


async def test_a_log_that_goes_on_in_its_next_file_while_it_is_read_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"first_bytes": 1 << 13, "segment_bytes": 1 << 13, "compact_bytes": 1 << 20}
    store = FileStore(f"file://{tmp_path / 'a'}", VirtualClock(), **sizes)
    await store.open()
    read, looks, number = Captured.read, 0, 0

    def meanwhile(files: Captured, name: str) -> bytes:
        nonlocal looks
        data = read(files, name)
        looks += name.startswith("log-")
        if name.startswith("log-") and looks <= 3:
            asyncio.run_coroutine_threadsafe(more(), loop).result(30)
        return data

    async def more() -> None:
        nonlocal number
        for _ in range(4):
            number += 1
            await add(store, number, 2000)

    loop = asyncio.get_running_loop()
    while not goes_on_in_advance(tmp_path / "a"):
        await add(store, number := number + 1)
    monkeypatch.setattr(Captured, "read", meanwhile)
    found = await held(store)
    assert found.next_event == found.rows["read"] + 1
    assert 4 <= found.rows["read"] <= number
    await store.close()


async def test_looking_changes_no_file(scheme: str, tmp_path: Path) -> None:
    (folder := tmp_path / "closed").mkdir()
    store = await filled(scheme, folder / "a", close=False)
    shutil.copytree(folder, crashed := tmp_path / "crashed")  # as a kill leaves it
    await store.close()
    for place in (folder, crashed):
        before = hashes(place)
        found = at(scheme, place / "a")
        assert (await checked(found)).clean
        assert (await describe(found))["jobs"]["pending"] == COUNTS["job:pending"]
        assert hashes(place) == before


async def test_sizes_are_told_open_or_not(scheme: str, tmp_path: Path) -> None:
    store = await filled(scheme, tmp_path / "a", close=False)
    sizes = await sizes_of(store)
    assert sizes is not None
    assert sizes.store_bytes >= sizes.log_bytes > 0 < sizes.free_bytes
    await store.close()
    assert (await sizes_of(store)) is not None


# Checks


async def test_a_contradiction_in_a_store_is_found(scheme: str, tmp_path: Path) -> None:
    store = await filled(scheme, tmp_path / "a", close=False)
    async with store.begin() as tx:
        await tx.save(Changes(gone=[Key("job", KEYED)]))
    await store.close()
    report = await checked(store)
    assert {"key_without_job", "beside_without_job", "counts_off"} <= set(report.found)
    assert not report.clean
    async with tools_of(store).reading() as reading:
        assert not (await check(reading, most=1)).complete


async def test_a_registry_that_differs_is_found(tmp_path: Path) -> None:
    store = await filled("file", tmp_path / "a")
    path = tmp_path / "a" / "nodes_registry.json"
    path.write_bytes(path.read_bytes().replace(b'"n1"', b'"n2"'))
    assert [one.code for one in (await checked(store)).problems] == ["registry_differs"]
    (tmp_path / "a" / "closed.json").unlink()  # then it may be behind
    report = await checked(store)
    assert (report.clean, [one.code for one in report.notes]) == (True, ["registry_differs"])


async def test_a_file_that_others_may_read_is_told(scheme: str, tmp_path: Path) -> None:
    store = await filled(scheme, tmp_path / "a")
    (tmp_path / "a").chmod(0o755)
    report = await checked(store)
    assert (report.clean, [one.code for one in report.notes]) == (True, ["open_to_others"])


# Backups


async def test_a_backup_that_was_changed_is_not_restored(tmp_path: Path) -> None:
    await back_up(await filled("sqlite", tmp_path / "a"), tmp_path / "backup", VirtualClock())
    with closing(sqlite3.connect(tmp_path / "backup" / "hub.db")) as db, db:
        db.execute("UPDATE rows SET doc = 'other' WHERE kind = 'params'")
    before = hashes(tmp_path)
    with pytest.raises(StoreRefused, match="does not hold what was written into it"):
        await restore(tmp_path / "backup", at("file", tmp_path / "b"), VirtualClock())
    assert hashes(tmp_path) == before


async def test_a_backup_of_a_damaged_store_is_refused(scheme: str, tmp_path: Path) -> None:
    store = await filled(scheme, tmp_path / "a")
    spoil(largest(scheme, tmp_path / "a"), b'"keyed"')
    before = hashes(tmp_path)
    with pytest.raises(StoreRefused, match="damaged"):
        await back_up(store, tmp_path / "backup", VirtualClock())
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{}", '{"format": 9}', "[]", "name"])
async def test_what_is_no_backup_is_refused(text: str, tmp_path: Path) -> None:
    await back_up(await filled("sqlite", tmp_path / "a"), tmp_path / "backup", VirtualClock())
    manifest = tmp_path / "backup" / "backup.json"
    if text == "name":
        text = json.dumps({**json.loads(manifest.read_text()), "name": "../a"})
    elif "9" in text:
        text = json.dumps({**json.loads(manifest.read_text()), "format": 9})
    manifest.write_text(text)
    with pytest.raises(StoreRefused, match=r"backup\.json (is damaged|has format 9)"):
        await restore(tmp_path / "backup", at("file", tmp_path / "b"), VirtualClock())
    assert not (tmp_path / "b").exists()


# Damage


def largest(scheme: str, path: Path) -> Path:
    return path if scheme == "sqlite" else path / "log-000000000001"


def spoil(path: Path, part: bytes) -> None:
    """Write zeros and ones over the pages where this stands, but not over the first."""
    data = bytearray(path.read_bytes())
    place = data.index(part, 4096 if data.startswith(b"SQLite") else 0)
    if data.startswith(b"SQLite"):
        start = place - place % 4096
        data[start : start + 64] = b"\xff" * 64
    else:
        data[place : place + len(part)] = b"\xff" * len(part)
    path.write_bytes(data)


async def mended(scheme: str, folder: Path, to: str) -> Repaired:
    """Repaired into another store; the damaged one is as it was."""
    before = hashes(folder)
    done = await repair(at(scheme, folder / "a"), at(to, folder.with_name("new") / "b"), folder.parent, 9)
    assert hashes(folder) == before
    assert done.report.clean, done.report.problems
    target = at(to, folder.with_name("new") / "b")
    await target.open()
    await add(target, 1)
    await target.close()
    return done


@pytest.mark.parametrize("to", SCHEMES)
async def test_a_store_that_is_whole_is_repaired_into_the_same(scheme: str, to: str, tmp_path: Path) -> None:
    (folder := tmp_path / "old").mkdir()
    before = await held(await filled(scheme, folder / "a"))
    done = await repair(at(scheme, folder / "a"), target := at(to, tmp_path / "b"), tmp_path, 9)
    assert (done.lost, done.mended, done.lost_events, done.report.clean) == ([], [], 0, True)
    assert await held(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "old"], "nothing else is left"


@pytest.mark.parametrize("to", SCHEMES)
async def test_damage_in_its_middle_is_named_and_left_out(scheme: str, to: str, tmp_path: Path) -> None:
    (folder := tmp_path / "old").mkdir()
    store = await filled(scheme, folder / "a")
    spoil(largest(scheme, folder / "a"), b"x" * 1000)
    with pytest.raises(StoreRefused, match="damaged"):
        await store.open()
    done = await mended(scheme, folder, to)
    assert any("cannot be read" in text for text in done.lost)


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_is_spoilt_there_is_one_sentence_or_a_copy_that_is_right(
    scheme: str, seed: int, tmp_path: Path
) -> None:
    dice = random.Random(seed)
    (folder := tmp_path / "old").mkdir()
    await filled(scheme, folder / "a")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "a.lock"))
    path = dice.choice(paths)
    data = bytearray(path.read_bytes())
    end = len(bytes(data).rstrip(b"\0"))
    how = dice.choice(("flip", "flip", "flip", "zero", "cut"))
    place = dice.randrange(max(1, end))
    if how == "flip":
        for _ in range(dice.choice((1, 30))):
            data[dice.randrange(max(1, end))] ^= 1 << dice.randrange(8)
    elif how == "zero":
        data[place : place + 600] = bytes(len(data[place : place + 600]))
    else:
        del data[place:]
    path.write_bytes(data)
    before = hashes(folder)
    with suppress(StoreRefused):
        await checked(at(scheme, folder / "a"))
    assert hashes(folder) == before
    said = ""
    try:
        done = await repair(at(scheme, folder / "a"), at(OTHER[scheme], tmp_path / "b"), tmp_path, 9)
        assert done.report.clean, done.report.problems
    except StoreRefused as no:
        said = str(no)
    assert "\n" not in said
    assert (tmp_path / "b").exists() == (not said)
    assert hashes(folder) == before


@pytest.mark.parametrize("bytes_left", [0.9, 0.5])
async def test_of_a_sqlite_file_that_was_cut_off_the_beginning_is_kept(bytes_left: float, tmp_path: Path) -> None:
    store = await filled("sqlite", path := tmp_path / "a", close=False)
    for number in range(200):
        await add(store, number, 1000)
    await store.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * bytes_left)])
    done = await repair(at("sqlite", path), target := at("file", tmp_path / "b"), tmp_path, 9)
    assert done.lost
    assert done.report.clean
    assert (await held(target)).rows["job"] >= 1


async def test_lost_events_keep_their_numbers(tmp_path: Path) -> None:
    (folder := tmp_path / "old").mkdir()
    before = await held(await filled("file", folder / "a"))
    spoil(folder / "a" / "log-000000000001", b'"keyed"')
    (folder / "a" / "events-00000000000000000001").unlink()  # else they are there
    done = await mended("file", folder, "sqlite")
    assert done.lost_events == 5
    events = done.report.events
    assert events == before.events
    target = at("sqlite", folder.with_name("new") / "b")
    await target.open()
    lost = [line for line in await target.events(0, 1000) if b"ledger.lost" in line.line]
    await target.close()
    assert len(lost) == 5


async def foreign(path: Path) -> None:
    path.write_bytes(b"no database, but long enough to look at")


async def of_another_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t (x)")


async def newer(path: Path) -> None:
    await filled("sqlite", path)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE meta SET value = 99 WHERE key = 'format'")


async def newer_folder(path: Path) -> None:
    await filled("file", path)
    (path / "store.json").write_text('{"store": "file", "format": 99}')


async def foreign_folder(path: Path) -> None:
    path.mkdir()
    (path / "letter.txt").write_text("dear")


async def nothing(path: Path) -> None:
    pass


BAD: list[tuple[str, Callable[[Path], Awaitable[None]], str]] = [
    ("sqlite", foreign, "is not a SQLite database"),
    ("sqlite", of_another_program, "is a SQLite database of another program"),
    ("sqlite", newer, "has format 99"),
    ("sqlite", nothing, "there is no store"),
    ("file", foreign, "is no folder"),
    ("file", newer_folder, "has format 99"),
    ("file", foreign_folder, "holds other things and is no store"),
    ("file", nothing, "there is no store"),
]


@pytest.mark.parametrize(("scheme", "make", "text"), BAD)
async def test_what_is_no_store_of_ours_is_refused_and_untouched(
    scheme: str, make: Callable[[Path], Awaitable[None]], text: str, tmp_path: Path
) -> None:
    (folder := tmp_path / "old").mkdir()
    await make(folder / "a")
    before = sorted(tmp_path.rglob("*")), hashes(tmp_path)
    store, target = at(scheme, folder / "a"), at("file", tmp_path / "b")

    async def compact() -> None:
        await tools_of(store).compact()

    tries: list[Any] = [held(store), copy(store, target), compact(), back_up(store, tmp_path / "c", VirtualClock())]
    for attempt in tries:
        with pytest.raises(StoreRefused, match=text):
            await attempt
    with pytest.raises((StoreRefused, StoreDown)):
        await repair(store, target, tmp_path, 9)
    assert (sorted(tmp_path.rglob("*")), hashes(tmp_path)) == before


# Compaction


async def test_compaction_keeps_everything_and_gives_room_back(scheme: str, tmp_path: Path) -> None:
    store = await filled(scheme, tmp_path / "a", close=False)
    for number in range(40):
        await add(store, number, 100_000)
    async with store.begin() as tx:
        await tx.save(Changes(gone=[Key("read", f"more-{number}") for number in range(40)]))
    with pytest.raises(StoreRefused, match="is held by process"):
        await tools_of(at(scheme, tmp_path / "a")).compact()
    await store.close()
    before, large = await held(store), await sizes_of(store)
    await tools_of(store).compact()
    small = await sizes_of(store)
    assert await held(store) == before
    assert large is not None
    assert small is not None
    assert small.store_bytes < large.store_bytes - 2_000_000
