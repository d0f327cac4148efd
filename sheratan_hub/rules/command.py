"""What every rule is made of: command, scene, view, decision, event, refusal.

A command names what it must see (`wants`) and decides on it (`decide`). The committer loads for many commands
at once, lets each decide on the shared view, and saves what they decided as one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Any, Protocol

import msgspec

from sheratan_hub.rules.lanes import Lanes
from sheratan_hub.storage import Changes, Due, Key, Loaded, Ready, Row, Wants, merge


class Code(StrEnum):
    """Every `code` of an error answer. Codes never change; docs/protocol.md lists them."""

    BAD_JSON = "bad_json"
    MISSING_TOKEN = "missing_token"
    INVALID_TOKEN = "invalid_token"
    FOREIGN_HOST = "foreign_host"
    LOOPBACK_ONLY = "loopback_only"
    UNKNOWN_PATH = "unknown_path"
    JOB_NOT_FOUND = "job_not_found"
    NODE_NOT_FOUND = "node_not_found"
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
    BATCH_REFUSED = "batch_refused"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    INVALID_FIELD = "invalid_field"
    TOO_DEEP = "too_deep"
    BATCH_TOO_LARGE = "batch_too_large"
    RESULT_INTEGRITY_FAIL = "result_integrity_fail"
    QUEUE_FULL = "queue_full"
    BUSY = "busy"
    UNAVAILABLE = "unavailable"
    DRAINING = "draining"
    BAD_REQUEST = "bad_request"
    INTERNAL = "internal"


class Refused(Exception):
    """A "no" that the caller is meant to read: a stable code and a sentence with the id in it.

    `reason` goes to the audit log, `retry_after_ms` to the client when trying again makes sense.
    """

    def __init__(self, code: Code, text: str, *, reason: str = "", retry_after_ms: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.reason = reason
        self.retry_after_ms = retry_after_ms


class Need(Exception):
    """Raised inside `decide`: this must be loaded too, then decide again."""

    def __init__(self, wants: Wants) -> None:
        super().__init__(wants)
        self.wants = wants


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


@dataclass(frozen=True, slots=True)
class Scene:
    """What is known without asking the store: the time (ms), the limits, the lanes, when this hub started."""

    now: int
    limits: Limits = Limits()
    lanes: Lanes = field(default_factory=Lanes)
    started_at: int = 0


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


@dataclass(frozen=True, slots=True)
class Decision:
    """What a command decided: the answer, the rows it writes, the events it makes.

    `events` go to the ledger in the same transaction, `notes` only to the observers after it. `durable` is
    false only if losing the change in a power cut breaks no promise.
    """

    answer: Any
    new: tuple[Row, ...] = ()
    put: tuple[Row, ...] = ()
    gone: tuple[Key, ...] = ()
    events: tuple[Event, ...] = ()
    notes: tuple[Event, ...] = ()
    durable: bool = True


class Command(Protocol):
    """One thing to decide."""

    def wants(self, scene: Scene) -> Wants:
        """What must be loaded before `decide`; anything forgotten is asked for by `Need`."""
        ...

    def decide(self, view: View) -> Decision:
        """Decide on what is there. Raises `Refused` or `Need`; changes nothing itself."""
        ...


class View:
    """The rows of one transaction as the decisions so far have left them.

    Asking for something that was not loaded raises `Need`; so does a lane whose loaded part is used up.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.now = scene.now
        self._rows: dict[Key, Row | None] = {}
        self._ready: dict[str, list[Row]] = {}
        self._depth: dict[str, int] = {}
        self._at: dict[str, int] = {}
        self._due: dict[str, list[Row]] = {}
        self._counts: dict[str, int] = {}
        self._fresh: set[Key] = set()
        self._written: dict[Key, Row | None] = {}
        self._deltas: dict[str, int] = {}
        self._events: list[Event] = []

    def add(self, wants: Wants, loaded: Loaded) -> None:
        """Take in what the store found for `wants`. Rows already here keep what was decided on them."""
        for key in (*wants.keys, *wants.look):
            self._rows.setdefault(key, loaded.rows.get(key))
        for ready, rows in loaded.ready.items():
            self._ready[ready.lane] = rows
            self._at[ready.lane] = 0
            self._depth[ready.lane] = wants.ready[ready]
            self._keep(rows)
        for due, rows in loaded.due.items():
            self._due[due.agenda] = rows
            self._keep(rows)
        for facet, n in loaded.counts.items():
            self._counts.setdefault(facet, n)

    def _keep(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._rows.setdefault(row.key, row)

    def row(self, kind: str, id: str) -> Row | None:
        """The row, locked, or None if there is none."""
        key = Key(kind, id)
        if key not in self._rows:
            raise Need(Wants(keys={key}))
        return self._rows[key]

    def look(self, kind: str, id: str) -> Row | None:
        """The row, only read, or None if there is none."""
        key = Key(kind, id)
        if key not in self._rows:
            raise Need(Wants(look={key}))
        return self._rows[key]

    def has(self, kind: str, id: str) -> bool:
        """Whether it is known if there is such a row."""
        return Key(kind, id) in self._rows

    def loaded(self, lane: str) -> bool:
        """Whether any part of the lane was loaded."""
        return lane in self._ready

    def count(self, facet: str) -> int:
        """How many there are of `facet`, this batch's decisions included."""
        if facet not in self._counts:
            raise Need(Wants(counts={facet}))
        return self._counts[facet] + self._deltas.get(facet, 0)

    def ready(self, lane: str, limit: int) -> list[Row]:
        """Up to `limit` rows of `lane` that nobody in this batch has taken; fewer only if there are no more."""
        if lane not in self._ready:
            raise Need(Wants(ready={Ready(lane): limit}))
        rows, start = self._ready[lane], self._first_left(lane)
        found = list(islice((row for row in islice(rows, start, None) if self._untouched(row)), limit))
        if len(found) < limit and len(rows) >= self._depth[lane]:
            raise Need(Wants(ready={Ready(lane): self._depth[lane] + limit}))
        return found

    def _first_left(self, lane: str) -> int:
        rows, at = self._ready[lane], self._at.get(lane, 0)
        while at < len(rows) and not self._untouched(rows[at]):
            at += 1
        self._at[lane] = at
        return at

    def _untouched(self, row: Row) -> bool:
        return row.key not in self._written

    def due(self, agenda: str) -> list[Row]:
        """The due rows loaded for `agenda`, as they are now; those changed by this batch are left out."""
        return [row for row in self._due.get(agenda, ()) if self._untouched(row)]

    def apply(self, decision: Decision) -> None:
        """Make a decision part of what later commands of the batch see."""
        for row in decision.new:
            self._write(row.key, row)
            self._fresh.add(row.key)
        for row in decision.put:
            self._write(row.key, row)
        for key in decision.gone:
            self._write(key, None)
        self._events.extend(decision.events)

    def _write(self, key: Key, row: Row | None) -> None:
        before = self._rows.get(key)
        for facet in facets(before):
            self._deltas[facet] = self._deltas.get(facet, 0) - 1
        for facet in facets(row):
            self._deltas[facet] = self._deltas.get(facet, 0) + 1
        self._rows[key] = self._written[key] = row

    def changes(self) -> Changes:
        """All decisions so far as one set of changes."""
        out = Changes(counts={facet: n for facet, n in self._deltas.items() if n})
        for key, row in self._written.items():
            if row is None:
                if key not in self._fresh:
                    out.gone.append(key)
            elif key in self._fresh:
                out.new.append(row)
            else:
                out.put.append(row)
        out.ledger = [_encode(event) for event in self._events]
        return out

    def heads(self) -> dict[str, int | None]:
        """For each lane that was loaded: the order of its first row left, or None if nothing is left."""
        return {lane: self._head(lane, rows) for lane, rows in self._ready.items()}

    def _head(self, lane: str, rows: list[Row]) -> int | None:
        at = self._first_left(lane)
        if at < len(rows):
            return rows[at].order
        return rows[-1].order if rows and len(rows) >= self._depth[lane] else None

    def trial(self) -> View:
        """A copy to decide on; this view stays as it is."""
        copy = View(self.scene)
        copy._rows, copy._ready, copy._depth = dict(self._rows), self._ready, self._depth
        copy._due, copy._counts = self._due, self._counts
        copy._written, copy._deltas, copy._fresh = dict(self._written), dict(self._deltas), set(self._fresh)
        return copy


@dataclass(frozen=True, slots=True)
class Together:
    """Several commands that happen all or none. The first refusal refuses the whole, naming its place."""

    commands: tuple[Command, ...]

    def wants(self, scene: Scene) -> Wants:
        """All that the members want."""
        return merge(command.wants(scene) for command in self.commands)

    def decide(self, view: View) -> Decision:
        """Decide one after the other on a trial copy; the answer is the tuple of their answers."""
        trial, made = view.trial(), []
        for place, command in enumerate(self.commands):
            try:
                decision = command.decide(trial)
            except Refused as no:
                raise Refused(
                    no.code,
                    f"entry {place} of the atomic batch: {no.text}",
                    reason=no.reason,
                    retry_after_ms=no.retry_after_ms,
                ) from no
            trial.apply(decision)
            made.append(decision)
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


def facets(row: Row | None) -> tuple[str, ...]:
    """What a row counts for: jobs by status, nodes by state, idempotency keys in all."""
    if row is None:
        return ()
    if row.kind in ("job", "node"):
        return (f"{row.kind}:{row.labels[0]}",)
    return ("key",) if row.kind == "key" else ()


def due_wants(agenda: str, before: int, limit: int) -> Wants:
    """The wants of a sweep over one agenda."""
    return Wants(due={Due(agenda, before): limit})


_encode = msgspec.json.Encoder().encode
