"""Reads query strings: lists by cursor, and waits."""

from __future__ import annotations

from aiohttp.web_request import BaseRequest

from sheratan_hub.rules.command import Code, Refused

PAGE_DEFAULT = 100
PAGE_MAX = 1000


def number(request: BaseRequest, name: str, default: float, least: float, most: float) -> float:
    """A number from the query. Refused with `invalid_field` when it is none or out of range."""
    text = request.query.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise Refused(Code.INVALID_FIELD, f"{name} must be a number from {least:g} to {most:g}")
    return value


def page_limit(request: BaseRequest) -> int:
    """`limit`: how many entries a page may have."""
    return int(number(request, "limit", PAGE_DEFAULT, 1, PAGE_MAX))


def cursor(request: BaseRequest) -> str | None:
    """`cursor`: the `next_cursor` of the page before."""
    return request.query.get("cursor") or None


def word(request: BaseRequest, name: str) -> str | None:
    """A filter from the query; an empty one is none."""
    return request.query.get(name) or None
