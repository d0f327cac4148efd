"""What time does to jobs: leases, timeouts and waiting end, jobs expire; a dead node's leases (rules 4, 5, 12)."""

from __future__ import annotations

from typing import Any

import msgspec

from sheratan_hub.canonical import NULL, Raw
from sheratan_hub.rules.attempts import Kept, Outcome, ask_for_attempts, noted
from sheratan_hub.rules.command import Decision, Event, Scene, due_wants
from sheratan_hub.rules.jobs import Job, job_event, job_key, job_of
from sheratan_hub.rules.nodes import Swept
from sheratan_hub.rules.retry import after_failure, after_loss, end
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row, Wants

LOOK_AHEAD_MS = 1000
"""A sweep also loads what is due this soon, so that it knows when the next one must run."""


class SweepJobs(msgspec.Struct, frozen=True, gc=False):
    """Act on the jobs of one agenda that are due: `"lease"`, `"wait"` or `"expire"`. `jitter` is from 0 up to 1."""

    agenda: str
    jitter: float = 0.0
    limit: int = 500

    def wants(self, scene: Scene) -> Wants:
        """What is due by now or soon."""
        return due_wants(self.agenda, scene.now + LOOK_AHEAD_MS, self.limit)

    def decide(self, view: View) -> Decision:
        """The jobs changed, with their events; the answer is `Swept`."""
        jobs, next_at = self._due(view)
        if self.agenda == "lease":
            ask_for_attempts(view, jobs)
        new: list[Row] = []
        put: list[Row] = []
        events: list[Event] = []
        for place, job in enumerate(jobs):
            after, happened, meta = _act(self.agenda, job, view, (self.jitter + place * 0.618) % 1)
            kept = _on_record(view, job, after, meta["cause"]) if "cause" in meta else Kept(after)
            new += kept.new
            put += (kept.job.row, *kept.put)
            if happened != "due":
                events.append(job_event(after, happened, view.now, "hub", **meta))
        swept = Swept(len(jobs), view.now if len(jobs) >= self.limit else next_at)
        return Decision(swept, tuple(new), tuple(put), events=tuple(events))

    def _due(self, view: View) -> tuple[list[Job], int | None]:
        """The jobs whose time has come, and when the next one's does."""
        jobs: list[Job] = []
        next_at: int | None = None
        for row in view.due(self.agenda):
            job = job_of(row)
            at = _acts_at(job, row.due_at, view.scene)
            if at <= view.now:
                jobs.append(job)
            else:
                next_at = at if next_at is None else min(next_at, at)
        return jobs, next_at


class ReapNode(msgspec.Struct, frozen=True, gc=False):
    """The leases of a dead node end now, as losses. `job_ids` are those that were seen to be its own."""

    node_id: str
    job_ids: tuple[str, ...]

    def wants(self, scene: Scene) -> Wants:
        """The jobs, and whether the node is still silent."""
        return Wants(keys={job_key(id) for id in self.job_ids}, look={Key("node", self.node_id)})

    def decide(self, view: View) -> Decision:
        """The answer is how many leases ended: none if the node was heard of since."""
        node = view.look("node", self.node_id)
        if node is None or node.labels[0] != "DEAD":
            return Decision(0)
        rows = [view.row("job", id) for id in self.job_ids]
        jobs = [job_of(row) for row in rows if row is not None]
        held = [job for job in jobs if job.status == "running" and job.node_id == self.node_id]
        ask_for_attempts(view, held)
        new: list[Row] = []
        put: list[Row] = []
        events: list[Event] = []
        for job in held:
            happened, lost = after_loss(job, view.now, view.scene.limits)
            kept = _on_record(view, job, lost, "node_dead")
            new += kept.new
            put += (kept.job.row, *kept.put)
            events.append(job_event(lost, happened, view.now, "hub", **_ended(job, lost, "node_dead")))
        return Decision(len(held), tuple(new), tuple(put), events=tuple(events))


