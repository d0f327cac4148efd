"""A stage for rules without an event loop: rows in a dict, commands decided one after the other."""

from __future__ import annotations

from typing import Any

from sheratan_hub.rules.command import Command, Event, Limits, Need, Refused, Scene
from sheratan_hub.rules.jobs import Job, job_of
from sheratan_hub.rules.lanes import Lanes
from sheratan_hub.rules.pull import Pull
from sheratan_hub.rules.submit import Submit
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Loaded, Row, Wants

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
        self._n = 0

    def do(self, command: Command) -> Any:
        lanes = Lanes()
        for row in self.rows.values():
            if row.lane is not None:
                lanes.joined_by(row.lane, row.order)
        scene = Scene(self.now, self.limits, lanes, self.started_at)
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

    def submit(self, kind: str = "work", **fields: Any) -> str:
        self._n += 1
        job: Job = self.do(Submit(f"job-{self._n:04d}", kind, **fields)).job
        return job.id

    def pull(self, node_id: str = "n1", limit: int = 1, **fields: Any) -> list[Job]:
        self._n += 1
        fields = {"capabilities": frozenset(), **fields}
        return list(self.do(Pull(node_id, f"secret{self._n:04d}-", limit, **fields)).jobs)

    def lease(self, node_id: str = "n1", **fields: Any) -> Job:
        (job,) = self.pull(node_id, **fields)
        return job

    def job(self, job_id: str) -> Job:
        return job_of(self.rows[Key("job", job_id)])
