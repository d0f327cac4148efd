"""The hub's part of a job's trace, made of what was committed: accepted, waited, leased.

An observer, so that a hub that does not trace does nothing for it. Only jobs that carry a `traceparent` have spans.
"""

from __future__ import annotations

from sheratan_hub.clock import Clock
from sheratan_hub.items import Committed
from sheratan_hub.rules.command import Event
from sheratan_hub.rules.jobs import Job, job_of
from sheratan_hub.tracing import Tracing, traceparent_of

ENDS = {
    "job.completed": "completed",
    "job.failed": "failed",
    "job.retry": "retry",
    "job.lost": "lost",
    "job.released": "released",
    "job.cancelled": "cancelled",
}
"""The events that end a lease, and what they make of it."""

FINE = frozenset({"completed", "released", "cancelled"})


class JobSpans:
    """An observer of commits."""

    def __init__(self, tracing: Tracing, clock: Clock) -> None:
        self._tracing, self._clock = tracing, clock

    def committed(self, committed: Committed) -> None:
        """Make the spans of what has ended with this batch."""
        events = [event for one in committed.happened for event in one.events if event.trace_id is not None]
        if not events:
            return
        changes = committed.changes
        rows = {row.id: row for row in (*changes.new, *changes.put) if row.kind == "job"}
        for event in events:
            if event.job_id in rows:
                self._span(event, job_of(rows[event.job_id]))

    def _span(self, event: Event, job: Job) -> None:
        if event.event == "job.submitted":
            self._make("accept", job, event.ts, self._clock.now())
        elif event.event == "job.leased":
            self._make("wait", job, min(job.pending_since, event.ts), event.ts, attempt=event.meta["attempt"])
        elif event.event in ENDS and "attempt" in event.meta and not event.meta.get("late"):
            attempt = event.meta["attempt"]
            began = job.started_at if job.attempt == attempt else event.ts
            self._make("lease", job, began, event.ts, attempt, ENDS[event.event], event.meta)

    def _make(
        self,
        operation: str,
        job: Job,
        start_ms: int,
        end_ms: int,
        attempt: int | None = None,
        outcome: str | None = None,
        meta: dict[str, object] | None = None,
    ) -> None:
        span = self._tracing.span(
            "server" if operation == "accept" else "internal",
            operation,
            job.kind,
            parent=traceparent_of(job.traceparent),
            start_ms=start_ms,
            job_id=job.id,
            attempt=attempt,
            outcome=outcome,
            node_id=job.node_id if attempt is not None else None,
        )
        if outcome is not None and outcome not in FINE:
            span.failed(str((meta or {}).get("cause") or (meta or {}).get("reason") or outcome))
        span.end(max(start_ms, end_ms))
