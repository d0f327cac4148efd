"""Any graph under any story, several commands a batch: what jobs know of their parents is what is true of them."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sheratan_hub.rules.cascade import SweepCascades, SweepLinks
from sheratan_hub.rules.command import Command, Decision, Scene, Together
from sheratan_hub.rules.edges import resuming
from sheratan_hub.rules.finish import Cancel, Finish
from sheratan_hub.rules.jobs import PRUNE, Job, job_key, job_of
from sheratan_hub.rules.prune import Prune
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.redrive import redriven
from sheratan_hub.rules.submit import Submit
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Wants
from tests.rules.stage import Stage
from tests.rules.whole import wrong

POLICIES: Any = ("cancel", "hold", "run")


class Act:
    """What is done to one job, whatever state it is in: end it, cancel it, redrive it."""

    def __init__(self, verb: str, job_id: str) -> None:
        self.verb, self.job_id = verb, job_id

    def wants(self, scene: Scene) -> Wants:
        return Wants(keys={job_key(self.job_id)})

    def decide(self, view: View) -> Decision:
        row = view.row("job", self.job_id)
        job = job_of(row) if row else None
        if job is None:
            return Decision(None)
        if self.verb in ("redrive", "revive") and job.status in ("failed", "cancelled", "quarantined"):
            after, new, put = resuming(view, redriven(job, view), dependents=self.verb == "revive")
            return Decision(None, new=new, put=(after.row, *put))
        if self.verb in ("complete", "fail") and job.status == "running":
            return Finish(job.id, self.verb == "complete", job.lease_id, retry=False).decide(view)
        if self.verb == "cancel" and job.status in ("pending", "quarantined"):
            return Cancel(job.id).decide(view)
        return Decision(None)


class Allowed:
    """A submit that may come too early for a parent that is not there: then it is nothing."""

    def __init__(self, submit: Submit) -> None:
        self.submit = submit

    def wants(self, scene: Scene) -> Wants:
        wants = self.submit.wants(scene)
        return Wants(keys=wants.keys | set(map(job_key, self.submit.depends_on)), counts=set(wants.counts))

    def decide(self, view: View) -> Decision:
        there = all(view.row("job", parent) is not None for parent in self.submit.depends_on)
        return self.submit.decide(view) if there else Decision(None)


N = 8
VERBS = (
    "complete",
    "fail",
    "cancel",
    "redrive",
    "revive",
    "submit",
    "submit",
    "pull",
    "pull",
    "sweep",
    "link",
    "prune",
)
STEP = st.tuples(st.sampled_from(VERBS), st.integers(0, N - 1), st.integers(1, 3))
STORIES = st.lists(st.lists(STEP, min_size=1, max_size=3), min_size=5, max_size=60)
GRAPHS = st.lists(st.tuples(st.integers(0, 2**N - 1), st.integers(0, 2), st.booleans()), min_size=N, max_size=N)


def command_of(step: tuple[str, int, int], graph: Any, place: int) -> Command:
    verb, n, size = step
    bits, policy, later = graph[n]
    if verb == "submit":
        parents = tuple(f"j{p}" for p in range(n) if bits >> p & 1)
        submit = Submit(f"j{n}", "k", key=f"k{n}", depends_on=parents, on_dependency_failure=POLICIES[policy])
        return Allowed(submit if not later else Submit(**{**fields(submit), "later": bool(parents)}))
    if verb == "pull":
        return Pull("n", f"s{place}-", size, capabilities=frozenset())
    if verb == "prune":
        return Prune(sorted(PRUNE)[n % len(PRUNE)], size)
    if verb == "sweep":
        return SweepCascades(edges=size, levels=size)
    return SweepLinks() if verb == "link" else Act(verb, f"j{n}")


def fields(submit: Submit) -> dict[str, Any]:
    return {name: getattr(submit, name) for name in submit.__struct_fields__}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(GRAPHS, STORIES)
def test_what_jobs_know_of_their_parents_is_true(graph: Any, story: Any) -> None:
    stage = Stage(completed_kept_ms=20, failed_kept_ms=20, cancelled_kept_ms=20, key_ttl_ms=30, backoff_base_ms=0)
    made: set[str] = set()
    for place, steps in enumerate(story):
        stage.now += 10
        before = {id: job.finished for id, job in jobs_of(stage).items()}
        new = [step for step in steps if step[0] != "submit" or f"j{step[1]}" not in made]
        if any(verb == "submit" for verb, *_ in new) or any(key.kind == "link" for key in stage.rows):
            new = [step for step in new if step[0] != "prune"]  # who is yet to be linked is soon, or cancelled
        stage.do(Together(tuple(command_of(step, graph, place * 10 + n) for n, step in enumerate(new))))
        made |= set(jobs_of(stage))
        assert all(before[id] for id in before.keys() - jobs_of(stage).keys()), "only what is finished is forgotten"
        leased_early(stage, graph)
        assert wrong(stage.rows, stage.counts) == []
    for _ in range(1000):
        if not (stage.do(SweepLinks()).next_at or stage.do(SweepCascades(edges=3, levels=2)).next_at):
            break
    assert wrong(stage.rows, stage.counts) == []
    jobs = jobs_of(stage)
    assert {row.kind for row in stage.rows.values()} <= {"job", "edge", "key", "attempts", "puller"}
    for n, (bits, _, _) in enumerate(graph):
        if f"j{n}" in jobs:
            settled(jobs, jobs[f"j{n}"], [jobs[f"j{p}"] for p in range(n) if bits >> p & 1 and f"j{p}" in jobs])


def jobs_of(stage: Stage) -> dict[str, Job]:
    return {key.id: job_of(row) for key, row in stage.rows.items() if key.kind == "job"}


def leased_early(stage: Stage, graph: Any) -> None:
    """Nothing runs before all that it depends on has completed, or failed and may."""
    for n, (bits, policy, _) in enumerate(graph):
        row = stage.rows.get(job_key(f"j{n}"))
        if row is not None and job_of(row).status == "running" and POLICIES[policy] != "run":
            parents = (stage.rows.get(job_key(f"j{p}")) for p in range(n) if bits >> p & 1)
            assert all(parent is None or job_of(parent).status == "completed" for parent in parents)


def settled(jobs: dict[str, Job], job: Job, parents: list[Job]) -> None:
    """Once everything was told: the counts are those of the parents as they are, and the state follows."""
    failed = sum(parent.status in ("failed", "cancelled") for parent in parents)
    left = sum(parent.status != "completed" for parent in parents)
    assert not job.cascade
    assert not job.resuming
    if job.on_dependency_failure == "run":
        assert job.parents_failed == 0
        assert job.parents_left <= left
    else:
        assert (job.parents_left, job.parents_failed) == (left, failed)
    assert job.status != "quarantined" or failed
    if job.status == "pending":
        assert (job.row.lane is not None) == (job.parents_left == 0)
    if job.root_cause is not None:
        assert job.reason == "DEPENDENCY_FAILED"
        assert job.root_cause in jobs
