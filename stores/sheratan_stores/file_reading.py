"""The file store read as a whole beside who writes: its files are opened, the log is read up to where it ends now.

What is open stays readable when a compaction removes it. Nothing is locked, no file is changed. The rows are put
together in memory, as the hub itself has them. Longer than 300 lines because a reading is one thing from the first file
to the last row.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from sheratan_hub.clock import Clock
from sheratan_hub.storage import Key, Page, Row, StoreRefused
from sheratan_hub.storage_tools import PIECE, PIECE_BYTES, About, Finding
from sheratan_hub.storage_tools import Batch as Lines
from sheratan_stores import file_folder, file_segments, file_snapshot
from sheratan_stores.file_capture import Captured, captured, growing_in
from sheratan_stores.file_folder import CLOSED, Reader
from sheratan_stores.file_records import read_all
from sheratan_stores.file_registry import readable
from sheratan_stores.file_segments import FORMAT, Batch, Scan, Tail, decode, number_of
from sheratan_stores.lock import held_by
from sheratan_stores.sqlite_reading import readable_by_others
from sheratan_stores.state import NONE, State, unpack

REGISTRY = "nodes_registry.json"


@asynccontextmanager
async def reading(folder: Path, clock: Clock) -> AsyncIterator[FileReading]:
    """All that the store in `folder` holds at this moment."""
    with captured(folder) as files:
        holder = held_by(folder / "lock")
        growing = await growing_in(files, clock) if holder else {}
        reader = await asyncio.to_thread(_put_together, files, growing)
        events = Ledger(files, reader.lines, reader.ledger.pruned, reader.seq)
        yield FileReading(folder, holder, reader.state, reader.seq, events)


def _put_together(files: Captured, growing: dict[str, bytes]) -> Reader:
    """What snapshot and log say; `growing` has the last files of a log in use. Raises `StoreRefused`, OSError."""
    reader = Reader(files.folder)
    for name in files.named("snapshot-"):
        reader.begin_with(*file_snapshot.read_open(files.folder / name, files.files[name], reader.keep))
    tail = _replayed(files, reader, growing)
    if CLOSED in files.files and not growing:
        file_folder.check_end(files.folder, tail, files.read(CLOSED))
    return reader


def _replayed(files: Captured, reader: Reader, growing: dict[str, bytes]) -> Tail:
    """As `file_segments.replay`, of open files; while the store is in use it may go on behind them."""
    tail: Tail | None = None
    names = files.named("log-")
    for number, name in enumerate(names, reader.first):
        path = files.folder / name
        if number_of(path) != number:
            missing = file_segments.path_of(files.folder, number)
            raise StoreRefused(f"{missing} is missing: the log of this store has a gap")
        scan = Scan(path)
        scan.of(growing[name] if name in growing else files.read(name), reader.take)
        if tail is not None and scan.batches:
            raise StoreRefused(f"{tail.path} is damaged: it ends at byte {tail.at}, but the log goes on in {name}")
        if tail is None and (not scan.sealed or (growing and name == names[-1])):
            tail = Tail(path, scan.size, scan.end, scan.synced)
    if tail is None:
        missing = file_segments.path_of(files.folder, reader.first + len(names))
        raise StoreRefused(f"{missing} is missing: the log of this store goes on there, or it has none")
    return tail


class Spot(NamedTuple):
    """Where to go on in the files of events: behind this line, in this file, at this byte."""

    after: int
    file: int
    at: int


class Events(Protocol):
    """Where the events are read."""

    def read(self, after: int, limit: int) -> list[Lines]:
        """See `Reading.batches`. Raises `StoreRefused`, OSError."""
        ...


class Ledger:
    """The events: in files up to where the log's begin, then in the log."""

    def __init__(self, files: Captured, lines: list[Batch], pruned: int, seq: int) -> None:
        self._files, self._lines, self.pruned = files, lines, pruned
        self._names = files.named("events-")
        self._firsts = [int(name[-20:]) for name in self._names]
        self._upto = (lines[0].first if lines else seq) - 1
        self._spot = Spot(-1, 0, 0)
        self._data: tuple[int, bytes] = (-1, b"")

    def read(self, after: int, limit: int) -> list[Lines]:
        """See `Reading.batches`. Raises `StoreRefused`, OSError."""
        after = max(after, self.pruned)
        found, size = [], 0
        for batch in self._from(after):
            found.append(Lines(batch.first, batch.at, batch.lines))
            size += sum(map(len, batch.lines))
            if len(found) >= limit or size >= PIECE_BYTES:
                break
        return found

    def _from(self, after: int) -> Iterator[Batch]:
        if after < self._upto:
            for batch in self._in_files(after):
                yield batch
                after = batch.first + len(batch.lines) - 1
        start = max(0, bisect_right(self._lines, after + 1, key=lambda batch: batch.first) - 1)
        for batch in islice(self._lines, start, None):
            if batch.first + len(batch.lines) - 1 > after:
                yield batch

    def _in_files(self, after: int) -> Iterator[Batch]:
        spot = self._spot
        at_file = spot.file if spot.after == after else max(0, bisect_right(self._firsts, after + 1) - 1)
        place = spot.at if spot.after == after else 0
        for file in range(at_file, len(self._names)):
            data = self._content(file)
            for record in read_all(data, self._names[file], place):
                batch = self._decoded(record.payload, file, record.at)
                if batch.first > self._upto:
                    return
                last = batch.first + len(batch.lines) - 1
                if last > after:
                    if batch.first > after + 1:
                        self._missing(after, file)
                    self._spot = Spot(last, file, record.end)
                    after = last
                    yield batch
            if after >= self._upto:
                return
            place = 0
            following = self._firsts[file + 1] if file + 1 < len(self._firsts) else self._upto + 1
            if after + 1 < following:
                self._missing(after, file)
        if after < self._upto:
            self._missing(after, len(self._names) - 1)

    def _decoded(self, payload: bytes, file: int, at: int) -> Batch:
        try:
            return decode(payload)
        except ValueError as error:
            path = self._files.folder / self._names[file]
            raise StoreRefused(f"{path} is damaged: the record at byte {at}: {error}") from error

    def _missing(self, after: int, file: int) -> None:
        path = self._files.folder / self._names[file] if self._names else self._files.folder
        raise StoreRefused(f"{path} is damaged: event {after + 1}, and what follows, cannot be read")

    def _content(self, file: int) -> bytes:
        if self._data[0] != file:
            self._data = file, self._files.read(self._names[file])
        return self._data[1]


