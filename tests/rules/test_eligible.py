"""Why a waiting job cannot be leased: node, hub, pauses, sources. Pulls and explanations go by the same words."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheratan_hub.rules.command import Rate
from sheratan_hub.rules.eligible import World, stops, stops_here
from sheratan_hub.rules.lanes import Offer
from sheratan_hub.rules.limits import RATES, SetRate, rates_of
from sheratan_hub.rules.nodes import Beat, node_of
from sheratan_hub.rules.pauses import PAUSES, PauseKind, pauses_of
from sheratan_hub.rules.pull import REASONS
from sheratan_hub.storage import Key
from tests.rules.stage import Stage


def beat(stage: Stage, node_id: str = "n1", *, draining: bool = False, **fields: Any) -> None:
    stage.do(Beat(node_id, **fields))
    if draining:
        row = stage.rows[Key("node", node_id)]
        stage.rows[row.key] = msgspec.structs.replace(node_of(row), draining=True).row(row.due_at)


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
def test_a_node_that_may_not_have_jobs_is_told_why(fields: dict[str, Any], silent_ms: int, reason: str) -> None:
    stage = Stage()
    beat(stage, **fields)
    stage.submit()
    stage.now += silent_ms
    assert stage.reason() == reason
    assert reason in REASONS


def test_a_node_holds_no_more_leases_than_its_heartbeat_says() -> None:
    stage = Stage()
    beat(stage, max_concurrent=3)
    for _ in range(5):
        stage.submit()
    jobs = stage.pull(limit=2) + stage.pull(limit=2)
    assert len(jobs) == 3
    assert stage.reason() == "node_full"
    stage.finish(jobs[0])
    assert len(stage.pull(limit=2)) == 1


@pytest.mark.parametrize("known", [True, False])
def test_a_node_that_names_no_limit_is_held_to_the_configured_one_if_there_is_one(known: bool) -> None:
    for most, got in ((2, 2), (0, 4)):
        stage = Stage(max_leases_per_node=most)
        if known:
            beat(stage)
        for _ in range(4):
            stage.submit()
        assert len(stage.pull(limit=4)) == got


def test_a_lost_lease_no_longer_counts_for_its_node() -> None:
    stage = Stage(max_leases_per_node=1)
    stage.submit()
    stage.lease()
    stage.now += 10_001
    stage.sweep("lease")
    assert stage.counts["leases:n1"] == 0


@given(
    state=st.sampled_from(["fine", "stale", "draining", "busy"]),
    most=st.sampled_from([None, 0, 1]),
    held=st.integers(0, 1),
    needs=st.sampled_from([(), ("gpu",)]),
    kinds=st.sampled_from([frozenset[str](), frozenset({"k"}), frozenset({"l"})]),
    paused=st.sampled_from(["", "k", "l", "*"]),
    rate=st.sampled_from([None, 1, 0]),
    inflight=st.integers(1, 2),
    delay_ms=st.sampled_from([0, 1000]),
    capabilities=st.sampled_from([frozenset[str](), frozenset({"gpu"})]),
)
def test_a_pull_gets_the_job_exactly_if_nothing_is_said_to_stop_it(
    state: Any,
    most: int | None,
    held: int,
    needs: tuple[str, ...],
    kinds: frozenset[str],
    paused: str,
    rate: int | None,
    inflight: int,
    delay_ms: int,
    capabilities: frozenset[str],
) -> None:
    stage = Stage(max_inflight=inflight)
    beat(stage, draining=state == "draining", status="busy" if state == "busy" else "online", max_concurrent=most)
    for _ in range(held):
        stage.submit("k", source="s")
        stage.lease("other")
        stage.submit("k", source="s")
        stage.counts["leases:n1"] = stage.counts.get("leases:n1", 0) + 1
        stage.rows.pop(Key("job", stage.ids()[-1]))
        stage.counts["job:pending"] -= 1
    job_id = stage.submit("k", source="s", needs=needs, delay_ms=delay_ms)
    if rate is not None:
        stage.do(SetRate("s", Rate(0, rate)))
    if paused:
        stage.do(PauseKind(None if paused == "*" else paused))
    if state == "stale":
        stage.now += 120_001
    world = World(
        stage.now,
        stage.limits,
        pauses=pauses_of(stage.rows.get(PAUSES)),
        rates=rates_of(stage.rows.get(RATES)),
        inflight=held,
        running=held,
    )
    job, node = stage.job(job_id), node_of(stage.rows[Key("node", "n1")])
    offer = Offer(capabilities, kinds)
    said = [stop.reason for stop in (*stops(job, world), *stops_here(job, node, offer, held, world))]
    got = [one.id for one in stage.pull(kinds=kinds, capabilities=capabilities)]
    assert got == ([] if said else [job_id]), said


def test_what_stops_a_job_comes_with_its_evidence_and_its_end() -> None:
    stage = Stage()
    job = stage.job(stage.submit("k", source="s", delay_ms=500))
    stage.do(PauseKind("k", for_ms=9000, reason="repairs"))
    world = World(stage.now, rates={"s": Rate(1, 2)}, running=2, pauses=pauses_of(stage.rows[PAUSES]))
    assert [(stop.reason, stop.until, stop.detail) for stop in stops(job, world)] == [
        ("not_before", stage.now + 500, {"failures": 0, "losses": 0}),
        ("paused", stage.now + 9000, {"kind": "k", "reason": "repairs"}),
        ("throttled", 0, {"source": "s", "running": 2, "concurrent": 2}),
    ]
