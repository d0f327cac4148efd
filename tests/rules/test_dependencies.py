"""Dependencies by their rules: who waits, who is told, what failure and redrive do. No event loop."""

from __future__ import annotations

from typing import Any

import pytest

from sheratan_hub.rules.cascade import SweepCascades, SweepLinks
from sheratan_hub.rules.command import Code, Command, Decision, Refused, Scene, Together
from sheratan_hub.rules.edges import AT_ONCE, PIECE, loosen, resuming
from sheratan_hub.rules.finish import Cancel, Finish
from sheratan_hub.rules.graph import Graph, Member, alone, plan
from sheratan_hub.rules.jobs import job_key, job_of
from sheratan_hub.rules.missions import RedriveMember
from sheratan_hub.rules.redrive import redriven
from sheratan_hub.rules.submit import Submit, Submitted
from sheratan_hub.rules.sweep import SweepJobs
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Wants
from tests.rules.stage import Stage


def refused(stage: Stage, command: Any) -> Refused:
    with pytest.raises(Refused) as no:
        stage.do(command)
    return no.value


def sweep(stage: Stage, **options: Any) -> None:
    while stage.do(SweepLinks()).next_at or stage.do(SweepCascades(**options)).next_at:
        pass


def end(stage: Stage, job_id: str, *, ok: bool = True) -> None:
    """Run one job to its end, whichever is leased before it; then tell its dependents."""
    job = stage.job(job_id)
    while job.status != "running":
        stage.lease()
        job = stage.job(job_id)
    stage.do(Finish(job_id, ok, job.lease_id, error=b'{"type":"E"}', retry=False))
    sweep(stage)


def states(stage: Stage, *job_ids: str) -> list[str]:
    return [stage.job(one).status for one in job_ids]


class Redrive:
    """What the operator's command does: redrive, and tell the dependents."""

    def __init__(self, job_id: str, *, dependents: bool = False) -> None:
        self.job_id, self.dependents = job_id, dependents

    def wants(self, scene: Scene) -> Wants:
        return Wants(keys={job_key(self.job_id)})

    def decide(self, view: View) -> Decision:
        row = view.row("job", self.job_id)
        assert row is not None
        job, new, put = resuming(view, redriven(job_of(row), view), dependents=self.dependents)
        return Decision(None, new=new, put=(job.row, *put))


def graph_of(*entries: tuple[str, list[str]], atomic: bool = True, **fields: Any) -> Graph:
    members = [Member(ref, Submit(f"{ref}-id", "work", depends_on=tuple(names), **fields)) for ref, names in entries]
    return plan(members, atomic=atomic)


# Waiting and going on


def test_a_job_runs_when_all_it_depends_on_has_completed() -> None:
    stage = Stage()
    a, b = stage.submit(), stage.submit()
    child = stage.submit(depends_on=(a, b))
    assert stage.job(child).parents_left == 2
    end(stage, a)
    assert (stage.job(child).status, stage.rows[job_key(child)].lane) == ("pending", None)
    end(stage, b)
    assert stage.lease().id == child


def test_nothing_is_left_of_edges_once_all_have_completed() -> None:
    stage = Stage()
    a = stage.submit()
    stage.submit(depends_on=(a,))
    end(stage, a)
    assert {key.kind for key in stage.rows} == {"job"}
    assert stage.rows[job_key(a)].agenda == "prune.completed"
    assert not stage.job(a).dependents


def test_two_parents_that_finish_in_one_batch_are_both_counted() -> None:
    stage = Stage()
    a, b = stage.submit(), stage.submit()
    child = stage.submit(depends_on=(a, b))
    leases = stage.pull(limit=2)
    stage.do(Together(tuple(Finish(job.id, True, job.lease_id) for job in leases)))
    sweep(stage)
    assert stage.lease().id == child


