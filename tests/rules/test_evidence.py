"""Late results: refused, kept as evidence, compared with what completed the job. No event loop."""

from __future__ import annotations

from typing import Any

import pytest

from sheratan_hub.canonical import result_sha256
from sheratan_hub.rules.command import Code, Refused, Together
from sheratan_hub.rules.evidence import LAST_KEPT, RESULT_BYTES, Evidence, Late, evidence_of
from sheratan_hub.rules.finish import CLOSED_KEPT, Cancel, Extend, Finish, Release
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.submit import Submit
from sheratan_hub.rules.sweep import SweepJobs
from sheratan_hub.storage import Key
from tests.rules.stage import LEASE_MS, Stage
from tests.rules.test_life import done, failed, lose, refused


def evidence(stage: Stage, job_id: str) -> Evidence:
    return evidence_of(stage.rows.get(Key("late", job_id)))


def one(stage: Stage, job_id: str) -> Late:
    (late,) = evidence(stage, job_id).late
    return late


def raced(**limits: Any) -> tuple[Stage, Job, Job]:
    """A job whose first lease, of node a, was lost, and which b has now."""
    stage = Stage(**{"max_losses": 99, **limits})
    job_id = stage.submit()
    first = stage.lease("a")
    lose(stage, job_id)
    return stage, first, stage.lease("b")


def told(stage: Stage) -> list[tuple[str, Any]]:
    names = ("job.superseded", "job.judged")
    return [(event.event, event.meta["diverged"]) for event in stage.events if event.event in names]


def test_a_late_result_is_refused_and_kept() -> None:
    stage, first, second = raced()
    assert refused(stage, done(first, result=b'{"n": 1}')) is Code.LEASE_SUPERSEDED
    late = one(stage, first.id)
    assert (late.attempt, late.node_id, late.ok, bytes(late.result)) == (1, "a", True, b'{"n": 1}')
    assert (late.sha256, late.diverged) == (result_sha256(first.id, True, b'{"n":1}', b"null"), None)
    job = stage.job(first.id)
    assert (job.late_results, job.status, job.lease_id) == (1, "running", second.lease_id)
    assert told(stage) == [("job.superseded", None)]
    assert stage.events[-1].meta["node_id"] == "a"


@pytest.mark.parametrize(("result", "diverged"), [(b'{"a": 1, "b": 2}', False), (b'{"a":1,"b":3}', True)])
def test_what_completes_the_job_judges_those_that_came_before(result: bytes, diverged: bool) -> None:
    stage, first, second = raced()
    refused(stage, done(first, result=b'{"b":2,"a":1}'))
    assert stage.do(done(second, result=result)).status == "completed"
    assert one(stage, first.id).diverged is diverged
    assert told(stage) == [("job.superseded", None), ("job.judged", diverged)]


@pytest.mark.parametrize(("result", "diverged"), [(b"1", False), (b"1.0", True), (b"null", True)])
def test_one_that_comes_after_is_judged_at_once(result: bytes, diverged: bool) -> None:
    stage, first, second = raced()
    stage.do(done(second, result=b"1"))
    assert refused(stage, done(first, result=result)) is Code.LEASE_SUPERSEDED
    assert one(stage, first.id).diverged is diverged
    assert told(stage) == [("job.superseded", diverged)]
    assert bytes(stage.job(first.id).result) == b"1"


def test_a_late_failure_differs_from_any_result() -> None:
    stage, first, second = raced()
    stage.do(done(second))
    assert refused(stage, failed(first)) is Code.LEASE_SUPERSEDED
    late = one(stage, first.id)
    assert (late.ok, late.diverged, bytes(late.error)) == (False, True, b'{"type":"E"}')


def test_a_late_result_that_is_repeated_or_changed_leaves_no_second_trace() -> None:
    stage, first, second = raced()
    for result in (b"1", b"1", b"2"):
        assert refused(stage, done(first, result=result)) is Code.LEASE_SUPERSEDED
    assert bytes(one(stage, first.id).result) == b"1"
    stage.do(done(second, result=b"1"))
    refused(stage, done(first, result=b"2"))
    assert (stage.job(first.id).late_results, one(stage, first.id).diverged) == (1, False)


