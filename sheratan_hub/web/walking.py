"""Walks through long lists of jobs, piece by piece, so that neither the hub nor its store is held up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from sheratan_hub.clock import settle
from sheratan_hub.hub import Hub, unavailable
from sheratan_hub.rules.jobs import Job, job_of
from sheratan_hub.storage import StoreDown

CHUNK = 200
"""Jobs of one piece, and so of one transaction that changes them."""

EXAMINED_MAX = 100_000
"""Jobs that one request looks at; then it answers with a cursor."""

PAGE_EXAMINED = 2000
"""What a page of a store looks at when it finds little."""

Keep = Callable[[Job], bool]
T = TypeVar("T")


def everyone(_: Job) -> bool:
    """Keeps all jobs."""
    return True


class Walk:
    """The jobs under these labels that `keep` keeps, in pieces, up to `most` of them and `examine` looked at.

    While a piece is worked on, and at the end, `next` is the id after which to go on, None when the list has ended.
    """

    def __init__(
        self,
        hub: Hub,
        labels: Sequence[str | None],
        keep: Keep,
        after: str | None,
        most: int,
        examine: int = EXAMINED_MAX,
        *,
        newest: bool = False,
    ) -> None:
        self._hub, self._labels, self._keep, self._newest = hub, labels, keep, newest
        self._most, self._examine = most, examine
        self.next = after

    async def __aiter__(self) -> AsyncIterator[list[Job]]:
        """The pieces; some may be empty."""
        taken = examined = 0
        while taken < self._most and examined < self._examine:
            store = self._hub.store
            page = await read(store.page("job", self._labels, self.next, CHUNK, PAGE_EXAMINED, self._newest))
            kept = [job for job in map(job_of, page.rows) if self._keep(job)]
            piece = kept[: self._most - taken]
            self.next = page.next if len(piece) == len(kept) else piece[-1].id
            taken += len(piece)
            examined += len(page.rows) if len(page.rows) == CHUNK else PAGE_EXAMINED
            yield piece
            if self.next is None:
                return
            await settle(1)


async def read(reading: Awaitable[T]) -> T:
    """What the store says. Refused with `unavailable` when it is down."""
    try:
        return await reading
    except StoreDown as down:
        raise unavailable(down) from down