def test_a_parent_that_has_completed_counts_as_done_and_none_is_counted_twice() -> None:
    stage = Stage()
    a = stage.submit()
    end(stage, a)
    stage.do(alone(Submit("c", "work", depends_on=(a, a))))
    assert stage.lease().id == "c"


def test_an_unblocked_job_has_kept_its_place_in_line() -> None:
    stage = Stage()
    a = stage.submit("other")
    first = stage.submit(depends_on=(a,))
    stage.now += 5
    second = stage.submit()
    stage.now += 5
    stage.lease(kinds=frozenset({"other"}))
    end(stage, a)
    assert [job.id for job in stage.pull(limit=2)] == [first, second]


def test_a_delay_that_is_not_over_goes_on_after_the_last_parent() -> None:
    stage = Stage()
    a = stage.submit()
    child = stage.submit(depends_on=(a,), delay_ms=5000)
    end(stage, a)
    assert stage.pull() == []
    stage.now += 5000
    stage.do(SweepJobs("wait"))
    assert stage.lease().id == child


def test_a_job_that_waits_for_others_expires_by_its_own_deadline_and_not_by_the_lines() -> None:
    stage = Stage(item_ttl_ms=1000)
    a = stage.submit(expires_in_ms=10**9)
    mine, lines = stage.submit(depends_on=(a,), expires_in_ms=2000), stage.submit(depends_on=(a,))
    stage.now += 2000
    stage.do(SweepJobs("expire"))
    assert [stage.job(mine).reason, stage.job(lines).status] == ["EXPIRED", "pending"]
    end(stage, a)
    assert stage.job(lines).ends_unclaimed_at == stage.now + 1000


@pytest.mark.parametrize("parents", [3, AT_ONCE + 1, 2 * PIECE + 7])
def test_a_fan_in_waits_for_every_one(parents: int) -> None:
    stage = Stage(max_depth=10**6, max_inflight=10**6)
    ids = [stage.submit() for _ in range(parents)]
    stage.do(alone(Submit("c", "work", depends_on=tuple(ids))))
    end(stage, ids[0])
    jobs = stage.pull(limit=parents)
    stage.do(Together(tuple(Finish(job.id, True, job.lease_id) for job in jobs[1:])))
    sweep(stage)
    assert stage.job("c").parents_left == 1
    end(stage, jobs[0].id)
    assert stage.lease().id == "c"
    assert {key.kind for key in stage.rows} == {"job"}


def test_parents_that_end_while_a_job_is_being_linked_are_counted_once() -> None:
    stage = Stage(max_depth=10**6, max_inflight=10**6)
    ids = [stage.submit() for _ in range(2 * PIECE)]
    stage.do(alone(Submit("c", "work", depends_on=tuple(ids))))
    stage.do(SweepLinks())
    jobs = stage.pull(limit=len(ids))
    stage.do(Together(tuple(Finish(job.id, True, job.lease_id) for job in jobs)))
    while stage.do(SweepCascades()).next_at:
        assert stage.job("c").parents_left >= PIECE
    sweep(stage)
    assert stage.lease().id == "c"


def test_a_job_that_was_cancelled_while_it_was_linked_stays_so() -> None:
    stage = Stage(max_depth=10**6)
    ids = [stage.submit() for _ in range(2 * PIECE)]
    stage.do(alone(Submit("c", "work", depends_on=tuple(ids))))
    stage.do(SweepLinks())
    stage.do(Cancel("c"))
    sweep(stage)
    end(stage, ids[0], ok=False)
    assert (stage.job("c").status, stage.job("c").reason) == ("cancelled", "CANCELLED")


# Failure


def test_a_failure_cancels_transitively_with_the_root_cause() -> None:
    stage = Stage()
    a = stage.submit()
    b = stage.submit(depends_on=(a,))
    c = stage.submit(depends_on=(b,))
    end(stage, a, ok=False)
    assert states(stage, a, b, c) == ["failed", "cancelled", "cancelled"]
    assert {stage.job(one).root_cause for one in (b, c)} == {a}
    told = [(event.event, event.job_id, event.meta) for event in stage.events if event.event == "job.cancelled"]
    assert told == [("job.cancelled", one, {"reason": "DEPENDENCY_FAILED", "root_cause": a}) for one in (b, c)]


