"""What the hub does by itself: sweeping up what is due, clamping times at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sheratan_hub.items import HUB, Item
from sheratan_hub.reaping import reap
from sheratan_hub.rules.cascade import SweepCascades, SweepLinks
from sheratan_hub.rules.command import Command
from sheratan_hub.rules.jobs import job_of
from sheratan_hub.rules.nodes import Swept, node_of
from sheratan_hub.rules.pauses import SweepPauses
from sheratan_hub.rules.probe import Probe
from sheratan_hub.rules.silence import ClampNodes, SweepNodes
from sheratan_hub.rules.sweep import ClampDelays, ClampLeases, SweepJobs, delayed_beyond

if TYPE_CHECKING:
    from sheratan_hub.hub import Hub

JOB_AGENDAS = ("lease", "wait", "expire")
SWEPT = frozenset({*JOB_AGENDAS, "node", "cascade", "resume", "link", "pause"})
"""The agendas that the sweep looks at; a row that comes into one of them may call for the next sweep."""


async def sweep(hub: Hub) -> int | None:
    """One look at everything that is due; when the next is."""
    hub.give_back_again()
    await hub.beats.unsaved.catch_up()
    await _clamp_delays(hub)
    commands: list[Command] = [SweepJobs(agenda, hub.clock.jitter()) for agenda in JOB_AGENDAS]
    commands += [*cascades(), SweepNodes(), SweepPauses()]
    if hub.committer.failing:
        commands.append(Probe(writes=True))
    outcomes = await hub.execute_many(commands, urgent=True)
    hub.lease_ends_at = outcomes[0].next_at if isinstance(outcomes[0], Swept) else None
    swept = [outcome for outcome in outcomes if isinstance(outcome, Swept)]
    await reap(hub, [end for one in swept for end in one.owed])
    return min((one.next_at for one in swept if one.next_at is not None), default=None)


def cascades() -> list[Command]:
    """What tells dependents of their parents, and ties those that have many to them: a piece of each."""
    return [SweepCascades(), SweepLinks()]


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


async def _clamp_delays(hub: Hub) -> None:
    """Design rule 12 for jobs that wait: one page with each sweep, until all that were there at the start are seen."""
    if hub.delays_after is None:
        return
    page = await hub.page("job", ("pending",), hub.delays_after or None, 1000)
    now = hub.clock.now()
    wrong = tuple(job.id for job in map(job_of, page.rows) if delayed_beyond(job, now))
    if wrong:
        await hub.execute_many([ClampDelays(wrong)], urgent=True)
    hub.delays_after = page.next


async def _clamp_nodes(hub: Hub) -> None:
    after: str | None = None
    now = hub.clock.now()
    while True:
        page = await hub.page("node", (), after, 1000)
        nodes = map(node_of, page.rows)  # when a STALE one is due depends on when the hub was started
        wrong = tuple(node.id for node in nodes if node.last_seen > now or node.state == "STALE")
        if wrong:
            hub.committer.add(Item([ClampNodes(wrong)], HUB, None))
        if page.next is None:
            return
        after = page.next
