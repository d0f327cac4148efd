"""A job's life by its rules: fence, repeats, budgets, timeouts, cancel. No event loop."""

from __future__ import annotations

from typing import Any

import pytest

from sheratan_hub.rules.command import Code, Refused, Together
from sheratan_hub.rules.finish import Cancel, Extend, Finish, Release
from sheratan_hub.rules.jobs import FINISHED, TRANSITIONS, Job
from sheratan_hub.rules.nodes import Beat, End
from sheratan_hub.rules.silence import SweepNodes
from sheratan_hub.rules.submit import Submit
from sheratan_hub.rules.sweep import ClampLeases, ReapNode, SweepJobs
from tests.rules.stage import LEASE_MS, Stage


def refused(stage: Stage, command: Any) -> Code:
    with pytest.raises(Refused) as no:
        stage.do(command)
    return no.value.code


def done(job: Job, **fields: Any) -> Finish:
    return Finish(job.id, True, job.lease_id, **fields)


def failed(job: Job, **fields: Any) -> Finish:
    return Finish(job.id, False, job.lease_id, error=b'{"type":"E"}', **fields)


def lose(stage: Stage, job_id: str) -> None:
    """Let the current lease run out and the loss delay pass."""
    stage.now += LEASE_MS
    stage.do(SweepJobs("lease"))
    stage.now += stage.limits.loss_delay_ms
    stage.do(SweepJobs("wait"))


def test_a_job_is_leased_once_and_completed() -> None:
    stage = Stage()
    job_id = stage.submit()
    job = stage.lease()
    assert (job.id, job.attempt, job.status) == (job_id, 1, "running")
    assert stage.pull() == []
    assert stage.do(done(job, result=b"7")).status == "completed"
    assert bytes(stage.job(job_id).result) == b"7"
    assert [event.event for event in stage.events] == ["job.submitted", "job.leased", "job.completed"]


def test_a_lost_lease_cannot_complete_what_another_node_holds() -> None:
    stage = Stage()
    job_id = stage.submit()
    first = stage.lease("n1")
    lose(stage, job_id)
    second = stage.lease("n2")
    assert refused(stage, done(first)) is Code.LEASE_SUPERSEDED
    assert stage.job(job_id).lease_id == second.lease_id
    assert stage.do(done(second)).status == "completed"
    assert refused(stage, done(first)) is Code.LEASE_SUPERSEDED


def test_a_late_result_counts_while_nobody_else_has_had_the_job() -> None:
    stage = Stage()
    job_id = stage.submit()
    job = stage.lease()
    lose(stage, job_id)
    assert stage.job(job_id).status == "pending"
    answer = stage.do(done(job))
    assert (answer.status, answer.late) == ("completed", True)
    assert stage.pull() == []
    assert stage.do(done(job)) == answer


def test_a_repeated_result_gets_the_same_answer_and_another_one_a_conflict() -> None:
    stage = Stage()
    stage.submit()
    job = stage.lease()
    answer = stage.do(done(job, result=b"1"))
    assert stage.do(done(job, result=b"1")) == answer
    assert refused(stage, done(job, result=b"2")) is Code.RESULT_CONFLICT
    assert refused(stage, failed(job)) is Code.RESULT_CONFLICT
    assert refused(stage, Release(job.id, job.lease_id or "")) is Code.RESULT_CONFLICT
    assert stage.counts["job:completed"] == 1


def test_a_repeated_failure_is_counted_once_even_after_the_next_lease() -> None:
    stage = Stage(backoff_base_ms=100)
    job_id = stage.submit()
    first = stage.lease()
    answer = stage.do(failed(first))
    assert answer.status == "pending"
    assert stage.do(failed(first)) == answer
    stage.now += 100
    stage.do(SweepJobs("wait"))
    second = stage.lease()
    assert stage.do(failed(first)) == answer
    assert stage.job(job_id).failures == 1
    assert stage.job(job_id).lease_id == second.lease_id


@pytest.mark.parametrize(
    ("backoff", "delays"), [("exponential", [1000, 2000, 4000, 5000]), ("linear", [1000, 2000, 3000, 4000])]
)
def test_failures_retry_with_capped_backoff_until_the_budget_is_used_up(backoff: Any, delays: list[int]) -> None:
    stage = Stage(backoff_cap_ms=5000)
    job_id = stage.submit(backoff=backoff, max_retries=4)
    for delay in delays:
        assert stage.do(failed(stage.lease())).retry_in_ms == delay
        stage.now += delay - 1
        stage.do(SweepJobs("wait"))
        assert stage.pull() == []
        stage.now += 1
        stage.do(SweepJobs("wait"))
    assert stage.do(failed(stage.lease())).status == "failed"
    job = stage.job(job_id)
    assert (job.reason, job.failures, job.attempt) == ("RETRIES_EXHAUSTED", 5, 5)


