"""Loads a running hub, for operators: how much it takes, how fast it answers, what it refuses.

Submits jobs of a kind of their own, leases them and returns results. With a rate, requests are due at fixed moments
whether or not the hub keeps up, and a latency counts from the moment a request was due; nothing is sent before. What
is still leased when time is up is ended, what stays queued is told; a run with --mix work=1 takes it away.
Longer than 300 lines so that it is one file, which runs wherever aiohttp and orjson are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson

DATA_URL, TOKEN = "http://127.0.0.1:8788", "shared-secret"
VERBS = ("submit", "bulk", "work")
WORK = ("pull", "result")
"""Requests after which something may still be leased."""

ANSWER_SECONDS, GRACE_SECONDS, LOST_PAUSE_SECONDS = 10.0, 15.0, 0.1
EXIT_UNREACHABLE, EXIT_REFUSED = 69, 77
TRY_AGAIN = (429, 502, 503, 504)
STEP = math.log(1.01)


class Latencies:
    """Milliseconds in steps of one percent, so that a long run takes no more memory than a short one."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.max_ms = 0.0

    def add(self, ms: float) -> None:
        self.counts[round(math.log(max(ms, 1e-3)) / STEP)] += 1
        self.max_ms = max(self.max_ms, ms)

    def quantile(self, share: float) -> float | None:
        """Milliseconds that this share of the answers took at most; None when there are none."""
        rank = math.ceil(share * self.counts.total())
        for step in sorted(self.counts):
            rank -= self.counts[step]
            if rank <= 0:
                return min(math.exp(step * STEP), self.max_ms)
        return None


@dataclass(slots=True)
class Verb:
    """What became of the requests of one verb; `lost` are those without an answer."""

    sent: int = 0
    lost: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    latencies: Latencies = field(default_factory=Latencies)

    def document(self, seconds: float) -> dict[str, Any]:
        quantiles = {f"p{share}_ms": self.latencies.quantile(share / 100) for share in (50, 95, 99)}
        return {
            "sent": self.sent,
            "per_second": self.sent / seconds,
            **quantiles,
            "max_ms": self.latencies.max_ms,
            "refused": dict(self.refused),
            "connection_errors": self.lost,
        }


