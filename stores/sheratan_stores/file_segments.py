"""The segments of the file store's log: made in advance, written, sealed, read back. A record is a batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from sheratan_hub.storage import Key, StoreRefused
from sheratan_stores.file_disk import SyncFailed, draft_of, sync, sync_folder, write
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


class Tail(msgspec.Struct):
    """Where the log ends: the segment to go on with, what it was made with, its end.

    `synced` is how far it is on disk for sure, `logged` counts the bytes of the segments before it.
    """

    path: Path
    size: int
    at: int
    synced: int = 0
    logged: int = 0


class Segment:
    """One file of the log, open for writing: its number, its end `at`, and how far it is known to be on disk."""

    def __init__(self, tail: Tail) -> None:
        self.path, self.size, self.at, self.synced = tail.path, tail.size, tail.at, tail.synced
        self.number, self._name = number_of(tail.path), tail.path.name
        self._file = os.open(tail.path, os.O_RDWR | os.O_CLOEXEC)

    def framed(self, payload: bytes) -> bytes:
        """The record for this payload at the end."""
        return frame(payload, self._name, self.at, self.synced)

    def has_room(self, record: bytes) -> bool:
        """Whether there is room for this record and a seal."""
        return self.at + len(record) + SEAL_BYTES <= self.size

    def append(self, record: bytes, *, durable: bool) -> None:
        """Write a record at the end. Raises OSError when it was refused and cut back, `SyncFailed` when unsure."""
        done = 0
        try:
            while done < len(record):
                done += os.pwrite(self._file, record[done:] if done else record, self.at + done)
        except OSError:
            self._cut_back(done)
            raise
        if durable:
            sync(self._file, self.path)
        self.at += len(record)
        if durable:
            self.synced = self.at

    def seal(self) -> None:
        """Say that the log goes on in the next segment."""
        self.append(self.framed(SEAL), durable=True)

    def sync(self) -> None:
        """Wait until all that was written is on disk. Raises `SyncFailed`."""
        if self.synced < self.at:
            sync(self._file, self.path)
            self.synced = self.at

    def renew(self) -> None:
        """Put zeros over what a torn write left behind the end, and bring everything to disk. Raises OSError.

        What is not known to be on disk is written again: after a sync that failed, the system may show bytes that
        the disk has not, and would not write them. Raises `SyncFailed`, too.
        """
        data = self.path.read_bytes()
        rest = data[self.at :].rstrip(b"\0")
        write(self._file, data[self.synced : self.at] + bytes(len(rest)), self.synced)
        os.ftruncate(self._file, self.size)
        sync(self._file, self.path)
        self.synced = self.at

    def _cut_back(self, length: int) -> None:
        """Put zeros over what was written of a record that found no room, before another is written there."""
        if length == 0:
            return
        try:
            write(self._file, bytes(length), self.at)
        except OSError as error:
            raise SyncFailed(f"{self.path}: {error.strerror}") from error
        sync(self._file, self.path)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def path_of(folder: Path, number: int) -> Path:
    """The file of a segment."""
    return folder / f"log-{number:012}"


def number_of(path: Path) -> int:
    """The number in the name of a segment or a snapshot."""
    return int(path.name.rpartition("-")[2])


def make(folder: Path, number: int, size: int) -> Tail:
    """Make a segment of zeros with its header, whole or not at all; where it ends. Raises OSError."""
    path = path_of(folder, number)
    draft = draft_of(path)
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
    return Tail(path, size, len(header), len(header))


def is_empty(path: Path) -> bool:
    """Whether this is a segment without a batch. Raises OSError."""
    data = path.read_bytes()
    record = next(read_all(data, path.name), None)
    return record is not None and not data[record.end :].strip(b"\0")


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
        scan = Scan(path)
        scan.run(take)
        if tail is not None and scan.batches:
            raise StoreRefused(f"{tail.path} is damaged: it ends at byte {tail.at}, but the log goes on in {path.name}")
        if tail is None and not scan.sealed:
            tail = Tail(path, scan.size, scan.end, scan.synced, logged)
        logged += scan.end
    if tail is None and paths:
        raise StoreRefused(f"{path_of(folder, first + len(paths))} is missing: the log of this store goes on there")
    return tail


class Scan:
    """One segment read from its beginning to its end: the size it was made with, and what stands in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = self.end = self.synced = self.batches = 0
        self.sealed = False

    def run(self, take: Callable[[Batch], None]) -> None:
        """Read the file. Raises `StoreRefused`."""
        try:
            self.of(self.path.read_bytes(), take)
        except OSError as error:
            raise StoreRefused(f"{self.path} cannot be read: {error.strerror}") from error

    def of(self, data: bytes, take: Callable[[Batch], None]) -> None:
        """Read these bytes as the file's content. Raises `StoreRefused`."""
        for record in read_all(data, self.path.name):
            try:
                if record.at == 0:
                    self.size = _header(self.path, record.payload).size
                else:
                    self._batch(decode(record.payload), take)
            except ValueError as error:
                raise StoreRefused(f"{self.path} is damaged: the record at byte {record.at}: {error}") from error
            self.end, self.synced = record.end, record.synced
            if self.sealed:
                break
        if self.end == 0:
            raise StoreRefused(f"{self.path} is damaged: its header at byte 0 cannot be read")
        if self.sealed:
            if data[self.end :].strip(b"\0"):
                raise StoreRefused(f"{self.path} is damaged: something follows its end at byte {self.end}")
        elif not is_torn(data, self.path.name, self.end, self.size):
            raise StoreRefused(f"{self.path} is damaged: record {self.batches + 2} at byte {self.end} cannot be read")

    def _batch(self, batch: Batch, take: Callable[[Batch], None]) -> None:
        if batch.sealed:
            self.sealed = True
        else:
            take(batch)
            self.batches += 1


def _header(path: Path, payload: bytes) -> Header:
    header = msgspec.json.decode(payload, type=Header)
    if header.format > FORMAT:
        raise StoreRefused(newer(path, header.format))
    return header


def newer(path: Path, format: int) -> str:
    """The refusal's text for a file of a format that only a newer version knows."""
    return (
        f"{path} has format {format}, this version knows formats up to {FORMAT}; "
        "start the version of Sheratan Hub that wrote it, or a newer one"
    )
