"""A node's pulls, alone or with results: one at a time, and under one id until it is answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sheratan_hub.client import HubClient, Pulled
from sheratan_hub.clock import Clock


class Pulling:
    """What a node's next pull is. As there is one at a time, nobody else asks for the same room.

    `in_flight`: somebody waits for an answer; `unanswered`: the last one has had none, and may have leased jobs.
    """

    def __init__(
        self, hub: HubClient, clock: Clock, node_id: str, capabilities: Sequence[str], kinds: Sequence[str]
    ) -> None:
        self._hub, self._clock = hub, clock
        self._node_id, self._capabilities, self._kinds = node_id, capabilities, kinds
        self._id = clock.secret()
        self.in_flight = False
        self.unanswered = False

    def ask(self, most: int) -> dict[str, Any]:
        """What to pull up to `most` jobs with. `answered` must follow."""
        self.in_flight = self.unanswered = True
        return {
            "node_id": self._node_id,
            "max": most,
            "pull_id": self._id,
            "capabilities": self._capabilities,
            "kinds": self._kinds,
        }

    def answered(self, pulled: Pulled | None) -> None:
        """The pull has come back. None, without an answer: then leases that were lost on the way come with the next."""
        self.in_flight = False
        if pulled is not None:
            self.unanswered, self._id = False, self._clock.secret()

    async def hand_back(self) -> None:
        """Release what the unanswered pull may have leased: the same pull, but for no kind of new job."""
        pulled = await self._hub.pull(self._node_id, pull_id=self._id, kinds=[self._clock.secret()])
        for lease in pulled.jobs:
            await self._hub.release(lease.job_id, lease.lease_id)
