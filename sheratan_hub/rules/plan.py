"""What a draft policy would change: which nodes lose or gain what, which waiting jobs nobody could take any more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sheratan_hub.rules.lanes import Lane
from sheratan_hub.rules.nodes import Node
from sheratan_hub.rules.policies import node_ask, submit_ask
from sheratan_hub.rules.policy import Action, Ask, Judge

OF_NODES: tuple[Action, ...] = ("heartbeat", "pull", "result")


class NodeChange(NamedTuple):
    """What a node may do after, and not before, or the reverse. `by` says for each action what decides after."""

    node_id: str
    lost: tuple[Action, ...]
    gained: tuple[Action, ...]
    by: tuple[str, ...]


class LaneChange(NamedTuple):
    """Waiting jobs of one kind, source and needs: how many live nodes could take them before and after.

    `submit` tells whether such a job could be submitted, `submit_lost` that it could so far.
    """

    lane: Lane
    before: int
    after: int
    submit: bool
    submit_lost: bool


class Plan(NamedTuple):
    """What would change, nodes by id and lanes by name. What stays as it is is left out."""

    nodes: tuple[NodeChange, ...]
    lanes: tuple[LaneChange, ...]


def plan(before: Judge, after: Judge, nodes: Sequence[Node], lanes: Iterable[Lane]) -> Plan:
    """Compare two policies on the live nodes and the lanes of waiting jobs."""
    changes = (_node_change(before, after, node) for node in nodes)
    takers = _Takers(before, after, nodes)
    lane_changes = (takers.change(lane) for lane in lanes)
    return Plan(
        tuple(change for change in changes if change.lost or change.gained),
        tuple(change for change in lane_changes if change.before != change.after or change.submit_lost),
    )


def may_do(judge: Judge, ask: Ask) -> str | None:
    """What denies it, None if it is allowed. Pulls and results count as denied only if those of every job are."""
    verdict = judge.pull(ask) if ask.action in ("pull", "result") else judge.decide(ask)
    return None if verdict.allowed else verdict.by


def _node_change(before: Judge, after: Judge, node: Node) -> NodeChange:
    asks = [node_ask(action, node.id, node) for action in OF_NODES]
    then = [(ask.action, may_do(before, ask), may_do(after, ask)) for ask in asks]
    return NodeChange(
        node.id,
        tuple(action for action, old, new in then if old is None and new is not None),
        tuple(action for action, old, new in then if old is not None and new is None),
        tuple(new for _, _, new in then if new is not None),
    )


class _Takers:
    """Counts the nodes that could take a lane's jobs. Nodes that no policy can tell apart are asked about once."""

    def __init__(self, before: Judge, after: Judge, nodes: Sequence[Node]) -> None:
        self._before, self._after = before, after
        named = any(rule.nodes is not None for judge in (before, after) for rule in judge.policy.rules)
        self._groups: dict[Ask, int] = {}
        for node in nodes:
            ask = node_ask("pull", node.id if named else "", node)
            self._groups[ask] = self._groups.get(ask, 0) + 1

    def change(self, lane: Lane) -> LaneChange:
        """How many could take it before and after."""
        ask = submit_ask(lane.kind, lane.source, lane.needs)
        could, can = (judge.decide(ask).allowed for judge in (self._before, self._after))
        return LaneChange(lane, self._count(self._before, lane), self._count(self._after, lane), can, could and not can)

    def _count(self, judge: Judge, lane: Lane) -> int:
        return sum(
            n
            for ask, n in self._groups.items()
            if ask.capabilities.issuperset(lane.needs)
            and judge.decide(ask._replace(kind=lane.kind, source=lane.source or None)).allowed
        )
