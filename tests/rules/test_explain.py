"""Explanations: every reason with its evidence; and that pulls and they never disagree, in worlds of all sorts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheratan_hub.rules.command import Rate
from sheratan_hub.rules.eligible import Stop, World, stops, stops_here
from sheratan_hub.rules.explain import REASONS, SHOWN, Explanation, Seen, explain, sentence
from sheratan_hub.rules.finish import Cancel, Finish
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.lanes import Offer
from sheratan_hub.rules.limits import RATES, SetRate, rates_of
from sheratan_hub.rules.nodes import Beat, Node, node_of
from sheratan_hub.rules.pauses import PAUSES, PauseKind, pauses_of
from sheratan_hub.rules.view import leases_on, running_of
from sheratan_hub.storage import Key
from tests.rules.stage import Stage

ANYTHING = Offer(frozenset(), frozenset())


def beat(stage: Stage, node_id: str, *, draining: bool = False, **fields: Any) -> None:
    stage.do(Beat(node_id, **fields))
    if draining:
        row = stage.rows[Key("node", node_id)]
        stage.rows[row.key] = msgspec.structs.replace(node_of(row), draining=True).row(row.due_at)


def node_in(stage: Stage, node_id: str) -> Node | None:
    row = stage.rows.get(Key("node", node_id))
    return node_of(row) if row is not None else None


def world_of(stage: Stage, job: Job) -> World:
    return World(
        stage.now,
        stage.limits,
        stage.started_at,
        pauses_of(stage.rows.get(PAUSES)),
        rates_of(stage.rows.get(RATES)),
        stage.counts.get("job:running", 0),
        stage.counts.get(running_of(job.source), 0),
    )


def explained(stage: Stage, job_id: str, *offers: Offer, line: dict[str, Any] | None = None) -> Explanation:
    """Of the nodes of the stage; `offers` are those of each one's waiting pulls."""
    job = stage.job(job_id)
    ids = [key.id for key in stage.rows if key.kind == "node"]
    seen = [Seen(id, node_in(stage, id), stage.counts.get(leases_on(id), 0), offers) for id in ids]
    return explain(job, world_of(stage, job), seen, line)


def reasons(found: Explanation) -> list[str]:
    return [stop.reason for stop in found.reasons]


def only(found: Explanation) -> Stop:
    (stop,) = found.reasons
    return stop


def test_a_running_job_tells_who_holds_it_until_when() -> None:
    stage = Stage()
    stage.submit()
    job = stage.lease()
    found = explained(stage, job.id)
    assert (only(found).reason, only(found).until) == ("not_pending", stage.now + 10_000)
    assert (only(found).detail["node_id"], only(found).detail["attempt"]) == ("n1", 1)
    assert (found.fleet, found.runnable) == (None, False)
    stage.do(Cancel(job.id))
    assert sentence(only(explained(stage, job.id))).endswith("it was asked to stop.")


def test_a_finished_job_tells_its_end() -> None:
    stage = Stage()
    stage.submit(max_retries=0)
    job = stage.lease()
    stage.do(Finish(job.id, False, job.lease_id))
    stop = only(explained(stage, job.id))
    assert (stop.reason, stop.until, stop.detail["reason"]) == ("not_pending", 0, "RETRIES_EXHAUSTED")
    assert sentence(stop) == "It is failed (RETRIES_EXHAUSTED)."


def test_a_delay_and_a_backoff_are_told_apart() -> None:
    stage = Stage()
    beat(stage, "n1")
    delayed = stage.submit(delay_ms=500)
    stage.submit()
    job = stage.lease()
    stage.do(Finish(job.id, False, job.lease_id))
    assert (reasons(explained(stage, delayed)), explained(stage, delayed).reasons[0].until) == (
        ["not_before"],
        stage.now + 500,
    )
    stop = only(explained(stage, job.id))
    assert (stop.reason, stop.detail) == ("backoff", {"failures": 1, "losses": 0})
    assert stop.until == stage.job(job.id).not_before


