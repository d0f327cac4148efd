"""Both budgets to their end, the cap above them, and the record of every attempt. No event loop."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sheratan_hub.canonical import Raw
from sheratan_hub.rules.attempts import LAST_KEPT, TRACES_KEPT, Tried, attempts_of
from sheratan_hub.rules.finish import Cancel, Extend, Finish, Release
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.nodes import Beat, SweepNodes
from sheratan_hub.rules.sweep import ClampDelays, ReapNode, SweepJobs
from sheratan_hub.storage import Key
from tests.rules.stage import LEASE_MS, Stage
from tests.rules.test_life import done, failed, lose, refused


def record(stage: Stage, job_id: str) -> list[Tried]:
    return list(attempts_of(stage.rows.get(Key("attempts", job_id))))


def ends(stage: Stage, job_id: str) -> list[tuple[int, str | None, str]]:
    return [(one.attempt, one.node_id, one.outcome) for one in record(stage, job_id)]


def wake(stage: Stage) -> None:
    stage.now += stage.limits.backoff_cap_ms
    stage.do(SweepJobs("wait"))


def released(job: Job, **fields: Any) -> Release:
    return Release(job.id, job.lease_id or "", **fields)


# The cap


@pytest.mark.parametrize("how", ["fail", "lose", "release"])
def test_a_job_that_keeps_coming_back_ends_at_the_cap_on_deliveries(how: str) -> None:
    stage = Stage(max_deliveries=3, max_losses=99)
    job_id = stage.submit(max_retries=99)
    for _ in range(3):
        assert stage.job(job_id).status == "pending"
        job = stage.lease()
        if how == "lose":
            lose(stage, job_id)
        else:
            stage.do(failed(job) if how == "fail" else released(job))
            wake(stage)
    after = stage.job(job_id)
    assert (after.status, after.reason, after.attempt) == ("failed", "RETRIES_EXHAUSTED", 3)
    assert json.loads(bytes(after.error))["type"] == ("E" if how == "fail" else "TooManyDeliveries")
    assert stage.events[-1].event == "job.failed"
    assert stage.events[-1].meta["reason"] == "RETRIES_EXHAUSTED"


def test_a_release_at_the_cap_is_answered_alike_when_it_is_repeated() -> None:
    stage = Stage(max_deliveries=1)
    stage.submit()
    job = stage.lease()
    answer = stage.do(released(job))
    assert answer.status == "failed"
    assert stage.do(released(job)) == answer


def test_the_last_delivery_may_still_complete_the_job() -> None:
    stage = Stage(max_deliveries=2)
    job_id = stage.submit()
    stage.do(released(stage.lease()))
    assert stage.do(done(stage.lease())).status == "completed"
    assert stage.job(job_id).attempt == 2


def test_answers_that_never_left_the_hub_do_not_count_for_the_cap() -> None:
    stage = Stage(max_deliveries=2)
    job_id = stage.submit()
    for _ in range(5):
        stage.do(released(stage.lease(), undelivered=True))
    assert (stage.job(job_id).status, record(stage, job_id)) == ("pending", [])
    stage.do(released(stage.lease()))
    assert stage.job(job_id).status == "pending"
    stage.do(released(stage.lease()))
    assert (stage.job(job_id).status, stage.job(job_id).attempt) == ("failed", 7)


def test_poison_comes_before_the_cap_and_names_each_node_once() -> None:
    stage = Stage(max_deliveries=3, max_losses=3)
    job_id = stage.submit()
    for node in ("a", "b", "a"):
        stage.lease(node)
        lose(stage, job_id)
    job = stage.job(job_id)
    assert (job.reason, job.lost_on) == ("POISON", ("a", "b"))
    assert json.loads(bytes(job.error))["nodes"] == ["a", "b"]


# Timeouts and delays


def test_no_extension_lasts_beyond_the_attempts_timeout() -> None:
    stage = Stage()
    job_id = stage.submit(timeout_ms=15_000)
    job = stage.lease()
    stage.now += 9_000
    assert stage.do(Extend(job.id, job.lease_id or "", 900_000)).lease_ms == 6_000
    assert stage.job(job_id).lease_until == stage.job(job_id).times_out_at
    stage.now += 5_999
    stage.do(SweepJobs("lease"))
    assert stage.job(job_id).status == "running"
    stage.now += 1
    stage.do(SweepJobs("lease"))
    assert ends(stage, job_id) == [(1, "n1", "timeout")], "the lease ends with it, and a tie is a failure"


@pytest.mark.parametrize("how", ["fail", "retry_after", "lose", "delay"])
def test_a_delay_written_by_a_clock_that_was_ahead_is_clamped(how: str) -> None:
    stage = Stage(backoff_base_ms=5000, loss_delay_ms=5000)
    job_id = stage.submit(delay_ms=5000 if how == "delay" else 0)
    if how == "lose":
        stage.lease()
        stage.now += LEASE_MS
        stage.do(SweepJobs("lease"))
    elif how != "delay":
        stage.do(failed(stage.lease(), retry_after_ms=5000 if how == "retry_after" else None))
    assert stage.do(ClampDelays((job_id,))) == 0, "it waits as long as it should"
    stage.now -= 3_600_000
    assert stage.do(ClampDelays((job_id,))) == 1
    stage.now += 5000
    stage.do(SweepJobs("wait"))
    assert stage.lease().id == job_id


def test_a_moment_that_the_producer_named_is_not_clamped() -> None:
    stage = Stage()
    later = stage.now + 90_000
    job_id = stage.submit(not_before=later, delay_ms=1000)
    stage.now -= 3_600_000
    assert stage.do(ClampDelays((job_id,))) == 0
    assert stage.job(job_id).not_before == later


def test_of_a_delay_and_a_moment_the_later_counts() -> None:
    stage = Stage()
    soon, late = stage.now + 1000, stage.now + 9000
    assert stage.job(stage.submit(not_before=soon, delay_ms=5000)).not_before == stage.now + 5000
    assert stage.job(stage.submit(not_before=late, delay_ms=5000)).not_before == late
    assert stage.job(stage.submit(not_before=1)).status == "pending"
    assert len(stage.pull()) == 1, "a moment that is over is none"


# The record


def test_a_job_that_is_completed_at_once_has_no_record() -> None:
    stage = Stage()
    job_id = stage.submit()
    stage.do(done(stage.lease()))
    assert [key.kind for key in stage.rows] == ["job"]
    assert b"tried" not in stage.rows[Key("job", job_id)].doc


def test_every_attempt_that_did_not_complete_is_on_record() -> None:
    stage = Stage(max_losses=99)
    job_id = stage.submit(max_retries=99, timeout_ms=LEASE_MS * 3)
    stage.do(failed(stage.lease("a")))
    wake(stage)
    stage.lease("b")
    lose(stage, job_id)
    stage.do(released(stage.lease("c")))
    job = stage.lease("d")
    for _ in range(4):
        stage.do(Extend(job.id, job.lease_id or ""))
        stage.now += LEASE_MS - 1
    stage.do(SweepJobs("lease"))
    wake(stage)
    stage.do(Beat("e"))
    stage.lease("e")
    stage.now += stage.limits.node_dead_ms + 1
    stage.do(SweepNodes())
    stage.do(ReapNode("e", (job_id,)))
    wake(stage)
    last = stage.lease("f")
    stage.do(Cancel(job_id))
    stage.do(failed(last))
    assert ends(stage, job_id) == [
        (1, "a", "failed"),
        (2, "b", "lost"),
        (3, "c", "released"),
        (4, "d", "timeout"),
        (5, "e", "node_dead"),
        (6, "f", "cancelled"),
    ]
    errors = [json.loads(bytes(one.error)) for one in record(stage, job_id)]
    assert [error and error["type"] for error in errors] == ["E", None, None, "Timeout", None, "E"]
    assert stage.job(job_id).tried == 6
    assert [one.at for one in record(stage, job_id)] == sorted(one.at for one in record(stage, job_id))


def test_a_repeated_failure_is_on_record_once() -> None:
    stage = Stage()
    job_id = stage.submit()
    job = stage.lease()
    stage.do(failed(job))
    stage.do(failed(job))
    assert ends(stage, job_id) == [(1, "n1", "failed")]


def test_what_a_worker_says_late_of_its_failure_stands_at_the_lost_attempt() -> None:
    stage = Stage()
    job_id = stage.submit()
    job = stage.lease()
    lose(stage, job_id)
    stage.do(failed(job))
    assert ends(stage, job_id) == [(1, "n1", "lost")]
    assert json.loads(bytes(record(stage, job_id)[0].error)) == {"type": "E"}


def test_a_cancel_that_had_to_be_enforced_is_on_record() -> None:
    stage = Stage(cancel_grace_ms=1000)
    job_id = stage.submit()
    stage.lease()
    stage.do(Cancel(job_id))
    stage.now += 1000
    stage.do(SweepJobs("lease"))
    assert ends(stage, job_id) == [(1, "n1", "cancelled")]


def test_the_record_is_bounded_to_the_first_and_the_last_attempts() -> None:
    stage = Stage(max_deliveries=999)
    job_id = stage.submit(max_retries=999)
    for n in range(LAST_KEPT + 9):
        text = json.dumps({"type": "E", "message": str(n), "trace": "line"}).encode()
        job = stage.lease()
        stage.do(Finish(job.id, False, job.lease_id, error=text))
        wake(stage)
    kept = record(stage, job_id)
    assert [one.attempt for one in kept] == [1, *range(10, LAST_KEPT + 10)]
    traced = [one.attempt for one in kept if b"trace" in bytes(one.error).replace(b"truncated", b"")]
    assert traced == [1, *range(LAST_KEPT + 10 - TRACES_KEPT, LAST_KEPT + 10)]
    assert all(json.loads(bytes(one.error))["message"] == str(one.attempt - 1) for one in kept)


def test_a_sweep_over_many_jobs_puts_all_of_them_on_record() -> None:
    stage = Stage(max_losses=99)
    ids = [stage.submit() for _ in range(5)]
    for round_ in (1, 2):
        stage.pull(limit=5)
        stage.now += LEASE_MS
        assert stage.do(SweepJobs("lease", limit=5)).changed == 5
        wake(stage)
        assert [len(record(stage, id)) for id in ids] == [round_] * 5


def test_the_record_tells_leases_apart_without_giving_them_away() -> None:
    stage = Stage()
    job_id = stage.submit()
    job = stage.lease()
    stage.do(failed(job))
    assert (job.lease_id or "?").encode() not in stage.rows[Key("attempts", job_id)].doc


def test_a_failure_keeps_its_error_cut_and_a_repeat_is_known_by_what_was_sent() -> None:
    stage = Stage()
    job_id = stage.submit()
    job = stage.lease()
    long, longer = (json.dumps({"type": "E", "message": "x" * n}).encode() for n in (2000, 3000))
    answer = stage.do(Finish(job.id, False, job.lease_id, error=long))
    kept = {"type": "E", "message": "x" * 1000, "truncated": True}
    assert json.loads(bytes(stage.job(job_id).error)) == kept
    assert json.loads(bytes(record(stage, job_id)[0].error)) == kept
    assert stage.do(Finish(job.id, False, job.lease_id, error=long)) == answer
    assert refused(stage, Finish(job.id, False, job.lease_id, error=longer)) == "result_conflict"
    assert isinstance(stage.job(job_id).error, Raw)
