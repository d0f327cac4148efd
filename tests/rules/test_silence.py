"""What silence, a new boot and a drain do to nodes and their leases; and the brake on mass silence."""

from __future__ import annotations

from typing import Any

import pytest

from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.drain import Drain, Resume
from sheratan_hub.rules.finish import Extend, Finish, Release
from sheratan_hub.rules.jobs import Job, job_of
from sheratan_hub.rules.nodes import Beat, Node, Swept, interval_ms, node_of
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.silence import FLEET, EndSilence, LookAgain, Settle, SweepNodes, fleet_of
from sheratan_hub.rules.sweep import ReapNode
from sheratan_hub.storage import Key
from tests.rules.stage import Stage

TTL, DEAD = 120_000, 600_000
LONG = 100 * DEAD


def stage(**limits: Any) -> Stage:
    return Stage(**{"lease_ms": LONG, "max_inflight": 1000, "max_depth": 1000, **limits})


def node(stage: Stage, node_id: str = "n1") -> Node:
    return node_of(stage.rows[Key("node", node_id)])


def sweep(stage: Stage, ms: int = 0, **options: Any) -> Swept:
    """One look after `ms`, and what the engine does about it."""
    stage.now += ms
    swept: Swept = stage.do(SweepNodes(**options))
    for end in swept.owed:
        held = [row for row in stage.rows.values() if row.kind == "job" and row.labels[0] == "running"]
        jobs = [job for job in map(job_of, held) if job.node_id == end.node_id]
        if end.owed == "drain":
            for job in jobs:
                stage.do(Release(job.id, job.lease_id or "", cause="drain_deadline"))
        else:
            stage.do(ReapNode(end, tuple(job.id for job in jobs)))
        stage.do(Settle(end))
    return swept


def held(stage: Stage, node_id: str = "n1") -> Job:
    """A job that the node has leased."""
    stage.do(Beat(node_id, boot_id="b1"))
    stage.submit(timeout_ms=LONG)
    return stage.lease(node_id)


def names(stage: Stage, start: str) -> list[str]:
    return [event.event for event in stage.events if event.event.startswith(start)]


# a new boot


def test_a_new_boot_ends_the_leases_of_the_old_one_as_losses() -> None:
    s = stage()
    job = held(s)
    s.now += 1
    s.do(Beat("n1", boot_id="b2"))
    assert sweep(s).owed[0].owed == "boot"
    assert (s.job(job.id).status, s.job(job.id).losses) == ("pending", 1)
    assert s.events[-1].meta["cause"] == "node_restarted"
    assert names(s, "node.") == ["node.online", "node.restarted"]


def test_what_the_new_boot_has_leased_stays() -> None:
    s = stage()
    old = held(s)
    s.now += 1
    s.do(Beat("n1", boot_id="b2"))
    new = held_by_new_boot(s)
    sweep(s)
    assert (s.job(old.id).status, s.job(new.id).status) == ("pending", "running")
    assert sweep(s, 1).owed == (), "once"


def held_by_new_boot(s: Stage) -> Job:
    s.submit(timeout_ms=LONG)
    return s.lease("n1")


def test_the_same_boot_an_unnamed_one_and_the_first_one_end_nothing() -> None:
    s = stage()
    job = held(s)
    for boot_id in ("b1", None):
        s.now += 1
        s.do(Beat("n1", boot_id=boot_id))
        assert sweep(s).owed == ()
    s.do(Beat("n2"))
    s.do(Beat("n2", boot_id="b1"))
    assert sweep(s).owed == ()
    assert s.job(job.id).status == "running"


def test_a_boot_that_was_followed_by_another_is_not_settled_by_its_end() -> None:
    s = stage()
    held(s)
    s.now += 1
    s.do(Beat("n1", boot_id="b2"))
    (first,) = s.do(SweepNodes()).owed
    s.now += 1
    s.do(Beat("n1", boot_id="b3"))
    s.do(Settle(first))
    assert s.do(ReapNode(first, ())) == 0
    assert node(s).owed == ("boot",)
    assert [end.booted_at for end in sweep(s).owed] == [s.now]


# drain


def test_a_draining_node_gets_nothing_until_it_is_resumed() -> None:
    s = stage()
    job = held(s)
    s.submit()
    s.do(Drain("n1"))
    assert s.do(Pull("n1", "s")).reason == "node_draining"
    assert s.do(Beat("n1")).node.draining
    assert s.do(Extend(job.id, job.lease_id or "")).lease_ms > 0
    s.do(Finish(job.id, True, job.lease_id))
    s.do(Resume("n1"))
    assert s.do(Pull("n1", "s")).jobs
    assert names(s, "node.") == ["node.online", "node.drain", "node.resume"]


