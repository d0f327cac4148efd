"""The ends of a hub's logs, fit to leave the machine: the last lines of each, of every line what may be told."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sheratan_hub.audit_lines import parsed
from sheratan_hub.redact import GONE, Redactor

LINES = 200
"""So many lines of each log are shown."""

TAIL_BYTES = 1 << 20
"""No more than this is read of a log."""

LINE_BYTES = 65_536
"""A longer line is not looked into."""

Record = dict[str, Any]


class Tail(NamedTuple):
    """The last lines, the newest last, without their newlines. `cut`: there were more than could be read."""

    lines: list[bytes]
    cut: bool = False


def tail(files: Sequence[Path], most: int = LINES, most_bytes: int = TAIL_BYTES) -> Tail:
    """The last lines of a log that goes through these files, oldest first. Raises `OSError`."""
    found: list[bytes] = []
    for file in reversed(files):
        lines, whole = _end_of(file, most_bytes)
        most_bytes -= sum(len(line) + 1 for line in lines)
        found = [*lines, *found]
        if len(found) >= most:
            return Tail(found[-most:])
        if not whole:
            return Tail(found, True)
    return Tail(found)


def _end_of(file: Path, most_bytes: int) -> tuple[list[bytes], bool]:
    """(whole lines at its end, whether that is all of it)"""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        opened.seek(max(0, size - most_bytes))
        lines = opened.read(most_bytes).split(b"\n")
    if size > most_bytes:
        del lines[0]
    return [line for line in lines if line], size <= most_bytes


Clean = Callable[[Record, Redactor], Record]


def cleaned(line: bytes, clean: Clean, redactor: Redactor) -> Record:
    """What of a line may be told; of one that is no JSON object only its length."""
    record = parsed(line) if len(line) <= LINE_BYTES else None
    return {"unreadable_bytes": len(line)} if record is None else clean(record, redactor)


HUBS_OWN = re.compile(r"[0-9a-f]{12}-[0-9a-f]{1,16}")
"""A request id that the hub has made; clients may send any other."""

HASH = re.compile(r"[0-9a-f]{64}")

PLAIN = ("ts", "level", "logger")


def log_line(record: Record, redactor: Redactor) -> Record:
    """A line of a plane's log: of an exception its type and where it came from, without the words of others."""
    told: Record = {name: redactor.name(str(record[name])) for name in PLAIN if name in record}
    told["event"] = redactor.text(str(record.get("event", "")))
    if HUBS_OWN.fullmatch(str(record.get("request_id", ""))):
        told["request_id"] = record["request_id"]
    if "exception" in record:
        told["exception"] = trace(str(record["exception"]), redactor)
    others = {name: value for name, value in record.items() if name not in {*PLAIN, "event", "request_id", "exception"}}
    return {**redactor.value(others), **told}


_FRAME = re.compile(r' +File "([^"]*)", line (\d+), in (\S+)')
_RAISED = re.compile(
    r"(?:  [|+] )?([A-Za-z_][\w.]*(?:Error|Exception|Down|Full|Refused|Conflict|Warning|Exit|Group|Need))(?::(.*))?$"
)
_OURS = re.compile(r"^(?:sqlite3\.\w+|sheratan_hub\.storage\.\w+|StoreDown|StoreRefused|StoreFull)$")
_SYSTEM = re.compile(
    r"^(?:OS|IO|FileNotFound|FileExists|Permission|Connection\w*|BrokenPipe|Timeout|BlockingIO|NotADirectory|IsADirectory)Error$"
)
FRAMES_MAX = 60


def trace(text: str, redactor: Redactor) -> list[str]:
    """A traceback as `file:line function`, then the exception; its words only if they are the system's or a store's."""
    told: list[str] = []
    for line in text.splitlines():
        if (frame := _FRAME.match(line)) is not None:
            told.append(f"{'/'.join(Path(frame[1]).parts[-3:])}:{frame[2]} {frame[3]}")
        elif (raised := _RAISED.match(line)) is not None:
            words = _OURS.match(raised[1]) or _SYSTEM.match(raised[1])
            told.append(f"{raised[1]}:{redactor.text(raised[2] or '')}" if words else raised[1])
    return [redactor.name(line) for line in told[-FRAMES_MAX:]]


def audit_line(record: Record, redactor: Redactor) -> Record:
    """A line of the audit log. Its text is changed, so it proves nothing any more: `chain` tells whether it did."""
    told: Record = {"seq": record.get("seq") if isinstance(record.get("seq"), int) else None}
    for name in ("ts", "event", "plane", "remote_addr", "node_id"):
        told[name] = None if record.get(name) is None else redactor.name(str(record[name]))
    for name in ("path", "reason"):
        told[name] = None if record.get(name) is None else redactor.text(str(record[name]))
    told["detail"] = redactor.value(record.get("detail"))
    if isinstance(record.get("count"), int):
        told["count"] = record["count"]
    told["hash"] = record["hash"] if HASH.fullmatch(str(record.get("hash"))) else GONE
    return told


def alert_line(record: Record, redactor: Redactor) -> Record:
    """A line of alerts.jsonl."""
    names = ("ts", "rule", "event", "reason", "origin", "count", "window_seconds", "remote_addr", "from_seq", "to_seq")
    return {
        **redactor.value({name: record.get(name) for name in names}),
        "text": redactor.text(str(record.get("text"))),
    }


def ledger_line(record: Record, redactor: Redactor) -> Record:
    """A line of the ledger's file, without what results name as their own."""
    names = ("seq", "ts", "actor", "event", "job_id", "zone", "meta")
    told: Record = redactor.value({name: record.get(name) for name in names})
    return told