def test_dependencies_and_holds_are_told_with_what_is_known_of_the_parents() -> None:
    stage = Stage()
    beat(stage, "n1")
    parent = stage.submit("parent")
    child = stage.job(stage.submit(depends_on=(parent,), delay_ms=5))
    world = msgspec.structs.replace(world_of(stage, child), parents={"parents": [parent], "linking": True})
    waits, stop = stops(child, world)
    assert (waits.reason, stop.reason) == ("not_before", "dependency")
    assert stop.detail == {"parents_left": 1, "parents_failed": 0, "parents": [parent], "linking": True}
    held = child.after("held", reason="DEPENDENCY_FAILED", root_cause=parent)
    assert [(one.reason, one.detail["root_cause"]) for one in stops(held, world)] == [("quarantined", parent)]


def test_without_a_node_that_could_have_it_what_is_lacking_is_told() -> None:
    stage = Stage()
    job_id = stage.submit("k", needs=("eu", "gpu"))
    assert sentence(only(explained(stage, job_id))) == "No node is known, and no pull waits."
    beat(stage, "n1", capabilities=("eu",))
    beat(stage, "n2")
    stop = only(explained(stage, job_id))
    assert (stop.reason, stop.detail["lacking"], stop.detail["nodes"]) == ("no_capable_node", ["gpu"], 2)
    other = Offer(frozenset({"eu", "gpu"}), frozenset({"l"}))
    stop = only(explained(stage, job_id, other))
    assert (stop.detail["lacking"], stop.detail["ask_for_other_kinds"]) == ([], 2)
    assert explained(stage, job_id, other, Offer(other.capabilities, frozenset())).runnable


@pytest.mark.parametrize(
    ("fields", "silent_ms", "reason"),
    [
        ({}, 120_001, "node_stale"),
        ({}, 600_001, "node_dead"),
        ({"draining": True}, 0, "node_draining"),
        ({"status": "busy"}, 0, "node_busy"),
        ({"max_concurrent": 0}, 0, "node_full"),
    ],
)
def test_what_is_wrong_with_the_only_capable_node_is_the_reason(
    fields: dict[str, Any], silent_ms: int, reason: str
) -> None:
    stage = Stage()
    beat(stage, "able", capabilities=("gpu",), **fields)
    stage.now += silent_ms
    beat(stage, "unable")
    found = explained(stage, stage.submit(needs=("gpu",)))
    assert (only(found).reason, only(found).detail) == (reason, {"nodes": 1, "node_ids": ["able"]})
    assert found.fleet is not None
    assert (found.fleet.known, found.fleet.capable, found.fleet.free) == (2, 1, 0)
    assert {one.node_id: [stop.reason for stop in one.stops] for one in found.fleet.shown} == {
        "able": [reason],
        "unable": ["not_capable"],
    }


def test_if_nothing_else_stops_it_the_job_waits_its_turn() -> None:
    stage = Stage()
    beat(stage, "n1")
    found = explained(stage, stage.submit(), line={"level": 2})
    assert (only(found).reason, only(found).detail, found.runnable) == (
        "waits_its_turn",
        {"free_nodes": 1, "level": 2},
        True,
    )


def test_the_free_nodes_are_shown_first_and_only_some_of_many() -> None:
    stage = Stage()
    for n in range(30):
        beat(stage, f"n{n:02}", capabilities=("gpu",) if n == 29 else ())
    fleet = explained(stage, stage.submit(needs=("gpu",))).fleet
    assert fleet is not None
    assert (fleet.shown[0].node_id, len(fleet.shown), fleet.known) == ("n29", SHOWN, 30)


# Pulls and explanations

