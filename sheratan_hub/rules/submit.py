"""Submitting a job: depth limit, idempotency key, the new job (design rules 8 and 9)."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal

import msgspec

from sheratan_hub.canonical import NULL, Raw
from sheratan_hub.rules.command import Code, Decision, Event, Quota, Refused, Scene
from sheratan_hub.rules.edges import after_parents, deferred, link, told, unknown
from sheratan_hub.rules.jobs import APART_BYTES, Job, OnFailure, job_event, job_of
from sheratan_hub.rules.limits import RATES, admit
from sheratan_hub.rules.policies import refuse_denied, submit_ask
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row, Wants


class KeyDoc(msgspec.Struct, frozen=True, array_like=True):
    """What an idempotency key is bound to: a job, and the digest of the payload it came with."""

    job_id: str
    payload_sha256: str


class Submitted(msgspec.Struct, frozen=True, gc=False):
    """The job that a submit made, or that its key already named (`dedup`); what its source may still submit."""

    job: Job
    dedup: bool
    quota: Quota | None = None


class Submit(msgspec.Struct, frozen=True, gc=False):
    """Make a job, or find the one that the idempotency key already names.

    `params` is a JSON text; `payload_sha256` is needed with a `key`. A delay or expiry counts from now, in ms.
    `not_before` is ms since 1970. None for `max_retries` means the configured default. `depends_on` names jobs, each
    once; `later`: they are linked after this, and were looked for before it (`unknown` is one that was not found).
    `dependents`: others of the same batch will depend on it.
    """

    job_id: str
    kind: str
    params: bytes = b"null"
    key: str | None = None
    payload_sha256: str = ""
    source: str = ""
    mission_id: str | None = None
    task_id: str | None = None
    priority: int = 2
    timeout_ms: int = 300_000
    max_retries: int | None = None
    backoff: Literal["exponential", "linear"] = "exponential"
    needs: tuple[str, ...] = ()
    not_before: int = 0
    delay_ms: int = 0
    expires_in_ms: int = 0
    at_most_once: bool = False
    traceparent: str | None = None
    depends_on: tuple[str, ...] = ()
    on_dependency_failure: OnFailure = "cancel"
    later: bool = False
    unknown: str | None = None
    dependents: bool = False

    def wants(self, scene: Scene) -> Wants:
        """The depth, and the key's row."""
        if self.key is None:
            return DEPTH_AND_RATES if self.source else DEPTH
        look = {RATES} if self.source else set()
        return Wants(keys={Key("key", key_id(self.key))}, look=look, counts=set(DEPTH.counts))

    def decide(self, view: View) -> Decision:
        """A new job, or the one known.

        Refused: `idempotency_key_collision`, `queue_full`, `rate_limited`, `unknown_dependency`,
        `policy_denied`.
        """
        judge = view.scene.judge
        if not judge.trivial:
            refuse_denied(judge, submit_ask(self.kind, self.source, self.needs))
        if self.key is None:
            return self._make(view)
        held = view.row("key", key_id(self.key))
        known = _known(view, held)
        if known is None:
            return self._make(view, KeyDoc(self.job_id, self.payload_sha256), held)
        job, doc = known
        if doc.payload_sha256 != self.payload_sha256:
            raise Refused(
                Code.IDEMPOTENCY_KEY_COLLISION,
                f"this idempotency key already belongs to job {job.id}, which has another payload",
                detail={"job_id": job.id, "key": key_hint(self.key)},
            )
        note = Event(view.now, "key.hit", "client", job.id, meta={"key": key_hint(self.key)})
        return Decision(Submitted(job, dedup=True), notes=(note,))

    def _make(self, view: View, doc: KeyDoc | None = None, held: Row | None = None) -> Decision:
        refuse_when_full(view)
        admitted = admit(view, self.source) if self.source else None
        job = self._job(view)
        new = [job.row]
        if job.params_apart:
            new.append(Row("params", job.id, self.params))
        put: tuple[Row, ...] = ()
        if doc is not None and self.key is not None:
            row = Row("key", key_id(self.key), _encode(doc))
            put = (row,) if held is not None else ()
            new += [row] if held is None else []
        quota = None
        if admitted is not None:
            row, fresh, quota = admitted
            new += [row] if fresh else []
            put += () if fresh else (row,)
        actor = job.source or "client"
        event = job_event(job, "submitted", view.now, actor, kind=job.kind, mission_id=job.mission_id)
        made = Decision(Submitted(job, dedup=False, quota=quota), new=tuple(new), put=put, events=(event,))
        return self._tied(view, job, made) if self.depends_on or self.dependents else made

    def _tied(self, view: View, job: Job, made: Decision) -> Decision:
        """The same with the edges to what it depends on (rule 7)."""
        job = job.with_(
            on_dependency_failure=self.on_dependency_failure,
            parents_left=len(self.depends_on),
            dependents=self.dependents,
        )
        new, put, events = made.new[1:], made.put, made.events
        if self.later:
            if self.unknown is not None:
                raise unknown(self.unknown)
            new += deferred(job, self.depends_on, view.now)
        elif self.depends_on:
            linked = link(view, job, self.depends_on)
            job, happened = after_parents(job, linked.parents, view.now)
            new, put = new + linked.new, put + linked.put
            if happened is not None and happened != "unblocked":
                events += (told(job, happened, view.now),)
        answer = msgspec.structs.replace(made.answer, job=job)
        return Decision(answer, new=(job.row, *new), put=put, events=events)

    def _job(self, view: View) -> Job:
        now, limits = view.now, view.scene.limits
        start = max(self.not_before, now + self.delay_ms)
        apart = len(self.params) > APART_BYTES
        waiting = start > now
        job = Job(  # by place, in the order of its fields: by name it takes five times as long
            self.job_id,
            self.kind,
            now,
            view.scene.order_at(start) if waiting else view.next_order(),
            NULL if apart else Raw(self.params),
            apart,
            "pending",
            self.priority,
            self.source,
            self.mission_id,
            self.task_id,
            self.needs,
            self.timeout_ms,
            limits.max_retries if self.max_retries is None else self.max_retries,
            self.backoff,
            self.at_most_once,
            start if waiting else 0,
            now + self.expires_in_ms if self.expires_in_ms else 0,
            0 if self.expires_in_ms else limits.item_ttl_ms,
            start,
            waiting,
        )
        if waiting and start == now + self.delay_ms:
            job = job.with_(delay_ms=self.delay_ms)
        if self.key is None and self.traceparent is None:
            return job
        return job.with_(traceparent=self.traceparent, key=None if self.key is None else key_id(self.key))