def test_at_the_deadline_of_a_drain_leases_go_back_at_no_cost() -> None:
    s = stage()
    job = held(s)
    s.do(Drain("n1", 5000))
    assert sweep(s, 4999).owed == ()
    assert s.job(job.id).status == "running"
    sweep(s, 1)
    after = s.job(job.id)
    assert (after.status, after.losses, after.failures, after.waiting) == ("pending", 0, 0, False)
    assert s.events[-1].meta["cause"] == "drain_deadline"
    assert (node(s).draining, node(s).drain_until, node(s).owed) == (True, 0, ())
    assert s.do(Pull("n1", "s")).reason == "node_draining", "until it is resumed"


def test_the_deadline_of_a_drain_counts_for_a_node_that_was_silent_for_a_while() -> None:
    s = stage()
    job = held(s)
    s.do(Drain("n1", TTL + 60_000))
    sweep(s, TTL + 1)
    assert s.do(Beat("n1")).node.draining
    sweep(s, 60_000)
    assert s.job(job.id).status == "pending"


def test_a_drain_without_a_deadline_takes_nothing_away() -> None:
    s = stage()
    job = held(s)
    s.do(Drain("n1"))
    for _ in range(10):
        s.do(Beat("n1"))
        sweep(s, TTL)
    assert s.job(job.id).status == "running"


def test_a_resume_before_the_deadline_keeps_the_leases_and_a_second_drain_moves_it() -> None:
    s = stage()
    job = held(s)
    s.do(Drain("n1", 5000))
    s.do(Drain("n1", 9000))
    sweep(s, 5000)
    assert s.job(job.id).status == "running"
    s.do(Resume("n1"))
    sweep(s, 50_000)
    assert s.job(job.id).status == "running"
    s.do(Resume("n1"))
    assert names(s, "node.resume") == ["node.resume"], "once"


def test_a_drain_outlives_a_new_boot_and_death() -> None:
    s = stage()
    held(s)
    s.do(Drain("n1"))
    sweep(s, DEAD + 1)
    s.do(Beat("n1", boot_id="b2"))
    sweep(s)
    assert s.do(Pull("n1", "s")).reason == "node_draining"


def test_only_a_known_node_can_be_drained_and_resumed() -> None:
    for command in (Drain("nobody"), Resume("nobody")):
        with pytest.raises(Refused) as no:
            stage().do(command)
        assert no.value.code is Code.NODE_NOT_FOUND


# when to come again


@pytest.mark.parametrize(
    ("online", "ms"), [(0, 10_000), (1, 10_000), (10_000, 10_000), (20_000, 20_000), (36_000, 36_000), (10**6, 36_000)]
)
def test_a_larger_fleet_is_asked_to_come_less_often_but_never_too_late(online: int, ms: float) -> None:
    assert interval_ms(online, Stage().limits) == ms


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999])
def test_the_interval_is_jittered_by_a_tenth_and_stays_below_a_third_of_the_ttl(jitter: float) -> None:
    s = stage(max_heartbeats=1)
    for n in range(100):
        last = s.do(Beat(f"n{n}", jitter=jitter)).next_in_ms
    assert last == pytest.approx(36_000 * (0.9 + 0.2 * jitter))
    assert last < TTL / 3


# the clock of a node


def test_the_skew_of_a_nodes_clock_is_measured_and_changes_nothing() -> None:
    s = stage()
    ahead = s.do(Beat("n1", sent_ms=s.now + 90_000_000)).node
    assert (ahead.skew_ms, ahead.last_seen) == (90_000_000, s.now)
    assert s.do(Beat("n1")).node.skew_ms == 90_000_000
    assert s.do(Beat("n1", sent_ms=s.now - 5)).node.skew_ms == -5


# mass silence


def fleet(size: int, **limits: Any) -> tuple[Stage, list[Job]]:
    s = stage(**limits)
    return s, [held(s, f"n{n:03}") for n in range(size)]


