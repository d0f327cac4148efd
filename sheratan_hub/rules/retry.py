"""The two budgets: failures retry with backoff, lost leases return with a small delay (design rules 4 and 5).

Beyond both stands a cap on deliveries, `max_deliveries`: nothing is handed out for ever, by releases neither.
"""

from __future__ import annotations

import msgspec

from sheratan_hub.canonical import Raw
from sheratan_hub.rules.command import ORDERS, Limits
from sheratan_hub.rules.jobs import Job


def backoff_ms(job: Job, limits: Limits, jitter: float) -> int:
    """The delay before retry number `job.failures` (from 1): base·2ⁿ⁻¹ or base·n, capped, less up to half by jitter.

    `jitter` is from 0 up to 1. Half the delay is kept ("equal jitter"), so a retry is never immediate.
    """
    n = max(job.failures - 1, 0)
    grown = limits.backoff_base_ms * (2 ** min(n, 40) if job.backoff == "exponential" else n + 1)
    delay = min(grown, limits.backoff_cap_ms)
    return delay - int(delay / 2 * jitter)


def after_failure(
    job: Job,
    now: int,
    limits: Limits,
    error: Raw,
    jitter: float,
    *,
    retry: bool = True,
    retry_after_ms: int | None = None,
) -> tuple[str, Job]:
    """What a failure makes of the job: (`"failed"`, `"retry"` or `"cancelled"`, the job after it)."""
    job = job.with_(failures=job.failures + 1, error=error)
    if job.cancel_at:
        return "cancelled", end(job, "cancelled", now, "CANCELLED")
    if not retry or job.at_most_once:
        return "failed", end(job, "failed", now, "NOT_RETRYABLE")
    if job.failures > job.max_retries or delivered_out(job, limits):
        return "failed", end(job, "failed", now, "RETRIES_EXHAUSTED")
    delay = backoff_ms(job, limits, jitter) if retry_after_ms is None else retry_after_ms
    return "retry", back_in_line(job, "retry", now, delay)


def after_loss(job: Job, now: int, limits: Limits) -> tuple[str, Job]:
    """What a lost lease makes of the job: (`"failed"`, `"lost"` or `"cancelled"`, the job after it)."""
    nodes = (*job.lost_on, job.node_id) if job.node_id and job.node_id not in job.lost_on else job.lost_on
    job = job.with_(losses=job.losses + 1, lost_on=nodes)
    if job.cancel_at:
        return "cancelled", end(job, "cancelled", now, "CANCELLED")
    if job.at_most_once:
        return "failed", end(job, "failed", now, "LOST", error=loss_error(job))
    if job.losses >= limits.max_losses:
        return "failed", end(job, "failed", now, "POISON", error=loss_error(job))
    if delivered_out(job, limits):
        return "failed", end(job, "failed", now, "RETRIES_EXHAUSTED", error=delivered_error(job))
    return "lost", back_in_line(job, "lost", now, limits.loss_delay_ms)


def after_release(job: Job, now: int, limits: Limits) -> tuple[str, Job]:
    """What a release makes of the job: (`"failed"`, `"released"` or `"cancelled"`, the job after it)."""
    if job.cancel_at:
        return "cancelled", end(job, "cancelled", now, "CANCELLED")
    if delivered_out(job, limits):
        return "failed", end(job, "failed", now, "RETRIES_EXHAUSTED", error=delivered_error(job))
    return "released", job.after("released", lease_id=None, pending_since=now)


def delivered_out(job: Job, limits: Limits) -> bool:
    """Whether it has been handed out as often as any job may be; answers that never left the hub do not count."""
    return job.attempt - job.uncounted >= limits.max_deliveries


def end(job: Job, happened: str, now: int, reason: str | None = None, **changes: object) -> Job:
    """The job finished now. The last lease stays on record, so that a late result is recognised.

    Whoever depends on it is told by the sweep of cascades, on whose agenda its row stands then (rule 7).
    """
    if job.dependents:
        changes["cascade"] = True
    return job.after(happened, finished_at=now, reason=reason, cancel_at=0, **changes)


def back_in_line(job: Job, happened: str, now: int, delay_ms: int) -> Job:
    """The job pending again after `delay_ms`, at the end of its lane: a crash does not repeat at once."""
    at = now + delay_ms
    return job.after(
        happened, not_before=at, order=at * ORDERS, pending_since=at, waiting=delay_ms > 0, delay_ms=delay_ms
    )


def loss_error(job: Job) -> Raw:
    """The error of a job that ended by lost leases, naming the nodes it was lost on."""
    text = f"its lease was lost {job.losses} times, on {len(job.lost_on)} nodes"
    return Raw(msgspec.json.encode({"type": "LeaseLost", "message": text, "nodes": job.lost_on}))


def delivered_error(job: Job) -> Raw:
    """The error of a job that was handed out too often."""
    text = f"it was handed out {job.attempt - job.uncounted} times and always came back"
    return Raw(msgspec.json.encode({"type": "TooManyDeliveries", "message": text}))
