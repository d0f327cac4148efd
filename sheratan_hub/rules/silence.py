"""What silence does: STALE and DEAD when their time comes, whose leases end, and the brake on mass silence (rule 12).

A node is looked at when its `due_at` comes, which a heartbeat does not move. What its leases are owed (`Node.owed`)
stands in its row until it is done, so that a crash in between loses nothing.
"""

from __future__ import annotations

import msgspec

from sheratan_hub.rules.command import Decision, Event, Scene, due_wants
from sheratan_hub.rules.nodes import End, Swept, dead_at, node_of, state_of
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row, Wants

LOOK_AHEAD_MS = 1000
"""A sweep also loads what is due this soon, so that it knows when the next one must run."""

STEP_MS = 50
"""Nodes are not swept more often than this by themselves."""

FLEET = Key("fleet", "silence")
FLEET_MIN = 5
"""A smaller fleet has no brake."""

SILENT_PERCENT = 55
"""More than this share of the fleet falling silent within one TTL is taken for the hub's or the network's fault."""

SLICES = 16
"""The TTL is counted in so many slices: which nodes fell silent in it is known that exactly."""


class Slice(msgspec.Struct, frozen=True, array_like=True):
    """How many nodes fell silent, and how many became DEAD, in a slice of time that began at `at` (ms)."""

    at: int
    fell: int = 0
    died: int = 0