def test_jitter_takes_at_most_half_of_the_delay() -> None:
    stage = Stage()
    stage.submit()
    assert stage.do(failed(stage.lease(), jitter=0.999)).retry_in_ms == 501


def test_the_worker_may_say_when_to_retry_or_never() -> None:
    stage = Stage()
    stage.submit()
    assert stage.do(failed(stage.lease(), retry_after_ms=123, jitter=0.9)).retry_in_ms == 123
    job_id = stage.submit()
    assert stage.do(failed(stage.lease(), retry=False)).status == "failed"
    assert stage.job(job_id).reason == "NOT_RETRYABLE"


def test_losses_have_their_own_budget_and_end_as_poison_with_the_nodes() -> None:
    stage = Stage(max_losses=3)
    job_id = stage.submit(max_retries=0)
    for node in ("a", "b", "a"):
        stage.lease(node)
        lose(stage, job_id)
    job = stage.job(job_id)
    assert (job.status, job.reason, job.losses, job.failures) == ("failed", "POISON", 3, 0)
    assert job.lost_on == ("a", "b")


def test_an_at_most_once_job_is_never_delivered_twice() -> None:
    stage = Stage()
    lost, unlucky = stage.submit(at_most_once=True), stage.submit(at_most_once=True)
    stage.lease()
    job = stage.lease()
    stage.do(failed(job))
    lose(stage, lost)
    assert (stage.job(lost).status, stage.job(lost).reason) == ("failed", "LOST")
    assert (stage.job(unlucky).status, stage.job(unlucky).reason) == ("failed", "NOT_RETRYABLE")
    assert stage.pull() == []


def test_the_timeout_counts_from_the_start_whatever_is_extended_and_is_a_failure() -> None:
    stage = Stage()
    job_id = stage.submit(timeout_ms=15_000)
    job = stage.lease()
    stage.now += 9_000
    assert stage.do(Extend(job.id, job.lease_id or "")).lease_ms == 6_000
    stage.now += 6_000
    stage.do(SweepJobs("lease"))
    after = stage.job(job_id)
    assert (after.status, after.failures, after.losses) == ("pending", 1, 0)


def test_when_lease_and_timeout_end_together_it_is_a_failure_and_a_lease_that_ended_first_a_loss() -> None:
    stage = Stage()
    tie, loss = stage.submit(timeout_ms=LEASE_MS), stage.submit(timeout_ms=LEASE_MS + 1)
    stage.pull(limit=2)
    stage.now += LEASE_MS + 60_000
    stage.do(SweepJobs("lease"))
    assert (stage.job(tie).failures, stage.job(tie).losses) == (1, 0)
    assert (stage.job(loss).failures, stage.job(loss).losses) == (0, 1)


def test_an_extended_lease_is_not_reaped_at_its_old_end() -> None:
    stage = Stage()
    job_id = stage.submit()
    job = stage.lease()
    stage.now += LEASE_MS - 1
    stage.do(Extend(job.id, job.lease_id or ""))
    stage.now += LEASE_MS - 1
    stage.do(SweepJobs("lease"))
    assert stage.job(job_id).status == "running"
    stage.now += 1
    stage.do(SweepJobs("lease"))
    assert stage.job(job_id).status == "pending"
    assert refused(stage, Extend(job.id, job.lease_id or "")) is Code.LEASE_EXPIRED


def test_a_release_costs_nothing_and_keeps_the_place_in_line() -> None:
    stage = Stage()
    first = stage.submit()
    stage.now += 5
    stage.submit()
    job = stage.lease()
    assert job.id == first
    answer = stage.do(Release(job.id, job.lease_id or ""))
    assert stage.do(Release(job.id, job.lease_id or "")) == answer
    again = stage.lease()
    assert (again.id, again.failures, again.losses, again.attempt) == (first, 0, 0, 2)
    assert refused(stage, done(job)) is Code.LEASE_SUPERSEDED


def test_a_lost_job_does_not_return_to_the_head_of_its_lane() -> None:
    stage = Stage()
    lost = stage.submit()
    stage.lease()
    stage.now += 1
    other = stage.submit()
    lose(stage, lost)
    assert [job.id for job in stage.pull(limit=2)] == [other, lost]


def test_a_waiting_job_is_cancelled_at_once_and_again() -> None:
    stage = Stage()
    job_id = stage.submit()
    assert stage.do(Cancel(job_id)).status == "cancelled"
    assert stage.do(Cancel(job_id)).status == "cancelled"
    assert stage.pull() == []


