"""Retention by its rules: by age from the end, with all that belongs to a job, never while something needs it."""

from __future__ import annotations

import msgspec
import pytest

from sheratan_hub.rules.finish import Cancel, Finish
from sheratan_hub.rules.prune import MarkRead, Prune, Pruned
from sheratan_hub.rules.redrive import Redrive
from sheratan_hub.rules.submit import Submit, key_id
from sheratan_hub.storage import Key, Row
from tests.rules.stage import Stage

DAY = 86_400_000
BIG = b'"' + b"x" * 3000 + b'"'


def finished(stage: Stage, *, ok: bool = True, **fields: object) -> str:
    job_id = stage.submit(**{"max_retries": 0, **fields})
    job = stage.lease()
    stage.do(Finish(job.id, ok, job.lease_id))
    return job_id


def prune(stage: Stage, status: str = "completed", limit: int = 100) -> int:
    pruned: Pruned = stage.do(Prune(status, limit))
    return pruned.gone


@pytest.mark.parametrize(("status", "kept"), [("completed", DAY), ("cancelled", DAY), ("failed", 7 * DAY)])
def test_a_finished_job_goes_when_its_time_from_its_end_is_over(status: str, kept: int) -> None:
    stage = Stage()
    job_id = stage.submit(max_retries=0, params=BIG)
    if status == "cancelled":
        stage.now += DAY
        stage.do(Cancel(job_id))
    else:
        job = stage.lease()
        stage.now += DAY  # it counts from the end, not from the submission
        stage.do(Finish(job_id, status == "completed", job.lease_id))
    stage.now += kept - 1
    assert prune(stage, status) == 0
    stage.now += 1
    assert prune(stage, status) == 1
    assert stage.rows == {}
    assert {facet: n for facet, n in stage.counts.items() if n} == {}


@pytest.mark.parametrize("status", ["completed", "cancelled", "failed"])
def test_what_is_not_finished_never_goes(status: str) -> None:
    stage = Stage()
    waits, runs = stage.submit(), stage.submit()
    assert runs
    stage.lease()
    stage.now += 1000 * DAY
    assert prune(stage, status) == 0
    assert stage.job(waits)


def test_what_was_redriven_does_not_go() -> None:
    stage = Stage()
    job_id = finished(stage, ok=False)
    stage.now += 6 * DAY
    stage.do(Redrive(job_id))
    stage.now += DAY
    assert prune(stage, "failed") == 0
    assert stage.job(job_id).status == "pending"


def test_a_job_is_kept_as_long_as_its_key_is_remembered_and_goes_with_it() -> None:
    stage = Stage(completed_kept_ms=1000, key_ttl_ms=5000)
    job_id = finished(stage, key="k", payload_sha256="p")
    stage.now += 1000
    for _ in range(2):
        assert prune(stage) == 0
    again = stage.do(Submit("x", "work", key="k", payload_sha256="p"))
    assert (again.job.id, again.dedup) == (job_id, True)
    stage.now += 3999
    assert prune(stage) == 0
    stage.now += 1
    assert prune(stage) == 1
    assert stage.rows == {}
    assert stage.counts["key"] == 0


def test_while_it_is_kept_for_its_key_it_does_not_stand_in_the_way() -> None:
    stage = Stage(completed_kept_ms=1000, key_ttl_ms=5000)
    finished(stage, key="k", payload_sha256="p")
    finished(stage)
    stage.now += 1000
    assert [prune(stage, limit=1) for _ in range(3)] == [0, 1, 0]
    assert stage.do(Prune("completed")).looked == 0


def test_a_key_that_names_another_job_by_now_stays() -> None:
    stage = Stage(key_ttl_ms=1000)
    finished(stage, key="k", payload_sha256="p")
    stage.now += DAY
    other = stage.do(Submit("other", "work", key="k", payload_sha256="p")).job
    assert other.id == "other"
    assert prune(stage) == 1
    assert set(stage.rows) == {Key("job", "other"), Key("key", key_id("k"))}
    assert stage.counts["key"] == 1


