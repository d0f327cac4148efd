"""What design.md's "The life of a job" promises, once more, as plainly as it can be said: the machine's oracle.

Written from the text, not from `sheratan_hub/rules`, of which it uses only the commands (as data). No rows, no
lanes, no agendas, no batches: jobs, nodes and keys in dictionaries. `Model.apply` is told a command and what the
engine answered to it; it raises `Divergence` unless the rules allow that answer, and moves on. Numbers in comments
are the rules'. Longer than 300 lines, as it is one description of one thing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sheratan_hub.rules.command import Command, Limits, Refused, Together
from sheratan_hub.rules.finish import Cancel, Extend, Finish, Release
from sheratan_hub.rules.nodes import Beat, Forget
from sheratan_hub.rules.pull import Pull, Pulled
from sheratan_hub.rules.submit import Submit

FINISHED = ("completed", "failed", "cancelled")
REMEMBERED = 8
"""So many ended leases of a job, and pulls of a node, are remembered (docs/protocol.md)."""

LINES = "lanes"
"""Inside what the order of submission is kept: "lanes" (what nobody can tell apart), or "sources" (all of a source's
jobs of one level), which rule 6 asks for and the directory of lanes does not yet keep."""

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
    ended: OrderedDict[str, Ended] = field(default_factory=OrderedDict)
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
        return replace(self, ended=OrderedDict(self.ended), happened=list(self.happened))


@dataclass(slots=True)
class NodeModel:
    """A node: when it was last heard of, and the state that was written down last."""

    id: str
    last_seen: int
    state: str = "ONLINE"
    capabilities: tuple[str, ...] = ()
    told: tuple[str, ...] = ()


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
        self._submits = 0

    def copy(self) -> Model:
        twin = Model(self.limits, self.now)
        twin.started_at, twin.starts, twin._submits = self.started_at, self.starts, self._submits
        twin.jobs = {id: job.copy() for id, job in self.jobs.items()}
        twin.nodes = {id: replace(node) for id, node in self.nodes.items()}
        twin.keys = dict(self.keys)
        twin.pulls = {node: OrderedDict(pulls) for node, pulls in self.pulls.items()}
        twin.tied = self.tied
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
        return {facet: facets.count(facet) for facet in set(facets)}

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
        self._make(one)
        if one.key is not None:
            self.keys[one.key] = (one.job_id, one.payload_sha256)
        return "submitted", one.job_id, False, "pending"

    def _known(self, key: str | None) -> tuple[str, str] | None:
        """8: a key is held while its job lives, then for its time after the job's end."""
        if key is None or key not in self.keys:
            return None
        job = self.jobs[self.keys[key][0]]
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
        )
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
        again = self.pulls.get(one.node_id, {}).get(one.pull_id or "")
        if again is not None:
            return self._again(again)
        state = self.state(one.node_id)
        if state != "ONLINE":
            return "pulled", (), f"node_{state.lower()}"
        free = self.limits.max_inflight - self.count("running")
        if free <= 0:
            return "pulled", (), "inflight_limit"
        may = {job.id: job for job in self.takeable(one)}
        must = sum(self.has_to_be_seen(job) for job in may.values())
        given = tuple((job.id, job.lease_id or "") for job in outcome.jobs)
        most = min(one.limit, free)
        if not min(most, must) <= len(given) <= min(most, len(may)):
            raise Divergence(f"{one} got {len(given)} jobs where {must} to {len(may)} are there for it, {free} free")
        if not given:
            return "pulled", (), "no_job"
        for job_id, lease in given:
            self._lease(one, may, job_id, lease)
        if one.pull_id is not None:
            remembered = self.pulls.setdefault(one.node_id, OrderedDict())
            remembered[one.pull_id] = given
            if len(remembered) > REMEMBERED:
                remembered.popitem(last=False)
        return "pulled", given, None

    def _again(self, leases: tuple[tuple[str, str], ...]) -> tuple[Any, ...]:
        """3: the same pull_id gives the same leases while they live."""
        live = [(id, lease) for id, lease in leases if self.holds(self.jobs[id], lease)]
        for job_id, _ in live:
            self.jobs[job_id].sending += 1
            self.touched.add(job_id)
        return "pulled", tuple(live), None if live else "pull_spent"

    def _lease(self, one: Pull, may: dict[str, JobModel], job_id: str, lease: str) -> None:
        if job_id not in may:
            raise Divergence(f"{one} got {job_id}, which is not there for it: {self.jobs.get(job_id)}")
        job = may.pop(job_id)
        first = next((other for other in may.values() if self.goes_before(other, job, one.limit == 1)), None)
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

    def goes_before(self, a: JobModel, b: JobModel, alone: bool) -> bool:
        """6: whether `a` has to be served before `b`. `alone`: the pull takes one job; else lanes go one by one."""
        if not self.has_to_be_seen(a):
            return False
        if a.priority != b.priority:
            return a.priority < b.priority
        if alone and LINES == "sources":
            return a.source == b.source and a.place.before(b.place)
        return a.lane == b.lane and a.place.before(b.place)

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
        if lease in job.ended:  # 3
            if job.ended[lease].said != said:
                raise No("result_conflict")
            return self._finished(job.id, job.ended[lease], outcome)
        self._fence(job, lease)
        late = job.status == "pending"  # 2
        self._take_result(job, one, late)
        ended = Ended(said, job.status, late, self._delay(job, outcome))
        self._end_lease(job, lease or "", ended)
        return self._finished(job.id, ended, outcome)

    def _take_result(self, job: JobModel, one: Finish, late: bool) -> None:
        if one.ok:
            job.result, job.error = one.result, b"null"
            self._end(job, "completed", "completed")
        elif late and one.retry:  # the hub has charged this delivery already
            job.error = one.error
            self._happens(job, "late_failure")
        else:
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
        job.lease_until = self.now + job.lease_ms
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
        if job.status == "running" and job.cancel_at:
            self._end(job, "cancelled", "cancelled", "CANCELLED")
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
        if job.failures > job.max_retries:
            return self._end(job, "failed", "failed", "RETRIES_EXHAUSTED")
        if after_ms is None:
            n, base = job.failures - 1, self.limits.backoff_base_ms
            delay = min(base * 2**n if job.backoff == "exponential" else base * (n + 1), self.limits.backoff_cap_ms)
            return self._back(job, "retry", (delay - delay // 2, delay))
        return self._back(job, "retry", (after_ms, after_ms))

    def _lose(self, job: JobModel) -> None:
        job.losses += 1
        if job.node and job.node not in job.lost_on:
            job.lost_on = (*job.lost_on, job.node)
        if job.cancel_at:
            return self._end(job, "cancelled", "cancelled", "CANCELLED")
        if job.at_most_once or job.losses >= self.limits.max_losses:
            job.error = None
            return self._end(job, "failed", "failed", "LOST" if job.at_most_once else "POISON")
        delay = self.limits.loss_delay_ms
        return self._back(job, "lost", (delay, delay))

    def _back(self, job: JobModel, happened: str, delay: Span) -> None:
        """Back in line, behind all that came before it may start again."""
        first, last = self.now + delay[0], self.now + delay[1]
        job.status, job.waiting = "pending", last > self.now
        job.not_before = first if first == last else (first, last)
        job.place, job.pending_since = Place(first, self.starts, None), first
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
        node = self.nodes.setdefault(one.node_id, NodeModel(one.node_id, self.now))
        node.last_seen, node.state = self.now, "ONLINE"
        if one.capabilities is not None:
            node.capabilities = one.capabilities
        stop = [self.jobs[id] for id in node.told]
        node.told = tuple(job.id for job in stop if job.status == "running" and job.cancel_at and job.node == node.id)
        return "beaten", "ONLINE", node.told  # 14

    def forget(self, one: Forget, outcome: Any) -> None:
        if one.node_id not in self.nodes:
            raise No("node_not_found")
        if self.state(one.node_id) != "DEAD":
            raise No("node_alive")
        del self.nodes[one.node_id]
        self.pulls.pop(one.node_id, None)

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
        for job in list(self.jobs.values()):
            if job.status == "running":
                self._sweep_running(job)
            elif job.status == "pending":
                self._sweep_pending(job)
        for node in self.nodes.values():
            before, node.state = node.state, self.state(node.id)
            if node.state == "DEAD" != before:
                for job in self.jobs.values():
                    if job.status == "running" and job.node == node.id:
                        self._lose(job)

    def _sweep_running(self, job: JobModel) -> None:
        grace = min(job.lease_ms, self.limits.restart_grace_ms)  # 12
        if max(job.ends_at, self.started_at + grace) > self.now:
            return
        if job.cancel_at and job.cancel_at <= self.now:
            self._end(job, "cancelled", "cancelled", "CANCELLED")  # 14
        elif job.times_out_at <= min(self.now, job.lease_until):
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

    def restart(self, now: int) -> None:
        """12: a hub starts on what was stored; its wall clock may have gone back."""
        self.now = self.started_at = now
        self.starts += 1
        for job in self.jobs.values():
            if job.status == "running" and job.lease_until > now + job.lease_ms:
                job.lease_until, job.started_at = now + job.lease_ms, min(job.started_at, now)
                self.touched.add(job.id)
        for node in self.nodes.values():
            node.last_seen = min(node.last_seen, now)

    def deadlines(self) -> list[int]:
        """The moments at which something becomes due, soonest first: where mistakes are made."""
        found = set()
        for job in self.jobs.values():
            if job.status == "running":
                found |= {job.lease_until, job.times_out_at, job.cancel_at}
            elif job.status == "pending":
                found |= {job.expires, *([job.not_before] if isinstance(job.not_before, int) else job.not_before)}
            else:
                found.add(job.finished_at + self.limits.key_ttl_ms)
        for node in self.nodes.values():
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
    "Beaten": lambda it: ("beaten", it.node.state, it.cancel),
}
