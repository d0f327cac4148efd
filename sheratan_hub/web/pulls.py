"""The data plane's handlers of pulls, and how leases are delivered: to those who have gone, not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from sheratan_hub.items import Order, Outcome
from sheratan_hub.rules.command import Code, Command, Refused
from sheratan_hub.rules.pull import Pull, Pulled
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.forms import FleetPullForm, PullForm
from sheratan_hub.web.gate import holds_still, patience_ms, refuse_revoked
from sheratan_hub.web.plane import Call
from sheratan_hub.web.query import whole
from sheratan_hub.web.render import pulled, reply


async def pull(call: Call) -> Answer:
    """POST /api/jobs/pull: lease jobs, waiting for some if asked."""
    return await _pull(call, call.form, wait_ms(call.form))


async def fleet_pull(call: Call) -> Answer:
    """/mesh/pull_requests: lease jobs without waiting; the node stands in the path, the body or the query."""
    form: FleetPullForm = call.form or FleetPullForm()
    query = call.request.query
    node_id = call.params.get("node_id") or form.node_id or query.get("node_id") or query.get("host_id") or ""
    if not node_id or len(node_id) > 200:
        raise Refused(Code.INVALID_FIELD, "node_id must have 1 to 200 characters - at `$.node_id`")
    most = whole(call.request, "max", form.max, 1, 100)
    return await _pull(call, msgspec.structs.replace(form, node_id=node_id, max=most), 0)


async def _pull(call: Call, form: PullForm, wait_ms: int) -> Answer:
    done = (await pull_after(call, (), form, wait_ms))[1]
    if done.denied is not None:
        raise done.denied
    return await deliver(call, done)


async def pull_after(
    call: Call, first: Sequence[Command], form: PullForm, wait_ms: int, order: Order = "in_turn"
) -> tuple[list[Outcome], Pulled]:
    """The outcomes of `first`, and what the pull got after them. `deliver` must follow."""
    command = Pull(
        form.node_id,
        call.services.clock.secret(),
        form.max,
        form.pull_id,
        None if form.capabilities is None else frozenset(form.capabilities),
        frozenset(form.kinds or ()),
    )
    origin, good = call.from_node(form.node_id), partial(holds_still, call) if wait_ms else None
    outcomes, done = await call.hub.pull_after(first, command, patience_ms(call, wait_ms), origin, order, good)
    if wait_ms and not done.jobs and not first:
        refuse_revoked(call)
    if first and done.denied is not None:
        call.refused(done.denied, form.node_id)
    if call.hub.waiting.closed and not done.jobs:
        done = Pulled(reason="draining")
    return outcomes, done


async def deliver(call: Call, done: Pulled, **also: Any) -> Answer:
    """Write the answer here, so that leases whose answer could not be written go back at no cost.

    `also` are further members of the answer, which come first.
    """
    response = reply(pulled(done, defer_ms(call, done.reason), call.services.clock.now(), **also))
    if not done.jobs:
        return response
    begun = False
    try:
        transport = call.request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has gone")
        begun = True
        await call.request.answer(response)
    except (ConnectionError, asyncio.CancelledError):
        call.hub.give_back(done, begun=begun)
        raise
    return response


def wait_ms(form: PullForm) -> int:
    """How long the pull may wait."""
    return int(form.wait_seconds * 1000)


def defer_ms(call: Call, reason: str | None) -> int:
    """How long a node without work does well to wait, jittered by a quarter so that a fleet does not march."""
    known = {"no_job": 1000, "node_full": 1000, "throttled": 1000, "draining": 2000}
    base = call.hub.frees_in_ms() if reason == "inflight_limit" else known.get(reason or "no_job", 5000)
    return int(base * (0.75 + call.services.clock.jitter() / 2))
