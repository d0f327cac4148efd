"""An engine on a virtual clock beside a model of it: every command goes to both, and they have to agree."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import permutations
from typing import Any, TypeVar

import msgspec

from sheratan_hub.clock import VirtualClock, settle
from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB, Committed
from sheratan_hub.rules.command import Command, Limits, Refused
from sheratan_hub.rules.evidence import evidence_of, late_key
from sheratan_hub.rules.jobs import TRANSITIONS, Job, job_key, job_of
from sheratan_hub.rules.nodes import Beat
from sheratan_hub.rules.pull import Pull, Pulled
from sheratan_hub.rules.submit import Submitted
from sheratan_hub.storage import Changes, Key, Row, Store, StoreFull, Tx, open_store
from sheratan_hub.storage_tools import tools_of
from sheratan_hub.store_check import check
from tests.model.model import Divergence, JobModel, Model, told

T = TypeVar("T")
Said = tuple[Command, Any]
"""A command and the outcome that the engine gave it."""

QUIET_TURNS = 15
"""So many turns of the event loop without the store being asked: nothing is under way any more."""


class Watched:
    """A store that counts what it is asked, so that one can tell when the engine has come to rest."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.shared = store.shared
        self.asked = self.busy = 0
        self.fails = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Tx]:
        with self._asked():
            async with self._store.begin() as tx:
                yield Failing(self, tx) if self.fails else tx

    async def fetch(self, keys: Sequence[Key]) -> list[Row]:
        with self._asked():
            return await self._store.fetch(keys)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        self.asked += 1
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1


class Failing:
    """A transaction of a store whose next save fails."""

    def __init__(self, store: Watched, tx: Tx) -> None:
        self._store, self.load, self._save = store, tx.load, tx.save

    async def save(self, changes: Changes, *, durable: bool = True) -> int:
        if self._store.fails:
            self._store.fails = False
            raise StoreFull("no room")
        return await self._save(changes, durable=durable)


class Poll:
    """A pull that waits, in a task of its own."""

    def __init__(self, command: Pull, until: int, task: asyncio.Task[Pulled]) -> None:
        self.command, self.until, self.task = command, until, task
        self.replaced = False


