"""The clients of a crash run: what they share, producers, and one that only looks. Workers: `tools/crash_worker.py`.

What they choose to do comes from the run's seed; what then happens, and when, does not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from time import monotonic
from typing import Any

import aiohttp

from tools.crash_history import SUBMIT, Exchange, History

PATIENCE_SECONDS = 20.0
"""How long a client waits for an answer; far longer than any should take."""

TRIES = 200
BACKLOG = 120
KINDS = ("crash.a", "crash.b")


@dataclass
class Fleet:
    """What all clients of a run share. `open`: the hub has been started and clients may talk; `calm`: no more mischief.

    `submitting` and `over` end the producers and the rest. `backlog` is how many jobs were unfinished when last looked.
    `trap` is called at the next acknowledgement, at once. `held` has the last lease of each job that a worker was told.
    """

    session: aiohttp.ClientSession
    url: str
    history: History
    seed: int
    open: asyncio.Event = field(default_factory=asyncio.Event)
    rush: asyncio.Event = field(default_factory=asyncio.Event)
    calm: bool = False
    submitting: bool = True
    over: bool = False
    backlog: int = 0
    trap: Callable[[], None] | None = None
    job_ids: list[str] = field(default_factory=list)
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    keyed: list[dict[str, Any]] = field(default_factory=list)


class Client:
    """One client: asks, and writes down what it asked and what it was told."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet, self.name = fleet, name
        self.random = Random(f"{fleet.seed}/{name}")
        self.count = 0

    def chance(self, percent: float) -> bool:
        """True so often."""
        return self.random.random() * 100 < percent

    def mischief(self, percent: float) -> bool:
        """True so often, but never once the fleet is calm."""
        return self.chance(percent) and not self.fleet.calm

    async def pause(self, low: float, high: float) -> None:
        """Some seconds; half of the pauses end when the rush begins, so that a kill meets many requests."""
        seconds = self.random.uniform(low, high)
        if self.chance(50):
            await asyncio.sleep(seconds)
        else:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.fleet.rush.wait(), seconds)
            await asyncio.sleep(0)

    async def ask(self, path: str, body: Any = None, patience: float = PATIENCE_SECONDS) -> Exchange:
        """One request, written down before it is sent; its answer, written down once it is whole."""
        await self.fleet.open.wait()
        exchange = Exchange(self.name, "GET" if body is None else "POST", path, body, monotonic())
        self.fleet.history.exchanges.append(exchange)
        timeout = aiohttp.ClientTimeout(total=patience)
        try:
            async with self.fleet.session.request(
                exchange.method, self.fleet.url + path, json=body, timeout=timeout
            ) as answer:
                text = await answer.read()
                if self.fleet.trap is not None and exchange.method == "POST" and answer.ok:
                    self.fleet.trap()
                said = json.loads(text)
        except aiohttp.ClientConnectorError:
            exchange.reached = False
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            pass
        else:
            exchange.done, exchange.status, exchange.answer = monotonic(), answer.status, said
        return exchange

    async def reach(self, path: str, body: Any, patience: float = PATIENCE_SECONDS) -> Exchange:
        """Send a request once, as soon as there is a hub to send it to."""
        for _ in range(TRIES):
            exchange = await self.ask(path, body, patience)
            if exchange.reached:
                break
            await self.pause(0.005, 0.05)
        return exchange

    async def insist(self, path: str, body: Any, patience: float = PATIENCE_SECONDS) -> Exchange:
        """Repeat the same request blindly until it is answered; now and then give up instead."""
        for count in range(TRIES):
            exchange = await self.ask(path, body, patience)
            if exchange.status and exchange.status not in (429, 500, 503):
                break
            if exchange.reached and self.mischief(8):
                break
            patience = PATIENCE_SECONDS
            if count or not exchange.reached:
                await self.pause(0.005, 0.05)
        return exchange


