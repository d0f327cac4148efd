"""The node: heartbeats, ONLINE / STALE / DEAD by its silence, when to come again, forgetting (design rule 13).

What silence does is decided in `silence.py`, what operators do with a node in `drain.py`.

It is longer than 300 lines because a heartbeat touches all that is known of a node.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sheratan_hub.rules.attestation import Attested, Claim, attest, news
from sheratan_hub.rules.command import Code, Decision, Event, Limits, Need, Refused, Scene
from sheratan_hub.rules.policies import denied, node_ask
from sheratan_hub.rules.policy import ALLOWED
from sheratan_hub.rules.view import View, leases_on
from sheratan_hub.storage import Key, Row, Wants

State = Literal["ONLINE", "STALE", "DEAD"]
Health = Literal["GREEN", "YELLOW", "RED"]
Owed = Literal["dead", "boot", "drain"]
"""Why leases of a node must end: it is DEAD, it was started anew, or its drain's deadline has passed."""

INTERVAL_SHARE = 0.3
"""However large the fleet, the next heartbeat is asked for within this share of the TTL: jittered, a third of it."""

JITTER = 0.2
"""An interval is told give or take half of this."""


class Node(msgspec.Struct, frozen=True, omit_defaults=True):
    """A node's document. Times in ms since 1970. `state` is the last one written; `state_of` tells the present one.

    `booted_at`: when its present `boot_id` was first heard of, if it had another before. `owed`: whose leases the
    hub has yet to end. `drain_until` 0: no deadline, or it has passed. `skew_ms`: its clock less the hub's.
    """

    id: str
    first_seen: int
    last_seen: int
    state: State = "ONLINE"
    health: Health = "GREEN"
    status: Literal["online", "busy"] = "online"
    zone: str | None = None
    capabilities: tuple[str, ...] = ()
    current_jobs: int | None = None
    max_concurrent: int | None = None
    boot_id: str | None = None
    endpoint: str | None = None
    sent_at: str | None = None
    labels: dict[str, str | int | float | bool] = {}
    attested: Attested = Attested()
    cancel: tuple[str, ...] = ()
    draining: bool = False
    drain_until: int = 0
    booted_at: int = 0
    owed: tuple[Owed, ...] = ()
    skew_ms: int | None = None
    token_id: str | None = None

    def row(self, due_at: int | None) -> Row:
        """The row it is kept as; None: nobody needs to look at it again."""
        agenda = None if due_at is None else "node"
        return Row(
            "node",
            self.id,
            _encode(self),
            (self.state, self.attested.status, health_of(self), "draining" if self.draining else None, None),
            None,
            0,
            agenda,
            due_at or 0,
        )

    def owing(self, owed: Owed, still: bool) -> Node:
        """With this end of its leases owed, or no longer."""
        others = tuple(one for one in self.owed if one != owed)
        return msgspec.structs.replace(self, owed=(*others, owed) if still else others)


def node_of(row: Row) -> Node:
    """The node kept in a row."""
    return _decode(row.doc)


def state_of(node: Node, now: int, limits: Limits, started_at: int) -> State:
    """ONLINE while silent for at most the TTL, STALE up to the dead limit, then DEAD.

    A node that was written as DEAD or STALE stays so until it is heard of, whatever a clock says.
    """
    if node.state == "DEAD" or now > dead_at(node, now, limits, started_at):
        return "DEAD"
    return "STALE" if node.state == "STALE" or now - node.last_seen > limits.node_ttl_ms else "ONLINE"


def dead_at(node: Node, now: int, limits: Limits, started_at: int) -> int:
    """When silence makes it DEAD: after a start not before the restart grace is over (design rule 12)."""
    grace = min(limits.node_dead_ms, limits.restart_grace_ms)
    return max(min(node.last_seen, now) + limits.node_dead_ms, started_at + grace)


def health_of(node: Node) -> Health:
    """As it says itself, but YELLOW at least while what it attests is in doubt."""
    doubtful = node.attested.status in ("DRIFT", "SPOOF_SUSPECT")
    return "YELLOW" if doubtful and node.health == "GREEN" else node.health


def interval_ms(online: int, limits: Limits) -> float:
    """When the next heartbeat of one of so many nodes is due.

    Often enough to be seen alive, and to be told of a cancel well before its grace is over; but no more
    heartbeats a second than configured, unless a node would be STALE before its next.
    """
    base = min(limits.node_ttl_ms / 4, max(1000.0, limits.cancel_grace_ms / 3))
    most = limits.node_ttl_ms * INTERVAL_SHARE
    return min(max(base, online * 1000 / limits.max_heartbeats), max(base, most))


