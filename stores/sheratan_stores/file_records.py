"""The file store's records: how bytes are framed in a file, read back, and told apart when they are torn or damaged.

A record is a header, a payload and a newline. The header names the payload's length, the offset up to which the
file was known to be synced when the record was written, a CRC-32 of the payload and one of the header. The
payload's sum begins with the file's name and the record's place, so a record in another place is no record.

Files are filled with zeros before use, so what was never written is known as such. Disks write whole sectors: of a
record that was being written when the power went, a sector that holds a part of it is zeros from there to its end.
No whole record looks like that, and none comes near it (payloads with many zeros are escaped), hence a bad record
without such a sector is damage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol
from zlib import crc32

HEADER_BYTES = 37
FRAME_BYTES = HEADER_BYTES + 1
"""What a record takes beside its payload."""

HEADERS = re.compile(rb"[pe][0-9a-f]{8}:[0-9a-f]{8}:[0-9a-f]{8}:[0-9a-f]{8}:")
SECTOR = 512
"""What a disk writes whole: the smallest there is."""

ZEROS = bytes(64)
"""A payload with so many zeros in a row is escaped: no sector of it is a few flipped bits away from being empty."""

PLAIN, ESCAPED = b"pe"
ESCAPES = ((b"\x01", b"\x01a"), (b"\x00", b"\x01c"))
"""Sorted so that the escape itself goes first, and comes back last. No code has a byte of another's first."""


class Bytes(Protocol):
    """A file's content, in memory or on disk."""

    def __len__(self) -> int:
        """How much there is."""
        ...

    def __getitem__(self, part: slice, /) -> bytes:
        """Some of it."""
        ...


class Record(NamedTuple):
    """A whole record: its payload, where it begins and ends, and what it says was synced before it."""

    payload: bytes
    at: int
    end: int
    synced: int


def frame(payload: bytes, file: str, at: int, synced: int) -> bytes:
    """The record of this payload for offset `at` of the file of that name."""
    form, total = PLAIN, checksum(payload, file, at)
    if ZEROS in payload:
        form = ESCAPED
        for plain, code in ESCAPES:
            payload = payload.replace(plain, code)
    head = b"%c%08x:%08x:%08x:" % (form, len(payload), synced, total)
    return b"%b%08x:%b\n" % (head, crc32(head), payload)


def checksum(payload: bytes, file: str, at: int) -> int:
    """The CRC-32 of a payload at its place."""
    return crc32(payload, crc32(f"{file}@{at}".encode()))


def end_of(head: bytes, at: int) -> int | None:
    """Where the record that has this header at `at` ends, None if it is no whole header."""
    if not HEADERS.fullmatch(head) or crc32(head[:28]) != int(head[28:36], 16):
        return None
    return at + FRAME_BYTES + int(head[1:9], 16)


def read(data: Bytes, file: str, at: int) -> Record | None:
    """The record at `at`, None if there is none that is whole."""
    head = data[at : at + HEADER_BYTES]
    end = end_of(head, at)
    if end is None or end > len(data):
        return None
    payload = data[at + HEADER_BYTES : end]
    if payload[-1:] != b"\n":
        return None
    payload = payload[:-1]
    if head[0] == ESCAPED:
        for plain, code in reversed(ESCAPES):
            payload = payload.replace(code, plain)
    if checksum(payload, file, at) != int(head[19:27], 16):
        return None
    return Record(payload, at, end, int(head[10:18], 16))


def read_all(data: Bytes, file: str, at: int = 0) -> Iterator[Record]:
    """The records from `at` to the first place where there is none."""
    while (record := read(data, file, at)) is not None:
        yield record
        at = record.end


def is_torn(data: bytes, file: str, at: int, size: int) -> bool:
    """Whether what stands at `at`, where no whole record is, can be the last write before a crash, never confirmed.

    It is if nothing was written there, or not all of it, and no later record knows it as synced. `size` is what
    the file was made with: one that is shorter was cut by somebody, and its end tells nothing unless it is a zero.
    """
    if at >= len(data):
        return len(data) >= size
    if not data[at:].strip(b"\0"):
        return True
    later = (read(data, file, match.start()) for match in HEADERS.finditer(data, at + 1))
    if any(record is not None and record.synced > at for record in later):
        return False
    end = end_of(data[at : at + HEADER_BYTES], at) or at + HEADER_BYTES
    return end <= len(data) and has_gap(data, at, end)


def has_gap(data: bytes, at: int, end: int) -> bool:
    """Whether a sector that holds a part of these bytes is all zeros from there on: it was never written."""
    sectors = range(at - at % SECTOR, end, SECTOR)
    return any(not data[max(at, start) : start + SECTOR].strip(b"\0") for start in sectors)
