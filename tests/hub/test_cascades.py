"""Dependencies on running engines and on disk: thousands of parents, long chains, what a crash leaves half done."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from sheratan_hub.clock import SystemClock, VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.items import Committed
from sheratan_hub.rules.cascade import EDGES
from sheratan_hub.rules.command import Limits
from sheratan_hub.rules.edges import PIECE
from sheratan_hub.rules.finish import Cancel, Finish
from sheratan_hub.rules.graph import Member, alone, plan
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.submit import Submit
from sheratan_hub.storage import open_store

MakeHub = Callable[..., Awaitable[Hub]]
SIZE = int(os.environ.get("GRAPH_TORTURE", "2500"))
"""So many jobs depend on each other; `make torture` takes 10 000."""
LIMITS = Limits(max_depth=10**6, max_inflight=10**6)


@pytest.fixture(params=["sqlite", "file"])
async def disk(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Hub]:
    """A hub with its loops on a store that syncs."""
    clock = SystemClock()
    store = open_store(f"{request.param}://{tmp_path / 'hub'}", clock)
    await store.open()
    hub = Hub(store, clock, LIMITS)
    await hub.start()
    tasks = [asyncio.create_task(hub.committer.run()), *(asyncio.create_task(loop.run()) for loop in hub.loops)]
    yield hub
    hub.stop()
    hub.committer.close()
    for task in tasks[1:]:
        task.cancel()
    await asyncio.wait(tasks)
    await store.close()


def largest(hub: Hub) -> list[int]:
    """How many rows the largest transaction has written from now on, in the last place."""
    sizes = [0]

    def note(committed: Committed) -> None:
        sizes.append(
            max(sizes[-1], len(committed.changes.new) + len(committed.changes.put) + len(committed.changes.gone))
        )

    hub.observe(note)
    return sizes


async def until(hub: Hub, **counts: int) -> None:
    while await hub.counts("job:") != {f"job:{status}": n for status, n in counts.items()}:
        await asyncio.sleep(0.005)


async def submit_many(hub: Hub, ids: list[str], kind: str) -> None:
    for at in range(0, len(ids), 500):
        await hub.execute_many([Submit(id, kind) for id in ids[at : at + 500]])


async def finish_all(hub: Hub, kind: str, n: int) -> None:
    while n:
        pull = Pull("n", hub.clock.secret(), min(100, n), capabilities=frozenset(), kinds=frozenset({kind}))
        jobs = (await hub.pull(pull, 0)).jobs
        await hub.execute_many([Finish(job.id, True, job.lease_id) for job in jobs])
        n -= len(jobs)


async def test_a_job_with_thousands_of_parents_runs_after_the_last_in_small_transactions(disk: Hub) -> None:
    parents = [f"p{n:05d}" for n in range(SIZE)]
    await submit_many(disk, parents, "p")
    sizes = largest(disk)
    await disk.execute(alone(Submit("child", "c", depends_on=tuple(parents))))
    await finish_all(disk, "p", SIZE - 1)
    child = asyncio.create_task(disk.pull(Pull("m", "s", kinds=frozenset({"c"}), capabilities=frozenset()), 30_000))
    await finish_all(disk, "p", 1)
    assert [job.id for job in (await child).jobs] == ["child"]
    assert not (await disk.page("edge")).rows
    assert not (await disk.page("link")).rows
    assert sizes[-1] <= 2 * PIECE + 2 + 2 * EDGES + 200, "a piece of links, a cascade, and a pull beside them"


async def test_a_chain_is_cancelled_from_its_first_to_its_last_in_small_transactions(disk: Hub) -> None:
    chain = [f"c{n:05d}" for n in range(SIZE)]
    for at in range(0, len(chain), 1000):
        members = [
            Member(id, Submit(id, "c", depends_on=(chain[place - 1],) if place else ()))
            for place, id in enumerate(chain[at : at + 1000], at)
        ]
        await disk.execute(plan(members, atomic=True))
    sizes = largest(disk)
    await disk.execute(Cancel(chain[0]))
    await until(disk, cancelled=len(chain))
    assert (await disk.job(chain[-1])).root_cause == chain[0]
    assert sizes[-1] <= 3 * EDGES


async def test_thousands_of_dependents_of_one_hear_of_its_end_in_small_transactions(disk: Hub) -> None:
    await disk.execute(Submit("p", "p"))
    children = [f"c{n:05d}" for n in range(SIZE)]
    for at in range(0, len(children), 500):
        await disk.execute_many([Submit(id, "c", depends_on=("p",)) for id in children[at : at + 500]])
    sizes = largest(disk)
    await finish_all(disk, "p", 1)
    while (await disk.job(children[-1])).parents_left:
        await asyncio.sleep(0.005)
    assert len(await disk.store.heads()) == 1
    assert sizes[-1] <= 3 * EDGES


async def test_a_waiting_pull_is_woken_by_the_last_parent(make_hub: MakeHub) -> None:
    hub = await make_hub(loops=True)
    await hub.execute_many([Submit("a", "a"), Submit("b", "b", depends_on=("a",))])
    waiting = asyncio.create_task(hub.pull(Pull("n", "s", kinds=frozenset({"b"}), capabilities=frozenset()), 30_000))
    await finish_all(hub, "a", 1)
    await settle(200)
    assert [job.id for job in waiting.result().jobs] == ["b"], "without a second's wait for the sweep"


@pytest.mark.parametrize("steps", range(5))
async def test_what_a_crash_left_half_done_goes_on_after_the_start(
    make_hub: MakeHub, clock: VirtualClock, steps: int
) -> None:
    first = await make_hub(LIMITS)
    parents = [f"p{n}" for n in range(2 * PIECE)]
    await submit_many(first, parents, "p")
    await first.execute(alone(Submit("fan-in", "c", depends_on=tuple(parents), on_dependency_failure="hold")))
    members = [Member(f"c{n}", Submit(f"c{n}", "c", depends_on=(f"c{n - 1}",) if n else ("p0",))) for n in range(80)]
    await first.execute(plan(members, atomic=True))
    await first.execute(Cancel("p0"))
    for _ in range(steps):
        await first.sweep()
    second = await make_hub(LIMITS, first.store, loops=True)
    await clock.advance(5000)
    assert (await second.job("fan-in")).status == "quarantined"
    assert (await second.counts("job:"))["job:cancelled"] == 81


async def test_sweeps_that_share_a_batch_do_not_hurt_each_other(make_hub: MakeHub) -> None:
    hub = await make_hub(LIMITS)
    await hub.execute(Submit("p", "p"))
    await hub.execute_many([Submit(f"c{n}", "c", depends_on=("p",)) for n in range(600)])
    await hub.execute(Cancel("p"))
    while (await hub.job("p")).cascade:
        await asyncio.gather(*(hub.sweep() for _ in range(3)))
    assert await hub.counts("job:") == {"job:cancelled": 601}


async def test_a_child_that_comes_in_the_batch_that_tells_is_judged_too(make_hub: MakeHub) -> None:
    hub = await make_hub(LIMITS)
    await hub.execute_many([Submit("a", "k"), Submit("b", "k", depends_on=("a",)), Submit("c", "k", depends_on=("b",))])
    await hub.execute(Cancel("a"))
    late = [Submit(f"late-{parent}", "k", depends_on=(parent,)) for parent in "abc"]
    await asyncio.gather(hub.execute_many(late[:2]), hub.sweep(), hub.execute_many(late[2:]))
    await hub.sweep()
    assert await hub.counts("job:") == {"job:cancelled": 6}
