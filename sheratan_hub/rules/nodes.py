"""The node: heartbeats, ONLINE / STALE / DEAD by its silence, forgetting."""

from __future__ import annotations

from typing import Literal

import msgspec

from sheratan_hub.rules.attestation import Attested, Claim, attest
from sheratan_hub.rules.command import Code, Decision, Event, Limits, Need, Refused, Scene, due_wants
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row, Wants

State = Literal["ONLINE", "STALE", "DEAD"]


class Node(msgspec.Struct, frozen=True, omit_defaults=True):
    """A node's document. Times in ms since 1970. `state` is the last one written; `state_of` tells the present one."""

    id: str
    first_seen: int
    last_seen: int
    state: State = "ONLINE"
    health: Literal["GREEN", "YELLOW", "RED"] = "GREEN"
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
    token_id: str | None = None

    def row(self, due_at: int | None) -> Row:
        """The row it is kept as; None: nobody needs to look at it again."""
        agenda = None if due_at is None else "node"
        return Row(
            "node",
            self.id,
            _encode(self),
            (self.state, self.attested.status, None, None, None),
            None,
            0,
            agenda,
            due_at or 0,
        )


def node_of(row: Row) -> Node:
    """The node kept in a row."""
    return _decode(row.doc)


def state_of(node: Node, now: int, limits: Limits, started_at: int) -> State:
    """ONLINE while silent for at most the TTL, STALE up to the dead limit, then DEAD.

    A node that was written as DEAD or STALE stays so until it is heard of, whatever a clock says.
    """
    if node.state == "DEAD" or now > _dead_at(node, now, limits, started_at):
        return "DEAD"
    return "STALE" if node.state == "STALE" or now - node.last_seen > limits.node_ttl_ms else "ONLINE"


def _dead_at(node: Node, now: int, limits: Limits, started_at: int) -> int:
    """When silence makes it DEAD: after a start not before the restart grace is over (design rule 12)."""
    grace = min(limits.node_dead_ms, limits.restart_grace_ms)
    return max(min(node.last_seen, now) + limits.node_dead_ms, started_at + grace)


class Beaten(msgspec.Struct, frozen=True, gc=False):
    """The node as recorded, and the ids of its running jobs that it should stop."""

    node: Node
    cancel: tuple[str, ...]


class Beat(msgspec.Struct, frozen=True, gc=False):
    """A heartbeat. A field that is None was not sent and keeps its last value; health and status have defaults."""

    node_id: str
    health: Literal["GREEN", "YELLOW", "RED"] = "GREEN"
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
    token_id: str | None = None

    def wants(self, scene: Scene) -> Wants:
        """The node's row."""
        return Wants(keys={Key("node", self.node_id)})

    def decide(self, view: View) -> Decision:
        """Record it; never refused. Not synced by itself when nothing but the last contact moved."""
        row = view.row("node", self.node_id)
        before = node_of(row) if row else None
        cancel = _still_to_cancel(view, before.cancel, self.node_id) if before else ()
        node = self._recorded(before, view.now, cancel)
        back = before is None or before.state != "ONLINE"
        due_at = view.now + view.scene.limits.node_ttl_ms if back or row is None else row.due_at
        events = (Event(view.now, "node.online", node.id, zone=node.zone),) if back else ()
        written = node.row(due_at)
        return Decision(
            Beaten(node, cancel),
            new=(written,) if row is None else (),
            put=() if row is None else (written,),
            events=events,
            durable=before is None or node != msgspec.structs.replace(before, last_seen=node.last_seen),
        )

    def _recorded(self, before: Node | None, now: int, cancel: tuple[str, ...]) -> Node:
        old = before or Node(self.node_id, now, now)
        sent = {name: getattr(self, name) for name in _KEPT if getattr(self, name) is not None}
        attested = attest(old.attested, self.claim, now)
        return msgspec.structs.replace(
            old,
            last_seen=now,
            state="ONLINE",
            health=self.health,
            status=self.status,
            attested=attested,
            cancel=cancel,
            token_id=self.token_id or old.token_id,
            **sent,
        )


_KEPT = (
    "zone",
    "capabilities",
    "current_jobs",
    "max_concurrent",
    "boot_id",
    "endpoint",
    "sent_at",
    "labels",
)


