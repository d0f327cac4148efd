"""`HubClient`: every verb of the hub as a typed coroutine that can be repeated blindly, and repeats itself.

Longer than 300 lines because it is one class with one method for each route.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import msgspec

from sheratan_hub.answers import (
    Accepted,
    Beat,
    Cancelled,
    Envelope,
    Explained,
    Extended,
    Integrity,
    Job,
    JobPage,
    Lease,
    Node,
    NodePage,
    Pulled,
    Refusal,
    Report,
    Submitted,
    Taken,
    json_text,
)
from sheratan_hub.canonical import Raw, result_sha256, result_sig
from sheratan_hub.clock import Clock, SystemClock
from sheratan_hub.merging import ENTRY_AT_FAULT, Merger, Of, chunks, groups_of, outcomes_of, packs, request_of
from sheratan_hub.operating import Operating, job_path, query_of
from sheratan_hub.paging import pages
from sheratan_hub.tracing import Tracing, traceparent_of
from sheratan_hub.transport import HubRefused, HubUnreachable, Plane, Request, Transport, client_tls

__all__ = [
    "Accepted",
    "Beat",
    "Cancelled",
    "Explained",
    "Extended",
    "HubClient",
    "HubRefused",
    "HubUnreachable",
    "Job",
    "Lease",
    "Node",
    "Pulled",
    "Refusal",
    "Report",
    "Submitted",
    "client_tls",
]

CONTROL_URL = "http://127.0.0.1:8787"
DATA_URL = "http://127.0.0.1:8788"
NO_ROOM = frozenset({429, 503})

T = TypeVar("T")


class HubClient(Operating):
    """A hub's client: `async with HubClient(token=...) as hub: await hub.submit("text.stats", {...})`.

    Lost connections, cut answers, 429 and 503 are tried again with full jitter and Retry-After, for up to
    `patience_seconds` a call (0: one try). Every method raises `HubRefused` when the hub says no and
    `HubUnreachable` when no answer came in time. `connections` bounds the pool; `answer_seconds` is how long an
    answer may take beyond what a long poll waits on purpose; `hmac_key` signs results; `tls` is for a hub
    whose certificate the system does not know, or that asks for one (see `client_tls`). `token_file` is read again when
    the hub takes the token no longer, or by `reload_token`. `tracing` makes a span of each submit,
    and the job a part of its trace (see `sheratan_hub.tracing`).

    Any number of tasks may share one client. Calls of `submit`, and of `complete` and `fail`, that are made while
    others are under way travel as one request; each still has its own outcome.
    """

    def __init__(
        self,
        control_url: str = CONTROL_URL,
        data_url: str = DATA_URL,
        token: str | None = None,
        *,
        clock: Clock | None = None,
        patience_seconds: float = 30.0,
        backoff_base_ms: float = 100.0,
        backoff_cap_ms: float = 5000.0,
        answer_seconds: float = 30.0,
        connections: int = 32,
        hmac_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        token_file: str | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        self._clock = clock or SystemClock()
        self._hmac_key = hmac_key
        self._hub = Transport(
            {"control": control_url, "data": data_url},
            token,
            self._clock,
            patience_seconds=patience_seconds,
            backoff_base_ms=backoff_base_ms,
            backoff_cap_ms=backoff_cap_ms,
            answer_seconds=answer_seconds,
            connections=connections,
            tls=tls,
            token_file=token_file,
        )
        self._submits = Merger(self._hub, "jobs", Submitted)
        self._reports = Merger(self._hub, "results", Accepted)

    def __repr__(self) -> str:
        return f"HubClient({self._hub!r})"

    async def __aenter__(self) -> HubClient:
        await self._hub.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._submits.close()
        await self._reports.close()
        await self._hub.__aexit__(kind, error, trace)

    def reload_token(self) -> bool:
        """Read `token_file` again; whether it held another token, which is used from now on."""
        return self._hub.reload_token()

    async def call(
        self,
        plane: Plane,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Any route, by hand: the answer as it stands. The path must be quoted."""
        text = None if body is None else json_text(body)
        return await self._hub.ask(Request(plane, method, path, text, headers=headers or {}), dict)

    async def text(self, plane: Plane, path: str) -> str:
        """What a GET answers that is no JSON, such as /metrics."""
        return await self._hub.ask(Request(plane, "GET", path), str)

    async def submit(
        self,
        kind: str,
        params: Mapping[str, object] | None = None,
        *,
        idempotency_key: str | None = None,
        source: str | None = None,
        mission_id: str | None = None,
        task_id: str | None = None,
        priority: int | str | None = None,
        timeout_seconds: float | None = None,
        max_retries: int | None = None,
        retry_backoff: Literal["exponential", "linear"] | None = None,
        required_capabilities: Sequence[str] | None = None,
        not_before: str | None = None,
        delay_seconds: float | None = None,
        expires_in_seconds: float | None = None,
        delivery: Literal["at_least_once", "at_most_once"] | None = None,
        depends_on: Sequence[str] | None = None,
        on_dependency_failure: Literal["cancel", "hold", "run"] | None = None,
        traceparent: str | None = None,
    ) -> Submitted:
        """Hand in one job; what is left out is the hub's default. Without a key one is drawn, so that a repeated
        request makes one job. `depends_on` are ids of jobs. `traceparent` (W3C) is of the span that this belongs to;
        with `tracing` it is found out. Raises ValueError or TypeError for params that JSON can't hold."""
        given = {name: value for name, value in locals().items() if name != "self" and value is not None}
        if self._tracing is None:
            return await self._submit(given)
        with self._tracing.span("producer", "submit", kind, parent=traceparent_of(traceparent)) as span:
            done = await self._submit({**given, "traceparent": span.traceparent})
            span.set(job_id=done.job_id)
            return done

    async def _submit(self, job: Mapping[str, object]) -> Submitted:
        body = self._keyed(job)
        return await self._submits.send(body, partial(Request, "data", "POST", "/api/jobs", body))

    async def submit_many(
        self, jobs: Iterable[Mapping[str, object]], *, atomic: bool = False
    ) -> list[Submitted | Refusal]:
        """Hand in many jobs (bodies as `POST /api/jobs` takes them), one outcome each, in order.

        They travel in chunks of up to 500, but those that name each other by `ref` stay together; entries the hub has
        no room for are offered again while patience lasts. What it refuses is a `Refusal` at that place; only what
        concerns the whole call (a wrong token, no hub) is raised. Repeating the call is safe for jobs that bring an
        `idempotency_key`.

        `atomic` makes all or none, in one request: whatever is refused is raised.
        """
        given = list(jobs)
        if self._tracing is None:
            return await self._submit_all(given, atomic)
        with self._tracing.span("producer", "submit", _one_of({str(job.get("kind")) for job in given})) as span:
            span.set(count=len(given))
            return await self._submit_all([{"traceparent": span.traceparent, **job} for job in given], atomic)

    async def _submit_all(self, given: list[Mapping[str, object]], atomic: bool) -> list[Submitted | Refusal]:
        bodies = [self._keyed(job) for job in given]
        if atomic:
            envelope = await self._hub.ask(request_of("jobs", bodies, b',"atomic":true'), Envelope)
            return outcomes_of(envelope, "jobs", len(bodies), Submitted)
        return await self._submit_groups(groups_of(given), bodies)

    async def _submit_groups(self, left: list[list[int]], bodies: list[bytes]) -> list[Submitted | Refusal]:
        """Send groups until each entry has found room or patience has run out.

        A group is offered again as a whole, as its members are known to each other in one request only; who got room
        before keeps the first outcome.
        """
        outcomes: dict[int, Submitted | Refusal] = {}
        until, tries = self._hub.deadline(), 0
        while True:
            for pack in packs(left, bodies):
                sent = await self._send_batch("jobs", pack, bodies, Submitted, until)
                outcomes.update((i, outcome) for i, outcome in sent.items() if _is_news(outcomes.get(i)))
            left = [group for group in left if any(_has_no_room(outcomes[i]) for i in group)]
            pause = self._hub.pause(tries)
            if not left or self._clock.now() + pause > until:
                return [outcomes[i] for i in range(len(bodies))]
            await self._clock.sleep(pause)
            tries += 1

    async def _send_batch(
        self, of: Of, groups: list[list[int]], bodies: list[bytes], answer: type[T], until: float
    ) -> dict[int, T | Refusal]:
        """The outcome of each place. If one entry is at fault, the batch is halved until its group is alone."""
        places = [i for group in groups for i in group]
        try:
            envelope = await self._hub.ask(request_of(of, [bodies[i] for i in places]), Envelope, until)
        except HubRefused as no:
            if no.status in ENTRY_AT_FAULT and len(groups) > 1:
                half = len(groups) // 2
                first = await self._send_batch(of, groups[:half], bodies, answer, until)
                return first | await self._send_batch(of, groups[half:], bodies, answer, until)
            if no.status in ENTRY_AT_FAULT | NO_ROOM:
                return dict.fromkeys(places, Refusal(code=no.code, status=no.status, detail=no.detail))
            raise
        return dict(zip(places, outcomes_of(envelope, of, len(places), answer), strict=True))

    def _keyed(self, job: Mapping[str, object]) -> bytes:
        if job.get("idempotency_key") is not None:
            return json_text(job)
        return json_text({**job, "idempotency_key": self._clock.secret()})

    async def pull(
        self,
        node_id: str,
        *,
        max: int = 1,
        wait_seconds: float = 0,
        pull_id: str | None = None,
        capabilities: Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
    ) -> Pulled:
        """Lease up to `max` (1-100) jobs, waiting up to `wait_seconds` (0-30) for the first.

        One `pull_id` is drawn for the call and kept for its repeats: a lost answer costs nothing. Give your own
        to get the same leases again after a restart, while they live.
        """
        named = {name: value for name, value in locals().items() if name != "self"}
        return await self._post("data", "/api/jobs/pull", self._identified(named), Pulled, wait_seconds)

    def _identified(self, pull: Mapping[str, object]) -> dict[str, object]:
        return {**pull, "pull_id": pull.get("pull_id") or self._clock.secret()}

    async def complete(self, job_id: str, lease_id: str, node_id: str, result: object = None) -> Accepted:
        """Report success with a JSON-able `result`."""
        text = Raw(json_text(result))
        return await self._report(Report(job_id=job_id, lease_id=lease_id, node_id=node_id, ok=True, result=text))

    async def fail(
        self,
        job_id: str,
        lease_id: str,
        node_id: str,
        error: object = None,
        *,
        retry: bool | None = None,
        retry_after_seconds: float | None = None,
    ) -> Accepted:
        """Report a failure with a JSON-able `error`; `retry=False` ends the job."""
        return await self._report(
            Report(
                job_id=job_id,
                lease_id=lease_id,
                node_id=node_id,
                ok=False,
                error=Raw(json_text(error)),
                retry=retry,
                retry_after_seconds=retry_after_seconds,
            )
        )

    async def _report(self, report: Report) -> Accepted:
        fields = _fields(self._sealed(report))
        return await self._reports.send(msgspec.json.encode(fields), partial(_alone, fields))

    async def results(self, reports: Sequence[Report]) -> list[Accepted | Refusal]:
        """Report many jobs' ends, one outcome each, in order; in chunks of up to 500."""
        return await self._send_reports(self._report_bodies(reports), self._hub.deadline())

    def _report_bodies(self, reports: Sequence[Report]) -> list[bytes]:
        return [msgspec.json.encode(_fields(self._sealed(report))) for report in reports]

    async def _send_reports(self, bodies: list[bytes], until: float) -> list[Accepted | Refusal]:
        outcomes: list[Accepted | Refusal] = []
        for pack in packs([[i] for i in range(len(bodies))], bodies):
            outcomes += (await self._send_batch("results", pack, bodies, Accepted, until)).values()
        return outcomes

    async def results_and_pull(
        self,
        reports: Sequence[Report],
        node_id: str,
        *,
        max: int = 1,
        wait_seconds: float = 0,
        pull_id: str | None = None,
        capabilities: Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
    ) -> tuple[list[Accepted | Refusal], Pulled]:
        """Report jobs' ends as `results` does, and `pull` in the same request: what ended makes room for what comes.

        A request that is refused for what stands in it is sent again as results alone; then the pull, which may
        be at fault, is answered with nothing.
        """
        named = {name: value for name, value in locals().items() if name not in ("self", "reports")}
        pull = json_text({name: value for name, value in self._identified(named).items() if value is not None})
        bodies, until = self._report_bodies(reports), self._hub.deadline()
        last = [[], *chunks(range(len(bodies)), bodies)][-1]
        done = await self._send_reports(bodies[: len(bodies) - len(last)], until)
        bodies = bodies[len(done) :]
        request = request_of("results", bodies, b',"pull":%b' % pull)._replace(wait_seconds=wait_seconds)
        try:
            taken = await self._hub.ask(request, Taken, until)
        except HubRefused as no:
            if no.status not in ENTRY_AT_FAULT:
                raise
            return done + await self._send_reports(bodies, until), Pulled()
        return done + outcomes_of(Envelope(results=taken.results), "results", len(bodies), Accepted), taken

    def _sealed(self, report: Report) -> Report:
        """The report with its integrity: a SHA-256 always, a signature when there is a key."""
        covered = (report.job_id, report.ok, bytes(report.result), bytes(report.error))
        sha256 = result_sha256(*covered)
        if self._hmac_key:
            seal = Integrity("hmac", sha256, result_sig(self._hmac_key, *covered))
        else:
            seal = Integrity("sha256", sha256)
        return msgspec.structs.replace(report, integrity=seal)

    async def extend(self, job_id: str, lease_id: str, seconds: float | None = None) -> Extended:
        """Let the lease end `seconds` from now (None: the hub's usual time). 409 when it is no longer this one's."""
        body = {"lease_id": lease_id, "seconds": seconds}
        return await self._post("data", f"{job_path(job_id)}/extend", body, Extended)

    async def release(self, job_id: str, lease_id: str) -> None:
        """Give the job back at no cost."""
        await self._post("data", f"{job_path(job_id)}/release", {"lease_id": lease_id}, dict)

    async def cancel(self, job_id: str) -> Cancelled:
        """Cancel a job: a waiting one at once, a running one as soon as its worker hears of it."""
        return await self._post("data", f"{job_path(job_id)}/cancel", {}, Cancelled)

    async def job(self, job_id: str, *, wait_seconds: float = 0) -> Job:
        """One job, as soon as it is finished or `wait_seconds` (0-30) have passed."""
        query = {"wait_seconds": f"{wait_seconds:g}"} if wait_seconds else {}
        return await self._hub.ask(
            Request("data", "GET", job_path(job_id), query=query, wait_seconds=wait_seconds), Job
        )

    async def explain(self, job_id: str) -> Explained:
        """Every reason why the job is not running now."""
        return await self._hub.ask(Request("data", "GET", f"{job_path(job_id)}/explain"), Explained)

    async def jobs(
        self,
        *,
        status: str | None = None,
        kind: str | None = None,
        source: str | None = None,
        mission_id: str | None = None,
        node_id: str | None = None,
        page: int | None = None,
    ) -> AsyncIterator[Job]:
        """Every job that the filters leave, oldest first, fetched `page` at a time while they are read."""
        query = query_of(status=status, kind=kind, source=source, mission_id=mission_id, node_id=node_id, limit=page)
        async for found in pages(self._hub, "data", "/api/jobs", JobPage, query):
            for job in found.jobs:
                yield job

    async def heartbeat(
        self,
        node_id: str,
        *,
        boot_id: str | None = None,
        status: Literal["online", "busy"] | None = None,
        health: Literal["GREEN", "YELLOW", "RED"] | None = None,
        zone: str | None = None,
        capabilities: Sequence[str] | None = None,
        current_jobs: int | None = None,
        max_concurrent: int | None = None,
        endpoint: str | None = None,
        ts_utc: str | None = None,
        attestation: Mapping[str, str] | None = None,
        labels: Mapping[str, object] | None = None,
    ) -> Beat:
        """Check in on the control plane. `labels` are further scalar fields the hub keeps with the node.

        `ts_utc` is the node's own time (RFC 3339): the hub shows how far it is off.
        """
        named = {name: value for name, value in locals().items() if name not in ("self", "labels")}
        return await self._post("control", "/api/hosts/heartbeat", {**(labels or {}), **named}, Beat)

    async def nodes(self) -> list[Node]:
        """Every node the hub knows."""
        found = pages(self._hub, "control", "/api/hosts", NodePage, {})
        return [node async for page in found for node in page.nodes]

    async def node(self, node_id: str) -> dict[str, Any]:
        """One node, with the history of what it attested."""
        return await self._get("control", _node_path(node_id))

    async def drain_node(
        self, node_id: str, *, seconds: float | None = None, until: str | None = None
    ) -> dict[str, Any]:
        """Lease nothing more to the node; when the deadline has passed, what it holds goes to others."""
        body = {"seconds": seconds, "until": until}
        return await self._post("control", f"{_node_path(node_id)}/drain", body, dict[str, Any])

    async def resume_node(self, node_id: str) -> dict[str, Any]:
        """Take a drained node back."""
        return await self._post("control", f"{_node_path(node_id)}/resume", {}, dict[str, Any])

    async def attest(self, node_id: str) -> dict[str, Any]:
        """Accept what the node attests now as its baseline. 409 when its last heartbeat attested nothing."""
        return await self._post("control", f"{_node_path(node_id)}/attest", {}, dict[str, Any])

    async def forget(self, node_id: str) -> dict[str, Any]:
        """Forget a node that is DEAD, or drained and without a job."""
        return await self._hub.ask(Request("control", "DELETE", _node_path(node_id)), dict[str, Any])

    async def fleet(self) -> dict[str, Any]:
        """How many nodes are in which state; `silence` while mass silence keeps dead nodes' leases."""
        return await self._get("control", "/api/fleet")

    async def reap(self) -> dict[str, Any]:
        """End the brake on mass silence: the leases of DEAD nodes end now. `ended`: whether there was one."""
        return await self._post("control", "/api/fleet/reap", {}, dict[str, Any])

    async def registry(self) -> dict[str, Any]:
        """The fleet's registry: `nodes` by id, and `policy`."""
        return await self._get("control", "/api/registry")

    async def metrics(self, plane: Plane = "data") -> dict[str, Any]:
        """A plane's JSON metrics, by the fleet's keys."""
        return await self._get(plane, "/metrics", format="json")

    async def health(self, plane: Plane = "control") -> dict[str, Any]:
        """A plane's `/health`."""
        return await self._get(plane, "/health")


def _node_path(node_id: str) -> str:
    return f"/api/hosts/{quote(node_id, safe='')}"


def _alone(fields: Mapping[str, Any]) -> Request:
    """The request of one result, whose job is named by the path."""
    body = {name: value for name, value in fields.items() if name != "job_id"}
    return Request("data", "POST", f"{job_path(fields['job_id'])}/result", msgspec.json.encode(body))


def _fields(report: Report) -> dict[str, Any]:
    """The report's fields as they travel, absent ones left out."""
    values = {name: getattr(report, name) for name in report.__struct_fields__}
    return {name: value for name, value in values.items() if value is not None}


def _one_of(kinds: set[str]) -> str:
    """The kind that all jobs of a batch have, else none."""
    return next(iter(kinds)) if len(kinds) == 1 else ""


def _has_no_room(outcome: object) -> bool:
    return isinstance(outcome, Refusal) and outcome.status in NO_ROOM


def _is_news(known: object) -> bool:
    """Whether another try's outcome counts: there is none yet, or there was no room, or none for what it depends on."""
    return not isinstance(known, Submitted)
