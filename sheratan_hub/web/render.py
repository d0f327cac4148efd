"""What clients get: the successful answers of both planes, as JSON."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sheratan_hub.canonical import Raw
from sheratan_hub.clock import rfc3339
from sheratan_hub.rules.attestation import Attested, Claim
from sheratan_hub.rules.jobs import FINISHED, TRANSITIONS, Job
from sheratan_hub.rules.nodes import Node, State, health_of
from sheratan_hub.rules.pull import Pulled
from sheratan_hub.rules.redrive import Redriven
from sheratan_hub.rules.submit import Submitted
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.history import AttemptAnswer, History, LateAnswer

_encode = msgspec.json.Encoder().encode


def reply(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """A successful answer; `body` is a struct or a dict that carries `ok: true`."""
    return Answer(status, _encode(body), headers=headers)


Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
JobStatus = Annotated[
    str, Meta(extra_json_schema={"enum": sorted({*(status for status, _ in TRANSITIONS), *FINISHED, "throttled"})})
]
SubmitStatus = Annotated[
    str, Meta(extra_json_schema={"enum": ["accepted", "in_progress", "quarantined", *sorted(FINISHED)]})
]


class SubmitAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a submit is told."""

    ok: bool
    request_id: str
    job_id: str
    dedup: bool
    status: SubmitStatus
    result: Raw | msgspec.UnsetType = msgspec.UNSET
    error: Raw | msgspec.UnsetType = msgspec.UNSET
    result_truncated: bool = False


class JobAnswer(msgspec.Struct, frozen=True):
    """A job in any answer: one flat object."""

    ok: bool | msgspec.UnsetType
    job_id: str
    status: JobStatus
    kind: str
    params: Raw
    priority: int
    source: str | None
    mission_id: str | None
    task_id: str | None
    attempt: int
    failures: int
    losses: int
    node_id: str | None
    result: Raw
    error: Raw
    reason: str | None
    late_results: int
    created_at: Time
    started_at: Time | None
    finished_at: Time | None
    not_before: Time | None
    lost_on: tuple[str, ...]
    redrives: int
    root_cause: str | None
    depends_on_left: int
    attempts: list[AttemptAnswer] | msgspec.UnsetType = msgspec.UNSET
    late: list[LateAnswer] | msgspec.UnsetType = msgspec.UNSET


class LeaseAnswer(msgspec.Struct, frozen=True):
    """A leased job, as its worker needs it."""

    job_id: str
    kind: str
    params: Raw
    lease_id: str
    lease_seconds: float
    attempt: int
    failures: int
    losses: int
    timeout_seconds: float
    priority: int
    mission_id: str | None
    task_id: str | None
    traceparent: str | None
    delivery: str | msgspec.UnsetType = msgspec.UNSET


def submitted(done: Submitted, request_id: str, cached_bytes: int) -> SubmitAnswer:
    """`request_id` is this request's own; a result above `cached_bytes` is left out and said to be."""
    job = done.job
    if not done.dedup:
        return SubmitAnswer(True, request_id, job.id, False, "accepted")
    if not job.finished:
        status = "quarantined" if job.status == "quarantined" else "in_progress"
        return SubmitAnswer(True, request_id, job.id, True, status)
    value = job.result if job.status == "completed" else job.error
    if len(bytes(value)) > cached_bytes:
        return SubmitAnswer(True, request_id, job.id, done.dedup, job.status, result_truncated=True)
    if job.status == "completed":
        return SubmitAnswer(True, request_id, job.id, done.dedup, job.status, result=value)
    return SubmitAnswer(True, request_id, job.id, done.dedup, job.status, error=value)


def status_of(job: Job, throttled: Collection[str]) -> str:
    """A job's state as clients see it: `throttled` while it could be leased but for its source (design rule 10)."""
    if job.status == "pending" and job.source in throttled and not job.waiting:
        return "throttled"
    return job.status


