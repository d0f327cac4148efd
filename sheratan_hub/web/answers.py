"""What clients are answered, as types: the route table names them, the OpenAPI document shows them.

Those with raw JSON inside stand where they are made: in `render`, `history` and `explain`. A field that may be `UNSET`
is left out at times; every other one is always there.

It is longer than 300 lines because it lists every answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from sheratan_hub.ledger import Entry
from sheratan_hub.rules.access import Role
from sheratan_hub.rules.nodes import State
from sheratan_hub.rules.policy import Action, Policy, Status
from sheratan_hub.web.render import JobAnswer, JobStatus, LeaseAnswer, SubmitAnswer, Time

Yes = Annotated[bool, Meta(extra_json_schema={"const": True})]
No = Annotated[bool, Meta(extra_json_schema={"const": False})]
Plane = Literal["control", "data"]
Count = Annotated[int, Meta(ge=0)]


def each(*types: type[Struct]) -> Meta:
    """The entries of a list are of these types, which may have different fields."""
    refs = [{"$ref": f"#/components/schemas/{one.__name__}"} for one in types]
    return Meta(extra_json_schema={"items": {"anyOf": refs}})


class Reply(Struct, frozen=True, kw_only=True):
    """What every successful answer is."""

    ok: Yes = True


class Problem(Struct, frozen=True):
    """Why a request was refused (RFC 9457). Rely on `code`; `detail` is for people."""

    type: str
    title: str
    status: Annotated[int, Meta(ge=400, le=599)]
    detail: str
    code: str
    ok: No
    request_id: str | UnsetType = UNSET
    checks: dict[str, bool] | UnsetType = UNSET


class Refusal(Struct, frozen=True):
    """A refused entry of a batch, in the place of its answer."""

    ok: No
    code: str
    status: Annotated[int, Meta(ge=400, le=599)]
    detail: str
    job_id: str | UnsetType = UNSET


# both planes


class Health(Reply, frozen=True, kw_only=True):
    """How the hub is, for people. `version` is not told to strangers."""

    status: Literal["ok", "degraded"]
    plane: Plane
    version: str | UnsetType = UNSET
    checks: dict[str, bool]


class Alive(Reply, frozen=True, kw_only=True):
    """The event loop turns."""

    plane: Plane


class Ready(Reply, frozen=True, kw_only=True):
    """It takes requests. `checks` when `verbose` was asked for."""

    plane: Plane
    checks: dict[str, bool] | UnsetType = UNSET


class AuthFailures(Struct, frozen=True):
    """Refused tokens of the last minute."""

    old_token_1m: Count
    invalid_1m: Count


class ControlMetrics(Reply, frozen=True, kw_only=True):
    """The fleet's numbers of the control plane; `_1m` is the last minute."""

    nodes_online: int
    nodes_stale: int
    nodes_dead: int
    auth_fail_rate_1m: Count
    port_mismatch_rate_1m: Count
    auth_success_active_1m: Count
    auth_success_next_1m: Count
    auth_failure: AuthFailures
    attestation_ok: int
    attestation_missing: int
    attestation_drift: int
    attestation_spoof_suspect: int
    attestation_drift_1m: Count
    attestation_spoof_1m: Count


class IntegrityChecks(Struct, frozen=True):
    """Results of the last minute whose proof was right, and wrong."""

    ok_1m: Count
    fail_1m: Count


class DataMetrics(Reply, frozen=True, kw_only=True):
    """The fleet's numbers of the data plane; `_1m` is the last minute."""

    queue_depth: int
    inflight_jobs: int
    retry_rate_1m: Count
    queue_drop_1m: Count
    inflight_saturated_1m: Count
    retry_scheduled_1m: Count
    lease_reap_1m: Count
    dlq_size: int
    pending_processing: int
    idempotent_hits_1m: Count
    idempotent_collisions_1m: Count
    idempotency_store_size: int
    integrity: IntegrityChecks


# nodes


class TokenState(Struct, frozen=True):
    """Whether the token that was used is about to end, and when."""

    retiring: bool
    until: Time | None


class BeatAnswer(Reply, frozen=True, kw_only=True):
    """When the next heartbeat is due, which jobs to stop, whether to take no more."""

    node_id: str
    attestation_status: Status
    policy_version: Count
    heartbeat_after_seconds: float
    cancel: list[str]
    drain: bool
    token: TokenState


class ClaimAnswer(Struct, frozen=True):
    """What a node said of itself, and when."""

    build_id: str | None
    capability_hash: str | None
    runtime: str | None
    ts: Time


