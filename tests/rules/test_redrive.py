"""Redrive and purge by their rules: another life under the same id, and no way back for an old lease."""

from __future__ import annotations

from typing import Any

import pytest

from sheratan_hub.rules.cascade import SweepCascades
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.finish import Cancel, Finish
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.missions import RedriveMember
from sheratan_hub.rules.purge import Purge
from sheratan_hub.rules.redrive import Redrive, Redriven
from sheratan_hub.rules.submit import Submit
from sheratan_hub.rules.sweep import ClampDelays, SweepJobs
from tests.rules.stage import LEASE_MS, Stage


def refused(stage: Stage, command: Any) -> Code:
    with pytest.raises(Refused) as no:
        stage.do(command)
    return no.value.code


def failed(job: Job, **fields: Any) -> Finish:
    return Finish(job.id, False, job.lease_id, error=b'{"type":"E"}', **fields)


def dead(stage: Stage, **fields: Any) -> Job:
    """A job that failed at its first attempt; the lease it had is on it."""
    stage.submit(**{"max_retries": 0, **fields})
    job = stage.lease()
    stage.do(failed(job))
    return job


def lost(stage: Stage) -> Job:
    """A job parked as POISON by one lost lease, as it was leased."""
    stage.submit()
    job = stage.lease("n1")
    stage.now += LEASE_MS
    stage.do(SweepJobs("lease"))
    return job


def test_a_redriven_job_is_pending_under_its_id_with_new_budgets() -> None:
    stage = Stage(max_losses=1)
    job_id = lost(stage).id
    assert stage.job(job_id).reason == "POISON"
    assert stage.do(Redrive(job_id)) == Redriven(job_id, "pending", 1)
    job = stage.job(job_id)
    assert (job.failures, job.losses, job.lost_on, job.finished_at, job.reason) == (0, 0, (), 0, None)
    assert {facet: n for facet, n in stage.counts.items() if n} == {"job:pending": 1, "claimable:2": 1}


def test_its_attempts_count_on_and_those_before_are_uncounted() -> None:
    stage = Stage()
    job = dead(stage)
    stage.do(Redrive(job.id))
    again = stage.lease()
    assert (again.id, again.attempt, again.uncounted, again.redrives) == (job.id, 2, 1, 1)


def test_it_has_all_its_retries_again() -> None:
    stage = Stage(backoff_base_ms=0, backoff_cap_ms=0)
    job_id = stage.submit(max_retries=1)
    for life in range(3):
        stage.do(failed(stage.lease()))
        assert stage.job(job_id).status == "pending"
        stage.do(failed(stage.lease()))
        assert (stage.job(job_id).reason, stage.job(job_id).redrives) == ("RETRIES_EXHAUSTED", life)
        stage.do(Redrive(job_id))


def test_a_result_of_the_old_life_is_superseded() -> None:
    stage = Stage(max_losses=1)
    old = lost(stage)
    stage.do(Redrive(old.id))
    late = Finish(old.id, True, old.lease_id)
    assert refused(stage, late) == Code.LEASE_SUPERSEDED
    new = stage.lease("n2")
    assert refused(stage, late) == Code.LEASE_SUPERSEDED
    assert stage.do(Finish(new.id, True, new.lease_id)).status == "completed"


def test_without_a_lease_id_nobody_ends_what_nobody_holds() -> None:
    stage = Stage(max_losses=1)
    old = lost(stage)
    stage.do(Redrive(old.id))
    assert refused(stage, Finish(old.id, True, node_id="n1")) == Code.NOT_LEASED


def test_a_repeated_result_of_the_old_life_gets_its_old_answer() -> None:
    stage = Stage()
    old = dead(stage)
    stage.do(Redrive(old.id))
    assert stage.do(failed(old)).status == "failed"
    assert refused(stage, Finish(old.id, True, old.lease_id)) == Code.RESULT_CONFLICT
    assert stage.job(old.id).status == "pending"


def test_it_stands_behind_those_that_wait() -> None:
    stage = Stage()
    job = dead(stage)
    waiting = [stage.submit(), stage.submit()]
    stage.now += 1
    stage.do(Redrive(job.id))
    assert [one.id for one in stage.pull(limit=3)] == [*waiting, job.id]


def test_redriving_twice_changes_nothing_the_second_time() -> None:
    stage = Stage()
    job = dead(stage)
    stage.do(Redrive(job.id))
    before, told = dict(stage.rows), len(stage.events)
    assert stage.do(Redrive(job.id)) == Redriven(job.id, "pending", 1, changed=False)
    stage.lease()
    assert stage.do(Redrive(job.id)) == Redriven(job.id, "running", 1, changed=False)
    assert len(stage.events) == told + 1
    assert before.keys() == stage.rows.keys()


def test_a_completed_job_and_none_at_all_are_refused() -> None:
    stage = Stage()
    stage.submit()
    job = stage.lease()
    stage.do(Finish(job.id, True, job.lease_id))
    assert refused(stage, Redrive(job.id)) == Code.NOT_FAILED
    assert refused(stage, Redrive("none")) == Code.JOB_NOT_FOUND


def test_a_cancelled_job_runs_again() -> None:
    stage = Stage()
    job_id = stage.submit()
    stage.do(Cancel(job_id))
    stage.do(Redrive(job_id))
    assert stage.lease().id == job_id


