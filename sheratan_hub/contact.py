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
    """What is wrong between a worker and its hub, by trouble and by the planes it was met on.

    A trouble is said when the first plane shows it and again only after the last one is rid of it.
    """

    def __init__(self, clock: Clock, say: Say) -> None:
        self._clock = clock
        self._say = say
        self._met: dict[str, set[str]] = {trouble: set() for trouble in CAP_MS}
        self._tries: dict[str, int] = {}

    async def reach(self, purpose: str, call: Awaitable[T]) -> T | None:
        """The answer of `call`, or None when the hub could not be reached or refused."""
        plane = "control" if purpose == "heartbeat" else "data"
        try:
            answer = await call
        except HubRefused as no:
            self._trouble(plane, "AUTH_FAIL" if no.status == 403 else "HUB_REFUSED", str(no))
        except HubUnreachable as error:
            self._trouble(plane, "HUB_UNREACHABLE", str(error))
        else:
            self._tries.pop(purpose, None)
            self._trouble(plane, None)
            return answer
        self._tries[purpose] = self._tries.get(purpose, 0) + 1
        return None

    def pause_ms(self, purpose: str) -> float:
        """How long to wait before the next try: doubling, half of it jitter; 0 when the last one went well."""
        tries = self._tries.get(purpose, 0)
        cap = max((CAP_MS[trouble] for trouble, planes in self._met.items() if planes), default=5_000)
        bound = min(cap, BASE_MS * 2.0 ** min(tries - 1, 30)) if tries else 0.0
        return bound * (0.5 + self._clock.jitter() / 2)

    def _trouble(self, plane: str, now: str | None, text: str = "") -> None:
        """`plane` shows the trouble `now` and no other."""
        for trouble, planes in self._met.items():
            before = bool(planes)
            planes.discard(plane)
            if trouble == now:
                planes.add(plane)
            if planes and not before:
                self._say(f"{trouble} {text}; trying again")
            elif before and not planes:
                self._say(f"{trouble} is over")
