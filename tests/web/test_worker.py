"""The worker against a scripted hub, on a clock that the test moves. Real processes: tests/e2e/test_worker.py.

Longer than 300 lines because one scripted hub serves all of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, cast

import orjson
import pytest

from sheratan_hub.answers import Accepted, Beat, Extended, Lease, Pulled, Refusal, Report
from sheratan_hub.canonical import Raw
from sheratan_hub.client import HubClient, HubRefused, HubUnreachable
from sheratan_hub.clock import SystemClock, VirtualClock, settle
from sheratan_hub.handlers import Attempt, Handler
from sheratan_hub.rules.pull import REASONS
from sheratan_hub.worker import Fail, Options, Worker
from tests.conftest import TOKEN, MakeSite, Site

FORBIDDEN = HubRefused(403, "invalid_token", "the token is not valid")
GONE = HubUnreachable("no answer")


class ScriptedHub:
    """Gives out the leases in `waiting`, keeps every call, and raises `trouble` where there is one."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.waiting: list[Lease] = []
        self.lost: list[Lease] = []
        self.empty = Pulled(reason="no_job")
        self.answer_beat = Beat(node_id="n", heartbeat_after_seconds=20)
        self.answer_extend = Extended()
        self.refuse: dict[str, Refusal] = {}
        self.trouble: dict[str, Exception] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.came = asyncio.Event()
        self.calls: list[tuple[str, Any]] = []
        self.carried: list[dict[str, Any]] = []
        self.pulls_out = 0
        self.at_once = False

    def of(self, name: str) -> list[Any]:
        return [what for called, what in self.calls if called == name]

    def _called(self, name: str, what: Any) -> None:
        self.calls.append((name, what))
        if name in self.trouble:
            raise self.trouble[name]

    def give(self, *leases: Lease) -> None:
        self.waiting += leases
        self.came.set()

    async def pull(self, node_id: str, *, max: int = 1, wait_seconds: float = 0, **more: Any) -> Pulled:
        self._called("pull", {"max": max, "wait_seconds": wait_seconds, **more})
        return await self._pull(max, wait_seconds, **more)

    async def _pull(self, max: int, wait_seconds: float, **more: Any) -> Pulled:
        assert self.pulls_out == 0, "two pulls at a time could get more than there is room for"
        self.pulls_out += 1
        try:
            return await self._find(max, wait_seconds, **more)
        finally:
            self.pulls_out -= 1

    async def _find(self, max: int, wait_seconds: float, **more: Any) -> Pulled:
        if not (self.waiting or self.lost) and wait_seconds and not self.at_once:
            self.came.clear()
            await self.clock.wait(self.came.wait(), wait_seconds * 1000)
        fit = [lease for lease in self.waiting if lease.kind in more["kinds"]][:max] + self.lost
        self.waiting = [lease for lease in self.waiting if lease not in fit]
        self.lost = []
        return Pulled(jobs=fit) if fit else self.empty

    async def heartbeat(self, node_id: str, **what: Any) -> Beat:
        self._called("heartbeat", what)
        return self.answer_beat

    async def extend(self, job_id: str, lease_id: str, seconds: float | None = None) -> Extended:
        self._called("extend", (job_id, seconds))
        return self.answer_extend

    async def release(self, job_id: str, lease_id: str) -> None:
        self._called("release", (job_id, lease_id))

    async def results(self, reports: list[Report]) -> list[Accepted | Refusal]:
        self._called("results", reports)
        return await self._results(reports)

    async def results_and_pull(
        self, reports: list[Report], node_id: str, *, max: int = 1, **more: Any
    ) -> tuple[list[Accepted | Refusal], Pulled]:
        self.carried.append({"max": max, **more})
        self._called("results", reports)
        outcomes = await self._results(reports)
        return outcomes, await self._pull(max, 0, **more)

    async def _results(self, reports: list[Report]) -> list[Accepted | Refusal]:
        await self.gate.wait()
        return [self.refuse.pop(one.job_id, None) or Accepted(job_id=one.job_id) for one in reports]

    def reported(self) -> dict[str, Report]:
        return {report.job_id: report for batch in self.of("results") for report in batch}


