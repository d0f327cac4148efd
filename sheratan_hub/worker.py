"""The node daemon: pulls jobs, runs their handlers, keeps their leases, sends results; and `@handler` to write them.

A handler module says `from sheratan_hub.worker import Fail, handler`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from sheratan_hub.client import HubClient, HubRefused, Lease, Report
from sheratan_hub.clock import Clock
from sheratan_hub.contact import Contact
from sheratan_hub.handlers import Attempt, Fail, Handler, Outcome, failure, handler, load
from sheratan_hub.outbox import Outbox
from sheratan_hub.runner import ProcessDied, Runner

__all__ = ["Attempt", "Fail", "Options", "Worker", "handler", "load"]

PULL_MAX = 100
OUTBOX_MAX = 2000
QUIET_MS = 60_000
END_MS = 5_000


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told. `concurrency`: how many handlers run at once; `wait_seconds`: of a long poll (0-30);
    `grace_seconds`: how long running handlers may go on once it is to stop."""

    module: str
    node_id: str
    concurrency: int = 1
    capabilities: tuple[str, ...] = ()
    zone: str | None = None
    wait_seconds: float = 20.0
    grace_seconds: float = 10.0


class Running:
    """A lease being worked on. `ending` gets the first cause to end the work before it is done."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.ending: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def end(self, cause: str) -> None:
        """`cause` is "timeout", "cancelled", "gone" or "released"; only the first counts."""
        if not self.ending.done():
            self.ending.set_result(cause)


class Worker:
    """One node. `run` until `stop`; `say` gets one line for each thing an operator should know."""

    def __init__(
        self,
        hub: HubClient,
        handlers: Mapping[str, Handler],
        options: Options,
        clock: Clock,
        say: Callable[[str], None],
    ) -> None:
        self._hub, self._options, self._clock, self._say = hub, options, clock, say
        self._kinds = sorted(handlers)
        self._runner = Runner(options.module, handlers, options.concurrency)
        self._contact = Contact(clock, say)
        self._outbox = Outbox(hub, self._contact, clock, say)
        self._running: dict[str, Running] = {}
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._beaten = asyncio.Event()
        self._boot_id = clock.secret()
        self._pull_id = clock.secret()
        self._drained = False

    def stop(self) -> None:
        """Pull no more; `run` returns when what runs is done, or released after the grace."""
        self._stop.set()
        self._changed.set()

    async def run(self) -> None:
        """Work until `stop`. Raises ProcessDied when the pool of processes cannot be started."""
        await self._runner.start()
        try:
            async with asyncio.TaskGroup() as group:
                lasting = [group.create_task(self._heartbeats()), group.create_task(self._outbox.send_all())]
                await self._pull_until_stopped(group)
                await self._wind_down(group)
                for task in lasting:
                    task.cancel()
        finally:
            await self._runner.stop()

    # pulling

    async def _pull_until_stopped(self, group: asyncio.TaskGroup) -> None:
        await self._unless_stopped(self._beaten.wait(), QUIET_MS)
        while not self._stop.is_set():
            free = self._free()
            if free <= 0 or self._drained:
                await self._until_changed()
                continue
            began = self._clock.now()
            pull = group.create_task(self._pull(free))
            await self._unless_stopped(asyncio.shield(pull), QUIET_MS)
            ...

    def _free(self) -> int:
        if len(self._outbox) >= OUTBOX_MAX:
            return 0
        return min(PULL_MAX, self._options.concurrency - len(self._running))
