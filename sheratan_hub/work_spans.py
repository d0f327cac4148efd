"""A worker's part of a job's trace: the work on it, and the sending of its result."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from sheratan_hub.answers import Accepted, Lease, Refusal, Report
from sheratan_hub.handlers import Outcome
from sheratan_hub.tracing import Kind, Span, Tracing, traceparent_of


class WorkSpans:
    """The spans of one node. What runs is `process`, a child of what submitted the job; its result is `settle`."""

    def __init__(self, tracing: Tracing, node_id: str) -> None:
        self._tracing, self._node_id = tracing, node_id
        self._settling: dict[str, Span] = {}

    def begin(self, lease: Lease) -> tuple[Span, Lease]:
        """The span of the work on a lease, and the lease with that span as its `traceparent`, for its handler."""
        span = self._span("consumer", "process", lease)
        return span, msgspec.structs.replace(lease, traceparent=span.traceparent)

    def _span(self, kind: Kind, operation: str, lease: Lease) -> Span:
        return self._tracing.span(
            kind,
            operation,
            lease.kind,
            parent=traceparent_of(lease.traceparent),
            job_id=lease.job_id,
            attempt=lease.attempt,
            node_id=self._node_id,
        )

    def done(self, span: Span, lease: Lease, outcome: Outcome | None) -> None:
        """The work is over; its result, if there is one, is about to be sent. A second one of a lease goes with it."""
        if outcome is None:
            span.failed("given_up")
            return
        span.set(outcome="completed" if outcome.ok else "failed")
        if not outcome.ok:
            span.failed(_error_type(outcome))
        self._settling[lease.lease_id] = self._span("client", "settle", lease)

    def settled(self, report: Report, outcome: Accepted | Refusal) -> None:
        """The hub has taken the result, or never will."""
        span = self._settling.pop(report.lease_id, None)
        if span is None:
            return
        if isinstance(outcome, Refusal):
            span.failed(outcome.code)
        else:
            span.set(outcome=outcome.status)
        span.end()


def _error_type(outcome: Outcome) -> str:
    error = msgspec.json.decode(outcome.error)
    return str(error.get("type")) if isinstance(error, Mapping) else "error"
