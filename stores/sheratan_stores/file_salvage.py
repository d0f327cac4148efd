"""What can still be read of a damaged file store, record by record, and what is known of the rest.

Behind a damaged record the next one that is whole is looked for. Changes that stood in between are lost, so rows may be
as they were before them; the numbers of the events tell how many are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import msgspec

from sheratan_hub.storage import StoreRefused
from sheratan_hub.storage_tools import PIECE_BYTES, Salvage
from sheratan_hub.storage_tools import Batch as Lines
from sheratan_stores import file_segments, file_snapshot
from sheratan_stores.file_folder import MARK
from sheratan_stores.file_reading import FileReading
from sheratan_stores.file_records import HEADERS, Record, read
from sheratan_stores.file_segments import FORMAT, Batch, decode, newer
from sheratan_stores.file_snapshot import Totals, decode_rows
from sheratan_stores.lock import held_by
from sheratan_stores.state import State, key_of, unpack


class Format(msgspec.Struct):
    """What every first record, and `store.json`, have in common."""

    format: int = FORMAT


@contextmanager
def salvaging(folder: Path) -> Iterator[Salvage]:
    """The readable part of the store in `folder`, in memory. Nobody may have it open. Raises `StoreRefused`."""
    holder = held_by(folder / "lock")
    if holder:
        raise StoreRefused(f"{folder} is held by {holder}; a store is repaired while nobody has it open")
    found = Found(folder)
    try:
        found.read()
    except OSError as error:
        raise StoreRefused(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    events = Events(found.batches, found.pruned)
    yield Salvage(FileReading(folder, "", found.state, found.seq, events), found.lost)


class Found:
    """What the files of a folder hold, as far as they can be read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.state = State()
        self.lost: list[str] = []
        self.batches: dict[int, Batch] = {}
        self.seq, self.pruned = 1, 0

    def read(self) -> None:
        """Snapshot, log, events. Raises OSError, `StoreRefused`."""
        names = {path.name for path in self._folder.iterdir()}
        logs = sorted(self._folder.glob(f"log-{'[0-9]' * 12}"))
        snapshot = file_snapshot.latest(self._folder)
        if MARK not in names and not (snapshot and logs):
            raise StoreRefused(f"there is no store in {self._folder}")
        if MARK not in names:
            self.lost.append(f"{self._folder / MARK} was missing")
        else:
            self._refuse_newer(self._folder / MARK, (self._folder / MARK).read_bytes())
        first = 1
        if snapshot is not None:
            first = file_segments.number_of(snapshot)
            self._snapshot(snapshot)
        self._events()
        self._log([path for path in logs if file_segments.number_of(path) >= first], first)
        self._put_events_right()

    def _refuse_newer(self, path: Path, payload: bytes) -> None:
        try:
            said = msgspec.json.decode(payload, type=Format)
        except ValueError:
            return
        if said.format > FORMAT:
            raise StoreRefused(newer(path, said.format))

    def _snapshot(self, path: Path) -> None:
        totals: Totals | None = None
        for record in self._records(path):
            if record.at == 0:
                self._refuse_newer(path, record.payload)
            try:
                if record.payload[:1] == b"{":
                    totals = msgspec.json.decode(record.payload, type=Totals)
                elif not record.payload.isdigit():
                    self._keep(path, decode_rows(record.payload))
            except ValueError as error:
                self.lost.append(f"{path}: the record at byte {record.at}: {error}")
        if totals is not None:
            self.seq, self.pruned = totals.seq, totals.pruned

    def _log(self, paths: list[Path], first: int) -> None:
        for number, path in enumerate(paths, first):
            if file_segments.number_of(path) != number and path == paths[0]:
                self.lost.append(f"{file_segments.path_of(self._folder, first)} was missing, and what it held is lost")
            for record in self._records(path):
                if record.at == 0:
                    self._refuse_newer(path, record.payload)
                    continue
                try:
                    self._take(path, decode(record.payload))
                except ValueError as error:
                    self.lost.append(f"{path}: the record at byte {record.at}: {error}")
        numbers = [file_segments.number_of(path) for path in paths]
        for before, after in pairwise(numbers):
            if after != before + 1:
                self.lost.append(f"{self._folder}: the log's files between number {before} and {after} were missing")

    def _take(self, path: Path, batch: Batch) -> None:
        self._keep(path, batch.rows)
        for kind, id in batch.gone:
            self.state.rows.get(kind, {}).pop(id, None)
        self.state.count(batch.counts)
        self.pruned = max(self.pruned, batch.pruned)
        if batch.lines:
            self.batches[batch.first] = Batch(first=batch.first, at=batch.at, lines=batch.lines)
            self.seq = max(self.seq, batch.first + len(batch.lines))

    def _keep(self, path: Path, packed: list[bytes]) -> None:
        for row in packed:
            try:
                unpack(row)
            except ValueError as error:
                self.lost.append(f"{path}: a row that is none: {error}")
            else:
                kind, id = key_of(row)
                self.state.rows.setdefault(kind, {})[id] = row

    def _events(self) -> None:
        for path in sorted(self._folder.glob(f"events-{'[0-9]' * 20}")):
            for record in self._records(path):
                try:
                    batch = decode(record.payload)
                except ValueError as error:
                    self.lost.append(f"{path}: the record at byte {record.at}: {error}")
                else:
                    self.batches[batch.first] = batch

    def _put_events_right(self) -> None:
        """The events in order, each once; those that were pruned are left out."""
        following = self.pruned + 1
        kept: dict[int, Batch] = {}
        for first in sorted(self.batches):
            batch = self.batches[first]
            if first >= following and batch.lines:
                kept[first] = batch
                following = first + len(batch.lines)
        self.batches = kept
        self.seq = max(self.seq, following)

    def _records(self, path: Path) -> Iterator[Record]:
        """All whole records of a file; of what stands between them, a sentence."""
        data = path.read_bytes()
        at = 0
        while at < len(data):
            record = read(data, path.name, at)
            if record is not None:
                yield record
                at = record.end
                continue
            beyond = self._next(data, path.name, at)
            if data[at:beyond].strip(b"\0"):
                self.lost.append(f"{path}: what stood from byte {at} to {beyond} cannot be read, and is lost")
            at = beyond

    def _next(self, data: bytes, name: str, at: int) -> int:
        for match in HEADERS.finditer(data, at + 1):
            if read(data, name, match.start()) is not None:
                return match.start()
        return len(data)


class Events:
    """The events that were found, behind which and between which some may be missing."""

    def __init__(self, batches: dict[int, Batch], pruned: int) -> None:
        self.pruned = pruned
        self._batches = sorted(batches.values(), key=lambda batch: batch.first)

    def read(self, after: int, limit: int) -> list[Lines]:
        """See `Reading.batches`."""
        found, size = [], 0
        for batch in self._batches:
            if batch.first + len(batch.lines) - 1 > after:
                found.append(Lines(batch.first, batch.at, batch.lines))
                size += sum(map(len, batch.lines))
            if len(found) >= limit or size >= PIECE_BYTES:
                break
        return found
