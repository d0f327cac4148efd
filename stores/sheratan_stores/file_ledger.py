"""The file store's ledger: the events in files of their own, outside memory.

The log holds every line until its segment goes, and has the last word. So these files follow behind without a sync
of their own, and when a store is opened they are cut where the log's lines begin, which are then written again.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sheratan_hub.storage import LedgerLine, StoreDown, StoreRefused
from sheratan_stores.file_disk import SyncFailed, sync, sync_folder, write
from sheratan_stores.file_records import frame, read_all
from sheratan_stores.file_segments import Batch, decode, encode

FILE_BYTES = 8 << 20
"""A ledger file that has grown to this is followed by another. Files go whole when all their lines are pruned."""

NOT_OPEN = -1

PLACES = 256
"""For so many numbers it is known where in their file they stand, so that who reads page by page need not search."""


class Ledger:
    """The lines from `pruned` + 1 to `last`, and those that wait to be written. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._firsts: list[int] = []
        self._file = NOT_OPEN
        self._end = 0
        self._places: dict[int, tuple[int, int]] = {}
        self._place = 0
        self.last = self.pruned = 0

    def look(self, upto: int) -> None:
        """Find out which lines there are up to a number. Changes nothing; raises `StoreRefused`."""
        names = (path.name for path in self._folder.glob(f"events-{'[0-9]' * 20}"))
        firsts = sorted(int(name.rpartition("-")[2]) for name in names)
        self._firsts = [first for first in firsts if first <= upto]
        if not self._firsts:
            return
        path = self._path(self._firsts[-1])
        self.last = self._firsts[-1] - 1
        try:
            for _, end, batch in self._batches(self._firsts[-1], 0):
                if batch.first > upto:
                    break
                self.last, self._end = batch.first + len(batch.lines) - 1, end
        except OSError as error:
            raise StoreRefused(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise StoreRefused(f"{path} is damaged: the record at byte {self._end}: {error}") from error

    def check(self, upto: int) -> None:
        """Refuse a ledger whose lines do not reach up to this number, behind which the log's begin."""
        known = max(self.last, self.pruned)
        if known < upto:
            where = f"{self._path(self._firsts[-1])} at byte {self._end}" if self._firsts else f"{self._folder}"
            raise StoreRefused(f"{where} is damaged: the events from number {known + 1} to {upto} are missing")
        self.last = known

    def open(self) -> None:
        """Make the last file ready to be continued: cut what is not known of. Raises OSError."""
        for path in self._folder.glob(f"events-{'[0-9]' * 20}"):
            if path not in map(self._path, self._firsts):
                path.unlink()
        if self._firsts:
            self._file = self._opened(self._firsts[-1])
            os.ftruncate(self._file, self._end)

    def write(self, batches: list[Batch]) -> None:
        """Append batches of lines; those that are there already are passed over. Raises OSError, `SyncFailed`."""
        for batch in batches:
            if batch.first > self.last:
                file = self._file_for(batch.first)
                record = frame(encode(batch), file.name, self._end, 0)
                write(self._file, record, self._end)
                self._end += len(record)
                self.last = batch.first + len(batch.lines) - 1

    def sync(self) -> None:
        """Wait until all that was written is on disk. Raises `SyncFailed`."""
        if self._file != NOT_OPEN:
            sync(self._file, self._path(self._firsts[-1]))

    def close(self) -> None:
        """Close the file."""
        if self._file != NOT_OPEN:
            os.close(self._file)
            self._file = NOT_OPEN

    def read(self, after: int, limit: int) -> list[LedgerLine]:
        """See `Store.events`. Raises `StoreDown` where a file is damaged."""
        after, last = max(after, self.pruned), self.last
        lines = list(islice(self._lines(after), min(limit, last - after) if last > after else 0))
        if lines:
            self._remember(lines[-1].seq)
        return lines

    def prunable(self, before: int) -> tuple[int, int]:
        """How far whole batches were saved before this time (ms), and how many lines these are."""
        upto = self.pruned
        for batch in self._from(self.pruned):
            if batch.at >= before:
                break
            upto = batch.first + len(batch.lines) - 1
        return upto, upto - self.pruned

    def remove_pruned(self) -> None:
        """Remove the files that hold pruned lines only. Raises OSError."""
        while len(self._firsts) > 1 and self._firsts[1] <= self.pruned + 1:
            self._path(self._firsts[0]).unlink(missing_ok=True)
            del self._firsts[0]

    def _lines(self, after: int) -> Iterator[LedgerLine]:
        for batch in self._from(after):
            for seq, line in enumerate(batch.lines, batch.first):
                if seq > after:
                    yield LedgerLine(seq, line)

    def _from(self, after: int) -> Iterator[Batch]:
        """The batches with lines behind a number, from file to file."""
        start = max(0, bisect_right(self._firsts, after + 1) - 1)
        known, place = self._places.get(after, (0, 0))
        for first in self._firsts[start:]:
            for at, _, batch in self._batches(first, place if first == known else 0):
                self._place = at
                if batch.first > after + 1:
                    break
                if batch.first + len(batch.lines) - 1 > after:
                    yield batch
                    after = batch.first + len(batch.lines) - 1
        if after < self.last:
            file = self._path(self._firsts[max(0, bisect_right(self._firsts, after + 1) - 1)])
            raise StoreDown(f"{file} is damaged: event {after + 1}, and what follows, cannot be read")

    def _remember(self, seq: int) -> None:
        """Where to go on behind this number: who reads page by page need not search from the file's beginning."""
        first = self._firsts[bisect_right(self._firsts, seq) - 1]
        self._places[seq] = (first, self._place)
        if len(self._places) > PLACES:
            del self._places[next(iter(self._places))]

    def _batches(self, first: int, at: int) -> Iterator[tuple[int, int, Batch]]:
        """The whole batches of a file, each with the places where it begins and ends. Raises OSError."""
        path = self._path(first)
        for record in read_all(path.read_bytes(), path.name, at):
            yield record.at, record.end, decode(record.payload)

    def _path(self, first: int) -> Path:
        return self._folder / f"events-{first:020}"

    def _opened(self, first: int) -> int:
        return os.open(self._path(first), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _file_for(self, first: int) -> Path:
        """The file that this number goes to, open: the last one, or the next. Raises OSError, `SyncFailed`."""
        if self._file == NOT_OPEN or self._end >= FILE_BYTES:
            self.sync()
            file = self._opened(first)
            try:
                sync_folder(self._folder)
            except OSError as error:
                os.close(file)
                raise SyncFailed(f"{self._folder}: {error.strerror}") from error
            self.close()
            self._file, self._end = file, 0
            self._firsts.append(first)
        return self._path(self._firsts[-1])
