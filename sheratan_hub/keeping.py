"""What the hub keeps, and for how long: prunes finished jobs and ledger events by age, watches the dead letters."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from sheratan_hub.items import HUB, Committed
from sheratan_hub.rules.command import Event
from sheratan_hub.rules.jobs import PRUNE
from sheratan_hub.rules.mission_prune import MISSIONS_MAX, MissionsPruned, PruneMissions
from sheratan_hub.rules.prune import PRUNE_MAX, Prune, kept_ms

if TYPE_CHECKING:
    from sheratan_hub.hub import Hub

log = logging.getLogger("sheratan.keeping")

FIRST, LARGE_BYTES = 8, 1 << 20
"""Jobs that the first transaction of a prune takes; while these are smaller than so many bytes, the next takes twice
as many: jobs may hold a megabyte each, and a hundred of those at once would be felt."""

LEDGER_EVERY_MS = 600_000

REST_MIN_MS, REST_MAX_MS = 1000, 600_000
"""The bounds of how long nothing is looked at."""

WATCH_MS = 1000
"""The number of dead letters is looked at once in so long at most."""


class Keeping:
    """Runs behind everything else: one small transaction after the other, until nothing is due; then it rests.

    `nudge` asks for the next run at a time (ms).
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._jobs_at = self._ledger_at = 0
        self._watched_at, self._watch = 0, True
        self.over = False
        self.nudge: Callable[[int], None] = lambda _: None

    def committed(self, committed: Committed) -> None:
        """The observer: more jobs or fewer have failed, so that their number is looked at within a second."""
        if "job:failed" in committed.changes.counts and not self._watch:
            self._watch = True
            self.nudge(self._watched_at + WATCH_MS)

    def adopt(self) -> None:
        """Other ages and bounds are in force: look at everything now, not when the rest is over."""
        self._jobs_at = self._ledger_at = 0
        self._watch = True
        self.nudge(self._hub.clock.now())

    async def prune(self) -> int | None:
        """Forget the finished jobs and the events whose time is over; when to come again."""
        now, limits = self._hub.clock.now(), self._hub.limits
        if now >= self._jobs_at:
            next_at = min(await self._prune_jobs(), await self._prune_missions())
            self._jobs_at = next_at if self._hub.limits is limits else 0
        if self._watch:
            self._watch, self._watched_at = False, now
            try:
                await self._watch_dead_letters()
            except BaseException:
                self._watch = True
                raise
        if now >= self._ledger_at:
            self._ledger_at = now + LEDGER_EVERY_MS
            await self._hub.store.prune_events(now - self._hub.limits.ledger_kept_ms)
        return min(self._jobs_at, self._ledger_at)

    async def _prune_jobs(self) -> int:
        """When the next is due. A job that ends later than now cannot be due before its whole time from now is over."""
        limits = self._hub.limits
        began = self._hub.clock.now()
        next_at = began + min(REST_MAX_MS, limits.mission_kept_ms, *(kept_ms(status, limits) for status in PRUNE))
        due = dict.fromkeys(PRUNE, FIRST)
        while due:
            outcomes = await self._hub.execute_many([Prune(*one) for one in due.items()], HUB, urgent=True)
            again = {}
            for (status, limit), pruned in zip(due.items(), outcomes, strict=True):
                if isinstance(pruned, BaseException):
                    raise pruned
                if pruned.looked >= limit:
                    again[status] = min(2 * limit, PRUNE_MAX) if pruned.size < LARGE_BYTES else FIRST
                elif pruned.next_at is not None:
                    next_at = min(next_at, pruned.next_at)
            due = again
        return max(next_at, began + REST_MIN_MS)

    async def _prune_missions(self) -> int:
        """Forget those that are over; when the next is due."""
        began = self._hub.clock.now()
        while True:
            done: MissionsPruned = (await self._hub.execute_many([PruneMissions()], HUB, urgent=True))[0]
            if isinstance(done, BaseException):
                raise done
            if done.looked < MISSIONS_MAX:
                return max(done.next_at or began + REST_MAX_MS, began + REST_MIN_MS)

    async def _watch_dead_letters(self) -> None:
        """Nothing is dropped for being too many; that there are is said once, until there are fewer again."""
        limits = self._hub.limits
        if not limits.dead_letters:
            self.over = False
            return
        n = (await self._hub.counts("job:failed")).get("job:failed", 0)
        if n > limits.dead_letters_max and not self.over:
            log.warning("%d jobs are dead letters, more than dlq.max_items (%d)", n, limits.dead_letters_max)
            event = Event(self._hub.clock.now(), "dlq.over", "hub", meta={"count": n, "max": limits.dead_letters_max})
            self._hub.report(event, HUB)
        self.over = n > limits.dead_letters_max