class Rig:
    """One engine and one model. What `do` and its like return is what the engine said."""

    def __init__(self, url: str, limits: Limits) -> None:
        self.url, self.limits = url, limits
        self.clock = VirtualClock()
        self.model = Model(limits, self.clock.now())
        self.loop = asyncio.new_event_loop()
        self.polls: list[Poll] = []
        self.awaited: list[tuple[str, int, asyncio.Task[Job]]] = []
        self.changed: set[str] = set()
        self.acknowledged: set[str] = set()
        self.store: Any = None
        self.run(self._open(), check=False)

    def run(self, what: Coroutine[Any, Any, T], *, check: bool = True) -> T:
        """Let the engine do something to its end, then hold it against the model."""
        return self.loop.run_until_complete(self._checked(what) if check else what)

    async def _checked(self, what: Coroutine[Any, Any, T]) -> T:
        answer = await what
        await self.agree()
        return answer

    # The hub's own life

    async def _open(self) -> None:
        if self.store is None or not self.url.startswith("memory"):
            self.store = Watched(open_store(self.url, self.clock))
            await self.store.open()
        self.hub = Hub(self.store, self.clock, self.limits)
        self.hub.observe(self._committed)
        self.model.restart(self.clock.now())
        await self.hub.start()
        self.committing = self.loop.create_task(self.hub.committer.run())
        await self._quiet()

    async def _close(self) -> None:
        """Every waiting request is answered; what was acknowledged is in the store."""
        self.hub.stop()
        await self._quiet()
        await self._explain([], stopping=True)
        self.hub.committer.close()
        await self.committing
        if not self.url.startswith("memory"):
            await self.store.close()

    async def restart(self, ms: int) -> None:
        """Stop, and start another on the same store, whose wall clock says that so many ms have passed (or less)."""
        await self._close()
        self.clock = VirtualClock(self.clock.now() + ms, seed=self.model.starts * 1000 + 7)
        if self.url.startswith("memory"):
            self.store._store._clock = self.clock
        await self._open()

    async def end(self) -> None:
        """Everything is held against everything; then the hub is closed."""
        await self._whole()
        await self._close()
        if not self.url.startswith("memory"):
            async with tools_of(open_store(self.url, self.clock)).reading() as reading:
                report = await check(reading)
            if not report.clean:
                raise Divergence(f"the store contradicts itself: {report.problems}")

    def dispose(self) -> None:
        """Leave nothing behind, whatever has happened."""
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks))
        self.loop.run_until_complete(self.store.close())
        self.loop.close()

    # Doing

    async def do(self, *commands: Command) -> list[Any]:
        """One request with these commands, decided in one transaction, in order."""
        outcomes = await self.hub.execute_many(commands, order="in_turn")
        self._told(outcomes)
        await self._explain(list(zip(commands, outcomes, strict=True)))
        return outcomes

    async def beat(self, command: Beat) -> None:
        """A heartbeat, as the control plane hands it on."""
        answer = await self.hub.beats.take(command, HUB)
        await self._explain([(command, answer)])

    async def fail(self, *commands: Command) -> None:
        """A request whose changes cannot be saved: it is refused, and nothing has happened."""
        self.store.fails = True
        try:
            outcomes = await self.hub.execute_many(commands)
        except Refused as no:
            if self.store.fails or str(no.code) != "unavailable":
                raise
            outcomes = []
        self.store.fails = False
        await self._explain(list(zip(commands, outcomes, strict=False)))

    async def sweep_in_vain(self) -> None:
        """The hub looks at what is due and cannot write: whatever was due is due still."""
        self.store.fails = True
        with suppress(Refused):
            await self.hub.sweep()
        if self.store.fails:  # there was nothing to write
            self.store.fails = False
        await self._explain([])

    async def adopt(self, limits: Limits) -> None:
        """Other limits count from now on."""
        self.limits = self.model.limits = limits
        self.hub.adopt(limits)
        await self._explain([])

    async def race(self, *commands: Command, apart: int = 0) -> list[Any]:
        """Requests at the same time, `apart` turns of the event loop after each other: some order explains it."""
        tasks = []
        for command in commands:
            tasks.append(asyncio.ensure_future(self.hub.execute(command)))
            await settle(apart)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        self._told(outcomes)
        await self._explain(list(zip(commands, outcomes, strict=True)), any_order=True)
        return outcomes

    async def finish_and_pull(self, finish: Command, pull: Pull) -> Pulled | None:
        """A result that takes a pull along; nothing is leased if it is refused.

        A job that the result itself sends back into the line may be overlooked by the pull.
        """
        try:
            outcomes, pulled = await self.hub.pull_after([finish], pull, 0, HUB, "while_fine")
        except Refused as no:
            await self._explain([(finish, no)])
            return None
        await self._explain([(finish, outcomes[0]), (pull, pulled)], any_order=True)
        return pulled

    async def poll(self, command: Pull, wait_ms: int, *commands: Command, apart: int = 0) -> list[Any]:
        """Begin a pull that waits; and requests at the same time, while it looks for the first time."""
        task = self.loop.create_task(self.hub.pull(command, wait_ms))
        if command.pull_id is not None:
            for older in self.polls:
                one = older.command
                older.replaced |= (one.node_id, one.pull_id) == (command.node_id, command.pull_id)
        self.polls.append(Poll(command, self.clock.now() + wait_ms, task))
        await settle(apart)
        return await self.race(*commands, apart=apart)

    async def hang_up(self, place: int) -> None:
        """The client of a waiting pull goes away; nothing was leased to it, and nothing is."""
        poll = self.polls.pop(place)
        poll.task.cancel()
        await asyncio.wait({poll.task})
        await self._explain([])

    async def await_job(self, job_id: str, wait_ms: int) -> None:
        """Begin to wait for a job's end."""
        task = self.loop.create_task(self.hub.job(job_id, wait_ms))
        self.awaited.append((job_id, self.clock.now() + wait_ms, task))
        await self._explain([])

    async def give_back(self, pulled: Pulled) -> None:
        """An answer with leases could not be written: they go back at no cost, if it was the only one."""
        self.hub.give_back(pulled)
        await self._quiet()
        self.model.now = self.clock.now()
        for job in pulled.jobs:
            self.model.undelivered(job.id, job.lease_id or "")
        await self._explain([])

    async def sweep(self) -> None:
        """The hub looks at everything that is due."""
        await self.hub.sweep()
        self.model.now = self.clock.now()
        self.model.sweep()
        await self._explain([])

    async def prune(self) -> None:
        """The hub forgets whatever is old enough, whenever it had planned to look for it."""
        self.hub.keeping._jobs_at = 0
        await self.hub.keeping.prune()
        self.model.now = self.clock.now()
        self.model.prune()
        await self._explain([])

    async def advance(self, ms: int) -> None:
        """Time passes; nobody looks at what is due meanwhile."""
        if self.polls or self.awaited:
            await self.clock.advance(ms)
        else:
            self.clock._now += ms
        await self._explain([])

    # Agreeing

    def _told(self, outcomes: Iterable[Any]) -> None:
        for outcome in outcomes:
            for one in outcome if isinstance(outcome, tuple) else (outcome,):
                if isinstance(one, Submitted):
                    self.acknowledged.add(one.job.id)

    async def _quiet(self) -> None:
        """Until nothing is under way: nobody has asked the store for a while."""
        turns, seen = 0, -1
        while turns < QUIET_TURNS or self.store.busy:
            turns = 0 if self.store.asked != seen or self.store.busy else turns + 1
            seen = self.store.asked
            await settle(1)

    async def _explain(self, said: list[Said], *, any_order: bool = False, stopping: bool = False) -> None:
        """Tell the model what was said, and what waiting requests were answered meanwhile: some order must do."""
        self.model.now = self.clock.now()
        self.model.begin(alone=True)
        if not self.polls and not self.awaited and not (any_order and len(said) > 1):
            for command, outcome in said:
                self.model.apply(command, outcome)
            return
        await self._quiet()
        done = [poll for poll in self.polls if poll.task.done()]
        self.polls = [poll for poll in self.polls if not poll.task.done()]
        answered = [(poll.command, self._answer(poll, stopping)) for poll in done]
        self.model.fresh = set() if any_order else None
        self.model.tie(any_order)
        self._order(said, [one for one in answered if one[1].jobs or one[1].reason in STATES], any_order)
        self.model.fresh = None
        self.model.tie(False)
        self._still_waiting(stopping)
        self._ended_waits(stopping)

    def _answer(self, poll: Poll, stopping: bool) -> Pulled:
        pulled = poll.task.result()
        over = stopping or poll.replaced or self.clock.now() >= poll.until
        if not pulled.jobs and pulled.reason not in STATES and not over:
            raise Divergence(f"{poll.command} was sent home without a job and without a reason: {pulled}")
        return pulled

    def _order(self, said: list[Said], answered: list[Said], any_order: bool) -> None:
        """Apply all of it in the first order that the model goes along with."""
        orders: Iterable[Sequence[Said]] = [[*said, *answered]]
        if any_order or len(answered) > 1:
            orders = permutations([*said, *answered]) if any_order else ([*said, *p] for p in permutations(answered))
        first: Divergence | None = None
        self.model.begin(alone=len(said) + len(answered) <= 1)
        for order in orders:
            trial = self.model.copy()
            try:
                for one in order:
                    trial.dealt = any(one is other for other in answered)
                    trial.apply(*one)
            except Divergence as no:
                first = first or no
                continue
            self.model, self.model.dealt = trial, False
            return
        raise Divergence(f"no order explains {[(c, told(o)) for c, o in (*said, *answered)]}; the first: {first}")

    def _still_waiting(self, stopping: bool) -> None:
        """11: nobody waits while there is a job for it."""
        for poll in self.polls:
            if stopping or self.clock.now() > poll.until:
                raise Divergence(f"{poll.command} still waits")
            free = self.model.limits.max_inflight - self.model.count("running")
            there = [
                job
                for job in self.model.takeable(poll.command)
                if self.model.has_to_be_seen(job) and not self.model.paused(job.kind, seen=False)
            ]
            if there and free > 0 and not poll.replaced and self.model.node_stop(poll.command.node_id) is None:
                raise Divergence(f"{poll.command} waits, and {there[0]} is there for it")

    def _ended_waits(self, stopping: bool) -> None:
        waits, self.awaited = self.awaited, []
        for job_id, until, task in waits:
            known = self.model.jobs[job_id]
            goes_home = stopping and not known.finished  # pulls that go home, too, may have looked once more since
            if task.done() and task.result().status != known.status and not goes_home:
                raise Divergence(f"who waited for {job_id} was told {task.result().status}: {known}")
            if not task.done() and (known.finished or stopping or self.clock.now() > until):
                raise Divergence(f"somebody still waits for the end of {known}")
            if task.done() and not (known.finished or stopping or self.clock.now() >= until):
                raise Divergence(f"who waited for {job_id} was answered too early")
            if not task.done():
                self.awaited.append((job_id, until, task))

    def _committed(self, committed: Committed) -> None:
        rows = (*committed.changes.new, *committed.changes.put)
        self.changed.update(row.id for row in rows if row.kind == "job")

    async def agree(self) -> None:
        """What the engine changed, or should have changed, is as the model says; so are the counters and the lanes."""
        ids = self.changed | self.model.touched
        self.changed = set()
        self.model.touched = set()
        if ids:
            await self._same(ids)
        counted = await self.store.counts()
        mine = self.model.counts()
        if {facet: n for facet, n in counted.items() if facet.startswith(COUNTED)} != mine:
            raise Divergence(f"counted {counted}, there are {mine}")
        missing = [lane for lane in await self.store.heads() if lane not in self.hub.committer.lanes]
        if missing:
            raise Divergence(f"the directory does not know {missing}")

    async def _same(self, ids: Iterable[str]) -> None:
        rows = {row.id: row for row in await self.store.fetch([job_key(id) for id in ids])}
        for id in ids:
            if id in self.model.gone and id not in rows:
                continue
            if id not in rows or id not in self.model.jobs:
                raise Divergence(f"{id}: stored {rows.get(id)}, expected {self.model.jobs.get(id)}")
            row = rows[id]
            same(self.model, self.model.jobs[id], job_of(row))
            if (row.labels[0], row.labels[4]) != (self.model.jobs[id].status, self.model.jobs[id].node):
                raise Divergence(f"{id} is listed as {row.labels}")

    async def _whole(self) -> None:
        """Every job, every acknowledged submit exactly once, every event in its place, nothing lost by the lists."""
        await self._same(self.model.jobs)
        if not self.acknowledged <= {*self.model.jobs, *self.model.gone}:
            raise Divergence("a submit was acknowledged and has no job")
        await self._evidence()
        page = await self.store.page("job", limit=10_000, examine=10_000)
        if {row.id for row in page.rows} != set(self.model.jobs):
            raise Divergence("there are other jobs than were submitted")
        missions = await self.store.page("mission", limit=10_000, examine=10_000)
        if {row.id for row in missions.rows} != set(self.model.missions):
            raise Divergence(f"missions {[row.id for row in missions.rows]}, expected {list(self.model.missions)}")
        self._replay([msgspec.json.decode(line.line) for line in await self.store.events(0, 100_000)])

    async def _evidence(self) -> None:
        """2: what superseded leases said is kept, and judged by what completed the job."""
        rows = {row.id: row for row in await self.store.fetch([late_key(id) for id in self.model.jobs])}
        for id, job in self.model.jobs.items():
            kept = [(one.ok, one.diverged) for one in evidence_of(rows.get(id)).late]
            if kept != job.evidence():
                raise Divergence(f"evidence {kept}, expected {job.evidence()} of {job}")

    def _replay(self, events: list[dict[str, Any]]) -> None:
        """16: the ledger tells each job's whole life, and ends with its present status.

        What is older than the ledger's age may be gone. When something superseded came, between others that were sent
        at the same time, nobody can tell from outside.
        """
        status: dict[str, str] = {}
        lives = {**self.model.gone, **self.model.jobs}
        told_of: dict[str, list[str]] = {id: [] for id in lives}
        for event in events:
            id, happened = event.get("job_id"), event["event"].removeprefix("job.")
            if id is None or not event["event"].startswith("job."):
                continue
            told_of[id].append(happened)
            if happened == "submitted":
                status[id] = "pending"
            elif (status.get(id), happened) in TRANSITIONS:
                status[id] = TRANSITIONS[status[id], happened]
        old = self.clock.now() - self.limits.ledger_kept_ms
        for id, job in lives.items():
            told, lived = told_of[id], job.happened
            if made_at(id) < old and "submitted" not in told:
                lived = lived[len(lived) - len(told) :]
            elif status.get(id) != job.status:
                raise Divergence(f"the ledger ends {told} of {job}")
            if in_any_case(told) != in_any_case(lived):
                raise Divergence(f"the ledger tells {told} of {job}")