class ClampLeases(msgspec.Struct, frozen=True, gc=False):
    """After a start: no lease lasts longer than its full time from now, even if the wall clock went back."""

    job_ids: tuple[str, ...]

    def wants(self, scene: Scene) -> Wants:
        """The jobs."""
        return Wants(keys={job_key(id) for id in self.job_ids})

    def decide(self, view: View) -> Decision:
        """The answer is how many were clamped."""
        rows = [view.row("job", id) for id in self.job_ids]
        put = []
        for job in (job_of(row) for row in rows if row is not None):
            until = view.now + job.lease_ms
            if job.status == "running" and (job.lease_until > until or job.started_at > view.now):
                clamped = job.with_(lease_until=min(job.lease_until, until), started_at=min(job.started_at, view.now))
                put.append(clamped.row)
        return Decision(len(put), put=tuple(put))


class ClampDelays(msgspec.Struct, frozen=True, gc=False):
    """After a start: no delay lasts longer than its full time from now, even if the wall clock went back (rule 12)."""

    job_ids: tuple[str, ...]

    def wants(self, scene: Scene) -> Wants:
        """The jobs."""
        return Wants(keys={job_key(id) for id in self.job_ids})

    def decide(self, view: View) -> Decision:
        """The answer is how many were clamped."""
        rows = [view.row("job", id) for id in self.job_ids]
        jobs = [job for job in (job_of(row) for row in rows if row is not None) if delayed_beyond(job, view.now)]
        put = []
        for job in jobs:
            at = view.now + job.delay_ms
            put.append(job.with_(not_before=at, order=view.scene.order_at(at), pending_since=at).row)
        return Decision(len(put), put=tuple(put))


def delayed_beyond(job: Job, now: int) -> bool:
    """Whether the job waits for longer than its whole delay; a `not_before` of its producer's is no delay."""
    return job.status == "pending" and job.waiting and 0 < job.delay_ms < job.not_before - now


def _acts_at(job: Job, due_at: int, scene: Scene) -> int:
    """When the row's time has truly come: after a start, no lease ends within the restart grace (rule 12)."""
    if job.status != "running":
        return due_at
    grace = min(job.lease_ms, scene.limits.restart_grace_ms)
    return max(due_at, scene.started_at + grace)


def _act(agenda: str, job: Job, view: View, jitter: float) -> tuple[Job, str, dict[str, Any]]:
    """(the job after it, what happened, what to tell of it)."""
    now = view.now
    if agenda != "lease":
        if 0 < job.ends_unclaimed_at <= now:
            return end(job, "expired", now, "EXPIRED", error=_EXPIRED), "failed", {"reason": "EXPIRED"}
        return job.after("due", waiting=False), "due", {}
    if job.cancel_at and job.cancel_at <= now:
        done = end(job, "cancelled", now, "CANCELLED")
        return done, "cancelled", _ended(job, done, "cancel_deadline")
    if job.times_out_at <= min(now, job.lease_until):
        happened, after = after_failure(job, now, view.scene.limits, _TIMEOUT, jitter)
        return after, happened, _ended(job, after, "timeout")
    happened, after = after_loss(job, now, view.scene.limits)
    return after, happened, _ended(job, after, "lease_expired")


def _on_record(view: View, job: Job, after: Job, cause: str) -> Kept:
    """The end of the attempt, by what caused it, on the job's record."""
    error = _TIMEOUT if cause == "timeout" else NULL
    return noted(view, job, after, _OUTCOMES[cause], error)


_OUTCOMES: dict[str, Outcome] = {
    "timeout": "timeout",
    "lease_expired": "lost",
    "node_dead": "node_dead",
    "cancel_deadline": "cancelled",
}


def _ended(job: Job, after: Job, cause: str) -> dict[str, Any]:
    """What to tell of a lease that the hub itself ended: `cause` is what makes it one."""
    return {"reason": after.reason, "attempt": job.attempt, "node_id": job.node_id, "cause": cause}


_EXPIRED = Raw(msgspec.json.encode({"type": "Expired", "message": "nobody took it before its time ran out"}))
_TIMEOUT = Raw(msgspec.json.encode({"type": "Timeout", "message": "the attempt used up its timeout_seconds"}))