def live(s: Stage, first: int, last: int, ms: int, step: int = 60_000) -> None:
    """Let `ms` pass in which only these nodes are heard of."""
    for _ in range(ms // step):
        s.now += step
        for n in range(first, last):
            s.do(Beat(f"n{n:03}"))
        sweep(s)


def statuses(s: Stage, jobs: list[Job]) -> list[str]:
    return [s.job(job.id).status for job in jobs]


def test_when_more_than_55_percent_fall_silent_nobodys_leases_end_by_death() -> None:
    s, jobs = fleet(10)
    live(s, 6, 10, DEAD + 2 * 60_000)
    assert s.counts["node:DEAD"] == 6, "the states tell the truth"
    assert statuses(s, jobs) == ["running"] * 10
    (alarm,) = [event for event in s.events if event.event == "fleet.silent"]
    assert (alarm.meta["silent"], alarm.meta["known"]) == (6, 10)


def test_up_to_55_percent_are_reaped_when_they_are_dead() -> None:
    s, jobs = fleet(20)
    live(s, 11, 20, DEAD + 60_000)
    assert statuses(s, jobs) == ["pending"] * 11 + ["running"] * 9
    assert names(s, "fleet") == []


def test_a_fleet_of_four_has_no_brake() -> None:
    s, jobs = fleet(4)
    live(s, 4, 4, DEAD + 60_000)
    assert statuses(s, jobs) == ["pending"] * 4
    assert names(s, "fleet") == []


def test_the_brake_holds_for_one_dead_limit_and_then_lets_go() -> None:
    s, jobs = fleet(5)
    live(s, 5, 5, TTL + DEAD)
    assert statuses(s, jobs) == ["running"] * 5
    live(s, 5, 5, 2 * 60_000)
    assert statuses(s, jobs) == ["pending"] * 5
    live(s, 5, 5, 2 * DEAD)
    assert names(s, "fleet") == ["fleet.silent"], "once"


def test_who_comes_back_under_the_brake_keeps_its_leases() -> None:
    s, jobs = fleet(10)
    live(s, 10, 10, DEAD + 60_000)
    live(s, 3, 10, 2 * DEAD)
    assert statuses(s, jobs) == ["pending"] * 3 + ["running"] * 7
    assert s.counts["node:ONLINE"] == 7


def test_an_operator_ends_the_brake() -> None:
    s, jobs = fleet(5)
    assert s.do(EndSilence()) is False
    live(s, 5, 5, DEAD + 60_000)
    assert statuses(s, jobs) == ["running"] * 5
    assert s.do(EndSilence()) is True
    s.do(LookAgain(tuple(f"n{n:03}" for n in range(5))))
    sweep(s)
    assert statuses(s, jobs) == ["pending"] * 5
    assert s.do(EndSilence()) is False


def test_those_who_fall_silent_one_after_the_other_over_more_than_a_ttl_are_no_mass() -> None:
    s, jobs = fleet(10)
    for n in range(10):
        live(s, n, 10, TTL)
    live(s, 10, 10, DEAD + 60_000)
    assert names(s, "fleet") == []
    assert statuses(s, jobs) == ["pending"] * 10


def test_one_node_that_comes_and_goes_is_no_mass() -> None:
    s, _ = fleet(6, node_ttl_ms=16_000)
    for _ in range(20):
        live(s, 0, 6, 1000, 1000)
        live(s, 1, 6, 17_000, 1000)
        assert node(s, "n000").state == "STALE"
    assert names(s, "fleet") == []


def test_nodes_that_come_a_little_too_late_one_after_the_other_are_no_mass() -> None:
    s, _ = fleet(10, node_ttl_ms=20_000)
    for second in range(200):
        s.now += 1000
        sweep(s)
        if second % 22 % 2 == 0 and second % 22 < 20:
            s.do(Beat(f"n{second % 22 // 2:03}"))
    assert len(names(s, "node.stale")) > 50
    assert names(s, "fleet") == []


def test_a_sweep_that_cannot_see_all_at_once_still_brakes_before_it_reaps() -> None:
    s, jobs = fleet(20, node_ttl_ms=DEAD)
    s.now += 2 * DEAD
    while sweep(s, limit=3).changed:
        pass
    assert s.counts["node:DEAD"] == 20
    assert statuses(s, jobs) == ["running"] * 20
    assert names(s, "fleet") == ["fleet.silent"]


def test_leases_still_end_by_their_own_time_under_the_brake() -> None:
    from sheratan_hub.rules.sweep import SweepJobs

    s, jobs = fleet(5, lease_ms=DEAD + 2 * 60_000)
    live(s, 5, 5, DEAD + 60_000)
    s.now += 60_000
    s.do(SweepJobs("lease"))
    assert statuses(s, jobs) == ["pending"] * 5


def test_what_is_known_of_the_fleets_silence_stays_small() -> None:
    s, _ = fleet(6)
    for _ in range(30):
        live(s, 1, 6, TTL + 6000, 6000)
        s.do(Beat("n000"))
    assert len(fleet_of(s.rows[FLEET]).slices) <= 18


def test_a_sweep_asks_for_the_next_one_only_for_nodes_whose_time_will_truly_come() -> None:
    s = stage()
    s.do(Beat("n1"))
    s.now += TTL - 500
    s.do(Beat("n1"))
    assert sweep(s).next_at is None, "it was heard of"
    s.do(Beat("n2"))
    assert sweep(s, TTL - 400).next_at == s.now + 401
    assert sweep(s, 390).next_at == s.now + 50, "in steps"
