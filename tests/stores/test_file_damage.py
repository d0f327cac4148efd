"""The file store's files damaged in every way: it opens with exactly what was acknowledged, or refuses and says where.

What no store can find out, and these tests allow: after a crash (not after `close`, which says where the log ends) the
last record zeroed sector by sector, with those that share its sectors, is what a torn write leaves, and the last
segment in an older state is what a disk leaves that has not written yet. Then the store shows an earlier state, as a
whole. And all files together put back to an older state are a backup.
"""

# ruff: noqa: PT017  (what is raised is one of two outcomes)

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sheratan_hub.storage import Changes, LedgerLine, StoreDown, StoreRefused
from sheratan_stores import file_ledger, file_segments, file_snapshot
from sheratan_stores.file_ledger import Ledger
from sheratan_stores.file_records import read_all
from sheratan_stores.file_segments import Batch, Scan
from tests.stores.history import History, file_store, quiet, save, seen
from tests.stores.test_file_power import TORTURE

STEP = 1 if TORTURE > 1 else 9
Files = dict[str, bytes]
TOLD = 90
"""How many transactions are told to the stores that are damaged."""


def files_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


class Told(NamedTuple):
    """A folder's files, older states of them, and what it shows now and has shown before."""

    files: Files
    older: list[Files]
    pictures: list[Any]

    @property
    def tail(self) -> str:
        return max(
            name for name, content in self.files.items() if name.startswith("log-") and records(name, content) > 1
        )

    @property
    def last(self) -> int:
        """Where the last record begins."""
        return [record.at for record in read_all(self.files[self.tail], self.tail)][-1]


def records(name: str, content: bytes) -> int:
    return len(list(read_all(content, name)))


