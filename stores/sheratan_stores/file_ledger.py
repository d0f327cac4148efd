"""The file store's ledger: the events in segments of their own, outside memory.

The log holds every line until its segment goes, so these files follow behind without a sync of their own: what a
crash took from their end is written again from the log.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sheratan_hub.storage import LedgerLine, StoreDown, StoreRefused
from sheratan_stores.file_log import Batch, decode, encode, sync_folder, write
from sheratan_stores.file_records import frame, read_all

FILE_BYTES = 8 << 20
"""A ledger file that has grown to this is followed by another. Files go whole when all their lines are pruned."""

PLACES = 256
"""For so many numbers it is known where in their file they stand, so that who reads page by page need not search."""


class Ledger:
    """The lines from `pruned` + 1 to `last`, and those that wait to be written. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._firsts: list[int] = []
        self._file: int | None = None
        self._end = 0
        self._places: dict[int, tuple[int, int]] = {}
        self._place = 0
        self.last = self.pruned = 0

    def look(self, upto: int | None = None) -> None:
        """Find out which lines there are, up to a number if one is given. Changes nothing; raises `StoreRefused`."""
        names = (path.name for path in self._folder.glob(f"events-{'[0-9]' * 20}"))
        firsts = sorted(int(name.rpartition("-")[2]) for name in names)
        self._firsts = [first for first in firsts if upto is None or first <= upto]
        self.last, self._end = self._firsts[-1] - 1 if self._firsts else 0, 0
        try:
            for _, end, batch in self._batches(self._firsts[-1], 0) if self._firsts else ():
                if upto is not None and batch.first > upto:
                    return
                self.last, self._end = batch.first + len(batch.lines) - 1, end
        except OSError as error:
            raise StoreRefused(f"{self._path(self._firsts[-1])} cannot be read: {error.strerror}") from error

    def open(self) -> None:
        """Make the last file ready to be continued: cut what is no whole record of what is known. Raises OSError."""
        for path in self._folder.glob(f"events-{'[0-9]' * 20}"):
            if path not in map(self._path, self._firsts):
                path.unlink()
        if self._firsts:
            self._file = self._opened(self._firsts[-1])
            os.ftruncate(self._file, self._end)

    def write(self, batches: list[Batch]) -> None:
        """Append batches of lines; those that are there already are passed over. Raises OSError."""
        for batch in batches:
            if batch.first <= self.last:
                continue
            if self._file is None or self._end >= FILE_BYTES:
                self._next_file(batch.first)
            record = frame(encode(batch), self._path(self._firsts[-1]).name, self._end, 0)
            write(self._file or 0, record, self._end)
            self._end += len(record)
            self.last = batch.first + len(batch.lines) - 1

    def sync(self) -> None:
        """Wait until all that was written is on disk. Raises OSError."""
        if self._file is not None:
            os.fdatasync(self._file)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

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

    def prune(self, upto: int) -> None:
        """Forget the lines up to this number, and the files that hold no others. Raises OSError."""
        self.pruned = max(self.pruned, upto)
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
            raise StoreDown(f"{self._folder}: the ledger is damaged: what follows number {after} cannot be read")

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

    def _next_file(self, first: int) -> None:
        self.sync()
        file = self._opened(first)
        self.close()
        self._file, self._end = file, 0
        self._firsts.append(first)
        sync_folder(self._folder)
