"""Explanations of the engine: they and its pulls agree, whoever waits; what is read is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sheratan_hub import explaining
from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.explaining import Explained, explained
from sheratan_hub.hub import Hub
from sheratan_hub.rules.command import Limits, Rate, Refused
from sheratan_hub.rules.finish import Finish
from sheratan_hub.rules.graph import Graph, Member, plan
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.limits import SetRate
from sheratan_hub.rules.nodes import Beat
from sheratan_hub.rules.pauses import PauseKind
from sheratan_hub.rules.pull import Pull, Pulled
from sheratan_hub.rules.submit import Submit
from sheratan_hub.storage import open_store

MakeHub = Callable[..., Awaitable[Hub]]
NODES = ("n0", "n1", "n2", "able", "unheard of")


def pull(hub: Hub, node: str, limit: int = 1, wait_ms: int = 30_000, **fields: Any) -> asyncio.Task[Pulled]:
    return asyncio.create_task(hub.pull(Pull(node, hub.clock.secret(), limit, **fields), wait_ms))


async def leased(hub: Hub, node: str, limit: int = 1) -> list[Job]:
    return list((await pull(hub, node, limit, 0)).jobs)


def reasons(found: Explained) -> list[str]:
    return [stop.reason for stop in found.reasons]


async def test_a_job_that_is_not_there_is_refused(make_hub: MakeHub) -> None:
    with pytest.raises(Refused, match="there is no job j"):
        await explained(await make_hub(), "j")


async def test_a_node_never_heard_of_counts_while_its_pull_waits(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await hub.execute(Submit("j", "k", needs=("gpu",)))
    assert (await explained(hub, "j")).reasons[0].detail["nodes"] == 0
    waiting = pull(hub, "new", capabilities=frozenset({"gpu"}), kinds=frozenset({"l"}))
    await settle()
    found = await explained(hub, "j")
    assert (reasons(found), found.reasons[0].detail["ask_for_other_kinds"]) == (["no_capable_node"], 1)
    assert found.fleet is not None
    assert [(one.node_id, one.state, one.waiting_pulls) for one in found.fleet.shown] == [("new", None, 1)]
    waiting.cancel()


async def test_what_a_nodes_waiting_pulls_ask_for_counts_more_than_its_heartbeat(make_hub: MakeHub) -> None:
    hub = await make_hub()
    await hub.execute(Beat("n", capabilities=("gpu",)))
    waiting = pull(hub, "n", capabilities=frozenset())
    await settle()
    await hub.execute(Submit("j", "k", needs=("gpu",)))
    found = await explained(hub, "j")
    assert found.reasons[0].detail["lacking"] == ["gpu"]
    waiting.cancel()
    await settle()
    assert reasons(await explained(hub, "j")) == ["waits_its_turn"]


async def test_no_more_than_a_thousand_nodes_are_looked_at_and_those_online_first(
    make_hub: MakeHub, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explaining, "NODES_MAX", 5)
    hub = await make_hub(loops=True)
    await hub.execute_many([Beat(f"a{n}") for n in range(4)])
    await clock.advance(130_000)
    await hub.execute_many([Beat(f"z{n}") for n in range(4)])
    await hub.execute(Submit("j", "k"))
    found = await explained(hub, "j")
    assert found.fleet is not None
    assert (found.fleet.known, found.fleet.live, found.fleet.free, found.fleet.cut) == (5, 4, 4, True)


async def test_a_job_with_very_many_parents_is_told_a_few_of_them_and_that_it_is_being_linked(
    make_hub: MakeHub,
) -> None:
    hub = await make_hub(Limits(max_depth=10_000))
    names = [f"p{n:03}" for n in range(250)]
    await hub.execute_many([Submit(name, "k") for name in names])
    members = [Member("j", Submit("j", "k", depends_on=tuple(names)))]
    graph: Graph = plan(members, atomic=True)
    await hub.execute(graph)
    (stop,) = [stop for stop in (await explained(hub, "j")).reasons if stop.reason == "dependency"]
    assert (stop.detail["parents_left"], stop.detail["parents"], stop.detail["linking"]) == (250, [], True)
    while await hub.sweep() == hub.clock.now():
        pass
    (stop,) = [stop for stop in (await explained(hub, "j")).reasons if stop.reason == "dependency"]
    assert (stop.detail["parents_left"], stop.detail["linking"]) == (250, False)
    assert [one["job_id"] for one in stop.detail["parents"]] == names[:20]
    assert {(one["status"], one["failed"]) for one in stop.detail["parents"]} == {("pending", False)}


async def test_the_level_that_counts_and_the_age_of_the_line_are_told(make_hub: MakeHub, clock: VirtualClock) -> None:
    hub = await make_hub(loops=True)
    await hub.execute(Beat("n"))
    await hub.execute(Submit("first", "k", priority=3))
    began = clock.now()
    await clock.advance(61_000)
    await hub.execute(Submit("j", "k", priority=3))
    assert (await explained(hub, "j")).reasons[0].detail == {
        "free_nodes": 1,
        "priority": 3,
        "level": 2,
        "lane_waits_since_at": began,
    }


async def test_a_job_that_changes_while_it_is_explained_is_explained_as_it_is_then(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = await make_hub()
    await hub.execute(Submit("j", "k"))
    counts = hub.counts

    async def leased_meanwhile(prefix: str = "") -> dict[str, int]:
        await leased(hub, "n")
        return await counts(prefix)

    monkeypatch.setattr(hub, "counts", leased_meanwhile)
    assert reasons(await explained(hub, "j")) == ["not_pending"]


# Pulls and explanations

JOBS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from("kl"),
        "source": st.sampled_from(["", "s", "s", "t"]),
        "needs": st.sampled_from([(), (), ("gpu",), ("eu", "gpu")]),
        "delay_ms": st.sampled_from([0, 0, 0, 0, 0, 1000]),
        "priority": st.integers(0, 3),
        "after": st.sampled_from([None, None, None, None, 0, 1]),
    }
)
BEATS = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["online", "online", "busy"]),
        "max_concurrent": st.sampled_from([None, None, 0, 1, 2]),
        "capabilities": st.sampled_from([(), ("gpu",), ("eu", "gpu")]),
    }
)
STEPS = st.one_of(
    st.tuples(st.just("submit"), JOBS),
    st.tuples(st.just("submit"), JOBS),
    st.tuples(st.just("poll"), st.sampled_from(NODES), st.sampled_from([(), ("k",), ("l",)])),
    st.tuples(
        st.just("pull"), st.sampled_from(NODES), st.integers(1, 3), st.sampled_from(["keep", "keep", "done", "fail"])
    ),
    st.tuples(st.just("pull"), st.just("able"), st.integers(1, 3), st.just("keep")),
    st.tuples(st.just("rate"), st.sampled_from("st"), st.integers(1, 2)),
    st.tuples(st.just("pause"), st.sampled_from([None, "k", "l"]), st.sampled_from([0, 500])),
    st.tuples(st.just("wait"), st.sampled_from([600, 1000, 120_001])),
    st.tuples(st.just("beat"), st.sampled_from(NODES[:3]), BEATS),
)


class Story:
    """A hub that lives through some steps; `check` holds its explanations against its pulls."""

    def __init__(self, hub: Hub, clock: VirtualClock) -> None:
        self.hub, self.clock = hub, clock
        self.ids: list[str] = []
        self.polls: list[tuple[str, asyncio.Task[Pulled]]] = []

    async def do(self, what: str, *given: Any) -> None:
        await getattr(self, f"_{what}")(*given)
        await settle(20)

    async def _submit(self, job: dict[str, Any]) -> None:
        after, job_id = job["after"], f"j{len(self.ids)}"
        parents = () if after is None or after >= len(self.ids) else (self.ids[after],)
        fields = {name: value for name, value in job.items() if name != "after"}
        await self.hub.execute(Submit(job_id, depends_on=parents, **fields))
        self.ids.append(job_id)

    async def _poll(self, node: str, kinds: tuple[str, ...]) -> None:
        self.polls.append((node, pull(self.hub, node, kinds=frozenset(kinds))))

    async def _pull(self, node: str, limit: int, then: str) -> None:
        for job in await leased(self.hub, node, limit):
            if then != "keep":
                await self.hub.execute(Finish(job.id, then == "done", job.lease_id))

    async def _rate(self, source: str, concurrent: int) -> None:
        await self.hub.execute(SetRate(source, Rate(0, concurrent)))

    async def _pause(self, kind: str | None, for_ms: int) -> None:
        await self.hub.execute(PauseKind(kind, for_ms=for_ms))

    async def _wait(self, ms: int) -> None:
        await self.clock.advance(ms)

    async def _beat(self, node: str, fields: dict[str, Any]) -> None:
        await self.hub.execute(Beat(node, **fields))

    async def check(self, node: str) -> None:
        """The node's pulls get exactly those jobs that its explanations say it can have."""
        waits = {name for name, task in self.polls if not task.done()}
        free, known = set[str](), False
        for job_id in self.ids:
            found = await explained(self.hub, job_id)
            assert found.reasons
            assert found.runnable == (reasons(found) == ["waits_its_turn"])
            if found.fleet is None:
                continue
            could = {one.node_id for one in found.fleet.shown if not one.stops and not found.stops}
            assert not could & waits  # who waits has had all that it can have
            known = known or node in {one.node_id for one in found.fleet.shown}
            free |= {job_id} if node in could else set()
        if known and node not in waits:  # a pull that waits asks for kinds of its own
            await self._take(node, free)

    async def _take(self, node: str, free: set[str]) -> None:
        got = await leased(self.hub, node, 100)
        assert {job.id for job in got} <= free
        while got:  # what is left has to wait for room only: it comes when those before it are done
            free = free - {job.id for job in got}
            for job in got:
                await self.hub.execute(Finish(job.id, True, job.lease_id))
            got = await leased(self.hub, node, 100)
        assert not free


@asynccontextmanager
async def story(limits: Limits) -> Any:
    clock = VirtualClock()
    store = open_store("memory://", clock)
    await store.open()
    hub = Hub(store, clock, limits)
    await hub.start()
    tasks = [asyncio.create_task(hub.committer.run()), *(asyncio.create_task(loop.run()) for loop in hub.loops)]
    one = Story(hub, clock)
    try:
        yield one
    finally:
        hub.stop()
        await asyncio.gather(*(task for _, task in one.polls))
        for task in tasks[1:]:
            task.cancel()
        hub.committer.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(STEPS, min_size=4, max_size=20),
    inflight=st.integers(1, 4),
    per_node=st.integers(0, 1),
    node=st.sampled_from(NODES),
)
def test_the_engine_leases_a_job_exactly_if_its_explanation_says_that_it_can(
    steps: list[Any], inflight: int, per_node: int, node: str
) -> None:
    async def live() -> None:
        async with story(Limits(max_inflight=inflight, max_leases_per_node=per_node)) as one:
            await one.do("beat", "able", {"capabilities": ("eu", "gpu")})
            for step in steps:
                await one.do(*step)
            await one.check(node)

    asyncio.run(live())