def test_the_record_of_attempts_and_late_results_goes_with_the_job() -> None:
    stage = Stage()
    job_id = finished(stage, ok=False)
    job = stage.job(job_id).with_(late_results=1)
    for row in (job.row, Row("attempts", job_id, b"[]"), Row("late", job_id, b"[]")):
        stage.rows[row.key] = row
    stage.now += 7 * DAY
    assert prune(stage, "failed") == 1
    assert stage.rows == {}


def test_so_many_at_most_go_at_once_the_first_to_end_first() -> None:
    stage = Stage()
    ids = []
    for _ in range(5):
        ids.append(finished(stage))
        stage.now += 1
    stage.now += DAY
    assert stage.do(Prune("completed", 2)).looked == 2
    assert [key.id for key in stage.rows] == ids[2:]


def test_a_changed_age_counts_for_the_jobs_that_are_there() -> None:
    stage = Stage(completed_kept_ms=1000)
    finished(stage)
    stage.now += 2000
    stage.limits = msgspec.structs.replace(stage.limits, completed_kept_ms=3000)
    assert prune(stage) == 0
    stage.limits = msgspec.structs.replace(stage.limits, completed_kept_ms=2000)
    assert prune(stage) == 1


def test_after_the_wall_clock_was_set_back_a_job_stays_longer_by_the_error_and_no_more() -> None:
    stage = Stage(completed_kept_ms=1000)
    finished(stage)
    stage.now -= 500
    stage.now += 1499
    assert prune(stage) == 0
    stage.now += 1
    assert prune(stage) == 1


def test_a_prune_is_one_event_and_one_more_for_each_dead_letter() -> None:
    stage = Stage()
    dead = [finished(stage, ok=False), finished(stage, ok=False)]
    finished(stage)
    stage.now += 7 * DAY
    told = len(stage.events)
    prune(stage)
    prune(stage, "failed")
    prune(stage, "cancelled")
    events = stage.events[told:]
    assert [(event.event, event.job_id) for event in events] == [
        ("jobs.pruned", None),
        *(("job.pruned", job_id) for job_id in dead),
        ("jobs.pruned", None),
    ]
    assert [event.meta["count"] for event in events if event.job_id is None] == [1, 2]


def mark(stage: Stage, *ids: str) -> int:
    marked: int = stage.do(MarkRead(tuple((id, stage.job(id).finished_at) for id in ids)))
    return marked


def test_a_result_is_marked_as_read_once_and_the_mark_goes_with_its_job() -> None:
    stage = Stage()
    first, second = finished(stage), finished(stage)
    assert mark(stage, first, first) == 1
    assert mark(stage, first, second) == 1
    assert stage.counts["read"] == 2
    stage.now += DAY
    assert prune(stage) == 2
    assert (stage.rows, stage.counts["read"]) == ({}, 0)


def test_a_job_whose_time_is_over_gets_no_mark_that_would_outlive_it() -> None:
    stage = Stage()
    job_id = finished(stage)
    ended = stage.job(job_id).finished_at
    stage.now += DAY
    prune(stage)
    assert stage.do(MarkRead(((job_id, ended),))) == 0
    assert stage.rows == {}


def test_a_mark_need_not_be_synced() -> None:
    stage = Stage()
    job_id = finished(stage)
    from sheratan_hub.rules.command import Scene
    from sheratan_hub.rules.view import View

    command = MarkRead(((job_id, stage.now),))
    scene = Scene(stage.now, stage.limits)
    view = View(scene)
    view.add(*stage._load(command.wants(scene)))
    assert not command.decide(view).durable


def test_a_completed_job_is_written_with_no_more_than_before() -> None:
    stage = Stage()
    job = stage.job(finished(stage))
    assert (job.row.agenda, job.row.due_at) == ("prune.completed", job.finished_at)
    assert set(stage.rows) == {Key("job", job.id)}
