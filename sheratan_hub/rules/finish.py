"""What the holder of a lease may say: result, extend, release; and cancelling (design rules 1-3, 14).

Every verb carries the `lease_id`, which is compared in the same transaction, and can be repeated blindly. The file
is longer than 300 lines because these verbs share the fence and the record of ended leases.
"""

from __future__ import annotations

import hashlib

import msgspec

from sheratan_hub.canonical import NULL, Raw
from sheratan_hub.rules.attempts import Kept, amended, noted
from sheratan_hub.rules.command import Code, Decision, Event, Refused, Scene
from sheratan_hub.rules.errors import kept_error
from sheratan_hub.rules.evidence import judged, refused_late
from sheratan_hub.rules.jobs import Closed, Job, found, job_event, job_key
from sheratan_hub.rules.nodes import node_of
from sheratan_hub.rules.policies import node_ask, refuse_denied
from sheratan_hub.rules.retry import after_failure, after_release, end
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Row, Wants

CLOSED_KEPT = 8
"""How many ended leases of a job are remembered, so that a repeat gets its answer again."""

RELEASED = "released"
"""What stands for the digest of a lease that was given back."""

EXTEND_MAX_MS = 86_400_000


class Finished(msgspec.Struct, frozen=True, gc=False):
    """What a result made of its job. `retry_in_ms` is set when it will be tried again."""

    job_id: str
    status: str
    late: bool = False
    retry_in_ms: int = 0


class Finish(msgspec.Struct, frozen=True, gc=False):
    """A delivery's result: done (`ok`, with `result`) or failed (with `error`); both are JSON texts.

    Without `lease_id` (the fleet's old route) it counts for the job's current lease; then a `node_id`, if
    given, must be its holder. `jitter` is from 0 up to 1. `proven`: it came with a proof, which holds.
    """

    job_id: str
    ok: bool
    lease_id: str | None = None
    node_id: str | None = None
    result: bytes = b"null"
    error: bytes = b"null"
    retry: bool = True
    retry_after_ms: int | None = None
    jitter: float = 0.0
    proven: bool = False

    def wants(self, scene: Scene) -> Wants:
        """The job."""
        return Wants(keys={job_key(self.job_id)})

    def decide(self, view: View) -> Decision:
        """Refused: `job_not_found`, `not_leased`, `not_holder`, `lease_superseded`, `result_conflict`,
        `policy_denied`.
        """
        job = found(view, self.job_id)
        lease_id = self.lease_id or self._current_lease(job)
        digest = self._digest()
        closed = job.closing(lease_id)
        if closed is not None:
            return self._again(closed, digest, view)
        try:
            held(job, lease_id)
        except Refused as no:
            if lease_id is None:
                raise
            return refused_late(view, job, lease_id, (self.ok, self.result, self.error), no)
        _refuse_by_policy(job, view)
        happened, done = self._outcome(job, view)
        late = job.status == "pending"
        delay = max(0, done.not_before - view.now) if done.status == "pending" else 0
        answer = Finished(job.id, done.status, late, delay)
        done = close(done, Closed(lease_id or "", digest, done.status, late, delay))
        actor = job.node_id or "client"
        reason = done.reason or (error_type(self.error) if happened == "retry" else None)
        event = job_event(done, happened, view.now, actor, attempt=job.attempt, late=late or None, reason=reason)
        event = msgspec.structs.replace(event, artifact_path=_artifact_path(self.result))
        notes = self._notes(view)
        if self.ok and not done.late_results:
            return Decision(answer, put=(done.row,), events=(event,), notes=notes)
        kept = judged(view, done) if self.ok else self._noted(view, job, done, happened)
        return Decision(answer, kept.new, (kept.job.row, *kept.put), events=(event, *kept.events), notes=notes)

    def _notes(self, view: View) -> tuple[Event, ...]:
        return (Event(view.now, "integrity.ok", "client", self.job_id),) if self.proven else ()

    def _noted(self, view: View, job: Job, done: Job, happened: str) -> Kept:
        """The failure on record; of an attempt that the hub had ended only its error is new."""
        if job.status == "pending":
            return amended(view, done, job.lease_id or "", done.error)
        return noted(view, job, done, "cancelled" if happened == "cancelled" else "failed", done.error)

    def _current_lease(self, job: Job) -> str | None:
        if self.node_id is not None and job.node_id not in (None, self.node_id):
            raise Refused(
                Code.NOT_HOLDER,
                f"job {job.id} is held by another node than {self.node_id}",
                reason="not_holder",
            )
        return job.lease_id

    def _again(self, closed: Closed, digest: str, view: View) -> Decision:
        if closed.digest == RELEASED:
            raise Refused(Code.LEASE_SUPERSEDED, f"this lease of job {self.job_id} was given back")
        if closed.digest != digest:
            raise Refused(
                Code.RESULT_CONFLICT,
                f"the lease of job {self.job_id} was already ended with another result; the first stands",
            )
        return Decision(Finished(self.job_id, closed.status, closed.late, closed.retry_in_ms), notes=self._notes(view))

    def _outcome(self, job: Job, view: View) -> tuple[str, Job]:
        if job.status == "pending" and not self.ok and self.retry:
            return "late_failure", job.with_(error=kept_error(self.error))  # the hub has charged this delivery already
        if self.ok:
            return "completed", end(job, "completed", view.now, result=Raw(self.result), error=NULL)
        return after_failure(
            job,
            view.now,
            view.scene.limits,
            kept_error(self.error),
            self.jitter,
            retry=self.retry,
            retry_after_ms=self.retry_after_ms,
        )

    def _digest(self) -> str:
        text = b"%d %b %b" % (self.ok, self.result, self.error)
        return hashlib.blake2b(text, digest_size=12).hexdigest()