class End(msgspec.Struct, frozen=True, gc=False):
    """Leases of a node that must end, and why; `booted_at` (ms) is that of the boot which it was seen for."""

    node_id: str
    owed: Owed
    booted_at: int = 0

    def holds(self, node: Node) -> bool:
        """Whether it is still so."""
        return self.owed in node.owed and (self.owed != "boot" or node.booted_at == self.booted_at)


class Swept(msgspec.Struct, frozen=True, gc=False):
    """What a sweep did: how many rows it changed, when the next is due (ms, None: unknown), whose leases must end."""

    changed: int
    next_at: int | None = None
    owed: tuple[End, ...] = ()

    @property
    def dead(self) -> tuple[str, ...]:
        """The nodes whose leases end because they are DEAD."""
        return tuple(end.node_id for end in self.owed if end.owed == "dead")


class Beaten(msgspec.Struct, frozen=True, gc=False):
    """The node as recorded, the ids of its running jobs that it should stop, and when to come again (ms)."""

    node: Node
    cancel: tuple[str, ...]
    next_in_ms: float = 0.0
    denied: Refused | None = None
    """What the policy says to it; it is recorded all the same (design rule 13)."""


class Beat(msgspec.Struct, frozen=True, gc=False):
    """A heartbeat. A field that is None was not sent and keeps its last value; health and status have defaults.

    `sent_ms` is the node's own time, `jitter` from 0 up to 1.
    """

    node_id: str
    health: Health = "GREEN"
    status: Literal["online", "busy"] = "online"
    zone: str | None = None
    capabilities: tuple[str, ...] | None = None
    current_jobs: int | None = None
    max_concurrent: int | None = None
    boot_id: str | None = None
    endpoint: str | None = None
    sent_at: str | None = None
    labels: dict[str, str | int | float | bool] | None = None
    claim: Claim | None = None
    sent_ms: int | None = None
    jitter: float = 0.5
    token_id: str | None = None

    def wants(self, scene: Scene) -> Wants:
        """The node's row, and how many nodes there are."""
        return Wants(keys={Key("node", self.node_id)}, counts={"node:ONLINE"})

    def decide(self, view: View) -> Decision:
        """Record it, before anything else is decided about it (design rule 13).

        Never refused itself, but the answer may hold the policy's refusal.

        Not synced by itself when nothing but the last contact moved.
        """
        row = view.row("node", self.node_id)
        before = node_of(row) if row else None
        cancel = _still_to_cancel(view, before.cancel, self.node_id) if before and before.cancel else ()
        node = self._recorded(before, view.now, view.scene.limits, cancel)
        written = node.row(self._due_at(before, node, row, view))
        next_in_ms = interval_ms(view.count("node:ONLINE"), view.scene.limits) * (1 - JITTER / 2 + JITTER * self.jitter)
        return Decision(
            Beaten(node, cancel, next_in_ms, self._denied(node, view.scene)),
            new=(written,) if row is None else (),
            put=() if row is None else (written,),
            events=_events(before, node, view.now),
            durable=before is None or not _only_contact(before, node),
        )

    def _denied(self, node: Node, scene: Scene) -> Refused | None:
        """What the active policy has against it; it is recorded all the same."""
        ask = node_ask("heartbeat", node.id, node)
        verdict = ALLOWED if scene.judge.trivial else scene.judge.decide(ask)
        return None if verdict.allowed else denied(scene.judge, ask, verdict)

    def _due_at(self, before: Node | None, node: Node, row: Row | None, view: View) -> int:
        """At once if leases must end; else when it was, as the sweep moves it; anew for one that comes back."""
        if node.owed:
            return view.now
        if before is None or row is None or row.agenda is None or before.state != "ONLINE":
            silent = view.now + view.scene.limits.node_ttl_ms + 1
            return min(silent, node.drain_until) if node.drain_until else silent
        return row.due_at

    def _recorded(self, before: Node | None, now: int, limits: Limits, cancel: tuple[str, ...]) -> Node:
        old = before or Node(self.node_id, now, now)
        restarted = None not in (self.boot_id, old.boot_id) and self.boot_id != old.boot_id
        owed = old.owed
        if owed or restarted:
            owed = tuple(one for one in owed if one != "dead")
            owed = (*owed, "boot") if restarted and "boot" not in owed else owed
        return Node(
            old.id,
            old.first_seen,
            now,
            "ONLINE",
            self.health,
            self.status,
            old.zone if self.zone is None else self.zone,
            old.capabilities if self.capabilities is None else self.capabilities,
            old.current_jobs if self.current_jobs is None else self.current_jobs,
            old.max_concurrent if self.max_concurrent is None else self.max_concurrent,
            old.boot_id if self.boot_id is None else self.boot_id,
            old.endpoint if self.endpoint is None else self.endpoint,
            old.sent_at if self.sent_at is None else self.sent_at,
            old.labels if self.labels is None else self.labels,
            attest(old.attested, self.claim, now, limits),
            cancel,
            old.draining,
            old.drain_until,
            now if restarted else old.booted_at,
            owed,
            old.skew_ms if self.sent_ms is None else self.sent_ms - now,
            self.token_id or old.token_id,
        )


