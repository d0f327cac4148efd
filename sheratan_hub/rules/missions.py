"""Missions: a title over jobs that are submitted together as a graph (design rule 7), and what their counts tell.

A mission's row is written once and touched by none of its jobs: how many of these are in which state is counted in
facets `m:MISSION:STATUS`, by the view, for every job that carries a `mission_id`. So an id that was only ever given to
single jobs has counts as well. Pruned jobs stay counted, and are counted as such (`m:MISSION:pruned`), until the last
of them is gone and the mission's own time is over: see `rules/mission_prune.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, get_args

import msgspec

from sheratan_hub.canonical import Raw, canonical
from sheratan_hub.rules.command import Code, Decision, Event, Need, Refused, Scene
from sheratan_hub.rules.edges import resuming
from sheratan_hub.rules.graph import Graph
from sheratan_hub.rules.jobs import Status, job_key, job_of
from sheratan_hub.rules.redrive import redriven, redriven_event
from sheratan_hub.rules.submit import Submitted, key_hint, key_id
from sheratan_hub.rules.view import View, in_mission, pruned_of
from sheratan_hub.storage import Key, Row, Wants

STATUSES: tuple[str, ...] = get_args(Status)

STATES = ("pending", "running", "held", "completed", "failed", "cancelled")
"""What a mission may be, as its counts tell."""


class Mission(msgspec.Struct, frozen=True, omit_defaults=True):
    """A mission's document; `metadata` is the JSON text of an object.

    `key` is the row id of its idempotency key; `last_end` the last end (ms) among its jobs that are gone; `over`: none
    is left.
    """

    id: str
    title: str
    created_at: int
    metadata: Raw = Raw(b"{}")
    key: str | None = None
    last_end: int = 0
    over: bool = False

    @property
    def row(self) -> Row:
        """The row it is kept as."""
        agenda = "prune.mission" if self.over else None
        return Row("mission", self.id, _encode(self), agenda=agenda, due_at=self.over_at if self.over else 0)

    @property
    def over_at(self) -> int:
        """From when on its time is counted once no job is left: the end of the last, or its own making."""
        return self.last_end or self.created_at

    def with_(self, **changes: Any) -> Mission:
        """This mission with fields changed."""
        return msgspec.structs.replace(self, **changes)


class MissionKey(msgspec.Struct, frozen=True, array_like=True):
    """What an idempotency key of a mission is bound to: the mission, a digest of what it came with, its jobs."""

    mission_id: str
    payload_sha256: str
    job_ids: tuple[str, ...]


class Made(msgspec.Struct, frozen=True, gc=False):
    """The mission that a request made, or that its key already named (`dedup`), and one outcome a job."""

    mission_id: str
    jobs: tuple[Submitted | Refused, ...]
    dedup: bool = False


class MakeMission(msgspec.Struct, frozen=True, gc=False):
    """Make a mission with all its jobs, or nothing; or find the one that the idempotency key already names."""

    mission: Mission
    graph: Graph
    key: str | None = None
    payload_sha256: str = ""

    def __len__(self) -> int:
        """What it counts for in a batch of the committer."""
        return len(self.graph)

    def wants(self, scene: Scene) -> Wants:
        """All that the jobs want, and the key's row."""
        wants = self.graph.wants(scene)
        if self.key is not None:
            wants.keys.add(_key_of(self.key))
        return wants

    def decide(self, view: View) -> Decision:
        """Refused as the first job is that cannot be made, and with `idempotency_key_collision`."""
        held = view.row(*_key_of(self.key)) if self.key is not None else None
        if held is not None and self.key is not None and _lasts(view, known := _decode_key(held.doc)):
            return self._again(view, known, self.key)
        made = self.graph.decide(view)
        mission = self.mission.with_(key=None if self.key is None else key_id(self.key), over=not made.answer)
        new, put = (mission.row, *made.new), made.put
        if self.key is not None:
            ids = tuple(one.job.id for one in made.answer)
            doc = MissionKey(self.mission.id, self.payload_sha256, ids)
            row = Row("mission_key", key_id(self.key), _encode(doc))
            new, put = (new, (*put, row)) if held is not None else ((*new, row), put)
        meta = {"mission_id": self.mission.id, "jobs": len(made.answer)}
        event = Event(view.now, "mission.submitted", "client", meta=meta)
        answer = Made(self.mission.id, made.answer)
        return Decision(answer, new=new, put=put, events=(event, *made.events), notes=made.notes)

    def _again(self, view: View, doc: MissionKey, key: str) -> Decision:
        if doc.payload_sha256 != self.payload_sha256:
            raise Refused(
                Code.IDEMPOTENCY_KEY_COLLISION,
                f"this idempotency key already belongs to mission {doc.mission_id}, which has another payload",
                detail={"key": key_hint(key)},
            )
        rows = [(id, view.look("job", id)) for id in doc.job_ids]
        jobs = tuple(Submitted(job_of(row), dedup=True) if row is not None else _pruned(id) for id, row in rows)
        note = Event(view.now, "key.hit", "client", meta={"key": key_hint(key)})
        return Decision(Made(doc.mission_id, jobs, dedup=True), notes=(note,))


