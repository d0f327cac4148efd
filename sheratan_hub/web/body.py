"""Reads a request's body: bounded, strictly JSON, decoded into the type that the route table names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import orjson
from aiohttp import hdrs
from aiohttp.web_request import BaseRequest

from sheratan_hub.rules.command import Code, Refused

T = TypeVar("T")

FREE = ("params", "result")
"""Members inside which repeated keys are allowed; the last one wins."""


async def read_body(request: BaseRequest, limit: int) -> bytes:
    """The whole body. Refused: `unsupported_media_type`, `body_too_large` (as soon as it is known)."""
    _refuse_foreign(request.headers)
    length = request.content_length
    if length is not None and length > limit:
        raise _too_large(limit)
    if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    chunks: list[bytes] = []
    size = 0
    while chunk := await request.content.readany():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
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


def check_json(body: bytes, depth: int) -> None:
    """Refuse what is not one strict JSON object.

    A text that comes back the same after reading and writing it has no repeated key, no NaN, no infinity, no
    lone surrogate, no number beyond 64 bit; compact JSON without such things does. Anything else is examined.
    """
    if body.count(b"{") + body.count(b"[") > depth:
        _refuse_deep(body, depth)
    try:
        doc = orjson.loads(body)
        same = isinstance(doc, dict) and orjson.dumps(doc) == body
    except (orjson.JSONDecodeError, TypeError):
        same = False
    if not same:
        _examine(body)


def _refuse_deep(body: bytes, depth: int) -> None:
    level = 0
    for mark in _MARK.findall(_STRING.sub(b"", body)):
        level += 1 if mark in b"{[" else -1
        if level > depth:
            raise Refused(Code.TOO_DEEP, f"the body is nested deeper than {depth} levels")


def _examine(body: bytes) -> None:
    try:
        doc = json.loads(
            body.decode(),
            object_pairs_hook=_Object,
            parse_constant=_refuse_number,
            parse_int=_int,
            parse_float=_float,
        )
        json.dumps(doc, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused(Code.BAD_JSON, f"the body is not valid JSON: {_said(error)}") from error
    if not isinstance(doc, _Object):
        raise Refused(Code.BAD_JSON, "the body must be a JSON object")
    _refuse_repeated(doc)


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


_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_MARK = re.compile(rb"[][{}]")
