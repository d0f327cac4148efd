"""What operators do with a node: drain it, take it back, accept what it attests (design, "Control plane")."""

from __future__ import annotations

import msgspec

from sheratan_hub.rules.attestation import accepted
from sheratan_hub.rules.command import Code, Decision, Event, Refused, Scene
from sheratan_hub.rules.nodes import Node, known
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Wants

OPERATOR = "operator"


class Drain(msgspec.Struct, frozen=True, gc=False):
    """Lease nothing more to the node. What it holds may be finished and extended until the deadline, if there is one.

    The deadline is `in_ms` from now or `until` (ms); with neither there is none. Draining outlives a restart of the
    node and of the hub, and ends by `Resume`.
    """

    node_id: str
    in_ms: int | None = None
    until: int | None = None

    def wants(self, scene: Scene) -> Wants:
        """The node's row."""
        return Wants(keys={Key("node", self.node_id)})

    def decide(self, view: View) -> Decision:
        """The node as it is then. Refused: `node_not_found`. Said again, the deadline is the new one."""
        before = known(view, self.node_id)
        until = view.now + self.in_ms if self.in_ms is not None else self.until
        drained = msgspec.structs.replace(before, draining=True, drain_until=0 if until is None else max(until, 1))
        node = drained.owing("drain", False)
        if node == before:
            return Decision(node)
        meta = {"node_id": node.id, **({"seconds": max(0, until - view.now) / 1000} if until is not None else {})}
        event = Event(view.now, "node.drain", OPERATOR, zone=node.zone, meta=meta)
        return Decision(node, put=(node.row(_sooner(view, node)),), events=(event,))


class Resume(msgspec.Struct, frozen=True, gc=False):
    """Take a drained node back."""

    node_id: str

    def wants(self, scene: Scene) -> Wants:
        """The node's row."""
        return Wants(keys={Key("node", self.node_id)})

    def decide(self, view: View) -> Decision:
        """The node as it is then. Refused: `node_not_found`. One that is not drained stays as it is."""
        before = known(view, self.node_id)
        if not before.draining:
            return Decision(before)
        node = msgspec.structs.replace(before, draining=False, drain_until=0).owing("drain", False)
        event = Event(view.now, "node.resume", OPERATOR, zone=node.zone, meta={"node_id": node.id})
        return Decision(node, put=(node.row(_sooner(view, node)),), events=(event,))


class Accept(msgspec.Struct, frozen=True, gc=False):
    """What the node attests now is its baseline from now on."""

    node_id: str

    def wants(self, scene: Scene) -> Wants:
        """The node's row."""
        return Wants(keys={Key("node", self.node_id)})

    def decide(self, view: View) -> Decision:
        """The node as it is then. Refused: `node_not_found`, `not_attested`."""
        before = known(view, self.node_id)
        if before.attested.status == "MISSING":
            raise Refused(Code.NOT_ATTESTED, f"the last heartbeat of node {self.node_id} attested nothing")
        if before.attested.status == "OK":
            return Decision(before)
        node = msgspec.structs.replace(before, attested=accepted(before.attested))
        claim = node.attested.last_seen
        said = {"build_id": claim.build_id, "capability_hash": claim.capability_hash} if claim else {}
        event = Event(view.now, "attestation.accepted", OPERATOR, zone=node.zone, meta={"node_id": node.id, **said})
        return Decision(node, put=(node.row(_sooner(view, node)),), events=(event,))


def _sooner(view: View, node: Node) -> int | None:
    """When to look at the node: as before, but at its drain's deadline at the latest."""
    row = view.row("node", node.id)
    before = row.due_at if row is not None and row.agenda is not None else None
    if not node.drain_until:
        return before
    return node.drain_until if before is None else min(before, node.drain_until)