class Fleet(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of the fleet's silence: the last TTL in slices, and the brake's time (ms), 0 where there is none.

    `silent` of `known` nodes were silent when it began.
    """

    slices: tuple[Slice, ...] = ()
    since: int = 0
    until: int = 0
    silent: int = 0
    known: int = 0

    def braked(self, now: int) -> bool:
        """Whether reaping because of node death holds."""
        return self.since <= now < self.until

    def counted(self, now: int, ttl_ms: int, fell: int, died: int) -> Fleet:
        """With so many more, and without what is older than a TTL."""
        recent = tuple(one for one in self.slices if one.at > now - ttl_ms)
        if fell or died:
            at = now - now % max(1, ttl_ms // SLICES)
            same = next((one for one in recent if one.at == at), Slice(at))
            recent = (*(one for one in recent if one.at != at), Slice(at, same.fell + fell, same.died + died))
        return msgspec.structs.replace(self, slices=recent)

    @property
    def fell(self) -> int:
        """How many fell silent within the last TTL."""
        return sum(one.fell for one in self.slices)

    @property
    def died(self) -> int:
        """How many became DEAD within the last TTL."""
        return sum(one.died for one in self.slices)

    @property
    def row(self) -> Row:
        """The row it is kept as."""
        return Row(FLEET.kind, FLEET.id, _encode(self))


def fleet_of(row: Row | None) -> Fleet:
    """The fleet's silence as kept in a row."""
    return _decode(row.doc) if row is not None else Fleet()


class SweepNodes(msgspec.Struct, frozen=True, gc=False):
    """Write down the state of nodes that may have fallen silent. A node's `due_at` moves only here."""

    limit: int = 500

    def wants(self, scene: Scene) -> Wants:
        """The nodes due by now or soon; the fleet, when there are any, is asked for later."""
        return due_wants("node", scene.now + LOOK_AHEAD_MS, self.limit)

    def decide(self, view: View) -> Decision:
        """New states with their events; the answer is `Swept`."""
        due = view.due("node")
        now = [row for row in due if row.due_at <= view.now]
        next_at = _next_at(due, view)
        if not now:
            return Decision(Swept(0, next_at))
        looked = [_Looked(row, view) for row in now]
        fleet, alarm = _fleet(view, looked)
        # A full sweep has not seen all that is due. Who died in it is reaped when seen again: the silence of the
        # others is counted by then.
        full = len(now) >= self.limit
        owed = [end for one in looked for end in one.owed(fleet, full and one.died)]
        put = [one.node.row(one.due_at(fleet, view)) for one in looked]
        new: tuple[Row, ...] = ()
        if fleet is not None:
            new, put = ((), [*put, fleet.row]) if view.row(*FLEET) is not None else ((fleet.row,), put)
        events = (*alarm, *(event for one in looked for event in one.events))
        swept = Swept(len(now), view.now if full else next_at, tuple(owed))
        return Decision(swept, new=new, put=tuple(put), events=events)


def _next_at(due: list[Row], view: View) -> int | None:
    """When somebody's time will come soon; in steps, as in a mass silence it comes to somebody each millisecond.

    A node that was heard of since its time was set can be looked at whenever the next sweep is.
    """
    ttl_ms = view.scene.limits.node_ttl_ms
    soon = ((row.due_at, node_of(row)) for row in due if row.due_at > view.now)
    at = (at for at, node in soon if node.state != "ONLINE" or node.drain_until or node.last_seen + ttl_ms + 1 <= at)
    first = min(at, default=None)
    return None if first is None else max(first, view.now + STEP_MS)


class _Looked:
    """A node that was due, as it is now."""

    def __init__(self, row: Row, view: View) -> None:
        before, scene, now = node_of(row), view.scene, view.now
        state = state_of(before, now, scene.limits, scene.started_at)
        node = before if before.state == state else msgspec.structs.replace(before, state=state)
        self.fell = before.state == "ONLINE" and state != "ONLINE"
        self.died = before.state != "DEAD" and state == "DEAD"
        if self.died:
            node = node.owing("dead", True)
        if node.draining and 0 < node.drain_until <= now:
            node = msgspec.structs.replace(node, drain_until=0).owing("drain", True)
        self.node = node
        self.events: tuple[Event, ...] = ()
        if self.fell or self.died:
            meta = {"node_id": node.id}
            self.events = (Event(now, f"node.{state.lower()}", "hub", zone=node.zone, meta=meta),)

    def owed(self, fleet: Fleet | None, later: bool) -> list[End]:
        """The ends of leases that can be seen to now."""
        held = later or (fleet is not None and fleet.until > 0)
        node = self.node
        return [End(node.id, owed, node.booted_at) for owed in node.owed if not (held and owed == "dead")]

    def due_at(self, fleet: Fleet | None, view: View) -> int | None:
        """When to look at it next."""
        node, now, scene = self.node, view.now, view.scene
        times = [node.drain_until] if node.drain_until else []
        if node.owed:
            braked = fleet is not None and fleet.until > 0 and node.owed == ("dead",)
            times.append(fleet.until if braked and fleet is not None else now)
        elif node.state == "STALE":
            times.append(dead_at(node, now, scene.limits, scene.started_at) + 1)
        if node.state == "ONLINE":
            times.append(min(node.last_seen, now) + scene.limits.node_ttl_ms + 1)
        return min(times, default=None)


def _fleet(view: View, looked: list[_Looked]) -> tuple[Fleet | None, tuple[Event, ...]]:
    """The fleet's silence, if any of these nodes has to do with it, and the alarm if it begins now.

    `until` of what is returned is 0 unless the brake is in force.
    """
    fell, died = sum(one.fell for one in looked), sum(one.died for one in looked)
    if not (fell or died or any("dead" in one.node.owed for one in looked)):
        return None, ()
    limits, now = view.scene.limits, view.now
    kept = fleet_of(view.row(*FLEET))
    if kept.until and not kept.braked(now):
        kept = msgspec.structs.replace(kept, until=0, slices=())  # it is over: what fell before has had its time
    fleet = kept.counted(now, limits.node_ttl_ms, fell, died)
    if fleet.braked(now):
        return fleet, ()
    online = view.count("node:ONLINE") - fell
    stale = view.count("node:STALE") + fell - died
    known = online + stale + fleet.died
    silent = min(fleet.fell, stale + fleet.died)
    if known < FLEET_MIN or silent * 100 <= SILENT_PERCENT * known:
        return fleet, ()
    fleet = msgspec.structs.replace(fleet, since=now, until=now + limits.node_dead_ms, silent=silent, known=known)
    said = {"silent": silent, "known": known, "seconds": limits.node_dead_ms / 1000}
    return fleet, (Event(now, "fleet.silent", "hub", meta=said),)


class EndSilence(msgspec.Struct, frozen=True, gc=False):
    """An operator ends the brake: the leases of DEAD nodes end when these are looked at (`LookAgain`)."""

    def wants(self, scene: Scene) -> Wants:
        """The fleet."""
        return Wants(keys={FLEET})

    def decide(self, view: View) -> Decision:
        """The answer is whether there was one."""
        fleet = fleet_of(view.row(*FLEET))
        if not fleet.braked(view.now):
            return Decision(False)
        ended = msgspec.structs.replace(fleet, until=0, slices=())
        return Decision(True, put=(ended.row,), events=(Event(view.now, "fleet.reap", "operator"),))


class LookAgain(msgspec.Struct, frozen=True, gc=False):
    """Let the next sweep look at these nodes if their leases are owed an end."""

    node_ids: tuple[str, ...]

    def wants(self, scene: Scene) -> Wants:
        """The nodes."""
        return Wants(keys={Key("node", id) for id in self.node_ids})

    def decide(self, view: View) -> Decision:
        """The answer is how many are owed something."""
        rows = [row for id in self.node_ids if (row := view.row("node", id)) is not None]
        put = tuple(node.row(view.now) for node in map(node_of, rows) if node.owed)
        return Decision(len(put), put=put)


class Settle(msgspec.Struct, frozen=True, gc=False):
    """All leases that had to end for this have ended."""

    end: End

    def wants(self, scene: Scene) -> Wants:
        """The node."""
        return Wants(keys={Key("node", self.end.node_id)})

    def decide(self, view: View) -> Decision:
        """Nothing is settled if the node was started anew meanwhile."""
        row = view.row("node", self.end.node_id)
        node = node_of(row) if row is not None else None
        if node is None or not self.end.holds(node):
            return Decision(None)
        node = node.owing(self.end.owed, False)
        done_at = None if node.state == "DEAD" and not node.owed and not node.drain_until else view.now
        return Decision(None, put=(node.row(done_at),))


class ClampNodes(msgspec.Struct, frozen=True, gc=False):
    """After a start: no node was heard of in the future, even if the wall clock went back; all are looked at anew."""

    node_ids: tuple[str, ...]

    def wants(self, scene: Scene) -> Wants:
        """The nodes."""
        return Wants(keys={Key("node", id) for id in self.node_ids})

    def decide(self, view: View) -> Decision:
        """The answer is how many were clamped; the next sweep sees when each is due."""
        rows = [row for id in self.node_ids if (row := view.row("node", id)) is not None]
        now = view.now
        nodes = [
            msgspec.structs.replace(node, last_seen=min(node.last_seen, now), booted_at=min(node.booted_at, now))
            for node in map(node_of, rows)
        ]
        put = tuple(node.row(None if node.state == "DEAD" and not node.owed else now) for node in nodes)
        return Decision(len(put), put=put)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Fleet).decode
