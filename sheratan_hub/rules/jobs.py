"""The job: its states and legal transitions, its document, the row it is kept as, its events."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sheratan_hub.canonical import NULL, Raw
from sheratan_hub.rules.command import Code, Event, Refused
from sheratan_hub.rules.lanes import lane_name
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row

Status = Literal["pending", "running", "completed", "failed", "cancelled", "quarantined"]

# (status, what happened) -> status. Nothing else is legal; h11's state table is the model.
TRANSITIONS: dict[tuple[str, str], Status] = {
    ("pending", "leased"): "running",
    ("pending", "completed"): "completed",  # late: the lease ran out, but nobody else has had it since
    ("pending", "failed"): "failed",  # late as above, and it said not to try again
    ("pending", "expired"): "failed",
    ("pending", "cancelled"): "cancelled",
    ("pending", "due"): "pending",  # its time has come: it may be claimed now
    ("running", "completed"): "completed",
    ("running", "failed"): "failed",
    ("running", "retry"): "pending",
    ("running", "lost"): "pending",
    ("running", "released"): "pending",
    ("running", "cancelled"): "cancelled",
    ("pending", "unblocked"): "pending",  # all that it depends on has completed: it may be claimed now
    ("pending", "held"): "quarantined",  # what it depends on has failed
    ("quarantined", "resumed"): "pending",  # that was redriven
    ("quarantined", "expired"): "failed",
    ("quarantined", "cancelled"): "cancelled",
    ("failed", "redriven"): "pending",
    ("cancelled", "redriven"): "pending",
    ("quarantined", "redriven"): "pending",
}
FINISHED = frozenset({"completed", "failed", "cancelled"})

REASONS = (
    "RETRIES_EXHAUSTED",
    "POISON",
    "EXPIRED",
    "NOT_RETRYABLE",
    "LOST",
    "CANCELLED",
    "PURGED",
    "DEPENDENCY_FAILED",
)
"""Why a job failed, was cancelled or is held: every `reason` that a job can carry."""

PRUNE = {status: f"prune.{status}" for status in sorted(FINISHED)}
"""The agenda in which a finished job waits to be forgotten, by its state (design rule 15)."""

APART_BYTES = 2048
"""Params above this live in a row of their own, or every transition would write them again."""


class Closed(msgspec.Struct, frozen=True, array_like=True):
    """How a delivery ended: its lease, a digest of what was said, the status and delay that were answered."""

    lease_id: str
    digest: str
    status: str
    late: bool = False
    retry_in_ms: int = 0


OnFailure = Literal["cancel", "hold", "run"]
"""What the terminal failure of a job does to one that depends on it."""


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """A job's document. Times in ms since 1970, durations in ms. `params`, `result`, `error` are JSON texts.

    `delay_ms` is how long it was to wait when it began to; `tried` counts the attempts on record (`rules/attempts.py`);
    `uncounted` are deliveries that do not count for `max_deliveries`.
    `parents_left`: how many of the jobs it depends on have not completed, `parents_failed`: how many of these are
    known to have failed. `dependents`: others may depend on it; `cascade`: they have not all been told of its end;
    `resuming`: nor of its redrive.
    """

    id: str
    kind: str
    created_at: int
    order: int
    params: Raw = NULL
    params_apart: bool = False
    status: Status = "pending"
    priority: int = 2
    source: str = ""
    mission_id: str | None = None
    task_id: str | None = None
    needs: tuple[str, ...] = ()
    timeout_ms: int = 300_000
    max_retries: int = 3
    backoff: Literal["exponential", "linear"] = "exponential"
    at_most_once: bool = False
    not_before: int = 0
    expires_at: int = 0
    ttl_ms: int = 0
    pending_since: int = 0
    waiting: bool = False
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    lost_on: tuple[str, ...] = ()
    node_id: str | None = None
    zone: str | None = None
    lease_id: str | None = None
    lease_ms: int = 0
    lease_until: int = 0
    sending: int = 0
    started_at: int = 0
    cancel_at: int = 0
    finished_at: int = 0
    reason: str | None = None
    result: Raw = NULL
    error: Raw = NULL
    late_results: int = 0
    closed: tuple[Closed, ...] = ()
    traceparent: str | None = None
    key: str | None = None
    delay_ms: int = 0
    tried: int = 0
    redrives: int = 0
    redriven_at: int = 0
    uncounted: int = 0
    """Deliveries that do not count for a limit on them: those before the last redrive."""
    on_dependency_failure: OnFailure = "cancel"
    parents_left: int = 0
    parents_failed: int = 0
    dependents: bool = False
    cascade: bool = False
    resuming: bool = False
    root_cause: str | None = None
    policy_version: int = 0

    def after(self, happened: str, **changes: Any) -> Job:
        """This job after a transition of the table, with other fields changed as given."""
        status = TRANSITIONS[self.status, happened]
        return msgspec.structs.replace(self, status=status, **changes)

    def with_(self, **changes: Any) -> Job:
        """This job with fields changed, in the same state."""
        return msgspec.structs.replace(self, **changes)

    @property
    def finished(self) -> bool:
        """Whether it has reached a state that only a redrive changes."""
        return self.status in FINISHED

    @property
    def times_out_at(self) -> int:
        """When the running attempt has used up `timeout_ms`, whatever was extended."""
        return self.started_at + self.timeout_ms

    def closing(self, lease_id: str | None) -> Closed | None:
        """How this lease ended, if the worker ended it."""
        return next((one for one in self.closed if one.lease_id == lease_id), None)

    @property
    def ends_unclaimed_at(self) -> int:
        """When it fails if nobody has taken it: its own deadline, or the time one may wait in the line; 0: never."""
        if not self.expires_at and not self.ttl_ms:
            return 0
        if self.parents_left:
            return self.expires_at  # it does not stand in the line yet
        ends = [at for at in (self.expires_at, self.ttl_ms and self.pending_since + self.ttl_ms) if at]
        return min(ends, default=0)

    @property
    def row(self) -> Row:
        """The row it is kept as."""
        agenda, due_at = self._next_look()
        claimable = self.status == "pending" and not self.waiting and not self.parents_left
        return Row(
            "job",
            self.id,
            _encode(self),
            (self.status, self.kind, self.source or None, self.mission_id, self.node_id),
            lane_name(self.priority, self.kind, self.source, self.needs) if claimable else None,
            self.order,
            agenda,
            due_at,
        )

    def _next_look(self) -> tuple[str | None, int]:
        if self.status == "running":
            ends = min(self.lease_until, self.times_out_at)
            return "lease", min(ends, self.cancel_at) if self.cancel_at else ends
        if self.status in FINISHED:
            return "cascade" if self.cascade and not self.resuming else PRUNE[self.status], self.finished_at
        ends = self.ends_unclaimed_at
        if self.waiting and not self.parents_left:
            return "wait", min(self.not_before, ends) if ends else self.not_before
        return ("expire", ends) if ends else (None, 0)


def job_of(row: Row) -> Job:
    """The job kept in a row."""
    return _decode(row.doc)


def job_key(job_id: str) -> Key:
    """The row key of a job."""
    return Key("job", job_id)


def found(view: View, job_id: str) -> Job:
    """The job, locked for change. Refused with `job_not_found` when there is none."""
    row = view.row("job", job_id)
    if row is None:
        raise Refused(Code.JOB_NOT_FOUND, f"there is no job {job_id}")
    return job_of(row)


def job_event(job: Job, event: str, now: int, actor: str, **meta: Any) -> Event:
    """A transition of a job, as the ledger tells it. `meta` leaves out what is None."""
    if None in meta.values():
        meta = {name: value for name, value in meta.items() if value is not None}
    trace_id = job.traceparent.split("-")[1] if job.traceparent else None
    return Event(now, f"job.{event}", actor, job.id, trace_id, job.zone, None, meta)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Job).decode
