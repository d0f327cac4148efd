"""Why a waiting job cannot be leased now: to anybody, or to one node. Pulls choose by this, explanations tell it.

What is asked for each job of a pull is a function of its own, so that pulls pay for nothing else; `stops` and
`stops_here` ask all of them, each stop with its evidence and the moment when it may end.

A further stop is one more such function here, which the pull asks, and one line at the end of `stops` (if nobody may
have the job) or of `stops_here` (if this node may not). `rules/explain.py` needs a sentence for its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from sheratan_hub.rules.command import Limits, Rate
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.lanes import Offer, suits
from sheratan_hub.rules.limits import rate_of
from sheratan_hub.rules.nodes import Node, state_of
from sheratan_hub.rules.pauses import NONE, Pause, Pauses
from sheratan_hub.rules.policies import node_ask
from sheratan_hub.rules.policy import Judge, Verdict


def node_stop(node: Node | None, leases: int, now: int, limits: Limits, started_at: int) -> str | None:
    """Why this node gets nothing now, as the reason of its pulls (design rule 9); None: it may have jobs.

    `node` None is one never heard of: it may pull, within the limit for such nodes. `leases` are its live ones.
    """
    if node is not None:
        state = state_of(node, now, limits, started_at)
        if state != "ONLINE":
            return "node_stale" if state == "STALE" else "node_dead"
        if node.draining:
            return "node_draining"
        if node.status == "busy":
            return "node_busy"
    room = node_room(node, leases, limits)
    return "node_full" if room is not None and room <= 0 else None


def node_room(node: Node | None, leases: int, limits: Limits) -> int | None:
    """How many more leases the node may have: its `max_concurrent`, else the configured cap; None: no limit."""
    most = node.max_concurrent if node is not None else None
    if most is None:
        most = limits.max_leases_per_node or None
    return None if most is None else most - leases


def hub_room(inflight: int, limits: Limits) -> int:
    """How many more leases the hub may give."""
    return limits.max_inflight - inflight


def kind_stop(kind: str, pauses: Pauses, now: int) -> Pause | None:
    """The pause that keeps this kind from being leased."""
    return pauses.of(kind, now)


def source_room(source: str, running: int, stored: Mapping[str, Rate], limits: Limits) -> int | None:
    """How many more jobs of this source may run (design rule 10); None: no limit. At 0 it is throttled."""
    rate = rate_of(source, stored, limits)
    return None if rate is None or not rate.concurrent else rate.concurrent - running


class Stop(msgspec.Struct, frozen=True):
    """One reason why a job cannot be leased now. `until` is the earliest time (ms) it may end by itself; 0: unknown.

    Times (ms) in `detail` have names that end in `_at` or `_until`.
    """

    reason: str
    until: int = 0
    detail: dict[str, Any] = {}


class World(msgspec.Struct, frozen=True):
    """What counts beside the job and the node: `inflight` live leases, `running` of them of the job's source.

    Evidence only: `frees_at`, when the next lease ends by its time, and what is known of the job's `parents`.
    """

    now: int
    limits: Limits = Limits()
    started_at: int = 0
    pauses: Pauses = NONE
    rates: Mapping[str, Rate] = {}
    inflight: int = 0
    running: int = 0
    frees_at: int = 0
    parents: dict[str, Any] = {}
    judge: Judge = Judge()


def stops(job: Job, world: World) -> list[Stop]:
    """Why nobody can lease this job now; empty: somebody may."""
    found = list(_own_stops(job, world))
    pause = kind_stop(job.kind, world.pauses, world.now)
    if pause is not None:
        found.append(Stop("paused", pause.until, {"kind": pause.kind, "reason": pause.reason}))
    room = source_room(job.source, world.running, world.rates, world.limits)
    if room is not None and room <= 0:
        said = {"source": job.source, "running": world.running, "concurrent": world.running + room}
        found.append(Stop("throttled", detail=said))
    if hub_room(world.inflight, world.limits) <= 0:
        said = {"inflight": world.inflight, "max_inflight": world.limits.max_inflight}
        found.append(Stop("inflight_limit", world.frees_at, said))
    return found


def _own_stops(job: Job, world: World) -> Iterator[Stop]:
    """What its own state says; nothing exactly if its row stands in a lane (see `Job.row`)."""
    if job.status == "quarantined":
        yield Stop("quarantined", detail={"reason": job.reason, "root_cause": job.root_cause, **world.parents})
        return
    if job.status != "pending":
        yield _held(job) if job.status == "running" else Stop("not_pending", detail=_ended(job))
        return
    if job.waiting:
        again = bool(job.failures or job.losses)
        said = {"failures": job.failures, "losses": job.losses}
        yield Stop("backoff" if again else "not_before", job.not_before, said)
    if job.parents_left:
        said = {"parents_left": job.parents_left, "parents_failed": job.parents_failed}
        yield Stop("dependency", detail={**said, **world.parents})


def _held(job: Job) -> Stop:
    """Who has it; it can change at the end of the lease, of the attempt, or of what a cancel waits."""
    said = {
        "status": job.status,
        "node_id": job.node_id,
        "attempt": job.attempt,
        "started_at": job.started_at,
        "lease_until": job.lease_until,
        "times_out_at": job.times_out_at,
        "cancel_requested": bool(job.cancel_at),
    }
    return Stop("not_pending", job.row.due_at, said)


def _ended(job: Job) -> dict[str, Any]:
    return {
        "status": job.status,
        "reason": job.reason,
        "finished_at": job.finished_at,
        "root_cause": job.root_cause,
    }


def policy_stop(judge: Judge, node_id: str, node: Node | None, kind: str, source: str) -> Verdict | None:
    """What of the active policy keeps such a job from this node."""
    if judge.trivial:
        return None
    verdict = judge.decide(node_ask("pull", node_id, node, kind, source))
    return None if verdict.allowed else verdict


def stops_here(job: Job, node: Node | None, offer: Offer, leases: int, world: World, node_id: str = "") -> list[Stop]:
    """Why this node, with this offer and so many live leases, cannot lease the job though somebody may."""
    found: list[Stop] = []
    stop = node_stop(node, leases, world.now, world.limits, world.started_at)
    if stop is not None:
        found.append(Stop(stop, detail=_of_node(stop, node, leases, world.limits)))
    if not suits(job.kind, job.needs, offer):
        if lacking := sorted(set(job.needs) - offer.capabilities):
            found.append(Stop("not_capable", detail={"lacking": lacking}))
        if offer.kinds and job.kind not in offer.kinds:
            found.append(Stop("kind_not_asked", detail={"kind": job.kind, "asked": sorted(offer.kinds)}))
    verdict = policy_stop(world.judge, node_id or (node.id if node else ""), node, job.kind, job.source)
    if verdict is not None:
        found.append(Stop("policy_denied", detail={"version": world.judge.version, "by": verdict.by}))
    return found


def _of_node(stop: str, node: Node | None, leases: int, limits: Limits) -> dict[str, Any]:
    if stop == "node_full":
        return {"leases": leases, "max_concurrent": leases + (node_room(node, leases, limits) or 0)}
    return {"last_seen_at": node.last_seen} if node is not None else {}
