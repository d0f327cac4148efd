"""What the hub does by itself: sweeping up what is due, reaping dead nodes' leases, clamping times at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sheratan_hub.items import HUB, Item
from sheratan_hub.rules.command import Command
from sheratan_hub.rules.jobs import job_of
from sheratan_hub.rules.nodes import ClampNodes, SweepNodes, Swept, node_of
from sheratan_hub.rules.pauses import SweepPauses
from sheratan_hub.rules.sweep import ClampLeases, ReapNode, SweepJobs

if TYPE_CHECKING:
    from sheratan_hub.hub import Hub

JOB_AGENDAS = ("lease", "wait", "expire")


async def sweep(hub: Hub) -> int | None:
    """One look at everything that is due; when the next is."""
    hub.give_back_again()
    commands: list[Command] = [SweepJobs(agenda, hub.clock.jitter()) for agenda in JOB_AGENDAS]
    outcomes = await hub.execute_many([*commands, SweepNodes(), SweepPauses()], urgent=True)
    hub.lease_ends_at = outcomes[0].next_at if isinstance(outcomes[0], Swept) else None
    swept = [outcome for outcome in outcomes if isinstance(outcome, Swept)]
    for node_id in (node_id for one in swept for node_id in one.dead):
        await _reap(hub, node_id)
    return min((one.next_at for one in swept if one.next_at is not None), default=None)


async def _reap(hub: Hub, node_id: str) -> None:
    after: str | None = None
    while True:
        page = await hub.page("job", ("running", None, None, None, node_id), after)
        if page.rows:
            await hub.execute_many([ReapNode(node_id, tuple(row.id for row in page.rows))], urgent=True)
        if page.next is None:
            return
        after = page.next


async def clamp(hub: Hub) -> None:
    """At the start: what was written by another wall clock, and lies too far ahead, is cut to what can be."""
    await _clamp_leases(hub)
    await _clamp_nodes(hub)


async def _clamp_leases(hub: Hub) -> None:
    """Design rule 12: what was persisted by another wall clock is clamped when it is read back."""
    after: str | None = None
    now = hub.clock.now()
    while True:
        page = await hub.page("job", ("running",), after, 1000)
        wrong = [job.id for job in map(job_of, page.rows) if job.lease_until > now + job.lease_ms]
        if wrong:
            hub.committer.add(Item([ClampLeases(tuple(wrong))], HUB, None))
        if page.next is None:
            return
        after = page.next


async def _clamp_nodes(hub: Hub) -> None:
    after: str | None = None
    now = hub.clock.now()
    while True:
        page = await hub.page("node", (), after, 1000)
        wrong = tuple(node.id for node in map(node_of, page.rows) if node.last_seen > now)
        if wrong:
            hub.committer.add(Item([ClampNodes(wrong)], HUB, None))
        if page.next is None:
            return
        after = page.next
