"""What design.md's "The life of a job" promises, once more, as plainly as it can be said: the machine's oracle.

Written from the text, not from `sheratan_hub/rules`, of which it uses only the commands (as data). No rows, no
lanes, no agendas, no batches: jobs, nodes and keys in dictionaries. `Model.apply` is told a command and what the
engine answered to it; it raises `Divergence` unless the rules allow that answer, and moves on. Numbers in comments
are the rules'. Longer than 300 lines, as it is one description of one thing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sheratan_hub.rules.command import Command, Limits, Rate, Refused, Together
from sheratan_hub.rules.drain import Drain, Resume
from sheratan_hub.rules.finish import Cancel, Extend, Finish, Release
from sheratan_hub.rules.limits import DropRate, SetRate
from sheratan_hub.rules.missions import MakeMission, RedriveMember
from sheratan_hub.rules.nodes import Beat, Forget
from sheratan_hub.rules.pauses import PauseKind, ResumeKind
from sheratan_hub.rules.pull import Pull, Pulled
from sheratan_hub.rules.redrive import Redrive
from sheratan_hub.rules.submit import Submit

FINISHED = ("completed", "failed", "cancelled")
REMEMBERED = 8
"""So many ended leases of a job, and pulls of a node, are remembered (docs/protocol.md)."""

EVIDENCE_KEPT = 5
"""So many late results of a job are kept, and judged once it completes."""

BY_HUB = ("timeout", "lost", "cancelled")
"""The ends of deliveries after which the worker has not had its say: what it says later is evidence."""

Span = tuple[int, int]
"""A time that jitter decides: from, to (ms)."""


class Divergence(AssertionError):
    """The engine did what the rules do not allow."""


class No(Exception):
    """The rules refuse this, with this code."""


class Place(NamedTuple):
    """A place in line: from when on (ms), since which start of the hub, the how-manieth (None: among equals)."""

    at: int
    start: int
    n: int | None

    def before(self, other: Place) -> bool:
        """Whether it is certainly the earlier one."""
        if self.at != other.at:
            return self.at < other.at
        return self.start == other.start and self.n is not None and other.n is not None and self.n < other.n


class Pause(NamedTuple):
    """Nothing of this kind (None: of any) is handed out until then; 0: until somebody says so."""

    kind: str | None
    until: int

    def holds(self, now: int) -> bool:
        return not self.until or now < self.until


class Ended(NamedTuple):
    """How a delivery was ended by its holder: what was said, and the answer."""

    said: tuple[Any, ...]
    status: str
    late: bool = False
    delay: Any = 0


@dataclass(slots=True)
class JobModel:
    """A job as the rules see it. Times in ms."""

    id: str
    kind: str
    source: str
    priority: int
    needs: tuple[str, ...]
    params: bytes
    timeout_ms: int
    max_retries: int
    backoff: str
    at_most_once: bool
    place: Place
    expires_at: int
    ttl_ms: int
    pending_since: int
    not_before: int | Span
    waiting: bool
    delay: Any = 0
    status: str = "pending"
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    lost_on: tuple[str, ...] = ()
    node: str | None = None
    lease: str | None = None
    lease_ms: int = 0
    lease_until: int = 0
    started_at: int = 0
    sending: int = 0
    cancel_at: int = 0
    finished_at: int = 0
    reason: str | None = None
    result: bytes = b"null"
    error: bytes | None = b"null"
    uncounted: int = 0
    redrives: int = 0
    began_at: int = 0
    ended: OrderedDict[str, Ended] = field(default_factory=OrderedDict)
    outcomes: dict[str, str] = field(default_factory=dict)
    late: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    mission: str | None = None
    keyed: bool = False
    happened: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.status in FINISHED

    @property
    def lane(self) -> tuple[Any, ...]:
        """Nobody can tell two waiting jobs of one lane apart, except by age."""
        return self.priority, self.kind, self.source, self.needs

    @property
    def times_out_at(self) -> int:
        return self.started_at + self.timeout_ms  # 5: from the attempt's start, whatever is extended

    @property
    def ends_at(self) -> int:
        """When the running attempt ends if nothing is heard."""
        ends = min(self.lease_until, self.times_out_at)
        return min(ends, self.cancel_at) if self.cancel_at else ends

    @property
    def expires(self) -> int:
        """When it has waited too long; 0: never."""
        ends = [at for at in (self.expires_at, self.pending_since + self.ttl_ms if self.ttl_ms else 0) if at]
        return min(ends, default=0)

    def copy(self) -> JobModel:
        twin = replace(self, ended=OrderedDict(self.ended), happened=list(self.happened))
        twin.outcomes, twin.late = dict(self.outcomes), dict(self.late)
        return twin

    @property
    def tried(self) -> int:
        return len(self.outcomes)

    @property
    def late_results(self) -> int:
        return len(self.late)

    def evidence(self) -> list[tuple[bool, bool | None]]:
        """2: of the late results that are kept: whether it was a success, and whether it differs from the winner's."""
        last = list(self.late.values())[-EVIDENCE_KEPT:]
        done = self.status == "completed"
        return [(ok, not (ok and result == self.result) if done else None) for ok, result, _ in last]


