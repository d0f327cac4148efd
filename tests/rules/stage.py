"""A stage for rules without an event loop: rows in a dict, commands decided one after the other."""

from __future__ import annotations

from typing import Any

from sheratan_hub.rules.command import Command, Event, Limits, Need, Refused, Scene
from sheratan_hub.rules.finish import Finish
from sheratan_hub.rules.jobs import Job, job_of
from sheratan_hub.rules.lanes import Lanes
from sheratan_hub.rules.policy import Judge
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.submit import Submit
from sheratan_hub.rules.sweep import SweepJobs
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Loaded, Row, Wants, merge

LEASE_MS = 10_000


class Stage:
    """`do(command)` decides and keeps; `now` is moved by hand."""

    def __init__(self, **limits: Any) -> None:
        self.limits = Limits(**{"lease_ms": LEASE_MS, "restart_grace_ms": 0, **limits})
        self.rows: dict[Key, Row] = {}
        self.counts: dict[str, int] = {}
        self.events: list[Event] = []
        self.now = 1_000_000
        self.started_at = 0
        self.lanes = Lanes(age_ms=self.limits.age_ms)
        self.judge = Judge()
        self._n = 0
        self._known: set[str] = set()

    def do(self, command: Command) -> Any:
        self._learn_lanes()
        scene = Scene(self.now, self.limits, self.lanes, self.started_at, judge=self.judge)
        view = View(scene)
        view.add(*self._load(command.wants(scene)))
        while True:
            try:
                decision = command.decide(view)
                break
            except Need as need:
                view.add(*self._load(need.wants))
        view.apply(decision)
        changes = view.changes()
        assert not {row.key for row in changes.new} & set(self.rows)
        self.rows |= {row.key: row for row in (*changes.new, *changes.put)}
        for key in changes.gone:
            del self.rows[key]
        for facet, n in changes.counts.items():
            self.counts[facet] = self.counts.get(facet, 0) + n
        self.events += decision.events
        if isinstance(decision.answer, Refused):
            raise decision.answer
        return decision.answer

    def _learn_lanes(self) -> None:
        """What the committer does after each batch; the same directory stays, as it knows whose turn it is."""
        heads: dict[str, int] = {}
        for row in self.rows.values():
            if row.lane is not None:
                heads[row.lane] = min(row.order, heads.get(row.lane, row.order))
        for lane in {*heads, *self._known}:
            self.lanes.set(lane, heads.get(lane))
        self._known = set(heads)

    def _load(self, wants: Wants) -> tuple[Wants, Loaded]:
        found = Loaded(
            rows={key: self.rows[key] for key in wants.keys | wants.look if key in self.rows},
            counts={facet: self.counts.get(facet, 0) for facet in wants.counts},
        )
        for ready, limit in wants.ready.items():
            rows = [row for row in self.rows.values() if row.lane == ready.lane]
            found.ready[ready] = sorted(rows, key=lambda row: (row.order, row.id))[:limit]
        for due, limit in wants.due.items():
            rows = [row for row in self.rows.values() if row.agenda == due.agenda and row.due_at <= due.before]
            found.due[due] = sorted(rows, key=lambda row: (row.due_at, row.id))[:limit]
        return wants, found

    def together(self, commands: list[Command]) -> int:
        """Decide them as one batch, as the engine does; how often more had to be loaded."""
        self._learn_lanes()
        scene = Scene(self.now, self.limits, self.lanes, self.started_at)
        view = View(scene)
        view.add(*self._load(merge(command.wants(scene) for command in commands)))
        for times in range(256):
            needs, left = [], []
            for command in commands:
                try:
                    view.apply(command.decide(view))
                except Need as need:
                    needs.append(need.wants)
                    left.append(command)
            if not left:
                self.rows |= {row.key: row for row in (*view.changes().new, *view.changes().put)}
                return times
            commands = left
            view.add(*self._load(merge(needs)))
        raise AssertionError("they ask for more and more")

    def ids(self) -> list[str]:
        """Every job's id."""
        return [key.id for key in self.rows if key.kind == "job"]

    def submit(self, kind: str = "work", **fields: Any) -> str:
        self._n += 1
        job: Job = self.do(Submit(f"job-{self._n:04d}", kind, **fields)).job
        return job.id

    def pull(self, node_id: str = "n1", limit: int = 1, **fields: Any) -> list[Job]:
        self._n += 1
        fields = {"capabilities": frozenset(), **fields}
        return list(self.do(Pull(node_id, f"secret{self._n:04d}-", limit, **fields)).jobs)

    def reason(self, node_id: str = "n1", **fields: Any) -> str | None:
        """Why a pull gets nothing."""
        self._n += 1
        fields = {"capabilities": frozenset(), **fields}
        pulled = self.do(Pull(node_id, f"secret{self._n:04d}-", **fields))
        assert not pulled.jobs
        reason: str | None = pulled.reason
        return reason

    def lease(self, node_id: str = "n1", **fields: Any) -> Job:
        (job,) = self.pull(node_id, **fields)
        return job

    def finish(self, job: Job) -> None:
        """The job is done."""
        self.do(Finish(job.id, True, job.lease_id))

    def sweep(self, agenda: str) -> None:
        """Act on the jobs of one agenda that are due."""
        self.do(SweepJobs(agenda))

    def job(self, job_id: str) -> Job:
        return job_of(self.rows[Key("job", job_id)])
