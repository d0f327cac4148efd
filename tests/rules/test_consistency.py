"""What is named when a store contradicts itself, and that what was put right does so no more; no event loop."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from sheratan_hub.rules.cascade import SweepCascades
from sheratan_hub.rules.command import Event
from sheratan_hub.rules.consistency import NOTES, PROBLEMS, Consistency
from sheratan_hub.rules.edges import edge
from sheratan_hub.rules.finish import Cancel
from sheratan_hub.rules.jobs import job_key, job_of
from sheratan_hub.rules.missions import Mission
from sheratan_hub.rules.submit import key_id
from sheratan_hub.storage import Key, Row
from tests.rules.stage import Stage
from tests.rules.whole import DONE, FAILS, KEYED, PARENT, RUNS, WAITS, Rows, a_bit_of_everything, put_right, seen, wrong


@pytest.fixture(scope="module")
def kept() -> tuple[Rows, dict[str, int]]:
    return a_bit_of_everything()


def test_a_hub_that_has_done_a_bit_of_everything_is_consistent(kept: tuple[Rows, dict[str, int]]) -> None:
    assert wrong(*kept) == []
    assert put_right(*kept) == kept


def job(id: str, **changes: Any) -> Callable[[Rows, dict[str, int]], None]:
    """The job's document is changed, its row as it should be then."""

    def change(rows: Rows, counts: dict[str, int]) -> None:
        rows[job_key(id)] = job_of(rows[job_key(id)]).with_(**changes).row

    return change


def row(kind: str, id: str, **changes: Any) -> Callable[[Rows, dict[str, int]], None]:
    """Fields of a row are changed."""

    def change(rows: Rows, counts: dict[str, int]) -> None:
        rows[Key(kind, id)] = msgspec.structs.replace(rows[Key(kind, id)], **changes)

    return change


def gone(kind: str, id: str) -> Callable[[Rows, dict[str, int]], None]:
    def change(rows: Rows, counts: dict[str, int]) -> None:
        del rows[Key(kind, id)]

    return change


def made(*more: Row) -> Callable[[Rows, dict[str, int]], None]:
    return lambda rows, counts: rows.update({one.key: one for one in more})


def counted(**facets: int) -> Callable[[Rows, dict[str, int]], None]:
    return lambda rows, counts: counts.update({name.replace("__", ":"): n for name, n in facets.items()})


EDGE = f"{PARENT}/{WAITS}"

DEFECTS: list[tuple[str, str, Callable[[Rows, dict[str, int]], None]]] = [
    ("row_unreadable", f"job {FAILS}", row("job", FAILS, doc=b'{"id":')),
    ("row_unreadable", "node n1", row("node", "n1", doc=b"\xff")),
    ("row_misnamed", "node n2", made(Row("node", "n2", b'{"id":"n1","first_seen":1,"last_seen":1}'))),
    ("labels_differ", f"job {RUNS}", row("job", RUNS, labels=("pending", "runs", None, None, None))),
    ("lane_differs", f"job {RUNS}", row("job", RUNS, lane='[2,"runs","",[]]')),
    ("lane_differs", f"job {KEYED}", row("job", KEYED, lane=None)),
    ("lane_differs", f"job {KEYED}", row("job", KEYED, order=1)),
    ("agenda_differs", f"job {RUNS}", row("job", RUNS, agenda=None, due_at=0)),
    ("agenda_differs", f"job {RUNS}", row("job", RUNS, due_at=5)),
    ("agenda_differs", f"job {DONE}", row("job", DONE, agenda="prune.failed")),
    ("agenda_without_time", f"job {RUNS}", row("job", RUNS, due_at=0)),
    ("job_impossible", f"job {RUNS}", job(RUNS, lease_id=None)),
    ("job_impossible", f"job {DONE}", job(DONE, finished_at=0)),
    ("job_impossible", f"job {KEYED}", job(KEYED, losses=-1)),
    ("params_lost", f"job {KEYED}", gone("params", KEYED)),
    ("beside_lost", f"job {FAILS}", gone("attempts", FAILS)),
    ("beside_lost", f"job {RUNS}", job(RUNS, late_results=1)),
    ("beside_lost", f"job {RUNS}", job(RUNS, resuming=True)),
    ("beside_without_job", f"params {KEYED}", gone("job", KEYED)),
    ("beside_without_job", f"read {DONE}", gone("job", DONE)),
    ("beside_unknown", f"attempts {FAILS}", job(FAILS, tried=0)),
    ("beside_unknown", f"resume {FAILS}", made(Row("resume", FAILS, b"0", agenda="resume", due_at=9))),
    ("key_without_job", f"key {key_id('k')}", gone("job", KEYED)),
    ("key_lost", f"job {KEYED}", gone("key", key_id("k"))),
    ("key_lost", f"job {KEYED}", row("key", key_id("k"), doc=b'["job-0001","sha"]')),
    ("mission_key_without_mission", f"mission_key {key_id('mission key')}", gone("mission", "m1")),
    ("edge_without_parent", f"edge {EDGE}", gone("job", PARENT)),
    ("edge_unknown", f"edge {EDGE}", job(PARENT, dependents=False)),
    ("edge_untold", f"edge {EDGE}", made(edge(PARENT, WAITS, failed=True))),
    ("edges_off", f"job {WAITS}", gone("edge", EDGE)),
    ("edges_off", f"job {WAITS}", job(WAITS, parents_left=2)),
    ("edges_off", f"job {KEYED}", made(edge(PARENT, KEYED, failed=False))),
    ("lease_without_job", "leases:n1", counted(leases__n1=2)),
    ("lease_without_job", "running:s", counted(running__s=1)),
    ("counts_off", "job:pending", counted(job__pending=77)),
    ("counts_off", "m:m1:pending", counted(m__m1__pending=9)),
    ("counts_off", "m:half:pruned", counted(m__half__pruned=0)),
    ("counts_off", "m:half:pruned", counted(m__half__pruned=2)),
    ("counts_off", "m:half:pending", counted(m__half__pending=0)),
    ("counts_off", "m:gone:completed", counted(m__gone__completed=3, m__gone__pruned=3)),
    ("counts_off", "m:over:completed", gone("mission", "over")),
    ("counts_off", "claimable:2", counted(claimable__2=0)),
    ("mission_kept", "mission over", made(Mission("over", "title", 1).row)),
    ("policy_broken", "policy 0000000002", gone("policy", "0000000001")),
    ("policy_missing", "policy-active active", gone("policy", "0000000002")),
]


