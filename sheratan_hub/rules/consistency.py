"""What can be wrong in a store as a whole: each contradiction between rows, counters and events that rules can name.

Rows are seen piece by piece, kind by kind, in any size of store: what must be compared is looked up beside a piece
(`beside`), counted, or summed up, so that memory grows with the number of nodes, sources and missions, not of jobs.
Edges and the counts that jobs keep of them are summed up in buckets, and only what is in a bucket that does not come
out even is looked at again (`Recount`).

It is longer than 300 lines because it is one list of contradictions.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from sheratan_hub.rules import stored
from sheratan_hub.rules.command import Event
from sheratan_hub.rules.edges import failed_of
from sheratan_hub.rules.jobs import FINISHED, Job, job_key
from sheratan_hub.rules.missions import STATUSES, Mission, mission_key
from sheratan_hub.rules.policies import START_HASH, Pointer, Snapshot, version_id
from sheratan_hub.rules.stored import as_it_should, child_of_link, ends_of, is_known, name_in
from sheratan_hub.rules.view import facets, in_mission, pruned_of
from sheratan_hub.storage import Key, Row

PROBLEMS = {
    "damaged": "the store's own files contradict themselves, or cannot be read",
    "row_unreadable": "a row's document is none of its kind",
    "row_misnamed": "a row's document names another id",
    "labels_differ": "lists would show a row in the wrong place: its labels do not fit its document",
    "lane_differs": "a job may be claimed that may not, or not, or out of turn: its lane or order does not fit it",
    "agenda_differs": "nobody would look at a row when its time comes: its agenda or time does not fit its document",
    "agenda_without_time": "a row stands on an agenda without a time",
    "job_impossible": "a job's document contradicts itself, such as a running job without a lease",
    "params_lost": "a job's params have a row of their own, which is missing",
    "beside_lost": "a job speaks of attempts or late results, or of a redrive under way, whose row is missing",
    "beside_without_job": "a row that belongs to a job stands alone: params, attempts, late results, a mark, a redrive",
    "beside_unknown": "a row belongs to a job that does not know of it",
    "key_without_job": "an idempotency key names a job that is not there",
    "key_lost": "an unfinished job's idempotency key is missing, or names another job",
    "mission_key_without_mission": "a mission's idempotency key names a mission that is not there",
    "edge_without_parent": "a job waits for one that is not there",
    "edge_unknown": "a job has dependents and does not know of them, so nobody would tell these",
    "edge_untold": "a job's dependents will not be told of its end, or of its redrive",
    "edges_off": "a job's count of what it depends on is not that of its edges",
    "lease_without_job": "more leases are counted for a node or a source than jobs are leased",
    "counts_off": "a counter is not what counting gives",
    "mission_kept": "all jobs of a mission are gone, and it does not know: nobody would forget it",
    "policy_broken": "a policy version does not prove itself, or its predecessor",
    "policy_missing": "the active policy version is not there, or another one than was activated",
    "event_gap": "numbers of events are missing",
    "event_unreadable": "a line of the ledger is no event",
    "registry_differs": "nodes_registry.json tells something else than the store, although that was closed",
}
"""Every code of a problem, and what it means."""

NOTES = {
    "edge_without_child": "a dependent was pruned before what it depended on has ended; its edge goes with that",
    "unknown_kind": "rows of a kind that this version does not know",
    "open_to_others": "others than the owner may read or write a file",
    "registry_differs": "nodes_registry.json is behind, as after a crash; a hub writes it anew",
    "not_all": "not everything was looked at",
}
"""Every code of a note: worth telling, and nothing wrong."""

MISSION = "m:"
"""How the counters of missions begin."""

BUCKETS = 1 << 14
MASK = (1 << 64) - 1


class Problem(NamedTuple):
    """What is wrong, by a code of `PROBLEMS` or `NOTES`; where (a kind and an id, a counter, a file); a sentence."""

    code: str
    place: str
    text: str


Beside = Mapping[Key, Row]


class Consistency:
    """Sees all rows of a store, then its counters and events, and names what does not fit."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.events = 0
        self._counts: Counter[str] = Counter()
        self._sums = Sums()
        self._missions: dict[str, bool] = {}
        self._policy: Snapshot | None = None
        self._versions: dict[int, str] = {}
        self._next_event = 0

    # Rows

    def beside(self, rows: Sequence[Row]) -> set[Key]:
        """The keys of rows that must be seen together with these."""
        keys: set[Key] = set()
        for row in rows:
            doc = _read(row)
            if doc is not None:
                keys.update(_beside(row, doc))
        return keys

    def see(self, rows: Sequence[Row], beside: Beside) -> Iterator[Problem]:
        """What is wrong with these rows, given those of `beside` that exist."""
        for row in rows:
            self.rows[row.kind] += 1
            self._counts.update(facets(row))
            doc = _read(row)
            if doc is None:
                yield _problem("row_unreadable", row, "its document cannot be read")
                continue
            yield from fields(row, doc)
            check = CHECKS.get(row.kind)
            if check is not None:
                yield from check(row, doc, beside)
            self._sums.add(row, doc)
            if isinstance(doc, Mission):
                self._missions[doc.id] = doc.over
            elif row.kind in ("policy", "policy-active"):
                yield from self._chain(row, doc)

    def _chain(self, row: Row, doc: Any) -> Iterator[Problem]:
        """Versions follow each other, and come in their order; the pointer comes last."""
        if isinstance(doc, Snapshot):
            before = self._policy.sha256 if self._policy is not None else START_HASH
            last = self._policy.version if self._policy is not None else 0
            if not doc.proves_itself():
                yield _problem("policy_broken", row, "its hash is not that of what it says")
            elif doc.prev_sha256 != before or doc.version != last + 1:
                yield _problem("policy_broken", row, "it does not follow from the version before")
            self._policy, self._versions[doc.version] = doc, doc.sha256
        elif isinstance(doc, Pointer) and doc.active and self._versions.get(doc.active) != doc.active_sha256:
            yield _problem(
                "policy_missing", row, f"version {doc.active} is active, and is not there as it was activated"
            )

    # Counters and events

    def counted(self, counts: Mapping[str, int]) -> Iterator[Problem]:
        """What is wrong with the counters, and with missions by these, once all rows were seen."""
        rights = self.recounted(counts)
        for facet in sorted(rights.keys() | counts.keys()):
            told, right = counts.get(facet, 0), rights.get(facet, 0)
            if told != right:
                leases = told > right and facet.startswith(("leases:", "running:"))
                code = "lease_without_job" if leases else "counts_off"
                yield Problem(code, facet, f"it is {told}, and should be {right}")
        for id, over in self._missions.items():
            if not over and not self._left_of(id):
                yield Problem(
                    "mission_kept", f"mission {id}", "none of its jobs is left, and it is not said to be over"
                )

    def recounted(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The counters as they should be, given what they are: missions go on counting jobs that were pruned."""
        right = {facet: n for facet, n in self._counts.items() if not facet.startswith(MISSION)}
        for id in {
            facet[len(MISSION) :].rpartition(":")[0] for facet in (*counts, *self._counts) if facet[:2] == MISSION
        }:
            right |= self._mission(id, counts)
        return {facet: n for facet, n in right.items() if n}

    def _mission(self, id: str, counts: Mapping[str, int]) -> dict[str, int]:
        """A mission's counters; none if nothing is left of it (design rule 15)."""
        left = self._left_of(id)
        if not left and id not in self._missions:
            return {}
        right = {facet: self._counts[facet] for facet in _states_of(id)}
        for status in FINISHED:
            facet = in_mission(status, id)
            right[facet] = max(right[facet], counts.get(facet, 0))
        return {**right, pruned_of(id): sum(right.values()) - left}

    def _left_of(self, mission_id: str) -> int:
        """How many of a mission's jobs were seen."""
        return sum(self._counts[facet] for facet in _states_of(mission_id))

    def line(self, first: int, lines: Sequence[bytes]) -> Iterator[Problem]:
        """What is wrong with a batch of events, which come in order."""
        if self._next_event and first != self._next_event:
            lost = f"events {self._next_event} to {first - 1} are missing"
            text = lost if first > self._next_event else f"event {first} comes after event {self._next_event - 1}"
            yield Problem("event_gap", f"event {first}", text)
        for seq, text_of in enumerate(lines, first):
            try:
                _event(text_of)
            except ValueError:
                yield Problem("event_unreadable", f"event {seq}", "its line is no event")
        self._next_event = first + len(lines)
        self.events += len(lines)

    def ended(self, seq: int) -> Iterator[Problem]:
        """Whether the next number follows on the last event."""
        if self._next_event and seq != self._next_event:
            text = f"the last event is {self._next_event - 1}, and the next would get number {seq}"
            yield Problem("event_gap", f"event {seq}", text)

    def recount(self) -> Recount | None:
        """What must see jobs, edges and links once more, None if nothing must."""
        return self._sums.recount()


def _states_of(mission_id: str) -> Iterator[str]:
    return (in_mission(status, mission_id) for status in STATUSES)


def fields(row: Row, doc: Any) -> Iterator[Problem]:
    """What is wrong between a row's document and the fields that the store searches by."""
    if not is_known(row.kind):
        return
    if name_in(row, doc) != row.id:
        yield _problem("row_misnamed", row, f"its document is that of {name_in(row, doc)[:200]}")
        return
    right = as_it_should(row, doc)
    if row.labels != right.labels:
        yield _problem("labels_differ", row, f"its labels are {_told(row.labels)}, and should be {_told(right.labels)}")
    if row.lane != right.lane or (row.lane is not None and row.order != right.order):
        text = f"it stands in lane {row.lane} at {row.order}, and should in {right.lane} at {right.order}"
        yield _problem("lane_differs", row, text)
    if row.agenda is not None and row.due_at <= 0:
        yield _problem("agenda_without_time", row, f"it stands on the agenda {row.agenda} without a time")
    elif row.agenda != right.agenda or (row.agenda is not None and row.due_at != right.due_at):
        text = f"it is due at {row.due_at} for {row.agenda}, and should be at {right.due_at} for {right.agenda}"
        yield _problem("agenda_differs", row, text)


def _told(labels: Iterable[str | None]) -> str:
    return ", ".join("-" if label is None else label for label in labels)


def impossible(job: Job) -> str | None:
    """What a job's document says that cannot be, in a few words."""
    if job.status == "running" and not (job.lease_id and job.node_id and job.lease_until and job.attempt):
        return "it is running without a lease"
    if job.finished != bool(job.finished_at):
        return f"it is {job.status}, and its end {'is not told' if job.finished else 'is'}"
    if job.parents_left < 0 or job.parents_failed < 0 or job.failures < 0 or job.losses < 0:
        return "one of its counts is below 0"
    return None


def holds_key(job: Job) -> bool:
    """Whether an idempotency key must name this job; one that was redriven may have lost its own (rule 8)."""
    return job.key is not None and not job.finished and not job.redrives


# What each kind must have beside it


def _beside(row: Row, doc: Any) -> Iterator[Key]:
    if isinstance(doc, Job):
        yield from (key for key, says in _rows_of(doc) if says)
        if holds_key(doc):
            yield Key("key", doc.key or "")
    elif row.kind in OF_A_JOB:
        yield job_key(row.id)
    elif row.kind == "key":
        yield job_key(doc.job_id)
    elif row.kind == "mission_key":
        yield mission_key(doc.mission_id)
    elif row.kind == "edge":
        parent, child = ends_of(row)
        yield from (job_key(parent), job_key(child))
    elif row.kind == "policy-active" and doc.active:
        yield Key("policy", version_id(doc.active))


OF_A_JOB = ("params", "attempts", "late", "read", "resume")


def _rows_of(job: Job) -> Iterator[tuple[Key, bool]]:
    """The rows that this job may have beside it, by its id, and whether it says that it has."""
    yield Key("params", job.id), job.params_apart
    yield Key("attempts", job.id), job.tried > 0
    yield Key("late", job.id), job.late_results > 0
    yield Key("resume", job.id), job.resuming


def _job(row: Row, job: Job, beside: Beside) -> Iterator[Problem]:
    wrong = impossible(job)
    if wrong is not None:
        yield _problem("job_impossible", row, wrong)
    for key, says in _rows_of(job):
        if says and key not in beside:
            code = "params_lost" if key.kind == "params" else "beside_lost"
            yield _problem(code, row, f"its row of kind {key.kind} is missing")
    if holds_key(job):
        held = beside.get(Key("key", job.key or ""))
        doc = _read(held) if held is not None else None
        if doc is None or doc.job_id != job.id:
            yield _problem("key_lost", row, "its idempotency key is missing, or names another job")


def _of_job(row: Row, doc: Any, beside: Beside) -> Iterator[Problem]:
    found = beside.get(job_key(row.id))
    job = _read(found) if found is not None else None
    if found is None:
        yield _problem("beside_without_job", row, f"there is no job {row.id}")
    elif isinstance(job, Job) and not dict(_rows_of(job)).get(row.key, True):
        yield _problem("beside_unknown", row, f"job {row.id} does not know of it")


def _key(row: Row, doc: Any, beside: Beside) -> Iterator[Problem]:
    if job_key(doc.job_id) not in beside:
        yield _problem("key_without_job", row, f"it names job {doc.job_id[:200]}, which is not there")


def _mission_key(row: Row, doc: Any, beside: Beside) -> Iterator[Problem]:
    if mission_key(doc.mission_id) not in beside:
        text = f"it names mission {doc.mission_id[:200]}, which is not there"
        yield _problem("mission_key_without_mission", row, text)


def _edge(row: Row, doc: Any, beside: Beside) -> Iterator[Problem]:
    parent_id, child_id = ends_of(row)
    found = beside.get(job_key(parent_id))
    parent = _read(found) if found is not None else None
    if found is None:
        yield _problem("edge_without_parent", row, f"job {child_id} depends on job {parent_id}, which is not there")
    elif isinstance(parent, Job):
        if not parent.dependents:
            yield _problem("edge_unknown", row, f"job {parent_id} does not know that job {child_id} depends on it")
        elif untold(row, parent):
            yield _problem(
                "edge_untold", row, f"job {child_id} will not be told that job {parent_id} is {parent.status}"
            )
    if job_key(child_id) not in beside:
        yield _problem("edge_without_child", row, f"job {child_id} is not there any more")


def untold(edge: Row, parent: Job) -> bool:
    """Whether nobody would bring this edge in line with what its parent is."""
    if parent.resuming:
        return False
    failed = edge.agenda == failed_of(parent.id)
    return (not parent.finished and failed) or (parent.finished and not failed and not parent.cascade)


CHECKS: dict[str, Callable[[Row, Any, Beside], Iterator[Problem]]] = {
    "job": _job,
    "key": _key,
    "mission_key": _mission_key,
    "edge": _edge,
    **dict.fromkeys(OF_A_JOB, _of_job),
}


def _problem(code: str, row: Row, text: str) -> Problem:
    return Problem(code, f"{row.kind} {row.id}", text)


def _read(row: Row) -> Any:
    """The document of a row, None if it cannot be read."""
    try:
        return stored.read(row)
    except (ValueError, RecursionError):
        return None


# Edges, and the counts that jobs keep of them


class Owed(NamedTuple):
    """A child's part of a sum: how many it says it waits for, or how many edges it has; and how many of them failed."""

    child: str
    left: int
    failed: int


def owed(row: Row, doc: Any) -> Owed | None:
    """What a row adds to the sum of its child; in all that must come to nothing."""
    if isinstance(doc, Job):
        return Owed(doc.id, doc.parents_left, doc.parents_failed) if doc.parents_left or doc.parents_failed else None
    if row.kind == "edge":
        parent, child = ends_of(row)
        return Owed(child, -1, -(row.agenda == failed_of(parent)))
    return Owed(child_of_link(row), -len(doc), 0) if row.kind == "link" else None


class Sums:
    """The parts of all children, weighed and added up in buckets."""

    def __init__(self) -> None:
        self._left, self._failed = array("Q", bytes(8 * BUCKETS)), array("Q", bytes(8 * BUCKETS))

    def add(self, row: Row, doc: Any) -> None:
        """One row more."""
        part = owed(row, doc)
        if part is not None:
            weight, bucket = weigh(part.child)
            self._left[bucket] = (self._left[bucket] + part.left * weight) & MASK
            self._failed[bucket] = (self._failed[bucket] + part.failed * weight) & MASK

    def recount(self) -> Recount | None:
        """What looks at the children whose buckets do not come out even, None if all do."""
        uneven = {n for n in range(BUCKETS) if self._left[n] or self._failed[n]}
        return Recount(uneven) if uneven else None


class Recount:
    """Adds up, child by child, what is in the buckets that did not come out even."""

    KINDS = ("edge", "link", "job")

    def __init__(self, buckets: set[int]) -> None:
        self._buckets = buckets
        self._left: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._jobs: set[str] = set()

    def see(self, rows: Sequence[Row]) -> None:
        """All rows of `KINDS` once more."""
        for row in rows:
            doc = _read(row)
            part = owed(row, doc) if doc is not None else None
            if part is not None and weigh(part.child)[1] in self._buckets:
                self._left[part.child] += part.left
                self._failed[part.child] += part.failed
            if row.kind == "job" and weigh(row.id)[1] in self._buckets:
                self._jobs.add(row.id)

    def problems(self) -> Iterator[Problem]:
        """What did not come out even. A job that was linked late may have lost a parent: then both differ alike."""
        for child in sorted(self._left):
            left, failed = self._left[child], self._failed[child]
            if child in self._jobs and (left != failed or left < 0):
                text = f"it waits for {left:+d} jobs and knows of {failed:+d} failed ones more than it has edges"
                yield Problem("edges_off", f"job {child}", text)


def weigh(child: str) -> tuple[int, int]:
    """A number that is a child's own, for all that is known, and its bucket."""
    weight = int.from_bytes(hashlib.blake2b(child.encode(), digest_size=8).digest()) | 1
    return weight, weight // 2 % BUCKETS


_event = msgspec.json.Decoder(Event).decode
