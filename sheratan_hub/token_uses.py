"""Which token each node last used: by its heartbeats and, while a rotation is under way, by its pulls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sheratan_hub.hub import Hub
from sheratan_hub.keyring import Keyring
from sheratan_hub.rules.nodes import node_of

PIECE = 200
"""Nodes that are read at once; others have their turn in between."""


class LastUse(NamedTuple):
    """The token's id, when it was used (ms), and the node's state; None for one that only pulls."""

    token_id: str
    at: int
    state: str | None


async def last_uses(hub: Hub, keyring: Keyring) -> dict[str, LastUse]:
    """The last use of each node that is known to have used a token. Reads all nodes, piece by piece."""
    uses: dict[str, LastUse] = {}
    after: str | None = None
    while True:
        page = await hub.page("node", (), after, PIECE)
        for node in map(node_of, page.rows):
            if node.token_id is not None:
                uses[node.id] = LastUse(node.token_id, node.last_seen, hub.state_of(node))
        after = page.next
        if after is None:
            break
        await hub.clock.sleep(0)
    for node_id, use in keyring.uses.items():
        known = uses.get(node_id)
        if known is None or known.at < use.at:
            uses[node_id] = LastUse(use.token_id, use.at, known.state if known else None)
    return uses


def users_of(token_id: str, uses: Mapping[str, LastUse]) -> list[str]:
    """The nodes, sorted, that last used this token and would be locked out without it: DEAD ones do not count."""
    return sorted(id for id, use in uses.items() if use.token_id == token_id and use.state != "DEAD")
