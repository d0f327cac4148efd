"""Room in a full queue: who finds none waits a moment for it, behind those who wait already, while somebody works."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB
from sheratan_hub.rules.command import Code, Limits, Refused
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.submit import Submit
from sheratan_hub.web import room as room_module
from sheratan_hub.web.room import Room

MakeHub = Callable[..., Awaitable[Hub]]


@pytest.fixture
async def hub(make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """With a queue of two, which is full, and a worker that has just taken a job; no refusal goes out at once."""
    monkeypatch.setattr(room_module, "AT_ONCE", 0)
    one = await make_hub(Limits(max_depth=2))
    one.room = Room(one, one.clock)  # type: ignore[attr-defined]
    for n in range(3):
        await one.room.submit(Submit(f"job-{n}", "k"), HUB)  # type: ignore[attr-defined]
        if n == 0:
            await pull(one)
    return one


def submit(hub: Hub, job_id: str) -> asyncio.Task[object]:
    return asyncio.create_task(hub.room.submit(Submit(job_id, "k"), HUB))  # type: ignore[attr-defined]


async def pull(hub: Hub, limit: int = 1) -> None:
    assert (await hub.execute(Pull("n", hub.clock.secret(), limit, capabilities=frozenset()))).jobs
    await settle()


async def test_a_submit_waits_for_room_and_gets_it_in_its_turn(hub: Hub) -> None:
    first, second = submit(hub, "first"), submit(hub, "second")
    await settle()
    assert not first.done()
    await pull(hub)
    assert (first.done(), second.done()) == (True, False)
    await pull(hub)
    assert second.result().job.status == "pending"  # type: ignore[attr-defined]


async def test_a_submit_that_finds_no_room_in_time_is_refused(hub: Hub, clock: VirtualClock) -> None:
    waiting = submit(hub, "late")
    await clock.advance(room_module.LATEST_MS - 1)
    assert not waiting.done()
    await clock.advance(1)
    assert isinstance(no := waiting.exception(), Refused)
    assert no.code is Code.QUEUE_FULL
    assert await hub.counts() == {"job:pending": 2, "job:running": 1}


async def test_who_has_waited_in_vain_is_in_nobodys_way(hub: Hub, clock: VirtualClock) -> None:
    waiting = submit(hub, "late")
    await clock.advance(room_module.LATEST_MS)
    assert waiting.exception()
    refused = submit(hub, "j")
    await settle()
    assert refused.exception()


async def test_while_nobody_works_a_refusal_goes_out_at_once(hub: Hub, clock: VirtualClock) -> None:
    await clock.advance(room_module.IDLE_MS + 1)
    refused = submit(hub, "j")
    await settle()
    assert isinstance(refused.exception(), Refused)


async def test_a_client_that_hangs_up_takes_nobodys_turn(hub: Hub) -> None:
    gone, next_one = submit(hub, "gone"), submit(hub, "next")
    await settle()
    gone.cancel()
    await pull(hub)
    assert next_one.result().job.id == "next"  # type: ignore[attr-defined]
    assert await hub.counts() == {"job:pending": 2, "job:running": 2}


async def test_a_known_key_waits_behind_nobody(hub: Hub) -> None:
    await pull(hub)
    keyed = Submit("keyed", "k", key="abc", payload_sha256="p")
    room: Room = hub.room  # type: ignore[attr-defined]
    await room.submit(keyed, HUB)
    waiting = submit(hub, "waiting")
    await settle()
    assert not waiting.done()
    again = asyncio.create_task(room.submit(Submit("again", "k", key="abc", payload_sha256="p"), HUB))
    await settle()
    assert again.result().job.id == "keyed"
    new = asyncio.create_task(room.submit(Submit("new", "k", key="other", payload_sha256="p"), HUB))
    await settle()
    assert not new.done()
    await pull(hub)
    assert waiting.result().job.id == "waiting"  # type: ignore[attr-defined]
    new.cancel()


async def test_who_finds_no_room_in_time_costs_the_committer_nothing(hub: Hub, clock: VirtualClock) -> None:
    first, behind = submit(hub, "first"), submit(hub, "behind")
    await settle()
    asked = hub.committer.add
    commands: list[object] = []
    hub.committer.add = lambda item: (commands.append(item), asked(item))[1]  # type: ignore[assignment, return-value]
    await clock.advance(room_module.LATEST_MS)
    for one in (first, behind):
        assert isinstance(no := one.exception(), Refused)
        assert (no.code, no.reason, no.retry_after_ms) == (Code.QUEUE_FULL, "max_queue_depth", 1000)
    assert commands == []


async def test_who_makes_no_job_of_its_turn_leaves_it_to_the_next(hub: Hub) -> None:
    room: Room = hub.room  # type: ignore[attr-defined]
    one = asyncio.create_task(room.submit(Submit("one", "k", key="abc", payload_sha256="p"), HUB))
    same = asyncio.create_task(room.submit(Submit("same", "k", key="abc", payload_sha256="p"), HUB))
    other = asyncio.create_task(room.submit(Submit("other", "k", key="abc", payload_sha256="q"), HUB))
    last = submit(hub, "last")
    await settle()
    await pull(hub, 2)
    await settle(50)
    assert (one.result().job.id, same.result().job.id) == ("one", "one")
    assert isinstance(no := other.exception(), Refused)
    assert no.code is Code.IDEMPOTENCY_KEY_COLLISION
    assert last.result().job.id == "last"  # type: ignore[attr-defined]


async def test_a_turn_that_nobody_is_left_to_use_goes_to_the_next(hub: Hub) -> None:
    gone, next_one = submit(hub, "gone"), submit(hub, "next")
    await settle()
    hub.observe(lambda committed: gone.cancel() and None)
    await pull(hub)
    assert next_one.result().job.id == "next"  # type: ignore[attr-defined]


async def test_a_few_refusals_go_out_at_once(make_hub: MakeHub) -> None:
    hub = await make_hub(Limits(max_depth=2))
    hub.room = Room(hub, hub.clock)  # type: ignore[attr-defined]
    await hub.execute_many([Submit(f"job-{n}", "k") for n in range(2)])
    await pull(hub)
    await hub.execute(Submit("one-more", "k"))
    refused = [submit(hub, f"r{n}") for n in range(room_module.AT_ONCE + 1)]
    await settle(200)
    assert [task.done() for task in refused] == [True] * room_module.AT_ONCE + [False]
    refused[-1].cancel()