def test_a_foreign_lease_leaves_nothing() -> None:
    stage, first, _ = raced()
    other = stage.submit()
    theirs = stage.lease("c")
    assert theirs.id == other
    before = dict(stage.rows)
    for lease_id in ("made-up", theirs.lease_id, "", "x" * 200):
        assert refused(stage, Finish(first.id, True, lease_id or "made-up")) is Code.LEASE_SUPERSEDED
    assert stage.rows == before


@pytest.mark.parametrize("verb", [Extend, Release])
def test_other_verbs_of_a_superseded_lease_leave_nothing(verb: Any) -> None:
    stage, first, _ = raced()
    before = dict(stage.rows)
    assert refused(stage, verb(first.id, first.lease_id)) is Code.LEASE_SUPERSEDED
    assert stage.rows == before


def test_a_lease_that_its_own_worker_ended_leaves_no_evidence() -> None:
    stage = Stage()
    job_id = stage.submit()
    first = stage.lease()
    stage.do(Release(job_id, first.lease_id or ""))
    stage.lease()
    assert refused(stage, done(first)) is Code.RESULT_CONFLICT
    assert stage.job(job_id).late_results == 0


def test_nor_does_one_that_ended_too_long_ago_to_be_told_from_others() -> None:
    stage = Stage()
    job_id = stage.submit()
    first = stage.lease()
    stage.do(Release(job_id, first.lease_id or ""))
    for _ in range(CLOSED_KEPT):
        stage.do(Release(job_id, stage.lease().lease_id or ""))
    stage.lease()
    assert refused(stage, done(first)) is Code.LEASE_SUPERSEDED
    assert stage.job(job_id).late_results == 0


@pytest.mark.parametrize("end", ["poison", "cancel", "timeout"])
def test_the_last_lease_of_a_job_that_the_hub_ended_leaves_evidence_without_a_verdict(end: str) -> None:
    stage = Stage(max_losses=1, cancel_grace_ms=0, lease_ms=LEASE_MS)
    job_id = stage.submit(timeout_ms=LEASE_MS if end == "timeout" else 10**6, max_retries=0)
    job = stage.lease()
    if end == "cancel":
        stage.do(Cancel(job_id))
    stage.now += LEASE_MS
    stage.do(SweepJobs("lease"))
    assert stage.job(job_id).finished
    assert refused(stage, done(job, result=b"1")) is Code.LEASE_SUPERSEDED
    assert one(stage, job_id).diverged is None


def test_a_late_result_that_completes_the_job_judges_the_others() -> None:
    stage, first, second = raced()
    refused(stage, done(first, result=b"1"))
    lose(stage, first.id)
    assert stage.do(done(second, result=b"2")).late
    assert one(stage, first.id).diverged is True


def test_the_last_ones_are_kept_and_all_are_counted() -> None:
    stage = Stage(max_losses=99)
    job_id = stage.submit()
    leases = []
    for n in range(LAST_KEPT + 2):
        leases.append(stage.lease(f"n{n}"))
        lose(stage, job_id)
    last = stage.lease("winner")
    for place, lease in enumerate((*leases, *leases)):
        refused(stage, done(lease, result=str(place).encode()))
    assert [late.attempt for late in evidence(stage, job_id).late] == list(range(3, LAST_KEPT + 3))
    assert stage.job(job_id).late_results == LAST_KEPT + 2
    stage.do(done(last, result=b"4"))
    assert [late.diverged for late in evidence(stage, job_id).late] == [True, True, False, True, True]


def test_of_a_large_late_result_only_hash_and_size_are_kept() -> None:
    stage, first, second = raced()
    text = b'"' + b"x" * RESULT_BYTES + b'"'
    refused(stage, done(first, result=text))
    assert len(stage.rows[Key("late", first.id)].doc) < 500
    late = one(stage, first.id)
    assert (late.size_bytes, isinstance(late.result, type(second.result))) == (len(text), False)
    stage.do(done(second, result=text))
    assert one(stage, first.id).diverged is False


def test_a_late_error_is_cut_like_any() -> None:
    stage, first, _ = raced()
    refused(stage, Finish(first.id, False, first.lease_id, error=b'{"message":"%b"}' % (b"x" * 5000)))
    assert b"truncated" in bytes(one(stage, first.id).error)


def test_all_or_none_keeps_no_evidence_of_what_it_refuses() -> None:
    stage, first, _ = raced()
    before = dict(stage.rows)
    with pytest.raises(Refused) as no:
        stage.do(Together((Submit("new", "k"), done(first))))
    assert "entry 1" in no.value.text
    assert stage.rows == before
