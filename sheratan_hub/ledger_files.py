"""The files beside `ledger.jsonl`: those that it was renamed to when it was full, and those of other ledgers.

A renamed one has the number of its first line in its name, so their names are in order, and the newest of them tells
where the ledger goes on when there is no current file yet. Ages are told by the lines' own times.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path

import msgspec

log = logging.getLogger("sheratan.ledger")

TAIL_BYTES = 4 << 20
"""So much is read at once to find the last whole line: an event may name an artifact path of a megabyte."""

HEAD_BYTES = 128
"""A line's number and time stand at its beginning."""

_HEAD = re.compile(rb'\{"seq":(\d+),"ts":"([^"]{1,40})"')
_NAME = re.compile(r"\.\d{12}\.jsonl\Z")


class Rotation(msgspec.Struct, frozen=True):
    """When a file is full, in bytes and by the hours between its first line and the next; 0: never.

    `keep_files` of the full ones are kept; 0: all.
    """

    max_bytes: int = 0
    max_hours: int = 0
    keep_files: int = 0

    def due(self, file: int, text: bytes) -> bool:
        """Whether the open file is too full, or too old, for this text. An empty one takes anything."""
        size = os.fstat(file).st_size
        if not size:
            return False
        if self.max_bytes and size + len(text) > self.max_bytes:
            return True
        first, next_one = _begins(os.pread(file, HEAD_BYTES, 0)), _begins(text[:HEAD_BYTES])
        if not self.max_hours or first is None or next_one is None:
            return False
        return next_one[1] - first[1] >= 3600 * self.max_hours

    def turn(self, path: Path, file: int) -> None:
        """Give the full file its own name and let the oldest go. It is synced first, as the next goes on from it."""
        first = _begins(os.pread(file, HEAD_BYTES, 0))
        target = path.with_name(f"{path.stem}.{first[0] if first else 0:012}.jsonl")
        os.fsync(file)
        if target.exists():
            _set_aside(target)
        os.rename(path, target)
        for old in full_ones(path)[: -self.keep_files] if self.keep_files else ():
            with suppress(FileNotFoundError):
                old.unlink()


NEVER = Rotation()


def full_ones(path: Path) -> list[Path]:
    """The renamed files, oldest first."""
    return sorted(one for one in path.parent.glob(f"{path.stem}.*.jsonl") if _NAME.search(one.name))


def last_line(file: int) -> tuple[int, bytes, int]:
    """The last whole line of an open file: its number (0: there is none), its text, and where it ends."""
    end = os.fstat(file).st_size
    while end:
        start = max(0, end - TAIL_BYTES)
        tail = os.pread(file, end - start, start)
        stop = len(tail)
        while stop:
            at = tail.rfind(b"\n", 0, stop - 1) + 1
            line = tail[at:stop]
            if seq := _seq_of(line):
                return seq, line, start + stop
            if at == 0 and start and stop < len(tail):
                break  # it may begin before this piece
            stop = at
        end = start + stop
    return 0, b"", 0


def last_of_full_ones(path: Path) -> tuple[int, bytes]:
    """The last whole line of the newest renamed file, and its number; 0 if there is none."""
    for newest in full_ones(path)[-1:]:
        file = os.open(newest, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return last_line(file)[:2]
        finally:
            os.close(file)
    return 0, b""


def has_lines(file: int) -> bool:
    """Whether an open file begins with a line at all."""
    return b"\n" in os.pread(file, TAIL_BYTES, 0)


def set_aside(path: Path, *, alone: bool = False) -> None:
    """They are another ledger's: the file and (unless `alone`) those that it was renamed to get names that end in
    `.old`, or `.old.2` and so on where there is such a one; nothing is overwritten."""
    for one in (*(() if alone else full_ones(path)), path):
        _set_aside(one)


def _set_aside(path: Path) -> None:
    names = (path.with_name(f"{path.name}.old{f'.{n}' if n > 1 else ''}") for n in count(1))
    aside = next(name for name in names if not name.exists())
    if path.stat().st_size:
        os.rename(path, aside)
        log.warning("%s is not the ledger of this store; it is kept as %s", path, aside)
    else:
        path.unlink()


def _begins(text: bytes) -> tuple[int, float] | None:
    """Number and time (seconds since 1970) of a line, by its beginning."""
    found = _HEAD.match(text)
    try:
        return (int(found[1]), datetime.fromisoformat(found[2].decode()).timestamp()) if found else None
    except ValueError:
        return None


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