def test_a_cancelled_parent_is_as_a_failed_one() -> None:
    stage = Stage()
    a = stage.submit()
    b = stage.submit(depends_on=(a,))
    stage.do(Cancel(a))
    sweep(stage)
    assert (stage.job(b).status, stage.job(b).root_cause) == ("cancelled", a)


def test_only_a_terminal_failure_is_told() -> None:
    stage = Stage(backoff_base_ms=0)
    a = stage.submit()
    b = stage.submit(depends_on=(a,))
    job = stage.lease()
    stage.do(Finish(a, False, job.lease_id))
    sweep(stage)
    assert states(stage, a, b) == ["pending", "pending"]


def test_hold_puts_a_job_aside_and_what_depends_on_it_waits() -> None:
    stage = Stage()
    a = stage.submit()
    b = stage.submit(depends_on=(a,), on_dependency_failure="hold")
    c = stage.submit(depends_on=(b,))
    end(stage, a, ok=False)
    assert states(stage, b, c) == ["quarantined", "pending"]
    assert (stage.job(b).reason, stage.job(b).root_cause) == ("DEPENDENCY_FAILED", a)
    assert stage.counts["job:quarantined"] == 1


def test_run_counts_a_failure_as_done() -> None:
    stage = Stage()
    a = stage.submit()
    b = stage.submit(depends_on=(a,), on_dependency_failure="run")
    end(stage, a, ok=False)
    assert stage.lease().id == b


@pytest.mark.parametrize(
    ("policy", "status", "reason"),
    [
        ("cancel", "cancelled", "DEPENDENCY_FAILED"),
        ("hold", "quarantined", "DEPENDENCY_FAILED"),
        ("run", "pending", None),
    ],
)
def test_a_parent_that_has_failed_before_is_judged_at_once(policy: Any, status: str, reason: str | None) -> None:
    stage = Stage()
    a = stage.submit()
    end(stage, a, ok=False)
    job = stage.job(stage.submit(depends_on=(a,), on_dependency_failure=policy))
    assert (job.status, job.reason, job.root_cause) == (status, reason, a if reason else None)


def test_a_held_job_can_be_cancelled_and_expires() -> None:
    stage = Stage()
    a = stage.submit()
    b, c = (stage.submit(depends_on=(a,), on_dependency_failure="hold", expires_in_ms=5000) for _ in range(2))
    end(stage, a, ok=False)
    assert stage.do(Cancel(b)).status == "cancelled"
    stage.now += 5000
    stage.do(SweepJobs("expire"))
    assert [stage.job(one).reason for one in (b, c)] == ["CANCELLED", "EXPIRED"]


def test_a_job_cancelled_while_its_dependents_are_told_stays_cancelled() -> None:
    stage = Stage()
    a = stage.submit()
    children = [stage.submit(depends_on=(a,)) for _ in range(10)]
    job = stage.lease()
    stage.do(Finish(a, True, job.lease_id))
    stage.do(SweepCascades(edges=4))
    stage.do(Cancel(children[2]))
    stage.do(Cancel(children[8]))
    sweep(stage)
    assert [job.id for job in stage.pull(limit=10)] == [one for n, one in enumerate(children) if n not in (2, 8)]


def test_a_dependent_that_was_pruned_leaves_nothing_behind() -> None:
    stage = Stage()
    a = stage.submit()
    b = stage.submit(depends_on=(a,))
    stage.do(Cancel(b))
    del stage.rows[job_key(b)]
    end(stage, a)
    assert {key.kind for key in stage.rows} == {"job"}


