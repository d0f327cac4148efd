"""Counting, timing and looking: by batch, within bounds, without reading more than is told."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.clock import SystemClock, VirtualClock
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB, Committed, Happened, Origin
from sheratan_hub.log import shift
from sheratan_hub.metrics import Lag, Metrics, TimedStore
from sheratan_hub.metrics.looking import Alerts, disk_of
from sheratan_hub.metrics.table import BY_NAME, FAMILIES
from sheratan_hub.metrics.tally import Buckets, Few, Minute
from sheratan_hub.rules.command import Code, Event
from sheratan_hub.rules.jobs import REASONS, Job
from sheratan_hub.rules.submit import Submit
from sheratan_hub.storage import Changes, Conflict, Store, StoreDown, StoreFull, open_store

WEB = Origin("data", "127.0.0.1", "/api/jobs")


def batch(names: list[str], rows: list[Any] | None = None, **meta: Any) -> Committed:
    """So many events, each of an item of its own, as requests make them."""
    happened = [Happened([Event(1000, name, "client", f"j{n}", meta=meta)], WEB) for n, name in enumerate(names)]
    return Committed(happened, Changes(put=rows or []), len(names))


# By batch


def calls_of(metrics: Metrics, committed: Committed) -> int:
    """How many functions written in Python ran, to count this batch; without what a collection of garbage calls."""
    calls = 0

    def note(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event == "call"

    gc.disable()
    sys.setprofile(note)
    try:
        metrics.committed(committed)
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def test_a_batch_of_submits_costs_as_many_calls_as_one_submit() -> None:
    metrics = Metrics(VirtualClock())
    metrics.committed(batch(["job.submitted"]))
    one = calls_of(metrics, batch(["job.submitted"]))
    assert calls_of(metrics, batch(["job.submitted"] * 500)) == one
    assert metrics.counts["sheratan_commands_total"][()] == 502
    assert metrics.events["job.submitted"] == 502
    assert metrics.batches.counts[0] == 2
    assert metrics.minute.totals()["job.submitted"] == 502


def test_the_same_batch_with_leases_and_results_is_told_apart() -> None:
    metrics = Metrics(VirtualClock())
    committed = batch(["job.submitted"] * 3 + ["job.leased"] * 2 + ["key.hit"])
    metrics.committed(committed)
    assert dict(metrics.events) == {"job.submitted": 3, "job.leased": 2, "key.hit": 1}
    assert metrics.counts["sheratan_leases_granted_total"][()] == 2
    assert metrics.counts["sheratan_idempotency_hits_total"][()] == 1


def test_an_event_that_nobody_knows_is_counted_by_its_name_and_breaks_nothing() -> None:
    metrics = Metrics(VirtualClock())
    metrics.committed(batch(["job.completed", "some.thing", "job.leased"], attempt=1))
    assert metrics.events["some.thing"] == 1
    assert metrics.took == {}, "the batch has not written these jobs"


# How long jobs take


def job(n: int, kind: str = "work", **fields: Any) -> Any:
    return Job(f"j{n}", kind, 1000, 0, node_id="n1", **fields).row


def test_times_are_taken_from_the_rows_that_a_batch_has_written() -> None:
    metrics = Metrics(VirtualClock())
    waited = job(0, status="running", pending_since=1000, started_at=4000, lease_until=9000)
    metrics.committed(batch(["job.leased"], [waited], attempt=1))
    done = job(0, status="completed", pending_since=1000, started_at=4000, finished_at=11_000)
    ended = Committed(
        [Happened([Event(11_000, "job.completed", "n1", "j0", meta={"attempt": 1})], WEB)], Changes(put=[done]), 1
    )
    metrics.committed(ended)
    took = metrics.took["work"]
    assert (took.wait.sum, took.run.sum, took.end_to_end.sum) == (3.0, 7.0, 10.0)


def test_a_clock_that_went_back_makes_no_negative_times() -> None:
    metrics = Metrics(VirtualClock())
    early = job(0, status="completed", pending_since=9000, started_at=8000, finished_at=500)
    metrics.committed(batch(["job.completed"], [early], attempt=1))
    took = metrics.took["work"]
    assert (took.run.sum, took.end_to_end.sum) == (0, 0)


def test_kinds_beyond_the_limit_share_other() -> None:
    metrics = Metrics(VirtualClock(), max_kinds=2)
    rows = [
        job(n, f"kind{n}", status="running", pending_since=1000, started_at=1500, lease_until=9000) for n in range(5)
    ]
    metrics.committed(batch(["job.leased"] * 5, rows, attempt=1))
    metrics.committed(batch(["job.leased"] * 5, rows, attempt=1))
    assert {kind: sum(took.wait.counts) for kind, took in metrics.took.items()} == {"kind0": 2, "kind1": 2, "other": 6}


def test_of_many_names_few_have_a_label() -> None:
    few = Few(2)
    assert [few.label(name) for name in "abcab"] == ["a", "b", "other", "a", "b"]
    assert [Few(0).label(name) for name in "ab"] == ["other", "other"]


def test_a_bucket_holds_what_is_at_most_its_bound() -> None:
    buckets = Buckets((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 99.0):
        buckets.add(value)
    assert (buckets.counts, buckets.sum) == ([2, 2, 1], 104.0)


# The last minute


async def test_what_was_counted_is_in_the_last_minute_for_a_minute() -> None:
    clock = VirtualClock()
    minute = Minute(clock)
    minute.add_all({"a": 2})
    await clock.advance(59_000)
    minute.add("b")
    assert minute.totals() == {"a": 2, "b": 1}
    await clock.advance(2_000)
    assert minute.totals() == {"b": 1}


async def test_valid_tokens_are_in_the_minute_in_which_they_came() -> None:
    clock = VirtualClock()
    metrics = Metrics(clock)
    metrics.accepted("active")
    metrics.fold()
    await clock.advance(30_000)
    metrics.accepted("active")
    metrics.accepted("next")
    for _ in range(2):
        metrics.fold()
        assert metrics.minute.totals() == {"auth.active": 2, "auth.next": 1}
    await clock.advance(40_000)
    assert metrics.minute.totals() == {"auth.active": 1, "auth.next": 1}


# The table


def test_names_follow_the_conventions() -> None:
    for family in FAMILIES:
        assert family.name.startswith("sheratan_")
        assert (family.type == "counter") == family.name.endswith("_total")
        assert family.text.endswith("."), family.name
        assert all(len(values) == len(family.labels) for values in family.known)
        assert not any(unit in family.name for unit in ("_ms", "_millis", "_kb", "_minutes"))
    assert len(BY_NAME) == len(FAMILIES)


def test_every_refusal_is_counted_from_the_start() -> None:
    refusals = Metrics(VirtualClock()).counts["sheratan_refusals_total"]
    assert {code for _, code in refusals} == {code.value for code in Code}
    assert {reason for (reason,) in Metrics(VirtualClock()).counts["sheratan_dead_letters_total"]} <= set(REASONS)


# The store's transactions


MakeHub = Callable[..., Awaitable[Hub]]


async def timed_hub(make_hub: MakeHub, clock: VirtualClock) -> tuple[Hub, TimedStore, Store]:
    store = open_store("memory://", clock)
    await store.open()
    timed = TimedStore(store)
    return await make_hub(store=timed.store), timed, store


async def fail(hub: Hub, error: Exception) -> None:
    async with hub.store.begin() as tx:
        await tx.save(Changes(counts={"a": 1}))
        raise error


async def test_transactions_that_write_are_timed(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub, timed, _ = await timed_hub(make_hub, clock)
    await asyncio.gather(*(hub.execute(Submit(f"j{n}", "work")) for n in range(5)))
    assert 1 <= sum(timed.commits.counts) <= 5
    assert sum(timed.syncs.counts) == sum(timed.commits.counts)
    assert timed.commits.sum >= timed.syncs.sum > 0
    assert len(await hub.store.events()) == 5, "all else goes to the store"


async def test_one_that_need_not_be_synced_counts_as_no_sync(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub, timed, _ = await timed_hub(make_hub, clock)
    async with hub.store.begin() as tx:
        await tx.save(Changes(counts={"a": 1}), durable=False)
    async with hub.store.begin():
        pass
    assert (sum(timed.commits.counts), sum(timed.syncs.counts)) == (1, 0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StoreDown("gone"), "down"),
        (StoreFull("full"), "full"),
        (Conflict("first"), "conflict"),
        (KeyError("bug"), "bug"),
    ],
)
async def test_transactions_that_fail_are_counted_by_why(
    make_hub: MakeHub, clock: VirtualClock, error: Exception, reason: str
) -> None:
    hub, timed, _ = await timed_hub(make_hub, clock)
    with pytest.raises(type(error)):
        await fail(hub, error)
    assert {name: n for name, n in timed.failures.items() if n} == {reason: 1}
    assert sum(timed.commits.counts) == 0


async def test_a_transaction_that_cannot_begin_has_failed(
    make_hub: MakeHub, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, timed, store = await timed_hub(make_hub, clock)

    @asynccontextmanager
    async def failing() -> AsyncIterator[None]:
        raise StoreDown("gone")
        yield

    monkeypatch.setattr(store, "begin", failing)
    with pytest.raises(StoreDown):
        await fail(hub, KeyError())
    assert timed.failures["down"] == 1


# The event loop


async def test_the_event_loops_lag_is_what_it_was_late_by() -> None:
    lag = Lag()
    lag.start()
    handle = lag._handle
    assert handle is not None
    loop, due = handle._args  # type: ignore[misc]
    handle.cancel()
    lag._look(loop, due - 3)  # due three seconds earlier than it would have been
    assert lag.seen.counts[-2] == 1
    assert lag._handle is not None
    lag.stop()
    lag.stop()
    assert lag._handle is None


# The disk, and the alerts beside it


async def test_what_a_store_takes_on_its_disk_is_seen(tmp_path: Path) -> None:
    clock = SystemClock()
    for url in (f"sqlite://{tmp_path / 'a' / 'hub.db'}", f"file://{tmp_path / 'b'}"):
        store = open_store(url, clock)
        await store.open()
        async with store.begin() as tx:
            await tx.save(Changes(counts={"a": 1}))
        disk = disk_of(store)
        await store.close()
        assert disk is not None
        assert 0 < disk.wal < disk.size
        assert 0 < disk.free < disk.total
    assert disk_of(open_store("memory://", clock)) is None


def test_files_beside_a_database_are_not_its_own(tmp_path: Path) -> None:
    class Named:
        path = tmp_path / "hub.db"

    for name, size in (("hub.db", 100), ("hub.db-wal", 30), ("other.db", 1000)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "hub.db.d").mkdir()
    disk = disk_of(Named())  # type: ignore[arg-type]
    assert disk is not None
    assert (disk.size, disk.wal) == (130, 30)


def test_a_store_whose_folder_has_gone_is_not_told_of(tmp_path: Path) -> None:
    class Named:
        path = tmp_path / "gone" / "hub.db"

    assert disk_of(Named()) is None  # type: ignore[arg-type]


def test_alerts_are_counted_from_the_start_on_whoever_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "alerts.jsonl"
    path.write_text('{"rule": "poison"}\n')
    alerts = Alerts(path, ("poison", "auth_failure"))
    alerts.look()
    assert alerts.raised == {"poison": 0, "auth_failure": 0}
    with path.open("a") as file:
        file.write('{"rule": "poison"}\nnonsense\n{"rule": "own"}\n{"rule": "poi')
    alerts.look()
    assert alerts.raised == {"poison": 1, "auth_failure": 0, "own": 1}
    with path.open("a") as file:
        file.write('son"}\n')
    alerts.look()
    assert alerts.raised["poison"] == 2
    os.rename(path, tmp_path / "old")
    alerts.look()
    path.write_text('{"rule": "poison"}\n')
    alerts.look()
    assert alerts.raised["poison"] == 3
    path.write_text("")
    alerts.look()
    path.write_text('{"rule": "poison"}\n')
    alerts.look()
    assert alerts.raised["poison"] == 4


def test_alerts_that_came_just_before_their_file_was_rotated_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "alerts.jsonl"
    path.write_text('{"rule": "poison"}\n')
    alerts = Alerts(path, ("poison",))
    with path.open("a") as file:
        file.write('{"rule": "poison"}\n')
    shift(path, 2)
    path.write_text('{"rule": "poison"}\n')
    alerts.look()
    alerts.look()
    assert alerts.raised["poison"] == 2
    shift(path, 2)
    alerts.look()
    path.write_text('{"rule": "poison"}\n' * 3)
    alerts.look()
    assert alerts.raised["poison"] == 5


def test_rules_of_alerts_beyond_the_limit_share_other(tmp_path: Path) -> None:
    path = tmp_path / "alerts.jsonl"
    alerts = Alerts(path, ())
    path.write_text("".join(f'{{"rule": "r{n}"}}\n' for n in range(60)))
    alerts.look()
    assert (len(alerts.raised), alerts.raised["other"]) == (51, 10)


def test_a_refusal_of_the_hub_itself_is_told_on_the_control_plane() -> None:
    metrics = Metrics(VirtualClock())
    metrics.committed(Committed([Happened([Event(1, "refused.busy", "hub")], HUB)], Changes(), 0))
    assert metrics.counts["sheratan_refusals_total"]["control", "busy"] == 1
