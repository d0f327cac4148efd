"""Refusals that wait their turn, so that telling a crowd that the queue is full does not take the workers' time.

A hub that answers each refused submit at once spends most of itself on refusals when five times too many come, and
its workers starve (measured: half of its throughput). So refusals are given out as useful answers are: a few at once,
then one for each `USEFUL` answers; a client whose refusal waits sends nothing meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import deque

from sheratan_hub.clock import Clock
from sheratan_hub.rules.command import Code

PACED = frozenset({Code.QUEUE_FULL})
"""Refusals that come in crowds and say: later."""

USEFUL = 4
"""So many useful answers pay for one refusal."""

AT_ONCE = 64
"""So many refusals may be saved up, and go out at once."""

LATEST_MS = 1000
"""No refusal waits longer than this."""

IDLE_MS = 200
"""After so long without a useful answer there is nobody to be protected: refusals go out at once."""

MOST = 20_000
"""So many refusals may wait; one more goes out at once."""


class Pace:
    """Tells refusals when they may go out."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._credit = AT_ONCE * USEFUL
        self._useful_at = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def useful(self) -> None:
        """An answer was no refusal."""
        self._useful_at = self._clock.now()
        self._credit += 1
        while self._waiting and self._credit >= USEFUL:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._credit -= USEFUL
        self._credit = min(self._credit, AT_ONCE * USEFUL)

    async def refusal(self) -> None:
        """Wait until this refusal may go out."""
        if self._credit >= USEFUL:
            self._credit -= USEFUL
            return
        if self._clock.now() - self._useful_at > IDLE_MS or len(self._waiting) >= MOST:
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        if not await self._clock.wait(turn, LATEST_MS):
            turn.cancel()
