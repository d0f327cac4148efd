"""Reads query strings: lists by cursor, and waits."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from msgspec import Meta, Struct

from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.web.request import Request

_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,40})?([eE][-+]?[0-9]{1,3})?")
_WHOLE = re.compile(r"-?[0-9]{1,18}")

PAGE_DEFAULT = 100
PAGE_MAX = 1000

Limit = Annotated[int, Meta(ge=1, le=PAGE_MAX, description="how many entries a page may have")]
Cursor = Annotated[str, Meta(description="the `next_cursor` of the page before")]
Number = Annotated[str, Meta(pattern="^[0-9]{0,18}$")]
Last = Annotated[int, Meta(ge=1, le=PAGE_MAX, description="the last so many, in the place of `cursor` and `limit`")]


class PageQuery(Struct, frozen=True):
    """A page of a list."""

    limit: Limit = PAGE_DEFAULT
    cursor: Cursor = ""


class JobsQuery(PageQuery, frozen=True):
    """Which jobs; what is not given does not matter."""

    status: Literal["pending", "running", "completed", "failed", "cancelled", "quarantined", "throttled", ""] = ""
    kind: str = ""
    source: str = ""
    mission_id: str = ""
    node_id: str = ""


class DeadQuery(PageQuery, frozen=True):
    """Which dead letters, in which order; what is not given does not matter."""

    kind: str = ""
    source: str = ""
    mission_id: str = ""
    node_id: str = ""
    reason: str = ""
    order: Literal["newest", "oldest", ""] = "newest"


class WaitQuery(Struct, frozen=True):
    """How long to wait for the end."""

    wait_seconds: Annotated[float, Meta(ge=0, le=30, description="wait so long for its end")] = 0


class MaxQuery(Struct, frozen=True):
    """For how many jobs."""

    max: Annotated[int, Meta(ge=1, le=100, description="how many jobs at most")] = 1


class PullQuery(MaxQuery, frozen=True):
    """Who asks, for how many jobs."""

    node_id: Annotated[str, Meta(examples=["press-7"], description="who asks")] = ""
    host_id: Annotated[str, Meta(description="another name of `node_id`")] = ""


class LedgerQuery(Struct, frozen=True):
    """Events after a number, those of one job if it is named."""

    after: Number = ""
    cursor: Number = ""
    limit: Limit = PAGE_DEFAULT
    job_id: str = ""


class AlertsQuery(Struct, frozen=True):
    """A page of alerts, or the last ones."""

    limit: Limit = PAGE_DEFAULT
    cursor: Number = ""
    last: Last | None = None


class AuditQuery(AlertsQuery, frozen=True):
    """Lines of the audit log; what is not given does not matter."""

    event: str = ""
    node_id: str = ""
    reason: str = ""
    since: Annotated[str, Meta(description="RFC 3339 with a zone")] = ""
    until: Annotated[str, Meta(description="RFC 3339 with a zone")] = ""


class ReadyQuery(Struct, frozen=True):
    """Whether to tell each check."""

    verbose: Annotated[str, Meta(description="given, even empty: each check is told")] = ""


class MetricsQuery(Struct, frozen=True):
    """In which form."""

    format: Annotated[str, Meta(description="`json`: the fleet's keys")] = ""


def number(request: Request, name: str, default: float, least: float, most: float) -> float:
    """A number from the query. Refused with `invalid_field` when it is none or out of range."""
    text = request.query.get(name)
    if text is None:
        return default
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not least <= value <= most:
        raise Refused(Code.INVALID_FIELD, f"{name} must be a number from {least:g} to {most:g}")
    return value


def whole(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A whole number from the query. Refused with `invalid_field` when it is none or out of range."""
    text = request.query.get(name)
    if text is None:
        return default
    if not _WHOLE.fullmatch(text) or not least <= int(text) <= most:
        raise Refused(Code.INVALID_FIELD, f"{name} must be a whole number from {least} to {most}")
    return int(text)


def page_limit(request: Request) -> int:
    """`limit`: how many entries a page may have."""
    return whole(request, "limit", PAGE_DEFAULT, 1, PAGE_MAX)


def cursor(request: Request) -> str | None:
    """`cursor`: the `next_cursor` of the page before."""
    return request.query.get("cursor") or None


def word(request: Request, name: str) -> str | None:
    """A filter from the query; an empty one is none."""
    return request.query.get(name) or None
