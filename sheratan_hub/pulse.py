"""Whether the hub gets on: what the service manager's watchdog lives by.

That the loop below runs proves the event loop. The committer gets on when it has finished a batch since the last
look, or has answered a command that asks for nothing; a refusal is an answer too, as no restart mends a full disk.
"""

from __future__ import annotations

import asyncio

from sheratan_hub.hub import Hub
from sheratan_hub.items import HUB, Committed, Item, Outcome
from sheratan_hub.notify import Notifier
from sheratan_hub.rules.command import Refused
from sheratan_hub.rules.probe import Probe


class Pulse:
    """Tells `notifier` that the hub is alive, step by step, as long as it is."""

    def __init__(self, hub: Hub, notifier: Notifier) -> None:
        self._hub, self._notifier = hub, notifier
        self._batches = self._seen = 0
        self._probe: asyncio.Future[list[Outcome]] | None = None
        self._since = 0
        hub.observe(self._committed)

    def _committed(self, committed: Committed) -> None:
        if committed.commands:
            self._batches += 1

    async def step(self) -> int | None:
        """Tell that all is well, or for how long nothing has been committed."""
        now = self._hub.clock.now()
        if self._gets_on():
            if self._since:
                self._notifier.status("the committer works again")
            self._since = 0
            self._notifier.alive()
        else:
            self._since = self._since or now - self._notifier.beat_ms
            self._notifier.status(f"nothing has been committed for {(now - self._since) / 1000:.1f} s")
        return None

    def _gets_on(self) -> bool:
        batches, self._seen = self._batches - self._seen, self._batches
        if self._probe is not None and not self._probe.done():
            return batches > 0
        self._probe = probe = asyncio.get_running_loop().create_future()
        probe.add_done_callback(_seen)
        try:
            self._hub.committer.add(Item([Probe()], HUB, probe, urgent=True))
        except Refused:  # the hub is stopping: what it still has to do takes its time
            self._probe = None
        return True


def _seen(probe: asyncio.Future[list[Outcome]]) -> None:
    """A refusal is as good as an answer."""
    if not probe.cancelled():
        probe.exception()