class AttestationAnswer(Struct, frozen=True):
    """What a node attests: the baseline, the last word, and how often it changed."""

    status: Status
    first_seen: ClaimAnswer | None
    last_seen: ClaimAnswer | None
    drift_count: Count
    spoof_count: Count


class KnownNode(Struct, frozen=True, kw_only=True):
    """A node of the registry: `status` by its last heartbeat, `health` as it says itself."""

    node_id: str
    status: State
    health: Literal["GREEN", "YELLOW", "RED"]
    reported_health: Literal["GREEN", "YELLOW", "RED"]
    reported_status: Literal["online", "busy"]
    first_seen: Time
    last_seen: Time
    zone: str | None
    capabilities: list[str]
    current_jobs: Count | None
    max_concurrent: Count | None
    boot_id: str | None
    endpoint: str | None
    labels: dict[str, str | int | float | bool]
    draining: bool
    drain_until: Time | None
    clock_skew_seconds: float | None
    attestation: AttestationAnswer


class OneNode(KnownNode, frozen=True, kw_only=True):
    """A node alone, with the last claims that it attested."""

    ok: Yes = True
    attestation_history: list[ClaimAnswer | None]


class NodePage(Reply, frozen=True, kw_only=True):
    """A page of nodes in id order."""

    nodes: list[KnownNode]
    next_cursor: str | None


class Pinned(Struct, frozen=True):
    """The active policy; version 0 allows everything."""

    version: Count
    sha256: str | None


class Registry(Reply, frozen=True, kw_only=True):
    """Every node by id, and the active policy."""

    nodes: dict[str, KnownNode]
    policy: Pinned


class NodeForgotten(Reply, frozen=True, kw_only=True):
    """The node that is no longer known."""

    node_id: str


class Silence(Struct, frozen=True):
    """The brake on mass silence: since and until when, and how many of how many nodes are silent."""

    since: Time
    until: Time
    silent: Count
    known: Count


class FleetAnswer(Reply, frozen=True, kw_only=True):
    """How many nodes are in which state."""

    nodes: dict[State, Count]
    silence: Silence | None


class Reaped(Reply, frozen=True, kw_only=True):
    """Whether there was a brake to end."""

    ended: bool


# audit log and alerts


class AuditLine(Struct, frozen=True):
    """A line of the audit log."""

    seq: Count
    ts: Time
    event: str
    plane: str | None
    remote_addr: str | None
    node_id: str | None
    path: str | None
    reason: str | None
    detail: dict[str, Any] | None
    prev_hash: str
    hash: str
    count: Count | UnsetType = UNSET


class ChainHead(Struct, frozen=True):
    """The end of the chain."""

    seq: Count
    hash: str
    ts: Time | None


class ChainPlace(Struct, frozen=True):
    """A place in the files of the log, and what is there."""

    file: str
    line: int
    text: str


class Chain(Struct, frozen=True):
    """What is known of the chain: `ok` is false only for a broken one, `complete` false while not all was looked at."""

    ok: bool
    complete: bool
    from_seq: Count
    to_seq: Count
    head: ChainHead
    broken: ChainPlace | None
    cuts: list[ChainPlace]
    writable: bool


class AuditPage(Reply, frozen=True, kw_only=True):
    """Lines of the audit log, the newest last, and whether their chain holds."""

    events: list[AuditLine]
    next_cursor: str | None
    position: str
    chain: Chain


class AlertLine(Struct, frozen=True):
    """What the watcher raised, and the lines of the audit log that it is about."""

    id: str
    ts: Time
    rule: str
    event: str
    reason: str
    origin: str | None
    count: Count
    window_seconds: Count
    remote_addr: str | None
    node_id: str | None
    from_seq: Count
    to_seq: Count
    text: str


class AlertPage(Reply, frozen=True, kw_only=True):
    """Alerts, the newest last."""

    alerts: list[AlertLine]
    next_cursor: str | None
    position: str


# tokens and access


class TokenSlot(Struct, frozen=True):
    """A token by its id, never by its value."""

    id: str
    since: Time


class RetiredToken(Struct, frozen=True):
    """A token that is over."""

    id: str
    retired_at: Time
    successor: str | None


class TokenUse(Struct, frozen=True):
    """Which token a node used last, and when."""

    token_id: str
    at: Time
    status: State | None


class Tokens(Reply, frozen=True, kw_only=True):
    """How the shared token stands; `locked_out` are the nodes that would be if the rotation ended now."""

    active: TokenSlot
    next: TokenSlot | None
    until: Time | None
    retired: list[RetiredToken]
    nodes: dict[str, TokenUse]
    locked_out: list[str]


