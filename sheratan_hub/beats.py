"""Heartbeats of a large fleet travel together: nobody waits for their answers, and each transaction costs a sync."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from sheratan_hub.items import Item, Origin
from sheratan_hub.rules.command import Command, Refused
from sheratan_hub.rules.jobs import job_of
from sheratan_hub.rules.nodes import Beat, Beaten, Remind
from sheratan_hub.unsaved import Unsaved

if TYPE_CHECKING:
    from sheratan_hub.hub import Hub

MANY = 100
"""At fewer heartbeats a second each goes its own way."""

GATHER_SECONDS = 0.025
"""So long the first of several waits for the others; by the event loop's own time, as a socket would."""

TOLD_MAX = 1000
"""So many of a new node's running jobs are looked at for those that it is to stop."""


class Beats:
    """Hands heartbeats to the committer: a few at once, many in groups."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.unsaved = Unsaved(hub)
        self._second = self._count = self._before = 0
        self._gathered: list[Item] = []

    async def take(self, command: Beat, origin: Origin) -> Any:
        """The command's answer, once it is committed, or heard although nothing can be. Raises `Refused`."""
        try:
            done: Beaten = await self._taken(command, origin)
            if done.node.first_seen == done.node.last_seen:
                told = await self._reminded(done.node.id, done.cancel)
                return msgspec.structs.replace(done, cancel=told)
            return done
        except Refused as no:
            return await self.unsaved.heard(command.node_id, command, no)

    async def _reminded(self, node_id: str, cancel: tuple[str, ...]) -> tuple[str, ...]:
        """What a node that is heard of for the first time is to stop: it may hold jobs that were cancelled before."""
        page = await self._hub.page("job", ("running", None, None, None, node_id), None, TOLD_MAX)
        asked = tuple(job.id for job in map(job_of, page.rows) if job.cancel_at)
        if not asked:
            return cancel
        told: tuple[str, ...] = await self._hub.execute(Remind(node_id, asked))
        return told

    async def _taken(self, command: Command, origin: Origin) -> Any:
        if not self._many():
            return await self._hub.execute(command, origin)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Any]] = loop.create_future()
        if not self._gathered:
            loop.call_later(GATHER_SECONDS, self._hand_over)
        self._gathered.append(Item([command], origin, future))
        (outcome,) = await future
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _many(self) -> bool:
        """Whether this second or the one before has seen many."""
        second = self._hub.clock.now() // 1000
        if second != self._second:
            self._before = self._count if second == self._second + 1 else 0
            self._second, self._count = second, 0
        self._count += 1
        return max(self._count, self._before) >= MANY

    def _hand_over(self) -> None:
        items, self._gathered = self._gathered, []
        for item in items:
            try:
                self._hub.committer.add(item)
            except Refused as no:
                if item.future is not None and not item.future.done():
                    item.future.set_exception(no)
