"""The Hypothesis machine: what clients, nodes, time and operators do to a hub, in any order.

A new feature is a `@rule` here, a method of the model, and, if it has a command of its own, a line in the model's `DO`.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from msgspec.structs import replace

from sheratan_hub.rules.command import Command, Limits, Rate, Together
from sheratan_hub.rules.drain import Drain, Resume
from sheratan_hub.rules.finish import Cancel, Extend, Finish, Release
from sheratan_hub.rules.graph import Member, plan
from sheratan_hub.rules.limits import DropRate, SetRate
from sheratan_hub.rules.missions import MakeMission, Mission, RedriveMember
from sheratan_hub.rules.nodes import Beat, Forget
from sheratan_hub.rules.pauses import PauseKind, ResumeKind
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.redrive import Redrive
from sheratan_hub.rules.submit import Submit
from tests.model.rig import Rig

SECOND = 1000
NODES = ("n1", "n2", "n3")

LIMITS = (
    Limits(max_depth=50, max_inflight=50, lease_ms=10 * SECOND, key_ttl_ms=20 * SECOND, node_ttl_ms=7 * SECOND,
           node_dead_ms=15 * SECOND, restart_grace_ms=3 * SECOND, cancel_grace_ms=4 * SECOND, backoff_cap_ms=3000,
           age_ms=4 * SECOND, completed_kept_ms=30 * SECOND, failed_kept_ms=40 * SECOND, cancelled_kept_ms=9 * SECOND,
           mission_kept_ms=45 * SECOND),
    Limits(max_depth=4, max_inflight=2, lease_ms=5 * SECOND, item_ttl_ms=8 * SECOND, max_losses=2, loss_delay_ms=0,
           max_retries=1, key_ttl_ms=3 * SECOND, node_ttl_ms=30 * SECOND, node_dead_ms=60 * SECOND,
           restart_grace_ms=0, cancel_grace_ms=20 * SECOND, age_ms=0, max_leases_per_node=1),
    Limits(max_depth=9, max_inflight=4, lease_ms=4 * SECOND, max_losses=1, backoff_base_ms=200, backoff_cap_ms=500,
           key_ttl_ms=0, node_ttl_ms=2 * SECOND, node_dead_ms=3 * SECOND, restart_grace_ms=60 * SECOND,
           age_ms=1500, max_deliveries=2, rates={"s": Rate(0, 1)}, completed_kept_ms=2 * SECOND,
           failed_kept_ms=SECOND, cancelled_kept_ms=3 * SECOND, mission_kept_ms=SECOND),
)  # fmt: skip
"""Hubs of different temper: roomy, narrow with a time to live, and one that gives up soon and limits a source."""

SHAPES: tuple[dict[str, Any], ...] = (
    *({"kind": kind, "source": source, "priority": level} for kind, source, level in product("ab", ("", "s"), (2, 0))),
    {"kind": "a", "needs": ("gpu",)},
    {"kind": "b", "needs": ("gpu",), "priority": 3},
    {"kind": "a", "delay_ms": 2 * SECOND},
    {"kind": "a", "delay_ms": 6 * SECOND, "expires_in_ms": 4 * SECOND},
    {"kind": "b", "expires_in_ms": 5 * SECOND},
    {"kind": "a", "at_most_once": True},
    {"kind": "b", "max_retries": 0},
    {"kind": "a", "max_retries": 2, "backoff": "linear"},
    {"kind": "b", "timeout_ms": 3 * SECOND},
    {"kind": "a", "timeout_ms": 10 * SECOND},
    {"kind": "a", "timeout_ms": 5 * SECOND, "max_retries": 1},
    {"kind": "a", "mission_id": "m"},
    {"kind": "b", "mission_id": "m:pending", "source": "s"},
)
PULLS: tuple[dict[str, Any], ...] = (
    {"capabilities": frozenset()},
    {"capabilities": frozenset({"gpu"})},
    {"capabilities": frozenset({"gpu"}), "limit": 3},
    {"capabilities": frozenset(), "kinds": frozenset("a")},
    {"capabilities": frozenset(), "limit": 10},
    {"capabilities": None, "limit": 2},
)
RESULTS: tuple[dict[str, Any], ...] = (
    {"ok": True, "result": b"1"},
    {"ok": True, "result": b"2"},
    {"ok": False, "error": b'"e"', "jitter": 0.5},
    {"ok": False, "error": b'"e"', "retry": False},
    {"ok": False, "error": b'"f"', "retry_after_ms": 1500},
    {"ok": False, "error": b'"f"', "retry_after_ms": 0},
)
STEPS = (1, 400, 1000, 2000, 5000, 11_000, 31_000)

shapes, pulls, results = st.sampled_from(SHAPES), st.sampled_from(PULLS), st.sampled_from(RESULTS)
nodes, any_one = st.sampled_from(NODES), st.integers(0, 15)
keys = st.sampled_from((None, None, "k1", "k2", "k3"))


class Machine(RuleBasedStateMachine):
    """Drives the engine on `url`; a subclass names another store, and the place of its files."""

    url = "memory://"

    def __init__(self) -> None:
        super().__init__()
        self.made: Rig | None = None
        self.leases: list[tuple[str, str, str]] = []
        self.answers: list[Any] = []

    @initialize(limits=st.sampled_from(LIMITS))
    def begin(self, limits: Limits) -> None:
        self.made = Rig(self.place(), limits)

    def place(self) -> str:
        """The store's URL for this example."""
        return self.url

    @property
    def rig(self) -> Rig:
        assert self.made is not None
        return self.made

    def teardown(self) -> None:
        if self.made is None:
            return
        try:
            self.rig.run(self.rig.end(), check=False)
        finally:
            self.rig.dispose()

    # What commands are made of

    def new_id(self) -> str:
        return self.rig.clock.job_id()

    def submit_of(self, shape: dict[str, Any], key: str | None = None, other: bool = False) -> Submit:
        params = b"1" if other else b"0"
        return Submit(self.new_id(), params=params, key=key, payload_sha256=f"{shape['kind']}{params!r}", **shape)

    def pull_of(self, node: str, shape: dict[str, Any], pull_id: str | None = None) -> Pull:
        return Pull(node, self.rig.clock.secret(), pull_id=pull_id, **shape)

    def lease(self, place: int) -> tuple[str, str, str]:
        """(job, lease, node) of one that was given away, the newest first; foreign to everybody now and then."""
        job_id, lease_id, node = self.leases[-1 - place % len(self.leases)]
        return job_id, lease_id, node

    def job_id(self, place: int) -> str:
        ids = list(self.rig.model.jobs)
        return ids[-1 - place % len(ids)] if ids else "nobody"

    def took(self, pulled: Any, node: str) -> None:
        if pulled is not None and pulled.jobs:
            self.answers.append(pulled)
            self.leases += [(job.id, job.lease_id, node) for job in pulled.jobs]

    def found_polls(self) -> None:
        """What waiting pulls were given is known to their nodes now."""
        known = {lease for _, lease, _ in self.leases}
        for job in self.rig.model.jobs.values():
            if job.lease is not None and job.lease not in known:
                self.leases.append((job.id, job.lease, job.node or ""))

    def do(self, *commands: Command) -> list[Any]:
        outcomes = self.rig.run(self.rig.do(*commands))
        self.found_polls()
        return outcomes

    # Producers

    @rule(shape=shapes, key=keys, other=st.booleans())
    def submit(self, shape: dict[str, Any], key: str | None, other: bool) -> None:
        self.do(self.submit_of(shape, key, other))

    @rule(shape=shapes, times=st.integers(1, 5))
    def submit_repeatedly(self, shape: dict[str, Any], times: int) -> None:
        one = self.submit_of(shape, "k4")
        again = [Submit(self.new_id(), **shape, params=one.params, key="k4", payload_sha256=one.payload_sha256)
                 for _ in range(times)]  # fmt: skip
        self.rig.run(self.rig.race(one, *again[:2], apart=times % 3))
        self.found_polls()

    @rule(some=st.lists(shapes, min_size=2, max_size=4), key=keys)
    def submit_batch(self, some: list[dict[str, Any]], key: str | None) -> None:
        self.do(*(self.submit_of(shape, key if place % 2 else None) for place, shape in enumerate(some)))

    @rule(some=st.lists(shapes, min_size=2, max_size=4), key=keys)
    def submit_all_or_none(self, some: list[dict[str, Any]], key: str | None) -> None:
        self.do(Together(tuple(self.submit_of(shape, key if place else None) for place, shape in enumerate(some))))

    @rule(place=any_one)
    def cancel(self, place: int) -> None:
        self.do(Cancel(self.job_id(place)))

    # Nodes

    @rule(node=nodes, shape=pulls, pull_id=st.sampled_from((None, None, "p1", "p2")))
    def pull(self, node: str, shape: dict[str, Any], pull_id: str | None) -> None:
        (pulled,) = self.do(self.pull_of(node, shape, pull_id))
        self.took(pulled, node)

    @rule(node=nodes, shape=pulls, wait=st.sampled_from((3000, 30_000)), pull_id=st.sampled_from((None, "w")))
    def pull_waiting(self, node: str, shape: dict[str, Any], wait: int, pull_id: str | None) -> None:
        self.rig.run(self.rig.poll(self.pull_of(node, shape, pull_id), wait))
        self.found_polls()

    @precondition(lambda self: self.made and self.made.polls)
    @rule(place=any_one)
    def hang_up(self, place: int) -> None:
        self.rig.run(self.rig.hang_up(place % len(self.rig.polls)))

    @precondition(lambda self: self.leases)
    @rule(place=any_one, result=results, named=st.booleans())
    def result(self, place: int, result: dict[str, Any], named: bool) -> None:
        job_id, lease_id, node = self.lease(place)
        self.do(Finish(job_id, lease_id=lease_id, node_id=node if named else None, **result))

    @precondition(lambda self: self.leases)
    @rule(place=any_one, result=results, node=nodes)
    def result_without_lease(self, place: int, result: dict[str, Any], node: str) -> None:
        self.do(Finish(self.lease(place)[0], node_id=node, **result))

    @precondition(lambda self: self.leases)
    @rule(place=any_one, other=any_one, result=results)
    def result_with_a_foreign_lease(self, place: int, other: int, result: dict[str, Any]) -> None:
        self.do(Finish(self.job_id(place), lease_id=self.lease(other)[1], **result))

    @precondition(lambda self: self.leases)
    @rule(place=any_one, result=results, node=nodes, shape=pulls)
    def result_with_a_pull(self, place: int, result: dict[str, Any], node: str, shape: dict[str, Any]) -> None:
        job_id, lease_id, _ = self.lease(place)
        finish = Finish(job_id, lease_id=lease_id, **result)
        self.took(self.rig.run(self.rig.finish_and_pull(finish, self.pull_of(node, shape))), node)

    @precondition(lambda self: self.leases)
    @rule(place=any_one, ms=st.sampled_from((None, 1500, 20_000)))
    def extend(self, place: int, ms: int | None) -> None:
        job_id, lease_id, _ = self.lease(place)
        self.do(Extend(job_id, lease_id, ms))

    @precondition(lambda self: self.leases)
    @rule(place=any_one)
    def release(self, place: int) -> None:
        job_id, lease_id, _ = self.lease(place)
        self.do(Release(job_id, lease_id))

    @precondition(lambda self: self.answers)
    @rule(place=any_one)
    def answer_that_could_not_be_written(self, place: int) -> None:
        self.rig.run(self.rig.give_back(self.answers[-1 - place % len(self.answers)]))
        self.found_polls()

    @rule(
        node=nodes,
        capabilities=st.sampled_from((None, (), ("gpu",))),
        status=st.sampled_from(("online", "online", "online", "busy")),
        most=st.sampled_from((None, None, None, 0, 1, 3)),
        boot=st.sampled_from((None, None, "b1", "b1", "b2")),
    )
    def heartbeat(
        self, node: str, capabilities: tuple[str, ...] | None, status: Any, most: int | None, boot: str | None
    ) -> None:
        self.rig.run(self.rig.beat(Beat(node, "GREEN", status, None, capabilities, None, most, boot)))
        self.found_polls()

    @precondition(lambda self: self.leases)
    @rule(place=st.integers(0, 1), looks=st.booleans())
    def a_holder_is_started_anew(self, place: int, looks: bool) -> None:
        """Its old boot is known; what it holds is lost, unless it was leased in this very millisecond."""
        _, _, node = self.lease(place)
        for boot in ("b1", "b2"):
            self.rig.run(self.rig.beat(Beat(node, boot_id=boot)))
        self.found_polls()
        if looks:
            self.sweep()

    @precondition(lambda self: self.leases)
    @rule(place=st.integers(0, 1))
    def a_holder_is_drained_at_once(self, place: int) -> None:
        self.do(Drain(self.lease(place)[2], 0))
        self.sweep()

    @rule(node=nodes, deadline=st.sampled_from((None, 0, 3000)))
    def drain(self, node: str, deadline: int | None) -> None:
        self.do(Drain(node, deadline))

    @rule(node=nodes)
    def take_back(self, node: str) -> None:
        self.do(Resume(node))

    @rule(node=nodes)
    def forget(self, node: str) -> None:
        self.do(Forget(node))

    # Operators

    @rule(kind=st.sampled_from((None, "a", "b")), for_ms=st.sampled_from((0, 2000)))
    def pause(self, kind: str | None, for_ms: int) -> None:
        self.do(PauseKind(kind, for_ms=for_ms))

    @rule(kind=st.sampled_from((None, None, "a")))
    def resume(self, kind: str | None) -> None:
        self.do(ResumeKind(kind))

    @rule(place=any_one, delay_ms=st.sampled_from((0, 0, 3000)))
    def redrive(self, place: int, delay_ms: int) -> None:
        dead = [id for id, job in self.rig.model.jobs.items() if job.status in ("failed", "cancelled")]
        self.do(Redrive(dead[-1 - place % len(dead)] if dead and place % 4 else self.job_id(place), delay_ms))

    @rule(source=st.sampled_from(("s", "s", "t")), minute=st.sampled_from((0, 6, 60)), most=st.sampled_from((0, 1, 2)))
    def set_rate(self, source: str, minute: int, most: int) -> None:
        self.do(SetRate(source, Rate(minute, most)))

    @rule(source=st.sampled_from(("s", "t")))
    def drop_rate(self, source: str) -> None:
        self.do(DropRate(source))

    @rule(some=st.lists(shapes, max_size=3))
    def mission(self, some: list[dict[str, Any]]) -> None:
        mission = Mission(self.new_id(), "t", self.rig.clock.now())
        submits = [self.submit_of({**shape, "mission_id": mission.id}) for shape in some]
        self.do(MakeMission(mission, plan([Member(None, one) for one in submits], atomic=True)))

    @rule(redrives=st.booleans(), place=any_one)
    def whole_mission(self, redrives: bool, place: int) -> None:
        named = [job.mission for job in self.rig.model.jobs.values() if job.mission]
        mission = named[-1 - place % len(named)] if named else None
        ids = [id for id, job in self.rig.model.jobs.items() if mission and job.mission == mission]
        if ids:
            self.do(*(RedriveMember(id) if redrives else Cancel(id) for id in ids))

    @rule()
    def prune(self) -> None:
        self.rig.run(self.rig.prune())

    # Everybody at once

    @rule(
        kinds=st.lists(st.integers(0, 6), min_size=2, max_size=4), place=any_one, shape=shapes, apart=st.integers(0, 4)
    )
    def at_once(self, kinds: list[int], place: int, shape: dict[str, Any], apart: int) -> None:
        commands = [self.one_of(kind, place, shape) for kind in kinds]
        self.raced(commands, self.rig.run(self.rig.race(*commands, apart=apart)))

    @rule(kind=st.integers(0, 6), place=any_one, shape=shapes, pull=pulls, apart=st.integers(0, 12))
    def pull_waiting_at_once(
        self, kind: int, place: int, shape: dict[str, Any], pull: dict[str, Any], apart: int
    ) -> None:
        """Something happens while a pull that is going to wait looks for the first time."""
        command, other = self.pull_of(NODES[place % 3], pull), self.one_of(kind, place, shape)
        self.raced([other], self.rig.run(self.rig.poll(command, 30_000, other, apart=apart)))

    def raced(self, commands: list[Command], outcomes: list[Any]) -> None:
        for command, outcome in zip(commands, outcomes, strict=True):
            if isinstance(command, Pull):
                self.took(outcome, command.node_id)
        self.found_polls()

    def one_of(self, kind: int, place: int, shape: dict[str, Any]) -> Command:
        job_id, lease_id, _ = self.lease(place) if self.leases else (self.job_id(place), "none", "n1")
        match kind:
            case 0:
                return self.submit_of(shape, "k1")
            case 1:
                return self.pull_of(NODES[place % 3], PULLS[place % 4])
            case 2:
                return Finish(job_id, lease_id=lease_id, **RESULTS[place % len(RESULTS)])
            case 3:
                return Cancel(job_id)
            case 4:
                return Release(job_id, lease_id)
            case 5:
                return self.submit_of(shape)
            case _:
                return Extend(job_id, lease_id, 2000)

    @rule(place=any_one, wait=st.sampled_from((3000, 60_000)))
    def wait_for_the_end(self, place: int, wait: int) -> None:
        if self.rig.model.jobs:
            self.rig.run(self.rig.await_job(self.job_id(place), wait))

    # Time, and the hub itself

    @rule(ms=st.sampled_from(STEPS), looks=st.booleans())
    def time_passes(self, ms: int, looks: bool) -> None:
        self.rig.run(self.rig.advance(ms))
        if looks:
            self.sweep()

    @rule(place=any_one, off=st.sampled_from((0, 0, -1, 1)), looks=st.booleans())
    def something_is_due(self, place: int, off: int, looks: bool) -> None:
        """The very moment of a deadline, or the one before or after it."""
        due = self.rig.model.deadlines()
        if due:
            self.rig.run(self.rig.advance(max(0, due[place % min(4, len(due))] + off - self.rig.clock.now())))
        if looks:
            self.sweep()

    @rule(kind=st.integers(0, 6), place=any_one, shape=shapes)
    def store_has_no_room(self, kind: int, place: int, shape: dict[str, Any]) -> None:
        self.rig.run(self.rig.fail(self.one_of(kind, place, shape)))
        self.found_polls()

    @rule()
    def sweep_without_room(self) -> None:
        self.rig.run(self.rig.sweep_in_vain())
        self.found_polls()

    @rule(depth=st.sampled_from((2, 9, 50)), inflight=st.sampled_from((1, 3, 50)), lease=st.sampled_from((3, 10)))
    def settings_are_reloaded(self, depth: int, inflight: int, lease: int) -> None:
        limits = replace(self.rig.limits, max_depth=depth, max_inflight=inflight, lease_ms=lease * SECOND)
        self.rig.run(self.rig.adopt(limits))
        self.found_polls()

    @rule()
    def sweep(self) -> None:
        self.rig.run(self.rig.sweep())
        self.found_polls()

    @rule(ms=st.sampled_from((1, 500, 5000, -3000)))
    def restart(self, ms: int) -> None:
        """Another hub on the same store; its wall clock may have gone back a little."""
        self.rig.run(self.rig.restart(ms))
