"""Proves a log that goes on growing, piece by piece, and remembers up to where: what a hub says of its own log."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import NamedTuple

from sheratan_hub.audit import Audit
from sheratan_hub.audit_lines import ALERTS_NAME, Head, Identity, chain_files, first_seq, identity, listed
from sheratan_hub.audit_verify import Chain, Place
from sheratan_hub.clock import Clock

BUDGET_BYTES = 8 << 20
"""So much is read at once; a longer log takes several looks."""

CHUNK_BYTES = 256 << 10

TICK_MS = 20
"""Two changes of a file within this time may leave the same time of change."""


class Stamp(NamedTuple):
    """What tells that a file is as it was: any change moves its time of change, which nobody can set."""

    inode: int
    size: int
    ctime_ns: int


class Proof(NamedTuple):
    """What is proved: lines `began_at` to `seq`. `complete`: nothing is left to be looked at."""

    broken: Place | None
    complete: bool
    began_at: int
    seq: int
    cuts: list[Place]


class ChainCheck:
    """Remembers what it has proved of the log at `path`. Finished files are looked at again when their stamp moves."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._foreign = 0
        self._reset()

    def _reset(self) -> None:
        self._chain = Chain()
        self._done: list[Stamp] = []
        self._begin_file(None)
        self._racy = False
        self._broken_at: Stamp | None = None

    def _stamp_of_broken(self) -> Stamp | None:
        """The stamp of the finished file in which a line is broken; the last file is its writer's to watch."""
        broken = self._chain.broken
        return None if broken is None or self._growing else _stamp(Path(broken.file))

    def _begin_file(self, inode: int | None, growing: bool = False) -> None:
        """Go on with this file (None: none yet), from its start; `growing`: it is the one that is written to."""
        self._inode, self._growing, self._offset, self._line = inode, growing, 0, 1
        self._start = (self._chain.head, self._chain.began_at, list(self._chain.cuts))

    def _rewind(self) -> None:
        """Forget what is proved of the file that was being looked at."""
        head, began_at, cuts = self._start
        self._chain = Chain(head.seq, head.hash)
        self._chain.began_at, self._chain.cuts = began_at, cuts
        self._growing = self._inode == _inode(self._path)
        self._offset, self._line, self._racy = 0, 1, False

    def advance(self, head: Head, foreign: int, now_ms: int, budget: int = BUDGET_BYTES) -> Proof:
        """Read on, at most `budget` bytes. `head` is what the writer knows to be the end, before this call.

        `foreign` counts the changes by others that the writer has seen: after one nothing counts as proved.
        """
        mended = self._broken_at is not None and self._broken_at != self._stamp_of_broken()
        if foreign != self._foreign or mended or not self._is_as_it_was():
            self._foreign = foreign
            self._reset()
        if self._racy or (self._growing and self._inode != _inode(self._path)):
            self._rewind()  # it was changed a moment before it was read, or has been rotated since
        left, at_end = budget, False
        files, current = listed(self._path)
        done = {stamp.inode for stamp in self._done}
        for file in files:
            if _inode(file) in done:
                continue
            left, at_end = self._read(file, current, left)
            if left <= 0 or self._chain.broken is not None or not at_end:
                break
        self._broken_at = self._stamp_of_broken()
        self._racy = self._is_racy(now_ms, budget)
        return self._proof(head, at_end)

    def _is_as_it_was(self) -> bool:
        """Whether the finished files are unchanged; the oldest may have been removed."""
        there = {stamp.inode: stamp for file in chain_files(self._path) if (stamp := _stamp(file)) is not None}
        while self._done and self._done[0].inode not in there:
            self._done.pop(0)
        return all(there.get(stamp.inode) == stamp for stamp in self._done)

    def _read(self, file: Path, current: Identity, budget: int) -> tuple[int, bool]:
        """(what is left of the budget, whether its end was reached); a log rotated since it was listed is left."""
        with file.open("rb") as opened:
            if file == self._path and identity(opened.fileno()) != current:
                return budget, False
            found = os.fstat(opened.fileno())
            if self._inode != found.st_ino:
                self._begin_file(found.st_ino, growing=file == self._path)
                if self._chain.seq == 0 and (first_seq(file) or 1) > 1:
                    self._chain.begin_at(opened.readline().rstrip(b"\n"))
            rotated, chunk = file != self._path, CHUNK_BYTES
            while budget > 0 and self._chain.broken is None:
                opened.seek(self._offset)
                text = opened.read(chunk)
                whole = text[: text.rfind(b"\n") + 1]
                if not whole and len(text) == chunk:
                    chunk *= 4
                    continue
                if rotated and len(text) < chunk:
                    whole = text
                if not whole:
                    return self._finish(found, rotated, budget)
                lines = whole.removesuffix(b"\n").split(b"\n")
                self._chain.feed(lines, str(file), self._line)
                self._offset, self._line = self._offset + len(whole), self._line + len(lines)
                budget -= len(whole)
        return budget, False

    def _finish(self, found: os.stat_result, rotated: bool, budget: int) -> tuple[int, bool]:
        if rotated:
            self._done.append(Stamp(found.st_ino, found.st_size, found.st_ctime_ns))
            self._begin_file(None)
        return budget, True

    def _is_racy(self, now_ms: int, budget: int) -> bool:
        """Whether the file might be changed once more without a trace in its time of change."""
        found = _stamp(self._path)
        return found is not None and found.size <= budget and now_ms - found.ctime_ns // 1_000_000 < TICK_MS

    def _proof(self, head: Head, at_end: bool) -> Proof:
        chain, broken = self._chain, self._chain.broken
        if broken is None and at_end and chain.seq < head.seq:
            text = f"is where the log ends, but line {head.seq} was written: lines were cut off"
            broken = Place(str(self._path), max(1, self._line - 1), text)
        if broken is None and chain.seq == head.seq and chain.head.hash != head.hash:
            broken = Place(str(self._path), max(1, self._line - 1), "is not the line that was written here")
        return Proof(broken, broken is not None or chain.seq >= head.seq, chain.began_at, chain.seq, chain.cuts)


class AuditView:
    """What the handlers see of the audit log: its files, and how much of its chain is proved."""

    def __init__(self, audit: Audit, clock: Clock) -> None:
        self.path, self.alerts = audit.path, audit.path.with_name(ALERTS_NAME)
        self._audit, self._clock = audit, clock
        self._check = ChainCheck(audit.path)
        self._one_at_a_time = asyncio.Lock()

    @property
    def head(self) -> Head:
        """The last line written."""
        return self._audit.head

    @property
    def refuses(self) -> bool:
        """Whether changes are refused now because the log cannot be written."""
        return self._audit.refusal() is not None

    @property
    def trouble(self) -> str | None:
        """Why the log cannot be written, None if it can be."""
        return self._audit.file.trouble

    async def proof(self) -> Proof:
        """Read on, a bounded piece, and say what is proved by now."""
        async with self._one_at_a_time:
            self._audit.file.look()
            head, foreign = self._audit.head, self._audit.file.foreign
            return await asyncio.to_thread(self._check.advance, head, foreign, self._clock.now())


def _stamp(file: Path) -> Stamp | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return Stamp(found.st_ino, found.st_size, found.st_ctime_ns)


def _inode(file: Path) -> int | None:
    found = _stamp(file)
    return found.inode if found else None
