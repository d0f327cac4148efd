"""What submits with dependencies need before they are decided: whether the jobs exist that will be linked later.

Thousands of rows are not to be read in the transaction that makes a job, while everybody waits for it. Jobs only ever
vanish long after their end, so looking before it is as good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from sheratan_hub.hub import Hub
from sheratan_hub.rules.graph import Graph, alone, lacking, outside
from sheratan_hub.rules.jobs import job_key
from sheratan_hub.rules.submit import Submit

LOOK = 500
"""How many jobs are looked for at a time."""


async def checked(hub: Hub, submit: Submit) -> Submit:
    """The submit of one job, knowing whether what it depends on is there."""
    submit = alone(submit)
    if not submit.later:
        return submit
    found = await _found(hub, submit.depends_on)
    unknown = next((id for id in submit.depends_on if id not in found), None)
    return msgspec.structs.replace(submit, unknown=unknown)


async def checked_graph(hub: Hub, graph: Graph) -> Graph:
    """The graph, knowing whether what its members depend on is there."""
    ids = outside(graph.members, graph.parents)
    return lacking(graph, await _found(hub, ids)) if ids else graph


def ref_of(raw: bytes) -> str | None:
    """The `ref` of an entry with which something else is wrong, so that those who depend on it can be told."""
    try:
        ref = msgspec.json.decode(raw, type=_Ref).ref
    except (msgspec.DecodeError, RecursionError):
        return None
    return ref if isinstance(ref, str) else None


class _Ref(msgspec.Struct):
    ref: Any = None


async def _found(hub: Hub, ids: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for at in range(0, len(ids), LOOK):
        found.update(row.id for row in await hub.fetch([job_key(id) for id in ids[at : at + LOOK]]))
    return found
