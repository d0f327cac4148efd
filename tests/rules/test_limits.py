"""Rate limits of sources: submits a minute, and jobs running at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheratan_hub.rules.command import Code, Rate, Refused, Together
from sheratan_hub.rules.limits import DropRate, SetRate, Taken, pay
from sheratan_hub.rules.submit import Submit
from tests.rules.stage import Stage

RATES = {"s": Rate(3, 2)}


def refused(stage: Stage, **fields: object) -> Refused:
    with pytest.raises(Refused) as no:
        stage.submit(**{"source": "s", **fields})
    return no.value


def test_a_source_submits_so_many_a_minute_and_is_told_when_the_next_is_welcome() -> None:
    stage = Stage(rates=RATES)
    for _ in range(3):
        stage.submit(source="s")
    no = refused(stage)
    assert (no.code, no.retry_after_ms) == (Code.RATE_LIMITED, 20_000)
    stage.submit(source="another")
    stage.submit()
    stage.now += 20_000
    stage.submit(source="s")
    assert refused(stage).retry_after_ms == 20_000


def test_a_refused_submit_stores_nothing_and_burns_no_key() -> None:
    stage = Stage(rates={"s": Rate(1, 0)})
    known = stage.submit(source="s", key="old", payload_sha256="h")
    rows, events = dict(stage.rows), list(stage.events)
    refused(stage, key="new", payload_sha256="h")
    assert (stage.rows, stage.events) == (rows, events)
    assert stage.submit(source="s", key="old", payload_sha256="h") == known


def test_an_atomic_batch_that_has_one_too_many_takes_nothing_from_the_bucket() -> None:
    stage = Stage(rates=RATES)
    with pytest.raises(Refused) as no:
        stage.do(Together(tuple(Submit(f"j{n}", "k", source="s") for n in range(4))))
    assert no.value.code is Code.RATE_LIMITED
    stage.do(Together(tuple(Submit(f"j{n}", "k", source="s") for n in range(3))))


@given(st.integers(1, 1000), st.lists(st.integers(0, 5000), max_size=200))
def test_never_more_than_the_bucket_and_what_flows_into_it_gets_through(per_minute: int, waits: list[int]) -> None:
    taken, now, passed = Taken(0), 1_000_000, 0
    for wait in waits:
        now += wait
        after, quota = pay(taken, Rate(per_minute, 0), now)
        assert 0 <= quota.left < per_minute
        if after is None:
            assert pay(taken, Rate(per_minute, 0), now + quota.next_in_ms)[0] is not None
            assert pay(taken, Rate(per_minute, 0), now + quota.next_in_ms - 1)[0] is None
            continue
        taken, passed = after, passed + 1
    assert passed <= per_minute + (now - 1_000_000) * per_minute / 60_000 + 1


def test_so_many_jobs_of_a_source_run_at_once_and_others_go_on() -> None:
    stage = Stage(rates={"s": Rate(0, 2)})
    own = [stage.submit(source="s") for _ in range(3)]
    other = stage.submit(source="t", priority=3)
    jobs = stage.pull(limit=9)
    assert [job.id for job in jobs] == [*own[:2], other]
    assert stage.reason() == "throttled"
    stage.finish(jobs[0])
    assert stage.lease().id == own[2]


def test_a_limit_set_at_run_time_wins_and_when_dropped_the_configured_one_counts() -> None:
    stage = Stage(rates={"s": Rate(0, 1)})
    for _ in range(6):
        stage.submit(source="s")
    stage.do(SetRate("s", Rate(0, 3)))
    jobs = stage.pull(limit=9)
    assert len(jobs) == 3
    stage.do(DropRate("s"))
    for job in jobs[:2]:
        stage.finish(job)
    assert stage.reason() == "throttled"
    stage.finish(jobs[2])
    stage.lease()
    with pytest.raises(Refused, match="run time"):
        stage.do(DropRate("s"))


def test_nought_is_without_that_limit() -> None:
    stage = Stage(rates={"s": Rate(0, 0)}, max_inflight=1000)
    for _ in range(50):
        stage.submit(source="s")
    assert len(stage.pull(limit=50)) == 50
