"""What the hub forgets and watches, in the engine: prunes, dead letters, marks of what was read."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.items import Committed
from sheratan_hub.rules.command import Limits, Refused
from sheratan_hub.rules.finish import Finish
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.prune import Prune
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.redrive import Redrive
from sheratan_hub.rules.submit import Submit
from sheratan_hub.storage import StoreDown, open_store
from tests.hub.moody import Moody

MakeHub = Callable[..., Awaitable[Hub]]
KEPT = Limits(max_depth=10_000, max_inflight=10_000, completed_kept_ms=60_000, failed_kept_ms=120_000)
DURABLE = pytest.mark.parametrize("scheme", ["sqlite", "file"])


async def finish(hub: Hub, n: int = 1, *, ok: bool = True, **fields: Any) -> list[Job]:
    """Make jobs and end them; the jobs as they ended."""
    ids = [hub.clock.job_id() for _ in range(n)]
    await hub.execute_many([Submit(id, "k", **{"max_retries": 0, **fields}) for id in ids])
    pulled = await hub.execute(Pull("n1", hub.clock.secret(), n, capabilities=frozenset()))
    await hub.execute_many([Finish(job.id, ok, job.lease_id) for job in pulled.jobs])
    return [await hub.job(id) for id in ids]


async def events(hub: Hub, name: str) -> list[bytes]:
    return [line.line for line in await hub.store.events(limit=100_000) if f'"{name}"'.encode() in line.line]


@asynccontextmanager
async def reopened(scheme: str, path: Path, clock: VirtualClock, make_hub: MakeHub) -> AsyncIterator[Hub]:
    store = open_store(f"{scheme}://{path / 'store'}", clock)
    await store.open()
    hub = await make_hub(KEPT, store)
    yield hub
    hub.committer.close()
    await settle()
    await store.close()


async def test_hundreds_of_jobs_are_forgotten_a_hundred_at_most_a_transaction(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    hub = await make_hub(KEPT)
    await finish(hub, 450)
    gone: list[int] = []
    hub.observe(lambda committed: gone.append(len(committed.changes.gone)))
    await clock.advance(60_000)
    await hub.keeping.prune()
    assert sum(gone) == 450
    assert max(gone) == 100
    assert await hub.counts() == {}


async def test_large_jobs_are_forgotten_a_few_at_a_time(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(KEPT)
    jobs = await finish(hub, 30)
    large = [job.with_(result=job.result.__class__(b'"' + b"x" * 300_000 + b'"')).row for job in jobs]
    async with hub.store.begin() as tx:
        from sheratan_hub.storage import Changes, Wants

        await tx.load(Wants(keys={row.key for row in large}))
        await tx.save(Changes(put=large))
    gone: list[int] = []
    hub.observe(lambda committed: gone.append(len(committed.changes.gone)))
    await clock.advance(60_000)
    await hub.keeping.prune()
    assert (sum(gone), max(gone)) == (30, 8)


async def test_other_ages_count_at_once_though_a_prune_is_under_way(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(KEPT)
    await finish(hub)
    shorter = [msgspec.structs.replace(KEPT, completed_kept_ms=1000)]

    def adopt(committed: Committed) -> None:
        if committed.commands and shorter:
            hub.adopt(shorter.pop())

    await clock.advance(2000)
    hub.observe(adopt)
    assert await hub.keeping.prune() == 0
    await hub.keeping.prune()
    assert await hub.counts() == {}


async def test_the_loop_forgets_by_itself(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(KEPT, loops=True)
    (job,) = await finish(hub)
    await clock.advance(59_000)
    assert await hub.job(job.id)
    await clock.advance(3_000)
    with pytest.raises(Refused):
        await hub.job(job.id)


async def prunes(hub: Hub, clock: VirtualClock, ms: int) -> int:
    """How many transactions the prune makes in this time."""
    made = 0
    execute_many = hub.execute_many

    async def counting(commands: Any, *args: Any, **options: Any) -> Any:
        nonlocal made
        made += any(isinstance(command, Prune) for command in commands)
        return await execute_many(commands, *args, **options)

    hub.execute_many = counting  # type: ignore[method-assign]
    await clock.advance(ms)
    hub.execute_many = execute_many  # type: ignore[method-assign]
    return made


async def test_the_loop_rests_until_something_is_due(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(Limits(completed_kept_ms=3_600_000), loops=True)
    await clock.advance(1000)
    (job,) = await finish(hub)
    assert await prunes(hub, clock, 3_599_999) <= 7
    assert await hub.job(job.id)
    assert await prunes(hub, clock, 1) == 1
    with pytest.raises(Refused):
        await hub.job(job.id)
    await finish(hub)
    await clock.advance(1_800_000)
    await finish(hub, 20)
    assert await prunes(hub, clock, 1_800_000) <= 5
    assert await hub.counts() == {"job:completed": 20}


async def test_a_job_that_is_kept_for_its_key_is_looked_at_when_that_is_over(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    hub = await make_hub(Limits(completed_kept_ms=1_200_000, key_ttl_ms=2_000_000), loops=True)
    (job,) = await finish(hub, key="k", payload_sha256="p")
    await clock.advance(job.finished_at + 1_999_999 - clock.now())
    assert await hub.counts() == {"job:completed": 1, "key": 1}
    await clock.advance(1)
    assert await hub.counts() == {}


async def test_a_loop_that_rests_tells_of_too_many_dead_letters_within_a_second(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    hub = await make_hub(Limits(dead_letters_max=1), loops=True)
    await clock.advance(5000)
    await finish(hub, 2, ok=False)
    await clock.advance(1)
    assert hub.keeping.over
    (dead,) = await finish(hub, ok=False)
    await hub.execute(Redrive(dead.id))
    await hub.execute(Redrive((await hub.page("job", ("failed",))).rows[0].id))
    await clock.advance(1000)
    assert not hub.keeping.over


async def test_a_prune_that_fails_is_tried_again_a_second_later(make_hub: MakeHub, clock: VirtualClock) -> None:
    store = Moody(clock)
    await store.open()
    hub = await make_hub(KEPT, store, loops=True)
    await clock.advance(1000)
    await finish(hub)
    await clock.advance(59_500)
    store.errors += [StoreDown("the disk is on fire")] * 2
    await clock.advance(2500)
    assert await hub.counts() == {}


async def test_an_end_does_not_call_for_a_sweep(make_hub: MakeHub) -> None:
    hub = await make_hub(KEPT)
    nudged: list[int] = []
    hub.loops[0].nudge = nudged.append  # type: ignore[method-assign]
    (job,) = await finish(hub)
    assert nudged, "the lease does"
    assert job.finished_at not in nudged


@DURABLE
async def test_a_prune_goes_on_after_a_restart_and_takes_everything_along(
    scheme: str, tmp_path: Path, clock: VirtualClock, make_hub: MakeHub
) -> None:
    params = b'"' + b"x" * 3000 + b'"'
    async with reopened(scheme, tmp_path, clock, make_hub) as hub:
        (done,) = await finish(hub, params=params)
        hub.reading.note(done)
        await hub.reading.flush()
        (dead,) = await finish(hub, ok=False, params=params)
    await clock.advance(60_000)
    async with reopened(scheme, tmp_path, clock, make_hub) as hub:
        await hub.keeping.prune()
        assert await hub.counts() == {"job:failed": 1}
        await hub.execute(Redrive(dead.id))
    await clock.advance(600_000)
    async with reopened(scheme, tmp_path, clock, make_hub) as hub:
        await hub.keeping.prune()
        assert await hub.counts() == {"job:pending": 1}
        (lease,) = (await hub.execute(Pull("n2", "s", capabilities=frozenset()))).jobs
        assert (lease.id, lease.attempt, (await hub.params([lease]))[dead.id]) == (dead.id, 2, params)
        await hub.execute(Finish(lease.id, True, lease.lease_id))
    await clock.advance(60_000)
    async with reopened(scheme, tmp_path, clock, make_hub) as hub:
        await hub.keeping.prune()
        assert await hub.counts() == {}
        left = [row for kind in ("job", "params", "read", "attempts") for row in (await hub.store.page(kind)).rows]
        assert left == []


async def test_a_prune_that_fails_leaves_everything_and_is_tried_again(make_hub: MakeHub, clock: VirtualClock) -> None:
    store = Moody(clock)
    await store.open()
    hub = await make_hub(KEPT, store)
    await finish(hub, 3)
    await clock.advance(60_000)
    store.errors.append(StoreDown("the disk is on fire"))
    with pytest.raises(Refused):
        await hub.keeping.prune()
    assert await hub.counts() == {"job:completed": 3}
    await hub.keeping.prune()
    assert await hub.counts() == {}


async def test_events_are_forgotten_by_age_and_those_after_keep_their_numbers(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    hub = await make_hub(Limits(ledger_kept_ms=1_000_000))
    await finish(hub)
    await clock.advance(900_000)
    await finish(hub)
    await clock.advance(100_001)
    await hub.keeping.prune()
    assert [line.seq for line in await hub.store.events()] == [4, 5, 6]


async def test_too_many_dead_letters_are_told_once_for_each_crossing_and_none_is_dropped(
    make_hub: MakeHub, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    hub = await make_hub(Limits(dead_letters_max=2))
    told: list[str] = []

    def observe(committed: Committed) -> None:
        told.extend(event.event for one in committed.happened for event in one.events if event.event == "dlq.over")

    hub.observe(observe)
    with caplog.at_level(logging.WARNING, "sheratan.keeping"):
        jobs = await finish(hub, 2, ok=False)
        await hub.keeping.prune()
        assert (told, hub.keeping.over) == ([], False)
        jobs += await finish(hub, 1, ok=False)
        for _ in range(3):
            await hub.keeping.prune()
        assert (told, hub.keeping.over) == (["dlq.over"], True)
        await hub.execute(Redrive(jobs[0].id))
        await hub.keeping.prune()
        assert not hub.keeping.over
        await finish(hub, 1, ok=False)
        await hub.keeping.prune()
    assert told == ["dlq.over"] * 2
    assert len(caplog.records) == 2
    assert (await hub.counts())["job:failed"] == 3


async def test_without_a_dead_letter_list_nobody_counts_them(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(dead_letters=False, dead_letters_max=1))
    await finish(hub, 3, ok=False)
    await hub.keeping.prune()
    assert not hub.keeping.over


async def test_what_was_read_is_marked_once_however_often_it_is_read(make_hub: MakeHub) -> None:
    hub = await make_hub(KEPT)
    commits: list[int] = []
    jobs = await finish(hub, 250)
    hub.observe(lambda committed: commits.append(len(committed.changes.new)))
    for job in [*jobs, *jobs]:
        hub.reading.note(job)
    await hub.reading.flush()
    for job in jobs:
        hub.reading.note(job)
    await hub.reading.flush()
    assert commits == [200, 50]
    assert (await hub.counts())["read"] == 250


async def test_what_was_marked_before_a_restart_is_not_marked_again(make_hub: MakeHub) -> None:
    hub = await make_hub(KEPT)
    (job,) = await finish(hub)
    for _ in range(2):
        hub.reading.note(job)
        await hub.reading.flush()
        hub.reading._known.clear()
    assert (await hub.counts())["read"] == 1


async def test_a_mark_that_could_not_be_written_is_made_by_the_next_who_reads(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    store = Moody(clock)
    await store.open()
    hub = await make_hub(KEPT, store)
    (job,) = await finish(hub)
    hub.reading.note(job)
    store.errors.append(StoreDown("the disk is on fire"))
    with pytest.raises(Refused):
        await hub.reading.flush()
    hub.reading.note(job)
    await hub.reading.flush()
    assert (await hub.counts())["read"] == 1


async def test_only_completed_jobs_have_a_result_to_read(make_hub: MakeHub) -> None:
    hub = await make_hub(KEPT)
    (job,) = await finish(hub, ok=False)
    hub.reading.note(job)
    await hub.reading.flush()
    assert await hub.counts() == {"job:failed": 1}


async def test_dead_letters_that_come_while_they_are_counted_are_told_within_a_second(
    make_hub: MakeHub, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = await make_hub(Limits(dead_letters_max=1), loops=True)
    await clock.advance(5000)
    counts, times = hub.store.counts, [1]

    async def counted(prefix: str = "") -> dict[str, int]:
        found = await counts(prefix)
        if times and prefix == "job:failed":
            times.clear()
            await finish(hub, 2, ok=False)
        return found

    monkeypatch.setattr(hub.store, "counts", counted)
    await finish(hub, ok=False)
    await clock.advance(3000)
    assert not times
    assert hub.keeping.over


async def test_a_shorter_retention_counts_at_once(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(Limits(completed_kept_ms=3_600_000), loops=True)
    await finish(hub)
    await clock.advance(70_000)
    hub.adopt(Limits(completed_kept_ms=60_000))
    await clock.advance(1000)
    assert await hub.counts() == {}
