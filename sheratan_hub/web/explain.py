"""Answers why a job is not running now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from sheratan_hub.clock import rfc3339
from sheratan_hub.explaining import Explained, explained
from sheratan_hub.rules.eligible import Stop
from sheratan_hub.rules.explain import Fleet, Told, sentence
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.plane import Call
from sheratan_hub.web.render import reply, status_of


class ReasonAnswer(msgspec.Struct, frozen=True):
    """One reason: `detail` is for people, `until` the earliest time it may end by itself."""

    reason: str
    detail: str
    evidence: dict[str, Any]
    until: str | None


class NodeAnswer(msgspec.Struct, frozen=True):
    """A node, and what keeps it from having the job; nothing: it is free to."""

    node_id: str
    status: str | None
    capable: bool
    leases: int
    waiting_pulls: int
    reasons: list[ReasonAnswer]


class NodesAnswer(msgspec.Struct, frozen=True):
    """How many nodes there are for the job; the first of them, the free ones before others."""

    known: int
    live: int
    capable: int
    free: int
    cut: bool
    shown: list[NodeAnswer]


class ExplainAnswer(msgspec.Struct, frozen=True):
    """Why the job is not running now."""

    ok: bool
    job_id: str
    status: str
    runnable: bool
    reasons: list[ReasonAnswer]
    expires_at: str | None
    rate_limit: dict[str, Any] | None
    nodes: NodesAnswer | None


async def explain(call: Call) -> Answer:
    """GET /api/jobs/{id}/explain: every reason why a job is not running now."""
    found = await explained(call.hub, call.params["id"])
    now = call.services.clock.now()
    return reply(
        ExplainAnswer(
            True,
            found.job.id,
            status_of(found.job, call.hub.throttled),
            found.runnable,
            [_reason(stop, now) for stop in found.reasons],
            _time(0 if found.job.finished or found.job.status == "running" else found.job.ends_unclaimed_at),
            _rate_limit(found),
            _nodes(found.fleet, now) if found.fleet is not None else None,
        )
    )


def _reason(stop: Stop, now: int) -> ReasonAnswer:
    until = max(stop.until, now) if stop.until else 0
    return ReasonAnswer(stop.reason, sentence(stop), _evidence(stop.detail), _time(until))


def _evidence(detail: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _time(value) if name.endswith(("_at", "_until")) else value for name, value in detail.items()}


def _rate_limit(found: Explained) -> dict[str, Any] | None:
    if found.rate is None:
        return None
    limits = {"per_minute": found.rate.per_minute, "concurrent": found.rate.concurrent}
    return {"source": found.job.source, **limits, "running": found.running}


def _nodes(fleet: Fleet, now: int) -> NodesAnswer:
    shown = [_node(one, now) for one in fleet.shown]
    return NodesAnswer(fleet.known, fleet.live, fleet.capable, fleet.free, fleet.cut, shown)


def _node(told: Told, now: int) -> NodeAnswer:
    reasons = [_reason(stop, now) for stop in told.stops]
    return NodeAnswer(told.node_id, told.state, told.capable, told.leases, told.waiting_pulls, reasons)


def _time(ms: int) -> str | None:
    return rfc3339(ms) if ms else None
