"""The file store's snapshots: all rows as they were when a segment of the log began, or later.

A row in it may be newer than the segment's beginning: the log that follows holds whole rows, so replaying it over
a newer one ends the same. Counters and ledger numbers are those of the beginning, as the log holds deltas.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from sheratan_hub.storage import StoreRefused
from sheratan_stores.file_disk import draft_of, sync_folder, write
from sheratan_stores.file_records import frame, read_all
from sheratan_stores.file_segments import FORMAT, newer


class Totals(msgspec.Struct):
    """The first record, as JSON: what is not rows. `seq` is the next ledger number."""

    format: int
    snapshot: int
    seq: int
    pruned: int
    counts: dict[str, int]


SYNC_BYTES = 16 << 20
"""After so much is written it is synced, so that the end need not sync hundreds of MiB in front of a commit."""

NOT_OPEN = -1

encode_rows = msgspec.msgpack.Encoder().encode
decode_rows = msgspec.msgpack.Decoder(list[bytes]).decode


class Writer:
    """Writes the snapshot that stands for all segments before one, under a draft's name until it is whole."""

    def __init__(self, folder: Path, totals: Totals) -> None:
        self._folder = folder
        self.path = path_of(folder, totals.snapshot)
        self._draft = draft_of(self.path)
        self._totals = totals
        self._rows = self._at = self._synced = 0
        self._file = NOT_OPEN

    def begin(self) -> None:
        """Make the draft. Raises OSError, as do the others."""
        self._file = os.open(self._draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._write(msgspec.json.encode(self._totals))

    def add(self, rows: list[bytes]) -> None:
        """Write some packed rows."""
        self._rows += len(rows)
        self._write(encode_rows(rows))

    def finish(self) -> int:
        """Write how many rows there are, sync, and give it its name; how many bytes it has."""
        self._write(b"%d" % self._rows)
        os.fsync(self._file)
        self._draft.replace(self.path)
        sync_folder(self._folder)
        return self._at

    def close(self) -> None:
        """Close the file; a draft that was not finished goes."""
        if self._file != NOT_OPEN:
            os.close(self._file)
            self._file = NOT_OPEN
            self._draft.unlink(missing_ok=True)

    def _write(self, payload: bytes) -> None:
        record = frame(payload, self.path.name, self._at, 0)
        write(self._file, record, self._at)
        self._at += len(record)
        if self._at - self._synced > SYNC_BYTES:
            os.fdatasync(self._file)
            self._synced = self._at


class OnDisk:
    """A file's content, read when it is asked for. A map of it would be killed by a sector that cannot be read."""

    def __init__(self, file: int) -> None:
        self._file, self._bytes = file, os.fstat(file).st_size

    def __len__(self) -> int:
        return self._bytes

    def __getitem__(self, part: slice, /) -> bytes:
        start, stop, _ = part.indices(self._bytes)
        return os.pread(self._file, stop - start, start)


def path_of(folder: Path, number: int) -> Path:
    """The file of the snapshot that stands for all segments before this one."""
    return folder / f"snapshot-{number:012}"


def latest(folder: Path) -> Path | None:
    """The newest snapshot, if there is one."""
    return max(folder.glob(f"snapshot-{'[0-9]' * 12}"), default=None)


def read(path: Path, take: Callable[[list[bytes]], None]) -> tuple[Totals, int]:
    """Give the packed rows of a snapshot to `take`; what else it holds, and its size in bytes.

    Raises `StoreRefused`.
    """
    try:
        with path.open("rb", buffering=0) as file:
            return read_open(path, file.fileno(), take)
    except OSError as error:
        raise StoreRefused(f"{path} cannot be read: {error.strerror}") from error


def read_open(path: Path, file: int, take: Callable[[list[bytes]], None]) -> tuple[Totals, int]:
    """The same of an open file, which need not be there any more. Raises OSError, too."""
    totals: Totals | None = None
    rows, end, whole = 0, 0, False
    data = OnDisk(file)
    try:
        for record in read_all(data, path.name):
            end = record.end
            if totals is None:
                totals = _totals(path, record.payload)
            elif record.payload.isdigit():
                whole = int(record.payload) == rows and end == len(data)
            else:
                some = decode_rows(record.payload)
                rows += len(some)
                take(some)
    except ValueError as error:
        raise StoreRefused(f"{path} is damaged: {error}") from error
    if totals is None or not whole:
        raise StoreRefused(f"{path} is damaged: what stands at byte {end} cannot be read")
    return totals, end


def _totals(path: Path, payload: bytes) -> Totals:
    totals = msgspec.json.decode(payload, type=Totals)
    if totals.format > FORMAT:
        raise StoreRefused(newer(path, totals.format))
    return totals
