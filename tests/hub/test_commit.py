"""The committer: one transaction for all that waits, neighbours that do not hurt each other, failures told truly."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB, Committed, Item, Order
from sheratan_hub.rules.command import Code, Command, Decision, Limits, Need, Rate, Refused, Scene
from sheratan_hub.rules.finish import Cancel, Finish
from sheratan_hub.rules.nodes import Beat
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.submit import Submit
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Conflict, Key, StoreDown, StoreFull, Wants
from tests.hub.moody import Moody

MakeHub = Callable[..., Awaitable[Hub]]


@dataclass(frozen=True)
class Broken:
    where: str = "decide"

    def wants(self, scene: Scene) -> Wants:
        if self.where == "wants":
            raise KeyError("wants")
        return Wants()

    def decide(self, view: View) -> Decision:
        raise KeyError("decide")


@dataclass(frozen=True)
class Greedy:
    def wants(self, scene: Scene) -> Wants:
        return Wants()

    def decide(self, view: View) -> Decision:
        raise Need(Wants(look={Key("job", "x")}))


@dataclass(frozen=True)
class Asks:
    """Asks for a row once before it is what it is."""

    then: Command
    row: str = "x"

    def wants(self, scene: Scene) -> Wants:
        return self.then.wants(scene)

    def decide(self, view: View) -> Decision:
        view.look("none", self.row)
        return self.then.decide(view)


async def together(hub: Hub, *items: tuple[list[Command], Order]) -> list[list[Any]]:
    """The outcomes of items that share one batch."""
    futures = [asyncio.get_running_loop().create_future() for _ in items]
    for (commands, order), future in zip(items, futures, strict=True):
        hub.committer.add(Item(commands, HUB, future, order=order))
    return await asyncio.gather(*futures)


async def moody(make_hub: MakeHub, clock: VirtualClock, **options: Any) -> tuple[Hub, Moody]:
    store = Moody(clock)
    await store.open()
    return await make_hub(Limits(max_depth=10**6), store, **options), store


async def test_commands_that_wait_together_share_one_transaction(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub, store = await moody(make_hub, clock)
    store.gate.clear()
    first = asyncio.create_task(hub.execute(Submit("j0", "k")))
    await settle()
    rest = [asyncio.create_task(hub.execute(Submit(f"j{n}", "k"))) for n in range(1, 100)]
    await settle()
    assert hub.committer.waiting == 99
    store.gate.set()
    await asyncio.gather(first, *rest)
    assert store.saves == 2
    assert await hub.counts() == {"job:pending": 100}


async def test_nobody_is_answered_before_the_commit(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub, store = await moody(make_hub, clock)
    store.gate.clear()
    task = asyncio.create_task(hub.execute(Submit("j", "k")))
    await settle()
    assert not task.done()
    assert await hub.counts() == {}
    store.gate.set()
    assert (await task).job.id == "j"


@pytest.mark.parametrize("where", ["wants", "decide"])
async def test_one_broken_command_fails_alone(make_hub: MakeHub, clock: VirtualClock, where: str) -> None:
    hub, store = await moody(make_hub, clock)
    outcomes = await hub.execute_many([Submit("a", "k"), Broken(where), Greedy(), Submit("b", "k")])
    assert [type(one).__name__ for one in outcomes] == ["Submitted", "KeyError", "RuntimeError", "Submitted"]
    assert store.saves == 1
    assert await hub.counts() == {"job:pending": 2}


async def test_a_full_queue_refuses_at_once_and_recovers(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub, store = await moody(make_hub, clock, max_waiting=3)
    store.gate.clear()
    tasks = [asyncio.create_task(hub.execute(Submit(f"j{n}", "k"))) for n in range(6)]
    await settle()
    refused = [task for task in tasks if task.done()]
    assert [task.exception().code for task in refused] == [Code.BUSY] * 3  # type: ignore[union-attr]
    assert all(task.exception().retry_after_ms > 0 for task in refused)  # type: ignore[union-attr]
    store.gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (await hub.execute(Submit("again", "k"))).job.id == "again"


async def test_a_conflict_is_decided_again_and_then_one_by_one(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub, store = await moody(make_hub, clock)
    store.errors = [Conflict() for _ in range(3)]
    outcomes = await asyncio.gather(*(hub.execute(Submit(f"j{n}", "k")) for n in range(4)))
    assert len({one.job.id for one in outcomes}) == 4
    assert await hub.counts() == {"job:pending": 4}
    assert len(await hub.store.events()) == 4


async def test_endless_conflicts_end_in_a_refusal(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub, store = await moody(make_hub, clock)
    store.errors = [Conflict() for _ in range(6)]
    with pytest.raises(Refused) as no:
        await hub.execute(Submit("j", "k"))
    assert no.value.code is Code.BUSY


@pytest.mark.parametrize("error", [StoreDown("gone"), StoreFull("full")])
async def test_a_failed_write_is_never_reported_as_done(
    make_hub: MakeHub, clock: VirtualClock, error: StoreDown
) -> None:
    hub, store = await moody(make_hub, clock)
    seen: list[Committed] = []
    hub.observe(seen.append)
    store.errors = [error]
    with pytest.raises(Refused) as no:
        await hub.execute(Submit("j", "k"))
    assert no.value.code is Code.UNAVAILABLE
    assert hub.committer.failing
    assert (seen, await hub.counts(), len(hub.committer.lanes)) == ([], {}, 0)
    await hub.execute(Submit("j", "k"))
    assert not hub.committer.failing


async def test_a_failing_observer_is_passed_over(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub, _ = await moody(make_hub, clock)
    seen: list[str] = []

    def fails(committed: Committed) -> None:
        raise ValueError("observer")

    hub.observe(fails)
    hub.observe(lambda committed: seen.extend(event.event for one in committed.happened for event in one.events))
    await hub.execute(Submit("j", "k"))
    assert seen == ["job.submitted"]


async def test_a_caller_that_left_before_its_batch_began_changes_nothing(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    hub, store = await moody(make_hub, clock)
    store.gate.clear()
    first = asyncio.create_task(hub.execute(Submit("first", "k")))
    await settle()
    gone = asyncio.create_task(hub.execute(Submit("gone", "k")))
    await settle()
    gone.cancel()
    await settle()
    store.gate.set()
    await first
    await hub.execute(Submit("last", "k"))
    assert await store.fetch([Key("job", "gone")]) == []


async def test_64_racing_first_submits_with_one_key_make_one_job(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub, _ = await moody(make_hub, clock)
    commands = [Submit(f"j{n}", "k", key="same", payload_sha256="s") for n in range(64)]
    outcomes = await asyncio.gather(*(hub.execute(command) for command in commands))
    assert len({one.job.id for one in outcomes}) == 1
    assert sum(not one.dedup for one in outcomes) == 1
    assert await hub.counts() == {"job:pending": 1, "key": 1}


async def test_depth_is_never_exceeded_within_one_batch(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(Limits(max_depth=10))
    outcomes = await hub.execute_many([Submit(f"j{n}", "k") for n in range(30)])
    assert sum(isinstance(one, Refused) for one in outcomes) == 20
    assert await hub.counts() == {"job:pending": 10}


async def test_a_cancel_beside_a_pull_of_the_same_node_hurts_nobody(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await hub.execute(Beat("n1"))
    await hub.execute(Submit("j", "k"))
    await hub.pull(Pull("n1", "a", capabilities=frozenset()), 0)
    commands = [Pull("n1", "b", capabilities=frozenset()), Cancel("j"), Submit("k", "k")]
    outcomes = await hub.execute_many(commands)
    assert [type(one).__name__ for one in outcomes] == ["Pulled", "Cancelled", "Submitted"]
    assert (await hub.execute(Beat("n1"))).cancel == ("j",)


async def test_a_batch_that_breaks_the_store_is_taken_apart(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub, store = await moody(make_hub, clock)
    store.errors = [ValueError("a bug")]
    outcomes = await asyncio.gather(*(hub.execute(Submit(f"j{n}", "k")) for n in range(5)))
    assert len(outcomes) == 5
    assert await hub.counts() == {"job:pending": 5}


async def test_the_hubs_own_upkeep_finds_room_in_a_full_queue(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub, store = await moody(make_hub, clock, max_waiting=2)
    await hub.execute(Submit("j", "k"))
    pulled = await hub.pull(Pull("n1", "a", capabilities=frozenset()), 0)
    store.gate.clear()
    tasks = [asyncio.create_task(hub.execute(Submit(f"j{n}", "k"))) for n in range(4)]
    await settle()
    hub.give_back(pulled)
    sweep = asyncio.create_task(hub.sweep())
    await settle()
    store.gate.set()
    await asyncio.gather(*tasks, sweep, return_exceptions=True)
    assert (await hub.job("j")).status == "pending"
    assert sweep.exception() is None


async def test_a_lane_that_was_emptied_by_cancels_leaves_the_directory(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await hub.execute_many([Submit(f"j{n}", f"kind{n}") for n in range(50)])
    await hub.execute(Submit("stays", "kind7"))
    assert len(hub.committer.lanes) == 50
    await hub.execute_many([Cancel(f"j{n}") for n in range(50)])
    assert len(hub.committer.lanes) == 1


async def leased(hub: Hub, *job_ids: str) -> str:
    """Submits these jobs and leases the first; its lease."""
    await hub.execute_many([Submit(job_id, "k") for job_id in job_ids])
    pulled = await hub.pull(Pull("n1", "a", capabilities=frozenset()), 0)
    return pulled.jobs[0].lease_id or ""


NEXT = Pull("n1", "b", capabilities=frozenset())


async def test_what_comes_after_a_command_that_asks_for_more_waits_if_it_is_to_come_in_turn(make_hub: MakeHub) -> None:
    for order, reason in (("in_turn", None), ("while_fine", None), ("any", "inflight_limit")):
        hub = await make_hub(Limits(max_inflight=1))
        finish = Finish("j0", True, await leased(hub, "j0", "j1"))
        [[finished, pulled]] = await together(hub, ([Asks(finish), NEXT], order))
        assert (finished.status, pulled.reason) == ("completed", reason)


async def test_in_turn_holds_for_all_of_an_item_and_for_no_other(make_hub: MakeHub) -> None:
    hub = await make_hub()
    mine: list[Command] = [Submit("a", "k"), Asks(Submit("b", "k")), Submit("c", "k"), Asks(Submit("d", "k"), "y")]
    await together(hub, (mine, "in_turn"), ([Submit("other", "k")], "any"))
    pulled = await hub.pull(Pull("n1", "s", 100, capabilities=frozenset()), 0)
    assert [job.id for job in pulled.jobs] == ["a", "other", "b", "c", "d"]


async def test_any_number_of_commands_in_turn_may_ask_for_more(make_hub: MakeHub) -> None:
    hub = await make_hub()
    commands: list[Command] = [Asks(Submit(f"j{n:03}", "k"), str(n)) for n in range(300)]
    [outcomes] = await together(hub, (commands, "in_turn"))
    assert [one.job.id for one in outcomes] == [f"j{n:03}" for n in range(300)]


@pytest.mark.parametrize("wrap", [Asks, lambda command: command])
async def test_after_a_refusal_nothing_happens_that_was_to_happen_only_while_all_is_fine(
    make_hub: MakeHub, wrap: Callable[[Command], Command]
) -> None:
    hub = await make_hub()
    await leased(hub, "j0", "j1")
    wrong = wrap(Finish("j0", True, "wrong"))
    [[refused, not_pulled, nor_this]] = await together(hub, ([wrong, NEXT, Submit("j2", "k")], "while_fine"))
    assert refused.code is Code.LEASE_SUPERSEDED
    assert not_pulled is nor_this is refused
    assert await hub.counts() == {"job:running": 1, "job:pending": 1}
    [[refused, pulled]] = await together(hub, ([wrong, NEXT], "in_turn"))
    assert (refused.code, pulled.jobs[0].id) == (Code.LEASE_SUPERSEDED, "j1")


async def test_a_bug_before_a_pull_costs_no_job_a_lease(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await hub.execute(Submit("j", "k"))
    with pytest.raises(KeyError):
        await hub.pull_after([Broken()], NEXT, 0, HUB)
    await settle()
    job = await hub.job("j")
    assert (job.status, job.losses) == ("pending", 0)


async def test_a_result_whose_sender_left_is_kept_and_what_was_leased_with_it_goes_back(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    hub, store = await moody(make_hub, clock)
    finish = Finish("j0", True, await leased(hub, "j0", "j1"))
    store.gate.clear()
    leaving = asyncio.create_task(hub.pull_after([finish], NEXT, 0, HUB, "while_fine"))
    await settle()
    leaving.cancel()
    await settle()
    store.gate.set()
    await settle()
    assert leaving.cancelled()
    assert (await hub.job("j0")).status == "completed"
    job = await hub.job("j1")
    assert (job.status, job.attempt, job.losses) == ("pending", 1, 0)


async def test_a_store_that_fails_is_known_to_fail_until_it_has_taken_a_write(
    make_hub: MakeHub, clock: VirtualClock
) -> None:
    store = Moody(clock)
    await store.open()
    hub = await make_hub(None, store, loops=True)
    store.errors = [StoreFull("full") for _ in range(50)]
    with pytest.raises(Refused):
        await hub.execute(Submit("j", "k"))
    seen = set()
    for _ in range(20):
        await clock.advance(500)
        seen.add(hub.committer.failing)
    assert seen == {True}, "looking at what is due writes nothing, and tells nothing of the disk"
    store.errors.clear()
    await clock.advance(1100)
    assert not hub.committer.failing, "nobody has asked for anything since"
    batches: list[Committed] = []
    hub.observe(batches.append)
    await clock.advance(5000)
    assert not any(batch.changes for batch in batches), "a store that is well is not written to"


async def test_leases_of_a_source_are_counted_although_the_lanes_could_not_be_read(
    make_hub: MakeHub, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = await make_hub(Limits(rates={"s": Rate(0, 1)}))
    await hub.execute_many([Submit(f"j{n}", "k", source="s") for n in range(2)])
    (job,) = (await hub.pull(Pull("n", "s1", capabilities=frozenset()), 0)).jobs
    heads, failures = hub.store.heads, [1]

    async def failing(prefix: str = "") -> dict[str, int]:
        if failures:
            failures.pop()
            raise StoreDown("gone for a moment")
        return await heads(prefix)

    monkeypatch.setattr(hub.store, "heads", failing)
    await hub.execute_many([Finish(job.id, True, job.lease_id), Cancel("j1")])
    assert not failures
    assert hub.committer.standing.running("s") == 0
