"""Background work: a loop runs its step, sleeps until the next is due, and never ends silently."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from sheratan_hub.clock import Clock
from sheratan_hub.rules.command import Refused

log = logging.getLogger("sheratan.loops")

LATE_MS = 5000
NEVER = 2**62

Step = Callable[[], Awaitable[int | None]]
"""Does what is due; returns when it wants to run again (ms since 1970), or None."""


class Loop:
    """Runs `step` when it is due: at the time it asked for, when nudged, and at least every `at_least_ms`.

    One that `rests` may ask for a later time than that; it is tried again after `at_least_ms` if it fails.

    When it wakes `LATE_MS` after its time or more, the process has stood still: then `late` is told how long before.
    """

    def __init__(
        self,
        name: str,
        step: Step,
        clock: Clock,
        at_least_ms: int = 1000,
        late: Callable[[int], None] = lambda _: None,
        *,
        rests: bool = False,
    ) -> None:
        self.name = name
        self.errors = 0
        self._said = ""
        self._late, self._rests = late, rests
        self._step, self._clock, self._at_least_ms = step, clock, at_least_ms
        self._nudged = asyncio.Event()
        self._next_at = 0

    def nudge(self, at: int) -> None:
        """Something is due at this time (ms): run then, if it is sooner than planned."""
        if at < self._next_at:
            self._next_at = at
            self._nudged.set()

    async def run(self) -> None:
        """Run until cancelled. Broad `except`, one of the four: a failed step is logged, counted and tried again."""
        while True:
            asked: int | None = None
            at_least = self._clock.now() + self._at_least_ms
            self._next_at = NEVER  # but a nudge may come while the step runs
            try:
                asked = await self._step()
                self._said = ""
            except Refused as no:  # as long as the store has no room: that is said once
                self.errors += 1
                if no.text != self._said:
                    log.warning("loop %s has to wait: %s", self.name, no.text)
                self._said = no.text
            except Exception:
                self.errors += 1
                log.exception("loop %s failed", self.name)
            if asked is None or not self._rests:
                asked = at_least if asked is None else min(asked, at_least)
            self._next_at = min(self._next_at, asked)
            since = self._clock.now()
            await self._sleep()
            over = self._clock.now() - max(self._next_at, since)
            if over >= LATE_MS:
                self._late(over)

    async def _sleep(self) -> None:
        while (left := self._next_at - self._clock.now()) > 0:
            self._nudged.clear()
            await self._clock.wait(self._nudged.wait(), left)
