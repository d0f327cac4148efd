"""Late results as evidence: what the worker of a superseded lease says is refused, and kept (design rule 2).

A row of its own, `late/<job id>`. `diverged` tells whether it differs from what completed the job; None while nothing
has. Only a lease that this job really had can leave evidence, and each lease once, so nobody can fill a store with it.
"""

from __future__ import annotations

import msgspec

from sheratan_hub.canonical import Raw, result_sha256
from sheratan_hub.rules.attempts import Kept, attempts_of, lease_digest
from sheratan_hub.rules.command import Decision, Event, Refused
from sheratan_hub.rules.errors import kept_error
from sheratan_hub.rules.jobs import Job, job_event
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row

LAST_KEPT = 5
"""So many late results of a job are kept, the last ones."""

RESULT_BYTES = 16_384
"""A larger result is not kept, only its hash and size."""

NOTHING = b"null"

SEEN_MAX = 100
"""So many leases of a job may leave evidence."""

VERDICTS = {True: "diverged", False: "equal", None: "undecided"}
"""Of `diverged`, the reason that an audit line is given."""

BY_HUB = frozenset({"timeout", "lost", "node_dead", "cancelled"})
"""The ends of attempts after which the worker has not had its say."""


class Late(msgspec.Struct, frozen=True):
    """One late result. `sha256` is that of the integrity text of what was said; a large `result` is left out."""

    attempt: int
    node_id: str | None
    ok: bool
    sha256: str
    size_bytes: int
    at: int
    diverged: bool | None = None
    result: Raw | msgspec.UnsetType = msgspec.UNSET
    error: Raw | msgspec.UnsetType = msgspec.UNSET


class Evidence(msgspec.Struct, frozen=True):
    """The late results of one job: digests of all leases that brought one, and the last results."""

    seen: tuple[str, ...] = ()
    late: tuple[Late, ...] = ()


def refused_late(view: View, job: Job, lease_id: str, said: tuple[bool, bytes, bytes], no: Refused) -> Decision:
    """Refuse with `no` and keep what was said (`ok`, `result`, `error`); raises `no` if there is nothing to keep."""
    delivery = _delivery(view, job, lease_id)
    digest = lease_digest(lease_id)
    row = view.row("late", job.id) if delivery and job.late_results else None
    known = evidence_of(row)
    if delivery is None or digest in known.seen or len(known.seen) >= SEEN_MAX:
        raise no
    late = _late(job, delivery, said, view.now)
    evidence = Evidence((*known.seen, digest), (*known.late, late)[-LAST_KEPT:])
    written = Row("late", job.id, _encode(evidence))
    counted = job.with_(late_results=job.late_results + 1)
    return Decision(
        no,
        new=(written,) if row is None else (),
        put=(counted.row,) if row is None else (counted.row, written),
        events=(_event(job, "superseded", late, view.now),),
    )


def judged(view: View, done: Job) -> Kept:
    """`done` was completed: whether the late results that came before differ from its result. May raise `Need`."""
    row = view.row("late", done.id)
    if row is None:
        return Kept(done)
    known, right = evidence_of(row), _winner(done)
    late = tuple(_against(one, right) for one in known.late)
    written = Row("late", done.id, _encode(msgspec.structs.replace(known, late=late)))
    open_ones = (new for new, old in zip(late, known.late, strict=True) if old.diverged is None)
    return Kept(done, put=(written,), events=tuple(_event(done, "judged", one, view.now) for one in open_ones))


def evidence_of(row: Row | None) -> Evidence:
    """The evidence kept in a row; none if there is no row."""
    return Evidence() if row is None else _decode(row.doc)


def late_key(job_id: str) -> Key:
    """The row key of a job's evidence."""
    return Key("late", job_id)


def _delivery(view: View, job: Job, lease_id: str) -> tuple[int, str | None] | None:
    """(attempt, node) of the lease if the hub has ended it, None if this job never had such a lease."""
    if job.lease_id == lease_id:
        return job.attempt, job.node_id
    digest = lease_digest(lease_id)
    tried = attempts_of(view.look("attempts", job.id)) if job.tried else ()
    return next(((one.attempt, one.node_id) for one in tried if one.lease == digest and one.outcome in BY_HUB), None)


def _late(job: Job, delivery: tuple[int, str | None], said: tuple[bool, bytes, bytes], now: int) -> Late:
    ok, result, error = said
    size = len(result) if ok else len(error)
    sha256 = result_sha256(job.id, ok, result if ok else NOTHING, NOTHING if ok else error)
    late = Late(*delivery, ok, sha256, size, now)
    if not ok:
        late = msgspec.structs.replace(late, error=kept_error(error))
    elif size <= RESULT_BYTES:
        late = msgspec.structs.replace(late, result=Raw(result))
    return _against(late, _winner(job))


def _winner(job: Job) -> str | None:
    """The hash of what completed the job, None if nothing has."""
    return result_sha256(job.id, True, bytes(job.result), NOTHING) if job.status == "completed" else None


def _against(late: Late, right: str | None) -> Late:
    return msgspec.structs.replace(late, diverged=None if right is None else late.sha256 != right)


def _event(job: Job, name: str, late: Late, now: int) -> Event:
    event = job_event(job, name, now, late.node_id or "client")
    meta = {
        "attempt": late.attempt,
        "node_id": late.node_id,
        "diverged": late.diverged,
        "reason": VERDICTS[late.diverged],
    }
    return msgspec.structs.replace(event, meta=meta)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Evidence).decode
