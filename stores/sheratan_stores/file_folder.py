"""The file store's folder: whether it is one, what lies in it, and how it is read back as a whole."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import msgspec

from sheratan_hub.storage import StoreRefused
from sheratan_stores import file_segments, file_snapshot
from sheratan_stores.file_disk import replace, sync_folder
from sheratan_stores.file_ledger import Ledger
from sheratan_stores.file_segments import FORMAT, Batch, Tail, newer
from sheratan_stores.file_snapshot import Totals
from sheratan_stores.state import State, key_of

MARK = "store.json"
"""What makes a folder a store; the first segment of the log is there before it."""

CLOSED = "closed.json"
"""Says where the log ended when the store was closed. As long as it is there, an end that looks torn is damage."""

FIRST = "log-000000000001"
NOT_OURS = {"lock", "logs", "lost+found", f"{MARK}.tmp", f"{FIRST}.tmp"}
"""What may lie in a folder that is to become a store: a failed start's, the hub's logs, a file system's."""


class Closed(msgspec.Struct):
    """The content of `closed.json`: the last segment, and its end in bytes."""

    log: int
    end: int


class Mark(msgspec.Struct):
    """The content of `store.json`."""

    store: str
    format: int


def look(folder: Path) -> bool:
    """Whether the folder is a store already; if not, it may become one. Changes nothing; raises `StoreRefused`."""
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise StoreRefused(f"{folder} is no folder, as a file store needs one") from None
    except OSError as error:
        raise StoreRefused(f"{folder} cannot be read: {error.strerror}") from error
    try:
        if MARK not in names:
            return _may_become_one(folder, names)
        said = msgspec.json.decode((folder / MARK).read_bytes(), type=Mark)
    except OSError as error:
        raise StoreRefused(f"{error.filename} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StoreRefused(f"{folder / MARK} is damaged: {error}") from error
    if said.store != "file":
        raise StoreRefused(f"{folder} is a store of another kind: {said.store}")
    if said.format > FORMAT:
        raise StoreRefused(newer(folder / MARK, said.format))
    return True


def _may_become_one(folder: Path, names: set[str]) -> bool:
    """Refuse a folder with other things in it than a start leaves that was killed. Raises OSError; else it is False."""
    if FIRST in names and file_segments.is_empty(folder / FIRST):
        names = names - {FIRST}
    if not names <= NOT_OURS:
        raise StoreRefused(f"{folder} holds other things and is no store; choose an empty folder, or a new one")
    return False


def make(folder: Path, size: int) -> None:
    """Make the folder an empty store whose first segment has `size` bytes. Raises OSError, having taken all back."""
    try:
        file_segments.make(folder, 1, size)
        mark(folder)
    except OSError:
        for path in (folder / MARK, folder / FIRST):
            with suppress(OSError):
                path.unlink()
        raise


def mark(folder: Path) -> None:
    """Say that the folder is a store. Raises OSError."""
    replace(folder / MARK, msgspec.json.encode(Mark("file", FORMAT)) + b"\n")
    sync_folder(folder)


def say_closed(folder: Path, log: int, end: int) -> None:
    """Say that everything up to here is on disk, and nothing more. Raises OSError."""
    replace(folder / CLOSED, msgspec.json.encode(Closed(log, end)) + b"\n")
    sync_folder(folder)


def say_open(folder: Path) -> None:
    """Say that the log may grow from now on, and be torn. Raises OSError."""
    path = folder / CLOSED
    if path.exists():
        path.unlink()
        sync_folder(folder)


class Found(msgspec.Struct):
    """What a folder holds: the state, the ledger with the lines the log has for it, and where the log ends.

    `seq` is the next event's number, `first` the segment the log begins with: what precedes it is not needed.
    """

    state: State
    ledger: Ledger
    lines: list[Batch]
    tail: Tail
    seq: int
    first: int
    snapshot_bytes: int


def read(folder: Path) -> Found:
    """Read everything. Changes nothing; raises `StoreRefused` for what is neither whole nor provably unfinished."""
    reader = Reader(folder)
    reader.read_snapshot()
    tail = file_segments.replay(folder, reader.first, reader.take)
    if tail is None:
        raise StoreRefused(f"{file_segments.path_of(folder, reader.first)} is missing: this store has no log")
    check_closed(folder, tail)
    reader.read_ledger()
    reader.state.index()
    return Found(reader.state, reader.ledger, reader.lines, tail, reader.seq, reader.first, reader.snapshot_bytes)


def check_closed(folder: Path, tail: Tail) -> None:
    """Refuse a log that ends elsewhere than when it was closed."""
    path = folder / CLOSED
    try:
        said = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreRefused(f"{path} cannot be read: {error.strerror}") from error
    check_end(folder, tail, said)


def check_end(folder: Path, tail: Tail, said: bytes) -> None:
    """The same, given what `closed.json` holds."""
    path = folder / CLOSED
    try:
        closed = msgspec.json.decode(said, type=Closed)
    except ValueError as error:
        raise StoreRefused(f"{path} is damaged: {error}") from error
    if (closed.log, closed.end) != (file_segments.number_of(tail.path), tail.at):
        was = file_segments.path_of(folder, closed.log).name
        raise StoreRefused(
            f"{tail.path} is damaged: the log ends in it at byte {tail.at}, "
            f"but {was} ended at byte {closed.end} when the store was closed"
        )


class Reader:
    """Puts together what snapshot, log and ledger say."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.state = State()
        self.ledger = Ledger(folder)
        self.lines: list[Batch] = []
        self.seq, self.first, self.snapshot_bytes = 1, 1, 0

    def read_snapshot(self) -> None:
        """The newest one, if there is any."""
        path = file_snapshot.latest(self._folder)
        if path is not None:
            self.begin_with(*file_snapshot.read(path, self.keep))

    def begin_with(self, totals: Totals, size: int) -> None:
        """What a snapshot says beside its rows, and how many bytes it has."""
        self.first, self.seq, self.snapshot_bytes = totals.snapshot, totals.seq, size
        self.ledger.pruned = totals.pruned
        self.state.count(totals.counts)

    def take(self, batch: Batch) -> None:
        """A batch of the log."""
        self.keep(batch.rows)
        for kind, id in batch.gone:
            self.state.rows.get(kind, {}).pop(id, None)
        self.state.count(batch.counts)
        self.ledger.pruned = max(self.ledger.pruned, batch.pruned)
        if batch.lines:
            if batch.first != self.seq:
                text = f"event {self.seq} is missing in the log: what follows is event {batch.first}"
                raise StoreRefused(f"{self._folder} is damaged: {text}")
            self.seq += len(batch.lines)
            self.lines.append(Batch(first=batch.first, at=batch.at, lines=batch.lines))

    def read_ledger(self) -> None:
        """What precedes the log's lines; the log has the last word on the others."""
        before = (self.lines[0].first if self.lines else self.seq) - 1
        self.ledger.look(before)
        self.ledger.check(before)

    def keep(self, packed: list[bytes]) -> None:
        """Some packed rows, in the place of older ones."""
        for row in packed:
            kind, id = key_of(row)
            self.state.rows.setdefault(kind, {})[id] = row
