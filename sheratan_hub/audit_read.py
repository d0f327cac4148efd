"""Reads an audit log: a page after a line, the last lines, lines by what is in them; no more of a file than it must."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sheratan_hub.audit_lines import Identity, first_seq, identity, listed, parsed, seq_of, whole_lines
from sheratan_hub.clock import rfc3339

NEAR_BYTES = 65_536
"""A file is halved until so much of it is left, which is then read line by line."""

EXAMINE_LINES = 2000

Record = dict[str, Any]


class Filter(NamedTuple):
    """Which lines are wanted; None is any. `since` and `until` (excluded) are RFC 3339 in UTC with milliseconds."""

    event: str | None = None
    node_id: str | None = None
    reason: str | None = None
    since: str | None = None
    until: str | None = None

    def takes(self, record: Record) -> bool:
        """Whether the line is wanted."""
        ts = str(record.get("ts"))
        return (
            self.event in (None, record.get("event"))
            and self.node_id in (None, record.get("node_id"))
            and self.reason in (None, record.get("reason"))
            and (self.since is None or ts >= self.since)
            and (self.until is None or ts < self.until)
        )


ANY = Filter()


class Lines(NamedTuple):
    """A piece of the log. `next` is the number to go on after, None at the end of it."""

    records: list[Record]
    next: int | None
    last: int


def page(path: Path, after: int, limit: int, wanted: Filter = ANY, examine: int = EXAMINE_LINES) -> Lines:
    """At most `limit` lines with a number above `after`; at most `examine` are looked at."""
    records: list[Record] = []
    looked = last = 0
    for line in lines_after(path, after):
        if looked == examine or len(records) == limit:
            return Lines(records, last, last)
        record = parsed(line)
        if record is None or not isinstance(record.get("seq"), int):
            continue  # cut by a crash; verifying tells of it
        looked, last = looked + 1, record["seq"]
        if wanted.takes(record):
            records.append(record)
    return Lines(records, None, last or after)


def lines_after(path: Path, after: int) -> Iterator[bytes]:
    """The lines with a number above `after`, through all files, oldest first; none is passed over by a rotation."""
    current: Identity | bool = False
    while identity(path) != current:
        files, current = listed(path)
        last = after
        try:
            for lines in _chunks_after(files, after):
                if identity(path) != current:
                    break
                for line in lines:
                    if (seq := seq_of(line)) is None or seq > after:
                        last = max(last, seq or 0)
                        yield line
        except FileNotFoundError:  # the oldest was removed, as a rotation does
            current = False
        after = last


def _chunks_after(files: list[Path], after: int) -> Iterator[list[bytes]]:
    """Lines from not far before the first with a number above `after` on."""
    begins = [first_seq(file) for file in files] if after else []  # from the start on all are read, whatever they say
    begun = [place for place, seq in enumerate(begins) if seq is not None and seq <= after + 1]
    for place in range(begun[-1] if begun else 0, len(files)):
        offset = _offset_after(files[place], after) if begun and place == begun[-1] else 0
        yield from (lines for _, lines in whole_lines(files[place], offset, NEAR_BYTES))


def _offset_after(file: Path, after: int) -> int:
    """Where a line begins that is not far before the first with a number above `after`."""
    low, high = 0, file.stat().st_size
    with file.open("rb") as opened:
        while high - low > NEAR_BYTES:
            middle = (low + high) // 2
            opened.seek(middle)
            at = middle
            for line in opened.read(NEAR_BYTES).split(b"\n"):
                if at > middle and (seq := seq_of(line)) is not None:
                    break
                at += len(line) + 1
            else:
                return low
            if seq <= after:
                low = at
            else:
                high = middle
    return low


def newest(path: Path, count: int) -> list[Record]:
    """The last `count` lines, the newest last."""
    while True:
        files, current = listed(path)
        with suppress(FileNotFoundError):
            found = list(islice(_reversed_records(files), count))[::-1]
            if identity(path) == current:
                return found


def _reversed_records(files: list[Path]) -> Iterator[Record]:
    for file in reversed(files):
        for line in reversed_lines(file):
            if (record := parsed(line)) is not None:
                yield record


def reversed_lines(file: Path, chunk_bytes: int = NEAR_BYTES) -> Iterator[bytes]:
    """The file's lines, the last first; what has no newline yet is left out."""
    with file.open("rb") as opened:
        at = opened.seek(0, 2)
        rest: bytes | None = None
        while at > 0:
            begin = max(0, at - chunk_bytes)
            opened.seek(begin)
            pieces = (opened.read(at - begin) + (rest or b"")).split(b"\n")
            if rest is None:
                pieces.pop()
                pieces = pieces or [b""]
            rest, at = pieces[0], begin
            yield from reversed(pieces[1:])
        if rest:
            yield rest


def moment(text: str) -> str:
    """A time with a zone in the form that lines have. Raises `ValueError`."""
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError("it names no zone; end it with Z")
    return rfc3339(int(found.timestamp() * 1000))


def search(path: Path, wanted: Filter) -> Iterator[Record]:
    """Every line that is wanted, oldest first, through all files."""
    quick = f'"event":"{wanted.event}"'.encode() if wanted.event else b""
    for line in lines_after(path, 0):
        if quick in line and (record := parsed(line)) is not None and wanted.takes(record):
            yield record


def alerts_page(path: Path, offset: int, limit: int) -> tuple[list[Record], int | None, int]:
    """(alerts, where to go on or None at the end, where the last one ended) from this place in the file on."""
    records: list[Record] = []
    if not path.exists() or offset > path.stat().st_size:
        return [], None, 0
    at = offset
    for _, lines in whole_lines(path, offset, NEAR_BYTES):
        for line in lines:
            if len(records) == limit:
                return records, at, at
            at += len(line) + 1
            if (record := parsed(line)) is not None:
                records.append(record)
    return records, None, at


def newest_alerts(path: Path, count: int) -> tuple[list[Record], int]:
    """(the last alerts, the newest last, where they end)"""
    if not path.exists():
        return [], 0
    found: list[Record] = []
    for line in reversed_lines(path):
        if len(found) == count:
            break
        if (record := parsed(line)) is not None:
            found.append(record)
    return found[::-1], whole_bytes(path)


def whole_bytes(path: Path) -> int:
    """Where the file's last whole line ends."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        while end > 0:
            begin = max(0, end - NEAR_BYTES)
            file.seek(begin)
            if (at := file.read(end - begin).rfind(b"\n")) >= 0:
                return begin + at + 1
            end = begin
    return 0
