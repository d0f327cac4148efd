"""What a job's end, or its redrive, does to those that depend on it: worked through piece by piece (design rule 7).

A finished job with dependents stands on the agenda `cascade`; one that was redriven has a row `resume` on the agenda
of that name, and its cascade waits until that is gone. Each step brings some edges in line with what their parent is
at that moment, so that it can be cut off after any transaction, repeated, or overtaken by the parent's next change.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import msgspec

from sheratan_hub.rules.command import Decision, Event, Need, Scene
from sheratan_hub.rules.edges import (
    ALWAYS,
    PIECE,
    Parents,
    after_parents,
    child_of,
    counts_as_done,
    edge,
    edges_of,
    failed_of,
    link,
    parents_in,
    resuming,
    root_of,
    told,
    waiting_of,
)
from sheratan_hub.rules.jobs import Job, job_key, job_of
from sheratan_hub.rules.nodes import Swept
from sheratan_hub.rules.redrive import redriven, redriven_event
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Due, Key, Row, Wants

PARENTS = 50
"""How many parents one transaction begins with."""

EDGES = 256
"""How many edges one transaction brings in line, about."""

LEVELS = 32
"""How far down one transaction follows a chain: each level asks the store once."""

FEW = 8
"""Of so few children the own edges are asked for with them: they may be next."""


class News(NamedTuple):
    """A job whose dependents are to be told: of its end, or of its redrive; `revive`: cancelled ones come back."""

    job: Job
    redrive: bool = False
    revive: bool = False

    @property
    def agenda(self) -> str:
        """Where the edges are that it concerns."""
        return failed_of(self.job.id) if self.redrive else waiting_of(self.job.id)


class SweepCascades(msgspec.Struct, frozen=True, gc=False):
    """Tell the dependents of some finished and of some redriven jobs."""

    parents: int = PARENTS
    edges: int = EDGES
    levels: int = LEVELS

    def wants(self, scene: Scene) -> Wants:
        """Who has news."""
        return Wants(due={Due("cascade", ALWAYS): self.parents, Due("resume", ALWAYS): self.parents})

    def decide(self, view: View) -> Decision:
        """The answer is `Swept`: how many edges were brought in line, and now if there may be more."""
        steps = Steps(view, self.edges)
        ends = [News(job_of(row)) for row in view.due("cascade")]
        resumes = view.due("resume")
        level = [*ends, *steps.redrives(resumes)]
        for _ in range(self.levels):
            if not level or steps.left <= 0:
                break
            level = steps.tell(level)
        more = bool(level) or steps.unfinished or max(len(ends), len(resumes)) >= self.parents
        return steps.decision(view.now if more else None)


class SweepLinks(msgspec.Struct, frozen=True, gc=False):
    """Tie a job that was stored with many parents to the next of them."""

    def wants(self, scene: Scene) -> Wants:
        """One piece of what is to be linked."""
        return Wants(due={Due("link", ALWAYS): 1})

    def decide(self, view: View) -> Decision:
        """The answer is `Swept`, with now if there may be more."""
        for row in view.due("link"):
            child_id = row.id.rpartition("/")[0]
            ids = parents_in(row)
            missing = {key for key in map(job_key, (child_id, *ids)) if not view.has(*key, locked=True)}
            if missing:
                raise Need(Wants(keys=missing))
            found = view.row("job", child_id)
            if found is None:
                return Decision(Swept(1, view.now), gone=(row.key,))
            linked = link(view, job_of(found), ids, known=True)
            child, happened = after_parents(job_of(found), linked.parents, view.now)
            events = (told(child, happened, view.now),) if happened is not None else ()
            put = (*linked.put, child.row)
            return Decision(Swept(len(ids), view.now), new=linked.new, put=put, gone=(row.key,), events=events)
        return Decision(Swept(0))


class Steps:
    """One transaction's worth of telling: the jobs and edges as they become."""

    def __init__(self, view: View, edges: int) -> None:
        self.view, self.left, self.most = view, edges, edges
        self.unfinished = False
        self._told: set[str] = set()
        self._later: set[str] = set()
        self._jobs: dict[str, Job | None] = {}
        self._edges: dict[Key, Row] = {}
        self._gone: list[Key] = []
        self._new: list[Row] = []
        self._put: list[Row] = []
        self._events: list[Event] = []

    def redrives(self, rows: list[Row]) -> list[News]:
        """The news of these `resume` rows."""
        missing = {job_key(row.id) for row in rows if not self.view.has("job", row.id, locked=True)}
        if missing:
            raise Need(Wants(keys=missing))
        found = [(self._job(row.id), row) for row in rows]
        self._gone += [row.key for job, row in found if job is None]
        return [News(job, redrive=True, revive=row.doc == b"1") for job, row in found if job is not None]

    def tell(self, level: list[News]) -> list[News]:
        """Tell the children of these, as many as there is room for; whose own children have news then."""
        self._load(level)
        following: list[News] = []
        for news in level:
            if news.job.id in self._later:
                self.unfinished = True
                continue
            self._told.add(news.job.id)
            fresh = self._edges_of(news)
            for row in fresh[: self.left]:
                following += self._tell_one(news, row)
            complete = len(fresh) <= self.left and len(fresh) == len(self.view.all_due(news.agenda) or ()) < PIECE
            self.left -= min(self.left, len(fresh))
            if complete:
                self._told_all(news)
            else:
                self.unfinished = True
        return following

    def _load(self, level: list[News]) -> None:
        """Ask for the edges of all, then for all their children; with few children, also for the edges of those."""
        missing = [news.agenda for news in level if self.view.all_due(news.agenda) is None]
        if missing:
            raise Need(edges_of(*missing))
        children = islice((child_of(row, news.job.id) for news in level for row in self._edges_of(news)), self.left)
        unknown = {job_key(child) for child in children if not self.view.has("job", child, locked=True)}
        if unknown:
            wants = Wants(keys=unknown)
            if len(unknown) <= FEW:
                name = failed_of if level[0].redrive else waiting_of
                wants.due = edges_of(*(name(key.id) for key in unknown)).due
            raise Need(wants)

    def _edges_of(self, news: News) -> list[Row]:
        """The edges that were loaded for it, without those that others in the batch have changed since."""
        return [row for row in self.view.all_due(news.agenda) or () if not self.view.changed(*row.key)]

    def _job(self, job_id: str) -> Job | None:
        if job_id not in self._jobs:
            row = self.view.row("job", job_id)
            return job_of(row) if row is not None else None
        return self._jobs[job_id]

    def _tell_one(self, news: News, row: Row) -> list[News]:
        """Bring one edge and its child in line; the child's own news, if it has any that can be told at once."""
        child = self._job(child_of(row, news.job.id))
        if child is None:
            self._gone.append(row.key)
            return []
        if news.redrive:
            self._edges[row.key] = edge(news.job.id, child.id, failed=False)
            return self._again(child, news)
        if counts_as_done(news.job, child):
            self._gone.append(row.key)
            parents = Parents(done=1)
        else:
            self._edges[row.key] = edge(news.job.id, child.id, failed=True)
            parents = Parents(failed=1, root_cause=root_of(news.job))
        after, happened = after_parents(child, parents, self.view.now)
        self._keep(after, happened)
        ended = happened == "cancelled" and after.cascade and not after.resuming
        return self._next(News(after)) if ended else []

    def _next(self, news: News) -> list[News]:
        """These news, if they can be told in this transaction: the edges must be as they were loaded."""
        if news.job.id not in self._told and not self.view.changed("job", news.job.id):
            return [news]
        self.unfinished = True
        return []

    def _again(self, child: Job, news: News) -> list[News]:
        """One parent less has failed: a held child may go on waiting, a cancelled one may come back."""
        after, happened = after_parents(child, Parents(failed=-1), self.view.now)
        cut = after.status == "cancelled" and after.reason == "DEPENDENCY_FAILED"
        if not (news.revive and cut and not after.parents_failed):
            self._keep(after, happened)
            return []
        before = after
        after, new, put = resuming(self.view, redriven(before, self.view), dependents=True)
        self._events.append(redriven_event(before, after, self.view.now, "hub"))
        self._put += put
        self._jobs[after.id] = after
        self._new += new
        if put:
            self._later.add(after.id)
        return self._next(News(after, redrive=True, revive=True)) if new else []

    def _keep(self, job: Job, happened: str | None) -> None:
        self._jobs[job.id] = job
        if happened is not None:
            self._events.append(told(job, happened, self.view.now))

    def _told_all(self, news: News) -> None:
        """Nobody is left to be told: the job is off the agenda. One that completed has no dependents any more."""
        job = self._job(news.job.id)
        if job is None:
            return
        if news.redrive:
            self._jobs[job.id] = job.with_(resuming=False)
            self.unfinished = self.unfinished or job.cascade  # it has ended again meanwhile
            self._gone.append(Key("resume", job.id))
        else:
            self._jobs[job.id] = job.with_(cascade=False, dependents=job.status != "completed")

    def decision(self, next_at: int | None) -> Decision:
        """What all of it comes to."""
        gone = set(self._gone)
        jobs = (job.row for job in self._jobs.values() if job is not None)
        return Decision(
            Swept(self.most - self.left, next_at),
            new=tuple(row for row in self._new if row.key not in gone),
            put=(*self._edges.values(), *jobs, *(row for row in self._put if row.key not in gone)),
            gone=tuple(gone - {row.key for row in self._new}),
            events=tuple(self._events),
        )
