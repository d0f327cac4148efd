"""What is handed to the committer and what comes out: items of commands, where they come from, what has happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import msgspec

from sheratan_hub.rules.command import Command, Event, Together
from sheratan_hub.rules.graph import Graph
from sheratan_hub.rules.missions import MakeMission
from sheratan_hub.storage import Changes


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


MANY = (Together, Graph, MakeMission)
"""Commands that stand for several."""


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
    lost: Callable[[list[Outcome]], None] | None = None
    """Is called with the outcomes if whoever waited was cancelled after it had begun."""
    size: int = 0
    """How many decisions it takes."""

    def __post_init__(self) -> None:
        self.size = len(self.commands)
        for command in self.commands:
            if isinstance(command, MANY):
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


def resolve(items: Iterable[Item], error: Exception | None = None) -> None:
    """Tell whoever waits: the outcomes, or the error that ended the whole batch."""
    for item in items:
        if item.future is None:
            continue
        if item.future.done():
            if item.lost is not None and error is None:
                item.lost(item.outcomes)
        elif error is None:
            item.future.set_result(item.outcomes)
        else:
            item.future.set_exception(error)
