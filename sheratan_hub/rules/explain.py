"""Why a job is not running now: every reason with its evidence, by the predicates that pulls are decided by.

What stops the job itself, and each node from having it, is said by `rules/eligible.py`; here it is put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from sheratan_hub.rules.eligible import Stop, World, stops, stops_here
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.lanes import Offer, suits
from sheratan_hub.rules.nodes import Node, State, state_of

SHOWN = 20
"""So many nodes are shown with their own reasons, and so many parents."""


class Seen(NamedTuple):
    """A node that might have the job: its live leases, what its waiting pulls ask for.

    `node` None is one never heard of, of which a pull waits. Without a waiting pull it counts as asking for any kind
    with the capabilities of its heartbeat.
    """

    node_id: str
    node: Node | None
    leases: int = 0
    offers: tuple[Offer, ...] = ()


class Told(msgspec.Struct, frozen=True):
    """What a node is told of the job: `stops` why it cannot have it; `capable` if it could by what it offers."""

    node_id: str
    state: State | None
    leases: int
    waiting_pulls: int
    capable: bool
    stops: list[Stop]


class Fleet(msgspec.Struct, frozen=True):
    """How many nodes are known, ONLINE (`live`), `capable`, `free` to have the job now; the most telling of them.

    `cut`: there are more nodes than were looked at.
    """

    known: int
    live: int
    capable: int
    free: int
    cut: bool
    shown: list[Told]


class Explanation(msgspec.Struct, frozen=True):
    """Every reason. `stops` are those that keep it from everybody; `fleet` None: it is no question of nodes."""

    job: Job
    stops: list[Stop]
    reasons: list[Stop]
    fleet: Fleet | None

    @property
    def runnable(self) -> bool:
        """Whether a node that is known, or whose pull waits, could lease it now."""
        return not self.stops and self.fleet is not None and self.fleet.free > 0


def explain(
    job: Job, world: World, seen: Iterable[Seen], line: dict[str, Any] | None = None, *, cut: bool = False
) -> Explanation:
    """All reasons why the job is not running; `line` is evidence of its place in line."""
    own = stops(job, world)
    if job.status == "running" or job.finished:
        return Explanation(job, own, own, None)
    told = [_told(job, one, world) for one in seen]
    fleet = _fleet(told, cut=cut)
    if fleet.free:
        others = [] if own else [Stop("waits_its_turn", detail={"free_nodes": fleet.free, **(line or {})})]
    elif fleet.capable:
        others = _each_reason(told)
    else:
        others = [_nobody(job, told)]
    return Explanation(job, own, [*own, *others], fleet)


def _told(job: Job, seen: Seen, world: World) -> Told:
    heartbeat = Offer(frozenset(seen.node.capabilities if seen.node else ()), frozenset())
    offers = seen.offers or (heartbeat,)
    each = [stops_here(job, seen.node, offer, seen.leases, world, seen.node_id) for offer in offers]
    state = state_of(seen.node, world.now, world.limits, world.started_at) if seen.node is not None else None
    capable = any(suits(job.kind, job.needs, offer) for offer in offers)
    return Told(seen.node_id, state, seen.leases, len(seen.offers), capable, min(each, key=len))


def _fleet(told: Sequence[Told], *, cut: bool) -> Fleet:
    live = sum(one.state in ("ONLINE", None) for one in told)
    free = sum(not one.stops for one in told)
    first = sorted(told, key=lambda one: (len(one.stops), not one.capable, one.node_id))[:SHOWN]
    return Fleet(len(told), live, sum(one.capable for one in told), free, cut, first)


def _each_reason(told: Iterable[Told]) -> list[Stop]:
    """The reasons of the capable nodes, each with the nodes that it holds for."""
    found: dict[str, list[str]] = {}
    for one in told:
        for stop in one.stops if one.capable else ():
            found.setdefault(stop.reason, []).append(one.node_id)
    return [Stop(reason, detail={"nodes": len(ids), "node_ids": ids[:SHOWN]}) for reason, ids in found.items()]


def _nobody(job: Job, told: Iterable[Told]) -> Stop:
    """No node could have it: which capabilities none of them offers, how many only ask for other kinds."""
    told = list(told)
    lacks = [{name for stop in one.stops for name in stop.detail.get("lacking", ())} for one in told]
    never = set(job.needs).intersection(*lacks)
    asked = sum(any(stop.reason == "kind_not_asked" for stop in one.stops) for one in told)
    said = {"kind": job.kind, "required_capabilities": list(job.needs), "nodes": len(told)}
    return Stop("no_capable_node", detail={**said, "lacking": sorted(never), "ask_for_other_kinds": asked})


def sentence(stop: Stop) -> str:
    """The reason for people."""
    text = TEXTS[stop.reason]
    return text.format_map(stop.detail) if isinstance(text, str) else text(stop.detail)


def _not_pending(said: dict[str, Any]) -> str:
    if said["status"] == "running":
        cancel = "; it was asked to stop" if said["cancel_requested"] else ""
        return f"It is running: node {said['node_id']} holds its lease, attempt {said['attempt']}{cancel}."
    why = f" ({said['reason']})" if said["reason"] else ""
    return f"It is {said['status']}{why}."


def _backoff(said: dict[str, Any]) -> str:
    return f"It waits to be tried again, after {said['failures']} failures and {said['losses']} lost leases."


def _dependency(said: dict[str, Any]) -> str:
    linking = "; it is still being tied to some of them" if said.get("linking") else ""
    return f"{said['parents_left']} of the jobs it depends on have not completed{linking}."


def _quarantined(said: dict[str, Any]) -> str:
    cause = f": job {said['root_cause']} has failed" if said["root_cause"] else ""
    return f"It is on hold until what it depends on is redriven{cause}."


def _paused(said: dict[str, Any]) -> str:
    what = "Everything" if said["kind"] is None else f"Kind {said['kind']}"
    return f"{what} is paused" + (f": {said['reason']}." if said["reason"] else ".")


def _no_capable_node(said: dict[str, Any]) -> str:
    if not said["nodes"]:
        return "No node is known, and no pull waits."
    if said["lacking"]:
        return f"None of {said['nodes']} nodes offers {', '.join(said['lacking'])}."
    if said["ask_for_other_kinds"] == said["nodes"]:
        return f"None of {said['nodes']} nodes asks for jobs of kind {said['kind']}."
    return f"None of {said['nodes']} nodes offers all that the job needs and takes kind {said['kind']}."


def _of_node(state: str) -> Callable[[dict[str, Any]], str]:
    def text(said: dict[str, Any]) -> str:
        if "nodes" in said:
            return f"{said['nodes']} nodes that could have it: {state}."
        full = f" ({said['leases']} of {said['max_concurrent']} leases)" if "max_concurrent" in said else ""
        return f"The node is {state}{full}."

    return text


TEXTS: dict[str, str | Callable[[dict[str, Any]], str]] = {
    "not_pending": _not_pending,
    "quarantined": _quarantined,
    "not_before": "It is not to start before a certain time.",
    "backoff": _backoff,
    "dependency": _dependency,
    "paused": _paused,
    "throttled": "Source {source} runs {running} of at most {concurrent} jobs at once.",
    "inflight_limit": "{inflight} of at most {max_inflight} leases are given.",
    "no_capable_node": _no_capable_node,
    "node_stale": _of_node("STALE"),
    "node_dead": _of_node("DEAD"),
    "node_draining": _of_node("draining"),
    "node_busy": _of_node("busy"),
    "node_full": _of_node("full"),
    "policy_denied": "The active policy keeps it from the node.",
    "not_capable": lambda said: f"The node does not offer {', '.join(said['lacking'])}.",
    "kind_not_asked": "The node's waiting pulls do not ask for kind {kind}.",
    "waits_its_turn": "Nothing stops it: it waits for a pull of one of {free_nodes} free nodes, and for its turn.",
}
"""Every reason, and what it says of its evidence."""

REASONS = tuple(TEXTS)