class Extended(msgspec.Struct, frozen=True, gc=False):
    """The lease as extended: how long it lasts from now (ms), and whether the job should be stopped."""

    job_id: str
    lease_ms: int
    cancel_requested: bool


class Extend(msgspec.Struct, frozen=True, gc=False):
    """Let the lease end `lease_ms` from now (None: the configured time). The attempt's timeout does not move."""

    job_id: str
    lease_id: str
    lease_ms: int | None = None

    def wants(self, scene: Scene) -> Wants:
        """The job."""
        return Wants(keys={job_key(self.job_id)})

    def decide(self, view: View) -> Decision:
        """Refused: `job_not_found`, `lease_superseded`, `lease_expired`, `not_leased`."""
        job = found(view, self.job_id)
        held(job, self.lease_id)
        if job.status != "running":
            raise Refused(
                Code.LEASE_EXPIRED,
                f"the lease of job {job.id} has run out; a result is still taken while nobody else has the job",
            )
        lease_ms = min(self.lease_ms or view.scene.limits.lease_ms, EXTEND_MAX_MS)
        longer = job.with_(lease_until=min(view.now + lease_ms, job.times_out_at), lease_ms=lease_ms)
        left = max(0, longer.row.due_at - view.now)
        return Decision(Extended(job.id, left, bool(job.cancel_at)), put=(longer.row,))


class Release(msgspec.Struct, frozen=True, gc=False):
    """Give the job back at no cost, to its old place in the line.

    `undelivered` is for the hub itself, when an answer could not be written: refused if the leases were sent more
    than once, as another answer may have arrived. `cause` is why the hub ends a lease that its node holds.
    """

    job_id: str
    lease_id: str
    undelivered: bool = False
    cause: str = ""

    def wants(self, scene: Scene) -> Wants:
        """The job."""
        return Wants(keys={job_key(self.job_id)})

    def decide(self, view: View) -> Decision:
        """Refused: `job_not_found`, `lease_superseded`, `result_conflict`, `not_leased`."""
        job = found(view, self.job_id)
        closed = job.closing(self.lease_id)
        if closed is not None and closed.digest == RELEASED:
            return Decision(Finished(job.id, closed.status))
        if closed is not None:
            raise Refused(Code.RESULT_CONFLICT, f"the lease of job {job.id} was already ended with a result")
        held(job, self.lease_id)
        if self.undelivered and job.sending > 1:
            raise Refused(Code.LEASE_SUPERSEDED, f"the lease of job {job.id} was sent more than once")
        if job.status != "running":  # the hub has ended the lease; said once more, this gets the same answer
            told = close(job, Closed(self.lease_id, RELEASED, job.status))
            return Decision(Finished(job.id, job.status), put=(told.row,))
        return self._give_back(job, view)

    def _give_back(self, job: Job, view: View) -> Decision:
        if self.undelivered:
            job = job.with_(uncounted=job.uncounted + 1)
        happened, back = after_release(job, view.now, view.scene.limits)
        back = close(back, Closed(self.lease_id, RELEASED, back.status))
        actor = "hub" if self.undelivered or self.cause else job.node_id or "client"
        reaped = {"node_id": job.node_id, "cause": self.cause} if self.cause else {}
        event = job_event(back, happened, view.now, actor, attempt=job.attempt, reason=back.reason, **reaped)
        answer = Finished(job.id, back.status)
        if self.undelivered:
            return Decision(answer, put=(back.row,), events=(event,))
        kept = noted(view, job, back, "cancelled" if happened == "cancelled" else "released")
        return Decision(answer, kept.new, (kept.job.row, *kept.put), events=(event,))


