"""A worker's contact with its hub: every failed call is told once until it works again, and waited upon."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from sheratan_hub.clock import Clock
from sheratan_hub.transport import HubRefused, HubUnreachable

T = TypeVar("T")
Say = Callable[[str], None]

BASE_MS = 250
CAP_MS = {"AUTH_FAIL": 30_000, "HUB_REFUSED": 30_000, "HUB_UNREACHABLE": 5_000}


class Contact:
    """What is wrong between a worker and its hub, by trouble and by the purposes that met it.

    A trouble is said when the first purpose meets it and again only after the last one is rid of it.
    """

    def __init__(self, clock: Clock, say: Say) -> None:
        self._clock = clock
        self._say = say
        self._met: dict[str, set[str]] = {trouble: set() for trouble in CAP_MS}
        self._tries: dict[str, int] = {}

    async def reach(self, purpose: str, call: Awaitable[T]) -> T | None:
        """The answer of `call`, or None when the hub could not be reached or refused."""
        try:
            answer = await call
        except HubRefused as no:
            self._meet(purpose, "AUTH_FAIL" if no.status == 403 else "HUB_REFUSED", str(no))
            return None
        except HubUnreachable as error:
            self._meet(purpose, "HUB_UNREACHABLE", str(error))
            return None
        self._tries.pop(purpose, None)
        for trouble in CAP_MS:
            self._rid(purpose, trouble)
        return answer

    def pause_ms(self, purpose: str) -> float:
        """How long to wait before the next try: doubling, half of it jitter; 0 when the last one went well."""
        tries = self._tries.get(purpose, 0)
        if not tries:
            return 0.0
        cap = max(cap for trouble, cap in CAP_MS.items() if purpose in self._met[trouble])
        bound = min(cap, BASE_MS * 2.0 ** min(tries, 30))
        return bound * (0.5 + self._clock.jitter() / 2)

    def _meet(self, purpose: str, trouble: str, text: str) -> None:
        self._tries[purpose] = self._tries.get(purpose, 0) + 1
        if not self._met[trouble]:
            self._say(f"{trouble} {text}; trying again")
        self._met[trouble].add(purpose)
        for other in CAP_MS:
            if other != trouble:
                self._rid(purpose, other)

    def _rid(self, purpose: str, trouble: str) -> None:
        if purpose in self._met[trouble]:
            self._met[trouble].discard(purpose)
            if not self._met[trouble]:
                self._say(f"{trouble} is over")
