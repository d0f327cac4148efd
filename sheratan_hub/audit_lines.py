"""The audit log as text: how a line is sealed into the chain, what is a whole one, which files make up a log.

A line's `hash` is the SHA-256 of its own text without the `hash` member; `prev_hash` is the line before's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

FILE_NAME = "hub_security_audit.jsonl"
ALERTS_NAME = "alerts.jsonl"

START_HASH = "0" * 64
"""`prev_hash` of the first line."""

END_BYTES = 75
"""What a line ends with: `,"hash":"`, 64 hex digits, `"}`."""

CUT = b'"detail":{"cut":{'
"""Stands in a line that accounts for a cut one before it; text from outside cannot hold it unescaped."""

EVENTS = frozenset(
    [
        "AUTH_FAILURE",
        "PORT_MISMATCH",
        "BACKPRESSURE_DROP",
        "INFLIGHT_SATURATED",
        "LEASE_REAP",
        "DLQ_ENQUEUE",
        "DLQ_REDRIVE",
        "IDEMPOTENCY_HIT",
        "IDEMPOTENCY_KEY_COLLISION",
        "RESULT_INTEGRITY_FAIL",
        "RESULT_SUPERSEDED",
        "TOKEN_ACCEPTED_NEXT",
        "TOKEN_ACCEPTED_OLD",
        "TOKEN_RETIRED",
        "TOKEN_ROTATION_STARTED",
        "TOKEN_ROTATION_FINALIZED",
        "ATTESTATION_FIRST_SEEN",
        "ATTESTATION_DRIFT",
        "ATTESTATION_SPOOF_SUSPECT",
        "ATTESTATION_ACCEPTED",
        "ACCESS_CREATED",
        "ACCESS_REVOKED",
        "NODE_ONLINE",
        "NODE_STALE",
        "NODE_DEAD",
        "NODE_DRAIN",
        "NODE_RESUME",
        "NODE_FORGOTTEN",
        "FLEET_SILENT",
        "POLICY_CREATED",
        "POLICY_ACTIVATED",
        "POLICY_DENY",
        "RATE_LIMITED",
        "ADMIN_ACTION",
        "HUB_START",
        "HUB_STOP",
    ]
)
"""Every event of the wire contract; alert rules may name these."""


class Head(NamedTuple):
    """The end of a chain: what a copy kept elsewhere proves the rest by."""

    seq: int
    hash: str
    ts: str | None = None


NO_LINES = Head(0, START_HASH)


def sealed(record: Mapping[str, Any], prev_hash: str) -> tuple[bytes, str]:
    """The line of `record` with its newline, in ASCII, and its hash. `record` begins with `seq`."""
    whole = {**record, "prev_hash": prev_hash}
    text = orjson.dumps(whole, default=str)
    if not text.isascii():
        text = json.dumps(whole, separators=(",", ":"), default=str).encode()
    digest = hashlib.sha256(text).hexdigest()
    return b'%b,"hash":"%b"}\n' % (text[:-1], digest.encode()), digest


def head_of(line: bytes) -> Head | None:
    """The end of the chain if `line` is its last: None unless its text matches its hash."""
    text = line.removesuffix(b"\n")
    digest = hashlib.sha256(text[:-END_BYTES] + b"}").hexdigest()
    if not text.endswith(b',"hash":"%b"}' % digest.encode()):
        return None
    record = parsed(text)
    if record is None or not isinstance(record.get("seq"), int):
        return None
    return Head(record["seq"], digest, str(record.get("ts")))


def parsed(line: bytes) -> dict[str, Any] | None:
    """The line's fields, None if it is no JSON object."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def seq_of(line: bytes) -> int | None:
    """A line's number by its first bytes, None if it does not begin as a line does."""
    found = _SEQ.match(line)
    return int(found[1]) if found else None


_SEQ = re.compile(rb'\{"seq":(\d{1,18}),')


def is_cut(text: bytes, seq: int) -> bool:
    """Whether `text` can be what a crash has left of line `seq`: its beginning, then perhaps zeros, never its end."""
    begun = text.rstrip(b"\0")
    start = b'{"seq":%d,' % seq
    return start.startswith(begun[: len(start)]) and not begun.endswith(b'"}') and b"\0" not in begun


def cut_detail(text: bytes) -> dict[str, Any]:
    """What the next line says of a cut one: its length and the SHA-256 of what is left of it."""
    return {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}


Identity = tuple[int, int] | None
"""Device and inode of a file, None if there is none: another one under the same name means a rotation."""


class Listing(NamedTuple):
    """The files of a log that exist, oldest first: the rotated ones by the number in their names, then `path`.

    `current` is which file had the log's own name: once another one has it, what is opened by that name is newer than
    the rest of the list.
    """

    files: list[Path]
    current: Identity


def chain_files(path: Path) -> list[Path]:
    """The files of a log, oldest first."""
    return listed(path).files


def listed(path: Path) -> Listing:
    """The files of a log as they were at one moment, even if it is rotated meanwhile."""
    while True:
        current = identity(path)
        rotated = [(number, one) for one in path.parent.glob(f"{path.stem}.*") if (number := number_of(one, path))]
        files = [found for _, found in sorted(rotated) if found.is_file()] + ([path] if path.is_file() else [])
        if identity(path) == current:
            return Listing(files, current)


def identity(file: Path | int) -> Identity:
    """Which file has this name, or is open as this descriptor."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def number_of(found: Path, path: Path) -> int:
    """The number of the first line of a rotated file, by its name; 0 if it is none of `path`'s."""
    match = re.fullmatch(rf"{re.escape(path.stem)}\.(\d{{1,18}}){re.escape(path.suffix)}", found.name)
    return int(match[1]) if match else 0


def rotated_name(path: Path, first_seq: int) -> Path:
    """Where the file that begins with this line is moved when the next one is begun."""
    return path.with_name(f"{path.stem}.{first_seq:012d}{path.suffix}")


def first_seq(path: Path) -> int | None:
    """The number of the file's first line that has one; None if there is none in its first 64 KiB."""
    with path.open("rb") as file:
        lines = file.read(65_536).split(b"\n")
    return next((seq for line in lines if (seq := seq_of(line)) is not None), None)


def whole_lines(path: Path, offset: int = 0, chunk_bytes: int = 1 << 20) -> Iterator[tuple[int, list[bytes]]]:
    """(where they end, the lines without their newlines) chunk by chunk; what has no newline yet is left out."""
    with path.open("rb") as file:
        file.seek(offset)
        rest = b""
        while chunk := file.read(chunk_bytes):
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            if lines:
                offset += sum(map(len, lines)) + len(lines)
                yield offset, lines