COUNTED = ("job:", "node:", "key", "leases:", "running:", "m:")
"""How the facets begin that the model counts, too."""

STATES = ("node_stale", "node_dead", "node_draining", "node_busy", "pull_spent")
"""Reasons that a waiting pull is told at once."""


def made_at(id: str) -> int:
    """When an id was made (ms): it is a UUID of version 7."""
    return uuid.UUID(id).int >> 80


def in_any_case(happened: list[str]) -> tuple[list[str], int]:
    """What happened to a job in its order, and how many superseded results it got."""
    return [one for one in happened if one != "superseded"], happened.count("superseded")


def same(model: Model, expected: JobModel, job: Job) -> None:
    """The stored job is the one that the model expects; what jitter decided is taken over."""
    if isinstance(expected.not_before, tuple) and expected.not_before[0] <= job.not_before <= expected.not_before[1]:
        model.settle(expected, job.not_before)
    want, have = facts(expected), facts(job)
    if want != have:
        wrong = {name: (want.get(name), have.get(name)) for name in want | have if want.get(name) != have.get(name)}
        raise Divergence(f"expected and stored of {job.id}: {wrong}\n  {expected}\n  {job}")


ALWAYS = (
    *("status", "kind", "source", "priority", "attempt", "failures", "losses", "lost_on", "reason", "finished_at"),
    *("uncounted", "tried", "late_results", "redrives"),
)
WAITING = ("not_before", "waiting", "pending_since")
RUNNING = ("lease_until", "lease_ms", "started_at", "cancel_at", "sending")


def facts(job: Any) -> dict[str, Any]:
    """What is compared: that which means something in the job's status."""
    names = [*ALWAYS, *(RUNNING if job.status == "running" else ()), *(WAITING if job.status == "pending" else ())]
    known = {name: getattr(job, name) for name in names}
    mine = isinstance(job, JobModel)
    known["node"], known["lease"] = (job.node, job.lease) if mine else (job.node_id, job.lease_id)
    known["result"] = bytes(job.result)
    known["error"] = None if job.error is None or b'"type"' in bytes(job.error) else bytes(job.error)
    if job.status == "pending" and not job.waiting:
        known["not_before"] = None
    return known
