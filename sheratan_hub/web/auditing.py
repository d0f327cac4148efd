"""The control plane's handlers that read the audit log and the alerts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from sheratan_hub import audit_read
from sheratan_hub.audit_check import AuditView, Proof
from sheratan_hub.audit_read import Filter, Lines
from sheratan_hub.audit_verify import Place
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.plane import Call
from sheratan_hub.web.query import PAGE_MAX, cursor, page_limit, whole, word
from sheratan_hub.web.render import reply
from sheratan_hub.web.request import Request

CUTS_SHOWN = 10


async def audit(call: Call) -> Answer:
    """GET /api/audit: lines of the audit log by cursor, the newest last, and whether its chain holds."""
    view, request = call.services.audit, call.request
    last = _last(request)
    try:
        proof = await view.proof()
        found = await asyncio.to_thread(_lines, view.path, request, last)
    except OSError as error:
        raise Refused(Code.UNAVAILABLE, f"the audit log cannot be read: {error}", retry_after_ms=2000) from error
    return reply(
        {
            "ok": True,
            "events": found.records,
            "next_cursor": None if found.next is None else str(found.next),
            "position": str(found.last),
            "chain": chain_answer(proof, view),
        }
    )


def _lines(path: Path, request: Request, last: int) -> Lines:
    if last:
        records = audit_read.newest(path, last)
        return Lines(records, None, records[-1]["seq"] if records else 0)
    return audit_read.page(path, _place(request), page_limit(request), _filter(request))


def chain_answer(proof: Proof, view: AuditView) -> dict[str, Any]:
    """What is known of the chain. `ok` is false only for a broken one; `complete` false: not all is looked at yet."""
    return {
        "ok": proof.broken is None,
        "complete": proof.complete,
        "from_seq": proof.began_at,
        "to_seq": proof.seq,
        "head": {"seq": view.head.seq, "hash": view.head.hash, "ts": view.head.ts},
        "broken": None if proof.broken is None else _place_answer(proof.broken),
        "cuts": [_place_answer(cut) for cut in proof.cuts[-CUTS_SHOWN:]],
        "writable": view.trouble is None,
    }


def _place_answer(place: Place) -> dict[str, Any]:
    return {"file": Path(place.file).name, "line": place.line, "text": place.text}


async def alerts(call: Call) -> Answer:
    """GET /api/alerts: what the watcher has raised, by cursor, the newest last."""
    path, last = call.services.audit.alerts, _last(call.request)
    at: int | None = None
    if last:
        records, end = await asyncio.to_thread(audit_read.newest_alerts, path, last)
    else:
        place, limit = _place(call.request), page_limit(call.request)
        records, at, end = await asyncio.to_thread(audit_read.alerts_page, path, place, limit)
    next_cursor = None if at is None else str(at)
    return reply({"ok": True, "alerts": records, "next_cursor": next_cursor, "position": str(end)})


def _last(request: Request) -> int:
    """`last`: the last so many instead of the first; 0 when it is not asked for."""
    return whole(request, "last", 0, 1, PAGE_MAX)


def _place(request: Request) -> int:
    text = cursor(request) or "0"
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise Refused(Code.INVALID_FIELD, "cursor must be a next_cursor or a position of this list")
    return int(text)


def _filter(request: Request) -> Filter:
    try:
        since, until = (
            audit_read.moment(text) if (text := word(request, name)) else None for name in ("since", "until")
        )
    except ValueError as error:
        raise Refused(Code.INVALID_FIELD, f"since and until are RFC 3339 times with a zone: {error}") from error
    return Filter(word(request, "event"), word(request, "node_id"), word(request, "reason"), since, until)