class Producer(Client):
    """Hands in jobs: one by one and many, with keys and without, again and again."""

    async def run(self) -> None:
        """Until the fleet submits no more."""
        while self.fleet.submitting:
            if self.fleet.backlog > BACKLOG and not self.fleet.rush.is_set():
                await self.pause(0.02, 0.1)
            elif self.chance(35):
                await self.many()
            elif self.fleet.keyed and self.chance(15):
                await self.submit(self.random.choice(self.fleet.keyed))
            else:
                await self.one()
            await self.pause(0.0, 0.06)

    async def one(self) -> None:
        """A single submit. With a key it is repeated after a lost answer, and now and then for no reason."""
        job = self.job(keyed=self.chance(60))
        if "idempotency_key" not in job:
            await self.submit(job)
        elif self.chance(20):
            await asyncio.gather(*(self.submit(job) for _ in range(3)))
        else:
            for _ in range(self.random.choice((1, 1, 1, 2, 3))):
                await self.submit(job)

    async def many(self) -> None:
        """A batch, atomic or not. It is repeated only if all of it has keys."""
        keyed = self.chance(50)
        jobs = [self.job(keyed=keyed or self.chance(30)) for _ in range(self.random.randint(2, 15))]
        body: dict[str, Any] = {"jobs": jobs}
        if self.chance(50):
            body["atomic"] = True
        exchange = await (self.insist if keyed else self.reach)(SUBMIT, body)
        for outcome in exchange.answer["jobs"] if exchange.acknowledged else ():
            self.learn(outcome)

    def job(self, *, keyed: bool) -> dict[str, Any]:
        """A job that there was none like before."""
        self.count += 1
        tag = f"{self.name}-{self.count}"
        size = self.random.choice((0, 10, 300, 3000))
        job: dict[str, Any] = {
            "kind": self.random.choice(KINDS),
            "params": {"tag": tag, "pad": "x" * size},
            "priority": self.random.randint(0, 3),
            "max_retries": 0 if self.chance(4) else 1000,
        }
        if self.chance(8):
            job["delay_seconds"] = self.random.choice((0.1, 0.5))
        if keyed:
            job["idempotency_key"] = f"key of {tag}"
            self.fleet.keyed.append(job)
        return job

    async def submit(self, job: dict[str, Any]) -> None:
        """Hand it in, again after a lost answer if it has a key."""
        exchange = await (self.insist if "idempotency_key" in job else self.reach)(SUBMIT, job)
        if exchange.acknowledged:
            self.learn(exchange.answer)

    def learn(self, outcome: dict[str, Any]) -> None:
        """Remember a job that is new."""
        if outcome.get("ok") and not outcome["dedup"]:
            self.fleet.job_ids.append(outcome["job_id"])


class Watcher(Client):
    """Looks at jobs, and at some until their end."""

    async def run(self) -> None:
        """Until the fleet is over."""
        while not self.fleet.over:
            if self.fleet.job_ids:
                recent = self.fleet.job_ids[-300:]
                wait = self.random.choice(("", "", "?wait_seconds=0.5"))
                await self.ask(f"/api/jobs/{self.random.choice(recent)}{wait}")
            await self.pause(0.01, 0.08)


async def ask_again(fleet: Fleet, most: int) -> None:
    """After all is done: repeat submits by key, and results, that were acknowledged. Nothing may change by it."""
    client = Client(fleet, "checker")
    said = [one for one in fleet.history.exchanges if one.acknowledged and one.method == "POST"]
    submits = [one for one in said if one.path == SUBMIT]
    keyed = [job for one in submits for job in one.body.get("jobs", [one.body]) if "idempotency_key" in job]
    for job in client.random.sample(keyed, min(most, len(keyed))):
        await client.ask(SUBMIT, job)
    results = [one for one in said if one.path.endswith("/result")]
    for one in client.random.sample(results, min(most, len(results))):
        await client.ask(one.path, {name: value for name, value in one.body.items() if name != "pull"})


async def read_jobs(fleet: Fleet) -> list[dict[str, Any]]:
    """Every job that the hub lists."""
    jobs: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = await read(fleet, f"{SUBMIT}?limit=1000{cursor}")
        jobs += page["jobs"]
        if page["next_cursor"] is None:
            return jobs
        cursor = f"&cursor={page['next_cursor']}"


async def read(fleet: Fleet, path: str) -> dict[str, Any]:
    """A GET of the run itself: no client's knowledge."""
    async with fleet.session.get(fleet.url + path) as answer:
        return dict(await answer.json())


async def listens(fleet: Fleet) -> bool:
    """Whether the hub is ready."""
    with suppress(aiohttp.ClientError, TimeoutError, ConnectionError):
        async with fleet.session.get(f"{fleet.url}/readyz", timeout=aiohttp.ClientTimeout(total=2)) as answer:
            return answer.status == 200
    return False