class Gated:
    """A handler that each job leaves through a gate of its own."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.cancelled: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    async def __call__(self, params: dict[str, str], attempt: Attempt) -> str:
        self.started.append(attempt.job_id)
        gate = self.gates.setdefault(attempt.job_id, asyncio.Event())
        try:
            await gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(attempt.job_id)
            raise
        return f"{attempt.job_id} done"

    def open(self, *job_ids: str) -> None:
        for job_id in job_ids:
            self.gates.setdefault(job_id, asyncio.Event()).set()


class Shift:
    """A running worker, its hub, its handler, and what it said."""

    def __init__(self, clock: VirtualClock, **options: Any) -> None:
        self.clock, self.hub, self.gated = clock, ScriptedHub(clock), Gated()
        self.said: list[str] = []
        handlers = {"gated": Handler("gated", self.gated, True, True), "final": Handler("final", final, True, False)}
        chosen = Options(module="none", node_id="n", **{"concurrency": 3, "grace_seconds": 10, **options})
        self.worker = Worker(cast("HubClient", self.hub), handlers, chosen, clock, self.said.append)
        self.task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        self.task = asyncio.create_task(self.worker.run())
        await self.clock.advance(0)

    @property
    def over(self) -> bool:
        return self.task is not None and self.task.done()


def lease(job_id: str, **fields: Any) -> Lease:
    given = {"kind": "gated", "lease_id": f"lease-{job_id}", "lease_seconds": 30, "timeout_seconds": 300, **fields}
    return Lease(job_id=job_id, params_json=Raw(b"{}"), **given)


async def final(params: dict[str, str]) -> None:
    raise Fail("never again", retry=False)


MakeShift = Callable[..., Shift]


@pytest.fixture
async def make_shift(clock: VirtualClock) -> AsyncIterator[MakeShift]:
    shifts: list[Shift] = []

    def make(**options: Any) -> Shift:
        shifts.append(Shift(clock, **options))
        return shifts[-1]

    yield make
    for shift in shifts:
        if shift.task is not None and not shift.task.done():
            shift.task.cancel()
        if shift.task is not None:
            with suppress(asyncio.CancelledError):
                await shift.task


async def test_it_never_holds_more_leases_than_it_can_run(clock: VirtualClock, make_shift: MakeShift) -> None:
    shift = make_shift(concurrency=3)
    shift.hub.give(*(lease(f"j{n}") for n in range(8)))
    await shift.begin()
    assert shift.gated.started == ["j0", "j1", "j2"]
    assert [pull["max"] for pull in shift.hub.of("pull")] == [3]
    shift.gated.open("j0", "j2")
    await clock.advance(0)
    assert shift.gated.started == ["j0", "j1", "j2", "j3", "j4"]
    assert sum(pull["max"] for pull in shift.hub.carried) == 2
    shift.gated.open(*(f"j{n}" for n in range(8)))
    await clock.advance(0)
    assert sorted(shift.hub.reported()) == [f"j{n}" for n in range(8)]


async def test_it_pulls_by_long_poll_and_only_what_it_has_handlers_for(make_shift: MakeShift) -> None:
    shift = make_shift(capabilities=("gpu", "eu"), wait_seconds=20)
    await shift.begin()
    (pull,) = shift.hub.of("pull")
    assert pull["kinds"] == ["final", "gated"]
    assert pull["capabilities"] == ("gpu", "eu")
    assert pull["wait_seconds"] == 20


async def test_it_checks_in_before_it_pulls_and_then_when_the_hub_says(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift(zone="z", concurrency=2)
    await shift.begin()
    assert [name for name, _ in shift.hub.calls[:2]] == ["heartbeat", "pull"]
    shift.hub.give(lease("j"))
    await clock.advance(19_999)
    assert len(shift.hub.of("heartbeat")) == 1
    await clock.advance(1)
    first, second = shift.hub.of("heartbeat")
    assert (first["status"], first["max_concurrent"], first["zone"]) == ("online", 2, "z")
    assert (first["current_jobs"], second["current_jobs"]) == (0, 1)
    assert len(first["boot_id"]) == 32
    assert first["boot_id"] == second["boot_id"]


async def test_a_lease_is_renewed_at_each_third_of_its_time_until_the_work_is_done(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift()
    shift.hub.give(lease("j", lease_seconds=30))
    await shift.begin()
    await clock.advance(9_999)
    assert shift.hub.of("extend") == []
    await clock.advance(10_001)
    assert shift.hub.of("extend") == [("j", None), ("j", None)]
    shift.gated.open("j")
    await clock.advance(60_000)
    assert len(shift.hub.of("extend")) == 2


async def test_a_lease_with_little_left_is_renewed_soon_and_then_by_the_time_the_hub_gives(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift()
    shift.hub.give(lease("j", lease_seconds=0))
    shift.hub.answer_extend = Extended(lease_seconds=60)
    await shift.begin()
    await clock.advance(100)
    assert len(shift.hub.of("extend")) == 1
    await clock.advance(19_999)
    assert len(shift.hub.of("extend")) == 1
    await clock.advance(1)
    assert len(shift.hub.of("extend")) == 2


async def test_a_renewal_that_did_not_reach_the_hub_is_tried_again_before_the_next_third(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift()
    shift.hub.give(lease("j", lease_seconds=30))
    shift.hub.trouble["extend"] = GONE
    await shift.begin()
    await clock.advance(12_500)
    assert len(shift.hub.of("extend")) == 2
    assert shift.gated.cancelled == []


async def test_work_whose_lease_is_gone_is_stopped_and_not_reported(clock: VirtualClock, make_shift: MakeShift) -> None:
    shift = make_shift()
    shift.hub.give(lease("j"))
    shift.hub.trouble["extend"] = HubRefused(409, "lease_superseded", "")
    await shift.begin()
    await clock.advance(10_000)
    assert shift.gated.cancelled == ["j"]
    assert shift.hub.reported() == {}
    assert shift.hub.of("release") == []
    assert any("j is no longer this node's" in line for line in shift.said)


@pytest.mark.parametrize("told_by", ["extend", "heartbeat"])
async def test_a_cancelled_job_is_stopped_and_reported_without_retry(
    clock: VirtualClock, make_shift: MakeShift, told_by: str
) -> None:
    shift = make_shift()
    shift.hub.give(lease("j"), lease("other"))
    await shift.begin()
    if told_by == "extend":
        shift.gated.open("other")
        shift.hub.answer_extend = Extended(cancel_requested=True)
    else:
        shift.hub.answer_beat = Beat(node_id="n", cancel=["j"])
    await clock.advance(20_000)
    report = shift.hub.reported()["j"]
    assert (report.ok, report.retry, orjson.loads(bytes(report.error))["type"]) == (False, False, "Cancelled")
    assert shift.gated.cancelled == ["j"]


async def test_an_attempt_that_uses_up_its_time_is_stopped_and_reported(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift()
    shift.hub.give(lease("j", timeout_seconds=5))
    await shift.begin()
    await clock.advance(4_999)
    assert shift.gated.cancelled == []
    await clock.advance(1)
    report = shift.hub.reported()["j"]
    assert shift.gated.cancelled == ["j"]
    assert (report.ok, report.retry, orjson.loads(bytes(report.error))["type"]) == (False, None, "Timeout")
    assert any("failed: Timeout: " in line for line in shift.said)


async def test_what_finishes_while_a_batch_is_in_flight_is_the_next_batch(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift(concurrency=4)
    shift.hub.give(*(lease(name) for name in "abcd"))
    await shift.begin()
    shift.hub.gate.clear()
    for name in "abc":
        shift.gated.open(name)
        await clock.advance(0)
    assert [[one.job_id for one in batch] for batch in shift.hub.of("results")] == [["a"]]
    shift.hub.gate.set()
    await clock.advance(0)
    assert [[one.job_id for one in batch] for batch in shift.hub.of("results")] == [["a"], ["b", "c"]]


async def test_without_a_hub_work_goes_on_and_its_results_are_kept_until_it_is_back(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift(concurrency=2)
    shift.hub.give(lease("a"), lease("b", lease_seconds=3000, timeout_seconds=3000))
    await shift.begin()
    shift.hub.trouble = dict.fromkeys(("pull", "heartbeat", "extend", "results"), GONE)
    shift.gated.open("a")
    await clock.advance(120_000)
    assert len([line for line in shift.said if line.startswith("HUB_UNREACHABLE no answer")]) == 1
    assert shift.gated.cancelled == []
    assert 120 / 5 <= len(shift.hub.of("pull")) < 120 / 2.5 + 10
    shift.hub.trouble = {}
    tries = len(shift.hub.of("results"))
    shift.gated.open("b")
    await clock.advance(5_000)
    assert {one.job_id for batch in shift.hub.of("results")[tries:] for one in batch} == {"a", "b"}
    assert shift.said[-1] == "HUB_UNREACHABLE is over"


async def test_a_refused_token_is_said_once_until_it_works_again_and_tried_at_most_every_15_seconds(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift()
    shift.hub.trouble = dict.fromkeys(("pull", "heartbeat"), FORBIDDEN)
    await shift.begin()
    await clock.advance(600_000)
    assert [line.partition(" ")[0] for line in shift.said] == ["AUTH_FAIL"]
    assert 600 / 30 <= len(shift.hub.of("pull")) <= 600 / 15 + 10
    shift.hub.trouble = {}
    await clock.advance(60_000)
    shift.hub.trouble = dict.fromkeys(("pull", "heartbeat"), FORBIDDEN)
    await clock.advance(60_000)
    assert [line for line in shift.said if "AUTH_FAIL" in line] == [
        shift.said[0],
        "AUTH_FAIL is over",
        shift.said[0],
    ]


async def test_a_pull_without_an_answer_is_repeated_with_its_id(clock: VirtualClock, make_shift: MakeShift) -> None:
    shift = make_shift()
    shift.hub.trouble["pull"] = GONE
    await shift.begin()
    await clock.advance(1_000)
    shift.hub.trouble = {}
    shift.hub.give(lease("j"))
    await clock.advance(10_000)
    *tries, after = [pull["pull_id"] for pull in shift.hub.of("pull")]
    assert len(tries) > 1
    assert len(set(tries)) == 1
    assert after != tries[0]


@pytest.mark.parametrize("wait_seconds", [0, 20])
@pytest.mark.parametrize("reason", [reason for reason in REASONS if reason != "pull_spent"])
async def test_an_empty_answer_is_waited_for_as_long_as_the_hub_says_and_without_a_word(
    clock: VirtualClock, make_shift: MakeShift, reason: str, wait_seconds: float
) -> None:
    shift = make_shift(wait_seconds=wait_seconds)
    shift.hub.at_once = True
    shift.hub.empty = Pulled(defer_ms=7_000, reason=reason)
    await shift.begin()
    await clock.advance(6_999)
    assert len(shift.hub.of("pull")) == 1
    await clock.advance(1)
    assert len(shift.hub.of("pull")) == 2
    assert shift.said == []


async def test_a_drained_node_takes_nothing_more_until_it_is_taken_back(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift(wait_seconds=5)
    shift.hub.answer_beat = Beat(node_id="n", heartbeat_after_seconds=20, drain=True)
    await shift.begin()
    await clock.advance(19_000)
    assert shift.hub.of("pull") == []
    shift.hub.answer_beat = Beat(node_id="n", heartbeat_after_seconds=20)
    await clock.advance(1_000)
    assert len(shift.hub.of("pull")) == 1


async def test_a_job_that_comes_back_to_its_own_node_ends_the_work_under_the_old_lease(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift()
    shift.hub.give(lease("j", lease_id="old"))
    await shift.begin()
    shift.hub.give(lease("j", lease_id="new", attempt=2))
    await clock.advance(0)
    assert shift.gated.started == ["j", "j"]
    assert shift.gated.cancelled == ["j"]
    shift.gated.open("j")
    await clock.advance(0)
    assert shift.hub.reported()["j"].lease_id == "new"


async def test_stopping_lets_work_finish_within_the_grace_and_releases_the_rest(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift(grace_seconds=10)
    shift.hub.give(lease("quick"), lease("slow"))
    await shift.begin()
    shift.worker.stop()
    await clock.advance(5_000)
    shift.gated.open("quick")
    await clock.advance(4_999)
    assert shift.gated.cancelled == []
    assert not shift.over
    await clock.advance(1)
    await settle()
    assert shift.gated.cancelled == ["slow"]
    assert shift.hub.of("release") == [("slow", "lease-slow")]
    assert list(shift.hub.reported()) == ["quick"]
    assert shift.hub.of("heartbeat")[-1]["status"] == "busy"
    assert shift.over


async def test_stopping_with_nothing_to_do_takes_no_time(clock: VirtualClock, make_shift: MakeShift) -> None:
    shift = make_shift()
    await shift.begin()
    shift.worker.stop()
    await clock.advance(0)
    assert shift.over


async def test_leases_of_a_pull_that_stopping_broke_off_are_given_back(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift()
    await shift.begin()
    shift.worker.stop()
    shift.hub.lost = [lease("j")]
    shift.hub.waiting = [lease("not mine")]
    await clock.advance(0)
    broken_off, repeat = shift.hub.of("pull")
    assert repeat["pull_id"] == broken_off["pull_id"]
    assert shift.hub.of("release") == [("j", "lease-j")]
    assert shift.hub.waiting == [lease("not mine")]
    assert shift.gated.started == []


async def test_a_hub_that_never_comes_back_does_not_keep_a_worker_from_stopping(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift()
    shift.hub.give(lease("j"))
    await shift.begin()
    shift.hub.trouble = dict.fromkeys(("pull", "heartbeat", "extend", "results", "release"), GONE)
    shift.gated.open("j")
    shift.worker.stop()
    await clock.advance(5_000)
    assert shift.over
    assert any("1 results could not be delivered" in line for line in shift.said)


async def test_a_result_the_hub_cannot_take_becomes_a_failure_that_says_so(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift()
    shift.hub.give(lease("j"))
    shift.hub.refuse["j"] = Refusal(code="body_too_large", status=413, detail="too large")
    await shift.begin()
    shift.gated.open("j")
    await clock.advance(0)
    first, second = (batch[0] for batch in shift.hub.of("results"))
    assert (first.ok, second.ok, second.retry, second.lease_id) == (True, False, False, first.lease_id)
    assert orjson.loads(bytes(second.error)) == {"type": "ResultTooLarge", "message": "too large (body_too_large)"}


async def test_what_may_run_once_only_is_not_given_back_when_it_has_begun(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift(grace_seconds=10)
    shift.hub.give(lease("once", delivery="at_most_once"), lease("often"))
    await shift.begin()
    shift.worker.stop()
    await clock.advance(10_000)
    await settle()
    assert shift.hub.of("release") == [("often", "lease-often")]
    report = shift.hub.reported()["once"]
    assert (report.ok, report.retry, orjson.loads(bytes(report.error))["type"]) == (False, False, "Stopped")


async def test_a_result_the_hub_has_no_room_for_is_sent_again_and_a_superseded_one_is_not(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift()
    shift.hub.give(lease("a"), lease("b"))
    shift.hub.refuse["a"] = Refusal(code="busy", status=503)
    shift.hub.refuse["b"] = Refusal(code="lease_superseded", status=409)
    await shift.begin()
    shift.gated.open("a", "b")
    await clock.advance(1_000)
    assert [one.job_id for batch in shift.hub.of("results") for one in batch] == ["a", "b", "a"]


async def test_a_handler_decides_about_retry(clock: VirtualClock, make_shift: MakeShift) -> None:
    shift = make_shift()
    shift.hub.give(lease("j", kind="final"))
    await shift.begin()
    report = shift.hub.reported()["j"]
    assert (report.ok, report.retry) == (False, False)
    assert orjson.loads(bytes(report.error))["message"] == "never again"


# results that bring the next jobs


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_busy_worker_makes_one_request_a_job_at_most(
    clock: VirtualClock, make_shift: MakeShift, concurrency: int
) -> None:
    shift = make_shift(concurrency=concurrency)
    names = [f"j{n}" for n in range(40)]
    shift.gated.open(*names)
    shift.hub.give(*map(lease, names))
    await shift.begin()
    for _ in names:
        await clock.advance(0)
    assert sorted(shift.hub.reported()) == sorted(names)
    asked = [name for name, _ in shift.hub.calls if name != "heartbeat"]
    assert asked[0] == asked[-1] == "pull", "one to begin with, and the long poll that waits for more"
    assert set(asked[1:-1]) == {"results"}
    assert len(asked) <= 40 + 2


async def test_results_pull_for_all_the_room_there_is_and_do_not_wait(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift(concurrency=5, capabilities=("gpu",), wait_seconds=20)
    shift.hub.give(*map(lease, "abcde"))
    await shift.begin()
    shift.gated.open("a", "b")
    await clock.advance(0)
    (pull,) = shift.hub.carried
    assert (pull["max"], pull["kinds"], pull["capabilities"]) == (2, ["final", "gated"], ("gpu",))
    assert pull.get("wait_seconds", 0) == 0
    assert pull["pull_id"] not in [one["pull_id"] for one in shift.hub.of("pull")]


async def test_while_results_that_pull_are_out_nobody_else_pulls(clock: VirtualClock, make_shift: MakeShift) -> None:
    shift = make_shift(concurrency=3)
    shift.hub.give(*map(lease, "abc"))
    await shift.begin()
    shift.hub.gate.clear()
    shift.gated.open("a")
    await clock.advance(0)
    shift.gated.open("b")
    await clock.advance(60_000)
    assert [len(shift.hub.of("pull")), [pull["max"] for pull in shift.hub.carried]] == [1, [1]]
    shift.hub.give(lease("d"), lease("e"), lease("f"))
    shift.hub.gate.set()
    await clock.advance(0)
    assert [pull["max"] for pull in shift.hub.carried] == [1, 1]
    assert shift.gated.started == ["a", "b", "c", "d", "e"]


async def test_while_a_long_poll_waits_results_pull_nothing(clock: VirtualClock, make_shift: MakeShift) -> None:
    shift = make_shift(concurrency=2)
    shift.hub.give(lease("a"))
    await shift.begin()
    assert [pull["max"] for pull in shift.hub.of("pull")] == [2, 1]
    shift.gated.open("a")
    await clock.advance(0)
    assert (list(shift.hub.reported()), shift.hub.carried) == (["a"], [])


async def test_the_leases_of_a_lost_answer_to_results_come_with_the_next_pull(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift(concurrency=1)
    shift.hub.give(lease("a"))
    await shift.begin()
    shift.hub.trouble = dict.fromkeys(("results", "pull"), GONE)
    shift.gated.open("a")
    await clock.advance(20_000)
    ids = {pull["pull_id"] for pull in (*shift.hub.carried, *shift.hub.of("pull")[1:])}
    assert (len(ids), len(shift.hub.carried) > 1, len(shift.hub.of("pull")) > 2) == (1, True, True)
    shift.hub.trouble, shift.hub.lost = {}, [lease("b")]
    await clock.advance(5_000)
    assert shift.gated.started == ["a", "b"]
    shift.gated.open("b")
    await clock.advance(0)
    assert shift.hub.carried[-1]["pull_id"] not in ids


async def test_results_of_a_drained_node_pull_nothing(clock: VirtualClock, make_shift: MakeShift) -> None:
    shift = make_shift(concurrency=1)
    shift.hub.give(lease("a"), lease("b"))
    await shift.begin()
    shift.hub.answer_beat = Beat(node_id="n", heartbeat_after_seconds=20, drain=True)
    await clock.advance(20_000)
    shift.gated.open("a")
    await clock.advance(0)
    assert (list(shift.hub.reported()), shift.hub.carried, shift.gated.started) == (["a"], [], ["a"])
    shift.hub.answer_beat = Beat(node_id="n", heartbeat_after_seconds=20)
    await clock.advance(20_000)
    assert shift.gated.started == ["a", "b"]


async def test_results_of_a_stopping_worker_pull_nothing(clock: VirtualClock, make_shift: MakeShift) -> None:
    shift = make_shift(concurrency=1)
    shift.hub.give(lease("a"), lease("b"))
    await shift.begin()
    shift.worker.stop()
    shift.gated.open("a")
    await clock.advance(0)
    assert (list(shift.hub.reported()), shift.hub.carried, shift.gated.started) == (["a"], [], ["a"])
    assert shift.over


async def test_leases_that_come_with_the_answer_to_results_while_stopping_are_given_back(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift(concurrency=1)
    shift.hub.give(lease("a"), lease("b"))
    await shift.begin()
    shift.hub.gate.clear()
    shift.gated.open("a")
    await clock.advance(0)
    shift.worker.stop()
    await clock.advance(1_000)
    shift.hub.gate.set()
    await clock.advance(0)
    assert shift.gated.started == ["a"]
    assert shift.hub.of("release") == [("b", "lease-b")]
    assert len(shift.hub.of("pull")) == 1, "the pull was answered, so nothing is left to be handed back"
    assert shift.over


async def test_leases_of_results_that_stopping_broke_off_are_handed_back(
    clock: VirtualClock, make_shift: MakeShift
) -> None:
    shift = make_shift(concurrency=1)
    shift.hub.give(lease("a"))
    await shift.begin()
    shift.hub.gate.clear()
    shift.gated.open("a")
    await clock.advance(0)
    shift.worker.stop()
    shift.hub.lost, shift.hub.waiting = [lease("b")], [lease("not mine")]
    await clock.advance(20_000)
    assert shift.over
    assert shift.hub.of("pull")[-1]["pull_id"] == shift.hub.carried[0]["pull_id"]
    assert shift.hub.of("release") == [("b", "lease-b")]
    assert shift.hub.waiting == [lease("not mine")]


async def test_with_a_real_hub_a_worker_makes_about_one_request_a_job(make_site: MakeSite) -> None:
    site = await make_site("sqlite")
    clock, done = SystemClock(), asyncio.Event()
    finished: list[int] = []

    async def count(params: dict[str, int]) -> int:
        finished.append(params["n"])
        if len(finished) == 50:
            done.set()
        return params["n"]

    async with HubClient(site.url("control", ""), site.url("data", ""), TOKEN) as hub:
        jobs = await hub.submit_many([{"kind": "count", "params": {"n": n}} for n in range(50)])
        options = Options(module="none", node_id="n", concurrency=1)
        worker = Worker(hub, {"count": Handler("count", count, True, False)}, options, clock, lambda line: None)
        running = asyncio.create_task(worker.run())
        async with asyncio.timeout(30):
            await done.wait()
            last = await hub.job(jobs[-1].job_id, wait_seconds=20)  # type: ignore[union-attr]
            worker.stop()
            await running
    assert (finished, last.status) == (list(range(50)), "completed")
    assert sum((await requests(site)).values()) <= 50 + 8
    assert await site.app.store.counts("job:") == {"job:completed": 50}


async def requests(site: Site) -> dict[str, float]:
    """How often a worker's routes were asked."""
    _, text, _ = await site.ask("data", "GET", "/metrics")
    found: dict[str, float] = {}
    for line in text.splitlines():
        for route in ("/api/jobs/pull", "/api/results", "/api/jobs/{id}/result", "/api/jobs/{id}/extend"):
            if "http_requests_total{" in line and f'route="{route}"' in line:
                found[route] = found.get(route, 0) + float(line.rpartition(" ")[2])
    return found


async def test_a_result_that_is_too_large_for_the_hub_ends_its_job_with_an_error_that_says_so(
    make_site: MakeSite,
) -> None:
    site = await make_site("sqlite")
    large, small = await site.submit("big", params=1_100_000), await site.submit("big", params=3)

    async def big(params: int) -> str:
        return "x" * params

    options = Options(module="none", node_id="n", concurrency=2)
    async with HubClient(site.url("control", ""), site.url("data", ""), TOKEN) as hub:
        worker = Worker(hub, {"big": Handler("big", big, True, False)}, options, SystemClock(), lambda _: None)
        running = asyncio.create_task(worker.run())
        try:
            ended = [(await site.data("GET", f"/api/jobs/{id}?wait_seconds=20"))[1] for id in (large, small)]
        finally:
            worker.stop()
            await running
    assert [(job["status"], job["reason"]) for job in ended] == [("failed", "NOT_RETRYABLE"), ("completed", None)]
    assert ended[0]["error"]["type"] == "ResultTooLarge"
    assert "1048576" in ended[0]["error"]["message"]