def _still_to_cancel(view: View, job_ids: tuple[str, ...], node_id: str) -> tuple[str, ...]:
    from sheratan_hub.rules.jobs import job_of

    missing = {Key("job", id) for id in job_ids if not view.has("job", id)}
    if missing:
        raise Need(Wants(look=missing))
    jobs = [job_of(row) for id in job_ids if (row := view.look("job", id)) is not None]
    return tuple(job.id for job in jobs if job.status == "running" and job.cancel_at and job.node_id == node_id)


class Forget(msgspec.Struct, frozen=True, gc=False):
    """Forget a node that is DEAD."""

    node_id: str

    def wants(self, scene: Scene) -> Wants:
        """The node and what it pulled."""
        return Wants(keys={Key("node", self.node_id), Key("puller", self.node_id)})

    def decide(self, view: View) -> Decision:
        """Remove it. Refused: `node_not_found`, `node_alive`."""
        row = view.row("node", self.node_id)
        if row is None:
            raise Refused(Code.NODE_NOT_FOUND, f"there is no node {self.node_id}")
        state = state_of(node_of(row), view.now, view.scene.limits, view.scene.started_at)
        if state != "DEAD":
            raise Refused(Code.NODE_ALIVE, f"node {self.node_id} is {state}; only a DEAD node can be forgotten")
        gone = [row.key]
        if view.row("puller", self.node_id) is not None:
            gone.append(Key("puller", self.node_id))
        return Decision(None, gone=tuple(gone), events=(Event(view.now, "node.forgotten", self.node_id),))


class Swept(msgspec.Struct, frozen=True, gc=False):
    """What a sweep did: how many rows it changed, when the next is due (ms, None: unknown), which nodes died."""

    changed: int
    next_at: int | None = None
    dead: tuple[str, ...] = ()


class SweepNodes(msgspec.Struct, frozen=True, gc=False):
    """Write down the state of nodes that may have fallen silent. A node's `due_at` moves only here."""

    limit: int = 500

    def wants(self, scene: Scene) -> Wants:
        """The nodes due by now."""
        return due_wants("node", scene.now, self.limit)

    def decide(self, view: View) -> Decision:
        """New states with their events; the answer is `Swept`."""
        put, events, dead = [], [], []
        for row in view.due("node"):
            node, due_at = _looked_at(node_of(row), view.now, view.scene)
            put.append(node.row(due_at))
            if node.state != row.labels[0]:
                events.append(
                    Event(
                        view.now,
                        f"node.{node.state.lower()}",
                        "hub",
                        zone=node.zone,
                        meta={"node_id": node.id},
                    )
                )
                dead += [node.id] if node.state == "DEAD" else []
        next_at = view.now if len(put) >= self.limit else None
        return Decision(Swept(len(put), next_at, tuple(dead)), put=tuple(put), events=tuple(events))


class ClampNodes(msgspec.Struct, frozen=True, gc=False):
    """After a start: no node was heard of in the future, even if the wall clock went back."""

    node_ids: tuple[str, ...]

    def wants(self, scene: Scene) -> Wants:
        """The nodes."""
        return Wants(keys={Key("node", id) for id in self.node_ids})

    def decide(self, view: View) -> Decision:
        """The answer is how many were clamped; the next sweep sees when each is due."""
        rows = [row for id in self.node_ids if (row := view.row("node", id)) is not None]
        nodes = [msgspec.structs.replace(node, last_seen=min(node.last_seen, view.now)) for node in map(node_of, rows)]
        put = tuple(node.row(None if node.state == "DEAD" else view.now) for node in nodes)
        return Decision(len(put), put=put)


def _looked_at(node: Node, now: int, scene: Scene) -> tuple[Node, int | None]:
    """The node with the state that it has now, and when to look again."""
    state = state_of(node, now, scene.limits, scene.started_at)
    looked = msgspec.structs.replace(node, state=state)
    if state == "DEAD":
        return looked, None
    if state == "STALE":
        return looked, _dead_at(node, now, scene.limits, scene.started_at) + 1
    return looked, min(node.last_seen, now) + scene.limits.node_ttl_ms + 1


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Node).decode
