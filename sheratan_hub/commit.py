"""Group commit: one transaction, one sync, for all the commands that are waiting.

While a batch is in flight the next one gathers, so batches grow with load and no timer lingers. Replies go out
after the commit. One bad command never fails its neighbours.

Longer than 300 lines because a command's way from the queue to its reply is told in one place.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from sheratan_hub.rules.command import Code, Command, Decision, Event, Limits, Need, Refused, Scene, Together
from sheratan_hub.rules.lanes import Lanes
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Changes, Conflict, Store, StoreDown, StoreFull, Tx, Wants, merge

log = logging.getLogger("sheratan.commit")

CONFLICT_TRIES = 3
"""How often a whole batch is decided again after a conflict, before its parts go one by one."""

ROUNDS = 256
"""How often a command may ask for more before it counts as broken."""


class Origin(msgspec.Struct, frozen=True, gc=False):
    """Where a request came from, for the audit log. `route` is the table's path, `path` the client's."""

    plane: str = "hub"
    remote_addr: str | None = None
    path: str | None = None
    node_id: str | None = None
    route: str | None = None


HUB = Origin()

Outcome = Any
"""A command's answer, or the exception (`Refused`, or a bug's) that it ended with."""

Order = Literal["any", "in_turn", "while_fine"]
"""While a command of an item waits for more rows, the others go on (`any`), or those after it wait for it (`in_turn`).
`while_fine`: in turn, and once one has failed those after it fail with the same error."""


class Item(msgspec.Struct, eq=False):
    """Commands that were handed in together, and who waits for their outcomes (None: nobody).

    `urgent` ones, the hub's own upkeep, are never refused for want of room.
    """

    commands: Sequence[Command]
    origin: Origin
    future: asyncio.Future[list[Outcome]] | None
    urgent: bool = False
    order: Order = "any"
    outcomes: list[Outcome] = msgspec.field(default_factory=list)
    notes: list[Event] = msgspec.field(default_factory=list)
    begun: bool = False
    size: int = 0
    """How many decisions it takes."""

    def __post_init__(self) -> None:
        self.size = len(self.commands)
        for command in self.commands:
            if isinstance(command, Together):
                self.size += len(command) - 1

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits; what nobody waits for is not begun."""
        return self.future is None or not self.future.done()


class Happened(msgspec.Struct, frozen=True, gc=False):
    """What observers are told after a commit: the events and notes of one item, and where it came from."""

    events: Sequence[Event]
    origin: Origin


class Committed(msgspec.Struct, frozen=True, gc=False):
    """A batch that is on disk: what happened, and the rows that were written."""

    happened: Sequence[Happened]
    changes: Changes
    commands: int


