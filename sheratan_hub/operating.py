"""The verbs of operators, and of missions: the part of `HubClient` that a producer or a worker seldom needs.

What stands under `/admin` is refused unless the hub is on this machine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import msgspec

from sheratan_hub.answers import Job, JobPage, json_text
from sheratan_hub.answers_admin import (
    CancelledMission,
    CancelledSome,
    LedgerEvent,
    LedgerPage,
    Mission,
    MissionPage,
    Pause,
    Pauses,
    Purged,
    Queue,
    RateLimit,
    Redriven,
    RedrivenMission,
    RedrivenPage,
    RedrivenSome,
    RefusedJob,
    SubmittedMission,
)
from sheratan_hub.merging import outcome_of
from sheratan_hub.paging import pages
from sheratan_hub.tracing import Tracing
from sheratan_hub.transport import Plane, Request, Transport

T = TypeVar("T")


class Operating:
    """What `HubClient` inherits."""

    _hub: Transport
    _tracing: Tracing | None

    # missions

    async def submit_mission(
        self,
        title: str,
        jobs: Iterable[Mapping[str, object]] = (),
        *,
        metadata: Mapping[str, object] | None = None,
        idempotency_key: str | None = None,
    ) -> SubmittedMission:
        """Hand in a titled graph of jobs, all or none, in one request.

        Jobs are bodies as `POST /api/jobs` takes them, without `mission_id`; one names others in its `depends_on` by
        their `ref`. Without a key one is drawn, so that a repeated request makes one mission.
        """
        body = {"title": title, "jobs": [dict(job) for job in jobs], "metadata": metadata}
        body["idempotency_key"] = idempotency_key or self._hub.clock.secret()
        text = json_text({name: value for name, value in body.items() if value is not None})
        request = Request("data", "POST", "/api/missions", text)
        if self._tracing is None:
            return await self._hub.ask(request, SubmittedMission)
        with self._tracing.span("producer", "submit", "") as span:
            request = request._replace(headers={"traceparent": span.traceparent})
            return await self._hub.ask(request, SubmittedMission)

    async def mission(self, mission_id: str) -> Mission:
        """One mission, also one that only single jobs have named."""
        return await self._hub.ask(Request("data", "GET", _path("missions", mission_id)), Mission)

    async def missions(self, *, page: int | None = None) -> AsyncIterator[Mission]:
        """Every mission that was submitted as such, newest first."""
        query = query_of(limit=page)
        async for found in pages(self._hub, "data", "/api/missions", MissionPage, query):
            for one in found.missions:
                yield one

    async def cancel_mission(self, mission_id: str) -> CancelledMission:
        """Cancel every job of it that is not finished."""
        return await self._post("data", f"{_path('missions', mission_id)}/cancel", {}, CancelledMission)

    async def redrive_mission(self, mission_id: str) -> RedrivenMission:
        """Try every job of it again that failed or was cancelled."""
        return await self._post("data", f"{_path('missions', mission_id)}/redrive", {}, RedrivenMission)

    # dead letters

    async def redrive(self, job_id: str, *, dependents: bool = False) -> Redriven:
        """Give a failed or cancelled job another life; with `dependents` also what was cancelled because it failed."""
        return await self._post("data", f"{job_path(job_id)}/redrive", {"dependents": dependents}, Redriven)

    async def dead_letters(
        self,
        *,
        kind: str | None = None,
        source: str | None = None,
        mission_id: str | None = None,
        node_id: str | None = None,
        reason: str | None = None,
        order: Literal["newest", "oldest"] | None = None,
        page: int | None = None,
    ) -> AsyncIterator[Job]:
        """Every failed job that the filters leave, with its attempts, the last submitted first."""
        query = query_of(
            kind=kind, source=source, mission_id=mission_id, node_id=node_id, reason=reason, order=order, limit=page
        )
        async for found in pages(self._hub, "data", "/admin/dlq", JobPage, query):
            for job in found.jobs:
                yield job

    async def redrive_many(
        self,
        job_ids: Sequence[str] | None = None,
        *,
        filter: Mapping[str, str] | None = None,
        limit: int | None = None,
        cursor: str | None = None,
        rate_per_second: float | None = None,
    ) -> RedrivenSome:
        """Redrive jobs by id (up to 1000), or up to `limit` dead letters that a filter means; `{}` means all.

        With a rate they come back one after the other. A filter's request whose answer was lost takes up to `limit`
        more when it is repeated.
        """
        body = {
            "job_ids": job_ids,
            "filter": filter,
            "limit": limit,
            "cursor": cursor,
            "rate_per_second": rate_per_second,
        }
        page = await self._post("data", "/admin/dlq/redrive", body, RedrivenPage)
        jobs = [outcome_of(raw, Redriven, RefusedJob) for raw in page.jobs]
        return RedrivenSome(jobs=jobs, redriven=page.redriven, next_cursor=page.next_cursor)

    # the queue as a whole

    async def queue(self) -> Queue:
        """How full it is, what waits longest, what is paused."""
        return await self._hub.ask(Request("data", "GET", "/admin/queue"), Queue)

    async def pause(
        self,
        kind: str | None = None,
        *,
        seconds: float | None = None,
        until: str | None = None,
        reason: str | None = None,
    ) -> list[Pause]:
        """Have jobs of a kind, or all, not leased until it is resumed or its time is over; what is paused then."""
        body = {"kind": kind, "seconds": seconds, "until": until, "reason": reason}
        return (await self._post("data", "/admin/pause", body, Pauses)).pauses

    async def resume(self, kind: str | None = None) -> list[Pause]:
        """End the pause of a kind, or every pause; those that still hold."""
        return (await self._post("data", "/admin/resume", {"kind": kind}, Pauses)).pauses

    async def purge(
        self,
        filter: Mapping[str, object],
        *,
        dry_run: bool = False,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Purged:
        """Cancel the waiting jobs that a filter means; `{}` means all. A dry run only counts them."""
        body = {"filter": filter, "dry_run": dry_run, "limit": limit, "cursor": cursor}
        return await self._post("data", "/admin/purge", body, Purged)

    async def cancel_many(
        self,
        job_ids: Sequence[str] | None = None,
        *,
        filter: Mapping[str, object] | None = None,
        dry_run: bool = False,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> CancelledSome:
        """Cancel unfinished jobs by id (up to 1000) or by filter; `{}` means all. A dry run only counts them."""
        body = {"job_ids": job_ids, "filter": filter, "dry_run": dry_run, "limit": limit, "cursor": cursor}
        return await self._post("data", "/admin/cancel", body, CancelledSome)

    # rate limits

    async def rate_limit(self, source: str) -> RateLimit:
        """The limit in force. Raises HubRefused with `rate_limit_not_found` when there is none."""
        return await self._hub.ask(Request("data", "GET", _limit_path(source)), RateLimit)

    async def set_rate_limit(
        self, source: str, *, per_minute: int | None = None, concurrent: int | None = None
    ) -> RateLimit:
        """Limit a source, from now on and after a restart; 0 is without that limit, None the hub's default."""
        given = {"per_minute": per_minute, "concurrent": concurrent}
        text = msgspec.json.encode({name: value for name, value in given.items() if value is not None})
        return await self._hub.ask(Request("data", "PUT", _limit_path(source), text), RateLimit)

    async def drop_rate_limit(self, source: str) -> RateLimit:
        """Forget what was set at run time; what is configured counts again."""
        return await self._hub.ask(Request("data", "DELETE", _limit_path(source)), RateLimit)

    # the ledger

    async def ledger(
        self, *, after: int = 0, job_id: str | None = None, page: int | None = None
    ) -> AsyncIterator[LedgerEvent]:
        """Every transition after the event number `after`, in order, up to the last there is; of one job if asked."""
        query = query_of(after=after, job_id=job_id, limit=page)
        async for found in pages(self._hub, "data", "/api/ledger", LedgerPage, query, "after"):
            for event in found.events:
                yield event

    # what every verb is made of

    async def _get(self, plane: Plane, path: str, **query: str) -> dict[str, Any]:
        return await self._hub.ask(Request(plane, "GET", path, query=query), dict)

    async def _post(
        self, plane: Plane, path: str, body: Mapping[str, object], answer: type[T], wait_seconds: float = 0
    ) -> T:
        given = {name: value for name, value in body.items() if value is not None}
        text = msgspec.json.encode(given)
        return await self._hub.ask(Request(plane, "POST", path, text, wait_seconds=wait_seconds), answer)


def job_path(job_id: str) -> str:
    """The path of one job."""
    return _path("jobs", job_id)


def query_of(**values: object) -> dict[str, str]:
    """What is given, as a query."""
    return {name: str(value) for name, value in values.items() if value is not None}


def _path(noun: str, name: str) -> str:
    return f"/api/{noun}/{quote(name, safe='')}"


def _limit_path(source: str) -> str:
    return f"/admin/rate-limits/{quote(source, safe='')}"