@pytest.mark.parametrize("levels", [1, 7, 32])
def test_a_long_chain_is_cancelled_piece_by_piece(levels: int) -> None:
    stage = Stage(max_depth=10**6)
    chain = [stage.submit()]
    for _ in range(100):
        chain.append(stage.submit(depends_on=(chain[-1],)))
    stage.do(Cancel(chain[0]))
    stage.do(SweepCascades(levels=levels))
    assert sum(stage.job(one).status == "cancelled" for one in chain) == levels + 1
    sweep(stage, levels=levels)
    assert {stage.job(one).root_cause for one in chain[1:]} == {chain[0]}


def test_one_transaction_touches_a_bounded_number_of_edges() -> None:
    stage = Stage(max_depth=10**6)
    a = stage.submit()
    children = [stage.submit(depends_on=(a,)) for _ in range(500)]
    stage.do(Cancel(a))
    counts = []
    while True:
        swept = stage.do(SweepCascades(edges=64))
        counts.append(swept.changed)
        if swept.next_at is None:
            break
    assert max(counts) == 64
    assert sum(counts) == 500
    assert set(states(stage, *children)) == {"cancelled"}


# Redrive


def test_redriving_a_parent_resumes_those_on_hold() -> None:
    stage = Stage()
    a = stage.submit()
    b = stage.submit(depends_on=(a,), on_dependency_failure="hold")
    end(stage, a, ok=False)
    stage.do(Redrive(a))
    sweep(stage)
    assert (stage.job(b).status, stage.job(b).reason, stage.job(b).root_cause) == ("pending", None, None)
    end(stage, a)
    assert stage.lease().id == b
    assert "job.resumed" in {event.event for event in stage.events}


def test_a_job_held_by_two_waits_until_both_are_redriven() -> None:
    stage = Stage()
    a, b = stage.submit(), stage.submit()
    c = stage.submit(depends_on=(a, b), on_dependency_failure="hold")
    end(stage, a, ok=False)
    end(stage, b, ok=False)
    stage.do(Redrive(a))
    sweep(stage)
    assert stage.job(c).status == "quarantined"
    stage.do(Redrive(b))
    sweep(stage)
    assert (stage.job(c).status, stage.job(c).parents_left) == ("pending", 2)


def test_cancelled_dependents_come_back_only_when_asked_for() -> None:
    stage = Stage()
    a = stage.submit()
    b = stage.submit(depends_on=(a,))
    c = stage.submit(depends_on=(b,))
    by_hand = stage.submit(depends_on=(b,))
    stage.do(Cancel(by_hand))
    end(stage, a, ok=False)
    stage.do(Redrive(a))
    sweep(stage)
    assert states(stage, a, b, c) == ["pending", "cancelled", "cancelled"]
    end(stage, a, ok=False)
    stage.do(Redrive(a, dependents=True))
    sweep(stage)
    assert states(stage, a, b, c, by_hand) == ["pending", "pending", "pending", "cancelled"]
    assert stage.job(c).root_cause is None
    for one in (a, b, c):
        end(stage, one)
    assert {key.kind for key in stage.rows} == {"job", "attempts"}


def test_a_dependent_redriven_alone_waits_for_what_has_failed() -> None:
    stage = Stage()
    a = stage.submit()
    b = stage.submit(depends_on=(a,))
    end(stage, a, ok=False)
    stage.do(Redrive(b))
    sweep(stage)
    assert (stage.job(b).status, stage.pull()) == ("pending", [])
    stage.do(Redrive(a))
    sweep(stage)
    end(stage, a)
    assert stage.lease().id == b


@pytest.mark.parametrize("policy", ["cancel", "hold"])
@pytest.mark.parametrize("steps", range(6))
def test_a_redrive_overtakes_a_cascade_at_any_moment(policy: Any, steps: int) -> None:
    stage = Stage()
    a = stage.submit()
    children = [stage.submit(depends_on=(a,), on_dependency_failure=policy) for _ in range(10)]
    stage.do(Cancel(a))
    for _ in range(steps):
        stage.do(SweepCascades(edges=2))
    stage.do(Redrive(a, dependents=True))
    for _ in range(steps):
        stage.do(SweepCascades(edges=1))
    end(stage, a)
    assert {job.id for job in stage.pull(limit=10)} == set(children)
    assert {key.kind for key in stage.rows} == {"job"}


