"""The file store's folder: whether it is one, what lies in it, and how it is read back as a whole."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import msgspec

from sheratan_hub.storage import StoreRefused
from sheratan_stores import file_log, file_snapshot
from sheratan_stores.file_ledger import Ledger
from sheratan_stores.file_log import FORMAT, Batch, Tail, newer
from sheratan_stores.state import State, key_of

MARK = "store.json"
"""What makes a folder a store; it is there before anything else."""

NOT_OURS = {"lock", "logs", "lost+found", f"{MARK}.tmp"}
"""What may lie in a folder that is to become a store: a failed start's, the hub's logs, a file system's."""


class Mark(msgspec.Struct):
    """The content of `store.json`."""

    store: str
    format: int


def look(folder: Path) -> bool:
    """Whether the folder is a store already; if not, it may become one. Changes nothing; raises `StoreRefused`."""
    try:
        names = set(os.listdir(folder))
        text = (folder / MARK).read_bytes() if MARK in names else b""
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise StoreRefused(f"{folder} is no folder, as a file store needs one") from None
    except OSError as error:
        raise StoreRefused(f"{folder} cannot be read: {error.strerror}") from error
    if MARK not in names:
        if names <= NOT_OURS:
            return False
        raise StoreRefused(f"{folder} holds other things and is no store; choose an empty folder, or a new one")
    try:
        mark = msgspec.json.decode(text, type=Mark)
    except msgspec.DecodeError as error:
        raise StoreRefused(f"{folder / MARK} is damaged: {error}") from error
    if mark.store != "file":
        raise StoreRefused(f"{folder} is a store of another kind: {mark.store}")
    if mark.format > FORMAT:
        raise StoreRefused(newer(folder / MARK, mark.format))
    return True


def make(folder: Path, size: int) -> None:
    """Make the folder an empty store whose first segment has `size` bytes. Raises OSError, having taken all back."""
    try:
        file_log.make(folder, 1, size)
        draft = folder / f"{MARK}.tmp"
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            file_log.write(file, msgspec.json.encode(Mark("file", FORMAT)) + b"\n", 0)
            os.fsync(file)
        finally:
            os.close(file)
        draft.replace(folder / MARK)
        file_log.sync_folder(folder)
    except OSError:
        for path in (folder / f"{MARK}.tmp", folder / MARK, file_log.path_of(folder, 1)):
            with suppress(OSError):
                path.unlink()
        raise


class Found(msgspec.Struct):
    """What a folder holds: the state, the ledger with the batches it lacks, where the log ends, what precedes it."""

    state: State
    ledger: Ledger
    missing: list[Batch]
    tail: Tail
    logged: int
    seq: int
    snapshot: int
    snapshot_bytes: int


def read(folder: Path) -> Found:
    """Read everything. Changes nothing; raises `StoreRefused` for what is neither whole nor provably unfinished."""
    reader = Reader(folder)
    tail = reader.read()
    if tail is None:
        raise StoreRefused(f"{file_log.path_of(folder, reader.first)} is missing: the log of this store is not there")
    reader.check_ledger()
    reader.state.index()
    return Found(
        reader.state, reader.ledger, reader.missing, tail, tail.logged, reader.seq, reader.first, reader.snapshot_bytes
    )


class Reader:
    """Puts together what snapshot, log and ledger say."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.state = State()
        self.ledger = Ledger(folder)
        self.missing: list[Batch] = []
        self.seq, self.first, self.snapshot_bytes = 1, 1, 0

    def read(self) -> Tail | None:
        """Snapshot, then ledger files, then log; where the log ends."""
        path = file_snapshot.latest(self._folder)
        if path is not None:
            totals, self.snapshot_bytes = file_snapshot.read(path, self._rows)
            self.first, self.seq = totals.snapshot, totals.seq
            self.ledger.pruned = totals.pruned
            self.state.count(totals.counts)
        self.ledger.look()
        tail = file_log.replay(self._folder, self.first, self._batch)
        if self.ledger.last >= self.seq:  # of a batch that was not synced and is lost
            self.ledger.look(self.seq - 1)
        return tail

    def check_ledger(self) -> None:
        """The ledger's files and the log's lines have no gap between them."""
        goes_on = self.missing[0].first if self.missing else self.seq
        if max(self.ledger.last, self.ledger.pruned) + 1 < goes_on:
            text = f"the events from number {self.ledger.last + 1} to {goes_on - 1} are missing"
            raise StoreRefused(f"{self._folder} is damaged: {text}")
        self.ledger.last = max(self.ledger.last, self.ledger.pruned)

    def _rows(self, packed: list[bytes]) -> None:
        for row in packed:
            kind, id = key_of(row)
            self.state.rows.setdefault(kind, {})[id] = row

    def _batch(self, batch: Batch) -> None:
        self._rows(batch.rows)
        for kind, id in batch.gone:
            self.state.rows.get(kind, {}).pop(id, None)
        self.state.count(batch.counts)
        self.ledger.pruned = max(self.ledger.pruned, batch.pruned)
        if batch.lines:
            self.seq = batch.first + len(batch.lines)
            if self.seq - 1 > self.ledger.last:
                self.missing.append(Batch(first=batch.first, at=batch.at, lines=batch.lines))
