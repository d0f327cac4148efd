"""Lists of the hub, page after page, for as long as somebody reads on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol, TypeVar

from sheratan_hub.transport import Plane, Request, Transport


class Paged(Protocol):
    """A page: there are more while `next_cursor` is set, even after an empty one."""

    @property
    def next_cursor(self) -> str | None:
        """What to ask the next page with."""
        ...


P = TypeVar("P", bound=Paged)


async def pages(
    hub: Transport, plane: Plane, path: str, page: type[P], query: Mapping[str, str], cursor: str = "cursor"
) -> AsyncIterator[P]:
    """Every page of a list, each asked for when it is read; `cursor` names the query's field for it."""
    while True:
        found = await hub.ask(Request(plane, "GET", path, query=query), page)
        yield found
        if found.next_cursor is None:
            return
        query = {**query, cursor: found.next_cursor}
