"""Heartbeats that could not be written down, as the disk is full, read-only, or the audit log's: heard all the same.

Each is decided on what the store shows, and answered. The last one of each node is written down when there is room
again, before anybody is looked at for his silence; and until then leases and nodes get the grace of a start, since
nobody can extend anything either.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from sheratan_hub.rules.command import Code, Command, Need, Refused, Scene
from sheratan_hub.rules.jobs import job_of
from sheratan_hub.rules.nodes import Beaten, Remind
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Loaded, Wants

if TYPE_CHECKING:
    from sheratan_hub.hub import Hub

CODES = frozenset({Code.UNAVAILABLE, Code.AUDIT_UNAVAILABLE})
"""How a refusal says that nothing can be written now."""

NODES_MAX = 20_000
"""Of so many nodes a heartbeat is remembered at most; others are heard when they come again."""

TOLD_MAX = 1000
"""So many of a new node's running jobs are looked at for those that it is to stop."""

PIECE = 500
LOADS_MAX = 8


class Unsaved:
    """The last heartbeat of each node that is not written down yet."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._beats: dict[str, Command] = {}

    def __len__(self) -> int:
        """Of how many nodes."""
        return len(self._beats)

    async def heard(self, node_id: str, command: Command, no: Refused) -> Any:
        """The answer to a heartbeat that was refused with `no`; raises it if it does not say that there is no room."""
        if no.code not in CODES:
            raise no
        if len(self._beats) < NODES_MAX or node_id in self._beats:
            self._beats[node_id] = command  # before anything is awaited, or a later one may have been written by then
        answer = await self._decided(command, no)
        committer = self._hub.committer
        committer.started_at = max(committer.started_at, self._hub.clock.now())
        return answer

    def superseded(self, node_id: str) -> None:
        """A later heartbeat of this node was written."""
        self._beats.pop(node_id, None)

    async def _decided(self, command: Command, no: Refused) -> Any:
        """What the command answers on what is committed. Raises `no` if that cannot be read either."""
        hub, committer = self._hub, self._hub.committer
        scene = Scene(hub.clock.now(), hub.limits, committer.lanes, committer.started_at, 0, committer.judge)
        view, wants = View(scene), command.wants(scene)
        for _ in range(LOADS_MAX):
            try:
                view.add(wants, await self._loaded(wants))
            except Refused:
                raise no from None
            try:
                return command.decide(view).answer
            except Need as need:
                wants = need.wants
        raise no

    async def _loaded(self, wants: Wants) -> Loaded:
        rows = {row.key: row for row in await self._hub.fetch(list(wants.keys | wants.look))}
        counts = {facet: (await self._hub.counts(facet)).get(facet, 0) for facet in wants.counts}
        return Loaded(rows=rows, counts=counts)

    async def catch_up(self) -> None:
        """Write down what was heard. Raises `Refused` while there is no room: nobody may be looked at before."""
        while self._beats:
            some = dict(islice(self._beats.items(), PIECE))
            outcomes = await self._hub.execute_many(list(some.values()), urgent=True)
            for (node_id, command), done in zip(some.items(), outcomes, strict=True):
                if isinstance(done, Beaten):
                    await reminded(self._hub, done)
                if self._beats.get(node_id) is command:
                    del self._beats[node_id]


async def reminded(hub: Hub, done: Beaten) -> Beaten:
    """The answer, when a node is heard of for the first time with all that it is to stop: it may hold jobs that were
    cancelled before.
    """
    node = done.node
    if node.first_seen != node.last_seen:
        return done
    page = await hub.page("job", ("running", None, None, None, node.id), None, TOLD_MAX)
    asked = tuple(job.id for job in map(job_of, page.rows) if job.cancel_at)
    if not asked:
        return done
    return msgspec.structs.replace(done, cancel=await hub.execute(Remind(node.id, asked)))
