"""A node's life by its rules."""

from __future__ import annotations

from typing import Any

import pytest

from sheratan_hub.rules.attestation import Claim
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.finish import Cancel, Finish
from sheratan_hub.rules.nodes import Beat, Forget, SweepNodes, node_of, state_of
from sheratan_hub.rules.pull import Pull
from sheratan_hub.storage import Key
from tests.rules.stage import Stage

TTL, DEAD = 120_000, 600_000


def state(stage: Stage) -> str:
    return state_of(node_of(stage.rows[Key("node", "n1")]), stage.now, stage.limits, stage.started_at)


def sweep(stage: Stage, ms: int) -> Any:
    stage.now += ms
    return stage.do(SweepNodes())


def names(stage: Stage) -> list[str]:
    return [event.event for event in stage.events if event.event.startswith("node.")]


def test_a_node_goes_stale_after_its_ttl_and_dead_after_the_limit_and_comes_back() -> None:
    stage = Stage()
    stage.do(Beat("n1"))
    sweep(stage, TTL)
    assert (state(stage), names(stage)) == ("ONLINE", ["node.online"])
    sweep(stage, 1)
    assert state(stage) == "STALE"
    sweep(stage, DEAD - TTL - 1)
    assert state(stage) == "STALE"
    assert sweep(stage, 1).dead == ("n1",)
    assert state(stage) == "DEAD"
    stage.do(Beat("n1"))
    assert state(stage) == "ONLINE"
    assert names(stage) == ["node.online", "node.stale", "node.dead", "node.online"]
    assert stage.counts == {"node:ONLINE": 1, "node:STALE": 0, "node:DEAD": 0, "attestation:MISSING": 1}


def test_a_heartbeat_moves_no_due_time_and_the_sweep_finds_the_right_one() -> None:
    stage = Stage()
    stage.do(Beat("n1"))
    due = stage.rows[Key("node", "n1")].due_at
    stage.now += TTL - 5
    stage.do(Beat("n1"))
    assert stage.rows[Key("node", "n1")].due_at == due
    sweep(stage, 10)
    assert state(stage) == "ONLINE"
    assert stage.rows[Key("node", "n1")].due_at == stage.now - 10 + TTL + 1


def test_after_a_start_no_node_dies_within_the_grace() -> None:
    stage = Stage(restart_grace_ms=15_000)
    stage.do(Beat("n1"))
    stage.now += DEAD * 2
    stage.started_at = stage.now
    sweep(stage, 0)
    sweep(stage, 15_000)
    assert names(stage)[-1] == "node.stale"
    sweep(stage, 1)
    assert names(stage)[-1] == "node.dead"


def test_only_a_dead_node_can_be_forgotten() -> None:
    stage = Stage()
    with pytest.raises(Refused) as no:
        stage.do(Forget("n1"))
    assert no.value.code is Code.NODE_NOT_FOUND
    stage.do(Beat("n1"))
    with pytest.raises(Refused) as no:
        stage.do(Forget("n1"))
    assert no.value.code is Code.NODE_ALIVE
    sweep(stage, DEAD + 1)
    stage.do(Forget("n1"))
    assert Key("node", "n1") not in stage.rows


def test_what_a_heartbeat_leaves_out_stays_as_it_was() -> None:
    stage = Stage()
    stage.do(Beat("n1", zone="z", capabilities=("gpu",), labels={"rack": 1}))
    node = stage.do(Beat("n1", health="RED")).node
    assert (node.zone, node.capabilities, node.labels, node.health) == ("z", ("gpu",), {"rack": 1}, "RED")


def test_a_stale_node_gets_nothing_and_is_told_why() -> None:
    stage = Stage()
    stage.submit()
    stage.do(Beat("n1"))
    stage.now += TTL + 1
    assert stage.do(Pull("n1", "s")).reason == "node_stale"
    stage.do(Beat("n1"))
    assert stage.do(Pull("n1", "s")).jobs


def test_the_heartbeats_capabilities_count_unless_the_pull_names_its_own() -> None:
    stage = Stage()
    stage.submit(needs=("gpu",))
    stage.do(Beat("n1", capabilities=("gpu",)))
    assert stage.do(Pull("n1", "s", capabilities=frozenset())).reason == "no_job"
    assert len(stage.do(Pull("n1", "s")).jobs) == 1


def test_a_heartbeat_is_answered_with_the_running_jobs_to_cancel() -> None:
    stage = Stage()
    stage.do(Beat("n1"))
    stage.submit()
    job = stage.lease("n1")
    assert stage.do(Beat("n1")).cancel == ()
    stage.do(Cancel(job.id))
    assert stage.do(Beat("n1")).cancel == (job.id,)
    assert stage.do(Beat("n1")).cancel == (job.id,)
    stage.do(Finish(job.id, True, job.lease_id))
    assert stage.do(Beat("n1")).cancel == ()


def test_attestation_keeps_the_baseline_and_reports_drift() -> None:
    stage = Stage()
    assert stage.do(Beat("n1")).node.attested.status == "MISSING"
    assert stage.do(Beat("n1", claim=Claim("b1", "c1"))).node.attested.status == "OK"
    drifted = stage.do(Beat("n1", claim=Claim("b2", "c1"))).node.attested
    assert (drifted.status, drifted.drift_count) == ("DRIFT", 1)
    assert drifted.first_seen is not None
    assert drifted.first_seen.build_id == "b1"
    assert stage.do(Beat("n1", claim=Claim("b1", "c1"))).node.attested.status == "OK"
