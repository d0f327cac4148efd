"""What a hub does with five times the load that it can take: what it still gets done, what it answers, how it recovers.

A hub of its own for each store, with a short queue. First the best that it sustains: the better of connections that
submit a job and work one off in turn, and of as many that only submit beside as many that only work. Then the same
workers, while five times as many connections offer five times as many submits as that, at fixed moments whether or not
the hub keeps up. At the end submits come at half the best rate, until they are answered as fast as they were before.
Rounds repeat that; all figures are shares of one run on one machine.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from tools.bench import requests
from tools.bench.figures import Failed
from tools.bench.servers import ROOT, Hub, cores, hub, pinned

TIMES = 5
FULL = 1e6
"""More submits a second than anybody can send: the next goes out as soon as a connection is free."""
CALM = 0.5
"""Share of the best rate at which latencies are normal."""
KEPT, RECOVERED_SECONDS = 0.8, 10.0
"""What is asked: this share of the best throughput under overload, and this long until all is as before."""
WINDOW_SECONDS, CALM_WINDOWS, PATIENCE_SECONDS = 0.5, 3, 30.0
ALLOWED = frozenset({200, 201, 429, 503})

Chain = Generator[bytes, tuple[int, bytes], None]


class Connection:
    """One keep-alive connection; at most one request is under way."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.got = b""
        self.sent_at = 0.0
        self.chain: Chain | None = None

    def send(self, request: bytes) -> None:
        self.sent_at = time.perf_counter()
        self.sock.sendall(request)

    def read(self) -> tuple[int, bytes] | None:
        """(status, body) once all of it is there."""
        piece = self.sock.recv(1 << 18)
        if not piece:
            raise Failed("the hub closed a connection")
        self.got += piece
        end = self.got.find(b"\r\n\r\n")
        at = self.got.find(b"Content-Length: ", 0, end)
        if end < 0 or len(self.got) < end + 4 + int(self.got[at + 16 : self.got.index(b"\r", at)]):
            return None
        whole, self.got = self.got, b""
        return int(whole[9:12]), whole[end + 4 :]


