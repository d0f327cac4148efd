"""Heartbeats of a large fleet travel together: nobody waits for their answers, and each transaction costs a sync."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sheratan_hub.items import Item, Origin
from sheratan_hub.rules.command import Command, Refused
from sheratan_hub.rules.nodes import Beat, Beaten
from sheratan_hub.unsaved import Unsaved, reminded

if TYPE_CHECKING:
    from sheratan_hub.hub import Hub

MANY = 100
"""At fewer heartbeats a second each goes its own way."""

GATHER_SECONDS = 0.025
"""So long the first of several waits for the others; by the event loop's own time, as a socket would."""


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
            self.unsaved.superseded(command.node_id)
            return await reminded(self._hub, done)
        except Refused as no:
            return await self.unsaved.heard(command.node_id, command, no)

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
