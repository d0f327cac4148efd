"""Reads a request's body: bounded, strictly JSON, decoded into the type that the route table names."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import orjson
from aiohttp import HttpVersion11, hdrs

from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.web.request import Request

T = TypeVar("T")

FREE = ("params", "result")
"""Members inside which repeated keys are allowed; the last one wins."""


BODY_SECONDS = 10.0
"""How long a body may take to arrive, unless the settings say otherwise."""

BODY_RATE = 16_384
"""Each so many bytes that have come give it another second."""


class BrokenBody(Exception):
    """The rest of a body cannot be read: what came is no valid transfer encoding."""


async def read_body(request: Request, limit: int, seconds: float = BODY_SECONDS) -> bytes:
    """The whole body. Refused: `unsupported_media_type`, `body_too_large` (as soon as it is known)."""
    _refuse_foreign(request.headers)
    length = request.content_length
    if length is None and request.headers.get(hdrs.TRANSFER_ENCODING, "chunked").lower() != "chunked":
        raise Refused(Code.UNSUPPORTED_MEDIA_TYPE, "of transfer encodings only chunked is taken")
    if length is not None and length > limit:
        raise _too_large(limit)
    expects = request.headers.get(hdrs.EXPECT, "").lower() == "100-continue" and request.version >= HttpVersion11
    if expects and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if request.content.is_eof():
        body = await request.content.readany()
        if len(body) > limit:
            raise _too_large(limit)
        return body
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds) as late:
            end = late.when() or 0.0
            while chunk := await request.content.readany():
                size += len(chunk)
                late.reschedule(end + size / BODY_RATE)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
    except BrokenBody as broken:
        raise Refused(Code.BAD_REQUEST, "the body's transfer encoding is broken") from broken
    except TimeoutError as slow:
        raise Refused(Code.BAD_REQUEST, f"the body did not arrive within {seconds:g} seconds") from slow
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _refuse_foreign(headers: Mapping[str, str]) -> None:
    encoding = headers.get(hdrs.CONTENT_ENCODING)
    if encoding is not None and encoding.lower() != "identity":
        raise Refused(Code.UNSUPPORTED_MEDIA_TYPE, "a body with a Content-Encoding is not taken; send it plain")
    charset = headers.get(hdrs.CONTENT_TYPE, "").lower().partition("charset=")[2]
    if charset and charset.partition(";")[0].strip(" \"'") not in ("utf-8", "utf8", "us-ascii"):
        raise Refused(Code.UNSUPPORTED_MEDIA_TYPE, "the body must be UTF-8")


def _too_large(limit: int) -> Refused:
    return Refused(Code.BODY_TOO_LARGE, f"the body is larger than {limit} bytes")


def decode(text: bytes, kind: type[T]) -> T:
    """JSON that was checked already, as `kind`. Refused with `invalid_field` and the field's path."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise Refused(Code.INVALID_FIELD, str(error)) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(Code.BAD_JSON, "the body is not valid JSON") from error


def refuse_long(entries: Any, most: int) -> None:
    """Refused with `batch_too_large` when a list has more entries than one request may have."""
    if isinstance(entries, list) and len(entries) > most:
        raise Refused(Code.BATCH_TOO_LARGE, f"a batch may have {most} entries, not {len(entries)}")


def check_json(body: bytes, depth: int) -> dict[str, Any]:
    """The body, read; refused if it is not one strict JSON object.

    A text that comes back the same after reading and writing it has no repeated key, no NaN, no infinity, no
    lone surrogate, no number beyond 64 bit. Compact JSON does, and so does what Python's `json.dumps` writes;
    anything else is examined.
    """
    try:
        doc = orjson.loads(body)
        same = isinstance(doc, dict) and (orjson.dumps(doc) == body or json.dumps(doc).encode() == body)
    except (orjson.JSONDecodeError, TypeError, RecursionError):
        same = False
    if not same:
        doc = _examine(body)
    if body.count(b"{") + body.count(b"[") > depth:
        _refuse_deep(body, depth)
    found: dict[str, Any] = doc
    return found


def _refuse_deep(body: bytes, depth: int) -> None:
    """Take away the innermost brackets `depth` times: what is left was deeper. The body is valid JSON."""
    brackets = _STRING.sub(b"", body).translate(_SQUARE, delete=_NO_BRACKETS)
    for _ in range(depth):
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return
    raise _too_deep()


def _too_deep() -> Refused:
    return Refused(Code.TOO_DEEP, "the body is nested too deep")


def _examine(body: bytes) -> dict[str, Any]:
    try:
        doc = json.loads(
            body.decode(),
            object_pairs_hook=_Object,
            parse_constant=_refuse_number,
            parse_int=_int,
            parse_float=_float,
        )
        json.dumps(doc, ensure_ascii=False).encode()
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise Refused(Code.BAD_JSON, f"the body is not valid JSON: {_said(error)}") from error
    if not isinstance(doc, _Object):
        raise Refused(Code.BAD_JSON, "the body must be a JSON object")
    _refuse_repeated(doc)
    return doc


class _Object(dict[str, Any]):
    """A JSON object that remembers whether a key was repeated."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = len(self) != len(pairs)


def _refuse_repeated(node: Any) -> None:
    if isinstance(node, _Object):
        if node.repeated:
            raise Refused(Code.BAD_JSON, "the body repeats a key")
        for name, value in node.items():
            if name not in FREE:
                _refuse_repeated(value)
    elif isinstance(node, list):
        for value in node:
            _refuse_repeated(value)


def _said(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "it is not UTF-8, or holds a lone surrogate"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:200]


def _int(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError("an integer has more than 64 bits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _refuse_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