async def told(folder: Path, *, close: bool) -> Told:
    """A history of synced transactions, closed or as a crash leaves it, with several files of each sort."""
    history = History(4, durable=1)
    store = file_store(folder, history.clock)
    await store.open()
    older = []
    for _ in range(6):
        for _ in range(TOLD // 6):
            await history.tell(store, 1)
            await quiet(store)
        older.append(files_of(folder))
        await store.events()
    if close:
        await store.close()
    files = files_of(folder)
    await store.close()
    now = file_store(folder)
    await now.open()
    assert await seen(now) == history.pictures[-1]
    await now.close()
    return Told(files, older[:-1], history.pictures)


async def outcome(folder: Path, files: Files) -> tuple[Any, str]:
    """(what a store over these files shows, "") or (None, its refusal), then nothing was touched."""
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    store = file_store(folder)
    try:
        await store.open()
    except StoreRefused as refused:
        assert files_of(folder) == files
        assert "\n" not in str(refused)
        assert str(folder) in str(refused)
        return None, str(refused)
    try:
        return await seen(store), ""
    except StoreDown as down:
        assert str(folder / "events-") in str(down)
        return None, str(down)
    finally:
        await store.close()


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    """In the place of pytest's."""
    return in_memory


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "damaged"
    place.mkdir()
    return place


# One segment, in every way: only the log is read, in memory


class Log(NamedTuple):
    path: Path
    content: bytes
    batches: list[Batch]

    @property
    def end(self) -> int:
        return len(self.content.rstrip(b"\0"))

    def read(self, content: bytes) -> list[Batch] | None:
        """The batches in this content; None if it is refused, naming the place."""
        batches: list[Batch] = []
        try:
            Scan(self.path).of(content, batches.append)
        except StoreRefused as refused:
            assert str(self.path) in str(refused)
            assert "byte" in str(refused)
            return None
        return batches


@pytest.fixture
async def log(tmp_path: Path) -> Log:
    history = History(3, durable=1, prunes=False)
    store = file_store(tmp_path / "hub", history.clock, first_bytes=1 << 14)
    await store.open()
    await history.tell(store, 20)
    path = tmp_path / "hub" / "log-000000000001"
    log = Log(path, path.read_bytes(), [])
    await store.close()
    assert 5000 < log.end < 14000
    batches = log.read(log.content)
    assert batches is not None
    return log._replace(batches=batches)


def test_a_log_that_was_cut_is_whole_or_refused(log: Log) -> None:
    for size in (*range(log.end + 600), *range(log.end + 600, len(log.content), 97)):
        assert log.read(log.content[:size]) == (log.batches if size > log.end else None), size


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_every_flipped_bit_is_found(log: Log) -> None:
    bits = range(8) if TORTURE > 1 else None
    for place in range(log.end - 4096, log.end + 2048):
        for bit in bits or ((place * 5) % 8, (place * 5 + 3) % 8):
            found = log.read(flipped(log.content, place, bit))
            assert found is None or (place >= log.end and found == log.batches), (place, bit)


def test_every_flipped_bit_of_the_last_records_is_found(log: Log) -> None:
    for place in range(log.end - 700, log.end + 40):
        for bit in range(8):
            found = log.read(flipped(log.content, place, bit))
            assert found is None or (place >= log.end and found == log.batches), (place, bit)


def test_every_byte_of_the_last_record_that_becomes_zero_is_found(log: Log) -> None:
    """But for a newline alone in its sector: a torn write leaves the same."""
    last = [record.at for record in read_all(log.content, log.path.name)][-1]
    for place in range(last, log.end):
        if log.content[place] != 0 and not (place == log.end - 1 and place % 512 == 0):
            assert log.read(log.content[:place] + b"\0" + log.content[place + 1 :]) is None, place


def test_a_record_that_was_never_written_whole_is_cut(log: Log) -> None:
    """All that a torn write can leave of the last record, by sectors; and of several that were not synced."""
    starts = [record.at for record in read_all(log.content, log.path.name)]
    for first in starts[-6:]:
        sectors = range(first - first % 512, log.end, 512)
        for torn in range(2 ** min(len(sectors), 8) - 1):
            content = bytearray(log.content)
            for bit, sector in enumerate(sectors):
                if not torn >> bit & 1:
                    content[max(sector, first) : sector + 512] = bytes(sector + 512 - max(sector, first))
            if first == starts[-1]:
                assert log.read(bytes(content)) == log.batches[:-1]
            else:  # synced, as a later record says: gone is only what no record tells of
                assert log.read(bytes(content)) in (None, *(log.batches[:n] for n in range(len(log.batches))))


def test_a_gap_in_a_record_that_a_later_one_knows_as_synced_is_damage(log: Log) -> None:
    whole = list(read_all(log.content, log.path.name))
    gaps = 0
    for record in whole[:-1]:
        for sector in range(record.at - record.at % 512, record.end - 511, 512):
            start = max(sector, record.at)
            assert log.read(log.content[:start] + bytes(sector + 512 - start) + log.content[sector + 512 :]) is None
            gaps += 1
    assert gaps > 4


async def test_a_record_in_another_place_is_none(tmp_path: Path) -> None:
    """Two of one length, in one file and in two: each of them whole, and none where the other is."""
    store = file_store(tmp_path / "hub", first_bytes=512, segment_bytes=512)
    await store.open()
    for n in range(9):
        await save(store, Changes(counts={f"{n}": 1}))
    await store.close()
    segments = [path for path in sorted(store.folder.glob("log-*")) if records(path.name, path.read_bytes()) > 3]
    assert len(segments) > 1
    one, other = (path.read_bytes() for path in segments[:2])
    _, first, second, *_ = read_all(one, segments[0].name)
    assert first.end - first.at == second.end - second.at
    moved = one[: second.at] + one[first.at : first.end] + one[second.end :]
    for path, content, right in ((segments[0], moved, one), (segments[1], one, other)):
        path.write_bytes(content)
        with pytest.raises(StoreRefused, match=f"{path} is damaged"):
            await store.open()
        path.write_bytes(right)
    await store.open()
    await store.close()


@pytest.mark.parametrize("size", [63, 64, 512])
def test_zeros_in_a_document_are_not_mistaken_for_a_gap(log: Log, size: int) -> None:
    """Nor is a sector of a document that was all zeros but for a bit, which has flipped."""
    path = log.path.with_name("log-000000000009")
    head = bytearray(log.content[: [record.at for record in read_all(log.content, log.path.name)][1]])
    payload = file_segments.encode(Batch(rows=[b"\x01" + bytes(size) + b"\x01" + bytes(size) + b"\x00\x01a\x01c"]))
    record = file_segments.frame(payload, path.name, len(head), 0)
    assert b"\0" * 64 not in record
    header = file_segments.frame(log.content[37 : len(head) - 1], path.name, 0, 0)
    content = header + record + bytes(len(log.content) - len(header) - len(record))
    assert Log(path, content, []).read(content) == [file_segments.decode(payload)]
    for place in range(len(head), len(head) + len(record), 7):
        for bit in range(8):
            assert Log(path, content, []).read(flipped(content, place, bit)) is None, (place, bit)


# A snapshot, and the ledger, in every way


async def test_every_damage_of_a_snapshot_is_found(tmp_path: Path) -> None:
    files = (await told(tmp_path / "hub", close=True)).files
    name = max(name for name in files if name.startswith("snapshot-"))
    path, content = tmp_path / name, files[name]

    def read() -> list[bytes] | None:
        rows: list[bytes] = []
        try:
            file_snapshot.read(path, rows.extend)
        except StoreRefused as refused:
            assert str(path) in str(refused)
            return None
        return rows

    path.write_bytes(content)
    assert read()
    for place in range(0, len(content), STEP):
        for harmed in (flipped(content, place, place % 8), content[:place], content + content[place:]):
            path.write_bytes(harmed)
            assert read() is None, place
    path.unlink()
    assert read() is None


async def test_no_damage_of_the_ledger_shows_other_events(tmp_path: Path) -> None:
    files = (await told(tmp_path / "hub", close=True)).files
    name = min(name for name in files if name.startswith("events-"))
    path, content = tmp_path / name, files[name]
    path.write_bytes(content)
    lines = ledger_of(tmp_path, 10**9)
    assert len(lines) > 50
    upto = lines[-1].seq
    for place in range(0, len(content), STEP):
        for harmed in (flipped(content, place, place % 8), content[:place]):
            path.write_bytes(harmed)
            with pytest.raises((StoreRefused, StoreDown), match=str(path)):
                ledger_of(tmp_path, upto)


def ledger_of(folder: Path, upto: int) -> list[LedgerLine]:
    ledger = Ledger(folder)
    ledger.pruned = min(int(path.name[-20:]) for path in folder.glob("events-*")) - 1
    ledger.look(upto)
    if upto < 10**9:
        ledger.check(upto)
    return ledger.read(0, 10**9)


async def test_damage_in_the_middle_of_the_ledger_is_found_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_ledger, "FILE_BYTES", 200)
    story = await told(tmp_path / "hub", close=True)
    expected = story.pictures[-1][-1]
    names = sorted(name for name in story.files if name.startswith("events-"))
    assert len(names) > 6
    place = tmp_path / "damaged"
    place.mkdir()
    needed = 0
    for name in names:
        for content in (None, b"", story.files[name][:-1], flipped(story.files[name], 60, 1)):
            files = {**story.files, name: content} if content is not None else dict(story.files)
            if content is None:
                del files[name]
            shown, text = await outcome(place, files)
            assert text or shown[-1] == expected, name
            needed += bool(text)
    assert needed > 4


