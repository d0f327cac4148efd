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
from sheratan_hub.storage import LedgerLine, Store

log = logging.getLogger("sheratan.ledger")

PIECE = 2000
"""Events that are read and written at once."""

TAIL_BYTES = 4 << 20
"""Where the last whole line is looked for: an event may name an artifact path of a megabyte."""


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
    is the only one to write it. A file whose last line the store does not know belongs to another ledger: it is set
    aside as `ledger.jsonl.old`.
    """

    def __init__(self, path: Path, store: Store) -> None:
        self.path, self._store = path, store
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = self._open()
        self.seq = 0
        self._behind, self._checked = True, False

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _cut(self) -> tuple[int, bytes]:
        """The last whole line with its number; what a crash left behind it is cut off."""
        end = os.fstat(self._file).st_size
        tail = os.pread(self._file, TAIL_BYTES, max(0, end - TAIL_BYTES))
        cut = end - len(tail)
        while tail:
            start = tail.rfind(b"\n", 0, len(tail) - 1) + 1
            line = tail[start:]
            seq = _seq_of(line)
            if seq:
                cut += len(tail)
                break
            tail = tail[:start]
        else:
            seq, line = 0, b""
        os.ftruncate(self._file, cut)
        return seq, line

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
            aside = self.path.with_name(f"{self.path.name}.old")
            log.warning("%s is not the ledger of this store; it is kept as %s", self.path, aside)
            os.replace(self.path, aside)
            os.close(self._file)
            self._file, self.seq = self._open(), 0
        self._checked = True

    def _write(self, lines: list[LedgerLine]) -> None:
        """In a thread. A piece that does not get through whole is cut off again."""
        if not self._there():
            os.close(self._file)
            self._file = self._open()
        before = os.fstat(self._file).st_size
        text = _text(lines)
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


def _seq_of(line: bytes) -> int:
    """The number of a whole line, 0 if it is none."""
    if not line.endswith(b"}\n"):
        return 0
    try:
        return msgspec.json.decode(line, type=_Numbered).seq
    except msgspec.DecodeError:
        return 0


class _Numbered(msgspec.Struct):
    seq: int


@lru_cache(64)
def _moment(ms: int) -> str:
    return rfc3339(ms)


_encoder = msgspec.json.Encoder()
_decode = msgspec.json.Decoder(_Stored).decode