@dataclass(slots=True)
class NodeModel:
    """A node: when it was last heard of, and the state that was written down last."""

    id: str
    last_seen: int
    state: str = "ONLINE"
    capabilities: tuple[str, ...] = ()
    busy: bool = False
    max_concurrent: int | None = None
    told: tuple[str, ...] = ()
    boot: str | None = None
    booted_at: int = 0
    booted: bool = False
    draining: bool = False
    drain_until: int = 0


@dataclass(slots=True)
class MissionModel:
    """A mission that was submitted as such, and when."""

    made_at: int


class Model:
    """All that the hub should know. `now` and `started_at` are set from outside; time moves nothing but by `sweep`."""

    def __init__(self, limits: Limits, now: int) -> None:
        self.limits = limits
        self.now = self.started_at = now
        self.starts = 0
        self.jobs: dict[str, JobModel] = {}
        self.nodes: dict[str, NodeModel] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        self.pulls: dict[str, OrderedDict[str, tuple[tuple[str, str], ...]]] = {}
        self.leases: set[str] = set()
        self.touched: set[str] = set()
        self.fresh: set[str] | None = None
        """While requests race: the jobs that they have made claimable, which those of the same batch may overlook."""
        self.tied = False
        """Whether submits are at the same time now: none of them is the earlier one."""
        self.alone = True
        """Whether a pull is decided in a transaction of its own: else the directory may be a step behind."""
        self.dealt = False
        """Whether pulls had waited: jobs are dealt to these one by one, and each may get fewer than there are."""
        self.pauses: list[Pause] = []
        self.rates: dict[str, Rate] = {}
        self.paid: dict[str, float] = {}
        """10: when all that a source has used of its minute will be given back (ms)."""
        self.missions: dict[str, MissionModel] = {}
        self.gone: dict[str, JobModel] = {}
        """15: the jobs that are forgotten."""
        self._levels: dict[tuple[Any, ...], int] = {}
        self._submits = 0
        self._delays_clamped = True

    def copy(self) -> Model:
        twin = Model(self.limits, self.now)
        twin.started_at, twin.starts, twin._submits = self.started_at, self.starts, self._submits
        twin.jobs = {id: job.copy() for id, job in self.jobs.items()}
        twin.nodes = {id: replace(node) for id, node in self.nodes.items()}
        twin.keys = dict(self.keys)
        twin.pulls = {node: OrderedDict(pulls) for node, pulls in self.pulls.items()}
        twin.tied, twin.alone, twin._levels = self.tied, self.alone, self._levels
        twin.rates, twin.paid, twin.gone = dict(self.rates), dict(self.paid), dict(self.gone)
        twin.missions = {id: replace(one) for id, one in self.missions.items()}
        twin.pauses, twin._delays_clamped = list(self.pauses), self._delays_clamped
        twin.leases, twin.touched = set(self.leases), set(self.touched)
        twin.fresh = None if self.fresh is None else set(self.fresh)
        return twin

    # What is asked of it

    def apply(self, command: Command, outcome: Any) -> None:
        """The engine gave this outcome (an answer or an exception) to this command: go along, or diverge."""
        try:
            expected = DO[type(command)](self, command, outcome)
        except No as no:
            expected = str(no)
        if told(outcome) != expected:
            raise Divergence(f"{command}\n  expected {expected}\n  got      {told(outcome)}")

    def tie(self, tied: bool) -> None:
        """From now on submits are at the same time, or one after the other again."""
        self.tied = tied
        self._submits += 1

    def count(self, status: str) -> int:
        return sum(job.status == status for job in self.jobs.values())

    def counts(self) -> dict[str, int]:
        """The counters that must stand in the store: a recount."""
        facets = [f"job:{job.status}" for job in self.jobs.values()]
        facets += [f"node:{node.state}" for node in self.nodes.values()]
        facets += ["key"] * len(self.keys)
        running = [job for job in self.jobs.values() if job.status == "running"]
        facets += [f"leases:{job.node}" for job in running]
        facets += [f"running:{job.source}" for job in running if job.source]
        facets += [f"m:{job.mission}:{job.status}" for job in self.jobs.values() if job.mission]
        for job in self.gone.values():  # 15: as long as the mission is known
            if job.mission:
                facets += [f"m:{job.mission}:{job.status}", f"m:{job.mission}:pruned"]
        return {facet: facets.count(facet) for facet in set(facets)}

    def mission_is_gone(self, mission: str) -> bool:
        """Nobody has submitted it, or it was pruned, and none of its jobs is left."""
        return mission not in self.missions and all(job.mission != mission for job in self.jobs.values())

    # 8, 9: submitting

    def submit(self, one: Submit, outcome: Any) -> tuple[Any, ...]:
        known = self._known(one.key)
        if known is not None:
            job_id, payload = known
            if payload != one.payload_sha256:
                raise No("idempotency_key_collision")
            return "submitted", job_id, True, self.jobs[job_id].status
        if self.count("pending") >= self.limits.max_depth:
            raise No("queue_full")
        self._admit(one.source)
        self._make(one)
        if one.key is not None:
            self.keys[one.key] = (one.job_id, one.payload_sha256)
        return "submitted", one.job_id, False, "pending"

    def _admit(self, source: str) -> None:
        """10: a bucket of so many submits that fills evenly within a minute."""
        rate = self.rate(source)
        if rate is None or not rate.per_minute:
            return
        each = 60_000 / rate.per_minute
        full_at = min(max(self.paid.get(source, 0), self.now), self.now + 60_000) + each
        if full_at > self.now + 60_000 + 0.001:
            raise No("rate_limited")
        self.paid[source] = full_at

    def rate(self, source: str) -> Rate | None:
        """10: what was set at run time wins."""
        return (self.rates.get(source) or self.limits.rates.get(source)) if source else None

    def set_rate(self, one: SetRate, outcome: Any) -> Any:
        self.rates[one.source] = one.rate
        return "limited", one.source, one.rate

    def drop_rate(self, one: DropRate, outcome: Any) -> Any:
        if self.rates.pop(one.source, None) is None:
            raise No("rate_limit_not_found")
        return "limited", one.source, self.limits.rates.get(one.source)

    def make_mission(self, one: MakeMission, outcome: Any) -> Any:
        """All of it or nothing; these have no key of their own."""
        answers = [None] * len(one.graph.members) if isinstance(outcome, BaseException) else outcome.jobs
        trial = self.copy()
        made = tuple(trial.submit(submit, answer) for submit, answer in zip(one.graph.members, answers, strict=True))
        self.__dict__.update(trial.__dict__)
        self.missions[one.mission.id] = MissionModel(self.now)
        return "mission", one.mission.id, made

    def redrive_member(self, one: RedriveMember, outcome: Any) -> Any:
        job = self.jobs.get(one.job_id)
        if job is None or job.status not in ("failed", "cancelled"):
            return False
        return self.redrive(Redrive(one.job_id), outcome)[-1]

    # 15: retention

    def kept_ms(self, job: JobModel) -> int:
        limits = self.limits
        kept = {
            "completed": limits.completed_kept_ms,
            "failed": limits.failed_kept_ms,
            "cancelled": limits.cancelled_kept_ms,
        }[job.status]
        return max(kept, limits.key_ttl_ms) if job.keyed else kept

    def prune(self) -> None:
        """What is finished goes by age from its end, its key with it; a mission after its last job."""
        for job in list(self.jobs.values()):
            if not job.finished or self.now < job.finished_at + self.kept_ms(job):
                continue
            if job.status == "failed":
                self._happens(job, "pruned")
            self.gone[job.id] = self.jobs.pop(job.id)
            self.touched.add(job.id)
            self.keys = {key: named for key, named in self.keys.items() if named[0] != job.id}
        for id, mission in list(self.missions.items()):
            if any(job.mission == id for job in self.jobs.values()):
                continue
            ends = [job.finished_at for job in self.gone.values() if job.mission == id]
            if max(ends, default=mission.made_at) + self.limits.mission_kept_ms <= self.now:
                del self.missions[id]
        for job in self.gone.values():
            if job.mission and self.mission_is_gone(job.mission):
                job.mission = None  # whoever names it anew begins from zero

    def _known(self, key: str | None) -> tuple[str, str] | None:
        """8: a key is held while its job lives, then for its time after the job's end."""
        if key is None or key not in self.keys:
            return None
        job = self.jobs[self.keys[key][0]]  # it is kept for as long
        held = not job.finished or self.now < job.finished_at + self.limits.key_ttl_ms
        return self.keys[key] if held else None

    def _make(self, one: Submit) -> None:
        start = max(one.not_before, self.now + one.delay_ms)
        waits = start > self.now
        self._submits += not self.tied
        self.jobs[one.job_id] = JobModel(
            one.job_id,
            one.kind,
            one.source,
            one.priority,
            one.needs,
            one.params,
            one.timeout_ms,
            self.limits.max_retries if one.max_retries is None else one.max_retries,
            one.backoff,
            one.at_most_once,
            Place(start, self.starts, None if waits else self._submits),
            expires_at=self.now + one.expires_in_ms if one.expires_in_ms else 0,
            ttl_ms=0 if one.expires_in_ms else self.limits.item_ttl_ms,
            pending_since=start,
            not_before=start if waits else 0,
            waiting=waits,
            delay=one.delay_ms if waits and start == self.now + one.delay_ms else 0,
        )
        self.jobs[one.job_id].began_at = self.now
        self.jobs[one.job_id].mission, self.jobs[one.job_id].keyed = one.mission_id, one.key is not None
        self._happens(self.jobs[one.job_id], "submitted")

    def together(self, all_or_none: Together, outcome: Any) -> Any:
        """All, or the first refusal and nothing."""
        trial = self.copy()
        answers = [None] * len(all_or_none) if isinstance(outcome, BaseException) else outcome
        expected = tuple(
            DO[type(one)](trial, one, answer) for one, answer in zip(all_or_none.commands, answers, strict=True)
        )
        self.__dict__.update(trial.__dict__)
        return expected

    # 3, 6, 9: pulling

    def pull(self, one: Pull, outcome: Pulled) -> tuple[Any, ...]:
        again = self.pulls.get(one.node_id, OrderedDict()).get(one.pull_id or "")
        if again is not None:
            return self._again(again)
        stop = self.node_stop(one.node_id)
        if stop is not None:
            return "pulled", (), stop
        if self._all_paused(one):
            return "pulled", (), "paused"
        free = self.limits.max_inflight - self.count("running")
        if free <= 0:
            return "pulled", (), "inflight_limit"
        may = {job.id: job for job in self.takeable(one)}
        most = min(one.limit, free, self.node_room(one.node_id))
        must = self._at_most(job for job in may.values() if self.has_to_be_seen(job))
        given = tuple((job.id, job.lease_id or "") for job in outcome.jobs)
        least = min(most, must, 1) if self.dealt else min(most, must)
        if not least <= len(given) <= min(most, self._at_most(may.values())):
            raise Divergence(
                f"{one} got {len(given)} jobs where {least} to {len(may)} are there for it, {most} at most"
            )
        if not given:
            return "pulled", (), self._why_none(one, outcome.reason)
        levels = self._levels_of(may.values())
        for job_id, lease in given:
            self._lease(one, may, levels, job_id, lease)
        if one.pull_id is not None:
            remembered = self.pulls.setdefault(one.node_id, OrderedDict())
            remembered[one.pull_id] = given
            if len(remembered) > REMEMBERED:
                remembered.popitem(last=False)
        return "pulled", given, None

    def node_stop(self, node_id: str) -> str | None:
        """9: why this node gets nothing."""
        node, state = self.nodes.get(node_id), self.state(node_id)
        if state != "ONLINE":
            return f"node_{state.lower()}"
        if node is not None and node.draining:
            return "node_draining"
        if node is not None and node.busy:
            return "node_busy"
        return None if self.node_room(node_id) > 0 else "node_full"

    def node_room(self, node_id: str) -> int:
        """9: how many more leases it may have."""
        node = self.nodes.get(node_id)
        most = node.max_concurrent if node is not None and node.max_concurrent is not None else None
        if most is None:
            most = self.limits.max_leases_per_node or 10**9
        return most - sum(job.status == "running" and job.node == node_id for job in self.jobs.values())

    def source_room(self, source: str) -> int:
        """10: how many more of its jobs may run."""
        rate = self.rate(source)
        if rate is None or not rate.concurrent:
            return 10**9
        return rate.concurrent - sum(job.status == "running" and job.source == source for job in self.jobs.values())

    def _at_most(self, jobs: Iterable[JobModel]) -> int:
        """How many of these may run at once more."""
        of: dict[str, int] = {}
        for job in jobs:
            of[job.source] = of.get(job.source, 0) + 1
        return sum(min(n, self.source_room(source)) for source, n in of.items())

    def paused(self, kind: str, *, seen: bool = True) -> bool:
        """Whether jobs of this kind are paused; `seen`: as of now, else until somebody has seen that it is over."""
        return any(one.kind in (None, kind) and (not seen or one.holds(self.now)) for one in self.pauses)

    def _all_paused(self, one: Pull) -> bool:
        holding = [pause.kind for pause in self.pauses if pause.holds(self.now)]
        return None in holding or (bool(one.kinds) and one.kinds <= set(holding))

    def _why_none(self, one: Pull, reason: str | None) -> str:
        """What is there but may not be handed out gives the reason; what has expired unseen may be overlooked."""
        there = list(self._suiting(one))
        throttled = [job for job in there if self.source_room(job.source) <= 0]
        paused = [job for job in there if self.paused(job.kind)]
        may: set[str] = set()
        if throttled or any(
            self.source_room(source) <= 0 or not self.alone for source in (*self.rates, *self.limits.rates)
        ):
            may.add("throttled")  # the hub may not know yet that nothing is left of what it leaves out
        if paused:
            may.add("paused")
        if not any(map(self.has_to_be_seen, [*throttled, *paused])):
            may |= {"no_job", "paused"} if any(pause.holds(self.now) for pause in self.pauses) else {"no_job"}
        if any(map(self.has_to_be_seen, throttled)):
            may = {"throttled"}
        return reason if reason in may else str(sorted(may))

    def _again(self, leases: tuple[tuple[str, str], ...]) -> tuple[Any, ...]:
        """3: the same pull_id gives the same leases while they live."""
        live = [(id, lease) for id, lease in leases if id in self.jobs and self.holds(self.jobs[id], lease)]
        for job_id, _ in live:
            self.jobs[job_id].sending += 1
            self.touched.add(job_id)
        return "pulled", tuple(live), None if live else "pull_spent"

    def _lease(
        self, one: Pull, may: dict[str, JobModel], levels: dict[tuple[Any, ...], int], job_id: str, lease: str
    ) -> None:
        if job_id not in may:
            raise Divergence(f"{one} got {job_id}, which is not there for it: {self.jobs.get(job_id)}")
        job = may.pop(job_id)
        first = next((other for other in may.values() if self.goes_before(other, job, levels)), None)
        if first is not None:
            raise Divergence(f"{one} got\n  {job}\nbefore\n  {first}")
        if lease in self.leases:
            raise Divergence(f"lease {lease} was given twice")  # 1
        self.leases.add(lease)
        job.status, job.attempt, job.node, job.lease = "running", job.attempt + 1, one.node_id, lease
        job.lease_ms, job.lease_until = self.limits.lease_ms, self.now + self.limits.lease_ms
        job.started_at, job.sending, job.not_before = self.now, 1, 0
        self._happens(job, "leased")

    def takeable(self, one: Pull) -> Iterator[JobModel]:
        """The jobs that may go to this pull."""
        return (job for job in self._suiting(one) if not self.paused(job.kind) and self.source_room(job.source) > 0)

    def _suiting(self, one: Pull) -> Iterator[JobModel]:
        node = self.nodes.get(one.node_id)
        has = set(node.capabilities if node else ()) if one.capabilities is None else one.capabilities
        for job in self.jobs.values():
            if (
                job.status == "pending"
                and not job.waiting
                and (not one.kinds or job.kind in one.kinds)
                and has.issuperset(job.needs)
            ):
                yield job

    def has_to_be_seen(self, job: JobModel) -> bool:
        """Not if its time has run out, but nobody has looked at it since: then it may still be given away."""
        return not 0 < job.expires <= self.now and job.id not in (self.fresh or ())

    def goes_before(self, a: JobModel, b: JobModel, levels: dict[tuple[Any, ...], int]) -> bool:
        """6: whether `a` has to be served before `b`: by level, then (among a source's own) by age.

        In one transaction with others a job may be served by what was known before it; then only lanes keep order.
        """
        if not self.has_to_be_seen(a) or self.source_room(a.source) <= 0:
            return False
        if levels[a.lane] != levels[b.lane]:
            return levels[a.lane] < levels[b.lane] and (self.alone or a.lane not in self._levels)
        same = a.source == b.source if self.alone else a.lane == b.lane
        return same and a.place.before(b.place)

    def level(self, job: JobModel) -> int:
        """6: a waiting job rises with age, up to HIGH."""
        age = self.limits.age_ms
        if job.priority <= 1 or not age:
            return job.priority
        return max(1, job.priority - max(0, self.now - job.place.at) // age)

    def _levels_of(self, jobs: Iterable[JobModel]) -> dict[tuple[Any, ...], int]:
        """The level of each lane: that of its oldest job, also for the others that the same transaction takes."""
        levels: dict[tuple[Any, ...], int] = {}
        for job in jobs:
            levels[job.lane] = min(self.level(job), levels.get(job.lane, 9), self._levels.get(job.lane, 9))
        return levels

    def begin(self, *, alone: bool) -> None:
        """A transaction begins: the directory shows the levels as they are now. `alone`: it has one pull at most."""
        self.alone = alone
        self._levels = (
            {}
            if alone
            else self._levels_of(job for job in self.jobs.values() if job.status == "pending" and not job.waiting)
        )

    def holds(self, job: JobModel, lease: str) -> bool:
        return job.status == "running" and job.lease == lease

    # 1-5, 14: what the holder of a lease says

    def finish(self, one: Finish, outcome: Any) -> tuple[Any, ...]:
        job = self._job(one.job_id)
        lease = one.lease_id
        if lease is None:  # the fleet's old way: the current lease, whose holder must be the node that is named
            if one.node_id is not None and job.node not in (None, one.node_id):
                raise No("not_holder")
            lease = job.lease
        said = (one.ok, one.result, one.error)
        if lease is not None and lease in job.ended:  # 3
            if job.ended[lease].said == ("released",):
                raise No("lease_superseded")
            if job.ended[lease].said != said:
                raise No("result_conflict")
            return self._finished(job.id, job.ended[lease], outcome)
        try:
            self._fence(job, lease)
        except No:
            self._evidence(job, lease, said)
            raise
        late = job.status == "pending"  # 2
        self._take_result(job, one, late)
        ended = Ended(said, job.status, late, self._delay(job, outcome))
        self._end_lease(job, lease or "", ended)
        return self._finished(job.id, ended, outcome)

    def _evidence(self, job: JobModel, lease: str | None, said: tuple[Any, ...]) -> None:
        """2: what a superseded lease of this job's says is kept, once."""
        if lease is None or lease in job.late or not (job.lease == lease or job.outcomes.get(lease) in BY_HUB):
            return
        job.late[lease] = said
        self._happens(job, "superseded")

    def _take_result(self, job: JobModel, one: Finish, late: bool) -> None:
        if one.ok:
            job.result, job.error = one.result, b"null"
            self._end(job, "completed", "completed")
            for _ in job.evidence():
                self._happens(job, "judged")
        elif late and one.retry:  # the hub has charged this delivery already
            job.error = one.error
            self._happens(job, "late_failure")
        else:
            if not late:
                job.outcomes[job.lease or ""] = "cancelled" if job.cancel_at else "failed"
            self._fail(job, one.error, one.retry, one.retry_after_ms)

    def _delay(self, job: JobModel, outcome: Any) -> Any:
        """How long until it may start again, as answered if that is possible: jitter decides inside of the span."""
        if job.status != "pending":
            return 0
        if isinstance(job.not_before, int):
            return max(0, job.not_before - self.now)
        told_ms = getattr(outcome, "retry_in_ms", -1)
        if not job.not_before[0] <= self.now + told_ms <= job.not_before[1]:
            return job.not_before
        self.settle(job, self.now + told_ms)
        return told_ms

    def settle(self, job: JobModel, not_before: int) -> None:
        """Jitter has decided when the job may start again."""
        job.not_before = job.pending_since = not_before
        job.delay = not_before - self.now
        job.place = Place(not_before, self.starts, None)

    def _finished(self, job_id: str, ended: Ended, outcome: Any) -> tuple[Any, ...]:
        return "ended", job_id, ended.status, ended.late, ended.delay

    def _fence(self, job: JobModel, lease: str | None) -> None:
        """1, 2: only the last lease of an unfinished job may say anything."""
        if lease is None:
            raise No("not_leased")
        if job.finished or job.lease != lease:
            raise No("lease_superseded")

    def _end_lease(self, job: JobModel, lease: str, ended: Ended) -> None:
        job.ended[lease] = ended
        self.touched.add(job.id)
        if len(job.ended) > REMEMBERED:
            job.ended.popitem(last=False)

    def extend(self, one: Extend, outcome: Any) -> tuple[Any, ...]:
        job = self._job(one.job_id)
        self._fence(job, one.lease_id)
        if job.status != "running":
            raise No("lease_expired")
        job.lease_ms = min(one.lease_ms or self.limits.lease_ms, 86_400_000)
        job.lease_until = min(self.now + job.lease_ms, job.times_out_at)
        self.touched.add(job.id)
        return "extended", job.id, max(0, job.ends_at - self.now), bool(job.cancel_at)

    def release(self, one: Release, outcome: Any) -> tuple[Any, ...]:
        job = self._job(one.job_id)
        ended = job.ended.get(one.lease_id)
        if ended is not None:
            if ended.said != ("released",):
                raise No("result_conflict")
            return "ended", job.id, ended.status, False, 0
        self._fence(job, one.lease_id)
        if one.undelivered and job.sending > 1:  # 11: another answer may have arrived
            raise No("lease_superseded")
        if job.status == "running" and one.undelivered:
            job.uncounted += 1
        elif job.status == "running":
            job.outcomes[one.lease_id] = "cancelled" if job.cancel_at else "released"
        if job.status == "running" and job.cancel_at:
            self._end(job, "cancelled", "cancelled", "CANCELLED")
        elif job.status == "running" and self._delivered_out(job):
            job.error = None
            self._end(job, "failed", "failed", "RETRIES_EXHAUSTED")
        elif job.status == "running":  # 4: costs nothing
            job.status, job.lease, job.pending_since = "pending", None, self.now
            self._happens(job, "released")
        self._end_lease(job, one.lease_id, Ended(("released",), job.status))
        return "ended", job.id, job.status, False, 0

    def undelivered(self, job_id: str, lease: str) -> None:
        """11: an answer with this lease could not be written; whether it goes back is nobody's business."""
        with suppress(No):
            self.release(Release(job_id, lease, undelivered=True), None)

    def cancel(self, one: Cancel, outcome: Any) -> tuple[Any, ...]:
        job = self._job(one.job_id)
        if job.status == "pending":
            self._end(job, "cancelled", "cancelled", "CANCELLED")
        elif job.status == "running" and not job.cancel_at:
            job.cancel_at = self.now + self.limits.cancel_grace_ms
            node = self.nodes.get(job.node or "")
            if node is not None:
                node.told = (*node.told, job.id)
            self._happens(job, "cancel_requested")
        elif job.status in ("completed", "failed"):
            raise No("already_finished")
        return "cancelled", job.id, job.status, job.status == "running"

    def redrive(self, one: Redrive, outcome: Any) -> tuple[Any, ...]:
        """8: what failed or was cancelled gets another life, at the end of the line, with new budgets."""
        job = self._job(one.job_id)
        if job.status in ("pending", "running"):
            return "redriven", job.id, job.status, job.redrives, False
        if job.status == "completed":
            raise No("not_failed")
        start = self.now + one.delay_ms
        if job.expires_at:
            job.expires_at = start + job.expires_at - job.began_at
        self._submits += not self.tied
        job.status, job.waiting, job.not_before = "pending", one.delay_ms > 0, start if one.delay_ms else 0
        job.place = Place(start, self.starts, None if one.delay_ms else self._submits)
        job.delay, job.pending_since, job.began_at = one.delay_ms, start, start
        job.failures = job.losses = job.finished_at = job.cancel_at = 0
        job.lost_on, job.lease, job.reason, job.result = (), None, None, b"null"
        job.redrives, job.uncounted = job.redrives + 1, job.attempt
        self._happens(job, "redriven")
        return "redriven", job.id, "pending", job.redrives, True

    def _job(self, job_id: str) -> JobModel:
        if job_id not in self.jobs:
            raise No("job_not_found")
        return self.jobs[job_id]

    # 4, 5: the two budgets

    def _fail(self, job: JobModel, error: bytes | None, retry: bool = True, after_ms: int | None = None) -> None:
        job.failures += 1
        job.error = error
        if job.cancel_at:
            return self._end(job, "cancelled", "cancelled", "CANCELLED")
        if not retry or job.at_most_once:
            return self._end(job, "failed", "failed", "NOT_RETRYABLE")
        if job.failures > job.max_retries or self._delivered_out(job):
            return self._end(job, "failed", "failed", "RETRIES_EXHAUSTED")
        if after_ms is None:
            n, base = job.failures - 1, self.limits.backoff_base_ms
            delay = min(base * 2**n if job.backoff == "exponential" else base * (n + 1), self.limits.backoff_cap_ms)
            return self._back(job, "retry", (delay - delay // 2, delay))
        return self._back(job, "retry", (after_ms, after_ms))

    def _lose(self, job: JobModel) -> None:
        job.losses += 1
        job.outcomes[job.lease or ""] = "lost"
        if job.node and job.node not in job.lost_on:
            job.lost_on = (*job.lost_on, job.node)
        if job.cancel_at:
            return self._end(job, "cancelled", "cancelled", "CANCELLED")
        if job.at_most_once or job.losses >= self.limits.max_losses:
            job.error = None
            return self._end(job, "failed", "failed", "LOST" if job.at_most_once else "POISON")
        if self._delivered_out(job):
            job.error = None
            return self._end(job, "failed", "failed", "RETRIES_EXHAUSTED")
        delay = self.limits.loss_delay_ms
        return self._back(job, "lost", (delay, delay))

    def _delivered_out(self, job: JobModel) -> bool:
        """4: nothing is handed out for ever; what never left the hub does not count."""
        return job.attempt - job.uncounted >= self.limits.max_deliveries

    def _back(self, job: JobModel, happened: str, delay: Span) -> None:
        """Back in line, behind all that came before it may start again."""
        first, last = self.now + delay[0], self.now + delay[1]
        job.status, job.waiting = "pending", last > self.now
        job.not_before = first if first == last else (first, last)
        job.place, job.pending_since = Place(first, self.starts, None), first
        job.delay = delay[0]
        self._happens(job, happened)

    def _end(self, job: JobModel, status: str, happened: str, reason: str | None = None) -> None:
        job.status, job.reason, job.finished_at, job.cancel_at = status, reason, self.now, 0
        self._happens(job, happened)

    def _happens(self, job: JobModel, what: str) -> None:
        job.happened.append(what)
        self.touched.add(job.id)
        if self.fresh is not None and job.status == "pending":
            self.fresh.add(job.id)

    # 12, 13: nodes

    def beat(self, one: Beat, outcome: Any) -> tuple[Any, ...]:
        is_new = one.node_id not in self.nodes
        node = self.nodes.setdefault(one.node_id, NodeModel(one.node_id, self.now))
        if None not in (one.boot_id, node.boot) and one.boot_id != node.boot:  # 13
            node.booted, node.booted_at = True, self.now
        node.boot = one.boot_id or node.boot
        node.last_seen, node.state, node.busy = self.now, "ONLINE", one.status == "busy"
        if one.max_concurrent is not None:
            node.max_concurrent = one.max_concurrent
        if one.capabilities is not None:
            node.capabilities = one.capabilities
        stop = [self.jobs[id] for id in (self.jobs if is_new else node.told) if id in self.jobs]
        node.told = tuple(job.id for job in stop if job.status == "running" and job.cancel_at and job.node == node.id)
        return "beaten", "ONLINE", node.told  # 14

    def forget(self, one: Forget, outcome: Any) -> None:
        if one.node_id not in self.nodes:
            raise No("node_not_found")
        holds = any(job.status == "running" and job.node == one.node_id for job in self.jobs.values())
        if self.state(one.node_id) != "DEAD" and (holds or not self.nodes[one.node_id].draining):
            raise No("node_alive")
        del self.nodes[one.node_id]
        self.pulls.pop(one.node_id, None)

    def drain(self, one: Drain, outcome: Any) -> Any:
        """It gets nothing more; at the deadline it gives back what it holds."""
        if one.node_id not in self.nodes:
            raise No("node_not_found")
        node = self.nodes[one.node_id]
        node.draining, node.drain_until = True, 0 if one.in_ms is None else self.now + one.in_ms
        return "node", node.id, True

    def resume_node(self, one: Resume, outcome: Any) -> Any:
        if one.node_id not in self.nodes:
            raise No("node_not_found")
        node = self.nodes[one.node_id]
        node.draining, node.drain_until = False, 0
        return "node", node.id, False

    def pause(self, one: PauseKind, outcome: Any) -> Any:
        """Submitting goes on; nothing of the kind is handed out. A kind has one pause at a time."""
        until = self.now + one.for_ms if one.for_ms else one.until
        self.pauses = [*(p for p in self.pauses if p.holds(self.now) and p.kind != one.kind), Pause(one.kind, until)]
        return self._paused()

    def resume(self, one: ResumeKind, outcome: Any) -> Any:
        """All that stays paused."""
        left = (p for p in self.pauses if p.holds(self.now) and p.kind != one.kind)
        self.pauses = [] if one.kind is None else list(left)
        return self._paused()

    def _paused(self) -> Any:
        return "paused", tuple((pause.kind, pause.until) for pause in self.pauses)

    def state(self, node_id: str) -> str:
        """ONLINE up to the TTL, STALE up to the dead limit, DEAD; one that was never heard of may pull."""
        node = self.nodes.get(node_id)
        if node is None:
            return "ONLINE"
        silent = self.now - node.last_seen
        grace = min(self.limits.node_dead_ms, self.limits.restart_grace_ms)
        long = silent > self.limits.node_dead_ms and self.now > self.started_at + grace
        if node.state == "DEAD" or long:
            return "DEAD"
        return "STALE" if node.state == "STALE" or silent > self.limits.node_ttl_ms else "ONLINE"

    # What time does, once somebody looks

    def sweep(self) -> None:
        """Leases, timeouts, waiting and expiry that are over now; nodes that have fallen silent."""
        self._clamp_delays()
        self.pauses = [pause for pause in self.pauses if pause.holds(self.now)]
        for job in list(self.jobs.values()):
            if job.status == "running":
                self._sweep_running(job)
            elif job.status == "pending":
                self._sweep_pending(job)
        for node in self.nodes.values():
            before, node.state = node.state, self.state(node.id)
            if node.state == "DEAD" != before:
                self._reap(node)
            if node.booted:
                self._reap(node, node.booted_at)
                node.booted = False
            if 0 < node.drain_until <= self.now:
                node.drain_until = 0
                for job in self._held_by(node):
                    self.release(Release(job.id, job.lease or ""), None)

    def _reap(self, node: NodeModel, before: int | None = None) -> None:
        """4, 13: the leases of a dead node are lost, and those that a node had before it was started anew."""
        for job in self._held_by(node):
            if before is None or job.started_at < before:
                self._lose(job)

    def _held_by(self, node: NodeModel) -> list[JobModel]:
        return [job for job in self.jobs.values() if job.status == "running" and job.node == node.id]

    def _sweep_running(self, job: JobModel) -> None:
        grace = min(job.lease_ms, self.limits.restart_grace_ms)  # 12
        if max(job.ends_at, self.started_at + grace) > self.now:
            return
        if job.cancel_at and job.cancel_at <= self.now:
            job.outcomes[job.lease or ""] = "cancelled"
            self._end(job, "cancelled", "cancelled", "CANCELLED")  # 14
        elif job.times_out_at <= min(self.now, job.lease_until):
            job.outcomes[job.lease or ""] = "timeout"
            self._fail(job, None)  # 5: on a tie it is a failure
        else:
            self._lose(job)

    def _sweep_pending(self, job: JobModel) -> None:
        if 0 < job.expires <= self.now:
            job.error = None
            self._end(job, "failed", "failed", "EXPIRED")
        elif job.waiting and not isinstance(job.not_before, tuple) and job.not_before <= self.now:
            job.waiting = False
            self.touched.add(job.id)

    def _clamp_delays(self) -> None:
        """12: the first look after a start: no delay lasts longer than its whole time, if the clock has gone back."""
        if self._delays_clamped:
            return
        self._delays_clamped = True
        for job in self.jobs.values():
            if job.status != "pending" or not job.waiting or isinstance(job.not_before, tuple):
                continue
            if 0 < job.delay < job.not_before - self.now:
                at = self.now + job.delay
                job.not_before, job.pending_since, job.place = at, at, Place(at, self.starts, None)
                self.touched.add(job.id)

    def restart(self, now: int) -> None:
        """12: a hub starts on what was stored; its wall clock may have gone back."""
        self.now = self.started_at = now
        self.starts += 1
        self._delays_clamped = False
        for job in self.jobs.values():
            if job.status == "running" and job.lease_until > now + job.lease_ms:
                job.lease_until, job.started_at = now + job.lease_ms, min(job.started_at, now)
                self.touched.add(job.id)
        for node in self.nodes.values():
            node.last_seen, node.booted_at = min(node.last_seen, now), min(node.booted_at, now)

    def deadlines(self) -> list[int]:
        """The moments at which something becomes due, soonest first: where mistakes are made."""
        found = set()
        for job in self.jobs.values():
            if job.status == "running":
                found |= {job.lease_until, job.times_out_at, job.cancel_at}
            elif job.status == "pending":
                found |= {job.expires, *([job.not_before] if isinstance(job.not_before, int) else job.not_before)}
            else:
                found |= {job.finished_at + self.limits.key_ttl_ms, job.finished_at + self.kept_ms(job)}
        found |= {pause.until for pause in self.pauses}
        for node in self.nodes.values():
            found |= {node.drain_until} if node.drain_until else set()
            found |= {node.last_seen + self.limits.node_ttl_ms, node.last_seen + self.limits.node_dead_ms}
        return sorted(at for at in found if at >= self.now)


DO: dict[type, Any] = {
    Submit: Model.submit,
    Together: Model.together,
    Pull: Model.pull,
    Finish: Model.finish,
    Extend: Model.extend,
    Release: Model.release,
    Cancel: Model.cancel,
    Beat: Model.beat,
    Forget: Model.forget,
    Drain: Model.drain,
    Resume: Model.resume_node,
    PauseKind: Model.pause,
    ResumeKind: Model.resume,
    Redrive: Model.redrive,
    RedriveMember: Model.redrive_member,
    SetRate: Model.set_rate,
    DropRate: Model.drop_rate,
    MakeMission: Model.make_mission,
}
"""What the model does with each command; a new command has its line here."""


def told(outcome: Any) -> Any:
    """An outcome of the engine in the model's words."""
    if isinstance(outcome, Refused):
        return str(outcome.code)
    if isinstance(outcome, tuple):
        return tuple(map(told, outcome))
    return TELL.get(type(outcome).__name__, lambda other: other)(outcome)


TELL: dict[str, Any] = {
    "Submitted": lambda it: ("submitted", it.job.id, it.dedup, it.job.status),
    "Pulled": lambda it: ("pulled", tuple((job.id, job.lease_id) for job in it.jobs), it.reason),
    "Finished": lambda it: ("ended", it.job_id, it.status, it.late, it.retry_in_ms),
    "Extended": lambda it: ("extended", it.job_id, it.lease_ms, it.cancel_requested),
    "Cancelled": lambda it: ("cancelled", it.job_id, it.status, it.cancel_requested),
    "Pauses": lambda it: ("paused", tuple((pause.kind, pause.until) for pause in it.pauses)),
    "Redriven": lambda it: ("redriven", it.job_id, it.status, it.redrives, it.changed),
    "Limited": lambda it: ("limited", it.source, it.rate),
    "Made": lambda it: ("mission", it.mission_id, told(it.jobs)),
    "Node": lambda it: ("node", it.id, it.draining),
    "Beaten": lambda it: ("beaten", it.node.state, it.cancel),
}
