"""How a store is put right after damage: what of its rows can stay, changed as little as can be, and what must go.

`Found` is filled with all rows first; then `mended` gives each row as it is to be. Nothing is made up: a job whose
params are lost goes, one that has lost jobs it depends on is held, and who must be told of something is told again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from sheratan_hub.canonical import payload_sha256
from sheratan_hub.rules import stored
from sheratan_hub.rules.attempts import attempts_of
from sheratan_hub.rules.command import Event
from sheratan_hub.rules.consistency import OF_A_JOB, holds_key, impossible
from sheratan_hub.rules.edges import edge, failed_of
from sheratan_hub.rules.evidence import evidence_of
from sheratan_hub.rules.jobs import Job, job_key
from sheratan_hub.rules.missions import Mission, mission_key
from sheratan_hub.rules.policies import POINTER, START_HASH, Pointer, Snapshot
from sheratan_hub.rules.stored import as_it_should, child_of_link, ends_of, name_in
from sheratan_hub.rules.submit import KeyDoc
from sheratan_hub.storage import Key, Row


class Mended(NamedTuple):
    """Rows in the place of one, and a sentence if that is another; none if it must go."""

    rows: tuple[Row, ...]
    text: str = ""


Beside = Mapping[Key, Row]


class Found:
    """What is known of a damaged store as a whole: which jobs there are, and what ties them to each other.

    Memory grows with what is tied together.
    """

    def __init__(self) -> None:
        self.dead: set[str] = set()
        self.left: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.parents: set[str] = set()
        self.untold: set[str] = set()
        self.missions: set[str] = set()
        self._chain = START_HASH
        self._versions: dict[int, str] = {}

    # First all jobs, then all edges and links

    def beside_job(self, rows: Sequence[Row]) -> set[Key]:
        """What must be seen with some jobs: all that may belong to them."""
        keys = {Key(kind, row.id) for row in rows for kind in OF_A_JOB}
        docs = (read(row) for row in rows)
        return keys | {Key("key", doc.key) for doc in docs if isinstance(doc, Job) and doc.key is not None}

    def see_jobs(self, rows: Sequence[Row], beside: Beside) -> None:
        """Some jobs, with what belongs to them."""
        for row in rows:
            job = read(row)
            params = beside.get(Key("params", row.id))
            lost = isinstance(job, Job) and job.params_apart and (params is None or read(params) is None)
            if not isinstance(job, Job) or job.id != row.id or lost:
                self.dead.add(row.id)
            elif job.mission_id is not None:
                self.missions.add(job.mission_id)

    def beside_edge(self, rows: Sequence[Row]) -> set[Key]:
        """What must be seen with some edges: the jobs at their ends, and whether a redrive is told of."""
        keys: set[Key] = set()
        for row in rows:
            parent, child = ends_of(row)
            keys |= {job_key(parent), job_key(child), Key("resume", parent)}
        return keys

    def see_edges(self, rows: Sequence[Row], beside: Beside) -> None:
        """Some edges."""
        for row in rows:
            mended = self.edge(row, beside)
            for one in mended.rows:
                parent_id, child_id = ends_of(one)
                failed = one.agenda == failed_of(parent_id)
                self.left[child_id] += 1
                self.failed[child_id] += failed
                self.parents.add(parent_id)
                parent = self._job(parent_id, beside)
                if parent is not None and parent.finished and not failed:
                    self.untold.add(parent_id)

    def see_links(self, rows: Sequence[Row]) -> None:
        """Some rows of parents that a job is yet to be linked to."""
        for row in rows:
            ids = read(row)
            if ids is not None:
                self.left[child_of_link(row)] += len(ids)

    def _job(self, id: str, beside: Beside) -> Job | None:
        row = beside.get(job_key(id))
        doc = read(row) if row is not None and id not in self.dead else None
        return doc if isinstance(doc, Job) else None

    def edge(self, row: Row, beside: Beside) -> Mended:
        """An edge, which goes if a job at its ends has gone. Of an unfinished parent no failure is known."""
        parent_id, child_id = ends_of(row)
        parent = self._job(parent_id, beside)
        if parent is None or self._job(child_id, beside) is None:
            return Mended((), f"edge {row.id}: one of its jobs is not there")
        resuming = parent.resuming and Key("resume", parent_id) in beside
        failed = row.agenda == failed_of(parent_id) and (parent.finished or resuming)
        right = edge(parent_id, child_id, failed=failed)
        return Mended((right,), "" if right == row else f"edge {row.id}: it is put right")

    # Then each row

    def beside(self, rows: Sequence[Row]) -> set[Key]:
        """What must be seen with some rows of any kind."""
        if not rows:
            return set()
        kind = rows[0].kind
        if kind == "job":
            return self.beside_job(rows)
        if kind == "edge":
            return self.beside_edge(rows)
        if kind in OF_A_JOB:
            return {job_key(row.id) for row in rows}
        docs = [doc for doc in map(read, rows) if doc is not None]
        if kind == "key":
            return {job_key(doc.job_id) for doc in docs}
        if kind == "mission_key":
            return {mission_key(doc.mission_id) for doc in docs}
        return {job_key(child_of_link(row)) for row in rows} if kind == "link" else set()

    def mended(self, row: Row, beside: Beside) -> Mended:
        """What a row becomes."""
        doc = read(row)
        if doc is None or name_in(row, doc) != row.id:
            return Mended((), f"{row.kind} {row.id}: what it holds cannot be read")
        if isinstance(doc, Job):
            return self._mended_job(row, doc, beside)
        if row.kind == "edge":
            return self.edge(row, beside)
        if not self._belongs(row, doc, beside):
            return Mended((), f"{row.kind} {row.id}: what it belongs to is not there")
        if isinstance(doc, Snapshot):
            return self._policy(row, doc)
        if isinstance(doc, Pointer):
            return self._pointer(row, doc)
        if isinstance(doc, Mission) and not doc.over and doc.id not in self.missions:
            return Mended((doc.with_(over=True).row,), f"mission {row.id}: it is over, as none of its jobs is left")
        right = as_it_should(row, doc)
        if right.agenda is not None and right.due_at <= 0:
            right = msgspec.structs.replace(right, due_at=1)
        return Mended((right,), "" if right == row else f"{row.kind} {row.id}: it is put where it belongs")

    def _belongs(self, row: Row, doc: Any, beside: Beside) -> bool:
        if row.kind in OF_A_JOB:
            job = self._job(row.id, beside)
            if job is None or row.kind not in ("params", "resume"):
                return job is not None
            return job.params_apart if row.kind == "params" else job.resuming
        if row.kind == "key":
            return self._job(doc.job_id, beside) is not None
        if row.kind == "link":
            return self._job(child_of_link(row), beside) is not None
        mission = beside.get(mission_key(doc.mission_id)) if row.kind == "mission_key" else row
        return mission is not None and read(mission) is not None

    def _mended_job(self, row: Row, job: Job, beside: Beside) -> Mended:
        if row.id in self.dead:
            return Mended((), f"job {row.id}: its params are lost, and it with them")
        told: list[str] = []
        right = self._tied(self._known(job, beside), told)
        if impossible(right) is not None:
            right = _possible(right)
            told.append("what it said of itself could not be")
        made, more = as_it_should(right.row, right), self._key(right, beside)
        if made.agenda == row.agenda and right.finished:
            made = msgspec.structs.replace(made, due_at=max(1, row.due_at))
        if right == job:
            made = msgspec.structs.replace(made, doc=row.doc)
        if more:
            told.append("its idempotency key is made anew")
        if made != row and not told:
            told.append("it is put where it belongs")
        return Mended((made, *more), f"job {row.id}: {', '.join(told)}" if told else "")

    def _known(self, job: Job, beside: Beside) -> Job:
        """The job as what lies beside it tells."""
        attempts, late = beside.get(Key("attempts", job.id)), beside.get(Key("late", job.id))
        tried = len(attempts_of(attempts)) if attempts is not None and read(attempts) is not None else 0
        said = len(evidence_of(late).seen) if late is not None and read(late) is not None else 0
        if bool(tried) != bool(job.tried):
            job = job.with_(tried=tried)
        if bool(said) != bool(job.late_results):
            job = job.with_(late_results=said)
        if job.resuming and Key("resume", job.id) not in beside:
            job = job.with_(resuming=False)
        held = beside.get(Key("key", job.key)) if job.key is not None and holds_key(job) else None
        named = read(held) if held is not None else None
        return job.with_(key=None) if named is not None and named.job_id != job.id else job

    def _tied(self, job: Job, told: list[str]) -> Job:
        """The job as its edges tell; one that has lost some of them is held rather than run too early."""
        left, failed = self.left[job.id], self.failed[job.id]
        if job.id in self.parents and not job.dependents:
            job = job.with_(dependents=True)
        if job.finished and job.id in self.untold and not job.cascade:
            job = job.with_(cascade=True)
        if (job.parents_left - left, job.parents_failed - failed) == (0, 0):
            return job
        lost = job.parents_left - left
        job = job.with_(parents_left=left, parents_failed=failed)
        told.append(f"it depends on {left} jobs that are known")
        if lost > 0 and job.status == "pending":
            told.append(f"{lost} that it waited for are not, so it is held until somebody redrives it")
            job = job.after("held", reason="DEPENDENCY_FAILED")
        return job

    def _key(self, job: Job, beside: Beside) -> tuple[Row, ...]:
        """The row of its idempotency key, if that is lost: nobody may make the same job again."""
        if job.key is None or not holds_key(job):
            return ()
        held = beside.get(Key("key", job.key))
        if held is not None and read(held) is not None:
            return ()
        params = beside.get(Key("params", job.id))
        text = params.doc if job.params_apart and params is not None else bytes(job.params)
        doc = msgspec.json.encode(KeyDoc(job.id, payload_sha256(job.kind, text)))
        return (Row("key", job.key, doc),)

    def _policy(self, row: Row, doc: Snapshot) -> Mended:
        """A version that follows from the one before; what comes after a lost one proves nothing any more."""
        if not doc.proves_itself() or doc.prev_sha256 != self._chain or doc.version != len(self._versions) + 1:
            return Mended((), f"policy {row.id}: it does not prove itself, or what it follows from is lost")
        self._chain = doc.sha256
        self._versions[doc.version] = doc.sha256
        return Mended((row,))

    def _pointer(self, row: Row, doc: Pointer) -> Mended:
        last = max(self._versions, default=0)
        right = msgspec.structs.replace(doc, latest=last, latest_sha256=self._chain)
        text = ""
        if doc.active and self._versions.get(doc.active) != doc.active_sha256:
            right = msgspec.structs.replace(right, active=0, active_sha256="")
            text = (
                f"policy version {doc.active}, which was active, is lost: version 0, WHICH ALLOWS EVERYTHING, is active"
            )
        if right == doc:
            return Mended((row,))
        return Mended((Row(*POINTER, msgspec.json.encode(right)),), text or "policy-active active: it is put right")


def _possible(job: Job) -> Job:
    """The job without what cannot be: a running one without a lease waits again."""
    job = job.with_(failures=max(0, job.failures), losses=max(0, job.losses))
    if job.status == "running" and not (job.lease_id and job.node_id and job.lease_until and job.attempt):
        return job.after("released", lease_id=None, cancel_at=0, waiting=False)
    if job.finished and not job.finished_at:
        return job.with_(finished_at=max(1, job.created_at))
    return job.with_(finished_at=0) if not job.finished else job


def read(row: Row) -> Any:
    """The document of a row, None if it cannot be read."""
    try:
        return stored.read(row)
    except (ValueError, RecursionError):
        return None


def lost_lines(first: int, after: int, now: int) -> Iterator[bytes]:
    """Lines in the place of the events from `first` up to `after` (not included), so that numbers stay as they are."""
    for _ in range(first, after):
        yield _encode(Event(now, "ledger.lost", "repair"))


def right_line(line: bytes, now: int) -> bytes:
    """The line, or the one in the place of what is no event."""
    try:
        _decode(line)
    except ValueError:
        return _encode(Event(now, "ledger.lost", "repair"))
    return line


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Event).decode
