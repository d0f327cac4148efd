"""What is kept of a worker's error: cut by rule, and marked with `"truncated": true` when it was.

A type has 100 characters, a message 1000, a trace 50 lines (its last ones, where Python says what happened).
"""

from __future__ import annotations

from typing import Any

import msgspec

from sheratan_hub.canonical import Raw

TYPE_CHARS = 100
MESSAGE_CHARS = 1000
TRACE_LINES = 50
LINE_CHARS = 400
ERROR_BYTES = 32_768
"""An error may have any shape, but is never kept larger than this."""

TRACES = ("trace", "traceback")


def kept_error(error: bytes) -> Raw:
    """The JSON text `error` as it is kept: itself when nothing has to be cut, else an object that says so."""
    if len(error) <= TYPE_CHARS:
        return Raw(error)
    try:
        told = _fields(error)
    except msgspec.DecodeError:
        return _without_fields(error)
    for lines in (TRACE_LINES, TRACE_LINES // 5, 0):
        cut = _cut(told, lines)
        if not cut and len(error) <= ERROR_BYTES:
            return Raw(error)
        text = _encode({**told, **cut, "truncated": True})
        if len(text) <= ERROR_BYTES:
            return Raw(text)
    known = {name: told[name] for name in ("type", "message") if isinstance(_text(told.get(name)), str)}
    return Raw(_encode({**known, **_cut(known, 0), "truncated": True}))


def without_trace(error: Raw) -> Raw:
    """The error without its trace, for a record that is to stay small."""
    try:
        told = _fields(bytes(error))
    except msgspec.DecodeError:
        return error
    if not any(name in told for name in TRACES):
        return error
    return Raw(_encode({**{name: value for name, value in told.items() if name not in TRACES}, "truncated": True}))


def _cut(told: dict[str, Raw], lines: int) -> dict[str, Any]:
    """The members that have to be cut, as they are after it."""
    cut: dict[str, Any] = {}
    for name, most in (("type", TYPE_CHARS), ("message", MESSAGE_CHARS)):
        text = _text(told.get(name))
        if isinstance(text, str) and len(text) > most:
            cut[name] = text[:most]
    for name in TRACES:
        trace = _text(told.get(name))
        if isinstance(trace, str):
            kept = "\n".join(line[:LINE_CHARS] for line in trace.splitlines()[-lines:]) if lines else ""
            if len(kept) < len(trace.rstrip("\n")):
                cut[name] = kept
        elif isinstance(trace, list) and len(trace) > lines:
            cut[name] = trace[-lines:] if lines else []
    return cut


def _without_fields(error: bytes) -> Raw:
    """An error that is no object: a text of at most 1000 characters, or what else is not too large."""
    told = _text(error)
    if len(told) <= MESSAGE_CHARS if isinstance(told, str) else len(error) <= ERROR_BYTES:
        return Raw(error)
    text = told if isinstance(told, str) else error.decode(errors="ignore")
    return Raw(_encode({"message": text[:MESSAGE_CHARS], "truncated": True}))


def _text(raw: bytes | None) -> Any:
    """The value of a JSON text; None for what is absent or cannot be read."""
    try:
        return None if raw is None else msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return None


_fields = msgspec.json.Decoder(dict[str, Raw]).decode
_encode = msgspec.json.Encoder().encode
