"""The file store's log: segments of records, each a batch of changes; made in advance, written, sealed, replayed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from sheratan_hub.storage import Key, StoreRefused
from sheratan_stores.file_records import FRAME_BYTES, frame, is_torn, read_all

FORMAT = 1
"""The format of every file of the store. A newer one is refused; an older one will be read and written anew."""

PIECE_BYTES = 1 << 20


class Batch(msgspec.Struct, array_like=True, gc=False):
    """One record of the log: what a transaction changed.

    `rows` are packed, `first` and `at` are the number and the time (ms) of its ledger `lines`. `pruned`: the
    ledger is forgotten up to this number. A `sealed` batch is the last of its segment, and there is another one.
    """

    rows: list[bytes] = []
    gone: list[Key] = []
    counts: dict[str, int] = {}
    first: int = 0
    at: int = 0
    lines: list[bytes] = []
    pruned: int = 0
    sealed: bool = False


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Batch).decode

SEAL = encode(Batch(sealed=True))
SEAL_BYTES = FRAME_BYTES + len(SEAL)


class Header(msgspec.Struct):
    """The first record of a segment, as JSON: the format, the segment's number, the bytes the file was made with."""

    format: int
    log: int
    size: int


class SyncFailed(Exception):
    """Nobody knows what is on disk now."""


class Segment:
    """One file of the log, open for writing. `at` is its end, `synced` how far it is known to be on disk."""

    def __init__(self, path: Path, size: int, at: int) -> None:
        self.path, self.size, self.at = path, size, at
        self.synced = 0
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    @property
    def number(self) -> int:
        """Its place in the order of segments."""
        return number_of(self.path)

    def framed(self, payload: bytes) -> bytes:
        """The record for this payload at the end."""
        return frame(payload, self.path.name, self.at, self.synced)

    def has_room(self, record: bytes) -> bool:
        """Whether there is room for this record and a seal."""
        return self.at + len(record) + SEAL_BYTES <= self.size

    def append(self, record: bytes, *, durable: bool) -> None:
        """Write a record at the end. Raises OSError when it was refused and cut back, `SyncFailed` when unsure."""
        try:
            write(self._file, record, self.at)
        except OSError as error:
            self._cut_back(len(record), error)
            raise
        if durable:
            self.sync(self.at + len(record))
        self.at += len(record)

    def seal(self) -> None:
        """Say that the log goes on in the next segment."""
        self.append(self.framed(SEAL), durable=True)

    def sync(self, upto: int | None = None) -> None:
        """Wait until all that was written is on disk."""
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise SyncFailed(f"{self.path}: {error.strerror}") from error
        self.synced = self.at if upto is None else upto

    def clear_rest(self) -> None:
        """Put zeros over what a torn write left behind the end, and sync. Raises OSError, `SyncFailed`."""
        rest = self.path.read_bytes()[self.at :].rstrip(b"\0")
        write(self._file, bytes(len(rest)), self.at)
        os.ftruncate(self._file, self.size)
        self.sync()

    def _cut_back(self, length: int, error: OSError) -> None:
        try:
            write(self._file, bytes(length), self.at)
        except OSError:
            raise SyncFailed(f"{self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def write(file: int, data: bytes, at: int) -> None:
    """Write all of `data` at this offset. Raises OSError."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(file, rest, at)
        rest, at = rest[done:], at + done


def path_of(folder: Path, number: int) -> Path:
    """The file of a segment."""
    return folder / f"log-{number:012}"


def number_of(path: Path) -> int:
    """The number in the name of a segment or a snapshot."""
    return int(path.name.rpartition("-")[2])


def make(folder: Path, number: int, size: int) -> tuple[Path, int, int]:
    """Make a segment of zeros with its header, whole or not at all: (path, size, its end). Raises OSError."""
    path = path_of(folder, number)
    draft = path.with_name(f"{path.name}.tmp")
    try:
        file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            for at in range(0, size, PIECE_BYTES):
                write(file, bytes(min(PIECE_BYTES, size - at)), at)
            header = frame(msgspec.json.encode(Header(FORMAT, number, size)), path.name, 0, 0)
            write(file, header, 0)
            os.fsync(file)
        finally:
            os.close(file)
        draft.replace(path)
        sync_folder(folder)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise
    return path, size, len(header)


def sync_folder(folder: Path) -> None:
    """Wait until the names in the folder are on disk. Raises OSError."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


class Tail(msgspec.Struct):
    """Where the log ends: the segment to go on with, what it was made with, its end; the bytes replayed."""

    path: Path
    size: int
    at: int
    logged: int = 0


def replay(folder: Path, first: int, take: Callable[[Batch], None]) -> Tail | None:
    """Give every batch from segment `first` on to `take`; None if there is no segment. Changes nothing.

    The order is: sealed segments, the one to go on with, and the next if it was made already. Raises
    `StoreRefused` for whatever is not provably an unfinished last write.
    """
    paths = sorted(path for path in folder.glob(f"log-{'[0-9]' * 12}") if number_of(path) >= first)
    tail: Tail | None = None
    logged = 0
    for number, path in enumerate(paths, first):
        if number_of(path) != number:
            raise StoreRefused(f"{path_of(folder, number)} is missing: the log of this store has a gap")
        size, end, batches, sealed = _scan(path, number, take)
        logged += end
        if tail is not None and batches:
            raise StoreRefused(f"{tail.path} is damaged: it ends at byte {tail.at}, but the log goes on in {path.name}")
        if tail is None and not sealed:
            tail = Tail(path, size, end)
    if tail is not None:
        tail.logged = logged - tail.at
    elif paths:
        raise StoreRefused(f"{path_of(folder, first + len(paths))} is missing: the log of this store goes on there")
    return tail


def _scan(path: Path, number: int, take: Callable[[Batch], None]) -> tuple[int, int, int, bool]:
    """(size it was made with, end, number of batches, whether it is sealed)"""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreRefused(f"{path} cannot be read: {error.strerror}") from error
    records = read_all(data, path.name)
    first = next(records, None)
    if first is None:
        raise StoreRefused(f"{path} is damaged: its first record cannot be read")
    header = msgspec.json.decode(first.payload, type=Header)
    if header.format > FORMAT:
        raise StoreRefused(newer(path, header.format))
    end, count = first.end, 0
    for record in records:
        batch = decode(record.payload)
        end = record.end
        if batch.sealed:
            return header.size, end, count, True
        take(batch)
        count += 1
    if header.log != number or not is_torn(data, path.name, end, header.size):
        raise StoreRefused(f"{path} is damaged: record {count + 2} at byte {end} cannot be read")
    return header.size, end, count, False


def newer(path: Path, format: int) -> str:
    """The refusal's text for a file of a format that only a newer version knows."""
    return (
        f"{path} has format {format}, this version knows formats up to {FORMAT}; "
        "start the version of Sheratan Hub that wrote it, or a newer one"
    )
