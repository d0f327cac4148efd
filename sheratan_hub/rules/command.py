"""What every rule is made of: command, scene, view, decision, event, refusal.

A command names what it must see (`wants`) and decides on it (`decide`). The committer loads for many commands
at once, lets each decide on the shared view, and saves what they decided as one transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from sheratan_hub.rules.lanes import PLACES, Lanes, Offer
from sheratan_hub.rules.policy import Judge
from sheratan_hub.storage import Due, Key, Row, Wants, merge

if TYPE_CHECKING:
    from sheratan_hub.rules.view import View


class Code(StrEnum):
    """Every `code` of an error answer. Codes never change; docs/protocol.md lists them."""

    BAD_JSON = "bad_json"
    MISSING_TOKEN = "missing_token"
    INVALID_TOKEN = "invalid_token"
    OLD_TOKEN = "old_token"
    EXPIRED_TOKEN = "expired_token"
    FORBIDDEN_ROLE = "forbidden_role"
    FORBIDDEN_NODE = "forbidden_node"
    FOREIGN_HOST = "foreign_host"
    FOREIGN_ORIGIN = "foreign_origin"
    LOOPBACK_ONLY = "loopback_only"
    UNKNOWN_PATH = "unknown_path"
    JOB_NOT_FOUND = "job_not_found"
    NODE_NOT_FOUND = "node_not_found"
    ACCESS_NOT_FOUND = "access_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    PORT_MISMATCH = "port_mismatch"
    IDEMPOTENCY_KEY_COLLISION = "idempotency_key_collision"
    LEASE_SUPERSEDED = "lease_superseded"
    LEASE_EXPIRED = "lease_expired"
    RESULT_CONFLICT = "result_conflict"
    NOT_LEASED = "not_leased"
    NOT_HOLDER = "not_holder"
    ALREADY_FINISHED = "already_finished"
    NODE_ALIVE = "node_alive"
    NOT_FAILED = "not_failed"
    NOT_ATTESTED = "not_attested"
    ROTATION_UNDER_WAY = "rotation_under_way"
    NO_ROTATION = "no_rotation"
    POLICY_DENIED = "policy_denied"
    POLICY_NOT_FOUND = "policy_not_found"
    PRECONDITION_FAILED = "precondition_failed"
    PRECONDITION_REQUIRED = "precondition_required"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    INVALID_FIELD = "invalid_field"
    TOO_DEEP = "too_deep"
    BATCH_TOO_LARGE = "batch_too_large"
    RESULT_INTEGRITY_FAIL = "result_integrity_fail"
    DEPENDENCY_CYCLE = "dependency_cycle"
    UNKNOWN_DEPENDENCY = "unknown_dependency"
    MISSION_NOT_FOUND = "mission_not_found"
    QUEUE_FULL = "queue_full"
    RATE_LIMITED = "rate_limited"
    RATE_LIMIT_NOT_FOUND = "rate_limit_not_found"
    BUSY = "busy"
    UNAVAILABLE = "unavailable"
    AUDIT_UNAVAILABLE = "audit_unavailable"
    DRAINING = "draining"
    BAD_REQUEST = "bad_request"
    INTERNAL = "internal"


class Quota(msgspec.Struct, frozen=True, gc=False):
    """What a source may still submit now: `left` of `per_minute`, and when there is one more (ms from now)."""

    per_minute: int
    left: int
    next_in_ms: int


class Refused(Exception):
    """A "no" that the caller is meant to read: a stable code and a sentence with the id in it.

    `reason` and `detail` go to the audit log, `retry_after_ms` to the client when trying again makes sense, and so
    does `quota` (see `rules/limits.py`).
    """

    def __init__(
        self,
        code: Code,
        text: str,
        *,
        reason: str = "",
        retry_after_ms: int = 0,
        detail: Mapping[str, str] | None = None,
        quota: Quota | None = None,
    ) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.reason = reason
        self.retry_after_ms = retry_after_ms
        self.detail = detail or {}
        self.quota = quota


class Need(Exception):
    """Raised inside `decide`: this must be loaded too, then decide again."""

    def __init__(self, wants: Wants) -> None:
        super().__init__(wants)
        self.wants = wants


class Rate(msgspec.Struct, frozen=True, array_like=True):
    """What a source may do: submits a minute, jobs running at once. 0: without that limit."""

    per_minute: int = 10
    concurrent: int = 5


class Limits(msgspec.Struct, frozen=True):
    """The configured numbers that rules decide by. Times in ms; 0 means never where a limit may be absent."""

    max_depth: int = 1000
    max_inflight: int = 100
    lease_ms: int = 300_000
    item_ttl_ms: int = 0
    max_losses: int = 3
    loss_delay_ms: int = 1000
    cancel_grace_ms: int = 30_000
    max_retries: int = 3
    backoff_base_ms: int = 1000
    backoff_cap_ms: int = 60_000
    key_ttl_ms: int = 86_400_000
    node_ttl_ms: int = 120_000
    node_dead_ms: int = 600_000
    restart_grace_ms: int = 15_000
    max_deliveries: int = 50
    completed_kept_ms: int = 86_400_000
    cancelled_kept_ms: int = 86_400_000
    failed_kept_ms: int = 604_800_000
    mission_kept_ms: int = 604_800_000
    ledger_kept_ms: int = 2_592_000_000
    dead_letters: bool = True
    dead_letters_max: int = 10_000
    age_ms: int = 60_000
    max_leases_per_node: int = 0
    rates: Mapping[str, Rate] = {}
    max_heartbeats: int = 1000
    flip_window_ms: int = 120_000
    spoof_threshold: int = 3


class Scene(msgspec.Struct, frozen=True, gc=False):
    """What is known without asking the store: the time (ms), the limits, the lanes, when this hub started.

    `first_order` is above every place in line that was given before. `known` are rows as they were last committed, so
    far as that is remembered (None: there is none); they may only help to guess what to load.
    """

    now: int
    limits: Limits = Limits()
    lanes: Lanes = msgspec.field(default_factory=Lanes)
    started_at: int = 0
    first_order: int = 0
    judge: Judge = Judge()
    """What decides by the active policy."""
    known: Mapping[Key, Row | None] = {}
    turns: dict[Offer, Iterator[str]] = msgspec.field(default_factory=dict)
    """By what pulls offer: the lanes that the next of the batch will probably be served from."""

    def order_at(self, ms: int) -> int:
        """The place in line of what may be claimed from this time on; a millisecond has `ORDERS` of them."""
        return ms * ORDERS


ORDERS = PLACES


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that happened. The fields and their order are the ledger's; `seq` is given by the store."""

    ts: int
    event: str
    actor: str
    job_id: str | None = None
    trace_id: str | None = None
    zone: str | None = None
    artifact_path: str | None = None
    meta: dict[str, Any] = {}


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What a command decided: the answer, the rows it writes, the events it makes.

    `events` go to the ledger in the same transaction, `notes` only to the observers after it. `durable` is
    false only if losing the change in a power cut breaks no promise. An `answer` that is a `Refused` is a refusal that
    writes: the command ends with it as if it had been raised, and what the decision holds is committed.
    `served` tells the directory of lanes whose turn it was. `forgotten` are counters, loaded before, that go to zero
    with what they counted: the only ones that do not follow from rows.
    """

    answer: Any
    new: tuple[Row, ...] = ()
    put: tuple[Row, ...] = ()
    gone: tuple[Key, ...] = ()
    events: tuple[Event, ...] = ()
    notes: tuple[Event, ...] = ()
    durable: bool = True
    served: Served | None = None
    forgotten: tuple[str, ...] = ()


class Served(msgspec.Struct, frozen=True, gc=False):
    """From which lanes a pull with this offer got its jobs, in order: their sources had their turn."""

    offer: Offer
    lanes: tuple[str, ...]


class Command(Protocol):
    """One thing to decide."""

    def wants(self, scene: Scene) -> Wants:
        """What must be loaded before `decide`; anything forgotten is asked for by `Need`."""
        ...

    def decide(self, view: View) -> Decision:
        """Decide on what is there. Raises `Refused` or `Need`; changes nothing itself."""
        ...


class Together(msgspec.Struct, frozen=True, gc=False):
    """Several commands that happen all or none. The first refusal refuses the whole, naming its place."""

    commands: tuple[Command, ...]

    def __len__(self) -> int:
        return len(self.commands)

    def wants(self, scene: Scene) -> Wants:
        """All that the members want."""
        return merge(command.wants(scene) for command in self.commands)

    def decide(self, view: View) -> Decision:
        """Decide one after the other on a trial copy; the answer is the tuple of their answers."""
        trial, made, needs = view.trial(), [], []
        for place, command in enumerate(self.commands):
            try:
                decision = command.decide(trial)
                if isinstance(decision.answer, Refused):
                    raise decision.answer
            except Need as need:
                needs.append(need.wants)
                continue
            except Refused as no:
                if needs:
                    continue  # it may have been refused for what is not loaded yet
                raise Refused(
                    no.code,
                    f"entry {place} of the atomic batch: {no.text}",
                    reason=no.reason,
                    retry_after_ms=no.retry_after_ms,
                    detail=no.detail,
                    quota=no.quota,
                ) from no
            trial.apply(decision)
            made.append(decision)
        if needs:
            raise Need(merge(needs))
        return joined(made)


def joined(decisions: list[Decision]) -> Decision:
    """Several decisions as one; its answer is the tuple of theirs."""
    return Decision(
        answer=tuple(d.answer for d in decisions),
        new=tuple(row for d in decisions for row in d.new),
        put=tuple(row for d in decisions for row in d.put),
        gone=tuple(key for d in decisions for key in d.gone),
        events=tuple(event for d in decisions for event in d.events),
        notes=tuple(note for d in decisions for note in d.notes),
    )


def due_wants(agenda: str, before: int, limit: int) -> Wants:
    """The wants of a sweep over one agenda."""
    return Wants(due={Due(agenda, before): limit})
