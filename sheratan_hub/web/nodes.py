"""The control plane's handlers of what operators do with nodes: drain, resume, attest; and of the fleet's silence."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated, Any

from msgspec import Meta

from sheratan_hub.clock import rfc3339
from sheratan_hub.reaping import end_silence
from sheratan_hub.rules.command import Code, Command, Refused
from sheratan_hub.rules.drain import Accept, Drain, Resume
from sheratan_hub.rules.nodes import Node
from sheratan_hub.rules.silence import FLEET, Fleet, fleet_of
from sheratan_hub.web import forms
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.forms import LAST_MOMENT_MS, Form, Moment
from sheratan_hub.web.plane import Call
from sheratan_hub.web.render import claim_answer, node_answer, reply


class DrainForm(Form, frozen=True):
    """Until when a drained node may finish what it holds: `seconds` from now or a time; with neither for ever."""

    seconds: Annotated[float, Meta(ge=0, le=31_536_000)] | None = None
    until: Moment | None = None


async def drain(call: Call) -> Answer:
    """POST /api/hosts/{id}/drain: lease nothing more to the node."""
    form: DrainForm = call.form
    if form.seconds is not None and form.until is not None:
        raise Refused(Code.INVALID_FIELD, "give seconds or until, not both - at `$.until`")
    until = None if form.until is None else forms.moment_ms("until", form.until)
    in_ms = None if form.seconds is None else round(form.seconds * 1000)
    return await _done(call, Drain(call.params["id"], in_ms, until))


async def resume(call: Call) -> Answer:
    """POST /api/hosts/{id}/resume: take a drained node back."""
    return await _done(call, Resume(call.params["id"]))


async def attest(call: Call) -> Answer:
    """POST /api/hosts/{id}/attest: accept what the node attests now as its baseline."""
    return await _done(call, Accept(call.params["id"]))


async def _done(call: Call, command: Command) -> Answer:
    node: Node = await call.hub.execute(command, call.from_node(call.params["id"]))
    return reply({"ok": True, **whole(call, node)})


def whole(call: Call, node: Node) -> dict[str, Any]:
    """A node alone: as in lists, with the history of what it attested."""
    history = [claim_answer(claim) for claim in node.attested.history]
    return {**node_answer(node, call.hub.state_of(node)), "attestation_history": history}


async def fleet(call: Call) -> Answer:
    """GET /api/fleet: how many nodes are in which state, and whether the brake on mass silence is in force."""
    rows = await call.hub.fetch([FLEET])
    counts = await call.hub.counts("node:")
    found = fleet_of(rows[0] if rows else None)
    nodes = {state: counts.get(f"node:{state}", 0) for state in ("ONLINE", "STALE", "DEAD")}
    return reply({"ok": True, "nodes": nodes, "silence": _silence(found, call.services.clock.now())})


def _silence(fleet: Fleet, now: int) -> dict[str, Any] | None:
    if not fleet.braked(now):
        return None
    times = {"since": rfc3339(fleet.since), "until": rfc3339(fleet.until)}
    return {**times, "silent": fleet.silent, "known": fleet.known}


async def reap(call: Call) -> Answer:
    """POST /api/fleet/reap: end the brake on mass silence; the leases of DEAD nodes end now."""
    return reply({"ok": True, "ended": await end_silence(call.hub, call.origin)})


def moment_ms(said: Any) -> int | None:
    """A time as nodes and operators write it, in ms: RFC 3339 with a zone, or seconds or ms since 1970; else None."""
    if isinstance(said, str):
        try:
            moment = datetime.fromisoformat(said)
            return None if moment.tzinfo is None else int(moment.astimezone(UTC).timestamp() * 1000)
        except (ValueError, OverflowError):
            return None
    if isinstance(said, bool) or not isinstance(said, (int, float)) or not math.isfinite(said):
        return None
    at = int(said if abs(said) >= 1e11 else said * 1000)
    return at if 0 <= at <= LAST_MOMENT_MS else None
