"""The clock that tests move."""

import asyncio

from sheratan_hub.clock import VirtualClock


async def test_sleepers_wake_at_their_own_moment_and_those_of_one_moment_together(clock: VirtualClock) -> None:
    start, woken = clock.now(), []

    async def sleep(name: str, ms: int, again: int = 0) -> None:
        await clock.sleep(ms)
        woken.append((name, clock.now() - start))
        if again:
            await sleep(name, again)

    tasks = [asyncio.create_task(one) for one in (sleep("late", 300), sleep("a", 100, 100), sleep("b", 100))]
    await clock.advance(250)
    assert woken == [("a", 100), ("b", 100), ("a", 200)]
    assert clock.now() == start + 250
    await clock.advance(50)
    assert woken[3:] == [("late", 300)]
    await asyncio.gather(*tasks)


async def test_who_has_stopped_sleeping_is_passed_over(clock: VirtualClock) -> None:
    start, woken = clock.now(), []

    async def sleep() -> None:
        await clock.sleep(200)
        woken.append(clock.now() - start)

    given_up, sleeps = (asyncio.create_task(one) for one in (clock.sleep(100), sleep()))
    await asyncio.sleep(0)
    given_up.cancel()
    await clock.advance(200)
    assert woken == [200]
    await sleeps
