"""The record of a job's attempts that did not complete it: who had it, how it ended, with what error.

A row of its own, `attempts/<job id>`, written only when such an attempt ends: a job that is completed at once has none.
`Job.tried` says how many there were, so that nobody loads what is not there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

from sheratan_hub.canonical import NULL, Raw
from sheratan_hub.rules.command import Event, Need
from sheratan_hub.rules.errors import without_trace
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row, Wants

Outcome = Literal["failed", "timeout", "lost", "node_dead", "released", "cancelled"]

LAST_KEPT = 20
"""So many of the last attempts are on record, and the first."""

TRACES_KEPT = 5
"""So many of the last ones, and the first, keep the trace in their error."""


class Tried(msgspec.Struct, frozen=True):
    """One attempt that did not complete its job. `lease` is a digest of the lease's id, which stays secret."""

    attempt: int
    node_id: str | None
    outcome: Outcome
    error: Raw
    at: int
    lease: str


class Kept(NamedTuple):
    """What is written beside a job, and the job as it is then."""

    job: Job
    new: tuple[Row, ...] = ()
    put: tuple[Row, ...] = ()
    events: tuple[Event, ...] = ()


def noted(view: View, before: Job, after: Job, outcome: Outcome, error: Raw = NULL) -> Kept:
    """`after` with the end of the attempt that `before` was in, on record. May raise `Need`."""
    row = view.row("attempts", after.id) if after.tried else None
    tried = Tried(before.attempt, before.node_id, outcome, error, view.now, lease_digest(before.lease_id))
    written = _row(after.id, _bounded((*attempts_of(row), tried)))
    job = after.with_(tried=after.tried + 1)
    return Kept(job, new=(written,)) if row is None else Kept(job, put=(written,))


def amended(view: View, job: Job, lease_id: str, error: Raw) -> Kept:
    """The job, and in its record what the worker said of an attempt that the hub had ended. May raise `Need`."""
    row = view.row("attempts", job.id) if job.tried else None
    digest = lease_digest(lease_id)
    tried = attempts_of(row)
    told = tuple(msgspec.structs.replace(one, error=error) if one.lease == digest else one for one in tried)
    return Kept(job, put=(_row(job.id, _bounded(told)),)) if row is not None else Kept(job)


def attempts_of(row: Row | None) -> tuple[Tried, ...]:
    """The record kept in a row, oldest first; empty if there is none."""
    return () if row is None else _decode(row.doc)


def attempts_key(job_id: str) -> Key:
    """The row key of a job's record."""
    return Key("attempts", job_id)


def ask_for_attempts(view: View, jobs: Iterable[Job]) -> None:
    """Raises `Need` for all records of these jobs that are not loaded, at once."""
    missing = {attempts_key(job.id) for job in jobs if job.tried and not view.has("attempts", job.id, locked=True)}
    if missing:
        raise Need(Wants(keys=missing))


def lease_digest(lease_id: str | None) -> str:
    """What tells one lease from another in a record that may be shown."""
    return hashlib.blake2b((lease_id or "").encode(), digest_size=8).hexdigest()


def _bounded(tried: tuple[Tried, ...]) -> tuple[Tried, ...]:
    """The first and the last ones; those between the first and the very last without their traces."""
    if len(tried) > 1 + LAST_KEPT:
        tried = (tried[0], *tried[-LAST_KEPT:])
    if len(tried) <= 1 + TRACES_KEPT:
        return tried
    older = (msgspec.structs.replace(one, error=without_trace(one.error)) for one in tried[1:-TRACES_KEPT])
    return (tried[0], *older, *tried[-TRACES_KEPT:])


def _row(job_id: str, tried: tuple[Tried, ...]) -> Row:
    return Row("attempts", job_id, _encode(tried))


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(tuple[Tried, ...]).decode
