"""Finished results on their way to the hub: gathered while the last batch is in flight, kept until it took them.

They take a pull along, so that the next jobs come with the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import msgspec

from sheratan_hub.answers import Accepted, Pulled, Refusal, Report
from sheratan_hub.canonical import NULL
from sheratan_hub.client import HubClient
from sheratan_hub.clock import Clock
from sheratan_hub.contact import Contact
from sheratan_hub.handlers import failure

BATCH = 500
LATER = frozenset({429, 500, 503})
UNFIT = frozenset({400, 413, 422})
CONFLICT = 409
TOO_LARGE = 413
PURPOSE = "results"


class Outbox:
    """The results of one node that the hub has not yet taken.

    `carry` gives the pull that goes with results that leave, if there is one; then `carried` is told what it got,
    None if there was no answer. `settled` is told of each result that will not be sent again.
    """

    def __init__(
        self,
        hub: HubClient,
        contact: Contact,
        clock: Clock,
        say: Callable[[str], None],
        carry: Callable[[], dict[str, Any] | None],
        carried: Callable[[Pulled | None], None],
        settled: Callable[[Report, Accepted | Refusal], None] | None = None,
    ) -> None:
        self._hub = hub
        self._contact = contact
        self._clock = clock
        self._say = say
        self._carry = carry
        self._carried = carried
        self._settled = settled
        self._busy = False
        self._reports: dict[str, Report] = {}
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()

    def __len__(self) -> int:
        return len(self._reports)

    @property
    def due(self) -> bool:
        """Whether results are about to leave: not those that are on their way, or have to wait for the hub."""
        return self._filled.is_set() and not self._busy

    def put(self, report: Report) -> None:
        """Have this sent."""
        self._reports[report.lease_id] = report
        self._emptied.clear()
        self._filled.set()

    async def flush(self, ms: float) -> None:
        """Wait until everything is sent, at most `ms`."""
        await self._clock.wait(self._emptied.wait(), ms)

    async def send_all(self) -> None:
        """Send what comes, until cancelled."""
        while True:
            await self._filled.wait()
            self._busy = True
            batch = list(islice(self._reports.values(), BATCH))
            outcomes = await self._send(batch)
            again = outcomes is None or self._settle(batch, outcomes)
            if again:
                await self._clock.sleep(max(250.0, self._contact.pause_ms(PURPOSE)))
            self._busy = False
            if not self._reports:
                self._filled.clear()
                self._emptied.set()

    async def _send(self, batch: Sequence[Report]) -> Sequence[Accepted | Refusal] | None:
        pull = self._carry()
        if pull is None:
            return await self._contact.reach(PURPOSE, self._hub.results(batch))
        answer = None
        try:
            answer = await self._contact.reach(PURPOSE, self._hub.results_and_pull(batch, **pull))
        finally:
            self._carried(answer[1] if answer else None)
        return answer[0] if answer else None

    def _settle(self, batch: Sequence[Report], outcomes: Sequence[Accepted | Refusal]) -> bool:
        """Forget what the hub took or will never take; whether something is to be sent again later."""
        again = False
        for report, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Refusal) and outcome.status in LATER:
                again = True
                continue
            del self._reports[report.lease_id]
            if self._settled is not None:
                self._settled(report, outcome)
            if isinstance(outcome, Refusal):
                self._refused(report, outcome)
        return again

    def _refused(self, report: Report, no: Refusal) -> None:
        """A result that can't be taken as it is becomes a failure that says so; for others there is nobody left."""
        if no.status == CONFLICT and not report.ok:
            return  # the hub saw the failure first: the time was up, the job cancelled, the lease lost
        self._say(f"the hub refused the result of job {report.job_id}: {no.detail} ({no.status} {no.code})")
        if report.ok and no.status in UNFIT and no.code != "result_integrity_fail":
            name = "ResultTooLarge" if no.status == TOO_LARGE else "ResultRefused"
            unfit = failure(name, f"{no.detail} ({no.code})", retry=False)
            self.put(msgspec.structs.replace(report, ok=False, result=NULL, error=unfit.error, retry=False))
