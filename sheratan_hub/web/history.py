"""What became of a job's attempts, as clients see it: those that failed, and results that came too late."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from sheratan_hub.canonical import Raw
from sheratan_hub.clock import rfc3339
from sheratan_hub.hub import Hub
from sheratan_hub.rules.attempts import Tried, attempts_key, attempts_of
from sheratan_hub.rules.evidence import Late, evidence_of, late_key
from sheratan_hub.rules.jobs import Job


class AttemptAnswer(msgspec.Struct, frozen=True):
    """An attempt that did not complete its job."""

    attempt: int
    node_id: str | None
    outcome: str
    error: Raw
    at: str


class LateAnswer(msgspec.Struct, frozen=True):
    """A result that came when its lease was over; `result` only if it was small enough to keep."""

    attempt: int
    node_id: str | None
    ok: bool
    sha256: str
    size_bytes: int
    diverged: bool | None
    at: str
    result: Raw | msgspec.UnsetType = msgspec.UNSET
    error: Raw | msgspec.UnsetType = msgspec.UNSET


class History(NamedTuple):
    """Both, oldest first."""

    attempts: list[AttemptAnswer]
    late: list[LateAnswer]


async def histories(hub: Hub, jobs: Iterable[Job]) -> dict[str, History]:
    """Each job's history by its id. Jobs without one cost nothing; the others one read for all."""
    jobs = list(jobs)
    keys = [attempts_key(job.id) for job in jobs if job.tried]
    keys += [late_key(job.id) for job in jobs if job.late_results]
    rows = {row.key: row for row in await hub.fetch(keys)} if keys else {}
    return {
        job.id: History(
            [_attempt(one) for one in attempts_of(rows.get(attempts_key(job.id)))],
            [_late(one) for one in evidence_of(rows.get(late_key(job.id))).late],
        )
        for job in jobs
    }


def _attempt(one: Tried) -> AttemptAnswer:
    return AttemptAnswer(one.attempt, one.node_id, one.outcome, one.error, rfc3339(one.at))


def _late(one: Late) -> LateAnswer:
    at = rfc3339(one.at)
    return LateAnswer(
        one.attempt, one.node_id, one.ok, one.sha256, one.size_bytes, one.diverged, at, one.result, one.error
    )
