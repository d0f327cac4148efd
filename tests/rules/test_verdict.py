"""What looks wrong by which signs; the runbook knows each of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sheratan_hub.rules.command import Limits
from sheratan_hub.rules.pauses import Pause
from sheratan_hub.rules.signs import (
    SEVERITIES,
    Answering,
    AuditSign,
    DiskSign,
    Finding,
    NodeSign,
    Signs,
    StoreSign,
    Told,
    Turning,
    Wait,
)
from sheratan_hub.rules.silence import Fleet
from sheratan_hub.rules.verdict import CODES, verdict, wrong
from tests.web.test_docs import anchors

NOW = 1_800_000_000_000
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
RUNBOOK = (Path(__file__).parents[2] / "docs/runbook.md").read_text()

DOWN = (
    Answering("control", "http://127.0.0.1:8787", False, "Connection refused"),
    Answering("data", "http://127.0.0.1:8788", False, "Connection refused"),
)
UP = tuple(Answering(one.plane, one.url, True) for one in DOWN)
BUSY = {"node:ONLINE": 2, "job:pending": 5, "job:running": 3}


def told(event: str, count: int = 1, ago: int = 1000, who: str = "10.0.0.9", reason: str = "") -> Told:
    return Told(NOW - ago, event, who, reason, count)


def waits(*reasons: str, age: int = MINUTE, lacking: tuple[str, ...] = ()) -> Wait:
    return Wait("j1", "render", age, reasons, lacking)


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("hub-down", {"planes": DOWN, "killed": True}, "was killed"),
    ("hub-down", {"planes": DOWN}, "was stopped"),
    ("hub-down", {"planes": DOWN, "killed": None}, "cannot be read by who runs this"),
    ("hub-down", {"planes": DOWN, "began": False}, "none has ever run"),
    ("hub-down", {"planes": DOWN, "held_by": "process 7 on box"}, "process 7 on box holds its store"),
    ("hub-down", {"planes": (UP[0], DOWN[1])}, "The data plane does not answer"),
    ("disk-full", {"disks": (DiskSign("/var/hub", "full"),)}, "/var/hub is full"),
    ("disk-full", {"disks": (DiskSign("/var/hub", "read-only"),)}, "read-only"),
    ("disk-full", {"disks": (DiskSign("/var/hub", "low"),)}, "nearly full"),
    ("disk-full", {"disks": (DiskSign("/var/hub", "forbidden"),)}, "may not be written"),
    ("disk-full", {"store": StoreSign("ok", not_writing="it has no room")}, "no room to write"),
    ("store-down", {"store": StoreSign("ok", not_writing="the sync failed")}, "the sync failed"),
    ("store-damaged", {"store": StoreSign("damaged", "x.db is damaged: page 4")}, "page 4"),
    ("store-damaged", {"store": StoreSign("newer", "x.db has format 9")}, "format 9"),
    ("store-damaged", {"store": StoreSign("foreign", "x.db is of another program")}, "another program"),
    ("store-damaged", {"store": StoreSign("missing", "there is no store at x.db")}, "no store"),
    ("store-damaged", {"store": StoreSign("ok", "", ("a counter is off",))}, "a counter is off"),
    ("audit-not-writable", {"audit": AuditSign(trouble="its disk is full")}, "cannot be written: its disk is full"),
    ("audit-broken", {"audit": AuditSign("x.jsonl, line 4: was changed")}, "line 4"),
    ("mass-silence", {"fleet": Fleet((), NOW - 5, NOW + 5, 6, 8)}, "6 of 8 nodes"),
    ("paused", {"pauses": (Pause(None, NOW - 5),), "waits": (waits("paused"),)}, "everything"),
    ("paused", {"pauses": (Pause("render", NOW - 5, NOW + 5),), "waits": (waits("paused"),)}, "kind render"),
    ("no-capable-node", {"waits": (waits("no_capable_node"),)}, "no node is known"),
    ("no-capable-node", {"waits": (waits("no_capable_node", lacking=("gpu",)),)}, "no node offers gpu"),
    ("nodes-silent", {"waits": (waits("node_stale"),), "counts": {"node:STALE": 2}}, "All nodes are STALE or DEAD"),
    ("policy-denies", {"waits": (waits("policy_denied"),)}, "policy"),
    ("saturated", {"counts": {**BUSY, "job:running": 100}}, "100 of at most 100"),
    ("saturated", {"waits": (waits("node_full", age=HOUR),), "counts": {}}, "full or busy"),
    ("queue-stuck", {"oldest_ms": HOUR, "counts": {"job:pending": 1}}, "60 minutes"),
    ("backpressure", {"counts": {**BUSY, "job:pending": 1000}}, "1000 of 1000"),
    ("backpressure", {"told": (told("BACKPRESSURE_DROP"),)}, "submits were refused"),
    ("node-down", {"nodes": (NodeSign("n1", "STALE", MINUTE),), "counts": {"node:STALE": 1}}, "n1"),
    ("dead-letters", {"counts": {"job:failed": 12}, "told": (told("DLQ_ENQUEUE", 12),)}, "12 dead letters; 12 came"),
    ("dead-letters", {"counts": {"job:failed": 10_001}}, "over the limit"),
    ("auth-burst", {"told": (told("AUTH_FAILURE", 21),)}, "21 requests"),
    ("port-mismatch", {"told": (told("PORT_MISMATCH", 21),)}, "wrong port"),
    ("integrity", {"told": (told("RESULT_INTEGRITY_FAIL", who="n7", reason="sha_mismatch"),)}, "n7"),
    ("rotation-stragglers", {"turning": Turning(NOW + DAY, ("n1", "n2"))}, "2 nodes still use the old one (n1, n2)"),
    ("commit-latency", {"commit_ms": 250.0}, "250 ms"),
    ("clock-skew", {"nodes": (NodeSign("n1", "ONLINE", 5, 90_000),)}, "90 s"),
]


def found(**signs: Any) -> list[Finding]:
    return verdict(Signs(NOW, **{"planes": UP, **signs}))


@pytest.mark.parametrize(("code", "signs", "text"), CASES, ids=[f"{case[0]}-{n}" for n, case in enumerate(CASES)])
def test_each_trouble_is_named_with_its_evidence_and_what_to_do(code: str, signs: dict[str, Any], text: str) -> None:
    findings = found(**signs)
    [finding] = [one for one in findings if one.code == code]
    assert text in finding.text
    assert finding.evidence
    assert finding.do
    assert wrong(findings)


def test_every_code_has_a_case_and_an_entry_in_the_runbook() -> None:
    assert {code for code, _, _ in CASES} | {"loop-errors"} == set(CODES)
    assert {anchor for _, anchor in CODES.values()} <= anchors(RUNBOOK)
    assert all(severity in SEVERITIES for severity, _ in CODES.values())


def test_a_hub_that_is_well_has_no_finding() -> None:
    disks = (DiskSign("/var/hub", "ok"),)
    nodes = (NodeSign("n1", "ONLINE", 10, 200),)
    assert found(counts=BUSY, disks=disks, nodes=nodes, oldest_ms=2000, store=StoreSign("ok"), commit_ms=4.0) == []
    assert found(waits=(waits("waits_its_turn"), waits("backoff"), waits("dependency"))) == []


@pytest.mark.parametrize(
    "signs",
    [
        {"pauses": (Pause(None, NOW - 5),)},
        {"counts": {"job:failed": 3}},
        {"nodes": (NodeSign("n1", "DEAD", 2 * DAY),), "counts": {"node:DEAD": 1}},
        {"waits": (waits("node_busy"),), "counts": BUSY},
        {"failed_loops": {"ledger": 2}},
    ],
    ids=["a pause that keeps nobody", "few dead letters", "long dead", "full for a moment", "a loop"],
)
def test_what_may_be_meant_so_is_a_note_and_nothing_is_wrong(signs: dict[str, Any]) -> None:
    findings = found(**signs)
    assert [one.severity for one in findings] == ["note"]
    assert not wrong(findings)


@pytest.mark.parametrize(
    "signs",
    [
        {"pauses": (Pause(None, NOW - 5, NOW - 1),)},
        {"fleet": Fleet((), NOW - 9, NOW - 5, 6, 8)},
        {"told": (told("AUTH_FAILURE", 20),)},
        {"told": (told("AUTH_FAILURE", 500, ago=2 * HOUR),)},
        {"told": tuple(told("AUTH_FAILURE", 4, ago=ago) for ago in range(30 * MINUTE, 0, -20_000))},
        {"told": (told("BACKPRESSURE_DROP", ago=HOUR),)},
        {"turning": Turning(NOW + DAY, ())},
        {"oldest_ms": HOUR, "counts": BUSY},
        {"oldest_ms": MINUTE, "counts": {"job:pending": 1}},
    ],
)
def test_what_is_over_or_within_its_bounds_is_no_finding(signs: dict[str, Any]) -> None:
    assert found(**signs) == []


def test_the_configured_number_of_wrong_tokens_counts() -> None:
    assert found(told=(told("AUTH_FAILURE", 30),), bursts={"AUTH_FAILURE": 30}) == []
    assert [one.code for one in found(told=(told("AUTH_FAILURE", 3),), bursts={"AUTH_FAILURE": 2})] == ["auth-burst"]


def test_the_worst_comes_first_and_causes_before_what_follows_from_them() -> None:
    signs: dict[str, Any] = {
        "disks": (DiskSign("/x", "full"),),
        "audit": AuditSign(trouble="its disk is full"),
        "store": StoreSign("ok", not_writing="no room"),
        "counts": {"job:failed": 3, "job:pending": 1},
        "told": (told("AUTH_FAILURE", 50),),
        "oldest_ms": HOUR,
    }
    codes = [one.code for one in found(planes=DOWN, killed=True, **signs)]
    assert codes == ["hub-down", "disk-full", "audit-not-writable", "auth-burst", "dead-letters"]


def test_a_rotation_that_ends_within_the_hour_is_critical() -> None:
    assert found(turning=Turning(NOW + HOUR - 1, ("n1",)))[0].severity == "critical"
    assert found(turning=Turning(NOW + HOUR, ("n1",)))[0].severity == "warning"


def test_nobody_who_can_is_worse_when_it_has_lasted_and_nothing_runs() -> None:
    lasting = waits("no_capable_node", age=HOUR)
    assert found(waits=(lasting,), counts={"job:running": 1})[0].severity == "warning"
    assert found(waits=(lasting,), limits=Limits())[0].severity == "critical"