def _only_contact(before: Node, node: Node) -> bool:
    """Whether nothing but the time of the last contact, and what was measured by it, has moved."""
    was, now = before.attested, node.attested
    if was.last_seen is not None and now.last_seen is not None and was.last_seen.ts != now.last_seen.ts:
        was = msgspec.structs.replace(was, last_seen=msgspec.structs.replace(was.last_seen, ts=now.last_seen.ts))
    return node == msgspec.structs.replace(
        before, last_seen=node.last_seen, sent_at=node.sent_at, skew_ms=node.skew_ms, attested=was
    )


def _events(before: Node | None, node: Node, now: int) -> tuple[Event, ...]:
    """It is heard of for the first time or again, was started anew, attests something else."""
    found = []
    if before is None or before.state != "ONLINE":
        found.append(Event(now, "node.online", node.id, zone=node.zone))
    if before is not None and before.booted_at != node.booted_at:
        found.append(Event(now, "node.restarted", node.id, zone=node.zone))
    was = before.attested if before else Attested()
    if was is not node.attested and node.attested.last_seen is not None:
        claim = node.attested.last_seen
        said = {"build_id": claim.build_id, "capability_hash": claim.capability_hash}
        names = news(was, node.attested)
        found += [Event(now, f"attestation.{name}", node.id, zone=node.zone, meta=said) for name in names]
    return tuple(found)


def _still_to_cancel(view: View, job_ids: tuple[str, ...], node_id: str) -> tuple[str, ...]:
    from sheratan_hub.rules.jobs import job_of

    missing = {Key("job", id) for id in job_ids if not view.has("job", id)}
    if missing:
        raise Need(Wants(look=missing))
    jobs = [job_of(row) for id in job_ids if (row := view.look("job", id)) is not None]
    return tuple(job.id for job in jobs if job.status == "running" and job.cancel_at and job.node_id == node_id)


class Remind(msgspec.Struct, frozen=True, gc=False):
    """These jobs were to stop before their node was first heard of: now it can be told (design rule 14)."""

    node_id: str
    job_ids: tuple[str, ...]

    def wants(self, scene: Scene) -> Wants:
        """The node, and the jobs as they are."""
        return Wants(keys={Key("node", self.node_id)}, look={Key("job", id) for id in self.job_ids})

    def decide(self, view: View) -> Decision:
        """The answer are the jobs that its heartbeats are answered with from now on."""
        row = view.row("node", self.node_id)
        if row is None:
            return Decision(())
        node = node_of(row)
        cancel = _still_to_cancel(view, tuple(dict.fromkeys((*node.cancel, *self.job_ids))), self.node_id)
        if cancel == node.cancel:
            return Decision(cancel)
        told = msgspec.structs.replace(node, cancel=cancel)
        return Decision(cancel, put=(told.row(row.due_at if row.agenda else None),))


class Forget(msgspec.Struct, frozen=True, gc=False):
    """Forget a node that is DEAD, or one that an operator has drained and that holds nothing any more."""

    node_id: str

    def wants(self, scene: Scene) -> Wants:
        """The node and what it pulled."""
        return Wants(keys={Key("node", self.node_id), Key("puller", self.node_id)})

    def decide(self, view: View) -> Decision:
        """Remove it. Refused: `node_not_found`, `node_alive`."""
        node = known(view, self.node_id)
        state = state_of(node, view.now, view.scene.limits, view.scene.started_at)
        if state != "DEAD" and (not node.draining or view.count(leases_on(self.node_id))):
            when = "only a node that is DEAD, or drained and without a lease, can be forgotten"
            raise Refused(Code.NODE_ALIVE, f"node {self.node_id} is {state}; {when}")
        gone = [Key("node", self.node_id)]
        if view.row("puller", self.node_id) is not None:
            gone.append(Key("puller", self.node_id))
        return Decision(None, gone=tuple(gone), events=(Event(view.now, "node.forgotten", self.node_id),))


def known(view: View, node_id: str) -> Node:
    """The node, locked for change. Refused with `node_not_found` when it was never heard of."""
    row = view.row("node", node_id)
    if row is None:
        raise Refused(Code.NODE_NOT_FOUND, f"there is no node {node_id}")
    return node_of(row)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Node).decode
