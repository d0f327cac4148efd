"""The workers of a crash run: they do with leases all that a worker may do, be it well or in trouble."""

from __future__ import annotations

import asyncio
from typing import Any

from tools.crash_clients import KINDS, PATIENCE_SECONDS, Client, Fleet
from tools.crash_history import PULL, RESULTS


class Worker(Client):
    """A node: takes leases, and does with them all that a worker may do, be it well or in trouble."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        super().__init__(fleet, name)
        self.later: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until the fleet is over."""
        leases: list[dict[str, Any]] = []
        while not self.fleet.over:
            leases = leases or await self.pull()
            if not leases:
                await self.pause(0.01, 0.1)
            leases = await self.work(leases)
        await asyncio.gather(*self.later)

    def body(self) -> dict[str, Any]:
        """A pull."""
        self.count += 1
        body: dict[str, Any] = {"node_id": self.name, "max": self.random.choice((1, 1, 2, 3, 5, 8, 20))}
        if self.chance(50):
            body["wait_seconds"] = 0.3 if self.fleet.calm else self.random.choice((0.2, 1, 2))
        if self.chance(65):
            body["pull_id"] = f"pull-{self.count}"
        if self.mischief(20):
            body["kinds"] = [self.random.choice(KINDS)]
        return body

    async def pull(self) -> list[dict[str, Any]]:
        """Leases. With a pull_id the pull is repeated after a lost answer and now and then for no reason.

        Some clients vanish while they wait, some as the same pull arrives a second time.
        """
        body = self.body()
        patience = self.random.uniform(0.0, self.random.choice((0.005, 0.3))) if self.mischief(8) else PATIENCE_SECONDS
        if "pull_id" not in body:
            return (await self.reach(PULL, body, patience)).leases
        if self.mischief(10):
            _, answered = await asyncio.gather(
                self.ask(PULL, body, self.random.uniform(0.0, 0.006)), self.insist(PULL, body)
            )
            return answered.leases
        leases = (await self.insist(PULL, body, patience)).leases
        return (await self.insist(PULL, body)).leases or leases if leases and self.chance(15) else leases

    async def work(self, leases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Say something of each lease, or nothing. The leases that came with the answers."""
        for lease in leases:
            former, self.fleet.held[lease["job_id"]] = self.fleet.held.get(lease["job_id"], lease), lease
            if former["lease_id"] != lease["lease_id"] and self.mischief(60):
                await self.meddle(former)
            if self.mischief(5):
                await self.meddle({**lease, "lease_id": "0" * 34})
        if len(leases) > 1 and self.chance(60):
            return await self.report_many(leases)
        found: list[dict[str, Any]] = []
        for some in await asyncio.gather(*(self.attend(lease) for lease in leases)):
            found += some
        return found

    async def report_many(self, leases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A batch of results, some of them failures, with a pull or without."""
        if self.mischief(60):
            await self.pause(0.0, 0.8)
        results = [{**self.result(lease), "job_id": lease["job_id"]} for lease in leases]
        return await self.report(RESULTS, {"results": results})

    async def attend(self, lease: dict[str, Any]) -> list[dict[str, Any]]:
        """What becomes of one lease."""
        path = f"/api/jobs/{lease['job_id']}"
        if self.mischief(70):
            await self.pause(0.0, self.random.choice((0.05, 0.4, 1.2)))
        if self.mischief(9):  # abandoned, and sometimes remembered too late
            if self.chance(40):
                self.later.add(asyncio.create_task(self.report_late(lease)))
            return []
        if self.mischief(8):
            await self.insist(f"{path}/release", {"lease_id": lease["lease_id"], "node_id": self.name})
            return []
        for _ in range(self.random.choice((1, 3, 4)) if self.mischief(12) else 0):
            seconds = self.random.choice((0.5, 2, 3, 3))
            await self.insist(f"{path}/extend", {"lease_id": lease["lease_id"], "seconds": seconds})
            await self.pause(0.0, 1.5)
        return await self.report(f"{path}/result", self.result(lease))

    async def meddle(self, lease: dict[str, Any]) -> None:
        """Say something of a lease that has ended or never was, while another has the job."""
        verb = self.random.choice(("result", "extend", "release"))
        own = {"lease_id": lease["lease_id"]}
        body = self.result(lease) if verb == "result" else {**own, "seconds": 2} if verb == "extend" else own
        await self.ask(f"/api/jobs/{lease['job_id']}/{verb}", body)

    async def report_late(self, lease: dict[str, Any]) -> None:
        """A result after the lease's end."""
        await self.pause(0.5, 4.0)
        await self.insist(f"/api/jobs/{lease['job_id']}/result", self.result(lease))

    def result(self, lease: dict[str, Any]) -> dict[str, Any]:
        """What the worker says of it: most often that it is done. No two deliveries have the same result."""
        said: dict[str, Any] = {"lease_id": lease["lease_id"], "node_id": self.name, "ok": not self.mischief(9)}
        mark = {"by": self.name, "attempt": lease["attempt"], "n": self.random.randrange(10**9)}
        if said["ok"]:
            return {**said, "result": mark}
        said["error"] = {"type": "Crash", **mark}
        if self.chance(20):
            said["retry"] = False
        elif self.chance(50):
            said["retry_after_seconds"] = self.random.choice((0, 0.1, 0.4))
        return said

    async def report(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Results, repeated after a lost answer and now and then for no reason. The leases that came along."""
        if self.chance(40) and not self.fleet.over:
            body = {**body, "pull": self.body()}
        exchange = await self.insist(path, body)
        if self.chance(6):
            await self.insist(path, {name: value for name, value in body.items() if name != "pull"})
        return exchange.leases