KINDS, CAPABILITIES = ("k", "l"), ("gpu", "eu")
JOBS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "source": st.sampled_from(["", "s", "s", "t"]),
        "needs": st.sampled_from([(), (), ("gpu",), ("eu", "gpu")]),
        "delay_ms": st.sampled_from([0, 0, 0, 0, 0, 1000]),
        "priority": st.integers(0, 3),
        "after": st.sampled_from([None, None, None, None, 0, 1]),
    }
)
NODES = st.fixed_dictionaries(
    {
        "draining": st.sampled_from([False, False, True]),
        "status": st.sampled_from(["online", "online", "busy"]),
        "max_concurrent": st.sampled_from([None, None, 0, 1, 2]),
        "capabilities": st.sampled_from([(), ("gpu",), ("eu", "gpu")]),
    }
)
OFFERS = st.builds(
    Offer,
    st.sampled_from([frozenset[str](), frozenset({"gpu"}), frozenset(CAPABILITIES)]),
    st.sampled_from([frozenset[str](), frozenset[str](), frozenset({"k"}), frozenset({"l"})]),
)
ENDS = st.sampled_from(["held", "held", "held", "done", "failed", "lost", "cancelled"])


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    """A small world in the middle of its life."""
    stage = Stage(max_inflight=draw(st.integers(1, 4)), max_leases_per_node=draw(st.integers(0, 1)))
    for n, node in enumerate(draw(st.lists(NODES, max_size=3))):
        beat(stage, f"n{n}", **node)
    stage.now += draw(st.sampled_from([0, 0, 0, 120_001, 600_001]))
    beat(stage, "able", capabilities=CAPABILITIES)
    ids: list[str] = []
    for job in draw(st.lists(JOBS, min_size=2, max_size=8)):
        after = job.pop("after")
        parents = () if after is None or after >= len(ids) else (ids[after],)
        ids.append(stage.submit(depends_on=parents, **job))
    for node in draw(st.lists(st.sampled_from(["able", "n0", "unheard of"]), min_size=1, max_size=3)):
        for job in stage.pull(node, draw(st.integers(1, 3)), capabilities=frozenset(CAPABILITIES)):
            end(stage, job, draw(ENDS))
    for source in draw(st.sets(st.sampled_from(["s", "t"]))):
        stage.do(SetRate(source, Rate(0, draw(st.integers(1, 2)))))
    if draw(st.booleans()):
        stage.do(PauseKind(draw(st.sampled_from([None, "k", "l"])), for_ms=draw(st.sampled_from([0, 500]))))
    stage.now += draw(st.sampled_from([0, 0, 600, 1000]))
    if draw(st.booleans()):
        stage.sweep("wait")
    return stage


def end(stage: Stage, job: Job, how: str) -> None:
    if how in ("done", "failed"):
        stage.do(Finish(job.id, how == "done", job.lease_id))
    elif how == "cancelled":
        stage.do(Cancel(job.id))
    elif how == "lost":
        stage.now += 10_001
        stage.sweep("lease")


@settings(max_examples=500, deadline=None)
@given(stage=stages(), offer=OFFERS, data=st.data())
def test_a_pull_gets_a_job_exactly_if_nothing_is_said_to_stop_it(stage: Stage, offer: Offer, data: Any) -> None:
    node_id = data.draw(st.sampled_from(["able", "n0", "n1", "n2", "unheard of"]))
    leases, node = stage.counts.get(leases_on(node_id), 0), node_in(stage, node_id)
    free: set[str] = set()
    for job in map(stage.job, stage.ids()):
        world = world_of(stage, job)
        stopped = bool(stops(job, world) or stops_here(job, node, offer, leases, world))
        found = explain(job, world, [Seen(node_id, node, leases, (offer,))])
        assert found.reasons
        assert all(sentence(stop) and stop.reason in REASONS for stop in found.reasons)
        assert (not stopped) == found.runnable == (reasons(found) == ["waits_its_turn"])
        free |= set() if stopped else {job.id}

    def pulled() -> list[Job]:
        return stage.pull(node_id, 100, capabilities=offer.capabilities, kinds=offer.kinds)

    got = pulled()
    assert {job.id for job in got} <= free
    while got:  # what is left has to wait for room only: it comes when those before it are done
        free -= {job.id for job in got}
        for job in got:
            stage.finish(job)
        got = pulled()
    assert not free


@given(stage=stages())
def test_what_a_jobs_own_state_stops_is_what_keeps_it_out_of_the_lanes(stage: Stage) -> None:
    for job_id in stage.ids():
        job = stage.job(job_id)
        assert bool(stops(job, World(stage.now))) == (job.row.lane is None)
