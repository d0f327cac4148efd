"""The ledger as people and programs read it: one flat object an event, and `ledger.jsonl`, which follows the store.

The file follows behind the commit and is never synced by itself: what a crash takes from its end is written again
from the store. It is written in a thread, a bounded piece at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import msgspec

from sheratan_hub.clock import rfc3339
from sheratan_hub.items import Committed
from sheratan_hub.ledger_files import NEVER, Rotation, has_lines, last_line, last_of_full_ones, set_aside
from sheratan_hub.storage import LedgerLine, Store

log = logging.getLogger("sheratan.ledger")

PIECE = 2000
"""Events that are read and written at once."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One event as it is told: all of its fields, the time in RFC 3339."""

    seq: int
    ts: str
    actor: str
    event: str
    job_id: str | None
    trace_id: str | None
    zone: str | None
    artifact_path: str | None
    meta: msgspec.Raw


class _Stored(msgspec.Struct, frozen=True, gc=False):
    """An `Event` as a store holds it; what is in `meta` is only handed on."""

    ts: int
    event: str
    actor: str
    job_id: str | None = None
    trace_id: str | None = None
    zone: str | None = None
    artifact_path: str | None = None
    meta: msgspec.Raw = msgspec.Raw(b"{}")


def entries(lines: Iterable[LedgerLine]) -> list[Entry]:
    """The events that these lines of a store hold."""
    found = ((line.seq, _decode(line.line)) for line in lines)
    return [
        Entry(seq, _moment(e.ts), e.actor, e.event, e.job_id, e.trace_id, e.zone, e.artifact_path, e.meta)
        for seq, e in found
    ]


class LedgerFile:
    """Appends to `path` what the store's ledger has beyond its last line.

    Raises `OSError` when it cannot be opened. Nothing in it is touched before the store is open and so this process
    is the only one to write it. A file whose last line the store does not know belongs to another ledger, one without
    a line of a ledger to something else: it is set aside as `ledger.jsonl.old`. When it is full by `rotation` it is
    renamed and a new one begun.
    """

    def __init__(self, path: Path, store: Store, rotation: Rotation = NEVER) -> None:
        self.path, self._store, self._rotation = path, store, rotation
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = self._open()
        self.seq = 0
        self._behind, self._checked = True, False

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _reopen(self) -> None:
        """The file that the path leads to now."""
        before, self._file = self._file, self._open()
        os.close(before)

    def _cut(self) -> tuple[int, bytes]:
        """The last whole line with its number, what a crash left behind it is cut off; if the file has none, that of
        the newest one that was full."""
        seq, line, end = last_line(self._file)
        if not seq and has_lines(self._file):
            set_aside(self.path, alone=True)
            self._reopen()
        else:
            os.ftruncate(self._file, end)
        return (seq, line) if seq else last_of_full_ones(self.path)

    def committed(self, committed: Committed) -> None:
        """The observer: there is something to follow."""
        if committed.changes.ledger:
            self._behind = True

    async def follow(self) -> int | None:
        """Write what the store has more. Nothing is read while nothing was committed."""
        if not self._checked:
            await self._check()
        while self._behind:
            self._behind = False  # what is committed from here on sets it again
            try:
                lines = await self._store.events(self.seq, PIECE)
                if lines:
                    await asyncio.to_thread(self._write, lines)
            except BaseException:
                self._behind = True
                raise
            self._behind = self._behind or bool(lines)
        return None

    async def _check(self) -> None:
        """Find the end of the file; whether its last line is one of this store's."""
        self.seq, last = self._cut()
        found = await self._store.events(self.seq - 1, 1) if self.seq else []
        known = not self.seq or (bool(found) and (found[0].seq > self.seq or _text(found) == last))
        if not known:
            set_aside(self.path)
            self._reopen()
            self.seq = 0
        self._checked = True

    def _write(self, lines: list[LedgerLine]) -> None:
        """In a thread. A piece that does not get through whole is cut off again."""
        if not self._there():
            self._reopen()
        text = _text(lines)
        if self._rotation.due(self._file, text):
            self._rotation.turn(self.path, self._file)
            self._reopen()
        before = os.fstat(self._file).st_size
        if os.write(self._file, text) != len(text):
            os.ftruncate(self._file, before)
            raise OSError(f"{self.path} cannot be written whole")
        self.seq = lines[-1].seq

    def _there(self) -> bool:
        """Whether the path still leads to the open file: it may have been moved away."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except OSError:
            return False

    def close(self) -> None:
        """Let go of it. Safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _text(lines: list[LedgerLine]) -> bytes:
    return _encoder.encode_lines(entries(lines))


@lru_cache(64)
def _moment(ms: int) -> str:
    return rfc3339(ms)


_encoder = msgspec.json.Encoder()
_decode = msgspec.json.Decoder(_Stored).decode