def _lasts(view: View, doc: MissionKey) -> bool:
    """Whether the key still names its mission: until the last job's end, and for the key's time after it (rule 8).

    The mission tells of the jobs that are gone when the last had ended.
    """
    wanted = {mission_key(doc.mission_id), *(job_key(id) for id in doc.job_ids)}
    missing = {key for key in wanted if not view.has(key.kind, key.id)}
    if missing:
        raise Need(Wants(look=missing))
    jobs = [job_of(row) for id in doc.job_ids if (row := view.look("job", id)) is not None]
    row = view.look("mission", doc.mission_id)
    last_end = mission_of(row).last_end if row is not None else 0
    oldest = view.now - view.scene.limits.key_ttl_ms
    lasts = any(not job.finished or job.finished_at > oldest for job in jobs) or last_end > oldest
    return lasts or (not doc.job_ids and row is not None)


class RedriveMember(msgspec.Struct, frozen=True, gc=False):
    """Redrive a job of a mission if it failed or was cancelled; its own dependents wait for it again."""

    job_id: str

    def wants(self, scene: Scene) -> Wants:
        """The job."""
        return Wants(keys={job_key(self.job_id)})

    def decide(self, view: View) -> Decision:
        """The answer is whether it was redriven. An operator's act: the depth limit does not refuse it."""
        row = view.row("job", self.job_id)
        job = job_of(row) if row is not None else None
        if job is None or job.status not in ("failed", "cancelled"):
            return Decision(False)
        again, new, put = resuming(view, redriven(job, view))
        event = redriven_event(job, again, view.now, "client")
        return Decision(True, new=new, put=(again.row, *put), events=(event,))


class Progress(msgspec.Struct, frozen=True):
    """How far a mission is: its state, jobs by status, jobs in all, and the part that is finished (0 to 1)."""

    status: str
    jobs: int
    counts: dict[str, int]
    progress: float


def facets_of(mission_id: str) -> tuple[str, ...]:
    """Every facet of a mission."""
    return *(in_mission(status, mission_id) for status in STATUSES), pruned_of(mission_id)


def left_of(view: View, mission_id: str) -> int:
    """How many of a mission's jobs are there."""
    *states, pruned = facets_of(mission_id)
    return sum(map(view.count, states)) - view.count(pruned)


def names_mission(row: Row) -> str:
    """The id of the mission that a key's row is bound to."""
    return _decode_key(row.doc).mission_id


def prefix_of(mission_id: str) -> str:
    """What the facets of a mission begin with."""
    return f"m:{mission_id}:"


def progress(mission_id: str, facets: Mapping[str, int]) -> Progress:
    """What the counters tell; those of other missions may be among them (`a` and `a:b` begin alike)."""
    counts = {status: facets.get(prefix_of(mission_id) + status, 0) for status in STATUSES}
    total = sum(counts.values())
    ended = counts["completed"] + counts["failed"] + counts["cancelled"]
    return Progress(_state(counts, total, ended), total, counts, round(ended / total, 4) if total else 0.0)


def _state(counts: Mapping[str, int], total: int, ended: int) -> str:
    if total and ended == total:
        return next(status for status in ("failed", "cancelled", "completed") if counts[status])
    if not ended and not counts["running"] and counts["quarantined"] == 0:
        return "pending"
    return "running" if counts["running"] or counts["pending"] else "held"


def mission_of(row: Row) -> Mission:
    """The mission kept in a row."""
    return _decode(row.doc)


def mission_key(mission_id: str) -> Key:
    """The row key of a mission."""
    return Key("mission", mission_id)


def mission_sha256(body: bytes) -> str:
    """A digest of what a mission was asked for with, without its idempotency key and what traces its jobs."""
    doc: dict[str, Any] = msgspec.json.decode(body)
    doc.pop("idempotency_key", None)
    for job in doc.get("jobs", ()):
        job.pop("traceparent", None)
    return hashlib.sha256(canonical(msgspec.json.encode(doc))).hexdigest()


def _key_of(key: str) -> Key:
    return Key("mission_key", key_id(key))


def _pruned(job_id: str) -> Refused:
    return Refused(Code.JOB_NOT_FOUND, f"job {job_id} was finished and has been pruned")


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Mission).decode
_decode_key = msgspec.json.Decoder(MissionKey).decode
