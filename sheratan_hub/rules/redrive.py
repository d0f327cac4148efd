"""Redriving: a job that failed, was cancelled or is held is tried again under its own id."""

from __future__ import annotations

from sheratan_hub.rules.command import ORDERS
from sheratan_hub.rules.jobs import Job


def redriven(job: Job, now: int) -> Job:
    """The job pending again with fresh budgets, at the end of its lane; its attempts count on."""
    return job.after(
        "redriven",
        failures=0,
        losses=0,
        lost_on=(),
        finished_at=0,
        reason=None,
        root_cause=None,
        lease_id=None,
        cancel_at=0,
        not_before=0,
        expires_at=0,
        waiting=False,
        order=now * ORDERS,
        pending_since=now,
    )
