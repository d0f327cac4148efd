"""The parts of a diagnosis that a hub is asked: queue, oldest waiting jobs, nodes, tokens. Never what is in a job."""

from __future__ import annotations

import heapq
from typing import Any

from sheratan_hub.clock import rfc3339
from sheratan_hub.diagnosis import Looking
from sheratan_hub.explaining import explained_all
from sheratan_hub.keyring import Use
from sheratan_hub.rules.eligible import Stop
from sheratan_hub.rules.explain import Explanation, sentence
from sheratan_hub.rules.jobs import Job, job_of
from sheratan_hub.rules.lanes import LEVELS, PLACES, read_lane
from sheratan_hub.rules.nodes import Node, health_of, node_of
from sheratan_hub.rules.signs import NodeSign, Turning, Wait
from sheratan_hub.rules.silence import FLEET, fleet_of
from sheratan_hub.rules.tokens import RING, ring_of

WAITING, NODES_SHOWN, LANES_SHOWN, WHO_SHOWN = 20, 500, 50, 5
NODES_PIECE = 50
"""How much is shown: the oldest waiting jobs, nodes, lanes, nodes of one explanation; nodes read in one slice."""


async def queue(look: Looking) -> dict[str, Any]:
    """How full the queue is, what waits longest, what is paused or throttled."""
    hub, now = look.hub, look.hub.clock.now()
    counts = await hub.counts()
    lanes = hub.committer.lanes
    heads = [(lanes.head(name), name) for name in lanes]
    oldest = min((at for level in range(LEVELS) if (at := lanes.oldest(level)) is not None), default=None)
    pauses = hub.pauses()
    shown = {
        "counts": counts,
        "limits": {name: getattr(hub.limits, name) for name in ("max_depth", "max_inflight", "dead_letters_max")},
        "lane_count": len(heads),
        "lanes": [_lane(look, now, *one) for one in heapq.nsmallest(LANES_SHOWN, heads)],
        "oldest_ready_ms": None if oldest is None else max(0, now - oldest),
        "pauses": [{"kind": _name(look, one.kind), "since": _at(one.since), "until": _at(one.until)} for one in pauses],
        "throttled_sources": sorted(look.redactor.name(source) for source in hub.throttled)[:LANES_SHOWN],
    }
    look.members.json("queue.json", shown, cut=len(heads) > LANES_SHOWN)
    ready = None if oldest is None else max(0, now - oldest)
    return {"counts": counts, "limits": hub.limits, "oldest_ms": ready, "pauses": pauses}


def _lane(look: Looking, now: int, head: int, name: str) -> dict[str, Any]:
    lane, since = read_lane(name), head // PLACES
    return {
        "priority": lane.level,
        "kind": look.redactor.name(lane.kind),
        "source": look.redactor.name(lane.source) or None,
        "required_capabilities": [look.redactor.name(need) for need in lane.needs],
        "head_since": _at(since),
        "head_age_ms": max(0, now - since),
    }


async def waiting(look: Looking) -> dict[str, Any]:
    """What `explain` says of the oldest waiting jobs; never what is in them."""
    page = await look.hub.page("job", ("pending",), limit=WAITING)
    jobs = [job_of(row) for row in page.rows]
    shown, waits = [], []
    async for found in explained_all(look.hub, jobs):
        shown.append(_explanation(look, found))
        waits.append(_wait(look, found))
        await look.pace.step()
    look.members.json("waiting.json", {"jobs": shown, "more": page.next is not None})
    return {"waits": tuple(waits)}


def _explanation(look: Looking, found: Explanation) -> dict[str, Any]:
    job, fleet, redactor = found.job, found.fleet, look.redactor
    nodes = None
    if fleet is not None:
        numbers = {name: getattr(fleet, name) for name in ("known", "live", "capable", "free", "cut")}
        who = [
            {"node_id": redactor.name(one.node_id), "state": one.state, "reasons": [stop.reason for stop in one.stops]}
            for one in fleet.shown[:WHO_SHOWN]
        ]
        nodes = {**numbers, "shown": who}
    return {
        "job_id": job.id,
        "kind": redactor.name(job.kind),
        "source": redactor.name(job.source) or None,
        "priority": job.priority,
        "created_at": _at(job.created_at),
        "age_ms": _age(look, job),
        "attempt": job.attempt,
        "failures": job.failures,
        "losses": job.losses,
        "runnable": found.runnable,
        "reasons": [_reason(look, stop) for stop in found.reasons],
        "nodes": nodes,
    }


def _reason(look: Looking, stop: Stop) -> dict[str, Any]:
    """A reason with its evidence; the words of who has paused something stay with the hub."""
    detail = {**stop.detail, "reason": ""} if stop.reason == "paused" else stop.detail
    shown = {name: _at(value) if name.endswith(("_at", "_until")) else value for name, value in detail.items()}
    evidence = look.redactor.names(shown)
    return {
        "reason": stop.reason,
        "text": look.redactor.name(sentence(Stop(stop.reason, 0, detail))),
        "evidence": evidence,
    }


