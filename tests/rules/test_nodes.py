"""A node's life by its rules."""

from __future__ import annotations

from typing import Any

import pytest

from sheratan_hub.rules.attestation import HISTORY, Attested, Claim
from sheratan_hub.rules.command import Code, Refused, Scene
from sheratan_hub.rules.drain import Accept, Drain
from sheratan_hub.rules.finish import Cancel, Finish, Release
from sheratan_hub.rules.nodes import Beat, Forget, health_of, node_of, state_of
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.silence import SweepNodes
from sheratan_hub.rules.view import View
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
    assert stage.counts == {
        "node:ONLINE": 1,
        "node:STALE": 0,
        "node:DEAD": 0,
        "attestation:MISSING": 1,
        "nodes:GREEN": 1,
    }


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


def test_a_drained_node_can_be_forgotten_once_it_holds_nothing() -> None:
    stage = Stage()
    stage.do(Beat("n1"))
    stage.submit()
    lease = stage.lease("n1")
    stage.do(Drain("n1"))
    with pytest.raises(Refused) as no:
        stage.do(Forget("n1"))
    assert no.value.code is Code.NODE_ALIVE
    stage.do(Release(lease.id, lease.lease_id or ""))
    stage.do(Forget("n1"))
    assert Key("node", "n1") not in stage.rows
    assert stage.counts.get("node:ONLINE", 0) == 0


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


# attestation

WINDOW = 120_000


def attests(stage: Stage, build: str | None, caps: str | None, ms: int = 1000) -> Attested:
    """What is known after a heartbeat with this claim, some time later."""
    stage.now += ms
    found: Attested = stage.do(Beat("n1", claim=Claim(build, caps) if build or caps else None)).node.attested
    return found


def test_the_first_claim_is_the_baseline_and_another_one_drift() -> None:
    stage = Stage()
    assert stage.do(Beat("n1")).node.attested.status == "MISSING"
    assert attests(stage, "b1", "c1").status == "OK"
    for claim in (("b2", "c1"), ("b1", "c2")):
        drifted = attests(stage, *claim)
        assert drifted.status == "DRIFT"
        assert drifted.first_seen is not None
        assert drifted.first_seen.same(Claim("b1", "c1"))
    assert attests(stage, "b1", "c1").status == "OK"


def test_drift_counts_and_is_told_once_until_the_claim_agrees_again() -> None:
    stage = Stage()
    for claim in (("b1", "c"), ("b2", "c"), ("b2", "c"), (None, None), ("b3", "c"), ("b1", "c"), ("b2", "c")):
        found = attests(stage, *claim)
    assert found.drift_count == 2
    told = [event.event for event in stage.events if event.event.startswith("attestation.")]
    assert told == ["attestation.first_seen", "attestation.drift", "attestation.drift"]


def test_three_changes_of_capabilities_within_the_window_are_suspect() -> None:
    stage = Stage()
    found = [attests(stage, "b", caps).status for caps in ("c1", "c2", "c1", "c2", "c1")]
    assert found == ["OK", "DRIFT", "OK", "SPOOF_SUSPECT", "SPOOF_SUSPECT"]
    assert attests(stage, "b", "c1").spoof_count == 1, "as long as it lasts it counts once"
    assert attests(stage, "b", "c1", WINDOW).status == "OK"


@pytest.mark.parametrize(("ms", "status"), [(WINDOW // 3, "SPOOF_SUSPECT"), (WINDOW // 2, "DRIFT")])
def test_changes_that_the_window_does_not_hold_together_are_not_suspect(ms: int, status: str) -> None:
    stage = Stage()
    found = [attests(stage, "b", caps, ms).status for caps in ("c1", "c2", "c1", "c2")]
    assert found[-1] == status


def test_changes_of_the_build_alone_are_never_suspect() -> None:
    stage = Stage()
    assert {attests(stage, f"b{n}", "c").status for n in range(10)} == {"OK", "DRIFT"}


def test_no_claim_is_missing_and_no_penalty() -> None:
    stage = Stage()
    attests(stage, "b", "c1")
    attests(stage, "b", "c2")
    missing = attests(stage, None, None)
    assert (missing.status, missing.drift_count) == ("MISSING", 1)
    assert health_of(stage.do(Beat("n1")).node) == "GREEN"


def test_a_doubtful_node_is_yellow_at_least() -> None:
    stage = Stage()
    attests(stage, "b1", "c")
    for health, shown in (("GREEN", "YELLOW"), ("YELLOW", "YELLOW"), ("RED", "RED")):
        node = stage.do(Beat("n1", health, claim=Claim("b2", "c"))).node
        assert (node.health, health_of(node)) == (health, shown)
    assert health_of(stage.do(Beat("n1", claim=Claim("b1", "c"))).node) == "GREEN"


def test_an_operator_accepts_what_a_node_attests_as_its_baseline() -> None:
    stage = Stage()
    for caps in ("c1", "c2", "c1", "c2"):
        attests(stage, "b", caps)
    taken = stage.do(Accept("n1")).attested
    assert (taken.status, taken.drift_count, taken.spoof_count) == ("OK", 2, 1)
    assert attests(stage, "b", "c2").status == "OK"
    assert attests(stage, "b", "c1").status == "DRIFT"
    assert stage.events[-2].event == "attestation.accepted"


def test_nothing_can_be_accepted_of_a_node_that_attests_nothing() -> None:
    stage = Stage()
    stage.do(Beat("n1"))
    with pytest.raises(Refused) as no:
        stage.do(Accept("n1"))
    assert no.value.code is Code.NOT_ATTESTED


def test_to_accept_what_is_the_baseline_already_changes_nothing() -> None:
    stage = Stage()
    attests(stage, "b", "c")
    before = stage.rows[Key("node", "n1")]
    stage.do(Accept("n1"))
    assert stage.rows[Key("node", "n1")] == before


def test_what_is_kept_of_claims_stays_small() -> None:
    stage = Stage()
    for n in range(1000):
        found = attests(stage, f"b{n}", f"c{n}")
    assert (len(found.flips), len(found.history)) == (3, HISTORY)
    assert found.history[-1].build_id == "b999"


@pytest.mark.parametrize(
    ("again", "durable"),
    [
        ({}, False),
        ({"sent_at": "later", "sent_ms": 7}, False),
        ({"claim": Claim("b", "c")}, False),
        ({"claim": Claim("b2", "c")}, True),
        ({"zone": "z"}, True),
        ({"boot_id": "b2"}, True),
        ({"health": "RED"}, True),
    ],
)
def test_a_heartbeat_must_be_synced_unless_it_says_nothing_new(again: dict[str, Any], durable: bool) -> None:
    stage = Stage()
    first = {"claim": Claim("b", "c"), "boot_id": "b1", "sent_at": "now", "sent_ms": 1}
    stage.do(Beat("n1", **first))
    stage.now += 1000
    view = View(Scene(stage.now, stage.limits))
    command = Beat("n1", **{**first, **again})
    view.add(*stage._load(command.wants(view.scene)))
    assert command.decide(view).durable is durable
