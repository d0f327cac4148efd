"""One lease being worked on: its handler runs while the lease is kept, until it is done or has to end."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from sheratan_hub.client import Extended, HubClient, HubRefused, Lease
from sheratan_hub.clock import Clock
from sheratan_hub.contact import Contact
from sheratan_hub.handlers import Attempt, Outcome, failure
from sheratan_hub.runner import Runner

Cause = Literal["timeout", "cancelled", "gone", "released"]

PAUSE_MIN_MS = 100
END_MS = 5_000
"""How long an async handler may take to end once it is cancelled."""


class Running:
    """A lease and the work on it. `ending` gets the first cause to end the work before it is done."""

    def __init__(self, lease: Lease, hub: HubClient, runner: Runner, contact: Contact, clock: Clock) -> None:
        self.lease = lease
        self.ending: asyncio.Future[Cause] = asyncio.get_running_loop().create_future()
        self._hub, self._runner, self._contact, self._clock = hub, runner, contact, clock

    def end(self, cause: Cause) -> None:
        """Have the work ended; only the first cause counts, and none if the work is done before."""
        if not self.ending.done():
            self.ending.set_result(cause)

    async def work(self) -> Outcome | None:
        """Run the handler: what to report, or None when the lease is gone or is to be released.

        Raises ProcessDied when its process ended without an answer.
        """
        lease = self.lease
        run = asyncio.create_task(self._runner.run(lease.kind, bytes(lease.params_json), _attempt(lease)))
        either: set[asyncio.Future[Any]] = {run, self.ending}
        try:
            async with asyncio.TaskGroup() as group:
                watches = group.create_task(self._keep()), group.create_task(self._time_out())
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                for watch in watches:
                    watch.cancel()
        finally:
            run.cancel()
            await self._clock.wait(asyncio.wait({run}), END_MS)
        return run.result() if run.done() and not run.cancelled() else self._ended()

    def _ended(self) -> Outcome | None:
        if not self.ending.done():
            return failure("CancelledError", "the handler cancelled itself")
        match self.ending.result():
            case "timeout":
                return failure("Timeout", f"it ran for longer than {self.lease.timeout_seconds:g} seconds")
            case "cancelled":
                return failure("Cancelled", "it was cancelled while it ran", retry=False)
            case "released" if self.lease.delivery == "at_most_once":
                return failure("Stopped", "its worker was stopped while it ran, and it must not run twice", retry=False)
        return None

    async def _time_out(self) -> None:
        if self.lease.timeout_seconds is not None:
            await self._clock.sleep(self.lease.timeout_seconds * 1000)
            self.end("timeout")

    async def _keep(self) -> None:
        """Renew the lease at each third of its time; a renewal that did not reach the hub is tried again sooner.

        The hub says how long the renewed lease lasts: one that was sent twice began with what was left of it.
        """
        third_ms = self.lease.lease_seconds * 1000 / 3
        pause = third_ms
        while True:
            await self._clock.sleep(max(pause, PAUSE_MIN_MS))
            longer = await self._contact.reach("extend", self._extend())
            if longer is not None and longer.lease_seconds is not None:
                third_ms = longer.lease_seconds * 1000 / 3
            pause = third_ms if longer is not None else third_ms / 4

    async def _extend(self) -> Extended:
        try:
            longer = await self._hub.extend(self.lease.job_id, self.lease.lease_id)
        except HubRefused as no:
            if no.status not in (404, 409):
                raise
            self.end("gone")
            return Extended()
        if longer.cancel_requested:
            self.end("cancelled")
        return longer


def _attempt(lease: Lease) -> Attempt:
    """The part of a lease that its handler may see."""
    return Attempt(**{name: getattr(lease, name) for name in Attempt.__struct_fields__})