def test_a_running_job_is_told_to_stop_and_fenced_after_the_grace() -> None:
    stage = Stage(cancel_grace_ms=3000)
    job_id = stage.submit()
    job = stage.lease()
    assert stage.do(Cancel(job_id)).cancel_requested
    assert stage.do(Extend(job.id, job.lease_id or "")).cancel_requested
    stage.now += 3000
    stage.do(SweepJobs("lease"))
    assert stage.job(job_id).status == "cancelled"
    assert refused(stage, done(job)) is Code.LEASE_SUPERSEDED


def test_a_result_that_comes_before_the_cancel_grace_ends_wins() -> None:
    stage = Stage()
    job_id = stage.submit()
    job = stage.lease()
    stage.do(Cancel(job_id))
    assert stage.do(done(job)).status == "completed"
    assert refused(stage, Cancel(job_id)) is Code.ALREADY_FINISHED


@pytest.mark.parametrize("how", ["fail", "release", "lose"])
def test_a_job_with_a_cancel_on_it_is_never_revived(how: str) -> None:
    stage = Stage(cancel_grace_ms=10**9)
    job_id = stage.submit()
    job = stage.lease()
    stage.do(Cancel(job_id))
    if how == "lose":
        lose(stage, job_id)
    else:
        stage.do(failed(job) if how == "fail" else Release(job.id, job.lease_id or ""))
    assert stage.job(job_id).status == "cancelled"


def test_a_delayed_job_waits_and_an_expired_one_fails() -> None:
    stage = Stage()
    delayed, brief = stage.submit(delay_ms=5000), stage.submit(expires_in_ms=3000)
    assert [job.id for job in stage.pull(limit=9, node_id="x")] == [brief]
    never = stage.submit(delay_ms=9000, expires_in_ms=4000)
    stage.now += 5000
    for agenda in ("wait", "expire"):
        stage.do(SweepJobs(agenda))
    assert (stage.job(never).status, stage.job(never).reason) == ("failed", "EXPIRED")
    assert [job.id for job in stage.pull()] == [delayed]


def test_after_a_start_no_lease_ends_within_the_grace() -> None:
    stage = Stage(restart_grace_ms=4000)
    job_id = stage.submit()
    stage.lease()
    stage.now += LEASE_MS * 5
    stage.started_at = stage.now
    swept = stage.do(SweepJobs("lease"))
    assert (swept.changed, swept.next_at) == (0, stage.now + 4000)
    stage.now += 4000
    stage.do(SweepJobs("lease"))
    assert stage.job(job_id).losses == 1


def test_a_lease_written_by_a_clock_that_was_ahead_is_clamped() -> None:
    stage = Stage()
    job_id = stage.submit()
    stage.lease()
    stage.now -= 3_600_000
    stage.do(ClampLeases((job_id,)))
    assert stage.job(job_id).lease_until == stage.now + LEASE_MS
    assert stage.job(job_id).times_out_at <= stage.now + 300_000


def test_a_dead_nodes_leases_are_lost_but_not_those_of_others() -> None:
    stage = Stage()
    mine, theirs = stage.submit(), stage.submit()
    stage.do(Beat("dead"))
    stage.lease("dead")
    stage.lease("alive")
    assert stage.do(ReapNode(End("dead", "dead"), (mine, theirs))) == 0, "it lives"
    stage.now += stage.limits.node_dead_ms + 1
    stage.do(SweepNodes())
    assert stage.do(ReapNode(End("dead", "dead"), (mine, theirs))) == 1
    assert (stage.job(mine).losses, stage.job(theirs).status) == (1, "running")


def test_a_key_holds_for_its_time_after_the_end_and_no_longer() -> None:
    stage = Stage(key_ttl_ms=1000)
    fields = {"key": "k", "payload_sha256": "a"}
    first = stage.do(Submit("j1", "work", **fields)).job
    assert stage.do(Submit("j2", "work", **fields)).job.id == first.id
    assert refused(stage, Submit("j3", "work", key="k", payload_sha256="b")) is Code.IDEMPOTENCY_KEY_COLLISION
    stage.do(done(stage.lease()))
    stage.now += 999
    assert stage.do(Submit("j4", "work", **fields)).dedup
    stage.now += 1
    assert stage.do(Submit("j5", "work", **fields)).job.id == "j5"
    assert stage.counts["key"] == 1


def test_a_refused_submit_burns_no_key() -> None:
    stage = Stage(max_depth=1)
    blocker = stage.submit()
    assert refused(stage, Submit("j2", "work", key="k", payload_sha256="a")) is Code.QUEUE_FULL
    stage.do(Cancel(blocker))
    assert not stage.do(Submit("j3", "work", key="k", payload_sha256="b")).dedup