class RotationAnswer(Reply, frozen=True, kw_only=True):
    """The rotation; `token` only if the hub made the next one, and never again."""

    active: TokenSlot
    next: TokenSlot | None
    until: Time | None
    token: str | UnsetType = UNSET


class RotationAbandoned(Reply, frozen=True, kw_only=True):
    """`locked_out` are the nodes that last used the token which is dropped."""

    active: TokenSlot
    next: TokenSlot | None
    until: Time | None
    locked_out: list[str]


class ScopedToken(Struct, frozen=True, kw_only=True):
    """A scoped token, without its value."""

    access_id: str
    role: Role
    node_id: str | None
    name: str | None
    created_at: Time
    expires_at: Time | None
    expired: bool


class AccessPage(Reply, frozen=True, kw_only=True):
    """A page of scoped tokens in order of their making."""

    access: list[ScopedToken]
    next_cursor: str | None


class AccessMade(ScopedToken, frozen=True, kw_only=True):
    """A new scoped token, with its value: here and never again."""

    ok: Yes = True
    token: str


class AccessRevoked(Reply, frozen=True, kw_only=True):
    """The scoped token that is refused from now on."""

    access_id: str


# policies


class PolicyVersion(Struct, frozen=True, kw_only=True):
    """A version of the policy, without its text."""

    version: Count
    sha256: str
    prev_sha256: str | None
    created_at: Time | None
    active: bool
    title: str
    note: str
    file: str | None
    rules: Count


class PolicyPage(Reply, frozen=True, kw_only=True):
    """Versions, oldest first, and which is active."""

    active: Count
    policies: list[PolicyVersion]
    next_cursor: str | None


class OnePolicy(PolicyVersion, frozen=True, kw_only=True):
    """A version of the policy, whole."""

    ok: Yes = True
    policy: Policy


class PolicyActivated(Reply, frozen=True, kw_only=True):
    """The version that is active from now on."""

    version: Count
    sha256: str | None


class PlannedNode(Struct, frozen=True):
    """What a node might do after, and not before, or the reverse."""

    node_id: str
    lost: list[Action]
    gained: list[Action]
    by: list[str]


class PlannedLane(Struct, frozen=True):
    """Waiting jobs of one kind: how many live nodes could take them before and after."""

    priority: int
    kind: str
    source: str | None
    required_capabilities: list[str]
    nodes_before: Count
    nodes_after: Count
    submit_allowed: bool


class Planned(Reply, frozen=True, kw_only=True):
    """What a policy would change. `stranded_jobs` wait and could be taken by nobody; `more`: not all was looked at."""

    active: Count
    nodes: list[PlannedNode]
    waiting: list[PlannedLane]
    stranded_jobs: Count
    more: bool


# jobs


class BatchSubmitted(Reply, frozen=True, kw_only=True):
    """One outcome each, in order."""

    jobs: Annotated[list[Any], each(SubmitAnswer, Refusal)]


class JobPage(Reply, frozen=True, kw_only=True):
    """A page of jobs; it may be short or empty and still carry a cursor."""

    jobs: list[JobAnswer]
    next_cursor: str | None


class Leases(Reply, frozen=True, kw_only=True):
    """Leased jobs; without any, how long to wait before the next pull, and why."""

    jobs: list[LeaseAnswer]
    defer_ms: Count | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class LeaseEnded(Reply, frozen=True, kw_only=True):
    """The job after its lease was ended."""

    job_id: str
    status: JobStatus
    late: Yes | UnsetType = UNSET
    retry_in_seconds: float | UnsetType = UNSET


class ResultAnswer(LeaseEnded, frozen=True, kw_only=True):
    """The job after its result; and what a pull with it got."""

    jobs: list[LeaseAnswer] | UnsetType = UNSET
    defer_ms: Count | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class ResultsAnswer(Reply, frozen=True, kw_only=True):
    """One outcome each, in order; and what a pull with them got."""

    results: Annotated[list[Any], each(LeaseEnded, Refusal)]
    jobs: list[LeaseAnswer] | UnsetType = UNSET
    defer_ms: Count | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class LeaseExtended(Reply, frozen=True, kw_only=True):
    """The lease lasts so long from now; with `cancel_requested` the work is to be stopped."""

    job_id: str
    lease_seconds: float
    cancel_requested: bool


class JobCancelled(Reply, frozen=True, kw_only=True):
    """The job after a cancel: `cancelled`, or still `running` with the request on it."""

    job_id: str
    status: JobStatus
    cancel_requested: bool