# Everything, at random


def bytes_changed(dice: random.Random, content: bytes, at: int) -> bytes:
    harmed = bytearray(content)
    for _ in range(dice.randrange(1, 4)):
        harmed[(at + dice.randrange(60)) % len(harmed)] = dice.choice([dice.randrange(256), 0xFF, 0x22])
    return bytes(harmed)


def zeroed(dice: random.Random, content: bytes, at: int) -> bytes:
    size = dice.choice([1, 30, 512, 2000])
    return content[:at] + bytes(min(size, len(content) - at)) + content[at + size :]


def sector_zeroed(dice: random.Random, content: bytes, at: int) -> bytes:
    start = at - at % 512
    return content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :]


def deleted(dice: random.Random, content: bytes, at: int) -> bytes:
    return content[:at] + content[at + dice.choice([1, 37, 512]) :]


def inserted(dice: random.Random, content: bytes, at: int) -> bytes:
    return content[:at] + dice.choice([b"\0", b"\n", b"\xff" * 9, content[:100], bytes(512)]) + content[at:]


def swapped(dice: random.Random, content: bytes, at: int) -> bytes:
    a, b = sorted([at, dice.randrange(len(content))])
    size = dice.choice([16, 512])
    return content[:a] + content[b : b + size] + content[a + size : b] + content[a : a + size] + content[b + size :]