def refuse_when_full(view: View) -> None:
    """Refused with `queue_full` when the jobs that nobody holds have reached the configured depth."""
    limit = view.scene.limits.max_depth
    if view.count("job:pending") + view.count("job:quarantined") >= limit:
        raise queue_full(limit)


def queue_full(limit: int) -> Refused:
    """The refusal of a submit when so many jobs wait."""
    return Refused(
        Code.QUEUE_FULL,
        f"the queue holds {limit} waiting jobs, which is its limit; try again later",
        reason="max_queue_depth",
        retry_after_ms=1000,
    )


def _known(view: View, held: Row | None) -> tuple[Job, KeyDoc] | None:
    """The job that a key still names: while it lives, and for the key's time after its end."""
    if held is None:
        return None
    doc = _decode(held.doc)
    row = view.row("job", doc.job_id)
    if row is None:
        return None
    job = job_of(row)
    if job.finished and job.finished_at + view.scene.limits.key_ttl_ms <= view.now:
        return None
    return job, doc


def named_job(held: Row) -> str:
    """The id of the job that a key's row is bound to."""
    return _decode(held.doc).job_id


@lru_cache(512)
def key_id(key: str) -> str:
    """The row id of an idempotency key: a digest, so that any length fits and the key itself is not stored."""
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def key_hint(key: str) -> str:
    """What the audit log may show of a key: its beginning, never more than 8 characters, never the whole."""
    return key[: min(8, len(key) // 2)]


DEPTH = Wants(counts={"job:pending", "job:quarantined"})
"""What a submit without a key wants."""

DEPTH_AND_RATES = Wants(look={RATES}, counts=set(DEPTH.counts))
"""The same with a source, which may be limited."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(KeyDoc).decode
