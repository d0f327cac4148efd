"""Retention: finished jobs are forgotten by age from their end, and by nothing else (design rule 15, research T25).

A finished job stands in the agenda of its state from its end on. What is due is decided when it is looked at, so
that a changed retention counts for the jobs that are there already. A wall clock that was set moves the end of a
job's time by as much as the clock is wrong, and by no more.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from sheratan_hub.rules.command import Decision, Event, Limits, Need, Scene, due_wants
from sheratan_hub.rules.edges import Loose, ask_for_edges, loosen
from sheratan_hub.rules.jobs import PRUNE, Job, job_event, job_key, job_of
from sheratan_hub.rules.mission_prune import WHENEVER, without
from sheratan_hub.rules.submit import named_job
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row, Wants

PRUNE_MAX = 100
"""Jobs that one transaction prunes at most, so that others wait for a millisecond or two."""

NEEDED_MS = 60_000
"""A job that unfinished ones depend on is looked at again after so long."""


class Pruned(msgspec.Struct, frozen=True, gc=False):
    """What a prune looked at: how many jobs that were due, how many bytes of them, how many went.

    `next_at` is when the next is due (ms); None: no more of them are there, or at least none was seen.
    """

    looked: int
    size: int
    gone: int
    next_at: int | None = None


class Prune(msgspec.Struct, frozen=True, gc=False):
    """Forget up to `limit` jobs in the state `status` whose time is over, with all that belongs to them."""

    status: str
    limit: int = PRUNE_MAX

    def wants(self, scene: Scene) -> Wants:
        """The first that have ended, due by now or not: what is left tells when to come again."""
        return due_wants(PRUNE[self.status], WHENEVER, self.limit)

    def decide(self, view: View) -> Decision:
        """What something still needs is looked at again when that may be over. The answer is `Pruned`."""
        kept = kept_ms(self.status, view.scene.limits)
        ended = view.due(PRUNE[self.status])
        rows = [row for row in ended if row.due_at <= view.now - kept]
        next_at = ended[len(rows)].due_at + kept if len(rows) < len(ended) else None
        jobs = [job_of(row) for row in rows]
        _ask(view, jobs)
        put: list[Row] = []
        gone: list[Key] = []
        pruned: list[Job] = []
        for row, job in zip(rows, jobs, strict=True):
            loose = loosen(view, job)
            again_at = prunable(job, view, loose)
            gone += loose.gone
            if again_at:
                put.append(msgspec.structs.replace(row, due_at=again_at - kept))
                next_at = again_at if next_at is None else min(next_at, again_at)
            else:
                pruned.append(job)
                gone += _rows_of(job, view)
        left = without(view, pruned)
        put += left.put
        answer = Pruned(len(rows), sum(len(row.doc) for row in rows), len(pruned), next_at)
        events = tuple(self._events(pruned, view))
        return Decision(answer, put=tuple(put), gone=tuple(gone), events=events, forgotten=left.forgotten)

    def _events(self, pruned: list[Job], view: View) -> Iterable[Event]:
        """One event for all of them, and one for each dead letter, since its loss may matter to somebody."""
        if self.status == "failed":
            yield from (job_event(job, "pruned", view.now, "hub", reason=job.reason) for job in pruned)
        if pruned:
            yield Event(
                view.now,
                "jobs.pruned",
                "hub",
                meta={"status": self.status, "count": len(pruned), "reason": "retention"},
            )


def kept_ms(status: str, limits: Limits) -> int:
    """How long a job in this final state is kept after its end."""
    return {
        "completed": limits.completed_kept_ms,
        "failed": limits.failed_kept_ms,
        "cancelled": limits.cancelled_kept_ms,
    }[status]


def prunable(job: Job, view: View, loose: Loose) -> int:
    """0 when nothing needs this job any more, else when to look again (ms).

    The one place that knows what needs a job whose own time is over: its key, while that is remembered (rule 8), and
    unfinished jobs that depend on it (rule 7).
    """
    if job.key is not None:
        ends = job.finished_at + view.scene.limits.key_ttl_ms
        if ends > view.now:
            return ends
    if not loose.prunable:
        return view.now if loose.gone else view.now + NEEDED_MS
    return 0


def _ask(view: View, jobs: list[Job]) -> None:
    """Load the rows that may be there beside the jobs."""
    ask_for_edges(view, jobs)
    beside = {key for job in jobs if not prunable(job, view, loosen(view, job)) for key in _beside(job)}
    missing = {key for key in beside if not view.has(key.kind, key.id, locked=True)}
    if missing:
        raise Need(Wants(keys=missing))


def _beside(job: Job) -> Iterable[Key]:
    """What may belong to a job beside its own row; nothing is named that this job cannot have."""
    if job.status == "completed":
        yield Key("read", job.id)
    if job.tried:
        yield Key("attempts", job.id)
    if job.late_results:
        yield Key("late", job.id)
    if job.key is not None:
        yield Key("key", job.key)


def _rows_of(job: Job, view: View) -> Iterable[Key]:
    """The job's row and all that belongs to it; a key that names another job by now does not."""
    yield job_key(job.id)
    if job.params_apart:
        yield Key("params", job.id)
    for key in _beside(job):
        row = view.row(key.kind, key.id)
        if row is not None and (key.kind != "key" or named_job(row) == job.id):
            yield key


class MarkRead(msgspec.Struct, frozen=True, gc=False):
    """Somebody has read the results of these completed jobs, each given with the time of its end.

    How many completed jobs nobody has read is the number of them less that of these marks: completing a job costs
    nothing for it.
    """

    jobs: tuple[tuple[str, int], ...]

    def wants(self, scene: Scene) -> Wants:
        """The marks that may be there already."""
        return Wants(keys={Key("read", id) for id, _ in self.jobs})

    def decide(self, view: View) -> Decision:
        """A mark for each that has none and that is not about to be pruned; the answer is how many.

        Not synced by itself: a mark lost in a power cut is made again by the next who reads.
        """
        kept = view.scene.limits.completed_kept_ms
        unread = [id for id, finished_at in dict(self.jobs).items() if view.now < finished_at + kept]
        new = tuple(Row("read", id, b"") for id in unread if view.row("read", id) is None)
        return Decision(len(new), new=new, durable=False)
