"""Redrive: a job that failed or was cancelled gets another life, under the same id (design rule 8, research T8)."""

from __future__ import annotations

import msgspec

from sheratan_hub.canonical import NULL
from sheratan_hub.rules.command import ORDERS, Code, Decision, Event, Refused, Scene
from sheratan_hub.rules.edges import resuming
from sheratan_hub.rules.jobs import Job, found, job_event, job_key
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Wants


class Redriven(msgspec.Struct, frozen=True, gc=False):
    """The job after a redrive. `changed` is false when it was unfinished already and nothing had to be done."""

    job_id: str
    status: str
    redrives: int
    not_before: int = 0
    changed: bool = True


class Redrive(msgspec.Struct, frozen=True, gc=False):
    """Let a job that failed, was cancelled or is held run again, `delay_ms` from now at the earliest.

    Dependents on hold wait for it again; with `dependents` those that were cancelled because of it come back, too.

    It is an operator's act: neither the depth limit nor `at_most_once` refuses it. Repeated, it changes nothing.
    """

    job_id: str
    delay_ms: int = 0
    actor: str = "client"
    dependents: bool = False

    def wants(self, scene: Scene) -> Wants:
        """The job."""
        return Wants(keys={job_key(self.job_id)})

    def decide(self, view: View) -> Decision:
        """The job waits at the end of its lane. Refused: `job_not_found`, `not_failed`."""
        job = found(view, self.job_id)
        if not job.finished and job.status != "quarantined":
            return Decision(Redriven(job.id, job.status, job.redrives, job.not_before, changed=False))
        if job.status == "completed":
            raise Refused(Code.NOT_FAILED, f"job {job.id} is completed; only what failed or was cancelled runs again")
        again = redriven(job, view)
        if self.delay_ms > 0:
            again = delayed(again, view.now + self.delay_ms)
        event = redriven_event(job, again, view.now, self.actor)
        again, new, put = resuming(view, again, dependents=self.dependents)
        answer = Redriven(job.id, again.status, again.redrives, again.not_before)
        return Decision(answer, new=new, put=(again.row, *put), events=(event,))


def redriven(job: Job, view: View) -> Job:
    """The finished job pending again, at the end of its lane, both budgets new.

    Its id, its key and what is told of it stay; `attempt` goes on. No old lease may end the new life: those on record
    are answered as before, any other is `lease_superseded`. The time to expire begins anew, or it would expire at once.
    """
    now = view.now
    lasts = job.expires_at - (job.redriven_at or job.created_at) if job.expires_at else 0
    return job.after(
        "redriven",
        order=view.next_order(),
        not_before=0,
        waiting=False,
        pending_since=now,
        expires_at=now + lasts if lasts else 0,
        failures=0,
        losses=0,
        lost_on=(),
        lease_id=None,
        finished_at=0,
        reason=None,
        root_cause=None,
        cancel_at=0,
        result=NULL,
        redrives=job.redrives + 1,
        redriven_at=now,
        uncounted=job.attempt,
        delay_ms=0,
    )


def redriven_event(before: Job, again: Job, now: int, actor: str) -> Event:
    """What the ledger tells of a redrive: also what and why the job was before."""
    return job_event(again, "redriven", now, actor, reason=before.reason, was=before.status, redrives=again.redrives)


def delayed(job: Job, at: int) -> Job:
    """The redriven job, not to be handed out before `at`; the time in which it may be taken begins then."""
    ends = at + job.expires_at - job.redriven_at if job.expires_at else 0
    return job.with_(
        not_before=at,
        order=at * ORDERS,
        waiting=True,
        pending_since=at,
        expires_at=ends,
        redriven_at=at,
        delay_ms=at - job.redriven_at,
    )