@pytest.mark.parametrize(("code", "place", "change"), DEFECTS)
def test_a_contradiction_is_named_and_mended(
    kept: tuple[Rows, dict[str, int]], code: str, place: str, change: Callable[[Rows, dict[str, int]], None]
) -> None:
    rows, counts = dict(kept[0]), dict(kept[1])
    change(rows, counts)
    found = [(one.code, one.place) for one in wrong(rows, counts)]
    assert (code, place) in found
    assert wrong(*put_right(rows, counts)) == []


def test_every_code_is_named_by_some_test() -> None:
    elsewhere = {"damaged", "event_gap", "event_unreadable", "registry_differs"}
    assert {code for code, _, _ in DEFECTS} | elsewhere == set(PROBLEMS)
    assert not (set(PROBLEMS) & set(NOTES)) - {"registry_differs"}


def test_what_is_harmless_is_no_problem(kept: tuple[Rows, dict[str, int]]) -> None:
    rows, counts = dict(kept[0]), dict(kept[1])
    rows[Key("job", "gone")] = job_of(rows[job_key(PARENT)]).with_(id="gone").row
    rows[edge(PARENT, "pruned", failed=False).key] = edge(PARENT, "pruned", failed=False)
    del rows[Key("job", "gone")]
    counts |= {"m:m1:completed": 5, "m:m1:pruned": 5}  # jobs that were pruned stay counted in their mission
    assert wrong(rows, counts) == []
    assert "edge_without_child" in {one.code for one in seen(rows)[1]}


def test_numbers_that_are_missing_among_events_are_named() -> None:
    line = msgspec.json.encode(Event(1, "job.submitted", "client"))
    rules = Consistency()
    assert list(rules.line(5, [line, line])) == []
    assert [one.code for one in rules.line(9, [line, b"?"])] == ["event_gap", "event_unreadable"]
    assert [one.code for one in rules.line(10, [line])] == ["event_gap"]
    assert list(rules.ended(11)) == []
    assert [one.code for one in rules.ended(12)] == ["event_gap"]


def test_a_held_job_has_lost_what_it_waited_for(kept: tuple[Rows, dict[str, int]]) -> None:
    rows, counts = dict(kept[0]), dict(kept[1])
    del rows[Key("edge", EDGE)]
    right, _ = put_right(rows, counts)
    held = job_of(right[job_key(WAITS)])
    assert (held.status, held.reason, held.parents_left) == ("quarantined", "DEPENDENCY_FAILED", 0)
    assert right[job_key(WAITS)].lane is None


def test_a_lost_key_is_made_anew_from_the_job(kept: tuple[Rows, dict[str, int]]) -> None:
    rows, counts = dict(kept[0]), dict(kept[1])
    del rows[Key("key", key_id("k"))]
    right, _ = put_right(rows, counts)
    name, sha256 = msgspec.json.decode(right[Key("key", key_id("k"))].doc)
    assert name == KEYED
    assert len(sha256) == 64


def test_dependents_of_an_end_that_nobody_was_told_of_are_told(kept: tuple[Rows, dict[str, int]]) -> None:
    stage = Stage()
    stage.rows, stage.counts = dict(kept[0]), dict(kept[1])
    stage.do(Cancel(PARENT))
    ended = stage.job(PARENT)
    stage.rows[job_key(PARENT)] = ended.with_(cascade=False).row
    assert "edge_untold" in {one.code for one in wrong(stage.rows, stage.counts)}
    stage.rows, stage.counts = put_right(stage.rows, stage.counts)
    assert wrong(stage.rows, stage.counts) == []
    stage.do(SweepCascades())
    assert stage.job(WAITS).status == "quarantined"
    assert wrong(stage.rows, stage.counts) == []


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_lost_or_spoilt_is_put_right(kept: tuple[Rows, dict[str, int]], seed: int) -> None:
    dice = random.Random(seed)
    rows, counts = dict(kept[0]), dict(kept[1])
    for _ in range(dice.randrange(1, 6)):
        key = dice.choice(sorted(rows))
        if dice.random() < 0.5:
            del rows[key]
        elif dice.random() < 0.5:
            doc = bytearray(rows[key].doc or b"x")
            doc[dice.randrange(len(doc))] ^= 1 << dice.randrange(8)
            rows[key] = msgspec.structs.replace(rows[key], doc=bytes(doc))
        elif len(rows) == len(kept[0]):
            dice.choice(DEFECTS)[2](rows, counts)
        counts[dice.choice(sorted(counts))] += dice.choice((-1, 3))
    assert wrong(*put_right(rows, counts)) == []
