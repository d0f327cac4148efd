"""The canonical JSON of the wire contract and its digests: what integrity and idempotency compare.

Keys sorted by code point, no whitespace, UTF-8 unescaped, numbers as Python's `json` writes them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from contextlib import suppress

import msgspec
import orjson

Raw = msgspec.Raw
NULL = Raw(b"null")

# orjson sorts keys by UTF-8 bytes, which is code point order, and writes strict JSON as Python's json does, but for
# floats that are very large or small. A float literal has a digit before its point or exponent; text without has none.
_FLOAT = re.compile(rb"[0-9][.eE]")

# A number that the two may write differently: with an exponent, sixteen digits and more, nought and four zeros, -0.
_ODD = re.compile(rb"(?:^|[\[:,])(?:-0|-?0\.0000|-?[0-9]{16}|-?[0-9]+(?:\.[0-9]+)?[eE])")


def canonical(raw: bytes) -> bytes:
    """The canonical form of a JSON text (of which repeated keys count by their last)."""
    with suppress(TypeError):  # nested deeper than orjson writes
        text = orjson.dumps(orjson.loads(raw), option=orjson.OPT_SORT_KEYS)
        if _FLOAT.search(raw) is None or _ODD.search(text) is None:
            return text
    return json.dumps(
        json.loads(raw), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def result_text(job_id: str, ok: bool, result: bytes, error: bytes) -> bytes:
    """The text that a result's integrity covers: exactly `{"error", "job_id", "ok", "result"}`, canonical.

    `result` and `error` are JSON texts; absent is `b"null"`.
    """
    return b'{"error":%b,"job_id":%b,"ok":%b,"result":%b}' % (
        canonical(error),
        orjson.dumps(job_id),
        b"true" if ok else b"false",
        canonical(result),
    )


def result_sha256(job_id: str, ok: bool, result: bytes, error: bytes) -> str:
    """SHA-256 of `result_text`, as hex digits."""
    return hashlib.sha256(result_text(job_id, ok, result, error)).hexdigest()


def result_sig(key: str, job_id: str, ok: bool, result: bytes, error: bytes) -> str:
    """HMAC-SHA256 of `result_text` under `key`, as hex digits."""
    return hmac.new(key.encode(), result_text(job_id, ok, result, error), hashlib.sha256).hexdigest()


def payload_sha256(kind: str, params: bytes) -> str:
    """SHA-256 of canonical `{"kind", "params"}`, as hex digits: what an idempotency key is bound to."""
    text = b'{"kind":%b,"params":%b}' % (orjson.dumps(kind), canonical(params))
    return hashlib.sha256(text).hexdigest()