def job_answer(
    job: Job,
    params: Mapping[str, bytes],
    *,
    alone: bool = False,
    throttled: Collection[str] = (),
    history: History | None = None,
) -> JobAnswer:
    """The job as clients see it; `alone`: it is the whole answer, so it carries `ok`. With its `history` if given."""
    return JobAnswer(
        True if alone else msgspec.UNSET,
        job.id,
        status_of(job, throttled),
        job.kind,
        Raw(params.get(job.id, b"null")) if job.params_apart else job.params,
        job.priority,
        job.source or None,
        job.mission_id,
        job.task_id,
        job.attempt,
        job.failures,
        job.losses,
        job.node_id,
        job.result,
        job.error,
        job.reason,
        job.late_results,
        rfc3339(job.created_at),
        rfc3339(job.started_at) if job.started_at else None,
        rfc3339(job.finished_at) if job.finished_at else None,
        rfc3339(job.not_before) if job.not_before else None,
        job.lost_on,
        job.redrives,
        job.root_cause,
        job.parents_left,
        history.attempts if history else msgspec.UNSET,
        history.late if history else msgspec.UNSET,
    )


def redriven_answer(done: Redriven) -> dict[str, Any]:
    """What a redrive is told; `redriven` is false when the job was unfinished already."""
    at = rfc3339(done.not_before) if done.not_before else None
    told = {"ok": True, "job_id": done.job_id, "status": done.status, "redriven": done.changed}
    return {**told, "redrives": done.redrives, "not_before": at}


def pulled(done: Pulled, defer_ms: int, now: int, **also: Any) -> dict[str, Any]:
    """What a pull is told; `also` is what else its request is told.

    `defer_ms` only when there is nothing to do. A lease that is sent again is told what is left of it.
    """
    params = dict(done.params)
    answer = {"ok": True, **also, "jobs": [_lease(job, params, now) for job in done.jobs]}
    return answer if done.jobs else {**answer, "defer_ms": defer_ms, "reason": done.reason or "no_job"}


def _lease(job: Job, params: Mapping[str, bytes], now: int) -> LeaseAnswer:
    left_ms = job.lease_ms if job.sending == 1 else max(0, job.lease_until - now)
    return LeaseAnswer(
        job.id,
        job.kind,
        Raw(params.get(job.id, b"null")) if job.params_apart else job.params,
        job.lease_id or "",
        left_ms / 1000,
        job.attempt,
        job.failures,
        job.losses,
        job.timeout_ms / 1000,
        job.priority,
        job.mission_id,
        job.task_id,
        job.traceparent,
        "at_most_once" if job.at_most_once else msgspec.UNSET,
    )


def node_answer(node: Node, state: State) -> dict[str, Any]:
    """A node as the registry and the lists show it, in the state that it has now."""
    return {
        "node_id": node.id,
        "status": state,
        "health": health_of(node),
        "reported_health": node.health,
        "reported_status": node.status,
        "first_seen": rfc3339(node.first_seen),
        "last_seen": rfc3339(node.last_seen),
        "zone": node.zone,
        "capabilities": list(node.capabilities),
        "current_jobs": node.current_jobs,
        "max_concurrent": node.max_concurrent,
        "boot_id": node.boot_id,
        "endpoint": node.endpoint,
        "labels": node.labels,
        "draining": node.draining,
        "drain_until": rfc3339(node.drain_until) if node.drain_until else None,
        "clock_skew_seconds": None if node.skew_ms is None else node.skew_ms / 1000,
        "attestation": attestation_answer(node.attested),
    }


def attestation_answer(attested: Attested) -> dict[str, Any]:
    """A node's attestation as the registry shows it."""
    return {
        "status": attested.status,
        "first_seen": claim_answer(attested.first_seen),
        "last_seen": claim_answer(attested.last_seen),
        "drift_count": attested.drift_count,
        "spoof_count": attested.spoof_count,
    }


def claim_answer(claim: Claim | None) -> dict[str, Any] | None:
    """What a node said of itself, and when."""
    if claim is None:
        return None
    return {
        "build_id": claim.build_id,
        "capability_hash": claim.capability_hash,
        "runtime": claim.runtime,
        "ts": rfc3339(claim.ts),
    }


def rfc3339_or_none(ms: int) -> str | None:
    """A moment as clients see it; 0 is none."""
    return rfc3339(ms) if ms else None


def listed(name: str, rows: Iterable[Any], next_cursor: str | None) -> Answer:
    """A page of a list; it may be short or empty and still carry a cursor."""
    return reply({"ok": True, name: list(rows), "next_cursor": next_cursor})
