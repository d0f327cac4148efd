"""ledger.jsonl: complete and in order, behind the store, whole again after a crash."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sheratan_hub import ledger, ledger_files
from sheratan_hub.clock import VirtualClock
from sheratan_hub.items import Committed
from sheratan_hub.ledger import LedgerFile
from sheratan_hub.ledger_files import NEVER, Rotation, full_ones
from sheratan_hub.rules.command import Event
from sheratan_hub.storage import Changes, Store, StoreDown, open_store

FIELDS = ["seq", "ts", "actor", "event", "job_id", "trace_id", "zone", "artifact_path", "meta"]


@pytest.fixture(params=["memory", "sqlite", "file"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: VirtualClock) -> AsyncIterator[Store]:
    store = open_store(f"{request.param}://{'' if request.param == 'memory' else tmp_path / 'store'}", clock)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "ledger.jsonl"


async def write(store: Store, n: int, **fields: Any) -> Committed:
    """Commit a batch of `n` events; what the observers are told."""
    lines = [msgspec.json.encode(Event(1_700_000_000_123, "job.leased", f"a{i}", **fields)) for i in range(n)]
    changes = Changes(ledger=lines)
    async with store.begin() as tx:
        await tx.save(changes)
    return Committed([], changes, 1)


async def following(path: Path, store: Store, rotation: Rotation = NEVER) -> LedgerFile:
    file = LedgerFile(path, store, rotation)
    await file.follow()
    return file


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_every_event_is_a_flat_line_with_all_fields(store: Store, path: Path) -> None:
    await write(store, 1, job_id="j", trace_id="t", zone="z", artifact_path="p", meta={"attempt": 1})
    await write(store, 2)
    file = await following(path, store)
    file.close()
    found = lines(path)
    assert [list(line) for line in found] == [FIELDS] * 3
    assert [line["seq"] for line in found] == [1, 2, 3]
    assert list(found[0].values())[1:] == [
        "2023-11-14T22:13:20.123Z", "a0", "job.leased", "j", "t", "z", "p", {"attempt": 1},
    ]  # fmt: skip
    assert found[2] == {**dict.fromkeys(FIELDS), "seq": 3, "ts": found[2]["ts"], "actor": "a1", "meta": {}} | {
        "event": "job.leased"
    }
    assert path.stat().st_mode & 0o777 == 0o600


async def test_it_follows_what_is_committed_and_reads_nothing_while_nothing_is(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await following(path, store)
    file.committed(await write(store, 2))
    await file.follow()
    assert len(lines(path)) == 2
    monkeypatch.setattr(store, "events", None)
    file.committed(Committed([], Changes(), 1))
    await file.follow()
    file.close()


async def test_more_than_a_piece_is_written_piece_by_piece(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PIECE", 10)
    for _ in range(5):
        await write(store, 7)
    (await following(path, store)).close()
    assert [line["seq"] for line in lines(path)] == list(range(1, 36))


@pytest.mark.parametrize("torn", [b'{"seq":3,"ts":"20', b'{"seq":3}', b"\0\0\0", b'{"seq":3,"ts":\n\n', b"x\n"])
async def test_after_a_crash_what_is_torn_is_cut_off_and_the_rest_follows(
    store: Store, path: Path, torn: bytes
) -> None:
    await write(store, 2)
    (await following(path, store)).close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    await write(store, 2)
    (await following(path, store)).close()
    assert path.read_bytes().startswith(whole)
    assert [line["seq"] for line in lines(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("torn", [b"\0" * 5000, b"x\n" * 2000, b'{"seq":3,"ts":"20' + b"2" * 3000])
async def test_however_much_a_crash_has_torn_the_last_whole_line_is_found(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes
) -> None:
    monkeypatch.setattr(ledger_files, "TAIL_BYTES", 500)
    await write(store, 2)
    (await following(path, store)).close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    await write(store, 2)
    (await following(path, store)).close()
    assert path.read_bytes().startswith(whole)
    assert [line["seq"] for line in lines(path)] == [1, 2, 3, 4]


async def test_a_file_that_is_no_ledger_is_set_aside(store: Store, path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"somebody's notes\n" * 3)
    await write(store, 2)
    (await following(path, store)).close()
    assert path.with_name("ledger.jsonl.old").read_bytes() == b"somebody's notes\n" * 3
    assert [line["seq"] for line in lines(path)] == [1, 2]


async def test_a_line_that_lost_its_end_is_written_again(store: Store, path: Path) -> None:
    await write(store, 3)
    (await following(path, store)).close()
    path.write_bytes(path.read_bytes()[:-9])
    (await following(path, store)).close()
    assert [line["seq"] for line in lines(path)] == [1, 2, 3]


async def test_a_line_longer_than_what_is_looked_at_first_is_still_found(store: Store, path: Path) -> None:
    await write(store, 1, artifact_path="p" * 1_000_000)
    for _ in range(2):
        (await following(path, store)).close()
    assert [line["seq"] for line in lines(path)] == [1]


async def test_it_goes_on_after_its_last_line_when_the_store_has_forgotten_that_one(
    store: Store, path: Path, clock: VirtualClock
) -> None:
    await write(store, 3)
    (await following(path, store)).close()
    await clock.advance(1000)
    await store.prune_events(clock.now())
    await write(store, 1)
    (await following(path, store)).close()
    assert [line["seq"] for line in lines(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("others", [2, 5])
async def test_the_ledger_of_another_store_is_set_aside(store: Store, path: Path, others: int) -> None:
    other = open_store("memory://", VirtualClock())
    await other.open()
    for n in range(others):
        await write(other, 1, job_id=f"other-{n}")
    (await following(path, other)).close()
    before = path.read_bytes()
    await write(store, 3)
    (await following(path, store)).close()
    assert path.with_name("ledger.jsonl.old").read_bytes() == before
    assert [(line["seq"], line["job_id"]) for line in lines(path)] == [(1, None), (2, None), (3, None)]


async def test_a_file_that_was_moved_away_is_begun_anew_with_the_next_event(store: Store, path: Path) -> None:
    file = await following(path, store)
    file.committed(await write(store, 2))
    await file.follow()
    path.rename(path.with_name("rotated"))
    file.committed(await write(store, 1))
    await file.follow()
    file.close()
    assert [line["seq"] for line in lines(path)] == [3]
    assert len(lines(path.with_name("rotated"))) == 2


async def test_what_could_not_be_read_or_written_is_tried_again(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await following(path, store)
    file.committed(await write(store, 2))
    with monkeypatch.context() as broken:
        broken.setattr(store, "events", _down)
        with pytest.raises(StoreDown):
            await file.follow()
    with monkeypatch.context() as broken:
        broken.setattr(ledger.os, "write", lambda file, text: 5)
        with pytest.raises(OSError, match="cannot be written whole"):
            await file.follow()
    await file.follow()
    file.close()
    file.close()
    assert [line["seq"] for line in lines(path)] == [1, 2]


async def _down(*_: Any) -> Any:
    raise StoreDown("the disk is on fire")


async def test_a_file_that_another_process_writes_is_not_touched(store: Store, path: Path) -> None:
    await write(store, 2)
    (await following(path, store)).close()
    half = path.read_bytes() + b'{"seq":3,"ts":"20'
    path.write_bytes(half)
    LedgerFile(path, store).close()
    assert path.read_bytes() == half


def names(path: Path) -> list[str]:
    return sorted(one.name for one in path.parent.iterdir())


def seqs(path: Path) -> list[int]:
    """The numbers in all files, in the order of the files."""
    return [line["seq"] for one in (*full_ones(path), path) if one.exists() for line in lines(one)]


async def test_a_full_file_is_renamed_and_the_next_goes_on_from_it(store: Store, path: Path) -> None:
    for _ in range(5):
        await write(store, 2)
        (await following(path, store, Rotation(max_bytes=700))).close()
    assert names(path) == ["ledger.000000000001.jsonl", "ledger.000000000005.jsonl", "ledger.jsonl"]
    assert seqs(path) == list(range(1, 11))
    assert all(one.stat().st_size <= 700 for one in full_ones(path))


async def test_a_file_is_renamed_when_the_next_event_comes_so_many_hours_after_its_first(
    store: Store, path: Path
) -> None:
    file = await following(path, store, Rotation(max_hours=2))
    for ms in (0, 7_199_000, 7_200_000, 7_300_000):
        async with store.begin() as tx:
            await tx.save(Changes(ledger=[msgspec.json.encode(Event(1_700_000_000_000 + ms, "job.leased", "a"))]))
        file.committed(Committed([], Changes(ledger=[b"{}"]), 1))
        await file.follow()
    file.close()
    assert [line["seq"] for line in lines(path)] == [3, 4]
    assert seqs(path) == [1, 2, 3, 4]


async def test_so_many_full_files_are_kept_and_the_oldest_go(store: Store, path: Path) -> None:
    for _ in range(6):
        await write(store, 1)
        (await following(path, store, Rotation(max_bytes=1, keep_files=2))).close()
    assert names(path) == ["ledger.000000000004.jsonl", "ledger.000000000005.jsonl", "ledger.jsonl"]


async def test_killed_before_the_new_file_was_begun_it_goes_on_after_the_full_one(store: Store, path: Path) -> None:
    await write(store, 3)
    (await following(path, store)).close()
    path.rename(path.with_name("ledger.000000000001.jsonl"))
    await write(store, 2)
    (await following(path, store)).close()
    assert [line["seq"] for line in lines(path)] == [4, 5]
    path.write_bytes(b'{"seq":4,"ts":"2')
    (await following(path, store)).close()
    assert seqs(path) == [1, 2, 3, 4, 5]


async def test_all_files_of_another_ledger_are_set_aside_and_nothing_is_overwritten(store: Store, path: Path) -> None:
    for turn in range(3):
        other = open_store("memory://", VirtualClock())
        await other.open()
        await write(other, 1, job_id=f"other-{turn}")
        await write(other, 1, job_id=f"other-{turn}")
        for _ in range(2):
            file = LedgerFile(path, other, Rotation(max_bytes=1))
            await file.follow()
            file.close()
            await write(other, 1, job_id=f"other-{turn}")
        await other.close()
    await write(store, 1)
    (await following(path, store)).close()
    assert seqs(path) == [1]
    aside = [one for one in path.parent.iterdir() if ".old" in one.name]
    assert sorted(line["job_id"] for one in aside for line in lines(one)) == [f"other-{n // 3}" for n in range(9)]


async def test_a_rename_that_fails_loses_nothing(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = await following(path, store, Rotation(max_bytes=1))
    for n in range(3):
        file.committed(await write(store, 1))
        with monkeypatch.context() as broken:
            if n:
                broken.setattr(ledger_files.os, "rename", _no)
                with pytest.raises(OSError, match="read only"):
                    await file.follow()
        await file.follow()
    file.close()
    assert seqs(path) == [1, 2, 3]


def _no(*_: Any) -> Any:
    raise OSError("read only")