@pytest.mark.parametrize("steps", range(4))
def test_a_parent_that_fails_again_before_all_have_heard_of_its_redrive(steps: int) -> None:
    stage = Stage()
    a = stage.submit()
    children = [stage.submit(depends_on=(a,), on_dependency_failure="hold") for _ in range(6)]
    stage.do(Cancel(a))
    sweep(stage)
    stage.do(Redrive(a))
    for _ in range(steps):
        stage.do(SweepCascades(edges=2))
    stage.do(Cancel(a))
    sweep(stage)
    assert set(states(stage, *children)) == {"quarantined"}
    stage.do(Redrive(a))
    sweep(stage)
    assert set(states(stage, *children)) == {"pending"}
    assert {stage.job(one).parents_failed for one in children} == {0}


def test_a_long_chain_comes_back_with_its_first() -> None:
    stage = Stage(max_depth=10**6)
    chain = [stage.submit()]
    for _ in range(80):
        chain.append(stage.submit(depends_on=(chain[-1],)))
    stage.do(Cancel(chain[0]))
    sweep(stage)
    stage.do(Redrive(chain[0], dependents=True))
    sweep(stage)
    assert set(states(stage, *chain)) == {"pending"}
    assert {key.kind for key in stage.rows} == {"job", "edge"}
    assert not any(stage.job(one).resuming for one in chain)


def test_a_dependent_comes_back_once_nothing_above_it_is_failed() -> None:
    stage = Stage()
    a, b = stage.submit(), stage.submit()
    c = stage.submit(depends_on=(a, b))
    stage.do(Cancel(a))
    stage.do(Cancel(b))
    sweep(stage)
    stage.do(Redrive(a, dependents=True))
    sweep(stage)
    assert stage.job(c).status == "cancelled"
    stage.do(Redrive(b, dependents=True))
    sweep(stage)
    assert (stage.job(c).status, stage.job(c).parents_left) == ("pending", 2)


@pytest.mark.parametrize("first", [True, False])
def test_of_two_redrives_before_a_sweep_either_may_ask_for_dependents(first: bool) -> None:
    stage = Stage()
    a = stage.submit()
    b = stage.submit(depends_on=(a,))
    stage.do(Cancel(a))
    sweep(stage)
    stage.do(Redrive(a, dependents=first))
    stage.do(Cancel(a))
    stage.do(Redrive(a, dependents=not first))
    sweep(stage)
    assert stage.job(b).status == "pending"


# Several changes in one transaction


def test_a_dependent_made_in_the_transaction_that_tells_is_told_too() -> None:
    stage = Stage()
    a = stage.submit()
    b = stage.submit(depends_on=(a,))
    stage.submit(depends_on=(b,))
    stage.do(Cancel(a))
    stage.do(Together((Submit("late", "work", depends_on=(b,)), SweepCascades())))
    sweep(stage)
    assert stage.job("late").status == "cancelled"


def test_a_second_sweep_in_a_transaction_does_not_take_what_it_sees_for_all() -> None:
    stage = Stage(max_depth=10**6)
    a = stage.submit()
    children = [stage.submit(depends_on=(a,)) for _ in range(2 * PIECE + 100)]
    stage.do(Cancel(a))
    stage.do(Together((SweepCascades(), SweepCascades())))
    sweep(stage)
    assert set(states(stage, *children)) == {"cancelled"}


def test_a_job_that_ends_in_the_transaction_that_tells_of_its_redrive_tells_of_its_end_later() -> None:
    stage = Stage()
    a = stage.submit()
    b = stage.submit(depends_on=(a,))
    c = stage.submit(depends_on=(b,))
    d = stage.submit(depends_on=(c,), on_dependency_failure="hold")
    stage.do(Cancel(c))
    sweep(stage)
    stage.do(Redrive(c))
    stage.do(Cancel(a))
    sweep(stage)
    assert states(stage, a, b, c, d) == ["cancelled"] * 3 + ["quarantined"]
    assert stage.job(d).root_cause == a


