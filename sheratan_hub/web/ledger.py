"""The ledger's handler: every transition in order."""

from __future__ import annotations

from sheratan_hub.ledger import Entry, entries
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.plane import Call
from sheratan_hub.web.query import page_limit, word
from sheratan_hub.web.render import listed
from sheratan_hub.web.walking import read

EXAMINED_MAX, READ_AT_ONCE = 20_000, 1000
"""A page ends after so many events were looked at, of which so many are read at once."""


async def ledger(call: Call) -> Answer:
    """GET /api/ledger: every transition after a number, those of one job if asked."""
    most, job_id = page_limit(call.request), word(call.request, "job_id")
    after, examined = _after(call), 0
    found: list[Entry] = []
    while True:
        asked = READ_AT_ONCE if job_id is not None else most
        lines = entries(await read(call.hub.store.events(after, asked)))
        for line in lines:
            if job_id is None or line.job_id == job_id:
                found.append(line)
            after = line.seq
            if len(found) == most:
                break
        examined += len(lines)
        ended = len(lines) < asked and (not lines or after == lines[-1].seq)
        if ended or len(found) == most or examined >= EXAMINED_MAX:
            return listed("events", found, None if ended else str(after))


def _after(call: Call) -> int:
    """`cursor`, or `after`: the number of the last event that the client has."""
    text = word(call.request, "cursor") or word(call.request, "after") or "0"
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise Refused(Code.INVALID_FIELD, "after and cursor must be the number of an event")
    return int(text)