def _wait(look: Looking, found: Explanation) -> Wait:
    reasons = tuple(stop.reason for stop in found.reasons)
    lacking = (name for stop in found.reasons for name in stop.detail.get("lacking", ()))
    names = tuple(sorted({look.redactor.name(str(name)) for name in lacking}))
    return Wait(found.job.id, look.redactor.name(found.job.kind), _age(look, found.job), reasons, names)


def _age(look: Looking, job: Job) -> int:
    return max(0, look.hub.clock.now() - job.created_at)


async def registry(look: Looking) -> dict[str, Any]:
    """The nodes, the silent ones first, without their own free words; whether most of them fell silent at once."""
    hub, now = look.hub, look.hub.clock.now()
    nodes, more = await _nodes(look)
    fleet = fleet_of(next(iter(await hub.fetch([FLEET])), None))
    judge = hub.judge
    policy = {"version": judge.version, "sha256": judge.sha256 or None}
    silence = {"braked": fleet.braked(now), "since": _at(fleet.since), "until": _at(fleet.until)}
    brake = {**silence, "silent": fleet.silent, "known": fleet.known}
    shown = {look.redactor.name(node.id): _node(look, node) for node in nodes}
    look.members.json("registry.json", {"nodes": shown, "policy": policy, "mass_silence": brake}, cut=more)
    signs = tuple(
        NodeSign(look.redactor.name(one.id), hub.state_of(one), max(0, now - one.last_seen), one.skew_ms or 0)
        for one in nodes
    )
    return {"fleet": fleet, "nodes": signs, **await _tokens(look, nodes)}


async def _nodes(look: Looking) -> tuple[list[Node], bool]:
    """(the first nodes, whether there are more)"""
    found: list[Node] = []
    more = False
    for state, most in (("STALE", NODES_SHOWN // 4), ("DEAD", NODES_SHOWN // 2), ("ONLINE", NODES_SHOWN)):
        after: str | None = None
        while len(found) < most:
            page = await look.hub.page("node", (state,), after, min(NODES_PIECE, most - len(found)))
            found += map(node_of, page.rows)
            after = page.next
            await look.pace.step()
            if after is None:
                break
        more = more or after is not None or len(found) >= NODES_SHOWN
    return found, more


def _node(look: Looking, node: Node) -> dict[str, Any]:
    redactor = look.redactor
    return {
        "status": look.hub.state_of(node),
        "health": health_of(node),
        "reported_status": node.status,
        "first_seen": _at(node.first_seen),
        "last_seen": _at(node.last_seen),
        "zone": _name(look, node.zone),
        "capabilities": [redactor.name(one) for one in node.capabilities[:100]],
        "current_jobs": node.current_jobs,
        "max_concurrent": node.max_concurrent,
        "draining": node.draining,
        "drain_until": _at(node.drain_until),
        "clock_skew_ms": node.skew_ms,
        "attestation": node.attested.status,
        "drift_count": node.attested.drift_count,
        "spoof_count": node.attested.spoof_count,
        "token_id": node.token_id,
        "labels": len(node.labels),
        "owed": list(node.owed),
    }


async def _tokens(look: Looking, nodes: list[Node]) -> dict[str, Any]:
    """Which tokens are in force, by id, and which of these nodes still use the old one of a rotation."""
    rows = await look.hub.fetch([RING])
    if not rows:
        return {}
    ring = ring_of(rows[0])
    used = {node.id: Use(node.token_id, node.last_seen) for node in nodes if node.token_id is not None}
    used |= {id: use for id, use in look.uses.items() if id not in used or used[id].at < use.at}
    dead = {node.id for node in nodes if look.hub.state_of(node) == "DEAD"}
    late = sorted(id for id, use in used.items() if use.token_id == ring.active.id and id not in dead)
    late = [look.redactor.name(id) for id in late] if ring.next is not None else []
    shown = {
        "active": {"id": ring.active.id, "since": _at(ring.active.since)},
        "next": None if ring.next is None else {"id": ring.next.id, "since": _at(ring.next.since)},
        "until": _at(ring.until) if ring.next is not None else None,
        "stragglers": late[:NODES_SHOWN],
    }
    look.members.json("tokens.json", shown)
    return {"turning": Turning(ring.until, tuple(late)) if ring.next is not None else None}


def _name(look: Looking, text: str | None) -> str | None:
    return None if text is None else look.redactor.name(text)


def _at(ms: Any) -> str | None:
    """A time as text; 0 is none."""
    return rfc3339(ms) if isinstance(ms, int) and ms > 0 else None