def test_a_job_that_was_cancelled_while_it_ran_is_not_to_stop_in_its_new_life() -> None:
    stage = Stage()
    job_id = stage.submit()
    job = stage.lease()
    stage.do(Cancel(job_id))
    stage.do(failed(job))
    stage.do(Redrive(job_id))
    assert (stage.job(job_id).cancel_at, stage.lease().cancel_at) == (0, 0)


def test_the_depth_limit_does_not_refuse_it_but_it_counts() -> None:
    stage = Stage(max_depth=1)
    job = dead(stage)
    stage.submit()
    stage.do(Redrive(job.id))
    assert stage.counts["job:pending"] == 2
    assert refused(stage, Submit("more", "work")) == Code.QUEUE_FULL


def test_at_most_once_does_not_refuse_it() -> None:
    stage = Stage()
    job = dead(stage, at_most_once=True)
    stage.do(Redrive(job.id))
    assert stage.lease().id == job.id


def test_its_key_stays_attached_even_when_the_time_of_the_key_was_over() -> None:
    stage = Stage(key_ttl_ms=1000)
    job = dead(stage, key="k", payload_sha256="p")
    stage.now += 5000
    stage.do(Redrive(job.id))
    found = stage.do(Submit("other", "work", key="k", payload_sha256="p"))
    assert (found.job.id, found.dedup) == (job.id, True)


def test_what_expired_has_its_whole_time_again_each_time() -> None:
    stage = Stage()
    job_id = stage.submit(expires_in_ms=5000)
    for _ in range(3):
        stage.now += 50_000
        stage.do(SweepJobs("expire"))
        assert stage.job(job_id).reason == "EXPIRED"
        stage.do(Redrive(job_id))
        stage.now += 4999
        stage.do(SweepJobs("expire"))
        assert stage.job(job_id).status == "pending"
        stage.now += 1
        stage.do(SweepJobs("expire"))
        assert stage.job(job_id).reason == "EXPIRED"


def test_the_patience_of_the_line_begins_anew() -> None:
    stage = Stage(item_ttl_ms=5000)
    job_id = stage.submit()
    stage.now += 5000
    stage.do(SweepJobs("expire"))
    stage.do(Redrive(job_id))
    assert stage.job(job_id).ends_unclaimed_at == stage.now + 5000


def test_a_redrive_with_a_delay_waits_and_its_time_to_expire_counts_from_there() -> None:
    stage = Stage()
    job_id = stage.submit(expires_in_ms=5000)
    stage.now += 5000
    stage.do(SweepJobs("expire"))
    assert stage.do(Redrive(job_id, 7000)).not_before == stage.now + 7000
    assert stage.pull() == []
    assert stage.job(job_id).ends_unclaimed_at == stage.now + 12_000
    stage.now += 7000
    stage.do(SweepJobs("wait"))
    assert stage.lease().id == job_id


def test_the_ledger_tells_why_it_had_failed() -> None:
    stage = Stage()
    stage.do(Redrive(dead(stage).id, actor="operator"))
    event = stage.events[-1]
    assert (event.event, event.actor) == ("job.redriven", "operator")
    assert event.meta == {"reason": "RETRIES_EXHAUSTED", "was": "failed", "redrives": 1}


def test_a_plain_job_is_written_without_what_redrives_need() -> None:
    stage = Stage()
    job_id = stage.submit()
    assert not [name for name in (b"redrive", b"uncounted") if name in stage.job(job_id).row.doc]


def test_a_purge_cancels_what_waits_and_leaves_the_rest_alone() -> None:
    stage = Stage()
    taken = stage.submit()
    stage.lease()
    waits = stage.submit()
    assert stage.do(Purge(waits)).status == "cancelled"
    assert stage.do(Purge(taken)).status == "running"
    assert (stage.job(waits).status, stage.job(waits).reason) == ("cancelled", "PURGED")
    assert stage.job(taken).cancel_at == 0
    assert stage.do(Purge(waits)).status == "cancelled"
    assert [event.event for event in stage.events].count("job.cancelled") == 1
    assert refused(stage, Purge("none")) == Code.JOB_NOT_FOUND


def test_a_redrive_with_a_delay_waits_for_it_whatever_an_older_delay_was() -> None:
    stage = Stage()
    stage.submit(max_retries=1)
    stage.do(failed(stage.lease(), retry_after_ms=1000))
    stage.now += 1000
    stage.do(SweepJobs("wait"))
    job = stage.lease()
    stage.do(failed(job))
    stage.do(Redrive(job.id, delay_ms=60_000))
    stage.do(ClampDelays((job.id,)))
    assert stage.job(job.id).not_before == stage.now + 60_000


def test_what_comes_back_with_its_mission_or_its_parent_tells_what_it_was() -> None:
    stage = Stage()
    parent, member = stage.submit(mission_id="m"), stage.submit(mission_id="m")
    child = stage.submit(depends_on=(parent,))
    for job_id in (parent, member):
        stage.do(Cancel(job_id))
    stage.do(SweepCascades())
    stage.do(RedriveMember(member))
    stage.do(Redrive(parent, dependents=True))
    stage.do(SweepCascades())
    told = [(event.job_id, event.meta) for event in stage.events if event.event == "job.redriven"]
    reasons = {member: "CANCELLED", parent: "CANCELLED", child: "DEPENDENCY_FAILED"}
    assert told == [(id, {"reason": reasons[id], "was": "cancelled", "redrives": 1}) for id in (member, parent, child)]
