"""Gathers what an explanation is made of: the job, its parents, pauses, limits, nodes, waiting pulls.

All of it is read by key or by bounded pages; no jobs are scanned.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from sheratan_hub.rules.command import Code, Rate, Refused
from sheratan_hub.rules.edges import failed_of
from sheratan_hub.rules.eligible import World
from sheratan_hub.rules.explain import SHOWN, Explanation, Seen, explain
from sheratan_hub.rules.jobs import Job, job_key, job_of
from sheratan_hub.rules.lanes import PLACES, level_at
from sheratan_hub.rules.limits import RATES, rate_of, rates_of
from sheratan_hub.rules.nodes import node_of
from sheratan_hub.rules.pauses import PAUSES, pauses_of
from sheratan_hub.rules.view import leases_on, running_of
from sheratan_hub.storage import Key, Row

if TYPE_CHECKING:
    from sheratan_hub.hub import Hub

NODES_MAX = 1000
"""So many nodes are looked at, those ONLINE first."""

TRIES = 3
"""How often it is begun again because the job has changed meanwhile."""


class Explained(Explanation, frozen=True):
    """An explanation, and the limit of the job's source if it has one: `running` of its jobs run."""

    rate: Rate | None = None
    running: int = 0


async def explained(hub: Hub, job_id: str) -> Explained:
    """Why the job is not running now. Refused with `job_not_found`."""
    row = await _job(hub, job_id)
    for _ in range(TRIES):
        found = await _explain(hub, job_of(row))
        again = await _job(hub, job_id)
        if again.doc == row.doc:
            break
        row = again
    return found


async def explained_all(hub: Hub, jobs: Iterable[Job]) -> AsyncIterator[Explained]:
    """Why each of these jobs is not running, as they were read; the nodes are read once, for all of them."""
    nodes = await _nodes(hub)
    for job in jobs:
        yield await _explain(hub, job, nodes)


async def _job(hub: Hub, job_id: str) -> Row:
    rows = await hub.fetch([job_key(job_id)])
    if not rows:
        raise Refused(Code.JOB_NOT_FOUND, f"there is no job {job_id}")
    return rows[0]


async def _explain(hub: Hub, job: Job, nodes: tuple[list[Seen], bool] | None = None) -> Explained:
    if job.status == "running" or job.finished:
        found, world = explain(job, World(hub.clock.now(), hub.limits), ()), None
    else:
        world = await _world(hub, job)
        seen, cut = nodes or await _nodes(hub)
        found = explain(job, world, seen, _line(hub, job), cut=cut)
    rate = rate_of(job.source, world.rates, hub.limits) if world is not None else None
    running = world.running if world is not None else 0
    return Explained(found.job, found.stops, found.reasons, found.fleet, rate, running)


async def _world(hub: Hub, job: Job) -> World:
    rows = {row.key: row for row in await hub.fetch([PAUSES, RATES])}
    inflight = (await hub.counts("job:running")).get("job:running", 0)
    of_source = running_of(job.source)
    running = (await hub.counts(of_source)).get(of_source, 0) if job.source else 0
    parents = await _parents(hub, job) if job.parents_left or job.status == "quarantined" else {}
    return World(
        hub.clock.now(),
        hub.limits,
        hub.committer.started_at,
        pauses_of(rows.get(PAUSES)),
        rates_of(rows.get(RATES)),
        inflight,
        running,
        hub.lease_ends_at or 0,
        parents,
        hub.judge,
    )


async def _parents(hub: Hub, job: Job) -> dict[str, Any]:
    """The first of those that stand before it, and whether some are not known yet: it has many, and is new."""
    edges = (await hub.page("edge", (None, None, None, None, job.id), limit=SHOWN)).rows
    ids = {row.id[: -len(job.id) - 1]: row for row in edges}
    jobs = {row.id: row for row in await hub.fetch([job_key(id) for id in ids])} if ids else {}
    parents = [
        {
            "job_id": id,
            "status": job_of(jobs[id]).status if id in jobs else None,
            "failed": row.agenda == failed_of(id),
        }
        for id, row in ids.items()
    ]
    links = (await hub.page("link", (), f"{job.id}/", 1)).rows
    return {"parents": parents, "linking": any(row.id.startswith(f"{job.id}/") for row in links)}


async def _nodes(hub: Hub) -> tuple[list[Seen], bool]:
    """The nodes, those of which a pull waits included, and whether there are more."""
    leases, prefix = await hub.counts(leases_on("")), leases_on("")
    rows: dict[str, Row] = {}
    cut = False
    for state in ("ONLINE", "STALE", "DEAD"):
        if len(rows) >= NODES_MAX:
            cut = True
            break
        page = await hub.page("node", (state,), None, NODES_MAX - len(rows))
        rows |= {row.id: row for row in page.rows}
        cut = cut or page.next is not None
    others = list(islice((id for id in hub.waiting.nodes if id not in rows), NODES_MAX))
    rows |= {row.id: row for row in await hub.fetch([Key("node", id) for id in others])} if others else {}
    nodes = {**dict.fromkeys(others), **{id: node_of(row) for id, row in rows.items()}}
    seen = [Seen(id, node, leases.get(prefix + id, 0), hub.waiting.offers(id)) for id, node in nodes.items()]
    return seen, cut


def _line(hub: Hub, job: Job) -> dict[str, Any]:
    """Where it stands: the level that counts for its lane, and since when the first job of that waits."""
    name = job.row.lane
    head = hub.committer.lanes.head(name) if name is not None else 0
    if not head:
        return {}
    since = head // PLACES
    level = level_at(job.priority, since, hub.clock.now(), hub.limits.age_ms)
    return {"priority": job.priority, "level": level, "lane_waits_since_at": since}