class Crowd:
    """All clients of one hub, in one loop. `statuses` and `latencies` are of the phase that runs."""

    def __init__(self, port: int, token: str, clients: int) -> None:
        self.wire = requests.Wire(port, token)
        self.workers = [Connection(port) for _ in range(clients)]
        self.crowd = [Connection(port) for _ in range(clients * TIMES)]
        self.by_fd = {one.sock.fileno(): one for one in (*self.workers, *self.crowd)}
        self.poll = select.epoll()
        for fd in self.by_fd:
            self.poll.register(fd, select.EPOLLIN)
        self.greet()
        (self.submit,) = requests.submit(self.wire)
        self.statuses: Counter[int] = Counter()
        self.latencies: list[float] = []
        self.done = self.sent = 0
        self.over = False
        self.until = 0.0

    def greet(self) -> None:
        """Ask something on each connection: the hub cuts those that never do."""
        for one in self.by_fd.values():
            one.send(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            while one.read() is None:
                pass

    def begin(self) -> None:
        self.statuses, self.latencies, self.done, self.sent, self.over = Counter(), [], 0, 0, False

    def both(self, place: int) -> Chain:
        """Submits and works, in turn."""
        held: list[dict[str, Any]] = []
        while not self.over:
            yield self.submit
            held = yield from self.work(place, held, wait=0)
        yield from self.last(place, held)

    def only_works(self, place: int) -> Chain:
        """Works for as long as it may, waiting for jobs."""
        held: list[dict[str, Any]] = []
        while not self.over:
            held = yield from self.work(place, held, wait=1)
        yield from self.last(place, held)

    def work(self, place: int, held: list[dict[str, Any]], wait: int) -> Generator[bytes, tuple[int, bytes], Any]:
        """Ends what is held, and takes the next with the same request; what is held now."""
        pull = {"node_id": f"n{place}", "max": 1, "wait_seconds": wait}
        if not held:
            status, body = yield self.wire.post("/api/jobs/pull", orjson.dumps(pull))
            return orjson.loads(body)["jobs"] if status == 200 else []
        (lease,) = held
        result = {"lease_id": lease["lease_id"], "ok": True, "result": requests.RESULT, "pull": pull}
        status, body = yield self.wire.post(f"/api/jobs/{lease['job_id']}/result", orjson.dumps(result))
        if status != 200:
            return held
        self.done += 1
        return orjson.loads(body)["jobs"]

    def last(self, place: int, held: list[dict[str, Any]]) -> Chain:
        for lease in held:
            result = {"lease_id": lease["lease_id"], "ok": True, "result": None}
            yield self.wire.post(f"/api/jobs/{lease['job_id']}/result", orjson.dumps(result))

    def run(self, seconds: float, *, works: bool, offered: float, connections: int) -> float:
        """Run the workers' chains, and offer so many submits a second; jobs done a second."""
        self.begin()
        idle = deque(self.crowd[:connections])
        running = set(self.workers)
        for place, one in enumerate(self.workers):
            one.chain = self.only_works(place) if works else self.both(place)
            one.send(next(one.chain))
        began = time.perf_counter()
        until = self.until = began + seconds
        done = 0
        while running or len(idle) < connections:
            now = time.perf_counter()
            if now >= until and not self.over:
                self.over, done = True, self.done
            while idle and not self.over and now >= began + self.sent / (offered or 1e-9):
                self.sent += 1
                idle.popleft().send(self.submit)
            if now > until + 20:
                raise Failed(f"{len(running)} workers and {connections - len(idle)} others got no answer in 20 s")
            for fd, _ in self.poll.poll(0.002 if idle else 0.05):
                self.step(self.by_fd[fd], running, idle)
        return done / seconds

    def step(self, one: Connection, running: set[Connection], idle: deque[Connection]) -> None:
        answer = one.read()
        if answer is None:
            return
        self.statuses[answer[0]] += 1
        if one not in running:
            self.latencies.append(time.perf_counter() - one.sent_at)
            idle.append(one)
            return
        assert one.chain is not None
        try:
            one.send(one.chain.send(answer))
        except StopIteration:
            running.discard(one)

    def close(self) -> None:
        for one in self.by_fd.values():
            one.sock.close()


def p95_ms(latencies: list[float]) -> float:
    ordered = sorted(latencies)
    return ordered[int(0.95 * len(ordered))] * 1000 if ordered else 0.0


def recover(crowd: Crowd, rate: float, connections: int, normal_ms: float) -> float:
    """Seconds until submits are answered as fast as before, and stay so for a while."""
    ended, good = crowd.until, 0
    since = time.perf_counter()
    while good < CALM_WINDOWS and time.perf_counter() - ended < PATIENCE_SECONDS:
        began = time.perf_counter()
        crowd.run(WINDOW_SECONDS, works=True, offered=rate, connections=connections)
        fast = p95_ms(crowd.latencies) <= 2 * normal_ms + 5 and set(crowd.statuses) <= {200, 201}
        since = since if good else began
        good = good + 1 if fast else 0
    return since - ended if good else time.perf_counter() - ended


def cost(one: Hub, crowd: Crowd, seconds: float, **how: Any) -> tuple[float, float]:
    """(jobs done a second, jobs done for a second of the hub's CPU time: the same whatever else the machine does)"""
    spent = one.cpu_s()
    rate = crowd.run(seconds, **how)
    return rate, rate * seconds / (one.cpu_s() - spent)


def one_round(one: Hub, crowd: Crowd, given: argparse.Namespace) -> dict[str, Any]:
    clients = given.clients
    best, best_cpu = max(
        cost(one, crowd, given.seconds, works=False, offered=0, connections=0),
        cost(one, crowd, given.seconds, works=True, offered=FULL, connections=clients),
    )
    crowd.run(given.seconds / 2, works=True, offered=CALM * best, connections=clients)
    normal_ms = p95_ms(crowd.latencies)
    spent = time.process_time()
    kept, kept_cpu = cost(one, crowd, given.seconds, works=True, offered=TIMES * best, connections=clients * TIMES)
    busy = (time.process_time() - spent) / given.seconds
    statuses, answered = dict(crowd.statuses), len(crowd.latencies)
    refused_ms = p95_ms(crowd.latencies)
    recovered = recover(crowd, CALM * best, clients, normal_ms)
    return {
        "best jobs/s": best,
        "offered/s": TIMES * best,
        "answered/s": answered / given.seconds,
        "kept": kept / best,
        "kept of a CPU second": kept_cpu / best_cpu,
        "statuses": statuses,
        "normal p95 ms": normal_ms,
        "overload p95 ms": refused_ms,
        "recovered s": recovered,
        "client busy": busy,
    }


def measure(store: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    servers, clients = cores()
    environ = {"SHERATAN_MAX_QUEUE_DEPTH": str(given.depth)}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(pinned(clients))
        one = stack.enter_context(hub(Path(given.root), store, Path(folder), servers, uvloop=False, **environ))
        crowd = Crowd(one.port, one.token, given.clients)
        crowd.run(1, works=False, offered=0, connections=0)
        rounds = [one_round(one, crowd, given) for _ in range(given.rounds)]
        crowd.close()
        check(one)
    return rounds


def check(one: Hub) -> None:
    """Nothing may be left running, as every lease was ended."""
    left = one.ask("/metrics?format=json")["inflight_jobs"]
    if left:
        raise Failed(f"{left} jobs are still leased")


def verdict(rounds: list[dict[str, Any]]) -> tuple[bool, str]:
    kept = statistics.median(one["kept"] for one in rounds)
    recovered = max(one["recovered s"] for one in rounds)
    strange = sorted({status for one in rounds for status in one["statuses"]} - ALLOWED)
    good = kept >= KEPT and recovered <= RECOVERED_SECONDS and not strange
    return good, f"kept {kept:.0%} of its best, recovered within {recovered:.1f} s, other statuses: {strange or 'none'}"


def show(store: str, rounds: list[dict[str, Any]]) -> None:
    for one in rounds:
        figures = ", ".join(f"{name} {value:.2f}" for name, value in one.items() if isinstance(value, float))
        print(f"{store:7} {figures}; {one['statuses']}", flush=True)


def main() -> int:
    """0 when all stores do what is asked, 1 when one does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="append", choices=("memory", "sqlite", "file"), help="[sqlite and file]")
    parser.add_argument("--seconds", type=float, default=5, help="of each phase [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--clients", type=int, default=64, help="connections that give the best [%(default)s]")
    parser.add_argument("--depth", type=int, default=100, help="of the hub's queue [%(default)s]")
    parser.add_argument("--root", default=str(ROOT), help="checkout of the hub to be measured [this one]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    good = True
    told = {}
    for store in given.store or ["sqlite", "file"]:
        rounds = told[store] = measure(store, given)
        fine, words = verdict(rounds)
        good = good and fine
        if not given.json:
            show(store, rounds)
            print(f"{store:7} {words}", flush=True)
    if given.json:
        print(json.dumps(told, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
