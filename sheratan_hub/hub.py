"""The engine that handlers hold: execute commands, wait for work, read rows, tell the observers.

Longer than 300 lines because it is the one door to all of them, and a long poll goes through most of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any

from sheratan_hub.beats import Beats
from sheratan_hub.clock import Clock, settle
from sheratan_hub.commit import TURNS, Committer
from sheratan_hub.items import HUB, Committed, Happened, Item, Order, Origin, Outcome
from sheratan_hub.keeping import Keeping
from sheratan_hub.loops import Loop
from sheratan_hub.reading import Reading
from sheratan_hub.rules.command import Code, Command, Event, Limits, Refused
from sheratan_hub.rules.finish import Release
from sheratan_hub.rules.jobs import Job, job_key, job_of
from sheratan_hub.rules.lanes import Offer
from sheratan_hub.rules.nodes import Node, State, node_of, state_of
from sheratan_hub.rules.pauses import Pause
from sheratan_hub.rules.policies import POINTER, Pointer, Snapshot, node_ask, pointer_of, snapshot_of, version_id
from sheratan_hub.rules.policy import Ask, Judge
from sheratan_hub.rules.pull import Pull, Pulled, bars_of
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Changes, Key, Page, Row, Store, StoreDown
from sheratan_hub.upkeep import SWEPT, clamp, sweep
from sheratan_hub.waiting import Good, Waiter, Waiting

log = logging.getLogger("sheratan.hub")

Observer = Callable[[Committed], None]


class Hub:
    """Everything between the handlers and the store. Open the store before `start`."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        limits: Limits | None = None,
        *,
        max_waiting: int = 20_000,
        max_batch: int = 512,
        max_polls: int = 10_000,
    ) -> None:
        self.store, self.clock, self.limits = store, clock, limits or Limits()
        self.waiting = Waiting()
        self.ready = False
        self.max_polls, self.max_waiting = max_polls, max_waiting
        self._observers: list[Observer] = []
        self._undelivered: list[Command] = []
        self.delays_after: str | None = ""
        self.committer = Committer(store, self.limits, self._committed, max_waiting=max_waiting, max_batch=max_batch)
        self.committer.guests = self._guests
        self._judge = self.committer.judge
        self.reading, self.keeping = Reading(self), Keeping(self)
        pruning = Loop("prune", self.keeping.prune, clock, rests=True)
        self.loops = [
            Loop("sweep", self.sweep, clock, late=self.stood_still),
            Loop("read", self.reading.flush, clock),
            pruning,
        ]
        self.keeping.nudge = pruning.nudge
        self.observe(self.keeping.committed)
        self.waiting.open = lambda lane: not self.committer.standing.closed(lane, clock.now())
        self.lease_ends_at: int | None = None
        self.beats = Beats(self)

    def observe(self, observer: Observer) -> None:
        """Call `observer` with every `Committed`, before its replies go out. A failing one is logged, passed over."""
        self._observers.append(observer)

    async def start(self) -> None:
        """Make ready what the rules need to know; then run `committer.run` and the loops."""
        await self.committer.prepare()
        self._judge = self.committer.judge
        await clamp(self)
        self.ready = True

    def adopt(self, limits: Limits) -> None:
        """Go by other limits from now on, all but `age_ms`; who waits looks again."""
        self.limits = limits
        self.committer.adopt(limits)
        self.keeping.adopt()
        self.waiting.wake_all()

    def stop(self) -> None:
        """Answer every long poll at once, take no new commands; what is queued is still committed."""
        self.ready = False
        self.waiting.close()

    async def execute(self, command: Command, origin: Origin = HUB) -> Any:
        """The command's answer, once it is committed. Raises `Refused`."""
        outcome = (await self.execute_many([command], origin))[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def execute_many(
        self, commands: Sequence[Command], origin: Origin = HUB, *, urgent: bool = False, order: Order = "any"
    ) -> list[Outcome]:
        """One outcome each, in order: an answer or the exception it ended with; all in one transaction.

        Those that need more rows are decided after the others, unless `order` says otherwise.
        If the caller is cancelled before the batch begins, nothing happens; after that, it happens anyway.
        """
        future: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self.committer.add(Item(commands, origin, future, urgent, order))
        return await future

    def report(self, event: Event, origin: Origin) -> None:
        """Tell the observers of something that no command decided (a refusal, a wrong token)."""
        self._committed(Committed([Happened([event], origin)], Changes(), 0))

    async def pull(self, command: Pull, wait_ms: int, origin: Origin = HUB) -> Pulled:
        """Look, wait, look: jobs as soon as there are any for this node, or none after `wait_ms`.

        Once leased, the answer comes even if the caller is cancelled: then the leases are given back at no cost.
        """
        return (await self.pull_after((), command, wait_ms, origin))[1]

    async def pull_after(
        self,
        first: Sequence[Command],
        command: Pull,
        wait_ms: int,
        origin: Origin,
        order: Order = "in_turn",
        good: Good = None,
    ) -> tuple[list[Outcome], Pulled]:
        """Decide `first` and look, in one transaction; then wait and look as `pull` does. The outcomes of `first`.

        By `while_fine` what is refused of `first` is raised, and nothing is leased. A wait ends when `good` does.
        """
        if first and self.waiting.thirsty:
            told = await self._take_turns(first, origin, order)
            return told, (await self.pull_after((), command, wait_ms, origin, good=good))[1]
        if wait_ms <= 0 or len(self.waiting) >= self.max_polls:
            return await self._look([*first, command], origin, order)
        until = self.clock.now() + wait_ms
        outcomes: list[Outcome] = []
        name = (command.node_id, command.pull_id) if command.pull_id is not None else None
        with self.waiting.pull(await self._offer(command), command.limit, command.node_id, name) as waiter:
            waiter.follows, waiter.good = command.capabilities is None, good
            while True:
                waiter.asked, waiter.bars = await self._bars(command)
                wakes, freed, mark = len(waiter.woken), waiter.freed, self.waiting.mark(waiter)
                told, pulled = await self._look([*first, command], origin, order)
                outcomes, first = [*outcomes, *told], ()
                found = len(pulled.jobs)
                for lane in self.waiting.looked(waiter, found, pulled.reason, pulled.free, wakes, mark):
                    if lane in self.committer.lanes:
                        self.waiting.wake(lane)
                if freed and not found and pulled.reason != "inflight_limit":
                    self.waiting.pass_on(waiter)
                left = until - self.clock.now()
                over = left <= 0 or self.waiting.closed or waiter.dismissed
                if pulled.jobs or over or pulled.reason not in WORTH_WAITING:
                    return outcomes, pulled
                woken = await self._wait(waiter, command, origin, left)
                given = await self._given(waiter)
                if given is not None or not woken or waiter.dismissed:
                    return outcomes, given or pulled
                waiter.rouse()
                waiter.offer = await self._offer(command)

    async def _take_turns(self, first: Sequence[Command], origin: Origin, order: Order) -> list[Outcome]:
        """Others wait for a lease to end: what `first` frees is theirs, and its pull comes after them (rule 9)."""
        outcomes = await self.execute_many(first, origin, order=order)
        for one in outcomes:
            if isinstance(one, Exception) and (order == "while_fine" or not isinstance(one, Refused)):
                raise one
        await settle(TURNS)
        return outcomes

    async def _wait(self, waiter: Waiter, command: Pull, origin: Origin, ms: int) -> bool:
        """Whether something has come up; if it was a job, the pull may have been decided with it already."""
        waiter.item = Item([command], origin, None)
        try:
            return await self.clock.wait(waiter.event.wait(), ms)
        except asyncio.CancelledError:
            if waiter.served is not None:
                waiter.served.add_done_callback(self._give_back_late)
            raise
        finally:
            waiter.item = None

    async def _given(self, waiter: Waiter) -> Pulled | None:
        """The jobs that the pull was given while it waited, None if it has to look itself."""
        served, waiter.served = waiter.served, None
        if served is None:
            return None
        try:
            await asyncio.wait({served})
        except asyncio.CancelledError:
            served.add_done_callback(self._give_back_late)
            raise
        pulled = None if served.cancelled() else served.result()[-1]
        return pulled if isinstance(pulled, Pulled) and pulled.jobs else None

    def _guests(self, view: View) -> list[Item]:
        """Those who wait for jobs that a batch makes, each as an item of that batch."""
        if not self.waiting.pulls or not self.judge.trivial:
            return []  # by a policy who waits first is not who may have the job
        if view.left:
            return []  # which lane is next is known again after the commit
        lanes = {lane: len(orders) for lane, orders in view.joined().items()}
        return [waiter.serve(n) for waiter, n in self.waiting.takers(lanes)]

    async def _look(self, commands: list[Command], origin: Origin, order: Order) -> tuple[list[Outcome], Pulled]:
        """The outcomes of all but the last, which is a pull, and what that got. Any bug is raised."""
        future: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self.committer.add(Item(commands, origin, future, order=order, lost=self._lost))
        try:
            *outcomes, pulled = await future
        except asyncio.CancelledError:
            self._give_back_late(future)  # if it was answered already; else the committer tells of what is lost
            raise
        bug = next((one for one in outcomes if isinstance(one, Exception) and not isinstance(one, Refused)), None)
        if bug is not None:
            self._lost([pulled])
            raise bug
        if isinstance(pulled, BaseException):
            raise pulled
        return outcomes, pulled

    def _give_back_late(self, future: asyncio.Future[list[Outcome]]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._lost(future.result())

    def _lost(self, outcomes: Sequence[Outcome]) -> None:
        """Nobody hears of these any more: what a pull, the last of them, has got goes back."""
        if isinstance(outcomes[-1], Pulled):
            self.give_back(outcomes[-1])

    def give_back(self, pulled: Pulled, *, begun: bool = False) -> None:
        """Release leases whose answer could not be delivered, if it was the only one that told of them.

        `begun`: some of it may have arrived; then an at_most_once job is left to its lease, which ends as a loss.
        """
        jobs = [job for job in pulled.jobs if not (begun and job.at_most_once)]
        self._give_back([Release(job.id, job.lease_id or "", undelivered=True) for job in jobs])

    def _give_back(self, releases: Sequence[Command]) -> None:
        """If the store fails it is tried again with the next sweep; when the hub closes, leases end by their time."""
        if not releases:
            return
        future: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: self._undelivered.extend(releases if done.exception() else ()))
        with suppress(Refused):
            self.committer.add(Item(releases, HUB, future, urgent=True))

    def give_back_again(self) -> None:
        """Release what a failing store has kept from being released."""
        again, self._undelivered = self._undelivered, []
        self._give_back(again)

    async def _offer(self, command: Pull) -> Offer:
        if command.capabilities is not None:
            return Offer(command.capabilities, command.kinds)
        node = await self._puller(command)
        return Offer(frozenset(node.capabilities if node else ()), command.kinds)

    async def _puller(self, command: Pull) -> Node | None:
        """The node that pulls. The store is asked only for one that no pull has looked at yet."""
        key, known = Key("node", command.node_id), self.committer.memo.rows
        if key not in known:
            return await self.node(command.node_id)
        row = known[key]
        return node_of(row) if row else None

    async def _bars(self, command: Pull) -> tuple[Ask | None, Callable[[str], bool] | None]:
        """(as what the node asks the active policy, what that keeps from it as its pull will be told); None: nothing"""
        if self.judge.trivial:
            return None, None
        node = await self._puller(command)
        return node_ask("pull", command.node_id, node), bars_of(command.node_id, node, self.judge)

    async def job(self, job_id: str, wait_ms: int = 0, good: Good = None) -> Job:
        """The job, after waiting up to `wait_ms` for its end, or that of `good`. Refused with `job_not_found`."""
        with self.waiting.job(job_id, good) as finished:
            job = await self._find_job(job_id)
            if wait_ms > 0 and not job.finished and len(self.waiting) <= self.max_polls:
                await self.clock.wait(finished.event.wait(), wait_ms)
                return job_of(finished.row) if finished.row is not None else await self._find_job(job_id)
            return job

    async def _find_job(self, job_id: str) -> Job:
        rows = await self.fetch([job_key(job_id)])
        if not rows:
            raise Refused(Code.JOB_NOT_FOUND, f"there is no job {job_id}")
        return job_of(rows[0])

    async def params(self, jobs: Iterable[Job]) -> dict[str, bytes]:
        """The params that are kept in rows of their own, by job id."""
        keys = [Key("params", job.id) for job in jobs if job.params_apart]
        return {row.id: row.doc for row in await self.fetch(keys)} if keys else {}

    @property
    def judge(self) -> Judge:
        """What decides by the active policy."""
        return self.committer.judge

    async def policies(self, after: str | None = None, limit: int = 100) -> tuple[Pointer, Page]:
        """Which version is active, and a piece of the list of versions."""
        pointer = pointer_of(next(iter(await self.fetch([POINTER])), None))
        return pointer, await self.page("policy", (), after, limit)

    async def policy(self, version: int) -> Snapshot | None:
        """One version, None if there is none."""
        rows = await self.fetch([Key("policy", version_id(version))])
        return snapshot_of(rows[0]) if rows else None

    async def node(self, node_id: str) -> Node | None:
        """The node as last recorded, None if it was never heard of."""
        rows = await self.fetch([Key("node", node_id)])
        return node_of(rows[0]) if rows else None

    def state_of(self, node: Node) -> State:
        """The node's state now."""
        return state_of(node, self.clock.now(), self.limits, self.committer.started_at)

    async def fetch(self, keys: Sequence[Key]) -> list[Row]:
        """Committed rows. Refused with `unavailable` when the store is down."""
        try:
            return await self.store.fetch(keys)
        except StoreDown as down:
            raise unavailable(down) from down

    async def page(
        self,
        kind: str,
        labels: Sequence[str | None] = (),
        after: str | None = None,
        limit: int = 100,
        *,
        newest: bool = False,
    ) -> Page:
        """A piece of a list. Refused with `unavailable` when the store is down."""
        try:
            return await self.store.page(kind, labels, after, limit, newest=newest)
        except StoreDown as down:
            raise unavailable(down) from down

    async def counts(self, prefix: str = "") -> dict[str, int]:
        """The kept counters; those of single nodes and sources only if they are asked for.

        Refused with `unavailable` when the store is down.
        """
        try:
            found = [await self.store.counts(one) for one in ((prefix,) if prefix else KEPT)]
        except StoreDown as down:
            raise unavailable(down) from down
        return {facet: n for counts in found for facet, n in counts.items()}

    @property
    def throttled(self) -> Collection[str]:
        """The sources that have used up their concurrency: their waiting jobs are shown as `throttled` (rule 10)."""
        return self.committer.lanes.benched

    def pauses(self) -> tuple[Pause, ...]:
        """What is paused now."""
        return self.committer.standing.pauses.holding(self.clock.now()).pauses

    def frees_in_ms(self) -> int:
        """When the next lease may end by its time, from now; what lies beyond the sweep's sight counts as its end."""
        if self.lease_ends_at is None:
            return FREES_MAX_MS
        return min(max(self.lease_ends_at - self.clock.now(), FREES_MIN_MS), FREES_MAX_MS)

    def _committed(self, committed: Committed) -> None:
        """Broad `except`, one of the four: an observer that fails is logged and passed over."""
        for observer in self._observers:
            try:
                observer(committed)
            except Exception:
                log.exception("an observer failed")
        changes = committed.changes
        rows = (*changes.new, *changes.put)
        if rows or changes.gone:
            self.waiting.committed(changes)
            self._let_look()
            soonest = min((row.due_at for row in rows if row.agenda in SWEPT), default=None)
            if soonest is not None:
                self.loops[0].nudge(soonest)

    def _let_look(self) -> None:
        """Wake who waits for sources that are no longer throttled, and everybody when pauses have changed."""
        standing = self.committer.standing
        for lane, n in standing.freed():
            for _ in range(n):
                if not self.waiting.wake(lane):
                    break
        if standing.resumed() or self._judge is not self.judge:
            self._judge = self.judge
            self.waiting.wake_all()

    def stood_still(self, ms: int) -> None:
        """The process could hear nobody for so long: leases and nodes get the grace of a start (design rule 12)."""
        log.warning("the hub has stood still for %.1f s; leases and nodes get the grace of a restart", ms / 1000)
        self.committer.started_at = self.clock.now()

    async def sweep(self) -> int | None:
        """One look at everything that is due; when the next is."""
        return await sweep(self)


WORTH_WAITING = ("no_job", "inflight_limit", "node_full", "paused", "throttled")
"""Reasons that a long poll waits on; any other is told at once."""


KEPT = ("attestation:", "job:", "key", "node:", "read")
"""How the facets begin that are told together; those of single nodes, sources and missions grow without bound."""

FREES_MIN_MS, FREES_MAX_MS = 100, 1000
"""The bounds of how long a pull is asked to wait for a lease to end; the sweep sees a second ahead."""


def unavailable(down: StoreDown) -> Refused:
    """The refusal for a store that fails."""
    return Refused(Code.UNAVAILABLE, f"the store cannot be read: {down}", retry_after_ms=2000)
