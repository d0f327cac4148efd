"""What the hub answers, as types: the client's side of the wire contract. Times are RFC 3339 texts, as sent.

Fields a newer hub adds are ignored; those an older one lacks have a default.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import orjson

from sheratan_hub.canonical import NULL, Raw

_LONG_NUMBER = re.compile(rb"[0-9]{19}")


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What every typed answer is."""


class Submitted(Answer, frozen=True, kw_only=True):
    """A job the hub has. `status` is `accepted` when this request made it, else where the known one stands."""

    job_id: str
    status: str
    dedup: bool = False
    request_id: str | None = None
    result: Any = None
    error: Any = None
    result_truncated: bool = False


class Refusal(Answer, frozen=True, kw_only=True):
    """The hub's "no" to one entry of a batch: a stable `code`, the HTTP status it means, a sentence."""

    code: str
    status: int
    detail: str = ""


class Lease(Answer, frozen=True, kw_only=True):
    """A job to work on, and for how long it is this node's alone. What is at_most_once is not given back once begun."""

    job_id: str
    kind: str
    lease_id: str
    lease_seconds: float
    params_json: Raw = msgspec.field(default=NULL, name="params")
    attempt: int = 1
    failures: int = 0
    losses: int = 0
    timeout_seconds: float | None = None
    priority: int = 2
    mission_id: str | None = None
    task_id: str | None = None
    traceparent: str | None = None
    delivery: str = "at_least_once"

    @property
    def params(self) -> Any:
        """The job's parameters."""
        return orjson.loads(bytes(self.params_json))


class Pulled(Answer, frozen=True, kw_only=True):
    """Leases, or none; `defer_ms` and `reason` when there is a cause to wait before the next pull."""

    jobs: list[Lease] = []
    defer_ms: int | None = None
    reason: str | None = None


class Accepted(Answer, frozen=True, kw_only=True):
    """The hub took a result. `status` is what the job is now, `late` that its lease had run out before."""

    job_id: str = ""
    status: str = ""
    late: bool = False


class Extended(Answer, frozen=True, kw_only=True):
    """The lease lasts `lease_seconds` from now; with `cancel_requested` the work is to be stopped."""

    lease_seconds: float | None = None
    cancel_requested: bool = False


class Cancelled(Answer, frozen=True, kw_only=True):
    """The job after a cancel: `cancelled`, or still `running` with the request on it."""

    job_id: str
    status: str
    cancel_requested: bool = False


class Job(Answer, frozen=True, kw_only=True):
    """A job as the hub sees it. `attempt` counts deliveries and starts at 1; `node_id` holds or last held it.

    `attempts` (those that failed or were lost) and `late` (results that came too late) only where one job is asked for,
    and of dead letters. `root_cause` is the job whose failure ended this one, `depends_on_left` how many it waits for.
    """

    job_id: str
    status: str
    kind: str
    params: Any = None
    priority: int = 2
    source: str | None = None
    mission_id: str | None = None
    task_id: str | None = None
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    node_id: str | None = None
    result: Any = None
    error: Any = None
    reason: str | None = None
    late_results: int = 0
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    not_before: str | None = None
    redrives: int = 0
    root_cause: str | None = None
    depends_on_left: int = 0
    lost_on: list[str] = []
    attempts: list[dict[str, Any]] = []
    late: list[dict[str, Any]] = []


class TokenState(msgspec.Struct, frozen=True):
    """Whether the token that was used is about to end, and when (None: not by itself)."""

    retiring: bool = False
    until: str | None = None


class Beat(Answer, frozen=True, kw_only=True):
    """The answer to a heartbeat: when the next is due, which jobs to stop, whether to take no more."""

    node_id: str
    heartbeat_after_seconds: float = 15.0
    cancel: list[str] = []
    drain: bool = False
    attestation_status: str | None = None
    policy_version: int | str | None = None
    token: TokenState = TokenState()


class Node(Answer, frozen=True, kw_only=True):
    """A machine of the fleet: `status` ONLINE, STALE or DEAD by its last heartbeat, `health` as it says itself."""

    node_id: str
    status: str
    health: str | None = None
    zone: str | None = None
    capabilities: list[str] = []
    current_jobs: int | None = None
    max_concurrent: int | None = None
    last_seen: str | None = None
    draining: bool = False
    drain_until: str | None = None


class JobPage(Answer, frozen=True, kw_only=True):
    """One page of a list of jobs; there are more while `next_cursor` is set, even after an empty page."""

    jobs: list[Job] = []
    next_cursor: str | None = None


class Reason(Answer, frozen=True, kw_only=True):
    """Why a job is not running, or not on a node: a sentence, and the earliest time it may end by itself."""

    reason: str
    detail: str = ""
    evidence: dict[str, Any] = {}
    until: str | None = None


class NodeReasons(Answer, frozen=True, kw_only=True):
    """A node, and what keeps it from having the job; nothing: it is free to."""

    node_id: str
    status: str | None = None
    capable: bool = False
    leases: int = 0
    waiting_pulls: int = 0
    reasons: list[Reason] = []


class NodesExplained(Answer, frozen=True, kw_only=True):
    """How many nodes there are for a job; `shown` are the first, the free ones before others."""

    known: int = 0
    live: int = 0
    capable: int = 0
    free: int = 0
    cut: bool = False
    shown: list[NodeReasons] = []


class Explained(Answer, frozen=True, kw_only=True):
    """Every reason why a job is not running now."""

    job_id: str
    status: str
    runnable: bool = False
    reasons: list[Reason] = []
    expires_at: str | None = None
    rate_limit: dict[str, Any] | None = None
    nodes: NodesExplained | None = None


class NodePage(Answer, frozen=True, kw_only=True):
    """One page of the list of nodes."""

    nodes: list[Node] = []
    next_cursor: str | None = None


class Envelope(Answer, frozen=True, kw_only=True):
    """A batch's answer: one outcome each, in order, under `jobs` or `results`."""

    jobs: list[Raw] = []
    results: list[Raw] = []


class Taken(Pulled, frozen=True, kw_only=True):
    """The answer to results with a pull: one outcome each, in order, and the leases."""

    results: list[Raw] = []


class Integrity(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a result can be checked: see `sheratan_hub.canonical`."""

    mode: str
    sha256: str
    sig: str | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node's word on a job it holds. `result` and `error` are JSON texts; absent is `null`.

    `retry` False: do not try again; None: as the job says. `retry_after_seconds` wins over the job's backoff.
    """

    job_id: str
    lease_id: str
    node_id: str
    ok: bool
    result: Raw = NULL
    error: Raw = NULL
    retry: bool | None = None
    retry_after_seconds: float | None = None
    integrity: Integrity | None = None


def json_text(value: object) -> bytes:
    """`value` as JSON that a hub takes as it is.

    Raises TypeError or ValueError for what JSON cannot hold or a hub refuses: NaN, infinities, lone surrogates,
    integers over 64 bit, circular structures.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if _LONG_NUMBER.search(text):
        orjson.dumps(json.loads(text))
    return text
