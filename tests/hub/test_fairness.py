"""Fairness between sources with numbers: what a hundred thousand waiting jobs of one source cost the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sheratan_hub.hub import Hub
from sheratan_hub.rules.command import Limits
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.submit import Submit

MakeHub = Callable[..., Awaitable[Hub]]
WAITING = 100_000


async def pulled(hub: Hub, pulls: int, most: int = 1) -> list[list[str]]:
    """The sources of what each pull got."""
    pull = Pull("n", "", most, capabilities=frozenset())
    return [[job.source for job in (await hub.pull(pull, 0)).jobs] for _ in range(pulls)]


async def test_a_hundred_thousand_waiting_jobs_of_one_source_delay_each_other_source_by_one_job(
    make_hub: MakeHub,
) -> None:
    hub = await make_hub(Limits(max_depth=10**9, max_inflight=10**9))
    for at in range(0, WAITING, 500):
        await hub.execute_many([Submit(f"big-{n:06}", f"k{n % 3}", source="big") for n in range(at, at + 500)])
    assert await pulled(hub, 7) == [["big"]] * 7
    await hub.execute(Submit("one", "k9", source="small"))
    assert ["small"] in await pulled(hub, 2), "it waits for one job"
    for n in range(10):
        await hub.execute(Submit(f"one-{n}", "k1", source=f"small-{n}"))
    turn = [source for sources in await pulled(hub, 11) for source in sources]
    assert sorted(turn) == ["big", *(f"small-{n}" for n in range(10))], "they wait for each other, and for one job"
    await hub.execute(Submit("last", "k1", source="small"))
    assert "small" in (await pulled(hub, 1, 2))[0], "a pull of two brings it with one of the others"
    assert await hub.counts("job:pending") == {"job:pending": WAITING - 7 - 1 - 1 - 1}