def test_a_redrive_with_dependents_reaches_those_of_a_job_whose_own_redrive_is_still_told() -> None:
    stage = Stage()
    q, r = stage.submit(), stage.submit()
    p = stage.submit(depends_on=(q, r))
    x = stage.submit(depends_on=(p,))
    stage.do(Cancel(q))
    sweep(stage)
    stage.do(Redrive(p))
    stage.do(Cancel(r))
    stage.do(SweepCascades(edges=1))
    assert (stage.job(p).status, stage.job(p).resuming) == ("cancelled", True)
    stage.do(Redrive(q, dependents=True))
    stage.do(Redrive(r, dependents=True))
    sweep(stage)
    assert states(stage, p, x) == ["pending", "pending"]


# Pruning


def loose(stage: Stage, job_id: str) -> tuple[bool, set[Key]]:
    class Ask:
        def wants(self, scene: Scene) -> Wants:
            return Wants(keys={job_key(job_id)})

        def decide(self, view: View) -> Decision:
            row = view.row("job", job_id)
            assert row is not None
            found = loosen(view, job_of(row))
            return Decision(found, gone=found.gone)

    command: Command = Ask()
    found = stage.do(command)
    return found.prunable, set(found.gone)


def test_a_parent_is_not_pruned_before_those_that_depend_on_it() -> None:
    stage = Stage()
    a = stage.submit()
    held = stage.submit(depends_on=(a,), on_dependency_failure="hold")
    cut = stage.submit(depends_on=(a,))
    stage.do(Cancel(a))
    assert loose(stage, a) == (False, set()), "not all have been told"
    sweep(stage)
    assert loose(stage, a) == (False, set())
    stage.do(Cancel(held))
    assert loose(stage, a) == (False, set()), "one that has ended may be redriven, and then waits for it"
    for child in (held, cut):
        del stage.rows[job_key(child)]
    assert loose(stage, a) == (True, {Key("edge", f"{a}/{held}"), Key("edge", f"{a}/{cut}")})
    assert {key.kind for key in stage.rows} == {"job"}


def test_a_job_without_dependents_is_prunable_at_once() -> None:
    stage = Stage()
    a = stage.submit()
    end(stage, a)
    assert loose(stage, a) == (True, set())


# Graphs


def test_members_name_each_other_in_any_order() -> None:
    stage = Stage()
    outcomes = stage.do(graph_of(("c", ["b"]), ("b", ["a"]), ("a", [])))
    assert [one.job.id for one in outcomes] == ["c-id", "b-id", "a-id"]
    for one in ("a-id", "b-id", "c-id"):
        assert [job.id for job in stage.pull(limit=3)] == [one]
        end(stage, one)


@pytest.mark.parametrize("entries", [[("a", ["a"])], [("a", ["b"]), ("b", ["a"])], [("a", []), ("b", ["a", "b"])]])
def test_a_cycle_is_refused_before_anything_is_decided(entries: Any) -> None:
    with pytest.raises(Refused) as no:
        graph_of(*entries)
    assert no.value.code is Code.DEPENDENCY_CYCLE


def test_a_ref_names_one_job_only() -> None:
    with pytest.raises(Refused, match="two jobs of the batch have the ref a"):
        graph_of(("a", []), ("a", []))


def test_an_unknown_parent_stores_nothing() -> None:
    stage = Stage()
    assert refused(stage, Submit("c", "work", depends_on=("nope",))).code is Code.UNKNOWN_DEPENDENCY
    assert refused(stage, graph_of(("a", []), ("b", ["a", "nope"]))).code is Code.UNKNOWN_DEPENDENCY
    assert stage.rows == {}
    late = alone(Submit("c", "work", depends_on=tuple(map(str, range(AT_ONCE + 1)))))
    assert refused(stage, Submit("c", "work", depends_on=late.depends_on, later=True, unknown="7")).text.count("7")
    assert stage.rows == {}


