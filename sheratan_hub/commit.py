"""Group commit: one transaction, one sync, for all the commands that are waiting.

While a batch is in flight the next one gathers, so batches grow with load and no timer lingers. Replies go out
after the commit. One bad command never fails its neighbours.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from sheratan_hub.clock import settle
from sheratan_hub.deciding import decide
from sheratan_hub.items import Committed, Happened, Item, resolve
from sheratan_hub.memo import Memo
from sheratan_hub.rules.command import Code, Limits, Refused, Scene
from sheratan_hub.rules.lanes import Lanes
from sheratan_hub.rules.policies import POINTER, judge_of, pointer_of, snapshot_of, version_id
from sheratan_hub.rules.policy import Judge
from sheratan_hub.rules.view import View
from sheratan_hub.standing import Standing
from sheratan_hub.storage import Changes, Conflict, Key, Store, StoreDown, StoreFull, Tx

log = logging.getLogger("sheratan.commit")

TURNS = 3
"""Turns of the event loop: one writes the replies of the last batch, one reads requests, one brings their commands."""

CONFLICT_TRIES = 3
"""How often a whole batch is decided again after a conflict, before its parts go one by one."""


class Committer:
    """Takes commands, decides them in batches, saves, answers. Owns the directory of lanes.

    `after` is called with each `Committed` before its replies go out. `guests` is asked, with what a batch has
    decided, for pulls to be decided in the same transaction; if that fails, their futures are cancelled.
    `gate` is asked before each batch; what it answers refuses the batch.
    `failing`: the store has failed, and has taken no change since.
    """

    def __init__(
        self,
        store: Store,
        limits: Limits,
        after: Callable[[Committed], None],
        *,
        max_waiting: int = 20_000,
        max_batch: int = 512,
    ) -> None:
        self._store, self._limits, self._after = store, limits, after
        self._max_waiting, self._max_batch = max_waiting, max_batch
        self._queue: deque[Item] = deque()
        self._waiting = 0
        self._wake = asyncio.Event()
        self._closing = False
        self.memo = Memo(shared=store.shared)
        self.guests: Callable[[View], list[Item]] = lambda _: []
        self.gate: Callable[[], Refused | None] = lambda: None
        self.lanes = Lanes()
        self.standing = Standing(limits)
        self.judge = Judge()
        self._judge_is_old = False
        self.started_at = 0
        self._first_order = 0
        self.failing = False

    async def prepare(self) -> None:
        """Read the lanes' heads and note the time of the start. Call once, after the store is open."""
        self.lanes = Lanes(await self._store.heads(), self._limits.age_ms)
        await self.standing.prepare(self._store, self.lanes)
        self.started_at = await self._store.now()
        self.judge = await self._active_judge()

    async def _active_judge(self) -> Judge:
        """What decides by the policy version that is active."""
        active = pointer_of(next(iter(await self._store.fetch([POINTER])), None)).active
        rows = await self._store.fetch([Key("policy", version_id(active))]) if active else []
        return judge_of(snapshot_of(rows[0]) if rows else None)

    async def _renew_judge(self) -> None:
        """Take the policy that was activated; nothing more is decided by the old one, even if this fails at first."""
        if self._judge_is_old:
            self.judge = await self._active_judge()
            self._judge_is_old = False

    def adopt(self, limits: Limits) -> None:
        """Decide by other limits from the next batch on; how lanes age stays as it was."""
        self._limits = limits
        self.standing.adopt(limits, self.lanes)

    @property
    def waiting(self) -> int:
        """How many commands wait for a batch."""
        return self._waiting

    def add(self, item: Item) -> None:
        """Queue an item. Refused with `busy` when the queue is full (never an urgent one), `draining` after `close`."""
        if self._closing:
            raise Refused(Code.DRAINING, "the hub is shutting down", retry_after_ms=2000)
        if self._waiting >= self._max_waiting and not item.urgent:
            raise Refused(Code.BUSY, f"{self._waiting} commands are waiting to be written", retry_after_ms=1000)
        self._queue.append(item)
        self._waiting += item.size
        self._wake.set()

    def close(self) -> None:
        """Take nothing more; `run` returns once everything queued is done."""
        self._closing = True
        self._wake.set()

    async def run(self) -> None:
        """Commit batch after batch until closed. Cancelling it loses what is queued, never what was answered."""
        while not (self._closing and not self._queue):
            self._wake.clear()
            await self._gather()
            batch = self._next_batch()
            if batch:
                await self._commit_until_done(batch)
            elif not self._closing:
                await self._wake.wait()

    async def _gather(self) -> None:
        """Let more come while a few turns of the event loop bring some: the larger a batch, the less each costs."""
        seen = 0
        while seen < self._waiting < self._max_batch:
            seen = self._waiting
            await settle(TURNS)

    def _next_batch(self) -> list[Item]:
        batch: list[Item] = []
        size = 0
        while self._queue and (not batch or size + self._queue[0].size <= self._max_batch):
            item = self._queue.popleft()
            self._waiting -= item.size
            if item.wanted:
                item.begun = True
                batch.append(item)
                size += item.size
        return batch

    async def _commit_until_done(self, batch: list[Item]) -> None:
        for _ in range(CONFLICT_TRIES):
            try:
                if await self._commit(batch):
                    return
            except Conflict:
                continue
            break
        else:
            if len(batch) == 1:
                resolve(batch, Refused(Code.BUSY, "others keep changing the same rows; try again", retry_after_ms=500))
                return
        for item in batch:
            await self._commit_until_done([item])

    async def _commit(self, batch: list[Item], *, serving: bool = True) -> bool:
        """One try; false if the batch must be taken apart to find the item that breaks it. Raises `Conflict`.

        Broad `except`, one of the four: no bug may end the hub.
        """
        if (closed := self.gate()) is not None:
            resolve(batch, closed)
            return True
        guests: list[Item] = []
        try:
            committed, view = await self._transact(batch, guests if serving else None)
        except Exception as error:
            self.memo.forget()
            for guest in guests:
                if guest.future is not None:
                    guest.future.cancel()
            if guests and not isinstance(error, Conflict | StoreDown):
                return await self._commit(batch, serving=False)  # it may have been a guest's fault
            return self._failed(batch, error)
        if committed.changes:
            self.failing = False
        try:
            await self._learn(view, committed.changes)
        except Exception:
            log.exception("the directory of lanes could not be brought up to date")
        try:
            self._after(committed)
        except Exception:
            log.exception("what follows a commit failed")
        resolve((*batch, *guests))
        return True

    def _failed(self, batch: list[Item], error: Exception) -> bool:
        if isinstance(error, Conflict):
            raise error
        if isinstance(error, StoreDown):
            self.failing = True
            after_ms = 5000 if isinstance(error, StoreFull) else 2000
            resolve(batch, Refused(Code.UNAVAILABLE, f"the store cannot write: {error}", retry_after_ms=after_ms))
            return True
        log.error("a batch of %d items failed", len(batch), exc_info=error)
        if len(batch) == 1:
            resolve(batch, error)
        return len(batch) == 1

    async def _transact(self, batch: list[Item], guests: list[Item] | None) -> tuple[Committed, View]:
        """Decide the batch and whoever waits for what it makes (`guests` are filled in; None: nobody), and save."""
        await self._renew_judge()
        now, known = await self._store.now(), self.memo.rows
        scene = Scene(now, self._limits, self.lanes, self.started_at, self._first_order, self.judge, known)
        view = View(scene)
        async with self._store.begin() as tx:
            durable = await decide(batch, tx, view, self.memo)
            if guests is not None:
                durable = await self._serve(guests, tx, view) or durable
            changes = view.changes()
            if changes:
                await tx.save(changes, durable=durable)
        items = (*batch, *(guests or ()))
        happened = [Happened(item.notes, item.origin) for item in items if item.notes]
        return Committed(happened, changes, sum(len(item.commands) for item in items)), view

    async def _serve(self, guests: list[Item], tx: Tx, view: View) -> bool:
        """Let waiting pulls have jobs in the transaction that makes them; whether the changes must be synced."""
        guests += self.guests(view)
        if not guests:
            return False
        for lane, orders in view.joined().items():
            if lane not in self.lanes:
                view.add_empty(lane)
            self.lanes.joined_by(lane, min(orders))
        return await decide(guests, tx, view, self.memo)

    async def _learn(self, view: View, changes: Changes) -> None:
        """Keep the active policy and the directory of lanes in step with what was committed."""
        self._first_order = view.next_order()
        self.memo.learn(view, changes)
        for lane, head in view.heads().items():
            self.lanes.set(lane, head, sure=view.sure(lane))
        for row in (*changes.new, *changes.put):
            if row.lane is not None:
                self.lanes.joined_by(row.lane, row.order)
            if row.kind == POINTER.kind:
                self._judge_is_old = True
        self.standing.learn(view, changes, self.lanes)  # before the store is asked, which may fail
        for lane in view.left | set(self.lanes.doubtful()):
            self.lanes.set(lane, (await self._store.heads(lane)).get(lane))
        await self._renew_judge()
