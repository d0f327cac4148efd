"""Runs handlers: async ones in the event loop, sync ones in a pool of processes. pebble stops here.

To cancel `Runner.run` is to end the work: the coroutine is cancelled, the process killed and replaced.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pebble import ProcessExpired, ProcessPool

from sheratan_hub.handlers import Attempt, Handler, Outcome, prepare, run, run_async

T = TypeVar("T")

PRELOAD = ["sheratan_hub.worker"]
"""Imported once in the server that the processes are forked from: what nearly every handler module imports."""


class ProcessDied(Exception):
    """A process ended without an answer: killed from outside, out of memory, a crash in foreign code."""


class Runner:
    """The handlers of one module and, if any of them is sync, as many processes as may run at once."""

    def __init__(self, module: str, handlers: Mapping[str, Handler], processes: int) -> None:
        self._module = module
        self._handlers = handlers
        self._processes = processes
        self._pool: ProcessPool | None = None

    async def start(self) -> None:
        """Start the pool, if one is needed. Raises ProcessDied when the module can't be imported there."""
        if not all(found.is_async for found in self._handlers.values()):
            await self._in_pool(_ready)

    async def run(self, kind: str, params: bytes, attempt: Attempt) -> Outcome:
        """How the handler of `kind` ended. Raises ProcessDied."""
        found = self._handlers[kind]
        if found.is_async:
            return await run_async(found, params, attempt)
        return await self._in_pool(run, kind, params, attempt)

    async def stop(self) -> None:
        """End every process of the pool."""
        if self._pool is not None:
            await self._end(self._pool)

    async def _in_pool(self, function: Callable[..., T], *args: object) -> T:
        fresh = self._pool is None
        pool = self._pool = self._pool or self._new_pool()
        try:
            # The first schedule starts the processes, which takes long enough to keep it out of the loop.
            future = await asyncio.to_thread(pool.schedule, function, args) if fresh else pool.schedule(function, args)
            return await asyncio.wrap_future(future)
        except ProcessExpired as died:
            raise ProcessDied(f"the process of the handler ended with exit code {died.exitcode}") from died
        except (BrokenProcessPool, RuntimeError) as broken:
            await self._end(pool)
            raise ProcessDied(f"the processes for {self._module} broke down: {broken}") from broken

    def _new_pool(self) -> ProcessPool:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        return ProcessPool(self._processes, initializer=prepare, initargs=(self._module,), context=context)

    async def _end(self, pool: ProcessPool) -> None:
        if self._pool is pool:
            self._pool = None
            pool.stop()  # type: ignore[no-untyped-call]
            await asyncio.to_thread(pool.join)


def _ready() -> None:
    """The first task of a pool: that it is done shows that the module could be imported there."""