def test_in_a_batch_that_is_not_atomic_what_depends_on_a_refused_entry_is_refused_too() -> None:
    stage = Stage()
    entries = [("a", ["nope"]), ("b", ["a"]), ("c", ["b"]), ("d", [])]
    outcomes = stage.do(graph_of(*entries, atomic=False))
    assert [getattr(one, "code", None) for one in outcomes] == [Code.UNKNOWN_DEPENDENCY] * 3 + [None]
    assert {key.id for key in stage.rows} == {"d-id"}


def test_entries_that_do_not_fit_take_their_dependents_with_them() -> None:
    stage = Stage(max_depth=2)
    entries = [("a", []), ("b", ["a"]), ("c", []), ("d", ["c"])]
    outcomes = stage.do(graph_of(*entries, atomic=False))
    assert [getattr(one, "code", None) for one in outcomes] == [None, None, Code.QUEUE_FULL, Code.QUEUE_FULL]


def test_a_repeated_graph_gives_the_same_jobs_and_links_new_ones_to_them() -> None:
    stage = Stage()

    def members(n: int) -> list[Member]:
        keyed = [
            Member("a", Submit(f"a{n}", "work", key="ka", payload_sha256="x")),
            Member("b", Submit(f"b{n}", "work", key="kb", payload_sha256="x", depends_on=("a",))),
        ]
        return [*keyed, Member(None, Submit(f"c{n}", "work", depends_on=("a", "b")))]

    first = stage.do(plan(members(1), atomic=True))
    again: tuple[Submitted, ...] = stage.do(plan(members(2), atomic=True))
    assert [one.job.id for one in first] == ["a1", "b1", "c1"]
    assert [(one.job.id, one.dedup) for one in again] == [("a1", True), ("b1", True), ("c2", False)]
    assert (stage.job("b1").parents_left, stage.job("c2").parents_left) == (1, 2)
    end(stage, "a1")
    end(stage, "b1")
    assert {job.id for job in stage.pull(limit=5)} == {"c1", "c2"}


def test_two_refs_of_one_job_are_one_parent() -> None:
    stage = Stage()
    same = [Member(ref, Submit(f"{ref}-id", "work", key="k", payload_sha256="x")) for ref in ("a", "b")]
    stage.do(plan([*same, Member(None, Submit("c", "work", depends_on=("a", "b")))], atomic=True))
    assert stage.job("c").parents_left == 1


def test_held_jobs_count_for_the_depth() -> None:
    stage = Stage(max_depth=2)
    a = stage.submit()
    stage.submit(depends_on=(a,), on_dependency_failure="hold")
    end(stage, a, ok=False)
    stage.submit()
    assert refused(stage, Submit("x", "work")).code is Code.QUEUE_FULL


def test_a_redrive_of_a_mission_ignores_the_depth_and_leaves_the_finished_alone() -> None:
    stage = Stage(max_depth=1)
    a = stage.submit()
    end(stage, a, ok=False)
    stage.submit()
    assert stage.do(RedriveMember(a)) is True
    assert stage.do(RedriveMember(a)) is False


def test_counts_of_a_mission_survive_the_pruning_of_its_jobs() -> None:
    stage = Stage()
    a = stage.submit(mission_id="m")
    assert stage.counts["m:m:pending"] == 1
    end(stage, a)

    class Prune:
        def wants(self, scene: Scene) -> Wants:
            return Wants(keys={job_key(a)})

        def decide(self, view: View) -> Decision:
            view.row("job", a)
            return Decision(None, gone=(job_key(a),))

    stage.do(Prune())
    assert {facet: n for facet, n in stage.counts.items() if n} == {"m:m:completed": 1, "m:m:pruned": 1}
