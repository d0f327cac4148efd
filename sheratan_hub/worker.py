"""The node daemon: pulls jobs, runs their handlers, keeps their leases, sends results; and `@handler` to write them.

A handler module says `from sheratan_hub.worker import Fail, handler`. Longer than 300 lines because the daemon is
best read in one piece.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec

from sheratan_hub.client import HubClient, Lease, Pulled, Report
from sheratan_hub.clock import Clock, rfc3339
from sheratan_hub.contact import Contact
from sheratan_hub.handlers import Attempt, Fail, Handler, Outcome, failure, handler, load
from sheratan_hub.outbox import Outbox
from sheratan_hub.pulling import Pulling
from sheratan_hub.runner import ProcessDied, Runner
from sheratan_hub.running import Running
from sheratan_hub.tracing import Span, Tracing
from sheratan_hub.work_spans import WorkSpans

__all__ = ["Attempt", "Fail", "Options", "Worker", "handler", "load", "work"]

T = TypeVar("T")

PULL_MAX = 100
OUTBOX_MAX = 2000
PAUSE_MIN_MS, PAUSE_MAX_MS = 250, 30_000
FLUSH_MS = 5_000
SAME_SIGNAL_MS = 300


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


class Worker:
    """One node. `run` until `stop`; `say` gets one line for each thing an operator should know."""

    def __init__(
        self,
        hub: HubClient,
        handlers: Mapping[str, Handler],
        options: Options,
        clock: Clock,
        say: Callable[[str], None],
        tracing: Tracing | None = None,
    ) -> None:
        self._spans = WorkSpans(tracing, options.node_id) if tracing is not None else None
        self._hub, self._options, self._clock, self._say = hub, options, clock, say
        self._runner = Runner(options.module, handlers, options.concurrency)
        self._contact = Contact(clock, say)
        settled = self._spans.settled if self._spans is not None else None
        self._outbox = Outbox(hub, self._contact, clock, say, self._carry, self._carried, settled)
        self._pulling = Pulling(hub, clock, options.node_id, options.capabilities, sorted(handlers))
        self._group = asyncio.TaskGroup()
        self._running: dict[str, Running] = {}
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._boot_id = clock.secret()
        self._drained = False

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Pull no more; `run` returns when what runs is done, or released after the grace."""
        self._stop.set()
        self._changed.set()

    async def run(self) -> None:
        """Work until `stop`. Raises ProcessDied when the pool of processes cannot be started."""
        await self._runner.start()
        try:
            async with self._group:
                beat_in_ms = await self._unless_stopped(self._beat())
                lasting = (
                    self._group.create_task(self._heartbeats(beat_in_ms or 0.0)),
                    self._group.create_task(self._outbox.send_all()),
                )
                while not self.stopping:
                    await self._pull_more()
                await self._wind_down()
                for task in lasting:
                    task.cancel()
        finally:
            await self._runner.stop()

    async def _pull_more(self) -> None:
        """Lease what there is room for and start it, or wait until there is room or work.

        Results that are about to be sent bring jobs for the room that they leave, so they go first.
        """
        free = self._free()
        if free <= 0 or self._drained or self._pulling.in_flight or self._outbox.due:
            self._changed.clear()
            await self._clock.wait(self._changed.wait(), PAUSE_MAX_MS)
            return
        began = self._clock.now()
        pull = self._hub.pull(**self._pulling.ask(free), wait_seconds=self._options.wait_seconds)
        pulled = await self._unless_stopped(self._contact.reach("pull", pull))
        self._take(pulled)
        pause = self._defer_ms(pulled, self._clock.now() - began)
        if pause:
            await self._unless_stopped(self._clock.sleep(pause))

    def _carry(self) -> dict[str, Any] | None:
        """The pull that goes with the results that leave now, if there may be one."""
        free = self._free()
        if free <= 0 or self._drained or self.stopping or self._pulling.in_flight:
            return None
        return self._pulling.ask(free)

    def _carried(self, pulled: Pulled | None) -> None:
        """The results that carried a pull have come back."""
        self._take(pulled)
        if self.stopping and pulled is None:
            self._hand_back()

    def _take(self, pulled: Pulled | None) -> None:
        """A pull has come back: start what it leased, or release that if the worker is to stop."""
        self._pulling.answered(pulled)
        for lease in pulled.jobs if pulled is not None else ():
            if self.stopping:
                self._group.create_task(self._release(lease))
            else:
                self._start(lease)
        self._changed.set()

    def _free(self) -> int:
        if len(self._outbox) >= OUTBOX_MAX:
            return 0
        return min(PULL_MAX, self._options.concurrency - len(self._running))

    def _defer_ms(self, pulled: Pulled | None, waited_ms: int) -> float:
        """How long to wait before the next pull: the hub's word, but not after a long poll that took its time."""
        if pulled is None:
            return self._contact.pause_ms("pull")
        wait_ms = self._options.wait_seconds * 1000
        if pulled.jobs or pulled.reason == "pull_spent" or 0 < wait_ms <= waited_ms * 2:
            return 0.0
        return min(max(pulled.defer_ms or 0, PAUSE_MIN_MS), PAUSE_MAX_MS)

    def _start(self, lease: Lease) -> None:
        for older in self._running.values():
            if older.lease.job_id == lease.job_id:
                older.end("gone")
        if lease.lease_id not in self._running:
            span = None
            if self._spans is not None:
                span, lease = self._spans.begin(lease)
            job = self._running[lease.lease_id] = Running(lease, self._hub, self._runner, self._contact, self._clock)
            self._group.create_task(self._work(job) if span is None else self._traced(job, span))

    async def _traced(self, job: Running, span: Span) -> None:
        """Work on it as a part of its trace: what an async handler traces is a child of this span."""
        with span:
            outcome = await self._work(job)
            if self._spans is not None:
                self._spans.done(span, job.lease, outcome)

    async def _work(self, job: Running) -> Outcome | None:
        lease = job.lease
        try:
            outcome = await job.work()
        except ProcessDied as died:
            # Whoever stops a worker may have signalled its processes too: that is not the job's failure.
            again = self.stopping and lease.delivery != "at_most_once"
            outcome = None if again else failure("ProcessDied", str(died))
        finally:
            del self._running[lease.lease_id]
            self._changed.set()
        if outcome is not None:
            if not outcome.ok:
                self._say(f"job {lease.job_id} ({lease.kind}) failed: {said(outcome.error)}")
            self._outbox.put(self._report(lease, outcome))
        elif job.ending.done() and job.ending.result() == "gone":
            self._say(f"job {lease.job_id} is no longer this node's; its handler was stopped")
        else:
            await self._release(lease)
        return outcome

    async def _release(self, lease: Lease) -> None:
        await self._contact.reach("release", self._hub.release(lease.job_id, lease.lease_id))

    def _report(self, lease: Lease, outcome: Outcome) -> Report:
        return Report(
            job_id=lease.job_id,
            lease_id=lease.lease_id,
            node_id=self._options.node_id,
            ok=outcome.ok,
            result=outcome.result,
            error=outcome.error,
            retry=outcome.retry,
            retry_after_seconds=outcome.retry_after_seconds,
        )

    async def _heartbeats(self, first_in_ms: float) -> None:
        pause = first_in_ms
        while True:
            await self._clock.sleep(pause)
            pause = await self._beat()

    async def _beat(self) -> float:
        """Check in and do what the answer says; when to do it again (ms)."""
        beat = await self._contact.reach(
            "heartbeat",
            self._hub.heartbeat(
                self._options.node_id,
                boot_id=self._boot_id,
                status="busy" if self.stopping else "online",
                zone=self._options.zone,
                capabilities=self._options.capabilities,
                current_jobs=len(self._running),
                max_concurrent=self._options.concurrency,
                ts_utc=rfc3339(self._clock.now()),
            ),
        )
        if beat is None:
            return self._contact.pause_ms("heartbeat")
        for job in self._running.values():
            if job.lease.job_id in beat.cancel:
                job.end("cancelled")
        self._drain(beat.drain)
        if beat.token.retiring and self._hub.reload_token():
            self._say("the token retires; went over to the one that the token file holds now")
        return max(float(PAUSE_MIN_MS), beat.heartbeat_after_seconds * 1000)

    def _drain(self, drained: bool) -> None:
        if drained != self._drained:
            self._say("the hub drains this node: no new jobs" if drained else "the hub takes this node back")
            self._drained = drained
            self._changed.set()

    async def _wind_down(self) -> None:
        """Let what runs finish within the grace, release the rest, send what is done."""
        self._say(f"stopping: {len(self._running)} jobs running, {len(self._outbox)} results to send")
        self._group.create_task(self._beat())
        if self._pulling.unanswered and not self._pulling.in_flight:
            self._hand_back()
        await self._idle(self._options.grace_seconds * 1000)
        for job in self._running.values():
            job.end("released")
        await self._idle(2 * FLUSH_MS)
        await self._outbox.flush(FLUSH_MS)
        if self._outbox:
            self._say(f"{len(self._outbox)} results could not be delivered; their jobs will be given out again")

    def _hand_back(self) -> None:
        self._group.create_task(self._contact.reach("pull", self._pulling.hand_back()))

    async def _idle(self, ms: float) -> None:
        """Wait until nothing runs, at most `ms`."""
        until = self._clock.now() + ms
        while self._running and (left := until - self._clock.now()) > 0:
            self._changed.clear()
            await self._clock.wait(self._changed.wait(), left)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, or None when it had to be cancelled because the worker stops."""
        task, stopped = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            stopped.cancel()
            await asyncio.wait({task, stopped})


def said(error: bytes) -> str:
    """A failure's type and message, on one line."""
    told = msgspec.json.decode(error)
    return f"{told.get('type')}: {told.get('message')}".replace("\n", " ")[:200] if isinstance(told, dict) else "?"


async def work(worker: Worker, clock: Clock) -> None:
    """Run the worker until SIGTERM or SIGINT; a second one ends the process and its handlers at once.

    Not one within a moment of the first: `timeout` and shells signal a process and then its group.
    """
    first_at = 0

    def on_signal(number: int) -> None:
        nonlocal first_at
        if not worker.stopping:
            first_at = clock.now()
            worker.stop()
        elif clock.now() - first_at > SAME_SIGNAL_MS:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + number)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await worker.run()