class JobRedriven(Reply, frozen=True, kw_only=True):
    """The job after a redrive. Not `redriven`: it was unfinished, and nothing changed."""

    job_id: str
    status: JobStatus
    redriven: bool
    redrives: Count
    not_before: Time | None


class LedgerPage(Reply, frozen=True, kw_only=True):
    """Events in order."""

    events: list[Entry]
    next_cursor: str | None


# missions


class MissionAnswer(Struct, frozen=True, kw_only=True):
    """A mission: `status` is what its `counts` tell, `progress` the part that is finished (0 to 1)."""

    mission_id: str
    title: str | None
    status: str
    metadata: Any
    created_at: Time | None
    jobs: Count
    counts: dict[str, Count]
    progress: float


class OneMission(MissionAnswer, frozen=True, kw_only=True):
    """A mission alone."""

    ok: Yes = True


class MissionPage(Reply, frozen=True, kw_only=True):
    """Missions, the newest first."""

    missions: list[MissionAnswer]
    next_cursor: str | None


class MissionMade(Reply, frozen=True, kw_only=True):
    """A mission the hub has, and its jobs in the order they were given. `dedup`: it was known before."""

    mission_id: str
    dedup: bool
    jobs: Annotated[list[Any], each(SubmitAnswer, Refusal)]


class MissionCancelled(Reply, frozen=True, kw_only=True):
    """How many of its jobs were cancelled, and how many have yet to stop."""

    mission_id: str
    cancelled: Count
    cancel_requested: Count


class MissionRedriven(Reply, frozen=True, kw_only=True):
    """How many of its jobs run again, and for how many there was no room."""

    mission_id: str
    redriven: Count
    refused: Count


# operators


class DeadRedriven(Reply, frozen=True, kw_only=True):
    """One outcome each, in order; `redriven` counts those that run again."""

    jobs: Annotated[list[Any], each(JobRedriven, Refusal)]
    redriven: Count
    next_cursor: str | None


class Purged(Reply, frozen=True, kw_only=True):
    """How many waiting jobs were meant, and cancelled."""

    dry_run: bool
    matched: Count
    purged: Count
    next_cursor: str | None


class ManyCancelled(Reply, frozen=True, kw_only=True):
    """How many jobs were meant, ended, and asked to stop; `jobs` tells each when they were named by id."""

    dry_run: bool
    matched: Count
    cancelled: Count
    cancel_requested: Count
    jobs: Annotated[list[Any], each(JobCancelled, Refusal)] | UnsetType = UNSET
    next_cursor: str | None


class PauseAnswer(Struct, frozen=True):
    """Jobs of `kind` (null: all) are not leased until `until` (null: until somebody resumes them)."""

    kind: str | None
    since: Time
    until: Time | None
    reason: str | None


class Pauses(Reply, frozen=True, kw_only=True):
    """The pauses that hold now."""

    pauses: list[PauseAnswer]


class QueueDepth(Struct, frozen=True):
    """Waiting jobs, and how many there may be."""

    jobs: int
    limit: Count


class QueueInflight(Struct, frozen=True):
    """Live leases, and how many there may be."""

    leases: int
    limit: Count


class DeadLetters(Struct, frozen=True):
    """Failed jobs; `over` when there are more than the limit, of which nothing is dropped."""

    jobs: int
    limit: Count
    over: bool


class QueueLane(Struct, frozen=True):
    """Waiting jobs that differ by age only: what they ask for, and since when the first of them waits."""

    priority: int
    kind: str
    source: str | None
    required_capabilities: list[str]
    head_since: Time
    head_age_seconds: float


class Queue(Reply, frozen=True, kw_only=True):
    """How full the queue is, what waits longest, what was put aside."""

    counts: dict[str, int]
    depth: QueueDepth
    inflight: QueueInflight
    dead_letters: DeadLetters
    oldest_ready_seconds: float | None
    lane_count: Count
    lanes: list[QueueLane]
    pauses: list[PauseAnswer]
    throttled_sources: list[str]
    commands_waiting: Count
    long_polls: Count


class RateLimit(Reply, frozen=True, kw_only=True):
    """What a source may do (0: without that limit; null: there is none), and whether it is at its limit."""

    source: str
    per_minute: Count | None
    concurrent: Count | None
    origin: Literal["stored", "configured"] | None
    running: Count
    throttled: bool


NAMED = (SubmitAnswer, Refusal, LeaseEnded, JobCancelled, JobRedriven)
"""What `each` names."""