class Cancelled(msgspec.Struct, frozen=True, gc=False):
    """The job after a cancel: cancelled, or still running with the request on it."""

    job_id: str
    status: str
    cancel_requested: bool


class Cancel(msgspec.Struct, frozen=True, gc=False):
    """Cancel a waiting job at once; ask a running one to stop, and fence it after the grace."""

    job_id: str

    def wants(self, scene: Scene) -> Wants:
        """The job."""
        return Wants(keys={job_key(self.job_id)})

    def decide(self, view: View) -> Decision:
        """Refused: `job_not_found`, `already_finished`. A repeat gets the same answer."""
        job = found(view, self.job_id)
        if job.status in ("pending", "quarantined"):
            done = end(job, "cancelled", view.now, "CANCELLED", root_cause=None)
            event = job_event(done, "cancelled", view.now, "client", reason="CANCELLED")
            return Decision(Cancelled(job.id, "cancelled", False), put=(done.row,), events=(event,))
        if job.status == "cancelled":
            return Decision(Cancelled(job.id, "cancelled", False))
        if job.finished:
            raise Refused(Code.ALREADY_FINISHED, f"job {job.id} is {job.status} already")
        if job.cancel_at:
            return Decision(Cancelled(job.id, "running", True))
        asked = job.with_(cancel_at=view.now + view.scene.limits.cancel_grace_ms)
        event = job_event(asked, "cancel_requested", view.now, "client")
        put = (asked.row, *_told(view, job))
        return Decision(Cancelled(job.id, "running", True), put=put, events=(event,))


def _refuse_by_policy(job: Job, view: View) -> None:
    """Refused with `policy_denied` when the active policy takes no result of this job from its node."""
    judge = view.scene.judge
    if judge.trivial or job.node_id is None:
        return
    row = view.look("node", job.node_id)
    refuse_denied(judge, node_ask("result", job.node_id, node_of(row) if row else None, job.kind, job.source))


def held(job: Job, lease_id: str | None) -> None:
    """The fence. Refused unless this is the last lease of an unfinished job."""
    if lease_id is None:
        raise Refused(Code.NOT_LEASED, f"job {job.id} is {job.status} and held by nobody")
    if job.finished:
        raise Refused(
            Code.LEASE_SUPERSEDED, f"job {job.id} is {job.status} after attempt {job.attempt}; this lease has ended"
        )
    if job.lease_id != lease_id:
        raise Refused(
            Code.LEASE_SUPERSEDED,
            f"this is not the last lease of job {job.id} (attempt {job.attempt}): it has ended, or is another job's",
        )


def close(job: Job, closed: Closed) -> Job:
    """The job with one more ended lease on record."""
    return job.with_(closed=(*job.closed, closed)[-CLOSED_KEPT:])


def error_type(error: bytes) -> str | None:
    """The `type` of an error object, at most 100 characters."""
    try:
        return msgspec.json.decode(error, type=_ErrorBody).type[:100] or None
    except msgspec.DecodeError:
        return None


def _told(view: View, job: Job) -> tuple[Row, ...]:
    """The holder's row with this job on the list that its next heartbeat is answered with."""
    row = view.row("node", job.node_id) if job.node_id else None
    if row is None:
        return ()
    node = node_of(row)
    told = msgspec.structs.replace(node, cancel=(*node.cancel, job.id)[-1000:])
    return (told.row(row.due_at if row.agenda else None),)


class _ErrorBody(msgspec.Struct):
    type: str = ""


class _ResultBody(msgspec.Struct):
    artifact_path: str | None = None


def _artifact_path(result: bytes) -> str | None:
    if b'"artifact_path"' not in result:
        return None
    try:
        return msgspec.json.decode(result, type=_ResultBody).artifact_path
    except msgspec.DecodeError:
        return None