class Load:
    """One run against one hub."""

    def __init__(self, session: aiohttp.ClientSession, given: argparse.Namespace) -> None:
        self.session, self.given = session, given
        self.verbs = {name: Verb() for name in ("submit", "bulk", "pull", "result")}
        self.held: deque[dict[str, Any]] = deque()
        self.submitted = self.completed = self.empty_pulls = self.working = self.slots = 0
        self.began = self.until = self.ended = time.monotonic()
        self.spent = 0.0
        self.changed = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        self.mix, self.weights = list(given.mix), list(given.mix.values())
        job = {"kind": given.kind, "params": {"text": "x" * given.params_bytes}}
        pull = {"node_id": f"load-{os.getpid()}", "kinds": [given.kind]}
        self.requests = {
            "submit": ("/api/jobs", orjson.dumps(job)),
            "bulk": ("/api/jobs", orjson.dumps({"jobs": [job] * given.bulk_jobs})),
            "pull": ("/api/jobs/pull", orjson.dumps(pull)),
        }

    def stop(self) -> None:
        """Time is up now."""
        self.until = min(self.until, time.monotonic())
        self.changed.set()

    def is_over(self) -> bool:
        return time.monotonic() >= self.until

    async def run(self) -> None:
        """Send for so many seconds, then end what is leased; 15 s later it is over, whatever the hub does."""
        self.began, self.spent = time.monotonic(), time.process_time()
        self.until = self.began + self.given.seconds
        with suppress(TimeoutError):
            async with asyncio.timeout(self.given.seconds + GRACE_SECONDS):
                await self.send_all()
                await asyncio.gather(*self.tasks)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.ended = time.monotonic()

    async def send_all(self) -> None:
        """Begin each request when it is due and a connection is free, until time is up and nothing is leased."""
        slot = 0
        while True:
            due = await self.due(slot)
            while len(self.tasks) >= self.given.concurrency:
                await self.change()
            if self.is_over() and not self.held:
                if not self.working:
                    return
                await self.change()
                continue
            self.begin(due)
            slot += 1
            self.slots += not self.is_over()
            if not self.given.rate:
                await asyncio.sleep(0)

    async def due(self, slot: int) -> float:
        """Wait until that request is due, or there is nothing left to send; when it is due, at once without a rate."""
        if not self.given.rate:
            return time.monotonic()
        due: float = self.began + slot / self.given.rate
        while (now := time.monotonic()) < due and (self.held or now < self.until):
            until = min(due, self.until) if now < self.until else due
            with suppress(TimeoutError):
                await asyncio.wait_for(self.change(), until - now)
        return due

    async def change(self) -> None:
        """Wait until a request has been answered, or it is time to stop."""
        self.changed.clear()
        await self.changed.wait()

    def begin(self, due: float) -> None:
        """Send what comes next: a result that waits goes first."""
        lease = self.held.popleft() if self.held else None
        verb = "result" if lease else random.choices(self.mix, self.weights)[0]
        verb = "pull" if verb == "work" else verb
        self.working += verb in WORK
        task = asyncio.create_task(self.send(verb, due if self.given.rate else time.monotonic(), lease))
        self.tasks.add(task)
        task.add_done_callback(self.sent)

    def sent(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self.changed.set()

    async def send(self, verb: str, due: float, lease: dict[str, Any] | None) -> None:
        """One request, counted whatever becomes of it. A lease that could not be ended is kept for another try."""
        one = self.verbs[verb]
        one.sent += 1
        try:
            status, answer = await self.post(*self.requests[verb] if lease is None else finish(lease))
        except asyncio.CancelledError:
            if lease is not None:
                self.held.append(lease)
            raise
        except (aiohttp.ClientError, TimeoutError):
            one.lost += 1
            if lease is not None:
                self.held.append(lease)
            await asyncio.sleep(LOST_PAUSE_SECONDS)
            return
        finally:
            self.working -= verb in WORK
        one.latencies.add((time.monotonic() - due) * 1000)
        if status >= 300:
            one.refused[f"{status} {answer.get('code', '')}".strip()] += 1
            if lease is not None and status in TRY_AGAIN:
                self.held.append(lease)
        else:
            self.take(verb, answer)

    async def post(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """(status, the answer if it is a JSON object)"""
        async with self.session.post(self.given.data_url.rstrip("/") + path, data=body) as reply:
            text = await reply.read()
        try:
            answer = orjson.loads(text)
        except ValueError:
            answer = {}
        return reply.status, answer if isinstance(answer, dict) else {}

    def take(self, verb: str, answer: dict[str, Any]) -> None:
        """Count what an answer brought."""
        if verb == "submit":
            self.submitted += 1
        elif verb == "bulk":
            for entry in answer.get("jobs", ()):
                self.submitted += entry["ok"]
                if not entry["ok"]:
                    self.verbs[verb].refused[f"{entry['status']} {entry['code']} (jobs of a bulk)"] += 1
        elif verb == "pull":
            self.held.extend(answer.get("jobs", ()))
            self.empty_pulls += not answer.get("jobs")
        else:
            self.completed += answer.get("status") == "completed"

    def document(self) -> dict[str, Any]:
        """What happened. `not_sent` were due, but no connection was free in time."""
        seconds = max(min(self.ended, self.until) - self.began, 1e-3)
        wanted = int((self.until - self.began) * self.given.rate)
        return {
            "seconds": seconds,
            "verbs": {name: verb.document(seconds) for name, verb in self.verbs.items() if verb.sent},
            "not_sent": max(0, wanted - self.slots),
            "kind": self.given.kind,
            "jobs_submitted": self.submitted,
            "jobs_completed": self.completed,
            "jobs_left_queued": max(0, self.submitted - self.completed - len(self.held)),
            "leases_left": len(self.held),
            "empty_pulls": self.empty_pulls,
            "cpu_share": (time.process_time() - self.spent) / (self.ended - self.began),
        }


def finish(lease: dict[str, Any]) -> tuple[str, bytes]:
    """(path, body) of a lease's result."""
    body = {"lease_id": lease["lease_id"], "ok": True, "result": {"text": "x" * 80}}
    return f"/api/jobs/{lease['job_id']}/result", orjson.dumps(body)


async def load(given: argparse.Namespace) -> dict[str, Any]:
    """Run it; Ctrl-C and SIGTERM end it early, and properly."""
    options: dict[str, Any] = {
        "connector": aiohttp.TCPConnector(limit=given.concurrency),
        "timeout": aiohttp.ClientTimeout(total=ANSWER_SECONDS),
        "headers": {"Authorization": f"Bearer {given.token}", "Content-Type": "application/json"},
    }
    async with aiohttp.ClientSession(**options) as session:
        one = Load(session, given)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, one.stop)
        await one.run()
    return one.document()


def show(told: dict[str, Any]) -> None:
    """The report for people."""
    print(f"{'verb':8}{'sent':>9}{'per s':>10}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'max ms':>10}{'lost':>7}")
    for name, verb in told["verbs"].items():
        times = "".join(f"{verb[key] or 0:10.2f}" for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms"))
        print(f"{name:8}{verb['sent']:9}{verb['per_second']:10.1f}{times}{verb['connection_errors']:7}")
    for name, verb in told["verbs"].items():
        for code, count in sorted(verb["refused"].items()):
            print(f"refused  {count} x {code}, of {name}")
    print(f"jobs     {told['jobs_submitted']} submitted, {told['jobs_completed']} completed", end=", ")
    print(
        f"{told['jobs_left_queued']} left queued, {told['leases_left']} left leased; {told['empty_pulls']} empty pulls"
    )
    if told["jobs_left_queued"]:
        print(f"         take them away: sheratan-hub queue purge --kind {told['kind']}")
    if told["not_sent"]:
        print(f"not sent {told['not_sent']} requests were due, but no connection was free: the hub is slower than that")
    if told["cpu_share"] > 0.9:
        print("this tool took a whole core: it may have been the limit, not the hub")


def mix(text: str) -> dict[str, float]:
    """`submit=8,bulk=1,work=1` as weights."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        weights[name] = float(weight or 1)
        if name not in VERBS or weights[name] < 0:
            raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(VERBS)} with a weight")
    if not sum(weights.values()):
        raise argparse.ArgumentTypeError("nothing to do")
    return weights


def parse(arguments: list[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").partition("\nLonger")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    url = os.environ.get("HUB_DATA_URL", DATA_URL)
    parser.add_argument("--data-url", default=url, help=f"the hub's data plane [HUB_DATA_URL; {DATA_URL}]")
    parser.add_argument("--token-file", type=Path, help="else SHERATAN_HUB_TOKEN_ACTIVE or SHERATAN_HUB_TOKEN")
    parser.add_argument(
        "--rate", type=float, default=50, help="requests a second; 0: as fast as possible [%(default)s]"
    )
    parser.add_argument("--concurrency", type=int, default=64, help="requests under way at most [%(default)s]")
    parser.add_argument("--seconds", type=float, default=10, help="how long to send [%(default)s]")
    parser.add_argument(
        "--mix", type=mix, default="submit=1,work=1", help="weights of submit, bulk, work [%(default)s]"
    )
    parser.add_argument("--bulk-jobs", type=int, default=100, help="jobs of a bulk [%(default)s]")
    parser.add_argument("--params-bytes", type=int, default=189, help="text in each job's params [%(default)s]")
    parser.add_argument(
        "--kind", default="load.test", help="kind of the jobs, which nobody else works on [%(default)s]"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    if given.rate < 0 or given.concurrency < 1 or given.seconds <= 0 or given.bulk_jobs < 1 or given.params_bytes < 0:
        parser.error("numbers must be positive")
    variables = ("SHERATAN_HUB_TOKEN_ACTIVE", "SHERATAN_HUB_TOKEN")
    given.token = next((os.environ[name] for name in variables if os.environ.get(name)), TOKEN)
    if given.token_file:
        given.token = given.token_file.read_text().strip()
    return given


def main(arguments: list[str] | None = None) -> int:
    """0 when the hub answered, 69 when it never did, 77 when it refused everything with 403."""
    given = parse(arguments)
    told = asyncio.run(load(given))
    print(json.dumps(told, indent=1)) if given.json else show(told)
    verbs = told["verbs"].values()
    answered = sum(verb["sent"] - verb["connection_errors"] for verb in verbs)
    refused = sum(count for verb in verbs for code, count in verb["refused"].items() if code.startswith("403"))
    if not answered:
        print(f"no answer from {given.data_url}", file=sys.stderr)
        return EXIT_UNREACHABLE
    return EXIT_REFUSED if refused >= answered else 0


if __name__ == "__main__":
    sys.exit(main())