def copied(dice: random.Random, content: bytes, at: int) -> bytes:
    """A record, or what comes first, over another of its length or not."""
    starts = [index + 1 for index in range(len(content) - 1) if content[index : index + 2] in (b"\np", b"\ne")] or [0]
    source, target = dice.choice(starts), dice.choice(starts)
    record = content[source : source + dice.choice([60, 200, 400])]
    return content[:target] + record + content[target + len(record) :]


def cut(dice: random.Random, content: bytes, at: int) -> bytes:
    return content[:at]


HARMS: list[Callable[[random.Random, bytes, int], bytes]]
HARMS = [bytes_changed, zeroed, sector_zeroed, deleted, inserted, swapped, copied, cut]


class Harm(NamedTuple):
    text: str
    files: Files
    loses: bool
    """Whether it looks like a crash that was too early for what is lost."""


def harms(told: Told, seed: int, number: int) -> Iterator[Harm]:
    """So many sorts of damage, one at a time."""
    dice = random.Random(seed)
    names = sorted(name for name in told.files if name != "nodes_registry.json")
    for _ in range(number):
        name = dice.choice([told.tail, *names])
        content = told.files[name]
        rest = {other: told.files[other] for other in told.files if other != name}
        if dice.random() < 0.1:
            yield Harm(f"without {name}", rest, name == told.tail)
        elif dice.random() < 0.1:
            older = [files[name] for files in told.older if files.get(name, content) != content]
            if older:
                yield Harm(f"older {name}", {**rest, name: dice.choice(older)}, name == told.tail)
        else:
            how, at = dice.choice(HARMS), dice.randrange(len(content.rstrip(b"\0")))
            if name == told.tail and dice.random() < 0.3:
                at = dice.randrange(told.last, len(content.rstrip(b"\0")))
            harmed = how(dice, content, at)
            zeros = any(a and not b for a, b in zip(content[told.last :], harmed[told.last :], strict=False))
            yield Harm(f"{name} {how.__name__} at {at}", {**rest, name: harmed}, name == told.tail and zeros)


@pytest.mark.parametrize("close", [True, False])
async def test_whatever_is_damaged_is_whole_or_refused(tmp_path: Path, place: Path, close: bool) -> None:
    story = await told(tmp_path / "hub", close=close)
    sorts = {name.partition("-")[0] for name in story.files}
    assert sorts >= {"log", "snapshot", "events", "store.json"}
    assert ("closed.json" in sorts) == close
    refused = 0
    for harm in harms(story, 7, 500 * TORTURE):
        shown, text = await outcome(place, harm.files)
        refused += bool(text)
        if text or shown == story.pictures[-1]:
            continue
        assert not close, harm.text
        assert harm.loses, harm.text
        assert shown in story.pictures, harm.text
        assert shown in story.pictures[-5:] or "older" in harm.text, harm.text
    assert refused > 250
