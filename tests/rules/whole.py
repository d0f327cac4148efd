"""All rows of a store, as a dict: those of a hub that has done a bit of everything; through the check, and repair."""

from __future__ import annotations

from itertools import groupby

from sheratan_hub.rules.access import Admit
from sheratan_hub.rules.consistency import PROBLEMS, Consistency, Problem
from sheratan_hub.rules.finish import Finish
from sheratan_hub.rules.graph import Member, plan
from sheratan_hub.rules.mending import Found
from sheratan_hub.rules.missions import MakeMission, Mission
from sheratan_hub.rules.nodes import Beat
from sheratan_hub.rules.pauses import PauseKind
from sheratan_hub.rules.policies import ActivatePolicy, CreatePolicy
from sheratan_hub.rules.policy import Policy
from sheratan_hub.rules.prune import MarkRead, Prune
from sheratan_hub.rules.submit import Submit
from sheratan_hub.rules.tokens import MakeSalt, Said, Settle
from sheratan_hub.storage import Key, Row
from tests.rules.stage import Stage

Rows = dict[Key, Row]

WAITS, PARENT, KEYED, RUNS, FAILS, DONE = "job-0002", "job-0001", "job-0003", "job-0004", "job-0005", "job-0006"


def a_bit_of_everything() -> tuple[Rows, dict[str, int]]:
    """The rows and counters of a hub that has done a bit of everything."""
    stage = Stage(max_retries=0)
    forgotten_jobs(stage)
    graph = plan(
        [
            Member("p", Submit(PARENT, "parent", mission_id="m1")),
            Member("c", Submit(WAITS, "child", mission_id="m1", depends_on=("p",), on_dependency_failure="hold")),
        ],
        atomic=True,
    )
    stage.do(MakeMission(Mission("m1", "title", stage.now), graph, "mission key", "sha"))
    stage.do(Submit(KEYED, "keyed", b'"' + b"x" * 3000 + b'"', key="k", payload_sha256="sha", source="s"))
    for id, kind in ((RUNS, "runs"), (FAILS, "fails"), (DONE, "done")):
        stage.do(Submit(id, kind))
    stage.do(Beat("n1"))
    stage.lease(kinds=frozenset({"runs"}), pull_id="p")
    for kind, ok in (("fails", False), ("done", True)):
        job = stage.lease(kinds=frozenset({kind}))
        stage.do(Finish(job.id, ok, job.lease_id, error=b'{"type":"E"}', retry=False))
    stage.do(MarkRead(((DONE, stage.now),)))
    stage.do(PauseKind("paused", stage.now + 1000))
    stage.do(CreatePolicy(Policy()))
    stage.do(CreatePolicy(Policy(title="second")))
    stage.do(ActivatePolicy(2, 0))
    stage.do(MakeSalt("salt"))
    stage.do(Settle(Said("digest")))
    stage.do(Admit("a1", "digest", "viewer", 1000))
    return stage.rows, {facet: n for facet, n in stage.counts.items() if n}


def forgotten_jobs(stage: Stage) -> None:
    """Missions of which all jobs are gone, one, or one that nobody has made a mission of."""
    over = plan([Member("o", Submit("job-0007", "over", mission_id="over"))], atomic=True)
    half = plan([Member(id, Submit(id, "half", mission_id="half")) for id in ("job-0008", "job-0009")], atomic=True)
    stage.do(MakeMission(Mission("over", "title", stage.now), over, "over's key", "sha"))
    stage.do(MakeMission(Mission("half", "title", stage.now), half))
    for id in ("job-0010", "job-0011"):
        stage.do(Submit(id, "loose", mission_id="a:b"))
    for kind in ("over", "half", "loose"):
        job = stage.lease(kinds=frozenset({kind}))
        stage.do(Finish(job.id, True, job.lease_id))
    stage.now += stage.limits.completed_kept_ms
    assert stage.do(Prune("completed")).gone == 3


def seen(rows: Rows, pieces: int = 3) -> tuple[Consistency, list[Problem]]:
    """All rows through the check, some at a time as a store gives them."""
    rules, problems = Consistency(), []
    for _, group in groupby(sorted(rows), key=lambda key: key.kind):
        keys = list(group)
        for start in range(0, len(keys), pieces):
            piece = [rows[key] for key in keys[start : start + pieces]]
            beside = {key: rows[key] for key in rules.beside(piece) if key in rows}
            problems += rules.see(piece, beside)
    recount = rules.recount()
    if recount is not None:
        for kind in recount.KINDS:
            recount.see([row for key, row in rows.items() if key.kind == kind])
        problems += recount.problems()
    return rules, problems


def wrong(rows: Rows, counts: dict[str, int]) -> list[Problem]:
    rules, problems = seen(rows)
    return [one for one in (*problems, *rules.counted(counts)) if one.code in PROBLEMS]


def put_right(rows: Rows, counts: dict[str, int]) -> tuple[Rows, dict[str, int]]:
    """What repair makes of these rows and counters."""
    found, right, rules = Found(), {}, Consistency()
    of = {kind: [row for key, row in rows.items() if key.kind == kind] for kind in ("job", "edge", "link")}
    found.see_jobs(of["job"], {key: rows[key] for key in found.beside_job(of["job"]) if key in rows})
    found.see_edges(of["edge"], {key: rows[key] for key in found.beside_edge(of["edge"]) if key in rows})
    found.see_links(of["link"])
    for key in sorted(rows):
        beside = {one: rows[one] for one in found.beside([rows[key]]) if one in rows}
        for row in found.mended(rows[key], beside).rows:
            assert row.key not in right, "a row is made twice"
            right[row.key] = row
    list(rules.see(list(right.values()), {}))
    return right, rules.recounted(counts)