class Committer:
    """Takes commands, decides them in batches, saves, answers. Owns the directory of lanes.

    `after` is called with each `Committed` before its replies go out. `failing` tells whether the store refused
    the last batch.
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
        self.lanes = Lanes()
        self.started_at = 0
        self._first_order = 0
        self.failing = False

    async def prepare(self) -> None:
        """Read the lanes' heads and note the time of the start. Call once, after the store is open."""
        self.lanes = Lanes(await self._store.heads())
        self.started_at = await self._store.now()

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
            batch = self._next_batch()
            if batch:
                await self._commit_until_done(batch)
            elif not self._closing:
                await self._wake.wait()

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
                _resolve(batch, Refused(Code.BUSY, "others keep changing the same rows; try again", retry_after_ms=500))
                return
        for item in batch:
            await self._commit_until_done([item])

    async def _commit(self, batch: list[Item]) -> bool:
        """One try; false if the batch must be taken apart to find the item that breaks it. Raises `Conflict`.

        Broad `except`, one of the four: no bug may end the hub.
        """
        try:
            committed, view = await self._transact(batch)
        except Conflict:
            raise
        except StoreDown as down:
            self.failing = True
            after_ms = 5000 if isinstance(down, StoreFull) else 2000
            _resolve(batch, Refused(Code.UNAVAILABLE, f"the store cannot write: {down}", retry_after_ms=after_ms))
            return True
        except Exception as bug:
            log.exception("a batch of %d items failed", len(batch))
            if len(batch) > 1:
                return False
            _resolve(batch, bug)
            return True
        self.failing = False
        try:
            await self._learn(view, committed.changes)
            self._after(committed)
        except Exception:
            log.exception("what follows a commit failed")
        for item in batch:
            if item.future is not None and not item.future.done():
                item.future.set_result(item.outcomes)
        return True

    async def _transact(self, batch: list[Item]) -> tuple[Committed, View]:
        scene = Scene(await self._store.now(), self._limits, self.lanes, self.started_at, self._first_order)
        view = View(scene)
        durable = False
        async with self._store.begin() as tx:
            todo = _opened(batch, scene)
            await _load(tx, view, merge((wants for _, _, _, wants in todo), self._limits.max_inflight))
            left = [(item, place, command) for item, place, command, _ in todo]
            for _ in range(ROUNDS):
                left, needs, synced = _decide_all(view, left)
                durable = durable or synced
                if not left:
                    break
                await _load(tx, view, merge(needs, self._limits.max_inflight))
            for item, place, command in left:
                item.outcomes[place] = RuntimeError(f"{type(command).__name__} asks for more and more")
            changes = view.changes()
            if changes:
                await tx.save(changes, durable=durable)
        happened = [Happened(item.notes, item.origin) for item in batch if item.notes]
        return Committed(happened, changes, len(todo)), view

    async def _learn(self, view: View, changes: Changes) -> None:
        """Keep the directory of lanes in step with what was committed."""
        self._first_order = view.next_order()
        for lane, head in view.heads().items():
            self.lanes.set(lane, head)
        for lane in view.left:
            self.lanes.set(lane, (await self._store.heads(lane)).get(lane))
        for row in (*changes.new, *changes.put):
            if row.lane is not None:
                self.lanes.joined_by(row.lane, row.order)


Todo = tuple[Item, int, Command]


def _opened(batch: list[Item], scene: Scene) -> list[tuple[Item, int, Command, Wants]]:
    """Every command with what it wants. One that cannot even say so has its outcome already."""
    out = []
    for item in batch:
        item.outcomes = [None] * len(item.commands)
        item.notes = []
        for place, command in enumerate(item.commands):
            try:
                out.append((item, place, command, command.wants(scene)))
            except Exception as bug:
                item.outcomes[place] = _as_outcome(bug, command)
    return out


def _decide_all(view: View, todo: list[Todo]) -> tuple[list[Todo], list[Wants], bool]:
    """Decide each; those that need more are returned with their needs. The last value: must it be synced?"""
    again: list[Todo] = []
    needs: list[Wants] = []
    durable = False
    held: Item | None = None
    for item, place, command in todo:
        if item is held:
            again.append((item, place, command))
            needs += _foreseen(view, command)
            continue
        if item.order == "while_fine" and place and isinstance(item.outcomes[place - 1], Exception):
            item.outcomes[place] = item.outcomes[place - 1]
            continue
        try:
            decision: Decision = command.decide(view)
            view.apply(decision)
        except Need as need:
            again.append((item, place, command))
            needs.append(need.wants)
            held = item if item.order != "any" else None
            continue
        except Exception as no:
            item.outcomes[place] = _as_outcome(no, command)
            continue
        durable = durable or decision.durable
        item.outcomes[place] = decision.answer
        item.notes += (*decision.events, *decision.notes)
    return again, needs, durable


def _foreseen(view: View, command: Command) -> list[Wants]:
    """What a command that waits for its turn would ask for, so that all of an item's needs are loaded at once."""
    try:
        command.decide(view)
    except Need as need:
        return [need.wants]
    except Exception:
        return []  # its turn will tell
    return []


def _as_outcome(error: Exception, command: Command) -> Exception:
    if not isinstance(error, Refused):
        log.error("%s failed", type(command).__name__, exc_info=error)
    return error


async def _load(tx: Tx, view: View, wants: Wants) -> None:
    view.add(wants, await tx.load(wants))


def _resolve(batch: list[Item], error: Exception) -> None:
    for item in batch:
        if item.future is not None and not item.future.done():
            item.future.set_exception(error)
