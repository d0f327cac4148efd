"""Notes whose results were read: what a client has seen first is marked in the store, behind its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sheratan_hub.items import HUB
from sheratan_hub.rules.command import Refused
from sheratan_hub.rules.jobs import Job
from sheratan_hub.rules.prune import MarkRead

if TYPE_CHECKING:
    from sheratan_hub.hub import Hub

MARKS = 200
"""Jobs that one command marks."""

KNOWN_MAX = 100_000
"""So many ids are remembered as marked; the mark in the store tells of the others."""

WAITING_MAX = 20_000
"""So many may wait to be marked; what is read beyond counts as unread until it is read again."""


class Reading:
    """`note` costs a look into a set; `flush` marks what was noted, some hundred jobs a transaction."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._known: set[str] = set()
        self._waiting: dict[str, int] = {}

    def note(self, job: Job) -> None:
        """A client was given this job's result, if it has one."""
        if job.status != "completed" or job.id in self._known or len(self._waiting) >= WAITING_MAX:
            return
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        self._known.add(job.id)
        self._waiting[job.id] = job.finished_at

    async def flush(self) -> int | None:
        """Mark what was noted until now; if that fails, who reads next makes it be tried again."""
        waiting, self._waiting = list(self._waiting.items()), {}
        for start in range(0, len(waiting), MARKS):
            try:
                await self._hub.execute_many([MarkRead(tuple(waiting[start : start + MARKS]))], HUB)
            except Refused:
                self._known.difference_update(id for id, _ in waiting[start:])
                raise
        return None
