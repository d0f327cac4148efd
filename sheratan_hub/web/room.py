"""A submit that finds the queue full waits a moment for room, while workers make some (design rule 9).

A hub that tells a crowd of submits at once that the queue is full is asked again at once, and spends itself on
refusals while its workers starve: under five times too much it kept a third of its throughput. So only a few refusals
go out at once; the other submits wait, and are decided once more when jobs have been taken from the queue. Who gets no
room in time is refused as ever. While nobody works there is nothing to wait for, and every refusal goes out at once.
A submit whose idempotency key is known makes no job and needs no room, so it waits behind nobody.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Any

from sheratan_hub.clock import Clock
from sheratan_hub.hub import Hub
from sheratan_hub.items import Committed, Origin
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.submit import Submit, Submitted, key_id, queue_full
from sheratan_hub.storage import Key

LATEST_MS = 1000
"""No submit waits longer for room."""

IDLE_MS = 200
"""So long after the last job has left the queue, nobody works."""

AT_ONCE, LEFT = 64, 4
"""So many refusals may go out at once; then one more for every `LEFT` jobs that have left the queue."""

ELSEWHERE = ("job:running", "job:completed", "job:failed", "job:cancelled")
"""Where jobs are that have left the queue."""

MOST = 20_000
"""So many submits may wait."""


class Room:
    """Lets submits wait for room in the queue."""

    def __init__(self, hub: Hub, clock: Clock) -> None:
        self._hub, self._clock = hub, clock
        self._credit = AT_ONCE * LEFT
        self._left_at = 0
        self._waiting: dict[asyncio.Future[None], None] = {}
        hub.observe(self._committed)

    async def submit(self, command: Submit, origin: Origin) -> Any:
        """The command's answer. Refused as `Hub.execute` does, with `queue_full` perhaps a little later."""
        if self._waiting and self._working() and not await self._known(command):  # behind those who wait already
            if not await self._turn():
                raise queue_full(self._hub.limits.max_depth)  # as it would be told: it need not be decided for that
            return await self._use(command, origin)
        try:
            return await self._hub.execute(command, origin)
        except Refused as no:
            if no.code is not Code.QUEUE_FULL or not self._worth_waiting() or not await self._turn():
                raise
        return await self._use(command, origin)

    async def _use(self, command: Submit, origin: Origin) -> Any:
        """Its turn has come. If it makes no job after all, the next may have the room."""
        made = False
        try:
            done: Submitted = await self._hub.execute(command, origin)
            made = not done.dedup
            return done
        except Refused as no:
            made = no.code is Code.QUEUE_FULL  # there was none
            raise
        finally:
            if not made:
                self._grant(1)

    async def _known(self, command: Submit) -> bool:
        """Whether its key names a job, as far as a look tells: what is decided is decided by the rules."""
        return command.key is not None and bool(await self._hub.fetch([Key("key", key_id(command.key))]))

    def _worth_waiting(self) -> bool:
        """Whether workers make room, and enough have been told already that there is none."""
        if self._credit >= LEFT:
            self._credit -= LEFT
            return False
        return self._working() and not self._hub.waiting.closed

    def _working(self) -> bool:
        return self._clock.now() - self._left_at <= IDLE_MS

    async def _turn(self) -> bool:
        """Whether there is room now, as far as one can tell."""
        if len(self._waiting) >= MOST:
            return False
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = None
        try:
            await self._clock.wait(turn, LATEST_MS)
            return turn.done()
        except asyncio.CancelledError:
            if turn.done():
                self._grant(1)
            raise
        finally:
            self._waiting.pop(turn, None)
            turn.cancel()

    def _committed(self, committed: Committed) -> None:
        """Jobs have left the queue: as many submits may try."""
        counts = committed.changes.counts
        left = sum(counts.get(facet, 0) for facet in ELSEWHERE)
        events = (event for happened in committed.happened for event in happened.events)
        left += sum(event.meta["count"] for event in events if event.event == "jobs.pruned")
        if left > 0:
            self._left_at = self._clock.now()
            self._credit = min(self._credit + left, AT_ONCE * LEFT)
            self._grant(left)

    def _grant(self, room: int) -> None:
        for turn in list(islice(self._waiting, max(0, room))):
            del self._waiting[turn]
            turn.set_result(None)
