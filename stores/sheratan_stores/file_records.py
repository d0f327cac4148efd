"""The file store's records: how bytes are framed in a file, read back, and told apart when they are torn or damaged.

A record is a header, a payload and a newline. The header names the payload's length, the offset up to which the
file was known to be synced when the record was written, a CRC-32 of the payload and one of the header. The
payload's sum begins with the file's name and the record's place, so a record in another place is no record.

Files are filled with zeros before use and a header never begins with one, so what was never written is known as
such. Disks write whole sectors: a record that was being written when the power went has a sector of zeros inside
its bounds. No other record has (payloads with so many zeros are escaped), hence a bad record without one is damage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from mmap import mmap
from typing import NamedTuple
from zlib import crc32

HEADER_BYTES = 37
FRAME_BYTES = HEADER_BYTES + 1
"""What a record takes beside its payload."""

HEADERS = re.compile(rb"[pe][0-9a-f]{8}:[0-9a-f]{8}:[0-9a-f]{8}:[0-9a-f]{8}:")
SECTOR = 512
"""What a disk writes whole: the smallest there is."""

ZEROS = bytes(SECTOR)
PLAIN, ESCAPED = b"pe"
ESCAPES = ((b"\x01", b"\x01a"), (b"\x00", b"\x01c"))
"""Sorted so that the escape itself goes first, and comes back last. No code has a byte of another's first."""


Bytes = bytes | mmap
"""A file's content."""


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


def bounds(data: Bytes, at: int) -> int | None:
    """Where the record at `at` ends by its header, None if there is no whole header."""
    head = data[at : at + HEADER_BYTES]
    if not HEADERS.fullmatch(head) or crc32(head[:28]) != int(head[28:36], 16):
        return None
    return at + FRAME_BYTES + int(head[1:9], 16)


def read(data: Bytes, file: str, at: int) -> Record | None:
    """The record at `at`, None if there is none that is whole."""
    end = bounds(data, at)
    if end is None or end > len(data) or data[end - 1 : end] != b"\n":
        return None
    payload = data[at + HEADER_BYTES : end - 1]
    if data[at] == ESCAPED:
        for plain, code in reversed(ESCAPES):
            payload = payload.replace(code, plain)
    if checksum(payload, file, at) != int(data[at + 19 : at + 27], 16):
        return None
    return Record(payload, at, end, int(data[at + 10 : at + 18], 16))


def read_all(data: Bytes, file: str, at: int = 0) -> Iterator[Record]:
    """The records from `at` to the first place where there is none."""
    while (record := read(data, file, at)) is not None:
        yield record
        at = record.end


def is_torn(data: Bytes, file: str, at: int, size: int) -> bool:
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
    end = bounds(data, at) or at + HEADER_BYTES
    return data[at] == 0 or (end <= len(data) and has_gap(data, at, end))


def has_gap(data: Bytes, at: int, end: int) -> bool:
    """Whether a sector's part of these bytes is all zeros."""
    sectors = range(at - at % SECTOR, end, SECTOR)
    return any(not data[max(at, start) : min(start + SECTOR, end)].strip(b"\0") for start in sectors)
