"""Ends the leases of nodes that are DEAD, were started anew, or are drained past their deadline: page by page.

That they must end stands in the node's row until it is done (`Node.owed`), so a crash in between loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sheratan_hub.rules.command import Command
from sheratan_hub.rules.finish import Release
from sheratan_hub.rules.jobs import job_of
from sheratan_hub.rules.nodes import End
from sheratan_hub.rules.silence import EndSilence, LookAgain, Settle
from sheratan_hub.rules.sweep import ReapNode
from sheratan_hub.storage import Row

if TYPE_CHECKING:
    from sheratan_hub.hub import Hub
    from sheratan_hub.items import Origin

PAGE = 100
"""So many leases end in one transaction."""


async def reap(hub: Hub, ends: Sequence[End]) -> None:
    """End what is owed: by death or a new boot as losses, at a drain's deadline at no cost (design rule 4)."""
    for end in ends:
        await _end(hub, end)
    if ends:
        await hub.execute_many([Settle(end) for end in ends], urgent=True)


async def _end(hub: Hub, end: End) -> None:
    after: str | None = None
    while True:
        page = await hub.page("job", ("running", None, None, None, end.node_id), after, PAGE)
        if page.rows:
            await hub.execute_many(_commands(end, page.rows), urgent=True)
        if page.next is None:
            return
        after = page.next


def _commands(end: End, rows: Sequence[Row]) -> list[Command]:
    if end.owed != "drain":
        return [ReapNode(end, tuple(row.id for row in rows))]
    return [Release(job.id, job.lease_id or "", cause="drain_deadline") for job in map(job_of, rows)]


async def end_silence(hub: Hub, origin: Origin) -> bool:
    """An operator ends the brake on mass silence: the leases of DEAD nodes end now. Whether there was one."""
    ended: bool = await hub.execute(EndSilence(), origin)
    after: str | None = None
    while ended:
        page = await hub.page("node", ("DEAD",), after, 500)
        if page.rows:
            await hub.execute_many([LookAgain(tuple(row.id for row in page.rows))], urgent=True)
        if page.next is None:
            break
        after = page.next
    return ended