class FileReading:
    """See `Reading`."""

    def __init__(self, folder: Path, holder: str, state: State, seq: int, ledger: Events) -> None:
        self.about = About(str(folder), FORMAT, holder)
        self.seq = seq
        self._folder, self._holder, self._state, self._ledger = folder, holder, state, ledger
        self._ids: dict[str, list[str]] = {}
        self._indexed = False

    async def kinds(self) -> list[str]:
        """See `Reading.kinds`."""
        return sorted(kind for kind, rows in self._state.rows.items() if rows)

    async def rows(self, kind: str, after: str | None = None, limit: int = PIECE) -> list[Row]:
        """See `Reading.rows`."""
        return await asyncio.to_thread(self._rows, kind, after, limit)

    def _rows(self, kind: str, after: str | None, limit: int) -> list[Row]:
        packed = self._state.rows.get(kind, NONE)
        if kind not in self._ids:
            self._ids = {kind: sorted(packed)}
        ids = self._ids[kind]
        start = 0 if after is None else bisect_right(ids, after)
        rows, size = [], 0
        for id in islice(ids, start, start + limit):
            rows.append(self._unpacked(packed[id]))
            size += len(packed[id])
            if size >= PIECE_BYTES:
                break
        return rows

    def _unpacked(self, packed: bytes) -> Row:
        try:
            return unpack(packed)
        except msgspec.DecodeError as error:
            raise StoreRefused(f"{self._folder} is damaged: a row in it is none: {error}") from error

    async def fetch(self, keys: Iterable[Key]) -> list[Row]:
        """See `Reading.fetch`."""
        found = (self._state.rows.get(kind, NONE).get(id) for kind, id in set(keys))
        return [self._unpacked(packed) for packed in found if packed is not None]

    async def counts(self) -> dict[str, int]:
        """See `Reading.counts`."""
        return dict(self._state.counts)

    async def batches(self, after: int = 0, limit: int = PIECE) -> list[Lines]:
        """See `Reading.batches`."""
        return await asyncio.to_thread(self._batches, after, limit)

    def _batches(self, after: int, limit: int) -> list[Lines]:
        try:
            return self._ledger.read(after, limit)
        except OSError as error:
            raise StoreRefused(f"{self._folder} cannot be read: {error.strerror}") from error

    async def page(
        self,
        kind: str,
        labels: Sequence[str | None] = (),
        after: str | None = None,
        limit: int = 100,
        examine: int = 2000,
        newest: bool = False,
    ) -> Page:
        """See `Store.page`. The first one makes the indexes, which is work for all rows."""
        await self._index()
        return self._state.page(kind, labels, after, limit, examine, newest)

    async def heads(self, prefix: str = "") -> dict[str, int]:
        """See `Store.heads`."""
        await self._index()
        return self._state.heads(prefix)

    async def _index(self) -> None:
        if not self._indexed:
            await asyncio.to_thread(self._state.index)
            self._indexed = True

    async def findings(self) -> list[Finding]:
        """See `Reading.findings`: whether `nodes_registry.json` tells the same, and who may read the files."""
        return await asyncio.to_thread(lambda: [*self._registry(), *readable_by_others(*self._mine())])

    def _mine(self) -> list[Path]:
        return [path for path in (self._folder, *sorted(self._folder.iterdir())) if path.is_file() or path.is_dir()]

    def _registry(self) -> Iterator[Finding]:
        """While it is in use, or after a crash, the file may be behind: then it is only told."""
        path = self._folder / REGISTRY
        if self._holder or not path.exists():
            return
        late = not (self._folder / CLOSED).exists()
        try:
            told = msgspec.json.decode(path.read_bytes())["nodes"]
        except (OSError, ValueError, KeyError, TypeError):
            yield Finding("registry_differs", str(path), "it cannot be read; a hub writes it anew when it starts", late)
            return
        right = {id: _json(unpack(packed).doc) for id, packed in self._state.rows.get("node", NONE).items()}
        names = sorted(id for id in right.keys() | told.keys() if told.get(id) != right.get(id))
        if names:
            text = f"it differs from the store in {len(names)} nodes, the first is {names[0]}; a hub writes it anew"
            yield Finding("registry_differs", str(path), text, late)


def _json(doc: bytes) -> object:
    return msgspec.json.decode(msgspec.json.encode(readable(doc)))