def test_all_or_none_leaves_nothing_when_one_is_refused() -> None:
    stage = Stage(max_depth=2)
    commands = tuple(Submit(f"j{n}", "work") for n in range(3))
    assert refused(stage, Together(commands)) is Code.QUEUE_FULL
    assert stage.rows == {}
    answers = stage.do(Together(commands[:2]))
    assert [answer.job.id for answer in answers] == ["j0", "j1"]
    assert stage.counts == {"job:pending": 2, "claimable:2": 2}


def test_the_same_pull_id_gives_the_same_leases_and_never_new_ones() -> None:
    stage = Stage()
    for _ in range(3):
        stage.submit()
    first = stage.pull(limit=2, pull_id="p")
    again = stage.pull(limit=2, pull_id="p")
    assert [(job.id, job.lease_id) for job in again] == [(job.id, job.lease_id) for job in first]
    assert [job.sending for job in again] == [2, 2]
    stage.do(done(first[0]))
    assert [job.id for job in stage.pull(limit=2, pull_id="p")] == [first[1].id]
    stage.do(done(first[1]))
    assert stage.pull(limit=2, pull_id="p") == []
    assert len(stage.pull(limit=2, pull_id="q")) == 1


def test_only_leases_that_were_sent_once_go_back_when_an_answer_could_not_be_written() -> None:
    stage = Stage()
    stage.submit()
    job = stage.lease()
    undelivered = Release(job.id, job.lease_id or "", undelivered=True)
    assert stage.do(undelivered).status == "pending"
    job = stage.lease(pull_id="p")
    stage.pull(pull_id="p")  # of two answers, one may have arrived
    undelivered = Release(job.id, job.lease_id or "", undelivered=True)
    assert refused(stage, undelivered) is Code.LEASE_SUPERSEDED
    assert stage.do(Release(job.id, job.lease_id or "")).status == "pending"


def test_a_late_release_that_is_repeated_gets_the_same_answer() -> None:
    stage = Stage()
    stage.submit()
    job = stage.lease()
    stage.now = job.lease_until
    stage.do(SweepJobs("lease", 0.0))
    late = Release(job.id, job.lease_id or "")
    assert stage.do(late).status == "pending"
    stage.now += 60_000
    stage.do(SweepJobs("wait", 0.0))
    assert stage.lease().attempt == 2
    assert stage.do(late).status == "pending"
    assert stage.job(job.id).status == "running"


def test_params_above_two_kilobytes_travel_in_a_row_of_their_own() -> None:
    stage = Stage()
    text = b'"' + b"x" * 5000 + b'"'
    stage.submit(params=text)
    from sheratan_hub.rules.pull import Pull

    pulled = stage.do(Pull("n1", "s", 1, capabilities=frozenset()))
    assert dict(pulled.params) == {pulled.jobs[0].id: text}
    assert len(pulled.jobs[0].row.doc) < 1000


def test_inflight_leases_are_limited_across_pulls() -> None:
    stage = Stage(max_inflight=3)
    for _ in range(5):
        stage.submit()
    assert len(stage.pull(limit=2)) == 2
    jobs = stage.pull(limit=2)
    assert len(jobs) == 1
    assert stage.pull() == []
    stage.do(done(jobs[0]))
    assert len(stage.pull(limit=9)) == 1


def test_finished_states_have_no_way_out_but_a_redrive() -> None:
    assert {happened for start, happened in TRANSITIONS if start in FINISHED} == {"redriven"}


def test_a_late_failure_charges_nothing_more_for_a_delivery_that_was_charged() -> None:
    stage = Stage()
    job_id = stage.submit(max_retries=1, timeout_ms=LEASE_MS)
    job = stage.lease()
    stage.now += LEASE_MS
    stage.do(SweepJobs("lease"))
    answer = stage.do(failed(job))
    assert (answer.status, answer.late) == ("pending", True)
    assert stage.do(failed(job)) == answer
    assert (stage.job(job_id).failures, bytes(stage.job(job_id).error)) == (1, b'{"type":"E"}')


def test_the_time_one_may_wait_in_the_line_does_not_run_while_the_job_does() -> None:
    stage = Stage(item_ttl_ms=6000)
    running, delayed, waiting = stage.submit(), stage.submit(delay_ms=8000), stage.submit(priority=3)
    job = stage.lease()
    assert job.id == running
    stage.now += 9000
    stage.do(Release(job.id, job.lease_id or ""))
    for agenda in ("wait", "expire"):
        stage.do(SweepJobs(agenda))
    assert [stage.job(id).status for id in (running, delayed, waiting)] == ["pending", "pending", "failed"]


def test_an_atomic_batch_of_any_size_can_be_repeated() -> None:
    stage = Stage(max_depth=10_000)
    commands = tuple(Submit(f"j{n}", "work", key=f"k{n}", payload_sha256="s") for n in range(400))
    stage.do(Together(commands))
    assert all(answer.dedup for answer in stage.do(Together(commands)))
